"""The processes that share a run's work: how they start, what they exchange, and how they end.

Read it when a run has several processes. Without torchrun there is one, and most of what is here does nothing.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from quartz.errors import UserError
from quartz.machine import pick_device

LOST_RANK = ("Connection", "connection", "gloo", "NCCL", "Socket", "socket", "Broken pipe")  # of errors of dist's


class Processes(NamedTuple):
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def start_processes(device: str, backend: str) -> tuple[Processes, torch.device]:
    """Joins torchrun's process group, if there is one, and picks this process's device.

    backend is used on CUDA; other devices talk through gloo.
    """
    if "RANK" not in os.environ:
        return Processes(), pick_device(device)
    processes = Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    found = pick_device(device)
    if found.type == "cuda":
        found = pick_device(f"cuda:{processes.local_rank}")
        torch.cuda.set_device(found)
    else:
        backend = "gloo"
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun's store outlives its restarts, and with it the addresses of processes that are gone
        store = dist.PrefixStore(f"attempt {attempt()}", store)
        # Bound to its device NCCL connects at once, and need not guess at a barrier; gloo can't be
        bound = found if found.type == "cuda" and "nccl" in backend else None
        with output_as_remarks():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"backend={backend} could not start: {error}") from error
    return processes, found


@contextlib.contextmanager
def output_as_remarks() -> Iterator[None]:
    """What is printed goes to standard error, from C++ too: gloo of torch 2.9 tells there who is connected."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def check_share(gradient_accumulation_steps: int) -> None:
    """Raises UserError where the micro-batches of an update can't be shared out evenly."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps ({gradient_accumulation_steps}) counts over all processes, and must be a "
            f"multiple of their number ({world_size})"
        )


def replicated(model: torch.nn.Module, processes: Processes) -> torch.nn.Module:
    """The model for several processes that each hold all of it: gradients become their mean (DDP)."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.nn.parallel.DistributedDataParallel(model, [processes.local_rank] if on_gpu else None)


def set_gradient_sync(model: torch.nn.Module, wanted: bool) -> None:
    """Whether the next backward passes exchange gradients among the processes."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's
        model.set_requires_gradient_sync(wanted)
    else:
        model.require_backward_grad_sync = wanted


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. That class is not named, since importing it takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be divided among the processes, put together on each of them. All have to call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be divided, in the same memory."""
    return tensor.to_local() if is_divided(tensor) else tensor


def divided_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on all processes, divided among them as `model` is."""
    if not is_divided(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(model.device)
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)  # each takes its own part


def any_of(value: bool, device: torch.device) -> bool:
    """Whether it is true on any process; waits for all of them."""
    flag = torch.tensor(float(value), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    return flag.item() > 0


def gather(state: dict, processes: Processes) -> dict:
    """A state dict with its divided tensors put together, one after the other, in the master's main memory."""
    gathered = {}
    for key, value in state.items():
        if isinstance(value, dict):
            value = gather(value, processes)
        elif torch.is_tensor(value) and is_divided(value):
            value = whole(value)
            value = value.cpu() if processes.is_master else None
        gathered[key] = value
    return gathered


def stop_processes() -> None:
    """Ends this process, if it is one of several, together with the others: who left earlier would break their work.

    It ends at once: left to the interpreter's own end, threads of the process group abort it now and then. gloo's group
    is not taken down before, since its threads may be reading what that frees; the system closes its sockets.
    """
    if dist.is_initialized():
        dist.barrier()  # raises where another process has died
        if dist.get_backend() != "gloo":
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def launch_id() -> str:
    """What torchrun's restarts of a run have in common: its run id, else the process that starts the workers."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"process {os.getppid()}"


def attempt() -> int:
    """How often torchrun has restarted the workers: above 0, this process is in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextlib.contextmanager
def lost_ranks_named(processes: Processes) -> Iterator[None]:
    """Turns what a communication says when another rank is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if processes.world_size == 1 or not any(sign in text for sign in LOST_RANK):
            raise
        first = text.strip().splitlines()[0]
        raise UserError(
            f"rank {processes.rank} lost another rank ({first}): see above which one failed, then resume"
        ) from error
