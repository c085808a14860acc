"""Measures the speed of training, or of generating text, side by side with a plain way, and prints the ratio.

    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --batch_size=16 --block_size=256 --vocab_size=65
    python bench.py --mode=decode --batch_size=1 --dtype=bfloat16
    python bench.py --nanogpt=PATH        # the peer is the model.py of a nanoGPT checkout, used as its own scripts do

Without --nanogpt the peer is this model, used as nanoGPT would use it here. In training: all logits held at once; on a
CPU in float32, uncompiled, with the unfused AdamW. In decoding: the whole context computed anew for each token, in
float32 on a CPU; of its tokens only every 16th is computed. The two take turns, round after round, so that a drift of
the machine's speed meets both; the figure is the median over the rounds. Standard output is a line of JSON; the same
for reading goes to standard error.
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
mode = "train"  # train: a step of forward, backward and update; decode: the tokens of batch_size growing texts
batch_size = 12  # sequences in a step
max_new_tokens = 256  # tokens that each text grows by, in decode
quantize = ""  # int8, in decode: weights in 8 bits (CPUs)
block_size = 1024  # tokens in a sequence
vocab_size = 50304  # rows of the embedding; with real_data, the data's own ids must fit
n_layer = 12  # transformer blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width
bias = False  # biases in linear layers and layer norms
dropout = 0.0  # as in train.py
arch = "gpt2"  # gpt2 or qwen3: our network; the peer's is GPT-2's
tie_embeddings = True  # as in train.py
optimizer = "adamw"  # adamw or muon, as in train.py; the peer's is AdamW
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

import contextlib
import dataclasses
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import compiled, kernels, machine, optim, shards
from quartz.decoder import Decoder, Sampling

LEARNING_RATE, BETAS, WEIGHT_DECAY, MOMENTUM = 1e-4, (0.9, 0.95), 1e-2, 0.95


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings."""
    rules = configurator.ranges(globals())
    rules += [(False, problem) for problem in our_config().problems()]
    rules += [(mode in ("train", "decode"), f"mode must be train or decode, not {mode!r}")]
    rules += [(not nanogpt or (Path(nanogpt) / "model.py").is_file(), f"nanogpt={nanogpt}: no model.py is there")]
    rules += [(not quantize or mode == "decode", "quantize is for mode=decode")]
    looks = [lambda: machine.check_machine(device, dtype)]
    if real_data:
        looks.append(lambda: shards.find(dataset))
    configurator.check(rules, looks)


def our_config() -> GPTConfig:
    ours = {"arch": arch, "tie_embeddings": tie_embeddings}
    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, **ours)


def batches(place: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (B, T) without end: from the data set, or the same random tokens again and again."""
    if not real_data:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randint(vocab_size, (2, batch_size, block_size), generator=generator).to(place)
        while True:
            yield x, y
    folder = shards.find(dataset)
    split = shards.Split(folder, "train", shards.load_meta(folder), vocab_size)
    split.check_length(block_size)
    row = 0
    while True:
        rows = np.arange(row, row + batch_size)
        x, y = split.windows(shards.training_starts(rows, len(split), block_size, seed), block_size)
        yield x.to(place), y.to(place)
        row += batch_size


def step_of(model: torch.nn.Module, updater: torch.optim.Optimizer, autocast, keywords: dict) -> Callable:
    """A function that takes a batch through forward, backward and update, and returns the loss."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast:
            _, loss = model(x, y, **keywords)
        loss.backward()
        updater.step()
        updater.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(place: torch.device) -> tuple[GPT, Callable]:
    compute_dtype = machine.pick_dtype(dtype, place)
    model = GPT(our_config()).to(place)
    kernels.install(model)
    if optimizer == "muon":
        rates = dict.fromkeys(("matrix", "embedding", "head", "vector"), LEARNING_RATE)
        updater = optim.muon(model, rates, MOMENTUM, BETAS, WEIGHT_DECAY, compute_dtype)
    else:
        updater = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, place.type)
    if compile:
        machine.compile_model(model, place)
    return model, step_of(model, updater, machine.autocast(place, compute_dtype), {"return_logits": False})


def peer_model(place: torch.device) -> torch.nn.Module:
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
    return network(settings(**shape)).to(place)


def peer_step(place: torch.device) -> Callable:
    model = peer_model(place)
    if nanogpt:
        updater = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, place.type)
    else:
        updater = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, fused=place.type == "cuda" or None)
    on_gpu = place.type == "cuda"
    if on_gpu and compile:
        model.compile()
    return step_of(model, updater, machine.autocast(place, torch.bfloat16 if on_gpu else torch.float32), {})


def timed(step: Callable, source: Iterator, count: int) -> float:
    """Seconds a step."""
    began = time.perf_counter()
    for _ in range(count):
        loss = step(*next(source))
    if not math.isfinite(loss.item()):  # also waits for the GPU
        raise UserError("the loss is not finite: these settings diverge")
    return (time.perf_counter() - began) / count


def train_turns(place: torch.device) -> tuple[Callable[[], float], Callable[[], float], dict]:
    """Two functions that take a turn and return seconds a token, ours and the peer's, and what else is to be told."""
    source = batches(place)
    model, ours = our_step(place)
    record = {"first_steps_s": 2 * timed(ours, source, 2)}  # also warms up
    if profile:
        with torch.profiler.profile() as profiler:
            timed(ours, source, steps)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        sys.exit()
    if place.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30  # ours alone, before the peer is there
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT's tells of its parameters
        peer, tokens = peer_step(place), batch_size * block_size
    timed(peer, source, 2)
    if peak := machine.peak_flops(place, machine.pick_dtype(dtype, place)):
        record["mfu_of"] = lambda seconds: model.estimate_mfu(batch_size, seconds * tokens, peak)
    return lambda: timed(ours, source, steps) / tokens, lambda: timed(peer, source, steps) / tokens, record


def decode_turns(place: torch.device) -> tuple[Callable[[], float], Callable[[], float], dict]:
    """As train_turns."""
    model = GPT(dataclasses.replace(our_config(), dropout=0.0)).eval()
    with contextlib.redirect_stdout(sys.stderr):
        peer = peer_model(place).eval()
    kept = machine.pick_dtype(dtype, place)
    weights = model.get_num_params()
    in_int8, steps = quantize == "int8", 10**9  # compiled, whatever that costs
    engine = compiled.prepare(model, place, kept, in_int8, batch_size, steps, compile, gives_up=True)
    prompt = torch.randint(vocab_size, (1, 1), generator=torch.Generator().manual_seed(seed)).to(place)
    idx = prompt.expand(batch_size, 1 + max_new_tokens)
    stride = 16
    is_packed = isinstance(engine, compiled.CompiledStep)
    bytes_kept = (engine.engine.kept if is_packed else engine.model.lm_head.weight.dtype).itemsize

    def ours() -> float:
        began = time.perf_counter()
        decoder = Decoder(engine, batch_size, 1 + max_new_tokens)
        decoder.admit(prompt[0].tolist(), range(batch_size), max_new_tokens, Sampling(temperature=0))
        while decoder.step():
            pass
        return (time.perf_counter() - began) / (batch_size * max_new_tokens)

    @torch.no_grad()
    def theirs() -> float:
        began, lengths = time.perf_counter(), range(1, max_new_tokens + 1, stride)
        with machine.autocast(place, kept if place.type == "cuda" else torch.float32):
            for length in lengths:
                peer(idx[:, max(0, length - block_size) : length])[0].argmax().item()
        return (time.perf_counter() - began) / (batch_size * len(lengths))

    ours(), theirs()
    share = {"weight_bytes": weights * bytes_kept, "memory_bytes_per_s": machine.memory_speed(place)}
    return ours, theirs, share


def main() -> None:
    check_settings()
    machine.keep_freed_memory()  # which serves the peer too
    place = machine.pick_device(device)
    torch.manual_seed(seed)
    ours, peer, record = (train_turns if mode == "train" else decode_turns)(place)
    pairs = [(ours(), peer()) for _ in range(rounds)]
    ours_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    name = "nanoGPT" if nanogpt else "plain step" if mode == "train" else "full forward"
    for who, seconds in (("ours", ours_s), (name, peer_s)):
        print(f"{who + ':':<14} {1000 * seconds:10.4f} ms/token {1 / seconds:12,.1f} tokens/s", file=sys.stderr)
    print(f"{'ratio:':<14} {ratio:10.2f}x (median of {rounds} rounds)", file=sys.stderr)
    if mode == "decode":
        read = record["weight_bytes"] / (batch_size * ours_s)
        record["memory_share"] = read / record["memory_bytes_per_s"]
        share = f"{record['memory_share']:.0%} of what a plain sum reads"
        print(f"{'weights read:':<14} {read / 1e9:10.1f} GB/s, {share}", file=sys.stderr)
    if mfu_of := record.pop("mfu_of", None):
        record["mfu"] = mfu_of(ours_s)
    record |= {"mode": mode, "ratio": ratio, "peer": name, "tokens_per_s": 1 / ours_s, "peer_tokens_per_s": 1 / peer_s}
    record |= {"device": str(place), "torch": str(torch.__version__)}
    if place.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(place)
    print(json.dumps(record))


if __name__ == "__main__":
    with configurator.user_errors():
        main()
