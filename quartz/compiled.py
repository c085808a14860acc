"""Faster ways to take GPT.step: weights in fewer bits, a compiled step on CPUs, a CUDA graph on GPUs.

One token reads every weight once, so decoding is as fast as memory delivers them. On CPUs arithmetic is in float32
whatever the weights are kept in: a text does not depend on whether the step is compiled, nor on the rows beside it.
(The exception, for speed, is many rows in bfloat16: see `prepare`.) Fewer bits are read by a compiled step alone;
without one the weights have the values that those bits can hold, in float32.

A compiled step is two small packages of machine code, one for a block and one for the head, made by PyTorch's
ahead-of-time compiler from the model's own code and kept in ~/.cache/quartzgpt for every later run.
"""

import copy
import hashlib
import math
import os
import platform
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import model as model_module
from model import GPT, CausalSelfAttention, KVCache, Slots
from quartz import machine

MAX_COMPILED_ROWS = 8  # above, a matrix product does better than as many products of a matrix and a vector
COMPILE_SECONDS = 20.0  # what the first compilation takes on two cores, at most
SLOW_MEMORY = 20e9  # bytes/s that an uncompiled step reads, for the estimate of what compiling saves
ONEDNN_SIZE = 2**18  # weights from which on oneDNN's product beats its cost of dispatch


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept in fewer bits, (N, K) with a scale (N,) for int8; float32 in and out.

    For tracing into a compiled step: a sum over each row of the weight, for each of a few rows of x.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None):
        super().__init__()
        for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, shape = self.weight.float(), x.shape[:-1]
        x = x.reshape(-1, x.size(-1))
        x = x.as_strided(x.shape, x.stride())  # makes the compiler store x, rather than compute it anew for every sum
        if len(x) == 1:  # two sums at a time, so that one's additions need not wait for each other
            y = torch.cat([(half * x[0]).sum(-1) for half in weight.chunk(2)]).view(*shape, -1)
        else:
            y = torch.stack([(weight * row).sum(-1) for row in x]).view(*shape, -1)
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias


class OneDnnLinear(nn.Linear):
    """nn.Linear in float32 by oneDNN, which reads a weight up to twice as fast as the BLAS behind F.linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class WrittenOutAttention(CausalSelfAttention):
    """Attention of one query a row, written out: in a compiled step it becomes loops of its own."""

    def shared(self, t: torch.Tensor) -> torch.Tensor:
        return t  # read where they are; torch 2.11 cannot trace the copies

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)  # (B, n_kv, heads of queries, …)
        scores = (q * k).sum(-1, keepdim=True).mT / math.sqrt(self.head_dim)  # (B, n_kv, heads of queries, 1, keys)
        weights = scores.masked_fill(~mask.unsqueeze(2), -math.inf).softmax(-1)
        return (weights.mT * v).sum(-2, keepdim=True).flatten(1, 2)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) -> int8 (N, K) and float32 scale (N,): each row's largest magnitude becomes 127."""
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def pack(model: GPT, dtype: torch.dtype, quantize: bool) -> dict[nn.Parameter, tuple]:
    """The matrices in `dtype`, or in int8 with a scale a row; the model goes on with the same values in float32."""
    packed = {}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight not in packed:
                weight, scale = quantize_rows(module.weight) if quantize else (module.weight.to(dtype), None)
                if quantize or dtype != torch.float32:
                    module.weight.copy_(weight.float() if scale is None else weight * scale[:, None])
                packed[module.weight] = (weight, scale)
    return packed


def prepare(
    model: GPT, place: torch.device, dtype: torch.dtype, quantize: bool, rows: int, steps: int, may_compile: bool
):
    """Makes the model ready on `place` to take `steps` steps with `rows` rows; returns the engine for GPT.stream.

    With more than MAX_COMPILED_ROWS rows in bfloat16, on a CPU that computes in it, products are in bfloat16 too: that
    is twice as fast.
    """
    if place.type != "cpu":
        model.to(place, dtype)
        if place.type == "cuda":
            torch.cuda.set_device(place)  # where graphs are captured
            return GraphedStep(model)
        return model
    if dtype == torch.bfloat16 and not quantize and rows > MAX_COMPILED_ROWS and machine.cpu_has_bfloat16():
        return model.to(dtype)
    packed = pack(model.float(), dtype, quantize)
    if may_compile and rows <= MAX_COMPILED_ROWS and model.config.block_size >= 4:
        try:
            step = CompiledStep(model, packed, rows)
            if step.is_compiled() or pays(packed, steps):
                step.compile()
                return step
        except Exception as error:  # whatever a compiler or a folder that is missing, old or broken raises
            reason = machine.why_no_compiler(place) or f"{type(error).__name__}: {error}".split("\n")[0][:200]
            print(f"warning: the step can't be compiled ({reason}); going on without", file=sys.stderr)
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.numel() >= ONEDNN_SIZE:
                module.__class__ = OneDnnLinear
    return model


def pays(packed: dict, steps: int) -> bool:
    """Whether compiling saves this run a quarter of its cost: then from the fourth such run on it has paid."""
    full = sum(4 * weight.numel() for weight, _ in packed.values())
    small = sum(weight.numel() * weight.element_size() for weight, _ in packed.values())
    return steps * (full - 0.75 * small) / SLOW_MEMORY > COMPILE_SECONDS / 4


class GraphedStep:
    """GPT.step as a CUDA graph: static shapes, one launch a token, nothing that waits for the GPU."""

    def __init__(self, model: GPT):
        self.model, self.cache = model, None
        self.new_cache = model.new_cache

    def compute(self) -> torch.Tensor:
        slots = Slots(self.cache.keys, self.cache.values, self.at, self.cache.keys.size(3))
        hidden = self.model._hidden(self.tokens[:, None], self.at[:, None], slots)
        return self.model.lm_head(hidden[:, 0])

    def capture(self, tokens: torch.Tensor, cache: KVCache) -> None:
        self.cache, self.tokens = cache, tokens.clone()
        self.at = torch.tensor(cache.lengths, device=tokens.device)
        self.lengths = list(cache.lengths)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what kernels set up at their first call must not be captured
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.compute()

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As GPT.step. The logits are overwritten by the next step."""
        if self.cache is not cache:
            self.capture(tokens, cache)
        if self.lengths != cache.lengths:  # a prompt was read since
            self.at.copy_(torch.tensor(cache.lengths))
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.at += 1
        cache.lengths = [length + 1 for length in cache.lengths]
        self.lengths = list(cache.lengths)
        return self.logits


class CompiledStep:
    """GPT.step on a CPU for a fixed number of rows, as machine code for a block and for the head."""

    def __init__(self, model: GPT, packed: dict[nn.Parameter, tuple], rows: int):
        self.model, self.packed, self.rows = model, packed, rows
        self.capacity = model.config.block_size + 8  # more than any length: the tracer wants the two told apart
        c, (weight, _) = model.config, packed[model.lm_head.weight]
        what = [torch.__version__, c, rows, weight.dtype, torch.get_num_threads(), _cpu()]
        what += [Path(file).read_bytes() for file in (__file__, model_module.__file__)]
        key = hashlib.sha256("\n".join(map(repr, what)).encode()).hexdigest()[:16]
        self.paths = [cache_folder() / f"{part}-{key}.pt2" for part in ("block", "head")]

    def is_compiled(self) -> bool:
        """Whether the packages are there, and whole: machine code that is damaged would crash."""
        try:
            return all(zipfile.ZipFile(path).testzip() is None for path in self.paths)
        except (OSError, zipfile.BadZipFile, zlib.error):
            return False

    def new_cache(self, rows: int, length: int) -> KVCache:
        assert rows == self.rows, "compiled for another number of rows"
        return KVCache(self.model.config, rows, self.capacity, torch.device("cpu"), torch.float32)

    def tensors(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """What `packed_copy(module)` computes with, by name, from this module's weights."""
        found = {}
        for name, part in module.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if isinstance(part, nn.Linear):
                own["weight"], own["scale"] = self.packed[part.weight]
            prefix = f"{name}." if name else ""
            found |= {prefix + key: tensor.detach() for key, tensor in own.items() if tensor is not None}
        return found

    def packed_copy(self, module: nn.Module) -> nn.Module:
        twin = copy.deepcopy(module)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(twin.get_submodule(parent), leaf, PackedLinear(*self.packed[part.weight], part.bias))
            elif isinstance(part, CausalSelfAttention):
                twin.get_submodule(name).__class__ = WrittenOutAttention
        return twin

    def compile(self) -> None:
        """Loads the two packages, after making them if need be."""
        c, transformer = self.model.config, self.model.transformer
        head = nn.Sequential(transformer.ln_f, self.model.lm_head)
        self.layers = [list(self.tensors(block).values()) for block in transformer.h]
        self.head_weights = list(self.tensors(head).values())
        if not self.is_compiled():
            print("compiling the step: about 20 s, kept for every later run of this shape", file=sys.stderr)
            x = torch.zeros(self.rows, 1, c.n_embd)
            at, positions = torch.ones(self.rows, dtype=torch.long), torch.arange(2)
            cache = self.new_cache(self.rows, 0)
            end = torch.export.Dim("end", min=2, max=self.capacity - 1)
            block, names = self.packed_copy(transformer.h[0]), list(self.tensors(transformer.h[0]))

            def take_block(x, at, positions, keys, values, rope, weights):
                slots = Slots([keys], [values], at, positions.size(0))
                given = dict(zip(names, weights, strict=True))
                return torch.func.functional_call(block, given, (x, tuple(rope) or None, slots))

            _, rope = self.model.embed(torch.zeros(self.rows, 1, dtype=torch.long), at[:, None])
            rope = list(rope or ())
            example = (x, at, positions, cache.keys[0], cache.values[0], rope, self.layers[0])
            shapes = (None, None, {0: end}, None, None, [None] * len(rope), [None] * len(names))
            _build(self.paths[0], take_block, example, shapes)
            packed_head, head_names = self.packed_copy(head), list(self.tensors(head))

            def take_head(x, weights):
                return torch.func.functional_call(packed_head, dict(zip(head_names, weights, strict=True)), x)

            _build(self.paths[1], take_head, (x, self.head_weights), (None, [None] * len(head_names)))
        self.run_block, self.run_head = map(_load, self.paths)
        self.positions = torch.arange(self.capacity)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As GPT.step."""
        at = torch.tensor(cache.lengths)
        positions = self.positions[: max(cache.lengths) + 1]
        cache.lengths = [length + 1 for length in cache.lengths]
        x, rope = self.model.embed(tokens[:, None], at[:, None])
        for weights, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            (x,) = self.run_block([x, at, positions, keys, values, *(rope or ()), *weights])
        (logits,) = self.run_head([x, *self.head_weights])
        return logits[:, 0]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "quartzgpt"


def _cpu() -> str:
    """What tells processors apart that do not run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _build(path: Path, function: Callable, example: tuple, shapes: tuple) -> None:
    """Compiles `function` for arguments like `example` into a package at `path`."""

    class Traced(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's remarks on its own deprecations
        program = torch.export.export(Traced(), example, dynamic_shapes=(shapes,))
        from torch._inductor import aoti_compile_and_package

        os.replace(aoti_compile_and_package(program, package_path=os.path.join(folder, path.name)), path)


def _load(path: Path) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    try:  # what the public function does, without the second that importing the compiler takes
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
    except (AttributeError, TypeError):
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(path)).loader.run
