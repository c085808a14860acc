"""Measures the speed of a training step, side by side with a plain one, and prints the ratio.

    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --batch_size=16 --block_size=256 --vocab_size=65
    python bench.py --nanogpt=PATH        # the peer is the model.py of a nanoGPT checkout, trained as its bench.py does

Without --nanogpt the peer is this model, trained as nanoGPT would train it here: all logits held at once; on a CPU in
float32, uncompiled, with the unfused AdamW. The two take turns, round after round, so that a drift of the machine's
speed meets both; the figure is the median over the rounds. The last line is JSON.
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
mode = "train"  # what is measured: train, a step of forward, backward and update
batch_size = 12  # sequences in a step
block_size = 1024  # tokens in a sequence
vocab_size = 50304  # rows of the embedding; with real_data, the data's own ids must fit
n_layer = 12  # transformer blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width
bias = False  # biases in linear layers and layer norms
dropout = 0.0  # as in train.py
real_data = False  # read batches from a data set, rather than random tokens
dataset = "openwebtext"  # the data set, with real_data
seed = 1337  # of weights and data
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "auto"  # auto, float32, bfloat16, float16
compile = True  # compile our model; the peer is compiled on GPUs only, as nanoGPT's users run it
rounds = 5  # turns that each of the two takes
steps = 5  # steps in a turn
nanogpt = ""  # folder of a nanoGPT checkout to measure against
profile = False  # print what our step spends its time on, instead of comparing
# ----------------------------------------------------------------------------------------------------------------------
configurator.configure(globals())

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import dataset as data
import runtime
from configurator import UserError
from model import GPT, GPTConfig

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-2


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    rules = [
        (globals()[k] >= 1, f"{k} must be at least 1, not {globals()[k]}") for k in ("batch_size", "rounds", "steps")
    ]
    shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)
    rules += [(False, problem) for problem in shape.problems()]
    rules += [(0 <= seed < 2**32, f"seed must be from 0 to {2**32 - 1}, not {seed}")]
    rules += [(mode == "train", f"mode must be train, not {mode!r}")]
    rules += [(not nanogpt or (Path(nanogpt) / "model.py").is_file(), f"nanogpt={nanogpt}: no model.py is there")]
    looks = [lambda: runtime.check_machine(device, dtype)]
    if real_data:
        looks.append(lambda: data.find(dataset))
    configurator.check(rules, looks)


def batches(place: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (B, T) without end: from the data set, or the same random tokens again and again."""
    if not real_data:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randint(vocab_size, (2, batch_size, block_size), generator=generator).to(place)
        while True:
            yield x, y
    folder = data.find(dataset)
    split = data.Split(folder, "train", data.load_meta(folder), vocab_size)
    split.check_length(block_size)
    row = 0
    while True:
        rows = np.arange(row, row + batch_size)
        x, y = split.windows(data.training_starts(rows, len(split), block_size, seed), block_size)
        yield x.to(place), y.to(place)
        row += batch_size


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, autocast, keywords: dict) -> Callable:
    """A function that takes a batch through forward, backward and update, and returns the loss."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast:
            _, loss = model(x, y, **keywords)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(place: torch.device) -> tuple[GPT, Callable]:
    compute_dtype = runtime.pick_dtype(dtype, place)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)).to(place)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, place.type)
    if compile:
        runtime.compile_model(model, place)
    return model, step_of(model, optimizer, runtime.autocast(place, compute_dtype), {"return_logits": False})


def peer_step(place: torch.device) -> Callable:
    if nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(nanogpt) / "model.py")
        theirs = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(theirs)
            network, settings = theirs.GPT, theirs.GPTConfig
        except Exception as error:
            raise UserError(f"{nanogpt}/model.py can't be used: {type(error).__name__}: {error}") from error
    else:
        network, settings = GPT, GPTConfig
    shape = {"block_size": block_size, "vocab_size": vocab_size, "n_layer": n_layer, "n_head": n_head}
    shape |= {"n_embd": n_embd, "dropout": dropout, "bias": bias}
    model = network(settings(**shape)).to(place)
    if nanogpt:
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, place.type)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, fused=place.type == "cuda" or None)
    on_gpu = place.type == "cuda"
    if on_gpu and compile:
        model.compile()
    return step_of(model, optimizer, runtime.autocast(place, torch.bfloat16 if on_gpu else torch.float32), {})


def timed(step: Callable, source: Iterator, count: int) -> float:
    """Seconds a step."""
    began = time.perf_counter()
    for _ in range(count):
        loss = step(*next(source))
    if not math.isfinite(loss.item()):  # also waits for the GPU
        raise UserError("the loss is not finite: these settings diverge")
    return (time.perf_counter() - began) / count


def main() -> None:
    check_settings()
    place = runtime.pick_device(device)
    torch.manual_seed(seed)
    source = batches(place)
    model, ours = our_step(place)
    compile_s = timed(ours, source, 2)  # also warms up
    if profile:
        with torch.profiler.profile() as profiler:
            timed(ours, source, steps)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        return
    on_gpu = place.type == "cuda"
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None  # ours alone, before the peer is there
    torch.manual_seed(seed)
    peer = peer_step(place)
    timed(peer, source, 2)
    pairs = [(timed(ours, source, steps), timed(peer, source, steps)) for _ in range(rounds)]
    ours_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    tokens = batch_size * block_size
    name = "nanoGPT" if nanogpt else "plain step"
    print(f"ours:       {ours_s * 1000:9.2f} ms/step {tokens / ours_s:12,.0f} tokens/s")
    print(f"{name + ':':<11} {peer_s * 1000:9.2f} ms/step {tokens / peer_s:12,.0f} tokens/s")
    print(f"ratio:      {ratio:9.2f}x (median of {rounds} rounds of {steps} steps)")
    record = {
        "mode": mode,
        "ratio": ratio,
        "peer": name,
        "tokens_per_s": tokens / ours_s,
        "first_steps_s": 2 * compile_s,
    }
    record |= {"peer_tokens_per_s": tokens / peer_s, "device": str(place), "torch": str(torch.__version__)}
    if on_gpu:
        record |= {"gpu": torch.cuda.get_device_name(place), "peak_gib": peak_gib}
    peak = runtime.peak_flops(place, runtime.pick_dtype(dtype, place))
    if peak:
        record["mfu"] = model.estimate_mfu(batch_size, ours_s, peak)
    print(json.dumps(record))


if __name__ == "__main__":
    with configurator.user_errors():
        main()
