"""Files that are written whole or not at all, and folders in which one process at a time writes."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from configurator import UserError


def write(path: Path, content: bytes) -> None:
    """Has `path` hold the old content or the new one, never a part. Raises OSError where the disk refuses."""
    partial = path.with_name(path.name + ".tmp")
    write_through(partial, content)
    replace(partial, path)


def write_through(path: Path, content: bytes) -> None:
    """Writes a file, and returns when the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(partial: Path, path: Path) -> None:
    """Gives a file, or a folder, its final name, and returns when the disk has that too."""
    os.replace(partial, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def claimed(folder: str | Path, what: str) -> Iterator[bool]:
    """Holds the folder for this process: raises UserError where another holds it, and calls that `what`.

    The claim ends with the process, however that ends. Yields whether it is certain: some file systems know no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be opened: {error.strerror}") from error
    is_certain = True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(f"another {what} is writing to {folder}: wait for it, or take another folder") from None
    except OSError as error:
        is_certain = False
        print(f"warning: {folder} can't be locked ({error.strerror}): start no second {what} there", file=sys.stderr)
    try:
        yield is_certain
    finally:
        os.close(held)
