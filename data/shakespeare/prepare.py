"""Tiny Shakespeare (1.1 MB) in GPT-2's BPE tokens: train.bin, val.bin and meta.json in this folder.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --source=FILE

Without --source the text is input.txt of this folder, which is downloaded if it is not there. Any other text does too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator

source = ""  # a text file to use instead of the download
url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"  # where to download
configurator.configure(globals())

from quartz import corpus
from quartz.tokenizer import GPT2Tokenizer


def main() -> None:
    folder = Path(__file__).resolve().parent
    text = corpus.read_source(source, url, folder)
    tokenizer = GPT2Tokenizer()
    split = int(len(text) * 0.9)
    corpus.write_dataset(
        folder, {"train": tokenizer.encode(text[:split]), "val": tokenizer.encode(text[split:])}, tokenizer
    )


if __name__ == "__main__":
    with configurator.user_errors():
        main()
