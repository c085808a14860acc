"""Where a run computes: device, precision, compilation, and the processes that share the work."""

import contextlib
import ctypes
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from configurator import UserError, check
from model import GPT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LOST_RANK = ("Connection", "connection", "gloo", "NCCL", "Socket", "socket", "Broken pipe")  # of errors of dist's
# Dense 16-bit matrix peak of a device in FLOP/s, by a part of its name (makers' data sheets); the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


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
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"backend={backend} could not start: {error}") from error
    return processes, found


def set_deterministic(wanted: bool) -> None:
    """Asks for kernels that give the same bits each time, at some cost on GPUs; an operation that has none raises."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if wanted != torch.are_deterministic_algorithms_enabled():  # a call loads torch.compile's parts, for a second
        torch.use_deterministic_algorithms(wanted)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed, rather than to return it and have it mapped anew in every step.

    Nothing happens with another C library. Blocks over 32 MiB, its limit, still come and go.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, -1)


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

    It ends at once. Left to the interpreter's own end, threads of the process group abort it now and then.
    """
    if dist.is_initialized():
        dist.barrier()
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


def pick_device(name: str) -> torch.device:
    """The device of that name; for 'auto' the first there is of cuda, mps and cpu. Raises UserError for any other."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if not there[kind]:
        raise UserError(f"device {name!r} is not there: this machine or this build of torch has no {kind}; try cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and int(index) >= count:
        raise UserError(f"device {name!r} is not there: the last one is {kind}:{count - 1}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name, of DTYPES; for 'auto' bfloat16 where the device computes in it, else float32."""
    has_bfloat16 = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: False,  # not tried on such a machine yet
        "cpu": cpu_has_bfloat16,
    }[device.type]
    if name == "auto":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype 'float16' needs a GPU: on a cpu use bfloat16 or float32")
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16():
        raise UserError(f"dtype 'bfloat16' is not in {torch.cuda.get_device_name(device)}: use float16 or float32")
    return DTYPES[name]


def check_machine(device: str, dtype: str) -> None:
    """Raises one UserError with what is wrong in either name, or in the two together."""
    known = dtype in ("auto", *DTYPES)
    rule = (known, f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    check([rule], [lambda: pick_dtype(dtype if known else "auto", pick_device(device))])


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), rather than by emulation."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "avx512_bf16" in features or "amx_bf16" in features:
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return any(getattr(torch.cpu, f"_is_{part}_supported", bool)() for part in ("avx512_bf16", "amx_tile"))


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype`, weights and sums in float32; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compile_model(model: GPT, device: torch.device) -> None:
    """Compiles the model's blocks, in place, which keeps its state-dict keys. Warns where there is no compiler.

    The blocks share one piece of compiled code, so that depth costs no compile time. The embeddings stay out: compiled
    for a CPU, their gradient is summed by atomic additions in whatever order, and no two runs would be equal.
    """
    why = why_no_compiler(device)
    if why:
        print(f"warning: compile=True is not possible ({why}); going on without", file=sys.stderr)
        return
    for block in model.transformer.h:
        block.compile()


def why_no_compiler(device: torch.device) -> str:
    """What is missing to compile for the device; empty if nothing is."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "the triton package is missing or does not know this GPU"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:  # each platform has its own
            return "no C++ compiler is installed, or CXX names none"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "Python's header files are not installed"
    return ""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's matrix peak in FLOP/s at 16 bits; None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def memory_speed(device: torch.device) -> float:
    """Bytes/s that the device reads from its memory: a sum over half a gibibyte, the best of five."""
    data, times = torch.ones(2**27, device=device), []
    for _ in range(5):
        began = time.perf_counter()
        data.sum().item()  # which waits for a GPU
        times.append(time.perf_counter() - began)
    return data.numel() * data.element_size() / min(times)
