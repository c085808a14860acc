"""What a person did wrong, or what their machine refuses, as one line on standard error and exit status 2.

Read it to see what becomes of an error: a UserError, a full disk and memory that runs out are told in a line; anything
else is a bug, and raises.
"""

import atexit
import contextlib
import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

NO_MORE = {  # what no program can help
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EROFS: "the disk is for reading only",
}


class UserError(Exception):
    """What the person at the keyboard can put right: each problem is one line, what is wrong and what to do."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@contextlib.contextmanager
def user_errors():
    """Ends the program with one line a problem on stderr and exit status 2 on a UserError, or where the machine has no
    room: on the disk, or in memory. A bug raises."""
    gc.set_threshold(gc.get_threshold()[0], 10)  # Python's own, which configurator.configure had raised
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _exit(*error.problems)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        _drop_unwritten()
        sys.exit(141)
    except Exception as error:
        if not (problem := problem_of_machine(error)):
            raise
        _exit(problem)


class _Lossy:
    """A stream but that what can't be written is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def lossy_output():
    """For what is to run on where its log has no reader, or is on a full disk: what can't be written to standard
    output and error is lost."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lossy, kept)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept
        _drop_unwritten()


def problem_of_machine(error: Exception) -> str:
    """The line for memory that runs out, or for a disk that takes no more, whoever tells of it; empty for a bug."""
    no_memory = "out of memory|not enough memory|can't allocate memory"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(no_memory, str(error))):
        return f"not enough memory; lower the sizes of model or batch ({error})"
    behind = os_error(error)
    if not isinstance(error, PermissionError) and (behind is None or behind.errno not in NO_MORE):
        return ""
    what = behind.filename or ("standard output" if behind is error else "a file")  # files.writing names all others
    return f"{what} can't be {'opened' if isinstance(error, PermissionError) else 'written'}: {in_words(behind)}"


def os_error(error: BaseException) -> OSError | None:
    """What the operating system has said behind an error: libraries raise one of their own. None where it has not."""
    while error is not None and not isinstance(error, OSError):
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # as libraries that are written in Rust pass it on
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error


def in_words(error: OSError) -> str:
    """Why the operating system refuses, as far as possible as a person would say it."""
    reason = error.strerror or str(error)
    return f"{NO_MORE[error.errno]} ({reason})" if error.errno in NO_MORE else reason


def _exit(*problems: str) -> None:
    with contextlib.suppress(OSError):  # where they can't be told either
        for problem in problems:
            print("error: " + " ".join(problem.split()), file=sys.stderr)
    _drop_unwritten()
    sys.exit(2)


def _drop_unwritten() -> None:
    """Sends to nowhere what an output refuses: flushing it at exit would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def set_up_process() -> None:
    """Prints any character on any terminal, survives a closed one, and takes Ctrl-C without a traceback. At the end no
    garbage is looked for: among all that torch has brought, that would take a third of a second."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the program
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace")
    show = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else show(kind, *rest)
    atexit.register(gc.freeze)


def check(rules: list[tuple[bool, str]], looks: Sequence[Callable[[], object]] = ()) -> None:
    """Raises one UserError with all that is wrong: the message of every (condition, message) whose condition does not
    hold, and the problems of every function in `looks` that raises UserError."""
    problems = [message for holds, message in rules if not holds]
    for look in looks:
        try:
            look()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
