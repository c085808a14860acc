import gzip
import itertools
import json
import struct
import subprocess
import sys

import pytest
from conftest import PRINT_PEAK, ROOT

from configurator import UserError
from quartz import documents
from quartz.documents import files_of, is_held_out, pieces_of

TEXTS = ["First one.\nTwo lines.\n", "Zweiter Text: ä ö ü\n", "第三の文書\n", "no newline at the end"]


def pack(path, content: bytes):
    """Writes content as the ending of path says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as a parallel compressor writes them
        content = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


def parquet(texts, column="text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pytest.importorskip("pyarrow.parquet").write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def read(path, field="text", passage=documents.PASSAGE) -> list[str]:
    """The documents, put together again from their passages."""
    found, text = [], ""
    for piece in pieces_of(path, field, passage):
        assert piece.text
        text += piece.text
        if piece.is_end:
            found.append(text)
            text = ""
    assert not text, "the last document has no end"
    return found


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".txt", ".md", ".py"])
def test_every_kind_of_file_gives_its_documents(tmp_path, kind, packing):
    if kind == ".jsonl":
        content = "\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS).encode()
    elif kind == ".parquet":
        content = parquet(TEXTS)
    else:
        content = "<|endoftext|>\n\n".join(TEXTS).encode()
    assert read(pack(tmp_path / f"a{kind}{packing}", content)) == TEXTS


def test_a_named_field_or_column_holds_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    (tmp_path / "a.parquet").write_bytes(parquet(["yes", None, ""], column="body"))
    assert read(tmp_path / "a.jsonl", "body") == ["yes"] and read(tmp_path / "a.parquet", "body") == ["yes"]
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match="'words', but .*body.*--field=NAME"):
            read(tmp_path / name, "words")
    with pytest.raises(UserError, match="row 1 holds no text, but int"):
        read(tmp_path / "a.parquet", "id")


def test_line_ends_become_newlines_wherever_a_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "READ_BYTES", 1)
    (tmp_path / "a.txt").write_bytes("\ufeffä\r\nb\rc\n<|endoftext|>\r\n\r\n\nd<|endoftext".encode())
    assert read(tmp_path / "a.txt") == ["ä\nb\nc\n", "d<|endoftext"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\r\nb\rc"}))
    assert read(tmp_path / "a.jsonl") == ["a\nb\nc"]


@pytest.mark.parametrize("passage", [1, 7, 50, 10_000])
def test_passages_depend_on_the_document_alone(tmp_path, monkeypatch, passage):
    """However the file is read, and whatever stands before; they are lines where those are short enough."""
    document = "".join(f"line {n}\n" + "x" * (n % 90) for n in range(300))
    (tmp_path / "a.txt").write_text(document)
    (tmp_path / "b.txt").write_text("other\n<|endoftext|>" + document + "<|endoftext|>")
    found = []
    for size in (1, 13, 64, 2**20):
        monkeypatch.setattr(documents, "READ_BYTES", size)
        found.append([piece[:2] for piece in pieces_of(tmp_path / "a.txt", "", passage)])
        behind = [piece[:2] for piece in pieces_of(tmp_path / "b.txt", "", passage)]
        assert behind[-len(found[0]) :] == found[0]
    assert all(pieces == found[0] for pieces in found)
    texts = [text for text, _ in found[0]]
    assert "".join(texts) == document and max(map(len, texts)) <= passage
    assert [is_end for _, is_end in found[0]] == [False] * (len(texts) - 1) + [True]
    if passage == 10_000:
        assert len(texts) > 1 and all(text.endswith("\n") for text in texts[:-1])


def test_a_folder_gives_its_text_in_order_and_tells_what_it_leaves_out(tmp_path, capsys):
    for name in ("b.txt", "a/z.md", "a/b.jsonl.gz", "c.parquet", "x.png", "y.pdf", ".git/config.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [path.relative_to(tmp_path).as_posix() for path in files_of(str(tmp_path))]
    assert names == ["a/b.jsonl.gz", "a/z.md", "b.txt", "c.parquet"]
    assert ".pdf, .png" in capsys.readouterr().err
    assert [path.name for path in files_of(f"{tmp_path}/**/*.md")] == ["z.md"]
    assert files_of(str(tmp_path / "x.png")) == [tmp_path / "x.png"], "a file that is named is taken"


@pytest.mark.parametrize("source", ["", "nowhere", "*.nothing", "empty"])
def test_a_source_without_text_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--source=PATH"):
        files_of(source)


@pytest.mark.parametrize("place", [0, 3, 2**20 - 1, 2**20, 2**20 + 500])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_an_undecodable_byte_is_named_with_its_file_and_place(tmp_path, packing, place):
    content = bytearray("é".encode() * 2**19 + b"abc" * 500)
    content[place] = 0xFF
    with pytest.raises(UserError) as problem:
        read(pack(tmp_path / f"a.txt{packing}", bytes(content)))
    told = str(problem.value)
    assert f"a.txt{packing}" in told
    assert f"byte {place} is 0xff" in told or f"byte {place - 1} is 0xc3" in told  # a character's first byte


def test_a_character_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("abcé".encode()[:-1])
    with pytest.raises(UserError, match="byte 3 is 0xc3"):
        read(tmp_path / "a.txt")


SUMMED = (".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst", ".parquet.zst")  # plain parquet holds no sums


@pytest.mark.parametrize(
    ("kind", "damage"),
    [*itertools.product(SUMMED, ("cut", "junk", "flipped")), (".parquet", "cut"), (".parquet", "junk")],
)
def test_a_damaged_file_is_named(tmp_path, kind, damage):
    texts = [f"{n} {n * n} {n**3 % 1009} lines of text\n" * 3 for n in range(2000)]
    content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    path = pack(tmp_path / f"a{kind}", parquet(texts) if ".parquet" in kind else content)
    whole = path.read_bytes()
    damaged = {"cut": whole[:-9], "junk": b"junk" * 99, "flipped": whole[:40] + b"\0" * 40 + whole[80:]}[damage]
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="a" + kind):
        read(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "line 2 is no JSON"),
        ("[1]", "line 2 has no field 'text'"),
        ('{"text": 3}', "line 2 holds no text, but float"),
        ("[" * 100_000, "line 2 is no JSON"),
        (b'{"text": "\xff"}', "line 2 is no JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"{package} package: pip install -e \.\[data\]"):
        read(tmp_path / name)


def test_the_held_out_share_is_a_share():
    chosen = [is_held_out(str(n).encode(), 0.1) for n in range(20_000)]
    assert 0.09 < sum(chosen) / len(chosen) < 0.11
    assert all(is_held_out(str(n).encode(), 0.2) for n in range(20_000) if chosen[n]), (
        "a larger share holds the smaller"
    )


def test_bytes_in_a_parquet_file_that_are_no_text_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    ends = pyarrow.py_buffer(struct.pack("<3i", 0, 4, 6))
    column = pyarrow.StringArray.from_buffers(2, ends, pyarrow.py_buffer(b"good\xff\xfe"))
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet, row 2 is no UTF-8 text"):
        read(tmp_path / "a.parquet")


def test_links_are_followed_once_and_a_broken_one_is_named(tmp_path):
    for name in ("src", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    (tmp_path / "src" / "a.txt").write_text("a")
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "circle").symlink_to(tmp_path / "src")
    assert [path.name for path in files_of(str(tmp_path / "src"))] == ["a.txt", "b.txt"]
    (tmp_path / "src" / "broken.txt").symlink_to(tmp_path / "nowhere")
    broken = next(path for path in files_of(str(tmp_path / "src")) if path.name == "broken.txt")
    with pytest.raises(UserError, match="broken.txt can't be read"):
        read(broken)


def test_what_a_glob_leaves_out_is_told(tmp_path, capsys):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("a")
    assert files_of(f"{tmp_path}/*") == [tmp_path / "a.txt"]
    assert "1 folders are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="--source=PATH"):
        files_of("a" * 300)


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"name" + bytes(500) + b"text")
    with pytest.raises(UserError, match="a.tar is no text: it holds NUL"):
        read(tmp_path / "a.tar")
    (tmp_path / "a.txt.gz").write_bytes(b"")
    with pytest.raises(UserError, match="a.txt.gz is damaged: it is empty"):
        read(tmp_path / "a.txt.gz")
    (tmp_path / "a.ndjson").write_text('{"text": "x", "n": ' + "9" * 5000 + "}")
    assert read(tmp_path / "a.ndjson") == ["x"]


def test_a_file_that_unpacks_to_a_thousand_times_its_size_takes_no_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"the same line\n" * 10_000_000))
    code = (
        f"from quartz import documents; from pathlib import Path; pieces = documents.pieces_of(Path({str(tmp_path)!r}, "
    )
    code += "'a.txt.zst'), 'text'); [next(pieces) for _ in range(200)]; "
    code += PRINT_PEAK
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 120 * 1024, done.stderr  # KiB; all of it would be 140 MB more
