"""HTTP for a service: routes, streams, metrics, and what becomes of clients that are greedy or gone.

Read it to see when a request ends. Who may ask at all stands in quartz/gate.py, what a request means in quartz/api.py,
how it is computed in quartz/serving.py; these two run beside this event loop, which never computes.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import prometheus_client as prometheus
import uvicorn
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from quartz import api, machine, openapi
from quartz.api import ApiError
from quartz.errors import UserError, in_words
from quartz.gate import Gate, Json, Protocol, dumps, refusal
from quartz.serving import Closed, Counts, Event, Full, Read, Service, Token
from quartz.watch import Watch

MAX_BODY, MAX_HEAD = 2**20, 2**14  # bytes
SMALL = 2**12  # bytes of a body that the event loop itself looks at
BODY_SECONDS = 10.0  # for a request's body to arrive
IDLE_SECONDS = 5  # that a connection is kept for the next request
MAX_CONNECTIONS = 512
STREAM = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # of histograms
STOPPING = "the server is shutting down"
FAILED = "the server has failed; its log tells why"


class Gone(Exception):
    """The client has left."""


# ----------------------------------------------------------------------------------------------------------------------
# Between the computing thread and the event loop


class Mailbox:
    """What the computing thread tells calls: the event loop is woken once for all that has come meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.letters, self.is_called = loop, deque(), False

    def put(self, call: "Call", which: int, event: Event) -> None:
        """In the computing thread."""
        self.letters.append((call, which, event))
        if not self.is_called:
            self.is_called = True
            self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        self.is_called = False
        while self.letters:
            call, which, event = self.letters.popleft()
            call.hear(which, event)


class Metrics:
    """What /metrics tells, by vLLM's names, which dashboards know."""

    def __init__(self, name: str):
        self.name, self.registry = name, prometheus.CollectorRegistry()
        self.services: list[Service] = []  # with --watch, those before that still run too
        self.past = Counts()  # of those that are over
        prometheus.disable_created_metrics()
        self.registry.register(self)
        self.finished = self.own(prometheus.Counter, "request_success", "Texts that ended, by why", "finished_reason")
        told = functools.partial(self.own, prometheus.Histogram, buckets=SECONDS)
        self.first = told("time_to_first_token_seconds", "From the request to its first token").labels(name)
        self.between = told("inter_token_latency_seconds", "Between two tokens of a text").labels(name)
        self.whole = told("e2e_request_latency_seconds", "From the request to the end of its answer").labels(name)
        self.queue = told("request_queue_time_seconds", "From the request until rows are free").labels(name)

    def own(self, kind: type, name: str, told: str, *labels: str, **settings):
        return kind(f"vllm:{name}", told, ["model_name", *labels], registry=self.registry, **settings)

    def collect(self):
        """What the services count, as prometheus_client asks for it."""
        counts = sum((service.counts() for service in self.services), self.past)
        for kind, name, value, told in (
            (GaugeMetricFamily, "num_requests_running", counts.running, "Texts that are written"),
            (GaugeMetricFamily, "num_requests_waiting", counts.waiting, "Texts that wait for a row"),
            (CounterMetricFamily, "prompt_tokens", counts.prompt_tokens, "Tokens of prompts, cached or not"),
            (CounterMetricFamily, "generation_tokens", counts.generated_tokens, "Tokens that were drawn"),
            (CounterMetricFamily, "prefix_cache_queries", counts.cache_queries, "Tokens looked for in the cache"),
            (CounterMetricFamily, "prefix_cache_hits", counts.cache_hits, "Tokens found there"),
        ):
            family = kind(f"vllm:{name}", told, labels=["model_name"])
            family.add_metric([self.name], value)
            yield family

    def retire(self, service: Service) -> None:
        """Of one that is over, counts what it has done. In the event loop, as collect, so that sums never fall."""
        self.past += dataclasses.replace(service.counts(), running=0, waiting=0, cache_bytes=0)
        self.services.remove(service)


class Call:
    """A request that is computed: its answer as far as it has come, and what to do when nobody wants it any more."""

    def __init__(self, site: "Site", service: Service, answer: api.Answer, began: float):
        self.site, self.service, self.answer, self.began = site, service, answer, began
        self.changed, self.error, self.tickets = asyncio.Event(), None, []
        self.times: dict[tuple[int, int], float] = {}  # when a row's newest token came

    def submit(self) -> None:
        """All of its prompts, or none. Raises what Service.submit does."""
        try:
            for which, request in enumerate(self.answer.requests):
                emit = functools.partial(self.site.mailbox.put, self, which)
                self.tickets.append(self.service.submit(request, emit))
        except (Full, Closed, ValueError):
            self.cancel()
            raise

    def hear(self, which: int, event: Event) -> None:
        """Takes an event, in the event loop. What goes wrong with it ends the request."""
        try:
            self.measure(which, event)
            if self.answer.take(which, event):
                self.service.cancel(self.tickets[which], event.row)
        except ApiError as error:
            self.error = error
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self.error = ApiError(500, FAILED)
        self.changed.set()

    def measure(self, which: int, event: Event) -> None:
        metrics, now = self.site.metrics, time.monotonic()
        if isinstance(event, Read):
            metrics.queue.observe(event.waited)
        if isinstance(event, Token):
            if not self.times:
                metrics.first.observe(now - self.began)
            if before := self.times.get((which, event.row)):
                metrics.between.observe(now - before)
            self.times[which, event.row] = now

    async def news(self) -> None:
        """Waits until something has come. Raises ApiError where the request has failed."""
        await self.changed.wait()
        self.changed.clear()
        if self.error:
            raise self.error

    async def whole(self) -> bytes:
        """All of the answer, once it is over; what is told of thousands of tokens takes a while to write down."""
        while not self.answer.is_over():
            await self.news()
        size = 0 if self.answer.asked.logprobs is None else MAX_BODY
        return await self.site.apart(size, lambda: dumps(self.answer.whole()))

    def end(self) -> None:
        """Whatever has become of it."""
        otherwise = "error" if self.error else "abort"
        for choice in self.answer.choices:
            self.site.metrics.finished.labels(self.site.metrics.name, choice.end or otherwise).inc()
        self.site.metrics.whole.observe(time.monotonic() - self.began)
        self.cancel()

    def cancel(self) -> None:
        if self.error or not self.answer.is_over():
            for ticket in self.tickets:
                self.service.cancel(ticket)


def too_large() -> ApiError:
    return ApiError(413, f"the body may have {MAX_BODY} bytes", code="too_large")


def no_room(error: Exception) -> ApiError:
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return ApiError(503, str(error), code="queue_full" if isinstance(error, Full) else "stopping")


class EventStream:
    """An answer as server-sent events, each as soon as it is known; where the client is slow, several become one."""

    def __init__(self, call: Call):
        self.call = call

    async def __call__(self, scope, receive, send) -> None:
        async def say(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            await self.call.site.unless_gone(self.tell(say), receive)
        except ApiError as error:
            await say(dumps(error.body()))
        except Gone:
            return
        finally:
            self.call.end()
        await say(b"[DONE]", more=False)

    async def tell(self, say: Callable) -> None:
        answer, is_over = self.call.answer, False
        while not is_over:
            is_over = answer.is_over()  # which a short one may be before its stream begins
            if not is_over:
                await self.call.news()
            if chunk := answer.chunk():
                await say(dumps(chunk))
        if chunk := answer.last_chunk():
            await say(dumps(chunk))


# ----------------------------------------------------------------------------------------------------------------------
# The routes


@dataclass
class Site:
    """What is served. It listens at once, and answers as soon as the first of `offers` is there, which may take time.

    offers: each takes the place of the one before, which ends what it has begun. key: empty for none; hosts: names by
    which it is known, beside addresses; seconds: that a request may take in all; watch: the run that is watched.
    """

    offers: Iterator[tuple[api.Served, Service]]
    key: str
    hosts: set[str]
    seconds: float
    watch: Watch | None = None
    now: tuple[api.Served, Service] | None = None
    metrics: Metrics | None = None
    mailbox: Mailbox | None = None
    is_loading: bool = True
    failure: BaseException | None = None  # of a model
    stop: Callable[[], None] = lambda: None
    aside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "texts"))

    def app(self) -> Gate:
        routes = [
            Route("/v1/completions", functools.partial(self.complete, api.completion), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(self.complete, api.chat), methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/tokenize", functools.partial(self.convert, api.tokenize), methods=["POST"]),
            Route("/detokenize", functools.partial(self.convert, api.detokenize), methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/vocabulary", self.vocabulary, methods=["GET"]),
            Route("/run", self.run, methods=["GET"]),
            Route("/", page(), methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]
        handlers = {ApiError: _refuse, HTTPException: _refuse_http, Gone: _leave, ClientDisconnect: _leave, 500: _fail}
        return Gate(Starlette(routes=routes, exception_handlers=handlers, lifespan=self.live), self.key, self.hosts)

    @contextlib.asynccontextmanager
    async def live(self, app: Starlette):
        loop = asyncio.get_running_loop()
        self.mailbox = Mailbox(loop)
        threading.Thread(target=self._load, args=(loop,), name="loading", daemon=True).start()
        yield

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            retiring = None
            for served, service in self.offers:
                if retiring:  # so that memory holds one model that goes, one that stays and one that comes, and no more
                    retiring.join()
                self.metrics = self.metrics or Metrics(served.name)
                self.metrics.services.append(service)
                before, self.now = self.now, (served, service)
                retiring = before and threading.Thread(target=self._retire, args=(before[1],), daemon=True)
                if retiring:
                    retiring.start()
            self.is_loading = False
        except BaseException as error:
            self.failure, self.is_loading = error, False
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self.stop)

    def _retire(self, service: Service) -> None:
        """Ends it once all is over that it was asked for."""
        service.drain(self.seconds)
        service.close()
        machine.give_back_memory()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self.mailbox.loop.call_soon_threadsafe(self.metrics.retire, service)

    def ready(self) -> tuple[api.Served, Service]:
        if self.now is None:
            raise ApiError(503, "the model is being loaded", code="loading")
        return self.now

    def served(self) -> api.Served:
        return self.ready()[0]

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for one that is too large, or too slow."""
        if int(request.headers.get("content-length", 0)) > MAX_BODY:
            raise too_large()
        try:
            return await asyncio.wait_for(_read(request), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body has not arrived within {BODY_SECONDS:g} s", code="timeout") from error

    async def apart(self, size: int, function: Callable, *arguments):
        """What the function returns; in a thread of its own where it may take long."""
        if size <= SMALL:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.aside, function, *arguments)

    async def unless_gone(self, work: Coroutine, receive: Callable):
        """What `work` returns. Raises Gone as soon as the client leaves, and ApiError where it takes too long or the
        server ends; the work is cancelled then."""
        tasks = task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
        try:
            await asyncio.wait(tasks, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # as uvicorn does when time is up
            raise ApiError(503, STOPPING, code="stopping") from None
        finally:
            leaving.cancel()
            if not task.done():
                task.cancel()
        if task.done():
            return task.result()
        if leaving.done():
            raise Gone
        raise ApiError(504, f"the request has taken more than {self.seconds:g} s", code="timeout")

    async def complete(self, means: Callable[[dict, api.Served], api.Asked], request: Request) -> Json | EventStream:
        began = time.monotonic()
        self.ready()
        data = await self.body(request)
        call = await self.unless_gone(self.begin(data, means, began), request.receive)
        if call.answer.asked.stream:
            return EventStream(call)
        try:
            return Json(await self.unless_gone(call.whole(), request.receive))
        finally:
            call.end()

    async def begin(self, data: bytes, means: Callable, began: float) -> Call:
        """Submits what a body asks for, after a look whether there is room, and then at the prompts."""
        served, service = now = self.ready()
        asked = await self.apart(len(data), lambda: means(api.read_json(data), served))
        try:
            service.check_room(asked.choices())
            answer = await self.apart(len(data), lambda: api.Answer(asked, asked.encode(served), served))
            call = Call(self, service, answer, began)
            call.submit()
        except Closed as error:
            if now is not self.now:  # a newer model has taken its place meanwhile
                return await self.begin(data, means, began)
            raise no_room(error) from error
        except (Full, ValueError) as error:
            raise no_room(error) from error
        return call

    async def convert(self, function: Callable, request: Request) -> Json:
        served, data = self.served(), await self.body(request)
        work = self.apart(len(data), lambda: dumps(function(api.read_json(data), served)))
        return Json(await self.unless_gone(work, request.receive))

    async def models(self, request: Request) -> Json:
        return Json({"object": "list", "data": [api.model(self.served())]})

    async def model(self, request: Request) -> Json:
        served, name = self.served(), request.path_params["name"]
        if name != served.name:
            raise api.not_found(name, served)
        return Json(api.model(served))

    async def tokenizer_info(self, request: Request) -> Json:
        return Json(api.tokenizer_info(self.served()))

    async def vocabulary(self, request: Request) -> Json:
        return Json(await self.apart(MAX_BODY, lambda served: dumps(api.vocabulary(served)), self.served()))

    async def run(self, request: Request) -> Json:
        if self.watch is None:
            raise ApiError(404, "no run is watched here: start the server with --watch=True", code="not_watched")
        its = {"fingerprint": self.now and self.now[0].fingerprint}
        return Json(await self.apart(MAX_BODY, lambda: dumps(its | self.watch.told())))

    async def health(self, request: Request) -> Json:
        self.ready()
        return Json({"status": "ok"})

    async def openapi(self, request: Request) -> Json:
        return Json(openapi.document())

    async def tell_metrics(self, request: Request) -> Response:
        self.ready()
        return Response(prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)


def page() -> Callable:
    """What answers with the page, which runs what stands in it, and nothing else."""
    data = Path(__file__).with_name("page.html").read_bytes()
    sums = {kind: _sums(data, kind) for kind in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {sums['script']}; style-src {sums['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    async def answer(request: Request) -> Response:
        return HTMLResponse(data, headers=headers | {"cache-control": "no-cache"})

    return answer


def _sums(page: bytes, kind: str) -> str:
    """Of each inline script or style, as a Content-Security-Policy names it."""
    found = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(its).digest()).decode()}'" for its in found)


async def _read(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise too_large()
    return bytes(data)


async def _leaving(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: ApiError) -> Json:
    return refusal(error)


async def _refuse_http(request: Request, error: HTTPException) -> Json:
    told = refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"[:200]))
    told.headers.update(error.headers or {})  # which methods are allowed
    return told


async def _leave(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # which nobody reads


async def _fail(request: Request, error: Exception) -> Json:
    return refusal(ApiError(500, FAILED))


# ----------------------------------------------------------------------------------------------------------------------
# Running


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises UserError where there is none to be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda its: its[0] != socket.AF_INET)  # as clients try it first
        return socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except UnicodeError as error:  # of what can't be a name, as where two dots follow each other
        raise UserError(f"host={host} is no name of a machine, nor an address") from error
    except OSError as error:
        raise UserError(f"host={host} port={port} can't be had: {in_words(error)}") from error


def address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(site: Site, sock: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT, then finishes within drain_seconds what was begun. Raises what loading raised."""
    server = uvicorn.Server(
        uvicorn.Config(
            site.app(),
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEAD,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=drain_seconds,
        )
    )
    site.stop = lambda: setattr(server, "should_exit", True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at the end, which is no failure
    status = 0
    try:
        server.run(sockets=[sock])
    except BaseException as error:
        if not site.is_loading:
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if status == 1:
            traceback.print_exc(file=sys.stderr)
    finally:
        if site.now is not None:
            site.now[1].close()
    if site.is_loading:  # a thread that loads can't be ended, and would not survive the interpreter's end
        os._exit(status)
    if site.failure is not None:
        raise site.failure
