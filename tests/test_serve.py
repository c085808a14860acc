"""serve.py as a process of its own: by OpenAI's client, and by raw sockets as an attacker would."""

import asyncio
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_user_error, flags
from server import END, TOKENS, Server, httpx, leave, openai, read_all, served, until, write_model
from test_compiled import has_compiler

from model import GPT
from quartz import api, checkpoint, http
from quartz.serving import Read, Token, Told

KEY = "a key of nobody's".replace(" ", "-")
# serve.py with less patience than it has; loading takes a moment, and so does encoding a long text
IMPATIENT = """
import runpy, socket, sys, time
from quartz import gate, http, sources, tokenizer
gate.HEAD_SECONDS = http.BODY_SECONDS = gate.READER_SECONDS = 0.6
gate.READER_RATE = 1e9
listen, load, encode = http.listen, sources.to_sample, tokenizer.BPETokenizer.encode
def listen_briefly(*where):
    sock = listen(*where)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # as of all connections then
    return sock
def encode_slowly(self, text, special=False):
    time.sleep(len(text) > 10**5)  # as tiktoken, it lets other threads run meanwhile
    return encode(self, text, special)
http.listen, tokenizer.BPETokenizer.encode = listen_briefly, encode_slowly
sources.to_sample = lambda *names: time.sleep(0.5) or load(*names)
sys.argv[0] = "serve.py"
runpy.run_path("serve.py", run_name="__main__")
"""

NO_ROOM = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
sys.argv[0] = "serve.py"
runpy.run_path("serve.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a checkpoint of random weights in `tiny`, whose context is long enough to be busy for a while."""
    folder = tmp_path_factory.mktemp("served")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def network(folder) -> GPT:
    return checkpoint.build_model(checkpoint.load(folder / "tiny" / "ckpt.pt")).eval()


@pytest.fixture(scope="module")
def server(folder):
    yield from served(folder)


@pytest.fixture(scope="module")
def guarded(folder):
    """One with a key, two rows, a short queue and little patience."""
    yield from served(folder, "-c", IMPATIENT, key=KEY, max_rows=2, max_queue=2, max_seconds=3)


@torch.no_grad()
def logprobs(network: GPT, ids: list[int]) -> torch.Tensor:
    """Of what may follow each token, by a whole forward pass: (len(ids), V)."""
    idx = torch.tensor([ids])
    return network(idx, idx)[0][0, :, : TOKENS.vocab_size].log_softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# The API


def test_it_answers_503_while_it_loads_and_then_200(guarded):
    assert guarded.first_health.status_code == 503 and guarded.first_health.headers["retry-after"] == "1"
    assert guarded.first_health.json()["error"]["code"] == "loading"
    assert guarded.http.get("/health").json() == {"status": "ok"}


def test_greedy_text_is_that_of_the_full_forward_pass(server, network):
    answer = server.client.completions.create(
        model="tiny", prompt="the a", temperature=0, max_tokens=12, logprobs=2, extra_body={"return_token_ids": True}
    )
    ids = TOKENS.encode("the a")
    for _ in range(12):
        ids.append(int(logprobs(network, ids)[-1].argmax()))
    (choice,) = answer.choices
    assert choice.token_ids == ids[-12:]
    assert choice.finish_reason == "length" and choice.index == 0
    told = torch.tensor(choice.logprobs.token_logprobs)
    expected = logprobs(network, ids[:-1])[-12:].amax(-1)
    torch.testing.assert_close(told, expected, atol=1e-4, rtol=0)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 12, 14)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.system_fingerprint


def test_an_evaluation_gets_a_number_for_each_token_of_each_prompt(server, network):
    """As lm-eval's local-completions asks, and reads."""
    greedy = server.post(prompt=[97, 98], temperature=0, max_tokens=6, return_token_ids=True).json()
    likely = [97, 98, *greedy["choices"][0]["token_ids"]]
    prompts = [likely, [256, 5, 257, 99], [END, 97], [97, *range(130)]]
    body = {"model": "tiny", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    answer = server.post(prompt=prompts, **body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    told = []
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        its, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(its) == len(tops) == len(prompt) + 1 and its[0] is tops[0] is None
        expected = logprobs(network, prompt)
        own = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(its[1:-1]), own, atol=1e-4, rtol=0)
        is_greedy = [one == max(top.values()) for one, top in zip(its[1:], tops[1:], strict=True)]
        assert is_greedy == [*(expected[:-1].argmax(-1) == torch.tensor(prompt[1:])).tolist(), True]
        told += is_greedy[:-1]
    assert {*told} == {True, False}


def test_a_stream_comes_to_the_answer(server):
    body = {"prompt": ["the", " a"], "n": 2, "max_tokens": 20, "seed": 3, "logprobs": 1, "echo": True}
    whole = server.client.completions.create(model="tiny", **body)
    chunks = [*server.client.completions.create(model="tiny", stream=True, **body)]
    for choice in whole.choices:
        its = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in its) == choice.text
        assert [c.finish_reason for c in its] == [None] * (len(its) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(c.logprobs, name) for c in its), []) == getattr(choice.logprobs, name)
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


def test_a_stream_that_is_over_before_it_begins_tells_all_the_same():
    """As where one token is drawn sooner than the event loop comes to it."""
    served = api.Served("tiny", TOKENS, block_size=64, rows=2, max_queue=2, fingerprint="fp_1")
    asked = api.completion(
        {"prompt": "the", "max_tokens": 1, "stream_options": {"include_usage": True}, "stream": True}, served
    )
    answer, said = api.Answer(asked, asked.encode(served), served), []
    for event in (Read(None, 0, 0.0), Token(0, Told(97, -1.0, []), "length")):
        answer.take(0, event)

    async def say(data: bytes) -> None:
        said.append(json.loads(data))

    asyncio.run(http.EventStream(SimpleNamespace(answer=answer)).tell(say))
    assert [choice["text"] for chunk in said for choice in chunk["choices"]] == ["a"] and said[-1]["usage"]


def test_a_stream_is_server_sent_events_with_the_usage_at_the_end(server):
    body = {"prompt": "the", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    answer = server.post(**body)
    assert answer.headers["content-type"] == "text/event-stream"
    *events, end = answer.text.split("\n\n")
    assert end == "" and events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3


def test_row_k_draws_with_seed_plus_k(server):
    def texts(**body):
        return [
            c.text for c in server.client.completions.create(model="tiny", prompt="the", max_tokens=24, **body).choices
        ]

    four = texts(n=4, seed=10)
    assert four == [texts(seed=10 + k)[0] for k in range(4)] and len(set(four)) == 4
    assert texts(seed=10, temperature=0) == texts(seed=11, temperature=0) != four[:1]
    assert texts() != texts()


def test_a_text_ends_before_a_stop(server):
    body = {"model": "tiny", "prompt": "the", "seed": 1, "max_tokens": 40}
    text = server.client.completions.create(**body).choices[0].text
    stop = text[10:14]
    for stream in (False, True):
        answer = server.client.completions.create(**body, stop=[stop, "never"], stream=stream)
        chunks = [*answer] if stream else [answer]
        assert "".join(c.text for chunk in chunks for c in chunk.choices) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    until(server.is_idle)


def test_the_same_request_alone_and_among_15_others_that_come_and_go(server):
    """Cached or not, streamed or not: text and log-probabilities are equal."""
    body = {"prompt": "the a " * 120, "n": 2, "max_tokens": 30, "seed": 5, "logprobs": 3, "return_token_ids": True}

    def ask(**more):
        answer = server.post(**body, **more)
        if more:
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            its = [[c for chunk in chunks for c in chunk["choices"] if c["index"] == k] for k in range(2)]
            return [
                (sum((c["token_ids"] for c in cs), []), sum((c["logprobs"]["token_logprobs"] for c in cs), []))
                for cs in its
            ]
        return [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in answer.json()["choices"]]

    alone, cached, done = ask(), server.metric("prefix_cache_hits_total"), threading.Event()

    def disturb(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            for turn in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
                its = {"prompt": [97 + number] * (1 + 37 * (turn + number) % 400), "max_tokens": 1 + turn % 40}
                client.post("/v1/completions", json=its)

    with ThreadPoolExecutor(15) as pool:
        others = [pool.submit(disturb, number) for number in range(15)]
        try:
            until(lambda: server.metric("num_requests_running") > 4)
            assert [ask(), ask(stream=True), ask()] == [alone] * 3
        finally:
            done.set()
        for other in others:
            other.result()
    assert server.metric("prefix_cache_hits_total") > cached  # the prompt came from the cache, and gave the same


def test_a_server_of_other_rows_gives_the_same_text(server, guarded):
    body = {"prompt": "the", "max_tokens": 20, "seed": 5, "logprobs": 1, "n": 2}
    assert server.post(**body).json()["choices"] == guarded.post(**body).json()["choices"]


def test_a_sequence_of_texts_and_ids_comes_back(server):
    text = "the 日本 a<|endoftext|>"
    ids = server.post("/tokenize", prompt=text).json()["tokens"]
    assert ids == TOKENS.encode(text, special=True)
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == text
    assert server.http.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"


def test_models_are_listed(server):
    (its,) = server.client.models.list().data
    assert its.id == "tiny" and its.max_model_len == 8192
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_errors_are_those_that_clients_know(server):
    create = server.client.completions.create
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", prompt="the", max_tokens=9000)
    assert error.value.code == "context_length_exceeded" and "maximum context length" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", prompt="the", n=17)
    assert error.value.param == "n" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        create(model="another", prompt="the")
    with pytest.raises(openai.BadRequestError, match="no chat tokens"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/nothing", 404), ("GET", "/v1/", 404)):
        answer = server.http.request(method, path, headers={"content-type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_waits_for_no_acknowledgement(server):
    """Which the other end may hold back for 40 ms, where head and body are sent apart."""

    def seconds() -> float:
        began = time.monotonic()
        assert server.http.get("/health").status_code == 200
        return time.monotonic() - began

    assert min(seconds() for _ in range(10)) < 0.03


def test_metrics_count_what_was_done(server):
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "prefix_cache_queries_total")
    histograms = ("time_to_first_token", "e2e_request_latency", "request_queue_time", "inter_token_latency")
    names += tuple(f"{name}_seconds_count" for name in histograms)
    before = [server.metric(name) for name in names]
    server.post(prompt=[97, 98, 99], n=2, max_tokens=5, ignore_eos=True)
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 10, 2, 3, 1, 1, 1, 8]


# ----------------------------------------------------------------------------------------------------------------------
# Clients that leave, and too many of them


ON = {"ignore_eos": True}
LONG = {"prompt": "the", "max_tokens": 8000, **ON}  # many seconds' work


def test_a_client_that_leaves_frees_its_rows(server):
    aborted, written = server.metric("request_success_total"), server.metric("generation_tokens_total")
    stream = server.client.completions.create(
        model="tiny", prompt="the", max_tokens=8000, n=3, stream=True, extra_body=ON
    )
    next(iter(stream))
    assert server.metric("num_requests_running") == 3
    stream.close()
    until(server.is_idle)
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.2).completions.create(
            model="tiny", prompt="the", max_tokens=8000, extra_body=ON
        )
    until(server.is_idle)
    until(lambda: server.metric("request_success_total") == aborted + 4)
    assert server.metric("generation_tokens_total") - written < 4 * 8000 / 2
    assert 'finished_reason="abort"' in server.http.get("/metrics").text


def test_a_queue_that_is_full_says_when_to_try_again(guarded):
    sockets = [guarded.connect() for _ in range(4)]
    for n, sock in enumerate(sockets):
        sock.sendall(guarded.request(**LONG))
        until(lambda n=n: guarded.metric("num_requests_(?:running|waiting)") == n + 1)
    answer = guarded.post(**LONG)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full"
    # One that waits leaves, and disturbs nobody
    leave(sockets.pop())
    until(lambda: guarded.metric("num_requests_waiting") == 1)
    assert guarded.metric("num_requests_running") == 2
    for sock in sockets:
        leave(sock)
    until(guarded.is_idle)
    assert guarded.post(prompt="the", n=2, max_tokens=2).status_code == 200


def test_a_client_that_tries_again_is_answered(guarded):
    with contextlib.ExitStack() as stack:
        for sock in [stack.enter_context(guarded.connect()) for _ in range(4)]:
            sock.sendall(guarded.request(**LONG))
        until(lambda: guarded.metric("num_requests_(?:running|waiting)") == 4)
        with ThreadPoolExecutor(1) as pool:
            client = guarded.client.with_options(max_retries=2)
            answer = pool.submit(client.completions.create, model="tiny", prompt="the", max_tokens=2)
            time.sleep(0.3)
            assert not answer.done()
            stack.close()
            assert answer.result().usage.completion_tokens == 2


def test_a_request_that_takes_too_long_is_ended_as_an_error(guarded):
    with ThreadPoolExecutor(1) as pool, pytest.raises(openai.APIError, match="more than 3 s"):
        whole = pool.submit(guarded.post, **LONG)
        for _ in guarded.client.completions.create(
            model="tiny", prompt="the", max_tokens=8000, stream=True, extra_body=ON
        ):
            pass
    assert whole.result().status_code == 504 and whole.result().headers["x-should-retry"] == "false"
    until(guarded.is_idle)


def test_a_thousand_clients_that_leave_abruptly(server):
    long, short = server.request(**LONG, stream=True), server.request(**LONG)
    for turn in range(100):
        leave_after(server, long if turn % 2 else short)
    before = server.memory()
    for turn in range(900):
        leave_after(server, long if turn % 2 else short)
    until(server.is_idle)
    assert server.post(prompt="the", n=16, max_tokens=2).status_code == 200  # all rows are free
    assert server.memory() - before < 2**24


def leave_after(server, data: bytes) -> None:
    """As soon as a stream begins; or at once."""
    sock = server.connect()
    sock.sendall(data)
    if b'"stream": true' in data:
        assert sock.recv(12) == b"HTTP/1.1 200"
    leave(sock)


def test_after_200_requests_that_give_up_a_new_one_is_answered(server):
    data, written = server.request(prompt="a" * 3000, max_tokens=1000), server.metric("generation_tokens_total")
    sockets = [server.connect() for _ in range(200)]
    for sock in sockets:
        sock.sendall(data)
    time.sleep(0.5)
    for sock in sockets:
        sock.close()
    assert server.post(prompt="the", max_tokens=2).status_code == 200
    assert server.metric("generation_tokens_total") - written < 200 * 1000 / 4  # and not after all that they asked for


# ----------------------------------------------------------------------------------------------------------------------
# Attacks


ROUTES = [
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/tokenizer_info", "/metrics", "/nothing")),
]


def test_every_route_but_health_wants_the_key(guarded):
    with httpx.Client(base_url=guarded.url, timeout=10, trust_env=False) as client:
        for (method, path), given in itertools.product(
            ROUTES, (None, "", "Bearer x", f"Bearer {KEY}x", "Basic x", "é")
        ):
            headers = {} if given is None else {"Authorization": given.encode()}
            answer = client.request(method, path, headers=headers | {"content-type": "application/json"})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (path, given)
        assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client.with_options(api_key="wrong").models.list()
    assert guarded.client.models.list().data


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.evil", "]"]
)
def test_a_name_that_leads_here_is_not_ours(server, host):
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "192.168.1.7:80"])
def test_localhost_and_addresses_are_ours(server, host):
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_methods_are_refused_and_told_which_are_allowed(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, ways in paths.items():
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - {way.upper() for way in ways}:
            headers = {"content-type": "application/json"}
            answer = server.http.request(method, path.replace("{name}", "tiny"), headers=headers)
            assert answer.status_code == 405 and "error" in answer.json(), (method, path)
            assert {*answer.headers["allow"].split(", ")} - {"HEAD"} == {way.upper() for way in ways}


def test_two_hosts_are_refused(server):
    with server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert sock.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403"))


def test_pages_from_elsewhere_may_not_ask(server):
    for origin in (
        "http://evil.example",
        "null",
        f"http://localhost:{server.port}",
        "http://127.0.0.1:1",
        "[",
        "file://",
    ):
        assert server.http.get("/v1/models", headers={"Origin": origin}).status_code == 403, origin
    answer = server.http.get("/v1/models", headers={"Origin": server.url})
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert server.http.options("/v1/completions", headers=asked).status_code == 403


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json", "application/jsonx"]
)
def test_other_content_than_json_is_refused(server, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 415


def test_json_with_a_charset_is_json(server):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 2**20,
        b'{"prompt": ' + b"[" * 10**5,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "n": 1e9}',
        b'{"prompt": "a", "n": ' + b"9" * 10**5 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "' + b"a" * (2**20 - 20) + b'"}',
        b'{"prompt": [' + b"97," * 10**5 + b"97]}",
        b'{"prompt": ["a"], "n": 16, "logprobs": 1000000}',
        b'{"prompt": [' + b'"a",' * 10**4 + b'"a"]}',
        b'{"prompt": "a", "stop": [' + b'"a",' * 10**4 + b'"a"]}',
    ],
)
def test_bodies_that_mean_harm_are_refused(server, data):
    answer = server.http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_over_a_mebibyte_is_refused(server):
    for path in ("/v1/completions", "/tokenize"):
        assert server.post(path, prompt="a" * 10**7).status_code == 413
    parts = (b"a" * 2**16 for _ in range(40))  # of no length that is told
    answer = server.http.post("/tokenize", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_a_long_text_to_encode_stops_nobody(guarded):
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(guarded.post, "/tokenize", prompt="the" * 10**5) for _ in range(2)]  # a second each
        answered = 0
        while not all(text.done() for text in texts):
            answered += guarded.http.get("/health").status_code == 200
        assert answered > 10
        assert all(text.result().json()["count"] == 10**5 for text in texts)


def test_a_head_that_is_too_large_or_broken_is_refused(server):
    for head in (
        server.head(2, X_Large="a" * 2**17),
        b"GET / HTTP/1.1\r\nHost: a\nb\r\n\r\n",
        b"\x16\x03\x01\x02\r\n\r\n",
    ):
        with server.connect() as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(head)
            assert read_all(sock)[:12] in (b"HTTP/1.1 400", b"")
    assert server.http.get("/health").status_code == 200


def test_a_head_or_a_body_that_does_not_arrive_is_given_up(guarded):
    slow = [guarded.connect() for _ in range(3)]
    slow[1].sendall(guarded.head(100)[:-4])
    slow[2].sendall(guarded.head(100) + b'{"prompt"')
    began = time.monotonic()
    # One that sends a byte at a time gains nothing by it
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 1.5:
            slow[1].sendall(b"x")
            time.sleep(0.1)
    assert read_all(slow[0]) == b"" and read_all(slow[1]) == b""
    assert slow[2].recv(1000).startswith(b"HTTP/1.1 408")
    for sock in slow:
        sock.close()


def test_a_reader_who_does_not_read_is_cut_off(guarded):
    body = {"prompt": [97] * 2000, "echo": True, "logprobs": 20, "max_tokens": 1}
    for stream in (False, True):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(60)
            sock.connect(("127.0.0.1", guarded.port))
            sock.sendall(guarded.request(**body, stream=stream))
            watch = select.poll()
            watch.register(sock, 0)
            until(lambda watch=watch: watch.poll(0))  # a reset has come, and nothing was read
            assert len(read_all(sock)) < 2**19
    until(guarded.is_idle)


def test_no_attack_has_left_a_trace_of_failure(server, guarded):
    """Runs last, of these."""
    assert server.is_idle() and guarded.is_idle()
    for its in (server, guarded):
        assert "Traceback" not in its.errors() and "the a the a" not in its.errors()  # prompts are not logged


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and end


def test_sigterm_finishes_what_runs_and_takes_nothing_new(folder):
    for server in served(folder):
        stream = server.client.completions.create(
            model="tiny",
            prompt="the",
            max_tokens=600,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        chunks = iter(stream)
        count = len(next(chunks).choices[0].token_ids)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", trust_env=False)
        count += sum(len(c.token_ids) for chunk in chunks for c in chunk.choices)
        assert count == 600
        assert server.process.wait(60) == 0


def test_what_is_not_finished_in_time_is_an_error_never_a_short_text(folder):
    for server in served(folder, drain_seconds=0.3):
        with server.connect() as whole:
            whole.sendall(server.request(**LONG))
            with pytest.raises(openai.APIError, match="shutting down"):
                for n, _ in enumerate(
                    server.client.completions.create(
                        model="tiny", prompt="a", max_tokens=8000, stream=True, extra_body=ON
                    )
                ):
                    if n == 0:
                        server.process.send_signal(signal.SIGTERM)
            assert read_all(whole)[:12] in (b"HTTP/1.1 503", b"")
        assert server.process.wait(60) == 0


def test_killed_in_mid_stream_it_breaks_the_stream_and_gives_the_same_bits_once_it_is_back(folder):
    body = {"prompt": "the a", "max_tokens": 2000, "seed": 11, "logprobs": 2, "return_token_ids": True, **ON}
    for server in served(folder):
        whole = server.post(**body).json()
        stream = server.client.completions.create(
            model="tiny", prompt="the a", max_tokens=8000, stream=True, extra_body=ON
        )
        with pytest.raises(openai.APIConnectionError):  # and not a text that is short
            for n, _ in enumerate(stream):
                if n == 0:
                    server.process.kill()
        with pytest.raises(openai.APIConnectionError):
            server.client.models.list()
    for server in served(folder):
        again = server.post(**body).json()
    assert again["choices"] == whole["choices"] and again["system_fingerprint"] == whole["system_fingerprint"]


def test_it_serves_on_where_its_log_is_on_a_full_disk(folder):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), *flags(out_dir=folder / "tiny", port=port, device="cpu")]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([*command, "--compile=False"], stdout=full, stderr=full)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

            def is_ready() -> bool:
                assert process.poll() is None, "it has ended"
                with contextlib.suppress(httpx.ConnectError):
                    return client.get("/health").status_code == 200

            until(is_ready)
            for _ in range(2):
                assert client.post("/v1/completions", json={"prompt": "the"}).json()["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_it_serves_uncompiled_where_the_disk_has_no_room_for_a_compiled_step(folder, tmp_path, monkeypatch, server):
    """A limit on files' sizes stands for the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    body = {"prompt": "the a", "max_tokens": 30, "seed": 5, "logprobs": 1}
    for small in served(folder, "-c", NO_ROOM, max_rows=2, compile=True):
        assert "warning: the step can't be compiled" in small.errors() and "going on without" in small.errors()
        assert small.post(**body).json()["choices"] == server.post(**body).json()["choices"]
    assert not [*(tmp_path / "cache").glob("**/*.so")]


def test_it_can_be_stopped_while_it_loads(folder):
    for server in served(folder, "-c", IMPATIENT, waits=False):
        assert server.first_health.status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert [line for line in server.errors().splitlines() if not line.startswith("Overriding: ")] == []


def test_a_name_of_any_bytes_can_be_told(folder):
    for server in served(folder, model_name=os.fsdecode(b"m\xff")):
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "m?"
        assert 'model_name="m?"' in server.http.get("/metrics").text


def test_a_port_that_is_taken_is_one_line(server, folder, run):
    assert_user_error(
        run("serve.py", *flags(out_dir=folder / "tiny", port=server.port)), f"port={server.port}", "in use"
    )


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_no_machine_can_have_is_one_line(folder, run, host):
    result = run("serve.py", *flags(out_dir=folder / "tiny", port=0, host=host, public=True))
    assert_user_error(result, f"host={host} is no name of a machine")


def test_a_checkpoint_that_is_damaged_is_one_line(folder, tmp_path, run):
    data = (folder / "tiny" / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(data[: len(data) // 2])
    assert_user_error(run("serve.py", *flags(out_dir=tmp_path, port=0)), "ckpt.pt")


def test_settings_are_checked_together(run, folder, monkeypatch):
    monkeypatch.delenv("QUARTZGPT_API_KEY", raising=False)
    result = run("serve.py", *flags(out_dir=folder / "none", host="0.0.0.0", port=-1, max_rows=1, api_key="a b"))
    assert_user_error(result, "port must", "max_rows must", "api_key must", "none")
    result = run("serve.py", *flags(out_dir=folder / "tiny", host="0.0.0.0"))
    assert_user_error(result, "host=0.0.0.0 is open to others", "QUARTZGPT_API_KEY", "--public=True")


def test_help_is_answered(run):
    result = run("serve.py", "--help")
    assert result.code == 0 and "--max_queue=128" in result.out


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_a_package_that_is_missing_is_one_line(run, folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run("serve.py", *flags(out_dir=folder / "tiny"))
    assert_user_error(result, f"serve.py needs the {package} package", "pip install -e .[serve]")


FAULTY = """
import runpy, sys
from quartz import api
take = api.Choice.take
def fail(self, told, end):
    if self.asked.seeds[0] == 13:
        raise ZeroDivisionError("a fault of ours")
    take(self, told, end)
api.Choice.take = fail
sys.argv[0] = "serve.py"
runpy.run_path("serve.py", run_name="__main__")
"""


def test_a_fault_of_ours_ends_its_request_alone(folder):
    server = Server(folder, "-c", FAULTY)
    try:
        for streams in (False, True):
            began = time.monotonic()
            answer = server.post(prompt="the", seed=13, stream=streams)
            assert "the server has failed" in answer.text and (streams or answer.status_code == 500)
            assert time.monotonic() - began < 30
        assert server.post(prompt="the", seed=14).status_code == 200
        until(server.is_idle)
        assert "a fault of ours" in server.errors()
    finally:
        server.process.kill()
        server.process.communicate()
        server.log.close()
