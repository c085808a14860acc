"""LoRA (Hu et al., 2021): a model that exists is adapted by thin matrices beside its frozen weights.

Each linear layer of the blocks computes x W^T + (alpha / rank) x A^T B^T, of which A and B alone are trained; B begins
at zero. Merged, W + (alpha / rank) B A, it is the network that it was, and as fast.
"""

import hashlib

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT
from quartz import machine

PARTS = (".lora_a", ".lora_b")
LAYERS = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))  # of each block


class LoRALinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        """Takes over the weights of `linear`, frozen. lora_a (rank, in), lora_b (out, rank)."""
        super().__init__()
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        rows, columns = linear.weight.shape
        self.lora_a = nn.Parameter(torch.randn(rank, columns, device=linear.weight.device) * columns**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def attach(model: GPT, rank: int, alpha: float) -> None:
    """Freezes the model, in place, and puts an adapter beside each linear layer of its blocks."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.transformer.h:
        for part, name in LAYERS:
            setattr(getattr(block, part), name, LoRALinear(getattr(getattr(block, part), name), rank, alpha))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Adds the adapters to the weights, in place; the model is again one without them, and can be trained whole."""
    for block in model.transformer.h:
        for part, name in LAYERS:
            old = getattr(getattr(block, part), name)
            with machine.no_memory():
                plain = nn.Linear(1, 1, bias=False)
            plain.out_features, plain.in_features = old.weight.shape
            plain.weight, plain.bias = nn.Parameter(old.weight + old.scale * old.lora_b @ old.lora_a), old.bias
            setattr(getattr(block, part), name, plain)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """What tells whether a model is the one that adapters were trained on: of the weights that they stand beside."""
    found = hashlib.sha256()
    for name in sorted(
        name for name in state if name.endswith(tuple(f".{part}.{layer}.weight" for part, layer in LAYERS))
    ):
        found.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters among a model's tensors."""
    return {name: tensor for name, tensor in state.items() if name.endswith(PARTS)}
