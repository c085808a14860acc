"""The command that proves and measures all on a GPU, on a CPU: so that it is not what fails on the day."""

import dataclasses
import json
import subprocess
import sys
import time
import types

import gpu
import gpu_steps
import pytest
import stand_in
import torch
from conftest import ROOT

from quartz import machine, serving

# Stands in for tests/gpu_steps.py: tells a figure, and ends as its step says
PROGRAM = """
import json, os, signal, subprocess, sys, time
name, results = sys.argv[1], next(a for a in sys.argv if a.startswith("--results="))[10:]
def tell(record):
    with open(results, "a") as file:
        file.write(json.dumps({"step": name, **record}) + "\\n")
tell({"begins": {"device": "stand-in", "torch": "1"}})
verdict = {"agreement": "FAILS", "training": "missed"}.get(name, "holds")
tell({"what": "a figure", "value": 1234.5, "unit": "ms", "wanted": "at most 1", "verdict": verdict})
print("last words of", name, flush=True)
if name == "tests":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "resume":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open("child", "w").write(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """command(*arguments) -> exit status, table; its steps are the stand-in's."""
    (tmp_path / "steps.py").write_text(PROGRAM.replace('open("child"', f"open({str(tmp_path / 'child')!r}"))
    monkeypatch.setattr(gpu, "PROGRAM", tmp_path / "steps.py")
    monkeypatch.setitem(gpu.STEPS, "resume", gpu.Step(1, "hangs"))

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", f"--folder={tmp_path / 'out'}", *arguments])
        return gpu.main(), (tmp_path / "out" / "gpu.md").read_text()

    return command


def test_a_step_that_fails_is_told_of_and_the_next_ones_go_on(command, tmp_path):
    status, table = command("--only=machine,agreement,tests,resume,training")
    assert status == 1
    assert "Checks: 3 hold, 1 fail. Goals: 0 met, 1 missed." in table
    ends = {
        line.split(" | ")[0].strip("| "): line
        for line in table.partition("how it ended")[2].splitlines()
        if "|" in line
    }
    assert "done" in ends["machine"] and "done" in ends["agreement"] and "done" in ends["training"]
    assert "crashed" in ends["tests"] and "last words of tests" in ends["tests"]
    assert "out of time" in ends["resume"] and "last words of resume" in ends["resume"]
    assert "| agreement | a figure | 1,234 ms | at most 1 | FAILS |" in table
    child = int((tmp_path / "child").read_text())
    time.sleep(0.1)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout
    assert not state.strip() or state.startswith("Z"), "what a step has started ends with it"


def test_the_exit_status_is_0_where_only_goals_are_missed(command):
    assert command("--only=machine,training")[0] == 0


def test_the_rest_is_what_has_no_results_yet(command, tmp_path):
    assert command("--only=machine,agreement")[0] == 1
    before = (tmp_path / "out" / "gpu.jsonl").read_text()
    assert command("--only=machine,training", "--rest")[0] == 0
    added = (tmp_path / "out" / "gpu.jsonl").read_text().removeprefix(before)
    assert {json.loads(line)["step"] for line in added.splitlines()} == {"training"}


def test_a_step_that_is_run_again_replaces_what_it_told(command):
    command("--only=machine")
    assert command("--only=machine")[1].count("| machine | a figure |") == 1


def test_no_step_begins_when_the_time_is_over(command):
    status, table = command("--only=machine", "--minutes=0.1")
    assert status == 0 and "left out: no time is left" in table and "a figure" not in table


def test_a_line_that_was_cut_off_leaves_the_others(command, tmp_path):
    command("--only=machine")
    with open(tmp_path / "out" / "gpu.jsonl", "a") as file:
        file.write('{"step": "mach')
    assert len(gpu.records(tmp_path / "out")) == 3


def test_a_missing_gpu_is_one_line():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu.py"), "--device=cuda:99"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: device 'cuda:99' is not there")
    assert len(done.stderr.splitlines()) == 1


def test_each_step_has_a_program():
    assert [*gpu.STEPS] == [*gpu_steps.STEPS]


def test_tqdm_may_be_missing(tmp_path, monkeypatch):
    """The least of it stands in: what imports it still runs."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    folder = gpu.stand_ins(str(tmp_path))
    use = "from tqdm import tqdm\nwith tqdm(total=3) as bar: bar.update()\ntqdm.write(str([*tqdm(range(3))]))"
    done = subprocess.run(
        [sys.executable, "-c", use], env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[0, 1, 2]\n"


class Profiled:
    """A profile of three kernels and a copy, which leave the GPU idle for a sixth of the time."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def events(self) -> list:
        names = ["matmul", "norm", "Memcpy HtoD (Pinned -> Device)", "add"]
        spans = [(0, 30), (10, 20), (40, 60), (50, 55)]
        cuda = torch.autograd.DeviceType.CUDA
        ranges = [types.SimpleNamespace(start=start, end=end) for start, end in spans]
        return [
            types.SimpleNamespace(name=name, device_type=cuda, time_range=its)
            for name, its in zip(names, ranges, strict=True)
        ]

    def key_averages(self):
        return types.SimpleNamespace(table=lambda **_: "")


@pytest.mark.parametrize(
    "step", ["machine", "agreement", "graphs", "training", "decoding", "waits", "large", "fp8", "serving"]
)
def test_a_step_takes_the_ways_of_a_gpu(step, tmp_path, monkeypatch):
    """With its branches for GPUs, on the stand-in; nothing is compiled, and no other program started."""
    wide = {**gpu_steps.TOY, "n_embd": 128}
    scale = dataclasses.replace(gpu_steps.TINY, names=gpu_steps.FULL.names, gpt2=wide, xl=wide, xl_batches=(2, 4))
    monkeypatch.setattr(gpu_steps, "FULL", scale)
    monkeypatch.setattr(gpu_steps, "train", lambda *_, **__: None)
    monkeypatch.setattr(gpu_steps, "over_http", lambda _: None)
    monkeypatch.setattr(gpu_steps, "logged", lambda _: [{"iter": 1, "tokens_per_s": 1.0, "mfu": 0.1}])
    monkeypatch.setattr(machine, "memory_speed", lambda _: 1e12)
    monkeypatch.setattr(machine, "why_no_compiler", lambda _: "")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    monkeypatch.setattr(torch.profiler, "profile", Profiled)
    with stand_in.graphs() as gpu_:
        bench = gpu_steps.Bench(step, torch.device("cuda:0"), tmp_path / "gpu.jsonl", tmp_path)
        run = serving.Service._run

        def in_its_thread(self, count):
            with stand_in.StandIn():
                run(self, count)

        monkeypatch.setattr(serving.Service, "_run", in_its_thread)
        gpu_steps.STEPS[step](bench)
        assert gpu_.waits or step == "machine"
    told = [record for record in gpu.records(tmp_path) if "what" in record]
    slow = "data sheet's peak"  # of which a CPU reaches nothing
    assert not [record for record in told if record["verdict"] == "FAILS" and slow not in record["what"]]
    assert told and (step != "waits" or [r["value"] for r in told if "idle" in r["what"]] == [pytest.approx(1 / 6)])


@pytest.mark.slow
def test_the_whole_command_runs_at_toy_sizes(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--device=cpu", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    told = gpu.records(tmp_path)
    assert {record["step"] for record in told if record.get("ended") == "done"} == {*gpu.STEPS}
    assert not [record for record in told if record.get("verdict") in ("missed", "met")], "goals are a GPU's"
    assert sum(record.get("verdict") == "holds" for record in told) > 30
