"""Functions in C, which this machine's own compiler makes, once, and which are kept in ~/.cache/quartzgpt.

Read it when something is said not to compile. step.c is for sampling (quartz/compiled.py), training.c with all that it
includes for training (quartz/kernels.py).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of numbers, as vectors.h has them
OPTIONS = ["-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-march=native", "-fopenmp"]


def load(name: str, may_compile: bool) -> ctypes.CDLL | None:
    """quartz/{name}.c for this machine; None where it would have to be compiled first, which takes some seconds, and
    may not, and on systems other than Linux, whose compilers bring no OpenMP. Raises what a compiler, or a folder for
    the result, gives cause for.
    """
    if sys.platform != "linux":
        return None
    parts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]"))]
    key = hashlib.sha256(b"\n".join([*parts, _cpu().encode(), *map(str.encode, OPTIONS)])).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.so"
    if not is_whole(path):
        if not may_compile:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            _build(name, made)
            code = made.read_bytes()
            made.write_bytes(code + hashlib.sha256(code).digest())  # the system's loader does not mind
            os.replace(made, path)
    return ctypes.CDLL(str(path))


def at(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p | None]:
    """Where tensors lie, for a function in C; they have to be contiguous, and to be kept for as long."""
    return [tensor if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _build(name: str, path: Path) -> None:
    """Has the C compiler make the library."""
    named = os.environ.get("CC", "")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["cc", "gcc", "clang"])), None)
    if compiler is None:
        raise FileNotFoundError(f"there is no C compiler{f' {named}, which CC names' if named else ''}")
    command = [compiler, *OPTIONS, "-o", str(path), str(Path(__file__).with_name(f"{name}.c")), "-lm"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(told[0] if told else f"{compiler} failed")


def is_whole(path: Path) -> bool:
    """Whether a library is there, and undamaged: machine code that is not would crash."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "quartzgpt"


@functools.cache
def _cpu() -> str:
    """What tells processors apart that do not run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
