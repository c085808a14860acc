"""Servers under load, side by side in one run: serve.py, llama.cpp's llama-server and transformers' `serve`.

    python tests/load.py --llama=PATH/llama-server      # without it, and without transformers' packages, by itself
    python tests/load.py --dtype=bfloat16 --clients=1,4,16 --rounds=3
    python tests/load.py --url=http://127.0.0.1:8000     # a server that runs already, whatever it is

GPT-2's 124M shape with random weights, exported to each server's own format. All are loaded and warm; while one is
measured, the others are stopped (SIGSTOP), so that each has the machine to itself and its clients. Three things are
measured: the rate of C clients, each of which asks again as soon as it is answered; the rate of 8 texts beside the
decoder that sample.py draws with, in a process without HTTP; and how long tokens take where short and long prompts
come at random. Requests are the same for all, and greedy: so all write the same number of tokens, which is checked.
The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402 - found there
from quartz import threads  # noqa: E402

SHAPE = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
ROWS = 16
WORDS = ["the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "it", "by", "he", "at", "from"]
KINDS = {"float32": "f32", "bfloat16": "bf16"}  # llama.cpp's names


# ----------------------------------------------------------------------------------------------------------------------
# Servers


@dataclass
class Server:
    """A process that speaks OpenAI's API; `extra` are fields that have it write all the tokens it is asked for."""

    name: str
    port: int
    command: list[str] = field(default_factory=list)
    model: str = ""
    extra: dict = field(default_factory=dict)
    tells_usage: bool = True
    process: subprocess.Popen | None = None

    def start(self, folder: Path) -> None:
        log = open(folder / f"{self.name}.log", "w")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)
        began = time.monotonic()
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() - began > 300:
                raise SystemExit(f"{self.name} did not start: see {log.name}")
            time.sleep(0.5)

    def answers(self) -> bool:
        body = json.dumps(self.body("the", 2, stream=False)).encode()
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["usage"]["completion_tokens"] == 2
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def body(self, prompt: str, tokens: int, stream: bool = True) -> dict:
        told = {"stream_options": {"include_usage": True}} if stream and self.tells_usage else {}
        asked = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
        extra = {key: its(tokens) if callable(its) else its for key, its in self.extra.items()}
        return {**asked, **told, **extra}

    def signal(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def prepare(folder: Path) -> None:
    """The same random weights as a checkpoint, in Hugging Face's layout, and as GGUF."""
    import torch

    from model import GPT, GPTConfig
    from quartz import checkpoint
    from quartz.tokenizer import GPT2Tokenizer

    tokens = GPT2Tokenizer()
    torch.manual_seed(0)
    config = GPTConfig(**SHAPE, vocab_size=tokens.vocab_size, bias=True, dropout=0.0)
    state = {"model": GPT(config).state_dict(), "model_args": config.to_args(), "tokenizer": tokens.to_data()}
    checkpoint.save(folder / "ckpt.pt", {**state, "iter_num": 0, "best_val_loss": 1.0, "config": {}})


def export(folder: Path, to: str, dtype: str) -> Path:
    path = folder / (f"{dtype}.gguf" if to == "gguf" else f"{to}-{dtype}")
    if not path.exists():
        command = [sys.executable, "export.py", f"--out_dir={folder}", f"--to={to}", f"--dtype={dtype}"]
        subprocess.run([*command, f"--path={path}"], cwd=ROOT, check=True, stdout=sys.stderr)
    return path


def servers(folder: Path, dtype: str, llama: str) -> list[Server]:
    """Ours and those of the peers that are there."""
    found = [ours(folder, dtype, ROWS)]
    if llama:
        port, path = free_port(), export(folder, "gguf", KINDS[dtype])
        settings = {"model": path, "port": port, "parallel": ROWS, "threads": threads.cores()}
        settings |= {"ctx-size": ROWS * SHAPE["block_size"], "cache-type-k": "f32", "cache-type-v": "f32"}  # as ours
        command = [llama, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
        found.append(Server("llama.cpp", port, command, "gpt2", {"ignore_eos": True, "cache_prompt": False}))
    with contextlib.suppress(ImportError):
        import fastapi  # noqa: F401 - what it needs besides
        import transformers  # noqa: F401

        port, path = free_port(), export(folder, "hf", dtype)
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", str(path), f"--port={port}", "--device=cpu", f"--dtype={dtype}"]
        config = {"generation_config": lambda n: json.dumps({"min_new_tokens": n, "max_new_tokens": n})}
        found.append(Server("transformers", port, command, str(path), config, tells_usage=False))
    return found


def ours(folder: Path, dtype: str, rows: int) -> Server:
    port = free_port()
    command = [sys.executable, "serve.py", f"--out_dir={folder}", f"--port={port}", "--device=cpu", f"--dtype={dtype}"]
    command += [f"--max_rows={rows}", "--cache_mb=0", "--model_name=gpt2"]
    return Server(f"serve.py of {rows}", port, command, "gpt2", {"ignore_eos": True})


@contextlib.contextmanager
def alone(server: Server, others: list[Server]):
    """Has the machine be that server's, and its clients'."""
    for other in others:
        other.signal(signal.SIGSTOP if other is not server else signal.SIGCONT)
    try:
        yield
    finally:
        for other in others:
            other.signal(signal.SIGCONT)


# ----------------------------------------------------------------------------------------------------------------------
# Clients


async def ask(server: Server, prompt: str, tokens: int) -> list[float]:
    """Writes a text of so many tokens; returns when it was asked for, and when each piece of it came."""
    data = json.dumps(server.body(prompt, tokens)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    times, count = [time.perf_counter()], None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**20)
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{server.name}: {status.decode()} {(await reader.read(1000)).decode()}")
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise SystemExit(f"{server.name}: {chunk}")
        if any(choice["text"] for choice in chunk["choices"]):
            times.append(time.perf_counter())
        count = (chunk.get("usage") or {}).get("completion_tokens", count)
    writer.close()
    if server.tells_usage and count != tokens:
        raise SystemExit(f"{server.name} wrote {count} tokens in place of {tokens}")
    return times


def text(words: int, generator: random.Random) -> str:
    """Of about as many tokens of GPT-2's as words."""
    return " ".join(generator.choices(WORDS, k=words))


async def rate(server: Server, clients: int, words: int, tokens: int, turns: int) -> float:
    """Tokens a second of so many clients, each of which asks `turns` times."""
    generator = random.Random(clients)
    prompts = [[text(words, generator) for _ in range(turns)] for _ in range(clients)]

    async def client(its: list[str]) -> None:
        for prompt in its:
            await ask(server, prompt, tokens)

    began = time.perf_counter()
    await asyncio.gather(*map(client, prompts))
    return clients * turns * tokens / (time.perf_counter() - began)


async def mixed(server: Server, seconds: float, per_second: float) -> dict[str, float]:
    """Where requests come at random (Poisson), one in five with a prompt of 600 to 900 words: milliseconds to the first
    piece of a text, and between two, at the median and the 99th percentile."""
    generator, asked = random.Random(1), []
    arrival = generator.expovariate(per_second)
    while arrival < seconds:
        words = generator.randint(600, 900) if generator.random() < 0.2 else generator.randint(8, 64)
        asked.append((arrival, text(words, generator), generator.randint(16, 96)))
        arrival += generator.expovariate(per_second)

    async def client(arrival: float, prompt: str, tokens: int) -> list[float]:
        await asyncio.sleep(arrival)
        return await ask(server, prompt, tokens)

    found = await asyncio.gather(*(client(*its) for its in asked))
    first = [1000 * (times[1] - times[0]) for times in found]
    between = [1000 * (b - a) for times in found for a, b in zip(times[1:], times[2:], strict=False)]
    told = {"requests": len(found), "whole_s": max(times[-1] for times in found) - min(times[0] for times in found)}
    for name, values in (("first", first), ("between", between)):
        told[f"{name}_median_ms"] = statistics.median(values)
        told[f"{name}_p99_ms"] = statistics.quantiles(values, n=100)[98]
    return told


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def compare_rates(found: list[Server], clients: list[int], options: argparse.Namespace) -> dict:
    record = {}
    for count in clients:
        rates = {server.name: [] for server in found}
        turns = max(1, options.turns // count)
        for _ in range(options.rounds):
            for server in found:
                with alone(server, found):
                    rates[server.name].append(asyncio.run(rate(server, count, 32, options.tokens, turns)))
        base = rates[found[0].name]
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(base, values, strict=True))
            middle = statistics.median(values)
            print(f"{count:3} clients  {name:<16} {middle:8.1f} tokens/s; {found[0].name} is {ratio:.2f} times as fast")
            record[f"{count} {name}"] = {"tokens_per_s": middle, "ratio": ratio}
    return record


def compare_with_decoder(folder: Path, options: argparse.Namespace) -> dict:
    """8 texts that begin at once, over HTTP and by the decoder in a process of its own."""
    tokens, rows, prompt = options.tokens * 2, 8, "the of and to in is was for"  # 8 tokens, as in the other process
    server = ours(folder, options.dtype, rows)
    server.start(folder)
    command = [sys.executable, "tests/peers.py", f"--streams={rows}", f"--tokens={tokens}", "--work", "ours"]
    worker = subprocess.Popen(
        [*command, options.dtype], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.stdout.readline()

    async def at_once() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(ask(server, prompt, tokens) for _ in range(rows)))
        return rows * tokens / (time.perf_counter() - began)

    served, drawn = [], []
    for _ in range(options.rounds):
        worker.send_signal(signal.SIGSTOP)
        served.append(asyncio.run(at_once()))
        worker.send_signal(signal.SIGCONT)
        with alone(worker, [server]):
            worker.stdin.write("go\n")
            worker.stdin.flush()
            drawn.append(float(worker.stdout.readline()))
    worker.kill()
    server.process.kill()
    ratio = statistics.median(a / b for a, b in zip(served, drawn, strict=True))
    print(f"  8 texts    serve.py of 8 {statistics.median(served):8.1f} tokens/s; {ratio:.2f} of the decoder's rate")
    return {"8 texts": {"tokens_per_s": statistics.median(served), "of_decoder": ratio}}


def compare_mixed(found: list[Server], options: argparse.Namespace) -> dict:
    record = {}
    for server in found:
        with alone(server, found):
            record[f"mixed {server.name}"] = its = asyncio.run(mixed(server, options.seconds, options.per_second))
        print(
            f"{its['requests']} requests at random  {server.name:<16} first {its['first_median_ms']:.0f} ms "
            f"(p99 {its['first_p99_ms']:.0f}), between {its['between_median_ms']:.0f} ms "
            f"(p99 {its['between_p99_ms']:.0f}), all after {its['whole_s']:.0f} s"
        )
    return record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=list(KINDS), default="float32")
    parser.add_argument("--llama", default=shutil.which("llama-server") or "", help="the program llama-server")
    parser.add_argument("--without", default="", help="a peer that is left out: llama.cpp or transformers")
    parser.add_argument("--url", help="of one server to be measured, in place of all")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--turns", type=int, default=16, help="requests in a turn, over all clients")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the mixed load; 0 leaves it out")
    parser.add_argument("--per_second", type=float, default=1.0, help="requests of the mixed load")
    parser.add_argument("--folder", help="where the models are kept, to be used again")
    options = parser.parse_args()
    if options.llama and not shutil.which(options.llama):
        parser.error(f"--llama: there is no program {options.llama}")
    clients = [int(count) for count in options.clients.split(",") if count]
    with contextlib.ExitStack() as stack:
        if options.url:
            found = [Server(options.url, int(options.url.rpartition(":")[2].rstrip("/")), extra={"ignore_eos": True})]
            folder = None
        else:
            folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(exist_ok=True)
            if not (folder / "ckpt.pt").exists():
                prepare(folder)
            found = [its for its in servers(folder, options.dtype, options.llama) if its.name != options.without]
            for server in found:
                server.start(folder)
                stack.callback(server.process.kill)
                server.signal(signal.SIGSTOP)
        record = {"dtype": options.dtype, **compare_rates(found, clients, options)}
        if options.seconds:
            record |= compare_mixed(found, options)
        if folder:
            for server in found:
                server.signal(signal.SIGSTOP)
            record |= compare_with_decoder(folder, options)
    print(json.dumps(record))


if __name__ == "__main__":
    with configurator.user_errors():
        main()
