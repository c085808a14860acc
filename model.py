"""GPT: the network, the loss, and generation with a key/value cache. One file that needs only torch; copy it freely.

The architecture is GPT-2's (Radford et al., 2019): learned positions, pre-norm blocks, GELU in its tanh form, input
and output embeddings tied, and, as in nanoGPT, optional biases. Parameter names are nanoGPT's.

Shapes: B batch, T time, C = n_embd channels, V vocabulary, head_dim = C / n_head.
"""

import json
import math
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

LOSS_CHUNK_LOGITS = 2**25  # logits that the chunked loss holds at a time: 128 MiB in float32
CPU_FLOAT32_ATTENTION = 512  # up to this context, attention on CPUs trains faster in float32 than in bfloat16
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # not weights, though older code kept them among the weights
# Hugging Face keeps GPT-2's names, without the "transformer." in front, and these weights transposed.
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

    def problems(self) -> list[str]:
        """What makes this no buildable network, one line each."""
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        found = [f"{name} must be at least 1, not {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if self.n_head >= 1 and self.n_embd % self.n_head:
            found.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), not {self.dropout}")
        return found


class KVCache:
    """Keys and values of the tokens seen so far, for each layer, in memory that is reserved once.

    keys, values: (n_layer, B, n_head, block_size, head_dim). `length` counts the positions that are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores k, v (B, n_head, T, head_dim) behind `length`; returns all keys and values up to them."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """x: (B, T, C). With a cache, T tokens into an empty one (prefill), or one token behind it (decode)."""
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            assert cache.length == 0 or T == 1, "several tokens behind a cache would need a mask of their own"
            k, v = cache.extend(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        if self.training and x.device.type == "cpu" and T <= CPU_FLOAT32_ATTENTION:
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout, is_causal=T > 1)
            y = y.to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)  # (B, n_head, T, head_dim)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


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
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
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
        return (grad_hidden * scale).to(ctx.dtypes[0]), (grad_weight * scale).to(ctx.dtypes[1]), None, None


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1):
    """Mean cross-entropy of the logits hidden @ weight.T: hidden (N, C), weight (V, C), targets (N,) -> scalar."""
    if hidden.size(0) * weight.size(0) > LOSS_CHUNK_LOGITS:
        if not torch.is_grad_enabled():  # autograd would ask for the gradients all the same
            hidden, weight = hidden.detach(), weight.detach()
        return ChunkedCrossEntropy.apply(hidden, weight, targets, ignore_index)
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=ignore_index)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        """Raises ValueError where the config describes no network."""
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: what adds to the residual stream shrinks with depth
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, by default without the position embeddings. Tied weights count once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def _hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The final layer norm's output (B, T, C) for tokens idx (B, T), which stand behind what the cache holds."""
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit in block_size {self.config.block_size}")
        position = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            # Compiled blocks are for training: behind a cache each step has another shape, and would compile again.
            x = block(x) if cache is None else block.forward(x, cache)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, return_logits: bool = True):
        """idx (B, T) int64, targets (B, T) int64 with -1 where there is nothing to predict -> (logits, loss).

        Without targets: the logits of the last position (B, 1, V), and None. With targets: all logits (B, T, V) and the
        mean loss in nats; return_logits=False gives None for the logits and takes the loss in chunks, which saves their
        memory. Raises ValueError where T is over block_size.
        """
        x = self._hidden(idx)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        if return_logits:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1)
            return logits, loss
        return None, cross_entropy(x.view(-1, x.size(-1)), self.lm_head.weight, targets.reshape(-1))

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context to block_size: the later position embeddings go."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size {block_size} must be from 1 to the model's {self.config.block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> "GPT":
        """GPT-2's weights, from a folder of that name (model.safetensors, config.json) or else from the hub.

        model_type: one of GPT2_MODELS, or a folder. override_args: `dropout` alone may be given. Needs the safetensors
        package, and huggingface_hub for a download. Raises ValueError where the folder holds something else than GPT-2,
        OSError where nothing is found or the download fails, ImportError where a package is missing.
        """
        override_args = override_args or {}
        if unknown := set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(unknown))}")
        config_path, weights_path = _pretrained_files(model_type)
        try:
            with open(config_path, encoding="utf-8") as file:
                theirs = dict(json.load(file))
            sizes = {name: theirs[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
            config = GPTConfig(block_size=theirs["n_positions"], **sizes, bias=True, **override_args)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config_path} describes no GPT-2 ({error})") from error
        expected = {"model_type": "gpt2", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        for key, value in expected.items():
            if theirs.get(key, value) != value:
                raise ValueError(f"{config_path}: {key} is {theirs[key]!r}, and only {value!r} is read here")
        if theirs.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"{config_path}: activation {theirs['activation_function']!r} is not GPT-2's")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path} is damaged ({error})") from error
        model, state = cls(config), {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            if name.endswith(CAUSAL_MASKS) or name == "lm_head.weight":  # which is tied
                continue
            state["transformer." + name] = tensor.t() if name.endswith(GPT2_TRANSPOSED) else tensor
        state["lm_head.weight"] = state.get("transformer.wte.weight")
        try:
            model.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"{weights_path} does not hold the weights that {config_path} describes") from error
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW in two groups: matrices and embeddings decay, vectors (biases, layer norms) do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for a token (PaLM, Chowdhery et al., 2022, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilisation: the share of `peak_flops` (default: an A100's in bfloat16) that is put to use.

        fwdbwd_per_iter: sequences of block_size in an iteration; dt: its time in seconds.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        vocab_size: int | None = None,
        seeds: list[int] | None = None,
    ) -> torch.Tensor:
        """Continues the prompts idx (B, T) int64 by max_new_tokens; returns (B, T + max_new_tokens).

        temperature 0 takes the likeliest token. top_k keeps the k likeliest (and what ties with the last of them); 0 or
        None keeps all. Ids from vocab_size on are never drawn. Row b draws its tokens with seeds[b], whatever the other
        rows are; without seeds, torch's generator serves.

        Each token is drawn given all before it while they fit in block_size. A longer prompt counts by its last
        block_size tokens, and whenever the context is full its older half is dropped, so that the cost of a token stays
        what it is: within a half, the context is from half to all of block_size long.

        Raises ValueError for an empty prompt or a setting out of range.
        """
        c = self.config
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError("the prompt must hold at least one token")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, not {temperature}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, not {top_k}")
        if seeds is None:
            uniform = torch.rand(idx.size(0), max_new_tokens)
        else:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            uniform = torch.stack([torch.rand(max_new_tokens, generator=generator) for generator in generators])
        uniform = uniform.to(idx.device)
        training = self.training
        self.eval()
        length = idx.size(1)
        tokens = torch.cat((idx, idx.new_empty(idx.size(0), max_new_tokens)), dim=1)
        cache = KVCache(c, idx.size(0), idx.device, self._cache_dtype(idx.device.type))
        context = tokens[:, max(0, length - c.block_size) : length]  # what the cache does not hold yet
        for n in range(max_new_tokens):
            if cache.length == c.block_size:
                cache.length = 0
                context = tokens[:, length - max(1, c.block_size // 2) : length]
            logits = self.lm_head(self._hidden(context, cache)[:, -1])[:, :vocab_size]  # (B, V)
            tokens[:, length] = draw(logits.float(), temperature, top_k, uniform[:, n])
            context = tokens[:, length : length + 1]
            length += 1
        self.train(training)
        return tokens

    def _cache_dtype(self, device_type: str) -> torch.dtype:
        """The dtype that keys and values are computed in."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.lm_head.weight.dtype


def draw(logits: torch.Tensor, temperature: float, top_k: int | None, uniform: torch.Tensor) -> torch.Tensor:
    """Draws a token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) in [0, 1) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k:
        threshold = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    # The maximum is taken off first: divided by a tiny temperature, the logits themselves would overflow.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return ((cumulative > point) & (probs > 0)).int().argmax(dim=-1)


def _pretrained_files(name: str) -> tuple[str, str]:
    """The paths of config.json and model.safetensors: in the folder `name`, or downloaded from the hub."""
    files = ("config.json", "model.safetensors")
    if os.path.isdir(name):
        paths = tuple(os.path.join(name, file) for file in files)
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise OSError(f"missing {' and '.join(missing)}")
        return paths
    if name not in GPT2_MODELS:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(GPT2_MODELS)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its remarks on every retry; what comes of them is said below
    try:
        return tuple(hf_hub_download(f"openai-community/{name}", file) for file in files)
    except Exception as error:  # the client raises a dozen kinds; all of them mean that there is no file
        raise OSError(
            f"{name} could not be downloaded ({type(error).__name__}); a local folder {name!r} serves as well"
        ) from error
