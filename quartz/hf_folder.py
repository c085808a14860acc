"""A folder in Hugging Face's layout: config.json, model.safetensors, and the tokenizer's files.

Written and read without transformers, which loads it by AutoModelForCausalLM and AutoTokenizer, as vLLM and others do.
GPT.from_pretrained hands over to read_model; the names and shapes are hf_layout.py's.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from quartz import checkpoint, files, machine
from quartz.errors import UserError
from quartz.extras import needs
from quartz.hf_layout import GPT2_MODELS, config_from_hf, hf_config, state_from_hf, state_to_hf
from quartz.tokenizer import END_OF_TEXT, PATTERNS, CharTokenizer, Tokenizer, from_data, printable, printable_bytes

TOKENIZER = "tokenizer.json"
ANY_CHARACTER = r"[\s\S]"
# Of GPT-2's tokens by id, two line ends between them: by this they are recognised without a copy of them.
GPT2_TOKENS = "1448801f0c187622899a3b6fab4faaea405330bfddf2997501c15bbf642f1e23"
# How others write the ways to split text that are known here: so Llama 3, or Qwen 2, with other numbers of digits.
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
_CL100K += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_SPLITS = {
    _CL100K.replace("DIGITS", r"\p{N}{1,3}"): "gpt4",
    _CL100K.replace("DIGITS", r"\p{N}"): "qwen2",
    **{regex: name for name, regex in PATTERNS.items()},
}
# Text on which a tokenizer that is read must agree with the library that wrote it.
PROBE = (
    "Hello, world! I'LL say it's 3.14159, 1234567 and ¼ — naïve façade, ﬁn. Größe ÄÖÜß, Привет, мир, こんにちは世界, "
    "你好，世界, 안녕하세요, שלום עולם, مرحبا بالعالم, नमस्ते, 🙂👩\u200d💻🇩🇪\n\n\t"
    "def f(x):\r\n        return  x[0]   # a comment   \n  \n"
    "<b>http://a.b/c?d=e&f=%20</b> $x^2$ ''' \"\"\" \u00a0\u2028\u3000 end. 'tis 'S 'Re 12ab34 x1y22  9 \n 9  "
)


def read_model(name: str, dropout: float = 0.0) -> GPT:
    """The model in the folder `name`, or of that name on the hub, on the CPU. What it raises: see GPT.from_pretrained.

    Needs the safetensors package, and huggingface_hub for a download.
    """
    config_path, weights_paths = _model_files(name)
    try:
        with open(config_path, encoding="utf-8") as file:
            config = config_from_hf(json.load(file))
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    config.dropout = dropout
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors = {}
    for path in weights_paths:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error})") from error
    try:
        state = state_from_hf(config, tensors)
    except ValueError as error:
        raise ValueError(f"{os.path.dirname(weights_paths[0]) or name}: {error}") from error
    with machine.no_memory():
        model = GPT(config)
    checkpoint.fill(model, state)
    return model


def _model_files(name: str) -> tuple[str, list[str]]:
    """The paths of config.json and of the weights: in the folder `name`, or downloaded from the hub."""
    if os.path.isdir(name):
        files, index = ["config.json", "model.safetensors"], os.path.join(name, "model.safetensors.index.json")
        if not os.path.exists(os.path.join(name, files[1])) and os.path.exists(index):
            with open(index, encoding="utf-8") as file:
                listed = json.load(file)["weight_map"]
            files = ["config.json", *sorted(set(listed.values()))]
        paths = [os.path.join(name, file) for file in files]
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise OSError(f"missing {' and '.join(missing)}")
        return paths[0], paths[1:]
    if name not in GPT2_MODELS:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(GPT2_MODELS)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its remarks on every retry; what comes of them is said below
    try:
        config, weights = (
            hf_hub_download(f"openai-community/{name}", file) for file in ("config.json", "model.safetensors")
        )
        return config, [weights]
    except Exception as error:  # the client raises a dozen kinds; all of them mean that there is no file
        raise OSError(
            f"{name} could not be downloaded ({type(error).__name__}); a local folder {name!r} serves as well"
        ) from error


def write(folder: Path, config: GPTConfig, state: dict[str, torch.Tensor], tokenizer: Tokenizer | None) -> None:
    """Writes the model, in the dtype of `state`, and its tokenizer to a folder that must not be there yet.

    Raises UserError where it is, or where the disk refuses; nothing is left then.
    """
    from safetensors.torch import save_file

    theirs = hf_config(config) | {"torch_dtype": str(state["transformer.wte.weight"].dtype).removeprefix("torch.")}
    end = tokenizer.specials.get(END_OF_TEXT) if tokenizer else None
    theirs |= {"bos_token_id": end, "eos_token_id": end}
    with files.writing(folder):
        if folder.exists():
            raise UserError(f"{folder} is there already: move it away, or name another with --path")
    with files.writing(folder), files.whole_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
        save_file(state_to_hf(config, state), partial / "model.safetensors", metadata={"format": "pt"})
        if tokenizer:
            _write_tokenizer(partial, tokenizer, config.block_size)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, CharTokenizer):
        names = {char: i for i, char in enumerate(tokenizer.chars) if char is not None}
        theirs = tokenizers.Tokenizer(models.WordLevel(_filled(names, tokenizer), unk_token="<unk>"))
        theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(ANY_CHARACTER), "isolated")
        theirs.decoder = decoders.Fuse()
    else:
        merges = [(printable(a), printable(b)) for a, b in tokenizer.merges()]
        vocab = {printable(token): i for token, i in tokenizer.ranks().items()}
        theirs = tokenizers.Tokenizer(models.BPE(_filled(vocab, tokenizer), merges, ignore_merges=True))
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PATTERNS[tokenizer.pattern]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        theirs.decoder = decoders.ByteLevel()
    data = json.loads(theirs.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": i, "content": name, **flags} for name, i in tokenizer.specials.items()]
    (folder / TOKENIZER).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    written = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    assert all(written.token_to_id(name) == i for name, i in tokenizer.specials.items()), "special tokens have moved"
    end = END_OF_TEXT if END_OF_TEXT in tokenizer.specials else None
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "eos_token": end,
        "bos_token": end,
    }
    about |= {"clean_up_tokenization_spaces": False, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _filled(vocab: dict[str, int], tokenizer: Tokenizer) -> dict[str, int]:
    """A vocabulary with the special tokens in it, and names for ids that are free: else the package moves them."""
    taken = vocab | tokenizer.specials
    free = {*range(tokenizer.vocab_size)} - {*taken.values()}
    return taken | {f"<unused {i}>": i for i in free}


def may_be_gpt2(folder: Path) -> bool:
    """Whether a folder without tokenizer.json may hold a model of GPT-2's own tokens: no vocab.json says otherwise."""
    try:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        byte_of, names = printable_bytes(), sorted(vocab, key=vocab.__getitem__)
        plain = [bytes(byte_of[char] for char in name) for name in names if name != END_OF_TEXT]
        return hashlib.sha256(b"\n\n".join(plain)).hexdigest() == GPT2_TOKENS
    except FileNotFoundError:
        print(
            f"note: {folder} has no tokenizer; its vocabulary is as large as GPT-2's, which is taken", file=sys.stderr
        )
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_tokenizer(folder: Path) -> dict | None:
    """The tokenizer in tokenizer.json as our plain data; None where there is no such file.

    Raises UserError, which says what to do, for one that is not known here: it is compared with the tokenizers package
    on text of many scripts, so that none is taken for another.
    """
    path = folder / TOKENIZER
    if not path.exists():
        return None
    otherwise = f"to take the weights alone, move {TOKENIZER} away"
    tokenizers = needs("tokenizers", f"reading {path}", "hf")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        data = _as_ours(theirs)
        ours, peer = from_data(data), tokenizers.Tokenizer.from_file(str(path))
        probe = PROBE if data["type"] != "char" else "".join(char or "" for char in data["chars"])
        agrees = ours.encode(probe) == peer.encode(probe, add_special_tokens=False).ids
    except UserError as problem:
        raise UserError(f"{path}: {problem}; {otherwise}") from problem
    except Exception as error:  # the package raises bare Exceptions, and the file may hold anything
        raise UserError(f"{path} can't be read ({type(error).__name__}: {str(error)[:200]}); {otherwise}") from error
    if not agrees:
        raise UserError(f"{path} splits text in a way that is not known here; {otherwise}")
    return data


def _as_ours(theirs: dict) -> dict:
    model, added = theirs["model"], theirs.get("added_tokens") or []
    specials = {token["content"]: token["id"] for token in added}
    if (normalizer := theirs.get("normalizer")) and normalizer.get("type") != "NFC":
        raise UserError(f"it changes text before it is split ({normalizer.get('type')}), which is not done here")
    for token in added:
        if any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise UserError(f"its token {token['content']!r} takes more or less than itself, which is not done here")
    if ordinary := [token["content"] for token in added if not token.get("special", True)]:
        print(f"note: in plain text, {', '.join(ordinary)[:200]} are text here, and tokens in prompts", file=sys.stderr)
    if model["type"] == "WordLevel":
        if model.get("unk_token") in model["vocab"]:
            raise UserError(f"it has a token for unknown characters, {model['unk_token']!r}, which is not done here")
        chars = [None] * (max(model["vocab"].values()) + 1)
        for char, i in model["vocab"].items():
            chars[i] = char if len(char) == 1 and char not in specials else None
        while chars and chars[-1] is None and len(chars) > min(specials.values(), default=0) > 0:
            chars.pop()
        names = sorted(specials, key=specials.__getitem__)
        if [specials[name] for name in names] != [*range(len(chars), len(chars) + len(names))]:
            raise UserError("its special tokens do not follow its characters")
        return {"type": "char", "chars": chars} | ({"specials": names} if names else {})
    if model["type"] != "BPE":
        raise UserError(f"it is a {model['type']} tokenizer, and only byte-level BPE and characters are read here")
    byte_of = printable_bytes()
    pattern = _pattern_of(theirs["pre_tokenizer"])
    vocab: list[str | None] = [None] * (max(model["vocab"].values()) + 1)
    for token, i in model["vocab"].items():
        if token not in specials and byte_of.keys() >= set(token):  # else it is an id that is free
            vocab[i] = "".join(chr(byte_of[char]) for char in token)
    plain = [token.encode("latin-1") for token in vocab if token is not None]
    if (
        pattern == "gpt2"
        and specials == {END_OF_TEXT: len(plain)}
        and hashlib.sha256(b"\n\n".join(plain)).hexdigest() == GPT2_TOKENS
    ):
        return {"type": "gpt2"}
    if normalizer:
        print(f"note: {TOKENIZER} brings text into Unicode's form NFC, which is not done here", file=sys.stderr)
    while vocab and vocab[-1] is None:
        vocab.pop()
    ours = from_data({"type": "bpe", "pattern": pattern, "vocab": vocab, "specials": specials})
    made = {}  # of what each token is made; where there are two ways, the first
    for merge in model["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(a + b, (a, b))
    if specials.keys() & made.keys():
        raise UserError("some of its added tokens are made by merges too, which is not done here")
    if [*made.values()] != [(printable(a), printable(b)) for a, b in ours.merges()]:
        raise UserError("its merges are not those that the order of its ids gives")
    return ours.to_data()  # one of our own in its short form


def _pattern_of(pre_tokenizer: dict | None) -> str:
    """Which of PATTERNS it is that text is split by. Raises UserError where it is none of them."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UserError("it is no byte-level BPE, or puts a space before the text")
    own = steps[-1].get("use_regex", True)
    kinds = [step.get("type") for step in steps[:-1]]
    if own and not kinds:
        return "gpt2"
    if own and kinds == ["Digits"] and steps[0].get("individual_digits"):
        return "smollm"
    if not own and kinds == ["Split"] and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        regex = (steps[0].get("pattern") or {}).get("Regex")
        if regex in KNOWN_SPLITS:
            return KNOWN_SPLITS[regex]
    raise UserError(f"it splits text by {json.dumps(steps[:-1])[:300]}, which is not known here")
