"""Rows that come and go: texts that are continued side by side, each with its own sampling, seed, stops and length.

Read it to see how the next token is chosen, or to serve texts that arrive while others are written. An engine
(compiled.prepare makes one) computes the logits; a Decoder decides which rows it reads and steps, and draws.

A text, and the logits that it is drawn from, depend on its own prompt, sampling and seed, on the engine and on the
size of a chunk; not on what stands in the other rows, nor on which row it is: on CPUs bit for bit, where the step is
compiled; where it is not, in float32, among decoders of two rows and more. (A single row takes quicker products there,
which round otherwise.)
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

NUMBERS = 64  # random numbers that are drawn in one go
CHUNK = 256  # tokens of a prompt that are read in one go
NOT_FINITE = "the model's logits are not finite: its weights are damaged, or too large for this dtype"
TOGETHER = 32  # tokens up to which prompts are read side by side
READ_COST = 32  # tokens that could be read in the time that it takes to begin, which is that of reading the weights


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits, in the order of the fields."""

    repetition_penalty: float = 1.0  # logits of tokens already in the text: divided if positive, else multiplied
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # keeps the k likeliest tokens; 0 or None keeps all
    top_p: float = 1.0  # keeps the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keeps tokens at least this likely, relative to the likeliest

    def problems(self) -> list[str]:
        """What is out of range, one line each."""
        rules = [
            (1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty must be from 1e-6 to 1e6 (1 is off)"),
            (0 <= self.temperature < math.inf, "temperature must be 0 (greedy) or a positive number"),
            (self.top_k is None or self.top_k >= 0, "top_k must be 0 (off) or a positive number"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1 (off)"),
            (0 <= self.min_p <= 1, "min_p must be from 0 (off) to 1"),
        ]
        return [f"{rule}, not {getattr(self, rule.split()[0])}" for holds, rule in rules if not holds]


def draw(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Draws a token a row by inverting the cumulative distribution of what `sampling` leaves.

    logits (B, V) float32, uniform (B,) in [0, 1), seen (B, V) bool, the tokens that are in the text already -> (B,).
    What ties with the last token that is kept is kept too. The repetition penalty is CTRL's (Keskar et al., 2019),
    top_p nucleus sampling (Holtzman et al., 2019), min_p that of Nguyen et al. (2024).
    """
    if seen is not None:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if sampling.top_k:
        threshold = logits.topk(min(sampling.top_k, logits.size(-1)), sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    # The maximum is taken off first: divided by a tiny temperature, the logits themselves would overflow.
    limits = torch.finfo(torch.float32)
    temperature = min(max(sampling.temperature, limits.tiny), limits.max)
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if sampling.top_p < 1:
        ordered = probs.sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1) - ordered  # the mass of what is likelier
        last = (before < sampling.top_p).sum(dim=-1, keepdim=True).clamp(min=1) - 1
        probs = probs.masked_fill(probs < ordered.gather(1, last), 0)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(dim=-1, keepdim=True), 0)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return ((cumulative > point) & (probs > 0)).int().argmax(dim=-1)


class Drawn(NamedTuple):
    """The next token of a row."""

    row: int
    token: int
    logprob: float | None  # the model's, whatever the sampling; None unless it was asked for
    logits: torch.Tensor  # (V,) float32, before sampling; they hold until the next step, with ahead=1
    end: str | None  # "stop" or "length" where this is the row's last token; the row is then free again


class Reading:
    """What a caller does while a prompt of its own is read: nothing, unless it overrides this."""

    see: Callable[[torch.Tensor], None] | None = None  # is given the logits after each token, (n, V) float32 at a time

    def skip(self, cache, row: int, ids: Sequence[int], start: int) -> int:
        """Called before a chunk is read at `start`: may write what it knows of the ids into the row; returns where, at
        a chunk's border, reading goes on.
        """
        return start

    def has_read(self, cache, row: int, ids: Sequence[int], end: int) -> None:
        """Called after a chunk was read up to `end`."""


@dataclass
class _Text:
    """What a row that is in use holds beside its keys and values."""

    ids: list[int]  # the prompt and what was drawn
    left: int  # tokens that are still to be drawn
    sampling: Sampling
    generator: torch.Generator
    stop_ids: frozenset[int]
    seen: torch.Tensor | None  # (V,) bool, the tokens in the text, where there is a penalty for them
    numbers: list[float] = field(default_factory=list)  # random ones, drawn and not used yet
    logits: torch.Tensor | None = None  # (V,), of the token after what was read, until it is drawn


@dataclass
class _Prompt:
    """A prompt that is being read, once for all of its rows; the first of them holds what was read."""

    rows: list[int]
    ids: list[int]
    start: int = 0  # tokens that were read
    reading: Reading = field(default_factory=Reading)


class Decoder:
    """Rows of an engine that are admitted, stepped and released while others run.

    rows: how many there are; length: what a prompt and its continuation come to, at most, for the cache's sake;
    vocab_size: ids from there on are never drawn; chunk: tokens of a prompt that are read in one go, so a prompt's
    borders depend on it alone; ahead: tokens that a step computes before it looks at any, which spares a GPU its waits;
    logprobs: whether these are wanted.

    Each token is drawn given all before it while they fit in block_size. A longer prompt counts by its last block_size
    tokens, and whenever a row's context is full its older half is dropped, so that the cost of a token stays what it
    is: within a half, the context is from half to all of block_size long.
    """

    def __init__(
        self,
        engine,
        rows: int,
        length: int,
        vocab_size: int | None = None,
        chunk: int = CHUNK,
        ahead: int = 1,
        logprobs: bool = False,
    ):
        self.engine, self.cache = engine, engine.new_cache(rows, length)
        self.length, self.block_size, self.vocab_size = length, engine.model.config.block_size, vocab_size
        self.device = engine.model.lm_head.weight.device
        self.chunk, self.ahead, self.logprobs = chunk, ahead, logprobs
        self.texts: list[_Text | None] = [None] * rows
        self.prompts: deque[_Prompt] = deque()  # to be read, in this order

    def free(self) -> list[int]:
        """The rows that nothing is in."""
        return [row for row, text in enumerate(self.texts) if text is None]

    def admit(
        self,
        prompt: Sequence[int],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
        reading: Reading | None = None,
    ) -> list[int]:
        """Puts a prompt, which is read once, into as many free rows as there are seeds; returns them.

        A row draws with its seed, and ends after max_new_tokens, or with the first of stop_ids that it draws. `reading`
        is told of the prompt's chunks. Raises ValueError for an empty prompt, a setting out of range, a text that is
        too long, or too few free rows; then nothing has changed.
        """
        sampling, free = sampling or Sampling(), self.free()
        if problems := sampling.problems():
            raise ValueError("; ".join(problems))
        if not len(prompt) or max_new_tokens < 1:
            raise ValueError("the prompt must hold at least one token, and max_new_tokens be at least 1")
        if len(prompt) + max_new_tokens > self.length < self.block_size:
            raise ValueError(f"{len(prompt)} + {max_new_tokens} tokens do not fit in rows of {self.length}")
        if not 0 < len(seeds) <= len(free):
            raise ValueError(f"{len(seeds)} seeds for {len(free)} free rows")
        rows, prompt, texts = free[: len(seeds)], list(prompt), []
        for seed in seeds:
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.zeros(self.engine.model.config.vocab_size, dtype=torch.bool, device=self.device)
                seen[prompt] = True
            generator = torch.Generator().manual_seed(seed)
            texts.append(_Text([*prompt], max_new_tokens, sampling, generator, frozenset(stop_ids), seen))
        for row, text in zip(rows, texts, strict=True):
            self.texts[row] = text
        self.prompts.append(_Prompt([*rows], prompt[-self.block_size :], reading=reading or Reading()))
        return rows

    def clear(self) -> None:
        """Ends all texts, wherever they are, and whatever state an error has left them in."""
        self.texts = [None] * len(self.texts)
        self.prompts.clear()

    def release(self, row: int) -> None:
        """Ends a row's text, wherever it is."""
        self.texts[row] = None
        for prompt in [p for p in self.prompts if row in p.rows]:
            holds_it = prompt.rows[0] == row
            prompt.rows.remove(row)
            if not prompt.rows:
                self.prompts.remove(prompt)
            elif holds_it:
                self.cache.copy(row, prompt.rows[:1], prompt.start)

    def step(self, chunks: int | None = None) -> list[Drawn]:
        """Reads prompts that wait, as much as takes the time of `chunks` chunks (None: all there is), then draws the
        next token of every row whose prompt was read. Returns what was drawn: a token a row, or with `ahead` several,
        in their order; nothing where no row runs, though with `chunks` some may wait.
        """
        self._refill()
        self._read(math.inf if chunks is None else chunks * (self.chunk + READ_COST))
        rows = self._running()
        if not rows:
            return []
        count = min(self.ahead, *(self._room(row) for row in rows))
        uniform = torch.tensor([self._uniform(row, count) for row in rows]).T.to(self.device)
        tokens, found = None, []
        for n in range(count):
            logits = self._logits(rows, tokens)
            tokens = self._draw(rows, logits, uniform[n])
            its_logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0] if self.logprobs else tokens
            found.append((tokens, its_logprobs, logits))
        return self._tell(rows, found)

    def _refill(self) -> None:
        """Drops the older half of each context that is full."""
        is_full = {row for row, length in enumerate(self.cache.lengths) if length == self.block_size}
        if rows := [row for row in self._running() if row in is_full and self.texts[row].logits is None]:
            kept = [self.texts[row].ids[-max(1, self.block_size // 2) :] for row in rows]
            for row, logits in zip(rows, self.engine.refill(kept, self.cache, rows), strict=True):
                self.texts[row].logits = logits[: self.vocab_size].float()

    def _running(self) -> list[int]:
        """The rows whose prompts were read."""
        reading = {row for prompt in self.prompts for row in prompt.rows}
        return [row for row, text in enumerate(self.texts) if text is not None and row not in reading]

    def _room(self, row: int) -> int:
        """Tokens that can be drawn before the context is full."""
        text = self.texts[row]
        return min(text.left, self.block_size - self.cache.lengths[row] + (text.logits is not None))

    def _uniform(self, row: int, count: int) -> list[float]:
        """Random numbers of a row's own: the same however many of them are taken at a time."""
        text = self.texts[row]
        if text.sampling.temperature == 0:
            return [0.0] * count
        while len(text.numbers) < count:
            text.numbers += torch.rand(NUMBERS, generator=text.generator).tolist()
        numbers, text.numbers = text.numbers[:count], text.numbers[count:]
        return numbers

    def _read(self, left: float) -> None:
        """Reads chunks of the prompts that wait, in their order, while `left` tokens are enough."""
        while self.prompts and left > 0:
            chunks: list[tuple[_Prompt, list[int]]] = []  # short ones are read side by side
            for prompt in self.prompts:
                prompt.start = prompt.reading.skip(self.cache, prompt.rows[0], prompt.ids, prompt.start)
                ids = prompt.ids[prompt.start : prompt.start + self.chunk]
                if chunks and len(ids) > TOGETHER:
                    break
                left -= len(ids) + READ_COST
                if left >= 0:
                    chunks.append((prompt, ids))
                if left < 0 or len(ids) > TOGETHER:
                    break
            self._read_chunks(chunks)

    def _read_chunks(self, chunks: list[tuple[_Prompt, list[int]]]) -> None:
        """Reads the next ids of prompts."""
        parts = []
        for prompt, ids in chunks:
            see = prompt.reading.see and functools.partial(self._see, prompt.reading)
            parts.append((ids, prompt.rows[0], prompt.start, see))
        for (prompt, ids), logits in zip(chunks, self.engine.prefill_all(parts, self.cache), strict=True):
            row, *others = prompt.rows
            prompt.start += len(ids)
            prompt.reading.has_read(self.cache, row, prompt.ids, prompt.start)
            if prompt.start == len(prompt.ids):
                self.prompts.remove(prompt)
                self.cache.copy(row, others, prompt.start)
                for row in prompt.rows:
                    self.texts[row].logits = logits[: self.vocab_size].float()

    def _see(self, reading: Reading, logits: torch.Tensor) -> None:
        reading.see(logits[:, : self.vocab_size].float())

    def _logits(self, rows: list[int], tokens: torch.Tensor | None) -> torch.Tensor:
        """Of the token that follows in each of the rows, (n, V). `tokens` were drawn just before, if any were."""
        waiting = [row for row in rows if self.texts[row].logits is None]
        if tokens is None and waiting:
            tokens = torch.tensor([self.texts[row].ids[-1] for row in waiting], device=self.device)
        stepped = None
        if waiting:
            stepped = self.engine.step(tokens, self.cache, waiting)[:, : self.vocab_size].float()
        if len(waiting) == len(rows):
            return stepped
        of_row = dict(zip(waiting, stepped, strict=True)) if waiting else {}
        for row in rows:
            text = self.texts[row]
            if text.logits is not None:
                of_row[row], text.logits = text.logits, None
        return torch.stack([of_row[row] for row in rows])

    def _draw(self, rows: list[int], logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The next tokens (n,)."""
        texts = [self.texts[row] for row in rows]
        alike: dict[Sampling, list[int]] = {}
        for n, text in enumerate(texts):
            alike.setdefault(text.sampling, []).append(n)
        tokens = torch.empty(len(rows), dtype=torch.long, device=self.device)
        for sampling, its in alike.items():
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([texts[n].seen for n in its])[:, : self.vocab_size]
            if len(alike) == 1:
                tokens = draw(logits, sampling, uniform, seen)
            else:
                tokens[its] = draw(logits[its], sampling, uniform[its], seen)
            if seen is not None:
                for n in its:
                    texts[n].seen.scatter_(0, tokens[n : n + 1], True)
        return tokens

    def _tell(self, rows: list[int], found: list[tuple]) -> list[Drawn]:
        """Notes down what was drawn, and what ended by it; of a row that has ended, what comes later is dropped."""
        all_ids = torch.stack([tokens for tokens, _, _ in found]).tolist()
        all_logprobs = torch.stack([its for _, its, _ in found]).tolist()
        told = []
        for ids, logprobs, (_, _, logits) in zip(all_ids, all_logprobs, found, strict=True):
            logits = logits.unbind()
            for n, row in enumerate(rows):
                if (text := self.texts[row]) is None:
                    continue
                text.ids.append(ids[n])
                text.left -= 1
                end = "stop" if ids[n] in text.stop_ids else None if text.left else "length"
                told.append(Drawn(row, ids[n], logprobs[n] if self.logprobs else None, logits[n], end))
                if end:
                    self.texts[row] = None
        return told


def complete(
    engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    **settings,
) -> list[list[int]]:
    """What follows each of the prompts, which draw with their seeds (0, 1, … by default); settings: Decoder's."""
    seeds = range(len(prompts)) if seeds is None else seeds
    decoder = Decoder(engine, len(prompts), max(map(len, prompts)) + max_new_tokens, **settings)
    texts: list[list[int]] = [[] for _ in prompts]
    for prompt, seed in zip(prompts, seeds, strict=True):
        decoder.admit(prompt, [seed], max_new_tokens, sampling)
    while drawn := decoder.step():
        for its in drawn:
            texts[its.row].append(its.token)
    return texts
