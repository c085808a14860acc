"""Pretrains a GPT, resumes a run, or fine-tunes a GPT that exists.

One process, on a GPU or on a CPU:
    python train.py config/train_shakespeare_char.py
    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --batch_size=32
    python train.py config/train_shakespeare_char.py --init_from=resume

Eight GPUs of one machine:
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings. The defaults train a GPT-2 (124M) on OpenWebText.
# Input and output
out_dir = "out"  # folder of checkpoints and log; relative to where you stand
eval_interval = 2000  # iterations between two evaluations, each of which saves
log_interval = 1  # iterations between two log lines
eval_iters = 200  # micro-batches read in an evaluation of one split, at the most
eval_only = False  # evaluate once and stop; nothing is written
always_save_checkpoint = True  # ckpt.pt holds the latest evaluated state; False: the best by validation loss
init_from = "scratch"  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder: a checkpoint's, hf:PATH
# Weights & Biases
wandb_log = False  # send the figures to Weights & Biases too; WANDB_MODE=offline keeps them here
wandb_project = "owt"  # project name there
wandb_run_name = "gpt2"  # run name there
# Data
dataset = "openwebtext"  # folder under data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-batches in an update, over all processes together
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence: the longest context
# Model
n_layer = 12  # transformer blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining; 0.1 and more for small data or fine-tuning
bias = False  # biases in linear layers and layer norms
arch = "gpt2"  # gpt2, or qwen3: rotary positions, RMS norms, SwiGLU
n_kv_head = 0  # qwen3: heads of keys and values, each shared by several of queries; 0 is n_head
tie_embeddings = True  # one matrix for input and output; False only with qwen3
activation_checkpointing = (
    False  # keep less for the backward pass and compute it again: a third slower, for small cards
)
lora_rank = 0  # train matrices of this rank beside the frozen weights of the model that init_from names; 0 is off
lora_alpha = 0.0  # they count alpha / rank times; 0 is twice the rank
# Optimizer
optimizer = "adamw"  # adamw, or muon: Muon for the blocks' matrices, AdamW for all else
learning_rate = 6e-4  # the highest rate; with muon, of vectors (norms, biases) alone
max_iters = 600000  # updates in all
token_budget = 0  # tokens in all, in place of max_iters and, unless it is given, of lr_decay_iters; 0 is off
target_val_loss = 0.0  # stop at the first evaluation whose validation loss is no higher; 0 is off
patience = 0  # stop after so many evaluations in a row that bring no better validation loss; 0 is off
weight_decay = 1e-1  # of matrices and embeddings; with muon, of the blocks' matrices
beta1 = 0.9  # AdamW's decay of the mean of gradients
beta2 = 0.95  # AdamW's decay of the mean of squared gradients
grad_clip = 1.0  # gradients are scaled down to this norm; 0 is off
muon_lr = 0.02  # Muon's rate
muon_momentum = 0.95  # Muon's decay of the mean of gradients; it rises to this from 0.85 over the first 300 updates
embedding_lr = 0.012  # with muon: AdamW's rate for embeddings, at width 768; it goes with 1 / sqrt(width)
head_lr = 0.004  # with muon: AdamW's rate for a head that is not tied, likewise
lr_multipliers = ""  # wte=0.5,c_proj=2: rates of the parameters whose names hold these parts, times the numbers
no_decay = ""  # wte,wpe: parameters whose names hold one of these parts get no weight decay
# Learning rate: linear warm-up, then down to min_lr. Every group's rate takes the same course
decay_lr = True  # False: learning_rate throughout
schedule = "cosine"  # cosine, or wsd: constant, then linear over the last decay_fraction of lr_decay_iters
warmup_iters = 2000  # updates of the warm-up
lr_decay_iters = 600000  # the update at which min_lr is reached; about max_iters (Chinchilla)
min_lr = 6e-5  # about learning_rate / 10 (Chinchilla)
decay_fraction = 0.6  # of wsd
# Processes and machine
fsdp = False  # divide weights, gradients and moments among the processes (FSDP2), for models beyond one GPU
sharded_checkpoint = False  # with fsdp: folders last.dcp and ckpt.dcp, where one file would be too large
backend = "nccl"  # of torch.distributed on GPUs: nccl, gloo, …; CPUs use gloo
device = "auto"  # auto, cpu, cuda, cuda:N, mps
dtype = "auto"  # auto, float32, bfloat16, float16; auto is bfloat16 where the device computes in it
compile = True  # compile the model with torch.compile
seed = 1337  # of the weights, the order of the data, and dropout
deterministic = False  # the same bits in each run on a GPU too; slower
skip_bad_updates = 0  # so many updates in a row without a finite loss and gradient are left out; one more stops the run
# ----------------------------------------------------------------------------------------------------------------------
_given = configurator.configure(globals())

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, kernels, lora, machine, optim, ranks, run_folder, shards, sources
from quartz.hf_layout import GPT2_MODELS
from quartz.log import Log

# Settings that a checkpoint decides.
_ARCHITECTURE = ("block_size", "n_layer", "n_head", "n_embd", "bias", "arch", "n_kv_head", "tie_embeddings")
_PASSING = ("out_dir", "init_from", "eval_only", "device", "wandb_log", "wandb_run_name")  # may change at every resume
ROUND_VOCABULARY_TO = 64  # GPT-2's 50257 rows become 50304: matrix products of even sizes are faster


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings, before anything is loaded."""
    values, world_size = globals(), int(os.environ.get("WORLD_SIZE", "1"))
    at_least_one = ("eval_interval", "log_interval", "eval_iters", "gradient_accumulation_steps", "batch_size")
    not_negative = ("max_iters", "weight_decay", "grad_clip", "warmup_iters", "lr_decay_iters", "min_lr")
    not_negative += ("token_budget", "target_val_loss", "patience", "skip_bad_updates")
    rules = [
        (0 < values[name] < 2**31, f"{name} must be at least 1, and no giant, not {values[name]}")
        for name in at_least_one
    ]
    rules += [(0 <= values[k] < math.inf, f"{k} must be 0 or a positive number, not {values[k]}") for k in not_negative]
    rules += [(0 <= values[name] < 1, f"{name} must be in [0, 1), not {values[name]}") for name in ("beta1", "beta2")]
    rules += [(False, line) for line in model_config(1).problems()]
    positive = ("learning_rate", "muon_lr", "embedding_lr", "head_lr")
    rules += [(0 < values[k] < math.inf, f"{k} must be a positive number, not {values[k]}") for k in positive]
    rules += [
        (
            not (token_budget and "max_iters" in _given),
            "token_budget and max_iters both say how long to train: give one of the two",
        ),
        (optimizer in ("adamw", "muon"), f"optimizer must be adamw or muon, not {optimizer!r}"),
        (muon_lr <= 1, f"muon_lr is the length of a step relative to an orthogonal matrix, and {muon_lr} is no such"),
        (0 <= muon_momentum < 1, f"muon_momentum must be in [0, 1), not {muon_momentum}"),
        (schedule in ("cosine", "wsd"), f"schedule must be cosine or wsd, not {schedule!r}"),
        (0 < decay_fraction <= 1, f"decay_fraction must be above 0 and at most 1, not {decay_fraction}"),
        (not fsdp or "RANK" in os.environ, "fsdp divides a model among processes: start them with torchrun"),
        (not fsdp or dtype != "float16", "fsdp has no gradient scaler: take dtype=bfloat16, or float32"),
        (fsdp or not sharded_checkpoint, "sharded_checkpoint is of runs with fsdp=True"),
        (0 <= lora_rank < 2**16, f"lora_rank must be 0 (off) or a rank, not {lora_rank}"),
        (0 <= lora_alpha < math.inf, f"lora_alpha must be 0 (twice the rank) or a positive number, not {lora_alpha}"),
        (not lora_rank or init_from != "scratch", "lora_rank adapts a model that exists: name one with init_from"),
        (not lora_rank or (optimizer == "adamw" and not fsdp), "lora_rank takes optimizer=adamw, and no fsdp"),
        (0 <= seed < 2**32, f"seed must be from 0 to {2**32 - 1}, not {seed}"),
        (
            not decay_lr or warmup_iters != lr_decay_iters,
            f"warmup_iters and lr_decay_iters are both {warmup_iters}, which leaves no update to decay in",
        ),
        (
            gradient_accumulation_steps % world_size == 0,
            f"gradient_accumulation_steps ({gradient_accumulation_steps}) counts over all processes, and must be a "
            f"multiple of their number ({world_size})",
        ),
        (
            init_from in ("scratch", "resume", *GPT2_MODELS) or os.path.isdir(init_from.removeprefix("hf:")),
            f"init_from={init_from} is not scratch, resume, {', '.join(GPT2_MODELS)}, nor a folder",
        ),
    ]
    looks = [lambda: shards.find(dataset), lambda: machine.check_machine(device, dtype)]
    looks.append(lambda: optim.multipliers(lr_multipliers))
    if init_from == "resume":
        looks.append(lambda: run_folder.to_use(out_dir))
    if not eval_only and not (init_from == "resume" and not os.path.isdir(out_dir)):
        looks.append(lambda: run_folder.prepare_folder(out_dir))
    configurator.check(rules, looks)


def model_config(vocab_size: int) -> GPTConfig:
    qwen3 = {"arch": arch, "n_kv_head": n_kv_head, "tie_embeddings": tie_embeddings}
    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, **qwen3)


def make_optimizer(model: GPT, place: torch.device, compute_dtype: torch.dtype) -> torch.optim.Optimizer:
    betas = (beta1, beta2)
    if optimizer == "adamw":
        updater = optim.adamw_of(model, weight_decay, learning_rate, betas, place.type)
    else:
        rates = {"matrix": muon_lr, "embedding": embedding_lr, "head": head_lr, "vector": learning_rate}
        updater = optim.muon(model, rates, muon_momentum, betas, weight_decay, compute_dtype)
    optim.refine(updater, model, optim.multipliers(lr_multipliers), no_decay)
    return updater


def load_model(meta: dict) -> tuple[GPT, dict]:
    """The model that init_from asks for, on the CPU, and what else its checkpoint holds ({} where there is none)."""
    state = {}
    if init_from == "scratch":
        vocab_size = meta["vocab_size"] or 50304
        if meta["tokenizer"] and meta["tokenizer"]["type"] != "char":
            vocab_size = math.ceil(vocab_size / ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO
        if meta["row"] and meta["row"] <= block_size:
            raise UserError(
                f"the data set has rows of {meta['row']} tokens, which leave positions of block_size {block_size} "
                f"untrained: set block_size={meta['row'] - 1}"
            )
        return GPT(model_config(vocab_size)), state
    if init_from == "resume":
        state = run_folder.load_furthest(out_dir)
        source = str(state["path"])
        print(f"Resuming training from {source} at iteration {state['iter_num']}")
        model = checkpoint.build_model(state, dropout, keep_adapters=True)
    else:
        print(f"Initializing from {init_from} weights")
        (model, tokenizer_data), source = sources.pretrained(init_from, dropout), init_from
        state = {"tokenizer": tokenizer_data}
    have = dataclasses.asdict(model.config)
    problems = [
        f"{name} is {have[name]} in {source}, and can't be {globals()[name]}: leave it out"
        for name in _ARCHITECTURE[1:]
        if name in _given and globals()[name] != have[name]
    ]
    if "block_size" in _given and block_size > have["block_size"]:
        problems.append(f"block_size is {have['block_size']} in {source}, and can't grow to {block_size}")
    if state.get("tokenizer") and meta["tokenizer"] and state["tokenizer"] != meta["tokenizer"]:
        problems.append(f"{source} was trained with another tokenizer than that of data set {dataset!r}")
    if state.get("model", {}) is None and "block_size" in _given and block_size < have["block_size"]:
        problems.append(
            f"block_size can't be lowered from {have['block_size']} in shards: make one file of {source} first"
        )
    if init_from == "resume":
        global lora_rank, lora_alpha
        theirs = state.get("lora") or {"rank": 0, "alpha": 0.0}
        asked = {"rank": lora_rank, "alpha": lora_alpha}
        for name, value in theirs.items():
            if f"lora_{name}" in _given and asked[name] != value:
                problems.append(f"lora_{name} is {value} in {source}: leave it out, or begin with init_from={out_dir}")
        if theirs["rank"] and (optimizer != "adamw" or fsdp):
            problems.append(f"{source} is a run with lora_rank, which takes optimizer=adamw, and no fsdp")
        lora_rank, lora_alpha = theirs["rank"], float(theirs["alpha"])
    if problems:
        raise UserError(*problems)
    if "block_size" in _given and block_size < have["block_size"]:
        model.crop_block_size(block_size)
    if lora_rank and init_from != "resume":
        lora_alpha = lora_alpha or 2.0 * lora_rank
        state["lora"] = {"rank": lora_rank, "alpha": lora_alpha}
        lora.attach(model, **state["lora"])
    return model, state


def tell_changes(state: dict) -> None:
    """Notes the settings that differ from those of the checkpoint, once all of them are settled."""
    before = state.get("config", {})
    for name, value in configurator.settings_of(globals()).items():
        if name in before and name not in (*_ARCHITECTURE, *_PASSING) and before[name] != value:
            print(f"note: {name} was {before[name]!r} in {state['path']}, and is {value!r} from here on")


def get_lr(iteration: int) -> float:
    """Linear warm-up, then from learning_rate down to min_lr: along a cosine (Loshchilov and Hutter, 2017), or constant
    and at last along a line (Hu et al., 2024: warm-up, stable, decay).
    """
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration > lr_decay_iters:
        return min_lr
    if schedule == "wsd":
        left = (lr_decay_iters - iteration) / (decay_fraction * lr_decay_iters)
        return min_lr + min(1.0, left) * (learning_rate - min_lr)
    progress = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def start_wandb(config: dict):
    import wandb

    try:
        wandb_run = wandb.init(project=wandb_project, name=wandb_run_name, config=config)
        wandb_run.define_metric("*", step_metric="iter")  # what its charts are drawn against
        return wandb_run
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"Weights & Biases did not start ({error}): log in, set WANDB_MODE=offline, or use --wandb_log=False"
        ) from error


def main() -> None:
    global init_from
    check_settings()
    machine.keep_freed_memory()
    machine.set_deterministic(deterministic)
    processes, place = ranks.start_processes(device, backend)
    is_writing = processes.is_master and not eval_only
    with (
        ranks.lost_ranks_named(processes),
        run_folder.claimed(out_dir) if is_writing else contextlib.nullcontext(),
    ):
        restarted = ranks.any_of(ranks.attempt() > 0, place)
        if is_writing and not restarted:
            run_folder.forget_launch(out_dir)
        if restarted and init_from != "resume":
            goes_on = is_writing and run_folder.is_of(out_dir, ranks.launch_id())
            if ranks.any_of(goes_on, place):
                init_from = "resume"
        run(processes, place)
        ranks.stop_processes()


def run(processes: ranks.Processes, place: torch.device) -> None:
    compute_dtype = machine.pick_dtype(dtype, place)
    autocast = machine.autocast(place, compute_dtype)
    alone, is_writing = processes.world_size == 1, processes.is_master and not eval_only
    stopping = []  # signals that came in: the run ends at the next iteration's border, and at once on a second one

    def stop(number, frame):
        stopping.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    # Data, model, optimizer
    torch.manual_seed(seed)
    folder = shards.find(dataset)
    meta = shards.load_meta(folder)
    raw_model, state = load_model(meta)
    model_args = raw_model.config.to_args()
    T = shards.window_length(meta["row"], raw_model.config.block_size)
    tokens_per_iter = gradient_accumulation_steps * batch_size * T
    if token_budget:
        global max_iters, lr_decay_iters
        max_iters = math.ceil(token_budget / tokens_per_iter)
        lr_decay_iters = lr_decay_iters if "lr_decay_iters" in _given else max_iters
    tell_changes(state)
    splits = {name: shards.Split(folder, name, meta, raw_model.config.vocab_size) for name in ("train", "val")}
    configurator.check([], [lambda split=split: split.check_length(T) for split in splits.values()])
    kernels.install(raw_model)
    raw_model.activation_checkpointing = activation_checkpointing
    if compile:
        machine.compile_model(raw_model, place)
    if fsdp:
        from quartz import sharding

        sharding.divide(raw_model, place)
    else:
        raw_model.to(place)
    updater = make_optimizer(raw_model, place, compute_dtype)
    peak_rates = [group["lr"] / learning_rate for group in updater.param_groups]  # of each group, over learning_rate
    scaler = torch.amp.GradScaler(place.type, enabled=compute_dtype == torch.float16)
    if state.get("model", {}) is None:
        from quartz import sharding

        sharding.load(state, raw_model, updater)
    elif "optimizer" in state:
        checkpoint.load_optimizer(updater, state)
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    iter_num, tokens_seen = state.get("iter_num", 0), state.get("tokens_seen", 0)
    best_val_loss, evaluated = state.get("best_val_loss", math.inf), state.get("evaluated", False)
    without_better = state.get("without_better", 0)  # evaluations in a row
    tokenizer_data, adapted = state.get("tokenizer") or meta["tokenizer"], state.get("lora")
    base = lora.fingerprint(raw_model.state_dict()) if adapted and is_writing else ""  # which never changes
    config = configurator.settings_of(globals()) | {name: getattr(raw_model.config, name) for name in _ARCHITECTURE}
    del state
    model = raw_model
    if not alone and not fsdp:
        model = torch.nn.parallel.DistributedDataParallel(
            raw_model, device_ids=[processes.local_rank] if place.type == "cuda" else None
        )
    micro_steps = gradient_accumulation_steps // processes.world_size  # of this process, in an update
    peak = machine.peak_flops(place, compute_dtype)

    def batch_at(split: shards.Split, starts: np.ndarray) -> list[torch.Tensor]:
        """Inputs and targets (B, T), and the targets' weights where the data set has some."""
        batch = [*split.windows(starts, T)]
        if split.is_weighted:
            batch.append(split.weights(starts, T))
        if place.type == "cuda":  # from pinned memory the copy runs while the GPU computes
            batch = [tensor.pin_memory() for tensor in batch]
        return [tensor.to(place, non_blocking=True) for tensor in batch]

    def training_starts(nth: int, count: int = 1) -> np.ndarray:
        """Where the windows begin of `count` micro-batches from the run's nth, all processes' counted."""
        rows = np.arange(nth * batch_size, (nth + count) * batch_size)
        return shards.training_starts(rows, len(splits["train"]), T, seed, splits["train"].row)

    def training_batch(nth: int) -> list[torch.Tensor]:
        return batch_at(splits["train"], training_starts(nth))

    def loss_of(network: torch.nn.Module, batch: list[torch.Tensor], divisor: float | None) -> torch.Tensor:
        with autocast:
            return network(*batch, divisor=divisor, return_logits=False)[1]

    @torch.no_grad()
    def estimate_loss() -> dict[str, float] | None:
        """The mean loss over fixed windows of each split, shared out among the processes; None where told to stop."""
        losses = {}
        raw_model.eval()
        for name, split in splits.items():
            batches = min(eval_iters, math.ceil((len(split) - 1) / (batch_size * T)))
            starts = shards.evaluation_starts(len(split), T, batches * batch_size, split.row)
            parts = [starts[first : first + batch_size] for first in range(0, len(starts), batch_size)]
            batches, divisor = len(parts), split.count_targets(starts, T) if split.is_weighted else None
            if divisor == 0:
                raise UserError(f"no token of {split.name} that is evaluated is a target: raise eval_iters")
            total = torch.zeros((), device=place)
            for first in range(0, batches, processes.world_size):
                if stopping and alone:
                    return None
                # One for each process; where the last ones leave some over, these repeat one and do not count it
                nth = first + processes.rank
                batch = batch_at(split, parts[min(nth, batches - 1)])
                total += loss_of(raw_model, batch, divisor) * (nth < batches)
            losses[name] = processes.sum(total).item() / (1 if split.is_weighted else batches)
        return losses

    def save(*names: str) -> None:
        contents = {
            "model_args": model_args,
            "iter_num": iter_num,
            "best_val_loss": best_val_loss,
            "config": config,
            "tokenizer": tokenizer_data,
            "scaler": scaler.state_dict(),
            "tokens_seen": tokens_seen,
            "evaluated": evaluated,
            "without_better": without_better,
            "versions": {"torch": str(torch.__version__), "python": sys.version.split()[0]},
        }
        if sharded_checkpoint:
            for name in names:
                path = (Path(out_dir) / name).with_suffix(".dcp")
                checkpoint.save_shards(path, contents, raw_model, updater, is_writing)
            return
        contents["model"] = ranks.gather(raw_model.state_dict(), processes)
        if adapted:
            contents["lora"] = adapted
            if is_writing and run_folder.BEST in names:  # what there is to pass on
                by_itself = {"model": lora.adapters(contents["model"]), "model_args": model_args, "lora": adapted}
                checkpoint.save(Path(out_dir) / run_folder.ADAPTER, {**by_itself, "base": base})
        contents["optimizer"] = ranks.gather(updater.state_dict(), processes)
        for name in names if is_writing else ():
            checkpoint.save(Path(out_dir) / name, contents)
            checkpoint.drop_other_forms(Path(out_dir) / name)

    wandb_run = start_wandb(config) if is_writing and wandb_log else None
    # Up to here anything may fail, and nothing has been written
    if stopping and alone:
        return
    if is_writing:
        if init_from != "resume":
            run_folder.set_aside(Path(out_dir))
        if "RANK" in os.environ:
            run_folder.began(out_dir, ranks.launch_id())
    if processes.is_master:
        print(f"tokens per iteration will be: {tokens_per_iter:,}")
        print(f"number of parameters: {raw_model.get_num_params() / 1e6:.2f}M")
        if adapted:
            print(
                f"of which are trained: {sum(p.numel() for p in raw_model.parameters() if p.requires_grad) / 1e6:.3f}M"
            )
        print(f"computing in {str(compute_dtype).removeprefix('torch.')} on {place}")
    log = Log(Path(out_dir) if is_writing else None, iter_num, evaluated, max_iters, wandb_run)
    nth = iter_num * gradient_accumulation_steps + processes.rank  # the micro-batch that comes next
    batch = None if eval_only else training_batch(nth)
    seconds = log.seconds  # in updates, since the run began
    told, timed = seconds, 0  # the seconds at the last log line, and the updates since
    held = f"what {out_dir} holds is from before: resume it with a lower learning_rate"
    stops = 0.0  # of how many signals all processes know: several have to stop together
    skipped = 0  # updates in a row
    while True:
        if eval_only or (not evaluated and (iter_num % eval_interval == 0 or iter_num >= max_iters)):
            losses = estimate_loss()
            if losses is not None:
                if not eval_only and not all(map(math.isfinite, losses.values())):
                    raise UserError(f"an evaluated loss is {losses} at iteration {iter_num}: the run diverged; {held}")
                improved = losses["val"] < best_val_loss
                best_val_loss, evaluated = min(best_val_loss, losses["val"]), True
                without_better = 0 if improved else without_better + 1
                if processes.is_master:
                    log.evaluation(iter_num, losses, get_lr(iter_num), tokens_seen, seconds)
                if not eval_only:
                    if is_writing:
                        print(f"saving checkpoint to {out_dir}")
                    is_best = iter_num > 0 and (improved or always_save_checkpoint)
                    save(*([run_folder.BEST] if is_best else []), run_folder.LAST)
                    log.draw()
        if evaluated and iter_num and (best_val_loss <= target_val_loss or 0 < patience <= without_better):
            if processes.is_master:
                print(f"stopping early: the best validation loss is {best_val_loss:.4f}")
            break
        if iter_num >= max_iters or eval_only or stops or (stopping and alone):
            break

        # One update: its data and its dropout depend on the seed, iter_num and the rank, and on no history
        began = time.perf_counter()
        raw_model.train()
        if raw_model.config.dropout:
            torch.manual_seed(shards.mix(seed, iter_num, processes.rank))
        lr = get_lr(iter_num)
        for group, rate in zip(updater.param_groups, peak_rates, strict=True):
            group["lr"] = lr * rate
            if "momentum" in group:
                group["momentum"] = optim.momentum_at(iter_num, muon_momentum)
        # With weights, the sum over all targets of the update is divided by their number, which the mask alone tells,
        # over that of processes, since gradients become their mean
        targets = divisor = None
        if splits["train"].is_weighted:
            first = iter_num * gradient_accumulation_steps
            targets = splits["train"].count_targets(training_starts(first, gradient_accumulation_steps), T)
            divisor = targets / processes.world_size
        # The mean loss of all micro-batches, the signals that came in, and for each rank whether its loss is no number
        loss = torch.zeros(2 + processes.world_size, device=place)
        for micro_step in range(micro_steps):
            if not alone:  # gradients travel once an update
                ranks.set_gradient_sync(model, micro_step == micro_steps - 1)
            micro_loss = loss_of(model, batch, divisor)
            if divisor is None:
                micro_loss = micro_loss / micro_steps
            nth += processes.world_size
            if micro_step + 1 < micro_steps or iter_num + 1 < max_iters:
                batch = training_batch(nth)  # while a GPU computes
            scaler.scale(micro_loss).backward()
            loss[0] += micro_loss.detach()
        scaler.unscale_(updater)
        grad_norm = ranks.whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
        loss[1], loss[2 + processes.rank] = len(stopping), ~loss[0].isfinite()
        # The one place in an update that waits for the GPU
        mean_loss, stops, *bad, grad_norm = torch.cat((processes.sum(loss), grad_norm.reshape(1))).tolist()
        mean_loss, bad_ranks = mean_loss / processes.world_size, [rank for rank, is_bad in enumerate(bad) if is_bad]
        fault = f"the loss of rank {', '.join(map(str, bad_ranks))} is not finite" if bad_ranks else ""
        if targets == 0:
            fault = "no token of the update is a target"
        if not fault and not scaler.is_enabled() and not math.isfinite(grad_norm):  # a scaler does this for itself
            fault = f"the gradient's norm is {grad_norm}"
        skipped = skipped + 1 if fault else 0
        if skipped > skip_bad_updates:
            raise UserError(
                f"{fault} at iteration {iter_num}: the run stopped before that update; {held}, or with skip_bad_updates"
            )
        if fault:
            print(f"warning: {fault} at iteration {iter_num}; this update is left out", file=sys.stderr)
        else:
            scaler.step(updater)
        scaler.update()  # after a fault too: it lowers the scale, and forgets that it has unscaled
        updater.zero_grad(set_to_none=True)
        tokens_seen += tokens_per_iter
        seconds += time.perf_counter() - began
        timed += 1

        if iter_num % log_interval == 0:
            each = (seconds - told) / timed  # seconds of an update
            sequences = gradient_accumulation_steps * batch_size / processes.world_size  # of this device
            mfu = raw_model.estimate_mfu(sequences, each, peak) if peak else None
            if processes.is_master:
                speed = (each * 1000, tokens_per_iter / each)
                log.iteration(iter_num, mean_loss, lr, grad_norm, *speed, mfu, tokens_seen, seconds)
            told, timed = seconds, 0
        iter_num, evaluated = iter_num + 1, False
        log.bar.update()

    if (stops if not alone else stopping) and not eval_only and not evaluated:
        if is_writing:
            print(f"stopped by a signal after {iter_num} iterations, saving checkpoint to {out_dir}")
        save(run_folder.LAST)
    log.close()


if __name__ == "__main__":
    with configurator.user_errors():
        main()
