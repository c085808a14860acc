import json
import os
import pickle

import numpy as np
import pytest

import corpus
import dataset
from configurator import UserError
from dataset import Split
from tokenizer import CharTokenizer


def test_a_data_set_reads_back_as_written_here_and_by_nanogpt(tmp_path):
    tokenizer = CharTokenizer.train("abc\n")
    corpus.write_dataset(tmp_path, {"train": [1, 2, 3], "val": [0]}, tokenizer)
    meta = dataset.load_meta(tmp_path)
    assert meta["tokens"] == {"train": 3, "val": 1} and meta["vocab_size"] == 4
    assert Split(tmp_path, "train", meta).read(0, 3).tolist() == [1, 2, 3]
    theirs = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert theirs == {"vocab_size": 4, "itos": dict(enumerate("\nabc")), "stoi": {c: i for i, c in enumerate("\nabc")}}
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    """Stopped at each of its steps, over an older data set, it leaves the old one whole or none at all."""
    old, new = CharTokenizer.train("ab"), CharTokenizer.train("abcd")
    for stop_at in range(1, 12):
        folder = tmp_path / "data" / str(stop_at)
        folder.mkdir(parents=True)
        corpus.write_dataset(folder, {"train": [0, 1], "val": [1]}, old)
        steps = []

        def step(do, steps=steps, stop_at=stop_at):
            def wrapped(*arguments):
                steps.append(do)
                if len(steps) == stop_at:
                    raise KeyboardInterrupt
                return do(*arguments)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", step(os.fsync))
            patch.setattr(os, "replace", step(os.replace))
            finished = False
            try:
                corpus.write_dataset(folder, {"train": [3, 2, 3], "val": [2]}, new)
                finished = True
            except KeyboardInterrupt:
                pass
        patch.undo()
        monkeypatch.chdir(tmp_path)
        try:
            dataset.find(str(stop_at))
        except UserError:
            assert not finished
            continue
        meta = dataset.load_meta(folder)
        tokens = [Split(folder, name, meta, meta["vocab_size"]).read(0, 1).tolist() for name in ("train", "val")]
        assert tokens == ([[3], [2]] if finished else [[0], [1]])
        assert meta["vocab_size"] == (4 if finished else 2)
    assert finished, "more stops than steps: every step was stopped at"


def test_a_text_too_short_to_split_changes_nothing(tmp_path):
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("a"))
    with pytest.raises(UserError, match="nothing is left for train"):
        corpus.write_dataset(tmp_path, {"train": [], "val": [0]}, CharTokenizer.train("b"))
    assert dataset.load_meta(tmp_path)["tokenizer"]["chars"] == ["a"]


def test_what_is_written_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(corpus.os, "fsync", synced.append)
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("a"))
    assert len(synced) == 4  # two splits, two meta files


def test_json_meta_is_plain(tmp_path):
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("é"))
    assert json.loads((tmp_path / "meta.json").read_text())["tokenizer"] == {"type": "char", "chars": ["é"]}
