"""Requests that come and go, computed on one thread: who waits, who runs, what is told of each token, and to whom.

Read it to see what a server does between an HTTP request and the decoder. Each round of the thread admits what waits
and fits into free rows, reads one chunk of a prompt, or as much of several short ones, and draws a token for every row
that runs: so the time between a row's tokens is that of a chunk and a step, however long others' prompts are.

What a request is told depends on itself alone, not on what runs beside it, nor on whether its prompt was in the cache:
on a CPU with a compiled step, or in float32, ids and log-probabilities bit for bit.
"""

import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field

import torch

from quartz import threads
from quartz.decoder import CHUNK, NOT_FINITE, Decoder, Drawn, Reading, Sampling
from quartz.engine import RowCache

SEEDS = range(-(2**63), 2**64)  # what a generator takes


@dataclass(frozen=True)
class Request:
    """A prompt, and the texts that are to follow it: one a seed."""

    prompt: list[int]
    seeds: list[int]  # each draws in a row of its own; the prompt is read once
    max_new_tokens: int  # may be 0 with echo
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None  # how many of the likeliest to tell of each token; 0: its own alone; None: nothing
    echo: bool = False  # whether to tell of the prompt's tokens too


@dataclass(frozen=True)
class Told:
    """A token, and with `logprobs` what the model made of it, whatever the sampling: from a float32 log_softmax."""

    token: int
    logprob: float | None  # None too for a prompt's first token
    top: list[tuple[int, float]]  # the likeliest, in falling order


@dataclass(frozen=True)
class Read:
    """The prompt has been read: comes once, before any token; it is the end of a request of 0 new tokens."""

    prompt: list[Told] | None  # with both echo and logprobs
    cached_tokens: int  # of the prompt, that need not be computed
    waited: float  # seconds in the queue


@dataclass(frozen=True)
class Token:
    """The next token of one of the request's rows, counted from 0."""

    row: int
    told: Told
    end: str | None  # "stop" or "length" at the row's last token


@dataclass(frozen=True)
class Failed:
    """The request is over, and what it was told is not whole."""

    message: str


Event = Read | Token | Failed
Emit = Callable[[Event], None]


class Full(Exception):
    """Too many rows wait already."""


class Closed(Exception):
    """No more requests are taken."""


@dataclass(frozen=True)
class Counts:
    """Where a service stands (rows), and what it has done since its start (tokens, steps)."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0  # read, from the cache or not
    generated_tokens: int = 0
    cache_queries: int = 0  # prompt tokens that were looked for in the prefix cache
    cache_hits: int = 0
    cache_bytes: int = 0
    steps: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Of several services together."""
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class PrefixCache:
    """Keys and values of the beginnings of prompts, in whole chunks, up to a limit in bytes; what was used longest ago
    goes first, the end of a prompt before its beginning.

    A chunk is known by all ids up to its end. Its numbers are what reading wrote, so that they have the same bits.
    """

    def __init__(self, chunk: int, limit: int):
        self.chunk, self.limit, self.bytes = chunk, limit, 0
        self.parts: OrderedDict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def fill(self, cache: RowCache, row: int, ids: Sequence[int], start: int) -> int:
        """Writes the chunks that follow `start` into a row as far as they are known; returns where they end. The last
        token is left to be read, since its logits are wanted.
        """
        end = start
        while end + self.chunk < len(ids) and (part := self.parts.get(tuple(ids[: end + self.chunk]))):
            cache.put_back(row, end, part)
            end += self.chunk
        if end > start:
            self.touch(ids, end)
        return end

    def keep(self, cache: RowCache, row: int, ids: Sequence[int], end: int) -> None:
        """Takes a copy of the chunk that ends at `end`, if it is a whole one, is not known, and the limit allows it."""
        key = tuple(ids[:end])
        if not self.limit or end % self.chunk or key in self.parts:
            return
        part = cache.part(row, end - self.chunk, end)
        if size(key, part) > self.limit:
            return
        self.parts[key] = part
        self.bytes += size(key, part)
        self.touch(ids, end)
        while self.bytes > self.limit:
            self.bytes -= size(*self.parts.popitem(last=False))

    def touch(self, ids: Sequence[int], end: int) -> None:
        for border in range(end, 0, -self.chunk):
            if (key := tuple(ids[:border])) in self.parts:
                self.parts.move_to_end(key)


def size(key: tuple[int, ...], part: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of an entry of the cache."""
    return 8 * len(key) + sum(tensor.nbytes for tensor in part)


def tell(logits: torch.Tensor, tokens: Sequence[int], count: int | None) -> list[Told]:
    """What is told of tokens (n,) given the logits (n, V) float32 that each was drawn from."""
    if count is None:
        return [Told(token, None, []) for token in tokens]
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (its.tolist() for its in logprobs.topk(min(count, logprobs.size(1))))
    tops = [list(zip(*its, strict=True)) for its in zip(ids, values, strict=True)]
    return [Told(*its) for its in zip(tokens, own, tops, strict=True)]


class _PromptReading(Reading):
    """What is done while a request's prompt is read: its log-probabilities are told, or the cache is asked."""

    def __init__(self, request: Request, prefixes: PrefixCache):
        self.request, self.prefixes, self.cached = request, prefixes, 0
        self.told: list[Told] | None = None
        if request.echo and request.logprobs is not None:
            self.told, self.see = [Told(request.prompt[0], None, [])], self.take

    def take(self, logits: torch.Tensor) -> None:
        """The logits after some of the tokens, which tell of those that follow."""
        tokens = self.request.prompt[len(self.told) :][: len(logits)]
        if tokens:
            self.told += tell(logits[: len(tokens)], tokens, self.request.logprobs)

    def skip(self, cache: RowCache, row: int, ids: Sequence[int], start: int) -> int:
        end = start if self.told else self.prefixes.fill(cache, row, ids, start)
        self.cached += end - start
        return end

    def has_read(self, cache: RowCache, row: int, ids: Sequence[int], end: int) -> None:
        self.prefixes.keep(cache, row, ids, end)


@dataclass(eq=False)
class Ticket:
    """A request that was taken; for `Service.cancel`."""

    request: Request
    emit: Emit
    reading: _PromptReading
    unwanted: set[int] = field(default_factory=set)  # its rows that were cancelled
    began: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds in the queue
    is_read: bool = False


class Service:
    """A thread that computes what is submitted, in the rows of one decoder.

    engine: of compiled.prepare, for that many rows, at least 2, since a row alone is rounded in its own way.
    vocab_size: ids from there on are neither taken nor drawn. max_queue: rows that may wait beyond those that run.
    cache_bytes: the limit of the prefix cache. chunk: tokens of a prompt that are read in a round.

    Events are given to a request's `emit` in the computing thread: it must not block. One that raises has its request
    cancelled. Where the engine raises, all that runs has failed, and the thread goes on with what waits.
    """

    def __init__(self, engine, rows: int, vocab_size: int, max_queue: int, cache_bytes: int, chunk: int = CHUNK):
        if rows < 2:
            raise ValueError(f"a service has at least 2 rows, not {rows}")
        self.rows, self.vocab_size, self.max_queue = rows, vocab_size, max_queue
        self.block_size = engine.model.config.block_size
        self.decoder = Decoder(engine, rows, self.block_size, vocab_size, chunk)
        self.prefixes = PrefixCache(chunk, cache_bytes)
        self.changed = threading.Condition()  # of what follows; `running` is written by the thread alone
        self.waiting: deque[Ticket] = deque()
        self.running: dict[int, tuple[Ticket, int]] = {}  # by the decoder's row, the request's
        self.totals = dict.fromkeys(("prompt_tokens", "generated_tokens", "cache_queries", "cache_hits", "steps"), 0)
        self.is_draining = self.is_closed = self.is_idle = False
        threads.give_back()
        self.thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="serving", daemon=True)
        self.thread.start()

    # What other threads call

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Has a request computed. Raises ValueError for one that can't be, Full where the queue is, Closed."""
        if problems := self._problems(request):
            raise ValueError("; ".join(problems))
        ticket = Ticket(request, emit, _PromptReading(request, self.prefixes))
        with self.changed:
            self._check_room(len(request.seeds))
            self.waiting.append(ticket)
            self.changed.notify_all()
        return ticket

    def check_room(self, rows: int = 1) -> None:
        """Raises Full or Closed where a request of so many rows would be refused now."""
        with self.changed:
            self._check_room(rows)

    def cancel(self, ticket: Ticket, row: int | None = None) -> None:
        """Ends a request, or one of its rows, before the next step; events that were on their way may still come. What
        is over already is left alone.
        """
        with self.changed:
            ticket.unwanted.update(range(len(ticket.request.seeds)) if row is None else [row])
            if ticket in self.waiting and len(ticket.unwanted) == len(ticket.request.seeds):
                self.waiting.remove(ticket)

    def counts(self) -> Counts:
        """Where the service stands now."""
        with self.changed:
            return Counts(len(self.running), self._rows_waiting(), cache_bytes=self.prefixes.bytes, **self.totals)

    def drain(self, seconds: float) -> bool:
        """Takes no more requests, and waits for those that were taken; returns whether all are over in that time."""
        with self.changed:
            self.is_draining = True
            return self.changed.wait_for(lambda: self.is_closed or (self.is_idle and not self.waiting), seconds)

    def close(self) -> None:
        """Takes no more requests, fails those that are not over, ends the thread, and lets go of the model."""
        with self.changed:
            self.is_draining = self.is_closed = True
            self.changed.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _rows_waiting(self) -> int:
        return sum(len(ticket.request.seeds) for ticket in self.waiting)

    def _check_room(self, rows: int) -> None:
        if self.is_draining:
            raise Closed("the server is shutting down")
        if len(self.running) + self._rows_waiting() + rows > self.rows + self.max_queue:
            raise Full(f"the queue is full: {self._rows_waiting()} texts wait, and {len(self.running)} are written")

    def _problems(self, request: Request) -> list[str]:
        """Why a request can't be computed, one line each."""
        length, new, rows = len(request.prompt), request.max_new_tokens, len(request.seeds)
        last = self.vocab_size - 1
        rules = [
            (length > 0, "the prompt must hold at least one token"),
            (all(0 <= i <= last for i in request.prompt), f"token ids must be from 0 to {last}"),
            (new >= (not request.echo), f"max_new_tokens must be at least 1, or 0 with echo, not {new}"),
            (length + new <= self.block_size, f"{length} + {new} tokens do not fit in {self.block_size}"),
            (0 < rows <= self.rows, f"{rows} texts of a prompt, where from 1 to {self.rows} are possible"),
            (all(seed in SEEDS for seed in request.seeds), "seeds must fit in 64 bits"),
            (request.logprobs is None or request.logprobs >= 0, f"logprobs must be at least 0, not {request.logprobs}"),
        ]
        return [problem for holds, problem in rules if not holds] + request.sampling.problems()

    # The computing thread

    def _run(self, count: int) -> None:
        torch.set_num_threads(count)  # OpenMP counts them for each thread of Python
        if self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)
        while self._await_work():
            try:
                self._drop_unwanted()
                self._admit()
                self._tell(self.decoder.step(chunks=1))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self._fail(f"the engine failed: {type(error).__name__}: {error}")
        self._fail("the server is shutting down", with_waiting=True)
        # Whoever counts may hold on to the rest
        self.decoder, self.prefixes = None, PrefixCache(self.prefixes.chunk, 0)

    def _await_work(self) -> bool:
        """Sleeps while there is nothing to do; returns False at the end."""
        with self.changed:
            while not (self.running or self.waiting or self.is_closed):
                self.is_idle = True
                self.changed.notify_all()
                self.changed.wait()
            self.is_idle = False
            return not self.is_closed

    def _drop_unwanted(self) -> None:
        with self.changed:
            for row, (ticket, its_row) in [*self.running.items()]:
                if its_row in ticket.unwanted:
                    self.decoder.release(row)
                    del self.running[row]

    def _admit(self) -> None:
        """Takes from the queue, in its order, what fits into free rows."""
        refused = []
        with self.changed:
            while self.waiting and len(self.waiting[0].request.seeds) <= self.rows - len(self.running):
                ticket = self.waiting.popleft()
                ticket.waited = time.monotonic() - ticket.began
                its, new = ticket.request, max(1, ticket.request.max_new_tokens)
                try:
                    rows = self.decoder.admit(its.prompt, its.seeds, new, its.sampling, its.stop_ids, ticket.reading)
                except Exception as error:
                    refused.append((ticket, Failed(f"{type(error).__name__}: {error}")))
                else:
                    self.running |= {row: (ticket, n) for n, row in enumerate(rows)}
        for ticket, failed in refused:
            self._emit(ticket, failed)

    def _tell(self, drawn: list[Drawn]) -> None:
        """Emits what a step has drawn: all of it, or none where something raises."""
        of_ticket: dict[Ticket, list[tuple[int, Drawn]]] = {}
        for one in drawn:
            ticket, its_row = self.running[one.row]
            of_ticket.setdefault(ticket, []).append((its_row, one))
        events = [(ticket, event) for ticket, its in of_ticket.items() for event in self._events(ticket, its)]
        with self.changed:
            for one in drawn:
                if one.end:
                    del self.running[one.row]
            self._count(events)
        for ticket, event in events:
            if not isinstance(event, Token) or event.row not in ticket.unwanted:
                self._emit(ticket, event)

    def _events(self, ticket: Ticket, drawn: list[tuple[int, Drawn]]) -> list[Event]:
        """What a request is told of the tokens that were drawn for its rows."""
        request, reading, events = ticket.request, ticket.reading, []
        if not ticket.is_read:
            if not drawn[0][1].logits.isfinite().all():
                self.cancel(ticket)
                return [Failed(NOT_FINITE)]
            ticket.is_read = True
            events.append(Read(reading.told, reading.cached, ticket.waited))
        if request.max_new_tokens:
            logits = None if request.logprobs is None else torch.stack([one.logits for _, one in drawn])
            told = tell(logits, [one.token for _, one in drawn], request.logprobs)
            events += [Token(row, its, one.end) for (row, one), its in zip(drawn, told, strict=True)]
        return events

    def _count(self, events: list[tuple[Ticket, Event]]) -> None:
        totals = self.totals
        totals["steps"] += bool(events)
        for ticket, event in events:
            if isinstance(event, Token):
                totals["generated_tokens"] += 1
            elif isinstance(event, Read):
                length = len(ticket.request.prompt)
                totals["prompt_tokens"] += length
                totals["cache_queries"] += 0 if event.prompt else length
                totals["cache_hits"] += event.cached_tokens

    def _emit(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.emit(event)
        except Exception:  # whoever asked is gone
            self.cancel(ticket)

    def _fail(self, message: str, with_waiting: bool = False) -> None:
        """Ends all that runs."""
        self.decoder.clear()
        with self.changed:
            failed = dict.fromkeys(ticket for ticket, _ in self.running.values())
            self.running.clear()
            if with_waiting:
                failed |= dict.fromkeys(self.waiting)
                self.waiting.clear()
        for ticket in failed:
            if len(ticket.unwanted) < len(ticket.request.seeds):
                self._emit(ticket, Failed(message))
