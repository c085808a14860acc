import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT, assert_user_error

import configurator


@pytest.fixture
def configure(capsys, tmp_path, monkeypatch):
    """Configures a small script's settings; returns them, or the error lines."""
    monkeypatch.chdir(tmp_path)

    def configure(*argv):
        scope = {"rate": 0.1, "size": 4, "on": True, "name": "a", "_hidden": 1, "os": sys}
        try:
            given = configurator.configure(scope, list(argv))
        except SystemExit as stop:
            assert stop.code == 2 and scope["size"] == 4 and scope["rate"] == 0.1
            return capsys.readouterr().err.splitlines()
        return scope, given

    return configure


def test_a_key_is_not_shown(capsys):
    scope = {"api_key": "", "host": ""}
    configurator.configure(scope, ["--api_key=secret", "--host=h"])
    assert scope["api_key"] == "secret" and capsys.readouterr().err == (
        "Overriding: api_key = (not shown)\nOverriding: host = 'h'\n"
    )


def test_arguments_and_files_apply_from_left_to_right(configure, tmp_path):
    (tmp_path / "c.py").write_text("import time\n_half = 6\nsize = _half * 2\nname = 'from file'\nrate = 0.1\n")
    scope, given = configure("--size=1", "c.py", "--name=x=y")
    assert (scope["size"], scope["name"]) == (12, "x=y")
    assert given == {"size", "name", "rate"}  # rate is given although its value is the default's
    assert configure("c.py", "--size=1")[0]["size"] == 1


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--rate=1", "rate", 1.0),
        ("--rate=1e-3", "rate", 1e-3),
        ("--on=False", "on", False),
        ("--name=42", "name", "42"),
        ("--name='42'", "name", "42"),
        ("--name=", "name", ""),
        ("--size=-1_000", "size", -1000),
    ],
)
def test_values_keep_the_type_of_the_default(configure, argument, name, value):
    scope, _ = configure(argument)
    assert scope[name] == value and type(scope[name]) is type(value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--sice=3", "'size'"),
        ("/dev/zero", "not there"),
        ("--size=3.0", "whole number"),
        ("--size=True", "whole number"),
        ("--on=1", "True or False"),
        ("--on=false", "True or False"),
        ("--rate=fast", "a number"),
        ("--rate=" + "9" * 400, "a number"),
        ("--size", "--key=value"),
        ("-size=3", "--key=value"),
        ("--_hidden=2", "unknown"),
        ("--os=2", "unknown"),
        ("missing.py", "missing.py"),
        ("--size=" + "(" * 5000, "whole number"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(configure, argument, words):
    lines = configure("--size=9", argument)
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sice = 3", "'size'"),
        ("size = 'a'", "whole number"),
        ("size = = 3", "line 1"),
        ("1 / 0", "ZeroDivisionError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("size = [3]", "whole number"),
        ("sizes = [3]", "'size'"),
        ("\0", "c.py"),
        ("# coding: rot13\nsize = 3", "c.py"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("size = 9; raise BaseException('x')", "BaseException"),
        ("rate = 10 ** 5000", "a number"),
        ("globals()[3] = 3", "3"),
        ("globals()[''] = 3", "unknown"),
        ("del size", "deletes the setting 'size'"),
        ("class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E", "ZeroDivisionError"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(configure, tmp_path, source, words):
    (tmp_path / "c.py").write_text(source + "\n")
    lines = configure("c.py")
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0] and "c.py" in lines[0]


def test_a_config_file_that_is_no_text_is_one_line(configure, tmp_path):
    (tmp_path / "c.py").write_bytes(b"size = '\xff\xfe'\n")
    assert len(configure("c.py")) == 1
    assert len(configure(str(tmp_path))) == 1  # a folder


def test_names_inside_functions_are_no_settings_and_helpers_pass_on(configure, tmp_path):
    (tmp_path / "a.py").write_text(
        "from __future__ import annotations\nfrom math import pi\n_base = 3\n"
        "def _twice(n):\n    size = 2 * n\n    return size\n_all = [size for size in range(2)]\n"
    )
    (tmp_path / "b.py").write_text("rate = _twice(_base) * 0.5\n")
    scope, given = configure("a.py", "b.py")
    assert given == {"rate"} and scope["rate"] == 3.0 and scope["size"] == 4


def test_all_mistakes_are_reported_at_once(configure, tmp_path):
    (tmp_path / "c.py").write_text("foo = 1\nbar = 2\n")
    assert len(configure("--sise=1", "c.py", "--on=2")) == 4


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_every_setting_has_a_help_text_and_help_needs_no_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("  --")]
    assert len(rows) > 10
    assert all(row.split(")  ", 1)[-1].strip() for row in rows) and all(")  " in row for row in rows)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_on_any_terminal_and_to_a_reader_that_leaves(flag):
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    for command in (
        f"{sys.executable} {ROOT / 'train.py'} {flag}",
        f"{sys.executable} {ROOT / 'train.py'} {flag} | true",
    ):
        result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
        assert result.returncode == 0 and result.stderr == ""


def test_memory_and_disk_that_run_out_are_one_line(capsys):
    full, denied = OSError(errno.ENOSPC, "No space left"), PermissionError(errno.EACCES, "Permission denied", "x/y")
    hidden = RuntimeError("unexpected pos")  # as torch raises it
    hidden.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded", "x/z")
    lines = {
        MemoryError("x"): "not enough memory",
        RuntimeError("CUDA out of memory"): "not enough memory",
        full: "standard output can't be written: the disk is full (No space left)",
        denied: "x/y can't be opened: Permission denied",
        hidden: "x/z can't be written: the quota of the disk is used up (Disk quota exceeded)",
        ValueError("I/O error: (os error 30)"): "a file can't be written: the disk is for reading only",
    }
    for error, line in lines.items():
        with pytest.raises(SystemExit) as stop, configurator.user_errors():
            raise error
        told = capsys.readouterr().err
        assert stop.value.code == 2 and told.count("\n") == 1 and line in told


def test_a_bug_raises():
    with pytest.raises(ZeroDivisionError), configurator.user_errors():
        1 / 0  # noqa: B018


def test_error_lines_hold_no_line_breaks(capsys):
    with pytest.raises(SystemExit), configurator.user_errors():
        raise configurator.UserError("one\n  line", "two")
    assert capsys.readouterr().err == "error: one line\nerror: two\n"


NANOGPT_TRAIN = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
    wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout
    bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend
    device dtype compile"""
NANOGPT_SAMPLE = """init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile"""


@pytest.mark.parametrize(("script", "names"), [("train.py", NANOGPT_TRAIN), ("sample.py", NANOGPT_SAMPLE)])
def test_every_setting_of_nanogpt_is_there(run, script, names):
    result = run(script, "--help")
    assert all(f"--{name}=" in result.out for name in names.split())


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "config").glob("*.py")))
def test_every_preset_sets_only_settings_that_exist(run, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train.py", ROOT / "config" / preset, "--dataset=missing", "--init_from=scratch", "--device=cpu")
    assert_user_error(result, "'missing' is not prepared")
    assert result.err.count("error:") == 1


def test_garbage_is_collected_as_ever_while_a_program_works(tmp_path):
    """Less of it is looked for while a program is loaded, and none at its end."""
    (tmp_path / "verb.py").write_text(
        f"import gc, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import configurator\n"
        "before, size = gc.get_threshold(), 1\n"
        "configurator.configure(globals())\n"
        "loading = gc.get_threshold()\n"
        "with configurator.user_errors():\n"
        "    print(gc.isenabled(), gc.get_threshold() == before, loading[1] > before[1])\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "verb.py"], capture_output=True, text=True)
    assert done.stdout == "True True True\n", done.stderr
