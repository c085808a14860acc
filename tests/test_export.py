import json
import math
import shutil
import subprocess
import sys

import nanogpt
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, flags, load
from torch.nn import functional as F

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, hf_folder, run_folder, tokenizer
from quartz.tokenizer import PATTERNS, BPETokenizer, CharTokenizer, GPT2Tokenizer

TEXT = "".join(f"It's {n} bottles; I'LL drink {n * 37} of them, naïve 日本語 🙂\r\n\n  \tOK?! " for n in range(200))
NETWORKS = {
    "gpt2": {"bias": True},
    "gpt2 without biases": {"bias": False},
    "qwen3": {"bias": False, "arch": "qwen3"},
    "qwen3 grouped, untied": {"bias": False, "arch": "qwen3", "n_kv_head": 2, "head_dim": 16, "tie_embeddings": False},
    "llama": {"bias": False, "arch": "llama", "norm_eps": 1e-5, "rope_theta": 1e5},
}


def shaken(config: GPTConfig) -> GPT:
    """Every weight away from where it began; the logits differ by units."""
    torch.manual_seed(3)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = 0.5 if parameter.dim() == 1 or "wte" in name else 2.0 * parameter.size(1) ** -0.5
            parameter.add_(torch.randn_like(parameter) * width)
    return model


def tokens_of(kind: str, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_bpe")
        return GPT2Tokenizer()
    pytest.importorskip("tokenizers")
    return {
        "char": lambda: CharTokenizer(sorted(set(TEXT)), ["<|endoftext|>"]),
        "old char": lambda: CharTokenizer([*sorted(set(TEXT)), None, "q"]),
        "bpe": lambda: BPETokenizer.train([TEXT], 400, "gpt4"),
        "byte": lambda: BPETokenizer.of_merges([], "gpt2"),
    }[kind]()


def trained(folder, network: str, tokens, padding: int = 5) -> GPT:
    """A checkpoint in folder, whose vocabulary has some rows more than there are tokens."""
    changes = NETWORKS[network]
    model = shaken(GPTConfig(128, tokens.vocab_size + padding, 2, 4, 32, **changes))
    contents = {"model": model.state_dict(), "model_args": model.config.to_args(), "tokenizer": tokens.to_data()}
    folder.mkdir()
    checkpoint.save(folder / "ckpt.pt", {**contents, "iter_num": 7, "best_val_loss": 1.5, "config": {}})
    return model


def greedy(model: GPT, ids: list[int], count: int, vocab_size: int) -> list[int]:
    return model.generate(torch.tensor([ids]), count, temperature=0, vocab_size=vocab_size)[0].tolist()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("network", NETWORKS)
def test_transformers_loads_the_folder_and_computes_the_same(here, run, request, network, kind):
    transformers = pytest.importorskip("transformers")
    tokens = tokens_of(kind, request)
    ours = trained(here / "out", network, tokens)
    result = run("export.py", "--to=hf")
    assert result.code == 0, result.err
    assert result.out == "wrote out/hf\n" and "5 rows of the vocabulary are no token's" in result.err
    assert ("zeros" in result.err) == (network == "gpt2 without biases")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out/hf").eval()
    speller = transformers.AutoTokenizer.from_pretrained("out/hf")
    ids = tokens.encode(TEXT)
    assert speller.encode(TEXT, add_special_tokens=False) == ids and speller.decode(ids) == TEXT
    idx = torch.tensor([ids[:32], ids[32:64]])
    with torch.no_grad():
        expected, found = ours(idx, idx)[0][..., : tokens.vocab_size], theirs(idx).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        losses = [F.cross_entropy(its[:, :-1].flatten(0, 1), idx[:, 1:].flatten()) for its in (found, expected)]
    assert abs(losses[0] - losses[1]) < 1e-4
    prompt, stop = ids[:6], theirs.generation_config.eos_token_id
    out = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out[0].tolist() == greedy(ours, prompt, 100, tokens.vocab_size)
    assert stop == tokens.specials["<|endoftext|>"] and theirs.num_parameters() > 1000


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "old char", "gpt2"])
def test_the_folders_tokenizer_gives_the_same_ids_and_comes_back_as_it_was(here, run, request, kind):
    transformers = pytest.importorskip("transformers")
    tokens = tokens_of(kind, request)
    trained(here / "out", "qwen3", tokens)
    assert run("export.py", "--to=hf").code == 0
    speller = transformers.AutoTokenizer.from_pretrained("out/hf")
    texts = [TEXT, " ", "\n\n\n", "OK?!"]
    texts += [] if "char" in kind else [hf_folder.PROBE, "\x00\ufeff", "x" * 300, "𐍈 ẞ ǅ 1²³ ½"]
    for text in texts:
        assert speller.encode(text, add_special_tokens=False) == tokens.encode(text), text
        assert speller.decode(tokens.encode(text)) == text
    for name, i in tokens.specials.items():
        assert speller.encode(f"OK{name}OK", add_special_tokens=False).count(i) == 1
        assert speller.decode([i]) == name
    assert hf_folder.read_tokenizer(here / "out" / "hf") == tokens.to_data()


@pytest.mark.parametrize("network", NETWORKS)
def test_there_and_back_ends_in_equal_tensors(here, run, request, network):
    tokens = tokens_of("bpe", request)
    ours = trained(here / "out", network, tokens, padding=0)
    for to, place in (("hf", "out/hf"), ("safetensors", "out/model.safetensors")):
        assert run("export.py", f"--to={to}").code == 0
        result = run("export.py", f"--from={place}", f"--out_dir=back-{to}")
        assert result.code == 0, result.err
        state = run_folder.load_to_use(f"back-{to}")
        back = checkpoint.build_model(state).eval()
        assert state["tokenizer"] == tokens.to_data()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), name
        if to == "safetensors" or network != "gpt2 without biases":
            assert back.config == ours.config
        ids = tokens.encode("It's 5 bottles")
        assert greedy(back, ids, 20, tokens.vocab_size) == greedy(ours, ids, 20, tokens.vocab_size)


def test_bits_and_padding_are_kept_in_our_own_safetensors(here, run, request):
    tokens = tokens_of("char", request)
    ours = trained(here / "out", "gpt2 without biases", tokens)
    assert run("export.py", "--to=safetensors", "--dtype=bfloat16", "--path=small.safetensors").code == 0
    assert run("export.py", "--from=small.safetensors", "--out_dir=back").code == 0
    back = load(here / "back" / "ckpt.pt")["model"]
    assert all(torch.equal(t.bfloat16().float(), back[name]) for name, t in ours.state_dict().items())


def test_what_comes_back_trains_and_samples(here, run, request):
    tokens = tokens_of("char", request)
    trained(here / "out", "llama", tokens, padding=0)
    assert run("export.py", "--to=hf").code == 0
    (here / "text.txt").write_text(TEXT)
    prepared = run("data/text/prepare.py", "--source=text.txt", "--tokenizer=out/hf", "--out=data/mine")
    assert prepared.code == 0, prepared.err
    short = {"dataset": "mine", "device": "cpu", "compile": False, "batch_size": 2, "gradient_accumulation_steps": 1}
    short |= {"max_iters": 3, "eval_iters": 1, "dtype": "float32", "dropout": 0.0}
    result = run("train.py", *flags(init_from="hf:out/hf", out_dir="tuned", **short))
    assert result.code == 0, result.err
    assert run_folder.load_to_use("tuned")["model_args"]["arch"] == "llama"
    assert (
        run("sample.py", *flags(out_dir="tuned", num_samples=1, max_new_tokens=5, start="OK", device="cpu")).code == 0
    )
    result = run("sample.py", *flags(init_from="out/hf", num_samples=1, max_new_tokens=5, start="OK", device="cpu"))
    assert result.code == 0 and result.out.startswith("OK"), result.err
    for folder in ("out", "data/mine"):  # a checkpoint's, a data set's
        assert run("data/text/prepare.py", "--source=text.txt", f"--tokenizer={folder}", "--out=data/same").code == 0
    same = [json.loads((here / "data" / name / "meta.json").read_text())["tokenizer"] for name in ("mine", "same")]
    assert same[0] == same[1] == tokens.to_data()
    (here / "other.txt").write_text("".join(f"{n} ü\n" for n in range(500)))
    assert_user_error(run("data/text/prepare.py", "--source=other.txt", "--tokenizer=out", "--out=data/no"), "'ü'")
    assert run("data/text/prepare.py", "--source=other.txt", "--tokenizer=char", "--out=data/mine").code == 0
    assert_user_error(run("train.py", *flags(init_from="hf:out/hf", out_dir="no", **short)), "another tokenizer")


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT


@pytest.mark.parametrize("network", ["gpt2", "gpt2 without biases"])
def test_nanogpt_reads_its_folder(here, run, request, network):
    tokens = tokens_of("char", request)
    ours = trained(here / "out", network, tokens)
    assert run("export.py", "--to=nanogpt").code == 0
    state = torch.load(here / "out" / "nanogpt" / "ckpt.pt", weights_only=True)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    assert set(state["model_args"]) == set(names) and state["iter_num"] == 7
    shape = {name: state["model_args"][name] for name in names if name != "dropout"}
    reference = nanogpt.Reference(**shape)
    reference.load_state_dict(state["model"])
    idx = torch.randint(tokens.vocab_size, (2, 30))
    torch.testing.assert_close(reference(idx), ours(idx, idx)[0], atol=1e-4, rtol=0)
    meta = __import__("pickle").loads((here / "out" / "nanogpt" / "meta.pkl").read_bytes())
    assert "".join(meta["itos"][meta["stoi"][char]] for char in "OK?!") == "OK?!"
    back = run_folder.load_to_use("out/nanogpt")
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in back["model"].items())


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp; more in test_gguf.py


@pytest.mark.parametrize("dtype", ["f32", "bfloat16", "q8_0"])
@pytest.mark.parametrize("network", ["gpt2 without biases", "qwen3", "llama"])
def test_the_gguf_file_is_named_after_its_dtype_and_holds_the_vocabulary(here, run, request, network, dtype):
    gguf = pytest.importorskip("gguf")
    tokens = tokens_of("bpe", request)
    trained(here / "out", network, tokens)
    result = run("export.py", "--to=gguf", f"--dtype={dtype}")
    assert result.code == 0, result.err
    short = {"f32": "f32", "bfloat16": "bf16", "q8_0": "q8_0"}[dtype]
    reader = gguf.GGUFReader(here / "out" / f"model-{short}.gguf")
    assert reader.fields["general.architecture"].contents() == network.split()[0]
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == tokens.vocab_size
    assert ("zeros" in result.err) == ("bound the text" in result.err) == (network == "gpt2 without biases")


@pytest.mark.parametrize("network", ["gpt2", "qwen3 grouped, untied", "llama"])
def test_llama_cpp_writes_the_text_of_sample_py(here, run, request, network):
    pytest.importorskip("llama_cpp")
    from test_gguf import Llama

    tokens = tokens_of("bpe", request)
    trained(here / "out", network, tokens)
    arguments = flags(num_samples=1, max_new_tokens=40, temperature=0, start="It's 5", device="cpu")
    ours = run("sample.py", *arguments).out.split("\n---")[0]
    assert run("export.py", "--to=gguf").code == 0
    llama = Llama(here / "out" / "model-f32.gguf")
    theirs = llama.generate(llama.encode("It's 5"), 40)
    assert b"".join(map(llama.token_bytes, theirs)).decode("utf-8", "replace").startswith(ours.rstrip("\ufffd"))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers from elsewhere


def foreign(pre_tokenizers, folder, specials_first: bool):
    """A tokenizer.json as the tokenizers package writes it, with bytes and merges in its own order."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, trainers

    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers
    theirs.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>"] if specials_first else []
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    theirs.train_from_iterator([TEXT], trainer)
    if not specials_first:
        theirs.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


@pytest.mark.parametrize("specials_first", [True, False])
@pytest.mark.parametrize("pattern", [*PATTERNS, "llama 3", "qwen"])
def test_a_tokenizer_from_elsewhere_gives_its_ids(tmp_path, pattern, specials_first):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers as pre

    regex = {"llama 3": [*hf_folder.KNOWN_SPLITS][0], "qwen": [*hf_folder.KNOWN_SPLITS][1]}.get(pattern)
    if pattern == "gpt2":
        how = pre.ByteLevel(add_prefix_space=False)
    elif pattern == "smollm":
        how = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    else:
        split = pre.Split(tokenizers.Regex(regex or PATTERNS[pattern]), "isolated")
        how = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs = foreign(how, tmp_path / "a", specials_first)
    data = hf_folder.read_tokenizer(tmp_path / "a")
    tokenizer.check_data(json.loads(json.dumps(data)), theirs.get_vocab_size())
    ours = tokenizer.from_data(json.loads(json.dumps(data)))
    assert ours.vocab_size == theirs.get_vocab_size() and ours.to_data() == data
    for text in (TEXT, hf_folder.PROBE, "a  1  22\n\n3", "\t\t 'll 'LL x's", "日本語  \r\n 12345"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ids) == text
    assert ours.encode("<|endoftext|>", special=True) == theirs.encode("<|endoftext|>").ids
    # and on, as ours
    hf_folder._write_tokenizer(tmp_path / "a", ours, 64)
    assert hf_folder.read_tokenizer(tmp_path / "a") == data


def test_a_tokenizer_that_is_not_known_is_refused_by_name(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers as pre

    how = pre.Sequence([pre.Split(tokenizers.Regex(r"\w+|\W"), "isolated"), pre.ByteLevel(False, use_regex=False)])
    foreign(how, tmp_path / "a", False)
    with pytest.raises(UserError, match=r"splits text by .*not known here; to take the weights alone, move tokenizer"):
        hf_folder.read_tokenizer(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    theirs = json.loads(path.read_text())
    theirs["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    theirs["model"]["merges"] = theirs["model"]["merges"][::-1]  # an order that ids do not tell
    path.write_text(json.dumps(theirs))
    with pytest.raises(UserError, match="its merges are not those"):
        hf_folder.read_tokenizer(tmp_path / "a")
    for change, words in (
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": 3}, "can't be read"),
    ):
        path.write_text(json.dumps(theirs | change))
        with pytest.raises(UserError, match=words):
            hf_folder.read_tokenizer(tmp_path / "a")
    path.write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        hf_folder.read_tokenizer(tmp_path / "a")


def changed(folder, change):
    """The folder's tokenizer.json after `change` of what it holds."""
    theirs = json.loads((folder / "tokenizer.json").read_text())
    change(theirs)
    (folder / "tokenizer.json").write_text(json.dumps(theirs))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda its: its["model"].update(merges=its["model"]["merges"][:-3]), "its merges are not those"),
        (lambda its: its["model"]["merges"].append(its["model"]["merges"].pop(-2)), "its merges are not those"),
        (lambda its: its["added_tokens"][0].update(lstrip=True), "takes more or less than itself"),
        (lambda its: its["added_tokens"].append({"id": 300, "content": merged(its, 44)}), "made by merges"),
    ],
)
def test_a_tokenizer_that_differs_in_a_corner_is_refused(tmp_path, change, words):
    pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers as pre

    foreign(pre.ByteLevel(add_prefix_space=False), tmp_path / "a", False)
    with pytest.raises(UserError, match=words):
        hf_folder.read_tokenizer(changed(tmp_path / "a", change))


def merged(theirs: dict, n: int) -> str:
    merge = theirs["model"]["merges"][n]
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def test_special_tokens_keep_their_ids_wherever_they_are(tmp_path):
    """In front, in gaps, and far behind: in the file that is written too."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = [None, None, *(bytes([byte]) for byte in range(256)), None, b"th", b"the"]
    ours = BPETokenizer(vocab, "gpt2", {"<pad>": 0, "</s>": 1, "<|endoftext|>": 300})
    (tmp_path / "a").mkdir()
    hf_folder._write_tokenizer(tmp_path / "a", ours, 64)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert theirs.encode("<pad>the</s><|endoftext|>").ids == [0, 260, 1, 300]
    assert theirs.decode([0, 260, 1], skip_special_tokens=False) == "<pad>the</s>"
    assert hf_folder.read_tokenizer(tmp_path / "a") == ours.to_data()


def test_gpt2s_tokens_with_more_special_ones_keep_them(tmp_path, gpt2_bpe):
    pytest.importorskip("tokenizers")
    gpt2 = GPT2Tokenizer()
    vocab = [gpt2.token_bytes(i) for i in range(50256)]
    more = BPETokenizer(vocab, "gpt2", {"<|endoftext|>": 50256, "<|im_start|>": 50257})
    (tmp_path / "a").mkdir()
    hf_folder._write_tokenizer(tmp_path / "a", more, 64)
    assert tokenizer.from_data(hf_folder.read_tokenizer(tmp_path / "a")).encode("<|im_start|>", True) == [50257]
    hf_folder._write_tokenizer(tmp_path / "a", gpt2, 64)
    assert hf_folder.read_tokenizer(tmp_path / "a") == {"type": "gpt2"}


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_nothing_of_the_users_is_overwritten_or_taken_for_something_else(here, run, request):
    safetensors = pytest.importorskip("safetensors.torch")
    tokens = tokens_of("char", request)
    ours = trained(here / "out", "gpt2", tokens, padding=0)
    (here / "keep.tmp").mkdir()
    (here / "keep.tmp" / "notes.txt").write_text("mine")
    for to in ("hf", "nanogpt"):
        assert run("export.py", f"--to={to}", "--path=keep").code == 0
        shutil.rmtree("keep")
    assert (here / "keep.tmp" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["keep.tmp", "out"]
    # weights of another file, beside the model's
    assert run("export.py", "--to=hf").code == 0
    other = {
        name: torch.zeros_like(tensor) for name, tensor in safetensors.load_file("out/hf/model.safetensors").items()
    }
    safetensors.save_file(other, "out/hf/model_old.safetensors")
    back = GPT.from_pretrained("out/hf")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    # a run in shards
    (here / "run" / "last.dcp").mkdir(parents=True)
    assert_user_error(run("export.py", "--from=out/hf", "--out_dir=run"), "last.dcp is there already")
    assert_user_error(run("export.py", "--to=hf", f"--path={'x' * 300}"), "xxx")


def test_weights_too_large_for_float16_are_named(here, run, request):
    model = trained(here / "out", "qwen3", tokens_of("char", request))
    state = load(here / "out" / "ckpt.pt")
    state["model"]["transformer.ln_f.weight"] = torch.full_like(model.transformer.ln_f.weight, 1e5)
    checkpoint.save(here / "out" / "ckpt.pt", state)
    for to in ("hf", "safetensors"):
        assert_user_error(run("export.py", f"--to={to}", "--dtype=float16"), "ln_f.weight", "float16")


def test_mistakes_are_one_line_each_and_nothing_is_touched(here, run, request):
    tokens = tokens_of("char", request)
    trained(here / "out", "qwen3", tokens)
    assert_user_error(run("export.py"), "--to=hf", "--from=PATH")
    assert_user_error(run("export.py", "--to=onnx"), "hf, safetensors, gguf, nanogpt")
    assert_user_error(run("export.py", "--to=hf", "--dtype=int4", "--out_dir=nowhere"), "int4", "nowhere")
    assert_user_error(run("export.py", "--to=hf", "--dtype=q8_0"), "float32, bfloat16, float16")
    assert_user_error(run("export.py", "--to=nanogpt"), "this model's is qwen3")
    assert_user_error(run("export.py", "--to=nanogpt", "--dtype=bfloat16"), "float32")
    assert_user_error(run("export.py", "--from=nowhere", "--out_dir=b"), "nowhere")
    assert_user_error(run("export.py", "--from=out", "--to=hf"), "one of the two")
    assert_user_error(run("export.py", "--from=out", "--out_dir=b", "--path=x"), "path")
    assert_user_error(run("export.py", "--to=hf", "--adapter=no.pt"), "no.pt")
    assert not (here / "b").exists() and [path.name for path in (here / "out").iterdir()] == ["ckpt.pt"]
    assert run("export.py", "--to=hf").code == 0
    assert_user_error(run("export.py", "--to=hf"), "is there already")
    before = (here / "out" / "ckpt.pt").read_bytes()
    assert_user_error(run("export.py", "--from=out/hf", "--out_dir=out"), "out/ckpt.pt is there already")
    assert (here / "out" / "ckpt.pt").read_bytes() == before


def test_a_folder_with_wrong_tensors_is_refused_with_their_names(here, run, request):
    safetensors = pytest.importorskip("safetensors.torch")
    trained(here / "out", "qwen3", tokens_of("char", request))
    assert run("export.py", "--to=hf").code == 0
    tensors = {key: t.clone() for key, t in safetensors.load_file("out/hf/model.safetensors").items()}  # not mapped
    name = "model.layers.1.self_attn.k_proj.weight"
    changes = {
        "it lacks " + name: {key: value for key, value in tensors.items() if key != name},
        name + " is of shape": tensors | {name: tensors[name][:-1].contiguous()},
        "it has also model.layers.0.self_attn.q_proj.bias": tensors
        | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)},
    }
    for words, its in changes.items():
        safetensors.save_file(its, "out/hf/model.safetensors")
        assert_user_error(run("export.py", "--from=out/hf", "--out_dir=b"), words)
    config = json.loads((here / "out" / "hf" / "config.json").read_text())
    (here / "out" / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    assert_user_error(run("export.py", "--from=out/hf", "--out_dir=b"), "mixtral", "gpt2, qwen3 and llama")
    (here / "junk.safetensors").write_bytes(b"junk" * 99)
    assert_user_error(run("export.py", "--from=junk.safetensors", "--out_dir=b"), "junk.safetensors")
    safetensors.save_file(tensors, "plain.safetensors")
    assert_user_error(run("export.py", "--from=plain.safetensors", "--out_dir=b"), "not written here")
    assert not (here / "b" / "ckpt.pt").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(here, run, request):
    trained(here / "out", "qwen3", tokens_of("char", request), padding=0)
    trained(here / "big", "qwen3", tokens_of("bpe", request))
    assert run("export.py", "--to=hf").code == 0 and run("export.py", "--to=hf", "--out_dir=big").code == 0
    shutil.copy("big/hf/tokenizer.json", "out/hf/tokenizer.json")
    assert_user_error(run("export.py", "--from=out/hf", "--out_dir=b"), "the tokenizer has 400 tokens")


def test_help_shows_from_as_it_is_typed():
    result = subprocess.run([sys.executable, str(ROOT / "export.py"), "--help"], capture_output=True, text=True)
    assert "  --from=''" in result.stdout and math.isfinite(len(result.stdout)) and np.__name__ == "numpy"
