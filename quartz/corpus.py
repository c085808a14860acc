"""From documents to a data set on disk: what the data/<name>/prepare.py scripts share. shards.py reads the result.

Files hold documents. A document, or a passage of a long text file, is held out for validation or not, by a hash of what
it says, so that no other file has a say in it. Threads turn the pieces into ids; one writer puts them on disk in the
order in which they were read. So the result does not depend on the number of threads, and memory holds a few pieces.
Every few seconds the place is noted that all on disk stems from: a preparation that was killed goes on there.

Several processes, on several machines too, can share the work. Each takes one range of the text's bytes, and keeps what
it makes of it in a folder of its own, until a last step joins them all.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from quartz import download, files, threads
from quartz.documents import PACKED, PASSAGE, files_of, is_held_out, is_text, pieces_of
from quartz.errors import UserError, check
from quartz.extras import needs
from quartz.tokenizer import (
    END_OF_TEXT,
    PATTERNS,
    SPECIALS,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    from_data,
    read_text,
)

SPLITS = ("train", "val")
TOKENIZERS = ("char", "byte", "gpt2", "bpe")
PASSAGES_OF_A_FILE = 256  # at the least, where one text file is all there is
SHORTEST_PASSAGE = 64  # characters
BATCH_CHARS = 2**19  # what a thread encodes at a time
BPE_VOCABULARY = 8192
SAVE_SECONDS = 5.0  # between two notes of the place
TRAINING_CHARS = 3 * 10**8  # that a BPE is trained on: 1 GB of memory
READ_FOR_ONE = 10  # bytes that are read, at the most, for each character of those
AHEAD = 64  # texts that are read at a time, while others are trained on
REPORT_CHARS = 2**22  # held-out text that tokenizers are compared on
NOTE = "prepare.json"  # the place, in the data set's folder
PARTS = "parts"  # the folder in it of those that are not joined yet: a folder each, and a note of what they share
COPIED_TOKENS = 2**20  # at a time, where parts are joined
AGAIN = "run it again when it can, and it goes on"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How documents become a data set."""

    tokenizer: str = "gpt2"  # char, byte, gpt2, bpe, or a folder whose tokenizer to take
    vocab_size: int = 0  # of bpe; 0 is BPE_VOCABULARY
    pattern: str = "gpt4"  # of bpe
    field: str = "text"  # of .jsonl and .parquet
    skip_bad_files: bool = False  # what can't be read is left out whole; else it ends the preparation
    val_share: float = 0.1
    shard_tokens: int = 10**8
    workers: int = 0  # 0: as many as there are cores
    training_chars: int = 0  # that a BPE is trained on, up to a passage more; 0 is TRAINING_CHARS

    def problems(self) -> list[str]:
        """One line for everything that is wrong."""
        least = 256 + len(SPECIALS)
        rules = [
            (
                self.tokenizer in TOKENIZERS or os.path.isdir(os.path.expanduser(self.tokenizer)),
                f"tokenizer must be {', '.join(TOKENIZERS)}, or a folder that holds one, not {self.tokenizer!r}",
            ),
            (
                self.vocab_size == 0 or least <= self.vocab_size < 2**24,
                f"vocab_size must be at least {least} (256 bytes, {len(SPECIALS)} special tokens), and no giant, "
                f"not {self.vocab_size}",
            ),
            (self.vocab_size == 0 or self.tokenizer == "bpe", f"vocab_size is of bpe, not of {self.tokenizer}"),
            (self.training_chars == 0 or self.tokenizer == "bpe", f"training_chars is of bpe, not of {self.tokenizer}"),
            (self.training_chars >= 0, f"training_chars must be 0 (300 million) or more, not {self.training_chars}"),
            (self.pattern in PATTERNS, f"pattern must be {' or '.join(PATTERNS)}, not {self.pattern!r}"),
            (0 < self.val_share < 1, f"val_share must be between 0 and 1, not {self.val_share}"),
            (self.shard_tokens >= 1, f"shard_tokens must be at least 1, not {self.shard_tokens}"),
            (0 <= self.workers < 2**10, f"workers must be 0 (one a core) or a number of threads, not {self.workers}"),
        ]
        return [line for holds, line in rules if not holds]


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class Shards:
    """The .bin files of a data set while they are written: {split}_{number}.bin.tmp, of shard_tokens each.

    `counts` tells how many tokens, bytes of text and documents a split holds so far.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, counts: dict | None = None):
        """With the counts of an earlier one it goes on where that was. Raises UserError where its files are gone."""
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype).newbyteorder("<"), shard_tokens
        self.counts = counts or {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
        self._files: dict[str, IO[bytes]] = {}
        kept = set()
        for split in SPLITS:
            full, rest = divmod(self.counts[split]["tokens"], shard_tokens)
            for number in range(full + (rest > 0)):
                path, size = self._path(split, number), (shard_tokens if number < full else rest) * self.dtype.itemsize
                kept.add(path)
                if not path.is_file() or path.stat().st_size < size:
                    raise UserError(f"{path} does not hold what was written there")
                os.truncate(path, size)  # what came after the last note comes again
        for path in itertools.chain(*(folder.glob(f"{split}_*.bin.tmp") for split in SPLITS)):
            if path not in kept:
                path.unlink()

    def _path(self, split: str, number: int) -> Path:
        return self.folder / f"{split}_{number:06d}.bin.tmp"

    def write(self, split: str, ids: np.ndarray) -> None:
        while len(ids):
            number, filled = divmod(self.counts[split]["tokens"], self.shard_tokens)
            part, ids = ids[: self.shard_tokens - filled], ids[self.shard_tokens - filled :]
            with files.writing(self._path(split, number), AGAIN):
                if split not in self._files:
                    self._files[split] = open(self._path(split, number), "ab")  # noqa: SIM115 - open until it is full
                self._files[split].write(part.astype(self.dtype).tobytes())
                self.counts[split]["tokens"] += len(part)
                if filled + len(part) == self.shard_tokens:
                    self.sync()
                    self._files.pop(split).close()

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """What was written: (split, tokens), each split from its first token to its last."""
        for split in SPLITS:
            for number in range(-(-self.counts[split]["tokens"] // self.shard_tokens)):
                with open(self._path(split, number), "rb") as file:
                    while block := file.read(COPIED_TOKENS * self.dtype.itemsize):
                        yield split, np.frombuffer(block, self.dtype)

    def sync(self) -> None:
        """What was written reaches the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def names(self) -> dict[str, str]:
        """What the files are called now, and at the end: train.bin where there is but one."""
        names = {}
        for split in SPLITS:
            shards = -(-self.counts[split]["tokens"] // self.shard_tokens)
            for number in range(shards):
                path = self._path(split, number)
                names[path.name] = f"{split}.bin" if shards == 1 else path.name.removesuffix(".tmp")
        return names


def write_dataset(folder: Path, splits: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    """Writes {train,val}.bin and meta.json for token ids by split, in an order that leaves nothing half-finished."""
    with files.writing(folder, AGAIN):
        shards = Shards(folder, _dtype(tokenizer), max(map(len, splits.values())) + 1)
        for split, ids in splits.items():
            shards.write(split, np.array(ids, dtype=np.uint32))
        _publish(folder, shards, tokenizer)
        _tell(shards.counts)


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _publish(folder: Path, shards: Shards, tokenizer: Tokenizer, note: dict | None = None) -> None:
    """Gives the shards, and what describes them, their final names. Until all is on disk, what was there stays."""
    if empty := [split for split in SPLITS if not shards.counts[split]["tokens"]]:
        shards.close()
        if note and len(empty) == len(SPLITS):
            raise UserError("there is no text: the files are empty")
        raise UserError(
            f"the text is too short: nothing is left for {' and '.join(empty)}"
            + (": raise val_share" if note and empty == ["val"] else "")
        )
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": _dtype(tokenizer), "tokenizer": tokenizer.to_data()}
    keys = ("tokens", "bytes", "documents") if note else ("tokens",)
    meta |= {key: {split: shards.counts[split][key] for split in SPLITS} for key in keys}
    contents = {"meta.json": json.dumps(meta).encode()}
    if isinstance(tokenizer, CharTokenizer):  # what nanoGPT's own sample.py looks for
        contents["meta.pkl"] = pickle.dumps(tokenizer.to_nanogpt())
    for name, content in contents.items():
        files.write_through(folder / f"{name}.tmp", content)
    shards.sync()
    shards.close()
    names = {f"{name}.tmp": name for name in contents} | shards.names()
    if note:
        files.write(folder / NOTE, json.dumps({**note, "publish": names}).encode())
    _rename(folder, names, bool(note and "joined" in note))


def _rename(folder: Path, names: dict[str, str], joined: bool = False) -> None:
    """Puts new files in place of the old ones, as far as it is not done yet; of what was joined the parts go.

    Training's go first and come last: without them a folder counts as not prepared.
    """
    if all((folder / name).exists() for name in names):  # of those to come, none is in its place
        for split in SPLITS:
            masks = [folder / f"{split}.mask", *folder.glob(f"{split}_*.mask")]  # of other tokens than the new ones
            for old in [folder / f"{split}.bin", *folder.glob(f"{split}_*.bin"), *masks, folder / "meta.pkl"]:
                old.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name.startswith("train"), name)):
        if (folder / name).exists():
            files.replace(folder / name, folder / names[name])
    if joined:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / NOTE).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# From one to the other


def read_source(source: str, url: str, folder: Path) -> str:
    """The text of the file `source`; without one, of folder/input.txt, which is downloaded from `url` where missing.

    Line ends become newlines. Raises UserError that names --source where nothing can be downloaded.
    """
    path = Path(source or folder / "input.txt")
    if not source and not path.exists():
        download.fetch(url, path, otherwise="with a copy at hand, use --source=FILE")
    return read_text(path, f"{path} can't be read")


def prepare(
    folder: Path,
    source: str,
    recipe: Recipe,
    fetched: Callable[[], list[Path]] | None = None,
    validation: str = "",
    part: str = "",
    join: int = 0,
) -> None:
    """Makes `folder` a data set of what `source` names, or, where that is empty, of the files that `fetched` returns.

    validation: if files have this in their names, what they hold is held out, in place of a share of all.
    part: i/n makes the i-th of n parts alone. join: n makes the data set of n parts, once all are there. Raises
    UserError for all that is wrong with the recipe, and for sources that can't be read.
    """
    paths, source, folder = [], os.path.expanduser(source), folder.expanduser()
    number, count = _numbers(part)
    rules = [(False, line) for line in recipe.problems()]
    rules += [
        (not part or 1 <= number <= count, f"part must be i/n, with i from 1 to n, such as 2/8, not {part!r}"),
        (join >= 0, f"join must be the number of parts, not {join}"),
        (not (part and join), "part and join exclude each other: the parts first, then join"),
    ]
    if by_source := bool(source) or fetched is None:
        check(rules, [lambda: paths.extend(files_of(source))])
    else:
        check(rules)
    place = folder / PARTS / f"{number}_of_{count}" if part else folder
    with files.writing(place):
        place.mkdir(parents=True, exist_ok=True)
    if not part:
        with files.claimed(folder, "preparation"):
            whole = Preparation(folder, paths if by_source else fetched(), recipe, validation)
            whole.join(join) if join else whole.run()
        return
    with files.claimed(place, "preparation"):
        with files.claimed(folder / PARTS, "preparation", wait=True):  # what all need, the first one makes
            its = Preparation(place, paths if by_source else fetched(), recipe, validation, (number, count))
            tokenizer = its.shared_tokenizer()
        its.run(tokenizer)


def _numbers(part: str) -> tuple[int, int]:
    """i and n of i/n; 0 of 0 where it is none."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    return (int(found[1]), int(found[2])) if found else (0, 0)


class Preparation:
    """One way from files to a data set, or to one part of it; or the rest of a way that was begun.

    A part is a range of all files' bytes in a row, with the documents, or passages, that end in it: so parts are of a
    size however large the files are, one file can be shared out, and the parts' tokens, one behind the other, are the
    whole's. What a part finds before its range in the first of its files is read and passed over.
    """

    def __init__(
        self, folder: Path, paths: list[Path], recipe: Recipe, validation: str, part: tuple[int, int] | None = None
    ):
        self.folder, self.paths, self.recipe = folder, paths, recipe
        self.validation = {path for path in paths if validation and validation in path.name}
        self.stamps = [_stamp(path) for path in paths]
        self.sizes = [size for size, _ in self.stamps]
        self.ends = [0, *itertools.accumulate(self.sizes)]
        self.part, (number, count) = part, part or (1, 1)
        self.begin, self.end = (self.ends[-1] * nth // count for nth in (number - 1, number))
        self.passage = PASSAGE
        if len(paths) == 1 and is_text(paths[0]):
            size = self.sizes[0] if paths[0].suffix not in PACKED else self._unpacked_size()
            self.passage = max(SHORTEST_PASSAGE, min(PASSAGE, size // PASSAGES_OF_A_FILE))
        self.workers = recipe.workers or threads.cores()
        told = [dataclasses.asdict(dataclasses.replace(recipe, workers=0))]
        if told[0]["training_chars"] in (0, TRAINING_CHARS):
            del told[0]["training_chars"]  # as in notes from before there was a choice
        told += [validation, [str(path.resolve()) for path in paths], self.stamps]
        told += [sys.version_info[:2]]  # how far a .gz file is read at a time differs, and so where a part ends
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _unpacked_size(self) -> int:
        return sum(len(piece.text.encode("utf-8", "replace")) for piece in pieces_of(self.paths[0], self.recipe.field))

    def run(self, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: where it is not to be made here."""
        with files.writing(self.folder, AGAIN):
            note = self._noted()
            if "publish" in note:
                self._end_publishing(note)
                return
            tokenizer = tokenizer or (from_data(note["tokenizer"]) if note else self.make_tokenizer())
            try:
                shards = Shards(self.folder, _dtype(tokenizer), self.recipe.shard_tokens, note.get("counts"))
            except UserError as problem:
                print(f"note: {problem}: beginning anew", file=sys.stderr)
                note, shards = {}, Shards(self.folder, _dtype(tokenizer), self.recipe.shard_tokens)
            note = note or {
                "identity": self.identity,
                "tokenizer": tokenizer.to_data(),
                "place": {"file": self._first_file(), "piece": 0, "open": None, "read": self.begin},
                "counts": shards.counts,
            }
            if (read := note["place"]["read"] - self.begin) > 0:
                print(f"going on at {read / (self.end - self.begin):.0%} of the {'part' if self.part else 'text'}")
            try:
                self._encode_all(tokenizer, shards, note)
                self._check_unchanged()
                if self.part:
                    shards.sync()
                    files.write(self.folder / NOTE, json.dumps({**note, "tokenizer": None, "is_whole": True}).encode())
                else:
                    _publish(self.folder, shards, tokenizer, note)
            finally:
                shards.close()
            _tell(shards.counts)

    def _end_publishing(self, note: dict) -> None:
        _rename(self.folder, note["publish"], "joined" in note)
        _tell(note["counts"])

    def _first_file(self) -> int:
        """The first that holds something of this part."""
        return max(0, bisect.bisect_left(self.ends, self.begin) - 1)

    def shared_tokenizer(self) -> Tokenizer:
        """That of all parts, made where there is none yet. Raises UserError where the parts are of another identity."""
        noted = _read_note(self.folder.parent)
        if not noted:
            noted = {"identity": self.identity, "tokenizer": self.make_tokenizer().to_data()}
            with files.writing(self.folder, AGAIN):
                own = self.folder / f"{PARTS}.tmp"  # of this part alone: some file systems know no locks
                files.write_through(own, json.dumps(noted).encode())
                files.replace(own, self.folder.parent / NOTE)
        self._check_same(noted, self.folder.parent)
        return from_data(noted["tokenizer"])

    def _check_same(self, note: dict, folder: Path) -> None:
        if note["identity"] != self.identity:
            raise UserError(f"{folder} is of another text, recipe or Python: take that one, or delete the folder")

    def join(self, count: int) -> None:
        """Makes the data set of `count` parts, and deletes these. Raises UserError where some are not whole."""
        with files.writing(self.folder, AGAIN):
            note = self._noted()
            if "publish" in note:
                self._end_publishing(note)
                return
            tokenizer, parts = self._whole_parts(count)
            (self.folder / NOTE).unlink(missing_ok=True)
            shards = Shards(self.folder, _dtype(tokenizer), self.recipe.shard_tokens)
            try:
                for part in parts:
                    for split, tokens in part.read():
                        shards.write(split, tokens)
                    for split, key in itertools.product(SPLITS, ("bytes", "documents")):
                        shards.counts[split][key] += part.counts[split][key]
                self._check_unchanged()
                note = {"identity": self.identity, "counts": shards.counts, "joined": True}
                _publish(self.folder, shards, tokenizer, note)
            finally:
                shards.close()
            _tell(shards.counts)

    def _whole_parts(self, count: int) -> tuple[Tokenizer, list[Shards]]:
        """Their tokenizer, and all `count` parts. Raises UserError where one is not whole, or not of this identity."""
        folders = [self.folder / PARTS / f"{number}_of_{count}" for number in range(1, count + 1)]
        notes, parts = [{**_read_note(folder), "tokenizer": None} for folder in folders], []
        if lacking := [f"{n}/{count}" for n, note in enumerate(notes, 1) if not note.get("is_whole")]:
            more = " …" if len(lacking) > 9 else ""
            raise UserError(f"{len(lacking)} of {count} parts are not whole: --part={', '.join(lacking[:9])}{more}")
        shared = _read_note(self.folder / PARTS)
        tokenizer = from_data(shared.get("tokenizer"))
        for folder, note in zip([self.folder / PARTS, *folders], [shared, *notes], strict=True):
            self._check_same(note, folder)
        for number, (folder, note) in enumerate(zip(folders, notes, strict=True), 1):
            try:
                parts.append(Shards(folder, _dtype(tokenizer), self.recipe.shard_tokens, note["counts"]))
            except UserError as problem:
                raise UserError(f"{problem}: prepare --part={number}/{count} again") from problem
        return tokenizer, parts

    def _noted(self) -> dict:
        """The note of an earlier, unfinished preparation of the same files by the same recipe; else nothing."""
        note = _read_note(self.folder)
        if note and note["identity"] != self.identity:
            print("note: what was begun here is of another text or recipe: beginning anew", file=sys.stderr)
            return {}
        return note

    @functools.cache  # noqa: B019 - there is one of them, as long as the program
    def _is_bad(self, path: Path) -> bool:
        try:
            collections.deque(pieces_of(path, self.recipe.field, self.passage), maxlen=0)
        except UserError as problem:
            print(f"note: left out: {problem}", file=sys.stderr)
            return True
        return False

    def _check_unchanged(self) -> None:
        for path, stamp in zip(self.paths, self.stamps, strict=True):
            if _stamp(path) != stamp:
                raise UserError(f"{path} was changed while it was read: run it again")

    def make_tokenizer(self) -> Tokenizer:
        """The recipe's tokenizer, made of the text where it is of that kind."""
        if self.recipe.tokenizer not in TOKENIZERS:
            return tokenizer_at(Path(self.recipe.tokenizer).expanduser())
        if self.recipe.tokenizer == "gpt2":
            return GPT2Tokenizer()
        if self.recipe.tokenizer == "byte":
            return BPETokenizer.of_merges([], self.recipe.pattern)
        if self.recipe.tokenizer == "char":
            chars = set()
            with self._bar("reading", 0) as bar:
                for _, _, text, _, place in self._pieces({"file": 0, "piece": 0}):
                    chars.update(text)
                    _move(bar, place)
            if not chars:
                raise UserError("there is no text: the files are empty")
            return CharTokenizer(sorted(chars), [END_OF_TEXT])
        needs("tokenizers", "training a tokenizer", "data")
        began, sample, seen = time.perf_counter(), [], {"train": 0, "val": 0}
        texts, size = self._training_texts(seen, sample), self.recipe.vocab_size or BPE_VOCABULARY
        tokenizer = BPETokenizer.train(_ahead(texts), size, self.recipe.pattern)
        seconds = time.perf_counter() - began
        print(f"trained {tokenizer.vocab_size:,} tokens on {seen['train']:,} characters in {seconds:.1f} s")
        _compare(tokenizer, sample, self.workers)
        return tokenizer

    def _training_texts(self, seen: dict[str, int], sample: list[str]) -> Iterator[str]:
        """What is not held out, up to training_chars, spread evenly over the text; puts some of the rest in `sample`.

        Of a text that is far larger, over the first part of each file. What is even is characters for each byte of the
        files: one that is packed much closer than the others gives less of its text.
        """
        most, total = self.recipe.training_chars or TRAINING_CHARS, self.ends[-1]
        share = min(1, READ_FOR_ONE * most / max(1, total))  # of each file, that is read

        def is_enough(reached: float) -> bool:
            """For the text up to this byte of all files."""
            return seen["train"] * total > most * reached

        with self._bar("training a tokenizer", 0) as bar:
            for number, (begin, end) in enumerate(itertools.pairwise(self.ends)):
                if is_enough(end):
                    continue
                is_held_out = self.paths[number] in self.validation
                for _, split, text, _, place in self._pieces({"file": number, "piece": 0}, number + 1):
                    reached = min(end, begin + (place - begin) / share)  # by blocks, where it is no line or row
                    is_over = share < 1 and reached == end and (is_held_out or is_enough(end))
                    if split == "val":
                        if seen["val"] < REPORT_CHARS:
                            sample.append(text)
                        seen["val"] += len(text)
                    elif not is_enough(reached):
                        yield text
                        seen["train"] += len(text)
                    _move(bar, place)
                    if is_over:
                        break
                _move(bar, end)

    def _pieces(self, place: dict, end: int | None = None) -> Iterator[tuple[tuple[int, int], str, str, tuple, int]]:
        """From `place` on: ((file, piece), split, text, (bytes of it, whether a document ends), bytes read of all)."""
        for number in range(place["file"], len(self.paths) if end is None else end):
            path, first = self.paths[number], place["piece"] if number == place["file"] else 0
            if self.recipe.skip_bad_files and self._is_bad(path):
                continue
            pieces = itertools.islice(pieces_of(path, self.recipe.field, self.passage), first, None)
            for n, piece in enumerate(pieces, first):
                text = piece.text
                try:
                    data = text.encode()
                except UnicodeEncodeError:  # half a pair of UTF-16, which JSON can hold
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                    data = text.encode()
                read = self.ends[number] + min(piece.place, self.sizes[number])
                held_out = path in self.validation if self.validation else is_held_out(data, self.recipe.val_share)
                split = "val" if held_out else "train"
                yield (number, n), split, text, (len(data), piece.is_end), read

    def _batches(self, place: dict) -> Iterator[tuple[list[tuple[str, str, int, bool]], dict]]:
        """What a thread encodes at once: (split, text, its bytes, whether a document ends), and the place behind it."""
        batch, chars, begun = [], 0, place["open"]  # the split of a document that has not ended
        for (number, n), split, text, (size, is_end), read in self._pieces(place):
            if read < self.begin:
                begun = None if is_end else split
                continue
            if read >= self.end and self.end < self.ends[-1]:
                break
            if begun not in (None, split):  # it goes on in the other split, and is over in this one
                batch.append((begun, "", 0, True))
            batch.append((split, text, size, is_end))
            begun, chars = None if is_end else split, chars + len(text)
            if chars >= BATCH_CHARS:
                yield batch, {"file": number, "piece": n + 1, "open": begun, "read": read}
                batch, chars = [], 0
        yield batch, {"file": len(self.paths), "piece": 0, "open": None, "read": self.end}

    def _encode_all(self, tokenizer: Tokenizer, shards: Shards, note: dict) -> None:
        """Writes all that is behind note["place"], and moves the note along."""
        saved, pending = time.monotonic(), collections.deque()
        with self._bar("encoding", note["place"]["read"]) as bar, ThreadPoolExecutor(self.workers) as pool:

            def write_first() -> None:
                nonlocal saved
                encoded, batch, place = pending.popleft()
                for split, ids in encoded.result().items():
                    shards.write(split, ids)
                for split, _, size, is_end in batch:
                    shards.counts[split]["bytes"] += size
                    shards.counts[split]["documents"] += is_end
                note["place"] = place
                _move(bar, place["read"])
                if time.monotonic() - saved > SAVE_SECONDS:
                    shards.sync()
                    files.write(self.folder / NOTE, json.dumps(note).encode())
                    saved = time.monotonic()

            for batch, place in self._batches(note["place"]):
                pending.append((pool.submit(_encoded, tokenizer, batch), batch, place))
                if len(pending) > 2 * self.workers:
                    write_first()
            while pending:
                write_first()

    def _bar(self, what: str, read: int) -> tqdm:
        show = sys.stderr.isatty()
        how = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "disable": not show}
        return tqdm(desc=what, total=self.ends[-1], initial=read, **how)


def tokenizer_at(folder: Path) -> Tokenizer:
    """The tokenizer of a data set, of a model in Hugging Face's layout, or of a checkpoint.

    Raises UserError where the folder has none, or one without the token that is to stand behind each document.
    """
    if (folder / "meta.json").exists() or (folder / "meta.pkl").exists():
        from quartz import shards  # with it comes torch, which takes seconds to load

        data = shards.load_meta(folder)["tokenizer"]
    elif (folder / "tokenizer.json").exists():
        from quartz import hf_folder

        data = hf_folder.read_tokenizer(folder)
    else:
        from quartz import run_folder

        data = run_folder.load_to_use(str(folder)).get("tokenizer")
    if not data:
        raise UserError(f"{folder} has no tokenizer")
    tokenizer = from_data(data)
    if END_OF_TEXT not in tokenizer.specials:
        raise UserError(f"the tokenizer of {folder} has no {END_OF_TEXT}, which is to stand behind each document")
    return tokenizer


def _read_note(folder: Path) -> dict:
    """What is noted in a folder; nothing where there is no note that could be used."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return note if isinstance(note.get("identity"), str) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _stamp(path: Path) -> tuple[int, int]:
    """The size, and the time of the last change; nothing of either for a file that is gone."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return 0, 0


def _move(bar: tqdm, place: int) -> None:
    bar.update(place - bar.n)


def _encoded(tokenizer: Tokenizer, batch: list[tuple[str, str, int, bool]]) -> dict[str, np.ndarray]:
    """The ids of a batch by split, <|endoftext|> after each document."""
    parts, end = {split: [] for split in SPLITS}, np.array([tokenizer.specials[END_OF_TEXT]], dtype=np.uint32)
    for split, text, _, is_end in batch:
        if text:
            parts[split].append(tokenizer.encode_to_numpy(text))
        if is_end:
            parts[split].append(end)
    return {split: np.concatenate(ids) for split, ids in parts.items() if ids}


def _ahead(texts: Iterator[str]) -> Iterator[str]:
    """The same, of which a thread reads some while those before them are in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(lambda: [*itertools.islice(texts, AHEAD)])
        while read := coming.result():
            coming = reader.submit(lambda: [*itertools.islice(texts, AHEAD)])
            yield from read


def _compare(tokenizer: Tokenizer, sample: list[str], workers: int) -> None:
    """Prints how many bytes a token stands for, beside GPT-2's, on text that neither was trained on."""
    size = sum(len(text.encode()) for text in sample)
    if not size:
        return

    def bytes_a_token(its: Tokenizer) -> float:
        with ThreadPoolExecutor(workers) as pool:
            return size / sum(map(len, pool.map(its.encode_to_numpy, sample)))

    line = f"on {size:,} bytes held out: {bytes_a_token(tokenizer):.3f} bytes a token"
    try:
        gpt2 = GPT2Tokenizer()
        line += f"; GPT-2's {gpt2.vocab_size:,} tokens: {bytes_a_token(gpt2):.3f}"
    except UserError:
        line += " (GPT-2's tokens are not at hand to compare with)"
    print(line)


def _tell(counts: dict[str, dict[str, int]]) -> None:
    for split, its in counts.items():
        print(f"{split} has {its['tokens']:,} tokens", end="")
        more = f": {its['documents']:,} documents, {its['bytes'] / max(1, its['tokens']):.2f} bytes a token"
        print(more if its["documents"] else "")
