import json
import os
import re
import shutil
import subprocess
import sys

import nanogpt
import pytest
import torch
from conftest import ROOT, TINY, assert_user_error, flags

from quartz import checkpoint, compiled, decoder, machine, tokenizer

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


def test_the_settings_of_sampling_reach_the_model(trained, sample):
    greedy = sample(temperature=0, num_samples=1).out
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert sample(num_samples=1, **setting).out == greedy
    assert sample(num_samples=1, temperature=0, repetition_penalty=1e6).out != greedy
    # Half of the weights' bits, and a quarter: another model, if only slightly.
    prepare, written = compiled.prepare, []

    def prepared(*arguments, **keywords):
        engine = prepare(*arguments, **keywords)
        written.append(engine.model.lm_head.weight.clone())
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "prepare", prepared)
        assert {sample(num_samples=1, **kept).code for kept in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"})} == {0}
    full, half, quarter = written
    assert torch.equal(half, full.bfloat16().float()) and not torch.equal(half, full)
    assert len(quarter[0].unique()) <= 255 and 0 < (quarter - full).abs().max() < full.abs().max() / 100


def test_a_text_ends_before_a_stop(trained, sample):
    full = sample(num_samples=3).out.split("\n" + LINE)[:3]
    stop = full[0][30:32]
    cut = sample(num_samples=3, stop=f"jjjj||{stop}").out.split("\n" + LINE)[:3]
    assert cut == [text[: at if (at := text.find(stop, 1)) >= 0 else None] for text in full]
    assert len(cut[0]) <= 30
    result = sample(num_samples=2, stop=full[0][5], max_new_tokens=400)
    assert result.code == 0 and "2 x 400 tokens" not in result.err  # it ends when all have ended


def test_each_line_of_a_file_may_be_a_prompt(trained, sample):
    lines = ["the quick brown", "fox", "line 7 of"]
    (trained / "prompts.txt").write_text("\n".join(lines) + "\n")
    result = sample(start="FILE:prompts.txt", prompt_per_line=True, num_samples=2, max_new_tokens=30)
    texts = result.out.split("\n" + LINE)[:-1]
    for n, line in enumerate(lines):
        alone = sample(start=line, num_samples=2, max_new_tokens=30).out.split("\n" + LINE)[:-1]
        assert texts[2 * n : 2 * n + 2] == alone


def test_log_probabilities_are_those_of_the_model(trained, sample):
    assert sample(start="fox", num_samples=2, max_new_tokens=8, top_k=2, temperature=1.5, logprobs="l.jsonl").code == 0
    state = checkpoint.load(trained / "out" / "ckpt.pt")
    network, tokens = checkpoint.build_model(state).eval(), tokenizer.from_data(state["tokenizer"])
    lines = [json.loads(line) for line in (trained / "l.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["prompt"] == "fox" and "".join(line["tokens"]) == tokens.decode(line["ids"])
        ids = torch.tensor([tokens.encode("fox") + line["ids"]])
        logprobs = network(ids, ids)[0].log_softmax(-1)[0, 2:-1].gather(1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(line["logprobs"]), logprobs.detach(), atol=1e-4, rtol=1e-4)


def test_on_a_terminal_text_appears_as_it_is_drawn(trained):
    """Through a pseudo-terminal: the first characters are there long before the last are drawn."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    flags_ = ["--num_samples=1", "--max_new_tokens=30000", "--device=cpu", "--compile=False"]
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *flags_], stdout=theirs, cwd=trained)
    shown = b""
    while len(shown) < 500:
        shown += os.read(ours, 100)
    assert process.poll() is None
    process.kill()
    process.wait()
    os.close(ours), os.close(theirs)


def test_a_cache_that_cannot_fit_is_refused_with_its_size(trained, sample, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda place: 1_000_000)
    assert sample(num_samples=2, max_new_tokens=20).code == 0
    # 2 (keys, values) x 2 layers x 16 wide x 16 positions x 4 bytes x 100,000 rows
    assert_user_error(sample(num_samples=100_000), "a cache of 0.4", "fewer samples")
    assert_user_error(sample(num_samples=2, max_new_tokens=2_000_000_000), "smaller max_new_tokens")


def test_the_prompt_may_come_through_a_pipe(trained):
    command = f"printf 'quick fox' | {sys.executable} {ROOT / 'sample.py'} --start=FILE:/dev/stdin --num_samples=1"
    result = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True)
    assert result.returncode == 0 and "quick fox" in result.stdout, result.stderr


def test_an_earlier_report_stays_until_the_new_one_is_whole(trained, sample, monkeypatch):
    assert sample(num_samples=1, max_new_tokens=5, logprobs="l.jsonl").code == 0
    before = (trained / "l.jsonl").read_text()
    monkeypatch.setattr(decoder.Decoder, "step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(num_samples=1, max_new_tokens=5, logprobs="l.jsonl")
    assert (trained / "l.jsonl").read_text() == before


def test_weights_that_are_not_finite_are_one_line(trained, sample):
    state = torch.load(trained / "out" / "ckpt.pt")
    state["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    torch.save(state, trained / "out" / "ckpt.pt")
    assert_user_error(sample(num_samples=1), "not finite")


def test_a_folder_without_a_tokenizer_is_one_line(tiny, sample):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=1000, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("small")
    assert_user_error(sample(init_from="small", start="Hello"), "small has no tokenizer")


def test_a_prompt_longer_than_the_context_counts_by_its_end(trained, sample):
    long = "line 5 of 25: the quick brown fox"
    result = sample(start=long, num_samples=1, max_new_tokens=9, temperature=0)
    assert result.code == 0 and "last 16" in result.err and result.out.startswith(long)
    short = sample(start=long[-16:], num_samples=1, max_new_tokens=9, temperature=0)
    assert "note" not in short.err and result.out.endswith(short.out)


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
        ({"top_p": 0, "min_p": 2.0, "repetition_penalty": -1}, ["top_p", "min_p", "repetition_penalty"]),
        ({"stop": "fox||"}, ["stop", "empty"]),
        ({"stop": "€"}, ["stop='€'", "never"]),
        ({"quantize": "int3"}, ["quantize", "int3"]),
        ({"prompt_per_line": True}, ["prompt_per_line", "FILE:"]),
        ({"start": "FILE:gap.txt", "prompt_per_line": True}, ["gap.txt", "line 2"]),
        ({"logprobs": "no/folder/l.jsonl"}, ["logprobs=no/folder/l.jsonl"]),
        ({"logprobs": "a\0b"}, ["logprobs"]),
        ({"logprobs": "out/last.pt"}, ["overwrite"]),
        ({"max_new_tokens": 10**20}, ["max_new_tokens"]),
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
    (trained / "gap.txt").write_text("fox\n\nfox\n")
    (trained / "latin.txt").write_bytes("déjà".encode("latin-1"))
    result = sample(**settings)
    assert_user_error(result, *words)
    assert result.out == "" and result.err.count("error:") == (3 if len(settings) == 3 else 1)


def test_where_a_checkpoint_is_damaged_the_other_one_serves(trained, sample):
    path = trained / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:2000])
    result = sample()
    assert result.code == 0 and "warning: out/ckpt.pt" in result.err and "the other checkpoint serves" in result.err
    (trained / "out" / "last.pt").write_bytes(b"nothing")
    assert_user_error(sample(), "ckpt.pt", "last.pt")


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
