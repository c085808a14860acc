"""Faster ways on CPUs to compute what model.py says plainly, installed into a model from outside by `install`.

Read it when a training step on a CPU is too slow, or after a change of model.py's attention, norm or dropout: what is
here stands in for them while a model trains, and tests/test_kernels.py says where the two no longer agree. In
evaluation, without gradients or under torch.compile a module computes what model.py says. Attention and dropout do so
on other devices too; the norm's own backward pass serves on each.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from model import CausalSelfAttention, RMSNorm, rotate

TILED_ATTENTION = 512  # the longest context whose attention weights are kept for the backward pass
TILE_QUERIES, TILE_WEIGHTS = 128, 2**21


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


class FastRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not trains(self):
            return super().forward(x)
        return RMSNormInTraining.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)


def drop_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """What dropout multiplies x by: 0 with probability p (to 1/65536), else 1 / (1 - p).

    Each number of the generator makes four draws of 16 bits, a third of the time of PyTorch's own dropout on CPUs.
    """
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= min(round(p * 2**16), 2**16 - 1) - 2**15
    return keep.to(x.dtype).mul_(1 / (1 - p))


class FastDropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.p and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return x * drop_mask(x, self.p)
        return super().forward(x)


class TiledAttention(torch.autograd.Function):
    """Causal attention, tile by tile, with its weights kept for the backward pass: on CPUs in bfloat16, where matrix
    products are fast and PyTorch's fused kernel is not, training takes half that kernel's time in float32.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float):
        """q, k, v (B, n_head, T, head_dim) -> the same, in v's dtype, which is what everything is computed in."""
        B, H, T, D = q.shape
        q, k, v = (t.to(v.dtype).reshape(B * H, T, D) for t in (q, k, v))
        future = torch.full((T, T), -math.inf, dtype=v.dtype).triu(1)
        y, tiles = torch.empty_like(v), []
        for heads, queries, keys in TiledAttention.tiles(B * H, T):
            scores = torch.baddbmm(future[queries, keys], q[heads, queries], k[heads, keys].mT, alpha=D**-0.5)
            weights = scores.softmax(-1)
            mask = drop_mask(weights, dropout) if dropout else None
            y[heads, queries] = torch.bmm(weights if mask is None else weights * mask, v[heads, keys])
            tiles += weights, mask
        ctx.save_for_backward(q, k, v, *tiles)
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (q, k, v, *tiles), shape = ctx.saved_tensors, grad.shape
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        order = TiledAttention.tiles(*q.shape[:2])
        for (heads, queries, keys), weights, mask in zip(order, tiles[::2], tiles[1::2], strict=True):
            grad_v[heads, keys].baddbmm_((weights if mask is None else weights * mask).mT, grad[heads, queries])
            grad_weights = torch.bmm(grad[heads, queries], v[heads, keys].mT)
            if mask is not None:
                grad_weights *= mask
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[heads, queries] = torch.bmm(grad_scores, k[heads, keys])
            grad_k[heads, keys].baddbmm_(grad_scores.mT, q[heads, queries])
        grads = grad_q.mul_(q.size(-1) ** -0.5), grad_k.mul_(q.size(-1) ** -0.5), grad_v
        return *(g.view(shape) for g in grads), None

    @staticmethod
    def tiles(heads: int, T: int) -> list[tuple[slice, slice, slice]]:
        """Which heads, queries and keys go together: few enough to stay in a CPU's cache, and no keys of the future."""
        height = min(T, TILE_QUERIES)
        group = max(1, TILE_WEIGHTS // (height * T))
        starts = [(h, t) for h in range(0, heads, group) for t in range(0, T, height)]
        return [(slice(h, h + group), slice(t, t + height), slice(0, min(t + height, T))) for h, t in starts]


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


class FastAttention(CausalSelfAttention):
    def heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if rope is None or not trains(self):
            return super().heads(qkv, rope)
        return heads_at_once(self, qkv, rope, RMSNormInTraining.apply)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        fits = self.training and mask is None and q.size(2) == k.size(2) <= TILED_ATTENTION
        if fits and v.device.type == "cpu" and v.dtype == torch.bfloat16:
            return TiledAttention.apply(q, k, v, self.dropout)
        return super().attend(q, k, v, mask)


FASTER = {RMSNorm: FastRMSNorm, nn.Dropout: FastDropout, CausalSelfAttention: FastAttention}
