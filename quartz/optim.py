"""Optimizers: AdamW as nanoGPT uses it, and Muon for matrices with AdamW for the rest.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
orthogonal one, found by a few Newton-Schulz steps: a step of the same length in every direction of the matrix.
"""

import inspect
import math

import torch
from torch.optim.adamw import adamw

from model import GPT
from quartz import kernels, ranks
from quartz.errors import UserError

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: singular values go to about 1 in 5 steps, from 0.01 on
NEWTON_SCHULZ_STEPS = 5
FIRST_MOMENTUM, MOMENTUM_WARMUP = 0.85, 300  # of the published records: gradients that age fast mislead at the start
RATES_WIDTH = 768  # the width at which the rates of embeddings and head hold; they go with its inverse square root


def momentum_at(iteration: int, highest: float) -> float:
    """Muon's momentum, which rises along a line over the first MOMENTUM_WARMUP updates."""
    first = min(FIRST_MOMENTUM, highest)
    return first + (highest - first) * min(1.0, iteration / MOMENTUM_WARMUP)


def set_rates(updater: torch.optim.Optimizer, rates: list[float], momentum: float) -> None:
    """Gives each group its rate, and those that have one the momentum."""
    for group, rate in zip(updater.param_groups, rates, strict=True):
        group["lr"] = rate
        if "momentum" in group:
            group["momentum"] = momentum


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly orthogonalises a batch of matrices (n, rows, columns), rows <= columns: U S V' becomes about U V'."""
    a, b, c = QUINTIC
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if kernels.newton_schulz(x, QUINTIC, NEWTON_SCHULZ_STEPS):
        return x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def adamw_step(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """A step of AdamW for a group's parameters that have gradients."""
    parameters = [p for p in group["params"] if p.grad is not None]
    grads, states = [p.grad for p in parameters], [optimizer.state[p] for p in parameters]
    for p, state in zip(parameters, states, strict=True):
        if not state:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            counts_on = p.device if group["fused"] else "cpu"  # as torch's own
            state |= {"step": torch.zeros((), dtype=torch.float32, device=counts_on), **zeros}
    steps, means, squares = ([state[key] for state in states] for key in moment_names(group))
    (beta1, beta2), rest = group["betas"], {key: group[key] for key in ("lr", "weight_decay", "eps", "fused")}
    rest |= {key: getattr(optimizer, key, None) for key in ("grad_scale", "found_inf")}  # from float16's scaler
    adamw(
        parameters, grads, means, squares, [], steps,
        beta1=beta1, beta2=beta2, amsgrad=False, maximize=False, **rest,
    )  # fmt: skip


class AdamW(torch.optim.AdamW):
    """torch's, without what its methods are wrapped in: at their first call that loads torch.compile, for a second."""

    add_param_group, load_state_dict, state_dict, zero_grad = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    )

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None or any(group["amsgrad"] or group["maximize"] for group in self.param_groups):
            return super().step(closure)  # what no run here asks for
        for group in self.param_groups:
            adamw_step(self, group)


def adamw_of(
    model: GPT, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
) -> AdamW:
    """What GPT.configure_optimizers makes, quicker at its first step."""
    fused = device_type in ("cuda", "cpu")
    return AdamW(model.decay_groups(weight_decay), lr=learning_rate, betas=betas, fused=fused)


class Muon(torch.optim.Optimizer):
    """Muon for the groups with kind='muon', fused AdamW for the others.

    A group of Muon's: `parts` gives for each of its matrices the rows of those that were fused into it, each of which
    is orthogonalised by itself. Keys: lr, momentum, weight_decay (decoupled). A part (rows, columns) moves by
    lr * sqrt(max(1, rows / columns)) times an orthogonal matrix. A step computes in place of its matrices' gradients.
    """

    # Such as load no compiler
    add_param_group, load_state_dict = AdamW.add_param_group, AdamW.load_state_dict
    state_dict, zero_grad = AdamW.state_dict, AdamW.zero_grad

    def __init__(self, groups: list[dict], dtype: torch.dtype):
        """dtype: of the Newton-Schulz steps."""
        super().__init__(groups, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "no closure is called"
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon_step(group)
            else:
                adamw_step(self, group)

    def _muon_step(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        sizes = [parts for p, parts in zip(group["params"], group["parts"], strict=True) if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # Element by element each process works on its own part: not every release of torch has these for divided ones
        own = ranks.own_part
        momenta, grads = [own(self.state[p]["momentum_buffer"]) for p in parameters], [own(p.grad) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, momenta, group["momentum"])  # Nesterov's: one step ahead
        updates = [ranks.whole(p.grad) for p in parameters]
        places: dict[tuple[int, int], list[torch.Tensor]] = {}  # parts of one shape, lying down, to go in one batch
        for update, rows in zip(updates, sizes, strict=True):
            for part in update.split(rows):
                flat = part if part.size(0) <= part.size(1) else part.mT
                places.setdefault(tuple(flat.shape), []).append(flat)
        for flats in places.values():
            for flat, orthogonal in zip(flats, newton_schulz(torch.stack(flats).to(self.dtype)), strict=True):
                flat.copy_(orthogonal)  # in place of the update that it came from
        for update, rows in zip(updates, sizes, strict=True):
            for part in update.split(rows):
                part.mul_(math.sqrt(max(1.0, part.size(0) / part.size(1))))
        updates = [own(ranks.divided_like(update, p)) for update, p in zip(updates, parameters, strict=True)]
        parameters = [own(p) for p in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def muon(
    model: GPT,
    rates: dict[str, float],
    momentum: float,
    betas: tuple[float, float],
    weight_decay: float,
    compute_dtype: torch.dtype = torch.float32,
) -> Muon:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and vectors.

    rates: 'matrix', 'embedding', 'head', 'vector'. Those of embedding and head are meant for a width of RATES_WIDTH.
    compute_dtype: the run's; Newton-Schulz takes bfloat16 with it, as the records do, and float32 else. Every parameter
    is in exactly one group.
    """
    c, transformer = model.config, model.transformer
    by_width = math.sqrt(RATES_WIDTH / c.n_embd)
    matrices = {name: p for name, p in transformer.h.named_parameters() if p.dim() == 2}
    fused = {
        "attn.c_attn.weight": [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)],
        "mlp.c_fc.weight": [c.n_hidden, c.n_hidden],
    }
    if c.arch == "gpt2":
        del fused["mlp.c_fc.weight"]
    parts = [fused.get(name.split(".", 1)[1], [p.size(0)]) for name, p in matrices.items()]
    others = {"kind": "adamw", "betas": betas, "weight_decay": 0.0, "fused": True}
    others["eps"] = 1e-10  # zero heads want so small a one
    embeddings = [p for name, p in transformer.named_parameters() if name in ("wte.weight", "wpe.weight")]
    groups = [
        {"kind": "muon", "params": list(matrices.values()), "parts": parts, "lr": rates["matrix"], "momentum": momentum}
        | {"weight_decay": weight_decay},
        others | {"params": embeddings, "lr": rates["embedding"] * by_width},
        others | {"params": [p for p in model.parameters() if p.dim() < 2], "lr": rates["vector"]},
    ]
    if not c.tie_embeddings:
        groups.append(others | {"params": [model.lm_head.weight], "lr": rates["head"] * by_width})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "each parameter belongs in exactly one group"
    return Muon(groups, torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32)


def multipliers(text: str) -> dict[str, float]:
    """What lr_multipliers says, by part of a name: 'wte=0.5,c_proj=2'. Raises UserError for anything else."""
    found = {}
    for entry in filter(None, text.split(",")):
        part, _, number = entry.partition("=")
        try:
            found[part.strip()] = float(number)
        except ValueError:
            number = "nan"
        if not part.strip() or not 0 <= float(number) < math.inf:
            raise UserError(f"lr_multipliers: {entry!r} is not of the form wte=0.5, with a number that is not negative")
    return found


def refine(updater: torch.optim.Optimizer, model: GPT, rates: dict[str, float], no_decay: str) -> None:
    """Splits the optimizer's groups where parameters whose names hold a part get other rates, or no weight decay.

    rates: by part of a name, what multiplies the rate; several parts in one name multiply. no_decay: parts, separated
    by commas. Groups get `param_names`, by which a checkpoint finds them again. Raises UserError for a part that no
    name holds.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    exempt_parts = [part.strip() for part in no_decay.split(",") if part.strip()]
    for part in [*rates, *exempt_parts]:
        if not any(part in name for name in names.values()):
            example = next(iter(names.values()))
            raise UserError(f"lr_multipliers or no_decay: no parameter's name holds {part!r}; a name is {example}")
    refined = []
    for group in updater.param_groups:
        alike: dict[tuple[float, bool], list[int]] = {}  # places in the group
        for place, p in enumerate(group["params"]):
            rate = math.prod(number for part, number in rates.items() if part in names[id(p)])
            exempt = any(part in names[id(p)] for part in exempt_parts)
            alike.setdefault((rate, exempt), []).append(place)
        for (rate, exempt), places in alike.items():
            lists = {key: [group[key][n] for n in places] for key in ("params", "parts") if key in group}
            lists["param_names"] = [names[id(p)] for p in lists["params"]]
            decay = 0.0 if exempt else group["weight_decay"]
            refined.append(group | lists | {"lr": group["lr"] * rate, "weight_decay": decay})
    updater.param_groups = refined


def moment_names(group: dict) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter of a group."""
    return ("momentum_buffer",) if group.get("kind") == "muon" else ("step", "exp_avg", "exp_avg_sq")
