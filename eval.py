"""Measures a trained model, or GPT-2, on all of a text: loss, perplexity, bits per byte.

python eval.py --out_dir=out-shakespeare-char
python eval.py --out_dir=out-shakespeare-char --split=train --stride=64
python eval.py --init_from=gpt2 --source=book.txt --stride=512
torchrun --standalone --nproc_per_node=8 eval.py --out_dir=out --batch_size=32 --dtype=bfloat16

Each token but the first is predicted once: window k begins at token k * stride, and counts what no window before it has
predicted. The loss is the mean over tokens, in nats; perplexity is e to the loss. Bits per byte, the loss of all tokens
over the bytes of text that they stand for, compares models with different tokenizers. Standard output is a line of
JSON; the same for reading goes to standard error.

Of a data set with a mask only its targets count; of one with rows, each row is a window by itself.
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
init_from = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with those
out_dir = "out"  # folder of the checkpoint; ignored if init_from is not resume
dataset = ""  # folder under data/, or a path; empty: the one that the checkpoint was trained on
split = "val"  # train, val, or another whose files are in that folder
source = ""  # a UTF-8 text file to measure on, in place of a data set
stride = 0  # tokens between the beginnings of two windows, which share block_size - stride as context; 0: block_size
block_size = 0  # tokens in a window: the longest context; 0: the model's
batch_size = 8  # windows in a forward pass; the figures do not depend on it
backend = "nccl"  # of torch.distributed on GPUs: nccl, gloo, …; CPUs use gloo
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "float32"  # auto, float32, bfloat16, float16; float32 is exact, the others are faster
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import functools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError
from model import GPT
from quartz import machine, ranks, shards, sources, tokenizer

HIGHEST_LOSS = math.log(sys.float_info.max)  # whose perplexity is a number


class Text(shards.Split):
    """The tokens of a text, in memory, to be read as those of a split are."""

    def __init__(self, name: str, ids: np.ndarray):
        self.name, self.vocab_size, self.row, self.mask = name, None, None, None
        self.ids = ids.astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        return np.stack([self.ids[start : start + count] for start in starts])


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings, before anything is loaded."""
    rules = configurator.ranges(globals())
    rules += [
        (
            stride >= 0 and not 0 < block_size < stride,
            f"stride must be from 1 to block_size, or 0 for block_size, not {stride}",
        ),
        (block_size >= 0, f"block_size must be at least 1, or 0 for the model's, not {block_size}"),
        (not (dataset and source), "dataset and source both say what to measure on: give one of the two"),
        (dataset or source or init_from == "resume", f"init_from={init_from} needs a dataset, or a source"),
    ]
    looks = [lambda: machine.check_machine(device, dtype), lambda: sources.check(init_from, out_dir)]
    if source:
        looks.append(read_source)
    elif dataset:
        looks.append(lambda: find(dataset))
    configurator.check(rules, looks)


@functools.cache  # once: it may be a pipe
def read_source() -> str:
    return tokenizer.read_text(source, f"source={source}")


def find(name: str) -> Path:
    """The folder of a data set that has the split. Raises UserError, which names the splits that it has."""
    folder = shards.find(name)
    files = {path.stem for path in folder.glob("*.bin")}
    splits = {file.partition("_")[0] for file in files}
    if split not in files | splits:
        raise UserError(f"split={split!r} is not in {folder}, which has {', '.join(sorted(splits))}")
    return folder


def open_text(
    name: str | None, model: GPT, theirs: dict | None, where: str
) -> tuple[shards.Split, tokenizer.Tokenizer | None]:
    """What to measure on, and its tokenizer, None where the data set has none.

    name: the data set's, None for source; theirs: the tokenizer of the model from `where`, as plain data. Raises
    UserError where the two tokenizers differ, or nothing is there to be predicted.
    """
    vocab_size = model.config.vocab_size
    if name is None:
        if theirs is None:
            raise UserError(f"{where} holds no tokenizer for source={source}: name a prepared data set instead")
        tokens = tokenizer.from_data(theirs)
        text = Text(source, tokens.encode_to_numpy(read_source()))
    else:
        folder = find(name)
        meta = shards.load_meta(folder)
        ours = meta["tokenizer"]
        if ours and theirs and ours != theirs:
            raise UserError(
                f"the tokenizer of {folder} (type {ours['type']}) is not that of {where} (type {theirs['type']}): name "
                "the data set that was prepared for it, or a text with --source=FILE"
            )
        tokens = tokenizer.from_data(ours) if ours else None
        text = shards.Split(folder, split, meta, min(vocab_size, tokens.vocab_size) if tokens else vocab_size)
    if len(text) < 2:
        raise UserError(f"{text.name} holds a single token, and no other to predict from it: bring more text")
    return text, tokens


def bytes_by_id(tokens: tokenizer.Tokenizer) -> torch.Tensor:
    """How many bytes of text each id stands for (V,): none for special tokens, which are no text."""
    counts = torch.tensor([len(tokens.token_bytes(i)) for i in range(tokens.vocab_size)])
    counts[list(tokens.specials.values())] = 0
    return counts


def lay_out(n_tokens: int, T: int, step: int) -> tuple[int, int]:
    """How many windows there are that predict T tokens, and how many tokens a last one has that is shorter, or 0."""
    full = max(0, (n_tokens - 1 - T) // step + 1)
    predicted = (full - 1) * step + T if full else 0
    return full, n_tokens - 1 - full * step if predicted < n_tokens - 1 else 0


@torch.no_grad()
def measure(
    model: GPT, text: shards.Split, T: int, step: int, counts: torch.Tensor | None, processes: ranks.Processes
) -> tuple[float, int, int]:
    """The loss of all targets, summed, in nats; their number; and the bytes that they stand for.

    All tokens but the first are targets, unless a mask says less. counts (V,): the bytes of each id. The batches are
    shared out among the processes.
    """
    place = model.lm_head.weight.device
    autocast = machine.autocast(place, machine.pick_dtype(dtype, place))
    full, last = lay_out(len(text), T, step)
    batches = math.ceil(full / batch_size) + (last > 0)
    own = range(processes.rank, batches, processes.world_size)
    show = processes.is_master and sys.stderr.isatty()
    loss, n_tokens, n_bytes = 0.0, 0, 0
    for nth in tqdm(own, unit="batch", disable=not show, dynamic_ncols=True):
        starts, length = np.arange(nth * batch_size, min((nth + 1) * batch_size, full)) * step, T
        if not len(starts):
            starts, length = np.array([full * step]), last
        x, y = text.windows(starts, length)
        is_counted = torch.from_numpy(starts > 0)[:, None] & (torch.arange(length) < T - step)
        y = y.masked_fill(is_counted, -1)  # by the window before
        if text.mask is not None:
            y = y.masked_fill(text.weights(starts, length) == 0, -1)
        new = y[y >= 0]
        if not len(new):
            continue
        with autocast:
            mean = model(x.to(place), y.to(place), return_logits=False)[1].item()
        if not math.isfinite(mean):
            raise UserError(f"a loss is {mean}: the model's weights are damaged, or too large for dtype={dtype}")
        loss, n_tokens = loss + mean * len(new), n_tokens + len(new)
        n_bytes += int(counts[new].sum()) if counts is not None else 0
    where = place if place.type == "cuda" else "cpu"  # gloo's, and mps knows no float64
    sums = processes.sum(torch.tensor([loss, n_tokens, n_bytes], dtype=torch.float64, device=where))
    loss, n_tokens, n_bytes = sums.tolist()
    return loss, int(n_tokens), int(n_bytes)


def figures(loss: float, n_tokens: int, n_bytes: int) -> dict:
    """The three measures of what `measure` has summed; None where there is no number for one."""
    mean = loss / n_tokens
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < HIGHEST_LOSS else None,
        "bits_per_byte": loss / math.log(2) / n_bytes if n_bytes else None,
    }


def main() -> None:
    check_settings()
    machine.keep_freed_memory()
    model, theirs, state = sources.model_and_tokenizer(init_from, out_dir)
    where, longest = str(state.get("path", init_from)), model.config.block_size
    T = block_size or longest
    step = stride or T
    name = None if source else dataset or state["config"].get("dataset")
    rules = [
        (longest >= T, f"block_size must be at most that of {where}, {longest}, not {T}"),
        (step <= T, f"stride must be at most block_size, {T}, not {step}: tokens in between would be left out"),
        (source or isinstance(name, str), f"{where} does not tell what it was trained on: give dataset, or source"),
    ]
    configurator.check(rules)
    text, tokens = open_text(name, model, theirs, where)
    if text.row:
        T, step = shards.window_length(text.row, longest), text.row
        rule = f"{text.name} has rows of {step} tokens, each a window by itself: leave out stride and block_size"
        configurator.check([(not stride and not block_size, rule)])
    full, last = lay_out(len(text), T, step)
    processes, place = ranks.start_processes(device, backend)
    with ranks.lost_ranks_named(processes):
        if processes.is_master and not (theirs and tokens):
            print(f"note: no tokenizer tells whether {text.name} holds what {where} was made for", file=sys.stderr)
        if processes.is_master and not full:
            print(f"note: {text.name} holds {len(text)} tokens, which never fill the context of {T}", file=sys.stderr)
        model.to(place).eval()
        began = time.perf_counter()
        loss, n_tokens, n_bytes = measure(model, text, T, step, bytes_by_id(tokens) if tokens else None, processes)
        seconds = time.perf_counter() - began
        if not n_tokens:
            raise UserError(f"{text.name} holds no target: its mask has no 1 where there is something to predict from")
        if processes.is_master:
            record = figures(loss, n_tokens, n_bytes)
            shown = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in record.items() if value is not None]
            where_and_how_fast = f"{n_tokens:,} tokens of {text.name}, {n_tokens / seconds:,.0f} tokens/s"
            print(f"{', '.join(shown)} over {where_and_how_fast}", file=sys.stderr)
            record |= {"tokens": n_tokens, "bytes": n_bytes if tokens else None, "windows": full + (last > 0)}
            record |= {"stride": step, "block_size": T, "init_from": init_from, "dataset": name}
            record |= {"split": None if source else split, "source": source or None}
            record |= {"checkpoint": where if state else None, "iter_num": state.get("iter_num")}
            record |= {"dtype": str(machine.pick_dtype(dtype, place)).removeprefix("torch."), "device": str(place)}
            print(json.dumps(record | {"seconds": seconds, "tokens_per_s": n_tokens / seconds}))
        ranks.stop_processes()


if __name__ == "__main__":
    with configurator.user_errors():
        main()
