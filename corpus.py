"""From raw text to a data set on disk: what the data/<name>/prepare.py scripts share. dataset.py reads the result."""

import http.client
import json
import os
import pickle
import shutil
import urllib.request
from pathlib import Path

import numpy as np

from configurator import UserError
from tokenizer import Tokenizer, decode_text


def read_source(source: str, url: str, folder: Path) -> str:
    """The text of the file `source`; without one, of folder/input.txt, which is downloaded from `url` where missing.

    Line ends become newlines. Raises UserError that names --source where nothing can be downloaded.
    """
    path = Path(source or folder / "input.txt")
    if not source and not path.exists():
        partial = path.with_name("input.txt.tmp")
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, open(partial, "wb") as file:
                shutil.copyfileobj(reply, file)
                if file.tell() != int(reply.headers.get("Content-Length", file.tell())):
                    raise OSError("the connection broke off")
            os.replace(partial, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{url} can't be downloaded ({error}); with a copy at hand, use --source=FILE") from error
    try:
        return decode_text(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def write_dataset(folder: Path, splits: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    """Writes {train,val}.bin and meta.json for token ids by split, in an order that leaves nothing half-finished.

    All is written under other names first. train.bin, without which a folder counts as not prepared, goes first and
    comes last.
    """
    if empty := [split for split, ids in splits.items() if not ids]:
        raise UserError(f"the text is too short: nothing is left for {' and '.join(empty)}")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "tokens": {split: len(ids) for split, ids in splits.items()},
        "tokenizer": tokenizer.to_data(),
    }
    contents = {f"{split}.bin": np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")) for split, ids in splits.items()}
    contents["meta.json"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    if meta["tokenizer"]["type"] == "char":  # what nanoGPT's own sample.py looks for
        chars = tokenizer.chars
        theirs = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
        contents["meta.pkl"] = np.frombuffer(pickle.dumps(theirs), dtype=np.uint8)
    try:
        for name, content in contents.items():
            with open(folder / f"{name}.tmp", "wb") as file:
                content.tofile(file)
                file.flush()
                os.fsync(file.fileno())
        (folder / "train.bin").unlink(missing_ok=True)
        for name in sorted(contents, key=lambda name: name == "train.bin"):
            os.replace(folder / f"{name}.tmp", folder / name)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror or error}") from error
    for split, ids in splits.items():
        print(f"{split} has {len(ids):,} tokens")
