"""Faster engines: a compiled step with weights in fewer bits on CPUs, a CUDA graph on GPUs. `prepare` picks one.

The compiled step is quartz/step.c, translated once for a machine, whatever the model, and kept in ~/.cache/quartzgpt.
Its logits agree with those of the uncompiled step but for their last bits, and have the same bits whatever other rows
stand beside.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import nn

from model import GPT, GPTConfig
from quartz import machine, native
from quartz.engine import CPU, LOGITS_ROWS, Engine, Part, RowCache
from quartz.errors import UserError

MAX_EXACT_ROWS = 8  # more rows in bfloat16, in a step that is not compiled, are multiplied in bfloat16
COMPILE_SECONDS = 2.0  # what the compilation takes
SLOW_MEMORY = 20e9  # bytes/s that an uncompiled step reads, and
SLOW_LAYER = 150e-6  # seconds that it takes for a layer beside, for the estimate of what compiling saves
SHORT = 32  # tokens of a prompt that are read as those of so many texts, beside others
QUERIES = 32  # of a longer one that attend together, at the most


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

    In bfloat16, on a CPU that computes in it, what is multiplied is bfloat16 and sums are float32; but up to
    MAX_EXACT_ROWS rows of a step that is not compiled are multiplied in float32, which is faster.
    """
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # where graphs are captured
    if place.type != "cpu":
        return (GraphedStep if place.type == "cuda" else Engine)(model, place, dtype, gives_up=gives_up)
    library = None
    if may_compile:
        try:
            library = native.load("step", pays(model, 1 if quantize else dtype.itemsize, steps))
        except Exception as error:  # whatever a compiler or a folder that is missing, old or broken raises
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            print(f"warning: the step can't be compiled ({reason}); going on without", file=sys.stderr)
    in_half = dtype == torch.bfloat16 and not quantize and machine.cpu_has_bfloat16()
    in_half &= rows > MAX_EXACT_ROWS or library is not None
    engine = Engine(model, place, dtype if in_half else torch.float32, dtype, quantize, gives_up)
    return engine if library is None else CompiledStep(engine, library)


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


def pays(model: GPT, each: int, steps: int) -> bool:
    """Whether compiling saves a run of so many steps, with weights of `each` bytes, a quarter of its cost: from the
    fourth such run on it has paid.
    """
    saved = model.get_num_params() * (4 - 0.75 * each) / SLOW_MEMORY + model.config.n_layer * SLOW_LAYER
    return steps * saved > COMPILE_SECONDS / 4


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


# ----------------------------------------------------------------------------------------------------------------------
# quartz/step.c's structures


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Matrix(Structure):
    _fields_ = _fields(c_void_p, "weight scale bias") + _fields(c_int64, "outputs inputs kind")


class Norm(Structure):
    _fields_ = _fields(c_void_p, "weight bias")


class Layer(Structure):
    _fields_ = [
        *_fields(Norm, "ln_1 q_norm k_norm ln_2"),
        *_fields(Matrix, "attn attn_proj fc fc_proj"),
        *_fields(c_void_p, "keys values"),
    ]


class Network(Structure):
    _fields_ = [
        *_fields(c_int64, "n_layer n_head n_kv head_dim width hidden capacity threads is_gpt2"),
        ("eps", c_float),
        ("layers", POINTER(Layer)),
        ("ln_f", Norm),
        ("head", Matrix),
    ]


class Call(Structure):
    _fields_ = [
        ("n", c_int64),
        *_fields(c_void_p, "rows positions cos sin x h qkv y f scores"),
        *_fields(c_int64, "is_prompt m"),
        ("logits", c_void_p),
    ]


class CompiledStep:
    """An engine whose step, on a CPU, is machine code from the embeddings to the logits; that reads prompts too."""

    def __init__(self, engine: Engine, library: ctypes.CDLL):
        self.engine, self.model, self.compute = engine, engine.model, library.step
        # Of tiles of bfloat16 a library makes more than C here: then the engine reads prompts
        self.has_tiles = self.model.lm_head.weight.dtype == torch.bfloat16 and machine.cpu_has_amx()
        self.take_weights()

    def new_cache(self, rows: int, length: int) -> RowCache:
        config = self.model.config
        return RowCache(config, rows, min(length, config.block_size), CPU, torch.float32, threads=1)

    def refresh(self) -> None:
        self.engine.refresh()
        self.take_weights()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Notes where the weights lie, in the bits that they are kept in."""
        c, parts, self.held = self.model.config, self.model.transformer, []
        self.layers = (Layer * c.n_layer)()
        for layer, block in zip(self.layers, parts.h, strict=True):
            attn, mlp = block.attn, block.mlp
            layer.ln_1, layer.q_norm, layer.k_norm, layer.ln_2 = map(
                self.norm, (block.ln_1, attn.q_norm, attn.k_norm, block.ln_2)
            )
            layer.attn, layer.attn_proj, layer.fc, layer.fc_proj = map(
                self.matrix, (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
            )
        sizes = c.n_layer, c.n_head, c.n_kv_head, c.head_dim, c.n_embd, c.n_hidden, 0, 0, c.arch == "gpt2", c.norm_eps
        self.network = Network(*sizes, self.layers, self.norm(parts.ln_f), self.matrix(self.model.lm_head))
        self.cache, self.room = None, 0

    def place(self, tensor: torch.Tensor | None) -> int | None:
        """Where a tensor's numbers lie, which then stay."""
        if tensor is None:
            return None
        self.held.append(tensor.detach().contiguous())
        return self.held[-1].data_ptr()

    def norm(self, its: nn.Module | None) -> Norm:
        weights = (getattr(its, name, None) for name in ("weight", "bias"))
        return Norm(*(self.place(weight if weight is None else weight.float()) for weight in weights))

    def matrix(self, its: nn.Linear) -> Matrix:
        weight, scale = self.engine.packed(its.weight)
        places = [*map(self.place, (weight, scale, its.bias if its.bias is None else its.bias.float()))]
        if self.engine.source is None and not self.has_tiles and its.weight is not self.model.transformer.wte.weight:
            its.weight.data = its.weight.new_empty(0)  # the engine would read prompts with it
        return Matrix(*places, its.out_features, its.in_features, native.KINDS[weight.dtype])

    def ready(self, cache: RowCache, n: int) -> None:
        """Notes where a cache lies, and makes room for what is computed of n tokens."""
        net, c = self.network, self.model.config
        if cache is not self.cache or net.threads != torch.get_num_threads():
            self.cache, net.threads, net.capacity = cache, torch.get_num_threads(), cache.keys.size(4)
            for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
                layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            self.scores = torch.empty(net.threads, max(QUERIES, c.n_head // c.n_kv_head), net.capacity)
        if n > self.room:
            heads, others = c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim
            hidden = self.model.transformer.h[0].mlp.c_fc.out_features + c.n_hidden
            self.room = n
            self.between = [torch.empty(n, width) for width in (c.n_embd, heads + others, heads, hidden)]

    @torch.no_grad()
    def run(
        self,
        cache: RowCache,
        tokens: Sequence[int],
        rows: list[int],
        places: list[int],
        wanted: int,
        is_prompt: bool = False,
    ) -> torch.Tensor:
        """Puts tokens into places of rows; returns the logits that follow the last `wanted` of them, (wanted, V).

        is_prompt: they are a text's, one behind the other, and are multiplied in a way that is faster for many. Raises
        ValueError where they do not fit into the cache.
        """
        if max(places) >= cache.keys.size(4):
            raise ValueError(f"position {max(places)} does not fit into a cache of {cache.keys.size(4)}")
        self.ready(cache, len(rows))
        idx, at, position = (torch.as_tensor(its) for its in (tokens, rows, places))
        x, rope = self.model.embed(idx[:, None], position[:, None])
        x, logits = x.float().contiguous(), torch.empty(wanted, self.model.config.vocab_size)
        given = native.at(at, position, *(rope or (None, None)), x, *self.between, self.scores)
        self.compute(byref(self.network), byref(Call(len(rows), *given, is_prompt, wanted, *native.at(logits))))
        return logits

    def step(self, tokens: torch.Tensor, cache: RowCache, rows: list[int]) -> torch.Tensor:
        """As Engine.step."""
        places = [cache.lengths[row] for row in rows]
        for row in rows:
            cache.lengths[row] += 1
        return self.run(cache, tokens, rows, places, len(rows))

    def prefill(self, tokens: Sequence[int], cache: RowCache, row: int, start: int = 0, see: Callable | None = None):
        """As Engine.prefill."""
        return self.prefill_all([(tokens, row, start, see)], cache)[0]

    def prefill_all(self, parts: list[Part], cache: RowCache) -> list[torch.Tensor]:
        """As Engine.prefill_all. Short parts are read together, as a step of so many rows."""
        found, together = [], []
        for tokens, row, start, see in parts:
            is_long = len(tokens) > SHORT
            if is_long or sum(len(its) for its, *_ in together) + len(tokens) > LOGITS_ROWS:
                found += self.read(together, cache)
                together = []
            if not is_long:
                together.append((tokens, row, start, see))
                continue
            if self.has_tiles:
                self.engine.prefill(tokens[:-1], cache, row, start, see)
                found += self.read([(tokens[-1:], row, start + len(tokens) - 1, see)], cache)
                continue
            while see and len(tokens) > LOGITS_ROWS:
                self.read([(tokens[:LOGITS_ROWS], row, start, see)], cache, is_prompt=True)
                tokens, start = tokens[LOGITS_ROWS:], start + LOGITS_ROWS
            found += self.read([(tokens, row, start, see)], cache, is_prompt=True)
        return found + self.read(together, cache)

    def refill(self, texts: list[list[int]], cache: RowCache, rows: list[int]) -> torch.Tensor:
        """As Engine.refill."""
        return torch.stack([self.prefill(text, cache, row) for text, row in zip(texts, rows, strict=True)])

    def read(self, parts: list[Part], cache: RowCache, is_prompt: bool = False) -> list[torch.Tensor]:
        """Few tokens in all, or a prompt. Those whose logits are wanted come last."""
        if not parts:
            return []
        unwanted, wanted, counts = [], [], []
        for tokens, row, start, see in parts:
            cache.lengths[row] = start + len(tokens)
            its = [(token, row, start + n) for n, token in enumerate(tokens)]
            first = 0 if see else len(its) - 1
            unwanted += its[:first]
            wanted += its[first:]
            counts.append(len(its) - first)
        tokens, rows, places = map(list, zip(*unwanted, *wanted, strict=True))
        found = self.run(cache, tokens, rows, places, len(wanted), is_prompt).split(counts)
        for (*_, see), logits in zip(parts, found, strict=True):
            if see:
                see(logits)
        return [logits[-1] for logits in found]
