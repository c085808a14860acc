"""GPT: the network, the loss, and generation with a key/value cache. One file that needs only torch; copy it freely.

Two architectures. arch='gpt2' is GPT-2's (Radford et al., 2019): learned positions, pre-norm blocks, GELU in its tanh
form, input and output embeddings tied, and, as in nanoGPT, optional biases. arch='qwen3' is Qwen3's (Yang et al.,
2025): rotary positions, RMS norms, also on queries and keys, SwiGLU, grouped-query attention, no biases; arch='llama'
(Touvron et al., 2023) is the same without norms on queries and keys, for weights that come from elsewhere. Parameter
names are nanoGPT's; c_attn holds query, key and value, c_fc of qwen3 and llama gate and up.

Shapes: B batch, T time, C = n_embd channels, V vocabulary, n_kv heads of keys and values.
"""

import inspect
import json
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK_LOGITS = 2**25  # logits that the chunked loss holds at a time: 128 MiB in float32
CPU_TILED_ATTENTION = 512  # the longest context whose attention weights are kept for the backward pass on CPUs
TILE_QUERIES, TILE_WEIGHTS = 128, 2**21
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # not weights, though older code kept them among the weights
# Hugging Face keeps GPT-2's names, and these weights transposed.
GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in every linear layer and layer norm, as GPT-2 has them
    arch: str = "gpt2"  # gpt2, qwen3 or llama; what follows is of the latter two
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    n_hidden: int = 0  # width of the MLP; 0: 8/3 of n_embd, rounded up to a multiple of 64
    tie_embeddings: bool = True  # one matrix for input and output
    rope_theta: float = 10000.0  # the longest wavelength of the rotary positions, over 2 pi
    norm_eps: float = 1e-6  # added to the mean square in RMS norms

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // max(1, self.n_head)
        if not self.n_hidden:
            self.n_hidden = 4 * self.n_embd if self.arch == "gpt2" else math.ceil(self.n_embd * 8 / 3 / 64) * 64

    def to_args(self) -> dict:
        """What makes this config again; for gpt2 nanoGPT's seven fields alone."""
        args = asdict(self)
        return args if self.arch != "gpt2" else {name: args[name] for name in list(args)[:7]}

    def problems(self) -> list[str]:
        """What makes this no buildable network, one line each."""
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        found = [f"{name} must be at least 1, not {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), not {self.dropout}")
        if self.arch not in ("gpt2", "qwen3", "llama"):
            return [*found, f"arch must be gpt2, qwen3 or llama, not {self.arch!r}"]
        if found:
            return found
        is_free = self.arch != "gpt2" and self.head_dim != self.n_embd // self.n_head
        if self.n_embd % self.n_head and not is_free:
            found.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.arch == "gpt2":
            if (self.n_kv_head, self.head_dim) != (self.n_head, self.n_embd // self.n_head) or not self.tie_embeddings:
                found.append("n_kv_head, head_dim and tie_embeddings are qwen3's: leave them out, or take arch='qwen3'")
            return found
        if self.bias:
            found.append(f"bias must be False with arch={self.arch!r}")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            found.append(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.head_dim < 2 or self.head_dim % 2:
            found.append(f"the width of a head must be even for rotary positions, not {self.head_dim}")
        if self.n_hidden < 1 or not 0 < self.rope_theta < math.inf:
            found.append(f"n_hidden ({self.n_hidden}) and rope_theta ({self.rope_theta}) must be positive")
        if not 0 < self.norm_eps < 1:
            found.append(f"norm_eps must be between 0 and 1, not {self.norm_eps}")
        return found


class KVCache:
    """Keys and values of the tokens seen so far, in memory that is reserved once.

    keys, values: (n_layer, B, n_kv, capacity, head_dim), of which the first `length` positions are filled.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, rows, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Stores k, v (B, n_kv, T, head_dim) behind what is there; returns the keys and values to attend to, and a mask
        or None: a prompt fills an empty cache, so each of its tokens sees those before it, and a step's one token all.
        """
        keys, values, end = self.keys[layer], self.values[layer], self.length + k.size(2)
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end], None


class Embedding(nn.Embedding):
    """torch's, without random numbers where there is no memory to hold them: torch would load its compiler for that."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, ndim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(ndim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (…, C) over its root mean square, times weight (C,) or of x's last dimensions; in float32."""
    x, weight = x.float(), weight.float()
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return RMSNormInTraining.apply(x, weight, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


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


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (Su et al., 2021) in the layout of Hugging Face: channel i turns together with i + head_dim/2.

    x (B, T, n_head, head_dim); rope: cosines, and sines with their signs, each (T, 1, head_dim) or (B, T, 1, head_dim).
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def drop_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """What dropout multiplies x by: 0 with probability p (to 1/65536), else 1 / (1 - p).

    Each number of the generator makes four draws of 16 bits, a third of the time of PyTorch's own dropout on CPUs.
    """
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= min(round(p * 2**16), 2**16 - 1) - 2**15
    return keep.to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
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


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv = config.n_head, config.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv) * config.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.arch == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))
        self.resid_dropout = Dropout(config.dropout)
        self.head_dim, self.layer = config.head_dim, layer
        # GPT-2 drops attention weights too. Without that, attention is one fused kernel, which takes half the time.
        self.dropout = config.dropout if config.arch == "gpt2" else 0.0

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None) -> torch.Tensor:
        """x: (B, T, C). With a cache, T tokens of a prompt, or one token behind what the cache holds."""
        B, T, _ = x.shape
        heads = (self.n_head, self.n_kv, self.n_kv)
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)
        if rope is None:
            q, k, v = qkv.split(heads, dim=2)
        else:  # queries and keys in one go
            qk, v = qkv.split((self.n_head + self.n_kv, self.n_kv), dim=2)
            if self.q_norm is not None:
                weights = (self.q_norm.weight.expand(self.n_head, -1), self.k_norm.weight.expand(self.n_kv, -1))
                qk = rms_norm(qk, torch.cat(weights), self.q_norm.eps)
            q, k = rotate(qk.float(), rope).split(heads[:2], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, n_head or n_kv, T, head_dim)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        if self.n_kv != self.n_head:  # each head of keys and values serves several of queries
            k, v = (t.repeat_interleave(self.n_head // self.n_kv, dim=1) for t in (k, v))
        y = self.attend(q, k, v, mask)
        return self.resid_dropout(self.c_proj(y.to(qkv.dtype).transpose(1, 2).reshape(B, T, -1)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What each of q's T queries reads, (B, n_head, T, head_dim), in v's dtype.

        A query sees the keys up to its own place, or those that a mask (…, T, keys) admits.
        """
        in_tiles = self.training and mask is None and q.size(2) == k.size(2) <= CPU_TILED_ATTENTION
        if in_tiles and v.device.type == "cpu" and v.dtype == torch.bfloat16:
            return TiledAttention.apply(q, k, v, self.dropout)
        dropout, is_causal = self.dropout if self.training else 0.0, mask is None and q.size(2) > 1
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.is_gated = config.arch != "gpt2"
        self.c_fc = nn.Linear(config.n_embd, (1 + self.is_gated) * config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


def _norm(config: GPTConfig) -> nn.Module:
    gpt2 = config.arch == "gpt2"
    return LayerNorm(config.n_embd, config.bias) if gpt2 else RMSNorm(config.n_embd, config.norm_eps)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, without ever holding all logits or their gradient.

    The gradients of the head's input and weight are taken chunk by chunk in the forward pass, while the chunk's logits
    are at hand, so the head is multiplied once and the backward pass only scales. They are kept as sums, not means,
    which leaves float16 its range.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int):
        """hidden (N, C), weight (V, C), targets (N,) -> the mean, a float32 scalar."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        h_all, w = hidden.to(dtype), weight.to(dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad:
            grad_hidden = torch.empty_like(h_all)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        counted = targets != ignore_index
        rows = max(1, LOSS_CHUNK_LOGITS // weight.size(0))
        for start in range(0, hidden.size(0), rows):
            part = slice(start, start + rows)
            h, keep = h_all[part], counted[part].unsqueeze(1)
            target = targets[part].unsqueeze(1).clamp(min=0)  # where ignored, any valid row: it is masked below
            logits = F.linear(h, w).float()  # (rows, V)
            log_norm = logits.logsumexp(dim=1, keepdim=True)
            total += ((log_norm - logits.gather(1, target)) * keep).sum()
            if needs_grad:
                grad_logits = logits.sub_(log_norm).exp_()  # softmax, in place
                grad_logits.scatter_add_(1, target, torch.full_like(log_norm, -1.0))
                grad_logits = grad_logits.mul_(keep).to(dtype)
                grad_hidden[part] = grad_logits @ w
                if grad_weight is not None:  # else the head is frozen
                    grad_weight += grad_logits.T @ h
        count = counted.sum()
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, count)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor):
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count.clamp(min=1)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtypes[1])
        return (grad_hidden * scale).to(ctx.dtypes[0]), grad_weight, None, None


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1):
    """Mean cross-entropy of the logits hidden @ weight.T: hidden (N, C), weight (V, C), targets (N,) -> scalar."""
    if hidden.size(0) * weight.size(0) > LOSS_CHUNK_LOGITS:
        if not torch.is_grad_enabled():  # autograd would ask for the gradients all the same
            hidden, weight = hidden.detach(), weight.detach()
        return ChunkedCrossEntropy.apply(hidden, weight, targets, ignore_index)
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=ignore_index)


class AdamW(torch.optim.AdamW):
    """torch's, without what its methods are wrapped in: at their first call that loads torch.compile, for a second."""

    add_param_group, load_state_dict, state_dict, zero_grad, _step = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad", "step")
    )

    @torch.no_grad()
    def step(self, closure=None):
        return self._step(closure)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        """Raises ValueError where the config describes no network."""
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        parts: dict[str, nn.Module] = {"wte": Embedding(config.vocab_size, config.n_embd)}
        if config.arch == "gpt2":  # in this place, since optimizer states number the parameters in their order
            parts["wpe"] = Embedding(config.block_size, config.n_embd)
        parts["drop"] = Dropout(config.dropout)
        parts["h"] = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        parts["ln_f"] = _norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self._rope_table: torch.Tensor | None = None
        self.activation_checkpointing = False  # in training, keep only what enters a block, and compute the rest again
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    self._initialise(name, parameter)

    def _initialise(self, name: str, parameter: nn.Parameter) -> None:
        """GPT-2's values. For qwen3 and llama: matrices as in Muon's records, that is, what writes to the residual
        stream, and an untied head, at zero, so that each block begins as the identity.
        """
        c, kind = self.config, ".".join(name.split(".")[-2:])
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif kind in ("ln_1.weight", "ln_2.weight", "ln_f.weight", "q_norm.weight", "k_norm.weight"):
            nn.init.ones_(parameter)
        elif kind in ("wte.weight", "wpe.weight"):
            nn.init.normal_(parameter, std=0.02)
        elif kind in ("c_attn.weight", "c_fc.weight"):
            nn.init.normal_(parameter, std=0.02 if c.arch == "gpt2" else parameter.size(1) ** -0.5)
        elif kind == "c_proj.weight":  # GPT-2: what adds to the residual stream shrinks with depth
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.n_layer) if c.arch == "gpt2" else 0.0)
        elif kind == "lm_head.weight":
            nn.init.zeros_(parameter)
        else:
            raise ValueError(f"no rule says how {name} begins")

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Gives a network that was built on the meta device, where it costs nothing, its weights: float32 copies.

        Raises ValueError for what is no tensor of floating-point numbers, RuntimeError where names or shapes differ.
        """
        for name, value in state.items():
            if not torch.is_tensor(value) or value.is_meta or not value.is_floating_point():
                raise ValueError(f"{name} is no tensor of floating-point numbers")
        how = {"dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        # What does not fit is not copied, since it may be larger than its file and than memory
        state = {n: tensor.to(**how) if tensor.shape == shapes.get(n) else tensor for n, tensor in state.items()}
        self.load_state_dict(state, assign=True)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, by default without tables that are only looked up: position embeddings, or input
        embeddings that are not tied. Tied weights count once.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        tables = [self.transformer.wpe] if self.config.arch == "gpt2" else []
        tables += [] if self.config.tie_embeddings else [self.transformer.wte]
        return total - sum(table.weight.numel() for table in tables) if non_embedding else total

    def embed(self, idx: torch.Tensor, position: torch.Tensor):
        """What the first block reads, (B, T, C), and the rotation that blocks are given (None for gpt2).

        idx (B, T), position (T,) or (B, T).
        """
        x, rope = self.transformer.wte(idx), None
        if self.config.arch == "gpt2":
            x = x + self.transformer.wpe(position)
        else:
            rope = tuple(table[position].unsqueeze(-2) for table in self._rope(idx.device))
        return self.transformer.drop(x), rope

    def _rope(self, device: torch.device) -> torch.Tensor:
        """Cosines, and sines with their signs, for every position: (2, block_size, head_dim), always float32."""
        if self._rope_table is None or self._rope_table.device != device:
            c = self.config
            channels = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32)
            angles = torch.arange(c.block_size, device=device)[:, None] * c.rope_theta ** (-channels / c.head_dim)
            cos, sin = angles.cos(), angles.sin()
            self._rope_table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        return self._rope_table

    def _hidden(self, idx: torch.Tensor, position: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The final norm's output (B, T, C) for tokens idx (B, T) at the given positions, (T,) or (B, T)."""
        x, rope = self.embed(idx, position)
        for block in self.transformer.h:
            # Compiled blocks are for training: behind a cache each step has another shape, and would compile again.
            if cache is not None:
                x = block.forward(x, rope, cache)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, return_logits: bool = True):
        """idx (B, T) int64, targets (B, T) int64 with -1 where there is nothing to predict -> (logits, loss).

        Without targets: the logits of the last position (B, 1, V), and None. With targets: all logits (B, T, V) and the
        mean loss in nats; return_logits=False gives None for the logits and takes the loss in chunks, which saves their
        memory. Raises ValueError where T is over block_size.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit in block_size {self.config.block_size}")
        x = self._hidden(idx, torch.arange(idx.size(1), device=idx.device))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        if return_logits:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
            return logits, loss
        return None, cross_entropy(x.view(-1, x.size(-1)), self.lm_head.weight, targets.reshape(-1))

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context to block_size: of GPT-2 the later position embeddings go."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size {block_size} must be from 1 to the model's {self.config.block_size}")
        self.config.block_size, self._rope_table = block_size, None
        if self.config.arch != "gpt2":
            return
        old = self.transformer.wpe.weight
        self.transformer.wpe.weight = nn.Parameter(old[:block_size].detach().clone(), old.requires_grad)

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> "GPT":
        """The weights in a folder of Hugging Face's layout (config.json, *.safetensors), or GPT-2's from the hub.

        model_type: a folder with a GPT-2, Qwen3 or Llama, or one of GPT2_MODELS. override_args: `dropout` alone may be
        given. Needs the safetensors package, and huggingface_hub for a download. Raises ValueError that names what in
        the folder is not computed here, missing or misshapen, OSError where nothing is found or the download fails,
        ImportError where a package is missing.
        """
        override_args = override_args or {}
        if unknown := set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(unknown))}")
        config_path, weights_paths = _pretrained_files(model_type)
        try:
            with open(config_path, encoding="utf-8") as file:
                config = config_from_hf(json.load(file))
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from error
        config.dropout = override_args.get("dropout", 0.0)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors = {}
        for path in weights_paths:
            try:
                tensors |= load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error})") from error
        try:
            state = state_from_hf(config, tensors)
        except ValueError as error:
            raise ValueError(f"{os.path.dirname(weights_paths[0]) or model_type}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        model.load_weights(state)
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> AdamW:
        """AdamW in two groups: matrices and embeddings decay, vectors (biases, layer norms) do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for a token (PaLM, Chowdhery et al., 2022, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilisation: the share of `peak_flops` (default: an A100's in bfloat16) that is put to use.

        fwdbwd_per_iter: sequences of block_size in an iteration; dt: its time in seconds.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for `rows` texts of up to `length` tokens, in the dtype that attention computes in.

        On CPUs that is float32: in bfloat16 attention to a cache takes several times as long.
        """
        weight = self.lm_head.weight
        dtype = weight.dtype
        if weight.device.type == "cpu":
            dtype = torch.float32
        elif torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(self.config, rows, min(length, self.config.block_size), weight.device, dtype)

    @torch.no_grad()
    def prefill(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Reads prompts (B, T) of up to block_size tokens, in place of what the cache held; returns the logits of the
        tokens that follow, (B, V).
        """
        cache.length = 0
        return self._read(idx, cache)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Puts one token (B,) behind each row of the cache; returns the logits of those that follow, (B, V)."""
        return self._read(tokens[:, None], cache)

    def _read(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        end = cache.length + idx.size(1)
        x = self._hidden(idx, torch.arange(cache.length, end, device=idx.device), cache)
        cache.length = end
        return self.lm_head(x[:, -1])

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
    ) -> torch.Tensor:
        """Continues the prompts idx (B, T) int64 by max_new_tokens; returns (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k keeps the k likeliest alone, 0 or None all; ids from vocab_size
        on are never drawn. Each token is drawn given all before it while they fit in block_size. A longer prompt counts
        by its last block_size tokens, and whenever the context is full its older half is dropped, so that the cost of a
        token stays what it is. Raises ValueError for an empty prompt or a setting out of range.
        """
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError("idx must be of shape (B, T): each prompt must hold at least one token")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive number, not {top_k}")
        block_size, training = self.config.block_size, self.training
        self.eval()
        cache = self.new_cache(idx.size(0), idx.size(1) + max_new_tokens)
        for n in range(max_new_tokens):
            if n == 0 or cache.length == block_size:
                logits = self.prefill(idx[:, -(block_size if n == 0 else max(1, block_size // 2)) :], cache)
            else:
                logits = self.step(idx[:, -1], cache)
            logits = logits[:, :vocab_size].float()
            if top_k:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                logits = logits.masked_fill(logits < least, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, token), dim=1)
        self.train(training)
        return idx


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's names and layout: config.json as a dict, and tensors by name


def hf_config(config: GPTConfig) -> dict:
    """The config.json of GPT2LMHeadModel, Qwen3ForCausalLM or LlamaForCausalLM that computes what GPT(config) does."""
    c = config
    if c.arch == "gpt2":
        sizes = {"n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head}
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout)
        theirs = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": c.n_embd, **sizes, **dropouts}
        return theirs | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "vocab_size": c.vocab_size}
    return {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[c.arch]],
        "model_type": c.arch,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_hidden,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # up to transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
    }


# What must not be otherwise, since nothing else is computed here. A key that is missing has its library's default,
# which is the first of the values.
_HF_NEEDS = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "is_causal": (True,),
    },
    "llama": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0,),
        "use_sliding_window": (False,),
        "rope_interleaved": (False,),
        "is_causal": (True,),
    },
}


def config_from_hf(theirs: dict) -> GPTConfig:
    """The inverse of hf_config. Raises ValueError that names whatever in it is not computed here, or missing."""
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if kind not in ("gpt2", "qwen3", "llama"):
        raise ValueError(f"model_type is {kind!r}, and only gpt2, qwen3 and llama are read here")
    if theirs.get("quantization_config"):
        raise ValueError("its weights are quantized (quantization_config), which is not read here")
    for key, values in _HF_NEEDS["gpt2" if kind == "gpt2" else "llama"].items():
        if theirs.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {theirs[key]!r}, and only {values[0]!r} is computed here")
    try:
        if kind == "gpt2":
            if theirs.get("n_inner") not in (None, 4 * theirs["n_embd"]):
                raise ValueError(f"n_inner is {theirs['n_inner']}, and only 4 * n_embd is computed here")
            sizes = {name: theirs[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
            config = GPTConfig(block_size=theirs["n_positions"], **sizes, bias=True)
        else:
            rope = theirs.get("rope_parameters") or {}
            kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
            if kind_of_rope != "default":
                raise ValueError(f"rope_type is {kind_of_rope!r}, and only 'default' is computed here")
            if any(layer != "full_attention" for layer in theirs.get("layer_types") or ()):
                raise ValueError(f"layer_types has {theirs['layer_types']}, and only full_attention is computed here")
            heads = theirs["num_attention_heads"]
            config = GPTConfig(
                block_size=theirs["max_position_embeddings"],
                vocab_size=theirs["vocab_size"],
                n_layer=theirs["num_hidden_layers"],
                n_head=heads,
                n_embd=theirs["hidden_size"],
                bias=False,
                arch=kind,
                n_kv_head=theirs.get("num_key_value_heads") or heads,
                head_dim=theirs.get("head_dim") or (128 if kind == "qwen3" else theirs["hidden_size"] // heads),
                n_hidden=theirs["intermediate_size"],
                tie_embeddings=bool(theirs.get("tie_word_embeddings", False)),
                rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0),
                norm_eps=float(theirs.get("rms_norm_eps", 1e-6)),
            )
        for field in fields(config):
            if type(getattr(config, field.name)) is not field.type:
                raise ValueError(f"{field.name} is {getattr(config, field.name)!r}, which is no {field.type.__name__}")
        if problems := config.problems():
            raise ValueError("; ".join(problems))
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"it describes no network ({error})") from error
    return config


def _hf_layout(config: GPTConfig) -> dict[str, list[tuple[str, int]]]:
    """For each of our weights: theirs, of which it is made one below the other, and the rows of each."""
    c, queries, keys = config, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    if c.arch == "gpt2":
        with torch.device("meta"):
            names = GPT(c).state_dict()
        return {name: [(name, -1)] for name in names if name != "lm_head.weight"}
    layout = {
        "transformer.wte.weight": [("model.embed_tokens.weight", c.vocab_size)],
        "transformer.ln_f.weight": [("model.norm.weight", c.n_embd)],
    }
    if not c.tie_embeddings:
        layout["lm_head.weight"] = [("lm_head.weight", c.vocab_size)]
    block = {
        "ln_1": [("input_layernorm", c.n_embd)],
        "ln_2": [("post_attention_layernorm", c.n_embd)],
        "attn.c_attn": [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
        "attn.c_proj": [("self_attn.o_proj", c.n_embd)],
        "mlp.c_fc": [("mlp.gate_proj", c.n_hidden), ("mlp.up_proj", c.n_hidden)],
        "mlp.c_proj": [("mlp.down_proj", c.n_embd)],
    }
    if c.arch == "qwen3":
        block |= {f"attn.{name}": [(f"self_attn.{name}", c.head_dim)] for name in ("q_norm", "k_norm")}
    for n in range(c.n_layer):
        for ours, theirs in block.items():
            parts = [(f"model.layers.{n}.{name}.weight", rows) for name, rows in theirs]
            layout[f"transformer.h.{n}.{ours}.weight"] = parts
    return layout


def state_to_hf(config: GPTConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under their names and in their layout. What GPT-2 has and a model without biases lacks is zeros."""
    tensors = {}
    for ours, parts in _hf_layout(config).items():
        if config.arch == "gpt2":
            tensors[ours] = state[ours].t() if ours.endswith(GPT2_TRANSPOSED) else state[ours]
            if not config.bias and "wte" not in ours and "wpe" not in ours:
                tensors[ours.replace(".weight", ".bias")] = state[ours].new_zeros(state[ours].size(0))
        else:
            rows = state[ours].split([rows for _, rows in parts])
            tensors |= {name: its for (name, _), its in zip(parts, rows, strict=True)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def state_from_hf(config: GPTConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of state_to_hf. Raises ValueError that names tensors that are missing, misshapen or unknown."""
    if config.arch == "gpt2":  # the bare GPT2Model has no prefix
        tensors = {
            name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t
            for name, t in tensors.items()
        }
    layout = _hf_layout(config)
    known = {name for parts in layout.values() for name, _ in parts}
    missing = sorted(known - tensors.keys())
    unknown = [
        name for name in tensors if name not in known and not name.endswith((*CAUSAL_MASKS, "rotary_emb.inv_freq"))
    ]
    embedding = layout["transformer.wte.weight"][0][0]
    if config.tie_embeddings and "lm_head.weight" in unknown and not missing:
        if not torch.equal(tensors["lm_head.weight"], tensors[embedding]):
            raise ValueError("lm_head.weight differs from the input embeddings, though the two are said to be tied")
        unknown.remove("lm_head.weight")
    if missing or unknown:
        told = [
            f"{what} {', '.join(names[:4])}{' …' * (len(names) > 4)}"
            for what, names in (("it lacks", missing), ("it has also", unknown))
            if names
        ]
        raise ValueError("; ".join(told))
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    state = {}
    for ours, parts in layout.items():
        found = [
            tensors[name].t() if ours.endswith(GPT2_TRANSPOSED) and config.arch == "gpt2" else tensors[name]
            for name, _ in parts
        ]
        shape = tuple(expected[ours].shape)
        for (name, rows), tensor in zip(parts, found, strict=True):
            if tuple(tensor.shape) != (shape if rows < 0 else (rows, *shape[1:])):
                raise ValueError(f"{name} is of shape {tuple(tensors[name].shape)}, which is not what its config says")
        state[ours] = torch.cat(found) if len(found) > 1 else found[0]
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    return state


def _pretrained_files(name: str) -> tuple[str, list[str]]:
    """The paths of config.json and of the weights: in the folder `name`, or downloaded from the hub."""
    if os.path.isdir(name):
        files, index = ["config.json", "model.safetensors"], os.path.join(name, "model.safetensors.index.json")
        if not os.path.exists(os.path.join(name, files[1])) and os.path.exists(index):
            with open(index, encoding="utf-8") as file:
                listed = json.load(file)["weight_map"]
            files = ["config.json", *sorted(set(listed.values()))]
        paths = [os.path.join(name, file) for file in files]
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise OSError(f"missing {' and '.join(missing)}")
        return paths[0], paths[1:]
    if name not in GPT2_MODELS:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(GPT2_MODELS)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its remarks on every retry; what comes of them is said below
    try:
        config, weights = (
            hf_hub_download(f"openai-community/{name}", file) for file in ("config.json", "model.safetensors")
        )
        return config, [weights]
    except Exception as error:  # the client raises a dozen kinds; all of them mean that there is no file
        raise OSError(
            f"{name} could not be downloaded ({type(error).__name__}); a local folder {name!r} serves as well"
        ) from error
