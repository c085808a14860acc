"""Models that are divided among processes (FSDP2), and checkpoints in shards (DCP), to which each writes its own part.

Imported where it is called: it takes a second, and most runs have one process.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from model import GPT
from quartz import ranks, untrusted
from quartz.errors import UserError, os_error
from quartz.optim import moment_names


def divide(model: GPT, device: torch.device) -> None:
    """Divides the model's parameters among all processes, each block by itself, in place.

    A block is gathered on its device only while it computes. Gradients, and the optimizer's state that is made of the
    parameters, are divided likewise. Needs a process group.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class _Writer(dcp.FileSystemWriter):
    """DCP's own, but a rank tells the others what the operating system said: what stands behind an error would not
    travel with it."""

    def write_data(self, *arguments):
        try:
            return super().write_data(*arguments)
        except Exception as error:
            raise os_error(error) or error from error


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Writes weights and moments into `folder`; returns the counts of steps by parameter.

    All processes have to call it. Raises UserError where a tensor is not finite, on all of them OSError where the disk
    refuses.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # after an evaluation, parameters outside of blocks are still whole
    tensors = _tensors(model, optimizer)
    bad = [name for name, tensor in tensors.items() if not ranks.own_part(tensor).isfinite().all()]
    if ranks.any_of(bool(bad), next(model.parameters()).device):  # which also waits for all
        which = ", ".join(bad) or "a tensor of another rank"
        raise UserError(f"the run diverged: {which} is not finite; what {folder.parent} holds was left as it was")
    try:
        dcp.save(tensors, storage_writer=_Writer(folder))
    except CheckpointException as error:  # which is no Exception
        faults = [fault for fault, _ in error.failures.values()]
        raise next(filter(None, map(os_error, faults)), faults[0]) from error
    moved = [(name, optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state[p]]
    return {name: float(its.get("step", 0)) for name, its in moved}


def load(state: dict, model: GPT, optimizer: torch.optim.Optimizer | None) -> None:
    """Reads weights and moments, in place, from the folder that `state` was loaded from, however many wrote it.

    Without an optimizer the weights alone. Raises UserError where the folder lacks something.
    """
    try:
        untrusted.check_dcp_metadata(state["path"])
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{state['path']} is damaged or not whole: its .metadata can't be read ({error})") from error
    steps = state["steps"] if optimizer else {}
    for group in optimizer.param_groups if steps else ():
        for name, p in zip(group["param_names"], group["params"], strict=True):
            step = torch.tensor(steps[name], device=p.device)
            optimizer.state[p] = {key: step if key == "step" else torch.zeros_like(p) for key in moment_names(group)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that without a process group there is one process is meant so
            dcp.load(_tensors(model, optimizer), checkpoint_id=state["path"])
    except (CheckpointException, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{state['path']} does not hold what this run needs: {str(error).strip().splitlines()[-1][:300]}"
        ) from error


def _tensors(model: GPT, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters() if optimizer else ():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items() if key != "step"}
    return tensors
