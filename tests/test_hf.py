import copy
import json
import math
import runpy
import subprocess
import sys
import warnings

import nanogpt
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, load, records, same
from test_model import ROADS, make, shaken, sharpened, to_transformers, tokens

transformers = pytest.importorskip("transformers")

import hf
from configurator import UserError
from hf import NanoGPTConfig, NanoGPTLMHeadModel
from model import GPT, GPTConfig
from quartz import checkpoint, kernels, shards

every_road = pytest.mark.parametrize("road", ROADS)


def pair(road: str, **changes) -> tuple[GPT, NanoGPTLMHeadModel]:
    """A network of ours, and the same as one of transformers with weights of its own; logits differ by units."""
    ours = make(**ROADS[road], **changes)
    ours = sharpened(ours) if ours.config.arch == "gpt2" else shaken(ours)
    kernels.install(ours)  # as train.py does, and as theirs has them
    return ours, NanoGPTLMHeadModel(NanoGPTConfig.from_gpt(ours.config), copy.deepcopy(ours)).eval()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@every_road
def test_logits_loss_and_gradients_are_those_of_our_own_class(road):
    ours, theirs = pair(road)
    idx = tokens(3, 33)
    x, y = idx[:, :-1], idx[:, 1:]
    logits, loss = ours.train()(x, y)
    out = theirs.train()(x, shift_labels=y.contiguous())
    assert torch.equal(out.logits, logits) and getattr(out, hf.CACHE) is None
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=0)
    loss.backward()
    out.loss.backward()
    torch.testing.assert_close(gradients(theirs), gradients(ours), atol=1e-6, rtol=1e-5)


def test_labels_are_shifted_masked_and_counted_as_transformers_does():
    ours, theirs = pair("gpt2 without biases")
    idx = tokens(3, 32)
    expected = ours(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(theirs(idx, labels=idx).loss, expected, atol=1e-6, rtol=0)
    labels = idx.clone()
    labels[:, 10:20] = -100
    targets = labels[:, 1:].where(labels[:, 1:] >= 0, -1)
    expected = ours(idx[:, :-1], targets)[1]
    torch.testing.assert_close(theirs(idx, labels=labels).loss, expected, atol=1e-6, rtol=0)
    counted = theirs(idx, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(counted, expected * (labels[:, 1:] >= 0).sum() / 100, atol=1e-5, rtol=0)
    logits, loss = ours(idx, idx)[0], theirs(idx, labels=idx, return_dict=False)[0]
    torch.testing.assert_close(theirs(idx, logits_to_keep=2).logits, logits[:, -2:], atol=1e-5, rtol=0)
    assert loss.dim() == 0


@pytest.mark.parametrize(
    "given",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"attention_mask": torch.ones(1, 2)},
        {"attention_mask": torch.ones(1, 3, 3)},
        {"position_ids": torch.arange(2)[None]},
        {"past_key_values": transformers.DynamicCache(), "cache": transformers.DynamicCache()},
        {"inputs_embeds": torch.ones(1, 3, 64)},
        {"token_type_ids": torch.zeros(1, 3).long()},
        {"encoder_hidden_states": torch.ones(1, 3, 64)},
        {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3},
        {"is_causal": False},
        {"atention_mask": torch.ones(1, 3)},
    ],
    ids=lambda given: " ".join(given),
)
def test_what_is_not_computed_is_refused_by_name(given):
    _, theirs = pair("gpt2")
    with pytest.raises((TypeError, ValueError), match=next(iter(given))):
        theirs(tokens(1, 3), **given)
    nothing = dict.fromkeys(given)
    assert torch.equal(theirs(tokens(1, 3), **nothing).logits, theirs(tokens(1, 3)).logits)


def test_a_config_of_what_is_not_computed_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="n_embd"):
        NanoGPTLMHeadModel(NanoGPTConfig(n_embd=10, n_head=3))
    for mistaken in ({"n_layers": 3}, {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        with pytest.raises(TypeError, match=next(iter(mistaken))):
            NanoGPTConfig(**mistaken)
    theirs = NanoGPTLMHeadModel(NanoGPTConfig(n_layer=1, n_head=1, n_embd=8, output_hidden_states=True))
    with pytest.raises(ValueError, match="output_hidden_states"):
        theirs(tokens(1, 3))
    theirs.config.note = "of a tool"  # which comes back from the file, as with every config of transformers
    theirs.config.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).note == "of a tool"
    assert NanoGPTConfig(n_layer=1, dtype="bfloat16", attn_implementation="sdpa", num_labels=3).n_layer == 1


@pytest.mark.parametrize("road", ["gpt2", "qwen3"])
def test_texts_in_one_row_do_not_see_each_other(road):
    """Position ids that begin anew, as transformers' DataCollatorWithFlattening gives them."""
    ours, theirs = pair(road)
    idx, lengths = tokens(2, 12), (5, 1, 6)
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = theirs(idx, position_ids=position).logits
    alone = torch.cat([ours(part, part)[0] for part in idx.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
    own = to_transformers(ours).train()  # in evaluation they separate texts only without a cache
    torch.testing.assert_close(logits, own(idx, position_ids=position, use_cache=False).logits, atol=1e-4, rtol=0)
    later = torch.arange(3, 15)[None]
    assert theirs(idx[:1], position_ids=later).logits.shape == (1, 12, 101)
    if road == "qwen3":  # rotations tell distances alone
        torch.testing.assert_close(theirs(idx, position_ids=later).logits, ours(idx, idx)[0], atol=1e-4, rtol=0)


@every_road
def test_the_config_goes_to_ours_and_back(road, tmp_path):
    config = make(**ROADS[road]).config
    theirs = NanoGPTConfig.from_gpt(config)
    assert theirs.to_gpt() == config and theirs.hidden_size == config.n_embd
    theirs.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_gpt() == config
    ours = {name: getattr(theirs, name) for name in NanoGPTConfig.attribute_map}
    assert NanoGPTConfig(**{**config.to_args(), **ours}).to_gpt() == config
    assert NanoGPTConfig().to_gpt() == GPTConfig()


def test_a_new_model_begins_as_a_new_gpt():
    for road in ROADS:
        config = make(**ROADS[road]).config
        torch.manual_seed(3)
        expected = GPT(config)
        torch.manual_seed(3)
        assert same(NanoGPTLMHeadModel(NanoGPTConfig.from_gpt(config)).state_dict(), expected.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Files


@every_road
def test_what_is_saved_comes_back_to_the_bit_through_the_auto_class(road, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, theirs = pair(road)
    theirs.save_pretrained(tmp_path)
    names = ours.state_dict().keys() - ({"lm_head.weight"} if ours.config.tie_embeddings else set())
    assert safetensors.load_file(tmp_path / "model.safetensors").keys() == names
    assert any(name.endswith(".bias") for name in names) == ours.config.bias
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is NanoGPTLMHeadModel and not back.training
    assert same(back.state_dict(), ours.state_dict())
    assert (back.lm_head.weight is back.transformer.wte.weight) == ours.config.tie_embeddings
    idx = tokens(2, 32)
    assert torch.equal(back(idx).logits, ours(idx, idx)[0])


@pytest.mark.parametrize("road", ["gpt2", "qwen3", "llama untied, grouped"])
def test_weights_that_a_file_lacks_begin_as_a_new_gpts(road, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, theirs = pair(road)
    theirs.save_pretrained(tmp_path)
    whole = safetensors.load((tmp_path / "model.safetensors").read_bytes())  # not mapped, since it is rewritten
    missing = [name for name in whole if "h.1." in name or "ln_f" in name or "lm_head" in name]
    kept = {name: tensor for name, tensor in whole.items() if name not in missing}
    safetensors.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    back = NanoGPTLMHeadModel.from_pretrained(tmp_path).state_dict()
    new = make(**ROADS[road]).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in kept.items())
    for name in missing:
        if new[name].std() == 0 or new[name].dim() == 1:
            assert torch.equal(back[name], new[name]), name
        else:
            assert back[name].std().item() == pytest.approx(new[name].std().item(), rel=0.1), name


def test_a_checkpoint_of_nanogpt_comes_and_goes_to_the_bit(tmp_path):
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 28, "bias": False, "dropout": 0.1}
    reference = nanogpt.write(tmp_path / "ckpt.pt", 1.25, "_orig_mod.", dataset="poems", **args)
    theirs = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path)
    idx = torch.randint(28, (3, 16))
    torch.testing.assert_close(theirs(idx).logits, reference(idx), atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    path = back.to_nanogpt_ckpt(tmp_path / "back")
    assert path == tmp_path / "back" / "ckpt.pt"
    again, optimizer, state = nanogpt.read(path)
    assert same(again.state_dict(), reference.state_dict())
    assert state["model_args"] == args
    assert (state["iter_num"], state["best_val_loss"], state["config"]) == (0, math.inf, {"dataset": "poems"})
    torch.nn.functional.cross_entropy(again(idx).flatten(0, 1), idx.flatten()).backward()
    optimizer.step()  # as nanoGPT's first update
    assert all(group["fused"] is None for group in optimizer.param_groups)
    with pytest.raises(UserError, match="no checkpoint"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "hf")


@pytest.mark.parametrize("settings", [{}, {"arch": "qwen3", "optimizer": "muon"}], ids=["gpt2", "qwen3"])
def test_a_run_goes_on_from_what_came_back_with_its_tokenizer(tiny, train, run, settings):
    assert train(out_dir="a", max_iters=4, dropout=0.0, **settings).code == 0
    theirs = NanoGPTLMHeadModel.from_nanogpt_ckpt("a/last.pt")
    theirs.save_pretrained("hf")
    back = NanoGPTLMHeadModel.from_pretrained("hf")
    assert back.config.tokenizer == json.loads((tiny / "data/tiny/meta.json").read_text())["tokenizer"]
    back.to_nanogpt_ckpt("b/ckpt.pt")
    assert same(load("b/ckpt.pt")["model"], load("a/last.pt")["model"])
    (tiny / "data").rename(tiny / "elsewhere")
    told = run("sample.py", "--out_dir=b", "--device=cpu", "--num_samples=1", "--max_new_tokens=5", "--start=the")
    assert told.code == 0 and told.out.startswith("the"), told
    (tiny / "elsewhere").rename(tiny / "data")
    result = train(out_dir="b", init_from="resume", max_iters=3, dropout=0.0, **settings)
    assert result.code == 0 and "at iteration 0" in result.out, result
    assert load("b/last.pt")["iter_num"] == 3
    first, went_on = (records(tiny / name) for name in "ab")
    assert went_on[0]["val_loss"] == pytest.approx(first[-1]["val_loss"], abs=1e-6)


def test_no_file_is_overwritten(tmp_path):
    _, theirs = pair("gpt2")
    path = theirs.to_nanogpt_ckpt(tmp_path / "some.pt")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"some\.pt is there already"):
        theirs.to_nanogpt_ckpt(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["some.pt"]


def test_ids_beyond_the_tokenizer_are_never_generated(tmp_path):
    ours = sharpened(make(vocab_size=101, bias=False))
    with torch.no_grad():
        ours.lm_head.weight[40:] *= 5  # the likeliest by far
    state = {"model": ours.state_dict(), "model_args": ours.config.to_args()}
    state["tokenizer"] = {"type": "char", "chars": [chr(65 + n) for n in range(40)]}
    torch.save(state, tmp_path / "ckpt.pt")
    NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt").save_pretrained(tmp_path / "hf")
    theirs = NanoGPTLMHeadModel.from_pretrained(tmp_path / "hf")
    idx = tokens(2, 3) % 40
    out = theirs.generate(idx, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, ours.generate(idx, 20, temperature=0, vocab_size=40)) and out.max() < 40
    assert theirs.generate(idx, max_new_tokens=20, do_sample=True, num_beams=2).max() < 40


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@every_road
def test_greedy_text_is_that_of_our_own_class(road):
    ours, theirs = pair(road)
    idx = tokens(3, 7)
    out = theirs.generate(idx, max_new_tokens=15, do_sample=False)
    assert torch.equal(out, ours.generate(idx, 15, temperature=0))
    assert len(set(out[0, 7:].tolist())) > 3
    assert torch.equal(out, theirs.generate(idx, max_new_tokens=15, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 3, "eos_token_id": -1},  # up to 5.6 it wants one
        {"assistant_model": 1},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=lambda how: next(iter(how)),
)
@pytest.mark.parametrize("road", ["gpt2", "qwen3"])
def test_other_ways_to_greedy_text_give_the_same(road, how):
    ours, theirs = pair(road)
    idx = tokens(1, 7)
    if "assistant_model" in how:
        how = {"assistant_model": pair(road, n_layer=1)[1]}
    out = theirs.generate(idx, max_new_tokens=15, do_sample=False, pad_token_id=0, **how)
    text = out if torch.is_tensor(out) else out.sequences
    assert torch.equal(text, ours.generate(idx, 15, temperature=0))
    if not torch.is_tensor(out):  # and from the cache that it gives out, it goes on
        torch.testing.assert_close(torch.stack(out.logits, 1), ours(text, text)[0][:, 6:-1], atol=1e-3, rtol=0)
        more = {hf.CACHE: getattr(out, hf.CACHE), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(theirs.generate(text, **more), ours.generate(idx, 25, temperature=0))


@pytest.mark.parametrize("road", ["gpt2 without biases", "qwen3", "llama untied, grouped"])
def test_beam_search_is_that_of_transformers_own_class(road):
    ours, theirs = pair(road)
    own, idx = to_transformers(ours), tokens(2, 5)
    how = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    own.generation_config = theirs.generation_config
    assert torch.equal(theirs.generate(idx, **how), own.generate(idx, **how))


def test_sampling_is_that_of_transformers_own_class():
    ours, theirs = pair("gpt2")
    own, idx = to_transformers(ours), tokens(2, 5)
    own.generation_config = theirs.generation_config
    drawn = []
    for model in (theirs, own, theirs):
        torch.manual_seed(7 + len(drawn) // 2)
        drawn.append(model.generate(idx, max_new_tokens=20, do_sample=True, top_k=30, temperature=2.0))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("road", "cache"), [*((road, "dynamic") for road in ROADS), ("gpt2", "static"), ("llama untied, grouped", "static")]
)
def test_padded_on_the_left_each_prompt_goes_on_as_it_does_alone(road, cache):
    _, theirs = pair(road)
    prompts = [tokens(1, n, seed=n) for n in (1, 12, 5)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (12 - prompt.size(1), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(12) >= 12 - prompt.size(1) for prompt in prompts]).long()
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    together = theirs.generate(padded, attention_mask=mask, **how)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 12:], theirs.generate(prompt, **how)[0, prompt.size(1) :])
        logits = theirs(padded, attention_mask=mask).logits[row, 12 - prompt.size(1) :]
        torch.testing.assert_close(logits, theirs(prompt).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_tokens_may_come_in_any_portions_with_the_cache_by_either_name(name):
    ours, theirs = pair("qwen3")
    idx = tokens(2, 30)
    expected = ours(idx, idx)[0]
    for sizes in ([30], [10, 20], [1, 1, 8, 1, 19]):
        cache, logits = transformers.DynamicCache(), []
        for part in idx.split(sizes, dim=1):
            out = theirs(part, **{name: cache}, use_cache=True)
            assert getattr(out, hf.CACHE) is cache
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)


def test_padding_may_be_on_the_right_and_embeddings_may_be_given():
    ours, theirs = pair("qwen3")
    idx = tokens(2, 30)
    expected = ours(idx, idx)[0]
    mask = torch.ones(2, 30).long()
    mask[1, 20:] = 0
    torch.testing.assert_close(theirs(idx, attention_mask=mask).logits[1, :20], expected[1, :20], atol=1e-4, rtol=0)
    embedded = theirs(inputs_embeds=theirs.get_input_embeddings()(idx)).logits
    torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=0)


def test_in_bfloat16_the_cache_is_bfloat16_too(tmp_path):
    ours, theirs = pair("qwen3")
    theirs.save_pretrained(tmp_path)
    halved, idx = NanoGPTLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens(2, 8)
    out, expected = halved(idx), ours(idx, idx)[0]
    kept = getattr(out, hf.CACHE).layers[1]
    assert {out.logits.dtype, kept.keys.dtype, kept.values.dtype} == {torch.bfloat16}
    assert (out.logits.float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("road", ["gpt2", "qwen3"])
def test_text_beyond_block_size_is_refused(road):
    _, theirs = pair(road)
    theirs.generate(tokens(1, 30), max_new_tokens=3)  # the last token is read by nobody
    with pytest.raises(ValueError, match="33 tokens do not fit in block_size 32"):
        theirs.generate(tokens(1, 30), max_new_tokens=4)
    padded = torch.cat((torch.zeros(1, 8).long(), tokens(1, 28)), 1)
    mask = (torch.arange(36) >= 8)[None].long()
    assert theirs(padded, attention_mask=mask).logits[:, 8:].isfinite().all()  # padding takes no place


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.filterwarnings("ignore::FutureWarning")  # it is about to be called activation checkpointing
@pytest.mark.parametrize("road", ["gpt2", "qwen3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_but_the_memory(road, reentrant):
    found = []
    for saving in (False, True):
        _, theirs = pair(road, dropout=0.2)
        if saving:
            theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
        kept: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = theirs.train()(tokens(4, 32), labels=tokens(4, 32)).loss
        loss.backward()
        found.append((sum(kept), loss, gradients(theirs)))
    assert found[1][0] < found[0][0] / 2
    if reentrant:  # reads first without autograd, where norms are computed otherwise
        torch.testing.assert_close(found[0][1:], found[1][1:], atol=1e-5, rtol=1e-5)
    else:
        assert same(found[0][1:], found[1][1:])
    for name in ("cache", "past_key_values"):
        theirs.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="cache"):
            theirs(tokens(1, 3), **{name: transformers.DynamicCache()})
        theirs.gradient_checkpointing_disable()
        assert theirs(tokens(1, 3), **{name: transformers.DynamicCache()}).logits.isfinite().all()


def test_padding_is_masked_in_bfloat16_training_too():
    _, theirs = pair("gpt2")
    idx, mask = tokens(2, 20), torch.ones(2, 20).long()
    mask[0, :6] = 0
    with torch.autocast("cpu", torch.bfloat16):
        padded = theirs.train()(idx, attention_mask=mask).logits[0, 6:].float()
        alone = theirs(idx[:1, 6:]).logits[0].float()
    assert (padded - alone).abs().mean() < 0.02 * alone.std()


class Windows(torch.utils.data.IterableDataset):
    """The rows that train.py reads, in its order."""

    def __init__(self, folder, block_size, rows):
        split = shards.Split(folder, "train", shards.load_meta(folder))
        starts = shards.training_starts(np.arange(rows), len(split), block_size, seed=1337)
        self.x, self.y = split.windows(starts, block_size)

    def __iter__(self):
        for x, y in zip(self.x, self.y, strict=True):
            yield {"input_ids": x, "labels": x, "shift_labels": y}


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_the_trainer_of_transformers_gives_the_losses_of_train_py(tiny, train, arch, accumulated):
    pytest.importorskip("accelerate")
    how = {"arch": arch, "gradient_accumulation_steps": accumulated, "dropout": 0.0, "max_iters": 20, "grad_clip": 0.5}
    assert train(out_dir="out", **how).code == 0
    steps = [record for record in records(tiny / "out") if "iter" in record]
    expected, peak = [step["loss"] for step in steps], TINY["learning_rate"]

    torch.manual_seed(1337)
    shape = {name: TINY[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    vocab_size = json.loads((tiny / "data/tiny/meta.json").read_text())["vocab_size"]
    model = NanoGPTLMHeadModel(NanoGPTConfig(**shape, arch=arch, vocab_size=vocab_size, bias=False))
    updater = model.configure_optimizers(0.1, peak, (0.9, 0.95), "cpu")
    schedule = torch.optim.lr_scheduler.LambdaLR(updater, lambda step: steps[min(step, 19)]["lr"] / peak)
    arguments = transformers.TrainingArguments(
        output_dir="trainer", per_device_train_batch_size=TINY["batch_size"], max_steps=20, logging_steps=1,
        gradient_accumulation_steps=accumulated, max_grad_norm=0.5, use_cpu=True, report_to=[], save_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    windows = Windows(tiny / "data/tiny", TINY["block_size"], 20 * accumulated * TINY["batch_size"])
    trainer = transformers.Trainer(model, arguments, train_dataset=windows, optimizers=(updater, schedule))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and expected[0] - expected[-1] > 0.5
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4
    assert steps[7]["grad_norm"] == pytest.approx(trainer.state.log_history[7]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_evaluates_and_predicts(how, tmp_path):
    pytest.importorskip("accelerate")
    ours, theirs = pair("gpt2")
    idx = tokens(6, 16)
    labels = idx.clone()
    labels[:, 0] = -100  # nothing predicts it; up to 5.6 the Trainer counts it all the same
    rows = [{"input_ids": x, "labels": y, "token_type_ids": 0 * x} for x, y in zip(idx, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=1,
        learning_rate=0.0, weight_decay=0.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, **how,
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if not how.get("label_smoothing_factor"):
        assert loss == pytest.approx(ours(idx[:, :-1], idx[:, 1:])[1].item(), abs=1e-5)
    told = trainer.predict(rows)
    assert told.predictions.shape == (6, 16, 101)  # the logits, without a cache
    np.testing.assert_allclose(told.predictions, ours(idx, idx)[0].detach().numpy(), atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_that_are_trained_are_seen(kind):
    peft = pytest.importorskip("peft")
    _, theirs = pair("qwen3")
    wanted = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    model = peft.get_peft_model(theirs, wanted(task_type="CAUSAL_LM", num_virtual_tokens=4))
    idx = tokens(2, 8)
    mask = torch.ones_like(idx)
    before = model.eval()(input_ids=idx, attention_mask=mask).logits[:, -8:]
    assert (before - theirs(idx).logits).abs().max() > 0.1
    for _ in range(8):
        loss = model.train()(input_ids=idx, attention_mask=mask, labels=idx).loss
        loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    text = idx
    for _ in range(6):  # without a cache of its own
        logits = model.eval()(input_ids=text, attention_mask=torch.ones_like(text)).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
    told = {"input_ids": idx, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**told), text)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("road", "layers"), [("gpt2 without biases", ["c_attn"]), ("qwen3", ["c_attn", "c_fc", "c_proj"])]
)
def test_lora_attaches_trains_and_merges(road, layers, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = pair(road)
    idx = tokens(4, 32)
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers, fan_in_fan_out=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that a layer is of another kind than was said
        model = peft.get_peft_model(theirs, wanted)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    taken = [name for name, _ in ours.named_modules() if name.endswith(tuple(layers))]
    assert len(trainable) == 2 * len(taken) and all(".lora_" in name for name in trainable)
    assert torch.equal(model(idx).logits, ours(idx, idx)[0])
    model.gradient_checkpointing_enable()
    updater = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(model.train()(idx, labels=idx).loss)
        losses[-1].backward()
        updater.step()
        updater.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(ValueError, match="merge adapters first"):
        model.to_nanogpt_ckpt(tmp_path)
    tuned = model.eval()(idx).logits
    text = model.generate(input_ids=idx[:, :4], max_new_tokens=10, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(idx).logits, tuned, atol=1e-3, rtol=0)
    back = checkpoint.build_model(checkpoint.load(merged.to_nanogpt_ckpt(tmp_path / "tuned"))).eval()
    torch.testing.assert_close(back(idx, idx)[0], tuned, atol=1e-3, rtol=0)
    assert torch.equal(back.generate(idx[:, :4], 10, temperature=0), text)
    _, fresh = pair(road)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(again(idx).logits, tuned)


@pytest.mark.parametrize("road", ["gpt2", "llama untied, grouped"])
def test_the_vocabulary_grows_and_shrinks(road, tmp_path):
    ours, theirs = pair(road)
    idx = tokens(2, 8)
    for size in (128, 101):
        theirs.resize_token_embeddings(size)
        assert theirs.config.to_gpt().vocab_size == size == theirs(idx).logits.size(-1)
        torch.testing.assert_close(theirs(idx).logits[..., :101], ours(idx, idx)[0], atol=1e-5, rtol=0)
    assert same(checkpoint.load(theirs.to_nanogpt_ckpt(tmp_path))["model"], dict(ours.state_dict()))


# ----------------------------------------------------------------------------------------------------------------------
# An option


def test_nothing_else_imports_transformers():
    others = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "hf")
    others += sorted(f"quartz.{path.stem}" for path in ROOT.glob("quartz/*.py"))
    code = f"import sys; import {', '.join(others)}; print('found:', 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "found: False" in result.stdout and {"train", "sample", "eval"} <= set(others), result.stderr


def test_where_transformers_is_missing_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"^hf\.py needs the transformers package: pip install -e \.\[transformers\]$"
    ):
        runpy.run_path(hf.__file__)
