"""Two servers behind a real nginx, as deploy/nginx.conf has it, one of which is killed, or stopped, under load."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

if sys.version_info >= (3, 11):
    import tomllib

import pytest
from conftest import ROOT, program
from load import free_port
from server import Server, httpx, until, write_model

pytestmark = pytest.mark.clients
BROKEN = "the answer broke off"
LONG = 60000  # tokens: many seconds, however fast the machine


def test_what_is_shipped_names_files_and_settings_that_exist():
    deploy = ROOT / "deploy"
    containerfile, compose = (deploy / "Containerfile").read_text(), (deploy / "compose.yaml").read_text()
    sources = [name for line in re.findall(r"^COPY (.+)$", containerfile, re.M) for name in line.split()[:-1]]
    assert sources and all([*ROOT.glob(name)] for name in sources)
    # What is installed is in the image
    known = tomllib.loads((ROOT / "pyproject.toml").read_text()) if sys.version_info >= (3, 11) else None
    if known:
        assert {*known["tool"]["setuptools"]["packages"]} <= {*sources} and known["project"]["readme"] in sources
    scope = settings_of(ROOT / "serve.py")
    for name in re.findall(r'"--(\w+)=', containerfile + compose):
        assert name in scope, name
    assert "./nginx.conf:" in compose and "dockerfile: deploy/Containerfile" in compose


def settings_of(path) -> set[str]:
    """The settings of a script, by the lines before it calls the configurator."""
    return {*re.findall(r"^(\w+) = ", path.read_text().partition("configurator.configure")[0], re.M)}


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path, block_size=LONG + 100)
    return tmp_path


@pytest.fixture
def replicas(folder):
    found = [Server(folder, max_rows=4) for _ in range(2)]
    yield found
    for server in found:
        server.process.kill()
        server.process.communicate()
        server.log.close()


@pytest.fixture
def front(replicas, tmp_path):
    """nginx's address. Of the file that is shipped, the names and ports are the test's."""
    nginx = program("nginx")
    settings, port = (ROOT / "deploy" / "nginx.conf").read_text(), free_port()
    assert settings.count("server gpt:8000 ") == settings.count("listen 8000;") == settings.count("http {") == 1
    line = next(line for line in settings.splitlines() if "gpt:8000" in line)
    lines = [line.replace("gpt:8000", f"127.0.0.1:{server.port}") for server in replicas]
    own = [f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    settings = settings.replace(line, "\n".join(lines)).replace("listen 8000;", f"listen 127.0.0.1:{port};")
    (tmp_path / "nginx.conf").write_text(settings.replace("http {", "\n".join(["http {", *own])))
    command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", f"daemon off; pid {tmp_path}/pid;"]
    with open(tmp_path / "nginx.log", "w") as log:
        process = subprocess.Popen(command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    until(lambda: process.poll() is not None or is_there(url))
    assert process.poll() is None, (tmp_path / "nginx.log").read_text()
    yield url
    process.terminate()
    process.wait()


def is_there(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    return False


def body(seed: int) -> dict:
    return {"prompt": "the", "seed": seed, "max_tokens": 700, "ignore_eos": True, "return_token_ids": True}


def ask(url: str, seed: int, streams: bool) -> list[int] | str:
    """The ids of a text, or BROKEN, or an error's status."""
    asked, address = body(seed), f"{url}/v1/completions"
    try:
        if not streams:
            answer = httpx.post(address, json=asked, timeout=60, trust_env=False)
            return answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else str(answer.status_code)
        ids, is_whole = [], False
        with httpx.stream("POST", address, json={**asked, "stream": True}, timeout=60, trust_env=False) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            for line in answer.iter_lines():
                is_whole = line == "data: [DONE]" or is_whole
                if line.startswith("data: {"):
                    told = json.loads(line.removeprefix("data: "))
                    if "error" in told:
                        return BROKEN
                    ids += told["choices"][0]["token_ids"]
        assert is_whole, "a stream ended without a word"
        return ids
    except httpx.TransportError:
        return BROKEN


def load(url: str, count: int, then) -> list[list[int] | str]:
    """What so many requests get, 8 at a time, every other as a stream; `then` happens meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, seed, bool(seed % 2)) for seed in range(count)]
        then()
        return [its.result() for its in asked]


def busy(server: Server) -> None:
    until(lambda: server.metric("num_requests_running") >= 2)


def test_a_replica_that_is_killed_gives_no_wrong_answer(front, replicas):
    expected = [replicas[0].post(**body(seed)).json()["choices"][0]["token_ids"] for seed in range(32)]

    def kill():
        busy(replicas[1])
        replicas[1].process.send_signal(signal.SIGKILL)

    found = load(front, 32, kill)
    right = [a == b for a, b in zip(found, expected, strict=True)]
    assert all(its or one == BROKEN for its, one in zip(right, found, strict=True)), [type(one) for one in found]
    # What was not begun to be answered was asked of the other, and only streams can break off
    assert all(right[::2]) and sum(right) >= 32 - 4
    assert load(front, 8, lambda: None) == expected[:8]


def test_a_replica_that_is_stopped_fails_no_request(front, replicas):
    expected = [replicas[0].post(**body(seed)).json()["choices"][0]["token_ids"] for seed in range(24)]

    def stop():
        busy(replicas[1])
        replicas[1].process.send_signal(signal.SIGTERM)

    assert load(front, 24, stop) == expected
    assert replicas[1].process.wait(30) == 0


def test_a_replica_that_comes_back_is_asked_again(front, replicas, folder):
    replicas[1].process.kill()
    replicas[1].process.wait()
    assert ask(front, 1, streams=False) == replicas[0].post(**body(1)).json()["choices"][0]["token_ids"]
    replicas[1] = Server(folder, max_rows=4, port=replicas[1].port)
    began = time.monotonic()
    while not replicas[1].metric("prompt_tokens_total"):
        load(front, 4, lambda: None)
        assert time.monotonic() - began < 60


def test_a_client_that_leaves_frees_its_row_through_nginx(front, replicas):
    asked = {**body(1), "max_tokens": LONG, "stream": True}
    with httpx.stream("POST", f"{front}/v1/completions", json=asked, trust_env=False) as answer:
        assert answer.status_code == 200 and "token_ids" in next(answer.iter_lines())
    until(lambda: all(server.is_idle() for server in replicas), 5)
    assert 0 < sum(server.metric("generation_tokens_total") for server in replicas) < LONG
