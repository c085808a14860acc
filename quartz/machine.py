"""Where a run computes: device, precision, memory, compilation. Read it when that is not what you meant."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model import GPT
from quartz import kernels
from quartz.errors import UserError, check

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX, MADV_HUGEPAGE = -1, -4, -8, 14  # of malloc.h and sys/mman.h
HUGE_PAGE = 2**21

# Dense 16-bit matrix peak of a device in FLOP/s, by a part of its name (makers' data sheets); the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 836e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}
# Likewise, bytes/s that it reads from its memory
PEAK_MEMORY_SPEED = {
    "B200": 8e12,
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 1.555e12,
}


def set_deterministic(wanted: bool) -> None:
    """Asks for kernels that give the same bits each time, at some cost on GPUs; an operation that has none raises."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if wanted != torch.are_deterministic_algorithms_enabled():  # a call loads torch.compile's parts, for a second
        torch.use_deterministic_algorithms(wanted)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed, rather than to have it mapped anew in every step, and to lie in huge
    pages where the system lets programs ask for them.

    A processor looks up one page of 2 MiB where it would look up 512 of 4 KiB. In a virtual machine, where that takes
    two walks, going over all weights takes up to a third less time so. Half of what is free is set aside as addresses;
    memory it becomes when something is written there. Nothing happens with another C library, or where addresses are
    limited.
    """
    library = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(library, "gnu_get_libc_version"):
        return
    for setting, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
        library.mallopt(setting, value)
    if not _has_limits():
        _ask_for_huge_pages(library, (available_memory(torch.device("cpu")) or 0) // 2)


def give_back_memory() -> None:
    """Gives the system what is free after a model was made ready, which `keep_freed_memory` keeps."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _has_limits() -> bool:
    import resource

    limits = resource.RLIMIT_AS, resource.RLIMIT_DATA
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


def _ask_for_huge_pages(library: ctypes.CDLL, size: int) -> None:
    """Grows malloc's memory by addresses for `size` bytes, and asks for huge pages there."""
    for function, result, *arguments in (
        (library.malloc, ctypes.c_void_p, ctypes.c_size_t),
        (library.free, None, ctypes.c_void_p),
        (library.sbrk, ctypes.c_void_p, ctypes.c_ssize_t),
        (library.madvise, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    ):
        function.restype, function.argtypes = result, arguments
    begin = -(-library.sbrk(0) // HUGE_PAGE) * HUGE_PAGE
    library.free(library.malloc(size))  # where the system refuses, malloc returns a null, which free takes
    if (end := library.sbrk(0) // HUGE_PAGE * HUGE_PAGE) > begin:
        library.madvise(begin, end - begin, MADV_HUGEPAGE)


class _NoNumbers(TorchFunctionMode):
    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Builds networks without memory for their weights, which cost nothing so, and have no values. Nor are random
    numbers drawn for them: torch loads its compiler for that, and takes seconds.
    """
    with torch.device("meta"), _NoNumbers():
        yield


def pick_device(name: str) -> torch.device:
    """The device of that name; for 'auto' the first there is of cuda, mps and cpu. Raises UserError for any other.

    One of CUDA always has its number, without which torch.cuda.set_device refuses it.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = next(kind for kind, available in there.items() if available) if name == "auto" else name
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if not there[kind]:
        raise UserError(f"device {name!r} is not there: this machine or this build of torch has no {kind}; try cpu")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and int(index) >= count:
        raise UserError(f"device {name!r} is not there: the last one is {kind}:{count - 1}")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(name)


def sampling_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to sample in: as pick_dtype, but float32 on CPUs unless another is asked for."""
    return torch.float32 if name == "auto" and device.type == "cpu" else pick_dtype(name, device)


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


def check_machine(device: str, dtype: str, fp8: bool = False) -> None:
    """Raises one UserError with what is wrong in either name, or in the two together; or where fp8 is wanted, and the
    device has none.
    """
    known = dtype in ("auto", *DTYPES)

    def look() -> None:
        place = pick_device(device)
        computed = pick_dtype(dtype if known else "auto", place)
        if fp8 and not has_fp8(place):
            raise UserError(
                f"fp8=True needs a GPU of compute capability 8.9 or more, which {place} is not: leave it out"
            )
        if fp8 and computed != torch.bfloat16:
            raise UserError(f"fp8=True goes with dtype=bfloat16, not {dtype}")

    check([(known, f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")], [look])


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies numbers of 8 bits, e4m3 and e5m2 as the OCP has them, in hardware."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX), rather than by emulation."""
    return _cpu_has("avx512_bf16", "avx512_bf16") or cpu_has_amx()


def cpu_has_amx() -> bool:
    """Whether the CPU multiplies whole tiles of bfloat16, which libraries do and quartz's C does not."""
    return _cpu_has("amx_bf16", "amx_tile")


def _cpu_has(feature: str, before: str) -> bool:
    """`before`: what releases of torch without a table of features ask for."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features[feature] if feature in features else getattr(torch.cpu, f"_is_{before}_supported", bool)())


def send(batch: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The batch on the device; to a GPU from pinned memory, so that the copy runs while it computes."""
    if device.type == "cuda":
        batch = [tensor.pin_memory() for tensor in batch]
    return [tensor.to(device, non_blocking=True) for tensor in batch]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype`, weights and sums in float32; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compile_model(model: GPT, device: torch.device, wanted: bool = True) -> None:
    """Compiles the model's blocks, in place, which keeps its state-dict keys, if it is `wanted`. Warns where there is
    no compiler.

    The blocks share one piece of compiled code, so that depth costs no compile time. Not on CPUs: what kernels.py has
    installed is faster there, and takes no time to compile.
    """
    if not wanted:
        return
    if why := why_no_compiler(device):
        print(f"warning: compile=True is not possible ({why}); going on without", file=sys.stderr)
        return
    if device.type != "cpu":
        for block in model.transformer.h:
            block.compile()


def why_no_compiler(device: torch.device) -> str:
    """What is missing to compile for the device; empty if nothing is."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "the triton package is missing or does not know this GPU"
    if device.type == "cpu" and sys.platform == "linux" and kernels.in_c() is None:
        return "there is no C compiler, or CC names none"
    return ""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's matrix peak in FLOP/s at 16 bits; None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return _by_name(PEAK_FLOPS, device)


def peak_memory_speed(device: torch.device) -> float | None:
    """Bytes/s that the device reads from its memory, as its maker says; None where it is not known."""
    return _by_name(PEAK_MEMORY_SPEED, device) if device.type == "cuda" else None


def _by_name(figures: dict[str, float], device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((figure for part, figure in figures.items() if part in name), None)


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
    """Bytes/s that the device reads from its memory: a sum over half a gibibyte, the best of five; on a GPU over 4 GiB,
    beside which the launch and the wait count little."""
    data, times = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device), []
    for _ in range(5):
        began = time.perf_counter()
        data.sum().item()  # which waits for a GPU
        times.append(time.perf_counter() - began)
    return data.numel() * data.element_size() / min(times)
