"""Documents in files: text, source code, .jsonl, .parquet, each also as .gz or .zst. They are read piece by piece, and
memory holds little of a file however large. What can't be read is named, with its place. corpus.py makes data sets.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from quartz.errors import UserError
from quartz.extras import needs
from quartz.tokenizer import END_OF_TEXT

PACKED = (".gz", ".zst")
PROSE = ".txt .text .md .rst .tex"
CODE = ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .swift .cs .sh"
CODE += " .sql .r .jl .lua .pl .hs .ml .ex .erl .clj .lisp .el .vim .css .html"
JSONL = (".jsonl", ".ndjson")
KINDS = {*PROSE.split(), *CODE.split(), *JSONL, ".parquet"}  # what is taken of a folder
READ_BYTES = 2**20  # of a file, at a time
ZST_BYTES = 2**9  # packed, that are unpacked at a time: they may become 32,768 times as many
PASSAGE = 2**14  # characters of a text file that are held out, or not, as one


class Piece(NamedTuple):
    """A document, or a passage of one."""

    text: str
    is_end: bool  # of its document
    place: int  # bytes of the file that were read for it


def files_of(source: str) -> list[Path]:
    """The files that `source` names: itself, those below a folder that hold text, or what a glob matches; sorted.

    Raises UserError where there are none.
    """
    if not source:
        raise UserError("name your text with --source=PATH: a file, a folder, or a glob in quotes")
    path = Path(source)
    if os.path.isfile(path):  # Path's own methods raise for names that are too long
        return [path]
    if os.path.isdir(path):
        found = [
            file for file in _below(path) if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        taken = [file for file in found if _kind(file) in KINDS and (file.is_file() or file.is_symlink())]
        if len(taken) < len(found):
            others = ", ".join(sorted({file.suffix or file.name for file in set(found) - set(taken)}))
            print(f"note: {len(found) - len(taken)} files are left out: {others[:200]}", file=sys.stderr)
    else:
        found = glob.glob(source, recursive=True)
        taken = [Path(name) for name in found if not os.path.isdir(name)]
        if taken and len(taken) < len(found):
            left_out = f"{len(found) - len(taken)} folders are left out"
            print(f"note: {left_out}: to take what is in them, write ** in the glob", file=sys.stderr)
    if not taken:
        raise UserError(f"no text at {source!r}: --source=PATH names a file, a folder with text, or a glob in quotes")
    return sorted(taken, key=lambda file: file.as_posix())


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, behind links too, but no folder twice: links may form a circle."""
    seen = set()
    for top, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        here = os.path.realpath(top)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        yield from (Path(top) / name for name in names)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from error


def _kind(path: Path) -> str:
    """.jsonl, .parquet, or the ending of some text; that of a packed file is the one within."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix.lower()


def is_text(path: Path) -> bool:
    """Whether it is read in passages, rather than as records."""
    return _kind(path) not in (*JSONL, ".parquet")


def pieces_of(path: Path, field: str, passage: int = PASSAGE) -> Iterator[Piece]:
    """The documents of a file, in passages of up to `passage` characters where it is a text file. None is empty.

    In a text file <|endoftext|> ends a document. Line ends become newlines. Raises UserError that names the file and
    the place of what can't be read.
    """
    try:
        if path.suffix in PACKED and path.stat().st_size == 0:
            raise UserError(f"{path} is damaged: it is empty")
        with open(path, "rb") as raw, _unpacked(path, raw) as file:
            if _kind(path) == ".parquet":
                yield from _of_parquet(path, file, field)
            else:
                texts = _of_jsonl(path, file, field) if _kind(path) in JSONL else _of_text(path, file, passage)
                for text, is_end in texts:
                    yield Piece(text, is_end, raw.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _unpacked(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    if path.suffix not in PACKED:
        yield raw
        return
    file = io.BufferedReader(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else _Zstandard(path, raw), READ_BYTES)
    if _kind(path) != ".parquet":
        yield file
        return
    with tempfile.TemporaryFile() as seekable:  # its table of contents is at its end
        while block := file.read(READ_BYTES):
            seekable.write(block)
        yield seekable


class _Zstandard(io.RawIOBase):
    """Reads frame after frame, and raises EOFError where the last one is cut off, which zstandard's reader does not."""

    def __init__(self, path: Path, raw: IO[bytes]):
        self._zstandard, self._raw = needs("zstandard", f"reading {path}", "data"), raw
        self._frame, self._packed, self._held = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            self._packed = self._packed or self._raw.read(READ_BYTES // 8)
            if not self._packed:
                if self._frame:
                    raise EOFError("it ends in the middle")
                return 0
            part, self._packed = self._packed[:ZST_BYTES], self._packed[ZST_BYTES:]
            try:
                self._frame = self._frame or self._zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                self._held = memoryview(self._frame.decompress(part))
            except self._zstandard.ZstdError as error:
                raise EOFError(error) from error
            if self._frame.eof:
                self._frame, self._packed = None, self._frame.unused_data + self._packed
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _of_text(path: Path, file: IO[bytes], passage: int) -> Iterator[tuple[str, bool]]:
    """Passages end with a line where they can. Where they end follows from the document alone."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    held, begin, read, at_start = "", 0, 0, False
    while block := file.read(READ_BYTES):
        read += len(block)
        held, begin = held[begin:] + _decoded(path, decoder, block, read), 0
        while True:
            while at_start and held.startswith("\n", begin):  # behind <|endoftext|>
                begin += 1
            at_start = at_start and begin == len(held)
            end = held.find(END_OF_TEXT, begin)
            if end < 0:
                break
            yield from _passages(held[begin:end], passage)
            begin, at_start = end + len(END_OF_TEXT), True
        while len(held) - begin > passage + len(END_OF_TEXT):  # of which a part may have been read
            end = held.rfind("\n", begin, begin + passage) + 1 or begin + passage
            yield held[begin:end], False
            begin = end
    rest = held[begin:] + _decoded(path, decoder, b"", read)
    yield from _passages(rest.lstrip("\n") if at_start else rest, passage)


def _decoded(path: Path, decoder: io.IncrementalNewlineDecoder, block: bytes, read: int) -> str:
    try:
        text = decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        place = read - len(error.object) + error.start
        raise UserError(f"{path} is no UTF-8 text: byte {place} is {error.object[error.start]:#04x}") from error
    if "\0" in text:
        raise UserError(f"{path} is no text: it holds NUL characters")
    return text


def _passages(document: str, passage: int) -> Iterator[tuple[str, bool]]:
    begin = 0
    while len(document) - begin > passage:
        end = document.rfind("\n", begin, begin + passage) + 1 or begin + passage
        yield document[begin:end], False
        begin = end
    if document:
        yield document[begin:], True


def _of_jsonl(path: Path, file: IO[bytes], field: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=float)  # Python refuses to read integers of thousands of digits
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or field not in record:
            there = ", ".join(record) if isinstance(record, dict) else "no fields at all"
            raise UserError(f"{path}, line {number} has no field {field!r}, but {there[:200]}: use --field=NAME")
        if text := _checked(record[field], f"{path}, line {number}"):
            yield text, True


def _of_parquet(path: Path, file: IO[bytes], field: str) -> Iterator[Piece]:
    needs("pyarrow", f"reading {path}", "data")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file if path.suffix in PACKED else path, page_checksum_verification=True)
        if field not in table.schema_arrow.names:
            there = ", ".join(table.schema_arrow.names)
            raise UserError(f"{path} has no column {field!r}, but {there[:200]}: use --field=NAME")
        size, rows, row = path.stat().st_size, max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                row += 1
                if text := _checked(value.as_py(), f"{path}, row {row}"):
                    yield Piece(text, True, size * row // rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {row} is no UTF-8 text: byte {error.start}") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no parquet file, or damaged: {str(error)[:200]}") from error


def _checked(text: object, where: str) -> str:
    """A document as it is used: with newlines as line ends; nothing for null."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where} holds no text, but {type(text).__name__}: use --field=NAME")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document is one of the `share` that is for validation. Equal documents are so together."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < share * 2**64
