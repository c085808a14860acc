"""Draws the curves of runs: loss against iterations, tokens and time, learning rate, gradient norm, throughput.

python plot.py out-shakespeare-char
python plot.py out-adamw out-muon --out=compared.svg

A run is named by its out_dir, whose log.jsonl is read; several are drawn side by side, a colour for each.
"""

import sys

import configurator

# ----------------------------------------------------------------------------------------------------------------------
# Settings
out = ""  # .png or .svg to write; empty is curves.png: in the folder of one run, of several where you stand
# ----------------------------------------------------------------------------------------------------------------------
_folders = [argument for argument in sys.argv[1:] if not argument.startswith("-") and not argument.endswith(".py")]
configurator.configure(globals(), [argument for argument in sys.argv[1:] if argument not in _folders])

from pathlib import Path

from configurator import UserError
from quartz import curves, files


def check_settings(folders: list[Path]) -> None:
    """Raises one UserError with everything that is wrong in the arguments."""
    rules = [
        (len(folders) > 0, "name the folder of a run, or of several: python plot.py OUT_DIR …"),
        (out == "" or out.lower().endswith((".png", ".svg")), f"out must end with .png or .svg, not be {out}"),
    ]
    configurator.check(rules, [lambda folder=folder: check_run(folder) for folder in folders])


def check_run(folder: Path) -> None:
    try:
        if next(curves.records(folder / curves.LOG), None) is None:
            raise UserError(f"{folder / curves.LOG} holds no figures yet")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(folder)!r} has no {curves.LOG} to read ({reason}): name a run's out_dir") from error


def main() -> None:
    check_settings([Path(folder) for folder in _folders])
    folders = list({Path(folder).resolve(): Path(folder) for folder in _folders}.values())  # each once
    path = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / curves.PICTURE
    runs = [curves.read(folder, name) for folder, name in zip(folders, curves.names_of(folders), strict=True)]
    try:
        with files.writing(path, "what was there is untouched"):
            curves.write(runs, path)
    except ModuleNotFoundError as error:
        raise UserError(f"drawing needs the {error.name} package: pip install -e .[plot]") from error
    print(f"drew {path}")


if __name__ == "__main__":
    with configurator.user_errors():
        main()
