"""The steps of tests/gpu.py, which runs each as a process of its own: python tests/gpu_steps.py STEP --device=cuda …

A step gets a Bench, says with `tell` what it finds, and may compute with the rooms of quartz/, or start the verbs as a
person does. Each figure is written at once. On a CPU everything is of a toy's size, and goals are not looked at.
"""

import argparse
import asyncio
import contextlib
import copy
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import load
import nanogpt
from compare import same

import model as model_module
from model import GPT, GPTConfig
from quartz import checkpoint, compiled, float8, kernels, machine, optim, ranks, shards, update
from quartz.decoder import Decoder, Sampling, complete
from quartz.engine import Engine
from quartz.errors import UserError
from quartz.tokenizer import CharTokenizer

FAST = torch.bfloat16  # what figures are measured in
LETTERS = 128  # tokens of the text that every machine has: ASCII
PRESET_LOSS = 1.4697  # nanoGPT's own report of config/train_shakespeare_char.py
GPT2 = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False}
GPT2_XL = {**GPT2, "n_layer": 48, "n_head": 25, "n_embd": 1600}
LITTLE = {"block_size": 128, "vocab_size": LETTERS, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False}
TOY = {"block_size": 32, "vocab_size": LETTERS, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False}


@dataclass(frozen=True)
class Scale:
    """How much is computed."""

    little: dict  # a network's shape, to compare numbers with
    updates: int  # of losses that are compared
    names: tuple[str, str]  # of the next two shapes
    gpt2: dict  # that figures are of
    batches: tuple[int, ...]  # sequences in an update of it
    xl: dict
    xl_batches: tuple[int, ...]
    rounds: int  # turns that ours and a peer take
    steps: int  # updates in a turn
    streams: tuple[int, ...]  # texts that are decoded side by side
    tokens: int  # by which they grow
    preset: dict  # settings of config/train_shakespeare_char.py
    clients: int  # that ask a server at once
    words: int  # in what they ask
    product: int  # the size of one in bfloat16
    products: tuple[int, ...]  # of those in 8 bits
    six: dict  # a network of six layers that trains in 8 bits
    small: dict  # that of the shakespeare preset
    small_batch: int


FULL = Scale(
    little=LITTLE, updates=200, names=("GPT-2 124M", "GPT-2 1.5B"), gpt2=GPT2, batches=(12, 32), xl=GPT2_XL,
    xl_batches=(4, 8), rounds=3, steps=20, streams=(1, 16, 64), tokens=256, preset={}, clients=64, words=32,
    product=8192, products=(128, 1024, 4096), six={**LITTLE, "n_layer": 6, "n_head": 6, "n_embd": 384},
    small={**GPT2, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}, small_batch=64,
)  # fmt: skip
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "batch_size": 4, "block_size": 32, "max_iters": 20, "eval_iters": 2}
SMALL |= {"eval_interval": 10, "compile": False, "dtype": "float32"}
TINY = Scale(
    little={**TOY, "n_embd": 64}, updates=30, names=("toy", "other toy"), gpt2=TOY, batches=(2,), xl=TOY,
    xl_batches=(2,), rounds=2, steps=2, streams=(1, 3), tokens=12, preset=SMALL, clients=4, words=1,
    product=256, products=(128, 256), six={**TOY, "n_layer": 6, "n_embd": 128}, small=TOY, small_batch=3,
)  # fmt: skip


@dataclass
class Bench:
    """Where a step computes, how much, and what it has told."""

    step: str
    place: torch.device
    results: Path
    work: Path  # a folder for its files
    text: str = ""  # where tinyshakespeare.txt lies, if that was said

    @property
    def on_gpu(self) -> bool:
        return self.place.type == "cuda"

    @property
    def scale(self) -> Scale:
        return FULL if self.on_gpu else TINY

    @property
    def dtypes(self) -> list[torch.dtype]:
        """That are computed in."""
        return [torch.float32, torch.bfloat16, *([torch.float16] if self.on_gpu else [])]

    def write(self, record: dict) -> None:
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **record}) + "\n")

    def tell(self, what: str, value, unit: str = "", at_most=None, at_least=None, is_goal: bool = False) -> None:
        """Writes a figure; with a bound also whether it keeps that. A goal's is not looked at on a CPU."""
        wanted, verdict = "", ""
        if (at_most is not None or at_least is not None) and (self.on_gpu or not is_goal):
            keeps = value <= at_most if at_most is not None else value >= at_least  # neither holds of a NaN
            wanted = f"at most {at_most}" if at_most is not None else f"at least {at_least}"
            wanted = "yes" if at_least is True else wanted
            verdict = ("FAILS", "missed", "holds", "met")[2 * bool(keeps) + is_goal]
        value = value if not isinstance(value, float) or math.isfinite(value) else str(value)
        record = {"what": what, "value": value, "unit": unit, "wanted": wanted, "verdict": verdict}
        self.write(record)
        print(f"{what}: {value} {unit} {wanted} {verdict}", flush=True)

    def check(self, what: str, holds: bool) -> None:
        self.tell(what, bool(holds), at_least=True)  # True is above False

    def leave_out(self, what: str, why: str) -> None:
        self.tell(what, f"left out: {why}")

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.place)

    def seconds(self, function: Callable[[], object], times: int) -> float:
        """What a call takes, as the mean of several."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            function()
        self.synchronize()
        return (time.perf_counter() - began) / times


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def network(shape: dict, place: torch.device, **more) -> GPT:
    """Random weights, made where they are to lie."""
    torch.manual_seed(0)
    with torch.device(place):
        return GPT(GPTConfig(**{"dropout": 0.0, **shape, **more}))


def letters(most: int = 2**20) -> np.ndarray:
    """Text that every machine has: Python's own, in ASCII, as numbers."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(content for file in files if (content := file.read_bytes()).isascii())
    return np.frombuffer(text[:most], dtype=np.uint8)


def write_numbers(bench: Bench, vocab_size: int) -> Path:
    """A data set of random tokens, which any vocabulary has: speed does not depend on what they are."""
    folder = bench.work / f"numbers-{vocab_size}"
    if folder.exists():
        return folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 2**23 if bench.on_gpu else 2**14), ("val", 2**14)):
        generator.integers(vocab_size, size=count, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


def write_text(bench: Bench, name: str, text: str) -> Path:
    """A data set of letters, as a prepare.py makes it."""
    from quartz import corpus

    folder, tokenizer = bench.work / name, CharTokenizer.train(text)
    folder.mkdir(exist_ok=True)
    ids, held_out = tokenizer.encode(text), len(text) // 10
    corpus.write_dataset(folder, {"train": ids[:-held_out], "val": ids[-held_out:]}, tokenizer)
    return folder


def flags(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def start(command: list[str], **more) -> subprocess.CompletedProcess:
    """Runs a program to its end; raises with its last words where it fails."""
    print("$", *command, flush=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError(f"{command[0]} has ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done


def train(bench: Bench, *launcher: str, **settings) -> str:
    """Runs train.py, of a small model unless `settings` say otherwise; returns what it printed."""
    own = {"device": bench.place, **{key: its for key, its in bench.scale.little.items() if key != "vocab_size"}}
    own |= {
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "eval_iters": 4,
        "learning_rate": 1e-3,
        "warmup_iters": 5,
    }
    own |= {"max_iters": 20, "lr_decay_iters": 20, "eval_interval": 10, "compile": False}
    return start([*launcher, str(ROOT / "train.py"), *flags(**{**own, **settings})], cwd=bench.work).stdout


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far apart, relative to their length."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Ways to train


class Run:
    """The updates of train.py's loop, without its reports and its files."""

    def __init__(self, bench: Bench, shape: dict, batch: int, dtype: torch.dtype, compiles: bool = True, **more):
        """more: GPTConfig's fields, fp8 and activation_checkpointing."""
        self.bench, self.batch_size, self.dtype, self.fp8 = bench, batch, dtype, more.pop("fp8", False)
        checkpointing = more.pop("activation_checkpointing", False)
        self.model = network(shape, bench.place, **more)
        self.model.activation_checkpointing = checkpointing
        self.flops = self.model.flops_per_token()
        self.prepare(compiles)
        folder, T = write_numbers(bench, shape["vocab_size"]), shape["block_size"]
        split = shards.Split(folder, "train", shards.load_meta(folder), shape["vocab_size"])
        self.micro_batches, self.nth = shards.MicroBatches(split, batch, T, 0), 0
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(bench.place.type, enabled=dtype == torch.float16)
        self.signals, self.processes = update.Signals(), ranks.Processes()
        self.parameters, self.tokens = [*self.model.parameters()], batch * T
        self.batch = self.read()

    def prepare(self, compiles: bool) -> None:
        kernels.install(self.model)
        float8.install(self.model, self.fp8)
        if compiles:
            machine.compile_model(self.model, self.bench.place)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return optim.adamw_of(self.model, 0.1, 6e-4, (0.9, 0.95), self.bench.place.type)

    def read(self) -> list[torch.Tensor]:
        self.nth += 1
        return machine.send(self.micro_batches.read(self.nth), self.bench.place)

    def update(self) -> float:
        with machine.autocast(self.bench.place, self.dtype):
            loss = self.model(*self.batch, return_logits=False)[1]
        self.batch = self.read()
        self.scaler.scale(loss).backward()
        ended = update.end(self.optimizer, self.scaler, loss.detach(), 1.0, self.signals, self.processes)
        assert not ended.fault, ended.fault
        return ended.loss

    def turn(self) -> float:
        """Seconds of an update."""
        return self.bench.seconds(self.update, self.bench.scale.steps)

    def mfu(self, seconds: float) -> float | None:
        """Of an update that takes so long; None where the device's peak is unknown."""
        peak = machine.peak_flops(self.bench.place, self.dtype)
        return self.flops * self.tokens / seconds / peak if peak else None


class NanoGPT(nanogpt.Reference):
    """GPT-2 computed as nanoGPT's model.py does: fused attention, erf's GELU, and all logits at once."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.transformer.h:
            qkv = block.attn.c_attn(self.norm(block.ln_1, x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(self.norm(block.ln_2, x))))
        x = self.norm(self.transformer.ln_f, x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @staticmethod
    def norm(its: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, its.weight.shape, its.weight, its.bias, 1e-5)


def nanogpt_model(shape: dict, place: torch.device) -> NanoGPT:
    with torch.device(place):
        return NanoGPT(**shape)


class NanoGPTRun(Run):
    """The updates of nanoGPT's loop: its network compiled whole, AdamW fused, the loss left on the GPU."""

    def prepare(self, compiles: bool) -> None:
        weights, shape = self.model.state_dict(), self.model.config.to_args()
        self.model = nanogpt_model({key: its for key, its in shape.items() if key != "dropout"}, self.bench.place)
        self.model.load_state_dict(weights)
        if compiles:
            self.model.compile()

    def make_optimizer(self) -> torch.optim.Optimizer:
        matrices, vectors = ([p for p in self.model.parameters() if (p.dim() < 2) is thin] for thin in (False, True))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, 6e-4, (0.9, 0.95), fused=self.bench.on_gpu)

    def update(self) -> torch.Tensor:
        with machine.autocast(self.bench.place, self.dtype):
            _, loss = self.model(*self.batch)
        self.batch = self.read()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def free(bench: Bench) -> None:
    """Gives back what nothing holds any more."""
    import gc

    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.place)


def made(bench: Bench, make: Callable[[], Run], beside: bool = False) -> tuple[Run, float | None, float]:
    """A run that is warm, the peak of its memory in GiB, and the seconds until its first updates were made.

    What was compiled before is forgotten, unless another run goes on `beside` it: where a shape changes, torch would
    compile for any.
    """
    free(bench)
    if bench.on_gpu and not beside:
        torch.compiler.reset()
    before, began = torch.cuda.memory_allocated(bench.place) if bench.on_gpu else 0, time.perf_counter()
    run = make()
    for _ in range(3):
        run.update()
    bench.synchronize()
    peak = (torch.cuda.max_memory_allocated(bench.place) - before) / 2**30 if bench.on_gpu else None
    return run, peak, time.perf_counter() - began


def tell_training(bench: Bench, what: str, run: Run, seconds: float, peak: float | None, goal: float | None = None):
    """peak: of memory in GiB; goal: the least MFU that is wanted."""
    bench.tell(f"{what}: speed", run.tokens / seconds, "tokens/s")
    if (share := run.mfu(seconds)) is not None:
        bench.tell(f"{what}: MFU", share, at_least=goal, is_goal=True)
    if peak is not None:
        bench.tell(f"{what}: most memory", peak, "GiB")


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def what_is_there(bench: Bench) -> None:
    """Versions, and what the machine reaches: the peaks of data sheets, beside a plain product and a plain sum."""
    for name in ("numpy", "triton", "tqdm", "tiktoken", "pytest", "starlette", "uvicorn", "transformers", "wandb"):
        try:
            bench.tell(name, getattr(__import__(name), "__version__", "there"))
        except Exception as error:  # a package that is there and broken raises anything
            bench.tell(name, f"missing ({type(error).__name__})")
    size = bench.scale.product
    a, b = (torch.randn(size, size, device=bench.place, dtype=FAST) for _ in range(2))
    bench.seconds(lambda: a @ b, 3)
    reached = 2 * size**3 / bench.seconds(lambda: a @ b, 10)
    bench.tell(f"a product of {size} x {size} in bfloat16", reached / 1e12, "TFLOP/s")
    if peak := machine.peak_flops(bench.place, FAST):
        bench.tell("its share of the data sheet's peak", reached / peak, at_least=0.4, at_most=None)
        bench.tell("that peak", peak / 1e12, "TFLOP/s")
    read = machine.memory_speed(bench.place)
    bench.tell("a sum reads", read / 1e9, "GB/s")
    if peak := machine.peak_memory_speed(bench.place):
        bench.tell("its share of the data sheet's peak", read / peak, at_least=0.5)
        bench.tell("that peak", peak / 1e9, "GB/s")
    if bench.on_gpu:
        x = torch.zeros(1, device=bench.place)
        bench.tell("a small kernel, launched again and again", 1e6 * bench.seconds(lambda: x.add_(1), 1000), "µs")
        bench.tell("memory", torch.cuda.get_device_properties(bench.place).total_memory / 2**30, "GiB")
        bench.check("no compiler is missing", not machine.why_no_compiler(bench.place))


def agreement(bench: Bench) -> None:
    """Logits, gradients and losses beside the CPU's: in float64 for one batch, in float32 over many updates."""
    # Twice to ten times what a CPU is off by in these dtypes
    bounds = {torch.float32: (1e-5, 1e-4, 3e-3), torch.bfloat16: (3e-2, 5e-2, 1e-2), torch.float16: (5e-3, 1e-2, 1e-2)}
    for arch in ("gpt2", "qwen3"):
        its = network(bench.scale.little, torch.device("cpu"), arch=arch)
        leave_zero(its)
        text = torch.from_numpy(letters()[: 4 * (its.config.block_size + 1)].astype(np.int64)).view(4, -1)
        wanted = logits_and_gradient(copy.deepcopy(its).double(), text, torch.float32)
        curve = losses(bench, its, torch.device("cpu"), torch.float32)
        for dtype in bench.dtypes:
            own = copy.deepcopy(its).to(bench.place)
            kernels.install(own)
            found = logits_and_gradient(own, text.to(bench.place), dtype)
            what = f"{arch} in {short(dtype)}"
            bench.tell(f"{what}: logits, off float64's by", gap(found[0], wanted[0]), at_most=bounds[dtype][0])
            bench.tell(f"{what}: gradient, off float64's by", gap(found[1], wanted[1]), at_most=bounds[dtype][1])
            ours = losses(bench, its, bench.place, dtype)
            off = statistics.mean(abs(a - b) / b for a, b in zip(ours, curve, strict=True))
            bench.tell(f"{what}: {len(ours)} losses, off the CPU's by", off, at_most=bounds[dtype][2])
            bench.tell(f"{what}: the last of them", statistics.mean(ours[-10:]))
            bench.check(f"{what}: it has learned", statistics.mean(ours[-10:]) < 0.95 * ours[0])


def leave_zero(model: GPT) -> None:
    """Matrices that begin at zero would pass nothing on."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def logits_and_gradient(model: GPT, text: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one batch (B, T + 1); the gradient by way of the loss in chunks, which the logits are not."""
    inputs, targets, scale = (
        text[:, :-1].contiguous(),
        text[:, 1:].contiguous(),
        2.0**14 if dtype == torch.float16 else 1,
    )
    few = model_module.LOSS_CHUNK_LOGITS
    try:
        with machine.autocast(text.device, dtype):
            logits = model(inputs, targets)[0]
            model_module.LOSS_CHUNK_LOGITS = 100 * model.config.vocab_size
            loss = model(inputs, targets, return_logits=False)[1]
        (loss * scale).backward()
    finally:
        model_module.LOSS_CHUNK_LOGITS = few
    return logits, torch.cat([p.grad.flatten() for p in model.parameters()]) / scale


def losses(bench: Bench, model: GPT, place: torch.device, dtype: torch.dtype, fp8: bool = False) -> list[float]:
    """Of a copy of the model, over updates that take the same windows each time."""
    model, tokens, T = copy.deepcopy(model).to(place).train(), letters().astype(np.int64), model.config.block_size
    kernels.install(model)
    float8.install(model, fp8)
    optimizer = optim.adamw_of(model, 0.1, 1e-3, (0.9, 0.95), place.type)
    scaler = torch.amp.GradScaler(place.type, enabled=dtype == torch.float16, init_scale=2.0**12)
    found = []
    for n in range(bench.scale.updates):
        starts = shards.training_starts(np.arange(16 * n, 16 * n + 16), len(tokens), T, 0)
        batch = torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts])).to(place)
        with machine.autocast(place, dtype):
            loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), return_logits=False)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def tests(bench: Bench) -> None:
    """tests/test_cuda.py, and what else of the suite wants CUDA; the rest of it computes on CPUs."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        return bench.leave_out("tests/test_cuda.py", "pytest is missing")
    command = [
        "-m",
        "pytest",
        "tests/test_cuda.py",
        "tests/test_compiled.py",
        "-k",
        "cuda",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "QUARTZGPT_TEST_DEVICE": str(bench.place)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout[-500:])
    }
    bench.tell("passed", counts.get("passed", 0), at_least=1)
    bench.tell("failed", counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0), at_most=0)
    bench.check("pytest ends well", done.returncode == 0)
    for name in re.findall(r"^FAILED (\S+)", done.stdout, re.M):
        bench.tell(f"fails: {name}", False)


def resume(bench: Bench) -> None:
    """train.py with deterministic=True: cut at half and resumed, twice over, with dropout."""
    data = write_text(bench, "text", letters().tobytes().decode())
    ways = [{"dtype": "float32"}]
    if bench.on_gpu:
        ways += [{"dtype": "bfloat16", "compile": True}, {"dtype": "float16"}]
        ways += [{"dtype": "bfloat16", "optimizer": "muon", "arch": "qwen3"}]
    for n, way in enumerate(ways):
        settings = {"dataset": data, "dropout": 0.1, "deterministic": True, **way}
        for folder, parts in ((f"whole-{n}", [{}]), (f"cut-{n}", [{"max_iters": 10}, {"init_from": "resume"}])):
            for part in parts:
                train(bench, out_dir=bench.work / folder, **settings, **part)
        ours, theirs = (
            torch.load(bench.work / f"{name}-{n}" / "last.pt", weights_only=True) for name in ("whole", "cut")
        )
        for key in ("model", "optimizer", "scaler"):
            bench.check(f"{way}: equal bits of {key}", same(ours.get(key), theirs.get(key)))
        bench.tell(f"{way}: updates", theirs["iter_num"], at_least=20)


def graphs(bench: Bench) -> None:
    """The compiled model beside the plain one; the engine that a verb takes beside the plain engine."""
    scale, prompts = bench.scale, [[1, 2, 3], [4], [5] * 20]
    for dtype in (torch.float32, *([FAST] if bench.on_gpu else [])):
        found = []
        for compiles in (False, True):
            run = Run(bench, scale.little, 8, dtype, compiles)
            found.append([run.update() for _ in range(10)])
            bench.tell(f"an update in {short(dtype)}, {'compiled' if compiles else 'plain'}", 1000 * run.turn(), "ms")
        off = statistics.mean(abs(a - b) / b for a, b in zip(*found, strict=True))
        bench.tell(f"losses compiled, off the plain ones in {short(dtype)} by", off, at_most=1e-3)
    for arch in ("gpt2", "qwen3"):
        model = network(scale.little, bench.place, arch=arch)
        leave_zero(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(10)  # so that it has preferences
        engine = compiled.prepare(model, bench.place, torch.float32, False, len(prompts), 100, False)
        plain = Engine(model, bench.place)
        for name, how in (("greedy", Sampling(temperature=0)), ("drawn", Sampling(top_k=9))):
            texts = [complete(one, prompts, scale.tokens // 4, how, ahead=8) for one in (engine, plain)]
            bench.check(f"{arch}, {name}: {type(engine).__name__} writes what Engine writes", texts[0] == texts[1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        engine.refresh()
        texts = [
            complete(one, prompts, 8, Sampling(temperature=0), ahead=8) for one in (engine, Engine(model, bench.place))
        ]
        bench.check(f"{arch}: after the weights have changed too", texts[0] == texts[1])


def training(bench: Bench) -> None:
    """GPT-2 124M, and the network of the shakespeare preset, beside nanoGPT's way, in turns."""
    scale = bench.scale
    cases = [(f"{scale.names[0]}, {batch} x {scale.gpt2['block_size']}", scale.gpt2, batch) for batch in scale.batches]
    small = f"{scale.small['n_layer']} x {scale.small['n_embd']}, {scale.small_batch} x {scale.small['block_size']}"
    cases.append((small, scale.small, scale.small_batch))
    for what, shape, batch in cases:
        ours, peak, first = made(bench, lambda: Run(bench, shape, batch, FAST, bench.on_gpu))  # noqa: B023 - called at once
        theirs, their_peak, _ = made(bench, lambda: NanoGPTRun(bench, shape, batch, FAST, bench.on_gpu), True)  # noqa: B023
        turns = [(ours.turn(), theirs.turn()) for _ in range(scale.rounds)]
        seconds, their_seconds = (statistics.median(its) for its in zip(*turns, strict=True))
        tell_training(bench, what, ours, seconds, peak, 0.5 if shape is scale.gpt2 else None)
        bench.tell(f"{what}: an update", 1000 * seconds, "ms")
        bench.tell(f"{what}: nanoGPT's way", 1000 * their_seconds, "ms")
        bench.tell(f"{what}: times as fast as that", statistics.median(b / a for a, b in turns))
        if peak is not None:
            bench.tell(f"{what}: memory, as a share of that way's", peak / their_peak)
        bench.tell(f"{what}: until three updates were made", first, "s")
        print_profile(bench, ours)
        del ours, theirs
    its = {key: value for key, value in scale.gpt2.items() if key != "vocab_size"}
    settings = {
        "max_iters": 60,
        "log_interval": 20,
        "eval_interval": 1000,
        "eval_iters": 1,
        "always_save_checkpoint": False,
    }
    settings |= {
        "dataset": write_numbers(bench, scale.gpt2["vocab_size"]),
        "batch_size": scale.batches[-1],
        "compile": bench.on_gpu,
    }
    train(bench, **{**its, **settings}, gradient_accumulation_steps=1, out_dir=bench.work / "whole", dtype="bfloat16")
    last = [record for record in logged(bench.work / "whole") if "iter" in record][-1]
    bench.tell("train.py itself: speed", last["tokens_per_s"], "tokens/s")
    if "mfu" in last:
        bench.tell("train.py itself: MFU", last["mfu"], at_least=0.5, is_goal=True)


def print_profile(bench: Bench, run: Run) -> None:
    """What an update spends its time on, to gpu.log."""
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            run.update()
        bench.synchronize()
    order = "self_cuda_time_total" if bench.on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80), flush=True)


@torch.no_grad()
def nanogpt_generates(model: NanoGPT, idx: torch.Tensor, tokens: int) -> torch.Tensor:
    """As nanoGPT's generate: no cache, the whole context for each token."""
    for _ in range(tokens):
        logits = model(idx[:, -model.transformer.wpe.num_embeddings :])[0][:, -1] / 0.8
        least = logits.topk(min(200, logits.size(-1))).values[:, [-1]]
        probabilities = F.softmax(logits.masked_fill(logits < least, -math.inf), dim=-1)
        idx = torch.cat((idx, torch.multinomial(probabilities, 1)), dim=1)
    return idx


def decoding(bench: Bench) -> None:
    """Texts that grow side by side, in bfloat16; bytes are those of the weights alone."""
    for what, shape in zip(bench.scale.names, (bench.scale.gpt2, bench.scale.xl), strict=True):
        free(bench)
        decode(bench, what, shape)
    if bench.on_gpu:
        try:
            compiled.check_quantize("int8", str(bench.place))
            bench.check("int8 on a GPU is refused", False)
        except UserError as error:
            bench.leave_out("int8", str(error))


def decode(bench: Bench, what: str, shape: dict) -> None:
    scale, place = bench.scale, bench.place
    peak, dtype = (
        machine.peak_memory_speed(place) or machine.memory_speed(place),
        FAST if bench.on_gpu else torch.float32,
    )
    model = network(shape, place).eval()
    peer, weights = nanogpt_model(shape, place).eval(), model.get_num_params()
    peer.load_state_dict(model.state_dict())
    engine = compiled.prepare(model, place, dtype, False, max(scale.streams), 10**9, False, gives_up=True)
    for streams in scale.streams:
        case, speed = f"{what}, {streams} at once", decoding_speed(bench, engine, streams)
        bench.tell(f"{case}: speed", speed, "tokens/s")
        goal = 0.7 if (what, streams) == (scale.names[1], 1) else None
        read = speed / streams * weights * dtype.itemsize
        bench.tell(f"{case}: weights read, as a share of the memory's peak", read / peak, at_least=goal, is_goal=True)
        # A token's cost there goes with the context: these are from the middle of what ours has written
        few, length = max(2, scale.tokens // 8), min(8 + scale.tokens // 2, shape["block_size"])
        idx = torch.zeros((streams, length), dtype=torch.long, device=place)
        with machine.autocast(place, dtype):
            nanogpt_generates(peer, idx, 2)
            theirs = streams * few / bench.seconds(lambda: nanogpt_generates(peer, idx, few), 1)  # noqa: B023
        bench.tell(f"{case}: nanoGPT's way", theirs, "tokens/s")
        bench.tell(f"{case}: times as fast as that", speed / theirs)


def decoding_speed(bench: Bench, engine, streams: int) -> float:
    """Tokens/s of all texts, after the first chunk, which reads the prompt and captures the graph."""
    ahead = 16 if bench.on_gpu else 1
    decoder = Decoder(engine, streams, 8 + bench.scale.tokens, ahead=ahead)
    decoder.admit([0] * 8, range(streams), bench.scale.tokens, Sampling(temperature=0.8, top_k=200))
    decoder.step()
    bench.synchronize()
    count, began = 0, time.perf_counter()
    while drawn := decoder.step():
        count += len(drawn)
    return count / (time.perf_counter() - began)


def find_text(said: str) -> str:
    """tinyshakespeare.txt, from where it may lie; else empty."""
    data = os.environ.get("QUARTZGPT_TEST_DATA", "")
    places = [Path(said)] if said else [Path(data, "tinyshakespeare.txt")] if data else []
    for folder in (ROOT, ROOT.parent):
        places.append(folder / "shared" / "data" / "tinyshakespeare.txt")
    places.append(ROOT / "data" / "shakespeare_char" / "input.txt")
    return next((path.read_text(encoding="utf-8") for path in places if path.is_file()), "")


def shakespeare(bench: Bench) -> None:
    """config/train_shakespeare_char.py as a person runs it, until its validation loss is nanoGPT's."""
    text, what = find_text(bench.text), "config/train_shakespeare_char.py"
    if not text and bench.on_gpu:
        return bench.leave_out(what, "tinyshakespeare.txt is not there: --text=FILE names it")
    data = write_text(bench, "shakespeare", text or letters(2**17).tobytes().decode())
    settings = {
        "target_val_loss": PRESET_LOSS,
        "dataset": data,
        "out_dir": bench.work / "preset",
        "device": bench.place,
    }
    began = time.perf_counter()
    start(
        [
            str(ROOT / "train.py"),
            str(ROOT / "config/train_shakespeare_char.py"),
            *flags(**settings, **bench.scale.preset),
        ]
    )
    whole = time.perf_counter() - began
    found = [record for record in logged(bench.work / "preset") if "step" in record]
    best = min(record["val_loss"] for record in found)
    bench.tell("the validation loss reached", best, at_most=PRESET_LOSS, is_goal=True)
    bench.tell("updates", found[-1]["step"])
    # Seconds count where the loss is reached
    bench.tell("the whole process", whole, "s", at_most=45.0 if best <= PRESET_LOSS else None, is_goal=True)
    bench.tell("in updates", found[-1]["seconds"], "s")
    last = [record for record in logged(bench.work / "preset") if "iter" in record][-1]
    bench.tell("an update, at the end", last["ms"], "ms")


def waits(bench: Bench) -> None:
    """How often an update waits for the GPU, what its copies come from, and how long the GPU is idle."""
    if not bench.on_gpu:
        run = Run(bench, bench.scale.gpt2, 2, torch.float32, False)
        return bench.check("an update", math.isfinite(run.update()))
    run, _, _ = made(bench, lambda: Run(bench, bench.scale.gpt2, bench.scale.batches[-1], FAST))
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(10):
            run.update()
    torch.cuda.set_sync_debug_mode("default")
    for warning in told[:3]:
        print(warning.filename, warning.lineno, warning.message)
    bench.tell("waits in an update", len([w for w in told if "synchroniz" in str(w.message)]) / 10, at_most=1.0)
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            run.update()
        bench.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    names = {event.name for event in events if "HtoD" in event.name}
    bench.check("batches come from pinned memory", names and not any("Pageable" in name for name in names))
    bench.tell("copies to the GPU", ", ".join(sorted(names)))
    bench.tell("the GPU is idle", idle_share(spans), at_most=0.05, is_goal=True)


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time in which nothing runs, from the first beginning to the last end; spans by beginnings."""
    busy, end = 0.0, spans[0][0]
    for start_, stop in spans:
        busy += max(0.0, stop - max(start_, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def large(bench: Bench) -> None:
    """GPT-2's 1.5B, with and without what saves memory, and nanoGPT's way at the first size."""
    scale, seconds = bench.scale, {}
    first, last = scale.xl_batches[0], scale.xl_batches[-1]
    cases = [("ours", Run, batch, {}) for batch in scale.xl_batches]
    cases += [("ours, activation_checkpointing", Run, last, {"activation_checkpointing": True})]
    cases += [("nanoGPT's way", NanoGPTRun, first, {})]
    for name, kind, batch, more in cases:
        what = f"{scale.names[1]}, {batch} x {scale.xl['block_size']}: {name}"
        try:
            run, peak, _ = made(bench, lambda: kind(bench, scale.xl, batch, FAST, bench.on_gpu, **more))  # noqa: B023
            seconds[name, batch] = bench.seconds(run.update, max(2, scale.steps // 4))
            tell_training(bench, what, run, seconds[name, batch], peak)
        except torch.OutOfMemoryError:
            bench.tell(what, "does not fit")
        run = None
    if seconds.keys() >= {("ours", first), ("nanoGPT's way", first)}:
        ratio = seconds["nanoGPT's way", first] / seconds["ours", first]
        bench.tell(f"{scale.names[1]}, {first} x {scale.xl['block_size']}: times as fast as that", ratio)


def fsdp(bench: Bench) -> None:
    """torchrun with one process: FSDP2 and DDP beside the plain run, and a checkpoint in shards that goes on."""
    data = write_text(bench, "text", letters().tobytes().decode())
    settings, torchrun = {"dataset": data, "dtype": "float32"}, ("-m", "torch.distributed.run", "--standalone")
    ways = {"plain": ((), {}), "DDP": (torchrun, {}), "FSDP2": (torchrun, {"fsdp": True})}
    curves = {}
    for name, (launcher, more) in ways.items():
        launcher = (*launcher, "--nproc_per_node=1") if launcher else ()
        train(bench, *launcher, **settings, **more, out_dir=bench.work / name)
        curves[name] = [record["loss"] for record in logged(bench.work / name) if "iter" in record]
        off = statistics.mean(abs(a - b) / b for a, b in zip(curves[name], curves["plain"], strict=True))
        bench.tell(f"{name}: {len(curves[name])} losses, off the plain run's by", off, at_most=1e-4)
    launcher, more = (*torchrun, "--nproc_per_node=1"), {"fsdp": True, "sharded_checkpoint": True}
    for part in ({"max_iters": 10}, {"init_from": "resume"}):
        train(bench, *launcher, **settings, **more, **part, out_dir=bench.work / "shards")
    bench.check("a checkpoint in shards is there", (bench.work / "shards" / "last.dcp").is_dir())
    resumed = [record["loss"] for record in logged(bench.work / "shards") if "iter" in record]
    off = statistics.mean(abs(a - b) / b for a, b in zip(resumed, curves["plain"], strict=True))
    bench.tell("in shards, resumed: losses, off the plain run's by", off, at_most=1e-4)


def fp8(bench: Bench) -> None:
    """Products in 8 bits beside float32's, losses and speed beside bfloat16's."""
    scale = bench.scale
    if bench.on_gpu and not machine.has_fp8(bench.place):
        return bench.leave_out("fp8", "this GPU has no products of 8 bits")
    for size in scale.products:
        generator = torch.Generator().manual_seed(size)
        x, weight, grad = (torch.randn(size, size, generator=generator).to(bench.place) for _ in range(3))
        x.requires_grad_()
        weight.requires_grad_()
        y = float8.Float8Product.apply(x, weight)
        y.backward(grad.to(y.dtype))
        wanted = {"product": (y, x @ weight.T, 0.06)}
        wanted |= {"gradient by x": (x.grad, grad @ weight, 0.1), "by the weight": (weight.grad, grad.T @ x, 0.1)}
        for name, (ours, theirs, bound) in wanted.items():  # e4m3 rounds by 0.026 of a number, e5m2 by twice that
            bench.tell(f"{size} x {size}: {name}, off float32's by", gap(ours, theirs), at_most=bound)
    curves = [losses(bench, network(scale.six, torch.device("cpu")), bench.place, FAST, its) for its in (False, True)]
    ends, bound = (
        [statistics.mean(curve[-10:]) for curve in curves],
        0.01 if scale.updates >= 200 else 0.05,
    )  # early on, a loss says when
    bench.tell(
        f"{scale.updates} updates of 6 layers: loss, off bfloat16's by", abs(ends[1] / ends[0] - 1), at_most=bound
    )
    cases = [(scale.names[0], scale.gpt2, scale.batches[-1]), (scale.names[1], scale.xl, scale.xl_batches[-1])]
    if not bench.on_gpu:
        cases = [("toy", {**scale.gpt2, "n_embd": 128}, 2)]
    for name, shape, batch in cases:
        compare_with_fp8(bench, f"{name}, {batch} x {shape['block_size']}", shape, batch)


def compare_with_fp8(bench: Bench, what: str, shape: dict, batch: int) -> None:
    seconds = {}
    for wanted in (False, True):
        run, peak, _ = made(bench, lambda: Run(bench, shape, batch, FAST, bench.on_gpu, fp8=wanted))  # noqa: B023
        seconds[wanted] = bench.seconds(run.update, max(2, bench.scale.steps // 2))
        tell_training(bench, f"{what}, {'FP8' if wanted else 'bfloat16'}", run, seconds[wanted], peak)
        if wanted:
            print_profile(bench, run)
        run = None
    bench.tell(f"{what}: FP8 is times as fast as bfloat16", seconds[False] / seconds[True])


def serving(bench: Bench) -> None:
    """Clients that each ask again as soon as they are answered: of the service, and over HTTP where that is there."""
    from quartz import serving as service_module

    scale, rows, place = bench.scale, 16 if bench.on_gpu else 4, bench.place
    dtype = FAST if bench.on_gpu else torch.float32
    engine = compiled.prepare(network(scale.gpt2, place).eval(), place, dtype, False, rows, 10**9, False, gives_up=True)
    service = service_module.Service(engine, rows, scale.gpt2["vocab_size"], scale.clients, 0)
    for clients in (1, rows, scale.clients):
        speed, firsts = served(service, service_module, clients, scale.tokens // 4)
        bench.tell(f"{clients} clients of {rows} rows: speed", speed, "tokens/s")
        for name, which in (("half", 49), ("99 of 100", 98)):
            first = 1000 * statistics.quantiles(firsts, n=100, method="inclusive")[which]
            bench.tell(f"{clients} clients of {rows} rows: {name} get their first token within", first, "ms")
    service.close()
    alone = decoding_speed(bench, engine, rows)
    bench.tell(f"{rows} texts by the decoder alone", alone, "tokens/s")
    try:
        for package in ("starlette", "uvicorn", "prometheus_client"):
            __import__(package)
    except ImportError as error:
        return bench.leave_out("over HTTP", f"the {error.name} package is missing")
    over_http(bench)


def served(service, kinds, clients: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens/s of so many clients, and the seconds after which each of their texts began."""
    firsts, failed, turns = [], [], 4

    def client(nth: int) -> None:
        for turn in range(turns):
            over, began, seen = threading.Event(), time.perf_counter(), []

            def emit(event, over=over, began=began, seen=seen) -> None:
                if isinstance(event, kinds.Token) and not seen:
                    seen.append(time.perf_counter() - began)
                if isinstance(event, kinds.Failed):
                    failed.append(event.message)
                if isinstance(event, kinds.Failed) or getattr(event, "end", None):
                    over.set()

            prompt = [(7 * nth + turn + n) % 100 for n in range(16)]
            service.submit(kinds.Request(prompt, [nth], tokens, Sampling(temperature=0.8, top_k=200)), emit)
            over.wait()
            firsts.extend(seen)

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(failed[0])
    return clients * turns * tokens / (time.perf_counter() - began), firsts


def over_http(bench: Bench) -> None:
    """serve.py asked by the clients of tests/load.py, with a model of letters."""
    folder, tokenizer = bench.work / "served", CharTokenizer.train("".join(map(chr, range(LETTERS))))
    folder.mkdir(exist_ok=True)
    model = network({**bench.scale.gpt2, "vocab_size": tokenizer.vocab_size}, torch.device("cpu"))
    state = {"model": model.state_dict(), "model_args": model.config.to_args(), "tokenizer": tokenizer.to_data()}
    checkpoint.save(folder / "ckpt.pt", {**state, "iter_num": 1, "best_val_loss": 1.0, "config": {}})
    port, clients = load.free_port(), (1, min(16, bench.scale.clients))
    settings = {"out_dir": folder, "device": bench.place, "port": port, "compile": False, "max_rows": 16}
    command = [sys.executable, str(ROOT / "serve.py"), *flags(**settings)]
    server = load.Server("serve.py", port, command, "served", {"ignore_eos": True})
    try:
        server.start(bench.work)
        words, tokens = bench.scale.words, bench.scale.tokens // 2
        for count in clients:
            speed = asyncio.run(load.rate(server, count, words, tokens, 4))
            bench.tell(f"over HTTP, {count} clients: speed", speed, "tokens/s")
    finally:
        server.process.kill()


STEPS: dict[str, Callable[[Bench], None]] = {
    "machine": what_is_there,
    "agreement": agreement,
    "tests": tests,
    "resume": resume,
    "graphs": graphs,
    "training": training,
    "decoding": decoding,
    "shakespeare": shakespeare,
    "waits": waits,
    "large": large,
    "fsdp": fsdp,
    "fp8": fp8,
    "serving": serving,
}


def revision() -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", default="")
    options = parser.parse_args()
    bench = Bench(options.step, machine.pick_device(options.device), options.results, options.work, options.text)
    if bench.on_gpu:
        torch.cuda.set_device(bench.place)
    name = torch.cuda.get_device_name(bench.place) if bench.on_gpu else platform.processor() or platform.machine()
    begins = {"device": name, "date": datetime.date.today().isoformat(), "torch": str(torch.__version__)}
    begins |= {"CUDA": str(torch.version.cuda), "Python": platform.python_version(), "revision": revision()}
    bench.write({"begins": begins})
    STEPS[options.step](bench)


if __name__ == "__main__":
    main()
