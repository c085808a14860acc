"""Faster ways on CPUs to compute what model.py says plainly, installed into a model from outside by `install`.

Read it when a training step on a CPU is too slow, or after a change of model.py's Block or of its parts: what is here
stands in for them while a model trains, and tests/test_kernels.py says where the two no longer agree. Under
torch.compile and on other devices a module computes what model.py says, but for the norm's own backward pass there.

Where there is a C compiler, there are two ways. In bfloat16, on processors that multiply it in vectors (AVX512-BF16), a
block as a whole is quartz/block.c's, but in evaluation with gradients, and Muon's steps are quartz/muon.c's; a small
network with a small vocabulary is quartz/network.c's from its tokens to its loss. Where a library multiplies faster
(AMX), in float32, or where one of a block's parts is not model.py's own, products are PyTorch's; what comes between
them is quartz/passes.c's, and attention in bfloat16 quartz/attention.c's, while a model trains.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from model import GPT, MLP, Block, CausalSelfAttention, LayerNorm, RMSNorm, rotate
from quartz import native
from quartz.native import KINDS, at

BLOCKS = 64  # parts in which it sums over rows


def install(model: nn.Module) -> None:
    """Has the modules of a GPT, in place, take the faster ways where there are any; weights and their names stay."""
    for module in model.modules():
        module.__class__ = FASTER.get(type(module), type(module))


def trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class RMSNormInTraining(torch.autograd.Function):
    """rms_norm in fewer passes over memory than autograd would take, a fifth of the time on CPUs."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square_() / x.size(-1) + eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        unit, scale, weight = ctx.saved_tensors
        along = grad * unit
        grad_weight = along.sum_to_size(weight.shape)
        mean = (along * weight).mean(-1, keepdim=True)
        return (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale), grad_weight, None


@functools.cache
def in_c() -> ctypes.CDLL | None:
    """quartz/training.c, all of it; None where it can't be compiled, and kept."""
    try:
        return native.load("training", may_compile=True)
    except Exception:  # whatever a compiler or a folder that is missing, old or broken raises
        return None


def in_passes(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in KINDS and in_c() is not None


def floats(*shape: int) -> torch.Tensor:
    """Memory for C, whatever dtype and device new tensors have by default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in (torch.get_num_threads(), *numbers)]


class NormInPasses(torch.autograd.Function):
    """RMSNormInTraining of float32 in one pass each way; the result in `dtype`, whose product is to follow."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype):
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = torch.empty(x.shape, dtype=dtype), floats(*x.shape[:-1])
        numbers = sizes(KINDS[dtype], scale.numel(), x.size(-1))
        in_c().norm_forward(*numbers, ctypes.c_float(eps), *at(x, weight, scale, y))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, grad_x, parts = grad.contiguous(), torch.empty_like(x), floats(BLOCKS, x.size(-1)).zero_()
        numbers = sizes(KINDS[grad.dtype], scale.numel(), x.size(-1))
        in_c().norm_backward(*numbers, *at(x, weight, scale, grad, grad_x, parts))
        return grad_x, parts.sum(0), None, None


def wanted_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a norm's result is wanted by the product that follows."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class FastRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not trains(self):
            return super().forward(x)
        fits = self.weight.shape == x.shape[-1:] and self.weight.device == x.device
        if fits and in_passes(x) and wanted_dtype(x) in KINDS:
            return NormInPasses.apply(x.float(), self.weight.float(), self.eps, wanted_dtype(x))
        return RMSNormInTraining.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)


class SwiGLUInPasses(torch.autograd.Function):
    """silu(gate) * up, x (…, 2 n_hidden) holding both."""

    @staticmethod
    def forward(ctx, x: torch.Tensor):
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], x.size(-1) // 2, dtype=x.dtype)
        in_c().swiglu_forward(*sizes(KINDS[x.dtype], y.numel() // y.size(-1), y.size(-1)), *at(x, y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        numbers = sizes(KINDS[x.dtype], grad.numel() // grad.size(-1), grad.size(-1))
        in_c().swiglu_backward(*numbers, *at(x, grad, grad_x))
        return grad_x


class GELUInPasses(torch.autograd.Function):
    """F.gelu(x, approximate="tanh")"""

    @staticmethod
    def forward(ctx, x: torch.Tensor):
        x = x.contiguous()
        y = torch.empty_like(x)
        in_c().gelu_forward(*sizes(KINDS[x.dtype], x.numel()), *at(x, y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        in_c().gelu_backward(*sizes(KINDS[x.dtype], x.numel()), *at(x, grad, grad_x))
        return grad_x


class FastMLP(MLP):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if not (trains(self) and in_passes(x)):
            return super().activate(x)
        return (SwiGLUInPasses if self.is_gated else GELUInPasses).apply(x)


def share(p: float) -> tuple[int, float]:
    """Dropout with probability p: how many of 2^16 are dropped, and what the others are multiplied by."""
    return min(round(p * 2**16), 2**16 - 1), 1 / (1 - p)


def new_seed() -> int:
    """From PyTorch's generator."""
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None).item()


class DropoutInPasses(torch.autograd.Function):
    """Dropout whose mask is a hash of each number's place, and never stored; to 1/65536 with probability p."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, p: float, seed: int):
        ctx.drawn = seed, *share(p)
        return DropoutInPasses.masked(x, *ctx.drawn)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return DropoutInPasses.masked(grad, *ctx.drawn), None, None

    @staticmethod
    def masked(x: torch.Tensor, seed: int, dropped: int, kept: float) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        in_c().dropout(*sizes(KINDS[x.dtype], x.numel(), seed, dropped), ctypes.c_float(kept), *at(x, y))
        return y


class FastDropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.p and in_passes(x) and not torch.compiler.is_compiling():
            return DropoutInPasses.apply(x, self.p, new_seed())  # without gradients too: see AttentionInC
        return super().forward(x)


class Attention(ctypes.Structure):
    """quartz/attention.c's struct attention."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "batch", "n_head", "n_kv", "length", "head_dim")),
        *((name, ctypes.c_int64) for name in ("dropped", "seed")),
        ("kept", ctypes.c_float),
        ("strides", ctypes.c_int64 * 3 * 6),
    ]

    def call(self, name: str, *tensors: torch.Tensor) -> None:
        library = in_c()
        library.scratch.restype = ctypes.c_int64
        work = floats(self.threads, library.scratch(ctypes.byref(self)))
        getattr(library, name)(ctypes.byref(self), *at(*tensors, work))


def attention_of(
    threads, B, n_head, n_kv, T, head_dim, drawn: tuple[int, float], seed: int, strides: list
) -> Attention:
    rows = (ctypes.c_int64 * 3 * 6)(*((ctypes.c_int64 * 3)(*its) for its in strides))
    return Attention(threads, B, n_head, n_kv, T, head_dim, drawn[0], seed, drawn[1], rows)


class AttentionInC(torch.autograd.Function):
    """Causal attention in bfloat16: half the time of torch's operations, and no weights are kept.

    Without gradients too, for what checkpoints recompute has to draw the same dropout with them.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, seed: int):
        """q (B, n_head, T, head_dim), k and v (B, n_kv, …) -> (B, n_head, T, head_dim), which lies in memory as
        (B, T, n_head, head_dim), as the product that follows wants it.
        """
        q, k, v = (t.contiguous() for t in (q, k, v))
        (B, n_head, T, D), drawn = q.shape, share(dropout)
        strides = [t.stride()[:3] for t in (q, k, v)] * 2
        ctx.attention = attention_of(torch.get_num_threads(), B, n_head, k.size(1), T, D, drawn, seed, strides)
        y, logs = torch.empty(B, T, n_head, D, dtype=q.dtype), floats(B, n_head, T)
        ctx.attention.call("attention_forward", q, k, v, y, logs)
        ctx.save_for_backward(q, k, v, y, logs)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        saved = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in saved[:3]]
        ctx.attention.call("attention_backward", *saved, grad.transpose(1, 2).contiguous(), *grads)
        return *grads, None, None


def heads_at_once(attention: CausalSelfAttention, qkv: torch.Tensor, rope, rms_norm: Callable):
    """What CausalSelfAttention.heads gives, of a model with rotary positions: queries and keys are normalised, by
    rms_norm(x, weight, eps) of float32, and rotated in one go.
    """
    n_head, n_kv = attention.n_head, attention.n_kv
    qk, v = qkv.split((n_head + n_kv, n_kv), dim=2)
    if attention.q_norm is not None:
        norms = (attention.q_norm.weight.expand(n_head, -1), attention.k_norm.weight.expand(n_kv, -1))
        qk = rms_norm(qk.float(), torch.cat(norms).float(), attention.q_norm.eps)
    q, k = rotate(qk.float(), rope).split((n_head, n_kv), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Heads(ctypes.Structure):
    """quartz/passes.c's struct heads."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("threads", "kind", "batch", "length", "n_head", "n_kv", "head_dim")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q_weight", "k_weight", "cos", "sin")),
    ]


class HeadsInPasses(torch.autograd.Function):
    """heads_at_once, in qkv's dtype: q, k, v (B, heads, T, head_dim); without tables laid out so, and no more."""

    @staticmethod
    def forward(
        ctx, qkv: torch.Tensor, q_weight, k_weight, eps: float, cos: torch.Tensor, sin: torch.Tensor, n_head, n_kv
    ):
        qkv = qkv.contiguous()
        (B, T, _, D), given = qkv.shape, (q_weight, k_weight, cos, sin)
        numbers = torch.get_num_threads(), KINDS[qkv.dtype], B, T, n_head, n_kv, D
        ctx.heads = Heads(*numbers, eps, *at(*given))
        q, k, v = (torch.empty(B, heads, T, D, dtype=qkv.dtype) for heads in (n_head, n_kv, n_kv))
        scale = floats(B, T, n_head + n_kv)
        in_c().heads_forward(ctypes.byref(ctx.heads), *at(qkv, scale, q, k, v))
        ctx.save_for_backward(qkv, scale, *given)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        qkv, scale, q_weight, k_weight, cos, sin = ctx.saved_tensors
        ctx.heads.q_weight, ctx.heads.k_weight, ctx.heads.cos, ctx.heads.sin = at(q_weight, k_weight, cos, sin)
        grads, parts = [grad.contiguous() for grad in grads], floats(BLOCKS, 2, qkv.size(-1)).zero_()
        grad_qkv = torch.empty_like(qkv)
        in_c().heads_backward(ctypes.byref(ctx.heads), *at(qkv, scale, *grads, grad_qkv, parts))
        return grad_qkv, *(parts.sum(0) if q_weight is not None else (None, None)), *(None,) * 5


def tables_of(rope, T: int, head_dim: int) -> list[torch.Tensor | None] | None:
    """Cosines and sines as C takes them, (T, head_dim), or two None without rotations. None where rows have positions
    of their own, or tables are of another dtype.
    """
    if rope is None:
        return [None, None]
    fits = all(table.numel() == T * head_dim and table.dtype == torch.float32 for table in rope)
    return [table.reshape(T, head_dim) for table in rope] if fits else None


class FastAttention(CausalSelfAttention):
    def heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not trains(self):
            return super().heads(qkv, rope)
        tables = tables_of(rope, qkv.size(1), self.head_dim)
        if tables and in_passes(qkv) and self.head_dim <= 1024:
            norms = (None, None, 0.0)
            if self.q_norm is not None:
                norms = self.q_norm.weight.float(), self.k_norm.weight.float(), self.q_norm.eps
            return HeadsInPasses.apply(qkv, *norms, *tables, self.n_head, self.n_kv)
        return super().heads(qkv, rope) if rope is None else heads_at_once(self, qkv, rope, RMSNormInTraining.apply)

    def shared(self, t: torch.Tensor) -> torch.Tensor:
        return t  # as attention in C takes it

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        fits = mask is None and q.size(2) == k.size(2) and self.head_dim % 16 == 0
        fits = fits and v.device.type == "cpu" and v.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if fits and self.training and in_c() is not None:
            seed = new_seed() if self.dropout else 0
            return AttentionInC.apply(q.to(v.dtype), k.to(v.dtype), v, self.dropout, seed)
        return super().attend(q, super().shared(k), super().shared(v), mask)


POINTERS, GRADIENTS = 16, 14  # of what a block is given, and of what it gives back


class BlockStruct(ctypes.Structure):
    """quartz/block.c's struct block. given: weights and biases of the four linear layers, those of the two norms."""

    _fields_ = [
        ("heads", Heads),
        ("attention", Attention),
        *((name, ctypes.c_int64) for name in ("width", "hidden", "is_gated", "is_centred", "dropped")),
        ("seeds", ctypes.c_int64 * 2),
        *((name, ctypes.c_float) for name in ("kept", "eps")),
        ("given", ctypes.c_void_p * 12),
    ]

    def point_to(self, tensors: list[torch.Tensor | None]) -> None:
        """tensors: what `given` says; weights of the norms of queries and keys, cosines and sines."""
        self.place(pointers(tensors))

    def place(self, where: list[int | None]) -> None:
        heads = self.heads
        self.given, (heads.q_weight, heads.k_weight, heads.cos, heads.sin) = tuple(where[:12]), where[12:]

    def needs(self, count: int) -> list[int]:
        """How many floats so many such blocks keep for a backward pass, and without one; and that they work in, both
        ways. A template remembers it.
        """
        known = self.__dict__.setdefault("known", {})
        if count not in known:
            known[count] = (ctypes.c_int64 * 4)()
            in_c().blocks_sizes((BlockStruct * count)(*[self] * count), ctypes.c_int64(count), known[count])
        return known[count]


def pointers(tensors: Iterable[torch.Tensor | None]) -> list[int | None]:
    return [t if t is None else t.data_ptr() for t in tensors]


class BlocksInC(torch.autograd.Function):
    """Blocks of the network that are alike, one behind the other, x (B, T, C) float32, their products in bfloat16."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, template: BlockStruct, structs, keeps: bool, *tensors: torch.Tensor | None):
        """structs: a copy of the template for each block, with its seeds. tensors: POINTERS for each, see
        BlockStruct.point_to; keeps: whether a backward pass may come.
        """
        tensors, x, count = [t if t is None else t.contiguous() for t in tensors], x.contiguous(), len(structs)
        ctx.structs, ctx.needs = structs, template.needs(count)
        BlocksInC.point_to(structs, tensors)
        y, kept, work = torch.empty_like(x), floats(ctx.needs[not keeps]), floats(ctx.needs[2])
        in_c().blocks_forward(structs, ctypes.c_int64(count), ctypes.c_int64(keeps), *at(x, y, kept, work))
        ctx.save_for_backward(*([x, kept] if keeps else []), *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, kept, *tensors = (t if t is None else t.contiguous() for t in ctx.saved_tensors)
        structs, grad = ctx.structs, grad.contiguous()
        BlocksInC.point_to(structs, tensors)
        (grads, to), grad_x, work = BlocksInC.new_gradients(tensors), torch.empty_like(x), floats(ctx.needs[3])
        in_c().blocks_backward(structs, ctypes.c_int64(len(structs)), *at(x, kept, grad, grad_x), to, *at(work))
        return grad_x, None, None, None, *grads

    @staticmethod
    def point_to(structs, tensors: list[torch.Tensor | None]) -> None:
        for nth, struct in enumerate(structs):
            struct.point_to(tensors[POINTERS * nth : POINTERS * (nth + 1)])

    @staticmethod
    def new_gradients(tensors: list[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], ctypes.Array]:
        """Of all tensors but cosines and sines, and where they lie."""
        grads = [t if t is None or n % POINTERS >= GRADIENTS else torch.empty_like(t) for n, t in enumerate(tensors)]
        wheres = [where for n, where in enumerate(pointers(grads)) if n % POINTERS < GRADIENTS]
        return grads, (ctypes.c_void_p * len(wheres))(*wheres)


ENDS = 5  # tensors of a network outside of its blocks


class NetworkStruct(ctypes.Structure):
    """quartz/network.c's struct network. ends: embeddings, positions, head, and the last norm's weight and bias."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "vocab", "seed")),
        *((name, ctypes.c_void_p) for name in ("idx", "targets", "factors")),
        ("ends", ctypes.c_void_p * ENDS),
    ]


class NetworkInC(torch.autograd.Function):
    """The loss of a whole network, ids (B, T) given; see GPT.forward."""

    @staticmethod
    def forward(ctx, divisor, keeps: bool, network: NetworkStruct, structs, ids: list, *tensors):
        """ids: idx, targets and factors, or None; tensors: ENDS of them, and POINTERS for each of the structs."""
        tensors, library = [t if t is None else t.contiguous() for t in tensors], in_c()
        NetworkInC.point_to(network, structs, ids, tensors)
        ctx.needs = (ctypes.c_int64 * 4)()
        library.network_sizes(ctypes.byref(network), structs, ctx.needs)
        kept, work, sums = floats(ctx.needs[not keeps]), floats(ctx.needs[2]), (ctypes.c_double * 2)()
        places = at(kept, work)
        if library.network_forward(ctypes.byref(network), structs, ctypes.c_int64(keeps), *places, sums):
            raise IndexError("a token is not in the vocabulary")
        ctx.network, ctx.structs = network, structs
        by = sums[1] if divisor is None else divisor
        ctx.divisor = by or (1 if divisor is None else math.nan)  # without targets gradients are zero
        ctx.save_for_backward(*([kept] if keeps else []), *ids, *tensors)
        return torch.tensor(sums[0] / by if by else math.nan, dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if torch.is_grad_enabled():  # once_differentiable sees nothing of a loss's own gradient, which is one
            raise RuntimeError("create_graph: the loss of a network in C can't be differentiated twice")
        kept, *saved = (t if t is None else t.contiguous() for t in ctx.saved_tensors)
        ids, tensors, work = saved[:3], saved[3:], floats(ctx.needs[3])
        NetworkInC.point_to(ctx.network, ctx.structs, ids, tensors)
        ends = [t if t is None else torch.zeros_like(t) for t in tensors[:ENDS]]  # later positions stay at zero
        grads, to = BlocksInC.new_gradients(tensors[ENDS:])
        scale, of_ends = ctypes.c_float(grad.item() / ctx.divisor), (ctypes.c_void_p * ENDS)(*pointers(ends))
        places = ctypes.byref(ctx.network), ctx.structs, *at(kept), scale, of_ends, to, *at(work)
        in_c().network_backward(*places)
        return *(None,) * 5, *ends, *grads

    @staticmethod
    def point_to(network: NetworkStruct, structs, ids: list, tensors: list[torch.Tensor | None]) -> None:
        network.idx, network.targets, network.factors = pointers(ids)
        wheres = pointers(tensors[:ENDS])
        wheres[2] = wheres[2] or wheres[0]  # a head that is tied
        network.ends = tuple(wheres)
        BlocksInC.point_to(structs, tensors[ENDS:])


PIECE = 2**14  # numbers of which passes.c takes one sum
FLOATS = {(torch.Tensor, torch.float32, True, True)}  # gradients that C takes


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_, in a pass or two over all gradients in place of two over each."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    kinds = {(g.__class__, g.dtype, g.is_cpu, g.is_contiguous()) for g in grads}
    if not grads or not kinds <= FLOATS or in_c() is None:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    n, lengths = len(grads), [g.numel() for g in grads]
    sums = torch.empty(sum(lengths) // PIECE + n, dtype=torch.float64)
    arrays, lengths = (ctypes.c_void_p * n)(*pointers(grads)), (ctypes.c_int64 * n)(*lengths)
    clip = in_c().clip
    clip.restype = ctypes.c_double
    return torch.tensor(clip(*sizes(n), arrays, lengths, ctypes.c_double(limit), *at(sums)), dtype=torch.float32)


def newton_schulz(x: torch.Tensor, quintic: tuple[float, float, float], steps: int) -> bool:
    """Takes quartz/optim.py's steps with x (n, rows, columns) in place, if that is faster so; tells whether it did."""
    n, rows, columns = x.shape
    threads = torch.get_num_threads()
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous()
    if not (fits and rows % 16 == columns % 16 == 0 and block_pays()):
        return False
    work = floats(threads, in_c().newton_schulz_work(ctypes.c_int64(rows), ctypes.c_int64(columns)))
    in_c().newton_schulz(*sizes(n, rows, columns, steps), *map(ctypes.c_float, quintic), *at(x, work))
    return True


def block_pays() -> bool:
    library = in_c()
    return library is not None and bool(library.block_pays())


@functools.lru_cache
def struct_of(threads, B, T, n_head, n_kv, D, C, hidden, gated, centred, p_attention, p, eps, head_eps, there):
    """Without pointers and seeds. there: which of BlockStruct.point_to's tensors there are."""
    qkv, qk = (n_head + 2 * n_kv) * D, (n_head + n_kv) * D
    of_q, of_v = ((T * wide, D, wide) for wide in (qk if there[-1] else qkv, qkv))
    struct = BlockStruct(
        Heads(threads, KINDS[torch.bfloat16], B, T, n_head, n_kv, D, head_eps),
        attention_of(threads, B, n_head, n_kv, T, D, share(p_attention), 0, [of_q, of_q, *[of_v] * 4]),
        *(C, hidden, gated, centred, share(p)[0], (0, 0), share(p)[1], eps),
    )
    struct.place([int(is_there) or None for is_there in there])
    return struct


def may_be_c(module: nn.Module) -> bool:
    """Not in evaluation with gradients: who knows what is differentiated."""
    is_usual = module.training or not torch.is_grad_enabled()
    return is_usual and not torch.compiler.is_compiling() and block_pays()


PLAIN = {(kind, torch.float32, True) for kind in (torch.Tensor, nn.Parameter)}
SMALL = 2**35  # a network's weights, times the tokens
METHODS = {"forward", "heads", "shared", "attend", "activate", "embed", "_hidden", "_rope"}


def is_bare(part: nn.Module) -> bool:
    """Nobody looks at a module, or has put something in the place of one of its methods."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return not hooks and vars(part).keys().isdisjoint(METHODS)


class FastBlock(Block):
    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        tensors = self.for_c(x, rope) if cache is None and may_be_c(self) else None
        if tensors is None:
            return super().forward(x, rope, cache)
        return through_blocks([self], self.template(x, tensors), x, tensors)

    def template(self, x: torch.Tensor, tensors: list[torch.Tensor | None]) -> BlockStruct:
        """Of a block that for_c finds fit: the same object for all that are alike."""
        attn, mlp, is_centred = self.attn, self.mlp, isinstance(self.ln_1, LayerNorm)
        p_attention, p = (attn.dropout, mlp.dropout.p) if self.training else (0.0, 0.0)
        heads = (attn.n_head, attn.n_kv, attn.head_dim, x.size(-1), mlp.c_proj.in_features, mlp.is_gated)
        eps = 1e-5 if is_centred else self.ln_1.eps, attn.q_norm.eps if attn.q_norm else 0.0
        there = tuple([t is not None for t in tensors])
        return struct_of(torch.get_num_threads(), *x.shape[:2], *heads, is_centred, p_attention, p, *eps, there)

    def draw(self, struct: BlockStruct) -> None:
        """New seeds, in the order of model.py's modules."""
        drops = self.training and self.mlp.dropout.p
        struct.attention.seed = new_seed() if self.training and self.attn.dropout else 0
        struct.seeds[:] = [new_seed() if drops else 0 for _ in range(2)]

    def for_c(self, x: torch.Tensor, rope) -> list[torch.Tensor | None] | None:
        """The weights and the tables of rotations, as BlockStruct.point_to wants them.

        None where anything is not as model.py makes it, or of a size that C does not know; and where somebody looks at
        a part, or has put something in the place of one of its methods.
        """
        attn, mlp, norms = self.attn, self.mlp, (self.ln_1, self.ln_2)
        if x.dim() != 3 or wanted_dtype(x) != torch.bfloat16 or (type(attn), type(mlp)) != (FastAttention, FastMLP):
            return None
        linears, drops = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj), (attn.resid_dropout, mlp.dropout)
        head_norms = [norm for norm in (attn.q_norm, attn.k_norm) if norm is not None]
        parts, kind = [*linears, *drops, *norms, *head_norms], type(self.ln_1)
        kinds = [nn.Linear] * 4 + [FastDropout] * 2 + [kind] * 2 + [FastRMSNorm] * len(head_norms)
        if [type(part) for part in parts] != kinds or kind not in (LayerNorm, FastRMSNorm):
            return None
        for part in (attn, mlp, *parts):
            if part.training != self.training or not is_bare(part):
                return None
        epses = [*(norm.eps for norm in norms if kind is FastRMSNorm)], [norm.eps for norm in head_norms]
        if drops[0].p != drops[1].p or any(len(set(eps)) > 1 for eps in epses):
            return None
        T, C, D, read, hidden = *x.shape[1:], attn.head_dim, attn.n_head * attn.head_dim, mlp.c_proj.in_features
        outputs = ((attn.n_head + 2 * attn.n_kv) * D, C, hidden * (1 + mlp.is_gated), C)
        if not x.numel() or any(n % 16 for n in (C, D, hidden)) or D > 1024:
            return None
        inputs, tables = (C, read, C, hidden), tables_of(rope, T, D)
        if tables is None:
            return None
        tensors = [*(linear.weight for linear in linears), *(linear.bias for linear in linears)]
        tensors += [*(norm.weight for norm in norms), *(getattr(norm, "bias", None) for norm in norms)]
        tensors += [*([norm.weight for norm in head_norms] or [None] * 2), *tables]
        shapes = [*zip(outputs, inputs, strict=True), *((n,) for n in outputs), *[(C,)] * 4, *[(D,)] * 2, *[(T, D)] * 2]
        for t, shape in zip(tensors, shapes, strict=True):
            if t is not None and (t.shape != shape or (t.__class__, t.dtype, t.is_cpu) not in PLAIN):
                return None
        return tensors if (x.__class__, x.dtype, x.is_cpu) in PLAIN else None


def drawn(blocks: Sequence[FastBlock], template: BlockStruct) -> ctypes.Array:
    """Copies of what blocks are like, with seeds."""
    structs = (BlockStruct * len(blocks))(*[template] * len(blocks))
    for block, struct in zip(blocks, structs, strict=True):
        block.draw(struct)
    return structs


def through_blocks(blocks: Sequence[FastBlock], template: BlockStruct, x: torch.Tensor, tensors: Iterable):
    """What blocks that are alike make of x, in C."""
    return BlocksInC.apply(x, template, drawn(blocks, template), torch.is_grad_enabled(), *tensors)


class FastGPT(GPT):
    """A small network: all of it, or all blocks, at once, since to get from one thing to the next takes time too."""

    def forward(self, idx, targets=None, weights=None, divisor=None, return_logits=True):
        found, is_tensor = None, isinstance(divisor, torch.Tensor)
        is_number = not is_tensor or not (divisor.requires_grad or divisor.dim())
        if targets is not None and not return_logits and (weights is None or divisor is not None) and is_number:
            found = self.as_network(idx, targets, weights)
        if found is None:
            return super().forward(idx, targets, weights, divisor, return_logits)
        *network, tensors = found
        divisor = divisor.item() if is_tensor else divisor
        return None, NetworkInC.apply(divisor, torch.is_grad_enabled(), *network, *tensors)

    def blocks_for_c(self, x: torch.Tensor, rope) -> tuple[BlockStruct, list] | None:
        """Their template, and what for_c gives of each; None if they are not alike, or one is not fit."""
        blocks = self.transformer.h
        for block in blocks:
            if type(block) is not FastBlock or not is_bare(block) or block.training != self.training:
                return None
        tensors = [block.for_c(x, rope) for block in blocks]
        if not all(tensors):
            return None
        templates = [block.template(x, its) for block, its in zip(blocks, tensors, strict=True)]
        alike = bool(templates) and all(its is templates[0] for its in templates)
        return (templates[0], [*itertools.chain(*tensors)]) if alike else None

    def is_small(self, tokens: int) -> bool:
        c = self.config
        return 12 * c.n_layer * c.n_embd**2 * tokens < SMALL and not self.activation_checkpointing and may_be_c(self)

    def _hidden(self, idx: torch.Tensor, position: torch.Tensor, cache=None) -> torch.Tensor:
        if cache is not None or not self.is_small(idx.numel()):
            return super()._hidden(idx, position, cache)
        x, rope = self.embed(idx, position)
        # At once they are all differentiated: the first ones too, where none of their weights is trained
        is_wanted = x.requires_grad or not torch.is_grad_enabled()
        found = self.blocks_for_c(x, rope) if is_wanted else None
        if found:
            template, tensors = found
            x = through_blocks(self.transformer.h, template, x, tensors)
        else:
            for block in self.transformer.h:
                x = block(x, rope)
        return self.transformer.ln_f(x)

    def as_network(self, idx: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> tuple | None:
        """What NetworkInC.forward takes, but for the divisor; None where anything is not as model.py makes it, is not
        trained, or is of a size that C does not know.
        """
        if idx.dim() != 2 or not self.is_small(idx.numel()) or not len(self.transformer.h):
            return None
        C, parts, head = self.config.n_embd, dict(self.transformer.items()), self.lm_head
        (B, T), (wte, wpe, drop, ln_f, blocks) = idx.shape, map(parts.get, ("wte", "wpe", "drop", "ln_f", "h"))
        first, tables = blocks[0], [table for table in (wte, wpe) if table is not None]
        kinds = [type(part) for part in (first, head, drop, *tables)]
        if kinds != [FastBlock, nn.Linear, FastDropout, *[nn.Embedding] * len(tables)] or head.bias is not None:
            return None
        usual = (None, None, False, False)
        if any((t.padding_idx, t.max_norm, t.scale_grad_by_freq, t.sparse) != usual for t in tables):
            return None
        if not all(is_bare(part) and part.training == self.training for part in (self, head, drop, ln_f, *tables)):
            return None
        if type(ln_f) is not type(first.ln_1) or getattr(ln_f, "eps", 0) != getattr(first.ln_1, "eps", 0):
            return None
        given = [idx, targets, *([] if weights is None else [weights.float()])]
        wanted = [(idx.shape, torch.Tensor, dtype, True) for dtype in (torch.int64, torch.int64, torch.float32)]
        if [(ids.shape, type(ids), ids.dtype, ids.is_cpu) for ids in given] != wanted[: len(given)]:
            return None
        (V, _), (length, _) = wte.weight.shape, wpe.weight.shape if wpe else (self.config.block_size, 0)
        if min(length, self.config.block_size) < T:
            return None
        ends = [wte.weight, wpe and wpe.weight, None if head.weight is wte.weight else head.weight, ln_f.weight]
        ends.append(getattr(ln_f, "bias", None))
        for t, shape in zip(ends, ((V, C), (length, C), (V, C), (C,), (C,)), strict=True):
            if t is not None and (t.shape != shape or (t.__class__, t.dtype, t.is_cpu) not in PLAIN):
                return None
        rope = None if wpe else self._rope(idx.device)[:, :T, None]
        if rope is not None and rope.is_inference() and not torch.is_inference_mode_enabled():
            return None
        found = self.blocks_for_c(floats(B, T, C), rope)  # what embeddings will be like
        if not found or drop.p != first.mlp.dropout.p or first.mlp.c_fc.weight.size(0) < V + 32:
            return None
        template, tensors = found
        trained = [*ends, *(t for n, t in enumerate(tensors) if n % POINTERS < GRADIENTS)]
        if torch.is_grad_enabled() and not all(t is None or t.requires_grad for t in trained):
            return None
        network = NetworkStruct(len(blocks), V, new_seed() if self.training and drop.p else 0)
        ids = [*(ids.contiguous() for ids in given), *[None] * (3 - len(given))]
        return network, drawn(blocks, template), ids, [*ends, *tensors]


FASTER = {
    GPT: FastGPT,
    Block: FastBlock,
    RMSNorm: FastRMSNorm,
    nn.Dropout: FastDropout,
    CausalSelfAttention: FastAttention,
    MLP: FastMLP,
}
