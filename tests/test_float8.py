"""FP8: its products and gradients beside float32's, within what 8 bits allow. CPUs compute them too, slowly."""

import copy
import statistics

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, assert_user_error, load
from test_faults import assert_close_run, finish, torchrun
from torch.nn import functional as F

from model import GPT, GPTConfig
from quartz import float8, kernels, lora, machine, optim
from quartz.errors import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HALF_STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # the most by which rounding changes a number, relative to it
LEAST = {E4M3: 2.0**-10, E5M2: 2.0**-17}  # half of the smallest number that there is: by which it changes the others
WIDE = {**TINY, "n_embd": 128, "n_layer": 1, "dtype": "bfloat16", "fp8": True, "batch_size": 4}


@pytest.fixture
def with_fp8(monkeypatch):
    """Has this machine pass for one that has it."""
    monkeypatch.setattr(machine, "has_fp8", lambda place: True)


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def linear(inputs: int = 256, outputs: int = 128, bias: bool = True, size: float = 0.05) -> float8.Float8Linear:
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data = numbers(outputs, inputs, seed=1, size=size)
    layer.__class__ = float8.Float8Linear
    return layer.train()


def rounding(a: torch.Tensor, b: torch.Tensor, kind_a: torch.dtype, kind_b: torch.dtype) -> torch.Tensor:
    """The most by which a @ b may be off, element by element: each factor by its rounding, the sum by bfloat16's."""
    whole, off = [], []
    for x, kind in ((a, kind_a), (b, kind_b)):
        whole.append(x.abs())
        off.append(x.abs() * HALF_STEP[kind] * 1.001 + LEAST[kind] * x.abs().max() / torch.finfo(kind).max)
    bound = whole[0] @ off[1] + off[0] @ whole[1] + off[0] @ off[1]
    return bound + 2.0**-8 * ((a @ b).abs() + bound)


def off(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    ours, wanted = ours.double(), wanted.double()
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e9])
def test_a_product_and_its_gradients_are_as_near_as_8_bits_allow(size):
    layer, x, grad = (
        linear(bias=False),
        numbers(64, 256, size=size).requires_grad_(),
        numbers(64, 128, seed=2, size=size),
    )
    y = layer(x)
    y.backward(grad)
    weight, x_ = layer.weight.detach(), x.detach()
    cases = [
        (y.detach(), x_, weight.T, (E4M3, E4M3)),
        (x.grad, grad, weight, (E5M2, E4M3)),
        (layer.weight.grad, grad.T, x_, (E5M2, E4M3)),
    ]
    for ours, a, b, kinds in cases:
        wanted = a @ b
        assert ((ours.float() - wanted).abs() <= rounding(a, b, *kinds)).all()
        assert 0.005 < off(ours, wanted) < (0.05 if E5M2 not in kinds else 0.1), "8 bits were used, and no fewer"


def test_sums_of_gradients_have_no_drift():
    """Rounding has no preferred direction: the mean of many products' errors is far below one's."""
    layer, errors = linear(bias=False), []
    for seed in range(32):
        x, grad = numbers(64, 256, seed=3 + seed), numbers(64, 128, seed=100 + seed)
        layer.weight.grad = None
        layer(x).backward(grad)
        errors.append(layer.weight.grad - grad.T @ x)
    one = statistics.mean(error.norm().item() for error in errors)
    assert (sum(errors) / len(errors)).norm() < 2 * one / len(errors) ** 0.5


def test_the_largest_magnitude_becomes_the_largest_number():
    for kind in (E4M3, E5M2):
        small, scale = float8.scaled(torch.tensor([[3.0, -1e-3, 0.5, -7.0]]), kind)
        assert small.float().abs().max() == torch.finfo(kind).max and small.float().isfinite().all()
        assert (small.float() * scale)[0, 3] == -7.0


def test_zeros_stay_zeros():
    layer = linear()
    x = torch.zeros(32, 256, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.bias.to(y.dtype).expand(32, -1))
    y.backward(torch.zeros_like(y))
    assert not x.grad.any() and not layer.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    layer, x = linear(), numbers(32, 256)
    x[3, 5] = bad
    assert not layer(x).isfinite().any()
    y = layer(numbers(32, 256))
    grad = torch.ones_like(y)
    grad[1, 1] = bad
    y.backward(grad)
    assert not layer.weight.grad.isfinite().any(), "so that the update is left out"


def test_shapes_and_dtypes_are_those_of_a_linear_layer():
    layer, x = linear(), numbers(2, 16, 256).bfloat16().requires_grad_()
    y = layer(x)
    assert y.shape == (2, 16, 128) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    plain = F.linear(numbers(3, 256), layer.weight, layer.bias)
    assert torch.equal(layer(numbers(3, 256)), plain), "rows that are no multiple of 16 are multiplied as ever"
    assert torch.equal(layer.eval()(numbers(16, 256)), F.linear(numbers(16, 256), layer.weight, layer.bias))


def test_the_public_product_is_the_same(monkeypatch):
    arguments = [numbers(32, 64).to(E5M2), numbers(48, 64, seed=1).to(E4M3), torch.tensor([0.5]), torch.tensor([3.0])]
    found = float8.multiply(*arguments, fast=False)
    monkeypatch.delattr(torch, "_scaled_mm")
    try:
        other = float8.multiply(*arguments, fast=False)
    except (AttributeError, NotImplementedError):
        pytest.skip("this system has no F.scaled_mm: torch is older")
    assert torch.equal(other, found)


def model(n_layer: int = 2, **more) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 32, "vocab_size": 128, "n_head": 4, "n_embd": 128, "bias": False}
    return GPT(GPTConfig(**{**shape, **more}, n_layer=n_layer))


def test_layers_of_the_blocks_alone_are_replaced_and_keep_their_weights():
    its = model(arch="qwen3", n_kv_head=1)
    before = {name: id(p) for name, p in its.named_parameters()}
    keys = [*its.state_dict()]
    float8.install(its, True)
    changed = [name for name, module in its.named_modules() if type(module) is float8.Float8Linear]
    assert len(changed) == 8 and all(name.startswith("transformer.h.") for name in changed)
    assert {name: id(p) for name, p in its.named_parameters()} == before and [*its.state_dict()] == keys
    its = model(n_embd=96, n_head=4)
    float8.install(its, False)
    assert not any(isinstance(module, float8.Float8Linear) for module in its.modules())


@pytest.mark.parametrize("shape", [{"n_embd": 64}, {"n_embd": 136}], ids=str)
def test_a_model_of_other_sizes_is_refused(shape):
    with pytest.raises(UserError, match="128 and more, in multiples of 16"):
        float8.install(model(**shape), True)


def test_adapters_are_refused():
    its = model()
    lora.attach(its, 2, 4.0)
    with pytest.raises(UserError, match="adapters"):
        float8.install(its, True)


def test_evaluation_is_as_without():
    ours, theirs = model(), model()
    float8.install(ours, True)
    idx = torch.arange(32)[None]
    for its in (ours, theirs):
        its.eval()
    with torch.no_grad():
        assert torch.equal(ours(idx)[0], theirs(idx)[0])


def gradient(its: GPT) -> torch.Tensor:
    idx = torch.arange(128).view(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = its(idx, idx.roll(-1, 1), return_logits=False)[1]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in its.parameters()])


@pytest.mark.slow
def test_it_can_be_compiled():
    """In one piece each block; what is fused is rounded otherwise, as between any two ways to compute in 8 bits."""
    torch.compiler.reset()  # what was compiled before, of other sizes, would have these be taken for dynamic ones
    plain = model(1)
    float8.install(plain, True)
    compiled = copy.deepcopy(plain)
    for block in compiled.transformer.h:
        block.compile(fullgraph=True)
    wanted = gradient(plain)
    assert off(gradient(compiled), wanted) < 0.1
    again = copy.deepcopy(plain)
    again.zero_grad()
    again.activation_checkpointing = True
    assert torch.equal(gradient(again), wanted)


def test_a_machine_without_it_is_one_line(tiny, train):
    assert_user_error(train(**WIDE), "fp8=True", "capability 8.9")


def test_it_goes_with_bfloat16(tiny, train, with_fp8):
    assert_user_error(train(**{**WIDE, "dtype": "float32"}), "fp8=True", "bfloat16")


def test_a_small_model_is_one_line(tiny, train, with_fp8):
    assert_user_error(train(**{**WIDE, "n_embd": 32}), "fp8=True", "multiples of 16")
    assert not (tiny / "out" / "log.jsonl").exists()


def test_a_run_cut_and_resumed_ends_in_the_same_bits(tiny, train, with_fp8):
    for optimizer in ("adamw", "muon"):
        settings = {**WIDE, "optimizer": optimizer}
        assert train(**settings, out_dir=f"{optimizer}-whole").code == 0
        assert train(**{**settings, "max_iters": 5}, out_dir=optimizer).code == 0
        result = train(**settings, out_dir=optimizer, init_from="resume")
        assert result.code == 0, result.err
        assert_same_run(tiny / optimizer, tiny / f"{optimizer}-whole")
    assert train(**{**WIDE, "fp8": False}, out_dir="without").code == 0
    fp8, without = (load(tiny / name / "last.pt")["model"] for name in ("adamw", "without"))
    assert fp8.keys() == without.keys()
    assert not torch.equal(fp8["transformer.h.0.mlp.c_fc.weight"], without["transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"fsdp": True}], ids=str)
def test_several_processes_do_what_one_does(tiny, train, with_fp8, more):
    """Each scales its own tensors, so that they agree as far as 8 bits do."""
    script = tiny / "train_fp8.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom quartz import machine\n"
        f"machine.has_fp8 = lambda place: True\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    settings = {**WIDE, "dropout": 0.0, "learning_rate": 1e-3, "max_iters": 10}
    code, _, err = finish(torchrun(tiny, {**settings, **more, "out_dir": "several"}, script=script))
    assert code == 0, err
    assert train(**settings, out_dir="one").code == 0
    assert_close_run(tiny / "one", tiny / "several", tolerance=5e-3)


@pytest.mark.slow
def test_six_layers_learn_as_in_bfloat16():
    """The loss after 200 updates is within 1% of bfloat16's."""
    text = (ROOT / "model.py").read_bytes() + (ROOT / "train.py").read_bytes()
    tokens = torch.tensor([byte % 128 for byte in text])
    found = {}
    for wanted in (False, True):
        its = model(6)
        kernels.install(its)
        float8.install(its, wanted)
        updater, curve = optim.adamw_of(its, 0.1, 1e-3, (0.9, 0.95), "cpu"), []
        for n in range(200):
            starts = torch.randint(len(tokens) - 33, (16,), generator=torch.Generator().manual_seed(n))
            batch = torch.stack([tokens[start : start + 33] for start in starts])
            with torch.autocast("cpu", torch.bfloat16):
                loss = its(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), return_logits=False)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(its.parameters(), 1.0)
            updater.step()
            updater.zero_grad()
            curve.append(loss.item())
        found[wanted] = statistics.mean(curve[-20:])
        assert found[wanted] < 0.7 * curve[0], "it has learned something to be compared"
    assert found[True] == pytest.approx(found[False], rel=0.01) and found[True] != found[False]
