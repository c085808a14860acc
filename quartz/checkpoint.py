"""One checkpoint: written whole or not at all, read without running code, and exchanged with nanoGPT.

Read it to know what a ckpt.pt holds, or when one does not load.

A checkpoint is a dict of tensors and plain values. nanoGPT's keys: model, optimizer, model_args, iter_num,
best_val_loss, config. Ours besides: tokenizer, scaler, tokens_seen, evaluated, versions.

No random state is kept, because there is none: data and dropout follow from config["seed"] and iter_num.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from model import GPT, GPTConfig
from quartz import files, lora, machine, ranks, untrusted
from quartz.errors import UserError
from quartz.hf_layout import CAUSAL_MASKS
from quartz.optim import moment_names

KEPT = "what was saved before is untouched"


@dataclasses.dataclass
class Progress:
    """How far a run is. A checkpoint holds each field under its name."""

    iter_num: int = 0  # updates made
    tokens_seen: int = 0
    best_val_loss: float = math.inf
    evaluated: bool = False  # whether at this iter_num
    without_better: int = 0  # evaluations in a row

    @classmethod
    def of(cls, state: dict) -> "Progress":
        return cls(**{f.name: state.get(f.name, f.default) for f in dataclasses.fields(cls)})

    def evaluate(self, val_loss: float) -> bool:
        """Notes an evaluation; returns whether it is the best so far."""
        is_better = val_loss < self.best_val_loss
        self.best_val_loss, self.evaluated = min(self.best_val_loss, val_loss), True
        self.without_better = 0 if is_better else self.without_better + 1
        return is_better

    def is_enough(self, target_val_loss: float, patience: int) -> bool:
        """Whether the evaluation just made ends the run: the loss is as low as wanted, or no lower for too long."""
        is_there = self.best_val_loss <= target_val_loss
        return self.evaluated and self.iter_num > 0 and (is_there or 0 < patience <= self.without_better)

    def update(self, tokens: int) -> None:
        """Notes an update."""
        self.iter_num, self.tokens_seen, self.evaluated = self.iter_num + 1, self.tokens_seen + tokens, False


def save(path: Path, state: dict) -> None:
    """Writes `state` to `path` so that the path holds the old file or the new one, never a part.

    Raises UserError where the disk refuses, or a tensor is not finite; the old file is then still there.
    """
    with files.writing(path, KEPT):
        write(path, state)


def write(path: Path, state: dict) -> None:
    """As save; raises OSError, or a library's error that stands for one, where the disk refuses."""
    for name, tensor in _tensors("", state):
        if not tensor.isfinite().all():
            raise UserError(
                f"the run diverged: {name} is not finite, and {path} was left as it was; lower learning_rate and resume"
            )
    # Into a file, not to a name: then what the operating system says stands behind the error of torch's zip writer
    with files.whole(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def save_shards(path: Path, plain: dict, model: GPT, optimizer: torch.optim.Optimizer, is_master: bool) -> None:
    """As save, of a run of several processes, each of which writes its own part into the folder `path`.

    plain: all but the tensors of model and optimizer. All processes have to call it.
    """
    from quartz import sharding

    partial, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    if is_master:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with files.writing(path, KEPT):
            steps = sharding.save(partial, model, optimizer)
            if is_master:
                write(partial / "plain.pt", {"model": {}, **plain, "steps": steps})
                if path.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(path, old)
                files.replace(partial, path)
                drop_other_forms(path)
    finally:
        if is_master:
            shutil.rmtree(partial, ignore_errors=True)


def drop_other_forms(path: Path) -> None:
    """Once a checkpoint is saved as a file, or as shards, what it was before in the other form is stale."""
    for form in map(path.with_name, forms(path.with_suffix(".pt").name)):
        if form != path and form.exists():
            shutil.rmtree(form) if form.is_dir() else form.unlink()


def forms(name: str) -> list[str]:
    """Of a checkpoint: the file, the folder of shards, and what that is called while it is being replaced."""
    return [name, name.replace(".pt", ".dcp"), name.replace(".pt", ".dcp.old")]


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), part)


def load(path: Path) -> dict:
    """Reads a checkpoint, ours or nanoGPT's, to the CPU, in our form. Hidden code is not run.

    Raises UserError for a file that is truncated, holds more than tensors and plain values, or is no GPT checkpoint.
    """
    if path.is_dir():  # shards, which sharding.load reads
        return {**load(path / "plain.pt"), "path": path, "model": None}
    state = untrusted.torch_file(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of a GPT: it has no 'model'")
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    args = state.get("model_args")
    if not isinstance(args, dict) or not {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"} <= args.keys():
        raise UserError(f"{path} is no checkpoint of a GPT: its model_args are missing or incomplete")
    if unknown := args.keys() - fields:
        raise UserError(f"{path} holds a model that is unknown here: {', '.join(sorted(map(str, unknown)))}")
    try:
        model = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in state["model"].items()
            if not name.endswith(CAUSAL_MASKS)
        }
        best, iter_num = float(state.get("best_val_loss", math.inf)), int(state.get("iter_num", 0))
        plain = {"best_val_loss": math.inf if math.isnan(best) else best, "iter_num": max(0, iter_num)}
        return {**state, **plain, "model": model, "config": dict(state.get("config") or {}), "path": path}
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is no checkpoint of a GPT: {error}") from error


def fill(model: GPT, state: dict[str, torch.Tensor]) -> None:
    """Gives a network that was built on the meta device, where it costs nothing, its weights: float32 copies.

    Raises ValueError for what is no tensor of floating-point numbers, RuntimeError where names or shapes differ.
    """
    for name, value in state.items():
        if not torch.is_tensor(value) or value.is_meta or not value.is_floating_point():
            raise ValueError(f"{name} is no tensor of floating-point numbers")
    how = {"dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # What does not fit is not copied, since it may be larger than its file and than memory
    state = {n: tensor.to(**how) if tensor.shape == shapes.get(n) else tensor for n, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight


def build_model(state: dict, dropout: float = 0.0, keep_adapters: bool = False) -> GPT:
    """The model that a loaded checkpoint describes, with its weights. Raises UserError where the two do not match.

    Adapters are merged, unless keep_adapters, as to train them on. Of shards, several processes get no weights yet:
    sharding.load gives each its part.
    """
    if state["model"] is None:
        try:
            model = GPT(_config(state["model_args"], dropout))
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{state['path']} describes no GPT: {error}") from error
        if not torch.distributed.is_initialized():
            from quartz import sharding

            sharding.load(state, model, None)
        return model
    tied = [state["model"].get(name) for name in ("lm_head.weight", "transformer.wte.weight")]
    try:
        config = _config(state["model_args"], dropout)
        if config.tie_embeddings and all(map(torch.is_tensor, tied)) and not torch.equal(*tied):
            raise ValueError("its input and output embeddings differ, where this model's are one")
        if config.n_layer > len(state["model"]):
            raise ValueError(f"it has no weights for {config.n_layer} layers")
        adapted = state.get("lora")
        with machine.no_memory():
            model = GPT(config)
            if adapted:
                lora.attach(model, adapted["rank"], float(adapted["alpha"]))
        fill(model, state["model"])
        if adapted and not keep_adapters:
            lora.merge(model)
    except (ValueError, TypeError, RuntimeError, OverflowError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{state['path']} does not hold the weights that its model_args describe: {error}") from error
    return model


def _config(model_args: dict, dropout: float) -> GPTConfig:
    """Raises ValueError or TypeError where an argument is not of its type."""
    args = {**model_args, "dropout": dropout}
    for field in dataclasses.fields(GPTConfig):
        value = args.get(field.name, field.default)
        args[field.name] = float(value) if (field.type, type(value)) == (float, int) else value
        if type(args[field.name]) is not field.type:
            raise ValueError(f"{field.name} is no {field.type.__name__}")
    return GPTConfig(**args)


def restore(model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict) -> None:
    """Gives optimizer and scaler what a loaded checkpoint holds of them; from shards, the model its weights too."""
    if state.get("model", {}) is None:
        from quartz import sharding

        sharding.load(state, model, optimizer)
    elif "optimizer" in state:
        load_optimizer(optimizer, state)
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict) -> None:
    """Gives `optimizer` the moments and step counts of a loaded checkpoint; its rates, decay and kernels stay its own.

    Parameters are found by name, in nanoGPT's files by their place. Position embeddings that were cropped lose the
    moments of the rows that are gone.
    """
    saved, own = checkpoint["optimizer"], optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        theirs = saved["param_groups"]
        if all("param_names" in group for group in (*theirs, *own)):  # then the groups may have been split otherwise
            indices = {n: i for group in theirs for n, i in zip(group["param_names"], group["params"], strict=True)}
            order = [indices[name] for group in own for name in group["param_names"]]
        elif [len(group["params"]) for group in theirs] == [len(group["params"]) for group in own]:
            order = [index for group in theirs for index in group["params"]]
        else:
            raise ValueError("its groups hold other numbers of parameters")
        if len(set(order)) < len(order):
            raise ValueError("two of its parameters are one")
        keys = [moment_names(group) for group in own for _ in group["params"]]
        state = {}
        for index, (old, names, parameter) in enumerate(zip(order, keys, parameters, strict=True)):
            if old in saved["state"]:
                moments = saved["state"][old]
                state[index] = {n: moments[n] if n == "step" else _fitted(moments[n], parameter) for n in names}
                if state[index].get("step", torch.zeros(())).numel() != 1:
                    raise ValueError("a count of steps is no single number")
        if saved["state"] and len(state) < len(parameters):
            raise ValueError("some of its parameters have no moments")
        optimizer.load_state_dict({"state": state, "param_groups": own})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint['path']}: its optimizer does not fit this model ({error})") from error


def _fitted(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Moments as the parameter wants them: cropped, and divided among the processes."""
    if value.shape != parameter.shape and value.dim():
        value = value[: parameter.size(0)].clone()
    if value.shape != parameter.shape:
        raise ValueError(f"moments of shape {tuple(value.shape)} for weights of shape {tuple(parameter.shape)}")
    return ranks.divided_like(value, parameter)
