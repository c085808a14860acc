"""Token shards on disk, and the batches that are read from them.

A data set is a folder with train.bin and val.bin (or train_*.bin and val_*.bin, in name order): raw little-endian
uint16 tokens, uint32 where meta.json says so. A file that starts with the header of llm.c and modded-nanogpt is read as
such. meta.json holds the vocabulary size, the dtype, the token counts and the tokenizer. nanoGPT's folders, with
meta.pkl or no meta at all, work as they are.

Two things make a data set one of conversations. A mask beside each file of tokens, train.mask beside train.bin: a byte
a token, 1 where that token is a target, something to be predicted from all before it, and 0 where it is only read.
And "row" in meta.json: the tokens are rows of so many, one behind the other, each a window by itself, whose inputs are
all of the row but its last token, and whose targets are all but its first. So rows of 257 fill a context of 256. A row
that holds less is padded, with tokens that are no targets. Either works without the other.

The batches are a pure function: row r of iteration i depends on (seed, i, r) and on the data, and on nothing else.
"""

import bisect
import functools
import itertools
import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from quartz import untrusted
from quartz.errors import UserError
from quartz.files import stamp, stamp_of
from quartz.tokenizer import GPT2Tokenizer, check_data

HEADER_MAGIC, HEADER_INTS = 20240520, 256  # llm.c's shards: 256 int32 (magic, version, count, 0 …), then uint16 tokens
GPT2_ROWS, ROUND_VOCABULARY_TO = 50304, 64  # products of even sizes are faster; GPT-2's 50257 rows become 50304
SCAN_TOKENS = 2**26  # of a split, looked at before a run starts; every batch is checked as it is read
EVALUATED_AT_ONCE = 4096  # tokens, at least, on a CPU
STARTS_AT_ONCE = 64  # micro-batches whose places are found together: it takes hardly longer than for one
MAPPED = 32  # files of a split at a time, of its masks as many: each holds a file handle, of which there may be 256
_MASK = 2**64 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Finding and opening


def find(name: str) -> Path:
    """The folder of data set `name`: data/NAME where the user stands, or beside this file; else NAME itself, a path.

    Raises UserError that names the command to prepare it.
    """
    places = _places(name)
    for place in places:
        if _shard_files(place, "train"):
            return place
    scripts = [place / "prepare.py" for place in places if (place / "prepare.py").exists()]
    how = f"run: python {scripts[0]}" if scripts else f"no prepare.py is there; data sets: {', '.join(_known())}"
    raise UserError(f"data set {name!r} is not prepared: {how}")


def _places(name: str) -> list[Path]:
    return [Path("data") / name, Path(__file__).resolve().parents[1] / "data" / name, Path(name)]


def _shard_files(folder: Path, split: str) -> list[Path]:
    return _numbered(folder, split, ".bin") or [path for path in [folder / f"{split}.bin"] if path.exists()]


def _numbered(folder: Path, split: str, ending: str) -> list[Path]:
    """The files of a split that is in several, in name order. Of thousands a glob takes three times as long."""
    try:
        return [
            folder / name
            for name in sorted(os.listdir(folder))
            if name.startswith(f"{split}_") and name.endswith(ending)
        ]
    except (OSError, ValueError):  # no folder, or no name of one
        return []


def _known() -> list[str]:
    return sorted(path.parent.name for path in (Path(__file__).resolve().parents[1] / "data").glob("*/prepare.py"))


def load_meta(folder: Path) -> dict:
    """What is known of a data set: {vocab_size, dtype, tokens, tokenizer, row}, each None where nothing is.

    nanoGPT's folders without meta hold GPT-2 tokens. meta.pkl is read without running any code that hides in it.
    """
    meta = {"vocab_size": None, "dtype": "uint16", "tokens": None, "tokenizer": None, "row": None}
    try:
        if (folder / "meta.json").exists():
            meta = {**meta, **json.loads((folder / "meta.json").read_text(encoding="utf-8"))}
        elif (folder / "meta.pkl").exists():
            theirs = untrusted.plain_pickle(folder / "meta.pkl")
            meta["vocab_size"], itos = theirs["vocab_size"], theirs.get("itos")
            if itos is not None:
                if meta["vocab_size"] > sys.maxunicode + 1:
                    raise ValueError("it counts more characters than there are")
                itos = itos if isinstance(itos, dict) else dict(enumerate(itos))
                meta["tokenizer"] = {"type": "char", "chars": [itos.get(i) for i in range(meta["vocab_size"])]}
        else:
            meta |= {"tokenizer": {"type": "gpt2"}}
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {meta['dtype']!r}, not uint16 or uint32")
        if meta["vocab_size"] is not None and not (type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] < 2**32):
            raise ValueError(f"vocab_size is {meta['vocab_size']!r}")
        if not all(type(count) is int for count in (meta["tokens"] or {}).values()):
            raise ValueError(f"tokens is {meta['tokens']!r}, not a count for each split")
        if meta["row"] is not None and not (type(meta["row"]) is int and meta["row"] > 1):
            raise ValueError(f"row is {meta['row']!r}, not the number of tokens in a row, 2 or more")
        if meta["tokenizer"] is not None:
            check_data(meta["tokenizer"], meta["vocab_size"])
    except Exception as error:  # a broken pickle raises anything
        raise UserError(
            f"{folder}: its meta file can't be used ({str(error)[:300]}); prepare the data set again"
        ) from error
    return meta


def tokenizer_of(name: str, vocab_size: int) -> dict:
    """The tokenizer of a checkpoint that does not hold it, as nanoGPT's: that of its data set, else GPT-2's.

    Returns plain data. Raises UserError where there is no meta file and the vocabulary is too small for GPT-2's.
    """
    for place in _places(name):
        if (place / "meta.json").exists() or (place / "meta.pkl").exists():
            return load_meta(place)["tokenizer"]
    if vocab_size >= GPT2Tokenizer.vocab_size:
        return {"type": "gpt2"}
    raise UserError(
        f"the checkpoint holds no tokenizer, and its data set's meta.pkl is not in {_places(name)[0]}: put it there"
    )


def window_length(row: int | None, block_size: int) -> int:
    """The number of inputs in a window: of a data set of rows, so many tokens each, row - 1; else block_size.

    Raises UserError where a row does not fit in block_size.
    """
    if row and row - 1 > block_size:
        raise UserError(
            f"the data set has rows of {row} tokens, which need block_size {row - 1} or more, not {block_size}: "
            "prepare it with shorter rows, or take a longer context"
        )
    return row - 1 if row else block_size


def check_row(row: int | None, block_size: int) -> None:
    """Raises UserError where rows leave positions of a new model's context untrained."""
    if row and row <= block_size:
        raise UserError(
            f"the data set has rows of {row} tokens, which leave positions of block_size {block_size} untrained: set "
            f"block_size={row - 1}"
        )


def vocabulary_rows(meta: dict) -> int:
    """The rows of a new model's embedding for this data set: of a BPE a multiple of ROUND_VOCABULARY_TO."""
    rows = meta["vocab_size"] or GPT2_ROWS
    if meta["tokenizer"] and meta["tokenizer"]["type"] != "char":
        rows = -(-rows // ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO
    return rows


class Split:
    """The tokens of one split, and the mask over them, memory-mapped, as one row of tokens over all its shards."""

    def __init__(self, folder: Path, split: str, meta: dict, vocab_size: int | None = None):
        """Raises UserError for a missing, empty, truncated or half-written file, ids beyond vocab_size, a mask that
        is not this split's, or tokens that are no whole rows.
        """
        files = _shard_files(folder, split) or [folder / f"{split}.bin"]
        self.name, self.vocab_size, self.row = f"{folder} ({split})", vocab_size, meta.get("row")
        self.tokens = Pieces(files, np.dtype(meta["dtype"]).newbyteorder("<"))
        expected = (meta["tokens"] or {}).get(split, len(self))
        if expected != len(self):
            raise UserError(f"{self.name} holds {len(self)} tokens, and meta.json says {expected}: prepare it again")
        if self.row and len(self) % self.row:
            raise UserError(
                f"{self.name} holds {len(self)} tokens, no whole number of rows of {self.row}: prepare it again"
            )
        self.mask = _map_masks(folder, split, self.tokens)
        for shard in self.tokens.heads(SCAN_TOKENS):
            self._check_ids(shard)
        for shard in self.mask.heads(SCAN_TOKENS) if self.mask is not None else ():
            self._check_mask(shard)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_weighted(self) -> bool:
        """Whether targets have weights: a mask's, or ones where the last batch of rows is short in an evaluation."""
        return self.mask is not None or self.row is not None

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1, across the borders of shards, as int64."""
        return self.rows(np.array([start]), count)[0]

    def rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """What `read` gives for each of the starts: (starts, count)."""
        return self.tokens.rows(starts, count)

    def windows(self, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) int64 of the windows that begin at `starts`; a target is the next token."""
        tokens = self.rows(starts, block_size + 1)
        self._check_ids(tokens)
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batch(self, starts: np.ndarray, block_size: int) -> list[torch.Tensor]:
        """What GPT.forward takes of these windows: inputs and targets, and where targets have weights, those (B, T)."""
        batch = [*self.windows(starts, block_size)]
        return [*batch, self.weights(starts, block_size)] if self.is_weighted else batch

    def evaluation_batches(
        self, most: int, batch_size: int, block_size: int, together: int
    ) -> tuple[list[np.ndarray], int]:
        """The starts of the windows of up to `most` micro-batches, spread evenly, always the same, `together` at once;
        and what the sum of their losses is divided by. Raises UserError where none holds a target.
        """
        batches = min(most, math.ceil((len(self) - 1) / (batch_size * block_size)))
        starts = evaluation_starts(len(self), block_size, batches * batch_size, self.row)
        divisor = self.count_targets(starts, block_size) if self.is_weighted else len(starts) * block_size
        if divisor == 0:
            raise UserError(f"no token of {self.name} that is evaluated is a target: raise eval_iters")
        return [starts[first : first + together] for first in range(0, len(starts), together)], divisor

    def weights(self, starts: np.ndarray, block_size: int) -> torch.Tensor:
        """What the targets of these windows count, (B, T) float32: 1, or 0 where the mask has 0."""
        if self.mask is None:
            return torch.ones(len(starts), block_size)
        return torch.from_numpy(self._targets(starts, block_size)).float()

    def count_targets(self, starts: np.ndarray, block_size: int) -> int:
        """How many targets count in these windows. Reads the mask alone, so that it can be known before a batch is."""
        if self.mask is None:
            return len(starts) * block_size
        return sum(int(self._targets(start, block_size).sum()) for start in starts[:, None])

    def _targets(self, starts: np.ndarray, block_size: int) -> np.ndarray:
        """Which targets of these windows count, (B, T), 0 or 1 each."""
        mask = self.mask.rows(starts + 1, block_size)
        self._check_mask(mask)
        return mask

    def check_length(self, block_size: int) -> None:
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} holds {len(self)} tokens, and block_size {block_size} needs at least {block_size + 1}: "
                "lower block_size or bring more data"
            )

    def _check_ids(self, tokens: np.ndarray) -> None:
        if self.vocab_size is not None and tokens.size and (top := int(tokens.max())) >= self.vocab_size:
            raise UserError(f"{self.name} holds token id {top}, beyond the model's vocabulary of {self.vocab_size}")

    def _check_mask(self, mask: np.ndarray) -> None:
        if mask.size and (top := int(mask.max())) > 1:
            raise UserError(f"the mask of {self.name} holds {top}, which is neither 0 nor 1: prepare it again")


class Pieces:
    """The numbers in several files, read as if they were one. The files read last are memory-mapped, however many."""

    def __init__(self, files: list[Path], dtype: np.dtype):
        self.files, self._layouts = files, [_layout(file, dtype) for file in files]
        self.lengths = [layout.count for layout in self._layouts]
        self.ends = list(itertools.accumulate(self.lengths))
        self._mapped = functools.lru_cache(MAPPED)(self._map)

    def __len__(self) -> int:
        return self.ends[-1]

    def _map(self, nth: int) -> np.ndarray:
        _, dtype, begin, count = self._layouts[nth]
        try:
            with open(self.files[nth], "rb", buffering=0) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, dtype, count, begin)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.files[nth]} can't be read: {error}") from error

    def rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Of each start the numbers start … start + count - 1, as int64: (starts, count). Raises UserError where a file
        has changed meanwhile.
        """
        out, unchanged = np.empty((len(starts), count), dtype=np.int64), set()
        for row, start in zip(out, starts.tolist(), strict=True):
            nth, filled = bisect.bisect_right(self.ends, start), 0
            while filled < count:
                if nth not in unchanged and stamp(self.files[nth]) != self._layouts[nth].stamp:
                    # Of what is mapped and cut off, no read returns
                    raise UserError(f"{self.files[nth]} was changed while it is in use: prepare the data set again")
                unchanged.add(nth)
                offset = start + filled - (self.ends[nth - 1] if nth else 0)
                part = self._mapped(nth)[offset : offset + count - filled]
                row[filled : filled + len(part)] = part
                filled, nth = filled + len(part), nth + 1
        return out

    def heads(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` numbers, by file."""
        for nth, length in enumerate(self.lengths):
            if count <= 0:
                return
            yield self._mapped(nth)[:count]
            count -= length


class _Layout(NamedTuple):
    """How a file's numbers lie in it."""

    stamp: tuple[int, int, int]
    dtype: np.dtype
    begin: int  # bytes before them
    count: int


def _layout(path: Path, dtype: np.dtype) -> _Layout:
    """Raises UserError for a file that is missing, empty, truncated, or not as its header says."""
    try:
        with open(path, "rb", buffering=0) as file:
            found, head = stamp_of(os.fstat(file.fileno())), file.read(12)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: prepare the data set again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from error
    size = found[1]
    if size == 0:
        raise UserError(f"{path} is empty: prepare the data set again")
    magic, _, told = struct.unpack("<3i", head) if size >= 4 * HEADER_INTS else (0, 0, 0)
    begin, dtype = (4 * HEADER_INTS, np.dtype("<u2")) if magic == HEADER_MAGIC else (0, dtype)
    count, rest = divmod(size - begin, dtype.itemsize)
    if begin and count != told:
        raise UserError(f"{path} holds {count} tokens, and its header says {told}")
    if rest:
        raise UserError(f"{path}: {size} bytes are no whole number of {dtype.name} tokens; is it truncated?")
    return _Layout(found, dtype, begin, count)


def _map_masks(folder: Path, split: str, tokens: Pieces) -> Pieces | None:
    """The mask beside each file of tokens; None where there is none. Raises UserError where they don't go together."""
    there = [*_numbered(folder, split, ".mask"), *(path for path in [folder / f"{split}.mask"] if path.exists())]
    if not there:
        return None
    wanted = [file.with_suffix(".mask") for file in tokens.files]
    if lost := sorted(set(wanted) ^ set(there)):
        other = "has no mask, and others have" if lost[0] in wanted else "has no tokens, but a mask"
        raise UserError(f"{lost[0].with_suffix('.bin')} {other}: prepare the data set again")
    masks = Pieces(wanted, np.dtype("u1"))
    for path, masked, count in zip(wanted, masks.lengths, tokens.lengths, strict=True):
        if masked != count:
            raise UserError(f"{path} is of {masked} tokens, and there are {count}: prepare the data set again")
    if not any(mask.any() for mask in masks.heads(len(masks))):
        raise UserError(f"the mask of {folder} ({split}) is 0 throughout, which leaves no target")
    return masks


# ----------------------------------------------------------------------------------------------------------------------
# The order of the data


def mix(*numbers: int) -> int:
    """64 well-mixed bits from some integers (splitmix64: Steele, Lea, Flood, 2014); the same on every machine."""
    state = 0
    for number in numbers:
        state = (state + int(number) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def training_starts(
    rows: np.ndarray, n_tokens: int, block_size: int, seed: int, length: int | None = None
) -> np.ndarray:
    """Where the windows of these rows begin; rows are numbered through the run: iteration · rows an iteration + r.

    An epoch visits each of its windows once, in an order of its own. Windows do not overlap within an epoch, and each
    epoch shifts their boundaries; where the data itself is rows, of `length` tokens, its windows are these. Nothing is
    stored: the cost does not depend on the size of the data.
    """
    if length:
        n_windows, n_shifts, step = n_tokens // length, 1, length
    else:
        n_windows, step = max(1, (n_tokens - block_size) // block_size), block_size
        n_shifts = min(block_size, n_tokens - n_windows * block_size)
    epochs, places = np.divmod(np.asarray(rows, dtype=np.int64), n_windows)
    starts = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        shift = mix(seed, epoch, 1) % n_shifts
        starts[here] = _permute(places[here], n_windows, mix(seed, epoch, 2)) * step + shift
    return starts


class MicroBatches:
    """The micro-batches of a run, by their number, all processes' counted from the run's beginning."""

    def __init__(self, split: Split, batch_size: int, block_size: int, seed: int):
        self.split, self.batch_size, self.block_size, self.seed = split, batch_size, block_size, seed
        self._group, self._starts = -1, []  # of STARTS_AT_ONCE micro-batches

    def starts(self, nth: int, count: int = 1) -> np.ndarray:
        """Where the windows of `count` micro-batches begin, from the nth on."""
        rows = np.arange(nth * self.batch_size, (nth + count) * self.batch_size)
        return training_starts(rows, len(self.split), self.block_size, self.seed, self.split.row)

    def read(self, nth: int) -> list[torch.Tensor]:
        """As Split.batch."""
        group, place = divmod(nth, STARTS_AT_ONCE)
        if group != self._group:
            starts = self.starts(group * STARTS_AT_ONCE, STARTS_AT_ONCE)
            self._group, self._starts = group, starts.reshape(STARTS_AT_ONCE, -1)
        return self.split.batch(self._starts[place], self.block_size)

    def count_targets(self, nth: int, count: int) -> int | None:
        """The targets of `count` micro-batches, from the nth on: the mask alone tells. None where there are no weights,
        each micro-batch has as many, and the mean of their means will do.
        """
        return self.split.count_targets(self.starts(nth, count), self.block_size) if self.split.is_weighted else None


def evaluation_starts(n_tokens: int, block_size: int, count: int, length: int | None = None) -> np.ndarray:
    """Where `count` windows begin that are spread evenly over a split, its first and last token included.

    Where the data itself is rows, of `length` tokens, the windows are rows, and no more than there are.
    """
    if length:
        n_rows = n_tokens // length
        return np.linspace(0, n_rows - 1, min(count, n_rows)).round().astype(np.int64) * length
    return np.linspace(0, n_tokens - 1 - block_size, count).round().astype(np.int64)


def _permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of 0 … size - 1 at the given places.

    A Feistel network over the next power of four, walked until it falls below size (Black and Rogaway, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64(2**half - 1)
    keys = [np.uint64(mix(key, turn)) for turn in range(6)]

    def feistel(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & low
        for turn_key in keys:
            mixed = (right ^ turn_key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        return left << np.uint64(half) | right

    values = feistel(places.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = feistel(values[outside])
    return values.astype(np.int64)
