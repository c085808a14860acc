"""Checkpoints: written whole or not at all, read without running code, and exchanged with nanoGPT.

A checkpoint is a dict of tensors and plain values. nanoGPT's keys: model, optimizer, model_args, iter_num,
best_val_loss, config. Ours besides: tokenizer, scaler, tokens_seen, evaluated, versions. `ckpt.pt` is what to use (the
best, or the latest with always_save_checkpoint); `last.pt` is where a run goes on.

No random state is kept, because there is none: data and dropout follow from config["seed"] and iter_num.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pickle
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import dataset
import files
import hf_folder
import lora
import runtime
import tokenizer
from configurator import UserError
from curves import LOG, PICTURE
from model import CAUSAL_MASKS, GPT, GPT2_MODELS, GPTConfig
from optimizer import moment_names

BEST, LAST, ADAPTER, LAUNCH = "ckpt.pt", "last.pt", "adapter.pt", ".launch"
KEPT = "what was saved before is untouched"
ZIP_FOLDER = 0x10  # among an archive entry's external attributes
# nanoGPT may store best_val_loss as a numpy scalar: a dtype and its bytes, no code.
_NUMPY_SCALAR = [
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


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


def save(path: Path, state: dict) -> None:
    """Writes `state` to `path` so that the path holds the old file or the new one, never a part.

    Raises UserError where the disk refuses, or a tensor is not finite; the old file is then still there.
    """
    with files.writing(path, KEPT):
        write(path, state)


def write(path: Path, state: dict) -> None:
    """As save; raises OSError, or a library's error that stands for one, where the disk refuses."""
    for name, tensor in _tensors("", state):
        if not tensor.isfinite().all():
            raise UserError(
                f"the run diverged: {name} is not finite, and {path} was left as it was; lower learning_rate and resume"
            )
    # Into a file, not to a name: then what the operating system says stands behind the error of torch's zip writer
    with files.whole(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def save_shards(path: Path, plain: dict, model: GPT, optimizer: torch.optim.Optimizer, is_master: bool) -> None:
    """As save, of a run of several processes, each of which writes its own part into the folder `path`.

    plain: all but the tensors of model and optimizer. All processes have to call it.
    """
    import sharding

    partial, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    if is_master:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with files.writing(path, KEPT):
            steps = sharding.save(partial, model, optimizer)
            if is_master:
                write(partial / "plain.pt", {"model": {}, **plain, "steps": steps})
                if path.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(path, old)
                files.replace(partial, path)
                drop_other_forms(path)
    finally:
        if is_master:
            shutil.rmtree(partial, ignore_errors=True)


def drop_other_forms(path: Path) -> None:
    """Once a checkpoint is saved as a file, or as shards, what it was before in the other form is stale."""
    for form in map(path.with_name, forms(path.with_suffix(".pt").name)):
        if form != path and form.exists():
            shutil.rmtree(form) if form.is_dir() else form.unlink()


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), part)


def prepare_folder(out_dir: str) -> None:
    """Creates out_dir and makes sure that a file can be written there."""
    with files.writing(f"out_dir {out_dir!r}"):
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()


def began(out_dir: str, launch: str) -> None:
    """Notes in out_dir which launch its run belongs to; torchrun's restarts of it find that by `is_of`."""
    with files.writing(Path(out_dir) / LAUNCH):
        (Path(out_dir) / LAUNCH).write_text(launch, encoding="utf-8")


def forget_launch(out_dir: str) -> None:
    """Before a launch that is no restart: what an earlier one of the same name left is not its own."""
    with contextlib.suppress(OSError):
        (Path(out_dir) / LAUNCH).unlink(missing_ok=True)


def is_of(out_dir: str, launch: str) -> bool:
    """Whether out_dir holds a checkpoint of a run that this launch began."""
    path = Path(out_dir) / LAUNCH
    begun = any((Path(out_dir) / form).exists() for form in forms(LAST))
    return begun and path.is_file() and path.read_text(encoding="utf-8") == launch


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


def forms(name: str) -> list[str]:
    """Of a checkpoint: the file, the folder of shards, and what that is called while it is being replaced."""
    return [name, name.replace(".pt", ".dcp"), name.replace(".pt", ".dcp.old")]


def _found(folder: str) -> list[Path]:
    found = [Path(folder) / form for name in (BEST, LAST) for form in forms(name)]
    return [path for path in found if path.is_file() or (path / "plain.pt").is_file()]


def _existing(out_dir: str) -> list[Path]:
    if not (found := _found(out_dir)):
        raise UserError(f"no checkpoint in {out_dir!r}: train one with --out_dir={out_dir}, or name another folder")
    return found


def load(path: Path) -> dict:
    """Reads a checkpoint, ours or nanoGPT's, to the CPU, in our form. Hidden code is not run.

    Raises UserError for a file that is truncated, holds more than tensors and plain values, or is no GPT checkpoint.
    """
    if path.is_dir():  # shards, which sharding.load reads
        return {**load(path / "plain.pt"), "path": path, "model": None}
    _check_sums(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY_SCALAR):
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles say less than the errors below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values; it was not loaded") from error
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{path} can't be read; is it truncated? ({str(error)[:300]})") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of a GPT: it has no 'model'")
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    args = state.get("model_args")
    if not isinstance(args, dict) or not {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"} <= args.keys():
        raise UserError(f"{path} is no checkpoint of a GPT: its model_args are missing or incomplete")
    if unknown := args.keys() - fields:
        raise UserError(f"{path} holds a model that is unknown here: {', '.join(sorted(map(str, unknown)))}")
    try:
        model = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in state["model"].items()
            if not name.endswith(CAUSAL_MASKS)
        }
        best, iter_num = float(state.get("best_val_loss", math.inf)), int(state.get("iter_num", 0))
        plain = {"best_val_loss": math.inf if math.isnan(best) else best, "iter_num": max(0, iter_num)}
        return {**state, **plain, "model": model, "config": dict(state.get("config") or {}), "path": path}
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is no checkpoint of a GPT: {error}") from error


def _check_sums(path: Path) -> None:
    """Compares what the file holds with the sums that torch has stored in it, which torch.load does not do."""
    try:
        if not zipfile.is_zipfile(path):  # the format of before 2020, or no checkpoint: torch.load will tell
            return
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            if folders := [info.filename for info in file.infolist() if info.external_attr & ZIP_FOLDER]:
                raise zipfile.BadZipFile(f"{folders[0]} calls itself a folder, of which torch would read nothing")
    except Exception as error:  # zipfile lets pass what its decompressors raise
        raise UserError(f"{path} is damaged ({error})") from error
    if damaged:
        raise UserError(f"{path} is damaged: the sum of {damaged} in it is wrong")


def build_model(state: dict, dropout: float = 0.0, keep_adapters: bool = False) -> GPT:
    """The model that a loaded checkpoint describes, with its weights. Raises UserError where the two do not match.

    Adapters are merged, unless keep_adapters, as to train them on. Of shards, several processes get no weights yet:
    sharding.load gives each its part.
    """
    if state["model"] is None:
        try:
            model = GPT(_config(state["model_args"], dropout))
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{state['path']} describes no GPT: {error}") from error
        if not torch.distributed.is_initialized():
            import sharding

            sharding.load(state, model, None)
        return model
    tied = [state["model"].get(name) for name in ("lm_head.weight", "transformer.wte.weight")]
    try:
        config = _config(state["model_args"], dropout)
        if config.tie_embeddings and all(map(torch.is_tensor, tied)) and not torch.equal(*tied):
            raise ValueError("its input and output embeddings differ, where this model's are one")
        if config.n_layer > len(state["model"]):
            raise ValueError(f"it has no weights for {config.n_layer} layers")
        adapted = state.get("lora")
        with torch.device("meta"):
            model = GPT(config)
            if adapted:
                lora.attach(model, adapted["rank"], float(adapted["alpha"]))
        model.load_weights(state["model"])
        if adapted and not keep_adapters:
            lora.merge(model)
    except (ValueError, TypeError, RuntimeError, OverflowError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{state['path']} does not hold the weights that its model_args describe: {error}") from error
    return model


def _config(model_args: dict, dropout: float) -> GPTConfig:
    """Raises ValueError or TypeError where an argument is not of its type."""
    args = {**model_args, "dropout": dropout}
    for field in dataclasses.fields(GPTConfig):
        value = args.get(field.name, field.default)
        args[field.name] = float(value) if (field.type, type(value)) == (float, int) else value
        if type(args[field.name]) is not field.type:
            raise ValueError(f"{field.name} is no {field.type.__name__}")
    return GPTConfig(**args)


def pretrained(name: str, dropout: float = 0.0) -> tuple[GPT, dict | None]:
    """A model to begin with, and its tokenizer as plain data, None where there is none.

    name: one of GPT2_MODELS, which is downloaded; or a folder (hf:PATH too) in Hugging Face's layout, or with a
    checkpoint. Raises UserError where it holds neither, or something that is not computed here.
    """
    told, name = name, name.removeprefix("hf:")
    if os.path.isdir(name) and not (Path(name) / "config.json").exists() and _found(name):
        state = load_to_use(name)
        return build_model(state, dropout), _tokenizer_of(state)
    try:
        model = GPT.from_pretrained(name, {"dropout": dropout})
    except ModuleNotFoundError as error:
        raise UserError(f"init_from={told} needs the {error.name} package: pip install -e .[hf]") from error
    except (ValueError, OSError) as error:
        raise UserError(f"init_from={told}: {error}") from error
    data = hf_folder.read_tokenizer(Path(name)) if os.path.isdir(name) else {"type": "gpt2"}
    is_gpt2 = (model.config.arch, model.config.vocab_size) == ("gpt2", tokenizer.GPT2Tokenizer.vocab_size)
    if data is None and is_gpt2 and hf_folder.may_be_gpt2(Path(name)):
        data = {"type": "gpt2"}
    return model, data


def _tokenizer_of(state: dict) -> dict | None:
    name = str(state["config"].get("dataset"))
    return state.get("tokenizer") or dataset.tokenizer_of(name, state["model_args"]["vocab_size"])


def check_source(init_from: str, out_dir: str) -> None:
    """Raises UserError where init_from is neither resume, with a checkpoint in out_dir, nor a GPT-2 or a folder."""
    if init_from == "resume":
        to_use(out_dir)
    elif init_from not in GPT2_MODELS and not os.path.isdir(init_from.removeprefix("hf:")):
        raise UserError(f"init_from={init_from} is not resume, {', '.join(GPT2_MODELS)}, nor a folder")


def model_and_tokenizer(init_from: str, out_dir: str, adapter: str = "") -> tuple[GPT, dict | None, dict]:
    """The model to sample or evaluate: with init_from="resume" that of the checkpoint in out_dir, else from elsewhere.

    adapter: a file that `train.py --lora_rank` wrote, to be merged. Returns the model on the CPU; its tokenizer as
    plain data, None where its data set has none; and what else the checkpoint holds, without weights and moments, {}
    for one from elsewhere. Shards are read whole, so several processes call it before they form a group. Raises
    UserError where anything is missing, damaged, or does not fit the rest.
    """
    if init_from != "resume":
        (model, data), state = pretrained(init_from), {}
    else:
        state = load_to_use(out_dir)
        model = build_model(state)
        data = _tokenizer_of(state)
        state = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    if adapter and state.get("lora"):
        raise UserError(f"the checkpoint in {out_dir} has its adapters in it: leave out adapter={adapter}")
    if adapter:
        merge_adapter(model, Path(adapter))
    if data is not None:
        tokenizer.check_data(data, model.config.vocab_size)
    return model, data, state


def merge_adapter(model: GPT, path: Path) -> None:
    """Merges the adapters in `path` with the model that they were trained on. Raises UserError where they don't fit."""
    state = load(path)
    try:
        if state["base"] != lora.fingerprint(model.state_dict()):
            raise ValueError("it was trained beside other weights")
        lora.attach(model, state["lora"]["rank"], float(state["lora"]["alpha"]))
        left = model.load_state_dict(state["model"], strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not fit this model: {error}") from error
    if left.unexpected_keys or any(name.endswith(lora.PARTS) for name in left.missing_keys):
        raise UserError(f"{path} does not fit this model: it has adapters for other layers")
    lora.merge(model)


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict) -> None:
    """Gives `optimizer` the moments and step counts of a loaded checkpoint; its rates, decay and kernels stay its own.

    Parameters are found by name, in nanoGPT's files by their place. Position embeddings that were cropped lose the
    moments of the rows that are gone.
    """
    saved, own = checkpoint["optimizer"], optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        theirs = saved["param_groups"]
        if all("param_names" in group for group in (*theirs, *own)):  # then the groups may have been split otherwise
            indices = {n: i for group in theirs for n, i in zip(group["param_names"], group["params"], strict=True)}
            order = [indices[name] for group in own for name in group["param_names"]]
        elif [len(group["params"]) for group in theirs] == [len(group["params"]) for group in own]:
            order = [index for group in theirs for index in group["params"]]
        else:
            raise ValueError("its groups hold other numbers of parameters")
        if len(set(order)) < len(order):
            raise ValueError("two of its parameters are one")
        keys = [moment_names(group) for group in own for _ in group["params"]]
        state = {}
        for index, (old, names, parameter) in enumerate(zip(order, keys, parameters, strict=True)):
            if old in saved["state"]:
                moments = saved["state"][old]
                state[index] = {n: moments[n] if n == "step" else _fitted(moments[n], parameter) for n in names}
                if state[index].get("step", torch.zeros(())).numel() != 1:
                    raise ValueError("a count of steps is no single number")
        if saved["state"] and len(state) < len(parameters):
            raise ValueError("some of its parameters have no moments")
        optimizer.load_state_dict({"state": state, "param_groups": own})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint['path']}: its optimizer does not fit this model ({error})") from error


def _fitted(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Moments as the parameter wants them: cropped, and divided among the processes."""
    if value.shape != parameter.shape and value.dim():
        value = value[: parameter.size(0)].clone()
    if value.shape != parameter.shape:
        raise ValueError(f"moments of shape {tuple(value.shape)} for weights of shape {tuple(parameter.shape)}")
    return runtime.divided_like(value, parameter)
