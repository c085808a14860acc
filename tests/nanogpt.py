"""A second opinion: GPT-2 with nanoGPT's parameter names, written from its file format alone.

It shares no code with model.py. It writes checkpoints as nanoGPT writes them, and reads them as its train.py and
sample.py do: model_args become the configuration's arguments, the weights load strictly, AdamW takes its state.
"""

import math

import torch
from torch import nn

ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight
        return y if self.bias is None else y + self.bias


class Reference(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        blocks = []
        for _ in range(n_layer):
            block = nn.Module()
            block.ln_1, block.attn, block.ln_2, block.mlp = (
                Norm(n_embd, bias),
                nn.Module(),
                Norm(n_embd, bias),
                nn.Module(),
            )
            block.attn.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
            block.attn.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
            block.mlp.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
            block.mlp.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
            blocks.append(block)
        wte, wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        parts = {"wte": wte, "wpe": wpe, "h": nn.ModuleList(blocks), "ln_f": Norm(n_embd, bias)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, idx):
        T = idx.size(1)
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T))
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        for block in self.transformer.h:
            heads = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, self.n_head, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            h = block.mlp.c_fc(block.ln_2(x))
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + block.mlp.c_proj(h)
        return self.lm_head(self.transformer.ln_f(x))

    def adamw(self):
        """Two groups, as nanoGPT makes them: what has two dimensions decays, the rest does not."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def write(path, best_val_loss, prefix="", iter_num=4, dataset="tiny", **model_args) -> Reference:
    """Trains a Reference for a few steps on noise and saves it as nanoGPT would; returns it."""
    torch.manual_seed(0)
    model = Reference(**model_args)
    optimizer = model.adamw()
    for _ in range(iter_num):
        tokens = torch.randint(model_args["vocab_size"], (2, model_args["block_size"] + 1))
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": {"dataset": dataset, "batch_size": 4, "block_size": model_args["block_size"]},
    }
    torch.save(state, path)
    return model


def read(path) -> tuple[Reference, torch.optim.AdamW, dict]:
    """What nanoGPT takes from a checkpoint, in the way it takes it."""
    state = torch.load(path, weights_only=False)
    assert set(state["model_args"]) <= set(ARGS), "GPTConfig(**model_args) would refuse them"
    model = Reference(**state["model_args"])
    model.load_state_dict(state["model"])
    optimizer = model.adamw()
    optimizer.load_state_dict(state["optimizer"])
    float(state["best_val_loss"]), int(state["iter_num"]), state["config"]["dataset"]
    return model, optimizer, state
