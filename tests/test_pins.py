"""What make installs: the lock, the lower bounds, and the torch that somebody has."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pins
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = (("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows"))


def named() -> list[Requirement]:
    """Each string of pyproject.toml that is a requirement: of the project, of its extras, of what is locked besides."""
    text = (ROOT / "pyproject.toml").read_text().split("dependencies = ", 1)[1].split("[tool.", 1)[0]
    found = [Requirement(string) for string in re.findall(r'"([^"\n]+)"', re.sub(r"#.*", "", text))]
    return [requirement for requirement in found if requirement.name != "quartzgpt"]


def pinned(environment: dict[str, str] | None = None) -> dict[str, Version]:
    """What the lock says in an environment; here, unless told."""
    found = {}
    for line in LOCK:
        if line.marker is None or line.marker.evaluate(environment):
            assert canonicalize_name(line.name) not in found, f"{line.name} stands twice"
            (specifier,) = line.specifier
            found[canonicalize_name(line.name)] = Version(specifier.version)
    return found


def test_each_line_of_the_lock_is_an_exact_version_and_no_address():
    for line in LOCK:
        assert not line.url and not line.extras and [s.operator for s in line.specifier] == ["=="], line
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_the_lock_forces_nothing_of_cuda_upon_a_cpu_build():
    assert not [line.name for line in LOCK if re.match("nvidia|cuda|triton", line.name)]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "system"), SYSTEMS)
def test_the_lock_gives_every_package_of_pyproject_one_version_within_its_range(python, platform, system):
    version = {"python_version": python, "python_full_version": f"{python}.9"}
    found = pinned({**version, "sys_platform": platform, "platform_system": system})
    assert len(named()) > 20
    for requirement in named():
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_the_locks_setuptools_suits_each_torch_that_may_be_there_already():
    """torch 2.11 and 2.12 want one before 82, torch 2.13 one from 77.0.3 on."""
    assert Version("77.0.3") <= pinned()["setuptools"] < Version("82")


def test_the_lock_holds_what_its_packages_need_and_what_these_need():
    """By what is installed here, as far as it is what the lock says."""
    lock, seen, left = pinned(), set(), [(canonicalize_name(r.name), e) for r in named() for e in (r.extras or {""})]
    while left:
        name, extra = left.pop()
        assert name in lock or re.match("nvidia|cuda|triton", name), f"{name} is not in the lock"
        try:
            there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if (name, extra) in seen or Version(there.version).public != str(lock.get(name)):
            continue
        seen.add((name, extra))
        for need in map(Requirement, there.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(need.name), e) for e in {"", *need.extras}]


def test_each_package_of_pyproject_has_a_lower_bound_and_no_upper_one():
    lock_only = ("torch==", "pip", "setuptools<", "scikit-build-core", "llama-cpp-python")
    open_ones = [r for r in named() if not str(r).startswith(lock_only)]
    assert {r.name for r in open_ones} == {*pins.bounds()} - {"setuptools"}
    for requirement in open_ones:
        assert [s.operator for s in requirement.specifier] == [">="], requirement


def test_oldest_is_the_lower_bound_of_each_package():
    assert pins.bounds()["torch"] == "2.9"
    assert {"torch==2.9", f"numpy=={pins.bounds()['numpy']}"} <= {*pins.oldest()}
    assert len(pins.oldest()) == len(pins.bounds())


@pytest.mark.parametrize(
    ("there", "stays"),
    [("2.9.0", True), ("2.9.1+cu128", True), ("2.10.0a0+git1", True), ("3.0", True), ("2.8.0", False), (None, False)],
)
def test_a_torch_that_the_project_works_with_is_left_alone(there, stays, monkeypatch, capsys):
    def version(name):
        assert name == "torch"
        if there is None:
            raise metadata.PackageNotFoundError
        return there

    monkeypatch.setattr(pins.metadata, "version", version)
    lines = pins.locked()
    assert [line for line in lines if line.startswith("torch==")] == ([] if stays else [f"torch=={pinned()['torch']}"])
    assert len(lines) == len((ROOT / "requirements.lock").read_text().splitlines()) - stays
    assert ("stays" in capsys.readouterr().err) == stays


def test_the_locks_own_torch_is_held_to_the_lock_whatever_its_build(monkeypatch, capsys):
    monkeypatch.setattr(pins.metadata, "version", lambda name: f"{pinned()[name]}+cpu")
    assert f"torch=={pinned()['torch']}" in pins.locked() and not capsys.readouterr().err


def test_the_workflows_run_targets_of_make_on_the_locks_pythons_and_name_no_address():
    workflows = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").iterdir()}
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r'"(3\.\d+)"', workflows["test.yml"]) == [*PYTHONS]
    assert {*re.findall(r'python: "(3\.\d+)"', workflows["weekly.yml"])} <= {*PYTHONS}
    targets = re.findall(r"(?:make |target: )([a-z-]+)", "".join(workflows.values()))
    assert {*targets} == {"test-all", "test-oldest", "test-latest"}
    assert all(f"\n{target}:" in makefile for target in targets)
    for text in workflows.values():
        assert "://" not in text
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", used) for used in re.findall(r"uses: (.*)", text))


@pytest.mark.skipif(not shutil.which("make"), reason="this system has no make")
def test_what_each_target_of_make_runs_is_whole_for_the_shell():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-all", "test-oldest", "test-latest", "lock"} <= {*targets}
    for target in targets:
        make = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
        recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        shell = subprocess.run(["sh", "-n"], input=recipe, capture_output=True, text=True)
        assert recipe and not shell.returncode, f"{target}: {shell.stderr}{recipe}"


SKIPS = """
import pytest

def test_package():
    pytest.importorskip("quartz_of_no_such_name")

@pytest.mark.skipif(True, reason="some reason")
def test_marked():
    pass

def test_data(shakespeare):
    pass

def test_system():
    pytest.skip("this system has no such thing")

def test_program():
    pytest.skip("this system has no nginx")
"""


def pytest_of(folder, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The exit status, and the lines, of pytest with the project's conftest.py in a folder."""
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("PYTEST_")}
    environment = {**kept, "PYTHONPATH": str(ROOT / "tests"), **environment}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


SIDE_BY_SIDE = """
import os, torch

def test_dies():
    os._exit(0)

def test_threads():
    assert torch.get_num_threads() == 1
"""


@pytest.mark.parametrize(
    ("arguments", "data", "programs", "counts"),
    [
        ([], "", "nginx", {"skipped": 5}),
        (["--complete"], "", "", {"failed": 1, "errors": 1, "skipped": 3}),
        (["--complete"], "", "node nginx", {"failed": 2, "errors": 1, "skipped": 2}),
        (["--complete", "-n1"], "an empty folder", "", {"failed": 2, "passed": 1, "errors": 2, "skipped": 2}),
    ],
)
def test_in_a_complete_run_nothing_is_skipped_but_what_the_system_lacks(tmp_path, arguments, data, programs, counts):
    """The last of these as make runs them, in processes that have a thread each, and of which one dies. A program that
    .ci/run has found is not lacking."""
    (tmp_path / "test_skips.py").write_text(SKIPS + SIDE_BY_SIDE * ("-n1" in arguments))
    its = {"QUARTZGPT_TEST_DATA": data and str(tmp_path), "QUARTZGPT_TEST_PROGRAMS": programs}
    code, lines = pytest_of(tmp_path, *arguments, **its)
    assert bool(code) == ("failed" in counts)
    found = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", lines[-1].split(" in ")[0])}
    assert {word.removesuffix("s") + "s" * (word[:5] == "error"): n for word, n in found.items()} == counts, lines


def test_a_module_that_is_skipped_whole_ends_a_complete_run(tmp_path):
    (tmp_path / "test_skips.py").write_text("import pytest\n\npytest.importorskip('quartz_of_no_such_name')\n")
    code, lines = pytest_of(tmp_path, "--complete")
    assert code == 2 and "quartz_of_no_such_name" in "".join(lines), lines


def test_make_runs_every_test_with_marks_that_are_known_and_each_once():
    """What the two calls of pytest in `make test-all` leave out is nothing, and neither runs what the other does."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r'-m "([a-z ]+)\$\(2\)"', makefile) == ["not alone", "alone"]
    assert "$(call tests,$(VENV), and not slow and not clients)" in makefile
    assert "$(call tests,$(VENV),, --complete)" in makefile
    assert re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.M) == ["slow", "clients", "alone"]
