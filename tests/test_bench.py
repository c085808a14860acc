import json
from pathlib import Path

import pytest
from conftest import assert_user_error, flags

from model import GPT, GPTConfig
from quartz import machine

SMALL = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2, "vocab_size": 40}
SMALL |= {"device": "cpu", "compile": False, "rounds": 2, "steps": 1}


@pytest.fixture
def bench(tiny, run):
    return lambda **settings: run("bench.py", *flags(**{**SMALL, **settings}))


def test_standard_output_is_json_with_the_ratio(bench):
    result = bench()
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["mode"] == "train" and record["peer"] == "plain step" and record["ratio"] > 0
    assert f"{record['ratio']:.2f}x (median of 2 rounds)" in result.err
    once = json.loads(bench(rounds=1).out)
    assert once["ratio"] == pytest.approx(once["tokens_per_s"] / once["peer_tokens_per_s"])


@pytest.mark.parametrize("settings", [{}, {"quantize": "int8"}, {"dtype": "bfloat16", "batch_size": 9}], ids=str)
def test_decoding_is_measured_against_the_full_forward_pass(bench, settings):
    result = bench(mode="decode", max_new_tokens=20, **settings)
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["mode"] == "decode" and record["peer"] == "full forward"
    assert record["ratio"] > 0 and record["memory_share"] > 0
    shape = {name: SMALL[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    # What is read: float32 where no step is compiled, bfloat16 where many rows are multiplied in it.
    each = 2 if settings.get("batch_size") == 9 and machine.cpu_has_bfloat16() else 4
    assert record["weight_bytes"] == each * GPT(GPTConfig(**shape, bias=False)).get_num_params()


def test_the_fast_recipe_is_measured_against_the_plain_step(bench):
    result = bench(arch="qwen3", optimizer="muon", tie_embeddings=False)
    assert result.code == 0 and json.loads(result.out)["ratio"] > 0


def test_it_reads_real_data(bench):
    assert bench(real_data=True, dataset="tiny").code == 0
    assert_user_error(bench(real_data=True, dataset="tiny", vocab_size=20), "vocabulary of 20")


def test_a_nanogpt_checkout_is_the_peer(bench, tmp_path):
    """A stand-in for its model.py: the same names, arguments and results."""
    (tmp_path / "nanogpt").mkdir()
    source = (Path(__file__).resolve().parents[1] / "model.py").read_text(encoding="utf-8")
    (tmp_path / "nanogpt" / "model.py").write_text(f"print('number of parameters')\n{source}", encoding="utf-8")
    result = bench(nanogpt="nanogpt")
    assert result.code == 0 and json.loads(result.out)["peer"] == "nanoGPT"


def test_profile_shows_where_the_time_goes(bench):
    assert "aten::" in bench(profile=True).out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "drive"}, ["mode"]),
        ({"rounds": 0, "n_embd": 0}, ["rounds", "n_embd"]),
        ({"nanogpt": "nowhere"}, ["nowhere"]),
        ({"nanogpt": "broken"}, ["broken/model.py", "nothing_of_that_name"]),
        ({"seed": -1}, ["seed"]),
        ({"optimizer": "sgd", "tie_embeddings": False}, ["sgd", "tie_embeddings"]),
        ({"mode": "decode", "max_new_tokens": 0, "quantize": "int3"}, ["max_new_tokens", "int3"]),
        ({"real_data": True, "dataset": "nothing"}, ["'nothing'"]),
        ({"dtype": "float16"}, ["float16"]),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_each(tiny, bench, settings, words):
    (tiny / "broken").mkdir()
    (tiny / "broken" / "model.py").write_text("import nothing_of_that_name")
    assert_user_error(bench(**settings), *words)
