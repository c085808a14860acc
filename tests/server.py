"""serve.py as a process of its own, for tests of those who ask it."""

import contextlib
import dataclasses
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name)

from model import GPT, GPTConfig
from quartz import checkpoint
from quartz.tokenizer import BPETokenizer

TOKENS = BPETokenizer.of_merges([b"th", b"the", b" a", "日".encode()[:2]], "gpt4")
END = TOKENS.specials["<|endoftext|>"]


def write_model(folder: Path, block_size: int = 8192, seed: int = 1, iter_num: int = 1) -> None:
    """A checkpoint of random weights in `tiny`, whose context is long enough to be busy for a while."""
    (folder / "tiny").mkdir(parents=True)
    config = GPTConfig(block_size=block_size, vocab_size=TOKENS.vocab_size, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
    torch.manual_seed(seed)
    network = GPT(config)
    with torch.no_grad():
        network.transformer.wte.weight *= 6  # so that it has preferences
    state = {"model": network.state_dict(), "model_args": dataclasses.asdict(config), "tokenizer": TOKENS.to_data()}
    checkpoint.save(folder / "tiny" / "ckpt.pt", {**state, "iter_num": iter_num, "best_val_loss": 1.0, "config": {}})


class Server:
    """A process of serve.py on a free port."""

    def __init__(self, folder, *command: str, key: str = "", waits: bool = True, **settings):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "QUARTZGPT_API_KEY": key, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *(command or [str(ROOT / "serve.py")])]
        settings = {
            "out_dir": folder / "tiny",
            "device": "cpu",
            "dtype": "float32",
            "port": 0,
            "compile": False,
            **settings,
        }
        self.log = open(folder / f"log-{time.monotonic_ns()}", "w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [*command, *flags(**settings)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        try:
            self.await_start(key, waits)
        except BaseException:
            self.process.kill()
            raise

    def await_start(self, key: str, waits: bool) -> None:
        self.url = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", self.url), self.errors()
        self.port, self.key = int(self.url.rpartition(":")[2]), key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60)
        self.first_health = self.http.get("/health")
        if waits:
            until(lambda: self.http.get("/health").status_code == 200)

    def errors(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def post(self, path: str = "/v1/completions", **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def metric(self, name: str) -> float:
        found = re.findall(rf"^vllm:{name}{{.*}} (.+)$", self.http.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def is_idle(self) -> bool:
        return self.metric("num_requests_running") == self.metric("num_requests_waiting") == 0

    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def head(self, length: int | str, path: str = "/v1/completions", method: str = "POST", **headers: str) -> bytes:
        told = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json", "Content-Length": length}
        told |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in told.items() if v is not None)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def request(self, **body) -> bytes:
        data = json.dumps(body).encode()
        return self.head(len(data)) + data


def until(holds, seconds: float = 60.0) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it has not come to hold"
        time.sleep(0.02)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other end closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def leave(sock: socket.socket) -> None:
    """Closes a connection abruptly, by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def served(folder, *command, **settings):
    server = Server(folder, *command, **settings)
    try:
        yield server
        assert "Traceback" not in server.errors()
    finally:
        server.process.kill()
        server.process.communicate()
        server.log.close()
