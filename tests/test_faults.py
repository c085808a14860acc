"""Several processes, and what may happen to a run: each fault is brought about, and its outcome compared."""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, assert_user_error, flags, load, records

import model as model_module
from configurator import UserError
from quartz import checkpoint, ranks, shards

slow = pytest.mark.slow
PLAIN = {**TINY, "dropout": 0.0, "n_head": 4, "n_embd": 32}
MUON = {"optimizer": "muon", "arch": "qwen3", "tie_embeddings": False, "schedule": "wsd", "lr_decay_iters": 20}


def torchrun(
    tiny: Path, settings: dict, processes: int = 2, script: Path = ROOT / "train.py", options=("--standalone",)
):
    """Starts train.py on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags(**settings)], cwd=tiny, env=environment, **pipes)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


def iterations(out: Path) -> int:
    return (out / "log.jsonl").read_text().count('"iter"') if (out / "log.jsonl").exists() else 0


def workers(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's workers, in the order of their ranks."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def assert_close_run(a: Path, b: Path, tolerance: float = 1e-4) -> None:
    for ours, theirs in zip(records(a), records(b), strict=True):
        assert ours == pytest.approx(theirs, abs=10 * tolerance)
    ours, theirs = (load(folder / "last.pt") for folder in (a, b))
    assert ours["iter_num"] == theirs["iter_num"]
    for name in ours["model"]:
        torch.testing.assert_close(ours["model"][name], theirs["model"][name], atol=tolerance, rtol=0, msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"gradient_accumulation_steps": 2}),
        (2, {"gradient_accumulation_steps": 4, "batch_size": 2, "fsdp": True, **MUON, "n_kv_head": 2}),
        pytest.param(4, {"gradient_accumulation_steps": 8, "batch_size": 1}, marks=slow),
        pytest.param(2, {"gradient_accumulation_steps": 4, "batch_size": 2, **MUON}, marks=slow),
        pytest.param(2, {"gradient_accumulation_steps": 4, "batch_size": 2, "fsdp": True}, marks=slow),
        pytest.param(2, {"gradient_accumulation_steps": 2, "fsdp": True, **MUON}, marks=slow),
    ],
    ids=str,
)
def test_several_processes_do_what_one_does(tiny, train, processes, settings):
    """Over 20 updates: the same batches, losses, norms and weights, with and without accumulation."""
    settings = {**PLAIN, "max_iters": 20, "eval_interval": 10, "eval_iters": 3, **settings}
    code, _, err = finish(torchrun(tiny, {**settings, "out_dir": "several"}, processes))
    assert code == 0, err
    assert train(**{**settings, "out_dir": "one", "fsdp": False}).code == 0
    assert_close_run(tiny / "one", tiny / "several")


@pytest.mark.parametrize("settings", [{}, pytest.param({"fsdp": True, **MUON}, marks=slow)], ids=str)
def test_several_processes_do_what_one_does_on_masked_rows(rows, train, settings):
    """Where one process has more targets than the other: the mean is over all, not one of means."""
    settings = {**PLAIN, "max_iters": 12, "eval_interval": 6, "eval_iters": 9, "batch_size": 1, **settings}
    settings["gradient_accumulation_steps"] = 4
    code, _, err = finish(torchrun(rows, {**settings, "out_dir": "several"}))
    assert code == 0, err
    assert train(**{**settings, "out_dir": "one", "fsdp": False}).code == 0
    assert_close_run(rows / "one", rows / "several")
    whole = {"batch_size": 4, "gradient_accumulation_steps": 1, "eval_iters": 3}
    assert train(**{**settings, **whole, "out_dir": "whole", "fsdp": False}).code == 0
    losses = [[r["loss"] for r in records(rows / name) if "iter" in r] for name in ("whole", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@slow
def test_a_run_moves_between_one_process_and_several(tiny, train):
    """FSDP on two, then one process alone, then DDP on two, each from the last one's file."""
    settings = {**PLAIN, **MUON, "max_iters": 18, "eval_interval": 6}
    assert train(**settings, out_dir="one").code == 0
    code, _, err = finish(torchrun(tiny, {**settings, "fsdp": True, "max_iters": 6}))
    assert code == 0, err
    assert train(**{**settings, "max_iters": 12}, init_from="resume").code == 0
    code, _, err = finish(torchrun(tiny, {**settings, "init_from": "resume"}))
    assert code == 0, err
    assert_close_run(tiny / "one", tiny / "out")
    code, _, err = finish(torchrun(tiny, {**settings, "max_iters": 19, "init_from": "resume", "fsdp": True}))
    assert code == 0 and load(tiny / "out" / "last.pt")["iter_num"] == 19, err


@slow
def test_shards_of_a_checkpoint_resume_on_any_number_of_processes(tiny, train, run):
    settings = {**PLAIN, **MUON, "max_iters": 12, "eval_interval": 4}
    assert train(**settings, out_dir="one").code == 0
    sharded = {**settings, "fsdp": True, "sharded_checkpoint": True}
    code, _, err = finish(torchrun(tiny, {**sharded, "max_iters": 4}))
    assert code == 0, err
    assert sorted(path.name for path in (tiny / "out").iterdir() if path.suffix not in (".jsonl", ".png")) == [
        ".launch", "ckpt.dcp", "last.dcp",
    ]  # fmt: skip
    code, _, err = finish(torchrun(tiny, {**sharded, "max_iters": 8, "init_from": "resume"}))
    assert code == 0, err
    assert run("sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=5").code == 0
    assert train(**settings, init_from="resume").code == 0
    assert_close_run(tiny / "one", tiny / "out")
    assert not list((tiny / "out").glob("*.dcp*")), "files have taken the place of the shards"


def test_what_libraries_print_at_the_start_stays_out_of_a_result(capfd):
    with ranks.output_as_remarks():
        os.write(1, b"who is connected")
    os.write(1, b"result")
    assert tuple(capfd.readouterr()) == ("result", "who is connected")


@slow
def test_several_agents_form_one_run(tiny, train):
    """Two torchrun agents that meet at an address, as on two machines."""
    settings = {**PLAIN, "max_iters": 6}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two")
    agents = [torchrun(tiny, {**settings, "out_dir": "agents"}, 1, options=options) for _ in range(2)]
    for code, _, err in map(finish, agents):
        assert code == 0, err
    assert train(**settings, out_dir="one").code == 0
    assert_close_run(tiny / "one", tiny / "agents")


def test_several_processes_stop_together_on_a_signal(tiny):
    process = torchrun(tiny, {**PLAIN, "max_iters": 10**6, "eval_interval": 10**6, "log_interval": 3})
    wait_for(lambda: iterations(tiny / "out") > 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 60)
    stopped_at = load(tiny / "out" / "last.pt")["iter_num"]
    logged = max(record["iter"] for record in records(tiny / "out") if "iter" in record)
    assert 0 < logged < stopped_at <= logged + 3


def test_when_a_rank_is_killed_the_others_end_with_a_message(tiny):
    process = torchrun(tiny, {**PLAIN, "max_iters": 10**6, "eval_interval": 20})
    wait_for(lambda: iterations(tiny / "out") > 30)
    os.kill(workers(process)[1], signal.SIGKILL)
    killed_at = time.monotonic()
    code, _, err = finish(process, 60)
    assert code != 0 and time.monotonic() - killed_at < 60
    assert "SIGKILL" in err, err
    checkpoint.load(tiny / "out" / "last.pt")


@pytest.mark.parametrize("processes", [pytest.param(1, marks=slow), 2])
def test_torchruns_restart_goes_on_where_the_run_was(tiny, train, processes):
    """A killed rank with --max_restarts: no setting says so, but the run resumes, and ends as the undisturbed one."""
    earlier = train(out_dir="out", max_iters=3, n_embd=8)
    assert earlier.code == 0, "a run of another kind, which is set aside and never resumed"
    settings = {**PLAIN, "max_iters": 400, "lr_decay_iters": 400, "eval_interval": 20, "out_dir": "out"}
    process = torchrun(tiny, settings, processes, options=("--standalone", "--max_restarts=2"))
    wait_for(lambda: (tiny / "out" / "previous").exists() and iterations(tiny / "out") > 50)
    os.kill(workers(process)[-1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "Resuming training from out/last.pt" in out
    numbers = [record["iter"] for record in records(tiny / "out") if "iter" in record]
    assert numbers == list(range(400))
    assert train(**{**settings, "out_dir": "one"}).code == 0
    assert_close_run(tiny / "one", tiny / "out", 1e-3)


def test_the_rank_with_the_bad_loss_is_named(tiny):
    (tiny / "bad.py").write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import model\n"
        "plain, calls = model.GPT.forward, []\n"
        "def forward(self, *arguments, **keywords):\n"
        "    logits, loss = plain(self, *arguments, **keywords)\n"
        "    calls.append(self.training)\n"
        "    bad = os.environ['RANK'] == '1' and sum(calls) == 4\n"
        "    return logits, loss * (float('nan') if bad else 1)\n"
        "model.GPT.forward = forward\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    code, _, err = finish(torchrun(tiny, {**PLAIN, "gradient_accumulation_steps": 2}, script=tiny / "bad.py"))
    assert code != 0 and "error: the loss of rank 1 is not finite at iteration 3" in err
    assert load(tiny / "out" / "last.pt")["iter_num"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Kills and signals


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=slow)])
def test_killed_at_any_moment_a_run_ends_in_the_same_bits(tiny, train, kills):
    settings = {**TINY, "max_iters": 30 * kills, "eval_interval": 10, "eval_iters": 1, "n_layer": 1}
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(tiny / "out"), str(kills), "7"]
    done = subprocess.run([*command, *flags(**settings)], cwd=tiny, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= kills // 10, "some of the kills hit a save"
    assert train(**{**settings, "out_dir": "whole"}).code == 0
    assert_same_run(tiny / "out", tiny / "whole")
    assert not list((tiny / "out").glob("*.tmp"))


def test_a_second_interrupt_ends_the_run_at_once(tiny, start):
    """The first one waits for the iteration's border, which here is a minute away."""
    (tiny / "slow.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import runpy, time\n"
        "from quartz import shards\n"
        "plain, calls = shards.MicroBatches.read, []\n"
        "def read(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 5: open('slow', 'w'); [time.sleep(0.1) for _ in range(600)]\n"
        "    return plain(*arguments)\n"
        "shards.MicroBatches.read = read\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    process = start(tiny / "slow.py", *flags(**PLAIN), cwd=tiny)
    wait_for((tiny / "slow").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    assert load(tiny / "out" / "last.pt")["iter_num"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Disks and files


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this system mounts no tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tiny, train, small_disk):
    assert train(out_dir=small_disk / "out", max_iters=5).code == 0
    before = (small_disk / "out" / "last.pt").read_bytes()
    with open(small_disk / "fill", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    result = train(out_dir=small_disk / "out", max_iters=50, init_from="resume")
    assert_user_error(result, "No space left")
    assert (small_disk / "out" / "last.pt").read_bytes() == before
    (small_disk / "fill").unlink()
    assert train(out_dir=small_disk / "out", max_iters=50, init_from="resume").code == 0
    assert not list((small_disk / "out").glob("*.tmp"))


def test_files_that_may_not_grow_stop_a_save_and_leave_the_last_checkpoint(tiny, train, start):
    """A full disk for those who can't mount one: the operating system ends writes at 30 kB."""
    assert train(max_iters=5).code == 0
    before = (tiny / "out" / "last.pt").read_bytes()
    assert len(before) > 30000
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
    limited += f" sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    (tiny / "limited.py").write_text(limited)
    process = start(tiny / "limited.py", *flags(**{**TINY, "max_iters": 20, "init_from": "resume"}), cwd=tiny)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "ckpt.pt can't be written: File too large" in err and "Traceback" not in err, err
    assert (tiny / "out" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("place", [*(n / 41 for n in range(42))])
def test_a_flipped_bit_is_found_or_changes_nothing(trained, place):
    path = trained / "ckpt.pt"
    whole = path.read_bytes()
    good, at = checkpoint.load(path), min(len(whole) - 1, int(place * len(whole)))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << (at % 8)
    path.write_bytes(damaged)
    try:
        state = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error.problems)
    else:
        for name, tensor in good["model"].items():
            assert torch.equal(tensor, state["model"][name])
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    gpt = model_module.GPT(model_module.GPTConfig(8, 11, 1, 1, 8))
    updater = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = {"model": gpt.state_dict(), "optimizer": updater.state_dict(), "model_args": gpt.config.to_args()}
    checkpoint.save(folder / "ckpt.pt", {**state, "iter_num": 3, "best_val_loss": 1.0, "config": {}})
    return folder


@pytest.fixture
def at_batch(monkeypatch):
    """at_batch(n, action) does it before the nth window of the run is read."""

    def at_batch(number, action):
        plain, calls = shards.Split.windows, []

        def windows(self, starts, block_size):
            calls.append(1)
            if len(calls) == number:
                action()
            return plain(self, starts, block_size)

        monkeypatch.setattr(shards.Split, "windows", windows)

    return at_batch


@pytest.mark.parametrize("change", ["cut", "overwrite", "replace", "remove"])
def test_a_shard_that_changes_under_a_run_is_named(tiny, train, at_batch, change):
    path = tiny / "data" / "tiny" / "train.bin"
    whole = path.read_bytes()
    (tiny / "other.bin").write_bytes(whole[::-1])
    actions = {
        "cut": lambda: os.truncate(path, 100),
        "overwrite": lambda: path.write_bytes(whole[::-1]),
        "replace": lambda: os.replace(tiny / "other.bin", path),
        "remove": path.unlink,
    }
    at_batch(25, actions[change])
    assert_user_error(train(max_iters=50), "data/tiny/train.bin was changed")
    assert load(tiny / "out" / "last.pt")["iter_num"] == 5


def test_an_out_dir_that_disappears_is_one_line(tiny, train, at_batch):
    at_batch(25, lambda: shutil.rmtree(tiny / "out"))
    assert_user_error(train(max_iters=50), "out/ckpt.pt can't be written")


def test_a_second_run_in_the_same_out_dir_is_refused(tiny, train, start):
    first = start("train.py", *flags(**{**TINY, "max_iters": 10**6, "eval_interval": 10**6}), cwd=tiny)
    wait_for(lambda: iterations(tiny / "out") > 3)
    for mode in ("scratch", "resume"):
        assert_user_error(train(init_from=mode), "another run is writing to out")
    assert first.poll() is None and not (tiny / "out" / "previous").exists()
    assert train(out_dir="elsewhere").code == 0
    first.kill()
    first.wait()
    assert train(init_from="resume").code == 0, "the claim ends with the process"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, clocks, long runs


@pytest.fixture
def bad_at(monkeypatch):
    """bad_at(calls, loss=…, gradient=…) spoils these training passes, counted from 0."""

    def bad_at(calls, loss=1.0, gradient=1.0):
        plain, count = model_module.GPT.forward, []

        def forward(self, *arguments, **keywords):
            logits, value = plain(self, *arguments, **keywords)
            if self.training:
                if len(count) in calls:
                    value.register_hook(lambda grad: grad * gradient)
                    value = value * 1.0 if loss == 1.0 else value * loss
                count.append(1)
            return logits, value

        monkeypatch.setattr(model_module.GPT, "forward", forward)

    return bad_at


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ({"loss": math.nan}, ["loss of rank 0", "iteration 7"]),
        ({"loss": math.inf}, ["loss of rank 0", "iteration 7"]),
        ({"gradient": math.nan}, ["gradient", "nan", "iteration 7"]),
        ({"gradient": math.inf}, ["gradient", "iteration 7"]),
    ],
    ids=str,
)
def test_no_update_is_made_from_numbers_that_are_not_finite(tiny, train, bad_at, spoiled, words):
    bad_at({15}, **spoiled)  # two micro-batches an update
    assert_user_error(train(max_iters=20), *words)
    state = load(tiny / "out" / "last.pt")
    assert state["iter_num"] == 5 and all(t.isfinite().all() for t in state["model"].values())


def test_bad_updates_are_left_out_where_that_is_asked_for_up_to_a_bound(tiny, train, bad_at):
    bad_at({4, 6, 11}, loss=math.nan)  # updates 2, 3 and 5
    result = train(skip_bad_updates=2)
    assert result.code == 0 and result.err.count("is left out") == 3
    state = load(tiny / "out" / "last.pt")
    assert state["iter_num"] == 10 and all(t.isfinite().all() for t in state["model"].values())
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {7}
    bad_at({4, 6, 8}, loss=math.nan)  # three in a row
    result = train(skip_bad_updates=2, out_dir="again")
    assert result.code == 2 and "error: the loss of rank 0 is not finite at iteration 4" in result.err


def test_a_clock_that_goes_backwards_harms_nothing(tiny, train, monkeypatch):
    assert train(out_dir="whole").code == 0
    backwards = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(backwards)))
    assert train().code == 0
    assert_same_run(tiny / "out", tiny / "whole")


@slow
def test_over_a_long_run_memory_and_open_files_stay(tiny, train):
    """20,000 updates of a tiny model, watched from a thread: nothing grows after the first quarter."""
    seen, over = [], threading.Event()

    def watch():
        while not over.wait(0.05):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((iterations(tiny / "out"), pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system has no /proc to watch memory in")
    small = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "batch_size": 1, "gradient_accumulation_steps": 1}
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        settings = {**small, "dropout": 0.0, "max_iters": 20000, "eval_interval": 1000, "log_interval": 100}
        assert train(**settings).code == 0
    finally:
        over.set()
        watcher.join()
    settled = [(memory, files) for n, memory, files in seen if n >= 50]
    memory, files = zip(*settled, strict=True)
    assert max(memory) - memory[0] < 8 * 2**20 and max(files) <= files[0] + 2
    lines = (tiny / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines if '"iter"' in line] == list(range(0, 20000, 100))


@pytest.mark.skipif(shutil.which("bash") is None, reason="this system has no bash")
@pytest.mark.parametrize(
    ("restarts", "ends", "resumes", "requeued", "status"),
    [
        (0, "signal", False, True, 0),
        (1, "signal", True, True, 0),
        (1, "well", True, False, 0),
        (0, "badly", False, False, 2),
    ],
    ids=str,
)
def test_a_slurm_job_goes_back_into_the_queue_and_resumes(tmp_path, restarts, ends, resumes, requeued, status):
    """The script among stand-ins of SLURM's commands that note how they are called."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.pt").touch()
    last = {"signal": "trap 'exit 143' TERM; while :; do sleep 0.1; done", "well": "exit 0", "badly": "exit 2"}[ends]
    stand_ins = {
        "srun": f'echo "$@" > {tmp_path}/srun.txt; {last}',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.txt; echo node1',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = {
        **os.environ,
        **job,
        "SLURM_RESTART_COUNT": str(restarts),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    (tmp_path / "x.py").write_text(f"n_layer = 2\nout_dir = '{tmp_path}/out'  # where it goes\n")
    command = ["bash", str(ROOT / "docs" / "train.slurm"), f"{tmp_path}/x.py", "--n_head=2"]
    process = subprocess.Popen(command, env=environment)
    if ends == "signal":
        wait_for((tmp_path / "srun.txt").exists)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == status
    called = (tmp_path / "srun.txt").read_text()
    assert "--rdzv_endpoint=node1:29500" in called and f"train.py {tmp_path}/x.py --n_head=2" in called
    assert ("--init_from=resume" in called) == resumes
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text()) == requeued
