"""Tiny Shakespeare (1.1 MB), one token a character: train.bin, val.bin and meta.json in this folder.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --source=FILE

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
from quartz.tokenizer import CharTokenizer


def main() -> None:
    folder = Path(__file__).resolve().parent
    text = corpus.read_source(source, url, folder)
    tokenizer = CharTokenizer.train(text)
    print(f"length of dataset in characters: {len(text):,}")
    print("all the unique characters:", "".join(tokenizer.chars))
    print(f"vocab size: {tokenizer.vocab_size:,}")
    split = int(len(text) * 0.9)
    ids = tokenizer.encode(text)
    corpus.write_dataset(folder, {"train": ids[:split], "val": ids[split:]}, tokenizer)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
