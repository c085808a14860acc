import re
import shutil
import subprocess
import sys

import nanogpt
import pytest
import torch
from conftest import ROOT, TINY, assert_user_error, flags

import checkpoint
import model
import tokenizer

LINE = "---------------\n"


@pytest.fixture
def trained(tiny, train):
    assert train(max_iters=5).code == 0
    return tiny


@pytest.fixture
def sample(run):
    """sample(top_k=5, …) runs sample.py on the CPU in float32."""
    return lambda **settings: run("sample.py", *flags(**{"device": "cpu", "dtype": "float32", **settings}))


def test_samples_are_text_of_the_length_asked_for_each_behind_the_prompt(trained, sample):
    result = sample(start="fox", num_samples=3, max_new_tokens=40)
    assert result.code == 0, result.err
    texts = result.out.split("\n" + LINE)
    assert len(texts) == 4 and texts[3] == ""
    assert all(text.startswith("fox") and len(text) == 43 for text in texts[:3])
    assert len(set(texts)) == 4
    assert re.search(r"3 x 40 tokens in [\d.]+ s, [\d,]+ tokens/s", result.err)


def test_the_same_seed_gives_the_same_text_however_many_samples(trained, sample):
    three, one = sample(num_samples=3, seed=5), sample(num_samples=1, seed=7)
    assert three.out == sample(num_samples=3, seed=5).out
    assert three.out.split(LINE)[2] == one.out.split(LINE)[0]


def test_greedy_text_is_that_of_the_full_forward_pass(trained, sample):
    result = sample(start="line", temperature=0, num_samples=1, max_new_tokens=12)
    state = checkpoint.load(trained / "out" / "ckpt.pt")
    network, tokens = checkpoint.build_model(state).eval(), tokenizer.from_data(state["tokenizer"])
    idx = torch.tensor([tokens.encode("line")])
    for _ in range(12):
        idx = torch.cat((idx, network(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert result.out == tokens.decode(idx[0].tolist()) + "\n" + LINE


def test_sampling_needs_the_checkpoint_alone(trained, sample):
    before = sample(num_samples=2).out
    shutil.rmtree(trained / "data")
    assert sample(num_samples=2).out == before


def test_before_the_first_best_last_pt_serves(trained, sample):
    (trained / "out" / "ckpt.pt").unlink()
    assert sample(num_samples=1).code == 0


def test_top_k_and_dtype_reach_the_model(trained, sample, monkeypatch):
    assert sample(top_k=1, num_samples=1).out == sample(temperature=0, num_samples=1).out
    dtypes, plain = [], model.GPT.generate
    monkeypatch.setattr(
        model.GPT, "generate", lambda self, *a, **k: dtypes.append(self.lm_head.weight.dtype) or plain(self, *a, **k)
    )
    sample(dtype="bfloat16", num_samples=1)
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("meta", ["meta.json", "meta.pkl"])
def test_a_checkpoint_of_nanogpt_samples_with_its_data_sets_characters(tiny, sample, meta):
    (tiny / "out").mkdir()
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 33, "dropout": 0.0}
    nanogpt.write(tiny / "out" / "ckpt.pt", torch.tensor(1.0), bias=True, **shape)
    (tiny / "data" / "tiny" / "train.bin").unlink()  # the meta file alone is needed
    (tiny / "data" / "tiny" / ("meta.json" if meta == "meta.pkl" else "meta.pkl")).unlink()
    result = sample(start="fox", num_samples=1, max_new_tokens=5)
    assert result.code == 0 and result.out.startswith("fox"), result.err


def test_a_checkpoint_of_nanogpt_without_meta_speaks_gpt2_tokens(tiny, sample, gpt2_bpe):
    (tiny / "out").mkdir()
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50304, "dropout": 0.0}
    nanogpt.write(tiny / "out" / "ckpt.pt", 1.0, iter_num=1, dataset="openwebtext", bias=True, **shape)
    result = sample(start="Hello", num_samples=1, max_new_tokens=5)
    assert result.code == 0 and result.out.startswith("Hello"), result.err


def test_a_tokenizer_that_the_model_has_no_rows_for_is_one_line(tiny, sample):
    (tiny / "out").mkdir()
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 10, "dropout": 0.0}
    nanogpt.write(tiny / "out" / "ckpt.pt", 1.0, bias=True, **shape)
    assert_user_error(sample(start="fox"), "33 tokens", "only 10")
    shutil.rmtree(tiny / "data")
    assert_user_error(sample(start="fox"), "meta.pkl")


def test_the_prompt_may_come_from_a_file(trained, sample):
    (trained / "newline.txt").write_text("\n")
    assert sample(start="FILE:newline.txt", num_samples=1).code == 0
    (trained / "prompt.txt").write_text("brown\nfox")
    assert sample(start="FILE:prompt.txt", num_samples=1).out.startswith("brown\nfox")


def test_gpt2_samples_its_own_tokens(tiny, sample, gpt2_bpe):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.GPT2Config(vocab_size=50257, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    result = sample(init_from="gpt2", start="Hello<|endoftext|>", num_samples=2, max_new_tokens=40)
    assert result.code == 0 and result.out.startswith("Hello<|endoftext|>"), result.err


def test_padding_rows_are_never_sampled(tiny, sample, train):
    """As GPT-2's 50,257 tokens in 50,304 rows: here 20 characters in 33 rows, of which any would be drawn."""
    assert train(max_iters=1).code == 0
    state = torch.load("out/ckpt.pt")
    state["tokenizer"] = {"type": "char", "chars": state["tokenizer"]["chars"][:20]}
    torch.save(state, "out/ckpt.pt")
    result = sample(start="\n", num_samples=20, temperature=2.0, top_k=0)
    assert result.code == 0, result.err
    assert set(result.out.replace(LINE, "")) <= set(state["tokenizer"]["chars"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.5, "top_k": -1, "num_samples": 0}, ["temperature", "top_k", "num_samples"]),
        ({"temperature": "1e999"}, ["temperature"]),
        ({"seed": 2**70}, ["seed"]),
        ({"start": "FILE:a\0b"}, ["start"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
        ({"start": ""}, ["start"]),
        ({"start": "fox €"}, ["'€'"]),
        ({"start": "FILE:missing.txt"}, ["missing.txt"]),
        ({"start": "FILE:empty.txt"}, ["empty.txt"]),
        ({"start": "FILE:latin.txt"}, ["latin.txt", "UTF-8"]),
        ({"out_dir": "nowhere"}, ["nowhere", "train"]),
        ({"init_from": "scratch"}, ["init_from"]),
        ({"init_from": "gpt2x"}, ["gpt2x"]),
        ({"device": "tpu"}, ["tpu"]),
        ({"dtype": "float16"}, ["float16"]),
        ({"topk": 3}, ["'top_k'"]),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_each(trained, sample, settings, words):
    (trained / "empty.txt").write_text("")
    (trained / "latin.txt").write_bytes("déjà".encode("latin-1"))
    result = sample(**settings)
    assert_user_error(result, *words)
    assert result.out == "" and result.err.count("error:") == (3 if len(settings) == 3 else 1)


def test_a_damaged_checkpoint_is_one_line(trained, sample):
    path = trained / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:2000])
    assert_user_error(sample(), "ckpt.pt")


def test_a_reader_that_leaves_is_no_error(trained):
    command = f"{sys.executable} {ROOT / 'sample.py'} --num_samples=200 --max_new_tokens=500 | head -n 1"
    result = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr


def test_scripts_run_from_any_folder(tiny, start):
    """Paths are relative to where the user stands; the script and its presets may lie elsewhere."""
    train = start("train.py", *flags(**{**TINY, "max_iters": 1, "out_dir": "here/out"}), cwd=tiny)
    assert train.wait(60) == 0, train.stderr.read()
    sample = start("sample.py", "--out_dir=out", "--num_samples=1", "--device=cpu", cwd=tiny / "here")
    assert sample.wait(60) == 0, sample.stderr.read()
