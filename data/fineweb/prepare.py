"""FineWeb's sample of 10 billion tokens (the web, filtered), or that of FineWeb-Edu (what teaches something).

    python data/fineweb/prepare.py                     # downloads 30 GB to data/fineweb/source, then encodes them
    python data/fineweb/prepare.py --edu=True --out=data/fineweb_edu
    python data/fineweb/prepare.py --max_files=1       # a fifteenth of it
    python data/fineweb/prepare.py --source='fineweb/*.parquet'

Broken off and started again, the download and the encoding go on where they were.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator

edu = False  # FineWeb-Edu
source = ""  # a file, a folder or a glob to use instead of the download
out = ""  # folder of the data set, and of what is downloaded; empty is this script's own
max_files = 0  # of those on the hub, how many; 0 is all
tokenizer = "gpt2"  # gpt2, byte, char, or bpe: byte pairs of this text's own
vocab_size = 0  # of bpe: tokens in all, special ones included; 0 is 8192
training_chars = 0  # of bpe: so many characters, from everywhere, it is trained on; 0 is 300 million
field = "text"  # where files of --source hold the text
skip_bad_files = False  # leave out, with a note, files that can't be read as they should; False: stop at the first
val_share = 0.001  # of the documents is held out for validation
shard_tokens = 100_000_000  # tokens in a file, at the most
workers = 0  # threads; 0 is one a core. The result is the same
part = ""  # i/n: only the i-th of n parts, which other processes or machines share; then --join
join = 0  # n: make the data set of its n parts, of which each was prepared with --part
configurator.configure(globals())

from quartz import corpus, download


def main() -> None:
    folder, name = Path(out or Path(__file__).parent), "fineweb-edu" if edu else "fineweb"
    how = (val_share, shard_tokens, workers, training_chars)
    recipe = corpus.Recipe(tokenizer, vocab_size, "gpt4", field, skip_bad_files, *how)
    places, below = [("main", "sample/10BT")], folder / "source" / name
    corpus.prepare(
        folder,
        source,
        recipe,
        lambda: download.hub_files(f"HuggingFaceFW/{name}", places, below, max_files),
        part=part,
        join=join,
    )


if __name__ == "__main__":
    with configurator.user_errors():
        main()
