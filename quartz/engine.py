"""An engine: a model's weights, made ready to compute logits with for the rows of a decoder; the model is left alone.

Read it to see what a cache of many texts looks like, and why a text's bits do not depend on the rows beside it.
compiled.py has the faster engines, with the same methods: `new_cache`, `prefill`, `prefill_all`, `refill`, `step`, and
`refresh` for when the model's weights have changed. An engine has modules of its own, and its weights lie in the
model's memory where they are the same, so a model may be sampled from while it trains.

On CPUs sums, norms and embeddings are float32, and so are products, whatever the weights are kept in, unless `dtype`
is bfloat16. One token reads every weight once, so decoding is as fast as memory delivers them; but fewer bits are read
by a compiled step alone, and here weights have the values that those bits can hold, in float32.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, MLP, CausalSelfAttention, GPTConfig, RMSNorm
from quartz import lora
from quartz.kernels import heads_at_once

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LINEAR = torch.ops.mkldnn._linear_pointwise.default if HAS_ONEDNN else None
CPU = torch.device("cpu")
EIGHT = 8  # rows that are taken at a time by F.linear
LEAST = 4  # rows that oneDNN's product reads packed weights at full speed for; fewer take a third longer
ONEDNN_SIZE = 2**18  # weights from which on oneDNN's product beats its cost of dispatch
TRIED = (2, 3, LEAST, 8, 16, 33)  # numbers of rows, to see whether a product minds how many there are
FOUND: dict[tuple, bool] = {}  # what was seen, by the product's shape
LOGITS_ROWS = 64  # positions of a prompt whose logits are held at a time, where all are wanted
WIDTH = 16  # numbers that lie in memory alike, whatever row they are of
VECTOR = 32  # numbers that a kernel takes at a time: two vectors of 512 bits


# Tokens to be read, their row, how many stand before them, and what is given their logits
Part = tuple[Sequence[int], int, int, Callable[[torch.Tensor], None] | None]


class SteadyLinear(nn.Linear):
    """A linear layer on a CPU, in which a row's result has the same bits whatever other rows stand beside it.

    F.linear rounds a row otherwise where others stand beside it, but for most shapes not by how many eights of rows
    there are: so small layers take their rows in eights. Larger ones are quicker by oneDNN, where PyTorch has it, with
    the weight packed once as its kernels read it: a third to a half of F.linear's time. Each layer tries its product
    once, and one that fails takes a row at a time. A single row would be rounded in its own way, so it never is alone.
    In bfloat16 nothing is promised.
    """

    packed: torch.Tensor | None = None  # the weight in oneDNN's layout, made by `pack`
    is_steady = False  # whether its product minds no rows: known after `pack`

    def pack(self, gives_up: bool) -> None:
        """Makes the product of several rows ready, with a copy of the weight; in its place where that `gives_up`."""
        self.packed, self.is_steady = None, self.is_small() and self.minds_no_rows()
        if self.is_steady or not HAS_ONEDNN or self.weight.dtype not in (torch.float32, torch.bfloat16):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        self.is_steady = self.weight.dtype == torch.bfloat16 or self.minds_no_rows()
        if gives_up and self.is_steady and not self.is_small():
            self.weight.data = self.weight.new_empty(0)

    def is_small(self) -> bool:
        return self.weight.dtype == torch.float32 and self.in_features * self.out_features < ONEDNN_SIZE

    def minds_no_rows(self) -> bool:
        """Tries it, once for a shape: whether rows have the same bits among few and among many, wherever they stand."""
        shape = (self.in_features, self.out_features, self.bias is None, self.packed is None, torch.get_num_threads())
        if shape not in FOUND:
            x = torch.randn(max(TRIED) + 1, self.in_features, generator=torch.Generator().manual_seed(0))
            together = self.product(x)
            parts = [slice(start, start + rows) for rows in TRIED for start in (0, 1)]
            FOUND[shape] = all(torch.equal(self.product(x[part]), together[part]) for part in parts)
        return FOUND[shape]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Of rows (n, in_features), in the company that they need."""
        rows, bias = x.size(0), self.bias_of(x)
        if self.packed is None:
            missing = -rows % EIGHT
            return F.linear(F.pad(x, (0, 0, 0, missing)) if missing else x, self.weight, bias)[:rows]
        if rows < LEAST:
            x = x.expand(LEAST, -1) if rows == 1 else F.pad(x, (0, 0, 0, LEAST - rows))
        return LINEAR(x, self.packed, bias, "none", [], "")[:rows]

    def bias_of(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, T, in_features) or (n, in_features): of n texts, which mind each other in no way."""
        x = x.to(self.weight.dtype)
        if self.is_steady:
            return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        if x.size(0) > 1 and x.numel() > self.in_features:
            return torch.cat([self.forward(text.clone()) for text in x.split(1)])  # bits depend on where memory begins
        if self.packed is None and (self.is_small() or not HAS_ONEDNN or x.dtype != torch.float32):
            return F.linear(x, self.weight, self.bias_of(x))
        return LINEAR(x, self.weight if self.packed is None else self.packed, self.bias_of(x), "none", [], "")


def quick_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """model.rms_norm by a sum: of a few rows PyTorch takes the mean in five times a sum's time."""
    x = x.float()
    scale = x.square().sum(-1, keepdim=True).mul_(1 / x.size(-1)).add_(eps).rsqrt_()
    return (x * scale).mul_(weight.float())


class QuickRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quick_rms_norm(x, self.weight, self.eps).to(x.dtype)


class WideEmbedding(nn.Embedding):
    """What blocks add to is float32, where the matrix is the head's too and kept in fewer bits."""

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return super().forward(idx).float()


class SteadyMLP(MLP):
    """An MLP whose activations are taken row by row. They go over memory in vectors, and what remains at the end of a
    thread's share is rounded otherwise: that may be any row's, where its width is no multiple of a vector's.
    """

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(SteadyMLP, self).activate(row) for row in x.split(1)])


class RowsAttention(CausalSelfAttention):
    """Attention to a cache that does it itself. Queries and keys are normalised and rotated in one go."""

    def heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if rope is None:
            return super().heads(qkv, rope)
        return heads_at_once(self, qkv, rope, quick_rms_norm)

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

    def open_refill(self, rows: list[int], count: int) -> torch.Tensor:
        """Readies the cache for `count` tokens in each of the rows, in place of what they hold; returns positions."""
        self.stepped, self.row, self.filled, self.end = None, None, rows, count
        for row in rows:
            self.lengths[row] = count
        return torch.arange(count, device=self.keys.device)

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
        if self.stepped is None and self.row is None:
            for cache, its in zip(caches, (k, v), strict=True):
                its = its.unflatten(1, (self.groups, -1)).transpose(0, 1)
                cache[:, self.filled, :, : self.end] = its.to(cache.dtype)
            return k, v, self if self.keys.device.type == "cpu" else None
        if self.stepped is None:
            for cache, its in zip(caches, (k, v), strict=True):
                cache[:, self.row, :, self.start : self.end] = its[0].unflatten(0, (self.groups, -1))
            if not self.start:
                return k, v, None
            k, v = (placed(cache[:, self.row, :, : self.end].flatten(0, 1)[None]) for cache in caches)
            return k, v, self.mask
        for cache, its in zip(caches, (k, v), strict=True):
            its = its.view(-1, self.groups, cache.size(2), cache.size(4))  # (n, groups, heads, head_dim)
            if len(self.stepped) == 1:
                cache[:, self.stepped[0], :, self.end - 1] = its[0]
            elif self.is_even:
                cache.select(3, self.end - 1).copy_(its.transpose(0, 1))
            else:
                cache[:, self.index, :, self.at] = its.to(cache.dtype)
        if self.keys.device.type == "cpu":
            return *(cache.flatten(0, 1)[:, :, : self.end] for cache in caches), self
        k, v = (cache[0] if self.is_whole else cache[0, self.index] for cache in caches)
        return k[:, :, : self.end], v[:, :, : self.end], self.mask

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One query a row, (n, n_head, 1, head_dim), to k and v (groups * rows, n_head / groups, end, head_dim).

        Each at its row's own length: keys that are masked would change bits. In a refill text for text.
        """
        if self.stepped is None:
            one_by_one = zip(q.to(v.dtype).split(1), k.to(v.dtype).split(1), v.split(1), strict=True)
            return torch.cat([F.scaled_dot_product_attention(*map(placed, qkv), is_causal=True) for qkv in one_by_one])
        q = q.to(v.dtype).unflatten(1, (self.groups, -1)).transpose(0, 1)  # (groups, n, heads, 1, head_dim)
        if self.is_even and (self.groups == self.threads or self.rows == 1) and q.size(-1) % WIDTH == 0:
            y = F.scaled_dot_product_attention(q.flatten(0, 1), k, v).unflatten(0, (self.groups, -1))
        else:
            its = ([t[row :: self.rows, :, : self.lengths[row]] for t in (k, v)] for row in self.stepped)
            each = ((q[:, n], *kv) for n, kv in enumerate(its))
            y = torch.stack([F.scaled_dot_product_attention(*map(placed, qkv)) for qkv in each], dim=1)
        return y.transpose(0, 1).flatten(1, 2)

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


def placed(t: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values of one text (…, head_dim), for a product whose bits depend on where memory begins: that
    differs from row to row where head_dim is no multiple of WIDTH.
    """
    return t if t.size(-1) % WIDTH == 0 else t.clone()


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
        if any(isinstance(module, lora.LoRALinear) for module in model.modules()):
            raise ValueError("an engine takes a model without adapters beside its weights: merge them (quartz.lora)")
        self.source = None if gives_up else model
        self.is_packed = False  # whether `pack` was called
        self.model = (model if gives_up else twin(model)).eval()
        multiplied = {module.weight for module in self.model.modules() if isinstance(module, nn.Linear)}
        for p in self.model.parameters():
            p.data = p.data.to(place, dtype if p in multiplied or place.type != "cpu" else torch.float32)
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
        last = self.model.lm_head(x[0, -1:])[0]
        for start in range(0, len(idx), LOGITS_ROWS) if see else ():
            logits = self.model.lm_head(x[:, start : start + LOGITS_ROWS])[0]
            if start + LOGITS_ROWS >= len(idx):
                logits[-1] = last  # in the bits that it has where no others are asked for
            see(logits)
        return last

    def prefill_all(self, parts: list[Part], cache: RowCache) -> list[torch.Tensor]:
        """`prefill` for each of the parts, in their order."""
        return [self.prefill(tokens, cache, *rest) for tokens, *rest in parts]

    @torch.no_grad()
    def refill(self, texts: list[list[int]], cache: RowCache, rows: list[int]) -> torch.Tensor:
        """Reads texts of one length into rows, in place of what those held; returns the logits that follow, (n, V)."""
        idx = torch.tensor(texts, device=self.model.lm_head.weight.device)
        hidden = self.model._hidden(idx, cache.open_refill(rows, idx.size(1)), cache)
        return self.model.lm_head(hidden[:, -1])

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: RowCache, rows: list[int]) -> torch.Tensor:
        """Puts one token (n,) behind each of the given rows, and leaves the others as they are; returns the logits of
        those that follow, (n, V), which hold until the next step.
        """
        hidden = self.model._hidden(tokens[:, None], cache.open_step(rows)[:, None], cache)
        return self.model.lm_head(hidden[:, 0])


def install(model: GPT) -> None:
    """Has a model's modules, in place, compute each row with the same bits whatever rows stand beside it."""
    steady = {
        CausalSelfAttention: RowsAttention,
        nn.Linear: SteadyLinear,
        nn.Dropout: nn.Identity,
        nn.Embedding: WideEmbedding,
        RMSNorm: QuickRMSNorm,
    }
    if model.config.n_hidden % (VECTOR * math.lcm(*range(1, torch.get_num_threads() + 1))):  # of any number of shares
        steady[MLP] = SteadyMLP
    for module in model.modules():
        module.__class__ = next((new for old, new in steady.items() if isinstance(module, old)), type(module))


def twin(model: GPT) -> GPT:
    """A model with modules of its own, and weights in the same memory."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, weights)
