import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT, assert_user_error
from hub import Hub

from quartz import shards, tokenizer


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the data folders' scripts, so that a test does not prepare data in the project itself."""
    for script in (ROOT / "data").glob("*/prepare.py"):
        (tmp_path / "data" / script.parent.name).mkdir(parents=True)
        shutil.copy(script, tmp_path / "data" / script.parent.name / "prepare.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepare(project, run):
    """prepare("shakespeare_char", *arguments) runs that data set's script."""
    return lambda name, *arguments: run(str(project / "data" / name / "prepare.py"), *arguments)


def read(folder, split):
    meta = shards.load_meta(folder)
    tokens = shards.Split(folder, split, meta, meta["vocab_size"])
    return tokens.read(0, len(tokens)), tokenizer.from_data(meta["tokenizer"])


def test_tiny_shakespeare_in_characters(project, prepare, shakespeare):
    result = prepare("shakespeare_char", f"--source={shakespeare}")
    assert result.code == 0, result.err
    assert "vocab size: 65" in result.out
    assert "train has 1,003,854 tokens" in result.out and "val has 111,540 tokens" in result.out
    folder = project / "data" / "shakespeare_char"
    train, characters = read(folder, "train")
    val, _ = read(folder, "val")
    assert (len(train), len(val), characters.vocab_size) == (1_003_854, 111_540, 65)
    text = shakespeare.read_text(encoding="utf-8")
    assert characters.decode(train[:5000].tolist()) == text[:5000]
    assert characters.decode(val[-5000:].tolist()) == text[-5000:]


def test_tiny_shakespeare_in_gpt2_tokens(project, prepare, shakespeare, gpt2_bpe):
    result = prepare("shakespeare", f"--source={shakespeare}")
    assert result.code == 0, result.err
    train, bpe = read(project / "data" / "shakespeare", "train")
    val, _ = read(project / "data" / "shakespeare", "val")
    assert (len(train), len(val)) == (301_966, 36_059)
    text = shakespeare.read_text(encoding="utf-8")
    assert bpe.decode(train.tolist()) + bpe.decode(val.tolist()) == text


def test_the_standard_library_is_a_data_set(project, prepare):
    result = prepare("pystdlib_char")
    assert result.code == 0, result.err
    train, characters = read(project / "data" / "pystdlib_char", "train")
    val, _ = read(project / "data" / "pystdlib_char", "val")
    assert len(train) > 3_000_000 and len(val) == pytest.approx(len(train) / 9, rel=0.01)
    assert all(char.isascii() for char in characters.chars)
    text = characters.decode(train.tolist())
    assert "\nimport " in text and "def __init__(self" in text and "\r\n" not in text
    assert text.count("self.assertEqual(") < 200  # the tests, which hold tens of thousands, are left out
    first = (project / "data" / "pystdlib_char" / "train.bin").read_bytes()
    prepare("pystdlib_char")
    assert (project / "data" / "pystdlib_char" / "train.bin").read_bytes() == first


def test_any_folder_of_python_files_is_a_data_set(project, prepare):
    sources = project / "src" / "tests"
    sources.mkdir(parents=True)
    (sources / "test_a.py").write_text("left out")
    (sources.parent / "a.py").write_bytes(b"print('a')\r\n" * 20)
    (sources.parent / "b.py").write_bytes("print('é')\n".encode() * 20)
    result = prepare("pystdlib_char", f"--source={sources.parent}")
    assert result.code == 0, result.err
    train, characters = read(project / "data" / "pystdlib_char", "train")
    val, _ = read(project / "data" / "pystdlib_char", "val")
    assert characters.decode([*train.tolist(), *val.tolist()]) == "print('a')\n" * 20


@pytest.fixture
def server():
    """A local web server that serves what a test puts in its dict: (status, body, claimed length)."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = pages.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield pages, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_the_text_is_downloaded_once(project, prepare, server):
    pages, address = server
    text = ("First Citizen:\nSpeak.\n" * 30).encode()
    pages["/input.txt"] = (200, text, len(text))
    result = prepare("shakespeare_char", f"--url={address}/input.txt")
    assert result.code == 0, result.err
    assert (project / "data" / "shakespeare_char" / "input.txt").read_bytes() == text
    pages.clear()
    assert prepare("shakespeare_char", f"--url={address}/input.txt").code == 0


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
@pytest.mark.parametrize("page", [(404, b"", 0), (200, b"Speak.\n" * 9, 500), (500, b"", 0), None])
def test_a_failed_download_is_one_line_that_names_source(project, prepare, server, name, page):
    pages, address = server
    pages["/input.txt"] = page
    url = f"{address}/input.txt" if page else "http://127.0.0.1:9/input.txt"
    result = prepare(name, f"--url={url}")
    assert_user_error(result, "--source=FILE", url)
    assert result.err.count("error:") == 1
    assert [path.name for path in (project / "data" / name).iterdir() if path.suffix != ".tmp"] == ["prepare.py"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "can't be read"), (b"", "empty"), (b"a", "too short"), (b"ab\xff\xfecd", "byte 2 is 0xff")],
)
def test_a_source_that_is_no_text_is_one_line(project, prepare, content, words):
    if content is not None:
        (project / "mine.txt").write_bytes(content)
    before = prepare("shakespeare_char", f"--source={project / 'mine.txt'}")
    assert_user_error(before, words)
    assert not (project / "data" / "shakespeare_char" / "train.bin").exists()


def test_an_empty_folder_and_an_unknown_key_are_one_line(project, prepare):
    (project / "empty").mkdir()
    assert_user_error(prepare("pystdlib_char", "--source=empty"), "--source=FOLDER")
    assert_user_error(prepare("pystdlib_char", "--sorce=empty"), "'source'")
    assert_user_error(prepare("pystdlib_char", "--source=nowhere"), "nowhere")


def test_meta_counts_the_tokens(project, prepare):
    (project / "mine.txt").write_text("abcdefghij" * 10)
    prepare("shakespeare_char", f"--source={project / 'mine.txt'}")
    meta = json.loads((project / "data" / "shakespeare_char" / "meta.json").read_text())
    assert meta["tokens"] == {"train": 90, "val": 10} and meta["vocab_size"] == 10 and meta["dtype"] == "uint16"
    assert np.fromfile(project / "data" / "shakespeare_char" / "val.bin", "<u2").tolist() == list(range(10))


# ----------------------------------------------------------------------------------------------------------------------
# One's own text, and the public corpora


def parquet(path, texts):
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": texts, "id": texts}), path)
    return path.read_bytes()


def documents(folder) -> dict[str, list[str]]:
    found = {}
    for split in ("train", "val"):
        ids, its = read(folder, split)
        found[split] = its.decode(ids.tolist()).split("<|endoftext|>")[:-1]
    return found


def test_ones_own_text_is_prepared_and_trained_on(project, prepare, run):
    (project / "mine").mkdir()
    for n in range(60):
        (project / "mine" / f"{n}.md").write_text(f"# Note {n}\nAll is well at {n * n}.\n")
    result = prepare("text", "--source=mine", "--tokenizer=bpe", "--vocab_size=300")
    assert result.code == 0, result.err
    assert "trained 300 tokens" in result.out
    found = documents(project / "data" / "text")
    assert len(found["train"] + found["val"]) == 60 and found["val"]
    flags = "--dataset=text --device=cpu --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2 --max_iters=2"
    flags += " --gradient_accumulation_steps=1 --eval_iters=1 --compile=False --out_dir=out"
    assert run("train.py", *flags.split()).code == 0
    result = run("sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=5", "--start=All <|endoftext|>")
    assert result.code == 0 and result.out.startswith("All <|endoftext|>"), result.err


def test_own_text_may_go_to_another_folder(project, prepare):
    (project / "a.txt").write_text("".join(f"line {n}\n" for n in range(500)))
    assert prepare("text", "--source=a.txt", "--tokenizer=char", "--out=data/mine").code == 0
    assert shards.find("mine") and not (project / "data" / "text" / "train.bin").exists()


def test_bad_input_to_ones_own_text_is_one_line_a_problem(project, prepare):
    (project / "a.jsonl").write_text('{"body": "x"}\n')
    (project / "bad.txt").write_bytes(b"caf\xe9 au lait")
    assert_user_error(prepare("text"), "--source=PATH")
    assert_user_error(prepare("text", "--source=nowhere", "--val_share=7.0"), "nowhere", "val_share")
    assert_user_error(prepare("text", "--source=a.jsonl", "--tokenizer=byte"), "a.jsonl", "line 1", "'text'", "body")
    assert_user_error(prepare("text", "--source=bad.txt", "--tokenizer=byte"), "bad.txt", "byte 3 is 0xe9")
    assert_user_error(prepare("text", "--source=bad.txt", "--tokenizer=words"), "char, byte, gpt2, bpe")
    assert_user_error(prepare("text", "--source=bad.txt", "--out=bad.txt/x"), "bad.txt/x")
    assert not (project / "data" / "text" / "train.bin").exists()


@pytest.mark.parametrize("name", ["openwebtext", "fineweb", "tinystories"])
def test_a_public_corpus_is_prepared_from_files_at_hand(project, prepare, name):
    texts = [f"Page {n} of {n * n}." for n in range(400)]
    parquet(project / "there" / "a.parquet", texts[:300])
    parquet(project / "there" / "b.parquet", texts[300:])
    result = prepare(name, "--source=there/*.parquet", "--tokenizer=byte", "--val_share=0.1")
    assert result.code == 0, result.err
    found = documents(project / "data" / name)
    assert sorted(found["train"] + found["val"]) == sorted(texts) and len(found["val"]) > 10


def test_tiny_stories_validation_file_is_for_validation(project, prepare):
    parquet(project / "there" / "train-0.parquet", [f"Train {n}." for n in range(40)])
    parquet(project / "there" / "validation-0.parquet", [f"Validate {n}." for n in range(4)])
    assert prepare("tinystories", "--source=there", "--tokenizer=char").code == 0
    found = documents(project / "data" / "tinystories")
    assert found == {"train": [f"Train {n}." for n in range(40)], "val": [f"Validate {n}." for n in range(4)]}


@pytest.mark.parametrize(
    ("name", "flag", "repo", "folder"),
    [
        ("openwebtext", "--max_files=2", "Skylion007/openwebtext", "plain_text"),
        ("fineweb", "--max_files=2", "HuggingFaceFW/fineweb", "sample/10BT"),
        ("fineweb", "--edu=True", "HuggingFaceFW/fineweb-edu", "sample/10BT"),
        ("tinystories", "--val_share=0.1", "roneneldan/TinyStories", "data"),
    ],
)
def test_a_public_corpus_is_downloaded_and_prepared(project, prepare, monkeypatch, name, flag, repo, folder):
    hub = Hub(repo, folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    try:
        for n in range(3):
            texts = [f"{n} {line} {line * line}" for line in range(200)]
            hub.files[f"{folder}/{n}.parquet"] = parquet(project / "made" / f"{n}.parquet", texts)
        hub.faults = {f"{folder}/1.parquet": [1000]}  # the connection breaks in the middle
        result = prepare(name, flag, "--tokenizer=byte", "--val_share=0.1")
        assert result.code == 0, result.err
    finally:
        hub.close()
    found = documents(project / "data" / name)
    assert len(found["train"] + found["val"]) == 200 * (2 if "max_files" in flag else 3)
    assert (project / "data" / name / "source").is_dir()
    assert prepare(name, flag, "--tokenizer=byte", "--val_share=0.2").code == 0, (
        "without the hub too, once the files are there"
    )


def test_wrong_settings_are_told_before_a_download(project, prepare, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = prepare("fineweb", "--val_share=0.0", "--workers=-1")
    assert_user_error(result, "val_share", "workers")
    assert "127.0.0.1" not in result.err and not (project / "data" / "fineweb" / "source").exists()
    assert_user_error(prepare("fineweb"), "127.0.0.1:9", "--source=PATH")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py")))
def test_preparing_data_loads_no_torch(name, start, tmp_path):
    """It would take longer than the preparation of a small text."""
    code = f"import runpy, sys\nsys.argv = ['prepare.py']\nrunpy.run_path({str(ROOT / 'data' / name / 'prepare.py')!r})"
    (tmp_path / "load.py").write_text(f"{code}\nprint('torch' in sys.modules, 'quartz.corpus' in sys.modules)\n")
    out, err = start(tmp_path / "load.py").communicate(timeout=60)
    assert out.split() == ["False", "True"], err
