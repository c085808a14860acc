import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from quartz import checkpoint, compiled, lora, native
from quartz.compiled import CompiledStep, GraphedStep, Slots, pays, prepare
from quartz.decoder import Decoder, Sampling, complete
from quartz.engine import Engine, SteadyLinear, quantize_rows

CPU = torch.device("cpu")
QWEN3 = {"arch": "qwen3", "bias": False, "n_head": 4, "n_kv_head": 2, "tie_embeddings": False}
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


def logits_of(engine, prompts, steps: int) -> torch.Tensor:
    """(steps, B, V) along a greedy text."""
    decoder, found = Decoder(engine, len(prompts), 200), []
    for prompt in prompts:
        decoder.admit(prompt, [0], steps, Sampling(temperature=0))
    while drawn := decoder.step():
        found.append(torch.stack([its.logits for its in drawn]))
    return torch.stack(found)


def full_forward(model: GPT, prompt: list[int], steps: int) -> torch.Tensor:
    """The logits (steps, V) along a greedy text, with nothing cached; within block_size."""
    ids, found = list(prompt), []
    for _ in range(steps):
        found.append(model(torch.tensor([ids]))[0][0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.stack(found).detach()


def has_compiler() -> bool:
    return sys.platform == "linux" and any(map(shutil.which, ("cc", "gcc", "clang")))


def reference(model: GPT, dtype: torch.dtype, quantize: bool) -> tuple[GPT, float]:
    """The network whose full forward pass gives a compiled step's logits, and how far they may be off.

    In bfloat16 what meets a matrix is rounded, where the CPU multiplies so: then here and there to the neighbour.
    """
    rounded = Engine(model, CPU, torch.float32, dtype, quantize).model
    if dtype == torch.bfloat16 and native.load("step", True).multiplies_halves():
        for module in rounded.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
        return rounded, 0.02
    return rounded, 2e-4


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize(
    ("dtype", "quantize", "bias", "prompts"),
    [
        (torch.float32, False, True, [[1, 2, 3], [4], [7, 7]]),
        (torch.bfloat16, False, False, [[1, 2, 3]]),
        (torch.float32, True, None, [[1, 2, 3], [4], [1, 2, 3]]),
    ],
    ids=["float32", "bfloat16", "int8 qwen3"],
)
def test_a_compiled_step_gives_the_full_forward_pass(compiled_folder, capfd, dtype, quantize, bias, prompts):
    model = make(**(QWEN3 if bias is None else {"bias": bias}))
    engine = prepare(model, CPU, dtype, quantize, len(prompts), 10**9, True)
    assert isinstance(engine, CompiledStep)
    capfd.readouterr()
    found = logits_of(engine, prompts, 25)
    plain, off = reference(model, dtype, quantize)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(found[:, row], full_forward(plain, prompt, 25), atol=off, rtol=0)
    # Past block_size, drawn at random, beside the uncompiled step; from the library that was kept.
    again = prepare(model, CPU, dtype, quantize, len(prompts), 1, True)
    assert isinstance(again, CompiledStep) and capfd.readouterr().err == ""
    texts = complete(again, prompts, 80, Sampling(top_k=9))
    beside = engine if off > 1e-3 else Engine(model, CPU, torch.float32, dtype, quantize)
    assert texts == complete(beside, prompts, 80, Sampling(top_k=9))


KINDS = {
    "float32": ({}, torch.float32, False),
    "float32 with tails": ({"n_embd": 36, "n_head": 3, "vocab_size": 37}, torch.float32, False),
    "float32 with odd numbers": ({"n_embd": 35, "n_head": 1, "vocab_size": 37}, torch.float32, False),
    "bfloat16": ({"bias": False}, torch.bfloat16, False),
    "bfloat16 llama": ({**QWEN3, "arch": "llama", "n_kv_head": 1}, torch.bfloat16, False),
    "int8 qwen3": (QWEN3, torch.float32, True),
    "wide": ({"n_head": 1, "n_embd": 160, "block_size": 48}, torch.float32, False),
}


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize("length", [1, 33, 64, 65, 150, 530])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_any_length_is_read_whole(compiled_folder, kind, length):
    """With all of its logits asked for, or the last alone, by any number of threads: with the same bits, which are the
    full forward pass's up to rounding, and the same text follows; in two parts too."""
    changes, dtype, quantize = KINDS[kind]
    model = make(**{**changes, "block_size": 540})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(1.0)
    engine = prepare(model, CPU, dtype, quantize, 2, 10**9, True)
    plain, off = reference(model, dtype, quantize)
    prompt, seen = [(7 * n) % 37 for n in range(length)], []
    off = 0.25 if engine.has_tiles and length > compiled.SHORT else 2 * off  # there are many logits
    threads, following = torch.get_num_threads(), []
    cache = engine.new_cache(2, 540)
    last = engine.prefill(prompt, cache, 1, 0, seen.append)
    assert all(len(logits) <= 64 for logits in seen) and torch.equal(seen[-1][-1], last) and last.dtype == torch.float32
    wanted = plain(torch.tensor([prompt]), torch.tensor([prompt]))[0][0]
    torch.testing.assert_close(torch.cat(seen).float(), wanted, atol=off, rtol=0)
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            cache = engine.new_cache(2, 540)
            assert torch.equal(engine.prefill(prompt, cache, 1), last) or engine.has_tiles and count != threads
            following.append(engine.step(torch.tensor([3]), cache, [1]))
            assert torch.equal(following[-1], following[0]) or engine.has_tiles
    finally:
        torch.set_num_threads(threads)
    if length > 1:
        engine.prefill(prompt[: length // 2], cache, 0)
        torch.testing.assert_close(engine.prefill(prompt[length // 2 :], cache, 0, length // 2), last, atol=off, rtol=0)


@pytest.mark.skipif(
    not compiled.machine.cpu_has_bfloat16() or not has_compiler(), reason="no bfloat16, or no C compiler"
)
@pytest.mark.parametrize("length", [33, 150])
def test_where_a_library_has_tiles_a_prompt_is_read_by_it(compiled_folder, monkeypatch, length):
    """What matrices put out is rounded then; of the last token they are not, whose logits a step computes."""
    monkeypatch.setattr(compiled.machine, "cpu_has_amx", lambda: True)
    model, seen = make(block_size=540), []
    engine = prepare(model, CPU, torch.bfloat16, False, 2, 10**9, True)
    assert engine.has_tiles
    prompt, cache = [(7 * n) % 37 for n in range(length)], engine.new_cache(2, 540)
    last = engine.prefill(prompt, cache, 1, 0, seen.append)
    assert torch.equal(seen[-1][-1], last) and last.dtype == torch.float32
    wanted = reference(model, torch.bfloat16, False)[0](torch.tensor([prompt]), torch.tensor([prompt]))[0][0]
    torch.testing.assert_close(torch.cat(seen).float(), wanted, atol=0.25, rtol=0)


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_compiled_step_has_its_own_bits(compiled_folder, kind):
    """Whatever stands beside it, in whatever row, by however many threads; and they are the full forward pass's logits,
    with prompts of every length up to what a step reads, and beyond."""
    changes, dtype, quantize = KINDS[kind]
    model = make(**changes)
    engine = prepare(model, CPU, dtype, quantize, 2, 10**9, True)
    assert isinstance(engine, CompiledStep)
    size = model.config.block_size
    prompts = [[n % 37, *range(length)] for n, length in enumerate((0, 1, 2, 3, 4, 5, 6, 9, 11, 15, 16, 20, 25))]
    together = logits_of(engine, prompts, 5)
    threads = torch.get_num_threads()
    try:
        for row, prompt in enumerate(prompts):
            torch.set_num_threads(1 + row % 3)
            assert torch.equal(logits_of(engine, [prompt], 5)[:, 0], together[:, row])
    finally:
        torch.set_num_threads(threads)
    plain, off = reference(model, dtype, quantize)
    for row, prompt in enumerate(prompts):
        steps = min(5, size - len(prompt))
        found = together[:steps, row]
        torch.testing.assert_close(found, full_forward(plain, prompt, steps), atol=off, rtol=0)


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_extreme_numbers_are_computed_as_elsewhere(compiled_folder):
    """Activations far beyond what exp holds, and weights that are not finite."""
    model = make()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.copy_(torch.linspace(-300, 300, 128))
        model.transformer.h[1].attn.c_attn.weight.mul_(100)
    found = logits_of(prepare(model, CPU, torch.float32, False, 1, 10**9, True), [[1, 2, 3]], 9)
    torch.testing.assert_close(found[:, 0], full_forward(model, [1, 2, 3], 9), atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] = math.nan
    assert logits_of(prepare(model, CPU, torch.float32, False, 1, 10**9, True), [[1]], 1).isnan().all()


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
        text = model.generate(prompt, 100, temperature=0)[:, 9:]
        engine = prepare(model, CPU, torch.float32, True, 2, 1, False)
        after = engine.model(*held_out)[1]
    assert before < 1.2 < math.log(61)
    assert before != after and abs(after - before) / before < 0.005
    assert complete(engine, prompt.tolist(), 100, Sampling(temperature=0)) == text.tolist()


def test_bfloat16_weights_are_computed_with_in_float32():
    reference = make().to(torch.bfloat16).float()
    engine = prepare(make(), CPU, torch.bfloat16, False, 3, 1, False)
    model = engine.model
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name))
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(logits_of(engine, [[7]], 9)[:, 0], full_forward(model, [7], 9), atol=1e-4, rtol=0)


@pytest.mark.skipif(not compiled.machine.cpu_has_bfloat16(), reason="this CPU does not compute in bfloat16")
def test_many_rows_in_bfloat16_are_multiplied_in_bfloat16():
    engine = prepare(make(), CPU, torch.bfloat16, False, compiled.MAX_EXACT_ROWS + 1, 1, False)
    assert engine.model.lm_head.weight.dtype == torch.bfloat16


def test_a_linear_layer_that_minds_no_neighbours_is_a_linear_layer():
    for rows, is_packed in ((1, False), (2, False), (5, False), (1, True), (2, True), (5, True), (40, True)):
        linear, x = SteadyLinear(31, 7), torch.randn(rows, 1, 31)
        if is_packed:
            linear.pack(gives_up=False)
        assert (linear(x).shape, linear(x[0, 0]).shape) == ((rows, 1, 7), (7,))
        torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        assert rows == 1 or torch.equal(linear(x)[-1], linear(x[[-1, 0]])[0])


WAYS = {  # shape, dtype, int8, rows, compiled
    "float32": ({"dropout": 0.1}, torch.float32, False, 2, False),
    "bfloat16": ({**QWEN3, "dropout": 0.1}, torch.bfloat16, False, 2, False),
    "many rows in bfloat16": ({"dropout": 0.1}, torch.bfloat16, False, 9, False),
    "int8": (QWEN3, torch.float32, True, 2, False),
    "compiled float32": ({}, torch.float32, False, 3, True),
    "compiled bfloat16": ({"bias": False}, torch.bfloat16, False, 1, True),
    "compiled, many rows in bfloat16": ({"dropout": 0.1}, torch.bfloat16, False, 9, True),
    "compiled int8": (QWEN3, torch.float32, True, 3, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_may_be_sampled_from_while_it_trains(compiled_folder, way):
    """Its weights' bits after each update are those without sampling, and the engine's text that of a new engine."""
    changes, dtype, quantize, rows, may_compile = WAYS[way]
    if may_compile and not has_compiler():
        pytest.skip("no C compiler")

    def start():
        model = make(**changes).train()
        return model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), "cpu")

    def update(n: int, model, optimizer):
        torch.manual_seed(n)
        idx = torch.randint(61, (4, 32))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample(engine):
        return complete(engine, [[1, 2, 3], *([n] for n in range(1, rows))], 12, Sampling(top_k=9))

    def prepared(model):
        engine = prepare(model, CPU, dtype, quantize, rows, 10**9, may_compile)
        assert isinstance(engine, CompiledStep) == may_compile
        return engine

    plain, sampled = start(), start()
    engine, texts = prepared(sampled[0]), []
    for n in range(3):
        update(n, *plain), update(n, *sampled)
        engine.refresh()
        texts.append(sample(engine))
        assert texts[-1] == sample(prepared(sampled[0]))
        assert sampled[0].training
        for (name, ours), theirs in zip(sampled[0].named_parameters(), plain[0].parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.float32 and ours.requires_grad, name
    assert texts[0] != texts[1] != texts[2]
    assert type(sampled[0].lm_head) is nn.Linear


def test_an_engine_takes_no_memory_for_weights_that_are_the_same():
    def places(model):
        return [parameter.data_ptr() for parameter in model.parameters()]

    model = make()
    assert places(Engine(model).model) == places(model)
    rounded = Engine(model, kept=torch.bfloat16).model
    shared = [name for name, one in rounded.named_parameters() if one.data_ptr() in places(model)]
    assert shared and all("ln_" in name or "wpe" in name or name.endswith("bias") for name in shared)
    given = make()
    assert Engine(given, kept=torch.bfloat16, gives_up=True).model is given
    with pytest.raises(ValueError, match="given up"):
        Engine(given, gives_up=True).refresh()


def test_weights_that_are_put_in_the_place_of_others_are_taken_over():
    model, other = make(), make()
    engine = Engine(model)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(-1)
    checkpoint.fill(model, other.state_dict())
    before = complete(engine, [[1]], 20, Sampling(temperature=0))
    engine.refresh()
    assert before != complete(engine, [[1]], 20, Sampling(temperature=0))
    assert complete(engine, [[1]], 20, Sampling()) == complete(Engine(other), [[1]], 20, Sampling())


def test_compiling_is_decided_by_the_work():
    with torch.device("meta"):
        large, small = (GPT(GPTConfig(n_layer=12, n_head=12, n_embd=width)) for width in (768, 24))
    assert not pays(large, 2, 10) and pays(large, 2, 2000)
    assert not pays(small, 4, 200) and pays(small, 4, 2000)


def test_without_a_working_compiler_it_goes_on_with_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (broken := tmp_path / "broken").write_text("#!/bin/sh\necho 'cc1: error: no room\nand more lines' >&2\nexit 1\n")
    broken.chmod(0o755)
    model = make()
    for compiler, told in ((broken, "cc1: error: no room"), (tmp_path / "none", "there is no C compiler")):
        monkeypatch.setenv("CC", str(compiler))
        assert type(prepare(model, CPU, torch.float32, False, 1, 10**9, True)) is Engine
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "warning: the step can't be compiled" in err and told in err
        assert "more lines" not in err
    for steps, may_compile in ((10**9, False), (1, True)):
        assert type(prepare(model, CPU, torch.float32, False, 1, steps, may_compile)) is Engine
        assert capfd.readouterr().err == ""
    assert not [*tmp_path.glob("quartzgpt/*")]


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_a_damaged_library_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load("step", may_compile=False) is None
    native.load("step", may_compile=True)
    (path,) = tmp_path.glob("quartzgpt/*")
    whole = path.read_bytes()
    for bad in (b"", b"\x7fELF", whole[:500] + b"2" + whole[501:], whole[:-1]):
        path.write_bytes(bad)
        assert not native.is_whole(path) and native.load("step", may_compile=False) is None
    # Another one, which the system's loader does not take for one that this process has loaded already
    path.unlink()
    assert native.load("step", may_compile=True) and native.is_whole(path) and [*tmp_path.glob("quartzgpt/*")] == [path]


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize("machine_code", [[], ["-mavx2", "-mfma"]], ids=["any processor", "AVX2"])
def test_other_widths_of_vectors_compute_the_same(tmp_path, monkeypatch, machine_code):
    """What a machine with narrower vectors, or without OpenMP, would be given; as far as this one runs it."""
    if machine_code and "avx2" not in native._cpu().split():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(native, "OPTIONS", [*native.OPTIONS[:4], *machine_code])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for changes in ({}, QWEN3):
        model = make(**changes)
        engine = prepare(model, CPU, torch.float32, False, 3, 10**9, True)
        prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
        found = logits_of(engine, prompts, 20)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(found[:, row], full_forward(model, prompt, 20), atol=2e-4, rtol=0)
            assert torch.equal(logits_of(engine, [prompt], 20)[:, 0], found[:, row])


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize("name", ["step", "training"])
def test_what_is_in_c_compiles_without_a_warning(tmp_path, name):
    source = compiled.__file__.replace("compiled.py", f"{name}.c")
    command = ["cc", *native.OPTIONS, "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "made.so", source]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/tmp/" + 300 * "a"])
def test_a_cache_folder_that_cannot_be_is_no_obstacle(monkeypatch, capfd, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    model = make()
    assert type(prepare(model, CPU, torch.float32, False, 1, 3, True)) is Engine and capfd.readouterr().err == ""
    assert type(prepare(model, CPU, torch.float32, False, 1, 10**9, True)) is Engine
    assert "warning: the step can't be compiled" in capfd.readouterr().err


class Replayed(GraphedStep):
    """GraphedStep, with the computation itself in place of the recorded graph."""

    captures = 0

    def capture(self, cache):
        self.cache, self.tokens = cache, torch.zeros(cache.rows, dtype=torch.long)
        self.at = torch.full((cache.rows,), cache.keys.size(4) - 1)
        self.places, self.graph, self.logits = self.at.tolist(), self, torch.empty(cache.rows, SHAPE["vocab_size"])
        self.captures += 1

    def replay(self):
        self.logits.copy_(self.compute())


def test_the_step_of_fixed_shape_gives_the_same_text_as_the_growing_one():
    """Of rows that come and go, too: here two end early, and the others go on."""
    texts = []
    for engine in (Replayed(make()), Engine(make())):
        decoder, found = Decoder(engine, 4, 200, ahead=4), {}
        for seed, (prompt, count) in enumerate([([1, 2, 3], 70), ([4], 9), ([5] * 40, 70), ([6], 21)]):
            decoder.admit(prompt, [seed], count, Sampling(top_k=9))
        while drawn := decoder.step():
            for its in drawn:
                found.setdefault(its.row, []).append(its.token)
        texts.append(found)
    assert texts[0] == texts[1] and [*map(len, texts[0].values())] == [70, 9, 70, 21]


def test_two_decoders_may_take_turns_on_one_fixed_step():
    model, how, found = make(), Sampling(temperature=0), []
    engine = Replayed(model)
    decoders = [Decoder(engine, 1, 20) for _ in range(2)]
    for decoder, prompt in zip(decoders, ([1, 2], [7]), strict=True):
        decoder.admit(prompt, [0], 9, how)
    for _ in range(9):
        found.append([decoder.step()[0].token for decoder in decoders])
    for text, prompt in zip(zip(*found, strict=True), ([1, 2], [7]), strict=True):
        assert list(text) == model.generate(torch.tensor([prompt]), 9, 0)[0, len(prompt) :].tolist()
    before = engine.captures
    complete(engine, [[3]], 9)
    assert engine.captures == before + 1  # one for a decoder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this system has no CUDA device")
def test_a_cuda_graph_gives_the_same_text():
    model, prompts = make(), [[1, 2, 3], [4]]
    engine = prepare(model, torch.device("cuda"), torch.float32, False, 2, 70, True)
    assert isinstance(engine, GraphedStep)
    texts = [complete(one, prompts, 70, Sampling(top_k=9), ahead=16) for one in (engine, Engine(model))]
    assert texts[0] == texts[1]


def test_slots_write_where_they_are_told():
    keys, values, at = torch.zeros(2, 1, 6, 3), torch.zeros(2, 1, 6, 3), torch.tensor([4, 1])
    k, v, mask = Slots([keys], [values], at, 5).extend(0, torch.ones(2, 1, 1, 3), 2 * torch.ones(2, 1, 1, 3))
    assert k.shape == v.shape == (2, 1, 5, 3) and mask[:, 0, 0].sum(-1).tolist() == [5, 2]
    assert keys.nonzero()[:, 2].unique().tolist() == [1, 4] and values[0, 0, 4].tolist() == [2, 2, 2]
    assert keys.sum() == 6


def test_a_model_with_adapters_beside_its_weights_is_refused():
    model = make()
    lora.attach(model, 2, 4.0)
    with pytest.raises(ValueError, match="merge"):
        Engine(model)
    lora.merge(model)
    assert complete(Engine(model), [[1]], 5) == complete(Engine(make()), [[1]], 5)
