"""What a container leaves, and how threads wait. No test measures how fast anything is."""

import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from quartz import threads

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups, /proc and libgomp are Linux's")
two_cores = pytest.mark.skipif(threads.cores() < 2, reason="on one core no thread waits for another")


def process(folder, groups: list[str], mounts: list[str], limits: dict[str, str]):
    """A folder as /proc/self, beside the files of its control groups in folder/fs."""
    for name, text in limits.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = "".join(f"{line}\n" for line in mounts).replace("/sys/fs/cgroup", f"{folder}/fs")
    (folder / "mountinfo").write_text("22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n" + lines)
    return folder


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:5 - cgroup cgroup rw,cpu,cpuacct"
V1_SET = "32 23 0:28 / /sys/fs/cgroup/cpuset rw,nosuid - cgroup cgroup rw,cpuset"
CFS = "cpu,cpuacct/{}cpu.cfs_{}_us"


def cfs(group: str, quota: int, period: int = 100000) -> dict[str, str]:
    return {CFS.format(group, "quota"): str(quota), CFS.format(group, "period"): str(period)}


@pytest.mark.parametrize(
    "groups, mounts, limits, expected",
    [
        (["0::/"], [V2], {"cpu.max": "200000 100000"}, 2),  # a container with a name space of its own
        (["0::/"], [V2], {"cpu.max": "max 100000"}, math.inf),
        (["0::/"], [V2], {}, math.inf),  # the root of a machine has no limit, and no file
        (["0::/user.slice/job"], [V2], {"user.slice/job/cpu.max": "150000 50000"}, 3),
        (["0::/a/b"], [V2], {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        (["0::/a/b"], [V2], {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000", "c/cpu.max": "1 1"}, 3),
        (["0::/../b"], [V2], {"cpu.max": "100000 100000"}, 1),  # moved out of its name space
        (["4:cpu,cpuacct:/a", "1:cpuset:/b"], [V1, V1_SET], cfs("a/", 250000), 2.5),
        (["4:cpu,cpuacct:/a"], [V1], cfs("a/", -1), math.inf),
        (["4:cpu,cpuacct:/a"], [V1], cfs("a/", -1) | cfs("", 100000, 50000), 2),
        (["4:cpuset:/a"], [V1], cfs("a/", 100000), math.inf),  # of another controller's group
        (["4:cpu,cpuacct:/docker/1f"], [V1.replace("/ /sys", "/docker/1f /sys")], cfs("", 200000), 2),
        (["4:cpu:/a", "0::/"], [V1, V2.replace("cgroup rw", "cgroup/unified rw")], cfs("a/", 300000), 3),
        (["nonsense"], [V2], {"cpu.max": "100000 100000"}, math.inf),
        (["0::/"], [V2], {"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_the_quota_is_the_lowest_of_all_groups_around_the_process(tmp_path, groups, mounts, limits, expected):
    assert threads.quota(process(tmp_path, groups, mounts, limits)) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert threads.quota(tmp_path) == math.inf


@pytest.mark.parametrize("quota, expected", [(math.inf, 4), (64, 4), (2, 2), (1.5, 2), (0.2, 1)])
def test_cores_are_those_of_the_affinity_and_of_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7}, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: quota)
    assert threads.cores() == expected


def test_hyperthreads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings)
    assert threads._physical_cores(tmp_path) == 2


def test_waiting_is_summed_over_threads(tmp_path):
    for thread, nanoseconds in ((1, 5 * 10**8), (2, 10**9)):
        (tmp_path / str(thread)).mkdir()
        (tmp_path / str(thread) / "schedstat").write_text(f"77 {nanoseconds} 3\n")
    (tmp_path / "3").mkdir()  # which has just ended
    assert threads.waited(tmp_path) == 1.5


def python(program: str, **environment: str) -> list[str]:
    """What a program prints, in lines; the environment says nothing else about threads."""
    kept = {k: v for k, v in os.environ.items() if k not in threads.NUMBER + threads.WAITING}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and not result.stderr, result
    return result.stdout.splitlines()


TELL = """
import os, sys, threading
from quartz import threads
threads.quota = lambda: 1.0
import configurator
configurator.configure({}, [])
print(os.environ.get("OMP_NUM_THREADS"), sum(thread.name == "watch" for thread in threading.enumerate()))
configurator.configure({}, [])
import torch
print(torch.get_num_threads(), sum(thread.name == "watch" for thread in threading.enumerate()))
"""


@linux
@two_cores
def test_a_quota_decides_the_number_of_threads_of_every_verb():
    assert python(TELL) == ["1 1", "1 1"]


@linux
@two_cores
@pytest.mark.parametrize("name", threads.NUMBER)
def test_the_users_number_of_threads_stays(name):
    value = {"OMP_DYNAMIC": "false", "MKL_DYNAMIC": "false"}.get(name, "2")
    assert python(TELL, **{name: value}) == ["2 1" if name == "OMP_NUM_THREADS" else "None 1", "2 1"]


@linux
@two_cores
@pytest.mark.parametrize(
    "name, value",
    [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "500"), ("KMP_BLOCKTIME", "1"), ("KMP_LIBRARY", "throughput")],
)
def test_the_users_way_of_waiting_stays(name, value):
    assert name in threads.WAITING
    assert python(TELL, **{name: value}) == ["1 0", "1 0"]


# The clock stands for a machine on which a thread always waits, and a constant for one on which none does. An OpenMP
# thread that finds no work for a while shorter than libgomp's spinning sleeps at once, or not at all.
SWITCH = """
import os, threading, time
from pathlib import Path
from quartz import threads
threads.waited = time.perf_counter
threads.INTERVAL, threads.LOOKING = 0.01, 1.0
threads.set_up()
os.environ["GOMP_SPINCOUNT"] = "30000000"  # so long that a machine at work on other things makes none sleep
import torch
from model import GPT, GPTConfig

def sleeps():
    names = [path / "status" for path in Path("/proc/self/task").iterdir() if path.name != str(os.getpid())]
    return sum(int(name.read_text().split("\\nvoluntary_ctxt_switches:")[1].split()[0]) for name in names)

def sleep_at_once():
    before = sleeps()
    for _ in range(200):
        a + a
        until = time.perf_counter() + 2e-4
        while time.perf_counter() < until:
            pass
    return sleeps() - before > 100

def gradients_once(asleep):
    until = time.perf_counter() + 40
    while sleep_at_once() != asleep:
        assert time.perf_counter() < until, f"asleep does not become {asleep}"
    model.zero_grad()
    loss = model(idx, idx)[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

a, idx = torch.ones(10**5), torch.arange(512).view(8, 64)
model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=2, n_head=4, n_embd=128))
first = gradients_once(asleep=True)
threads.waited = lambda: 0.0
second = gradients_once(asleep=False)
threads.waited = time.perf_counter
third = gradients_once(asleep=True)
print(all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(first, second, third, strict=True)))
"""


@pytest.mark.alone
@linux
@two_cores
def test_where_others_are_at_work_threads_sleep_and_no_bit_changes():
    assert python(SWITCH) == ["True"]
