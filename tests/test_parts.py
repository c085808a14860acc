"""A data set that several processes prepare, each a part of it: together they are what one makes."""

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_user_error
from test_corpus import Killed, contents

from configurator import UserError
from quartz import corpus, documents, files
from quartz.corpus import Recipe, prepare
from quartz.tokenizer import END_OF_TEXT, CharTokenizer


@pytest.fixture
def source(tmp_path, monkeypatch) -> str:
    """Files of several kinds, read in small steps, so that parts end in the middle of files and of documents."""
    monkeypatch.setattr(documents, "READ_BYTES", 400)
    folder = tmp_path / "src"
    folder.mkdir()
    texts = [f"Story {n}.\nOnce there was{' a fox' * (n % 17)}, ä {n * n}.\n" for n in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text(END_OF_TEXT.join(texts[:80]))
    (folder / "c.txt").write_text("".join(f"line {n} of a document of several passages\n" for n in range(2000)))
    (folder / "d.txt").write_text("")
    with gzip.open(folder / "e.jsonl.gz", "wb") as file:
        file.write(lines.replace("fox", "hen").encode())
    return str(folder)


def tokens_of_parts(folder) -> list[int]:
    return [
        sum(its["tokens"] for its in json.loads((part / corpus.NOTE).read_text())["counts"].values())
        for part in (folder / corpus.PARTS).iterdir()
        if part.is_dir()
    ]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_the_parts_together_are_the_whole(tmp_path, source, tokenizer):
    """However many, in whichever order; tokens, meta.json and the names of the files."""
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    recipe = Recipe(tokenizer, 300 if tokenizer == "bpe" else 0, shard_tokens=20_000)
    prepare(tmp_path / "whole", source, recipe)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 3, "shards"
    orders = [*itertools.permutations((1, 2, 3)), (1,), (2, 1), tuple(range(60, 0, -1))]
    for n, order in enumerate(orders if tokenizer == "byte" else orders[3:4]):
        out = tmp_path / str(n)
        for number in order:
            prepare(out, source, recipe, part=f"{number}/{len(order)}")
            assert contents(out) == {}, "nothing is read as a data set before all are joined"
        shares = tokens_of_parts(out)
        assert len(order) == 60 or min(shares) > 0.1 * sum(shares), "each has its share"
        prepare(out, source, recipe, join=len(order))
        assert contents(out) == expected, order
        assert not (out / corpus.PARTS).exists()


@pytest.mark.parametrize("name", ["a.jsonl", "c.txt", "e.jsonl.gz", "b.txt.gz", "a.parquet"])
def test_one_file_is_shared_out_too(tmp_path, source, name):
    path = tmp_path / "src" / name
    if name == "b.txt.gz":
        path.write_bytes(gzip.compress((tmp_path / "src" / "b.txt").read_bytes()))
    elif name == "a.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.table({"text": ["always the same", *map(str, range(300))] * 9}), path)
    recipe = Recipe("byte", shard_tokens=5000)
    prepare(tmp_path / "whole", str(path), recipe)
    for number in (3, 1, 2):
        prepare(tmp_path / "out", str(path), recipe, part=f"{number}/3")
    if name in ("a.jsonl", "c.txt", "a.parquet"):
        assert min(tokens_of_parts(tmp_path / "out")) > 0.25 * sum(tokens_of_parts(tmp_path / "out"))
    prepare(tmp_path / "out", str(path), recipe, join=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_for_validation_are_so_in_every_part(tmp_path, source):
    for out, how in (("whole", [{}]), ("out", [{"part": "2/2"}, {"part": "1/2"}, {"join": 2}])):
        for each in how:
            prepare(tmp_path / out, source, Recipe("byte"), validation="b.", **each)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_that_is_killed_is_done_again_alone(tmp_path, start):
    """SIGKILL in its middle, while another is at work; it is not taken for whole, and goes on where it was."""
    text = "".join(f"{n} bottles and {n * n} glasses\n" for n in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    code = "import sys; from quartz import corpus; from pathlib import Path; "
    code += "corpus.SAVE_SECONDS, corpus.BATCH_CHARS = 0, 2000; "
    code += "corpus.prepare(Path(sys.argv[2]), sys.argv[1], corpus.Recipe('char', shard_tokens=100_000), "
    code += "part=sys.argv[3], join=int(sys.argv[4]))"

    def begin(out, part="", join="0"):
        command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / out), part, join]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, **pipes)

    whole, killed, other = begin("whole"), begin("out", "2/3"), begin("out", "3/3")
    note, deadline = tmp_path / "out" / corpus.PARTS / "2_of_3" / corpus.NOTE, time.monotonic() + 60
    while True:  # it works in moments between which it stands still, so that it can't be over before the signal
        time.sleep(0.02)
        killed.send_signal(signal.SIGSTOP)
        its = json.loads(note.read_text()) if note.exists() else {"counts": {"train": {"tokens": 0}}}
        if its["counts"]["train"]["tokens"] > 100_000:
            break
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        killed.send_signal(signal.SIGCONT)
    assert "is_whole" not in its
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(60) == 0 and begin("out", "1/3").wait(60) == 0
    with pytest.raises(UserError, match="1 of 3 parts are not whole: --part=2/3"):
        prepare(tmp_path / "out", str(tmp_path / "a.txt"), Recipe("char", shard_tokens=100_000), join=3)
    again = begin("out", "2/3")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and "going on at" in out, err
    joined = begin("out", join="3")
    assert joined.wait(60) == 0, joined.communicate()
    assert whole.wait(60) == 0 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_at_any_step_joining_is_done_again(tmp_path, source, monkeypatch):
    """Over an older data set: what can be read is the old one, the new one, or nothing."""
    recipe = Recipe("char", shard_tokens=100_000)
    prepare(tmp_path / "whole", source, recipe)
    for number in (1, 2):
        prepare(tmp_path / "parts", source, recipe, part=f"{number}/2")
    expected, stop_at, finished = contents(tmp_path / "whole"), 0, False
    while not finished:
        stop_at += 1
        out, steps = tmp_path / str(stop_at), []
        shutil.copytree(tmp_path / "parts", out)
        corpus.write_dataset(out, {"train": [0, 1], "val": [1]}, CharTokenizer.train("ab"))

        def step(do, steps=steps, stop_at=stop_at):
            def wrapped(*arguments, **keywords):
                steps.append(do)
                if len(steps) == stop_at:
                    raise Killed
                return do(*arguments, **keywords)

            return wrapped

        with monkeypatch.context() as patch:
            for where, name in (
                (corpus.Shards, "write"),
                (os, "replace"),
                (os, "unlink"),
                (files, "write_through"),
                (files, "whole"),
                (shutil, "rmtree"),
            ):
                patch.setattr(where, name, step(getattr(where, name)))
            try:
                prepare(out, source, recipe, join=2)
                finished = True
            except Killed:
                pass
        if not finished:
            prepare(out, source, recipe, join=2)
        assert contents(out) == expected and not (out / corpus.PARTS).exists(), stop_at
    assert stop_at > 12


def test_a_part_that_is_whole_is_not_done_again(tmp_path, source, monkeypatch):
    prepare(tmp_path / "out", source, Recipe("byte"), part="1/2")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.tmp")}
    monkeypatch.setattr(corpus, "_encoded", lambda _, batch: pytest.fail("it encodes again") if batch else {})
    prepare(tmp_path / "out", source, Recipe("byte"), part="1/2")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.tmp")} and before


def test_a_part_whose_tokens_are_gone_is_not_whole(tmp_path, source):
    for number in (1, 2):
        prepare(tmp_path / "out", source, Recipe("byte"), part=f"{number}/2")
    lost = tmp_path / "out" / corpus.PARTS / "2_of_2" / "train_000000.bin.tmp"
    lost.write_bytes(lost.read_bytes()[:-2])
    with pytest.raises(UserError, match="does not hold what was written there: prepare --part=2/2 again"):
        prepare(tmp_path / "out", source, Recipe("byte"), join=2)
    prepare(tmp_path / "out", source, Recipe("byte"), part="2/2")
    prepare(tmp_path / "out", source, Recipe("byte"), join=2)
    prepare(tmp_path / "whole", source, Recipe("byte"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_that_prepare_the_same_part_are_refused(tmp_path, source):
    (tmp_path / "out" / corpus.PARTS / "1_of_2").mkdir(parents=True)
    with files.claimed(tmp_path / "out" / corpus.PARTS / "1_of_2", "preparation"):
        with pytest.raises(UserError, match="another preparation"):
            prepare(tmp_path / "out", source, Recipe("byte"), part="1/2")
        prepare(tmp_path / "out", source, Recipe("byte"), part="2/2")


@pytest.mark.parametrize("name", ["text", "openwebtext", "fineweb", "tinystories"])
def test_what_makes_no_sense_is_one_line(tmp_path, source, run, name):
    """Numbers that are none, parts of different recipes or sources, parts that are not there."""

    def script(*arguments):
        always = (f"--out={tmp_path}/out", "--tokenizer=byte", "--val_share=0.1")
        return run(f"data/{name}/prepare.py", *always, *arguments)

    for part in ("0/3", "4/3", "1/0", "3", "1/2/3", "-1/3", "a/b"):
        assert_user_error(script(f"--source={source}", f"--part={part}"), "part must be i/n", repr(part))
    assert_user_error(script(f"--source={source}", "--join=-1"), "join must be the number of parts")
    assert_user_error(script(f"--source={source}", "--join=2", "--part=1/2"), "exclude each other")
    assert not (tmp_path / "out").exists()
    assert_user_error(script(f"--source={source}", "--join=2"), "2 of 2 parts are not whole: --part=1/2, 2/2")
    assert script(f"--source={source}", "--part=1/2").code == 0
    assert_user_error(script(f"--source={source}", "--part=2/2", "--val_share=0.3"), "another text, recipe or Python")
    assert_user_error(script(f"--source={source}/a.jsonl", "--part=2/2"), "another text, recipe or Python")
    assert script(f"--source={source}", "--part=2/2").code == 0
    assert_user_error(script(f"--source={source}/a.jsonl", "--join=2"), "another text, recipe or Python")
    assert_user_error(script(f"--source={source}", "--join=3"), "3 of 3 parts are not whole")
    assert script(f"--source={source}", "--join=2").code == 0
    assert (tmp_path / "out" / "meta.json").exists() and not (tmp_path / "out" / corpus.PARTS).exists()


# ----------------------------------------------------------------------------------------------------------------------
# docs/prepare.slurm, among stand-ins of SLURM's commands


SBATCH = """\
import os, subprocess, sys
options, (script, *arguments) = sys.argv[1:3], sys.argv[3:]
print(*options, file=open("sbatch.txt", "a"))
tasks = [option.partition("1-")[2] for option in options if option.startswith("--array=")]
for task in range(int(tasks[0]), 0, -1) if tasks else [None]:
    job = {"SLURM_JOB_ID": "7"} | ({"SLURM_ARRAY_TASK_ID": str(task)} if tasks else {})
    if not tasks and os.path.exists("failed.txt"):
        os.remove("failed.txt")
        break  # its dependency is never satisfied
    done = subprocess.run(["bash", script, *arguments], env=os.environ | job, stdout=sys.stderr)
    if done.returncode:
        open("failed.txt", "w").close()
if tasks:
    print("41;cluster")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stands in a folder, with sbatch that does its job at once, the tasks of an array backwards."""
    if shutil.which("bash") is None:
        pytest.skip("this system has no bash")
    (tmp_path / "bin").mkdir()
    (tmp_path / "sbatch.py").write_text(SBATCH)
    stand_ins = {
        "sbatch": f'exec {sys.executable} {tmp_path}/sbatch.py "$@"',
        "srun": '[ ! -e "fail_${SLURM_ARRAY_TASK_ID:-}" ] || exit 2; exec "$@"',
        "python": f'exec {sys.executable} "$@"',
        "scontrol": 'echo "$@" > scontrol.txt',
    }
    for name, body in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_slurm_job_array_prepares_the_parts_and_a_job_joins_them(slurm, source, run):
    """A part that fails keeps the others from being joined; the same line again does it, and joins."""
    script = [str(ROOT / "data/text/prepare.py"), f"--source={source}", "--tokenizer=char"]
    line = ["bash", str(ROOT / "docs" / "prepare.slurm"), "3", *script, f"--out={slurm}/out"]
    (slurm / "fail_2").touch()
    assert subprocess.run(line, capture_output=True).returncode == 0
    submitted = ["--parsable --array=1-3", "--dependency=afterok:41 --kill-on-invalid-dep=yes"]
    assert (slurm / "sbatch.txt").read_text().splitlines() == submitted
    assert sorted(path.name for path in (slurm / "out" / corpus.PARTS).glob("*_of_*")) == ["1_of_3", "3_of_3"]
    assert contents(slurm / "out") == {}
    (slurm / "fail_2").unlink()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run(script[0], *script[1:], f"--out={slurm}/whole").code == 0
    assert contents(slurm / "out") == contents(slurm / "whole")


def test_a_part_that_slurm_interrupts_goes_back_into_the_queue(slurm):
    (slurm / "bin" / "srun").write_text("#!/bin/bash\ntouch begun; trap 'exit 143' TERM; while :; do sleep 0.1; done\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    process = subprocess.Popen(["bash", str(ROOT / "docs" / "prepare.slurm"), "3", "x.py"], env=os.environ | job)
    deadline = time.monotonic() + 20
    while not (slurm / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert (slurm / "scontrol.txt").read_text() == "requeue 7\n"
