"""Every path of this program on a GPU, proved and measured by one command; docs/gpu.md tells of its runs.

    make gpu                                        # about 20 minutes; needs torch and numpy alone
    make gpu DEVICE=cpu                             # at toy sizes on a CPU, which shows that the command itself runs
    python tests/gpu.py --only=training,decoding    # some of the steps, in their order
    python tests/gpu.py --minutes=9                 # what fits into that, the most useful first; then
    python tests/gpu.py --minutes=9 --rest          # the others

Each step is a process of its own (tests/gpu_steps.py) with a limit of time: what crashes, hangs or runs out of memory
is told of, and the next one goes on. A figure is written as soon as it is known: gpu.jsonl holds a line of JSON for
each, gpu.md the same as a table, anew after each step, gpu.log what the steps printed. The exit status is 1 where a
check failed or a step did not end well. A goal that is missed is no failure, and what lacks a package is left out.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from quartz import machine
from quartz.errors import user_errors

PROGRAM = ROOT / "tests" / "gpu_steps.py"  # of the steps
LEAST_SECONDS = 20  # that a step is begun with


class Step(NamedTuple):
    seconds: int  # after which it is ended
    what: str


STEPS = {  # in the order of worth: a run may be cut off
    "machine": Step(90, "what is there, and its peaks"),
    "agreement": Step(150, "numbers beside the CPU's"),
    "tests": Step(240, "tests/test_cuda.py"),
    "resume": Step(240, "a run that is cut and resumed ends in the same bits"),
    "graphs": Step(150, "the compiled model, and the CUDA graph's texts"),
    "training": Step(330, "updates beside nanoGPT's way"),
    "decoding": Step(180, "tokens beside nanoGPT's way, and the share of the memory's speed"),
    "shakespeare": Step(150, "the preset's time to nanoGPT's loss"),
    "waits": Step(120, "what an update waits for"),
    "large": Step(270, "1.5B parameters"),
    "fsdp": Step(180, "one process of torchrun with FSDP2, and checkpoints in shards"),
    "fp8": Step(240, "products in 8 bits: their errors, losses, speed"),
    "serving": Step(120, "texts that many ask for at once"),
}
FAILED = ("crashed", "out of time")  # ways to end


def run_step(name: str, seconds: float, options: argparse.Namespace, work: str) -> dict:
    """Runs a step; returns how it ended. What it prints goes to gpu.log."""
    log = options.folder / "gpu.log"
    command = [sys.executable, "-u", str(PROGRAM), name, f"--device={options.device}"]
    command += [f"--results={options.folder / 'gpu.jsonl'}", f"--work={work}", f"--text={options.text}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), stand_ins(work)]), "WANDB_MODE": "disabled"}
    began = time.monotonic()
    with open(log, "ab") as file:
        file.write(f"\n=== {name}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=work, start_new_session=True
        )  # a session, so that all that it has started ends with it
        try:
            code = process.wait(timeout=seconds)
            ended = "done" if code == 0 else "crashed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with open(log, "rb") as file:
        file.seek(start)
        last = file.read().decode("utf-8", "replace").strip().splitlines()[-8:]
    found = {"step": name, "ended": ended, "seconds": round(time.monotonic() - began, 1)}
    return found if ended == "done" else found | {"last_lines": last}


def stand_ins(work: str) -> str:
    """A folder for PYTHONPATH with the least of tqdm, where that is missing: a bar is no reason to run nothing."""
    folder = Path(work) / "stand_ins"
    folder.mkdir(exist_ok=True)
    try:
        import tqdm  # noqa: F401
    except ImportError:
        (folder / "tqdm.py").write_text(
            "class tqdm:\n"
            "    def __init__(self, over=(), **settings): self.over = over\n"
            "    def __iter__(self): return iter(self.over)\n"
            "    def __enter__(self): return self\n"
            "    def __exit__(self, *error): pass\n"
            "    def update(self, count=1): pass\n"
            "    def close(self): pass\n"
            "    write = staticmethod(print)\n"
        )
    return str(folder)


def add(folder: Path, record: dict) -> None:
    """Appends a line to gpu.jsonl, and has gpu.md tell all of it."""
    with open(folder / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    partial = folder / "gpu.md.tmp"
    partial.write_text(table(records(folder)), encoding="utf-8")
    os.replace(partial, folder / "gpu.md")


def records(folder: Path) -> list[dict]:
    """The lines of gpu.jsonl; of a step that was run again, the last time alone. One that was cut off is left out."""
    found: dict[str, list[dict]] = {}
    lines = (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "gpu.jsonl").exists() else ()
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            its = found.setdefault(record["step"], [])
            if its and "ended" in its[-1]:
                its.clear()
            its.append(record)
    return [record for its in found.values() for record in its]


def number(value: object) -> str:
    if not isinstance(value, float) and (isinstance(value, bool) or not isinstance(value, int)):
        return {True: "yes", False: "no", None: ""}.get(value, str(value))
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.4g}"


def table(found: list[dict]) -> str:
    """What was measured, as Markdown."""
    begun = [record for record in found if "begins" in record]
    where = begun[-1]["begins"] if begun else {}
    told = [record for record in found if "what" in record]
    count = {
        verdict: sum(record["verdict"] == verdict for record in told) for verdict in ("holds", "FAILS", "met", "missed")
    }
    head = f"Checks: {count['holds']} hold, {count['FAILS']} fail. Goals: {count['met']} met, {count['missed']} missed."
    lines = [f"# {where.get('device', 'Nothing was run')}", "", ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += [head, "", "| step | what | measured | wanted | verdict |", "|---|---|---|---|---|"]
    for record in told:
        cells = [record["step"], record["what"], f"{number(record['value'])} {record['unit']}".strip()]
        lines.append(
            "| " + " | ".join(cell.replace("|", "/") for cell in (*cells, record["wanted"], record["verdict"])) + " |"
        )
    lines += ["", "| step | how it ended | seconds | last lines |", "|---|---|---|---|"]
    for record in found:
        if "ended" in record:
            last = " ⏎ ".join(record.get("last_lines", ())).replace("|", "/").replace("`", "'")
            lines.append(f"| {record['step']} | {record['ended']} | {record['seconds']} | {last[-600:]} |")
    return "\n".join(lines) + "\n"


def chosen(options: argparse.Namespace) -> list[str]:
    """The names of the steps that are to be run."""
    names = [name for name in STEPS if not options.only or name in options.only]
    done = (
        {record["step"] for record in records(options.folder) if record.get("ended") == "done"} if options.rest else ()
    )
    return [name for name in names if name not in options.skip and name not in done]


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        if unknown := set(given) - set(STEPS):
            raise argparse.ArgumentTypeError(f"no step is called {', '.join(unknown)}: {', '.join(STEPS)}")
        return given

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for toy sizes")
    parser.add_argument("--folder", type=Path, default=ROOT / "out-gpu", help="where the results go")
    parser.add_argument("--only", type=names, default=[], help="steps, separated by commas")
    parser.add_argument("--skip", type=names, default=[], help="steps, separated by commas")
    parser.add_argument("--rest", action="store_true", help="only steps that the folder's results do not hold yet")
    parser.add_argument("--minutes", type=float, default=20.0, help="in which it ends")
    parser.add_argument("--text", default="", help="tinyshakespeare.txt, where it is at no known place")
    return parser.parse_args()


def main() -> int:
    options = parse()
    machine.pick_device(options.device)  # or one line that says what is not there
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with this process
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        for name in (names := chosen(options)):
            left = ends - time.monotonic()
            if left < LEAST_SECONDS:
                ended = {"step": name, "ended": "left out: no time is left", "seconds": 0}
            else:
                print(f"{name}: {STEPS[name].what} …", flush=True)
                ended = run_step(name, min(left, STEPS[name].seconds), options, work)
            add(options.folder, ended)
            print(
                f"{name}: {ended['ended']} after {ended['seconds']} s",
                *ended.get("last_lines", ()),
                sep="\n  ",
                flush=True,
            )
    print((options.folder / "gpu.md").read_text(encoding="utf-8") if names else "nothing is left to run")
    own = [record for record in records(options.folder) if record["step"] in names]
    return int(any(record.get("verdict") == "FAILS" or record.get("ended") in FAILED for record in own))


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
