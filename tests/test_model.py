import json
import math

import nanogpt
import pytest
import torch
from torch.nn import functional as F

import model as model_module
from model import GPT, GPTConfig
from quartz import hf_layout

SHAPE = {"block_size": 32, "vocab_size": 101, "n_layer": 3, "n_head": 4, "n_embd": 64}


def make(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SHAPE, **changes})).eval()


def tokens(*shape, seed=1):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def sharpened(model: GPT) -> GPT:
    """Larger weights: the logits differ by units, as a trained model's do, not by hundredths."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def as_transformers(model: GPT):
    """The same weights in transformers' GPT2LMHeadModel."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        state[name] = tensor.t() if name.endswith(hf_layout.GPT2_TRANSPOSED) else tensor
    theirs.load_state_dict(state)
    return theirs


def test_logits_are_those_of_transformers():
    ours = sharpened(make())
    theirs = as_transformers(ours).eval()
    idx = tokens(3, 32)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 1
        torch.testing.assert_close(ours(idx, idx)[0], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(idx)[0], expected[:, -1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_an_independent_implementation(bias):
    ours = sharpened(make(bias=bias))
    reference = nanogpt.Reference(**SHAPE, bias=bias)
    reference.load_state_dict(ours.state_dict())
    idx = tokens(2, 32)
    torch.testing.assert_close(ours(idx, idx)[0], reference(idx), atol=1e-4, rtol=0)


QWEN3 = {"arch": "qwen3", "bias": False, "n_embd": 48, "n_head": 4}


def as_qwen3_of_transformers(model: GPT):
    """The same weights in transformers' Qwen3ForCausalLM."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=1e-6,
            max_position_embeddings=c.block_size, rope_theta=c.rope_theta, tie_word_embeddings=c.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    )  # fmt: skip
    ours, state = model.state_dict(), {}
    state["model.embed_tokens.weight"] = ours["transformer.wte.weight"]
    state["model.norm.weight"], state["lm_head.weight"] = ours["transformer.ln_f.weight"], ours["lm_head.weight"]
    for n in range(c.n_layer):
        here, there = f"transformer.h.{n}.", f"model.layers.{n}."
        sizes = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
        for name, part in zip("qkv", ours[here + "attn.c_attn.weight"].split(sizes), strict=True):
            state[f"{there}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), ours[here + "mlp.c_fc.weight"].chunk(2), strict=True):
            state[f"{there}mlp.{name}_proj.weight"] = part
        state[there + "self_attn.o_proj.weight"] = ours[here + "attn.c_proj.weight"]
        state[there + "mlp.down_proj.weight"] = ours[here + "mlp.c_proj.weight"]
        state[there + "self_attn.q_norm.weight"] = ours[here + "attn.q_norm.weight"]
        state[there + "self_attn.k_norm.weight"] = ours[here + "attn.k_norm.weight"]
        state[there + "input_layernorm.weight"] = ours[here + "ln_1.weight"]
        state[there + "post_attention_layernorm.weight"] = ours[here + "ln_2.weight"]
    theirs.load_state_dict(state)
    return theirs.eval()


def shaken(model: GPT) -> GPT:
    """Every weight away from where it began, zeros and ones included; the logits differ by units."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = 0.5 if parameter.dim() == 1 or "wte" in name else 2.0 * parameter.size(1) ** -0.5
            parameter.add_(width * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 2, "tie_embeddings": False, "rope_theta": 1e6},
        {"n_kv_head": 1, "head_dim": 20, "n_hidden": 56},
    ],
    ids=str,
)
def test_qwen3_logits_are_those_of_transformers(changes):
    ours = shaken(make(**QWEN3, **changes))
    theirs = as_qwen3_of_transformers(ours)
    idx = tokens(3, 32)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(idx, idx)[0], expected, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in theirs.parameters()) == ours.get_num_params(non_embedding=False)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "tie_embeddings": False}], ids=str)
def test_qwen3_generates_what_its_full_forward_pass_gives(changes):
    model = shaken(make(**QWEN3, **changes))
    idx = tokens(3, 7)
    assert torch.equal(model.generate(idx, 70, temperature=0), full_forward(model, idx, 70))


def test_qwen3_begins_as_the_identity_and_predicts_nothing_yet():
    model = make(**QWEN3, tie_embeddings=False)
    idx = tokens(2, 9)
    assert torch.equal(model._hidden(idx, torch.arange(9)), model.transformer.ln_f(model.transformer.wte(idx)))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(101), abs=1e-6)
    with pytest.raises(ValueError, match=r"transformer\.new\.weight"):
        model._initialise("transformer.new.weight", model.lm_head.weight)


def test_a_cropped_qwen3_computes_what_the_whole_one_does():
    model, idx = shaken(make(**QWEN3)), tokens(2, 12)
    before = model(idx, idx)[0]
    model.crop_block_size(12)
    assert torch.equal(model(idx, idx)[0], before)
    with pytest.raises(ValueError, match="13 tokens"):
        model(tokens(2, 13))


def test_twenty_adamw_steps_lose_what_transformers_loses():
    ours, losses = make().train(), []
    theirs = as_transformers(ours).train()
    optimizer = ours.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for step in range(20):
        idx = tokens(4, 33, seed=step)
        x, y = idx[:, :-1], idx[:, 1:]
        loss = ours(x, y, return_logits=False)[1]
        their_loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        for value, opt in ((loss, optimizer), (their_loss, their_optimizer)):
            value.backward()
            opt.step()
            opt.zero_grad()
        losses.append((loss.item(), their_loss.item()))
    assert losses[0][0] != losses[-1][0]
    assert max(abs(a - b) for a, b in losses) < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_loss_has_the_loss_and_gradients_of_the_plain_one(monkeypatch, autocast):
    model, x, y = make().train(), tokens(3, 32), tokens(3, 32, seed=2)
    y[0, 5:20] = -1

    def loss_and_gradients(chunk, **keywords):
        monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", chunk)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x, y, **keywords)[1]
        (loss * 3).backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]

    plain, plain_gradients = loss_and_gradients(2**25)
    # 101 logits a row: 10 chunks of 10 rows, the last one short
    chunked, chunked_gradients = loss_and_gradients(1010, return_logits=False)
    assert chunked == pytest.approx(plain, abs=2e-3 if autocast else 1e-6)
    for a, b in zip(plain_gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 if autocast else 1e-6, rtol=5e-2 if autocast else 1e-4)


def test_weights_and_divisor_by_hand(monkeypatch):
    """Two tokens with probabilities 1/4 and 3/4: losses ln 4 and ln 4/3, gradients of logits weight · (p - 1 at it)."""
    head = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # the logits of hidden [1, 0] are 0 and ln 3
    hidden = torch.tensor([[1.0, 0.0]] * 5)
    targets, weights = torch.tensor([0, 1, 0, -1, 1]), torch.tensor([2.0, -1.0, 0.0, 7.0, 0.5])
    d_logits = torch.tensor([[-1.5, 1.5], [-0.25, 0.25], [0, 0], [0, 0], [0.125, -0.125]]) / 10
    for chunk in (2**25, 4):
        monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", chunk)
        its = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = model_module.cross_entropy(*its, targets, weights, 10)
        assert loss.item() == pytest.approx((2 * math.log(4) - 0.5 * math.log(4 / 3)) / 10, abs=1e-6)
        loss.backward()
        torch.testing.assert_close(its[0].grad, d_logits @ head)
        torch.testing.assert_close(its[1].grad, d_logits.T @ hidden)


def weighted(*shape) -> torch.Tensor:
    """A mask, and advantages of either sign."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)


def gradients_of(model: GPT) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


WAYS = {
    "all logits": {},
    "in chunks": {"return_logits": False},
    "divisor as a tensor": {"return_logits": False, "divisor": torch.tensor(17)},
    "checkpointing": {"return_logits": False, "activation_checkpointing": True},
    "bfloat16": {"return_logits": False, "dtype": torch.bfloat16},
    "compiled": {"compile": True},
    "compiled, in chunks": {"return_logits": False, "compile": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weighted_loss_is_the_sum_of_weighted_losses_of_torch_over_the_divisor(monkeypatch, way):
    settings = {"return_logits": True, "divisor": 17, "dtype": torch.float32, **WAYS[way]}
    model, x, y, weights = make().train(), tokens(3, 32), tokens(3, 32, seed=2), weighted(3, 32)
    y[0, 5:20] = -1
    losses = F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    expected = (losses * weights.flatten()).sum() / 17
    expected.backward()
    expected_gradients = gradients_of(model)

    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", 1010)
    model.activation_checkpointing = settings.get("activation_checkpointing", False)
    # What is captured and differentiated is the compiler's; without code of its own, which would take 20 seconds
    network = torch.compile(model, backend="aot_eager", fullgraph=True) if "compile" in settings else model
    half = settings["dtype"] == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = network(x, y, weights, settings["divisor"], settings["return_logits"])[1]
    (loss * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-2 if half else 2e-6)
    for ours, theirs in zip(gradients_of(model), expected_gradients, strict=True):
        torch.testing.assert_close(ours / 3, theirs, atol=2e-2 if half else 2e-6, rtol=5e-2 if half else 1e-4)


@pytest.mark.parametrize("chunk", [2**25, 1010])
def test_the_split_of_a_weighted_batch_changes_neither_loss_nor_gradients(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", chunk)
    model, x, y, weights = make().train(), tokens(8, 16), tokens(8, 16, seed=2), weighted(8, 16)
    weights[2:4], weights[5] = 0, 1  # micro-batches of very different counts
    divisor = int((weights != 0).sum())
    found = []
    for size in (8, 4, 2, 1):
        losses = [
            model(x[i : i + size], y[i : i + size], weights[i : i + size], divisor, False)[1] for i in range(0, 8, size)
        ]
        sum(losses).backward()
        found.append((sum(losses).item(), gradients_of(model)))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for ours, theirs in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("masked", ["by weights", "by targets"])
def test_a_micro_batch_without_targets_adds_exactly_nothing(monkeypatch, return_logits, masked):
    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", 1010)
    model, x, y = make().train(), tokens(3, 32), tokens(3, 32, seed=2)
    nothing = (y, torch.zeros(3, 32)) if masked == "by weights" else (torch.full_like(y, -1), None)
    for divisor in (5, None) if masked == "by weights" else (5,):
        loss = model(x, *nothing, divisor, return_logits)[1]
        loss.backward()
        assert loss.item() == 0
        gradients = gradients_of(model)
        assert len(gradients) == len([*model.parameters()]) and not any(g.any() for g in gradients)


def test_without_a_divisor_weights_are_divided_by_how_many_count():
    model, x, y = make(), tokens(3, 32), tokens(3, 32, seed=2)
    y[0, :7] = -1
    weights = torch.ones(3, 32)
    weights[0, :10] = weights[1] = 0
    assert model(x, y, weights)[1].item() == pytest.approx(
        model(x[[0, 2]], torch.stack((torch.where(weights[0] > 0, y[0], -1), y[2])))[1].item(), abs=1e-6
    )
    assert model(x, y, weights * -2)[1].item() == pytest.approx(-2 * model(x, y, weights)[1].item(), abs=1e-6)
    assert torch.equal(model(x, y, weights.bool())[1], model(x, y, weights)[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_without_weights_the_loss_is_torchs_mean_to_the_bit(autocast):
    model, x, y = make(), tokens(3, 32), tokens(3, 32, seed=2)
    y[0, 5:20] = -1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, loss = model(x, y)
        assert torch.equal(model(x, y, return_logits=False)[1], loss)
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1))


def test_weights_are_one_a_target():
    with pytest.raises(ValueError, match=r"weights are \(3, 1\), and targets \(3, 32\)"):
        make()(tokens(3, 32), tokens(3, 32), torch.ones(3, 1))


def test_an_evaluation_takes_no_gradients(monkeypatch):
    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", 1010)
    asked, plain = [], model_module.ChunkedCrossEntropy.forward

    def forward(ctx, *arguments):
        asked.append(ctx.needs_input_grad[:2])
        return plain(ctx, *arguments)

    monkeypatch.setattr(model_module.ChunkedCrossEntropy, "forward", staticmethod(forward))
    model, x = make(), tokens(2, 32)
    with torch.no_grad():
        model(x, x, return_logits=False)
    model(x, x, return_logits=False)
    assert asked == [(False, False), (True, True)]


@pytest.mark.parametrize("changes", [{}, QWEN3], ids=["gpt2", "qwen3"])
def test_activation_checkpointing_changes_nothing_but_the_memory(changes):
    gradients = []
    for saving in (False, True):
        model = make(dropout=0.2, **changes).train()
        model.activation_checkpointing = saving
        torch.manual_seed(3)
        kept: list[int] = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens(4, 32), tokens(4, 32, seed=2))[1]
        loss.backward()
        gradients.append((sum(kept), [p.grad for p in model.parameters()]))
    (much, plain), (little, again) = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < much / 2


def test_targets_may_be_a_view_of_the_tokens():
    idx = tokens(3, 33)
    logits, loss = make()(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()))


def test_the_chunked_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(model_module, "LOSS_CHUNK_LOGITS", 1010)
    seen = []
    plain = F.linear
    monkeypatch.setattr(model_module.F, "linear", lambda x, w: seen.append(x.size(0)) or plain(x, w))
    hidden, weight = torch.randn(96, 64, requires_grad=True), torch.randn(101, 64, requires_grad=True)
    model_module.cross_entropy(hidden, weight, tokens(96)).backward()
    assert max(seen) == 10 and sum(seen) == 96


def full_forward(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy text by a full forward pass for each token, over the context that generate() states."""
    size, start = model.config.block_size, max(0, idx.size(1) - model.config.block_size)
    for _ in range(count):
        if idx.size(1) - start > size:
            start = idx.size(1) - max(1, size // 2)
        logits, _ = model(idx[:, start:])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("prompt", [1, 7, 32, 40])
def test_greedy_cached_text_is_that_of_the_full_forward_pass(batch, prompt):
    model = sharpened(make())
    idx = tokens(batch, prompt)
    assert torch.equal(model.generate(idx, 100, temperature=0), full_forward(model, idx, 100))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_contexts_generate_too(block_size):
    model = sharpened(make(block_size=block_size))
    assert torch.equal(model.generate(tokens(2, 4), 9, temperature=0), full_forward(model, tokens(2, 4), 9))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_cached_logits_agree_with_the_full_forward_pass(dtype, tolerance):
    model = sharpened(make()).to(dtype)
    idx = tokens(3, 32)
    with torch.no_grad():
        expected = model(idx, idx)[0][:, 8:].float()
    cache = model.new_cache(3, 32)
    logits = [model.prefill(idx[:, :9], cache)]
    logits += [model.step(idx[:, t], cache) for t in range(9, 32)]
    assert expected.std() > 1
    torch.testing.assert_close(torch.stack(logits, dim=1).float(), expected, atol=tolerance, rtol=0)


def test_generation_leaves_the_model_in_its_mode_and_follows_torchs_generator():
    model = make(dropout=0.5).train()
    torch.manual_seed(3)
    first = model.generate(tokens(2, 3), 20)
    assert model.training
    torch.manual_seed(3)
    assert torch.equal(model.generate(tokens(2, 3), 20), first)
    torch.manual_seed(4)
    assert not torch.equal(model.generate(tokens(2, 3), 20), first)


def test_dropout_acts_in_training_alone(monkeypatch):
    model, idx, rates, calls = make(dropout=0.5), tokens(2, 8), [], []
    plain = F.scaled_dot_product_attention

    def attention(*arguments, dropout_p, **keywords):
        rates.append(dropout_p)
        return plain(*arguments, dropout_p=dropout_p, **keywords)

    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, x, y: calls.append(torch.equal(x[0], y)))
    for training in (True, False):
        rates.clear(), calls.clear()
        model.train(training)(idx)
        assert rates == [0.5 * training] * 3
        assert calls == [not training] * (2 * 3 + 1)  # two in each block, one on the embeddings


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    model = make()
    with torch.no_grad():
        model.lm_head.weight[90:] = model.lm_head.weight[:11] * 1.5
    assert model.generate(tokens(20, 1) % 90, 40, temperature=2.0).max() >= 90
    assert model.generate(tokens(20, 1) % 90, 40, temperature=2.0, vocab_size=90).max() < 90


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
    ],
    ids=str,
)
def test_generation_settings_out_of_range_are_refused(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        make().generate(tokens(1, 1), 1, **keywords)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        make().generate(tokens(1, 0), 1)


def test_parameters_are_counted_as_gpt2_counts_them():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_weights_start_as_gpt2s_do():
    model = make(n_embd=256, n_layer=8)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float("ln" in name and name.endswith("weight"))))
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_every_parameter_is_in_one_group_of_the_optimizer():
    model = make()
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() < 2 for p in groups[1]["params"])


def test_a_cropped_model_computes_what_the_whole_one_does():
    model, idx = make(), tokens(2, 8)
    before = model(idx, idx)[0]
    model.crop_block_size(8)
    torch.testing.assert_close(model(idx, idx)[0], before)
    with pytest.raises(ValueError, match="block_size 8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="block_size"):
        model.crop_block_size(9)


def test_mfu_is_flops_over_peak():
    model = make()
    n, c = model.get_num_params(), model.config
    flops = (6 * n + 12 * c.n_layer * c.n_embd * c.block_size) * c.block_size * 10
    assert model.estimate_mfu(10, 0.5) == pytest.approx(flops / 0.5 / 312e12)
    assert model.estimate_mfu(10, 0.5, peak_flops=1e12) == pytest.approx(flops / 0.5 / 1e12)


@pytest.mark.parametrize(
    "changes", [{"n_head": 3}, {"n_layer": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"block_size": 0}, {"n_head": 0}]
)
def test_a_network_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make(**changes)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A folder as transformers saves it, and the model in it."""
    ours = sharpened(make())
    theirs = as_transformers(ours)
    theirs.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", theirs.eval()


def test_pretrained_weights_come_from_a_folder(gpt2_folder, monkeypatch):
    pytest.importorskip("safetensors")
    folder, theirs = gpt2_folder
    idx = tokens(2, 32)
    monkeypatch.chdir(folder.parent)
    for name in ("gpt2", str(folder)):  # a folder of the model's name goes before the hub
        model = GPT.from_pretrained(name, {"dropout": 0.25}).eval()
        assert model.config.dropout == 0.25
        torch.testing.assert_close(model(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_a_folder_that_is_no_gpt2_is_refused_by_name(gpt2_folder):
    pytest.importorskip("safetensors")
    folder, _ = gpt2_folder
    config = json.loads((folder / "config.json").read_text())
    cases = [({"model_type": "mamba"}, "mamba"), ({"activation_function": "relu"}, "relu")]
    cases += [({"n_embd": 32}, "transformer.* is of shape"), ({"n_layer": 9}, r"lacks transformer\.h\.")]
    for change, words in cases:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type is None"):
        GPT.from_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        GPT.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ValueError, match="n_layer"):
        GPT.from_pretrained(str(folder), {"n_layer": 2})


# Ours by name; transformers' configuration of the same network, and what of it is tied, grouped or of another width.
ROADS = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False},
    "qwen3": QWEN3,
    "qwen3 untied, grouped, wide heads": QWEN3 | {"tie_embeddings": False, "n_kv_head": 2, "head_dim": 32},
    "llama": QWEN3 | {"arch": "llama", "norm_eps": 1e-5, "rope_theta": 1e5, "n_hidden": 96},
    "llama untied, grouped": QWEN3 | {"arch": "llama", "tie_embeddings": False, "n_kv_head": 1},
}


def to_transformers(ours: GPT):
    """What transformers makes of our config and weights in its layout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**hf_layout.hf_config(ours.config))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    left = theirs.load_state_dict(hf_layout.state_to_hf(ours.config, ours.state_dict()), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("road", ROADS)
def test_in_hugging_faces_layout_the_logits_are_ours_and_the_way_back_ends_in_the_same_bits(road, tmp_path):
    ours = shaken(make(**ROADS[road]))
    theirs, idx = to_transformers(ours), tokens(2, 32)
    with torch.no_grad():
        expected = ours(idx, idx)[0]
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.5
    theirs.save_pretrained(tmp_path)
    back = GPT.from_pretrained(str(tmp_path)).eval()
    if ours.config.arch != "gpt2" or ours.config.bias:
        assert back.config == ours.config
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(back(idx, idx)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("road", ["gpt2", "qwen3", "llama"])
def test_weights_in_several_files_are_read(road, tmp_path):
    ours = shaken(make(**ROADS[road]))
    to_transformers(ours).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = GPT.from_pretrained(str(tmp_path))
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("gpt2", {"n_inner": 100}, "n_inner is 100"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gpt2", {"n_layer": None}, "n_layer is None"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3", {"num_key_value_heads": 3}, "multiple of n_kv_head"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("gpt2", {"is_causal": False}, "is_causal"),
        ("llama", {"vocab_size": 40.0}, "vocab_size is 40.0, which is no int"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
        ("llama", {"num_attention_heads": 0}, "describes no network|at least 1"),
    ],
)
def test_a_network_that_is_not_computed_here_is_refused_by_name(kind, change, words):
    theirs = hf_layout.hf_config(make(**ROADS[kind]).config)
    assert hf_layout.config_from_hf(theirs).arch == kind
    with pytest.raises(ValueError, match=words):
        hf_layout.config_from_hf(theirs | change)


def test_a_missing_key_is_named():
    for road in ("gpt2", "llama"):
        theirs = hf_layout.hf_config(make(**ROADS[road]).config)
        for key in ("vocab_size", "n_positions", "hidden_size", "intermediate_size"):
            if key in theirs:
                with pytest.raises(ValueError, match=f"it has no {key}"):
                    hf_layout.config_from_hf({name: value for name, value in theirs.items() if name != key})


@pytest.mark.parametrize("road", ROADS)
def test_missing_misshapen_and_unknown_tensors_are_named(road):
    ours = shaken(make(**ROADS[road]))
    config = hf_layout.config_from_hf(hf_layout.hf_config(ours.config))
    tensors = hf_layout.state_to_hf(ours.config, ours.state_dict())
    hf_layout.state_from_hf(config, tensors)
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=f"it lacks {name}"):
            hf_layout.state_from_hf(config, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=f"{name} is of shape"):
            hf_layout.state_from_hf(config, tensors | {name: tensor[:-1]})
    with pytest.raises(ValueError, match=r"it has also .*model\.layers\.0\.self_attn\.q_proj\.bias"):
        hf_layout.state_from_hf(config, tensors | {"model.layers.0.self_attn.q_proj.bias": tensor})
    if config.tie_embeddings:
        with pytest.raises(ValueError, match="lm_head.weight differs"):
            hf_layout.state_from_hf(config, tensors | {"lm_head.weight": torch.zeros(101, config.n_embd)})


@pytest.mark.parametrize("road", ["llama", "llama untied, grouped"])
def test_llama_trains_and_generates_what_its_full_forward_pass_gives(road):
    model = shaken(make(**ROADS[road]))
    idx = tokens(2, 8)
    out = model.generate(idx, 20, temperature=0)
    for n in range(8, 28):
        assert torch.equal(model(out[:, :n])[0].argmax(-1)[:, 0], out[:, n])
    model.train()
    loss = model(idx, idx)[1]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_download_asks_the_hub_for_the_two_files(gpt2_folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    folder, _ = gpt2_folder
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, file: asked.append((repo, file)) or str(folder / file))
    monkeypatch.chdir(folder)  # where no folder is called gpt2-medium
    GPT.from_pretrained("gpt2-medium")
    assert asked == [("openai-community/gpt2-medium", name) for name in ("config.json", "model.safetensors")]

    def fail(repo, file):
        raise ConnectionError

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="gpt2-large could not be downloaded"):
        GPT.from_pretrained("gpt2-large")


def test_model_py_stands_alone(tmp_path):
    """One file, torch and the standard library: copied elsewhere, it works."""
    import shutil
    import subprocess
    import sys

    shutil.copy(model_module.__file__, tmp_path / "model.py")
    code = "import model, sys; m = model.GPT(model.GPTConfig(8, 9, 1, 1, 8)); print('configurator' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
