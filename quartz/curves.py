"""The curves of runs, from the log.jsonl that each has written: loss, learning rate, gradient norm and throughput.

`read` takes a log apart, `draw` makes one figure of one log or of several, `write` puts it on the disk as PNG or SVG.
Only `draw` and `write` need matplotlib, and they leave its global state alone: no pyplot, no display.
"""

import contextlib
import io
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quartz import files

LOG, PICTURE = "log.jsonl", "curves.png"
# Okabe and Ito's colours (2008), which the colour-blind tell apart, without yellow; from the eighth run on, dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
LOOKS = [{"color": colour, "linestyle": dash} for dash in ("-", "--", ":") for colour in COLOURS]
GREY = "#555555"
GIANT = 1e39  # no float32 is as large
RAW, SMOOTH = {"linewidth": 0.6, "alpha": 0.3, "zorder": 2}, {"linewidth": 1.3, "alpha": 0.6, "zorder": 3}
FAINT = {**RAW, "alpha": 0.15}  # of several runs
TRAIN = {"linewidth": 0.8, "marker": "o", "markersize": 4, "markerfacecolor": "white", "zorder": 4}
VAL = {"linewidth": 1.8, "marker": "o", "markersize": 4, "zorder": 5}
BINS = 500  # a longer series is drawn as the lowest and the highest value in each of so many stretches of it
SMOOTHED_OVER = 0.02  # share of a series, on either side of a point, whose mean the smoothed line is
SHOWN = 0.95  # share of a run's losses for which the axis has room: the first ones would flatten all that follow
MARGIN = 0.06  # share of that range, above and below
DOTS = 40  # more evaluations than this are a line without dots
WIDTH, PANELS, ROW = 13, 7.2, 0.25  # inches: of the figure; height of the panels, and of a row of the legend
ONE_COLUMN = 4  # the legend of more runs has two columns
NAME = 45  # the legend shows so many characters of a run's name, its last
TIMES = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
COUNTS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


class Run(NamedTuple):
    """A log as columns of float64, by the names of its keys; what a record lacks, or holds as null, is NaN."""

    name: str
    updates: dict[str, np.ndarray]  # iter, loss, lr, grad_norm, tokens_per_s, tokens, seconds
    evaluations: dict[str, np.ndarray]  # iter (the log's step), train_loss, val_loss, tokens, seconds


def records(path: Path) -> Iterator[dict]:
    """The records of a log. Lines that are none, such as a last one that a kill has torn, are left out.

    Each has "tokens" and "seconds", trained on and spent in updates up to then. Where a log is from before both were
    written, they follow from the speed of its updates, or are None. Raises OSError.
    """
    made, one = None, {"tokens": math.nan, "seconds": math.nan}  # the number of updates, and what one of them takes
    so_far = {"tokens": 0, "seconds": 0.0}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                before = record["iter"] if "iter" in record else record["step"]  # so many updates
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if type(before) is not int or not 0 <= before < 2**53:
                continue
            now, made = before + ("iter" in record), before if made is None else made
            seconds, rate = _number(record.get("ms")) / 1000, _number(record.get("tokens_per_s"))
            if math.isfinite(seconds * rate):
                one = {"tokens": round(seconds * rate), "seconds": seconds}
            for key in so_far:
                if math.isfinite(_number(record.get(key))):
                    so_far[key] = record[key]
                elif now > made:
                    so_far[key] += (now - made) * one[key]
                record[key] = so_far[key] if math.isfinite(so_far[key]) else None
            made = max(now, made)
            yield record


def _number(value: object) -> float:
    try:
        return float(value) if type(value) in (int, float) and abs(value) < GIANT else math.nan
    except OverflowError:  # an int of hundreds of digits
        return math.nan


def read(folder: Path, name: str = "") -> Run:
    """The log in a run's folder. Raises OSError."""
    updates = {key: [] for key in ("iter", "loss", "lr", "grad_norm", "tokens_per_s", "tokens", "seconds")}
    evaluations = {key: [] for key in ("step", "train_loss", "val_loss", "tokens", "seconds")}
    for record in records(folder / LOG):
        for key, values in (updates if "iter" in record else evaluations).items():
            values.append(_number(record.get(key)))
    evaluations["iter"] = evaluations.pop("step")
    return Run(name, *({key: np.array(values) for key, values in kind.items()} for kind in (updates, evaluations)))


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call runs: by their folders' own names, or, where two have the same, as they were given."""
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [name.encode("utf-8", "replace").decode() for name in names]  # a folder's name may be any bytes


def draw(runs: Sequence[Run]):
    """A matplotlib Figure of all runs, a colour for each. Raises ModuleNotFoundError without matplotlib."""
    with _style():
        from matplotlib.figure import Figure

        rows = len(runs) if len(runs) <= ONE_COLUMN else math.ceil(len(runs) / 2)
        height = PANELS + ROW * rows
        figure = Figure(figsize=(WIDTH, height), dpi=100)
        edges = {"left": 0.05, "right": 0.985, "bottom": 0.55 / height, "top": 1 - (0.5 + ROW * rows) / height}
        axes = figure.subplots(2, 3, gridspec_kw={**edges, "hspace": 0.33, "wspace": 0.17, "height_ratios": [1.6, 1]})
        looks = list(itertools.islice(itertools.cycle(LOOKS), len(runs)))
        raw = RAW if len(runs) == 1 else FAINT
        seconds, unit = _unit_of_time(runs)
        against = (("iter", "iterations", 1), ("tokens", "tokens", 1), ("seconds", f"{unit} of training", seconds))
        for ax, (key, label, scale) in zip(axes[0], against, strict=True):
            for run, look in zip(runs, looks, strict=True):
                _noisy(ax, run.updates[key] / scale, run.updates["loss"], look, raw)
                for loss, style in (("train_loss", TRAIN), ("val_loss", VAL))[len(runs) > 1 :]:
                    _evaluated(ax, run.evaluations[key] / scale, run.evaluations[loss], {**look, **style})
            ax.set_ylim(_loss_limits(runs))
            _finish(ax, "loss", label)
        rate, norm, speed = axes[1]
        for run, look in zip(runs, looks, strict=True):
            iterations, norms = run.updates["iter"], run.updates["grad_norm"]
            _line(rate, iterations, run.updates["lr"], {**look, **SMOOTH})
            _noisy(norm, iterations, np.where(norms > 0, norms, np.nan), look, raw, is_log=True)
            _noisy(speed, iterations, run.updates["tokens_per_s"], look, raw)
        norms = np.concatenate([line.get_ydata() for line in norm.lines] or [[]])
        if len(norms) and norms.max() > 10 * norms.min():
            norm.set_yscale("log")
        rate.set_ylim(bottom=0)
        speed.set_ylim(bottom=0)
        for ax, title in zip(axes[1], ("learning rate", "gradient norm", "tokens per second"), strict=True):
            _finish(ax, title, "iterations")
        _explain(figure, axes[0, 0], runs, looks)
        return figure


def write(runs: Sequence[Run], path: Path) -> None:
    """Draws runs to a file, PNG or SVG by its ending: the path holds the old picture or the new one, never a part.

    Raises ModuleNotFoundError without matplotlib, OSError where the disk refuses.
    """
    figure, picture, kind = draw(runs), io.BytesIO(), path.suffix.lower().removeprefix(".")
    with _style():
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    files.write(path, picture.getvalue())


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's file of them says, with ours on top."""
    import matplotlib

    ours = {
        "font.size": 10,
        "text.parse_math": False,  # a run may be called $a$
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": PICTURE,  # the same curves, the same file
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titley": 1.0,  # or all texts around are measured for it
        "axes.xmargin": 0.015,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with warnings.catch_warnings(), matplotlib.rc_context({**defaults, **ours}):
        warnings.simplefilter("ignore")  # about characters that the font lacks
        yield


def _line(ax, x: np.ndarray, y: np.ndarray, look: dict) -> None:
    """What is known of a series; of a long one, the lowest and the highest value in each of BINS stretches."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) > 2 * BINS:
        first = np.linspace(0, len(y), BINS, endpoint=False).astype(int)
        x = np.repeat(x[first], 2)
        y = np.stack([np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)], axis=1).ravel()
    if len(y):
        ax.plot(x, y, **{"marker": "o" if len(y) == 1 else None, **look})


def _noisy(ax, x: np.ndarray, y: np.ndarray, look: dict, raw: dict, is_log: bool = False) -> None:
    """A series as it is, thin and light, and smoothed."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    _line(ax, x, y, {**look, **raw})
    _line(ax, x, np.exp(_smoothed(np.log(y))) if is_log else _smoothed(y), {**look, **SMOOTH})


def _smoothed(y: np.ndarray) -> np.ndarray:
    """The means of each value's surroundings; at the start, where a loss falls steeply, these are narrow."""
    n = np.arange(len(y))
    reach = np.minimum(n, int(SMOOTHED_OVER * len(y)))
    sums, first, end = np.concatenate([[0.0], y.cumsum()]), n - reach, np.minimum(n + reach + 1, len(y))
    return (sums[end] - sums[first]) / (end - first)


def _evaluated(ax, x: np.ndarray, y: np.ndarray, look: dict) -> None:
    if np.isfinite(y).sum() > DOTS:
        look = {**look, "marker": None}
    _line(ax, x, y, look)


def _loss_limits(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """The range of losses to show: SHOWN of each run's, and none far above those that the runs began with."""
    lowest, highest, firsts = [], [], []
    for run in runs:
        known = run.updates["loss"][np.isfinite(run.updates["loss"])]
        evaluated = np.concatenate([run.evaluations["train_loss"], run.evaluations["val_loss"]])
        shown = np.concatenate([_smoothed(known), evaluated[np.isfinite(evaluated)]])
        if len(shown):
            lowest.append(shown.min())
            highest.append(np.quantile(shown, SHOWN))
            firsts.append(shown[0])
    if not lowest or min(max(highest), max(firsts)) <= min(lowest):
        return None, None
    low, high = min(lowest), min(max(highest), max(firsts))
    margin = MARGIN * (high - low)
    return low - margin, high + margin


def _unit_of_time(runs: Sequence[Run]) -> tuple[int, str]:
    longest = max((np.nanmax(kind["seconds"], initial=0) for run in runs for kind in run[1:]), default=0)
    return next((seconds, name) for least, seconds, name in TIMES if longest >= least)


def _short(value: float, _=None) -> str:
    """1500 as 1.5k."""
    size, letter = next((count for count in COUNTS if count[0] <= abs(value) < 1000 * count[0]), (1, ""))
    return f"{value / size:.12g}{letter}"


def _finish(ax, title: str, label: str) -> None:
    """Title, label and ticks of a panel whose lines are drawn."""
    from matplotlib import ticker

    ax.set_title(title)
    ax.set_xlabel(label)
    for axis in (ax.xaxis, ax.yaxis):
        is_log = axis.get_scale() == "log"
        axis.set_major_locator(ticker.LogLocator(subs=(1, 3)) if is_log else ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(_short)
    ax.tick_params(length=0)
    if not ax.lines:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "nothing of it is in the log", ha="center", color=GREY, transform=ax.transAxes)


def _explain(figure, ax, runs: Sequence[Run], looks: list[dict]) -> None:
    """Two legends: the runs and how good they became, above all panels; the kinds of lines, in the first."""
    from matplotlib.lines import Line2D

    labels = []
    for run in runs:
        name = run.name if len(run.name) <= NAME else "…" + run.name[1 - NAME :]
        losses, best = run.evaluations["val_loss"], ""
        if np.isfinite(losses).any():
            nth = np.nanargmin(losses)
            best = f"    best validation loss {losses[nth]:.4f}, at iteration {run.evaluations['iter'][nth]:,.0f}"
        labels.append(f" {name}{best}")  # one that began with _ would be left out
    handles = [Line2D([], [], linewidth=3, **look) for look in looks]
    columns = 1 if len(runs) <= ONE_COLUMN else 2
    place = {"loc": "upper left", "bbox_to_anchor": (0.04, 1)}
    figure.legend(handles, labels, **place, ncols=columns, fontsize=11, handlelength=2.5)
    kinds = {
        "in training": RAW,
        "the same, smoothed": SMOOTH,
        "evaluated, training": TRAIN,
        "evaluated, validation": VAL,
    }
    if len(runs) > 1:
        del kinds["evaluated, training"]
    handles = [Line2D([], [], color="black", **look) for look in kinds.values()]
    ax.legend(handles, kinds, loc="upper right", fontsize=9)
