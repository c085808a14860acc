"""Speed beside other programs, in one run: of decoding, of training and of preparing data, the README's tables.

    python tests/peers.py                        # GPT-2 124M with random weights, one stream, then 16
    python tests/peers.py --streams=1 --rounds=3
    python tests/peers.py --prompt=512 --tokens=1   # how fast a prompt is read, in its tokens a second
    python tests/peers.py --sample=out-shakespeare-char   # sample.py's default work, as whole processes
    python tests/peers.py --train=config/fast_shakespeare_char.py --rounds=3  # time and loss, beside nanoGPT
    python tests/peers.py --busy=config/demo.py --dataset=pystdlib_char   # a step beside other work, and nanoGPT's
    python tests/peers.py --prepare=FILE.jsonl            # a data set of GPT-2's tokens, beside tiktoken by itself
    python tests/peers.py --bpe=FILE.jsonl --rounds=1     # a BPE of its own, beside tokenizers and tiktoken

Each program sits in a process of its own, loaded and warm, and they take turns; a figure is the median over the rounds,
and the ratio is that of ours to it. transformers and llama.cpp (`pip install transformers llama-cpp-python gguf`) are
left out where they are not installed, and one that dies, with its reason. "full forward" is nanoGPT's way: no cache,
the whole context for each token.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768}


def network():
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE, bias=True)).eval()


def ours(dtype: str, streams: int, prompt: int, tokens: int):
    import torch

    from quartz import compiled
    from quartz.decoder import Decoder, Sampling

    model = network()
    kept = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    engine = compiled.prepare(model, torch.device("cpu"), kept, dtype == "int8", streams, 10**9, True, True)
    ids = torch.randint(SHAPE["vocab_size"], (prompt,)).tolist()

    def run():
        decoder = Decoder(engine, streams, prompt + tokens)
        for seed in range(streams):  # each reads it, as elsewhere
            decoder.admit(ids, [seed], tokens, Sampling(temperature=0))
        while decoder.step():
            pass

    return run


def full_forward(dtype: str, streams: int, prompt: int, tokens: int):
    import torch

    model = network()
    idx = torch.randint(SHAPE["vocab_size"], (streams, prompt + tokens))
    lengths = range(prompt, prompt + tokens, 16)  # of the tokens, every 16th is computed

    @torch.no_grad()
    def run():
        for length in lengths:
            model(idx[:, :length])[0].argmax()
        return len(lengths) / tokens

    return run


def transformers(dtype: str, streams: int, prompt: int, tokens: int):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": SHAPE["vocab_size"], "n_positions": SHAPE["block_size"], "n_embd": SHAPE["n_embd"]}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_layer=SHAPE["n_layer"], n_head=SHAPE["n_head"])).eval()
    model = model.to(getattr(torch, dtype))
    idx = torch.randint(SHAPE["vocab_size"], (1, prompt)).repeat(streams, 1)
    keywords = {"attention_mask": torch.ones_like(idx), "pad_token_id": 0, "do_sample": False}
    keywords |= {"min_new_tokens": tokens, "max_new_tokens": tokens}

    @torch.no_grad()
    def run():
        model.generate(idx, **keywords)

    return run


def llama_cpp(dtype: str, streams: int, prompt: int, tokens: int):
    import llama_cpp as lib
    import numpy as np
    import torch

    from quartz import gguf

    model = network()
    path = Path(tempfile.mkdtemp()) / "model.gguf"
    kind = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}[dtype]
    gguf.write(path, model.config, model.state_dict(), None, kind, "GPT-2")
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, None)
    llama_cpp.keep = quiet
    loaded = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = streams * max(prompt + tokens, 256), streams  # it rounds up to 256
    settings.n_batch = max(512, streams * prompt)
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(loaded, settings)
    path.unlink()
    batch = lib.llama_batch_init(streams * prompt, 0, 1)

    def step(ids: list[int], start: int) -> list[int]:
        """The same tokens behind each stream's `start`, or one for each; returns what follows."""
        batch.n_tokens = 0
        for stream in range(streams):
            for n, token in enumerate(ids[stream : stream + 1] if start else ids):
                at, batch.n_tokens = batch.n_tokens, batch.n_tokens + 1
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, start + n, 1, stream
                batch.logits[at] = bool(start) or n == len(ids) - 1
        assert lib.llama_decode(context, batch) == 0
        each = batch.n_tokens // streams
        logits = (lib.llama_get_logits_ith(context, (stream + 1) * each - 1) for stream in range(streams))
        return [int(np.ctypeslib.as_array(its, (SHAPE["vocab_size"],)).argmax()) for its in logits]

    def run():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        ids = step([*range(prompt)], 0)
        for n in range(1, tokens):
            ids = step(ids, prompt + n - 1)

    return run


WORKERS = {"ours": ours, "full forward": full_forward, "transformers": transformers, "llama.cpp": llama_cpp}
CASES = {  # streams -> (program, dtype)
    1: [("ours", "float32"), ("full forward", "float32"), ("transformers", "float32"), ("llama.cpp", "float32")]
    + [("ours", "bfloat16"), ("transformers", "bfloat16"), ("llama.cpp", "bfloat16")]
    + [("ours", "int8"), ("llama.cpp", "int8")],
    16: [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("ours", "transformers", "llama.cpp")]
    + [("ours", "int8"), ("llama.cpp", "int8")],
}


def sample_as_nanogpt_does(folder: str) -> None:
    """What nanoGPT's sample.py does by default: ten samples one after the other, without a cache, then printed."""
    import pickle  # noqa: F401 - it imports these four, and starting up is part of the comparison

    import tiktoken  # noqa: F401
    import torch

    from quartz import checkpoint, tokenizer

    state = checkpoint.load(Path(folder) / "ckpt.pt")
    model, tokens = checkpoint.build_model(state).eval(), tokenizer.from_data(state["tokenizer"])
    torch.manual_seed(1337)
    with torch.no_grad():
        for _ in range(10):
            idx = torch.tensor([tokens.encode("\n")])
            for _ in range(500):
                logits = model(idx[:, -model.config.block_size :])[0][:, -1] / 0.8
                kept = torch.topk(logits, min(200, logits.size(-1))).values
                logits[logits < kept[:, [-1]]] = -float("inf")
                idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
            print(tokens.decode(idx[0].tolist()), "---------------", sep="\n")


def compare_samples(folder: str, rounds: int) -> None:
    commands = [["sample.py", f"--out_dir={folder}", "--device=cpu"], [__file__, f"--sample_slowly={folder}"]]
    times = []
    for _ in range(rounds):
        for command in commands:
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - began)
    ours, theirs = times[::2], times[1::2]
    record = {"ours_s": statistics.median(ours), "theirs_s": statistics.median(theirs)}
    record["ratio"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(json.dumps(record))


def train_as_nanogpt_does(dataset: str, out_dir: str, seed: int, steps: int) -> None:
    """nanoGPT's quick start for CPUs as its train.py goes about it: float32, unfused AdamW, batches at random."""
    import math
    import pickle  # noqa: F401 - what it imports

    import numpy as np
    import torch
    from torch.nn import functional as F

    from model import GPT, GPTConfig
    from quartz import shards

    tanh_gelu = F.gelu
    F.gelu = lambda x, approximate: tanh_gelu(x)  # its own is the erf form, which is faster
    folder = shards.find(dataset)
    splits = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in ("train", "val")}
    torch.manual_seed(seed)

    def batch(split: str) -> list[torch.Tensor]:
        starts = torch.randint(len(splits[split]) - 64, (12,))
        rows = np.stack([splits[split][start : start + 65] for start in starts]).astype(np.int64)
        return [torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])]

    config = GPTConfig(64, shards.load_meta(folder)["vocab_size"], n_layer=4, n_head=4, n_embd=128, bias=False)
    model = GPT(config)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() < 2) == is_vector] for is_vector in (False, True))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    x, y = batch("train")
    for n in range(steps + 1):
        began = time.perf_counter()
        decay = 0.5 * (1 + math.cos(math.pi * (n - 100) / 1900))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (n + 1) / 101 if n < 100 else 1e-4 + decay * 9e-4
        if n % 250 == 0:
            model.eval()
            with torch.no_grad():
                losses = {name: sum(model(*batch(name))[1].item() for _ in range(20)) / 20 for name in splits}
            model.train()
            print(f"step {n}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if n:  # the latest, which is better than what so rough an estimate takes for the best
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "best_val_loss": losses["val"],
                }
                state |= {"model_args": config.to_args(), "iter_num": n, "config": {"dataset": dataset}}
                torch.save(state, Path(out_dir) / "ckpt.pt")
        loss = model(x, y)[1]
        x, y = batch("train")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"iter {n}: loss {loss.item():.4f}, time {1000 * (time.perf_counter() - began):.2f}ms")


def compare_training(preset: str, dataset: str, settings: list[str], rounds: int) -> None:
    """Whole processes in turns, with the seeds 1337, 1, 2, …; losses are of the whole validation split."""
    rows = []
    for nth, seed in enumerate([1337, *range(1, rounds)]):
        with tempfile.TemporaryDirectory() as folder:
            ways = {"nanogpt": [__file__, f"--train_slowly={dataset}"]}
            ways["ours"] = ["train.py", preset, *settings, f"--dataset={dataset}"]
            row = {"seed": seed}
            for name, command in list(ways.items())[:: 1 if nth % 2 else -1]:  # what runs first finds the files unread
                where = Path(folder, name)
                where.mkdir()
                command += [f"--seed={seed}", f"--out_dir={where}"]
                began = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
                row[f"{name}_s"] = time.perf_counter() - began
                command = [sys.executable, "eval.py", f"--out_dir={where}", "--batch_size=64"]
                told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
                row[f"{name}_loss"] = json.loads(told.splitlines()[-1])["loss"]
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    ratio = statistics.median(row["nanogpt_s"] / row["ours_s"] for row in rows)
    print(json.dumps({"preset": preset, "settings": settings, "dataset": dataset, "ratio": ratio, "rounds": rows}))


BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with who started it


def compare_when_busy(preset: str, dataset: str, settings: list[str], steps: int, rounds: int) -> None:
    """Milliseconds a step, the mean after ten, alone and beside a process that never rests; whole processes in turns.

    "spinning" is ours with the threads' waiting as libgomp has it by default.
    """
    quick = ["--log_interval=1", "--eval_interval=1000000", "--eval_iters=1"]
    ours = ["train.py", preset, *settings, f"--dataset={dataset}", f"--max_iters={steps}", *quick]
    theirs = [__file__, f"--train_slowly={dataset}", f"--steps={steps}"]
    ways = {"ours": (ours, {}), "spinning": (ours, {"GOMP_SPINCOUNT": "300000"}), "nanogpt": (theirs, {})}
    figures = {f"{name} {when}": [] for name in ways for when in ("alone", "busy")}
    for _ in range(rounds):
        for key in figures:
            name, when = key.split()
            command, environment = ways[name]
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, *command, "--seed=1337", f"--out_dir={folder}"]
                other = subprocess.Popen([sys.executable, "-c", BUSY]) if when == "busy" else None
                try:
                    told = subprocess.run(
                        command, cwd=ROOT, check=True, capture_output=True, text=True, env=os.environ | environment
                    )
                finally:
                    if other:
                        other.kill()
                        other.wait()
            figures[key].append(statistics.mean([float(ms) for ms in re.findall(r"time ([\d.]+)ms", told.stdout)][10:]))
            print(f"{key}: {figures[key][-1]:.1f} ms", flush=True)
    record = {key: statistics.median(values) for key, values in figures.items()}
    record |= {f"{name} ratio": record[f"{name} busy"] / record[f"{name} alone"] for name in ways}
    print(json.dumps({"preset": preset, "settings": settings, "dataset": dataset, "rounds": rounds} | record))


def compare_preparations(path: str, rounds: int) -> None:
    """Preparing a data set, reading and writing included, in turns with tiktoken's encode_ordinary_batch on as many
    threads, which has the texts at hand and throws the ids away."""
    import contextlib
    import io

    import tiktoken

    from quartz import corpus
    from quartz.documents import pieces_of
    from quartz.threads import cores

    texts = [piece.text for piece in pieces_of(Path(path), "text")]
    size, threads, encoding = sum(len(text.encode()) for text in texts), cores(), tiktoken.get_encoding("gpt2")
    seconds = {"ours": [], "tiktoken": []}
    for _ in range(rounds):
        began = time.perf_counter()
        encoding.encode_ordinary_batch(texts, num_threads=threads)
        seconds["tiktoken"].append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            began = time.perf_counter()
            corpus.prepare(Path(folder), path, corpus.Recipe("gpt2", workers=threads))
            seconds["ours"].append(time.perf_counter() - began)
    record = {name: size / statistics.median(its) / 1e6 for name, its in seconds.items()}
    record["ratio"] = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["tiktoken"], strict=True))
    print(f"{threads} threads, {size / 1e6:.0f} MB: MB/s, and how many times as fast as tiktoken by itself")
    print(json.dumps(record))


def train_and_encode(path: str, vocab_size: int) -> None:
    """What tokenizers and tiktoken take by themselves, with a file's texts at hand, to train a BPE on what is not held
    out, and to encode all on as many threads. The ids are thrown away."""
    import tiktoken
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from quartz.documents import is_held_out, pieces_of
    from quartz.threads import cores
    from quartz.tokenizer import PATTERNS, SPECIALS, printable_bytes

    texts = [piece.text for piece in pieces_of(Path(path), "text")]
    trained_on = [text for text in texts if not is_held_out(text.encode(), 0.1)]
    began = time.perf_counter()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS["gpt4"]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainee = tokenizers.Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    size, alphabet = vocab_size - len(SPECIALS), to_bytes.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trainee.train_from_iterator(trained_on, trainer)
    trained, byte_of = time.perf_counter(), printable_bytes()
    ranks = {bytes(byte_of[char] for char in token): i for token, i in trainee.get_vocab().items()}
    encoding = tiktoken.Encoding("own", pat_str=PATTERNS["gpt4"], mergeable_ranks=ranks, special_tokens={})
    tokens, block = 0, 2**10
    for first in range(0, len(texts), block):  # all ids at once would fill the memory
        tokens += sum(map(len, encoding.encode_ordinary_batch(texts[first : first + block], num_threads=cores())))
    times = {"train_s": trained - began, "encode_s": time.perf_counter() - trained}
    print(json.dumps({**times, "tokens": tokens, "bytes": sum(len(text.encode()) for text in texts)}))


def compare_bpe(path: str, vocab_size: int, rounds: int) -> None:
    """data/text/prepare.py, as a whole process, in turns with the two libraries; both train on the whole text."""
    rows = []
    for nth in range(rounds):
        row = {}
        for name in ("ours", "libraries")[:: 1 if nth % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                command = ["data/text/prepare.py", f"--source={path}", "--tokenizer=bpe", f"--out={folder}"]
                command += [f"--training_chars={10**15}"]  # the libraries train on all of it too
                command = [sys.executable, *(command if name == "ours" else [__file__, f"--bpe_alone={path}"])]
                began = time.perf_counter()
                process = subprocess.Popen(
                    [*command, f"--vocab_size={vocab_size}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
                )
                told = process.stdout.read().splitlines()
                _, status, used = os.wait4(process.pid, 0)
                if status:
                    sys.exit(f"{' '.join(command)} has failed")
                row[f"{name}_s"], row[f"{name}_peak_mb"] = time.perf_counter() - began, used.ru_maxrss / 1024
                if name == "libraries":
                    row |= json.loads(told[-1])
                    row["libraries_s"] = row["train_s"] + row["encode_s"]  # without what it does to be ready
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    ratio = statistics.median(row["ours_s"] / row["libraries_s"] for row in rows)
    print("ours_s / libraries_s, of a BPE's training and encoding, reading and writing in ours included")
    print(json.dumps({"ratio": ratio, "rounds": rows}))


def work(name: str, dtype: str, streams: int, prompt: int, tokens: int) -> None:
    """A worker: for each line that it reads, it prints tokens/s; of the prompt, where but one is to follow."""
    run = WORKERS[name](dtype, streams, prompt, tokens)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        share = run() or 1  # of the work, that it has done
        print(streams * share * (prompt if tokens == 1 else tokens) / (time.perf_counter() - began), flush=True)


def told_by(worker: subprocess.Popen, case: tuple[str, str]) -> str:
    """A line of a worker's; empty, with a word why, where it has died."""
    if not (line := worker.stdout.readline()):
        (_, told), code = worker.communicate(), worker.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit {code}: {told.strip().splitlines()[-1:]}"
        print(f"{case[0]} in {case[1]} is left out: {reason}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int)
    parser.add_argument("--prompt", type=int, default=8, help="tokens; with --tokens=1 it is their reading that counts")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs=2, metavar=("NAME", "DTYPE"))
    parser.add_argument("--sample", metavar="OUT_DIR", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--prepare", metavar="FILE", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--bpe", metavar="FILE", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--vocab_size", type=int, default=2**15, help="with --bpe")
    parser.add_argument("--bpe_alone", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--train", metavar="PRESET", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--busy", metavar="PRESET", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--steps", type=int, help="of training, with --busy")
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--train_slowly", metavar="DATASET", help=argparse.SUPPRESS)
    parser.add_argument("--out_dir", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sample_slowly", metavar="OUT_DIR", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()  # settings: train.py's, behind --train or --busy
    if settings and not (options.train or options.busy):
        parser.error(f"unknown: {' '.join(settings)}")
    if options.sample:
        return compare_samples(options.sample, options.rounds)
    if options.train:
        return compare_training(options.train, options.dataset, settings, options.rounds)
    if options.busy:
        return compare_when_busy(options.busy, options.dataset, settings, options.steps or 60, options.rounds)
    if options.train_slowly:
        return train_as_nanogpt_does(options.train_slowly, options.out_dir, options.seed, options.steps or 2000)
    if options.prepare:
        return compare_preparations(options.prepare, options.rounds)
    if options.bpe:
        return compare_bpe(options.bpe, options.vocab_size, options.rounds)
    if options.bpe_alone:
        return train_and_encode(options.bpe_alone, options.vocab_size)
    if options.sample_slowly:
        return sample_as_nanogpt_does(options.sample_slowly)
    if options.work:
        return work(*options.work, options.streams, options.prompt, options.tokens)
    import torch

    from quartz.machine import memory_speed

    print(f"memory: {memory_speed(torch.device('cpu')) / 1e9:.1f} GB/s")
    record = {}
    for streams in [options.streams] if options.streams else list(CASES):
        workers = {}
        for case in CASES[1 if streams == 1 else 16]:
            command = [sys.executable, __file__, f"--streams={streams}", f"--prompt={options.prompt}"]
            command += [f"--tokens={options.tokens}", "--work", *case]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            worker = subprocess.Popen(command, text=True, **pipes)
            if told_by(worker, case):
                workers[case] = worker
        rates = {case: [] for case in workers}
        for _ in range(options.rounds):
            for case, worker in [*workers.items()]:
                worker.stdin.write("go\n")
                worker.stdin.flush()
                if line := told_by(worker, case):
                    rates[case].append(float(line))
                else:
                    del workers[case], rates[case]
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        for (name, dtype), values in rates.items():
            base = rates[("ours", dtype)]
            ratio = statistics.median(a / b for a, b in zip(base, values, strict=True))
            spread = f"{min(values):.1f} to {max(values):.1f}"
            what = f"{streams:3} x {options.prompt} + {options.tokens}  {dtype:<9} {name:<13}"
            print(f"{what} {statistics.median(values):8.1f} tokens/s ({spread}); ours is {ratio:.2f} times as fast")
            record[f"{streams} {dtype} {name}"] = {"tokens_per_s": statistics.median(values), "ratio": ratio}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
