import math

import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import optim
from quartz.checkpoint import load_optimizer
from quartz.optim import momentum_at, multipliers, muon, newton_schulz, refine

RATES = {"matrix": 0.02, "embedding": 0.012, "head": 0.004, "vector": 0.01}
QWEN3 = {"arch": "qwen3", "bias": False, "n_kv_head": 2, "tie_embeddings": False}


def make(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": 33, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**{**shape, **changes}))


def make_muon(model: GPT, weight_decay: float = 0.1):
    return muon(model, RATES, 0.95, (0.8, 0.95), weight_decay)


def grads(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_newton_schulz_makes_singular_values_about_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 8), (2, 5, 40), (1, 1, 7)):
        x = torch.randn(shape, generator=generator)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        found = newton_schulz(x)
        along = torch.einsum("nri,nrc,nic->ni", u, found, v)  # the singular vectors stay, the values change
        assert along[s / s.norm(dim=1, keepdim=True) > 0.05].sub(0.95).abs().max() < 0.35
        off = u.mT @ found @ v.mT - torch.diag_embed(along)
        assert off.abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, QWEN3, QWEN3 | {"tie_embeddings": True}], ids=str)
def test_every_parameter_is_in_one_group_and_moves(changes):
    model = make(**changes)
    updater = make_muon(model)
    grouped = [p for group in updater.param_groups for p in group["params"]]
    assert len(grouped) == len(list(model.parameters())) and {*map(id, grouped)} == {*map(id, model.parameters())}
    matrices = {id(p) for p in updater.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert len(names) == 8 and all(name.startswith("transformer.h.") and name.endswith("weight") for name in names)
    before = [p.clone() for p in model.parameters()]
    grads(model, 1)
    updater.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("changes", [{}, QWEN3], ids=str)
def test_batches_of_parts_are_what_each_part_alone_would_be(changes):
    """Against the algorithm as it is written down: a loop over matrices, each part of a fused one by itself."""
    model = make(**changes)
    c, naive = model.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in naive.items()}
    updater = make_muon(model)
    a, b, d = optim.QUINTIC
    for turn in range(3):
        grads(model, turn)
        for name, p in model.named_parameters():
            if p.dim() < 2 or ".h." not in name:
                continue
            momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
            ahead = 0.05 * p.grad + 0.95 * momenta[name]
            rows = [p.size(0)]
            if "c_attn" in name:
                rows = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
            elif "c_fc" in name and c.arch == "qwen3":
                rows = [c.n_hidden, c.n_hidden]
            moves = []
            for part in ahead.split(rows):
                x = part / part.norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = a * x + (b * gram + d * gram @ gram) @ x
                moves.append(x * math.sqrt(max(1, part.size(0) / part.size(1))))
            naive[name] = naive[name] * (1 - 0.02 * 0.1) - 0.02 * torch.cat(moves)
        updater.step()
        for name, p in model.named_parameters():
            if p.dim() == 2 and ".h." in name:
                torch.testing.assert_close(p.detach(), naive[name], atol=2e-5, rtol=0, msg=name)


def test_it_moves_as_torchs_own_muon_does():
    model = make(arch="gpt2", bias=False)
    name = "transformer.h.0.mlp.c_fc.weight"
    twin = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    other = torch.optim.Muon([twin], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, adjust_lr_fn="original")
    updater, before = make_muon(model), twin.detach().clone()
    for turn in range(3):
        grads(model, turn)
        twin.grad = model.get_parameter(name).grad.clone()
        updater.step()
        other.step()
    assert (model.get_parameter(name) - before).abs().max() > 0.01
    torch.testing.assert_close(model.get_parameter(name), twin, atol=2e-3, rtol=0)  # theirs is in bfloat16


def test_the_rest_is_adamw():
    model, twin = make(**QWEN3), make(**QWEN3)
    updater = make_muon(model)
    other = torch.optim.AdamW(
        [
            {"params": [twin.transformer.wte.weight], "lr": 0.012 * math.sqrt(768 / 32)},
            {"params": [p for p in twin.parameters() if p.dim() < 2], "lr": 0.01},
            {"params": [twin.lm_head.weight], "lr": 0.004 * math.sqrt(768 / 32)},
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    )
    for turn in range(3):
        grads(model, turn)
        grads(twin, turn)
        updater.step()
        other.step()
    for name, p in model.named_parameters():
        if p.dim() < 2 or ".h." not in name:
            torch.testing.assert_close(p, twin.get_parameter(name), atol=1e-6, rtol=1e-5, msg=name)


def test_a_saved_optimizer_goes_on_as_if_it_had_not_been_saved():
    models = [make(**QWEN3) for _ in range(2)]
    updaters = [make_muon(model) for model in models]
    for turn in range(2):
        for model, updater in zip(models, updaters, strict=True):
            grads(model, turn)
            updater.step()
    fresh = make_muon(models[1])
    fresh.load_state_dict(updaters[1].state_dict())
    for model, updater in zip(models, (updaters[0], fresh), strict=True):
        grads(model, 2)
        updater.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_momentum_rises_to_its_value():
    assert momentum_at(0, 0.95) == 0.85 and momentum_at(150, 0.95) == pytest.approx(0.9)
    assert momentum_at(300, 0.95) == momentum_at(9999, 0.95) == pytest.approx(0.95) and momentum_at(0, 0.5) == 0.5


def test_multipliers_reach_the_parameters_that_they_name():
    """One step from the same gradients: what is named moves by so many times as much, and the rest as before."""
    plain, other = make(**QWEN3), make(**QWEN3)
    refined = make_muon(other, weight_decay=0.0)
    refine(refined, other, multipliers("mlp.c_fc=0.5, h.1.=3,lm_head=0"), "")
    updaters = [make_muon(plain, weight_decay=0.0), refined]
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for model, updater in zip((plain, other), updaters, strict=True):
        grads(model, 1)
        updater.step()
    for name, p in plain.named_parameters():
        rate = (0.5 if "mlp.c_fc" in name else 1) * (3 if "h.1." in name else 1) * (0 if "lm_head" in name else 1)
        moved, moved_other = p - before[name], other.get_parameter(name) - before[name]
        torch.testing.assert_close(moved_other, rate * moved, atol=2e-4 * max(1, rate), rtol=2e-2, msg=name)


@pytest.mark.parametrize("make_updater", [make_muon, lambda m: m.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")])
def test_what_is_named_does_not_decay(make_updater):
    model = make()
    updater = make_updater(model)
    decayed = {id(p) for group in updater.param_groups if group["weight_decay"] for p in group["params"]}
    refine(updater, model, {}, "wte, c_proj")
    still = {id(p) for group in updater.param_groups if group["weight_decay"] for p in group["params"]}
    expected = {id(p) for name, p in model.named_parameters() if "wte" not in name and "c_proj" not in name}
    assert still == decayed & expected and still != decayed
    assert sum(len(group["params"]) for group in updater.param_groups) == len(list(model.parameters()))


def test_moments_find_their_parameters_when_the_groups_are_split_otherwise():
    model = make(**QWEN3)
    saved, fresh = make_muon(model), make_muon(model)
    refine(saved, model, {"c_fc": 0.5}, "wte")
    refine(fresh, model, {"h.0.": 2.0}, "")
    grads(model, 0)
    saved.step()
    load_optimizer(fresh, {"optimizer": saved.state_dict(), "path": "here"})
    for p in model.parameters():
        assert saved.state[p].keys() == fresh.state[p].keys()
        assert all(torch.equal(value, fresh.state[p][key]) for key, value in saved.state[p].items())


@pytest.mark.parametrize("text", ["wte", "wte=x", "=2", "wte=-1", "wte=nan", "wte=inf", "wte=1=2"])
def test_multipliers_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match="lr_multipliers"):
        multipliers(text)


def test_a_name_that_no_parameter_has_is_refused():
    model = make()
    with pytest.raises(UserError, match="'wtf'.*transformer.wte.weight"):
        refine(make_muon(model), model, {"wtf": 2.0}, "")
