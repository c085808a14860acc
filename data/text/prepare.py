"""Your own text: token files and meta.json in this folder, or in another one with --out.

    python data/text/prepare.py --source=mine.txt --tokenizer=char
    python data/text/prepare.py --source=~/notes --tokenizer=bpe --vocab_size=4096
    python data/text/prepare.py --source='crawl/**/*.jsonl.zst' --field=content --out=data/crawl
    python train.py --dataset=text …

A source is a file, a folder or a glob: text, Markdown and source code, one document a file (or several, with
<|endoftext|> between them); .jsonl, a document a line; .parquet, a document a row; each also as .gz or .zst. Killed and
started again, it goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator

source = ""  # a file, a folder, or a glob in quotes
out = ""  # folder of the data set; empty is this script's own
tokenizer = "gpt2"  # char, byte, gpt2, bpe (byte pairs of this text's own), or a folder: of a data set, or of a model
vocab_size = 0  # of bpe: tokens in all, special ones included; 0 is 8192
training_chars = 0  # of bpe: so many characters, from everywhere, it is trained on; 0 is 300 million
pattern = "gpt4"  # of bpe: how text is split before bytes are merged, as for gpt4 or gpt2
field = "text"  # where a line of .jsonl, or a .parquet file, holds the text
skip_bad_files = False  # leave out, with a note, files that can't be read as they should; False: stop at the first
val_share = 0.1  # of documents, and of passages of long text files, is held out for validation
shard_tokens = 100_000_000  # tokens in a file, at the most
workers = 0  # threads; 0 is one a core. The result is the same
part = ""  # i/n: only the i-th of n parts, which other processes or machines share; then --join
join = 0  # n: make the data set of its n parts, of which each was prepared with --part
configurator.configure(globals())

from quartz import corpus


def main() -> None:
    how = (val_share, shard_tokens, workers, training_chars)
    recipe = corpus.Recipe(tokenizer, vocab_size, pattern, field, skip_bad_files, *how)
    corpus.prepare(Path(out or Path(__file__).parent), source, recipe, part=part, join=join)


if __name__ == "__main__":
    with configurator.user_errors():
        main()
