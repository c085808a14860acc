"""What a run reports: lines on the terminal, log.jsonl, curves.png and, where asked for, Weights & Biases.

log.jsonl holds a JSON object a line, with null for a number that is not finite. Of an update: iter, loss, lr, ms and
tokens_per_s (means over the updates since the line before), mfu where the device's peak is known, and grad_norm. Of an
evaluation: step, train_loss, val_loss and lr. Of both: tokens, trained on since the run began, and seconds, spent in
updates since then.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import GPT
from quartz import curves, files
from quartz.checkpoint import Progress
from quartz.errors import UserError

KEPT = "the checkpoints beside it are untouched"
WANDB_NAMES = {"step": "iter", "train_loss": "train/loss", "val_loss": "val/loss"}  # nanoGPT's; its mfu is in percent
DRAWING_SHARE = 0.01  # of the time between two drawings, before the end of a run
FIRST_DRAWING = 1.0  # seconds that it is expected to take: it imports matplotlib


def tell_beginning(model: GPT, tokens_per_iter: int, compute_dtype: torch.dtype, place: torch.device) -> None:
    print(f"tokens per iteration will be: {tokens_per_iter:,}")
    print(f"number of parameters: {model.get_num_params() / 1e6:.2f}M")
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) < len(list(model.parameters())):
        print(f"of which are trained: {sum(trained) / 1e6:.3f}M")
    print(f"computing in {str(compute_dtype).removeprefix('torch.')} on {place}")


def start_wandb(project: str, name: str, config: dict):
    """A run of Weights & Biases. Raises UserError where it does not start."""
    import wandb

    try:
        wandb_run = wandb.init(project=project, name=name, config=config)
        wandb_run.define_metric("*", step_metric="iter")  # what its charts are drawn against
        return wandb_run
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"Weights & Biases did not start ({error}): log in, set WANDB_MODE=offline, or use --wandb_log=False"
        ) from error


class Log:
    """The reports of one run, which may have been resumed."""

    def __init__(
        self,
        folder: Path | None,
        is_shown: bool,
        progress: Progress,
        max_iters: int,
        tokens_per_iter: int = 0,
        flops_share: float | None = None,
        wandb_run=None,
    ):
        """Goes on where the run stands. folder: None writes no file (another rank, or eval_only); is_shown:
        whether the terminal is written to. flops_share: the MFU of an update that takes a second, None where the
        device's peak is unknown. Raises UserError where the log can't be written.
        """
        self.file, self.folder, self.is_shown, self.wandb = None, folder, is_shown, wandb_run
        self.tokens_per_iter, self.flops_share = tokens_per_iter, flops_share
        self.seconds = 0.0  # spent in updates since the run began, before this start too
        self.draws, self.is_drawn = folder is not None, False  # whether it can, and whether nothing has come since
        self.drawn, self.drawing = time.perf_counter(), FIRST_DRAWING  # when it was, and how long it took
        if folder:
            self._open(folder / curves.LOG, progress.iter_num, progress.evaluated)
        self.told, self.timed = self.seconds, 0  # the seconds at the last line, and the updates since
        show = folder is not None and sys.stderr.isatty()
        self.bar = tqdm(total=max_iters, initial=progress.iter_num, unit="iter", disable=not show, dynamic_ncols=True)

    def _open(self, path: Path, iter_num: int, evaluated: bool) -> None:
        """Keeps of an earlier log what this run will not write again."""
        with files.writing(path, KEPT):
            with files.whole(path) as partial, open(partial, "w", encoding="utf-8") as kept:
                for record in curves.records(path) if path.is_file() else ():
                    begins = record["iter"] if "iter" in record else record["step"] - evaluated
                    if begins < iter_num:
                        kept.write(json.dumps(record) + "\n")
                        self.seconds = record["seconds"] or 0.0
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the run

    def update(self, seconds: float) -> None:
        """Counts an update that took so long."""
        self.seconds, self.timed = self.seconds + seconds, self.timed + 1
        self.bar.update()

    def iteration(self, iter_num: int, loss: float, lr: float, grad_norm: float, tokens: int) -> None:
        """Tells of an update, and of the mean speed since the last time. tokens: trained on since the run began."""
        each = (self.seconds - self.told) / self.timed  # seconds of an update
        self.told, self.timed, tokens_per_s = self.seconds, 0, self.tokens_per_iter / each
        line = f"iter {iter_num}: loss {loss:.4f}, time {each * 1000:.2f}ms"
        record = {"iter": iter_num, "loss": loss, "lr": lr, "ms": each * 1000, "tokens_per_s": tokens_per_s}
        if self.flops_share is not None:
            record["mfu"] = self.flops_share / each
            line += f", mfu {record['mfu'] * 100:.2f}%"
        self._write(f"{line}, {tokens_per_s:,.0f} tokens/s", record | {"grad_norm": grad_norm}, tokens)

    def evaluation(self, step: int, losses: dict[str, float], lr: float, tokens: int) -> None:
        line = f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        record = {"step": step, "train_loss": losses["train"], "val_loss": losses["val"], "lr": lr}
        self._write(line, record, tokens)

    def _write(self, line: str, record: dict, tokens: int) -> None:
        if not self.is_shown:
            return
        record |= {"tokens": tokens, "seconds": self.seconds}
        tqdm.write(line)
        sys.stdout.flush()
        if self.file:
            plain = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
            with files.writing(self.file.name, KEPT):
                self.file.write(json.dumps(plain) + "\n")
            self.is_drawn = False
        if self.wandb:
            theirs = {WANDB_NAMES.get(key, key): value for key, value in record.items()}
            self.wandb.log(theirs if "mfu" not in record else {**theirs, "mfu": 100 * record["mfu"]})

    def draw(self, is_last: bool = False) -> None:
        """Refreshes curves.png, where matplotlib is there. A drawing that fails is told of once, and stops no run.

        The last one is always made. One before that is, if since the one before it (or the start) a hundred times as
        long has passed as that took: so drawing takes a hundredth of a long run, and a short one is drawn at its end.
        """
        began = time.perf_counter()
        due = is_last or self.drawing < (began - self.drawn) * DRAWING_SHARE
        if not self.draws or self.is_drawn or not due:
            return
        try:
            curves.write([curves.read(self.folder, *curves.names_of([self.folder]))], self.folder / curves.PICTURE)
        except Exception as error:
            self.draws = False
            if getattr(error, "name", None) != "matplotlib":
                print(f"warning: {self.folder / curves.PICTURE} could not be drawn ({error})", file=sys.stderr)
        self.is_drawn, self.drawn = True, time.perf_counter()
        self.drawing = self.drawn - began

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        self.draw(is_last=True)
        if self.wandb:
            self.wandb.finish()
