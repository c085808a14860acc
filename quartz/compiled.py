"""Faster engines: a compiled step with weights in fewer bits on CPUs, a CUDA graph on GPUs. `prepare` picks one.

A compiled step is two small packages of machine code, one for a block and one for the head, made by PyTorch's
ahead-of-time compiler from the model's own code and kept in ~/.cache/quartzgpt for every later run. Its logits
agree with those of the uncompiled step but for their last bits.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import model as model_module
import quartz.engine as engine_module
from model import GPT, CausalSelfAttention, GPTConfig
from quartz import machine
from quartz.engine import CPU, Engine, RowCache
from quartz.errors import UserError

MAX_COMPILED_ROWS = 8  # above, a matrix product does better than as many products of a matrix and a vector
COMPILE_SECONDS = 20.0  # what the first compilation takes on two cores, at most
SLOW_MEMORY = 20e9  # bytes/s that an uncompiled step reads, for the estimate of what compiling saves


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


class WrittenOutAttention(CausalSelfAttention):
    """Attention of one query a row, written out: in a compiled step it becomes loops of its own."""

    def shared(self, t: torch.Tensor) -> torch.Tensor:
        return t  # read where they are; torch 2.11 cannot trace the copies

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)  # (B, n_kv, heads of queries, …)
        scores = (q * k).sum(-1, keepdim=True).mT / math.sqrt(self.head_dim)  # (B, n_kv, heads of queries, 1, keys)
        weights = scores.masked_fill(~mask.unsqueeze(2), -math.inf).softmax(-1)
        return (weights.mT * v).sum(-2, keepdim=True).flatten(1, 2)


class Slots:
    """A cache in a step whose rows may differ in length: keys, values of each layer (B, n_kv, capacity, head_dim), of
    which the first `end` count; row b's new token stands at at[b]. Nothing in it depends on values, only on shapes.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], at: torch.Tensor, end: int):
        self.keys, self.values, self.at, self.end = keys, values, at, end
        self.rows = torch.arange(at.size(0), device=at.device)
        self.mask = (torch.arange(end, device=at.device) <= at[:, None])[:, None, None]  # (B, 1, 1, end)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """As KVCache.extend."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.at] = k[:, :, 0].to(keys.dtype)
        values[self.rows, :, self.at] = v[:, :, 0].to(values.dtype)
        return keys[:, :, : self.end], values[:, :, : self.end], self.mask


def prepare(
    model: GPT,
    place: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    rows: int,
    steps: int,
    may_compile: bool,
    gives_up: bool = False,
):
    """An engine on `place` for `rows` rows, of which `steps` steps are to be expected.

    With more than MAX_COMPILED_ROWS rows in bfloat16, on a CPU that computes in it, products are in bfloat16 too: that
    is twice as fast.
    """
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # where graphs are captured
    if place.type != "cpu":
        return (GraphedStep if place.type == "cuda" else Engine)(model, place, dtype, gives_up=gives_up)
    if dtype == torch.bfloat16 and not quantize and rows > MAX_COMPILED_ROWS and machine.cpu_has_bfloat16():
        return Engine(model, place, dtype, dtype, gives_up=gives_up)
    engine = Engine(model, place, torch.float32, dtype, quantize, gives_up)
    if may_compile and rows <= MAX_COMPILED_ROWS and model.config.block_size >= 4:
        try:
            step = CompiledStep(engine, rows)
            if step.is_compiled() or pays(model.get_num_params(), engine.kept.itemsize, steps):
                step.compile()
                return step
        except Exception as error:  # whatever a compiler or a folder that is missing, old or broken raises
            reason = machine.why_no_compiler(place) or f"{type(error).__name__}: {error}".split("\n")[0][:200]
            print(f"warning: the step can't be compiled ({reason}); going on without", file=sys.stderr)
    return engine


def check_quantize(quantize: str, device: str) -> None:
    """Raises UserError where weights in fewer bits are asked for, and would not be read as such."""
    if quantize and (place := machine.pick_device(device)).type != "cpu":
        raise UserError(f"quantize={quantize} is for CPUs, not for {place.type}: leave it out, or add --device=cpu")


def check_memory(config: GPTConfig, rows: int, length: int, place: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where the cache, and the logits with what is drawn from them, would not fit."""
    there, element = machine.available_memory(place), 4 if place.type == "cpu" else dtype.itemsize
    capacity = min(length, config.block_size)
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * capacity * element
    needed = rows * (cache + 8 * config.vocab_size * 4 + 3 * length * 4)
    if there is not None and needed > there:
        raise UserError(
            f"{rows} texts of {length} tokens need {needed / 2**30:.1f} GiB (a cache of {rows * cache / 2**30:.1f}), "
            f"and {there / 2**30:.1f} GiB are free: take fewer samples or prompts, or a smaller max_new_tokens"
        )


def pays(weights: int, each: int, steps: int) -> bool:
    """Whether compiling saves a run that reads so many weights, of `each` bytes, a quarter of its cost: then from the
    fourth such run on it has paid.
    """
    return steps * weights * (4 - 0.75 * each) / SLOW_MEMORY > COMPILE_SECONDS / 4


class GraphedStep(Engine):
    """An engine whose step is a CUDA graph: static shapes, one launch a token, nothing that waits for the GPU."""

    cache: RowCache | None = None  # the one that the graph was captured for

    def new_cache(self, rows: int, length: int) -> RowCache:
        """Its last position is nobody's: a step writes there for rows that it leaves as they are."""
        weight, config = self.model.lm_head.weight, self.model.config
        return RowCache(config, rows, min(length, config.block_size) + 1, weight.device, weight.dtype, threads=1)

    def refresh(self) -> None:
        super().refresh()
        self.cache = None  # weights may lie elsewhere now

    def compute(self) -> torch.Tensor:
        keys, values = self.cache.keys[:, 0], self.cache.values[:, 0]
        slots = Slots(keys, values, self.at, keys.size(3))
        position = self.at.clamp(max=self.model.config.block_size - 1)
        return self.model.lm_head(self.model._hidden(self.tokens[:, None], position[:, None], slots)[:, 0])

    def capture(self, cache: RowCache) -> None:
        self.cache, device = cache, cache.keys.device
        self.tokens = torch.zeros(cache.rows, dtype=torch.long, device=device)
        self.at = torch.full((cache.rows,), cache.keys.size(4) - 1, device=device)
        self.places = self.at.tolist()  # what `at` holds
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what kernels set up at their first call must not be captured
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread may load the next model meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self.compute()

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: RowCache, rows: list[int]) -> torch.Tensor:
        if self.cache is not cache:
            self.capture(cache)
        places, index = spread(cache, rows)
        if self.places != places:  # not just one further than before
            self.at.copy_(torch.tensor(places))
        if index is None:
            self.tokens.copy_(tokens)
        else:
            self.tokens[index] = tokens
        self.graph.replay()
        self.at += 1
        self.places = [place + 1 for place in places]
        return self.logits if index is None else self.logits[index]


def spread(cache: RowCache, rows: list[int]) -> tuple[list[int], torch.Tensor | None]:
    """For a step of all rows: where each row's token goes, and which rows count, or None if all do.

    What does not count goes to the cache's last position, where no text comes to.
    """
    if len(rows) == cache.rows:
        places, index = [*cache.lengths], None
    else:
        places = [cache.keys.size(4) - 1] * cache.rows
        for row in rows:
            places[row] = cache.lengths[row]
        index = torch.tensor(rows, device=cache.keys.device)
    for row in rows:
        cache.lengths[row] += 1
    return places, index


class CompiledStep:
    """An engine whose step, on a CPU and for a fixed number of rows, is machine code for a block and for the head."""

    def __init__(self, engine: Engine, rows: int):
        self.engine, self.model, self.rows = engine, engine.model, rows
        self.prefill, self.refill = engine.prefill, engine.refill
        self.capacity = self.model.config.block_size + 8  # more than any length: the tracer wants the two told apart
        what = [torch.__version__, self.model.config, rows, engine.kept, torch.get_num_threads(), _cpu()]
        what += [Path(file).read_bytes() for file in (__file__, engine_module.__file__, model_module.__file__)]
        key = hashlib.sha256("\n".join(map(repr, what)).encode()).hexdigest()[:16]
        self.paths = [cache_folder() / f"{part}-{key}.pt2" for part in ("block", "head")]

    def is_compiled(self) -> bool:
        """Whether the packages are there, and whole: machine code that is damaged would crash."""
        try:
            return all(zipfile.ZipFile(path).testzip() is None for path in self.paths)
        except (OSError, zipfile.BadZipFile, zlib.error):
            return False

    def new_cache(self, rows: int, length: int) -> RowCache:
        assert rows == self.rows, "compiled for another number of rows"
        return RowCache(self.model.config, rows, self.capacity, CPU, torch.float32, threads=1)

    def refresh(self) -> None:
        self.engine.refresh()
        self.take_weights()

    def take_weights(self) -> None:
        """Lays out the weights, packed, as the machine code wants them."""
        matrices = {part.weight for part in self.model.modules() if isinstance(part, nn.Linear)}
        self.packed = {weight: self.engine.packed(weight) for weight in matrices}
        self.layers = [list(self.tensors(block).values()) for block in self.model.transformer.h]
        self.head = nn.Sequential(self.model.transformer.ln_f, self.model.lm_head)
        self.head_weights = list(self.tensors(self.head).values())

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
        double = copy.deepcopy(module)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(double.get_submodule(parent), leaf, PackedLinear(*self.packed[part.weight], part.bias))
            elif isinstance(part, CausalSelfAttention):
                double.get_submodule(name).__class__ = WrittenOutAttention
        return double

    def compile(self) -> None:
        """Loads the two packages, after making them if need be."""
        c, transformer = self.model.config, self.model.transformer
        self.take_weights()
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
            example = (
                x,
                at,
                positions,
                cache.keys[0].flatten(0, 1),
                cache.values[0].flatten(0, 1),
                rope,
                self.layers[0],
            )
            shapes = (None, None, {0: end}, None, None, [None] * len(rope), [None] * len(names))
            _build(self.paths[0], take_block, example, shapes)
            packed_head, head_names = self.packed_copy(self.head), list(self.tensors(self.head))

            def take_head(x, weights):
                return torch.func.functional_call(packed_head, dict(zip(head_names, weights, strict=True)), x)

            _build(self.paths[1], take_head, (x, self.head_weights), (None, [None] * len(head_names)))
        self.run_block, self.run_head = map(_load, self.paths)
        self.positions = torch.arange(self.capacity)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: RowCache, rows: list[int]) -> torch.Tensor:
        """As Engine.step."""
        positions = self.positions[: max(cache.lengths[row] for row in rows) + 1]
        places, index = spread(cache, rows)
        at = torch.tensor(places)
        if index is not None:
            tokens = torch.zeros(self.rows, dtype=torch.long).index_copy(0, index, tokens)
        x, rope = self.model.embed(tokens[:, None], at.clamp(max=self.model.config.block_size - 1)[:, None])
        for weights, keys, values in zip(self.layers, cache.keys[:, 0], cache.values[:, 0], strict=True):
            (x,) = self.run_block([x, at, positions, keys, values, *(rope or ()), *weights])
        (logits,) = self.run_head([x, *self.head_weights])
        return logits[:, 0] if index is None else logits[index, 0]


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
