"""GPT: the network, the loss, and generation with a key/value cache. One file that needs only torch; copy it freely.

Two architectures. arch='gpt2' is GPT-2's (Radford et al., 2019): learned positions, pre-norm blocks, GELU in its tanh
form, input and output embeddings tied, and, as in nanoGPT, optional biases. arch='qwen3' is Qwen3's (Yang et al.,
2025): rotary positions, RMS norms, also on queries and keys, SwiGLU, grouped-query attention, no biases; arch='llama'
(Touvron et al., 2023) is the same without norms on queries and keys, for weights that come from elsewhere. Parameter
names are nanoGPT's; c_attn holds query, key and value, c_fc of qwen3 and llama gate and up.

Shapes: B batch, T time, C = n_embd channels, V vocabulary, n_kv heads of keys and values.
"""

import importlib
import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK_LOGITS = 2**25  # logits that the chunked loss holds at a time: 128 MiB in float32


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
        if self.n_embd % self.n_head and (self.arch == "gpt2" or self.head_dim == self.n_embd // self.n_head):
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
    """x (…, C) over its root mean square, times weight (C,); in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (Su et al., 2021) in the layout of Hugging Face: channel i turns together with i + head_dim/2.

    x (B, T, n_head, head_dim); rope: cosines, and sines with their signs, each (T, 1, head_dim) or (B, T, 1, head_dim).
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv = config.n_head, config.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv) * config.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.arch == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))
        self.resid_dropout = nn.Dropout(config.dropout)
        self.head_dim, self.layer = config.head_dim, layer
        # GPT-2 drops attention weights too. Without that, attention is one fused kernel, which takes half the time.
        self.dropout = config.dropout if config.arch == "gpt2" else 0.0

    def forward(self, x: torch.Tensor, rope=None, cache: KVCache | None = None) -> torch.Tensor:
        """x: (B, T, C). With a cache, T tokens of a prompt, or one token behind what the cache holds."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)
        q, k, v = self.heads(qkv, rope)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)
        y = self.attend(q, self.shared(k), self.shared(v), mask)
        return self.resid_dropout(self.c_proj(y.to(qkv.dtype).transpose(1, 2).reshape(B, T, -1)))

    def heads(self, qkv: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv (B, T, n_head + 2 n_kv, head_dim) -> queries (B, n_head, T, head_dim), keys and values (B, n_kv, T, …).

        Queries and keys come with all that the architecture does to them before they meet.
        """
        q, k, v = qkv.split((self.n_head, self.n_kv, self.n_kv), dim=2)
        if self.q_norm is not None:
            q, k = (rms_norm(t, norm.weight, norm.eps) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        if rope is not None:
            q, k = rotate(q.float(), rope), rotate(k.float(), rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def shared(self, t: torch.Tensor) -> torch.Tensor:
        """Keys or values (B, n_kv, T, head_dim), of which each head serves several of queries: (B, n_head, …)."""
        return t if self.n_kv == self.n_head else t.repeat_interleave(self.n_head // self.n_kv, dim=1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What each of q's T queries reads, (B, n_head, T, head_dim), in v's dtype.

        A query sees the keys up to its own place, or those that a mask (…, T, keys) admits.
        """
        dropout, is_causal = self.dropout if self.training else 0.0, mask is None and q.size(2) > 1
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.is_gated = config.arch != "gpt2"
        self.c_fc = nn.Linear(config.n_embd, (1 + self.is_gated) * config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

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
    """`loss_of_logits` of a linear head, without ever holding all logits or their gradient.

    The gradients of the head's input and weight are taken chunk by chunk in the forward pass, while the chunk's logits
    are at hand, so the head is multiplied once and the backward pass only scales. They are kept as sums, not means,
    which leaves float16 its range.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights, divisor):
        """hidden (N, C), head (V, C), targets (N,), weights (N,) or None -> a float32 scalar."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        h_all, w = hidden.to(dtype), head.to(dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad:
            grad_hidden = torch.empty_like(h_all)
            grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        counted = targets != -1
        factors = counted if weights is None else counted * weights
        rows = max(1, LOSS_CHUNK_LOGITS // head.size(0))
        for start in range(0, hidden.size(0), rows):
            part = slice(start, start + rows)
            h, factor = h_all[part], factors[part].unsqueeze(1)
            target = targets[part].unsqueeze(1).clamp(min=0)  # where ignored, any valid row: its factor is 0
            logits = F.linear(h, w).float()  # (rows, V)
            log_norm = logits.logsumexp(dim=1, keepdim=True)
            total += ((log_norm - logits.gather(1, target)) * factor).sum()
            if needs_grad:
                grad_logits = logits.sub_(log_norm).exp_()  # softmax, in place
                grad_logits.scatter_add_(1, target, torch.full_like(log_norm, -1.0))
                grad_logits = grad_logits.mul_(factor).to(dtype)
                grad_hidden[part] = grad_logits @ w
                if grad_head is not None:  # else the head is frozen
                    grad_head += grad_logits.T @ h
        if divisor is None:
            count = counted.sum()
            loss, divisor = total / count, count.clamp(min=1)
        else:
            loss = total / divisor
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.divisor, ctx.dtypes = divisor, (hidden.dtype, head.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor):
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_loss / ctx.divisor
        if grad_head is not None:
            grad_head = (grad_head * scale).to(ctx.dtypes[1])
        return (grad_hidden * scale).to(ctx.dtypes[0]), grad_head, None, None, None


def loss_of_logits(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, divisor):
    """The mean loss of the targets (N,) that are not -1, given logits (N, V), in nats.

    With a divisor: the sum of their losses, times weights (N,) where there are any, over the divisor.
    """
    if divisor is None:
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)
    losses = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")
    return (losses if weights is None else losses * weights).sum() / divisor


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights=None, divisor=None):
    """`loss_of_logits` of hidden @ head.T, of which few are held at a time: hidden (N, C), head (V, C)."""
    if hidden.size(0) * head.size(0) > LOSS_CHUNK_LOGITS:
        if not torch.is_grad_enabled():  # autograd would ask for the gradients all the same
            hidden, head = hidden.detach(), head.detach()
        return ChunkedCrossEntropy.apply(hidden, head, targets, weights, divisor)
    return loss_of_logits(F.linear(hidden, head), targets, weights, divisor)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        """Raises ValueError where the config describes no network."""
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.arch == "gpt2":  # in this place, since optimizer states number the parameters in their order
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
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

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        divisor: float | torch.Tensor | None = None,
        return_logits: bool = True,
    ):
        """idx (B, T) int64, targets (B, T) int64 with -1 where there is nothing to predict -> (logits, loss).

        Without targets: the logits of the last position (B, 1, V), and None. With targets: all logits (B, T, V) and the
        mean loss in nats; return_logits=False gives None for the logits and takes the loss in chunks, which saves their
        memory. Raises ValueError where T is over block_size.

        weights (B, T), constants: what each target's loss is multiplied by, such as 0 and 1, a mask, or an advantage.
        divisor: a number, or a tensor of one, that the sum is divided by, in place of the mean. Given how many targets
        count in all micro-batches together, their losses, and gradients, add up to those of the whole batch, and a
        micro-batch without any adds exactly 0. Weights alone are divided by the number of those that are not 0 here.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit in block_size {self.config.block_size}")
        x = self._hidden(idx, torch.arange(idx.size(1), device=idx.device))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        if weights is not None:
            if weights.shape != targets.shape:
                raise ValueError(f"weights are {(*weights.shape,)}, and targets {(*targets.shape,)}: give one for each")
            if divisor is None:
                divisor = ((weights != 0) & (targets != -1)).sum().clamp(min=1)
            weights = weights.detach().reshape(-1).float()
        targets = targets.reshape(-1)
        if return_logits:
            logits = self.lm_head(x)
            return logits, loss_of_logits(logits.view(-1, logits.size(-1)), targets, weights, divisor)
        return None, cross_entropy(x.view(-1, x.size(-1)), self.lm_head.weight, targets, weights, divisor)

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

        model_type: a folder with a GPT-2, Qwen3 or Llama, or gpt2, gpt2-medium, gpt2-large, gpt2-xl. override_args:
        `dropout` alone may be given. Raises ValueError that names what in the folder is not computed here, missing or
        misshapen, OSError where nothing is found or the download fails, ImportError where a package is missing.
        """
        override_args = override_args or {}
        if unknown := set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(unknown))}")
        # Imported by its name and here alone: without that room this file is still a whole network
        return importlib.import_module("quartz.hf_folder").read_model(model_type, override_args.get("dropout", 0.0))

    def decay_groups(self, weight_decay: float) -> list[dict]:
        """What an optimizer is made of: matrices and embeddings decay, vectors (biases, norms) do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW (Loshchilov and Hutter, 2019) over decay_groups."""
        groups, fused = self.decay_groups(weight_decay), device_type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

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
                token = torch.multinomial(F.softmax((logits - logits.amax(-1, True)) / temperature, dim=-1), 1)
            idx = torch.cat((idx, token), dim=1)
        self.train(training)
        return idx
