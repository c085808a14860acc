import gzip
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PRINT_PEAK, ROOT

from configurator import UserError
from quartz import corpus, documents, files, shards
from quartz.corpus import Recipe, prepare
from quartz.shards import Split
from quartz.tokenizer import END_OF_TEXT, CharTokenizer, from_data


def test_a_data_set_reads_back_as_written_here_and_by_nanogpt(tmp_path):
    tokenizer = CharTokenizer.train("abc\n")
    corpus.write_dataset(tmp_path, {"train": [1, 2, 3], "val": [0]}, tokenizer)
    meta = shards.load_meta(tmp_path)
    assert meta["tokens"] == {"train": 3, "val": 1} and meta["vocab_size"] == 4
    assert Split(tmp_path, "train", meta).read(0, 3).tolist() == [1, 2, 3]
    theirs = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert theirs == {"vocab_size": 4, "itos": dict(enumerate("\nabc")), "stoi": {c: i for i, c in enumerate("\nabc")}}
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "meta.pkl", "train.bin", "val.bin"]


def test_masks_of_other_tokens_go_when_a_data_set_is_prepared_anew(tmp_path):
    names = ("train.mask", "val_0.mask", "test.mask")
    for name in names:
        (tmp_path / name).write_bytes(b"\1\0\1")
    corpus.write_dataset(tmp_path, {"train": [1, 2, 3], "val": [0]}, CharTokenizer.train("abc\n"))
    assert [name for name in names if (tmp_path / name).exists()] == ["test.mask"]
    assert not Split(tmp_path, "train", shards.load_meta(tmp_path)).is_weighted


def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    """Stopped at each of its steps, over an older data set, it leaves the old one, the new one, or none at all."""
    old, new = CharTokenizer.train("ab"), CharTokenizer.train("abcd")
    for stop_at in range(1, 16):
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
            shards.find(str(stop_at))
        except UserError:
            assert not finished
            continue
        meta = shards.load_meta(folder)
        tokens = [Split(folder, name, meta, meta["vocab_size"]).read(0, 1).tolist() for name in ("train", "val")]
        found = (tokens, meta["vocab_size"])
        assert found == ([[3], [2]], 4) or (not finished and found == ([[0], [1]], 2))
    assert finished, "more stops than steps: every step was stopped at"


def test_a_text_too_short_to_split_changes_nothing(tmp_path):
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("a"))
    with pytest.raises(UserError, match="nothing is left for train"):
        corpus.write_dataset(tmp_path, {"train": [], "val": [0]}, CharTokenizer.train("b"))
    assert shards.load_meta(tmp_path)["tokenizer"]["chars"] == ["a"]


def test_what_is_written_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(corpus.os, "fsync", synced.append)
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("a"))
    assert len(synced) == 8  # two splits, two meta files; their names


def test_json_meta_is_plain(tmp_path):
    corpus.write_dataset(tmp_path, {"train": [0], "val": [0]}, CharTokenizer.train("é"))
    assert json.loads((tmp_path / "meta.json").read_text())["tokenizer"] == {"type": "char", "chars": ["é"]}


# ----------------------------------------------------------------------------------------------------------------------
# From files to a data set


def read_back(folder) -> dict[str, list[str]]:
    """The documents of each split, or what of them is there."""
    meta = shards.load_meta(folder)
    tokenizer, found = from_data(meta["tokenizer"]), {}
    for name in ("train", "val"):
        split = Split(folder, name, meta, meta["vocab_size"])
        ids = split.read(0, len(split)).tolist()
        texts = tokenizer.decode(ids).split(END_OF_TEXT)
        assert texts.pop() == "" and ids.count(tokenizer.specials[END_OF_TEXT]) == len(texts)
        found[name] = texts
    return found


def contents(folder) -> dict[str, str]:
    """What is in the folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def stories(tmp_path) -> list[str]:
    """300 documents in three files of two kinds in tmp_path/src."""
    texts = [f"Story {n}.\nOnce there was{' a fox' * (n % 17)}, ä {n * n}.\n" for n in range(300)]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:120]))
    (tmp_path / "src" / "b.txt").write_text(END_OF_TEXT.join(texts[120:200]))
    (tmp_path / "src" / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[200:]))
    return texts


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe", "gpt2"])
def test_documents_become_a_data_set_with_every_tokenizer(tmp_path, stories, tokenizer, request, capsys):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_bpe")
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    out = tmp_path / "out"
    prepare(out, str(tmp_path / "src"), Recipe(tokenizer, vocab_size=300 if tokenizer == "bpe" else 0))
    found = read_back(out)
    assert sorted(found["train"] + found["val"]) == sorted(stories)
    assert found["val"] == [text for text in stories if documents.is_held_out(text.encode(), 0.1)]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["documents"] == {split: len(texts) for split, texts in found.items()}
    assert meta["bytes"] == {split: sum(len(text.encode()) for text in texts) for split, texts in found.items()}
    told = capsys.readouterr().out
    assert f"val has {meta['tokens']['val']:,} tokens: {len(found['val'])} documents" in told
    names = {"train.bin", "val.bin", "meta.json"} | ({"meta.pkl"} if tokenizer == "char" else set())
    assert contents(out).keys() == names


def test_adding_files_moves_nothing_between_the_splits(tmp_path, stories):
    prepare(tmp_path / "before", str(tmp_path / "src"), Recipe("byte"))
    for n in range(50):
        (tmp_path / "src" / f"{n}.txt").write_text(f"new {n}")
    prepare(tmp_path / "after", str(tmp_path / "src"), Recipe("byte"))
    before, after = read_back(tmp_path / "before"), read_back(tmp_path / "after")
    assert all(set(before[split]) == set(after[split]) & set(stories) for split in ("train", "val"))


def test_one_long_text_gives_both_splits(tmp_path):
    """Its passages are in one of the two; neighbours stay together, and an end stands where one is taken out."""
    lines = [f"line {n} of a long text\n" for n in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    prepare(tmp_path / "out", str(tmp_path / "a.txt"), Recipe("char"))
    found = read_back(tmp_path / "out")
    both = [line for texts in found.values() for text in texts for line in text.splitlines(keepends=True)]
    assert sorted(both) == sorted(lines)
    assert 0.04 < len("".join(found["val"])) / len("".join(lines)) < 0.2
    whole = "".join(lines)
    assert all(text in whole for texts in found.values() for text in texts)
    assert len(found["train"]) <= len(found["val"]) + 1


def test_the_result_does_not_depend_on_the_number_of_workers_nor_on_batches(tmp_path, stories, monkeypatch):
    recipe, found = Recipe("bpe", 280, shard_tokens=1000), []
    for workers, batch in ((1, 2**19), (2, 100), (7, 1000)):
        monkeypatch.setattr(corpus, "BATCH_CHARS", batch)
        out = tmp_path / str(workers)
        prepare(out, str(tmp_path / "src"), recipe.__class__(**{**recipe.__dict__, "workers": workers}))
        found.append(contents(out))
    assert found[0] == found[1] == found[2] and len(found[0]) > 5
    sizes = [path.stat().st_size for path in sorted(out.glob("train_*.bin"))]
    assert set(sizes[:-1]) == {2000} and 0 < sizes[-1] <= 2000, "shards of bounded size"
    assert "val.bin" in found[0] or "val_000000.bin" in found[0]


class Killed(BaseException):
    pass


def test_killed_at_any_step_a_preparation_goes_on_where_it_was(tmp_path, stories, monkeypatch, capsys):
    """At whatever step it is stopped, over an older data set too: the next start ends in the same bytes."""
    monkeypatch.setattr(corpus, "BATCH_CHARS", 3000)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    recipe = Recipe("char", shard_tokens=9000, workers=1)
    prepare(tmp_path / "whole", str(tmp_path / "src"), recipe)
    expected, stop_at, finished, went_on = contents(tmp_path / "whole"), 0, False, 0
    while not finished:
        stop_at += 1
        out, steps = tmp_path / str(stop_at), []
        if stop_at % 2:
            out.mkdir()
            corpus.write_dataset(out, {"train": [0, 1], "val": [1]}, CharTokenizer.train("ab"))

        def step(do, steps=steps, stop_at=stop_at):
            def wrapped(*arguments):
                steps.append(do)
                if len(steps) == stop_at:
                    raise Killed
                return do(*arguments)

            return wrapped

        with monkeypatch.context() as patch:
            for where, name in ((corpus.Shards, "write"), (os, "replace"), (files, "write_through"), (files, "whole")):
                patch.setattr(where, name, step(getattr(where, name)))
            try:
                prepare(out, str(tmp_path / "src"), recipe)
                finished = True
            except Killed:
                pass
        capsys.readouterr()
        prepare(out, str(tmp_path / "src"), recipe)
        went_on += "going on at" in capsys.readouterr().out
        assert contents(out) == expected, stop_at
    assert stop_at > 25 and went_on > stop_at / 3, "more than a third of the stops came after some work"


def test_a_killed_process_goes_on_where_it_was(tmp_path, start):
    """SIGKILL, while it works; nothing is read as a data set before it is whole."""
    text = "".join(f"{n} bottles and {n * n} glasses\n" for n in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    code = "import sys; from quartz import corpus; from pathlib import Path; "
    code += "corpus.SAVE_SECONDS, corpus.BATCH_CHARS = 0, 2000; "
    code += "corpus.prepare(Path(sys.argv[2]), sys.argv[1], corpus.Recipe('byte', shard_tokens=100_000))"

    def begin(out):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(out)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = begin(tmp_path / "killed")
    note, deadline = tmp_path / "killed" / corpus.NOTE, time.monotonic() + 60
    while not (note.exists() and json.loads(note.read_text())["place"]["read"] > 200_000):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("*.bin"))
    again = begin(tmp_path / "killed")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and "going on at" in out, err
    whole = begin(tmp_path / "whole")
    assert whole.wait(120) == 0, whole.communicate()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_another_recipe_or_another_text_begins_anew(tmp_path, stories, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1500)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    source, write = str(tmp_path / "src"), corpus.Shards.write
    for n, change in enumerate(("recipe", "text", "nothing")):
        out, left = tmp_path / change, [9]

        def stop(*arguments, left=left):
            left[0] -= 1
            if not left[0]:
                raise Killed
            write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(corpus.Shards, "write", stop)
            with pytest.raises(Killed):
                prepare(out, source, Recipe("byte"))
        if change == "text":
            (tmp_path / "src" / "b.txt").write_text("changed\n" * 40)
        capsys.readouterr()
        prepare(out, source, Recipe("byte", val_share=0.2 if change == "recipe" else 0.1))
        assert ("going on at" in capsys.readouterr().out) == (change == "nothing"), n
        if change == "text":
            assert "changed\n" * 40 in [text for texts in read_back(out).values() for text in texts]


def test_shards_that_are_gone_begin_anew(tmp_path, stories, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1500)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_publish", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))
    next((tmp_path / "out").glob("train*.tmp")).unlink()
    prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))
    assert "beginning anew" in capsys.readouterr().err
    assert sum(map(len, read_back(tmp_path / "out").values())) == 300


def test_memory_does_not_grow_with_the_text(tmp_path):
    code = "import sys; from quartz import corpus; from pathlib import Path; "
    code += "corpus.prepare(Path(sys.argv[2]), sys.argv[1], corpus.Recipe('byte', workers=2)); "
    code += PRINT_PEAK
    peaks = []
    for name, count in (("small", 200_000), ("large", 1_600_000)):
        with open(tmp_path / f"{name}.txt", "w") as file:
            file.writelines(f"{n} bottles\n" for n in range(count))
        command = [sys.executable, "-c", code, str(tmp_path / f"{name}.txt"), str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert (tmp_path / "large.txt").stat().st_size > 20e6
    assert peaks[1] < peaks[0] + 12, peaks  # MiB; the text alone would take 20, its tokens 40 more


def test_half_a_pair_of_utf16_becomes_a_replacement_character(tmp_path):
    lines = [json.dumps({"text": f"{n} \ud83d x"}) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "out", str(tmp_path / "a.jsonl"), Recipe("byte"))
    assert "7 \ufffd x" in [text for texts in read_back(tmp_path / "out").values() for text in texts]


def test_special_tokens_in_the_text_are_text(tmp_path):
    texts = [f"{n} <|endoftext|> <|im_start|>" for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare(tmp_path / "out", str(tmp_path / "a.jsonl"), Recipe("byte"))
    meta = shards.load_meta(tmp_path / "out")
    ids = Split(tmp_path / "out", "train", meta).read(0, meta["tokens"]["train"])
    assert (ids == 256).sum() == meta["documents"]["train"] and not (ids > 256).any()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("word"), "char, byte, gpt2, bpe"),
        (Recipe("bpe", vocab_size=258), "at least 259"),
        (Recipe("bpe", vocab_size=-5), "at least 259"),
        (Recipe("gpt2", vocab_size=500), "of bpe, not of gpt2"),
        (Recipe("bpe", pattern="gpt5"), "gpt2 or gpt4"),
        (Recipe("bpe", training_chars=-1), "training_chars must be 0"),
        (Recipe("byte", training_chars=10), "training_chars is of bpe, not of byte"),
        (Recipe(val_share=0.0), "val_share"),
        (Recipe(val_share=1.5), "val_share"),
        (Recipe(shard_tokens=0), "shard_tokens"),
        (Recipe(workers=-1), "workers"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_before_anything_is_touched(tmp_path, recipe, words):
    with pytest.raises(UserError, match=words) as problem:
        prepare(tmp_path / "out", "nowhere", recipe)
    assert len(problem.value.problems) == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("packs", "read_for_one", "words"),
    [(False, 1000, "aaaa cccc bbbb dddd"), (False, 10, "aaaa bbbb"), (True, 1000, "aaaa bbbb")],
)
def test_a_bpe_is_trained_on_so_many_characters_from_everywhere(
    tmp_path, capsys, monkeypatch, packs, read_for_one, words
):
    """From all files alike, and from the whole of each, but for what is packed in one block; where the text is far
    larger, from the first part of each.
    """
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(corpus, "READ_FOR_ONE", read_for_one)
    (tmp_path / "src").mkdir()
    for name, first, second in (("1", "aaaa", "cccc"), ("2", "bbbb", "dddd")):
        lines = [json.dumps({"text": f"{first if n < 1500 else second} {n}"}) + "\n" for n in range(3000)]
        data, path = "".join(lines).encode(), tmp_path / "src" / f"{name}.jsonl{'.gz' * packs}"
        path.write_bytes(gzip.compress(data) if packs else data)
    prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("bpe", 300, training_chars=2000))
    assert 1990 <= int(re.search(r"on ([\d,]+) characters", capsys.readouterr().out)[1].replace(",", "")) < 2050
    tokens = json.loads((tmp_path / "out" / "meta.json").read_text())["tokenizer"]["tokens"]
    assert {*tokens} & {"aaaa", "bbbb", "cccc", "dddd"} == {*words.split()}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt"])
def test_files_that_are_read_in_one_block_give_their_share(tmp_path, capsys, suffix):
    """Of a text of far more than ten times what is asked for; what is held out by a file's name stays so."""
    pytest.importorskip("tokenizers")
    (tmp_path / "src").mkdir()
    for n in range(12):
        words = [hashlib.sha256(b"%d %d" % (n, i)).hexdigest()[:6] for i in range(12_000)]
        texts = [" ".join(words[i : i + 60]) for i in range(0, len(words), 60)]
        lines = [json.dumps({"text": text}) for text in texts]
        data = "\n".join(texts if suffix == ".txt" else lines).encode()
        (tmp_path / "src" / f"{n:02}{suffix}").write_bytes(data if suffix == ".txt" else gzip.compress(data))
    asked = 40_000 if suffix == ".txt" else 20_000
    prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("bpe", 300, training_chars=asked), validation="03")
    trained = int(re.search(r"on ([\d,]+) characters", capsys.readouterr().out)[1].replace(",", ""))
    assert asked * 0.9 < trained < asked + 17_000


def test_a_vocabulary_larger_than_the_text_allows_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("abc abd\n" * 500)
    with pytest.raises(UserError, match=r"vocab_size=5000 is more than this text allows: .* for 26\d tokens"):
        prepare(tmp_path / "out", str(tmp_path / "a.txt"), Recipe("bpe", 5000))


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_text_that_can_not_be_read_is_one_problem_and_what_was_there_stays(tmp_path, stories, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    out = tmp_path / "out"
    prepare(out, str(tmp_path / "src"), Recipe("byte"))
    before = contents(out)
    for content, words in ((b"ab\xffcd", "z.txt is no UTF-8 text: byte 2"), (b"", None)):
        (tmp_path / "src" / "z.txt").write_bytes(content)
        if words:
            with pytest.raises(UserError, match=words):
                prepare(out, str(tmp_path / "src"), Recipe(tokenizer, 300 if tokenizer == "bpe" else 0))
            assert {name: its for name, its in contents(out).items() if name in before} == before
        else:  # among others an empty file does no harm
            prepare(out, str(tmp_path / "src"), Recipe(tokenizer, 300 if tokenizer == "bpe" else 0))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match="empty|more than this text allows"):
        prepare(out, str(tmp_path / "empty.txt"), Recipe(tokenizer))
    assert sum(map(len, read_back(out).values())) == 300


def test_bad_files_are_left_out_whole_where_that_is_wanted(tmp_path, stories, capsys):
    (tmp_path / "src" / "bad.txt").write_bytes(b"a document<|endoftext|>another\n" * 200 + b"\xff")
    (tmp_path / "src" / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("char", skip_bad_files=True))
    found = read_back(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(stories)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "bad.jsonl, line 2" in told[0] and "bad.txt is no UTF-8 text: byte 6200" in told[1]


def test_nothing_held_out_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one document"}))
    with pytest.raises(UserError, match="nothing is left for val: raise val_share"):
        prepare(tmp_path / "out", str(tmp_path / "a.jsonl"), Recipe("byte", val_share=1e-9))


def test_a_full_disk_is_one_problem_and_the_preparation_goes_on_later(tmp_path, stories, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1500)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0.0)
    write, left = corpus.Shards.write, [12]

    def full(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(corpus.Shards, "write", full)
        with pytest.raises(UserError, match="the disk is full .*; run it again"):
            prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))
    prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))
    assert "going on at" in capsys.readouterr().out
    assert sum(map(len, read_back(tmp_path / "out").values())) == 300


def test_a_really_full_disk_is_one_line(tmp_path, stories):
    """/dev/full stands for the disk."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))


def test_two_preparations_in_one_folder_are_refused(tmp_path, stories):
    (tmp_path / "out").mkdir()
    with files.claimed(tmp_path / "out", "preparation"), pytest.raises(UserError, match="another preparation"):
        prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path, stories, monkeypatch):
    write = corpus.Shards.write

    def change(*arguments):
        (tmp_path / "src" / "c.jsonl").write_text(json.dumps({"text": "other"}))
        write(*arguments)

    monkeypatch.setattr(corpus.Shards, "write", change)
    with pytest.raises(UserError, match="c.jsonl was changed"):
        prepare(tmp_path / "out", str(tmp_path / "src"), Recipe("byte"))


def test_a_new_data_set_leaves_nothing_of_the_old_one(tmp_path, stories):
    out = tmp_path / "out"
    prepare(out, str(tmp_path / "src"), Recipe("char", shard_tokens=3000))
    assert (out / "train_000000.bin").exists() and (out / "meta.pkl").exists()
    prepare(out, str(tmp_path / "src"), Recipe("byte"))
    assert contents(out).keys() == {"train.bin", "val.bin", "meta.json"}
    assert sum(map(len, read_back(out).values())) == 300


def test_the_same_text_packed_gives_the_same_data_set(tmp_path):
    text = "".join(f"line {n} of a text\n" for n in range(2000))
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(text.encode())
    for name in ("a.txt", "a.txt.gz"):
        prepare(tmp_path / f"out {name}", str(tmp_path / name), Recipe("byte"))
    assert contents(tmp_path / "out a.txt") == contents(tmp_path / "out a.txt.gz")


def test_a_folder_without_a_usable_tokenizer_is_one_problem(tmp_path, stories):
    for name, content in (("torn", "{oops"), ("odd", "[1]"), ("none", '{"vocab_size": 5}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(content)
        with pytest.raises(UserError, match=name):
            prepare(tmp_path / "out", str(tmp_path / "src"), Recipe(str(tmp_path / name)))
