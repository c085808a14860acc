"""The computing side of a server: what a request is told, whatever runs beside it, and how requests come and go."""

import ctypes
import dataclasses
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_compiled import CPU, QWEN3, has_compiler, make

from quartz import compiled, threads
from quartz.decoder import Sampling, complete
from quartz.engine import Engine
from quartz.serving import (
    Closed,
    Counts,
    Failed,
    Full,
    PrefixCache,
    Read,
    Request,
    Service,
    Token,
    tell,
)

CHUNK = 5
GREEDY = Sampling(temperature=0)


class Client:
    """Who asked: keeps the events, and can be waited for."""

    def __init__(self, service: Service, request: Request, at_event=lambda client, event: None):
        self.events, self.left, self.over = [], len(request.seeds), threading.Event()
        self.request, self.at_event = request, at_event
        self.ticket = service.submit(request, self.emit)

    def emit(self, event) -> None:
        self.events.append(event)
        self.left -= isinstance(event, Token) and event.end is not None
        if not self.left or isinstance(event, Failed) or not self.request.max_new_tokens:
            self.over.set()
        self.at_event(self, event)

    def wait(self) -> "Client":
        assert self.over.wait(60), self.events
        return self

    def ids(self, row: int = 0) -> list[int]:
        return [event.told.token for event in self.events if isinstance(event, Token) and event.row == row]

    def told(self) -> list:
        """The events without what may differ: the order of rows among each other, the cache, the clock."""
        read = [dataclasses.replace(event, cached_tokens=0, waited=0) for event in self.events[:1]]
        return read + sorted(self.events[1:], key=lambda event: event.row)

    @property
    def cached(self) -> int:
        return self.events[0].cached_tokens


@pytest.fixture
def serve():
    """serve(engine, …) starts a service, which is closed at the end."""
    services = []

    def serve(engine, rows: int = 3, max_queue: int = 100, cache_bytes: int = 10**8, chunk: int = CHUNK) -> Service:
        services.append(Service(engine, rows, engine.model.config.vocab_size, max_queue, cache_bytes, chunk))
        return services[-1]

    yield serve
    for service in services:
        service.close()


class Gate:
    """Has an engine wait before each step until it is let: what happens meanwhile happens between two steps."""

    def __init__(self, engine, monkeypatch):
        self.open, self.arrived, step = threading.Semaphore(0), threading.Semaphore(0), engine.step

        def held(*arguments):
            self.arrived.release()
            assert self.open.acquire(timeout=60)
            return step(*arguments)

        monkeypatch.setattr(engine, "step", held)

    def await_step(self) -> None:
        """Returns while the engine stands before a step."""
        assert self.arrived.acquire(timeout=60)

    def let(self, steps: int = 1) -> None:
        self.open.release(steps)


def requests_of_all_kinds(block_size: int, vocab_size: int) -> list[Request]:
    """Lengths on both sides of a chunk's borders, some with a common beginning; n, echo, all samplings, stops."""
    base = [(7 * n + n * n) % vocab_size for n in range(block_size)]
    samplings = [Sampling(), Sampling(top_k=9), GREEDY, Sampling(top_p=0.8), Sampling(repetition_penalty=1.3)]
    samplings += [Sampling(temperature=2.0, min_p=0.1)]
    lengths = [1, CHUNK, 3 * CHUNK + 2, block_size - 12, block_size - 13, 2 * CHUNK, 2]
    found = []
    for n, length in enumerate(lengths):
        prompt = base[:length] if n % 2 else [n, *base[1:length]]
        more = {"logprobs": (None, 0, 2)[n % 3], "echo": n % 4 == 2, "stop_ids": frozenset([1, 2] if n % 2 else [])}
        found.append(Request(prompt, list(range(n, n + 1 + n % 3)), 5 + n, samplings[n % len(samplings)], **more))
    return found


def alone(serve, engine, request: Request, **settings) -> list:
    service = serve(engine, cache_bytes=0, **settings)
    told = Client(service, request).wait().told()
    service.close()
    return told


def assert_same_among_others(serve, make_engine, rows: int, block_size: int, vocab_size: int) -> None:
    """Each request's events are those of the request alone, on the first visit and with its prompt cached, among
    requests that come, are broken off, and go."""
    requests = requests_of_all_kinds(block_size, vocab_size)
    expected = [alone(serve, make_engine(), request, rows=rows) for request in requests]
    service, visits = serve(make_engine(), rows=rows), []
    for _ in range(2):
        clients = []
        for n, request in enumerate(requests):
            clients.append(Client(service, request))
            passing = Request([n, 3, 3, n] * 4, [n], 14, logprobs=3)
            Client(service, passing, lambda its, event, n=n: len(its.events) > n and service.cancel(its.ticket))
        for client, told in zip(clients, expected, strict=True):
            assert client.wait().told() == told, client.request
        visits.append(sum(client.cached for client in clients))
    assert visits[0] < visits[1] and service.drain(60) and service.decoder.free() == list(range(rows))


@pytest.mark.parametrize("changes", [{}, QWEN3, {"n_embd": 36, "n_head": 3}], ids=str)
def test_what_a_request_is_told_does_not_depend_on_others(serve, changes):
    """Ids and the bits of log-probabilities."""
    model = make(**changes, block_size=64)
    assert_same_among_others(serve, lambda: Engine(model), 4, 64, 61)


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
def test_what_a_compiled_step_tells_does_not_depend_on_others(serve, compiled_folder):
    """With contexts of several of a processor's vectors, and rows that are far from even."""
    model = make(block_size=300)
    engine = compiled.prepare(model, CPU, torch.float32, False, 3, 10**9, True)
    assert isinstance(engine, compiled.CompiledStep)
    assert_same_among_others(serve, lambda: engine, 3, 300, 61)


@pytest.mark.parametrize("changes", [{}, QWEN3], ids=str)
def test_texts_are_those_of_the_decoder(serve, changes):
    engine = Engine(make(**changes, block_size=64))
    service = serve(engine)
    for request in requests_of_all_kinds(64, 61):
        client = Client(service, request).wait()
        for row, seed in enumerate(request.seeds):
            prompts, new = [request.prompt] * 2, request.max_new_tokens
            (text, _) = complete(engine, prompts, new, request.sampling, [seed, 99], chunk=CHUNK)
            stop = next((n + 1 for n, token in enumerate(text) if token in request.stop_ids), new)
            assert client.ids(row) == text[:stop]
            assert [e.end for e in client.events[1:] if e.row == row] == [None] * (stop - 1) + [
                "stop" if text[stop - 1] in request.stop_ids else "length"
            ]


@pytest.mark.parametrize("changes", [{}, QWEN3], ids=str)
@pytest.mark.parametrize("chunk", [CHUNK, 256])
def test_log_probabilities_are_those_of_the_full_forward_pass(serve, changes, chunk):
    """Of the prompt with echo, and of what follows, to the last token that fits."""
    model = make(**changes, block_size=200)
    prompt = [(7 * n + n * n) % 61 for n in range(190)]
    service = serve(Engine(model), chunk=chunk)
    (read, *tokens) = Client(service, Request(prompt, [3, 4], 10, Sampling(), logprobs=4, echo=True)).wait().events
    assert [its.token for its in read.prompt] == prompt and read.prompt[0].logprob is None and read.prompt[0].top == []
    for row in range(2):
        told = [*read.prompt, *(event.told for event in tokens if event.row == row)]
        idx = torch.tensor([[its.token for its in told]])
        with torch.no_grad():
            expected = model(idx, idx)[0][0].log_softmax(-1)
        for n, its in enumerate(told[1:]):
            ids, values = [i for i, _ in its.top], torch.tensor([value for _, value in its.top])
            assert its.logprob == pytest.approx(expected[n, its.token].item(), abs=1e-4)
            torch.testing.assert_close(values, expected[n].topk(4).values, atol=1e-4, rtol=0)
            torch.testing.assert_close(values, expected[n, ids], atol=1e-4, rtol=0)


def test_the_likeliest_token_has_one_number(serve):
    """As an evaluation's test for a greedy text wants it: equal, not close."""
    prompt = [*range(30)]
    client = Client(serve(Engine(make())), Request(prompt, [0], 1, GREEDY, logprobs=1, echo=True)).wait()
    (read, token) = client.events
    assert token.told.top == [(token.told.token, token.told.logprob)]
    again = Client(serve(Engine(make())), Request([*prompt, token.told.token], [0], 0, GREEDY, logprobs=1, echo=True))
    (read,) = again.wait().events
    assert read.prompt[-1].top == [(token.told.token, read.prompt[-1].logprob)]


def test_a_request_of_no_new_tokens_is_read_and_over(serve):
    service = serve(Engine(make()))
    client = Client(service, Request([1, 2, 3], [0, 1], 0, logprobs=0, echo=True)).wait()
    assert service.drain(60) and len(client.events) == 1
    assert [(its.token, its.top) for its in client.events[0].prompt] == [(1, []), (2, []), (3, [])]
    assert service.counts().generated_tokens == 0


def test_what_is_told_of_a_row_does_not_depend_on_the_rows_beside_it():
    """At GPT-2's vocabulary."""
    logits = 5 * torch.randn(7, 50257, generator=torch.Generator().manual_seed(0))
    together = tell(logits, list(range(7)), 5)
    assert together == [tell(logits[n : n + 1], [n], 5)[0] for n in range(7)]


def test_a_prefix_is_taken_from_the_cache_at_borders_of_chunks_alone(serve):
    service, ids = serve(Engine(make())), [*range(20)]

    def cached(prompt: list[int], **more) -> int:
        return Client(service, Request(prompt, [0], 2, **more)).wait().cached

    assert cached(ids) == 0
    assert cached(ids) == 15  # the last chunk's logits are wanted
    assert cached([*ids, 1, 2]) == 20
    assert cached(ids[:9]) == 5 and cached(ids[:5]) == 0 and cached(ids[:4]) == 0
    assert cached([*ids[:7], 60, *ids[8:]]) == 5
    assert cached([60, *ids[1:]]) == 0  # later chunks are alike, what they follow is not
    assert cached(ids, echo=True, logprobs=0) == 0 and cached(ids, echo=True) == 15
    counts = service.counts()
    assert counts.cache_hits == 15 + 20 + 5 + 5 + 15
    assert (
        counts.cache_queries == 20 + 20 + 22 + 9 + 5 + 4 + 20 + 20 + 20
        and counts.prompt_tokens == 20 + counts.cache_queries
    )


def test_prompts_that_wait_together_are_read_once_as_far_as_they_agree(serve, monkeypatch):
    engine, ids = Engine(make()), [*range(14)]
    gate = Gate(engine, monkeypatch)
    service = serve(engine)
    first = Client(service, Request([9], [0], 4))
    gate.await_step()
    others = [Client(service, Request([*ids, last], [0], 4)) for last in (1, 2)]
    gate.let(100)
    assert [client.wait().cached for client in others] == [0, 10] and first.wait()


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago():
    engine = Engine(make())
    cache = engine.new_cache(2, 32)
    whole = PrefixCache(CHUNK, 10**9)
    a, b = list(range(10)), list(range(20, 30))

    def read(prefixes: PrefixCache, ids: list[int]) -> None:
        for start in range(0, len(ids), CHUNK):
            engine.prefill(ids[start : start + CHUNK], cache, 0, start)
            prefixes.keep(cache, 0, ids, start + CHUNK)

    read(whole, a)
    prefixes = PrefixCache(CHUNK, whole.bytes * 3 // 2)  # three chunks
    read(prefixes, a), read(prefixes, b)
    assert prefixes.bytes <= prefixes.limit
    assert prefixes.fill(cache, 1, [*b, 0], 0) == 10
    assert prefixes.fill(cache, 1, [*a, 0], 0) == 5  # of the other the end went, not the beginning
    assert torch.equal(cache.part(1, 0, 5)[0], whole.parts[tuple(a[:5])][0])
    read(prefixes, b[::-1])
    assert prefixes.fill(cache, 1, [*a, 0], 0) == 5 and prefixes.fill(cache, 1, [*b, 0], 0) == 0
    assert prefixes.bytes == sum(k.nbytes + v.nbytes + 8 * len(ids) for ids, (k, v) in prefixes.parts.items())
    small = PrefixCache(CHUNK, whole.bytes // 2 - 100)
    read(small, a)
    assert not small.parts and not small.bytes


def test_a_long_prompt_lets_others_go_on(serve, monkeypatch):
    """Between two tokens of a row at most one chunk is read."""
    engine, order = Engine(make(block_size=200)), []
    plain = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda ids, *rest: order.append(len(ids)) or plain(ids, *rest))
    service = serve(engine)
    gate = Gate(engine, monkeypatch)
    client = Client(service, Request([1], [0], 60), lambda its, event: order.append("token"))
    gate.await_step()
    long = Client(service, Request([*range(60)] * 3, [0], 2))
    gate.let(1000)
    assert client.wait() and long.wait()
    reads = [n for n, what in enumerate(order) if what == CHUNK]
    assert len(reads) == 36 and all(order[n + 1] == "token" for n in reads)


def test_a_cancelled_request_ends_before_the_next_step(serve, monkeypatch):
    engine = Engine(make(block_size=200))
    service, gate = serve(engine), Gate(engine, monkeypatch)
    client, other = (Client(service, Request([n], [0, 1][: n + 1], 20)) for n in (1, 0))
    gate.await_step()
    service.cancel(client.ticket, row=1)
    gate.let()
    gate.await_step()
    assert len(client.ids(1)) == 1 and service.counts().running == 2
    service.cancel(client.ticket)
    told = len(client.events)
    gate.let(100)
    assert len(other.wait().ids()) == 20
    assert service.drain(60) and len(client.events) == told and service.decoder.free() == [0, 1, 2]


def test_a_cancelled_request_that_waits_is_forgotten_at_once(serve, monkeypatch):
    engine = Engine(make(block_size=200))
    service, gate = serve(engine, max_queue=2), Gate(engine, monkeypatch)
    running = Client(service, Request([1], [0, 1, 2], 9))
    gate.await_step()
    gone, kept = (Client(service, Request([n], [0], 9)) for n in (1, 2))
    service.cancel(gone.ticket)
    assert service.counts().waiting == 1
    third = Client(service, Request([4], [0], 9))
    gate.let(100)
    assert all(client.wait() for client in (running, kept, third)) and gone.events == []


def test_a_prompt_that_is_being_read_can_be_cancelled(serve, monkeypatch):
    engine = Engine(make(block_size=200))
    service, gate = serve(engine), Gate(engine, monkeypatch)
    first = Client(service, Request([1], [0], 20))
    gate.await_step()
    long = Client(service, Request([*range(60)] * 3, [0, 1], 2))
    for _ in range(3):
        gate.let()
        gate.await_step()
    service.cancel(long.ticket)
    gate.let(100)
    assert first.wait() and service.drain(60) and long.events == []
    assert service.decoder.free() == [0, 1, 2] and not service.decoder.prompts


def test_the_queue_has_a_limit_that_counts_texts(serve, monkeypatch):
    engine = Engine(make())
    service, gate = serve(engine, rows=2, max_queue=3), Gate(engine, monkeypatch)
    clients = [Client(service, Request([1], [0, 1], 3))]
    gate.await_step()
    clients += [Client(service, Request([1], [0, 1], 3))]
    for seeds in ([0, 1], [0, 1]):
        with pytest.raises(Full):
            Client(service, Request([1], seeds, 3))
    service.check_room(1)
    clients += [Client(service, Request([1], [5], 3))]
    with pytest.raises(Full):
        service.check_room(1)
    assert (service.counts().running, service.counts().waiting) == (2, 3)
    gate.let(100)
    assert all(client.wait() for client in clients)


def test_a_service_without_a_queue_takes_a_request_when_a_text_has_ended(serve):
    """From within the event that says so."""
    service, more = serve(Engine(make()), rows=2, max_queue=0), []

    def go_on(client, event):
        if isinstance(event, Token) and event.end and len(more) < 20:
            more.append(Client(service, Request([len(more)], [0, 1], 1)))

    Client(service, Request([1], [0], 3), go_on).wait()
    assert service.drain(60) and len(more[0].wait().events) == 3


def test_a_service_that_drains_finishes_what_it_took(serve, monkeypatch):
    engine = Engine(make())
    service, gate = serve(engine, rows=2), Gate(engine, monkeypatch)
    clients = [Client(service, Request([1], [0, 1], 9))]
    gate.await_step()
    clients += [Client(service, Request([1], [0, 1], 9))]
    assert not service.drain(0.01)
    with pytest.raises(Closed):
        Client(service, Request([1], [0], 3))
    gate.let(9)  # all of the first, and one of the last, behind which nothing waits
    for _ in range(9):
        gate.await_step()
    assert service.counts() == Counts(2, 0, 2, 22, 2, 0, 0, 11)
    assert not service.drain(0.01)
    gate.let(100)
    assert service.drain(60) and all(client.over.is_set() and len(client.events) == 19 for client in clients)


def test_a_service_that_closes_fails_what_is_not_over(serve, monkeypatch):
    engine = Engine(make())
    service, gate = serve(engine, rows=2), Gate(engine, monkeypatch)
    clients = [Client(service, Request([1], [0, 1], 9)) for _ in range(2)]
    gate.await_step()
    threading.Timer(0.1, gate.let).start()
    service.close()
    assert not service.thread.is_alive()
    assert all("shutting down" in client.events[-1].message for client in clients)
    with pytest.raises(Closed):
        service.check_room()


@pytest.mark.parametrize("what", ["step", "prefill"])
def test_an_error_of_the_engine_fails_what_runs_and_nothing_else(serve, monkeypatch, capsys, what):
    engine = Engine(make(block_size=200))
    gate, plain, broken = Gate(engine, monkeypatch), getattr(engine, what), []

    def breaks(*arguments):
        found = plain(*arguments)
        if broken:
            raise RuntimeError(broken.pop())
        return found

    service, request = serve(engine), Request([1, 2], [0, 1], 9)  # a step for each token but the first
    gate.let(8)
    expected = Client(service, request).wait().told()
    for _ in range(8):
        gate.await_step()
    running = Client(service, request)
    gate.await_step()
    monkeypatch.setattr(engine, what, breaks)
    waiting = [Client(service, Request([5] * 30, [0], 9)), Client(service, request)]
    broken.append("it broke")
    gate.let(1000)
    assert isinstance(running.wait().events[-1], Failed) and "it broke" in running.events[-1].message
    assert waiting[1].wait().told() == expected and "it broke" in capsys.readouterr().err
    assert waiting[0].wait() and service.drain(60) and service.decoder.free() == [0, 1, 2]


def test_who_raises_on_an_event_is_gone_and_nobody_else(serve):
    service = serve(Engine(make()))

    def raises(client, event):
        raise RuntimeError("the loop is closed")

    gone, stays = Client(service, Request([1], [0], 20), raises), Client(service, Request([1], [0], 20))
    assert len(stays.wait().ids()) == 20 and service.drain(60)
    assert len(gone.events) == 1 and service.decoder.free() == [0, 1, 2]


def test_logits_that_are_not_finite_fail_the_request(serve):
    model = make()
    with torch.no_grad():
        model.transformer.wpe.weight[7] = float("nan")
    service = serve(Engine(model))
    bad, good = Client(service, Request([1] * 8, [0, 1], 5)), Client(service, Request([1], [0], 5))
    assert ["not finite" in event.message for event in bad.wait().events] == [True]
    assert len(good.wait().ids()) == 5 and service.drain(60)


def test_many_that_leave_early_leave_nothing(serve):
    service = serve(Engine(make(block_size=200)), max_queue=1000)
    for n in range(200):
        client = Client(service, Request([n % 61] * (1 + n % 90), [0, 1][: 1 + n % 2], 100))
        if n % 3:
            time.sleep(0.001)
        for row in (1, 0) if n % 4 == 3 else (None,):
            service.cancel(client.ticket, row)
    assert Client(service, Request([1], [0], 5)).wait() and service.drain(60)
    counts = service.counts()
    assert (counts.running, counts.waiting) == (0, 0)
    assert service.decoder.free() == [0, 1, 2] and not service.decoder.prompts


def test_an_idle_service_does_nothing(serve):
    service = serve(Engine(make()))
    Client(service, Request([1], [0], 5)).wait()
    service.drain(60)
    task = Path(f"/proc/self/task/{service.thread.native_id}/status")
    if not task.exists():
        pytest.skip("this system has no /proc")

    def switches() -> list[str]:
        return [line for line in task.read_text().splitlines() if "ctxt_switches" in line]

    time.sleep(0.1)
    before = switches()
    time.sleep(0.5)
    assert switches() == before


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no /proc")
def test_the_threads_of_who_starts_it_are_given_back(serve):
    """They would not let the computing thread's ones spin."""
    engine, before = Engine(make()), torch.get_num_threads()
    tasks = Path("/proc/self/task")
    torch.set_num_threads(2)
    try:
        threads.give_back()
        without = len([*tasks.iterdir()])
        torch.randn(2000, 2000).exp()
        if len([*tasks.iterdir()]) == without or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
            pytest.skip("this system's torch computes with other threads")
        threads.give_back()
        assert len([*tasks.iterdir()]) == without
        assert torch.randn(2000, 2000).exp().isfinite().all()  # they come again when they are needed
        service = serve(engine)
        assert len([*tasks.iterdir()]) <= without + 2  # the computing thread and its one
        assert Client(service, Request([1], [0], 5)).wait()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [61]}, "from 0 to 60"),
        ({"prompt": [-1]}, "from 0 to 60"),
        ({"prompt": [1] * 28}, r"28 \+ 5 tokens do not fit in 32"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1, "echo": True}, "max_new_tokens"),
        ({"seeds": []}, "0 texts"),
        ({"seeds": [1] * 4}, "4 texts"),
        ({"seeds": [2**64]}, "64 bits"),
        ({"logprobs": -1}, "logprobs"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(serve, changes, words):
    service = serve(Engine(make()))
    with pytest.raises(ValueError, match=words):
        service.submit(dataclasses.replace(Request([1], [0], 5), **changes), print)
    assert service.counts().waiting == 0


def test_a_service_of_one_row_is_refused(serve):
    with pytest.raises(ValueError, match="at least 2 rows"):
        serve(Engine(make()), rows=1)


def test_seeds_and_logprobs_go_to_their_limits(serve):
    service = serve(Engine(make()))
    client = Client(service, Request([1], [-(2**63), 2**64 - 1], 2, logprobs=10**6)).wait()
    assert isinstance(client.events[0], Read) and len(client.events[1].told.top) == 61
