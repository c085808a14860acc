"""Trains the small models of scaling_laws.ipynb: for each budget of compute several sizes, each to the budget's end.

    python data/pystdlib_char/prepare.py
    python notebooks/sweep.py

Each run becomes a line of scaling_laws.jsonl. Runs that have one are skipped: stop the sweep when you like, and start
it again. Half an hour or more on 2 cores; two runs at a time on a core each are faster than one on both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator
from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, machine, run_folder, shards

ROOT = Path(__file__).resolve().parents[1]

# Settings
results = str(ROOT / "notebooks" / "scaling_laws.jsonl")  # the file of the runs' results
workers = 2  # runs at a time
threads = 1  # of a run
configurator.configure(globals())

DATASET, BLOCK_SIZE, BATCH_SIZE = "pystdlib_char", 128, 16
EVALUATION_ROWS, EVALUATION_BATCH = 2048, 64  # windows of BLOCK_SIZE spread over the validation split: a quarter of it
RATE, SEED = 0.03, 1337
# Muon's rate serves all widths; train.py scales those of embeddings and head with the width. Each run's rates fall to
# nothing at its own end: the loss half-way through a longer run is higher than that of a run of half the length.
SETTINGS = {
    "dataset": DATASET,
    "arch": "qwen3",
    "tie_embeddings": False,
    "block_size": BLOCK_SIZE,
    "batch_size": BATCH_SIZE,
    "gradient_accumulation_steps": 1,
    "optimizer": "muon",
    "embedding_lr": 0.024,
    "head_lr": 0.004,
    "learning_rate": 0.01,
    "beta1": 0.8,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "schedule": "wsd",
    "warmup_iters": 0,
    "min_lr": 0.0,
    "device": "cpu",
    "compile": False,
    "eval_interval": 10**9,  # at the beginning and at the end
    "eval_iters": 1,
    "log_interval": 10**9,
}
# FLOPs of a run: the (n_layer, n_embd) that get them
SHAPES = {
    2e11: [(2, 12), (2, 16), (2, 24), (2, 32), (2, 48), (2, 64), (3, 64)],
    5e11: [(2, 16), (2, 24), (2, 32), (2, 48), (2, 64), (3, 64), (3, 96)],
    1.25e12: [(2, 24), (2, 32), (2, 48), (2, 64), (3, 64), (3, 96), (3, 128)],
    3.2e12: [(2, 32), (2, 48), (3, 64), (3, 96), (3, 128), (4, 160)],
    8e12: [(2, 64), (3, 64), (3, 96), (3, 128), (4, 160)],
}
MORE_SEEDS = {2e11: (1, 2), 5e11: (1, 2)}  # where runs are short


class Point(NamedTuple):
    """A run of the sweep."""

    budget: float  # FLOPs
    n_layer: int
    n_embd: int
    muon_lr: float = RATE
    seed: int = SEED

    def config(self, vocab_size: int) -> GPTConfig:
        """The network: heads 32 wide or somewhat less."""
        n_head = -(-self.n_embd // 32)
        shape = {"n_layer": self.n_layer, "n_head": n_head, "n_embd": self.n_embd, "bias": False}
        return GPTConfig(BLOCK_SIZE, vocab_size, **shape, arch="qwen3", tie_embeddings=False)


def points() -> list[Point]:
    """All runs: first three sizes at half and twice the rate, to check it, and then the profiles."""
    checked = [Point(5e11, 2, 32), Point(1.25e12, 2, 24), Point(1.25e12, 3, 96)]
    found = [point._replace(muon_lr=factor * RATE) for point in checked for factor in (0.5, 2)]
    for budget, shapes in SHAPES.items():
        found += [Point(budget, *shape, seed=seed) for seed in (SEED, *MORE_SEEDS.get(budget, ())) for shape in shapes]
    return found


def measure(point: Point, splits: dict[str, shards.Split], vocab_size: int) -> dict:
    """Trains a point's model with train.py, and returns its line of the results."""
    config = point.config(vocab_size)
    with torch.device("meta"):
        network = GPT(config)
    flops = network.flops_per_token()
    updates = round(point.budget / (flops * BATCH_SIZE * BLOCK_SIZE))
    settings = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    settings |= {"max_iters": updates, "lr_decay_iters": updates, "muon_lr": point.muon_lr, "seed": point.seed}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{name}={value}" for name, value in (SETTINGS | settings | {"out_dir": folder}).items()]
        began = time.perf_counter()
        run = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
        state = run_folder.load_furthest(folder) if run.returncode == 0 else {}
        if state.get("iter_num") != updates:
            raise UserError(f"{point} did not reach its end: {run.stderr.strip() or 'it was stopped'}")
        model = checkpoint.build_model(state).eval()
    tokens = updates * BATCH_SIZE * BLOCK_SIZE
    return point._asdict() | {
        "params_blocks": sum(p.numel() for p in network.transformer.h.parameters()),
        "params": network.get_num_params(non_embedding=False),
        "updates": updates,
        "tokens": tokens,
        "epochs": round(tokens / len(splits["train"]), 4),
        "flops": flops * tokens,
        "val_loss": round(validation_loss(model, splits["val"]), 5),
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def validation_loss(model: GPT, split: shards.Split) -> float:
    """The mean loss over the same EVALUATION_ROWS windows for each model, in nats a character."""
    place, total = torch.device("cpu"), 0.0
    starts = shards.evaluation_starts(len(split), BLOCK_SIZE, EVALUATION_ROWS)
    for first in range(0, EVALUATION_ROWS, EVALUATION_BATCH):
        x, y = split.windows(starts[first : first + EVALUATION_BATCH], BLOCK_SIZE)
        with machine.autocast(place, machine.pick_dtype("auto", place)):
            total += model(x, y, return_logits=False)[1].item()
    return total * EVALUATION_BATCH / EVALUATION_ROWS


def main() -> None:
    torch.set_num_threads(threads)
    path, todo = Path(results), points()
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        there = {Point(*(line[name] for name in Point._fields)) for line in lines}
        todo = [point for point in todo if point not in there]
    folder = shards.find(DATASET)
    meta = shards.load_meta(folder)
    splits = {name: shards.Split(folder, name, meta) for name in ("train", "val")}
    print(f"{len(todo)} runs to go")
    with ThreadPoolExecutor(workers) as pool, open(path, "a", encoding="utf-8", buffering=1) as file:
        runs = [pool.submit(measure, point, splits, meta["vocab_size"]) for point in todo]
        try:
            for run in as_completed(runs):
                line = json.dumps(run.result())
                file.write(line + "\n")
                print(line, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
