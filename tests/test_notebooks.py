"""The notebooks: they run, also without Jupyter, and what is committed of them is whole."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
RESULTS = FOLDER / "scaling_laws.jsonl"


@pytest.fixture(autouse=True)
def matplotlib_is_missing():
    """Not here."""


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def execute(name: str) -> dict:
    """Runs a notebook's code, a cell after the other, in plain Python; returns its variables."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    variables, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*non-interactive")  # of show(), without Jupyter
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|pyparsing")  # of each other
        for number, cell in enumerate(read(name)["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), variables)
    plt.close("all")
    torch.set_num_threads(threads)
    return variables


@pytest.fixture
def sweep(monkeypatch):
    """notebooks/sweep.py as a module."""
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    spec = importlib.util.spec_from_file_location("sweep", FOLDER / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_sizing_notebooks_formulas_agree_with_the_real_model(monkeypatch):
    monkeypatch.chdir(FOLDER)
    variables = execute("transformer_sizing.ipynb")  # which asserts as it goes
    assert sum(variables["parameters"](variables["zoo"]["gpt2"]).values()) == 124_439_808


def test_the_scaling_notebook_fits_the_committed_runs_and_finds_a_known_law(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # as the notebook does, but not for other tests
    variables = execute("scaling_laws.ipynb")
    for values in (variables["a_profile"], variables["b_profile"], variables["ours"]["a"]):
        assert 0.2 < values < 0.9
    n, d = np.meshgrid(np.geomspace(1e4, 1e6, 6), np.geomspace(1e5, 1e7, 6))
    loss = 0.9 + 40 / n**0.5 + 90 / d**0.4
    found = variables["fit"](n.ravel(), d.ravel(), loss.ravel())[0]
    known = {"E": 0.9, "A": 40, "B": 90, "alpha": 0.5, "beta": 0.4}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_as_executed_with_pictures_and_without_errors(name):
    notebook = read(name)
    assert (FOLDER / name).stat().st_size < 500_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = json.dumps([{k: v for k, v in output.get("data", output).items() if k != "image/png"} for output in outputs])
    for path in (str(ROOT), "/home/", "/tmp/", "/root/", "site-packages"):
        assert path not in text, path


def test_the_sweeps_results_are_whole_and_hold_each_of_its_runs(sweep):
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    there = [sweep.Point(*(line[name] for name in sweep.Point._fields)) for line in lines]
    assert sorted(there) == sorted(sweep.points())
    for line, point in zip(lines, there, strict=True):
        with torch.device("meta"):
            model = sweep.GPT(point.config(96))
        assert line["params"] == model.get_num_params(non_embedding=False)
        assert line["params_blocks"] < line["params"]
        assert line["tokens"] == line["updates"] * sweep.BATCH_SIZE * sweep.BLOCK_SIZE
        assert line["flops"] == line["tokens"] * model.flops_per_token()
        assert line["flops"] == pytest.approx(line["budget"], rel=0.01)
        assert 0 < line["epochs"] <= 2 and 0.5 < line["val_loss"] < 4 and line["seconds"] > 0


def test_a_sweep_that_was_stopped_goes_on_with_the_runs_that_are_missing(sweep, tiny, monkeypatch, capsys):
    points, path = [sweep.Point(2e9, 1, width) for width in (8, 16)], tiny / "results.jsonl"
    before = json.dumps(points[0]._asdict()) + "\n"
    path.write_text(before)
    monkeypatch.setattr(sweep, "points", lambda: points)
    monkeypatch.setattr(sweep, "results", str(path))
    monkeypatch.setattr(sweep, "DATASET", str(tiny / "data" / "tiny"))
    monkeypatch.setattr(sweep, "EVALUATION_ROWS", 64)
    sweep.SETTINGS["dataset"] = sweep.DATASET
    sweep.main()
    assert "1 runs to go" in capsys.readouterr().out
    first, second = path.read_text().splitlines(keepends=True)
    found = json.loads(second)
    assert first == before and found["n_embd"] == 16
    assert found["flops"] == pytest.approx(2e9, rel=0.2) and 0 < found["val_loss"] < 4
