"""The source of Python's own standard library, one token a character: a data set that every machine already has.

    python data/pystdlib_char/prepare.py
    python data/pystdlib_char/prepare.py --source=FOLDER

Takes the .py files of the running Python (of FOLDER, with --source) that are pure ASCII, without tests and without
tables of data. The files are put in an order that depends on their names alone, so the last tenth, which is held out
for validation, is code of the same kind; no file but the one at the border is in both.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator

source = ""  # a folder of Python files to use instead of the standard library
configurator.configure(globals())

from configurator import UserError
from quartz import corpus
from quartz.tokenizer import CharTokenizer

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


def read_files(root: Path) -> str:
    """The text of all files below `root` that are taken, with newlines alone as line ends."""
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(os.fsencode(name.as_posix())).digest())
    texts = []
    for name in names:
        try:
            content = (root / name).read_bytes()
        except OSError:  # a broken link, say
            continue
        if content.isascii():
            texts.append(content.decode("ascii").replace("\r\n", "\n"))
    return "".join(texts)


def main() -> None:
    root = Path(source or sysconfig.get_path("stdlib"))
    text = read_files(root)
    if not text:
        raise UserError(f"no Python source in {root}: name a folder of .py files with --source=FOLDER")
    tokenizer = CharTokenizer.train(text)
    print(f"length of dataset in characters: {len(text):,}")
    print(f"vocab size: {tokenizer.vocab_size:,}")
    split = int(len(text) * 0.9)
    ids = tokenizer.encode(text)
    folder = Path(__file__).resolve().parent
    corpus.write_dataset(folder, {"train": ids[:split], "val": ids[split:]}, tokenizer)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
