import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from quartz import shards
from quartz.shards import Split, evaluation_starts, training_starts

META = {"dtype": "uint16", "tokens": None}


def starts_of_epoch(epoch, n_tokens, block_size, seed=0):
    n_windows = max(1, (n_tokens - block_size) // block_size)
    return training_starts(np.arange(epoch * n_windows, (epoch + 1) * n_windows), n_tokens, block_size, seed)


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (16, 8), (17, 8), (1000, 7), (4097, 1), (100_000, 64)])
def test_an_epoch_visits_every_window_once(n_tokens, block_size):
    shifts = set()
    for epoch in range(3):
        starts = starts_of_epoch(epoch, n_tokens, block_size)
        assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
        assert len(np.unique(starts)) == len(starts)
        assert len(np.unique(starts % block_size)) == 1  # windows lie side by side, none overlap
        assert len(starts) * block_size >= n_tokens - 2 * block_size or len(starts) == 1
        shifts.add(int(starts[0] % block_size))
    if block_size > 50:
        assert len(shifts) > 1, "the boundaries shift from epoch to epoch"


def test_every_token_is_a_target_within_some_epochs():
    seen = np.zeros(40, dtype=bool)
    for epoch in range(60):
        for start in starts_of_epoch(epoch, 40, 8):
            seen[start + 1 : start + 9] = True
    assert seen[1:].all()


def test_rows_depend_on_seed_and_number_alone():
    together = training_starts(np.arange(500), 1000, 7, seed=3)
    assert np.array_equal(together[123:130], training_starts(np.arange(123, 130), 1000, 7, seed=3))
    assert np.array_equal(together[::-1], training_starts(np.arange(500)[::-1], 1000, 7, seed=3))
    assert not np.array_equal(together, training_starts(np.arange(500), 1000, 7, seed=4))


def test_the_order_is_fixed_for_ever():
    """A change of these numbers would break every run that is resumed with a newer version."""
    assert shards.mix(0) == 0xE220A8397B1DCDAF  # splitmix64's published first number
    assert training_starts(np.arange(4), 1_003_854, 64, 1337).tolist() == [961628, 180444, 85020, 843868]
    assert training_starts(np.arange(10**6, 10**6 + 2), 1_003_854, 64, 1337).tolist() == [953717, 115573]


def test_the_order_looks_random():
    starts = starts_of_epoch(0, 64 * 10_001, 64) // 64
    n = len(starts)
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), starts)[0, 1]) < 5 / np.sqrt(n)
    next_door = (np.abs(np.diff(starts)) == 1).sum()
    assert next_door < 20  # 2 are to be expected


def test_large_data_costs_no_more():
    starts = training_starts(np.array([0, 10**9, 10**12]), 10**12, 1024, 1)
    assert starts.max() < 10**12 - 1024 and len(set(starts.tolist())) == 3


def test_evaluation_windows_span_the_split_evenly():
    starts = evaluation_starts(1001, 10, 21)
    assert starts[0] == 0 and starts[-1] == 990 and set(np.diff(starts)) <= {49, 50}
    assert evaluation_starts(11, 10, 3).tolist() == [0, 0, 0]


def write(folder, name, tokens, dtype="<u2", header=None):
    folder.mkdir(exist_ok=True)
    with open(folder / name, "wb") as file:
        if header is not None:
            np.array(header + [0] * (256 - len(header)), dtype="<i4").tofile(file)
        np.array(tokens, dtype=dtype).tofile(file)


def test_shards_read_as_one_row_of_tokens(tmp_path):
    write(tmp_path, "train_000.bin", range(5))
    write(tmp_path, "train_001.bin", range(5, 7), header=[20240520, 1, 2])
    write(tmp_path, "train_002.bin", range(7, 20))
    split = Split(tmp_path, "train", META)
    assert len(split) == 20
    for start in range(20):
        for count in range(21 - start):
            assert split.read(start, count).tolist() == list(range(start, start + count))
    x, y = split.windows(np.array([3, 0]), 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [list(range(3, 11)), list(range(8))] and y.tolist() == [list(range(4, 12)), list(range(1, 9))]


def open_files(folder) -> int:
    """How many of the folder's files this process holds open; of what it has mapped too."""
    handles = Path("/proc/self/fd")
    if not handles.exists():
        pytest.skip("this system has no /proc")
    opened = [os.readlink(handle) for handle in handles.iterdir() if handle.is_symlink()]
    return sum(str(folder) in path for path in opened)


def test_of_thousands_of_shards_few_are_open_at_a_time(tmp_path):
    """More than a process may hold open, masks beside them; all are looked at when a run starts."""
    resource = pytest.importorskip("resource")
    count, generator = 1500, np.random.default_rng(0)
    tokens = generator.integers(0, 50, (count, 20))
    for n, its in enumerate(tokens):
        write(tmp_path, f"train_{n:06d}.bin", its)
        write(tmp_path, f"train_{n:06d}.mask", its % 2, dtype="u1")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    try:
        split = Split(tmp_path, "train", META, vocab_size=50)
        whole, starts = tokens.flatten(), generator.integers(0, count * 20 - 61, 300)
        x, y, weights = split.batch(starts, 60)
        assert open_files(tmp_path) <= 2 * shards.MAPPED
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    expected = np.stack([whole[start : start + 61] for start in starts])
    assert np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])
    assert np.array_equal(weights, expected[:, 1:] % 2)
    write(tmp_path, f"train_{count - 1:06d}.bin", [50] * 20)
    with pytest.raises(UserError, match="token id 50"):
        Split(tmp_path, "train", META, vocab_size=50)


def test_a_shard_whose_header_counts_no_tokens_has_none(tmp_path):
    write(tmp_path, "train_0.bin", [], header=[20240520, 1, 0])
    write(tmp_path, "train_1.bin", [7, 8])
    assert Split(tmp_path, "train", META, vocab_size=9).read(0, 2).tolist() == [7, 8]


def test_uint32_where_the_meta_says_so(tmp_path):
    write(tmp_path, "train.bin", [70000, 1, 2], dtype="<u4")
    assert Split(tmp_path, "train", {"dtype": "uint32", "tokens": None}).read(0, 3).tolist() == [70000, 1, 2]


@pytest.mark.parametrize(
    ("write_it", "words"),
    [
        (lambda folder: None, "missing"),
        (lambda folder: (folder / "train.bin").write_bytes(b""), "empty"),
        (lambda folder: (folder / "train.bin").write_bytes(b"abc"), "truncated"),
        (lambda folder: write(folder, "train.bin", [1, 2], header=[20240520, 1, 3]), "header says 3"),
        (lambda folder: write(folder, "train.bin", [1, 99]), "token id 99"),
        (lambda folder: (folder / "train.bin").mkdir(), "can't be read"),
    ],
)
def test_a_broken_shard_is_named(tmp_path, write_it, words):
    write_it(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        Split(tmp_path, "train", META, vocab_size=50)
    assert "train" in str(error.value) and len(error.value.problems) == 1


def test_a_shard_that_holds_other_than_its_count_is_named(tmp_path):
    write(tmp_path, "train.bin", [1, 2])
    with pytest.raises(UserError, match="prepare it again"):
        Split(tmp_path, "train", {"dtype": "uint16", "tokens": {"train": 3}})


def test_ids_beyond_the_vocabulary_are_found_in_the_batch_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 4)
    write(tmp_path, "train.bin", [1, 2, 3, 4, 60, 5])
    split = Split(tmp_path, "train", META, vocab_size=50)
    split.windows(np.array([0]), 3)
    with pytest.raises(UserError, match="token id 60"):
        split.windows(np.array([2]), 3)


def write_masked(folder, masks: dict[str, list[int]], files: dict[str, list[int]] | None = None) -> None:
    for name, ids in (files or {"train.bin": range(12)}).items():
        write(folder, name, ids)
    for name, mask in masks.items():
        write(folder, name, mask, dtype="u1")


def test_a_mask_says_which_tokens_are_targets(tmp_path):
    mask = [1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1]
    files = {"train_0.bin": range(5), "train_1.bin": range(5, 12)}
    write_masked(tmp_path, {"train_0.mask": mask[:5], "train_1.mask": mask[5:]}, files)
    split = Split(tmp_path, "train", META)
    starts = np.array([0, 3, 7])
    _, y = split.windows(starts, 4)
    weights = split.weights(starts, 4)
    assert split.is_weighted and weights.dtype == torch.float32
    assert weights.tolist() == [[mask[token] for token in row] for row in y.tolist()]
    assert split.count_targets(starts, 4) == weights.sum() == 6
    assert split.count_targets(np.array([7]), 2) == 0


def test_without_a_mask_or_rows_nothing_is_weighted(tmp_path):
    write(tmp_path, "train.bin", range(12))
    write(tmp_path, "val.mask", [1] * 12, dtype="u1")
    assert not Split(tmp_path, "train", META).is_weighted


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"train.mask": [1] * 11}, "train.mask is of 11 tokens, and there are 12"),
        ({"train.mask": [1] * 11 + [2]}, "holds 2, which is neither 0 nor 1"),
        ({"train.mask": [0] * 12}, "leaves no target"),
        ({"train.mask": []}, "empty"),
        ({"train_1.mask": [1] * 12}, "train.bin has no mask, and others have"),
        ({"train.mask": [1] * 12, "train_1.mask": [1] * 12}, "train_1.bin has no tokens, but a mask"),
    ],
    ids=str,
)
def test_a_mask_that_is_not_of_these_tokens_is_one_problem(tmp_path, masks, words):
    write_masked(tmp_path, masks)
    with pytest.raises(UserError, match=words) as error:
        Split(tmp_path, "train", META)
    assert len(error.value.problems) == 1


def test_a_mask_that_one_of_several_shards_lacks_is_named(tmp_path):
    write_masked(tmp_path, {"train_0.mask": [1] * 3}, {"train_0.bin": range(3), "train_1.bin": range(3)})
    with pytest.raises(UserError, match=r"train_1\.bin has no mask"):
        Split(tmp_path, "train", META)


def test_a_mask_that_changes_or_is_wrong_beyond_what_is_looked_at_first_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 4)
    write_masked(tmp_path, {"train.mask": [1] * 9 + [7] + [1] * 2})
    split = Split(tmp_path, "train", META)
    split.weights(np.array([0]), 8)
    for read in (split.weights, split.count_targets):
        with pytest.raises(UserError, match="holds 7"):
            read(np.array([1]), 9)
    (tmp_path / "train.mask").write_bytes(b"\1" * 3)
    with pytest.raises(UserError, match=r"train\.mask was changed"):
        split.weights(np.array([0]), 8)


@pytest.mark.parametrize(("n_rows", "row"), [(1, 5), (2, 2), (97, 9), (1000, 33)])
def test_an_epoch_visits_every_row_once_and_cuts_none(n_rows, row):
    epochs = []
    for epoch in range(3):
        numbers = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
        starts = training_starts(numbers, n_rows * row, row - 1, 7, row)
        assert sorted(starts) == list(range(0, n_rows * row, row))
        assert np.array_equal(starts[::-1], training_starts(numbers[::-1], n_rows * row, row - 1, 7, row))
        epochs.append(starts.tolist())
    if n_rows > 50:
        assert epochs[0] != epochs[1] != epochs[2], "each epoch has an order of its own"
        assert epochs[0] != training_starts(np.arange(n_rows), n_rows * row, row - 1, 8, row).tolist()


def test_the_order_of_rows_is_fixed_for_ever():
    assert training_starts(np.arange(4), 33 * 1000, 32, 1337, 33).tolist() == [28248, 22704, 726, 3531]


def test_evaluated_rows_are_whole_and_no_more_than_there_are():
    assert evaluation_starts(50, 4, 100, 5).tolist() == list(range(0, 50, 5))
    assert evaluation_starts(50, 4, 3, 5).tolist() == [0, 20, 45]
    for n_rows in range(1, 40):
        for count in range(1, n_rows + 1):
            starts = evaluation_starts(n_rows * 3, 2, count, 3)
            assert len(set(starts.tolist())) == count and not (starts % 3).any() and starts.max() < n_rows * 3


def test_a_window_of_rows_is_a_row(tmp_path):
    write(tmp_path, "train.bin", range(12))
    split = Split(tmp_path, "train", {**META, "row": 4})
    T = shards.window_length(split.row, 8)
    x, y = split.windows(evaluation_starts(len(split), T, 9, split.row), T)
    assert x.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]] and y.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert split.is_weighted and split.weights(np.array([0, 4]), T).tolist() == [[1] * 3] * 2
    assert split.count_targets(np.array([0, 4]), T) == 6


def test_rows_that_do_not_fit_are_one_problem(tmp_path):
    assert (shards.window_length(None, 8), shards.window_length(9, 8), shards.window_length(5, 8)) == (8, 8, 4)
    with pytest.raises(UserError, match="rows of 10 tokens, which need block_size 9 or more, not 8"):
        shards.window_length(10, 8)
    write(tmp_path, "train.bin", range(12))
    with pytest.raises(UserError, match="12 tokens, no whole number of rows of 5"):
        Split(tmp_path, "train", {**META, "row": 5})


class Bomb:
    def __reduce__(self):
        return (eval, ("open('bomb', 'w')",))


def test_a_meta_pkl_that_hides_code_does_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": Bomb(), "stoi": {}}))
    with pytest.raises(UserError, match="meta file"):
        shards.load_meta(tmp_path)
    assert not (tmp_path / "bomb").exists()


def test_nanogpts_meta_is_read(tmp_path):
    itos = {0: "\n", 1: "a", 2: "b"}
    theirs = {"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(theirs))
    meta = shards.load_meta(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}))
    assert shards.load_meta(tmp_path)["vocab_size"] == 3 and shards.load_meta(tmp_path)["tokenizer"] is None
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": list("\nab")}))
    assert shards.load_meta(tmp_path)["tokenizer"] == meta["tokenizer"]
    assert meta["vocab_size"] == 3 and meta["tokenizer"] == {"type": "char", "chars": ["\n", "a", "b"]}
    (tmp_path / "meta.pkl").unlink()
    assert shards.load_meta(tmp_path)["tokenizer"] == {"type": "gpt2"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"dtype": "float32"}',
        '{"vocab_size": "9"}',
        '{"vocab_size": 0}',
        '{"vocab_size": -5}',
        '{"row": 1}',
        '{"row": true}',
        '{"row": "9"}',
        '{"tokens": 5}',
        '{"tokens": {"train": "5"}}',
        '{"tokenizer": "gpt2"}',
        '{"vocab_size": 1, "tokenizer": {"type": "char", "chars": ["a", "b"]}}',
        "\xff",
    ],
)
def test_a_broken_meta_json_is_one_problem(tmp_path, text):
    (tmp_path / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="meta file"):
        shards.load_meta(tmp_path)


def test_a_data_set_that_is_missing_is_one_problem_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "prepare.py").touch()
    with pytest.raises(UserError, match=r"run: python data/mine/prepare\.py"):
        shards.find("mine")
    with pytest.raises(UserError, match="shakespeare_char"):
        shards.find("nothing")
