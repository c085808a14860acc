"""Who may ask a server, how slowly, and how those are refused who may not.

Read it to see what is looked at before a request is: its host, origin, key and kind of content, and how long a head may
take to arrive and an answer to be read.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import socket
import struct
from urllib.parse import urlsplit

from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from quartz.api import ApiError

HEAD_SECONDS = 10.0  # for a request's head to arrive
READER_SECONDS, READER_RATE = 30.0, 1e4  # a reader has this time, and longer for what is large, in bytes/s
OPEN = ("/", "/health", "/openapi.json")  # to those without the key


def dumps(data: object) -> bytes:
    """JSON in ASCII, so that no character of it can be cut."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


class Json(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else dumps(content)


def refusal(error: ApiError) -> Json:
    """With what tells clients whether and when to try again."""
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}, 504: {"x-should-retry": "false"}}
    return Json(error.body(), error.status, headers.get(error.status))


class Gate:
    """Lets a request in whose host, origin, key and kind of content are right; refuses others before they are read.

    A page from elsewhere can have a browser send requests here, even by a name of its own that leads to this machine.
    Its name shows as Host, and itself as Origin.
    """

    def __init__(self, app, key: str, hosts: set[str]):
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                self.check(scope)
            except ApiError as error:
                app = refusal(error)
        await app(scope, receive, send)

    def check(self, scope: dict) -> None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        host, *others = headers.get("host", ["localhost"])  # which HTTP/1.0 may leave out, and no browser does
        if others or not self.knows(host):
            raise ApiError(403, "this host is not served here: start the server with --hosts=NAME", code="host")
        if any(_part(origin, "netloc") != host.lower() for origin in headers.get("origin", [])):
            raise ApiError(403, "pages from elsewhere may not ask here", code="origin")
        if self.key and scope["path"] not in OPEN:
            scheme, _, given = headers.get("authorization", [""])[0].partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.key.encode()):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, "the content must be application/json", code="content_type")

    def knows(self, authority: str) -> bool:
        """Whether a Host is one of ours. An address always is: only by a name can a page from elsewhere lead here."""
        name = _part(f"//{authority}", "hostname")
        return "*" in self.hosts or name in self.hosts or is_address(name)


def _part(url: str, part: str) -> str:
    """netloc or hostname of a URL, in lower case; empty where it has none."""
    try:
        return (getattr(urlsplit(url), part) or "").lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Protocol(H11Protocol):
    """uvicorn's, which ends connections on which a head does not arrive, or what was written is not read, in time."""

    arriving: asyncio.TimerHandle | None = None
    leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # What is written goes out at once: else a token would wait until the one before is acknowledged, for 40 ms
        with contextlib.suppress(OSError):  # of a client that has left already
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=0)  # so that anything that waits to be read is told of below
        self.arriving = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered and self.arriving:  # the body has its own time
            self.arriving.cancel()
            self.arriving = None
        elif is_answered and not self.arriving:
            self.arriving = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = READER_SECONDS + self.transport.get_write_buffer_size() / READER_RATE
        self.leaving = self.loop.call_later(seconds, self.cut)

    def cut(self) -> None:
        """Ends the connection by a reset: else the system would keep what was written, and try to send it."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.leaving.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in filter(None, (self.arriving, self.leaving)):
            timer.cancel()
