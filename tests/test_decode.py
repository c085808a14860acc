import math
import zipfile

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig, Sampling, Slots
from quartz import compiled
from quartz.compiled import CompiledStep, GraphedStep, pays, prepare, quantize_rows

CPU = torch.device("cpu")
SHAPE = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}


def make(**changes) -> GPT:
    """A model whose logits differ by units, as a trained one's do."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # what begins at zero
                parameter.normal_(std=0.3)
            elif parameter.dim() == 2:
                parameter.mul_(8 if model.config.arch == "gpt2" else 2)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def logits_of(model: GPT, prompts, steps: int, engine) -> torch.Tensor:
    """(steps, B, V) along a greedy text."""
    return torch.stack([logits for _, logits in model.stream(prompts, steps, Sampling(temperature=0), engine=engine)])


def full_forward(model: GPT, prompt: list[int], steps: int) -> torch.Tensor:
    """The logits (steps, V) along a greedy text, with nothing cached; within block_size."""
    ids, found = list(prompt), []
    for _ in range(steps):
        found.append(model(torch.tensor([ids]))[0][0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.stack(found).detach()


@pytest.fixture(scope="module")
def compiled_folder(tmp_path_factory):
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def has_compiler() -> bool:
    return not compiled.machine.why_no_compiler(CPU)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler, or no Python headers")
@pytest.mark.parametrize(
    ("dtype", "quantize", "bias", "prompts"),
    [
        (torch.float32, False, True, [[1, 2, 3], [4]]),
        (torch.bfloat16, False, False, [[1, 2, 3]]),
        (torch.float32, True, None, [[1, 2, 3], [4], [1, 2, 3]]),
    ],
    ids=["float32", "bfloat16", "int8 qwen3"],
)
def test_a_compiled_step_gives_the_full_forward_pass(compiled_folder, capfd, dtype, quantize, bias, prompts):
    qwen3 = {"arch": "qwen3", "bias": False, "n_head": 4, "n_kv_head": 2, "tie_embeddings": False}
    model = make(**(qwen3 if bias is None else {"bias": bias}))
    engine = prepare(model, CPU, dtype, quantize, len(prompts), 10**9, True)
    assert isinstance(engine, CompiledStep) and "compiling" in capfd.readouterr().err
    found = logits_of(model, prompts, 25, engine)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[:, row], full_forward(model, prompt, 25), atol=2e-4, rtol=0)
    # Past block_size, drawn at random, beside the uncompiled step; from the package that was kept.
    again = prepare(model, CPU, dtype, quantize, len(prompts), 1, True)
    assert isinstance(again, CompiledStep) and capfd.readouterr().err == ""
    plain = [
        torch.stack(
            [ids for ids, _ in model.stream(prompts, 80, Sampling(top_k=9), seeds=range(len(prompts)), engine=e)]
        )
        for e in (again, model)
    ]
    assert torch.equal(*plain)


def test_int8_keeps_every_weight_within_half_a_step():
    weight = torch.randn(40, 30) * torch.logspace(-6, 3, 40)[:, None]
    weight[3] = 0
    small, scale = quantize_rows(weight)
    assert small.dtype == torch.int8 and scale.shape == (40,)
    error = (small * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all() and (small.abs().amax(1)[torch.arange(40) != 3] == 127).all()


def test_int8_of_a_trained_model_loses_little_and_writes_the_same():
    """Trained to count, far enough that its text means something."""
    model = make(n_embd=64, bias=False).train()
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.99), "cpu")
    generator = torch.Generator().manual_seed(0)

    def batch(rows):
        start, step = torch.randint(61, (2, rows, 1), generator=generator)
        text = (start + step % 3 * torch.arange(33)) % 61
        noisy = torch.where(torch.rand(text.shape, generator=generator) < 0.05, (text * 7) % 61, text)
        return noisy[:, :-1].contiguous(), noisy[:, 1:].contiguous()

    for _ in range(300):
        loss = model(*batch(32))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = batch(200)
    model.eval()
    with torch.no_grad():
        before = model(*held_out)[1]
        prompt = held_out[0][:2, :9]
        text = model.generate(prompt, 100, temperature=0)
        prepare(model, CPU, torch.float32, True, 2, 1, False)
        after = model(*held_out)[1]
    assert before < 1.2 < math.log(61)
    assert before != after and abs(after - before) / before < 0.005
    assert torch.equal(model.generate(prompt, 100, temperature=0), text)


def test_bfloat16_weights_are_computed_with_in_float32():
    model, reference = make(), make().to(torch.bfloat16).float()
    engine = prepare(model, CPU, torch.bfloat16, False, 3, 1, False)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name))
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(logits_of(model, [[7]], 9, engine)[:, 0], full_forward(model, [7], 9), atol=1e-4, rtol=0)


def test_many_rows_in_bfloat16_are_multiplied_in_bfloat16():
    model = make()
    prepare(model, CPU, torch.bfloat16, False, compiled.MAX_COMPILED_ROWS + 1, 1, True)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_large_layers_go_through_onednn_and_agree(monkeypatch):
    monkeypatch.setattr(compiled, "ONEDNN_SIZE", 1000)
    model = make()
    before = full_forward(model, [5, 6], 10)
    engine = prepare(model, CPU, torch.float32, False, 2, 1, False)
    assert sum(isinstance(module, compiled.OneDnnLinear) for module in model.modules()) == 4 * 2 + 1
    found = logits_of(model, [[5, 6], [5, 6]], 10, engine)
    torch.testing.assert_close(found[:, 0], before, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.tensor([[1]]))[0].dtype == torch.bfloat16


def test_compiling_is_decided_by_the_work():
    packed = {None: (torch.empty(124_000_000, dtype=torch.bfloat16, device="meta"), None)}
    assert not pays(packed, 10) and pays(packed, 2000)
    assert not pays({None: (torch.empty(800_000, device="meta"), None)}, 5000)


def test_without_a_working_compiler_it_goes_on_with_a_warning(tmp_path, monkeypatch, capfd):
    def build(*arguments):
        raise RuntimeError("g++: internal error\nand more lines")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_build", build)
    model = make()
    assert prepare(model, CPU, torch.float32, False, 1, 10**9, True) is model
    err = capfd.readouterr().err
    assert err.count("\n") == 2 and "warning: the step can't be compiled" in err and "more lines" not in err
    assert prepare(model, CPU, torch.float32, False, 1, 10**9, False) is model and capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn"])
def test_a_damaged_package_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, made = make(), []
    step = CompiledStep(model, compiled.pack(model, torch.float32, False), 1)
    assert not step.is_compiled()
    for path in step.paths:
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("code", b"1" * 1000)
    assert step.is_compiled()
    whole = step.paths[0].read_bytes()
    for bad in (damage, whole[:500] + b"2" + whole[501:]):
        step.paths[0].write_bytes(bad)
        assert not step.is_compiled()
    monkeypatch.setattr(compiled, "_build", lambda path, *a: made.append(path))
    monkeypatch.setattr(compiled, "_load", lambda path: None)
    step.compile()
    assert made == step.paths


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/tmp/" + 300 * "a"])
def test_a_cache_folder_that_cannot_be_is_no_obstacle(monkeypatch, capfd, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    model = make()
    assert prepare(model, CPU, torch.float32, False, 1, 3, True) is model and capfd.readouterr().err == ""
    assert prepare(model, CPU, torch.float32, False, 1, 10**9, True) is model
    assert "warning: the step can't be compiled" in capfd.readouterr().err


class Replayed(GraphedStep):
    """GraphedStep, with the computation itself in place of the recorded graph."""

    def capture(self, tokens, cache):
        self.cache, self.tokens, self.at = cache, tokens.clone(), torch.tensor(cache.lengths)
        self.lengths, self.graph, self.logits = list(cache.lengths), self, torch.empty(len(tokens), SHAPE["vocab_size"])
        self.captures = getattr(self, "captures", 0) + 1

    def replay(self):
        self.logits.copy_(self.compute())


def test_the_step_of_fixed_shape_gives_the_same_text_as_the_growing_one():
    model, prompts = make(), [[1, 2, 3], [4], [5] * 40]
    texts = [
        torch.stack([ids for ids, _ in model.stream(prompts, 70, Sampling(top_k=9), seeds=[1, 2, 3], engine=engine)])
        for engine in (Replayed(model), model)
    ]
    assert torch.equal(*texts)


def test_two_streams_may_take_turns_on_one_fixed_step():
    model, how = make(), Sampling(temperature=0)
    engine = Replayed(model)
    turns = zip(model.stream([[1, 2]], 9, how, engine=engine), model.stream([[7]], 9, how, engine=engine), strict=True)
    texts = torch.stack([torch.cat((a[0], b[0])) for a, b in turns])
    for row, prompt in enumerate(([1, 2], [7])):
        assert torch.equal(texts[:, row], model.generate(torch.tensor([prompt]), 9, 0)[0, len(prompt) :])
    before = engine.captures
    model.generate(torch.tensor([[3]]), 9, engine=engine)
    assert engine.captures == before + 1  # one for a text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this system has no CUDA device")
def test_a_cuda_graph_gives_the_same_text():
    model, prompts = make(), [[1, 2, 3], [4]]
    engine = prepare(model, torch.device("cuda"), torch.float32, False, 2, 70, True)
    texts = [
        torch.stack([ids for ids, _ in model.stream(prompts, 70, Sampling(top_k=9), seeds=[1, 2], engine=e)])
        for e in (engine, model)
    ]
    assert isinstance(engine, GraphedStep) and torch.equal(*texts)


def test_slots_write_where_they_are_told():
    keys, values, at = torch.zeros(2, 1, 6, 3), torch.zeros(2, 1, 6, 3), torch.tensor([4, 1])
    k, v, mask = Slots([keys], [values], at, 5).extend(0, torch.ones(2, 1, 1, 3), 2 * torch.ones(2, 1, 1, 3))
    assert k.shape == v.shape == (2, 1, 5, 3) and mask[:, 0, 0].sum(-1).tolist() == [5, 2]
    assert keys.nonzero()[:, 2].unique().tolist() == [1, 4] and values[0, 0, 4].tolist() == [2, 2, 2]
    assert keys.sum() == 6


def test_the_linear_layer_of_a_compiled_step_is_a_linear_layer():
    for rows in (1, 2, 5):
        linear, x = nn.Linear(31, 7), torch.randn(rows, 1, 31)
        packed = compiled.PackedLinear(linear.weight / 2, torch.full((7,), 2.0), linear.bias)
        torch.testing.assert_close(packed(x), linear(x))
