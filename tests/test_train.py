import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import nanogpt
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, assert_user_error, flags, load, records, same

import model as model_module
from quartz import checkpoint, corpus, machine, shards


@pytest.fixture
def undisturbed(tiny, train):
    assert train(out_dir="whole", max_iters=12).code == 0
    return tiny / "whole"


def test_a_run_learns_and_reports(tiny, train):
    result = train(max_iters=30, eval_interval=10, n_embd=32, dropout=0.0)
    assert result.code == 0, result.err
    steps = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", result.out, re.M)
    assert [int(step) for step, _, _ in steps] == [0, 10, 20, 30]
    assert float(steps[-1][2]) < float(steps[0][2]) - 0.5
    lines = re.findall(r"^iter (\d+): loss [\d.]+, time [\d.]+ms, [\d,]+ tokens/s$", result.out, re.M)
    assert [int(n) for n in lines] == list(range(30))
    kept = records(tiny / "out")
    assert [r["iter"] for r in kept if "iter" in r] == list(range(30))
    assert [r["step"] for r in kept if "step" in r] == [0, 10, 20, 30]
    assert all({"loss", "lr", "grad_norm"} <= r.keys() for r in kept if "iter" in r)


def test_max_iters_updates_are_made_and_the_last_is_evaluated_and_saved(tiny, train):
    result = train(max_iters=7, eval_interval=5)
    assert re.findall(r"^step (\d+)", result.out, re.M) == ["0", "5", "7"]
    for name in ("ckpt.pt", "last.pt"):
        state = load(tiny / "out" / name)
        assert state["iter_num"] == 7
        assert all(moments["step"] == 7 for moments in state["optimizer"]["state"].values())
    assert state["tokens_seen"] == 7 * 4 * 2 * 16


def test_the_state_before_the_first_update_is_never_the_best(tiny, train):
    train(max_iters=0)
    assert not (tiny / "out" / "ckpt.pt").exists() and load(tiny / "out" / "last.pt")["iter_num"] == 0


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 11])
def test_a_run_stopped_by_sigterm_and_resumed_is_the_undisturbed_run(tiny, train, undisturbed, monkeypatch, stop_at):
    plain, calls = shards.MicroBatches.read, []

    def stop(micro_batches, nth):
        calls.append(nth)
        if len(calls) == 2 * stop_at:  # two micro-batches an update
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(micro_batches, nth)

    with monkeypatch.context() as patch:
        patch.setattr(shards.MicroBatches, "read", stop)
        result = train(out_dir="cut", max_iters=12)
    assert result.code == 0 and "Traceback" not in result.err, result.err
    assert load(tiny / "cut" / "last.pt")["iter_num"] == stop_at
    assert "stopped by a signal" in result.out
    assert train(out_dir="cut", max_iters=12, init_from="resume").code == 0
    assert_same_run(tiny / "cut", undisturbed)


def test_evaluation_changes_nothing_in_training(tiny, train, undisturbed):
    train(out_dir="often", max_iters=12, eval_interval=1, eval_iters=7)
    for name in ("model", "optimizer"):
        assert same(load(tiny / "often" / "last.pt")[name], load(undisturbed / "last.pt")[name])
    ours, theirs = ([r for r in records(folder) if "iter" in r] for folder in (tiny / "often", undisturbed))
    assert ours == theirs


def test_a_signal_during_evaluation_stops_it_and_the_resumed_run_is_the_same(tiny, train, undisturbed, monkeypatch):
    plain, calls = shards.Split.windows, []

    def stop(self, starts, block_size):
        calls.append(self.name)
        if len(calls) == 2 + 5 * 2 + 1:  # in the evaluation after 5 updates, of two splits
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, starts, block_size)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Split, "windows", stop)
        assert train(out_dir="cut", max_iters=12).code == 0
    assert load(tiny / "cut" / "last.pt")["evaluated"] is False
    assert train(out_dir="cut", max_iters=12, init_from="resume").code == 0
    assert_same_run(tiny / "cut", undisturbed)


def test_a_resumed_log_repeats_nothing_and_drops_a_torn_line(tiny, train):
    train(max_iters=5)
    with open(tiny / "out" / "log.jsonl", "a") as log:
        log.write('{"iter": 5, "loss": 1.0}\n{"iter": 6, "lo')
    train(max_iters=10, init_from="resume")
    assert [r["iter"] for r in records(tiny / "out") if "iter" in r] == list(range(10))
    assert [r["step"] for r in records(tiny / "out") if "step" in r] == [0, 5, 10]


def test_the_split_into_micro_batches_changes_nothing_but_rounding(tiny, train):
    one = {"batch_size": 8, "gradient_accumulation_steps": 1, "dropout": 0.0}
    train(out_dir="one", **one)
    train(out_dir="four", **{**one, "batch_size": 2, "gradient_accumulation_steps": 4})
    a, b = ([r["loss"] for r in records(tiny / name) if "iter" in r] for name in ("one", "four"))
    assert a == pytest.approx(b, abs=1e-4)


@pytest.fixture
def losses(monkeypatch):
    """Makes the evaluations of the following runs report these validation losses, in turn."""
    plain, queue, calls = model_module.GPT.forward, [], []

    def forward(self, *arguments, **keywords):
        logits, loss = plain(self, *arguments, **keywords)
        if not self.training:  # an evaluation: train, then val, of one batch each
            calls.append(1)
            loss = torch.tensor(float(queue[(len(calls) - 1) // 2]))
        return logits, loss

    monkeypatch.setattr(model_module.GPT, "forward", forward)
    return lambda *values: queue.__setitem__(slice(None), values)


def test_the_best_stays_best_also_across_a_resume(tiny, train, losses):
    settings = {"eval_iters": 1, "eval_interval": 1, "always_save_checkpoint": False, "lr_decay_iters": 9}
    losses(5, 3, 2, 4)
    assert train(**settings, max_iters=3).code == 0
    best = load(tiny / "out" / "ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (2, 2.0)
    assert (load(tiny / "out" / "last.pt")["iter_num"], load(tiny / "out" / "last.pt")["best_val_loss"]) == (3, 2.0)
    losses(5, 3, 2, 4, 3, 1.5, 9)
    assert train(**settings, max_iters=4, init_from="resume").code == 0
    assert load(tiny / "out" / "ckpt.pt")["iter_num"] == 2
    assert train(**settings, max_iters=6, init_from="resume").code == 0
    assert load(tiny / "out" / "ckpt.pt")["iter_num"] == 5
    assert load(tiny / "out" / "last.pt")["best_val_loss"] == 1.5


def test_always_save_checkpoint_keeps_the_latest_and_remembers_the_best(tiny, train, losses):
    losses(5, 3, 2, 4)
    train(eval_iters=1, eval_interval=1, max_iters=3, always_save_checkpoint=True)
    state = load(tiny / "out" / "ckpt.pt")
    assert (state["iter_num"], state["best_val_loss"]) == (3, 2.0)


def test_eval_only_writes_nothing(tiny, train):
    result = train(eval_only=True)
    assert re.findall(r"^step (\d+): train loss [\d.]+, val loss [\d.]+$", result.out, re.M) == ["0"]
    assert not (tiny / "out").exists()
    train(max_iters=5)
    before = {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}
    result = train(eval_only=True, init_from="resume")
    assert re.findall(r"^step (\d+)", result.out, re.M) == ["5"]
    assert before == {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_resumes_and_goes_back(tiny, train, bias):
    (tiny / "out").mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 33, "dropout": 0.0}
    nanogpt.write(tiny / "out" / "ckpt.pt", torch.tensor(9.0), "_orig_mod.", iter_num=4, bias=bias, **shape)
    assert shards.load_meta(tiny / "data" / "tiny")["vocab_size"] == 33
    result = train(init_from="resume", max_iters=8, bias=bias)
    assert result.code == 0, result.err
    assert [r["iter"] for r in records(tiny / "out") if "iter" in r] == [4, 5, 6, 7]
    reference, optimizer, state = nanogpt.read(tiny / "out" / "ckpt.pt")
    assert state["iter_num"] == 8 and float(state["best_val_loss"]) < 9
    idx = torch.randint(33, (2, 16))
    ours = checkpoint.build_model(checkpoint.load(tiny / "out" / "ckpt.pt")).eval()
    torch.testing.assert_close(ours(idx, idx)[0], reference(idx), atol=1e-4, rtol=0)
    reference(idx).sum().backward()
    optimizer.step()
    assert all(moments["step"] == 9 for moments in optimizer.state.values())


@pytest.mark.parametrize("clip", [0.0, 0.02])
def test_the_first_resumed_update_is_nanogpts(tiny, train, clip):
    """The same weights, moments and batch: one update here is the one that plain PyTorch makes."""
    (tiny / "out").mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 33, "dropout": 0.0}
    nanogpt.write(tiny / "out" / "ckpt.pt", 9.0, iter_num=4, bias=False, **shape)
    reference, optimizer, _ = nanogpt.read(tiny / "out" / "ckpt.pt")
    settings = {"learning_rate": 1e-3, "decay_lr": False, "dropout": 0.0, "max_iters": 5, "grad_clip": clip}
    assert train(init_from="resume", gradient_accumulation_steps=1, **settings).code == 0
    folder = tiny / "data" / "tiny"
    split = shards.Split(folder, "train", shards.load_meta(folder))
    x, y = split.windows(shards.training_starts(np.arange(16, 20), len(split), 16, 1337), 16)
    torch.nn.functional.cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
    if clip:
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        assert norm > clip
        for parameter in reference.parameters():
            parameter.grad *= clip / norm
    optimizer.step()
    ours = load(tiny / "out" / "last.pt")["model"]
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)


def test_a_resume_may_shorten_the_context_and_says_what_changed(tiny, train):
    train(max_iters=5)
    result = train(max_iters=7, init_from="resume", block_size=8, batch_size=2)
    assert result.code == 0, result.err
    assert "batch_size was 4" in result.out
    state = load(tiny / "out" / "last.pt")
    assert state["model_args"]["block_size"] == 8 == state["config"]["block_size"]
    assert state["model"]["transformer.wpe.weight"].shape == (8, 16)


def test_a_resume_takes_the_architecture_from_the_checkpoint(tiny, run):
    small = ("n_layer", "n_head", "n_embd", "block_size")
    run("train.py", *flags(**{**TINY, "max_iters": 2}))
    result = run("train.py", *flags(**{k: v for k, v in TINY.items() if k not in small}, init_from="resume"))
    assert result.code == 0, result.err
    assert load(tiny / "out" / "last.pt")["config"]["n_layer"] == 2


def test_a_new_run_sets_the_old_one_aside(tiny, train):
    train(max_iters=2)
    before = load(tiny / "out" / "ckpt.pt")
    train(max_iters=0)
    result = train(max_iters=3, seed=2)
    assert "previous-2" in result.out
    assert same(load(tiny / "out" / "previous" / "ckpt.pt"), before)
    assert [path.name for path in (tiny / "out" / "previous-2").glob("*.pt")] == ["last.pt"]
    assert load(tiny / "out" / "ckpt.pt")["iter_num"] == 3
    assert [r["iter"] for r in records(tiny / "out") if "iter" in r] == [0, 1, 2]


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny, train):
    """Before an update from a loss that is no number, and before weights that are none reach the disk."""
    train(max_iters=5)
    wild = {"max_iters": 50, "init_from": "resume", "learning_rate": 1e38, "decay_lr": False, "grad_clip": 0.0}
    assert_user_error(train(**wild), "rank 0", "iteration 6")
    assert_user_error(train(**wild, eval_interval=1), "nan", "iteration 6", "diverged")
    state = load(tiny / "out" / "last.pt")
    assert state["iter_num"] == 5 and all(t.isfinite().all() for t in state["model"].values())


def test_a_log_that_can_not_be_written_is_one_line(tiny, train):
    (tiny / "out" / "log.jsonl").mkdir(parents=True)
    assert_user_error(train(), "log.jsonl")


def test_a_signal_before_the_start_leaves_the_earlier_run(tiny, train, monkeypatch):
    train(max_iters=2)
    before = {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}
    plain = shards.load_meta
    monkeypatch.setattr(shards, "load_meta", lambda folder: os.kill(os.getpid(), signal.SIGINT) or plain(folder))
    assert train(max_iters=9).code == 0
    assert before == {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}


def test_fine_tuning_starts_from_gpt2_weights(tiny, train):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.GPT2Config(vocab_size=33, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2-tiny")
    small = {**TINY, "init_from": "gpt2-tiny", "max_iters": 3, "bias": True}
    result = train(**small)
    assert result.code == 0, result.err
    assert load(tiny / "out" / "ckpt.pt")["model_args"]["bias"] is True
    assert_user_error(train(**{**small, "n_layer": 3, "bias": False}), "n_layer is 2", "bias is True")


def wandb_history(path) -> list[dict]:
    """What an offline run of Weights & Biases holds: protocol buffers in LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at < len(data):
        if (rest := 32768 - at % 32768) < 7:  # of a block: no room for a header
            at += rest
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only part of a record, or its last one
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_gets_every_figure_of_the_log_offline(tiny, start):
    settings = {**TINY, "wandb_log": True, "wandb_project": "p", "wandb_run_name": "r"}
    process = start("train.py", *flags(**settings), cwd=tiny, env={**os.environ, "WANDB_MODE": "offline"})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (path,) = tiny.glob("wandb/offline-run-*/run-*.wandb")
    names = {"step": "iter", "train_loss": "train/loss", "val_loss": "val/loss"}
    kept = [{names.get(key, key): value for key, value in record.items()} for record in log_of(tiny / "out")]
    sent = [{key: value for key, value in row.items() if key[0] != "_"} for row in wandb_history(path)]
    assert sent == kept and len(kept) == 10 + 3


def test_wandb_draws_against_iterations_and_gets_mfu_in_percent(tiny, train, monkeypatch):
    sent = []

    class Run:
        def define_metric(self, name, step_metric):
            sent.append((name, step_metric))

        def log(self, figures):
            sent.append(figures)

        def finish(self):
            sent.append("finished")

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **keywords: sent.append(keywords) or Run())
    monkeypatch.setattr(machine, "peak_flops", lambda place, dtype: 1e12)
    train(wandb_log=True, max_iters=1, wandb_project="p", wandb_run_name="r")
    assert sent[0]["project"] == "p" and sent[0]["name"] == "r" and sent[0]["config"]["n_layer"] == 2
    assert sent[1] == ("*", "iter") and sent[-1] == "finished"
    assert sent[3]["mfu"] == pytest.approx(100 * log_of(tiny / "out")[1]["mfu"]) and sent[3]["mfu"] > 0


def test_a_run_that_fails_to_start_leaves_the_earlier_one(tiny, train, monkeypatch):
    import wandb

    def fail(**keywords):
        raise wandb.errors.UsageError("api_key not configured")

    train(max_iters=2)
    before = {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}
    monkeypatch.setattr(wandb, "init", fail)
    assert_user_error(train(wandb_log=True), "WANDB_MODE=offline")
    assert before == {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}


def test_weights_dropout_and_order_follow_the_seed(tiny, train, monkeypatch):
    seeds, plain = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or plain(seed))
    train(out_dir="a", max_iters=4)
    train(out_dir="b", max_iters=4, seed=2)
    assert len(set(seeds)) == 2 * (1 + 4), "each update has a dropout of its own, in each of the runs"
    first = [records(tiny / name)[0]["val_loss"] for name in "ab"]
    assert first[0] != first[1], "the initial weights differ"


def test_the_optimizer_takes_its_settings(tiny, train):
    train(max_iters=2, beta1=0.7, beta2=0.8, weight_decay=0.25, decay_lr=False, learning_rate=0.5, min_lr=0.1)
    groups = load(tiny / "out" / "last.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert all(tuple(group["betas"]) == (0.7, 0.8) and group["lr"] == 0.5 for group in groups)


def test_an_evaluation_reads_no_window_twice_over(tiny, train, monkeypatch):
    """val has 500 tokens: 8 batches of 4 windows of 16 hold them all, however many eval_iters asks for."""
    read, plain = [], shards.Split.windows

    def windows(self, starts, block_size):
        read.append(len(starts))
        return plain(self, starts, block_size)

    monkeypatch.setattr(shards.Split, "windows", windows)
    train(eval_only=True, eval_iters=1000)
    assert sum(read) == 4 * (8 + math.ceil(2883 / 64))


def test_bfloat16_is_what_the_run_computes_in(tiny, train):
    for name in ("float32", "bfloat16"):
        train(out_dir=name, dtype=name, max_iters=1)
    ours, theirs = (records(tiny / name)[0]["val_loss"] for name in ("float32", "bfloat16"))
    assert ours != theirs and ours == pytest.approx(theirs, abs=0.02)


def test_auto_is_bfloat16_where_the_cpu_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for features, expected in (
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert machine.pick_dtype("auto", cpu) is expected
    assert machine.pick_dtype("bfloat16", cpu) is torch.bfloat16


def test_a_compiled_run_resumes_exactly_and_its_checkpoint_has_plain_names(tiny, train):
    if sys.platform != "linux":
        pytest.skip("this system is not Linux, where it compiles")
    settings = {"max_iters": 6, "eval_interval": 3, "dropout": 0.0, "n_embd": 64, "batch_size": 16}
    result = train(compile=True, **settings)
    assert result.code == 0, result.err
    assert not any("_orig_mod" in name for name in load(tiny / "out" / "ckpt.pt")["model"])
    assert train(out_dir="eager", **settings).code == 0
    a, b = (records(tiny / name) for name in ("out", "eager"))
    for ours, theirs in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    train(out_dir="cut", compile=True, **{**settings, "max_iters": 3})
    assert train(out_dir="cut", compile=True, init_from="resume", **settings).code == 0
    assert_same_run(tiny / "cut", tiny / "out")


def test_without_a_compiler_a_run_warns_and_goes_on(tiny, start):
    environment = {**os.environ, "PATH": "/nowhere", "XDG_CACHE_HOME": str(tiny / "empty")}
    process = start("train.py", *flags(**{**TINY, "compile": True, "max_iters": 1}), cwd=tiny, env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "warning: compile=True is not possible" in err and "Traceback" not in err and "step 1:" in out


LOADED = """
import json, runpy, sys
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    unwanted = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"} & sys.modules.keys()
    assert "torch" in sys.modules and not unwanted, (sys.argv, unwanted)
"""


def test_a_start_loads_no_compiler_and_nothing_of_divided_models(tiny):
    """Each would take torch about a second, which is most of a short run or of a sample."""
    adamw, sampling = {**TINY, "max_iters": 1}, {"out_dir": "out", "device": "cpu", "num_samples": 1}
    muon = {**adamw, "arch": "qwen3", "tie_embeddings": False, "optimizer": "muon"}
    work = [("train.py", adamw), ("train.py", muon), ("sample.py", {**sampling, "max_new_tokens": 3})]
    work.append(("eval.py", {"out_dir": "out", "device": "cpu"}))
    told = json.dumps([[str(ROOT / script), *flags(**settings)] for script, settings in work])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOADED, told]
    done = subprocess.run(command, cwd=tiny, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bfloat16_runs_and_resumes_exactly(tiny, train):
    settings = {"dtype": "bfloat16", "max_iters": 8, "eval_interval": 4}
    train(**settings, out_dir="whole")
    train(**{**settings, "max_iters": 4})
    assert train(**settings, init_from="resume").code == 0
    assert_same_run(tiny / "out", tiny / "whole")


def test_the_schedule_is_linear_then_cosine(tiny, train):
    train(max_iters=12, warmup_iters=3, lr_decay_iters=9, learning_rate=1.0, min_lr=0.1, log_interval=1)
    rates = [r["lr"] for r in records(tiny / "out") if "iter" in r]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert rates[3] == pytest.approx(1.0) and rates[6] == pytest.approx(0.55) and rates[9:] == pytest.approx([0.1] * 3)


WRONG = [
    ({"bach_size": 3}, ["'batch_size'"]),
    ({"batch_size": 0, "learning_rate": -1, "beta2": 1.0}, ["batch_size", "learning_rate", "beta2"]),
    ({"n_embd": 15}, ["n_embd (15)", "n_head (2)"]),
    ({"dropout": 1.0}, ["dropout"]),
    ({"dataset": "nothing"}, ["'nothing' is not prepared"]),
    ({"block_size": 1000}, ["block_size 1000"]),
    ({"init_from": "resume", "out_dir": "nowhere"}, ["no checkpoint", "nowhere"]),
    ({"init_from": "gpt3"}, ["gpt3", "gpt2-xl"]),
    ({"out_dir": "data/tiny/train.bin"}, ["out_dir"]),
    ({"out_dir": "/proc/nothing"}, ["out_dir"]),
    ({"device": "gpu"}, ["unknown device 'gpu'"]),
    ({"device": "cuda:99"}, ["cuda"]),
    ({"device": "cpu:x"}, ["unknown device"]),
    ({"dtype": "float8"}, ["unknown dtype"]),
    ({"dtype": "float8", "device": "gpu", "max_iters": -1}, ["unknown dtype", "unknown device", "max_iters"]),
    ({"dtype": "float16"}, ["float16"]),
    ({"warmup_iters": 20}, ["warmup_iters", "lr_decay_iters"]),
    ({"max_iters": -1}, ["max_iters"]),
    ({"seed": 2**70}, ["seed"]),
    ({"batch_size": 10**20}, ["batch_size"]),
    ({"out_dir": "a\0b"}, ["out_dir"]),
    ({"learning_rate": "1e999"}, ["learning_rate"]),
    ({"batch_size": 0, "dataset": "no", "device": "gpu", "out_dir": "data/tiny/val.bin"}, ["batch", "gpu", "out_"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=lambda value: "-".join(value)[:40] if value else "")
def test_wrong_settings_are_one_line_each(tiny, train, settings, words):
    result = train(**settings)
    assert_user_error(result, *words)
    lines = [line for line in result.err.splitlines() if line.startswith("error")]
    wrong = settings.keys() - ({"out_dir"} if settings.get("init_from") == "resume" else set())
    assert len(lines) == len(wrong)
    assert not list(tiny.glob("out/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": 3}, ["n_layer is 2"]),
        ({"n_head": 4, "n_embd": 32}, ["n_head is 2", "n_embd is 16"]),
        ({"bias": True}, ["bias is False"]),
        ({"block_size": 32}, ["block_size is 16"]),
    ],
)
def test_a_resume_with_another_architecture_is_refused(tiny, train, settings, words):
    train(max_iters=2)
    before = load(tiny / "out" / "last.pt")
    assert_user_error(train(init_from="resume", **settings), *words)
    assert same(load(tiny / "out" / "last.pt"), before)


def test_a_resume_with_another_tokenizer_is_refused(tiny, train):
    from quartz.tokenizer import CharTokenizer

    train(max_iters=2)
    (tiny / "data" / "other").mkdir()
    ids = [0, 1, 2] * 100
    corpus.write_dataset(tiny / "data" / "other", {"train": ids, "val": ids}, CharTokenizer.train("xyz"))
    assert_user_error(train(init_from="resume", dataset="other"), "another tokenizer")


def test_ids_beyond_the_vocabulary_are_refused_before_anything_is_written(tiny, train):
    path = tiny / "data" / "tiny" / "val.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[7] = 500
    tokens.tofile(path)
    assert_user_error(train(), "token id 500", "val")
    assert not list((tiny / "out").glob("*"))


def test_a_damaged_checkpoint_is_not_resumed_and_not_touched(tiny, train):
    train(max_iters=2)
    for name in ("ckpt.pt", "last.pt"):
        path = tiny / "out" / name
        path.write_bytes(path.read_bytes()[:3000])
    before = {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}
    assert_user_error(train(init_from="resume"), "truncated")
    assert before == {path.name: path.read_bytes() for path in (tiny / "out").iterdir()}


MUON = {"arch": "qwen3", "optimizer": "muon", "tie_embeddings": False, "schedule": "wsd", "weight_decay": 0.01}


def test_a_muon_run_resumes_in_the_same_bits_and_samples(tiny, train, run):
    assert train(**MUON, out_dir="whole", max_iters=10).code == 0
    assert train(**MUON, out_dir="parts", max_iters=5).code == 0
    assert train(**MUON, out_dir="parts", max_iters=10, init_from="resume").code == 0
    whole, parts = (torch.load(f"{folder}/last.pt") for folder in ("whole", "parts"))
    assert whole["iter_num"] == parts["iter_num"] == 10 and whole["model_args"]["arch"] == "qwen3"
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][index][key]) for key, value in state.items())
    assert train(**MUON, out_dir="parts", max_iters=11, init_from="resume", n_kv_head=1).code == 2
    result = run("sample.py", "--out_dir=parts", "--num_samples=2", "--max_new_tokens=30", "--device=cpu")
    assert result.code == 0, result.err


def test_muon_learns_faster_than_adamw(tiny, train):
    losses = {}
    for name, settings in (("adamw", {}), ("muon", MUON)):
        assert train(**settings, out_dir=name, max_iters=60, lr_decay_iters=60, eval_interval=60, dropout=0.0).code == 0
        losses[name] = torch.load(f"{name}/last.pt")["best_val_loss"]
    assert losses["muon"] < losses["adamw"] - 0.1


def test_wsd_is_constant_and_then_a_line(tiny, train):
    assert train(schedule="wsd", decay_fraction=0.5, warmup_iters=2, lr_decay_iters=10, max_iters=10).code == 0
    lines = [json.loads(line) for line in (tiny / "out" / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "iter" in line]
    high, low = TINY["learning_rate"], TINY["min_lr"]
    expected = [high / 3, high * 2 / 3] + [high] * 4 + [low + left / 5 * (high - low) for left in (4, 3, 2, 1)]
    expected = expected[:2] + [high] * 4 + expected[6:]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arch": "mamba"}, ["arch", "llama"]),
        ({"optimizer": "sgd", "schedule": "step"}, ["optimizer", "schedule"]),
        ({"muon_lr": 3.0}, ["muon_lr"]),
        ({"fsdp": True, "dtype": "float16"}, ["torchrun", "gradient scaler"]),
        ({"sharded_checkpoint": True}, ["fsdp=True"]),
        ({"lr_multipliers": "wte", "no_decay": "wte"}, ["lr_multipliers", "wte=0.5"]),
        ({"no_decay": "nothing_of_that_name"}, ["nothing_of_that_name", "transformer.wte.weight"]),
        ({"muon_lr": 0.0, "muon_momentum": 1.0, "decay_fraction": 0}, ["muon_lr", "muon_momentum", "decay_fraction"]),
        ({"tie_embeddings": False}, ["tie_embeddings", "qwen3"]),
        ({"arch": "qwen3", "n_head": 3}, ["n_head (3)"]),
        ({"arch": "qwen3", "n_kv_head": 3}, ["n_kv_head (3)"]),
        ({"arch": "qwen3", "n_head": 16, "n_embd": 16}, ["even"]),
        ({"arch": "qwen3", "bias": True}, ["bias"]),
    ],
    ids=str,
)
def test_what_makes_no_network_or_optimizer_is_refused(tiny, train, settings, words):
    assert_user_error(train(**settings), *words)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_token_budget_says_how_long_to_train(tiny, train, run):
    settings = {name: value for name, value in TINY.items() if name not in ("max_iters", "lr_decay_iters")}
    arguments = flags(**{**settings, "warmup_iters": 0, "token_budget": 1000})  # 4 x 2 x 16 an update: 7.8 updates
    assert run("train.py", *arguments).code == 0
    state = torch.load(tiny / "out" / "last.pt")
    assert state["iter_num"] == 8 and state["tokens_seen"] == 1024
    assert state["config"]["max_iters"] == state["config"]["lr_decay_iters"] == 8
    assert_user_error(train(token_budget=1000), "token_budget", "max_iters")
    again = run("train.py", *arguments, "--init_from=resume", "--token_budget=1200").out
    assert "note: max_iters was 8" in again and "is 10 from here on" in again and "600000" not in again


def test_it_stops_where_the_target_is_reached(tiny, train):
    result = train(max_iters=200, lr_decay_iters=200, eval_interval=5, target_val_loss=3.0, **MUON)
    assert result.code == 0 and "stopping early" in result.out
    values = [line["val_loss"] for line in log_of(tiny / "out") if "step" in line]
    assert values[-1] <= 3.0 < min(values[:-1]) and len(values) < 40
    assert torch.load(tiny / "out" / "last.pt")["best_val_loss"] == values[-1]


def test_it_stops_where_nothing_gets_better_also_across_a_resume(tiny, train):
    still = {"learning_rate": 1e-12, "min_lr": 0.0, "weight_decay": 0.0, "eval_interval": 1, "patience": 4}
    rates = {"muon_lr": 1e-12, "embedding_lr": 1e-12, "head_lr": 1e-12}
    assert train(max_iters=3, **still, **rates).code == 0
    before = sum("step" in line for line in log_of(tiny / "out"))
    result = train(max_iters=50, init_from="resume", **still, **rates)
    assert result.code == 0 and "stopping early" in result.out
    values = [line["val_loss"] for line in log_of(tiny / "out") if "step" in line]
    assert before < len(values) < 20 and min(values) == min(values[:-4])


def test_the_gradients_norm_is_logged_without_clipping_too(tiny, train):
    assert train(grad_clip=0.0, max_iters=2, out_dir="free").code == 0
    assert train(grad_clip=1e9, max_iters=2, out_dir="high").code == 0
    norms = [[line["grad_norm"] for line in log_of(tiny / out) if "iter" in line] for out in ("free", "high")]
    assert norms[0] == norms[1] and len(norms[0]) == 2 and min(norms[0]) > 0
    free, high = (torch.load(tiny / out / "last.pt")["model"] for out in ("free", "high"))
    assert all(torch.equal(free[name], high[name]) for name in free)


def test_tokens_and_seconds_go_on_over_a_resume(tiny, train):
    train(max_iters=4, eval_interval=3)
    before = log_of(tiny / "out")
    train(max_iters=9, eval_interval=3, init_from="resume")
    after = log_of(tiny / "out")
    assert after[: len(before)] == before
    assert [r["tokens"] for r in after] == [128 * (r["iter"] + 1 if "iter" in r else r["step"]) for r in after]
    seconds = [r["seconds"] for r in after]
    assert seconds[0] == 0 and seconds == sorted(seconds)
    for earlier, later in zip(after, after[1:], strict=False):
        assert later["seconds"] - earlier["seconds"] == pytest.approx(later.get("ms", 0) / 1000)


def test_the_time_of_an_update_is_the_mean_since_the_line_before_without_evaluations(tiny, train, monkeypatch):
    """A clock that goes on by a second at each look: of an update it sees two, wherever it was evaluated."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    train(max_iters=10, eval_interval=3, log_interval=4)
    lines = [line for line in log_of(tiny / "out") if "iter" in line]
    assert [line["iter"] for line in lines] == [0, 4, 8]
    assert [(line["ms"], line["tokens_per_s"], line["seconds"]) for line in lines] == [
        (1000, 128, 1),
        (1000, 128, 5),
        (1000, 128, 9),
    ]


def test_a_log_of_before_tokens_and_seconds_is_completed_by_a_resume(tiny, train):
    train(max_iters=5)
    path = tiny / "out" / "log.jsonl"
    whole = log_of(tiny / "out")
    old = [{k: v for k, v in r.items() if k != "seconds" and (k != "tokens" or "step" in r)} for r in whole]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    train(max_iters=7, init_from="resume")
    completed = log_of(tiny / "out")[: len(whole)]
    for ours, theirs in zip(completed, whole, strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["seconds"] == pytest.approx(theirs["seconds"])


# ----------------------------------------------------------------------------------------------------------------------
# Masks and rows


def targets_of(folder, split: str, numbers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and weights of the rows with these numbers, straight from the files of `rows`."""
    tokens = np.fromfile(folder / f"{split}.bin", dtype="<u2").reshape(-1, 17)[numbers].astype(np.int64)
    mask = np.fromfile(folder / f"{split}.mask", dtype=np.uint8).reshape(-1, 17)[numbers].astype(np.float32)
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:]), torch.from_numpy(mask[:, 1:])


def order_of(folder, numbers, length: int = 17) -> np.ndarray:
    size = (folder / "train.bin").stat().st_size // 2
    return shards.training_starts(numbers, size, length - 1, 1337, length) // length


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_update_on_masked_rows_is_that_of_plain_torch(rows, train, accumulation):
    """Four rows, one without any target, in one micro-batch or one each: the mean over all targets of the update."""
    (rows / "out").mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 33, "dropout": 0.0}
    nanogpt.write(rows / "out" / "ckpt.pt", 9.0, iter_num=4, bias=False, **shape)
    reference, optimizer, _ = nanogpt.read(rows / "out" / "ckpt.pt")
    folder = rows / "data" / "tiny"
    numbers = order_of(folder, np.arange(16, 20))
    mask = np.fromfile(folder / "train.mask", dtype=np.uint8)
    mask.reshape(-1, 17)[numbers[1]] = 0
    mask.tofile(folder / "train.mask")
    settings = {"learning_rate": 1e-3, "decay_lr": False, "dropout": 0.0, "max_iters": 5, "grad_clip": 0.0}
    settings |= {"batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    assert train(init_from="resume", **settings).code == 0
    x, y, weights = targets_of(folder, "train", numbers)
    losses = torch.nn.functional.cross_entropy(reference(x).flatten(0, 1), y.flatten(), reduction="none")
    loss = losses[weights.flatten() == 1].mean()
    loss.backward()
    optimizer.step()
    assert records(rows / "out")[-2]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    ours = load(rows / "out" / "last.pt")["model"]
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)


def test_a_masked_run_learns_its_targets_alone_and_resumes_exactly(rows, train):
    """The targets are every fourth token; what lies between is noise, which no model could learn."""
    folder = rows / "data" / "tiny"
    generator = np.random.default_rng(0)
    for split, n_rows in (("train", 60), ("val", 10)):
        tokens = generator.integers(1, 33, (n_rows, 17)).astype("<u2")
        tokens[:, 3::4] = 0
        tokens.tofile(folder / f"{split}.bin")
        (tokens == 0).astype(np.uint8).tofile(folder / f"{split}.mask")
    corpus_meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**corpus_meta, "tokens": {"train": 60 * 17, "val": 170}}))
    settings = {"max_iters": 60, "eval_interval": 30, "eval_iters": 9, "lr_decay_iters": 60, "n_embd": 32}
    assert train(out_dir="whole", **settings).code == 0
    last = records(rows / "whole")[-1]
    assert last["val_loss"] < 0.1 and last["train_loss"] < 0.1
    assert load(rows / "whole" / "last.pt")["tokens_seen"] == 60 * 4 * 2 * 16
    assert train(out_dir="cut", **{**settings, "max_iters": 30}).code == 0
    assert train(out_dir="cut", init_from="resume", **settings).code == 0
    assert_same_run(rows / "cut", rows / "whole")


@pytest.mark.parametrize("eval_iters", [2, 1000])
def test_masked_rows_are_evaluated_as_the_mean_over_their_targets(rows, train, run, eval_iters):
    """And eval.py finds the same over the whole split, whose rows fill no whole number of batches."""
    assert train(out_dir="out", max_iters=3, eval_interval=3, eval_iters=eval_iters).code == 0
    network = checkpoint.build_model(checkpoint.load(rows / "out" / "last.pt")).eval()
    found = records(rows / "out")[-1]
    for split, n_rows in (("train", 169), ("val", 29)):
        numbers = shards.evaluation_starts(n_rows * 17, 16, eval_iters * 4, 17) // 17
        assert len(numbers) == min(n_rows, eval_iters * 4)
        x, y, weights = targets_of(rows / "data" / "tiny", split, numbers)
        losses = torch.nn.functional.cross_entropy(network(x, x)[0].flatten(0, 1), y.flatten(), reduction="none")
        expected = losses[weights.flatten() == 1].mean().item()
        assert found[f"{split}_loss"] == pytest.approx(expected, abs=1e-5)
        if eval_iters == 1000:
            result = run("eval.py", *flags(out_dir="out", split=split, device="cpu", batch_size=7))
            record = json.loads(result.out.splitlines()[-1])
            assert record["loss"] == pytest.approx(expected, abs=1e-5)
            assert (record["tokens"], record["bytes"]) == (weights.sum(), weights.sum())
            assert (record["windows"], record["block_size"], record["stride"]) == (n_rows, 16, 17)


def test_a_mask_without_rows_moves_with_the_windows(rows, train):
    """All ones are the run without a mask; a mask over one half trains on that half alone."""
    folder = rows / "data" / "tiny"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "row": None}))
    size = {split: meta["tokens"][split] for split in ("train", "val")}
    for split in size:
        np.ones(size[split], dtype=np.uint8).tofile(folder / f"{split}.mask")
    assert train(out_dir="ones", dropout=0.0).code == 0
    for split in size:
        (folder / f"{split}.mask").unlink()
    assert train(out_dir="plain", dropout=0.0).code == 0
    for ours, theirs in zip(records(rows / "ones"), records(rows / "plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_an_update_without_a_target_is_left_out_or_stops_the_run(rows, train):
    folder = rows / "data" / "tiny"
    numbers = order_of(folder, np.arange(16, 24))  # of the third update
    mask = np.fromfile(folder / "train.mask", dtype=np.uint8)
    mask.reshape(-1, 17)[numbers] = 0
    mask.tofile(folder / "train.mask")
    assert_user_error(train(), "no token of the update is a target at iteration 2")
    result = train(skip_bad_updates=1)
    assert result.code == 0 and result.err.count("no token of the update is a target at iteration 2; this up") == 1
    state = load(rows / "out" / "last.pt")
    assert state["iter_num"] == 10 and all(t.isfinite().all() for t in state["model"].values())
    assert {int(its["step"]) for its in state["optimizer"]["state"].values()} == {9}


WRONG_MASKS = {
    "train.mask is of 5 tokens": ("train.mask", b"\1" * 5),
    "neither 0 nor 1": ("val.mask", b"\1" * 29 * 16 + b"\3" * 29),
    "leaves no target": ("train.mask", bytes(169 * 17)),
    "train_9.bin has no tokens": ("train_9.mask", b"\1"),
}


@pytest.mark.parametrize("words", WRONG_MASKS)
def test_wrong_masks_and_rows_are_one_line(rows, train, words):
    name, content = WRONG_MASKS[words]
    (rows / "data" / "tiny" / name).write_bytes(content)
    result = train()
    assert_user_error(result, words)
    assert result.err.count("\n") == 1 and not (rows / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(("size", "words"), [(8, "need block_size 16 or more, not 8"), (32, "set block_size=16")])
def test_a_new_model_has_the_context_of_its_rows(rows, train, size, words):
    assert_user_error(train(block_size=size), words)


def test_a_model_of_a_longer_context_may_train_on_rows(rows, train, run):
    (rows / "old").mkdir()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 33, "dropout": 0.0}
    nanogpt.write(rows / "old" / "ckpt.pt", 9.0, iter_num=4, bias=False, **shape)
    settings = {**TINY, "init_from": "old"}
    del settings["block_size"]
    assert run("train.py", *flags(**settings)).code == 0
    state = load(rows / "out" / "last.pt")
    assert state["model_args"]["block_size"] == 24 and state["tokens_seen"] == 10 * 4 * 2 * 16
