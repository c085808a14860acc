"""init_from: the one rule by which a name becomes a model and its tokenizer, for every verb.

Read it to see where a model can come from: a run's folder, Hugging Face's layout, or GPT-2 on the hub.
"""

import dataclasses
import os
from pathlib import Path

from model import GPT
from quartz import hf_folder, lora, run_folder, shards, tokenizer
from quartz.checkpoint import build_model, load
from quartz.errors import UserError
from quartz.hf_layout import GPT2_MODELS

# Settings of train.py that a checkpoint decides, and those that may change at every resume
ARCHITECTURE = ("block_size", "n_layer", "n_head", "n_embd", "bias", "arch", "n_kv_head", "tie_embeddings")
PASSING = ("out_dir", "init_from", "eval_only", "device", "wandb_log", "wandb_run_name")


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


def check(init_from: str, out_dir: str, scratch: bool = False) -> None:
    """Raises UserError where init_from names nothing: neither a checkpoint in out_dir (resume), nor a GPT-2 of the hub,
    nor a folder; nor, with `scratch`, which train.py takes, that.
    """
    if init_from == "resume":
        run_folder.to_use(out_dir)
        return
    words = ("scratch", "resume") if scratch else ("resume",)
    if init_from not in (*words, *GPT2_MODELS) and not os.path.isdir(init_from.removeprefix("hf:")):
        raise UserError(f"init_from={init_from} is not {', '.join((*words, *GPT2_MODELS))}, nor a folder")


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


def to_sample(init_from: str, out_dir: str) -> tuple[GPT, tokenizer.Tokenizer]:
    """The model, on the CPU, and its tokenizer. Raises UserError as model_and_tokenizer does, or where it has none."""
    model, data, _ = model_and_tokenizer(init_from, out_dir)
    return _with_tokenizer(model, data, out_dir if init_from == "resume" else init_from)


def of_state(state: dict) -> tuple[GPT, tokenizer.Tokenizer]:
    """As to_sample, of a checkpoint that was loaded."""
    model, data = build_model(state), _tokenizer_of(state)
    if data is not None:
        tokenizer.check_data(data, model.config.vocab_size)
    return _with_tokenizer(model, data, str(state["path"]))


def _with_tokenizer(model: GPT, data: dict | None, name: str) -> tuple[GPT, tokenizer.Tokenizer]:
    if data is None:
        raise UserError(f"{name} has no tokenizer: put its tokenizer.json there")
    return model, tokenizer.from_data(data)


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


def to_train(init_from: str, settings: dict, given: set[str], tokenizer_data: dict | None) -> tuple[GPT, dict]:
    """The model that a run goes on with, on the CPU, adapters and all, and what else its checkpoint holds.

    settings: train.py's, and the names of those that were asked for; tokenizer_data: the data set's. Raises one
    UserError with all that was asked for and that this model can't be.
    """
    out_dir, asked = settings["out_dir"], {name: settings[name] for name in given}
    if init_from == "resume":
        state = run_folder.load_furthest(out_dir)
        source = str(state["path"])
        print(f"Resuming training from {source} at iteration {state['iter_num']}")
        model = build_model(state, settings["dropout"], keep_adapters=True)
    else:
        print(f"Initializing from {init_from} weights")
        (model, theirs), source = pretrained(init_from, settings["dropout"]), init_from
        state = {"tokenizer": theirs}
    have = dataclasses.asdict(model.config)
    problems = [
        f"{name} is {have[name]} in {source}, and can't be {asked[name]}: leave it out"
        for name in ARCHITECTURE[1:]
        if name in asked and asked[name] != have[name]
    ]
    block_size = asked.get("block_size", have["block_size"])
    if block_size > have["block_size"]:
        problems.append(f"block_size is {have['block_size']} in {source}, and can't grow to {block_size}")
    if state.get("tokenizer") and tokenizer_data and state["tokenizer"] != tokenizer_data:
        problems.append(f"{source} was trained with another tokenizer than that of data set {settings['dataset']!r}")
    if state.get("model", {}) is None and block_size < have["block_size"]:
        problems.append(
            f"block_size can't be lowered from {have['block_size']} in shards: make one file of {source} first"
        )
    if init_from == "resume":
        adapted = state.get("lora") or {"rank": 0, "alpha": 0.0}
        for name, value in adapted.items():
            if asked.get(f"lora_{name}", value) != value:
                problems.append(f"lora_{name} is {value} in {source}: leave it out, or begin with init_from={out_dir}")
        if adapted["rank"] and (settings["optimizer"] != "adamw" or settings["fsdp"]):
            problems.append(f"{source} is a run with lora_rank, which takes optimizer=adamw, and no fsdp")
    if problems:
        raise UserError(*problems)
    if block_size < have["block_size"]:
        model.crop_block_size(block_size)
    if init_from != "resume" and (rank := settings["lora_rank"]):
        state["lora"] = {"rank": rank, "alpha": settings["lora_alpha"] or 2.0 * rank}
        lora.attach(model, **state["lora"])
    return model, state


def settled(model: GPT, state: dict) -> dict:
    """The settings that the model, or its checkpoint, has decided."""
    adapted = state.get("lora") or {"rank": 0, "alpha": 0.0}
    found = {name: getattr(model.config, name) for name in ARCHITECTURE}
    return found | {"lora_rank": adapted["rank"], "lora_alpha": float(adapted["alpha"])}


def tell_changes(config: dict, state: dict) -> None:
    """Notes the settings that differ from those of the checkpoint, once all of them are settled."""
    before = state.get("config", {})
    for name, value in config.items():
        if name in before and name not in (*ARCHITECTURE, *PASSING) and before[name] != value:
            print(f"note: {name} was {before[name]!r} in {state['path']}, and is {value!r} from here on")
