"""out_dir, the folder of a run: who writes there, which checkpoint is which, and what becomes of an earlier run.

Read it when a run is resumed, or finds another one's files. `ckpt.pt` is what to use (the best, or the latest with
always_save_checkpoint); `last.pt` is where a run goes on. Either may be a folder of shards, ckpt.dcp or last.dcp.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from model import GPT
from quartz import checkpoint, files, lora, ranks
from quartz.checkpoint import Progress, drop_other_forms, forms, load, save_shards
from quartz.curves import LOG, PICTURE
from quartz.errors import UserError

BEST, LAST, ADAPTER, LAUNCH = "ckpt.pt", "last.pt", "adapter.pt", ".launch"


@contextlib.contextmanager
def claimed(out_dir: str) -> Iterator[None]:
    """Holds out_dir for this process, so that no second run writes there, and clears what a killed one left half done.

    Raises UserError where another run does.
    """
    with files.claimed(out_dir, "run") as is_certain:
        with files.writing(out_dir):
            for leftover in Path(out_dir).glob("*.pt.tmp") if is_certain else ():
                leftover.unlink()
            for leftover in Path(out_dir).glob("*.dcp.tmp") if is_certain else ():
                shutil.rmtree(leftover)
        yield


def prepare_folder(out_dir: str) -> None:
    """Creates out_dir and makes sure that a file can be written there."""
    with files.writing(f"out_dir {out_dir!r}"):
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()


def after_restart(out_dir: str, init_from: str, is_writing: bool, place: torch.device) -> str:
    """What a run begins from: init_from, or resume where torchrun has restarted it. All ranks have to call it.

    Its note in out_dir tells the checkpoint of an earlier attempt from that of an earlier run.
    """
    note = Path(out_dir) / LAUNCH
    restarted = ranks.any_of(ranks.attempt() > 0, place)
    if is_writing and not restarted:  # what an earlier launch of the same name left is not its own
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
    if not restarted or init_from == "resume":
        return init_from
    is_ours = is_writing and note.is_file() and note.read_text(encoding="utf-8") == ranks.launch_id()
    goes_on = is_ours and any((Path(out_dir) / form).exists() for form in forms(LAST))
    return "resume" if ranks.any_of(goes_on, place) else init_from


def begin(out_dir: str, is_new: bool) -> None:
    """Readies out_dir for a run that is about to write: a new one moves an earlier one's files aside."""
    if is_new:
        set_aside(Path(out_dir))
    if "RANK" in os.environ:
        with files.writing(Path(out_dir) / LAUNCH):
            (Path(out_dir) / LAUNCH).write_text(ranks.launch_id(), encoding="utf-8")


def save(
    out_dir: str,
    plain: dict,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    processes: ranks.Processes,
    progress: Progress,
    names: list[str],
    is_writing: bool = True,
    in_shards: bool = False,
    adapted: dict | None = None,
    base: str = "",
) -> None:
    """Saves the run under each of the names, BEST or LAST. All ranks have to call it; one writes, all with in_shards.

    plain: what stays the same through the run. adapted: the rank and alpha of adapters, which get a file of their own,
    and base, the fingerprint of the weights beside them.
    """
    versions = {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    contents = {**plain, **dataclasses.asdict(progress), "scaler": scaler.state_dict(), "versions": versions}
    paths = [Path(out_dir) / name for name in names]
    if in_shards:
        for path in paths:
            save_shards(path.with_suffix(".dcp"), contents, model, optimizer, is_writing)
        return
    contents["model"] = ranks.gather(model.state_dict(), processes)
    if adapted:
        contents["lora"] = adapted
        if is_writing and BEST in names:  # what there is to pass on
            by_itself = {"model": lora.adapters(contents["model"]), "model_args": plain["model_args"], "lora": adapted}
            checkpoint.save(Path(out_dir) / ADAPTER, {**by_itself, "base": base})
    contents["optimizer"] = ranks.gather(optimizer.state_dict(), processes)
    for path in paths if is_writing else ():
        checkpoint.save(path, contents)
        drop_other_forms(path)


def set_aside(out_dir: Path) -> None:
    """Moves an earlier run's files out of the way, into out_dir/previous, previous-2, … : nothing is overwritten."""
    found = [out_dir / name for name in (*forms(BEST), *forms(LAST), ADAPTER, LOG, PICTURE)]
    found = [path for path in found if path.exists()]
    if all(path.name in (LOG, PICTURE) for path in found):
        return
    names = itertools.chain(["previous"], (f"previous-{n}" for n in itertools.count(2)))
    folder = next(out_dir / name for name in names if not (out_dir / name).exists())
    print(f"{out_dir} holds an earlier run; it is moved to {folder}")
    with files.writing(folder):
        folder.mkdir()
        for path in found:
            os.replace(path, folder / path.name)


def to_use(out_dir: str) -> Path:
    """The checkpoint to sample or evaluate: ckpt.pt, or last.pt before there is one. UserError if neither is there."""
    return _existing(out_dir)[0]


def load_to_use(out_dir: str) -> dict:
    """The loaded checkpoint to sample or evaluate; where ckpt.pt is damaged, last.pt with a warning."""
    return next(_states(_existing(out_dir)))


def load_furthest(out_dir: str) -> dict:
    """The loaded checkpoint that is furthest on: last.pt, unless nanoGPT has carried ckpt.pt on since."""
    return max(_states(_existing(out_dir)[::-1]), key=lambda state: state["iter_num"])


def _states(paths: list[Path]) -> Iterator[dict]:
    """Loads one after the other, and passes over those that are damaged: with a warning, so long as another serves."""
    problems, serves = [], False
    for path in paths:
        try:
            state = load(path)
        except UserError as error:
            problems += error.problems
            continue
        _tell(problems)
        problems, serves = [], True
        yield state
    if not serves:
        raise UserError(*problems)
    _tell(problems)


def _tell(problems: list[str]) -> None:
    for problem in problems:
        print(f"warning: {problem}; the other checkpoint serves", file=sys.stderr)


def found(folder: str) -> list[Path]:
    """The checkpoints in a folder, the one to use first."""
    paths = [Path(folder) / form for name in (BEST, LAST) for form in forms(name)]
    return [path for path in paths if path.is_file() or (path / "plain.pt").is_file()]


def _existing(out_dir: str) -> list[Path]:
    if not (paths := found(out_dir)):
        raise UserError(f"no checkpoint in {out_dir!r}: train one with --out_dir={out_dir}, or name another folder")
    return paths
