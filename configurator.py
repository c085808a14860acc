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
import gc
import keyword
import math
import os
import sys
import tokenize
import warnings
from collections.abc import Callable
from inspect import ismodule

from quartz import threads
from quartz.errors import UserError, check, set_up_process, user_errors

__all__ = ["UserError", "check", "configure", "ranges", "settings_of", "user_errors"]
SETTING_TYPES = (int, float, bool, str)
# What a setting of that name may be, in whichever script it stands.
_COUNT = (lambda value: 0 < value < 2**31, "at least 1, and no giant")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "0 or a positive number")
_POSITIVE = (lambda value: 0 < value < math.inf, "a positive number")
_SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
_COUNTS = "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size num_samples max_new_tokens"
_AMOUNTS = "max_iters token_budget weight_decay grad_clip warmup_iters lr_decay_iters min_lr target_val_loss patience"
RANGES = {
    **dict.fromkeys((*_COUNTS.split(), "rounds", "steps"), _COUNT),
    **dict.fromkeys((*_AMOUNTS.split(), "skip_bad_updates"), _NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "embedding_lr", "head_lr"), _POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum"), _SHARE),
    "muon_lr": (lambda value: 0 < value <= 1, "a positive number up to 1, the length of an orthogonal matrix's step"),
    "decay_fraction": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "lora_rank": (lambda value: 0 <= value < 2**16, "0 (off) or a rank"),
    "lora_alpha": (lambda value: 0 <= value < math.inf, "0 (twice the rank) or a positive number"),
    "seed": (lambda value: 0 <= value < 2**32, f"from 0 to {2**32 - 1}"),
    "optimizer": (lambda value: value in ("adamw", "muon"), "adamw or muon"),
    "schedule": (lambda value: value in ("cosine", "wsd"), "cosine or wsd"),
    "quantize": (lambda value: value in ("", "int8"), "int8, or empty"),
}


def ranges(scope: dict) -> list[tuple[bool, str]]:
    """For `check`: a rule for each setting in `scope` that RANGES knows."""
    return [
        (holds(scope[name]), f"{name} must be {what}, not {scope[name]!r}")
        for name, (holds, what) in RANGES.items()
        if name in scope
    ]


def settings_of(scope: dict) -> dict:
    """The settings among a script's globals: public names bound to an int, float, bool or str."""
    return {
        name: value for name, value in scope.items() if not str(name).startswith("_") and type(value) in SETTING_TYPES
    }


def configure(scope: dict, argv: list[str] | None = None) -> set[str]:
    """Overrides the settings in `scope`, a script's globals, as `argv` (default: the command line) says.

    Returns the names that were set by a file or an argument, whatever their value. Leaves `scope` untouched and exits
    with status 2 if anything is wrong; exits with status 0 after --help.
    """
    set_up_process()
    with user_errors():
        given = _configure(scope, sys.argv[1:] if argv is None else argv)
    threads.set_up()  # here, since it comes before torch in every verb
    gc.set_threshold(gc.get_threshold()[0], 1000)  # torch brings no garbage: until user_errors
    return given


def _configure(scope: dict, argv: list[str]) -> set[str]:
    if "--help" in argv or "-h" in argv:
        print(_help(scope))
        sys.exit(0)
    types_ = {name: type(value) for name, value in settings_of(scope).items()}
    now, given, problems = dict(scope), set(), []
    for argument in argv:
        try:
            if argument.startswith("-"):
                name, value = _from_argument(argument, types_)
                now[name] = value
                given.add(name)
            else:
                now, names = _from_file(argument, now, types_)
                given |= names
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    scope.update({name: now[name] for name in given})
    for name in sorted(given) if os.environ.get("RANK", "0") == "0" else ():
        shown = "(not shown)" if name.endswith("_key") else repr(scope[name])  # a secret
        with contextlib.suppress(OSError):  # a log that can't be written
            print(f"Overriding: {name} = {shown}", file=sys.stderr)  # standard output is for results
    return given


def _from_argument(argument: str, types_: dict[str, type]) -> tuple[str, object]:
    name, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise UserError(f"{argument}: write a setting as --key=value")
    name += "_" * keyword.iskeyword(name)  # --from=… sets from_, as Python has it
    if name not in types_:
        raise UserError(_unknown(name, types_))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about escapes in what may be no Python at all
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        value = text
    if types_[name] is str and not isinstance(value, str):
        value = text  # --start=42 is a text that happens to look like a number
    return name, _typed(name, value, types_[name])


def _from_file(path: str, scope: dict, types_: dict[str, type]) -> tuple[dict, set[str]]:
    """Executes a config file in a copy of `scope`; returns the copy, and the settings that the file assigns."""
    if not os.path.isfile(path):
        raise UserError(f"config file {path!r} is not there")
    try:
        with tokenize.open(path) as file:  # decodes as Python itself does
            source = file.read()
    except (OSError, SyntaxError, LookupError, UnicodeError) as error:
        raise UserError(f"config file {path!r} can't be read: {error}") from error
    after = dict(scope)
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), after)
    except SyntaxError as error:
        raise UserError(f"config file {path!r}, line {error.lineno or 1}: {error.msg}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a file that ends the program has not configured it
        raise UserError(f"config file {path!r} fails with {type(error).__name__}: {_shown(error, str)}") from error
    # A setting may be given the value that it had, which no comparison shows: the syntax tree names what is assigned.
    (stored, imported), new, problems = _names(tree), {}, []
    for name, value in after.items():
        changed = name not in scope or scope[name] is not value
        if name in types_ and (changed or name in stored):
            try:
                new[name] = _typed(name, value, types_[name])
            except UserError as error:
                problems.append(f"config file {path!r}: {error}")
        elif changed and not (name in imported or str(name).startswith("_") or callable(value) or ismodule(value)):
            problems.append(f"config file {path!r}: {_unknown(name, types_)} (a name of the file's own starts with _)")
    problems += [f"config file {path!r} deletes the setting {name!r}" for name in types_ if name not in after]
    if problems:
        raise UserError(*problems)
    return after | new, set(new)


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names that a module assigns, and those that it imports, outside of its functions and classes."""
    stored, imported, nodes = set(), set(), list(tree.body)
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if not isinstance(node, inner):
            nodes += ast.iter_child_nodes(node)
    return stored, imported


def _shown(value: object, form: Callable[[object], str]) -> str:
    """repr or str of a stranger's value, which may be endless or fail."""
    try:
        text = form(value)
    except Exception as error:
        return f"something whose text fails with {type(error).__name__}"
    return text if len(text) < 200 else text[:200] + "…"


def _typed(name: str, value: object, kind: type):
    if type(value) is kind:
        with contextlib.suppress(ValueError):  # an int of thousands of digits, which no message could print
            repr(value)
            return value
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            return float(value)
    hint = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]
    raise UserError(f"{name} takes {hint} ({kind.__name__}), not {_shown(value, repr)}")


def _unknown(name: str, types_: dict[str, type]) -> str:
    nearest = difflib.get_close_matches(str(name), types_, n=1, cutoff=0.0)
    return f"unknown setting {name!r}" + (f", the nearest is {nearest[0]!r}" if nearest else "")


def _help(scope: dict) -> str:
    """The script's docstring and a line for each setting: name, type, default and the comment behind it."""
    settings, comments, name = settings_of(scope), {}, None
    with tokenize.open(scope["__file__"]) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0 and name in settings:
                comments.setdefault(name, token.string.lstrip("# "))
    rows = [
        f"  --{k.removesuffix('_')}={v!r}  ({type(v).__name__})  {comments.get(k, '')}".rstrip()
        for k, v in settings.items()
    ]
    return "\n".join([(scope.get("__doc__") or "").strip(), "", "Settings, with their defaults:", *rows])
