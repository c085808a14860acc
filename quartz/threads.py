"""How many threads compute, and how they wait for each other, on a machine or in a container that is not ours alone.

`set_up` is called before torch is loaded, by configurator.configure, and so in every verb. On Linux it does two things,
each unless the environment already decides about it:

- A quota of control groups (a container's) below the number of cores becomes the number of threads, which torch would
  take from the machine. An affinity needs nothing: torch counts the cores that it leaves.
- A watch sees how long this process's threads wait for a core. torch's threads on CPUs (GNU's OpenMP, libgomp) wait for
  each other by spinning, for some 3 ms before they sleep. No way is faster on a machine of one's own. Where another
  process wants a core, the thread that spins keeps it from the one that is waited for, and a step takes up to ten times
  as long. So they sleep at once for as long as others want the cores. Only the waiting changes, no bit of the results.
"""

import atexit
import contextlib
import ctypes
import glob
import math
import os
import sys
import threading
import time
from pathlib import Path

# Whoever sets one of these has decided.
NUMBER = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS", "MKL_DYNAMIC")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
INTERVAL = 0.1  # seconds between two looks
LOOKING = 0.005  # the share of the time that looks may take: where threads are very many, they are rarer
BUSY = 0.1  # waiting for a core, all threads' time over the clock's: from here on sleep pays, until it is half of this
NEWEST = 0.2  # what a look counts in the mean share, so that a moment's work of another's changes nothing
PAUSE_SOFT = 1  # omp_pause_soft of omp.h

_stop = threading.Event()
_watches: list[threading.Thread] = []  # the one that runs is the last; a fork leaves dead ones


def set_up() -> None:
    """Sets the number of threads and starts the watch; later calls do nothing."""
    if sys.platform != "linux":
        return
    if "torch" not in sys.modules and not os.environ.keys() & set(NUMBER):
        allowed = cores()
        if allowed < _physical_cores():
            os.environ["OMP_NUM_THREADS"] = str(allowed)
    if not os.environ.keys() & set(WAITING) and not any(t.is_alive() for t in _watches):
        _watches.append(threading.Thread(target=_keep_watch, name="watch", daemon=True))
        _watches[-1].start()
        atexit.register(_end_watch)


def cores() -> int:
    """The cores that this process may keep busy: of its affinity, and within its quota."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(there, quota()))


def _physical_cores(system: Path = Path("/sys/devices/system/cpu")) -> int:
    """What torch takes for the number of threads: the affinity's cores, two hyperthreads counted as one."""
    cpus = os.sched_getaffinity(0)
    try:
        return len({(system / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus})
    except OSError:
        return len(cpus)


def quota(process: Path = Path("/proc/self")) -> float:
    """Cores' worth of time that its control groups (v1 or v2) leave a process; inf without a limit.

    The limits of the groups around its own count too, as far as they are mounted.
    """
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        groups = [line.split(":", 2)[1:] for line in (process / "cgroup").read_text().splitlines()]
        for mount in (process / "mountinfo").read_text().splitlines():
            (_, _, _, root, point, *_), (kind, _, options) = (part.split()[:5] for part in mount.split(" - "))
            for names, path in groups:
                is_v2 = kind == "cgroup2" and not names
                if is_v2 or (kind == "cgroup" and "cpu" in names.split(",") and "cpu" in options.split(",")):
                    # In a container the path may be one outside, of which only the part below `root` is there
                    inside = os.path.relpath(path, root) if f"{path}/".startswith(f"{root.rstrip('/')}/") else "."
                    own = Path(point, inside)
                    limits += [_limit(group, is_v2) for group in (own, *own.parents) if group.is_relative_to(point)]
    return min(limits)


def _limit(group: Path, is_v2: bool) -> float:
    """Cores' worth of time in a control group's folder; inf without a limit."""
    names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        most, period = " ".join((group / name).read_text() for name in names).split()
        return int(most) / int(period) if most not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def waited(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that this process's threads, as many as there are, have been ready to run and without a core."""
    total = 0
    for path in glob.glob(f"{tasks}/*/schedstat"):  # a kernel may have none
        with contextlib.suppress(OSError, IndexError), open(path) as file:  # a thread may have ended
            total += int(file.read().split()[1])  # nanoseconds
    return total / 1e9


def _is_libgomp(library: ctypes.CDLL) -> bool:
    return hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")


def give_back() -> None:
    """Ends the OpenMP threads that the calling thread has computed with. libgomp's hardly spin while a program has more
    of them than there are cores, so a second set, though it sleeps, slows down the thread that computes.
    """
    library = ctypes.CDLL(None)
    if _is_libgomp(library):
        library.omp_pause_resource_all(PAUSE_SOFT)


def _keep_watch() -> None:
    """Lets the OpenMP threads sleep while it sees others at work.

    libgomp spins for 100 rounds in place of 300,000 while a program has more OpenMP threads than there are cores. So a
    few more are made, in a team of this thread's own, which sleep until they are given back: a switch of public
    functions alone, where the counts of rounds themselves are out of reach once libgomp is loaded.
    """
    library = ctypes.CDLL(None)  # what torch itself finds
    before, then, pause, share, asleep = waited(), time.monotonic(), INTERVAL, 0.0, False
    while not _stop.wait(pause):
        now, began, total = time.monotonic(), time.thread_time(), waited()
        pause = max(INTERVAL, (time.thread_time() - began) / LOOKING)
        share += NEWEST * (max(0.0, total - before) / (now - then) - share)  # a thread that ends takes its time away
        before, then = total, now
        if asleep and share < BUSY / 2:
            library.omp_pause_resource_all(PAUSE_SOFT)
            asleep = False
        elif not asleep and share > BUSY and (threads := _torch_threads()) > 1:
            if not _is_libgomp(library):
                return
            more = max(2, library.omp_get_num_procs() - threads + 2)  # this thread is one of them
            library.GOMP_parallel(library.omp_get_level, None, more, 0)  # each calls what has no effect
            asleep = True


def _torch_threads() -> int:
    """How many threads compute; 1 as long as torch is not there."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return count() if count else 1


def _end_watch() -> None:
    """Ends the watch before the interpreter ends, which may not be done to a thread at work."""
    _stop.set()
    for watch in _watches[-1:]:
        watch.join()
