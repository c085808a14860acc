"""What stands in for model.py's plain ways on CPUs computes the same."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, GPTConfig, rms_norm
from quartz import kernels, lora, optim
from quartz.kernels import AttentionInC, FastDropout, RMSNormInTraining

pytestmark = pytest.mark.alone  # with as many threads as a run has


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 4, 6)], ids=str)
def test_the_norms_own_backward_pass_is_autograds(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(shape[2:], generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(RMSNormInTraining.apply, (x.requires_grad_(), weight.requires_grad_(), 1e-6))
    plain = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight).float()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), plain)
    torch.testing.assert_close(RMSNormInTraining.apply(x.float(), weight.float(), 1e-6), plain)


@pytest.fixture
def threads():
    """Sets their number, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


needs_c = pytest.mark.skipif(kernels.in_c() is None, reason="no C compiler")


def attention_and_gradients(q, k, v, grad, dropout=0.0, seed=0) -> list[torch.Tensor]:
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    y = AttentionInC.apply(*inputs, dropout, seed)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@needs_c
@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize("T, D", [(1, 16), (7, 32), (32, 48), (33, 64), (100, 16), (256, 128)])
def test_attention_in_c_is_attention(threads, T, D, n_kv):
    """Values and gradients are PyTorch's in float32, to bfloat16's rounding; the same bits whatever the threads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, T, D) for heads in (4, n_kv, n_kv, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator).mul(2).bfloat16() for shape in shapes)
    found = []
    for count in (1, 3):
        threads(count)
        found.append(attention_and_gradients(q, k, v, grad))
    assert all(map(torch.equal, *found))
    inputs = [t.float().requires_grad_() for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    wanted = [y.detach(), *torch.autograd.grad(y, inputs, grad.float())]
    for ours, theirs in zip(found[0], wanted, strict=True):
        assert (ours.float() - theirs).norm() <= 0.01 * theirs.norm() + 1e-4
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.02 * theirs.abs().max().item() + 1e-5)


@needs_c
def test_no_token_attends_to_what_comes_after_it():
    q, k, v = (torch.randn(1, 2, 70, 32).bfloat16() for _ in range(3))
    before = AttentionInC.apply(q, k, v, 0.0, 0)
    for t in (k, v):
        t[:, :, 41:] = 1e4
    after = AttentionInC.apply(q, k, v, 0.0, 0)
    assert torch.equal(after[:, :, :41], before[:, :, :41]) and not torch.equal(after[:, :, 41], before[:, :, 41])


@needs_c
def test_attention_in_c_hides_no_nan():
    """A query or a value that is no number is seen in what reads it, and in no other head."""
    for which in range(3):
        tensors = [torch.randn(2, 2, 70, 32).bfloat16() for _ in range(3)]
        tensors[which][0, 1, 41, 3] = math.nan
        y, *grads = attention_and_gradients(*tensors, torch.ones(2, 2, 70, 32).bfloat16())
        assert y[0, 1, 41].isnan().all() if which < 2 else y[0, 1, 41, 3].isnan()
        assert all(t[0, 1].isnan().any() for t in grads[:2])
        assert not any(t.isnan()[0, 0].any() or t.isnan()[1].any() for t in (y, *grads))


@needs_c
def test_attentions_dropout_has_the_gradients_of_what_it_computes():
    """With values that are unit vectors its output is its weights, and so shows the mask; PyTorch gives the rest."""
    T, p = 64, 0.25
    generator = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(2, 3, T, T, generator=generator).bfloat16() for _ in range(3))
    v = torch.eye(T).expand(2, 3, T, T).bfloat16()
    plain, dropped = (AttentionInC.apply(q, k, v, dropout, 5).float() for dropout in (0.0, p))
    causal = torch.ones(T, T).tril() == 1
    mask = (dropped != 0) & causal
    kept = mask.sum() / (causal.sum() * 6)
    assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / (causal.sum() * 6)) + 0.01  # a weight may round to 0
    assert all(0.5 < (a == b).float().mean() < 0.8 for a, b in zip(mask[0][:, causal], mask[1][:, causal], strict=True))
    torch.testing.assert_close(dropped[mask], plain[mask] / (1 - p), rtol=0.02, atol=1e-3)
    v = torch.randn(2, 3, T, T, generator=generator).bfloat16()
    ours = attention_and_gradients(q, k, v, grad, p, 5)
    inputs = [t.float().requires_grad_() for t in (q, k, v)]
    scores = (inputs[0] @ inputs[1].mT * T**-0.5).masked_fill(~causal, -math.inf)
    y = (scores.softmax(-1) * mask / (1 - p)) @ inputs[2]
    for found, wanted in zip(ours, [y, *torch.autograd.grad(y, inputs, grad.float())], strict=True):
        assert (found.float() - wanted).norm() < 0.01 * wanted.norm()
    assert not torch.equal(ours[0], attention_and_gradients(q, k, v, grad, p, 6)[0])
    assert all(map(torch.equal, ours, attention_and_gradients(q, k, v, grad, p, 5)))


def loss_and_gradients(gpt: GPT, idx: torch.Tensor, autocast: bool, only=lambda p: True) -> list[torch.Tensor]:
    gpt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = gpt(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in gpt.parameters() if only(p))]


ARCHITECTURES = {
    "gpt2": {"bias": True},
    "qwen3": {"bias": False, "arch": "qwen3", "n_kv_head": 2, "tie_embeddings": False},
    "llama": {"bias": False, "arch": "llama"},
}


@pytest.fixture(params=["C", "torch"])
def passes(request, monkeypatch):
    """Whether there is a C compiler."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "in_c", lambda: None)
    elif kernels.in_c() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.fixture
def blocks(monkeypatch):
    """Sets whether blocks are computed in C, on processors too where that does not pay."""
    if kernels.in_c() is None:
        pytest.skip("no C compiler")
    return lambda wanted: monkeypatch.setattr(kernels, "block_pays", lambda: wanted)


def shaken(config: GPTConfig, by: float = 0.05) -> GPT:
    """A network of which nothing is zero, or at one, or what it does would not show."""
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * by)
    return gpt


def distances(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / (b.norm() + 1e-6)).item() for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture
def memory(monkeypatch):
    """Sees to it that C writes nothing behind the memory that it is given."""
    behind = []

    def floats(*shape):
        n = math.prod(shape)
        whole = torch.full((n + 4096,), 7.0)
        behind.append(whole[n:])
        return whole[:n].view(shape)

    monkeypatch.setattr(kernels, "floats", floats)
    yield monkeypatch
    assert behind and all((its == 7).all() for its in behind)


@pytest.mark.parametrize(
    "shape",
    [(4, 64, 4, 64), (9, 64, 2, 32), (13, 128, 1, 16), (3, 37, 4, 64), (1, 1, 2, 96), (5, 65, 6, 192), (1, 300, 1, 16)],
    ids=str,
)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gpt2 without biases"])
def test_a_block_in_c_is_what_model_py_says(arch, shape, threads, blocks, memory):
    """If this fails after a change of model.py's Block, or of a part of it, change quartz/block.c with it.

    Loss and every gradient are as near to float32's as those of the modules in bfloat16 are, in evaluation too; a
    block has the same bits whatever the threads (two share sequences otherwise than three), alone and with the others.
    """
    B, T, n_head, width = shape
    settings = ARCHITECTURES.get(arch, {"bias": False})
    settings = settings | ({"n_kv_head": max(1, n_head // 2)} if arch == "qwen3" else {})
    plain = shaken(GPTConfig(T, 65, 2, n_head, width, **settings))
    fast, idx, found = copy.deepcopy(plain), torch.randint(65, (B, T + 1)), []
    kernels.install(fast)
    blocks(True)
    block, x = fast.transformer.h[0], torch.randn(B, T, width, requires_grad=True)
    rope = fast.embed(idx[:, :-1], torch.arange(T))[1]
    for count in (1, 2, 3):
        threads(count)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x, rope)
        along = y.transpose(1, 2).contiguous() if count == 1 else y  # so gradients come laid out otherwise
        found.append([y, *torch.autograd.grad((along * along).sum(), [x, *block.parameters()])])
    assert all(torch.equal(*its) for others in found[1:] for its in zip(found[0], others, strict=True))
    memory.setattr(kernels.FastGPT, "as_network", lambda *its: None)
    for count in (1, 2, 3):
        threads(count)
        memory.setattr(kernels, "SMALL", 0)
        alone = loss_and_gradients(fast, idx, autocast=True)
        memory.setattr(kernels, "SMALL", 2**40)
        found = loss_and_gradients(fast, idx, autocast=True)
        assert all(map(torch.equal, alone, found)), count
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert abs(fast.eval()(idx[:, :-1], idx[:, 1:])[1] - found[0]) < 1e-5
    blocks(False)
    modules = loss_and_gradients(fast.train(), idx, autocast=True)
    assert not all(map(torch.equal, modules, found)), "the blocks have to have been computed in C"
    exact = loss_and_gradients(plain, idx, autocast=False)
    for name, ours, theirs in zip(
        ["loss", *dict(plain.named_parameters())], distances(found, exact), distances(modules, exact), strict=True
    ):
        assert ours < 2 * theirs + 5e-3, name


@pytest.mark.parametrize("shape", [(12, 64, 2, 32), (9, 128, 1, 32), (3, 37, 4, 64), (1, 1, 2, 32)], ids=str)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gpt2 without biases", "weighted"])
def test_a_network_in_c_is_what_model_py_says(arch, shape, threads, blocks, memory):
    """If this fails after a change of model.py's GPT.forward, or of what it calls, change quartz/network.c with it."""
    B, T, n_head, width = shape
    settings = ARCHITECTURES.get(arch, {"bias": False})
    settings = settings | ({"n_kv_head": max(1, n_head // 2)} if arch == "qwen3" else {})
    plain = shaken(GPTConfig(T + 5, 65, 2, n_head, width, **settings))
    idx, targets = torch.randint(65, (2, B, T))
    targets[torch.rand(B, T) < 0.3] = -1
    targets[0, 0] = 64
    given = {"weights": torch.rand(B, T) - 0.3, "divisor": torch.tensor(7.5)} if arch == "weighted" else {}

    def computed(gpt: GPT, autocast: bool) -> list[torch.Tensor]:
        gpt.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = gpt(idx, targets, return_logits=False, **given)[1]
            with torch.no_grad():
                evaluated = gpt.eval()(idx, targets, return_logits=False, **given)[1]
        (3 * loss).backward()
        return [loss.detach(), evaluated, *(p.grad.clone() for p in gpt.parameters())]

    fast, found = copy.deepcopy(plain), []
    kernels.install(fast)
    blocks(True)
    for count in (1, 2, 3):
        threads(count)
        found.append(computed(fast, autocast=True))
        assert found[-1][0].dtype == torch.float32 and all(map(torch.equal, found[0], found[-1])), count
    assert torch.equal(*found[0][:2])
    blocks(False)
    modules, exact = computed(fast, autocast=True), computed(plain, autocast=False)
    assert not torch.equal(modules[0], found[0][0]), "the network has to have been computed in C"
    for name, ours, theirs in zip(
        ["loss", "evaluated", *dict(plain.named_parameters())],
        distances(found[0], exact),
        distances(modules, exact),
        strict=True,
    ):
        assert ours < 2 * theirs + 5e-3, name


def test_a_network_in_c_drops_what_it_drops_in_parts(blocks, monkeypatch):
    blocks(True)
    gpt, idx, found = shaken(GPTConfig(64, 65, 2, 4, 64, dropout=0.3, bias=False), 0.1), torch.randint(65, (9, 65)), []
    kernels.install(gpt)
    for _ in ("the network", "embeddings, blocks and head"):
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(loss_and_gradients(gpt, idx, autocast=True))
        monkeypatch.setattr(kernels.FastGPT, "as_network", lambda *its: None)
    assert max(distances(found[0], found[2])) < 0.02 and max(distances(found[1], found[3])) < 0.02
    assert distances(found[0], found[1])[1] > 0.3, "another seed drops others"


def as_attribute(part: nn.Module, name: str, value: torch.Tensor) -> None:
    delattr(part, name)
    setattr(part, name, value)


def divided(gpt: GPT, given: tuple, named: dict):
    return given, named | {"divisor": torch.tensor([7.0])}


NOT_MODEL_PYS = {
    "a hook": lambda gpt: gpt.lm_head.register_forward_hook(lambda part, given, logits: logits * 0.5),
    "a method": lambda gpt: setattr(gpt.transformer.ln_f, "forward", lambda x: x * 0.5),
    "an embedding of its own": lambda gpt: setattr(gpt, "embed", lambda idx, at: (gpt.transformer.wte(idx) * 2, None)),
    "another norm": lambda gpt: setattr(gpt.transformer, "ln_f", OtherNorm(64)),
    "no dropout": lambda gpt: setattr(gpt.transformer, "drop", nn.Identity()),
    "a head with a bias": lambda gpt: setattr(gpt, "lm_head", nn.Linear(64, 65)),
    "a frozen head": lambda gpt: gpt.lm_head.weight.requires_grad_(False),
    "a bias that is no parameter": lambda gpt: as_attribute(gpt.transformer.h[0].mlp.c_fc, "bias", torch.ones(256)),
    "a weight that is no parameter": lambda gpt: as_attribute(
        gpt.transformer.h[1].attn.c_proj, "weight", torch.eye(64)
    ),
    "no block": lambda gpt: setattr(gpt.transformer, "h", nn.ModuleList()),
    "a divisor of its own": lambda gpt: gpt.register_forward_pre_hook(divided, with_kwargs=True),
    "a large vocabulary": lambda gpt: setattr(gpt.transformer, "wte", nn.Embedding(300, 64)),
}


@pytest.mark.parametrize("what", NOT_MODEL_PYS)
def test_what_is_replaced_in_a_network_computes(what, blocks, monkeypatch):
    blocks(True)
    gpt, idx = shaken(GPTConfig(32, 65, 2, 4, 64, bias=False), 0.1), torch.randint(65, (9, 33))
    kernels.install(gpt)
    usual = loss_and_gradients(gpt, idx, autocast=True)
    NOT_MODEL_PYS[what](gpt)
    found = loss_and_gradients(gpt, idx, autocast=True, only=lambda p: p.grad is not None)
    monkeypatch.setattr(kernels.FastGPT, "as_network", lambda *its: None)
    assert all(map(torch.equal, found, loss_and_gradients(gpt, idx, autocast=True, only=lambda p: p.grad is not None)))
    assert not torch.equal(found[0], usual[0])


def test_a_network_in_c_refuses_what_modules_refuse(blocks):
    blocks(True)
    gpt, idx = shaken(GPTConfig(32, 65, 2, 4, 64, bias=False)), torch.randint(65, (2, 33))
    kernels.install(gpt)
    for place, token in (((0, 3), 65), ((1, 5), -1), ((1, 32), 70)):
        strange = idx.clone()
        strange[place] = token
        with pytest.raises(IndexError):
            loss_and_gradients(gpt, strange, autocast=True)
    with pytest.raises(ValueError, match="do not fit"):
        loss_and_gradients(gpt, torch.randint(65, (2, 34)), autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        none = gpt(idx[:, 1:], torch.full((2, 32), -1), return_logits=False)[1]
        assert none.isnan() and gpt(idx[:, 1:], torch.full((2, 32), -1), divisor=3, return_logits=False)[1] == 0
        own = idx[:, 1:].contiguous()
        loss = gpt(own, own, return_logits=False)[1]
    none.backward()
    assert all((p.grad == 0).all() for p in gpt.parameters())
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, gpt.lm_head.weight, create_graph=True)
    own += 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_network_in_c_trains_after_inference_mode(blocks):
    """Which leaves its table of rotations marked."""
    blocks(True)
    gpt, idx = shaken(GPTConfig(32, 65, 2, 4, 64, bias=False, arch="qwen3")), torch.randint(65, (9, 33))
    kernels.install(gpt)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        gpt.eval()(idx[:, 1:], idx[:, 1:], return_logits=False)
    assert loss_and_gradients(gpt.train(), idx, autocast=True)[0].isfinite()


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_block_in_c_drops_what_its_modules_drop(arch, blocks):
    """With the same numbers from PyTorch's generator; and the gradients are those of what it computes."""
    fast, found = shaken(GPTConfig(64, 65, 1, 4, 64, dropout=0.3, **ARCHITECTURES[arch]), 0.1), []
    kernels.install(fast)
    x = torch.randn(2, 64, 64).requires_grad_()
    rope = None if arch == "gpt2" else fast.embed(torch.zeros(2, 64, dtype=torch.int64), torch.arange(64))[1]
    for wanted in (True, False):
        blocks(wanted)
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16):
                y = fast.transformer.h[0](x, rope)
            found.append([y - x, *torch.autograd.grad((y * y).sum(), [x, *fast.transformer.h[0].parameters()])])
    assert max(distances(found[0], found[2])) < 0.05 and max(distances(found[1], found[3])) < 0.05
    assert distances(found[0], found[1])[0] > 0.3, "another seed drops others"


def test_where_a_part_is_looked_at_or_replaced_blocks_leave_it_in_place(blocks):
    """Hooks are called, and other layers than C knows compute."""
    blocks(True)
    gpt, idx, seen = shaken(GPTConfig(32, 65, 2, 4, 64, bias=False)), torch.randint(65, (2, 33)), []
    kernels.install(gpt)
    for part in (gpt.transformer.h[0].mlp, gpt.transformer.h[1]):
        hook = part.register_forward_hook(lambda *its: seen.append(its[2].shape))
        loss_and_gradients(gpt, idx, autocast=True)
        hook.remove()
    assert seen == [(2, 32, 64)] * 2
    lora.attach(gpt, 2, 4.0)
    gradients = loss_and_gradients(gpt, idx, autocast=True, only=lambda p: p.requires_grad)
    assert len(gradients) == 1 + 2 * 4 * 2 and all(g.isfinite().all() for g in gradients)


class OtherNorm(nn.LayerNorm):
    pass


REPLACED = {
    "another norm": lambda b: setattr(b, "ln_1", OtherNorm(64)),
    "another eps": lambda b: setattr(b.ln_2, "eps", 0.5),
    "another eps of keys": lambda b: setattr(b.attn.k_norm, "eps", 0.5),
    "a method": lambda b: setattr(b.mlp, "activate", lambda x: x[..., :192] * 0.5),
    "a part's forward": lambda b: setattr(b.attn.c_proj, "forward", lambda x: x * 0.5),
    "another dropout": lambda b: setattr(b.attn.resid_dropout, "p", 0.5),
    "no dropout": lambda b: setattr(b.mlp, "dropout", nn.Identity()),
    "a part in evaluation": lambda b: b.mlp.dropout.eval(),
    "another MLP": lambda b: setattr(b, "mlp", nn.Linear(64, 64)),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_in_a_block_computes(what, blocks):
    """C knows nothing but what model.py makes: with anything else, modules compute."""
    config = GPTConfig(32, 65, 1, 4, 64, bias=False, arch="qwen3", dropout=0.1)
    x, results = torch.randn(2, 32, 64), []
    for wanted in (True, False):
        blocks(wanted)
        gpt = shaken(config, 0.1)
        kernels.install(gpt)
        block, rope = gpt.transformer.h[0], gpt.embed(torch.zeros(2, 32, dtype=torch.int64), torch.arange(32))[1]
        REPLACED[what](block)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(block(x, rope))
    assert torch.equal(*results)


def test_what_does_not_fit_a_block_is_refused_as_its_modules_refuse_it(blocks):
    """Widths, tables and weights of other shapes reach no code that would read beyond them."""
    blocks(True)
    gpt = shaken(GPTConfig(32, 65, 1, 4, 64, bias=False, arch="qwen3"))
    kernels.install(gpt)
    block, rope = gpt.transformer.h[0], gpt.embed(torch.zeros(2, 32, dtype=torch.int64), torch.arange(32))[1]
    with torch.autocast("cpu", torch.bfloat16):
        whole = block(torch.ones(2, 32, 64), rope)
        for x, tables in (
            (torch.ones(2, 32, 2048), rope),
            (torch.ones(32, 64), rope),
            (torch.ones(2, 32, 64), [table[:5] for table in rope]),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                block(x, tables)
        assert torch.equal(block(torch.ones(2, 32, 64), [table[None] for table in rope]), whole)  # as transformers' are
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(block(torch.ones(2, 32, 64, dtype=torch.float32), rope), whole)
        finally:
            torch.set_default_dtype(torch.float32)
        block.mlp.c_fc.weight = nn.Parameter(torch.randn(16, 64))
        with pytest.raises(RuntimeError):
            block(torch.ones(2, 32, 64), rope)
        block.to("meta")
        with pytest.raises(RuntimeError):
            block(torch.ones(2, 32, 64), rope)


def test_a_second_derivative_is_refused(blocks):
    blocks(True)
    gpt = shaken(GPTConfig(32, 65, 1, 4, 64, bias=False))
    kernels.install(gpt)
    x = torch.randn(1, 32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = gpt.transformer.h[0](x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|differentiate twice"):
        grad.sum().backward()


def test_clipping_is_torchs(threads):
    """The norm, and the gradients after it; also of a few, of one that is no number, and with no limit."""
    torch.manual_seed(0)
    shapes = [(3, 5), (128, 512), (1,), (2**14,), (2**14 + 1,), (7, 3, 2)]
    for limit in (1.0, math.inf, 1e9):
        ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
        for a, b in list(zip(ours, theirs, strict=True))[:-1]:  # the last has none
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        threads(3)
        norm = kernels.clip_grad_norm(iter(ours), limit)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
        for a, b in list(zip(ours, theirs, strict=True))[:-1]:
            torch.testing.assert_close(a.grad, b.grad)
        threads(1)
        assert limit == 1.0 or torch.equal(norm, kernels.clip_grad_norm(ours, limit)), "the same bits"
    ours[1].grad[5, 7] = math.nan
    assert kernels.clip_grad_norm(ours, 1.0).isnan()
    assert kernels.clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.parametrize("shape", [(64, 4, 4), (60, 6, 2), (40, 1, 1)], ids=str)
def test_passes_in_c_give_the_gradients_of_what_model_py_says(shape, threads):
    """Norms, SwiGLU and heads in float32, of widths that are no multiple of a vector's, by one thread as by three: the
    same bits."""
    if kernels.in_c() is None:
        pytest.skip("no C compiler")
    width, n_head, n_kv = shape
    for arch in ("qwen3", "llama"):
        torch.manual_seed(0)
        config = GPTConfig(37, 65, 1, n_head, width, bias=False, arch=arch, n_kv_head=n_kv, n_hidden=3 * width // 2 + 1)
        plain = GPT(config)
        with torch.no_grad():
            for p in plain.parameters():
                p.add_(torch.randn_like(p) * 0.3)
        fast, idx, found = copy.deepcopy(plain), torch.randint(65, (3, 38)), []
        kernels.install(fast)
        for count in (1, 3):
            threads(count)
            found.append(loss_and_gradients(fast, idx, autocast=False))
        inside = fast.transformer.h[0]
        x = torch.randn(3, 37, width, requires_grad=True)
        results = []
        for count in (1, 3, 7):
            threads(count)
            y = inside.ln_1(x)
            qkv = torch.randn(3, 37, n_head + 2 * n_kv, width // n_head, generator=torch.Generator().manual_seed(1))
            rope = fast.embed(idx[:, :37], torch.arange(37))[1]
            q, k, v = inside.attn.heads(qkv.requires_grad_(), rope)
            total = y.square().sum() + q.square().sum() + (k * 2).sin().sum() + v.cos().sum()
            results.append([y, q, k, v, *torch.autograd.grad(total, [x, qkv, inside.ln_1.weight])])
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
        for ours, theirs in zip(found[0], loss_and_gradients(plain, idx, autocast=False), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_is_no_number_stays_none():
    """NaN and infinities through bfloat16."""
    if kernels.in_c() is None:
        pytest.skip("no C compiler")
    x = torch.tensor([[math.nan, 1.0, math.inf, 2.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    found = kernels.SwiGLUInPasses.apply(x)
    gate, up = x.float().chunk(2, -1)
    assert torch.equal(found.isnan(), (F.silu(gate) * up).isnan()) and found[0, 2] == math.inf
    numbers = torch.randn(4096).mul(torch.logspace(-30, 30, 4096))[None]
    ones = torch.full_like(numbers, 100.0)  # silu(100) is 100
    both = torch.cat([ones, numbers / 100], -1).bfloat16()
    wanted = (both[:, :4096].float() * both[:, 4096:].float()).bfloat16()
    assert torch.equal(kernels.SwiGLUInPasses.apply(both), wanted)  # rounded as PyTorch rounds


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_faster_ways_agree_with_what_model_py_says(arch, passes):
    """If this fails after a change of attention, norm or dropout in model.py, change quartz/kernels.py with it.

    Loss and gradients of the whole network: in float32 to its rounding; in bfloat16, whose products are rounded at
    other places, by their direction. Without gradients there is one way only.
    """
    torch.manual_seed(0)
    plain = GPT(GPTConfig(64, 65, 2, 4, 64, **ARCHITECTURES[arch]))
    with torch.no_grad():
        for p in plain.parameters():  # none may be zero, or at one, or what it does would not show
            p.add_(torch.randn_like(p) * 0.05)
    fast = copy.deepcopy(plain)
    kernels.install(fast)
    assert {type(module) for module in fast.modules()} & set(kernels.FASTER.values())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    idx = torch.randint(65, (4, 65))
    for ours, theirs in zip(*(loss_and_gradients(gpt, idx, autocast=False) for gpt in (fast, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    ours, theirs = (loss_and_gradients(gpt, idx, autocast=True) for gpt in (fast, plain))
    assert abs(ours[0] - theirs[0]) < 2e-3
    flat = [torch.cat([gradient.flatten() for gradient in found[1:]]) for found in (ours, theirs)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.999
    assert torch.equal(
        fast.eval().generate(idx[:, :9], 20, temperature=0), plain.eval().generate(idx[:, :9], 20, temperature=0)
    )


def test_training_on_a_cpu_in_bfloat16_attends_as_float32_does():
    """The whole network, to bfloat16's rounding: loss and gradients."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 65, 2, 4, 64, bias=False))
    idx, targets = torch.randint(65, (2, 4, 64))
    losses, norms = [], []
    for enabled in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = gpt(idx, targets, return_logits=False)[1]
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    assert abs(losses[0] - losses[1]) < 2e-3
    assert F.cosine_similarity(*norms, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_keeps_the_share_it_should_and_the_mean(p, dtype, threads):
    drop, x, found = FastDropout(p), torch.ones(1001, 333, dtype=dtype, requires_grad=True), []
    for count in (1, 3):
        threads(count)
        torch.manual_seed(0)
        y = drop(x)
        found += y.detach(), torch.autograd.grad(y.sum(), x)[0]
    assert all(torch.equal(found[0], other) for other in found[1:]), "what is dropped gets no gradient"
    share = (found[0] == 0).double().mean().item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / x.numel()) + 2**-16
    assert found[0].unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=0.01)]
    assert torch.equal(drop.eval()(x), x)
    again = drop.train()(torch.ones(64, 64))
    assert not torch.equal(again, drop(torch.ones(64, 64))), "each call draws anew"
    rows = (found[0] != 0).double().mean(1)  # one row of numbers is like another, and they are no neighbours' copies
    assert rows.std() < 2 * math.sqrt(p * (1 - p) / 333)
    pairs = torch.stack([found[0].flatten()[:-1] != 0, found[0].flatten()[1:] != 0]).double()
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.01


@needs_c
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_what_a_checkpoint_recomputes_draws_the_same_dropout(arch):
    """Also where its first pass is without gradients, as reentrant checkpoints' is."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 65, 1, 4, 64, dropout=0.3, **ARCHITECTURES[arch])).train()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    kernels.install(gpt)
    block, found = gpt.transformer.h[0], []
    x, rope = (
        (torch.randn(2, 64, 64), None) if arch == "gpt2" else gpt.embed(torch.randint(65, (2, 64)), torch.arange(64))
    )
    x = x.detach().requires_grad_()
    for compute in (lambda: block(x, rope), lambda: checkpoint(block, x, rope, use_reentrant=True)):
        gpt.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            y = compute()
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
    for ours, again in zip(*found, strict=True):
        assert (ours - again).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("shape", [(4, 192, 192), (3, 64, 208), (5, 16, 16)], ids=str)
def test_newton_schulz_in_c_is_what_optim_py_says(shape, threads, blocks):
    """As near to float32's steps as PyTorch's in bfloat16; the same bits by one thread as by three."""
    x, found = torch.randn(shape).bfloat16(), []
    blocks(True)
    for count in (1, 3):
        threads(count)
        found.append(optim.newton_schulz(x))
    assert torch.equal(*found)
    blocks(False)
    exact = optim.newton_schulz(x.float())
    assert distances(found[:1], [exact])[0] < 1.5 * distances([optim.newton_schulz(x)], [exact])[0]
