import json

import pytest
import torch
from conftest import assert_same_run, assert_user_error, flags, load

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, lora, run_folder, sources

SHAPES = {
    "gpt2": {"bias": True},
    "gpt2 without biases": {"bias": False},
    "qwen3": {"bias": False, "arch": "qwen3", "n_kv_head": 1, "tie_embeddings": False},
}


def make(kind: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 29, 2, 2, 16, **SHAPES[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", SHAPES)
def test_an_adapted_model_begins_as_it_was_and_merged_computes_what_it_did(kind):
    model, idx = make(kind), torch.randint(29, (2, 16))
    names, before = [*model.state_dict()], model(idx, idx)[0]
    lora.attach(model, 4, 8.0)
    assert torch.equal(model(idx, idx)[0], before)
    with torch.no_grad():
        for tensor in lora.adapters(model.state_dict()).values():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    adapted = model(idx, idx)[0]
    assert (adapted - before).abs().max() > 0.1
    lora.merge(model)
    assert [*model.state_dict()] == names
    torch.testing.assert_close(model(idx, idx)[0], adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_only_the_adapters_are_trained(kind):
    model, idx = make(kind), torch.randint(29, (2, 16))
    lora.attach(model, 2, 4.0)
    model.train()
    updater = model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        model(idx, idx, return_logits=False)[1].backward()
        updater.step()
        updater.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(lora.adapters(before)) and len(changed) == 2 * 4 * 2
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("weights", [(), (torch.tensor([1.0, 0.0, -2.0, 0.5] * 8).view(2, 16), 7)], ids=["", "weights"])
def test_the_loss_in_chunks_leaves_a_frozen_head_alone(monkeypatch, weights):
    import model as model_module

    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", 50)
    model, idx = make("gpt2"), torch.randint(29, (2, 16))
    lora.attach(model, 2, 4.0)
    grads = []
    for return_logits in (True, False):
        model.zero_grad()
        model(idx, idx, *weights, return_logits=return_logits)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert model.lm_head.weight.grad is None


@pytest.fixture
def base(tiny, train):
    """A model that was trained a little, in out-base."""
    assert train(out_dir="out-base", max_iters=5).code == 0
    return tiny


def test_a_model_is_adapted_sampled_resumed_and_exported(base, train, run):
    tuned = {"init_from": "out-base", "lora_rank": 4, "dropout": 0.0, "learning_rate": 1e-2, "out_dir": "out-lora"}
    result = train(**tuned)
    assert result.code == 0, result.err
    assert "of which are trained: 0.00" in result.out
    state, before = load(base / "out-lora" / "ckpt.pt"), load(base / "out-base" / "ckpt.pt")["model"]
    assert state["lora"] == {"rank": 4, "alpha": 8.0}
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in before.items()), "the base is as it was"
    records = [json.loads(line) for line in (base / "out-lora" / "log.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[-1] < losses[0] - 0.01
    # the same in two goes
    assert train(**tuned | {"out_dir": "out-two", "max_iters": 5, "lr_decay_iters": 20}).code == 0
    result = train(**{"init_from": "resume", "out_dir": "out-two"} | {"dropout": 0.0, "learning_rate": 1e-2})
    assert result.code == 0, result.err
    assert_same_run(base / "out-lora", base / "out-two")
    # everything else sees one plain model
    model, _, _ = sources.model_and_tokenizer("resume", "out-lora")
    assert model.state_dict().keys() == before.keys() and not lora.adapters(model.state_dict())
    assert run("sample.py", *flags(out_dir="out-lora", num_samples=1, max_new_tokens=3, device="cpu")).code == 0
    measured = run("eval.py", *flags(out_dir="out-lora", device="cpu"))
    assert json.loads(measured.out.splitlines()[-1])["loss"] < 10
    result = run("export.py", *flags(out_dir="out-lora", to="nanogpt"))
    assert result.code == 0, result.err
    merged = load(base / "out-lora" / "nanogpt" / "ckpt.pt")["model"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in merged.items())
    # merged once, not twice
    result = run("export.py", *flags(out_dir="out-lora", adapter="out-lora/adapter.pt", to="nanogpt", path="twice"))
    assert_user_error(result, "has its adapters in it")
    # the adapter alone, and the base, make the same
    small = load(base / "out-lora" / "adapter.pt")
    assert small["model"].keys() == lora.adapters(state["model"]).keys()
    arguments = flags(init_from="out-base", adapter="out-lora/adapter.pt", to="nanogpt", path="again")
    assert run("export.py", *arguments).code == 0
    again = load(base / "again" / "ckpt.pt")["model"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": "scratch"}, "init_from"),
        ({"optimizer": "muon"}, "optimizer=adamw"),
        ({"lora_rank": -1}, "lora_rank must"),
        ({"lora_alpha": -1.0}, "lora_alpha must"),
        ({"init_from": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_do_not_go_with_adapters_are_one_line(base, train, changes, words):
    assert_user_error(train(**{"init_from": "out-base", "lora_rank": 4, "out_dir": "out-lora", **changes}), words)
    assert not (base / "out-lora" / "ckpt.pt").exists()


def test_another_rank_at_a_resume_is_refused(base, train):
    assert train(init_from="out-base", lora_rank=4, max_iters=2, out_dir="out-lora").code == 0
    result = train(init_from="resume", lora_rank=2, max_iters=4, out_dir="out-lora")
    assert_user_error(result, "lora_rank is 4")
    assert_user_error(train(init_from="resume", lora_rank=2, out_dir="out-base"), "lora_rank is 0")
    assert_user_error(train(init_from="resume", lora_alpha=100.0, max_iters=4, out_dir="out-lora"), "lora_alpha is 8.0")
    assert_user_error(train(init_from="resume", optimizer="muon", max_iters=4, out_dir="out-lora"), "optimizer=adamw")
    result = train(init_from="resume", max_iters=4, out_dir="out-lora")
    assert result.code == 0 and "lora" not in result.out.replace("out-lora", ""), result.out
    assert load(base / "out-lora" / "last.pt")["config"]["lora_alpha"] == 8.0


def test_a_shorter_context_leaves_the_position_embeddings_frozen(base, train):
    tuned = {"init_from": "out-base", "lora_rank": 4, "block_size": 8, "out_dir": "out-lora"}
    assert train(**tuned, max_iters=3).code == 0
    name = "transformer.wpe.weight"
    before, after = (
        load(base / "out-base" / "ckpt.pt")["model"][name],
        load(base / "out-lora" / "ckpt.pt")["model"][name],
    )
    assert torch.equal(before[:8], after)
    result = train(init_from="resume", out_dir="out-lora", block_size=4, max_iters=6)
    assert result.code == 0, result.err


def test_an_adapter_for_another_model_is_refused(base, train):
    assert train(init_from="out-base", lora_rank=4, max_iters=1, out_dir="out-lora").code == 0
    path = base / "out-lora" / "adapter.pt"
    for shape in ((16, 28, 2, 2, 32), (16, 28, 3, 2, 16), (16, 28, 1, 2, 16)):
        with pytest.raises(UserError, match="does not fit this model"):
            sources.merge_adapter(GPT(GPTConfig(*shape)), path)
    with pytest.raises(UserError, match="does not fit this model"):
        sources.merge_adapter(GPT(GPTConfig(16, 28, 2, 2, 16)), base / "out-base" / "ckpt.pt")
    other = checkpoint.build_model(run_folder.load_to_use("out-base"))
    other.transformer.h[0].attn.c_attn.weight.data += 0.01
    with pytest.raises(UserError, match="beside other weights"):
        sources.merge_adapter(other, path)
