import json
import os
import random

import numpy as np
import pytest

from quartz import curves

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def matplotlib_is_missing():
    """It is there."""


@pytest.fixture
def logged(tmp_path):
    """logged("a", records or lines) writes the log of a run; returns what is read from it."""

    def logged(name: str, *lines) -> curves.Run:
        (tmp_path / name).mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name / "log.jsonl").write_text("\n".join(texts) + "\n")
        return curves.read(tmp_path / name, name)

    return logged


def update(n: int, loss: float | None, **more) -> dict:
    plain = {"iter": n, "loss": loss, "lr": 0.1 / (n + 1), "ms": 500.0, "tokens_per_s": 200.0, "grad_norm": 2.0 + n}
    return {**plain, "tokens": 100 * (n + 1), "seconds": 0.5 * (n + 1), **more}


def evaluation(n: int, train: float, val: float) -> dict:
    return {"step": n, "train_loss": train, "val_loss": val, "lr": 0.1, "tokens": 100 * n, "seconds": 0.5 * n}


LOG = [evaluation(0, 5.0, 5.1), update(0, 5.0), update(1, 4.0), evaluation(2, 3.5, 3.75), update(2, 3.0)]


def panels(runs) -> dict[str, list]:
    """The lines of each panel, by its title and what is below it: colour, x and y."""
    return {
        (ax.get_title("left"), ax.get_xlabel()): [
            (line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines
        ]
        for ax in curves.draw(runs).axes
    }


def test_what_is_drawn_is_what_the_log_holds(logged):
    drawn = panels([logged("a", *LOG)])
    assert len(drawn) == 6
    axes = {
        "iterations": ([0, 1, 2], [0, 2]),
        "tokens": ([100, 200, 300], [0, 200]),
        "seconds of training": ([0.5, 1, 1.5], [0, 1]),
    }
    for label, (x, x_evaluated) in axes.items():
        raw, _, train, val = [line[1:] for line in drawn["loss", label]]
        assert raw == (x, [5, 4, 3])
        assert train == (x_evaluated, [5, 3.5]) and val == (x_evaluated, [5.1, 3.75])
    assert [line[1:] for line in drawn["learning rate", "iterations"]] == [([0, 1, 2], [0.1, 0.1 / 2, 0.1 / 3])]
    assert drawn["gradient norm", "iterations"][0][1:] == ([0, 1, 2], [2, 3, 4])
    assert drawn["tokens per second", "iterations"][0][1:] == ([0, 1, 2], [200] * 3)


def test_each_run_has_one_colour_and_its_name_and_best_loss_stand_above(logged):
    runs = [logged("a", *LOG), logged("_b", *LOG, evaluation(3, 2.0, 1.23456)), logged("$c$", update(0, 3.0))]
    drawn = panels(runs)
    assert all(
        dict.fromkeys(colour for colour, *_ in lines).keys() == set(curves.COLOURS[:3]) for lines in drawn.values()
    )
    texts = [text.get_text() for text in curves.draw(runs).legends[0].get_texts()]
    assert "a " in texts[0] and "3.7500, at iteration 2" in texts[0]
    assert "_b " in texts[1] and "1.2346, at iteration 3" in texts[1]
    assert texts[2].strip() == "$c$"


def test_the_looks_of_twenty_runs_differ(logged):
    figure = curves.draw([logged(f"run {n}", *LOG) for n in range(20)])
    looks = {(line.get_color(), str(line.get_linestyle())) for line in figure.legends[0].get_lines()}
    assert len(looks) == 20 and len(figure.legends[0].get_texts()) == 20


def test_a_long_log_is_thinned_and_keeps_its_extremes(logged):
    n = 20_000
    values = [random.Random(i).uniform(2, 3) for i in range(n)]
    values[12_345], values[777] = 9.0, 1.0
    raw, smoothed = panels([logged("a", *[update(i, value) for i, value in enumerate(values)])])["loss", "iterations"]
    assert len(raw[1]) == 2 * curves.BINS == len(smoothed[1])
    width = n / curves.BINS
    assert abs(raw[1][raw[2].index(9.0)] - 12_345) < width and abs(raw[1][raw[2].index(1.0)] - 777) < width
    assert max(smoothed[2][100:]) < 2.6 and min(smoothed[2][100:]) > 2.4


def test_the_smoothed_line_is_the_mean_around_each_value():
    values = np.array([random.Random(n).random() for n in range(333)])
    reach = 6  # 2% of them
    naive = [values[n - min(n, reach) : n + min(n, reach) + 1].mean() for n in range(333)]
    np.testing.assert_allclose(curves._smoothed(values), naive)


def test_neither_the_first_losses_nor_a_run_that_diverged_hide_the_others(logged):
    falling = [update(n, 1.5 + 9.3 / (1 + n)) for n in range(1000)]
    low, high = curves.draw([logged("a", *falling)]).axes[0].get_ylim()
    assert 1.4 < low < 1.52 and 1.6 < high < 4
    gone = [update(n, 4.0 if n < 300 else 1e6) for n in range(1000)]
    low, high = curves.draw([logged("a", *falling), logged("b", *gone)]).axes[0].get_ylim()
    assert low < 1.5 and 4 < high < 12


def test_a_gradient_norm_over_decades_is_drawn_to_a_logarithm(logged):
    norm = curves.draw([logged("a", *LOG)]).axes[4]
    assert norm.get_yscale() == "linear"
    wild = curves.draw([logged("a", *LOG, update(3, 3.0, grad_norm=1e30), update(4, 3.0, grad_norm=0.0))]).axes[4]
    assert wild.get_yscale() == "log" and list(wild.lines[0].get_ydata()) == [2, 3, 4, 1e30]


def test_a_log_of_before_tokens_and_seconds_is_drawn_against_both(logged):
    old = [{k: v for k, v in r.items() if k != "seconds" and (k != "tokens" or "step" in r)} for r in LOG]
    assert panels([logged("a", *old)]) == panels([logged("a", *LOG)])
    sparse = [{**old[1], "iter": n} for n in (0, 10, 20)]  # of the updates in between, each takes as long
    run = logged("a", *sparse)
    assert list(run.updates["tokens"]) == [100, 1100, 2100] and list(run.updates["seconds"]) == [0.5, 5.5, 10.5]


LITTLE = {
    "one evaluation": [evaluation(0, 5.0, 5.1)],
    "evaluations alone": [evaluation(n, 5.0 - n, 5.1 - n) for n in range(3)],
    "evaluations of an old log": [{"step": n, "train_loss": 5.0, "val_loss": 4.0} for n in range(3)],
    "one update": [update(0, 5.0)],
    "equal losses": [update(n, 2.0) for n in range(9)],
    "nulls": [update(0, None, grad_norm=None), update(1, None, lr=None, ms=None, tokens_per_s=None)],
    "loss alone": [{"iter": n, "loss": 3.0} for n in range(5)],
    "other types": [update(0, "high", lr=[1], ms={}, tokens="x"), update(1, 10**400, seconds=True), update(2, 1e308)],
    "not finite": ['{"iter": 0, "loss": NaN, "ms": Infinity, "tokens_per_s": 1e999, "seconds": -Infinity}'],
    "nothing": [],
}


@pytest.mark.parametrize("lines", LITTLE.values(), ids=LITTLE)
def test_a_log_with_little_in_it_is_drawn(logged, tmp_path, lines):
    run = logged("a", *lines)
    for runs in ([run], [run, logged("b", *LOG)]):
        curves.write(runs, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nulls_are_left_out_and_all_else_stays(logged):
    run = logged("a", update(0, 5.0), update(1, None, grad_norm=None), update(2, 3.0))
    drawn = panels([run])
    assert drawn["loss", "iterations"][0][1:] == ([0, 2], [5, 3])
    assert drawn["gradient norm", "iterations"][0][1:] == ([0, 2], [2, 4])
    assert drawn["learning rate", "iterations"][0][1] == [0, 1, 2]


TORN = ['{"iter": 3, "lo', "", "null", "3", "[1]", '{"loss": 3}', '{"iter": "3"}', '{"step": 1.5}', '{"iter": true}']
TORN += ['{"iter": -1}', '{"iter": 1' + "0" * 400 + "}", "[" * 100_000, '{"iter": null}', "\ufffd\0"]


def test_lines_that_are_no_records_are_left_out(logged):
    whole = str(logged("a", *LOG))
    for line in TORN:
        assert str(logged("a", *LOG, line)) == whole, line[:50]
    assert str(logged("a", *[part for line in LOG for part in (line, TORN[0])])) == whole


def test_runs_are_called_by_their_folders_or_where_these_are_equal_by_their_paths(tmp_path, monkeypatch):
    for name in ("a", "b/a", "c"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "c")
    folders = [tmp_path / "a", tmp_path / "b" / "a", curves.Path(".")]
    assert curves.names_of(folders) == [str(folders[0]), str(folders[1]), "c"]


def test_a_picture_is_written_whole_or_not_at_all(logged, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"before")

    def fail(*arguments):
        assert path.read_bytes() == b"before"
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        curves.write([logged("a", *LOG)], path)
    assert path.read_bytes() == b"before" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_log_gives_the_same_file_and_matplotlib_keeps_its_settings(logged, tmp_path, kind):
    import matplotlib

    run = logged("a", *LOG)
    before = dict(matplotlib.rcParams)
    curves.write([run], tmp_path / f"1.{kind}")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"lines.color": "red", "font.size": 30, "text.usetex": True}):
        curves.write([run], tmp_path / f"2.{kind}")
    assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()
