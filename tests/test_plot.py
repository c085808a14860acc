import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_same_run, assert_user_error

from quartz import curves, log
from quartz.checkpoint import Progress

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def matplotlib_is_missing():
    """It is there."""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder to stand in, with runs out-a, out-b and other/out-a."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("out-a", "out-b", "other/out-a")):
        (tmp_path / name).mkdir(parents=True)
        lines = [{"iter": n, "loss": 3.0 - n / 10 - number, "lr": 0.1, "tokens": n, "seconds": n} for n in range(9)]
        lines += [{"step": 9, "train_loss": 2.0, "val_loss": 2.5 - number, "lr": 0.1, "tokens": 9, "seconds": 9}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_one_run_is_drawn_into_its_folder_and_several_where_you_stand(runs, run):
    result = run("plot.py", "out-a")
    assert (result.code, result.out, result.err) == (0, "drew out-a/curves.png\n", "") and is_png(
        runs / "out-a/curves.png"
    )
    assert run("plot.py", "out-a", "out-b/").code == 0 and is_png(runs / "curves.png")
    assert not (runs / "out-b" / "curves.png").exists()
    assert run("plot.py", "out-b", "out-b/", "./out-b").out == "drew out-b/curves.png\n"


def test_an_svg_holds_names_and_losses_as_text(runs, run):
    assert run("plot.py", "out-a", "--out=x.SVG", "out-b", "other/out-a").code == 0
    text = (runs / "x.SVG").read_text()
    for words in ("out-a ", "out-b ", "other/out-a ", "2.5000", "1.5000", "0.5000", "iterations", "tokens", "gradient"):
        assert words in text, words


def test_a_config_file_may_name_the_picture(runs, run):
    (runs / "c.py").write_text("out = 'named.png'\n")
    assert run("plot.py", "c.py", "out-a").code == 0 and is_png(runs / "named.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["python plot.py OUT_DIR"]),
        (["nowhere"], ["'nowhere' has no log.jsonl"]),
        (["out-a", "other"], ["'other' has no log.jsonl"]),
        (["out-a/log.jsonl"], ["out-a/log.jsonl", "out_dir"]),
        (["empty"], ["empty/log.jsonl holds no figures yet"]),
        (["out-a", "--ouut=x.png"], ["'out'"]),
        (["out-a", "-x"], ["--key=value"]),
        (["out-a", "--out=x.pdf"], ["out must end", "x.pdf"]),
        (["out-a", "--out=no/folder/x.png"], ["no/folder/x.png can't be written: No such file"]),
        (["out-a", "--out=folder.png"], ["folder.png can't be written"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(runs, run, arguments, words):
    (runs / "empty").mkdir()
    (runs / "empty" / "log.jsonl").touch()
    (runs / "folder.png").mkdir()
    result = run("plot.py", *arguments)
    assert_user_error(result, *words)
    assert result.err.count("\n") == 1 and not list(runs.glob("**/*.tmp"))


def test_all_mistakes_are_told_at_once(runs, run):
    assert run("plot.py", "no", "nor", "--out=x").err.count("error: ") == 3


def test_without_matplotlib_a_line_says_what_to_install(runs, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_user_error(run("plot.py", "out-a"), "matplotlib", "pip install -e .[plot]")


def test_help_says_how_and_needs_neither_torch_nor_matplotlib(tmp_path):
    for name in ("torch", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    command = [sys.executable, ROOT / "plot.py", "out-a", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "python plot.py out-adamw out-muon" in result.stdout and "  --out=''  (str)  .png or .svg" in result.stdout


# curves.png, as train.py refreshes it


@pytest.fixture
def drawings(monkeypatch):
    """What each drawing had to draw: the run's name, the last update and the last evaluation."""
    plain, made = curves.write, []

    def write(runs, path):
        plain(runs, path)
        made.append((runs[0].name, runs[0].updates["iter"].max(initial=-1), runs[0].evaluations["iter"][-1]))

    monkeypatch.setattr(curves, "write", write)
    return made


def test_every_evaluation_is_drawn_where_time_allows_and_the_end_once(tiny, train, drawings, monkeypatch):
    monkeypatch.setattr(log, "DRAWING_SHARE", 1e9)
    assert train(max_iters=12).code == 0
    assert drawings == [("out", -1, 0), ("out", 4, 5), ("out", 9, 10), ("out", 11, 12)]
    assert is_png(tiny / "out" / "curves.png") and not list((tiny / "out").glob("*.tmp"))


def test_a_short_run_is_drawn_at_its_end(tiny, train, drawings):
    assert train(max_iters=12).code == 0
    assert drawings == [("out", 11, 12)]


def test_drawing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """Evaluations come every 10 seconds, and a drawing takes 2: the first comes after 100, the others 200 apart."""
    now, drawn = [0.0], []

    def write(runs, path):
        drawn.append(now[0])
        now[0] += 2

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(curves, "write", write)
    report = log.Log(tmp_path, True, Progress(), 100)
    for step in range(100):
        report.evaluation(step, {"train": 1.0, "val": 1.0}, 0.1, 0)
        report.draw()
        now[0] += 10
    assert len(drawn) == 1 + 4 and drawn[0] == 110
    assert all(200 < later - earlier - 2 <= 210 for earlier, later in zip(drawn, drawn[1:], strict=False))
    report.close()
    assert len(drawn) == 6


def test_a_stopped_run_is_drawn_and_its_resumption_draws_all_of_it(tiny, train, drawings):
    assert train(max_iters=4).code == 0 and train(max_iters=8, init_from="resume").code == 0
    assert drawings == [("out", 3, 4), ("out", 7, 8)]


def test_a_drawing_that_fails_is_one_warning_and_changes_nothing(tiny, train, monkeypatch):
    assert train(out_dir="whole").code == 0

    def fail(*arguments):
        raise ValueError("no such colour")

    monkeypatch.setattr(curves, "draw", fail)
    monkeypatch.setattr(log, "DRAWING_SHARE", 1e9)
    result = train()
    assert result.code == 0 and result.err.count("\n") == 1
    assert "warning: out/curves.png could not be drawn (no such colour)" in result.err
    assert_same_run(tiny / "out", tiny / "whole")


def test_without_matplotlib_a_run_says_nothing_of_curves(tiny, train, monkeypatch):
    assert train(out_dir="whole").code == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = train()
    assert result.code == 0 and result.err == "" and not list((tiny / "out").glob("curves*"))
    assert_same_run(tiny / "out", tiny / "whole")


def test_eval_only_draws_nothing(tiny, train, drawings):
    assert train(eval_only=True).code == 0 and drawings == []


def test_a_picture_that_can_not_be_written_stops_no_run(tiny, train):
    (tiny / "out" / "curves.png").mkdir(parents=True)
    result = train()
    assert result.code == 0 and "warning: out/curves.png could not be drawn" in result.err
