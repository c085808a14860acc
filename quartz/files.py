"""Files that are written whole or not at all, and folders in which one process at a time writes."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quartz.errors import UserError, in_words, os_error


@contextlib.contextmanager
def writing(what: str | Path, kept: str = "") -> Iterator[None]:
    """Turns what the disk refuses within, or a library on its behalf, into a UserError: what can't be written, why,
    and what is kept."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_no_path = isinstance(error, ValueError) and "null" in str(error)  # a NUL in a name
        if not is_no_path and os_error(error) is None:
            raise
        why = "there is no such name" if is_no_path else in_words(os_error(error))
        raise UserError(f"{what} can't be written: {why}" + (f"; {kept}" if kept else "")) from error


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a file is still the same; None where it is gone."""
    try:
        return stamp_of(path.stat())
    except OSError:
        return None


def stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    """The time of the last change, in nanoseconds, size, and inode."""
    return found.st_mtime_ns, found.st_size, found.st_ino


def is_same(one: str, other: str) -> bool:
    """Whether two paths lead to the same file."""
    return os.path.realpath(one) == os.path.realpath(other)


def check_writable(name: str, path: str) -> None:
    """Raises UserError where the file that a setting names can't be written, '' none: to know before the work."""
    if os.path.isdir(path):
        raise UserError(f"{name}={path} is a folder: name a file")
    if path:
        with writing(f"{name}={path}"):
            Path(f"{path}.tmp").touch()
            Path(f"{path}.tmp").unlink()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a place to write to that becomes `path`, which so holds the old content or the new one, never a part.

    Raises OSError where the disk refuses; of the new one nothing is left then.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # of a folder that is gone, or that nothing can be taken from
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """As whole, of a folder that must not be there yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
        partial = Path(aside) / folder.name
        partial.mkdir()
        yield partial
        replace(partial, folder)


def write(path: Path, content: bytes) -> None:
    """Has `path` hold `content`, as `whole` does."""
    with whole(path) as partial:
        partial.write_bytes(content)


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
def claimed(folder: str | Path, what: str, wait: bool = False) -> Iterator[bool]:
    """Holds the folder for this process: where another holds it, raises UserError, and calls that `what`, or waits.

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
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
