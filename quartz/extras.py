"""Packages that one feature alone needs: imported where it is used. Read it when you add such a feature."""

from quartz.errors import UserError


def needs(package: str, purpose: str, extra: str):
    """Imports and returns a package of an optional extra. Raises UserError that names the extra to install."""
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{purpose} needs the {error.name} package: pip install -e .[{extra}]") from error
