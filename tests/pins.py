"""What make installs, as constraints for pip: exact versions, printed one a line.

    python tests/pins.py locked    # requirements.lock; a torch that is there stays, if the project works with it
    python tests/pins.py oldest    # the lower bound of each package that pyproject.toml names

pip holds to them what it installs, and what builds it: `pip install -c FILE --build-constraint FILE -e .`
"""

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bounds() -> dict[str, str]:
    """Each package that pyproject.toml names with an open range, and its lower bound."""
    named = re.findall(r'"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = dict(named)
    assert {*named} == {*found.items()}, "pyproject.toml gives one package two lower bounds"
    return found


def release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu, 2.14.0a0 and 2.9 as (2, 13), (2, 14) and (2, 9)."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))


def own_torch() -> str | None:
    """The version of the torch in this environment, should the project work with it. A torch that somebody chose, for
    their GPU, is not the lock's to replace."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    return version if release(version) >= release(bounds()["torch"]) else None


def locked() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    version = own_torch()
    if version is None or f"torch=={version.split('+')[0]}" in lines:
        return lines
    print(f"torch {version} is there, and stays", file=sys.stderr)
    return [line for line in lines if not line.startswith("torch==")]


def oldest() -> list[str]:
    return [f"{name}=={version}" for name, version in bounds().items()]


if __name__ == "__main__":
    print("\n".join({"locked": locked, "oldest": oldest}[sys.argv[1]]()))
