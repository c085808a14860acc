"""malloc's memory: kept, in huge pages, and no more of it than is used."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import resource, sys
import torch
from quartz import machine

def told(path, name):
    return sum(int(line.split()[1]) for line in open(f"/proc/self/{path}") if line.startswith(name)) / 1024

if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
before = told("status", "VmRSS")
machine.keep_freed_memory()
set_up = told("status", "VmRSS") - before
data = torch.ones(2**24)  # 64 MiB
held, huge = told("status", "VmRSS") - before, told("smaps", "AnonHugePages")
del data
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(set_up, held, huge, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def figures(how: str) -> list[float]:
    command = [sys.executable, "-c", PROGRAM, how]
    return [float(its) for its in subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.split()]


def test_memory_is_kept_and_no_more_is_taken_than_is_used():
    if sys.platform != "linux":
        pytest.skip("this system has no glibc")
    for how in ("free", "limited"):
        set_up, held, _, faults = figures(how)
        assert set_up < 8 and 60 < held < 80
        assert faults < 1000 or how == "limited"


def test_memory_lies_in_huge_pages():
    if not ENABLED.is_file() or "[never]" in ENABLED.read_text():
        pytest.skip("this system has no huge pages for programs that ask for them")
    assert figures("free")[2] > 40
