"""Overrides a script's settings from config files and from the command line.

A script declares its settings as module-level globals, each with a comment that is its help text, and then calls
`configure` on its own globals:

    batch_size = 12  # sequences in a micro-batch
    _given = configurator.configure(globals())

    python train.py config/train_gpt2.py --batch_size=32 --start="a=b"

Arguments are taken from left to right. A positional FILE.py is executed with the script's globals in sight, and what it
assigns replaces the settings of those names; --key=value replaces one; --help prints them all. A setting keeps the type
of its default: int, float, bool or str. An int may stand for a float; nothing else is converted.
"""

import ast
import contextlib
import difflib
import os
import sys
import tokenize
import types
from collections.abc import Callable, Sequence

SETTING_TYPES = (int, float, bool, str)


class UserError(Exception):
    """What the person at the keyboard can put right: each problem is one line, what is wrong and what to do."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


@contextlib.contextmanager
def user_errors():
    """Ends the program with one line a problem on stderr and exit status 2 on a UserError. A bug raises."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            print("error: " + " ".join(problem.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


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


def settings_of(scope: dict) -> dict:
    """The settings among a script's globals: public names bound to an int, float, bool or str."""
    return {name: value for name, value in scope.items() if name[0] != "_" and type(value) in SETTING_TYPES}


def configure(scope: dict, argv: list[str] | None = None) -> set[str]:
    """Overrides the settings in `scope`, a script's globals, as `argv` (default: the command line) says.

    Returns the names that were set by a file or an argument, whatever their value. Leaves `scope` untouched and exits
    with status 2 if anything is wrong; exits with status 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(_help(scope))
        sys.exit(0)
    settings, given, problems = settings_of(scope), set(), []
    types_ = {name: type(value) for name, value in settings.items()}
    for argument in argv:
        try:
            if argument.startswith("-"):
                new = _from_argument(argument, types_)
            else:
                new = _from_file(argument, scope | settings, types_)
        except UserError as error:
            problems += error.problems
            continue
        settings |= new
        given |= new.keys()
    with user_errors():
        if problems:
            raise UserError(*problems)
    scope.update(settings)
    if os.environ.get("RANK", "0") == "0":
        for name in sorted(given):
            print(f"Overriding: {name} = {settings[name]!r}", file=sys.stderr)
    return given


def _from_argument(argument: str, types_: dict[str, type]) -> dict:
    name, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise UserError(f"{argument}: write a setting as --key=value")
    if name not in types_:
        raise UserError(_unknown(name, types_))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if types_[name] is str and not isinstance(value, str):
        value = text  # --start=42 is a text that happens to look like a number
    return {name: _typed(name, value, types_[name])}


def _from_file(path: str, scope: dict, types_: dict[str, type]) -> dict:
    try:
        with tokenize.open(path) as file:  # decodes as Python itself does
            source = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"config file {path!r} can't be read: {reason}") from error
    after = dict(scope)
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), after)
    except SyntaxError as error:
        raise UserError(f"config file {path!r}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"config file {path!r} fails with {type(error).__name__}: {error}") from error
    # A setting may be given the value that it had, which no comparison shows: the syntax tree names what is assigned.
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    new, problems = {}, []
    for name, value in after.items():
        changed = name not in scope or scope[name] is not value
        if name in types_ and (changed or name in stored):
            try:
                new[name] = _typed(name, value, types_[name])
            except UserError as error:
                problems.append(f"config file {path!r}: {error}")
        elif changed and name not in types_ and name[0] != "_" and not _is_helper(value):
            problems.append(f"config file {path!r}: {_unknown(name, types_)} (a name of the file's own starts with _)")
    if problems:
        raise UserError(*problems)
    return new


def _is_helper(value: object) -> bool:
    return isinstance(value, types.ModuleType) or callable(value)


def _typed(name: str, value: object, kind: type):
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    hint = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
    raise UserError(f"{name} takes {hint} ({kind.__name__}), not {value!r}")


def _unknown(name: str, types_: dict[str, type]) -> str:
    nearest = difflib.get_close_matches(name, types_, n=1, cutoff=0.0)
    return f"unknown setting {name!r}" + (f", the nearest is {nearest[0]!r}" if nearest else "")


def _help(scope: dict) -> str:
    """The script's docstring and a line for each setting: name, type, default and the comment behind it."""
    settings, comments = settings_of(scope), {}
    with tokenize.open(scope["__file__"]) as file:
        name = None
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0 and name in settings:
                comments.setdefault(name, token.string.lstrip("# "))
    rows = [f"  --{k}={v!r}  ({type(v).__name__})  {comments.get(k, '')}".rstrip() for k, v in settings.items()]
    return "\n".join([(scope.get("__doc__") or "").strip(), "", "Settings, with their defaults:", *rows])
