"""Every command of README.md and docs/ is tried, as HOW says, so that no page tells of what does not work.

A command that is new on a page wants a line in HOW; one that no page has any more wants its line to go.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, flags

from model import GPT, GPTConfig
from quartz import checkpoint, corpus, hf_folder
from quartz.tokenizer import CharTokenizer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXT = "".join(map(chr, range(32, 127))) + "\n" + "".join(f"def line_{n}(): ROMEO, {n * n}.\n" for n in range(300))


class Tried(NamedTuple):
    """A command that runs, with `more` settings, in a folder where all that it reads lies as small stand-ins.

    makes: a file or folder that it leaves; says: words on its standard output; needs: packages, and gpt2's tokens.
    """

    more: str = ""
    makes: str = ""
    says: str = ""
    needs: str = ""


class Told(NamedTuple):
    """A command that no test runs as it stands: its words are checked, and `by` is what else holds what it does."""

    by: str


ON_CPU = "--device=cpu --dtype=float32 --compile=False"
BRIEF = f"{ON_CPU} --max_iters=2 --eval_interval=2 --eval_iters=1 --wandb_log=False"
BRIEF += " --block_size=32 --batch_size=2 --gradient_accumulation_steps=2"
SMALL = f"{BRIEF} --n_layer=1 --n_head=2 --n_embd=16"  # of a model that is new
FEW = f"{ON_CPU} --max_new_tokens=20"
ALL = "test_faults.test_several_processes_do_what_one_does"
INSTALL = Told("tests/test_pins.py, and every test: they run in what it makes")
SBATCH = Told("test_faults.test_a_slurm_job_goes_back_into_the_queue_and_resumes")
PARTS = Told("test_parts.test_a_part_that_is_killed_is_done_again_alone")

HOW = {
    # README.md
    "make demo": Told("its commands are the next ones"),
    "make test": INSTALL,
    "python3 -m venv .venv": INSTALL,
    "python -m pip install -c requirements.lock -e .": INSTALL,
    "python data/pystdlib_char/prepare.py": Tried("--source=notes", "data/pystdlib_char/train.bin"),
    "python train.py config/demo.py": Tried(SMALL, "out-demo/ckpt.pt"),
    'python sample.py --out_dir=out-demo --start="def "': Tried(FEW, says="\ndef "),
    "python data/shakespeare_char/prepare.py": Tried("", "data/shakespeare_char/train.bin", "vocab size: 96"),
    "python train.py config/fast_shakespeare_char.py": Tried(SMALL, "out-fast-shakespeare-char/ckpt.pt"),
    'python sample.py --out_dir=out-fast-shakespeare-char --start="ROMEO:"': Tried(FEW, says="ROMEO:"),
    "python eval.py --out_dir=out-fast-shakespeare-char": Tried("--device=cpu", says='"loss": '),
    "python train.py config/train_shakespeare_char.py": Tried(SMALL, "out-shakespeare-char/ckpt.pt"),
    "python train.py config/train_gpt2.py": Tried(SMALL, "out/ckpt.pt"),
    'python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100': (
        Tried(ON_CPU, says="What is the answer to life?", needs="safetensors gpt2")
    ),
    "python data/text/prepare.py --source=mine.txt --tokenizer=char": Tried("", "data/text/train.bin"),
    "python train.py config/fast_shakespeare_char_better.py --dataset=text --out_dir=out-mine": (
        Tried(SMALL, "out-mine/ckpt.pt")
    ),
    "python export.py --out_dir=out-mine --to=hf": Tried("", "out-mine/hf/config.json", needs="safetensors tokenizers"),
    # docs/data.md
    'pip install -e ".[data]"': INSTALL,
    "python data/text/prepare.py --source=notes/ --tokenizer=bpe --vocab_size=4096": (
        Tried("--vocab_size=300", "data/text/train.bin", needs="tokenizers")
    ),
    "python data/text/prepare.py --source='crawl/**/*.jsonl.zst' --field=content --out=data/crawl": (
        Tried("--tokenizer=byte", "data/crawl/train.bin", needs="zstandard")
    ),
    "python train.py --dataset=text": Tried(SMALL, "out/ckpt.pt"),
    "python data/text/prepare.py --source='crawl/**/*.jsonl.zst' --out=data/crawl --part=1/3": PARTS,
    "python data/text/prepare.py --source='crawl/**/*.jsonl.zst' --out=data/crawl --join=3": PARTS,
    "bash docs/prepare.slurm 16 data/text/prepare.py --source='/shared/crawl/*.jsonl.zst' --out=/shared/data/crawl": (
        Told("test_parts.test_a_slurm_job_array_prepares_the_parts_and_a_job_joins_them")
    ),
    # docs/installing.md
    'python -m pip install -c requirements.lock -e ".[test]"': INSTALL,
    "python -m pytest": INSTALL,
    # docs/gpu.md
    "make gpu": Told("test_gpu.test_the_whole_command_runs_at_toy_sizes"),
    "make gpu DEVICE=cpu": Told("test_gpu.test_the_whole_command_runs_at_toy_sizes"),
    # docs/numbers.md, docs/sampling.md
    "python tests/peers.py --train=config/fast_shakespeare_char.py --rounds=3": (
        Told("test_docs.test_peers_runs_as_the_pages_say")
    ),
    'pip install -e ".[hf,test]" llama-cpp-python gguf': INSTALL,
    "python tests/peers.py --streams=1 --tokens=64": Told("test_docs.test_peers_runs_as_the_pages_say"),
    "python tests/peers.py --streams=1 --prompt=512 --tokens=1": Told("test_docs.test_peers_runs_as_the_pages_say"),
    "python bench.py --mode=decode --batch_size=1 --dtype=bfloat16": (
        Tried(
            "--device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --vocab_size=64"
            " --max_new_tokens=16 --rounds=1",
            says='"ratio": ',
        )
    ),
    # docs/processes.md, docs/scaling.md
    "torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py": Tried(SMALL, "out/ckpt.pt"),
    "torchrun --standalone --nproc_per_node=8 --max_restarts=3 train.py config/train_gpt2.py": (
        Tried(SMALL, "out/ckpt.pt")
    ),
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500 --rdzv_id=run1"
    " train.py config/train_gpt2.py --out_dir=/shared/out": Tried(f"{SMALL} --out_dir=shared", "shared/ckpt.pt"),
    "torchrun --standalone --nproc_per_node=8 train.py config/mine.py --fsdp=True": (
        Tried(f"{SMALL} --dataset=text", "out/ckpt.pt")
    ),
    "sbatch --nodes=2 docs/train.slurm config/train_gpt2.py --out_dir=/shared/out": SBATCH,
    # docs/programs.md
    'pip install -e ".[hf,gguf]"': INSTALL,
    "python export.py --out_dir=out-shakespeare-char --to=hf": (
        Tried("", "out-shakespeare-char/hf/model.safetensors", needs="safetensors tokenizers")
    ),
    "python data/text/prepare.py --source=mine.txt --tokenizer=bpe --vocab_size=4096": (
        Tried("--vocab_size=300", "data/text/train.bin", needs="tokenizers")
    ),
    "python export.py --out_dir=out-mine --to=gguf --dtype=q8_0": Tried("", "out-mine/model-q8_0.gguf", needs="gguf"),
    'llama-cli -m out-mine/model-q8_0.gguf -p "Once upon a time" -n 200 -no-cnv': (
        Told("test_docs.test_the_programs_of_the_pages_run, of llama.cpp as a library")
    ),
    # docs/serving.md
    'pip install -e ".[serve]"': INSTALL,
    "python serve.py --out_dir=out-shakespeare-char": Told("test_serve.test_a_stream_comes_to_the_answer"),
    'curl localhost:8000/v1/completions -H "Content-Type: application/json" -d \'{"prompt": "ROMEO:", "max_tokens":'
    ' 100, "temperature": 0.8, "top_k": 200, "seed": 1337}\'': Told("test_serve.test_row_k_draws_with_seed_plus_k"),
    "lm_eval run --model local-completions --batch_size 8 --tasks … --model_args model=out-mine,base_url="
    "http://127.0.0.1:8000/v1/completions,tokenizer=out-mine/hf,num_concurrent=4,max_length=512": (
        Told("test_clients.test_lm_eval_over_http_gives_what_its_own_model_gives")
    ),
    "python tests/load.py --llama=PATH/llama-server --turns=8 --tokens=48": (
        Told("test_docs.test_servers_are_compared_under_load")
    ),
    "python serve.py --out_dir=out-mine --watch=True": Told("test_watch.test_a_run_is_served_while_it_trains"),
    "QUARTZGPT_API_KEY=$(openssl rand -hex 24) python serve.py --host=0.0.0.0": (
        Told("test_serve.test_every_route_but_health_wants_the_key")
    ),
    # docs/training.md
    "python train.py config/fast_shakespeare_char_better.py": Tried(SMALL, "out-fast-shakespeare-char-better/ckpt.pt"),
    "python train.py config/fast_shakespeare_char_best.py": Tried(SMALL, "out-fast-shakespeare-char-best/ckpt.pt"),
    "python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1"
    " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000"
    " --dropout=0.0": Tried(SMALL, "out-shakespeare-char/ckpt.pt"),
    "python train.py config/eval_gpt2.py": Tried(BRIEF, says="val loss", needs="safetensors"),
    "python data/shakespeare/prepare.py": Tried("", "data/shakespeare/train.bin", needs="gpt2"),
    "python train.py config/finetune_shakespeare.py": Tried(BRIEF, "out-shakespeare/last.pt", needs="safetensors"),
    "python train.py config/mine.py --batch_size=32 --learning_rate=1e-3": (
        Tried(f"{SMALL} --dataset=text", "out/ckpt.pt")
    ),
    "python eval.py --out_dir=out-shakespeare-char": Tried("--device=cpu", says='"loss": '),
    "python eval.py --out_dir=out-shakespeare-char --stride=64": Tried("--device=cpu", says='"loss": '),
    "python eval.py --init_from=gpt2 --source=book.txt --stride=512": (
        Tried("--device=cpu", says='"loss": ', needs="safetensors gpt2")
    ),
    "torchrun --standalone --nproc_per_node=8 eval.py --out_dir=out --batch_size=32 --dtype=bfloat16": (
        Tried("--device=cpu", says='"loss": ')
    ),
    'pip install -e ".[plot]"': INSTALL,
    "python plot.py out-shakespeare-char": Tried("", "out-shakespeare-char/curves.png", needs="matplotlib"),
    "python plot.py out-adamw out-muon --out=compared.svg": Tried("", "compared.svg", needs="matplotlib"),
}
ONCE = "--rounds=1"
FEW_STEPS = f"{ONCE} --steps=11 --batch_size=1"
PEERS = {  # the same of tests/peers.py, sentences included
    "python tests/peers.py --streams=1 --tokens=64": f"{ONCE} --tokens=8",
    "python tests/peers.py --streams=1 --prompt=512 --tokens=1": f"{ONCE} --prompt=16",
    "python tests/peers.py --sample=out-shakespeare-char": ONCE,
    "python tests/peers.py --train=config/fast_shakespeare_char.py --rounds=3": f"{ONCE} --steps=260 --max_iters=2",
    "python tests/peers.py --busy=config/demo.py --dataset=pystdlib_char --rounds=2 --steps=50": FEW_STEPS,
    "python tests/peers.py --prepare=FILE.jsonl": ONCE,
    "python tests/peers.py --bpe=FILE.jsonl --rounds=1": "--vocab_size=300",
}
SHAPE = {"block_size": 1024, "n_layer": 1, "n_head": 2, "n_embd": 64}
YOURS = ("config/mine.py", "FILE", "FOLDER", "BASE")  # what a page leaves to the reader


# ----------------------------------------------------------------------------------------------------------------------
# The pages


def fenced(page: Path, *languages: str) -> list[str]:
    """The blocks of a page in these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The commands of a page's blocks, each in one line, with one space between words, without the comments."""
    lines = "".join(fenced(page, "sh", "bash", "console")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).replace(".venv/bin/python", "python") for line in lines]
    return [" ".join(part.split()) for line in lines for part in line.split(" && ") if part.strip()]


def in_sentences(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]


def test_every_command_of_a_page_is_tried_and_no_other():
    found = {command: name for name, page in zip(NAMES, PAGES, strict=True) for command in commands(page)}
    assert len(found) > 40
    for command, name in found.items():
        assert command in HOW, f"{name} has a new command: say in HOW of tests/test_docs.py how it is tried: {command}"
    assert not HOW.keys() - found.keys(), "no page has these any more: take them out of HOW of tests/test_docs.py"


def test_commands_are_found_wherever_they_may_stand():
    """No page has a block of another kind that looks like commands."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        assert not re.search(r"^(    |\t| *\$ )", text, re.M), f"{page.name}: fence its commands as sh"
        blocks = re.findall(r"^```(\S*)\n.*?^```", page.read_text(encoding="utf-8"), re.S | re.M)
        assert {*blocks} <= {"sh", "bash", "console", "python", "ini"}, page.name


# ----------------------------------------------------------------------------------------------------------------------
# Words: what a command names is there


def settings_of(script: str) -> set[str]:
    """The settings of a verb or of a data set's script, as --help calls them; those of a script in tests/."""
    text = (ROOT / script).read_text(encoding="utf-8")
    if "configurator.configure(" in text:
        head = text.partition("configurator.configure(")[0]
        return {name.rstrip("_") for name in re.findall(r"^([a-z]\w*) = ", head, re.M)} | {"help"}
    return {*re.findall(r'add_argument\("--(\w+)"', text)} | settings_of("train.py")


VERBS = ("train.py", "sample.py", "eval.py", "export.py", "bench.py", "plot.py", "serve.py")
SCRIPTS = (*VERBS, *(f"data/{path.parent.name}/prepare.py" for path in (ROOT / "data").glob("*/prepare.py")))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def check_script(script: str, *arguments: str) -> None:
    """That it is there, and has these settings; that files in config/ are there."""
    assert (ROOT / script).is_file(), script
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0]
            assert name in settings_of(script), f"{script} has no setting {name}"
        elif argument.endswith(".py"):
            assert argument in YOURS or (ROOT / argument).is_file(), argument


def check_torchrun(*words: str) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args([*words])
    check_script(options.training_script, *options.training_script_args)


def check_make(*words: str) -> None:
    for word in words:
        name = word.partition("=")[0]
        assert re.search(rf"^{name} \?=" if "=" in word else rf"^{name}:", MAKEFILE, re.M), f"Makefile has no {name}"


def check_pip(*words: str) -> None:
    """pip's own options are pip's; files and extras are ours."""
    extras = {*re.findall(r"^(\w+) = \[", PYPROJECT.partition("optional-dependencies]")[2], re.M)}
    for word in words:
        assert not word.endswith((".txt", ".lock")) or (ROOT / word).is_file(), word
        if extra := re.fullmatch(r"\.\[(.*)\]", word):
            assert {*extra[1].split(",")} <= extras, word


def check_words(command: str) -> None:
    """That what a command names is there: script, settings, config file, target, extra."""
    first, *words = [word for word in shlex.split(command) if word != "…"]
    if first == "uv":
        first, *words = words[words.index("python") :] if "python" in words else words
    if (first, *words[:2]) == ("python", "-m", "pip"):
        first, words = "pip", words[2:]
    if first == "python" and words and words[0] != "-m":
        check_script(*words)
    elif first in SCRIPTS or first == "docs/train.slurm":
        check_script(first, *words)
    elif first == "bash":
        assert (ROOT / words[0]).is_file(), words[0]
        check_script(*words[2:])
    elif first == "sbatch":
        script = words.index("docs/train.slurm")
        check_script("train.py", *words[script + 1 :])
    elif first in ("torchrun", "make"):
        {"torchrun": check_torchrun, "make": check_make}[first](*words)
    elif first == "pip":
        check_pip(*words)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_commands_of_a_page_name_is_there(name):
    """In its sentences too, where single settings stand as well."""
    known = {"key"}.union(
        *map(settings_of, (*SCRIPTS, "tests/peers.py", "tests/gpu.py"))
    )  # --key=value is how one is written
    for command in (*commands(ROOT / name), *in_sentences(ROOT / name)):
        if command.startswith("--"):
            words = {word[2:].partition("=")[0] for word in command.split() if word.startswith("--")}
            assert words <= known, f"{command}: no script has this setting"
        elif re.match(r"(python3?|pip|uv|make|torchrun|sbatch|bash|\w+\.py)\b", command):
            check_words(command)


def test_a_page_that_names_what_is_not_there_is_noticed():
    check_words("python train.py config/demo.py --seed=2")
    for command in (
        "python trian.py", "python train.py config/nowhere.py", "python train.py --batchsize=2", "make demos",
        "python tests/peers.py --rouns=1", 'pip install -e ".[extras]"', "make demo VENVS=x", "sample.py --topk=1",
        "torchrun --standalone train.py --x=1", "pip install -c requirement.lock -e .",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check_words(command)


def test_what_is_told_of_a_command_that_no_test_runs_is_there():
    for command, how in HOW.items():
        if isinstance(how, Told):
            for module, name in re.findall(r"\b(test_\w+)\.(test_\w+)", how.by):
                assert hasattr(importlib.import_module(module), name), f"{command}: {how.by}"


def test_the_tests_that_a_page_names_are_there():
    tests = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    named = {words for page in PAGES for words in in_sentences(page) if "test_" in words and " " not in words}
    assert len(named) > 15
    for words in named:
        if words.startswith("tests/"):
            assert words.removeprefix("tests/") in tests, words
        else:
            assert f"\ndef {words.removesuffix('…')}" in "".join(tests.values()), words


def test_make_demo_is_the_commands_that_the_readme_shows_behind_it():
    recipe = MAKEFILE.partition("\ndemo:")[2].partition("\n\n")[0].replace("$(BIN)/python", "python")
    shown = [command for command in commands(ROOT / "README.md") if "pystdlib" in command or "demo" in command][1:]
    assert len(shown) == 3
    for command, line in zip(shown, recipe.splitlines()[1:], strict=True):
        assert line.strip().startswith(command)


# ----------------------------------------------------------------------------------------------------------------------
# Deeds: a command is run


@pytest.fixture(autouse=True)
def matplotlib_is_missing(request, monkeypatch):
    """But where curves are what a command is for."""
    how = getattr(request.node, "callspec", None) and HOW.get(request.node.callspec.params.get("command"))
    if not isinstance(how, Tried) or "matplotlib" not in how.needs:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What a reader may have by the time: texts, data sets, a model of each name, the logs of runs."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "config", root / "config", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "config" / "mine.py").write_text("n_layer = 1\n")
    for script in SCRIPTS[len(VERBS) :]:
        (root / script).parent.mkdir(parents=True)
        shutil.copy(ROOT / script, root / script)
    for name in ("data/shakespeare_char/input.txt", "data/shakespeare/input.txt", "mine.txt", "book.txt", "notes/a.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(TEXT)
    for n in range(40):  # of which some are held out
        (root / "notes" / f"{n}.md").write_text(f"{n} {TEXT[:500]}")
    lines = "".join(json.dumps({"content": f"{n} {TEXT[:500]}", "text": f"{n} {TEXT[:500]}"}) + "\n" for n in range(99))
    (root / "FILE.jsonl").write_text(lines)
    with contextlib.suppress(ImportError):
        import zstandard

        (root / "crawl" / "one").mkdir(parents=True)
        (root / "crawl" / "one" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    make_data_and_models(root)
    return root


def make_data_and_models(root: Path) -> None:
    tokenizer = CharTokenizer.train(TEXT)
    ids = tokenizer.encode(TEXT)
    for name in ("pystdlib_char", "shakespeare_char", "text"):
        corpus.write_dataset(root / "data" / name, {"train": ids[:-999], "val": ids[-999:]}, tokenizer)
    for name in ("openwebtext", "shakespeare"):  # GPT-2's tokens, as nanoGPT leaves them
        for split in ("train", "val"):
            (np.arange(3000) * 17 % 50257).astype("<u2").tofile(root / "data" / name / f"{split}.bin")
    model = GPT(GPTConfig(128, tokenizer.vocab_size, 1, 2, 32))
    state = {"model": model.state_dict(), "model_args": model.config.to_args(), "tokenizer": tokenizer.to_data()}
    state |= {"iter_num": 3, "best_val_loss": 4.0, "config": {"dataset": "shakespeare_char"}}
    log = "".join(json.dumps({"iter": n, "loss": 3.0, "lr": 0.1, "tokens": n, "seconds": n}) + "\n" for n in range(9))
    for name in (
        "out",
        "out-demo",
        "out-shakespeare-char",
        "out-fast-shakespeare-char",
        "out-mine",
        "out-adamw",
        "out-muon",
    ):
        (root / name).mkdir()
        checkpoint.save(root / name / "ckpt.pt", state)
        (root / name / "log.jsonl").write_text(log)
    with contextlib.suppress(ImportError):
        for name in ("gpt2", "gpt2-xl"):
            gpt2 = GPT(GPTConfig(512, 50257, 1, 1, 4, bias=True))
            hf_folder.write(root / name, gpt2.config, gpt2.state_dict(), None)


@pytest.fixture
def checkout(made, tmp_path, monkeypatch) -> Path:
    """A folder of one's own to stand in."""
    folder = tmp_path / "checkout"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def provide(needs: str, request) -> None:
    """Skips where a package is missing, or GPT-2's tokens."""
    for name in needs.split():
        request.getfixturevalue("gpt2_bpe") if name == "gpt2" else pytest.importorskip(name)


def begin(command: str, folder: Path) -> tuple[Tried, list[str]]:
    """How a command is tried, and its words. What it is to make is not there now."""
    how = HOW[command]
    if how.makes:
        (folder / how.makes).unlink(missing_ok=True)
    return how, [*shlex.split(command), *how.more.split()]


TRIED = [command for command, how in HOW.items() if isinstance(how, Tried)]


@pytest.mark.parametrize("command", [command for command in TRIED if command.startswith("python ")])
def test_a_command_of_the_pages_does_what_it_says(command, request, checkout, run):
    provide(HOW[command].needs, request)
    how, (_, script, *arguments) = begin(command, checkout)
    result = run(script if script in VERBS else str(checkout / script), *arguments)
    assert result.code == 0, result.err
    assert how.says in result.out and (checkout / how.makes).exists()


def several(words: list[str]) -> list[list[str]]:
    """torchrun's commands as two machines of one process, or one of two, give them."""
    words = [str(ROOT / word) if word in VERBS else word for word in words]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv_endpoint=127.0.0.1:{probe.getsockname()[1]}"
    machines = 2 if "--nnodes=2" in words else 1
    words = [re.sub("^--rdzv_endpoint=.*", endpoint, word) for word in words]
    words = [re.sub("^--nproc_per_node=.*", f"--nproc_per_node={2 // machines}", word) for word in words]
    return [[sys.executable, "-m", "torch.distributed.run", *words[1:]]] * machines


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in TRIED if command.startswith("torchrun ")])
def test_a_command_of_the_pages_does_what_it_says_on_several_processes(command, checkout):
    how, words = begin(command, checkout)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(each, **pipes) for each in several(words)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert how.says in "".join(out for out, _ in outputs) and (checkout / how.makes).exists()


def beside_the_program(name: str, checkout: Path, command: str) -> dict:
    """What the last line of tests/{name} tells, where it lies, with a network of GPT-2's names but not of its size."""
    for top in (*VERBS, "model.py", "configurator.py", "quartz"):
        (checkout / top).symlink_to(ROOT / top)
    (checkout / "tests").mkdir()
    for each in ("load.py", "peers.py"):
        shape = {**SHAPE, "vocab_size": 256} if each == "peers.py" else SHAPE
        program, count = re.subn("^SHAPE = .*", f"SHAPE = {shape}", (ROOT / "tests" / each).read_text(), flags=re.M)
        assert count == 1
        (checkout / "tests" / each).write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(checkout / "cache")}
    words = [sys.executable, f"tests/{name}", *command.split()]
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("command", PEERS)
def test_peers_runs_as_the_pages_say(command, checkout, gpt2_bpe):
    assert any(command in (*commands(page), *in_sentences(page)) for page in PAGES), "no page has this any more"
    assert beside_the_program("peers.py", checkout, f"{command.partition('peers.py')[2]} {PEERS[command]}")


@pytest.mark.slow
def test_servers_are_compared_under_load(checkout, gpt2_bpe):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    settings = "--without=transformers --clients=1,2 --turns=2 --tokens=4 --rounds=1 --seconds=2 --per_second=4"
    record = beside_the_program("load.py", checkout, settings)
    assert record["1 serve.py of 16"]["tokens_per_s"] > 0 and record["8 texts"]["of_decoder"] > 0
    assert record["mixed serve.py of 16"]["first_p99_ms"] >= record["mixed serve.py of 16"]["first_median_ms"] > 0


@pytest.mark.parametrize("package", ["hf", "llama_cpp"])
def test_the_programs_of_the_pages_run(package, checkout, run):
    pytest.importorskip("transformers" if package == "hf" else package)
    (program,) = [
        it
        for it in fenced(ROOT / "docs" / "programs.md", "python")
        if re.search(f"import {package}$|from {package} ", it, re.M)
    ]
    assert run("export.py", *flags(out_dir="out-mine", to="gguf", dtype="q8_0")).code == 0
    exec(program, {"ids": torch.zeros(1, 4, dtype=torch.long)})
    assert package == "llama_cpp" or (checkout / "out-tuned" / "ckpt.pt").exists()
