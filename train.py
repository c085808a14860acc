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
activation_checkpointing = False  # keep less for the backward pass and compute it again: a third slower, for small GPUs
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
fp8 = False  # multiply in 8 bits in the blocks, on GPUs that can (H100 and later): pays for large models, compiled
compile = True  # compile the model with torch.compile; on GPUs
seed = 1337  # of the weights, the order of the data, and dropout
deterministic = False  # the same bits in each run on a GPU too; slower
skip_bad_updates = 0  # so many updates in a row without a finite loss and gradient are left out; one more stops the run
# ----------------------------------------------------------------------------------------------------------------------
_given = configurator.configure(globals())

import contextlib
import functools
import math
import os
import sys
import time
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, float8, kernels, lora, machine, optim, ranks, run_folder, shards, sources, update
from quartz.log import Log, start_wandb, tell_beginning


def check_settings() -> None:
    """Raises one UserError with everything that is wrong in the settings, before anything is loaded."""
    rules = configurator.ranges(globals()) + [(False, line) for line in model_config(1).problems()]
    rules += [
        (not token_budget or "max_iters" not in _given, "token_budget and max_iters both say how long: give one"),
        (not fsdp or "RANK" in os.environ, "fsdp divides a model among processes: start them with torchrun"),
        (not fsdp or dtype != "float16", "fsdp has no gradient scaler: take dtype=bfloat16, or float32"),
        (fsdp or not sharded_checkpoint, "sharded_checkpoint is of runs with fsdp=True"),
        (not lora_rank or init_from != "scratch", "lora_rank adapts a model that exists: name one with init_from"),
        (not lora_rank or (optimizer == "adamw" and not fsdp), "lora_rank takes optimizer=adamw, and no fsdp"),
        (not decay_lr or warmup_iters != lr_decay_iters, "warmup_iters is lr_decay_iters: there is no time to decay"),
    ]
    looks = [
        lambda: ranks.check_share(gradient_accumulation_steps),
        lambda: sources.check(init_from, out_dir, scratch=True),
        lambda: shards.find(dataset),
        lambda: machine.check_machine(device, dtype, fp8),
        lambda: optim.multipliers(lr_multipliers),
    ]
    if not eval_only and not (init_from == "resume" and not os.path.isdir(out_dir)):
        looks.append(lambda: run_folder.prepare_folder(out_dir))
    configurator.check(rules, looks)


def model_config(vocab_size: int) -> GPTConfig:
    qwen3 = {"arch": arch, "n_kv_head": n_kv_head, "tie_embeddings": tie_embeddings}
    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, **qwen3)


def load_model(begin: str, meta: dict) -> tuple[GPT, dict]:
    """The model that `begin`, an init_from, asks for, and what else its checkpoint holds, {} where there is none."""
    if begin == "scratch":
        shards.check_row(meta["row"], block_size)
        return GPT(model_config(shards.vocabulary_rows(meta))), {}
    return sources.to_train(begin, configurator.settings_of(globals()), _given, meta["tokenizer"])


def make_optimizer(model: GPT, place: torch.device, compute_dtype: torch.dtype) -> torch.optim.Optimizer:
    betas = (beta1, beta2)
    if optimizer == "adamw":
        updater = optim.adamw_of(model, weight_decay, learning_rate, betas, place.type)
    else:
        rates = {"matrix": muon_lr, "embedding": embedding_lr, "head": head_lr, "vector": learning_rate}
        updater = optim.muon(model, rates, muon_momentum, betas, weight_decay, compute_dtype)
    optim.refine(updater, model, optim.multipliers(lr_multipliers), no_decay)
    return updater


def run_length(tokens_per_iter: int) -> tuple[int, int]:
    """The updates in all, and the one at which min_lr is reached."""
    if not token_budget:
        return max_iters, lr_decay_iters
    iters = math.ceil(token_budget / tokens_per_iter)
    return iters, lr_decay_iters if "lr_decay_iters" in _given else iters


def get_lr(iteration: int, decay_iters: int) -> float:
    """Linear warm-up, then from learning_rate down to min_lr: along a cosine (Loshchilov and Hutter, 2017), or constant
    and at last along a line (Hu et al., 2024: warm-up, stable, decay).
    """
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration > decay_iters:
        return min_lr
    if schedule == "wsd":
        left = (decay_iters - iteration) / (decay_fraction * decay_iters)
        return min_lr + min(1.0, left) * (learning_rate - min_lr)
    progress = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss(model: GPT, splits: dict, T: int, autocast, place, processes, signals) -> dict[str, float] | None:
    """The mean loss over fixed windows of each split, shared out among the processes; None where told to stop."""
    losses, rows = {}, shards.EVALUATED_AT_ONCE // T if place.type == "cpu" else 0  # a GPU has compiled micro-batches
    model.eval()
    for name, split in splits.items():
        parts, divisor = split.evaluation_batches(eval_iters, batch_size, T, max(batch_size, rows))
        total = torch.zeros((), device=place)
        for first in range(0, len(parts), processes.world_size):
            if signals.count and processes.world_size == 1:
                return None
            # One for each process; where the last ones leave some over, these repeat one and do not count it
            nth = first + processes.rank
            batch = machine.send(split.batch(parts[min(nth, len(parts) - 1)], T), place)
            with autocast:
                loss = model(*batch, divisor=divisor, return_logits=False)[1]
            total += loss * (nth < len(parts))
        losses[name] = processes.sum(total).item()
    model.train()
    return losses


def main() -> None:
    check_settings()
    machine.keep_freed_memory()
    machine.set_deterministic(deterministic)
    processes, place = ranks.start_processes(device, backend)
    is_writing = processes.is_master and not eval_only
    claim = run_folder.claimed(out_dir) if is_writing else contextlib.nullcontext()
    with ranks.lost_ranks_named(processes), claim:
        begin = run_folder.after_restart(out_dir, init_from, is_writing, place)
        train(processes, place, begin)
        ranks.stop_processes()


def train(processes: ranks.Processes, place: torch.device, begin: str) -> None:
    """A run, from `begin`, which is init_from or after a restart resume, to its end."""
    compute_dtype = machine.pick_dtype(dtype, place)
    autocast = machine.autocast(place, compute_dtype)
    alone, is_writing = processes.world_size == 1, processes.is_master and not eval_only
    signals = update.Signals()

    # Data and model
    torch.manual_seed(seed)
    folder = shards.find(dataset)
    meta = shards.load_meta(folder)
    raw_model, state = load_model(begin, meta)
    T = shards.window_length(meta["row"], raw_model.config.block_size)
    splits = {name: shards.Split(folder, name, meta, raw_model.config.vocab_size) for name in ("train", "val")}
    configurator.check([], [functools.partial(split.check_length, T) for split in splits.values()])
    tokens_per_iter = gradient_accumulation_steps * batch_size * T
    iters, decay_iters = run_length(tokens_per_iter)
    config = configurator.settings_of(globals()) | {"max_iters": iters, "lr_decay_iters": decay_iters}
    config |= sources.settled(raw_model, state)
    sources.tell_changes(config, state)
    kernels.install(raw_model)
    float8.install(raw_model, fp8)
    raw_model.activation_checkpointing = activation_checkpointing
    machine.compile_model(raw_model, place, compile)
    if fsdp:
        from quartz import sharding

        sharding.divide(raw_model, place)
    raw_model.to(place)
    model = raw_model if alone or fsdp else ranks.replicated(raw_model, processes)

    # Optimizer, and where the run stands
    updater = make_optimizer(raw_model, place, compute_dtype)
    peak_rates = [group["lr"] / learning_rate for group in updater.param_groups]  # of each group, over learning_rate
    scaler = torch.amp.GradScaler(place.type, enabled=compute_dtype == torch.float16)
    checkpoint.restore(raw_model, updater, scaler, state)
    progress = checkpoint.Progress.of(state)
    plain = {"model_args": raw_model.config.to_args(), "config": config}
    plain["tokenizer"] = state.get("tokenizer") or meta["tokenizer"]
    adapted = state.get("lora")
    del state
    save = functools.partial(
        run_folder.save, out_dir, plain, raw_model, updater, scaler, processes,
        is_writing=is_writing, in_shards=sharded_checkpoint, adapted=adapted,
        base=lora.fingerprint(raw_model.state_dict()) if adapted and is_writing else "",  # which never changes
    )  # fmt: skip
    wandb_run = start_wandb(wandb_project, wandb_run_name, config) if is_writing and wandb_log else None
    # Up to here anything may fail, and nothing has been written
    if signals.count and alone:
        return
    if is_writing:
        run_folder.begin(out_dir, is_new=begin != "resume")
    if processes.is_master:
        tell_beginning(raw_model, tokens_per_iter, compute_dtype, place)
    sequences = gradient_accumulation_steps * batch_size / processes.world_size  # of this device, in an update
    peak = machine.peak_flops(place, compute_dtype)
    flops_share = raw_model.estimate_mfu(sequences, 1.0, peak) if peak else None
    log_dir = Path(out_dir) if is_writing else None
    log = Log(log_dir, processes.is_master, progress, iters, tokens_per_iter, flops_share, wandb_run)
    micro_steps = gradient_accumulation_steps // processes.world_size  # of this process, in an update
    nth = progress.iter_num * gradient_accumulation_steps + processes.rank  # the micro-batch that comes next
    micro_batches = shards.MicroBatches(splits["train"], batch_size, T, seed)
    batch = None if eval_only else machine.send(micro_batches.read(nth), place)
    stops, skipped = 0, 0  # signals that all ranks know of, since several have to stop together; faults in a row
    held = f"what {out_dir} holds is from before: resume it with a lower learning_rate"

    while True:
        # Evaluate, and save
        iter_num = progress.iter_num
        if eval_only or (not progress.evaluated and (iter_num % eval_interval == 0 or iter_num >= iters)):
            losses = estimate_loss(raw_model, splits, T, autocast, place, processes, signals)
            if losses is not None:
                if not eval_only and not all(map(math.isfinite, losses.values())):
                    raise UserError(f"an evaluated loss is {losses} at iteration {iter_num}: the run diverged; {held}")
                is_better = progress.evaluate(losses["val"])
                log.evaluation(iter_num, losses, get_lr(iter_num, decay_iters), progress.tokens_seen)
                if not eval_only:
                    if is_writing:
                        print(f"saving checkpoint to {out_dir}")
                    is_best = iter_num > 0 and (is_better or always_save_checkpoint)
                    save(progress, [*([run_folder.BEST] if is_best else []), run_folder.LAST])
                    log.draw()

        # The end, or on
        if progress.is_enough(target_val_loss, patience):
            if processes.is_master:
                print(f"stopping early: the best validation loss is {progress.best_val_loss:.4f}")
            break
        if iter_num >= iters or eval_only or stops or (signals.count and alone):
            break

        # Batch: data and dropout depend on the seed, iter_num and the rank, and on no history
        began = time.perf_counter()
        if raw_model.config.dropout:
            torch.manual_seed(shards.mix(seed, iter_num, processes.rank))
        lr = get_lr(iter_num, decay_iters)
        optim.set_rates(updater, [lr * rate for rate in peak_rates], optim.momentum_at(iter_num, muon_momentum))
        targets = micro_batches.count_targets(iter_num * gradient_accumulation_steps, gradient_accumulation_steps)

        # Loss and backward. Gradients become their mean over the processes, so a sum of theirs is divided by a share
        loss = torch.zeros((), device=place)
        for micro_step in range(micro_steps):
            if not alone:  # gradients travel once an update
                ranks.set_gradient_sync(model, micro_step == micro_steps - 1)
            with autocast:
                divisor = None if targets is None else targets / processes.world_size
                micro_loss = model(*batch, divisor=divisor, return_logits=False)[1]
            if targets is None and micro_steps > 1:  # the mean of means
                micro_loss = micro_loss / micro_steps
            nth += processes.world_size
            if micro_step + 1 < micro_steps or iter_num + 1 < iters:
                batch = machine.send(micro_batches.read(nth), place)  # while a GPU computes
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # Agree, and step
        fault = "no token of the update is a target" if targets == 0 else ""
        ended = update.end(updater, scaler, loss, grad_clip, signals, processes, fault)
        stops, skipped = ended.stops, skipped + 1 if ended.fault else 0
        if skipped > skip_bad_updates:
            told_fault = f"{ended.fault} at iteration {iter_num}: the run stopped before that update"
            raise UserError(f"{told_fault}; {held}, or with skip_bad_updates")
        if ended.fault:
            print(f"warning: {ended.fault} at iteration {iter_num}; this update is left out", file=sys.stderr)
        progress.update(tokens_per_iter)

        # Log
        log.update(time.perf_counter() - began)
        if iter_num % log_interval == 0:
            log.iteration(iter_num, ended.loss, lr, ended.grad_norm, progress.tokens_seen)

    if (stops if not alone else signals.count) and not eval_only and not progress.evaluated:
        if is_writing:
            print(f"stopped by a signal after {progress.iter_num} iterations, saving checkpoint to {out_dir}")
        save(progress, [run_folder.LAST])
    log.close()


if __name__ == "__main__":
    with configurator.user_errors():
        main()
