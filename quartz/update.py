"""One update's end: what all ranks agree on, and then a step of the optimizer, or none.

Read it when a run stops, or leaves an update out; or to write another loop that trains. It is where an update waits for
the GPU and for the other ranks, once.
"""

import math
import signal
from typing import NamedTuple

import torch

from quartz import kernels, ranks


class Signals:
    """Counts SIGINT and SIGTERM from here on, for a loop that ends at the border of an update. A second one of a kind
    ends the process at once.
    """

    def __init__(self):
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.count += 1
        signal.signal(number, signal.SIG_DFL)


class Ended(NamedTuple):
    """How an update ended, in the same words on every rank."""

    loss: float  # the mean over the ranks
    grad_norm: float  # before clipping
    stops: int  # signals that came in on all ranks so far
    fault: str  # why the optimizer made no step; "" where it did


def end(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: torch.Tensor,
    grad_clip: float,
    signals: Signals,
    processes: ranks.Processes,
    fault: str = "",
) -> Ended:
    """Clips the gradients that `optimizer` has, lets it step unless something is wrong, and forgets them.

    loss (): this rank's, with gradients that are already the mean over the ranks, scaled by `scaler`. grad_clip: the
    norm to which they are scaled down, 0 for none. fault: what the caller knows to be wrong on every rank. A loss or a
    gradient that is not finite is one; a gradient under a float16 scaler is not, since the scaler passes over it.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = ranks.whole(kernels.clip_grad_norm(parameters, grad_clip or math.inf))
    told = torch.zeros(1 + processes.world_size, device=loss.device)  # signals, and each rank's loss in its own place
    told[0], told[1 + processes.rank] = signals.count, loss
    stops, *losses, grad_norm = torch.cat((processes.sum(told), grad_norm.reshape(1))).tolist()
    if not fault and (bad_ranks := [rank for rank, its in enumerate(losses) if not math.isfinite(its)]):
        fault = f"the loss of rank {', '.join(map(str, bad_ranks))} is not finite"
    if not fault and not scaler.is_enabled() and not math.isfinite(grad_norm):
        fault = f"the gradient's norm is {grad_norm}"
    if not fault:
        scaler.step(optimizer)
    scaler.update()  # after a fault too: it lowers the scale, and forgets that it has unscaled
    optimizer.zero_grad(set_to_none=True)
    return Ended(sum(losses) / processes.world_size, grad_norm, int(stops), fault)
