"""Faster ways on CPUs to compute what model.py says plainly, installed into a model from outside by `install`.

Read it when a training step on a CPU is too slow, or after a change of model.py's attention, MLP, norm or dropout: what
is here stands in for them while a model trains, and tests/test_kernels.py says where the two no longer agree. In
evaluation, without gradients or under torch.compile a module computes what model.py says; so it does on other devices,
but for the norm's own backward pass. Where there is a C compiler, what comes between the products is quartz/passes.c's,
and attention in bfloat16 quartz/attention.c's.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import nn

from model import MLP, CausalSelfAttention, RMSNorm, rotate
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
    def backward(ctx, grad: torch.Tensor):
        unit, scale, weight = ctx.saved_tensors
        along = grad * unit
        grad_weight = along.sum_to_size(weight.shape)
        mean = (along * weight).mean(-1, keepdim=True)
        return (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale), grad_weight, None


@functools.cache
def in_c(name: str) -> ctypes.CDLL | None:
    """quartz/{name}.c, passes or attention; None where it can't be compiled, and kept."""
    try:
        return native.load(name, may_compile=True)
    except Exception:  # whatever a compiler or a folder that is missing, old or broken raises
        return None


def passes() -> ctypes.CDLL | None:
    return in_c("passes")


def in_passes(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in KINDS and passes() is not None


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in (torch.get_num_threads(), *numbers)]


class NormInPasses(torch.autograd.Function):
    """RMSNormInTraining of float32 in one pass each way; the result in `dtype`, whose product is to follow."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype):
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:-1])
        numbers = sizes(KINDS[dtype], scale.numel(), x.size(-1))
        passes().norm_forward(*numbers, ctypes.c_float(eps), *at(x, weight, scale, y))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, grad_x, parts = grad.contiguous(), torch.empty_like(x), torch.zeros(BLOCKS, x.size(-1))
        numbers = sizes(KINDS[grad.dtype], scale.numel(), x.size(-1))
        passes().norm_backward(*numbers, *at(x, weight, scale, grad, grad_x, parts))
        return grad_x, parts.sum(0), None, None


def wanted_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a norm's result is wanted by the product that follows."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class FastRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not trains(self):
            return super().forward(x)
        if in_passes(x) and wanted_dtype(x) in KINDS:
            return NormInPasses.apply(x.float(), self.weight.float(), self.eps, wanted_dtype(x))
        return RMSNormInTraining.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)


class SwiGLUInPasses(torch.autograd.Function):
    """silu(gate) * up, x (…, 2 n_hidden) holding both."""

    @staticmethod
    def forward(ctx, x: torch.Tensor):
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], x.size(-1) // 2, dtype=x.dtype)
        passes().swiglu_forward(*sizes(KINDS[x.dtype], y.numel() // y.size(-1), y.size(-1)), *at(x, y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        numbers = sizes(KINDS[x.dtype], grad.numel() // grad.size(-1), grad.size(-1))
        passes().swiglu_backward(*numbers, *at(x, grad, grad_x))
        return grad_x


class GELUInPasses(torch.autograd.Function):
    """F.gelu(x, approximate="tanh")"""

    @staticmethod
    def forward(ctx, x: torch.Tensor):
        x = x.contiguous()
        y = torch.empty_like(x)
        passes().gelu_forward(*sizes(KINDS[x.dtype], x.numel()), *at(x, y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        passes().gelu_backward(*sizes(KINDS[x.dtype], x.numel()), *at(x, grad, grad_x))
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
    def backward(ctx, grad: torch.Tensor):
        return DropoutInPasses.masked(grad, *ctx.drawn), None, None

    @staticmethod
    def masked(x: torch.Tensor, seed: int, dropped: int, kept: float) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        passes().dropout(*sizes(KINDS[x.dtype], x.numel(), seed, dropped), ctypes.c_float(kept), *at(x, y))
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
    ]

    def call(self, name: str, *tensors: torch.Tensor) -> None:
        library = in_c("attention")
        library.scratch.restype = ctypes.c_int64
        work = torch.empty(self.threads, library.scratch(ctypes.byref(self)))
        getattr(library, name)(ctypes.byref(self), *at(*tensors, work))


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
        ctx.attention = Attention(torch.get_num_threads(), B, n_head, k.size(1), T, D, drawn[0], seed, drawn[1])
        y, logs = torch.empty(B, T, n_head, D, dtype=q.dtype), torch.empty(B, n_head, T)
        ctx.attention.call("attention_forward", q, k, v, y, logs)
        ctx.save_for_backward(q, k, v, y, logs)
        return y.transpose(1, 2)

    @staticmethod
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
        scale = torch.empty(B, T, n_head + n_kv)
        passes().heads_forward(ctypes.byref(ctx.heads), *at(qkv, scale, q, k, v))
        ctx.save_for_backward(qkv, scale, *given)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        qkv, scale, q_weight, k_weight, cos, sin = ctx.saved_tensors
        ctx.heads.q_weight, ctx.heads.k_weight, ctx.heads.cos, ctx.heads.sin = at(q_weight, k_weight, cos, sin)
        grads, parts = [grad.contiguous() for grad in grads], torch.zeros(BLOCKS, 2, qkv.size(-1))
        grad_qkv = torch.empty_like(qkv)
        passes().heads_backward(ctypes.byref(ctx.heads), *at(qkv, scale, *grads, grad_qkv, parts))
        return grad_qkv, *(parts.sum(0) if q_weight is not None else (None, None)), *(None,) * 5


class FastAttention(CausalSelfAttention):
    def heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not trains(self):
            return super().heads(qkv, rope)
        if in_passes(qkv) and self.head_dim <= 1024:
            norms, tables = (None, None, 0.0), (None, None)
            if self.q_norm is not None:
                norms = self.q_norm.weight.float(), self.k_norm.weight.float(), self.q_norm.eps
            if rope is not None:
                tables = (table.squeeze(-2).contiguous() for table in rope)
            return HeadsInPasses.apply(qkv, *norms, *tables, self.n_head, self.n_kv)
        return super().heads(qkv, rope) if rope is None else heads_at_once(self, qkv, rope, RMSNormInTraining.apply)

    def shared(self, t: torch.Tensor) -> torch.Tensor:
        return t  # as attention in C takes it

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        fits = mask is None and q.size(2) == k.size(2) and self.head_dim % 16 == 0
        fits = fits and v.device.type == "cpu" and v.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if fits and self.training and in_c("attention") is not None:
            seed = new_seed() if self.dropout else 0
            return AttentionInC.apply(q.to(v.dtype), k.to(v.dtype), v, self.dropout, seed)
        return super().attend(q, super().shared(k), super().shared(v), mask)


FASTER = {
    RMSNorm: FastRMSNorm,
    nn.Dropout: FastDropout,
    CausalSelfAttention: FastAttention,
    MLP: FastMLP,
}
