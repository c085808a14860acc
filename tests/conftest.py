"""What the tests share: a small data set, and scripts run as a person runs them."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes side by side: threads that spin would only stop each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; what a test starts has it too

import numpy as np
import pytest
import torch
from compare import same

ROOT = Path(__file__).resolve().parents[1]
MOST_WORKERS = 8  # of pytest -n auto: each loads torch, and the longest tests decide beyond that
# The most memory that a process has had, in KiB. getrusage's maximum begins with that of the process that started it.
PRINT_PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "offline")
if DATA := os.environ.get("QUARTZGPT_TEST_DATA"):
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(DATA) / "tiktoken"))

# A model and a run that take a moment; a test overrides what it is about.
TINY = {
    "dataset": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 2,
    "lr_decay_iters": 20,
    "max_iters": 10,
    "eval_interval": 5,
    "eval_iters": 2,
}


PROGRAMS = os.environ.get("QUARTZGPT_TEST_PROGRAMS", "").split()  # that are there, as .ci/run knows


class Result(NamedTuple):
    code: int
    out: str
    err: str


def pytest_addoption(parser):
    told = "a test that is skipped for want of a package, or of data where QUARTZGPT_TEST_DATA is set, fails"
    parser.addoption("--complete", action="store_true", help=told)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_auto_num_workers() -> int:
    from quartz import threads

    return min(threads.cores(), MOST_WORKERS)


def fail_if_skipped_in_vain(report, config):
    """What a system is cannot be helped. The reason of such a skip begins with "this system", and may go on with
    "has no" and a program, which fails where the program is known to be there."""
    if not config.getoption("complete") or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    lacks = reason.removeprefix("this system has no ").partition(" ")[0]
    if (lacks in PROGRAMS or not reason.startswith("this system")) and (DATA or "QUARTZGPT_TEST_DATA" not in reason):
        report.outcome, report.longrepr = "failed", f"skipped, in a complete run: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return fail_if_skipped_in_vain((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return fail_if_skipped_in_vain((yield), collector.config)


def program(*names: str) -> str:
    """The path of a program, by the first of its names that there is. Skips where there is none."""
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    return found or pytest.skip(f"this system has no {names[0]}")


def flags(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(autouse=True)
def matplotlib_is_missing(monkeypatch):
    """Runs of a moment go without their curves, which would take longer. Where these are tested, this is overridden."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def run(monkeypatch, capfd):
    """run("train.py", *arguments) runs a script in this process, as __main__, and returns its status and output."""

    def run(script: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.stdout.flush()
        out, err = capfd.readouterr()
        settings = "".join(line for line in err.splitlines(keepends=True) if line.startswith("Overriding: "))
        return Result(code, out, err.replace(settings, "", 1))

    return run


@pytest.fixture
def train(run):
    """train(max_iters=3, …) runs train.py on the tiny data set."""
    return lambda **settings: run("train.py", *flags(**{**TINY, **settings}))


def load(path):
    return torch.load(path, weights_only=True)


def records(out_dir) -> list[dict]:
    """The log without what a clock decides."""
    lines = (out_dir / "log.jsonl").read_text().splitlines()
    clock = ("ms", "tokens_per_s", "seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_run(a, b):
    for name in ("model", "optimizer", "iter_num", "best_val_loss", "tokens_seen", "evaluated"):
        assert same(load(a / "last.pt")[name], load(b / "last.pt")[name]), name
    assert records(a) == records(b)


@pytest.fixture
def start():
    """start("train.py", *arguments) starts a script as a process of its own; what still runs at the end is killed."""
    processes = []

    def start(script: str, *arguments: str, **keywords) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **keywords}
        processes.append(subprocess.Popen(command, **keywords))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with data/tiny prepared: about 3,000 characters of 28 kinds."""
    from quartz import corpus
    from quartz.tokenizer import CharTokenizer

    monkeypatch.chdir(tmp_path)
    text = "".join(f"line {n} of {n * n}: the quick brown fox jumps\n" for n in range(80))
    tokenizer = CharTokenizer.train(text)
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    ids = tokenizer.encode(text)
    corpus.write_dataset(tmp_path / "data" / "tiny", {"train": ids[:-500], "val": ids[-500:]}, tokenizer)
    return tmp_path


@pytest.fixture
def rows(tiny) -> Path:
    """data/tiny as 169 and 29 rows of 17 tokens, about a third of which are targets: of some rows none, of some all."""
    folder = tiny / "data" / "tiny"
    meta, counts, generator = json.loads((folder / "meta.json").read_text()), {}, np.random.default_rng(5)
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"{split}.bin", dtype="<u2")
        counts[split] = len(tokens) // 17 * 17
        tokens[: counts[split]].tofile(folder / f"{split}.bin")
        shares = generator.choice([0.0, 0.1, 0.3, 1.0], counts[split] // 17)
        (generator.random((counts[split] // 17, 17)) < shares[:, None]).astype(np.uint8).tofile(
            folder / f"{split}.mask"
        )
    (folder / "meta.json").write_text(json.dumps({**meta, "tokens": counts, "row": 17}))
    return tiny


@pytest.fixture
def shakespeare() -> Path:
    """tinyshakespeare.txt, from the folder that QUARTZGPT_TEST_DATA names."""
    path = Path(DATA or "") / "tinyshakespeare.txt"
    if not DATA or not path.exists():
        pytest.skip("QUARTZGPT_TEST_DATA names no folder with tinyshakespeare.txt")
    return path


@pytest.fixture(scope="session")
def gpt2_bpe() -> None:
    """Skips where tiktoken can't find GPT-2's tokens."""
    from configurator import UserError
    from quartz.tokenizer import GPT2Tokenizer

    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("neither TIKTOKEN_CACHE_DIR nor QUARTZGPT_TEST_DATA is set, to find GPT-2's tokens")
    try:
        GPT2Tokenizer()
    except UserError as error:
        pytest.skip(str(error))


def assert_user_error(result: Result, *words: str) -> None:
    """Exit status 2, one line a problem on stderr, each word in it, and no traceback."""
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), result.err
    for word in words:
        assert word in result.err, f"{word!r} is not in {result.err!r}"


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    """A folder of the tests' own for compiled steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
