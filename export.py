"""Takes a trained model elsewhere, and brings models from elsewhere here.

python export.py --out_dir=out-shakespeare-char --to=hf            # a folder for transformers, vLLM and others
python export.py --out_dir=out-shakespeare-char --to=gguf          # a file for llama.cpp, ollama and others
python export.py --out_dir=out --to=safetensors --dtype=bfloat16   # our weights, under our names
python export.py --out_dir=out --to=nanogpt                        # a folder that nanoGPT's scripts take as out_dir
python export.py --from=SmolLM2-135M --out_dir=out-smollm          # a GPT-2, Qwen3 or Llama becomes out_dir/ckpt.pt
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
out_dir = "out"  # folder of the checkpoint; with --from, where to write one
init_from = "resume"  # resume (a checkpoint in out_dir), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
to = ""  # hf, safetensors, gguf or nanogpt
from_ = ""  # a folder in Hugging Face's layout, or a .safetensors file written here, that becomes out_dir/ckpt.pt
path = ""  # what to write; empty: hf, model.safetensors, model-DTYPE.gguf or nanogpt in out_dir
adapter = ""  # an adapter.pt of train.py --lora_rank, to be merged with the model that init_from names
dtype = "float32"  # float32, bfloat16, float16, or f32, bf16, f16; of gguf also q8_0
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import json
import math
import os
import pickle
import sys
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, files, hf_folder, run_folder, sources
from quartz import tokenizer as tokenizers
from quartz.tokenizer import CharTokenizer, Tokenizer

NAMES = {"hf": "hf", "safetensors": "model.safetensors", "gguf": "model-{}.gguf", "nanogpt": "nanogpt"}
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # and what they are called in GGUF


def full_dtype() -> str:
    """dtype as torch calls it."""
    return {short: name for name, short in DTYPES.items()}.get(dtype, dtype)


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    gguf = to == "gguf"
    rules = [
        (bool(to) != bool(from_), f"name one of the two: --to={', '.join(NAMES)}, or --from=PATH"),
        (to in ("", *NAMES), f"to must be {', '.join(NAMES)}, not {to!r}"),
        (
            full_dtype() in (*DTYPES, *["q8_0"] * gguf),
            f"dtype must be {', '.join(DTYPES)}{', q8_0' * gguf}, not {dtype!r}",
        ),
        (to != "nanogpt" or full_dtype() == "float32", "nanoGPT's checkpoints are in float32"),
        (not (from_ and path), "with --from, out_dir is where to write: leave path out"),
        (not (from_ and adapter), "an adapter is merged when a model is taken elsewhere: leave it out with --from"),
        (not adapter or os.path.isfile(adapter), f"adapter={adapter} is no file"),
        (not from_ or init_from == "resume", "from and init_from both say where the model comes from: leave one out"),
    ]
    looks = []
    if from_:
        looks.append(check_origin)
    else:
        looks.append(lambda: sources.check(init_from, out_dir))
        looks.append(lambda: check_free(target()) if to in NAMES else None)
    configurator.check(rules, looks)


def check_origin() -> None:
    if not os.path.exists(from_):
        raise UserError(f"from={from_} is not there: name a folder, or a .safetensors file")
    for name in (run_folder.BEST, run_folder.LAST, run_folder.ADAPTER):
        for form in checkpoint.forms(name):
            check_free(Path(out_dir) / form)


def check_free(place: Path) -> None:
    if os.path.exists(place):
        raise UserError(f"{place} is there already, and is not overwritten: move it away, or name another place")


def target() -> Path:
    return Path(path) if path else Path(out_dir) / NAMES[to].format(DTYPES.get(full_dtype(), dtype))


def note(remark: str) -> None:
    print(f"note: {remark}", file=sys.stderr)


def without_padding(config: GPTConfig, state: dict[str, torch.Tensor], tokens: Tokenizer | None) -> None:
    """Leaves out, in place, the rows of the vocabulary that no token has, so that no other program draws them."""
    if not tokens or tokens.vocab_size == config.vocab_size:
        return
    note(f"{config.vocab_size - tokens.vocab_size} rows of the vocabulary are no token's, and left out")
    config.vocab_size = tokens.vocab_size
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][: tokens.vocab_size]


def write_safetensors(place: Path, config: GPTConfig, state: dict[str, torch.Tensor], tokens: Tokenizer | None) -> None:
    """Our weights under our names in one file; the rest of what makes the model is its metadata."""
    from safetensors.torch import save

    about = {"model_args": json.dumps(config.to_args()), "format": "pt"}
    about |= {"tokenizer": json.dumps(tokens.to_data())} if tokens else {}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    with files.writing(place):
        files.write(place, save(state, about))


def read_safetensors(place: Path) -> tuple[GPT, dict | None]:
    """The inverse of write_safetensors, in float32. Raises UserError where it is another kind of file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - it is no dict
        if "model_args" not in about:
            raise UserError(f"{place} was not written here: name the folder that it lies in, with its config.json")
        args = json.loads(about["model_args"])
        state.setdefault("lm_head.weight", state.get("transformer.wte.weight"))
        model = checkpoint.build_model({"model": state, "model_args": args, "path": place})
        return model, json.loads(about.get("tokenizer", "null"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} can't be read ({str(error)[:300]})") from error


def write_nanogpt(place: Path, model: GPT, tokens: dict | None, state: dict) -> None:
    """A folder for nanoGPT's --out_dir: ckpt.pt, and meta.pkl for its data folder where the tokens are characters."""
    c = model.config
    if c.arch != "gpt2":
        raise UserError(f"nanoGPT knows GPT-2's architecture alone, and this model's is {c.arch}")
    contents = {
        "model": model.state_dict(),
        "model_args": {**c.to_args(), "dropout": 0.0},
        "iter_num": state.get("iter_num", 0),
        "best_val_loss": state.get("best_val_loss", math.inf),
        "config": state.get("config", {}),
        "tokenizer": tokens,
    }
    with files.writing(place), files.whole_folder(place) as partial:
        checkpoint.write(partial / run_folder.BEST, contents)
        if tokens and tokens["type"] == "char":
            meta = CharTokenizer(tokens["chars"], tokens.get("specials", [])).to_nanogpt()
            files.write(partial / "meta.pkl", pickle.dumps(meta))
    note("nanoGPT computes GELU in its erf form, this model was trained with the tanh form: losses differ by some 1e-4")


def export() -> None:
    model, data, state = sources.model_and_tokenizer(init_from, out_dir, adapter)
    place, config = target(), model.config
    with files.writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    if to == "nanogpt":
        write_nanogpt(place, model, data, state)
    else:
        tokens = tokenizers.from_data(data) if data else None
        if not tokens:
            note("no tokenizer is known for this model, and none is written")
        kept = getattr(torch, full_dtype()) if to != "gguf" else torch.float32
        weights = {name: tensor.to(kept) for name, tensor in model.state_dict().items()}
        if lost := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise UserError(f"{lost[0]} holds weights that are too large for {full_dtype()}: take bfloat16, or float32")
        if to in ("hf", "gguf"):
            without_padding(config, weights, tokens)
            if config.arch == "gpt2" and not config.bias:
                note("the biases that this model does not have are written as zeros")
        if to == "hf":
            hf_folder.write(place, config, weights, tokens)
        elif to == "safetensors":
            write_safetensors(place, config, weights, tokens)
        else:
            from quartz import gguf

            short = DTYPES.get(full_dtype(), dtype)
            gguf.write(place, config, weights, tokens, short, Path(out_dir).resolve().name)
            if config.arch == "gpt2" and config.block_size % 256:
                note(f"llama.cpp can't go beyond this model's {config.block_size} positions: bound the text with -n")
    print(f"wrote {place}")


def bring() -> None:
    """Writes out_dir/ckpt.pt from what --from names."""
    origin = Path(from_)
    if origin.is_dir():
        model, data = sources.pretrained(from_)
    else:
        model, data = read_safetensors(origin)
    if data:
        tokenizers.check_data(data, model.config.vocab_size)
    else:
        note("it has no tokenizer that could come along")
    if data and data["type"] == "bpe" and tokenizers.END_OF_TEXT not in data["specials"]:
        note(f"none of its tokens is called {tokenizers.END_OF_TEXT}: what ends a text is not known from here on")
    run_folder.prepare_folder(out_dir)
    contents = {"model": model.state_dict(), "model_args": model.config.to_args(), "iter_num": 0}
    contents |= {"best_val_loss": math.inf, "config": {}, "tokenizer": data}
    with run_folder.claimed(out_dir):
        checkpoint.save(Path(out_dir) / run_folder.BEST, contents)
    print(
        f"wrote {Path(out_dir) / run_folder.BEST}: {model.get_num_params() / 1e6:.2f}M parameters, {model.config.arch}"
    )


def main() -> None:
    check_settings()
    try:
        bring() if from_ else export()
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the {error.name} package: pip install -e .[hf]") from error


if __name__ == "__main__":
    with configurator.user_errors():
        main()
