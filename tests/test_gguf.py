import ctypes
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from model import GPT, GPTConfig
from quartz import gguf as room
from quartz.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer

gguf = pytest.importorskip("gguf")

SHAPE = {"block_size": 128, "vocab_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 64}
ROTARY = {"arch": "qwen3", "bias": False}
MODELS = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False},
    "qwen3": {**ROTARY, "n_kv_head": 2, "head_dim": 24, "tie_embeddings": False, "rope_theta": 1e6, "norm_eps": 1e-5},
    "qwen3, tied": ROTARY,
    "llama": {**ROTARY, "arch": "llama", "n_kv_head": 2},
    "llama, untied": {**ROTARY, "arch": "llama", "n_kv_head": 1, "head_dim": 32, "tie_embeddings": False},
}
CHARS = CharTokenizer([chr(32 + i) if i != 7 else None for i in range(100)], [END_OF_TEXT])
TOKENS = 101  # of CHARS; the model has rows for 128


@pytest.fixture(params=MODELS)
def model(request) -> GPT:
    return made(**MODELS[request.param])


def made(**changes) -> GPT:
    """A network with every weight away from where it began; its logits differ by units, the first two by 0.005."""
    torch.manual_seed(6)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = 0.5 if parameter.dim() == 1 or "wte" in name else 2.0 * parameter.size(1) ** -0.5
            parameter.add_(width * torch.randn(parameter.shape))
    return model


@pytest.fixture
def write(tmp_path):
    def write(model: GPT, tokenizer=CHARS, dtype="f32"):
        path = tmp_path / "model.gguf"
        room.write(path, model.config, model.state_dict(), tokenizer, dtype, "a model")
        assert [*tmp_path.iterdir()] == [path]
        return path

    return write


def contents(path) -> tuple[dict, dict]:
    """The metadata as plain values, and the tensors by name, as gguf's own reader finds them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def expected(model: GPT) -> dict[str, torch.Tensor]:
    """What the file has to hold, by llama.cpp's names, written out by hand."""
    c, state = model.config, model.state_dict()
    found = {"token_embd.weight": state["transformer.wte.weight"][:TOKENS]}
    if not c.tie_embeddings:
        found["output.weight"] = state["lm_head.weight"][:TOKENS]
    if c.arch == "gpt2":
        found["position_embd.weight"] = state["transformer.wpe.weight"]
    pairs = {"transformer.ln_f": "output_norm"}
    for n in range(c.n_layer):
        ours, theirs = f"transformer.h.{n}.", f"blk.{n}."
        pairs |= {ours + "ln_1": theirs + "attn_norm", ours + "ln_2": theirs + "ffn_norm"}
        pairs |= {ours + "attn.c_proj": theirs + "attn_output", ours + "mlp.c_proj": theirs + "ffn_down"}
        if c.arch == "gpt2":
            pairs |= {ours + "attn.c_attn": theirs + "attn_qkv", ours + "mlp.c_fc": theirs + "ffn_up"}
            continue
        if c.arch == "qwen3":
            pairs |= {ours + f"attn.{name}": theirs + f"attn_{name}" for name in ("q_norm", "k_norm")}
        sizes = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
        parts = [*state[ours + "attn.c_attn.weight"].split(sizes)]
        if c.arch == "llama":  # channel i of a head and channel i + head_dim / 2 become neighbours
            half = c.head_dim // 2
            order = [channel for i in range(half) for channel in (i, i + half)]
            for n_part in range(2):
                heads = parts[n_part].split(c.head_dim)
                parts[n_part] = torch.cat([head[order] for head in heads])
        parts += state[ours + "mlp.c_fc.weight"].chunk(2)
        names = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
        found |= {f"{theirs}{name}.weight": part for name, part in zip(names, parts, strict=True)}
    for ours, theirs in pairs.items():
        found[theirs + ".weight"] = state[ours + ".weight"]
        if c.arch == "gpt2":
            found[theirs + ".bias"] = state.get(ours + ".bias", torch.zeros(state[ours + ".weight"].size(0)))
    return found


@pytest.mark.parametrize("dtype", room.DTYPES)
def test_the_weights_are_ours_to_the_rounding_of_the_dtype(model, write, dtype):
    tensors, wanted = contents(write(model, dtype=dtype))[1], expected(model)
    assert tensors.keys() == wanted.keys()
    for name, weight in wanted.items():
        tensor, found = tensors[name], values(tensors[name])
        assert found.shape == weight.shape and [*tensor.shape] == [*weight.shape][::-1], name
        plain = dtype == "f32" or weight.dim() == 1 or name == "position_embd.weight"
        kind = "f32" if plain else "f16" if dtype == "q8_0" and weight.size(1) % 32 else dtype
        assert tensor.tensor_type.name == kind.upper(), name
        if kind == "q8_0":  # 32 weights share a scale, which is itself a float16: their largest over 127
            blocks = weight.unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            assert ((found.view_as(blocks) - blocks).abs() <= step * (0.5 + 127 / 2048)).all(), name
        else:
            rounded = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(found, weight.to(rounded).float()), name


def test_weights_of_a_narrower_dtype_are_written_as_they_are(write):
    model = made().bfloat16()
    for dtype in ("f32", "bf16"):
        tensors = contents(write(model, dtype=dtype))[1]
        for name, weight in expected(model).items():
            assert torch.equal(values(tensors[name]), weight.float()), name


def test_the_metadata_is_what_the_config_says(write):
    common = {"block_count": 2, "context_length": 128, "embedding_length": 64, "vocab_size": 101}
    gpt2 = {"attention.head_count": 4, "attention.head_count_kv": 4, "feed_forward_length": 256}
    qwen3 = {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 192}
    qwen3 |= {"attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 24}
    cases = {"gpt2": gpt2, "qwen3": qwen3}
    floats = {"gpt2": {"attention.layer_norm_epsilon": 1e-5}}
    floats["qwen3"] = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
    for arch, sizes in cases.items():
        fields = contents(write(made(**MODELS[arch]), dtype="bf16"))[0]
        ours = {name.removeprefix(arch + "."): value for name, value in fields.items() if name.startswith(arch + ".")}
        assert ours == {**common, **sizes, **{name: pytest.approx(value) for name, value in floats[arch].items()}}
        assert (fields["general.architecture"], fields["general.name"]) == (arch, "a model")
        assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
        assert "tokenizer.chat_template" not in fields


def test_the_vocabulary_ends_where_the_tokenizers_does(write):
    fields, tensors = contents(write(made(tie_embeddings=False, **ROTARY)))
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(texts) == len(types) == TOKENS == tensors["token_embd.weight"].shape[1]
    assert (texts[0], texts[2], texts[99], texts[100]) == ("Ġ", '"', "Âĥ", END_OF_TEXT)
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.UNUSED] == [7]
    assert [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [100]
    assert fields["tokenizer.ggml.eos_token_id"] == 100
    assert fields["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.suppress_tokens" not in fields
    assert fields["tokenizer.ggml.merges"][:2] == ["Â Ģ", "Â ģ"]


def test_an_end_of_text_that_the_vocabulary_lacks_is_added_and_never_the_likeliest(write):
    """llama.cpp takes id 11 for it where there is none, here a plus sign."""
    model = made(tie_embeddings=False, **ROTARY)
    plain = CharTokenizer(CHARS.chars)
    fields, tensors = contents(write(model, plain))
    assert fields["tokenizer.ggml.tokens"][100:] == [END_OF_TEXT]
    assert fields["tokenizer.ggml.eos_token_id"] == 100 and fields["tokenizer.ggml.suppress_tokens"] == [100]
    head = values(tensors["output.weight"])
    assert head.shape == (101, 64) and torch.equal(head[:100], model.state_dict()["lm_head.weight"][:100])
    assert (head @ torch.randn(64, 1000)).argmax(0).max() < 100
    torch.testing.assert_close(head[100], head[:100].mean(0))


def test_without_a_tokenizer_all_rows_are_there(write):
    fields, tensors = contents(write(made(), None))
    assert fields["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in fields
    assert fields["gpt2.vocab_size"] == 128 == tensors["token_embd.weight"].shape[1]


def test_rows_that_q8_0_cannot_divide_are_f16_and_said_once(write, capsys):
    write(made(**{**ROTARY, "n_embd": 48, "n_hidden": 64}), dtype="q8_0")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "warning: q8_0 takes rows in multiples of 32 weights: 13 matrices are written in f16, such as token_embd.weight"
    ]
    write(made(), dtype="q8_0")
    assert capsys.readouterr() == ("", "")


def test_weights_too_large_for_f16_are_one_problem(tmp_path):
    model = made()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 70000
    with pytest.raises(UserError, match=r"token_embd.weight .* dtype=bf16"):
        room.write(tmp_path / "x.gguf", model.config, model.state_dict(), CHARS, "f16", "x")
    assert not [*tmp_path.iterdir()]


def test_tokens_that_llama_cpp_cannot_tell_apart_are_one_problem(tmp_path):
    model, twice = made(), CharTokenizer("aé", ["Ã©"])
    with pytest.raises(UserError, match="2 of this tokenizer's are 'Ã©' there"):
        room.write(tmp_path / "x.gguf", model.config, model.state_dict(), twice, "f32", "x")


def test_without_the_gguf_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = made()
    with pytest.raises(UserError, match=r"writing GGUF needs the gguf package: pip install -e .\[gguf\]"):
        room.write(tmp_path / "x.gguf", model.config, model.state_dict(), CHARS, "f32", "x")


@pytest.mark.parametrize("missing", [1, 300, 5000, 10**9])
def test_a_full_disk_is_one_problem_and_the_old_file_stays(write, missing):
    """However few bytes find no room: numpy does not tell of the last ones."""
    resource = pytest.importorskip("resource")
    model = made()
    path = write(model)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(0, len(before) - missing), limits[1]))
    try:
        with pytest.raises(UserError, match="model.gguf can't be written: File too large") as caught:
            write(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught.value.problems) == 1
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


# ----------------------------------------------------------------------------------------------------------------------
# What llama.cpp makes of it


class Llama:
    """llama.cpp by its C interface: its tokens, its logits, its greedy text. The cache is float32, as ours is."""

    def __init__(self, path, vocab_only: bool = False):
        self.lib = lib = pytest.importorskip("llama_cpp")
        Llama.quiet = lib.llama_log_callback(lambda *_: None)  # kept: llama.cpp goes on calling it
        lib.llama_log_set(Llama.quiet, None)
        settings = lib.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = vocab_only, 0
        self.model = lib.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, "llama.cpp does not load it"
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_tokens = lib.llama_vocab_n_tokens(self.vocab)
        self.context = None
        if not vocab_only:
            settings = lib.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
            settings.n_threads = settings.n_threads_batch = 1
            settings.type_k = settings.type_v = lib.GGML_TYPE_F32
            settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = lib.llama_init_from_model(self.model, settings)

    def __del__(self):
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)

    def encode(self, text: str, special: bool = False) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 1))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, special)
        assert count >= 0
        return ids[:count]

    def token_bytes(self, i: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = self.lib.llama_token_to_piece(self.vocab, i, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    def read(self, ids: list[int]) -> torch.Tensor:
        """The logits (T, n_tokens) behind each of the ids."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return torch.stack([self.step(i) for i in ids])

    def step(self, i: int) -> torch.Tensor:
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one((ctypes.c_int32 * 1)(i), 1)) == 0
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.n_tokens,)).copy())

    def generate(self, prompt: list[int], count: int) -> list[int]:
        ids, logits = [*prompt], self.read(prompt)[-1]
        for _ in range(count):
            ids.append(int(logits.argmax()))
            logits = self.step(ids[-1])
        return ids


IDS = torch.randint(TOKENS, (1, 100), generator=torch.Generator().manual_seed(1))


def gelu_looked_up(x: torch.Tensor, approximate: str, exact=torch.nn.functional.gelu) -> torch.Tensor:
    """GELU as llama.cpp has it on CPUs: both sides in float16, between -10 and 10."""
    found = exact(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, found, x.clamp(min=0))


@torch.no_grad()
def test_llama_cpp_computes_our_logits_and_our_greedy_text(model, write, monkeypatch):
    llama, prompt = Llama(write(model)), IDS[:, :7]
    assert llama.n_tokens == TOKENS
    text = model.generate(prompt, 100, temperature=0, vocab_size=TOKENS)[0].tolist()
    assert llama.generate(prompt[0].tolist(), 100) == text and len(set(text)) > 5
    found, ours = llama.read(IDS[0].tolist()), model(IDS, IDS)[0][0, :, :TOKENS]
    assert ours.std() > 1
    tolerance = 5e-4
    if model.config.arch == "gpt2":
        torch.testing.assert_close(found, ours, atol=0.05, rtol=0)
        monkeypatch.setattr(torch.nn.functional, "gelu", gelu_looked_up)  # what is left are numbers that it rounds
        ours, tolerance = model(IDS, IDS)[0][0, :, :TOKENS], 5e-3  # up there, and down here
    torch.testing.assert_close(found, ours, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.15)])
def test_llama_cpp_computes_logits_close_to_ours_in_narrower_dtypes(model, write, dtype, tolerance):
    """Mean distance against the spread of the logits."""
    found = Llama(write(model, dtype=dtype)).read(IDS[0].tolist())
    ours = model(IDS, IDS)[0][0, :, :TOKENS]
    assert (found - ours).abs().mean() < tolerance * ours.std()


@torch.no_grad()
def test_llama_cpp_runs_a_model_without_a_tokenizer(write):
    model = made(**ROTARY)
    torch.testing.assert_close(
        Llama(write(model, None)).read(IDS[0].tolist()), model(IDS, IDS)[0][0], atol=1e-3, rtol=0
    )


TEXT = "".join(f"It's {n} bottles; I'LL drink {n * 37} of them, naïve 日本語 🙂\r\n\n  \tOK?! " for n in range(200))
TEXTS = [
    "The quick brown fox doesn't jump: it'll WALK, they'RE told. (Twice…)",
    "def f(x):\n\tif  x >= 10_000:\r\n\t\treturn x**2  # ok\n\n\n    else:\n        pass\n",
    "1 22 333 4444 55555 666666 7777777 3.14159 1e-5 0x7f ½ ² ٣٤٥ Ⅷ",
    "日本語 русский العربية हिन्दी 한국어 ελληνικά עברית ไทย naïve a\u0301e\u0308 ǅ İ ß",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ™ © ∑ → ─ ¡¿",
    "   leading,   inner \t and trailing   ",
    "\n\n\n  \n a\n \r\n\r\n x\r\r y \n",
    "\x00\x01\x7f\xa0\u2003x\u3000\u2028\u0085y\u200b\ufeff",
    "<|endoftext|><|im_start|> as text",
    *("", " ", "\n", "\t", "'", "'s"),
]


@pytest.fixture(scope="module", params=["gpt2's", "gpt4", "gpt2", "bytes", "characters"])
def both(request, tmp_path_factory):
    """A tokenizer, and what llama.cpp makes of it."""
    if request.param == "gpt2's":
        request.getfixturevalue("gpt2_bpe")
        tokenizer = GPT2Tokenizer()
    elif request.param == "bytes":
        tokenizer = BPETokenizer.of_merges([], "gpt4")
    elif request.param == "characters":
        tokenizer = CharTokenizer([None, *sorted({*TEXT, *"".join(TEXTS)}), "\ud800"], [END_OF_TEXT])
    else:
        pytest.importorskip("tokenizers")
        tokenizer = BPETokenizer.train([TEXT, *TEXTS], 700, request.param)
    model = GPT(GPTConfig(8, tokenizer.vocab_size + 3, 1, 1, 2))
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    room.write(path, model.config, model.state_dict(), tokenizer, "f32", "x")
    return tokenizer, Llama(path, vocab_only=True)


@pytest.mark.parametrize("text", [*TEXTS, TEXT], ids=ascii)
def test_llama_cpp_gives_text_our_ids(both, text):
    ours, llama = both
    assert llama.encode(text) == ours.encode(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from(sorted({*"".join(TEXTS)})), max_size=60))
def test_llama_cpp_gives_any_text_our_ids(both, text):
    ours, llama = both
    assert llama.encode(text) == ours.encode(text)


def test_llama_cpp_knows_the_special_tokens_and_gives_every_id_our_bytes(both):
    ours, llama = both
    assert llama.n_tokens == ours.vocab_size
    text = f"a{END_OF_TEXT}b c" + "".join(f"{name}\n" for name in ours.specials)
    assert llama.encode(text, special=True) == ours.encode(text, special=True)
    assert not {*llama.encode(END_OF_TEXT)} & {*ours.specials.values()}
    assert all(llama.token_bytes(i) == ours.token_bytes(i) for i in range(ours.vocab_size))
    end = ours.specials[END_OF_TEXT]
    assert llama.lib.llama_vocab_eos(llama.vocab) == end and llama.lib.llama_vocab_is_eog(llama.vocab, end)
    assert not llama.lib.llama_vocab_get_add_bos(llama.vocab)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["\U00013460", "x\U00013460"], "x\U00013460"),  # a letter since Unicode 16
        (["ſ", "ſy"], "x'ſy"),
    ],
    ids=ascii,
)
def test_where_llama_cpp_splits_text_otherwise_it_is_the_same_text(tmp_path, tokens, text):
    """What gguf.py says of it. Should this fail, llama.cpp has caught up."""
    parts = dict.fromkeys(t.encode()[:n] for t in tokens[:1] for n in range(2, 5) if n <= len(t.encode()))
    ours = BPETokenizer.of_merges([*parts, tokens[1].encode()], "gpt4")
    model = GPT(GPTConfig(8, ours.vocab_size, 1, 1, 2))
    room.write(tmp_path / "x.gguf", model.config, model.state_dict(), ours, "f32", "x")
    llama = Llama(tmp_path / "x.gguf", vocab_only=True)
    assert llama.encode(text) != ours.encode(text)
    assert b"".join(map(llama.token_bytes, llama.encode(text))) == text.encode()


def test_llama_cpp_has_no_end_of_text_but_the_one_that_was_added(tmp_path):
    """Without it, the plus sign of these characters would end every text."""
    model, plain = made(), CharTokenizer(CHARS.chars)
    room.write(tmp_path / "x.gguf", model.config, model.state_dict(), plain, "f32", "x")
    llama = Llama(tmp_path / "x.gguf", vocab_only=True)
    ends = [i for i in range(llama.n_tokens) if llama.lib.llama_vocab_is_eog(llama.vocab, i)]
    assert ends == [100] and plain.decode([11]) == "+"
    assert llama.encode("a+b") == plain.encode("a+b")


def test_a_character_that_the_tokenizer_lacks_is_dropped_by_llama_cpp(tmp_path):
    model, chars = made(), CharTokenizer("ab日")
    room.write(tmp_path / "x.gguf", model.config, model.state_dict(), chars, "f32", "x")
    assert Llama(tmp_path / "x.gguf", vocab_only=True).encode("a旦é日\nb") == [0, 2, 1]
