"""Kills a run at random moments and resumes it, again and again; a program of its own, so that torch loads only once.

    python tests/killed.py OUT_DIR KILLS SEED SETTING …

Each turn is a fork that becomes train.py. After each kill every checkpoint on disk must load and the log must be JSON
up to a last torn line. The last line tells how many kills found a save under way.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from quartz import checkpoint  # noqa: E402


def begin(arguments: list[str]) -> int:
    """Forks; the child is train.py with these arguments."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sys.argv = ["train.py", *arguments]
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        os._exit(status)


def wait_for(condition) -> None:
    limit = time.monotonic() + 20
    while not condition() and time.monotonic() < limit:
        time.sleep(0.0005)


def main(out: Path, kills: int, seed: int, settings: list[str]) -> None:
    chance, within_saves = random.Random(seed), 0
    for turn in range(kills):
        mode = "resume" if (out / "last.pt").exists() else "scratch"
        child = begin([*settings, f"--out_dir={out}", f"--init_from={mode}"])
        if turn % 5 == 0:  # at any moment, of its start too
            time.sleep(chance.uniform(0, 0.5))
        elif turn % 5 == 1:  # inside a save
            wait_for(lambda: list(out.glob("*.pt.tmp")))
            time.sleep(chance.uniform(0, 0.002))
        else:  # once it has gone on
            before = (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
            wait_for(lambda before=before: (out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > before)
            time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run had ended by itself before kill {turn}: status {status}"
        within_saves += bool(list(out.glob("*.pt.tmp")))
        for path in out.glob("*.pt"):
            checkpoint.load(path)
        if (out / "log.jsonl").exists():
            lines = (out / "log.jsonl").read_text(encoding="utf-8").split("\n")
            for line in lines[:-1]:
                json.loads(line)
    child = begin([*settings, f"--out_dir={out}", "--init_from=resume"])
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    print(within_saves)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
