import json
import math
import os
import shutil
import subprocess
import sys

import nanogpt
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, flags, load

import model
from quartz import checkpoint, corpus, shards, tokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 33, "dropout": 0.0, "bias": True}


@pytest.fixture
def evaluate(run):
    """evaluate(stride=4, …) runs eval.py on the CPU; returns its figures, which standard output is, and the result."""

    def evaluate(**settings):
        result = run("eval.py", *flags(**{"device": "cpu", **settings}))
        assert result.code == 0, result.err
        return json.loads(result.out, parse_constant=pytest.fail), result

    return evaluate


@pytest.fixture
def fails(run):
    return lambda **settings: run("eval.py", *flags(**{"device": "cpu", **settings}))


@pytest.fixture
def reference(tiny):
    """A checkpoint of nanoGPT's in out/, and a second opinion on its model, in float64."""
    (tiny / "out").mkdir()
    return nanogpt.write(tiny / "out" / "ckpt.pt", 1.0, **SHAPE).double().eval()


@pytest.fixture
def trained(tiny, train):
    assert train(max_iters=5).code == 0
    return tiny


def characters() -> tokenizer.CharTokenizer:
    return tokenizer.from_data(shards.load_meta(shards.find("tiny"))["tokenizer"])


def tokens_of(name: str = "tiny", split: str = "val") -> list[int]:
    folder = shards.find(name)
    whole = shards.Split(folder, split, shards.load_meta(folder))
    return whole.read(0, len(whole)).tolist()


def write(name: str, ids: list[int], tokens: tokenizer.Tokenizer) -> None:
    """A data set of these ids, which are its splits train and val."""
    os.makedirs(f"data/{name}", exist_ok=True)
    corpus.write_dataset(shards.Path("data") / name, {"train": ids, "val": ids}, tokens)


@torch.no_grad()
def losses(network, ids: list[int], T: int, stride: int) -> list[float]:
    """What each token but the first costs, by itself: given all before it in the first window that reaches it."""
    found = []
    for place in range(1, len(ids)):
        start = stride * max(0, math.ceil((place - T) / stride))
        logits = network(torch.tensor([ids[start:place]]))[0, -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[place])).item())
    return found


@pytest.mark.parametrize("stride", [0, 1, 5, 15, 16])
def test_the_loss_is_the_mean_over_tokens_that_are_predicted_one_by_one(reference, evaluate, stride):
    ids = tokens_of()
    for length in (2, 9, 16, 17, 18, 33, 34, 50):
        write("piece", ids[:length], characters())
        record, result = evaluate(dataset="piece", stride=stride, batch_size=2)
        expected = losses(reference, ids[:length], 16, stride or 16)
        assert record["loss"] == pytest.approx(np.mean(expected), abs=1e-5), length
        assert record["tokens"] == length - 1
        assert ("never fill" in result.err) == (length < 17) and result.err.count("\n") == 1 + (length < 17)


def test_a_shorter_context_is_that_of_a_smaller_model(reference, evaluate):
    ids = tokens_of()[:60]
    write("piece", ids, characters())
    record, _ = evaluate(dataset="piece", block_size=7, stride=3)
    assert record["loss"] == pytest.approx(np.mean(losses(reference, ids, 7, 3)), abs=1e-5)
    assert (record["block_size"], record["stride"], record["windows"]) == (7, 3, 1 + math.ceil((59 - 7) / 3))


def test_the_figures_do_not_depend_on_the_batch_size(reference, evaluate):
    for stride in (0, 5):
        first, *others = [evaluate(stride=stride, batch_size=size)[0] for size in (1, 2, 7, 31, 1000)]
        for other in others:
            assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)
            for name in ("tokens", "bytes", "windows"):
                assert other[name] == first[name]


@pytest.mark.parametrize("settings", [{}, {"arch": "qwen3", "tie_embeddings": False}], ids=str)
def test_a_trained_model_is_measured_on_the_split_it_was_validated_with(tiny, train, evaluate, settings):
    assert train(max_iters=5, **settings).code == 0
    record, result = evaluate()
    state = load(tiny / "out" / "ckpt.pt")
    network = checkpoint.build_model({**state, "path": "ckpt.pt"}).eval()
    ids = tokens_of()
    expected = np.mean(losses(lambda idx: network(idx)[0], ids, 16, 16))
    assert record["loss"] == pytest.approx(expected, abs=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert record["bits_per_byte"] == pytest.approx(expected / math.log(2), abs=1e-4)  # a byte is a character here
    about = {"tokens": 499, "bytes": 499, "windows": 32, "stride": 16, "block_size": 16, "iter_num": 5}
    about |= {"checkpoint": "out/ckpt.pt", "dataset": "tiny", "split": "val", "source": None, "dtype": "float32"}
    assert about.items() <= record.items() and record["seconds"] > 0 and record["tokens_per_s"] > 0
    assert f"loss {expected:.4f}" in result.err and len(result.err.splitlines()) == 1


def test_half_precision_comes_close(trained, evaluate):
    exact, close = evaluate()[0]["loss"], evaluate(dtype="bfloat16")[0]
    assert close["dtype"] == "bfloat16" and 0 < abs(close["loss"] - exact) < 0.01


def test_any_split_is_measured_and_any_shard_of_it(trained, evaluate):
    train_ids, val_ids = tokens_of(split="train"), tokens_of()
    assert evaluate(split="train")[0]["tokens"] == len(train_ids) - 1
    (trained / "data" / "tiny" / "val.bin").rename(trained / "data" / "tiny" / "test_0.bin")
    np.array(train_ids[:100], dtype="<u2").tofile(trained / "data" / "tiny" / "test_1.bin")
    assert evaluate(split="test")[0]["tokens"] == len(val_ids) + 99
    assert evaluate(split="test_1")[0]["tokens"] == 99


def test_a_text_is_measured_as_the_split_that_holds_it(trained, evaluate):
    prepared, _ = evaluate(stride=6)
    text = characters().decode(tokens_of())
    (trained / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())
    raw, _ = evaluate(stride=6, source="text.txt")
    for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "windows"):
        assert raw[name] == prepared[name]
    assert (raw["source"], raw["dataset"], raw["split"]) == ("text.txt", None, None)
    shutil.rmtree(trained / "data")  # the checkpoint knows its characters
    assert evaluate(stride=6, source="text.txt")[0]["loss"] == prepared["loss"]


def test_bytes_are_those_of_the_characters_that_are_predicted(tiny, evaluate):
    text = "é€😀 ab" * 20
    tokens = tokenizer.CharTokenizer.train(text)
    ids = tokens.encode(text)
    write("wide", ids, tokens)
    (tiny / "out").mkdir()
    shape = {**SHAPE, "vocab_size": 10}
    reference = nanogpt.write(tiny / "out" / "ckpt.pt", 1.0, dataset="wide", **shape).double().eval()
    record, _ = evaluate()
    assert record["bytes"] == 20 * (2 + 3 + 4 + 3) - 2  # all but the first é
    bits = sum(losses(reference, ids, 16, 16)) / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(bits / record["bytes"], abs=1e-5)


@pytest.fixture
def gpt2(tiny, gpt2_bpe):
    """A folder with a small model of GPT-2's vocabulary, and that model in transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    network = transformers.GPT2LMHeadModel(config).eval()
    for parameter in network.parameters():
        parameter.data *= 5  # so that it prefers some tokens
    network.save_pretrained("small")
    return network


def test_gpt2_loses_what_it_loses_in_transformers_and_its_marker_is_no_text(gpt2, evaluate):
    text = "Größe: 3 €. <|endoftext|>日本語 😀 the end"
    tokens = tokenizer.GPT2Tokenizer()
    ids = tokens.encode(text, special=True)
    assert 50256 in ids and tokens.decode(ids[:1]) == "Gr"
    write("docs", ids, tokens)
    record, _ = evaluate(init_from="small", dataset="docs")
    with torch.no_grad():
        expected = gpt2(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert record["loss"] == pytest.approx(expected, abs=1e-5) and abs(expected - math.log(50257)) > 0.01
    plain = len(text.replace("<|endoftext|>", "").encode()) - 2
    assert record["bytes"] == plain and record["tokens"] == len(ids) - 1
    assert record["bits_per_byte"] == pytest.approx(expected * (len(ids) - 1) / math.log(2) / plain, rel=1e-5)
    assert (record["checkpoint"], record["iter_num"], record["init_from"]) == (None, None, "small")
    # Where there is nothing but markers there is no byte to divide by
    write("markers", [50256] * 5, tokens)
    record, _ = evaluate(init_from="small", dataset="markers")
    assert record["bits_per_byte"] is None and record["bytes"] == 0 and record["tokens"] == 4


def test_in_a_text_the_marker_of_gpt2_is_text_like_any_other(gpt2, evaluate):
    text = "one <|endoftext|> two\n" * 30
    shards.Path("text.txt").write_text(text)
    record, _ = evaluate(init_from="small", source="text.txt", stride=48)
    ids = tokenizer.GPT2Tokenizer().encode(text)
    assert 50256 not in ids and record["tokens"] == len(ids) - 1 and record["bytes"] == len(text.encode()) - len("one")
    expected = losses(lambda idx: gpt2(idx).logits, ids, 64, 48)
    assert record["loss"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_without_a_tokenizer_there_are_no_bytes(reference, evaluate, fails):
    path = shards.find("tiny") / "meta.json"
    meta = json.loads(path.read_text())
    whole, _ = evaluate()
    path.write_text(json.dumps({**meta, "tokenizer": None}))
    record, result = evaluate()
    assert record["loss"] == whole["loss"] and record["bits_per_byte"] is None and record["bytes"] is None
    assert "note: no tokenizer" in result.err and "bits" not in result.err
    shards.Path("text.txt").write_text("line")
    assert_user_error(fails(source="text.txt"), "ckpt.pt", "no tokenizer")


def test_several_processes_measure_shards_as_one_measures_the_whole(trained, evaluate):
    whole, _ = evaluate(stride=5, batch_size=7)
    state = checkpoint.load(trained / "out" / "ckpt.pt")
    network = checkpoint.build_model(state)
    updater = network.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint.load_optimizer(updater, state)
    plain = {name: state[name] for name in ("model_args", "iter_num", "config", "tokenizer")}
    shutil.rmtree(trained / "out")
    (trained / "out").mkdir()
    with pytest.warns(UserWarning, match="save in a single process"):
        checkpoint.save_shards(trained / "out" / "ckpt.dcp", plain, network, updater, True)
    one, result = evaluate(stride=5, batch_size=7)
    assert len(result.err.splitlines()) == 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "eval.py"]
    command += flags(stride=5, batch_size=7, device="cpu")  # 14 batches and a shorter one
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=trained, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    two = json.loads(result.stdout)  # one of the two reports
    for record in (one, two):
        assert record["loss"] == pytest.approx(whole["loss"], rel=1e-6) and record["checkpoint"] == "out/ckpt.dcp"
        assert [record[name] for name in ("tokens", "bytes", "windows")] == [499, 499, 98]


def test_on_a_terminal_a_bar_shows_the_time_left(trained, evaluate, monkeypatch):
    assert "%" not in evaluate()[1].err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, result = evaluate(stride=1)
    assert "100%" in result.err and "batch/s" in result.err and "%" not in result.out


def test_weights_that_are_not_finite_are_one_line(trained, fails):
    state = load(trained / "out" / "ckpt.pt")
    state["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    torch.save(state, trained / "out" / "ckpt.pt")
    assert_user_error(fails(), "nan", "damaged")


def test_a_loss_beyond_any_perplexity_is_still_json(trained, evaluate):
    state = load(trained / "out" / "ckpt.pt")
    state["model"]["transformer.ln_f.weight"].fill_(1e6)
    torch.save(state, trained / "out" / "ckpt.pt")
    record, _ = evaluate()
    assert record["loss"] > 710 and record["perplexity"] is None


def test_ids_that_no_token_has_are_refused_in_padding_too(reference, fails):
    """33 tokens in a model of 40 rows."""
    nanogpt.write("out/ckpt.pt", 1.0, **{**SHAPE, "vocab_size": 40})
    np.array([1, 2, 35, 3], dtype="<u2").tofile("data/tiny/test.bin")
    assert_user_error(fails(split="test"), "token id 35")


def test_a_checkpoint_that_names_no_data_set_asks_for_one(trained, evaluate, fails):
    state = load(trained / "out" / "ckpt.pt")
    del state["config"]["dataset"]
    torch.save(state, trained / "out" / "ckpt.pt")
    assert_user_error(fails(), "out/ckpt.pt", "dataset")
    assert evaluate(dataset="tiny")[0]["tokens"] == 499


def test_a_tokenizer_that_is_not_the_checkpoints_is_one_line(trained, fails):
    tokens = tokenizer.CharTokenizer(sorted(characters().chars, reverse=True))
    write("other", tokens.encode("line 1"), tokens)
    result = fails(dataset="other")
    assert_user_error(result, "data/other", "out/ckpt.pt")
    assert result.err.count("error:") == 1
    (trained / "data" / "other" / "meta.json").unlink()
    (trained / "data" / "other" / "meta.pkl").unlink()  # then these are GPT-2's tokens
    assert_user_error(fails(dataset="other"), "type gpt2", "type char")


def test_gpt2_refuses_characters(tiny, fails, monkeypatch):
    network = model.GPT(model.GPTConfig(16, 50257, 1, 2, 16))
    monkeypatch.setattr(model.GPT, "from_pretrained", classmethod(lambda *arguments: network))
    assert_user_error(fails(init_from="gpt2", dataset="tiny"), "data/tiny", "type char", "gpt2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stride": -1, "batch_size": 0, "block_size": -3}, ["stride", "batch_size", "block_size"]),
        ({"stride": 17}, ["stride", "16", "17"]),
        ({"stride": 9, "block_size": 8}, ["stride", "9"]),
        ({"block_size": 17}, ["block_size", "16", "17"]),
        ({"batch_size": 10**20}, ["batch_size"]),
        ({"out_dir": "nowhere"}, ["nowhere", "train"]),
        ({"init_from": "gpt2x", "dataset": "tiny"}, ["gpt2x"]),
        ({"init_from": "gpt2"}, ["init_from=gpt2", "dataset", "source"]),
        ({"dataset": "nothing"}, ["'nothing'"]),
        ({"split": "test"}, ["'test'", "train, val"]),
        ({"split": "*", "dataset": "tiny"}, ["'*'", "train, val"]),
        ({"split": ""}, ["split=''"]),
        ({"dataset": "tiny", "source": "one.txt"}, ["dataset", "source"]),
        ({"source": "missing.txt"}, ["missing.txt"]),
        ({"source": "empty.txt"}, ["empty.txt is empty"]),
        ({"source": "latin.txt"}, ["latin.txt", "UTF-8"]),
        ({"source": "one.txt"}, ["one.txt", "single token"]),
        ({"source": "euro.txt"}, ["'€'"]),
        ({"source": "a\0b"}, ["source"]),
        ({"device": "tpu"}, ["tpu"]),
        ({"dtype": "float16"}, ["float16"]),
        ({"strid": 3}, ["'stride'"]),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_each(tiny, reference, fails, settings, words):
    for name, content in {"empty": b"", "latin": "déjà".encode("latin-1"), "one": b"x", "euro": "3 €".encode()}.items():
        (tiny / f"{name}.txt").write_bytes(content)
    result = fails(**settings)
    assert_user_error(result, *words)
    assert result.out == "" and result.err.count("error:") == (3 if len(settings) == 3 else 1)


@pytest.mark.parametrize("stride", [0, 5])
def test_of_a_masked_split_the_targets_count_alone(reference, evaluate, fails, stride):
    ids = tokens_of()[:90]
    write("piece", ids, characters())
    mask = np.zeros(90, dtype=np.uint8)
    mask[[0, 3, 17, 18, 30, 66, 89]] = 1  # the first can't be predicted; of some batches nothing is left
    mask.tofile("data/piece/val.mask")
    record, _ = evaluate(dataset="piece", stride=stride, batch_size=1)
    expected = np.array(losses(reference, ids, 16, stride or 16))[mask[1:] == 1]
    assert record["loss"] == pytest.approx(expected.mean(), abs=1e-5)
    assert (record["tokens"], record["bytes"]) == (6, 6)
    mask[1:] = 0
    mask.tofile("data/piece/val.mask")
    assert_user_error(fails(dataset="piece", stride=stride), "holds no target")


def test_rows_take_no_stride_and_have_to_fit(rows, train, fails):
    assert train(max_iters=1).code == 0
    for setting in ({"stride": 4}, {"block_size": 8}):
        assert_user_error(fails(**setting), "rows of 17 tokens, each a window by itself: leave out")
    meta = json.loads((rows / "data" / "tiny" / "meta.json").read_text())
    (rows / "data" / "tiny" / "meta.json").write_text(json.dumps({**meta, "row": 29 * 17}))
    assert_user_error(fails(), "need block_size 492 or more, not 16")
