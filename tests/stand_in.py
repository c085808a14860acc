"""A GPU that is none: what is computed on it is computed on the CPU, and it is kept track of where each tensor lies.

Within `gpu()` a program runs as on a machine with eight GPUs of CUDA, and what would fail there fails here: an
operation on tensors of two devices, or NumPy on a tensor of a GPU. Counted are the waits for a number of the GPU, and
the copies to it from memory that is not pinned. What happens within C++ alone, as in autograd's engine or in DDP's
buckets, is not seen.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from torch.cuda._utils import _get_device_index
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quartz import compiled, kernels

CPU = torch.device("cpu")
# May be given tensors of two devices
MIXING = {"copy_", "__setitem__", "__getitem__", "__set__", "set_", "_has_compatible_shallow_copy_type"}
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "is_nonzero", "equal"}
DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__


def place_of(tensor: torch.Tensor) -> torch.device:
    return getattr(tensor, "_lies_on", CPU)


def lay(result, place: torch.device):
    """Notes down where the tensors of a result lie."""
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor):
            tensor._lies_on = place
    return result


class StandIn(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits = self.unpinned = 0
        self.in_backward = False  # where tensors come from C++, and nobody has said where they lie

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        keywords, name = dict(keywords or {}), getattr(function, "__name__", "")
        tensors = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
        own = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        places = {place_of(tensor) for tensor in tensors}
        gpu = next((place for place in places if place != CPU), None)
        if function == DEVICE:
            return place_of(own)
        if function == IS_CUDA:
            return place_of(own) != CPU
        if name in ("to", "cpu", "cuda", "pin_memory"):
            return self.move(name, own, *arguments[1:], **keywords)
        if name in ("numpy", "__array__") and gpu:
            raise TypeError("can't convert a tensor of the GPU to numpy")
        if name in ("backward", "grad") and tensors:
            self.in_backward = True
        self.waits += name in WAITS and gpu is not None
        wanted = keywords.pop("device", None)
        wanted = torch.device(wanted) if wanted is not None else None
        matter = {place_of(t) for t in tensors if t.dim()} if name not in MIXING and not self.in_backward else ()
        if len(matter) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {matter}")
        try:
            result = function(*arguments, **keywords)
        finally:
            if name in ("backward", "grad"):
                self.in_backward = False
        if name == "__set__":
            return lay(own, place_of(arguments[1])) if isinstance(arguments[1], torch.Tensor) else result
        return lay(result, wanted or (place_of(own) if name in MIXING else gpu) or CPU)

    def move(self, name: str, own: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
        """Tensor.to and its like."""
        given = [*arguments, *keywords.values()]
        wanted = next((torch.device(a) for a in given if isinstance(a, str | torch.device)), None)
        wanted = next((place_of(a) for a in given if isinstance(a, torch.Tensor)), wanted)
        wanted = CPU if name == "cpu" else wanted or place_of(own)
        dtype = next((a for a in given if isinstance(a, torch.dtype)), own.dtype)
        if name == "pin_memory":
            assert place_of(own) == CPU, "only memory of the CPU can be pinned"
            result = lay(own.clone(), CPU)
            result._is_pinned = True
            return result
        moves = wanted != place_of(own)
        if moves and wanted == CPU:
            self.waits += 1
        if moves and wanted != CPU and own.dim() and not getattr(own, "_is_pinned", False):
            self.unpinned += 1
        result = own.to(dtype)
        return lay(result.clone() if result is own and (moves or keywords.get("copy")) else result, wanted)


class Graph:
    """Of torch.cuda.CUDAGraph: replays nothing."""

    def replay(self) -> None:
        raise AssertionError("say what it computes")


@contextlib.contextmanager
def gpu(index: int = 0) -> Iterator[StandIn]:
    """The current device is cuda:index."""
    made = nn.Parameter.__new__

    def parameter(kind, data=None, requires_grad=True):
        return made(kind, data, requires_grad) if data is None else lay(made(kind, data, requires_grad), place_of(data))

    grouped = clip_grad._group_tensors_by_device_and_dtype

    def by_place(lists, *rest):
        found = grouped(lists, *rest).items()
        return {(place_of(its[0][0][0]), dtype): its for (_, dtype), its in found}

    properties = mock.Mock(total_memory=2**36, multi_processor_count=132)
    stands = {
        "is_available": lambda: True, "device_count": lambda: 8, "current_device": lambda: index,
        "set_device": mock.Mock(side_effect=_get_device_index), "is_bf16_supported": lambda **_: True,
        "get_device_name": lambda *_: "NVIDIA H200",
        "mem_get_info": lambda *_: (2**36, 2**37), "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties, "_lazy_init": lambda: None, "synchronize": lambda *_: None,
        "Stream": mock.Mock(), "stream": lambda _: contextlib.nullcontext(), "current_stream": mock.Mock(),
        "memory_allocated": lambda *_: 2**30, "max_memory_allocated": lambda *_: 2**31,
        "reset_peak_memory_stats": lambda *_: None, "set_sync_debug_mode": lambda _: None,
        "CUDAGraph": Graph, "graph": lambda _, **__: contextlib.nullcontext(), "empty_cache": lambda: None,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, its in stands.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, its))
        stack.enter_context(mock.patch.object(nn.Parameter, "__new__", parameter))
        stack.enter_context(mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", by_place))
        # What autograd's engine computes anew seems to lie on the CPU, and would go another way than before
        stack.enter_context(mock.patch.object(kernels, "in_c", lambda: None))
        yield stack.enter_context(StandIn())


@contextlib.contextmanager
def graphs(index: int = 3) -> Iterator[StandIn]:
    """A graph that is replayed computes anew what it was captured for; nothing in that waits, which no graph may."""
    capture, compute = compiled.GraphedStep.capture, compiled.GraphedStep.compute

    def captured(self, cache):
        capture(self, cache)
        self.graph.replay = lambda: self.logits.copy_(self.compute())

    def computed(self):
        before = mode.waits
        logits = compute(self)
        assert mode.waits == before
        return logits

    with contextlib.ExitStack() as stack:
        mode = stack.enter_context(gpu(index))
        stack.enter_context(mock.patch.object(compiled.GraphedStep, "capture", captured))
        stack.enter_context(mock.patch.object(compiled.GraphedStep, "compute", computed))
        yield mode
