"""Whatever a command line, a config file, a data set or a checkpoint holds: it is read rightly, or refused in words.

The inputs are hypothesis's, the same in every run.
"""

import ast
import contextlib
import gzip
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import same
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import configurator
from configurator import UserError
from model import GPT, GPTConfig
from quartz import checkpoint, optim
from quartz.documents import pieces_of
from quartz.shards import HEADER_INTS, HEADER_MAGIC, Split, load_meta
from quartz.tokenizer import check_data, from_data

LONGEST = 5  # seconds that one reading may take; all take milliseconds
WHY = "one line, what is wrong"


def examples(count: int):
    quiet = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=quiet,
        print_blob=False,
    )


class TooLong(BaseException):
    """No Exception, so that a reader that turns whatever was raised into a UserError doesn't hide it."""


@contextlib.contextmanager
def in_time():
    """Fails the test where what is inside seems to be endless."""
    fired = []

    def ring(number, frame):
        fired.append(number)
        raise TooLong

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not fired, "the reading was ended from outside"


def answer(read, *arguments):
    """What read(*arguments) returns, or None where it raises a UserError, which then tells something for each problem.

    Any other exception passes.
    """
    with in_time():
        try:
            return read(*arguments)
        except UserError as error:
            assert error.problems and all(isinstance(line, str) and line.strip() for line in error.problems), WHY
            return None


# ----------------------------------------------------------------------------------------------------------------------
# Values

letters = st.text(max_size=8)
small = st.integers(-3, 40)
# Nothing in between: sizes that memory could just hold would be tried.
huge = st.one_of(st.integers(2**40, 2**80), st.integers(-(2**80), -(2**40)), st.sampled_from([10**400, 10**4299]))
leaves = st.one_of(st.none(), st.booleans(), small, huge, st.floats(), letters, st.binary(max_size=8))
keys = st.one_of(letters, small, st.none(), st.booleans(), st.tuples(small, letters))
plain = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)), max_leaves=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder to stand in. All examples share it, each writes what it reads."""
    path = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


# ----------------------------------------------------------------------------------------------------------------------
# Settings

DEFAULTS = {"rate": 0.1, "size": 4, "on": True, "name": "a"}
PRIVATE = {"_hidden": 1, "os": os}


def configure(*argv) -> tuple[dict | None, set | list]:
    """The settings after these arguments and the names that were given; or None and the lines that tell why not."""
    scope = {**DEFAULTS, **PRIVATE, "__file__": __file__}
    before = dict(scope)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))  # the poorest of terminals
    hook = sys.excepthook
    try:
        with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            names, status = None, 0
            try:
                names = configurator.configure(scope, list(argv))
            except SystemExit as stop:
                status = stop.code
    finally:
        sys.excepthook = hook
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    shown, lines = (text.splitlines() for text in texts)
    assert all(scope[name] is value for name, value in before.items() if not names or name not in names)
    assert scope.keys() == before.keys()
    if names is None:
        asked_for_help = "--help" in argv or "-h" in argv
        assert status == (0 if asked_for_help else 2)
        assert bool(lines) != asked_for_help and all(re.fullmatch("error: .*[^ ].*", line) for line in lines), lines
        return None, lines
    assert not shown and names <= DEFAULTS.keys()
    assert [line.split(" = ")[0] for line in lines] == [f"Overriding: {name}" for name in sorted(names)]
    assert all(type(scope[name]) is type(value) for name, value in DEFAULTS.items())
    return {name: scope[name] for name in DEFAULTS}, names


names = st.one_of(st.sampled_from([*DEFAULTS, *DEFAULTS, *PRIVATE, "sice", "_own", ""]), letters)
literals = plain.map(repr) | huge.map(hex) | st.just(hex(16**5000)) | st.floats().map(lambda x: f"{x!r}+1j")
arithmetic = st.tuples(huge, st.sampled_from(["+1j", "-1j", "+1.0", "*2", "**2"])).map(
    lambda pair: hex(pair[0]) + pair[1]
)
nested = st.tuples(st.sampled_from(["(", "[", "-", "{1:", "not ", "1+", "f'{", "a.", "~"]), st.integers(1, 9000)).map(
    lambda pair: pair[0] * pair[1] + "1"
)
quoted = st.text(alphabet="\\'\"dxuN{}01\n\0 b", max_size=10).map(lambda text: f"'{text}'")
one_argument = st.one_of(
    st.tuples(names, literals | arithmetic | nested | quoted | letters).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    letters,
    st.text(alphabet="-=h'x.", max_size=6),
    st.sampled_from(["--help", "-h", "--", "=", "--=", "---size=1", "-size=1", "--size", ".", "..", "", "/", "\ud800"]),
)


@examples(200)
@given(st.lists(one_argument, max_size=4))
@example(["--size=" + hex(16**5000)])
@example(["--rate=" + "9" * 400 + "+1j"])
@example(["--name=" + "\udcff"])
@example([r"--name='\d'"])
def test_any_command_line_sets_what_it_says_or_is_refused_with_a_line_for_each_mistake(folder, argv):
    assume(not any(os.path.isfile(argument) for argument in argv))
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests have left, collected just now
        found, told = configure(*argv)
        alone = [configure(argument) for argument in argv]
    assert not remarks, "a text that looks like Python is no cause for a warning"
    if "--help" in argv or "-h" in argv:
        assert found is None
        return
    mistakes = [lines for settings_, lines in alone if settings_ is None]
    if found is None:
        assert told == [line for lines in mistakes for line in lines] and len(told) == len(mistakes)
        return
    assert not mistakes and told == {name for _, given_ in alone for name in given_}
    expected = dict(DEFAULTS)
    for settings_, (name,) in alone:
        expected[name] = settings_[name]
    assert repr(found) == repr(expected)  # repr: NaN is itself


right = {
    "rate": st.floats(allow_nan=False) | small | st.integers(-(2**80), 2**80),
    "size": st.integers(),
    "on": st.booleans(),
    "name": letters,
}


def fits(name: str, value: object) -> bool:
    """Whether a setting takes a value, as the README has it."""
    if name == "rate" and type(value) is int:
        return abs(value) < 2**1024 - 2**970  # the first that rounds beyond the largest float
    return type(value) is type(DEFAULTS[name]) and (type(value) is not int or abs(value) < 10**4300)


def source_of(value: object) -> str:
    """A literal, for numbers too that repr has none for."""
    if isinstance(value, float):
        return f"float({str(value)!r})"
    if type(value) is int:
        return hex(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}([{', '.join(map(source_of, value))}])"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{source_of(key)}: {source_of(part)}" for key, part in value.items()) + "}"
    return ascii(value)


typed = st.sampled_from(list(DEFAULTS)).flatmap(lambda name: st.tuples(st.just(name), right[name]))
assigned = st.one_of(typed, typed, st.tuples(st.sampled_from([*DEFAULTS, *PRIVATE, "sice", "_own", "__doc__"]), plain))
steps = st.lists(
    st.one_of(
        st.lists(assigned, max_size=3).map(dict),  # a file's assignments
        typed.map(lambda pair: f"--{pair[0]}={source_of(pair[1]) if type(pair[1]) is int else repr(pair[1])}"),
    ),
    max_size=4,
)


@examples(170)
@given(steps)
@example([{"rate": -(2**1024)}, {"size": True, "on": 1}])
def test_assignments_hold_from_left_to_right_and_each_wrong_one_is_a_line(folder, steps):
    argv, expected, given_, wrong = [], dict(DEFAULTS), set(), 0
    for number, step in enumerate(steps):
        if isinstance(step, str):
            argv.append(step)
            name, _, text = step[2:].partition("=")
            value = {"inf": None, "-inf": None}.get(text, text)
            step = {name: ast.literal_eval(value) if value is not None else None}
            if value is None:
                wrong, step = wrong + 1, {}
            elif name == "name" and not isinstance(step[name], str):
                step = {name: text}
        else:
            argv.append(f"{number}.py")
            lines = [f"{name} = {source_of(value)}\n" for name, value in step.items()]
            (folder / argv[-1]).write_text("".join(lines), encoding="utf-8")
        public = {name: value for name, value in step.items() if not name.startswith("_")}
        mistakes = [name for name, value in public.items() if name not in DEFAULTS or not fits(name, value)]
        wrong += len(mistakes)
        if not mistakes:
            expected |= {name: type(DEFAULTS[name])(value) for name, value in public.items()}
            given_ |= public.keys()
    found, told = configure(*argv)
    if wrong:
        assert found is None and len(told) == wrong
    else:
        assert told == given_ and repr(found) == repr(expected)


words = [*DEFAULTS, "sice", "_own", "os", "=", "= 3\n", "= 'b'\n", "=0.5\n", "\n", "\n ", ";", ":", ",", "(", ")", "["]
words += [
    "]",
    "{",
    "}",
    "del ",
    "import os",
    "from os import path",
    "for ",
    " in ",
    "if ",
    "else",
    "def f():",
    "lambda ",
]
words += ["class ", "return ", "yield ", "await ", "raise ", "assert ", "try:", "except ", "with ", "as ", "global "]
words += ["nonlocal ", "None", "True", "1", "2.5", "1j", "-", "+", "*", "/", "%", "@", "~", "not ", " is ", ":=", "..."]
words += ["'", '"""', "#", "\\", "\t", "\0", "\x0c", "# coding: utf-16\n", "# coding: x\n", "\ufeff", "f'{", "b'", "é"]
words += ["int", "float", "globals()", "vars()", "__builtins__", "__name__", "Exception", "SyntaxError", "SystemExit"]
soup = st.lists(st.sampled_from(words), max_size=14).map("".join)
contents = st.one_of(
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
    soup.map(str.encode),
)


@examples(300)
@given(contents)
@example(b"size = 16**5000")
@example(b"raise SyntaxError")
@example(b"size = [size]\nsize[0] = size")
@example(b"__builtins__ = 3")
@example(b"size: int")
def test_any_config_file_does_what_python_does_or_is_refused(folder, content):
    (folder / "c.py").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, about the file
        found, _ = configure("c.py")
        own = {**DEFAULTS, **PRIVATE}
        try:
            exec(compile(content, "c.py", "exec"), own)
        except BaseException:
            own = None
    if found is not None:
        assert own is not None, "a file that fails configures nothing"
        assert all(fits(name, own[name]) for name in DEFAULTS)
        assert repr(found) == repr({name: type(value)(own[name]) for name, value in DEFAULTS.items()})


# ----------------------------------------------------------------------------------------------------------------------
# Data


@st.composite
def shards(draw) -> bytes:
    """The bytes of a token file, of either form, now and then of neither."""
    payload = draw(st.binary(max_size=24)) * draw(st.sampled_from([1, 1, 2, 50]))
    kind = draw(st.sampled_from(["plain", "even", "header", "any count", "any header"]))
    if kind == "plain":
        return payload
    payload = payload[: len(payload) // 4 * 4]
    if kind == "even":
        return payload
    numbers = [HEADER_MAGIC, draw(st.integers(-(2**31), 2**31 - 1)), len(payload) // 2]
    if kind == "any count":
        numbers[2] = draw(st.one_of(small, st.integers(-(2**31), 2**31 - 1)))
    head = np.array(numbers + [0] * (HEADER_INTS - 3), dtype="<i4").tobytes()
    if kind == "any header":
        place = draw(st.integers(0, 11))
        head = head[:place] + draw(st.binary(min_size=1, max_size=4)) + head[place + 1 :]
        head = head[: draw(st.integers(0, len(head)))] if draw(st.booleans()) else head
    return head + payload + (draw(st.binary(max_size=1)))


def tokens_of(content: bytes, dtype: str) -> np.ndarray | None:
    """The tokens of a file in the words of shards.py's head; None where it is damaged."""
    if len(content) >= 1024 and int.from_bytes(content[:4], "little") == 20240520:
        count = int.from_bytes(content[8:12], "little", signed=True)
        return np.frombuffer(content, "<u2", offset=1024) if len(content) == 1024 + 2 * count else None
    size = {"uint16": 2, "uint32": 4}[dtype]
    return np.frombuffer(content, f"<u{size}") if content and len(content) % size == 0 else None


@examples(250)
@given(
    st.lists(shards(), min_size=1, max_size=3),
    st.sampled_from(["uint16", "uint32"]),
    st.sampled_from([None, "counted", 0, 7]),
    st.sampled_from([None, 1, 2**15, 2**16, 2**32 - 1]),
    st.data(),
)
def test_token_files_of_any_bytes_are_read_as_numpy_reads_them_or_refused(folder, files, dtype, counted, vocab, data):
    for path in folder.glob("train*"):
        path.unlink()
    for number, content in enumerate(files):
        (folder / ("train.bin" if len(files) == 1 else f"train_{number}.bin")).write_bytes(content)
    parts = [tokens_of(content, dtype) for content in files]
    tokens = None if any(part is None for part in parts) else np.concatenate(parts).astype(np.int64)
    count = {"train": len(tokens) if tokens is not None else 3} if counted == "counted" else counted
    meta = {"dtype": dtype, "tokens": {"train": count} if type(count) is int else count}
    split = answer(Split, folder, "train", meta, vocab)
    is_right = tokens is not None and (type(count) is not int or count == len(tokens))
    if not is_right or (vocab is not None and (tokens >= vocab).any()):
        assert split is None
        return
    if not len(tokens):
        assert split is None or len(split) == 0
        return
    assert split is not None and len(split) == len(tokens)
    for _ in range(3):
        start = data.draw(st.integers(0, len(tokens) - 1), label="start")
        length = data.draw(st.integers(0, len(tokens) - start), label="length")
        found = answer(split.read, start, length)
        assert found.dtype == np.int64 and np.array_equal(found, tokens[start : start + length])
    block_size = data.draw(st.integers(1, 8), label="block_size")
    if answer(lambda: split.check_length(block_size) or True) is None:
        assert len(tokens) <= block_size
        return
    starts = data.draw(st.lists(st.integers(0, len(tokens) - block_size - 1), min_size=1, max_size=4), label="starts")
    x, y = answer(split.windows, np.array(starts), block_size)
    assert x.tolist() == [tokens[start : start + block_size].tolist() for start in starts]
    assert y.tolist() == [tokens[start + 1 : start + block_size + 1].tolist() for start in starts]


FIELDS = ("vocab_size", "dtype", "tokens", "tokenizer")
chars = st.lists(st.characters() | st.none(), max_size=5)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), small, st.integers(-(2**80), 2**80), st.floats(), letters),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(letters, inner, max_size=4)),
    max_leaves=6,
)
names = st.lists(st.sampled_from(["ab", "ab\u0100", "th", "<|endoftext|>", "x"]), max_size=4)
tokenizers = st.fixed_dictionaries(
    {"type": st.sampled_from(["char", "char", "gpt2", "bpe", "bpe"]), "chars": chars | json_values},
    optional={
        "pattern": st.sampled_from(["gpt4", "gpt2"]) | json_values,
        "tokens": names | json_values,
        "specials": names | json_values | st.dictionaries(letters, small),
        "vocab": st.just([*map(chr, range(256)), None, "ab"]) | names | json_values,
    },
)
metas = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": small | json_values,
        "dtype": st.sampled_from(["uint16", "uint32", "int8"]) | json_values,
        "tokens": st.none() | st.fixed_dictionaries({"train": st.just(4) | json_values}) | json_values,
        "tokenizer": tokenizers | json_values,
        "row": st.sampled_from([2, 3, 4]) | json_values,
        "more": json_values,
    },
)


def read_meta(folder, name: str, content: bytes) -> dict | None:
    """What load_meta makes of this file, and whether it can be used as its docstring says."""
    for path in folder.glob("*.*"):
        path.unlink()
    (folder / name).write_bytes(content)
    meta = answer(load_meta, folder)
    if meta is not None:
        assert meta["dtype"] in ("uint16", "uint32")
        assert meta["vocab_size"] is None or type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] < 2**32
        if meta["tokenizer"] is not None:
            check_data(meta["tokenizer"], meta["vocab_size"])
            if meta["tokenizer"]["type"] != "gpt2":
                assert from_data(meta["tokenizer"]).to_data()["type"] == meta["tokenizer"]["type"]
        tokens = np.zeros(4, dtype=meta["dtype"])
        (folder / "train.bin").write_bytes(tokens.tobytes())
        split = answer(Split, folder, "train", meta, meta["vocab_size"])
        counted = (meta["tokens"] or {}).get("train", 4) == 4
        assert (split is not None) == (counted and 4 % (meta["row"] or 1) == 0)
    return meta


@examples(300)
@given(
    st.one_of(
        metas.map(lambda meta: json.dumps(meta).encode()),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=40),
        st.tuples(st.sampled_from(["[", '{"tokens":', "-", "1"]), st.integers(0, 9000)).map(
            lambda x: (x[0] * x[1]).encode()
        ),
    )
)
@example(b'{"vocab_size": ' + b"9" * 4300 + b"}")
@example(b'{"tokens": {"train": ' + b"9" * 4300 + b"}}")
def test_a_meta_json_of_any_content_is_taken_as_it_is_or_refused(folder, content):
    meta = read_meta(folder, "meta.json", content)
    if meta is not None:
        theirs = json.loads(content)
        defaults = {"vocab_size": None, "dtype": "uint16", "tokens": None, "tokenizer": None, "row": None}
        assert repr(meta) == repr({**defaults, **theirs})


itos = st.one_of(
    st.lists(st.characters(), max_size=5),
    st.dictionaries(small, st.characters(), max_size=5),
    st.text(max_size=4),
    plain,
)
pickled = st.one_of(st.fixed_dictionaries({"vocab_size": small | plain, "itos": itos, "stoi": plain}), plain)


@st.composite
def pickles(draw) -> bytes:
    """Pickles of plain values, also with some bytes overwritten or inserted; or no pickle at all."""
    if draw(st.booleans()):
        # The opcodes that fetch and call come up often.
        return draw(st.binary(max_size=20)) + draw(
            st.sampled_from([b"", b"cos\ngetcwd\n)R.", b"(ios\ngetcwd\n.", b"}."])
        )
    content = pickle.dumps(draw(pickled), protocol=draw(st.integers(0, 5)))
    return draw(damaged(content)) if draw(st.booleans()) else content


@st.composite
def damaged(draw, content: bytes, places=None) -> bytes:
    """`content` with a bit flipped, cut off, or with bytes inserted or overwritten, now and then at one of `places`."""
    within = st.integers(0, len(content) - 1)
    place = draw(within if places is None else within | st.sampled_from(places))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "overwrite"]))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    new = draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"\0" * 70, b"PK\3\4", content[:200]]))
    return content[:place] + new + content[place + (len(new) if kind == "overwrite" else 0) :]


@examples(350)
@given(pickles())
@example(pickle.dumps({"vocab_size": 2**70, "itos": {}}))
@example(pickle.dumps({"vocab_size": 2**40, "itos": {2**40 - 1: "a"}}))
def test_a_meta_pkl_of_any_content_gives_its_plain_values_or_is_refused(folder, content):
    meta = read_meta(folder, "meta.pkl", content)
    if meta is not None:
        theirs = pickle.loads(content)  # ours, and with no code in it: it was taken
        assert meta["vocab_size"] is theirs["vocab_size"] or meta["vocab_size"] == theirs["vocab_size"]
        if theirs.get("itos") is None:
            assert meta["tokenizer"] is None
        else:
            pairs = theirs["itos"].items() if isinstance(theirs["itos"], dict) else enumerate(theirs["itos"])
            pairs = {i: char for i, char in pairs if i in range(meta["vocab_size"]) and char is not None}
            assert {i: char for i, char in enumerate(meta["tokenizer"]["chars"]) if char is not None} == pairs


@pytest.fixture(scope="module")
def packed(folder) -> dict[str, bytes]:
    """A small file of every kind."""
    pyarrow, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    lines = [f"text {n}, é\n" for n in range(40)]
    sink = pyarrow.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": lines}), sink, row_group_size=20)
    plain = {
        ".txt": "".join(lines).encode(),
        ".jsonl": "".join(json.dumps({"text": line}) + "\n" for line in lines).encode(),
        ".parquet": sink.getvalue().to_pybytes(),
    }
    gz = {f"{kind}.gz": gzip.compress(content) for kind, content in plain.items()}
    return plain | gz | {f"{kind}.zst": zstandard.compress(content) for kind, content in plain.items()}


@examples(400)
@given(st.data())
def test_documents_of_any_bytes_are_read_or_refused(folder, packed, data):
    kind = data.draw(st.sampled_from(sorted(packed)))
    path = folder / f"fuzz{kind}"
    path.write_bytes(data.draw(damaged(packed[kind]) | st.binary(max_size=200)))
    pieces = answer(lambda: list(pieces_of(path, "text", 16)))
    for piece in pieces or ():
        assert isinstance(piece.text, str) and piece.text and "\r" not in piece.text
    assert not pieces or pieces[-1].is_end


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

ARGS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 5}
ARCHS = {"gpt2": {"bias": True}, "qwen3": {"bias": False, "arch": "qwen3", "tie_embeddings": False}}


def updater_of(model: GPT) -> torch.optim.Optimizer:
    """nanoGPT's AdamW for gpt2; for qwen3 Muon, whose groups name their parameters."""
    if model.config.arch == "gpt2":
        return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    rates = {"matrix": 0.02, "embedding": 0.1, "head": 0.01, "vector": 0.01}
    updater = optim.muon(model, rates, 0.95, (0.9, 0.95), 0.0)
    optim.refine(updater, model, {"ln_1": 0.5}, "")
    return updater


def take_a_step(model: GPT, updater: torch.optim.Optimizer) -> None:
    length = min(3, model.config.block_size)
    idx = torch.arange(length)[None] % model.config.vocab_size
    logits, loss = model(idx, idx)
    assert loss.isfinite()
    loss.backward()
    updater.step()


class Saved(NamedTuple):
    """A checkpoint: its file, the bytes there and what they hold."""

    path: Path
    content: bytes
    state: dict

    def __repr__(self):  # short, for a report
        return f"Saved({self.path})"


@pytest.fixture(scope="module", params=ARCHS)
def saved(request, folder):
    """The checkpoint of a small run."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ARGS, **ARCHS[request.param]))
    updater = updater_of(model)
    take_a_step(model, updater)
    state = {
        "model": model.state_dict(),
        "optimizer": updater.state_dict(),
        "model_args": model.config.to_args(),
        "iter_num": 1,
        "best_val_loss": 1.5,
        "config": {"seed": 1, "dataset": "tiny"},
        "tokenizer": {"type": "char", "chars": ["a", "b", "c", "d", None]},
        "evaluated": {"train": 1.5, "val": 1.25},
    }
    path = folder / "ckpt.pt"
    checkpoint.save(path, state)
    return Saved(path, path.read_bytes(), torch.load(path))


def frame(content: bytes) -> list[int]:
    """The places in a zip archive that are no member's data: headers, the directory and what pads them."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        infos = file.infolist()
        end = file.start_dir
    is_data = np.zeros(len(content), dtype=bool)
    for info, after in zip(infos, [*(info.header_offset for info in infos[1:]), end], strict=True):
        head = info.header_offset
        start = head + 30 + sum(int.from_bytes(content[head + n : head + n + 2], "little") for n in (26, 28))
        assert start + info.file_size <= after
        is_data[start : start + info.file_size] = True
        is_data[head + 30 + len(info.filename) + 4 : start - 1] = True  # padding: of no interest
    return np.flatnonzero(~is_data).tolist()


@examples(200)
@given(st.data())
def test_a_damaged_checkpoint_loads_to_the_bit_or_is_refused(saved, data):
    path, content, state = saved.path, saved.content, saved.state
    path.write_bytes(data.draw(damaged(content, frame(content)), label="content"))
    loaded = answer(checkpoint.load, path)
    if loaded is not None:
        assert loaded.pop("path") == path and same(loaded, state)
        model = answer(checkpoint.build_model, loaded | {"path": path})
        assert same(dict(model.state_dict()), state["model"])


def test_no_bit_of_the_archive_around_a_tensor_can_flip_and_change_what_loads(folder):
    """Each bit of a member's header, of its entry in the directory and of the archive's end: no sums cover them."""
    path = folder / "ckpt.pt"
    state = {"model": {"lm_head.weight": torch.arange(12.0)}, "model_args": ARGS, "iter_num": 1, "best_val_loss": 1.5}
    checkpoint.save(path, state)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        directory, (tensor,) = file.start_dir, [info for info in file.infolist() if info.filename.endswith("/data/0")]
    entry = content.rindex(b"PK\1\2", 0, content.index(tensor.filename.encode(), directory))
    places = [
        *range(tensor.header_offset, tensor.header_offset + 30 + len(tensor.filename) + 4),
        *range(entry, content.index(b"PK\1\2", entry + 4)),
        *range(content.index(b"PK\6\6", entry), len(content)),
    ]
    for place in places:
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            loaded = answer(checkpoint.load, path)
            assert loaded is None or same(loaded, {**state, "config": {}, "path": path}), (place, bit)


CALLED = []


class Bomb:
    def __reduce__(self):
        return CALLED.append, (1,)


def places_in(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all that a checkpoint holds, tensors and containers too."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [path, *(place for key, part in parts for place in places_in(part, (*path, key)))]


def replaced(value: object, path: tuple, new: object) -> object:
    if not path:
        return new
    if isinstance(value, dict):
        return {key: replaced(part, path[1:], new) if key == path[0] else part for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(part, path[1:], new) if n == path[0] else part for n, part in enumerate(value))
    return value


def renamed(value: object, path: tuple, new: object) -> object:
    """`value` with the last key on the path called `new`."""
    if not path:
        return value
    if isinstance(value, dict) and len(path) == 1:
        return {new if key == path[0] else key: part for key, part in value.items()}
    if isinstance(value, dict):
        return {key: renamed(part, path[1:], new) if key == path[0] else part for key, part in value.items()}
    return value


def at(value: object, path: tuple) -> object:
    for key in path:
        value = value[key]
    return value


@st.composite
def changes(draw, state: dict) -> list[tuple]:
    """What to replace in a checkpoint: values, or keys, by any others or by such as it holds elsewhere."""
    everywhere = places_in(state)
    important = [place for place in everywhere if len(place) == 1 or place[:1] == ("model_args",)]
    elsewhere = [part for part in (at(state, path) for path in everywhere) if not torch.is_tensor(part)]
    place = st.sampled_from(everywhere) | st.sampled_from(important)
    value = st.tuples(st.just(replaced), place, plain | st.sampled_from(elsewhere) | small)
    key = st.tuples(st.just(renamed), place, keys)
    return draw(st.lists(st.one_of(value, value, value, key), min_size=1, max_size=2))


def assert_works_or_is_refused(saved: Saved, state: dict) -> None:
    """`state` is saved's, but for plain values: they can't bring other weights about, or none that are there."""
    path, original = saved.path, saved.state
    torch.save(state, path)
    state = answer(checkpoint.load, path)
    if state is None:
        return
    assert type(state["iter_num"]) is int and state["iter_num"] >= 0
    assert type(state["best_val_loss"]) is float and not math.isnan(state["best_val_loss"])
    assert type(state["config"]) is dict and state["path"] == path
    model = answer(checkpoint.build_model, state)
    if model is None:
        return
    assert same(dict(model.state_dict()), original["model"])
    if model.config.block_size > 1000:  # of qwen3, whose weights do not tell it
        return
    updater = updater_of(model)
    if "optimizer" in state and answer(lambda: checkpoint.load_optimizer(updater, state) or True):
        moments = updater.state_dict()["state"]
        assert same(moments, original["optimizer"]["state"]) if moments else not state["optimizer"]["state"]
    take_a_step(model, updater)


@examples(90)
@given(st.data())
def test_a_checkpoint_with_any_values_gives_a_model_that_works_or_is_refused(saved, data):
    state = saved.state
    for change, place, new in data.draw(changes(state), label="changes"):
        state = change(state, place, new)
    assert_works_or_is_refused(saved, state)


@pytest.mark.parametrize("new", [math.inf, 2**40, 10**400, 2.0, True, "1", None, {}], ids=lambda new: repr(new)[:9])
def test_each_figure_of_a_checkpoint_may_be_anything(saved, new):
    figures = [("iter_num",), ("best_val_loss",), *(place for place in places_in(saved.state) if "model_args" in place)]
    figures += [("config",), ("optimizer",), ("optimizer", "state"), ("optimizer", "param_groups"), ("model",)]
    figures += [("optimizer", "param_groups", 0, "params"), ("optimizer", "param_groups", 0, "params", 1)]
    for place in figures:
        assert_works_or_is_refused(saved, replaced(saved.state, place, new))
    for key in (new, "rope") if isinstance(new, int | float | str | None) else ():
        args = saved.state["model_args"] | {key: new, "more": 1}
        assert_works_or_is_refused(saved, saved.state | {"model_args": args})
    moments = saved.state["optimizer"]["state"]
    swapped = {("x", key): part for key, part in moments.items()}
    assert_works_or_is_refused(saved, replaced(saved.state, ("optimizer", "state"), swapped))


@examples(60)
@given(st.data())
def test_a_checkpoint_with_code_anywhere_in_it_is_refused_and_the_code_not_run(saved, data):
    path, original = saved.path, saved.state
    place = data.draw(st.sampled_from(places_in(original)), label="place")
    torch.save(replaced(original, place, Bomb()), path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    CALLED.clear()
    assert answer(checkpoint.load, path) is None and not CALLED


@examples(130)
@given(st.data())
def test_a_checkpoint_whose_pickle_is_any_bytes_is_refused_or_holds_plain_values(saved, data):
    path, content = saved.path, saved.content
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    (name,) = [name for name in members if name.endswith("/data.pkl")]
    members[name] = data.draw(pickles() | damaged(members[name]), label="pickle")
    if data.draw(st.booleans()):
        path.write_bytes(members[name])  # as if in the format of before 2020
    else:
        with zipfile.ZipFile(path, "w") as file:  # with sums that are right
            for name, part in members.items():
                file.writestr(name, part)
    state = answer(checkpoint.load, path)
    if state is not None:
        answer(checkpoint.build_model, state)
