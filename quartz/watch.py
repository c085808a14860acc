"""A run that trains, watched from outside: each new checkpoint, as soon as it is whole, and the run's curves.

Read it to see what serve.py shows with --watch=True. Nothing is written into the run's folder.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quartz import checkpoint, curves, files, run_folder
from quartz.errors import UserError

SECONDS = 1.0  # between two looks into the folder
POINTS = 1000  # of a curve that are told
PAUSE = 10  # times as long as reading the log took, until it is read again


class Watch:
    """The folder of a run, in which there need not be a checkpoint yet."""

    def __init__(self, out_dir: str):
        self.out_dir, self.log = out_dir, Path(out_dir) / curves.LOG
        self.problem: str | None = None  # of the checkpoint that was written last
        self.served = dict.fromkeys(("iter", "best_val_loss", "max_iters"))
        self.read: tuple[tuple | None, dict] = None, {}  # what the log was when it was read, and its curves
        self.again = 0.0  # when it may be read next

    def states(self) -> Iterator[dict]:
        """The contents of each checkpoint as it comes, without end. One that can't be read is a line on stderr.

        A state that the caller can't use either is to be told of by `fail`."""
        seen = None
        while True:
            path, now = self.newest()
            if path and now != seen:
                seen, self.problem = now, None
                try:
                    yield checkpoint.load(path)
                except UserError as error:
                    self.fail(*error.problems)
            time.sleep(SECONDS)

    def newest(self) -> tuple[Path | None, tuple | None]:
        """The checkpoint that was written last, and what tells it from any other."""
        paths = run_folder.found(self.out_dir)
        found = [(files.stamp(path / "plain.pt" if path.is_dir() else path), path) for path in paths]
        stamp, path = max((its for its in found if its[0]), default=(None, None))  # by time
        return path, stamp

    def fail(self, *problems: str) -> None:
        self.problem = " ".join("; ".join(problems).split())  # torch's own words have several lines
        goes_on = "waiting for the next" if self.served["iter"] is None else "the model before is served on"
        print(f"warning: {self.problem}; {goes_on}", file=sys.stderr, flush=True)

    def serves(self, state: dict) -> None:
        """Notes that the model of this state is served now."""
        best, most = state["best_val_loss"], state["config"].get("max_iters")
        self.served = {
            "iter": state["iter_num"],
            "best_val_loss": best if math.isfinite(best) else None,
            "max_iters": most if type(most) is int else None,
        }

    def told(self) -> dict:
        """What is served, and the run's curves: columns of numbers, None where one is not known."""
        stamp, began = files.stamp(self.log), time.monotonic()
        if stamp != self.read[0] and began >= self.again:
            try:
                run = curves.read(self.log.parent)
                self.read = stamp, {"updates": thinned(run.updates), "evaluations": thinned(run.evaluations)}
            except OSError:
                self.read = None, {}
            self.again = time.monotonic() + PAUSE * (time.monotonic() - began)
        return {**self.served, "problem": self.problem, "updates": {}, "evaluations": {}, **self.read[1]}


def thinned(columns: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """At most POINTS rows of columns, evenly spread, the first and the last among them."""
    kept = {}
    for key, values in columns.items():
        rows = np.unique(np.linspace(0, len(values) - 1, min(POINTS, len(values))).round().astype(int))
        kept[key] = [value if math.isfinite(value) else None for value in values[rows].tolist()]
    return kept
