"""What must hold on a GPU as on a CPU.

Skipped where there is none; QUARTZGPT_TEST_DEVICE=cpu runs them on a CPU, which shows that the tests themselves run.
"""

import os
import re

import pytest
import torch
from conftest import TINY, assert_user_error, flags, load, records, same

from model import GPT, GPTConfig
from quartz import compiled, machine, serving
from quartz.decoder import Sampling, complete

NAME = os.environ.get("QUARTZGPT_TEST_DEVICE", "cuda")
PLACE = torch.device(NAME)
ON_GPU = PLACE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("this system has no CUDA device", allow_module_level=True)

SAME = {**TINY, "dropout": 0.0, "n_embd": 32, "max_iters": 12, "eval_interval": 6}
MUON = {"optimizer": "muon", "arch": "qwen3", "tie_embeddings": False, "n_kv_head": 1}
GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="this system has no CUDA device")


def losses(folder) -> list[float]:
    return [value for record in records(folder) for key, value in record.items() if key.endswith("loss")]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-3),
        (MUON, 1e-3),
        ({"activation_checkpointing": True}, 1e-3),
        ({"dtype": "bfloat16"}, 3e-2),
        pytest.param({"dtype": "float16"}, 3e-2, marks=GPU_ONLY),
        pytest.param({"compile": True}, 1e-3, marks=GPU_ONLY),
        pytest.param({"compile": True, **MUON, "dtype": "bfloat16"}, 3e-2, marks=GPU_ONLY),
    ],
    ids=str,
)
def test_a_run_has_the_losses_that_a_cpu_has(tiny, train, settings, tolerance):
    plain = {
        key: value for key, value in settings.items() if key not in ("dtype", "compile", "activation_checkpointing")
    }
    assert train(**{**SAME, **plain, "out_dir": "cpu"}).code == 0
    result = train(**{**SAME, **settings, "device": NAME, "out_dir": "gpu"})
    assert result.code == 0, result.err
    assert losses(tiny / "gpu") == pytest.approx(losses(tiny / "cpu"), abs=tolerance)


def test_masked_rows_count_as_on_a_cpu(rows, train):
    for folder, device in (("cpu", "cpu"), ("gpu", NAME)):
        assert train(**{**SAME, "device": device, "out_dir": folder}).code == 0
    assert losses(rows / "gpu") == pytest.approx(losses(rows / "cpu"), abs=1e-3)


def test_a_run_moves_between_a_cpu_and_a_gpu(tiny, train):
    assert train(**SAME, out_dir="whole").code == 0
    for n, device in enumerate(("cpu", NAME, "cpu"), 1):
        settings = {**SAME, "device": device, "max_iters": 4 * n, "init_from": "scratch" if n == 1 else "resume"}
        result = train(**settings)
        assert result.code == 0, result.err
    ours, theirs = (load(tiny / name / "last.pt") for name in ("out", "whole"))
    assert ours["iter_num"] == theirs["iter_num"] == 12
    for name, tensor in ours["model"].items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, theirs["model"][name], atol=1e-3, rtol=0)


def test_adapters_are_trained(tiny, train):
    assert train(**SAME).code == 0
    settings = {**SAME, "device": NAME, "init_from": "out", "out_dir": "adapted", "lora_rank": 2}
    result = train(**settings)
    assert result.code == 0, result.err
    found = losses(tiny / "adapted")
    assert found[-1] < found[0]
    assert train(**{**settings, "init_from": "resume", "max_iters": 14}).code == 0


def test_dropout_depends_on_the_seed_and_the_iteration_alone(tiny, train):
    settings = {**SAME, "dropout": 0.3, "device": NAME}
    assert train(**settings, out_dir="whole").code == 0
    assert train(**{**settings, "max_iters": 6}).code == 0
    assert train(**settings, init_from="resume").code == 0
    assert losses(tiny / "out") == pytest.approx(losses(tiny / "whole"), abs=1e-3)


@GPU_ONLY
def test_the_scaler_of_float16_is_kept(tiny, train):
    settings = {**SAME, "device": NAME, "dtype": "float16"}
    assert train(**settings, out_dir="whole").code == 0
    assert train(**{**settings, "max_iters": 6}).code == 0
    assert train(**settings, init_from="resume").code == 0
    assert same(load(tiny / "out" / "last.pt")["scaler"], load(tiny / "whole" / "last.pt")["scaler"])


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "top_k": 5, "num_samples": 3}], ids=str)
def test_samples_are_those_of_a_cpu(tiny, train, run, settings):
    assert train(**SAME).code == 0
    settings = {"num_samples": 2, "max_new_tokens": 40, "dtype": "float32", "compile": False, **settings}
    ours, theirs = (run("sample.py", *flags(**settings, device=device)) for device in (NAME, "cpu"))
    assert ours.code == theirs.code == 0, ours.err
    assert ours.out == theirs.out


def test_the_loss_over_a_text_is_that_of_a_cpu(tiny, train, run):
    assert train(**SAME).code == 0
    found = []
    for device in (NAME, "cpu"):
        result = run("eval.py", *flags(device=device, dtype="float32"))
        assert result.code == 0, result.err
        found.append(float(re.search(r'"loss": ([\d.]+)', result.out)[1]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_texts_that_would_not_fit_are_one_line(tiny, train, run):
    assert train(**SAME).code == 0
    assert_user_error(run("sample.py", *flags(device=NAME, num_samples=10**9)), "GiB are free")


def make() -> GPT:
    torch.manual_seed(0)
    network = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        network.transformer.wte.weight *= 10  # so that it has preferences
    return network


def test_plain_generation_is_that_of_a_cpu():
    prompt, model = torch.tensor([[1, 2, 3]]), make()
    wanted = model.generate(prompt, 30, temperature=0)
    assert torch.equal(model.to(PLACE).generate(prompt.to(PLACE), 30, temperature=0).cpu(), wanted)


def test_a_service_writes_what_the_decoder_writes():
    engine = compiled.prepare(make(), PLACE, torch.float32, False, 2, 30, False)
    wanted = complete(engine, [[1, 2, 3], [4]], 30, Sampling(top_k=5))
    service, events = serving.Service(engine, 2, 50, 8, 0), ([], [])
    for n, prompt in enumerate(([1, 2, 3], [4])):
        service.submit(serving.Request(prompt, [n], 30, Sampling(top_k=5)), events[n].append)
    assert service.drain(60)
    service.close()
    texts = [[event.told.token for event in its if isinstance(event, serving.Token)] for its in events]
    assert texts == wanted


def test_what_is_sent_arrives():
    batch = [torch.arange(1000), torch.randn(10, 10)]
    for sent, arrived in zip(batch, machine.send(batch, PLACE), strict=True):
        assert arrived.device.type == PLACE.type and torch.equal(arrived.cpu(), sent)
