"""An engine: a model's weights, made ready to compute logits with for the rows of a decoder; the model is left alone.

Read it to see what a cache of many texts looks like, and why a text's bits do not depend on the rows beside it.
compiled.py has the faster engines, with the same four methods: `new_cache`, `prefill`, `step`, and `refresh` for when
the model's weights have changed. An engine has modules of its own, and its weights lie in the model's memory where they
are the same, so a model may be sampled from while it trains.

On CPUs arithmetic is in float32 whatever the weights are kept in. One token reads every weight once, so decoding is as
fast as memory delivers them; but fewer bits are read by a compiled step alone, and here weights have the values that
those bits can hold, in float32.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, MLP, CausalSelfAttention, GPTConfig

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CPU = torch.device("cpu")
ONEDNN_SIZE = 2**18  # weights from which on oneDNN's product of a single row beats its cost of dispatch
TRIED = (2, 3, 5, 8, 12, 16, 33, 65)  # numbers of rows, to see whether a product minds how many there are
LOGITS_ROWS = 64  # positions of a prompt whose logits are held at a time, where all are wanted
VECTOR = 32  # numbers that a kernel takes at a time: two vectors of 512 bits


class SteadyLinear(nn.Linear):
    """A linear layer on a CPU, in which a row's result has the same bits whatever other rows stand beside it.

    By oneDNN, where PyTorch has it, with the weight packed once as its kernels read it: a third to a half of the time
    of F.linear. What rounds a row otherwise where more stand beside it (F.linear, and oneDNN for some shapes in some
    releases) takes one row at a time. A single row is rounded in its own way: see Engine.step. In bfloat16 nothing is
    promised.
    """

    packed: torch.Tensor | None = None  # the weight in oneDNN's layout, made by `pack`
    is_steady = False

    def pack(self, gives_up: bool) -> None:
        """Makes the product of several rows ready, with a copy of the weight; in its place where that `gives_up`."""
        if not HAS_ONEDNN or self.weight.dtype not in (torch.float32, torch.bfloat16):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        self.is_steady = self.weight.dtype == torch.bfloat16 or self.minds_no_rows()
        if gives_up and self.is_steady and not self.is_small():
            self.weight.data = self.weight.new_empty(0)

    def is_small(self) -> bool:
        return self.in_features * self.out_features < ONEDNN_SIZE

    def minds_no_rows(self) -> bool:
        """Tries it: whether rows have the same bits among few and among many."""
        x = torch.randn(max(TRIED), self.in_features, generator=torch.Generator().manual_seed(0))
        together = self.product(x)
        return all(torch.equal(self.product(x[:rows]), together[:rows]) for rows in TRIED)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.packed is None else self.packed
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, 1, in_features) or (n, in_features) in a step of n rows, (1, T, in_features) of a prompt."""
        if len(x) > 1 and not self.is_steady:
            return torch.cat([self.forward(row) for row in x.split(1)])
        is_single = x.numel() == self.in_features
        if not HAS_ONEDNN or (is_single and self.is_small()) or (self.packed is None and x.dtype != torch.float32):
            return super().forward(x)
        return self.product(x)


class SteadyMLP(MLP):
    """An MLP whose activations are taken row by row. They go over memory in vectors, and what remains at the end of a
    thread's share is rounded otherwise: that may be any row's, where its width is no multiple of a vector's.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(SteadyMLP, self).activate(row) for row in x.split(1)])


class RowsAttention(CausalSelfAttention):
    """Attention to a cache that does it itself."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
        return mask.attend(q, k, v) if isinstance(mask, RowCache) else super().attend(q, k, v, mask)


class RowCache:
    """Keys and values of texts of different lengths: of row r, lengths[r] positions are filled.

    keys, values: (n_layer, groups, rows, n_kv / groups, capacity, head_dim). There are as many groups of heads as
    threads, if the heads can be shared out so. Attention goes over the threads in the order of this memory, and its
    bits depend on which thread computes a head: so it is the same one for a single row and for many.
    """

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype, threads: int
    ):
        self.rows, self.threads = rows, threads
        self.groups = 1 if config.n_kv_head % threads else threads
        heads = (self.groups, rows, config.n_kv_head // self.groups)
        shape = (config.n_layer, *heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # zeros: a masked value counts 0 times, and 0 x NaN
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # would be NaN
        self.lengths = [0] * rows

    def open_prefill(self, row: int, start: int, count: int) -> torch.Tensor:
        """Readies the cache for `count` tokens of a row, behind its first `start`; returns their positions."""
        self.stepped, self.row, self.start, self.end = None, row, start, start + count
        positions = torch.arange(start, self.end, device=self.keys.device)
        self.mask = (torch.arange(self.end, device=self.keys.device) <= positions[:, None]) if start else None
        self.lengths[row] = self.end
        return positions

    def open_step(self, rows: list[int]) -> torch.Tensor:
        """Readies the cache for one more token in each of the rows; returns their positions (n,)."""
        lengths = [self.lengths[row] for row in rows]
        self.stepped, self.end, device = rows, max(lengths) + 1, self.keys.device
        self.is_whole = len(rows) == self.rows
        self.is_even = self.is_whole and min(lengths) == max(lengths)
        self.at, self.index = torch.tensor(lengths, device=device), torch.tensor(rows, device=device)
        if device.type != "cpu":
            self.mask = (torch.arange(self.end, device=device) <= self.at[:, None])[:, None, None]  # (n, 1, 1, end)
        for row in rows:
            self.lengths[row] += 1
        return self.at

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """As KVCache.extend; in place of a mask comes the cache itself where it attends."""
        caches = self.keys[layer], self.values[layer]  # (groups, rows, heads, capacity, head_dim)
        if self.stepped is None:
            for cache, its in zip(caches, (k, v), strict=True):
                cache[:, self.row, :, self.start : self.end] = its[0].unflatten(0, (self.groups, -1))
            if not self.start:
                return k, v, None
            k, v = (cache[:, self.row, :, : self.end].flatten(0, 1)[None] for cache in caches)
            return k, v, self.mask
        for cache, its in zip(caches, (k, v), strict=True):
            its = its[: len(self.stepped), :, 0].unflatten(1, (self.groups, -1))  # (n, groups, heads, head_dim)
            if self.is_even:
                cache[:, :, :, self.end - 1] = its.transpose(0, 1)
            else:
                cache[:, self.index, :, self.at] = its.to(cache.dtype)
        if self.keys.device.type == "cpu":
            return *(cache.flatten(0, 1)[:, :, : self.end] for cache in caches), self
        k, v = (cache[0] if self.is_whole else cache[0, self.index] for cache in caches)
        return k[:, :, : self.end], v[:, :, : self.end], self.mask

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One query a row, (n, n_head, 1, head_dim), to k and v (groups * rows, n_head / groups, end, head_dim).

        Each at its row's own length: keys that are masked would change bits.
        """
        n = len(self.stepped)
        copies = len(q) // n  # 2 where the only row is computed beside itself
        q = q[:n].to(v.dtype).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, n, heads, 1, head_dim)
        if self.is_even and (self.groups == self.threads or self.rows == 1):
            y = F.scaled_dot_product_attention(q.flatten(0, 1), k, v).unflatten(0, (self.groups, -1))
        else:
            its = ([t[row :: self.rows, :, : self.lengths[row]] for t in (k, v)] for row in self.stepped)
            y = torch.stack([F.scaled_dot_product_attention(q[:, i], *kv) for i, kv in enumerate(its)], dim=1)
        y = y.transpose(0, 1).flatten(1, 2)
        return y if copies == 1 else y.repeat(copies, 1, 1, 1)

    def copy(self, row: int, others: list[int], length: int) -> None:
        """Gives other rows the first `length` positions of a row."""
        for cache in (self.keys, self.values):
            for other in others:
                cache[:, :, other, :, :length] = cache[:, :, row, :, :length]
        for other in others:
            self.lengths[other] = length

    def part(self, row: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a row's keys and values from one position to another, for `put_back`."""
        return self.keys[:, :, row, :, start:end].clone(), self.values[:, :, row, :, start:end].clone()

    def put_back(self, row: int, start: int, part: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Writes a part, of any row, where it stood in its text."""
        for cache, its in zip((self.keys, self.values), part, strict=True):
            cache[:, :, row, :, start : start + its.size(3)] = its


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) -> int8 (N, K) and float32 scale (N,): each row's largest magnitude becomes 127."""
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Engine:
    """A model's weights, ready to be decoded with; the model is left as it is, and may go on training.

    place, dtype: where it computes, and in what. kept: the dtype whose values matrices are rounded to; quantize: to
    those of int8 with a scale a row. gives_up: the model is needed no more, so that its own weights are made ready,
    which saves the memory of others; then there is no `refresh`.
    """

    def __init__(
        self,
        model: GPT,
        place: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        kept: torch.dtype = torch.float32,
        quantize: bool = False,
        gives_up: bool = False,
    ):
        self.source, self.is_packed = None if gives_up else model, False
        self.model = (model if gives_up else twin(model)).eval().to(place, dtype)
        self.kept, self.quantize = torch.int8 if quantize else kept, quantize
        self.scales: dict[nn.Parameter, torch.Tensor] = {}  # of weights in int8
        if place.type == "cpu":
            install(self.model)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Gives matrices the values that the bits they are kept in can hold."""
        matrices = {module.weight for module in self.model.modules() if isinstance(module, nn.Linear)}
        for weight in matrices:
            if self.quantize:
                small, self.scales[weight] = quantize_rows(weight)
                weight.data = small * self.scales[weight][:, None]
            elif self.kept.itemsize < weight.dtype.itemsize:
                weight.data = weight.to(self.kept).to(weight.dtype)

    def packed(self, weight: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A matrix in the bits that it is kept in, and its scale a row for int8."""
        scale = self.scales.get(weight)
        weight = weight.detach()
        return (weight.to(self.kept), None) if scale is None else ((weight / scale[:, None]).round().char(), scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the weights of the model that this engine was made from, after they have changed."""
        if self.source is None:
            raise ValueError("an engine whose model was given up can't be refreshed")
        for mine, theirs in zip(self.model.parameters(), self.source.parameters(), strict=True):
            if (mine.device, mine.dtype) == (theirs.device, theirs.dtype):
                mine.data = theirs.detach()
            else:
                mine.copy_(theirs)
        self.round()
        if self.is_packed:
            self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Has matrices lie as products of several rows read them, on CPUs: see SteadyLinear."""
        embedding, self.is_packed = self.model.transformer.wte.weight, True
        for module in self.model.modules():
            if isinstance(module, SteadyLinear):
                module.pack(gives_up=self.source is None and module.weight is not embedding)

    def new_cache(self, rows: int, length: int) -> RowCache:
        """An empty cache for `rows` texts of up to `length` tokens, in the dtype that attention computes in.

        On CPUs that is float32: in bfloat16 attention to a cache takes several times as long.
        """
        weight, config = self.model.lm_head.weight, self.model.config
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
        if not self.is_packed and rows > 1:
            self.pack()
        return RowCache(config, rows, min(length, config.block_size), weight.device, dtype, threads)

    @torch.no_grad()
    def prefill(
        self,
        tokens: Sequence[int],
        cache: RowCache,
        row: int,
        start: int = 0,
        see: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Reads tokens into a row of the cache, behind its first `start`, in place of what it held there. Returns the
        logits of the token that follows, (V,). There may be block_size tokens in all.

        see: is given the logits that follow each of the tokens, in their order, (up to LOGITS_ROWS, V) at a time.
        """
        idx = torch.as_tensor(tokens, device=self.model.lm_head.weight.device)
        x = self.model._hidden(idx[None], cache.open_prefill(row, start, len(idx)), cache)
        for few in x.split(LOGITS_ROWS, dim=1) if see else ():
            see(self.model.lm_head(few)[0])
        return self.model.lm_head(x[0, -1:])[0]

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: RowCache, rows: list[int]) -> torch.Tensor:
        """Puts one token (n,) behind each of the given rows, and leaves the others as they are; returns the logits of
        those that follow, (n, V), which hold until the next step.
        """
        position = cache.open_step(rows)
        if len(rows) == 1 < cache.rows and position.device.type == "cpu":  # beside itself, as it would be beside others
            tokens, position = tokens.repeat(2), position.repeat(2)
        hidden = self.model._hidden(tokens[:, None], position[:, None], cache)
        return self.model.lm_head(hidden[:, 0])[: len(rows)]


def install(model: GPT) -> None:
    """Has a model's modules, in place, compute each row with the same bits whatever rows stand beside it."""
    steady = {nn.Linear: SteadyLinear}
    if model.config.n_hidden % (VECTOR * torch.get_num_threads()):
        steady[MLP] = SteadyMLP
    for module in model.modules():
        is_attention = isinstance(module, CausalSelfAttention)
        module.__class__ = RowsAttention if is_attention else steady.get(type(module), type(module))


def twin(model: GPT) -> GPT:
    """A model with modules of its own, and weights in the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, weights)
