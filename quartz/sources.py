"""init_from: the one rule by which a name becomes a model and its tokenizer, for every verb.

Read it to see where a model can come from: a run's folder, Hugging Face's layout, or GPT-2 on the hub.
"""

import os
from pathlib import Path

from configurator import UserError
from model import GPT
from quartz import hf_folder, lora, run_folder, shards, tokenizer
from quartz.checkpoint import build_model, load
from quartz.hf_layout import GPT2_MODELS


def pretrained(name: str, dropout: float = 0.0) -> tuple[GPT, dict | None]:
    """A model to begin with, and its tokenizer as plain data, None where there is none.

    name: one of GPT2_MODELS, which is downloaded; or a folder (hf:PATH too) in Hugging Face's layout, or with a
    checkpoint. Raises UserError where it holds neither, or something that is not computed here.
    """
    told, name = name, name.removeprefix("hf:")
    if os.path.isdir(name) and not (Path(name) / "config.json").exists() and run_folder.found(name):
        state = run_folder.load_to_use(name)
        return build_model(state, dropout), _tokenizer_of(state)
    try:
        model = GPT.from_pretrained(name, {"dropout": dropout})
    except ModuleNotFoundError as error:
        raise UserError(f"init_from={told} needs the {error.name} package: pip install -e .[hf]") from error
    except (ValueError, OSError) as error:
        raise UserError(f"init_from={told}: {error}") from error
    data = hf_folder.read_tokenizer(Path(name)) if os.path.isdir(name) else {"type": "gpt2"}
    is_gpt2 = (model.config.arch, model.config.vocab_size) == ("gpt2", tokenizer.GPT2Tokenizer.vocab_size)
    if data is None and is_gpt2 and hf_folder.may_be_gpt2(Path(name)):
        data = {"type": "gpt2"}
    return model, data


def _tokenizer_of(state: dict) -> dict | None:
    name = str(state["config"].get("dataset"))
    return state.get("tokenizer") or shards.tokenizer_of(name, state["model_args"]["vocab_size"])


def check_source(init_from: str, out_dir: str) -> None:
    """Raises UserError where init_from is neither resume, with a checkpoint in out_dir, nor a GPT-2 or a folder."""
    if init_from == "resume":
        run_folder.to_use(out_dir)
    elif init_from not in GPT2_MODELS and not os.path.isdir(init_from.removeprefix("hf:")):
        raise UserError(f"init_from={init_from} is not resume, {', '.join(GPT2_MODELS)}, nor a folder")


def model_and_tokenizer(init_from: str, out_dir: str, adapter: str = "") -> tuple[GPT, dict | None, dict]:
    """The model to sample or evaluate: with init_from="resume" that of the checkpoint in out_dir, else from elsewhere.

    adapter: a file that `train.py --lora_rank` wrote, to be merged. Returns the model on the CPU; its tokenizer as
    plain data, None where its data set has none; and what else the checkpoint holds, without weights and moments, {}
    for one from elsewhere. Shards are read whole, so several processes call it before they form a group. Raises
    UserError where anything is missing, damaged, or does not fit the rest.
    """
    if init_from != "resume":
        (model, data), state = pretrained(init_from), {}
    else:
        state = run_folder.load_to_use(out_dir)
        model = build_model(state)
        data = _tokenizer_of(state)
        state = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    if adapter and state.get("lora"):
        raise UserError(f"the checkpoint in {out_dir} has its adapters in it: leave out adapter={adapter}")
    if adapter:
        merge_adapter(model, Path(adapter))
    if data is not None:
        tokenizer.check_data(data, model.config.vocab_size)
    return model, data, state


def merge_adapter(model: GPT, path: Path) -> None:
    """Merges the adapters in `path` with the model that they were trained on. Raises UserError where they don't fit."""
    state = load(path)
    try:
        if state["base"] != lora.fingerprint(model.state_dict()):
            raise ValueError("it was trained beside other weights")
        lora.attach(model, state["lora"]["rank"], float(state["lora"]["alpha"]))
        left = model.load_state_dict(state["model"], strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not fit this model: {error}") from error
    if left.unexpected_keys or any(name.endswith(lora.PARTS) for name in left.missing_keys):
        raise UserError(f"{path} does not fit this model: it has adapters for other layers")
    lora.merge(model)
