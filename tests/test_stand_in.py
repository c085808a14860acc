"""The paths of CUDA, and of NCCL with eight processes, as far as they can be tried without: see stand_in.py."""

import functools
import inspect
import os
from unittest import mock

import numpy as np
import pytest
import stand_in
import torch
import torch.distributed as dist
from conftest import TINY, flags, records
from torch.distributed.tensor import DTensor

from model import GPT, GPTConfig
from quartz import compiled, machine, optim, ranks, sharding, shards, update
from quartz.decoder import Sampling, complete
from quartz.engine import Engine

PLAIN = {**TINY, "dropout": 0.0, "n_embd": 32, "max_iters": 6, "eval_interval": 3}
MUON = {"optimizer": "muon", "arch": "qwen3", "tie_embeddings": False, "n_kv_head": 1}
PLACE = torch.device("cuda:3")


# ----------------------------------------------------------------------------------------------------------------------
# The stand-in itself


def test_what_would_fail_on_a_gpu_fails():
    with stand_in.gpu(3) as gpu:
        there, here = torch.ones(3, device=PLACE), torch.ones(3)
        assert there.device == PLACE and here.device.type == "cpu" and (there * 2).device == PLACE
        for mixed in (lambda: there + here, lambda: torch.cat((there, here)), lambda: nn_linear(there)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2], "a number may lie anywhere"
        assert (gpu.waits, gpu.unpinned) == (1, 0)
        there.copy_(here)
        assert here.to(PLACE).device == PLACE and gpu.unpinned == 1
        assert here.pin_memory().to(PLACE).device == PLACE and gpu.unpinned == 1
        assert there.cpu().device.type == "cpu" and gpu.waits == 2


def nn_linear(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Linear(3, 3)(x)


# ----------------------------------------------------------------------------------------------------------------------
# One GPU


@pytest.mark.parametrize(
    "settings", [{}, MUON, {"activation_checkpointing": True}, {"init_from": "given", "lora_rank": 2}], ids=str
)
def test_a_run_on_a_gpu_mixes_no_devices_and_does_what_a_cpu_does(tiny, train, settings):
    assert train(**PLAIN, out_dir="given").code == 0
    assert train(**PLAIN | settings, out_dir="cpu").code == 0
    with stand_in.gpu():
        result = train(**PLAIN | settings | {"device": "cuda"}, out_dir="gpu")
        assert result.code == 0, result.err
        assert (
            train(**PLAIN | settings | {"device": "cuda", "max_iters": 8, "init_from": "resume"}, out_dir="gpu").code
            == 0
        )
    assert "computing in float32 on cuda" in result.out
    ours, theirs = ([r for r in records(tiny / name) if r.get("iter", 9) < 6] for name in ("gpu", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() - {"mfu"} == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_masked_rows_too(rows, train):
    with stand_in.gpu():
        result = train(**PLAIN | {"device": "cuda"})
    assert result.code == 0, result.err


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4}, MUON], ids=str)
def test_an_update_waits_for_the_gpu_once_and_copies_from_pinned_memory(tiny, train, settings):
    found = []
    for updates in (4, 9):
        with stand_in.gpu() as gpu:
            result = train(**PLAIN | {"device": "cuda", "max_iters": updates, "eval_interval": 100} | settings)
        assert result.code == 0, result.err
        found.append((gpu.waits, gpu.unpinned))
    assert found[1][0] - found[0][0] == 5, "one wait in each of five more updates"
    assert found[1][1] == found[0][1], "no copy in an update comes from memory that is not pinned"


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 5, "repetition_penalty": 1.2, "top_p": 0.9}], ids=str
)
def test_texts_of_the_graph_are_those_of_a_cpu(tiny, train, run, settings):
    assert train(**PLAIN).code == 0
    settings = {"num_samples": 3, "max_new_tokens": 40, "dtype": "float32", "logprobs": "told.jsonl", **settings}
    theirs = run("sample.py", *flags(**settings, device="cpu", compile=False))
    with stand_in.graphs():
        ours = run("sample.py", *flags(**settings, device="cuda"))
    assert ours.code == theirs.code == 0, ours.err
    assert ours.out == theirs.out


def test_rows_that_come_and_go_and_weights_that_change():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    prompts, how = [[1, 2, 3], [4], [5] * 40], Sampling(top_k=9)
    with stand_in.graphs():
        own = GPT(model.config).to(PLACE).eval()
        own.load_state_dict(model.state_dict())
        engine = compiled.prepare(own, PLACE, torch.float32, False, 3, 10, False)
        assert type(engine) is compiled.GraphedStep
        assert complete(engine, prompts, 70, how, ahead=16) == complete(Engine(model), prompts, 70, how)
        with torch.no_grad():
            for its in (*own.parameters(), *model.parameters()):
                its.mul_(1.5)
        engine.refresh()
        assert complete(engine, prompts, 9, how) == complete(Engine(model), prompts, 9, how)


def test_the_loss_over_a_text_is_that_of_a_cpu(tiny, train, run):
    assert train(**PLAIN).code == 0
    theirs = run("eval.py", *flags(device="cpu", dtype="float32"))
    with stand_in.gpu():
        ours = run("eval.py", *flags(device="cuda", dtype="float32"))
    assert ours.code == 0, ours.err
    assert ours.err.partition(" tokens of")[0] == theirs.err.partition(" tokens of")[0]


def test_a_device_of_cuda_has_its_number():
    with stand_in.gpu():
        for name, place in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:3", "cuda:3")):
            assert machine.pick_device(name) == torch.device(place)
            torch.cuda.set_device(machine.pick_device(name))
        compiled.prepare(GPT(GPTConfig(8, 8, 1, 1, 4)), torch.device("cuda"), torch.float32, False, 1, 1, False)


def test_peaks_are_found_by_the_name():
    with stand_in.gpu():
        assert machine.peak_flops(PLACE, torch.bfloat16) == 989e12 and machine.peak_memory_speed(PLACE) == 4.8e12
        assert machine.has_fp8(PLACE)
        for name, flops, speed in (("NVIDIA H100 80GB HBM3", 989e12, 3.35e12), ("NVIDIA H100 PCIe", 756e12, 2e12)):
            with mock.patch.object(torch.cuda, "get_device_name", lambda _, name=name: name):
                assert (machine.peak_flops(PLACE, torch.bfloat16), machine.peak_memory_speed(PLACE)) == (flops, speed)


# ----------------------------------------------------------------------------------------------------------------------
# Eight processes


COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "gather",
    "reduce_scatter_tensor", "reduce_scatter_single", "scatter", "all_to_all", "send", "recv", "barrier",
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
)  # fmt: skip


class Calls(list):
    """(name, tensors) of each collective, in their order."""

    def of(self, name: str) -> list:
        return [tensors for its, tensors in self if its.startswith(name)]


@pytest.fixture
def as_rank_3(monkeypatch):
    """This process is rank 3 of 8, of a group that notes down what it is asked to do, and does nothing. As if all ranks
    had the same numbers: a gathered tensor holds this rank's part eight times, of a scattered one it keeps its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls = Calls()
    for name, value in {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    start = dist.init_process_group

    def init(backend, **settings):
        calls.append(("init", {"backend": backend, **settings}))
        start("fake", store=FakeStore(), rank=settings["rank"], world_size=settings["world_size"])

    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(FakeStore(), 3, 8)]))
    monkeypatch.setattr(dist, "init_process_group", init)
    for name in filter(functools.partial(hasattr, dist), COLLECTIVES):  # some are of newer releases of torch
        monkeypatch.setattr(dist, name, noted(getattr(dist, name), name, calls))
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    yield calls
    if dist.is_initialized():
        dist.destroy_process_group()


def noted(function, name: str, calls: Calls):
    def call(*arguments, **keywords):
        tensors = [its for its in (*arguments, *keywords.values()) if isinstance(its, torch.Tensor)]
        calls.append((name, tensors))
        result = function(*arguments, **keywords)
        if name.startswith("reduce_scatter"):
            tensors[0].copy_(tensors[1].chunk(8)[3].view_as(tensors[0]))
        return result

    return call


@pytest.fixture
def ddp(monkeypatch):
    """DDP, which would look in C++ at where tensors lie; returns what it was given, and whether each pass was to be the
    one whose gradients travel."""
    given, syncs = [], []

    class Replicated(torch.nn.Module):
        require_backward_grad_sync = True

        def __init__(self, model, device_ids=None):
            super().__init__()
            self.model = model
            given.append(device_ids)

        def forward(self, *arguments, **keywords):
            syncs.append(self.require_backward_grad_sync)
            return self.model(*arguments, **keywords)

    theirs = inspect.getsource(torch.nn.parallel.DistributedDataParallel.no_sync)
    assert "self.require_backward_grad_sync = False" in theirs
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Replicated)
    return given, syncs


@pytest.mark.parametrize("settings", [{}, MUON, {"grad_clip": 0.0}, {"gradient_accumulation_steps": 24}], ids=str)
def test_nccl_is_given_tensors_of_this_ranks_gpu_alone(tiny, train, as_rank_3, ddp, settings):
    with stand_in.gpu():
        many = {"gradient_accumulation_steps": 8, "eval_iters": 8}  # so that there is a batch for this rank
        result = train(**PLAIN | {"device": "cuda"} | many | settings)
        told = [(name, {stand_in.place_of(t) for t in tensors}) for name, tensors in as_rank_3 if name != "init"]
        chosen = torch.cuda.set_device.call_args
    assert result.code == 0, result.err
    assert {name for name, _ in told} == {"all_reduce", "barrier"}, "no objects are sent, which would travel as tensors"
    assert all(places == {PLACE} for name, places in told if name == "all_reduce")
    steps = settings.get("gradient_accumulation_steps", 8) // 8
    assert chosen == mock.call(PLACE) and ddp == ([[3]], [n % steps == steps - 1 for n in range(6 * steps)])
    (_, asked), last = as_rank_3[0], as_rank_3[-1][0]
    assert (asked["backend"], asked["device_id"], asked["rank"], asked["world_size"]) == ("nccl", PLACE, 3, 8)
    assert last == "barrier" and not dist.is_initialized(), "NCCL's group is taken down once all have arrived"


def test_the_device_is_chosen_before_the_group_begins(tiny, as_rank_3):
    with stand_in.gpu():
        torch.cuda.set_device.side_effect = lambda place: as_rank_3.append(("set_device", place))
        processes, place = ranks.start_processes("cuda", "nccl")
    assert [name for name, _ in as_rank_3] == ["set_device", "init"]
    assert (processes, place) == (ranks.Processes(3, 3, 8), PLACE)


def test_an_evaluation_sums_on_the_gpu(tiny, train, run, as_rank_3, monkeypatch):
    with monkeypatch.context() as alone:
        for name in ("RANK", "WORLD_SIZE"):
            alone.delenv(name)
        assert train(**PLAIN).code == 0
    with stand_in.gpu():
        result = run("eval.py", *flags(device="cuda", dtype="float32"))
        (sums,) = as_rank_3.of("all_reduce")
        assert [stand_in.place_of(t) for t in sums] == [PLACE]
    assert result.code == 0, result.err


def divided(as_rank_3, updates: int = 1, steps: int = 3, dtype: torch.dtype = torch.float32, **shape):
    """A GPT of which this rank holds its eighth, after updates of so many micro-batches; and what was said in them."""
    processes, place = ranks.start_processes("cpu", "gloo")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32} | shape))
    whole = sum(p.numel() for p in model.parameters())
    sharding.divide(model, place)
    if shape.get("arch"):
        rates = dict.fromkeys(("matrix", "embedding", "head", "vector"), 1e-3)
        updater = optim.muon(model, rates, 0.9, (0.9, 0.95), 0.0)
    else:
        updater = optim.adamw_of(model, 0.1, 1e-3, (0.9, 0.95), "cpu")
    optim.refine(updater, model, {}, "")
    x, scaler, signals = torch.arange(32).view(2, 16), torch.amp.GradScaler("cpu", enabled=False), update.Signals()
    as_rank_3.clear()
    for _ in range(updates):
        for step in range(steps):
            ranks.set_gradient_sync(model, step == steps - 1)
            loss = model(x, x, return_logits=False)[1]
            loss.backward()
        ended = update.end(updater, scaler, loss.detach(), 1.0, signals, processes)
        assert not ended.fault
    return model, updater, whole


def test_each_rank_holds_an_eighth(as_rank_3):
    model, updater, whole = divided(as_rank_3)
    own = sum(ranks.own_part(p).numel() for p in model.parameters())
    assert own == pytest.approx(whole / 8, rel=0.05)
    moments = [its for state in updater.state.values() for key, its in state.items() if key != "step"]
    assert sum(ranks.own_part(its).numel() for its in moments) == 2 * own
    assert all(isinstance(its, DTensor) for its in (*model.parameters(), *moments))


def test_gradients_travel_once_an_update(as_rank_3):
    """However many micro-batches it has: one message for each of the blocks, and one for the rest."""
    for steps in (1, 4):
        divided(as_rank_3, steps=steps)
        assert len(as_rank_3.of("reduce_scatter")) == 3
        dist.destroy_process_group()


def test_muon_puts_updates_together_and_takes_its_own_part(as_rank_3):
    model, updater, _ = divided(as_rank_3, arch="qwen3", bias=False, tie_embeddings=False)
    moments = [state["momentum_buffer"] for state in updater.state.values() if "momentum_buffer" in state]
    assert len(moments) == 8 and all(isinstance(its, DTensor) for its in moments)


def test_a_gathered_checkpoint_is_whole_and_on_the_cpu_of_the_master_alone(as_rank_3):
    model, updater, _ = divided(as_rank_3)
    for rank, kind in ((0, torch.Tensor), (3, type(None))):
        processes = ranks.Processes(rank, rank, 8)
        for state in (model.state_dict(), updater.state_dict()):
            gathered = ranks.gather(state, processes)
            tensors = [its for its in flat(gathered) if its is None or its.dim()]
            assert tensors and all(type(its) is kind for its in tensors)
    assert [*ranks.gather(model.state_dict(), ranks.Processes(0, 0, 8))] == [*GPT(model.config).state_dict()]


def flat(value) -> list:
    if isinstance(value, dict):
        return [part for key, its in value.items() if key != "param_groups" for part in flat(its)]
    return [value] if value is None or torch.is_tensor(value) else []


def test_micro_batches_of_eight_ranks_are_those_of_one(tiny):
    folder = shards.find("tiny")
    split = shards.Split(folder, "train", shards.load_meta(folder))
    micro = shards.MicroBatches(split, 4, 16, 1)
    alone = [micro.starts(nth) for nth in range(16)]
    eight = [micro.starts(update_ * 8 + rank) for update_ in range(2) for rank in range(8)]
    assert np.array_equal(alone, eight)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gradient_accumulation_steps": 12}, "multiple of their number (8)"),
        ({"fsdp": True, "dtype": "float16", "device": "cuda"}, "gradient scaler"),
        ({"fsdp": True, "lora_rank": 2, "init_from": "given"}, "lora_rank"),
        ({"device": "cuda", "fp8": True, "dtype": "float32"}, "bfloat16"),
    ],
    ids=str,
)
def test_what_eight_ranks_can_not_do_is_one_line(tiny, train, as_rank_3, settings, word):
    (tiny / "given").mkdir()
    with stand_in.gpu():
        result = train(**PLAIN | {"gradient_accumulation_steps": 8} | settings)
    assert result.code == 2 and word in result.err
