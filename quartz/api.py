"""What a client's JSON asks for, and what it is told: plain data to Requests, and their events to answers, by OpenAI's
names.

Read it when a field is refused, or answered otherwise than you expect. It knows nothing of HTTP, which quartz/http.py
does, nor of how a text comes about, which quartz/serving.py does.
"""

import codecs
import json
import math
import secrets
import time
import uuid
from dataclasses import dataclass

from quartz.decoder import Sampling
from quartz.errors import UserError
from quartz.serving import Event, Failed, Read, Request, Told
from quartz.tokenizer import END_OF_TEXT, TextStream, Tokenizer

MAX_CHOICES = 128  # n times the number of prompts
MAX_LOGPROBS = 20  # likeliest tokens that are told of each
MAX_STOPS, MAX_STOP = 32, 256  # strings, and characters in each
MAX_TOKENS = 16  # by default, as OpenAI has it
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
WHOLE = 2**63  # whole numbers stay below
MAX_NUMBER = 1e300
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
NO_CHAT = "this model has no chat tokens, so there is no way to write a conversation for it: use /v1/completions"
# Fields of OpenAI's that would change the answer, with the values at which they don't
NOT_DONE = {"suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0}


class ApiError(Exception):
    """What a client is told in place of an answer: an HTTP status, and OpenAI's object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Served:
    """The model, as clients see it."""

    name: str
    tokens: Tokenizer
    block_size: int  # tokens of a prompt and its continuation
    rows: int  # texts that are written at once
    max_queue: int  # texts that may wait beside these
    fingerprint: str  # of all that decides about bits; the same after a restart
    created: int = 0  # seconds since 1970

    def __post_init__(self):
        data = [self.tokens.token_bytes(i) for i in range(self.tokens.vocab_size)]
        self.longest, self.spellings = max(map(len, data)), [spell(its) for its in data]  # in bytes; as texts

    @property
    def end(self) -> int | None:
        """The token that ends a text."""
        return self.tokens.specials.get(END_OF_TEXT)


# ----------------------------------------------------------------------------------------------------------------------
# Fields


def read_json(data: bytes) -> dict:
    """The object that a body holds. Raises ApiError for anything else, NaN and what is nested too deep included."""
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}"[:200]) from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be an object, not {_kind(body)}")
    return body


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _kind(value: object) -> str:
    return KINDS.get(type(value), "null")


def _of_kind(body: dict, name: str, *kinds: type):
    """A field of one of these kinds; None where it is missing, or null."""
    value = body.get(name)
    if value is not None and type(value) not in kinds:
        raise ApiError(400, f"{name} must be {KINDS[kinds[0]]}, not {_kind(value)}", name)
    return value


def _whole(body: dict, name: str, default: int | None, least: int, most: int) -> int | None:
    value = _of_kind(body, name, int)
    if value is not None and not least <= value <= most:
        raise ApiError(400, f"{name} must be from {least} to {most}", name)
    return default if value is None else value


def _number(body: dict, name: str, default: float) -> float:
    value = _of_kind(body, name, float, int)
    if value is not None and not abs(value) < MAX_NUMBER:
        raise ApiError(400, f"{name} is too large a number", name)
    return default if value is None else float(value)


def _flag(body: dict, name: str) -> bool:
    return bool(_of_kind(body, name, bool))


def _text(value: str, name: str) -> str:
    """Raises ApiError for half a surrogate pair, which JSON can write, and no text can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{name} holds half a surrogate pair at character {error.start}", name) from error
    return value


def _ids(value: list, name: str, served: Served) -> list[int]:
    size = served.tokens.vocab_size
    if not all(type(i) is int and 0 <= i < size for i in value):
        raise ApiError(400, f"{name} must hold token ids, whole numbers from 0 to {size - 1}", name)
    return value


def check_model(body: dict, served: Served) -> None:
    """The name is compared, never opened."""
    name = _of_kind(body, "model", str)
    if name not in (None, served.name):
        raise not_found(name, served)


def not_found(name: str, served: Served) -> ApiError:
    return ApiError(404, f"the model {name[:200]!r} is not here: {served.name!r} is", "model", "model_not_found")


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


@dataclass(frozen=True)
class Asked:
    """A request for completions: checked, but for the prompts' lengths, which are known once they are encoded."""

    prompts: list[str | list[int]]
    seeds: range  # of each prompt's choices
    max_tokens: int | None
    sampling: Sampling
    stops: list[str]
    stop_ids: frozenset[int]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    token_ids: bool
    ids_as_tokens: bool

    def choices(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def encode(self, served: Served) -> list[Request]:
        """A Request for each prompt. It may take a second. Raises ApiError for a text that does not fit, or that the
        tokenizer lacks characters of."""
        return [self.request(encode(prompt, served), served) for prompt in self.prompts]

    def request(self, ids: list[int], served: Served) -> Request:
        room = served.block_size - len(ids)
        wanted = min(MAX_TOKENS, max(room, 1)) if self.max_tokens is None else self.max_tokens
        if wanted > room:
            raise too_long(served, f"{len(ids)} in the prompt and {wanted} to be written")
        wants_prompt = self.echo and (self.logprobs is not None or not wanted)
        return Request(
            prompt=ids,
            seeds=list(self.seeds),
            max_new_tokens=wanted,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            logprobs=self.logprobs,
            echo=wants_prompt,
        )


def too_long(served: Served, told: str) -> ApiError:
    message = f"This model's maximum context length is {served.block_size} tokens, and you asked for {told}."
    return ApiError(400, message, "prompt", "context_length_exceeded")


def encode(prompt: str | list[int], served: Served) -> list[int]:
    """The ids of a prompt, in which the names of special tokens are these. Raises ApiError for one that is empty, or
    certainly too long, before it is looked at."""
    length = len(prompt) if isinstance(prompt, list) else math.ceil(len(prompt.encode()) / served.longest)
    if length > served.block_size:
        raise too_long(served, f"{'' if isinstance(prompt, list) else 'more than '}{length} in the prompt")
    ids = prompt if isinstance(prompt, list) else encode_text(prompt, "prompt", served)
    if not ids:
        raise ApiError(400, "prompt must hold at least one token", "prompt")
    return ids


def encode_text(text: str, name: str, served: Served) -> list[int]:
    try:
        return served.tokens.encode(text, special=True)
    except UserError as error:
        raise ApiError(400, f"{name}: {error}"[:500], name) from error


def completion(body: dict, served: Served) -> Asked:
    """What the body of /v1/completions asks for. Raises ApiError for what is missing, out of range, or not done here.

    Fields that are not known are ignored.
    """
    check_model(body, served)
    for name, off in NOT_DONE.items():
        if body.get(name) not in (None, off) or body.get(name) is False:  # which is 0, for Python
            raise ApiError(400, f"{name} is not supported here: leave it out", name)
    prompts, n = _prompts(body.get("prompt"), served), _n(body, served)
    if len(prompts) * n > (most := min(MAX_CHOICES, served.rows + served.max_queue)):
        raise ApiError(400, f"n times the number of prompts must be at most {most}, not {len(prompts) * n}", "n")
    seed, echo, stream = _whole(body, "seed", None, -WHOLE, WHOLE - 1), _flag(body, "echo"), _flag(body, "stream")
    first = secrets.randbelow(2**32) if seed is None else seed
    return Asked(
        prompts=prompts,
        seeds=range(first, first + n),
        max_tokens=_max_tokens(body, echo),
        sampling=_sampling(body),
        stops=_stops(body),
        stop_ids=_stop_ids(body, served),
        logprobs=_whole(body, "logprobs", None, 0, MAX_LOGPROBS),
        echo=echo,
        stream=stream,
        include_usage=_include_usage(body, stream),
        token_ids=_flag(body, "return_token_ids"),
        ids_as_tokens=_flag(body, "return_tokens_as_token_ids"),
    )


def _prompts(value: object, served: Served) -> list[str | list[int]]:
    """Of a text, texts, ids or lists of ids; a prompt that is missing is the beginning of a text."""
    if value is None and served.end is not None:
        return [[served.end]]
    if value is None:
        raise ApiError(400, "prompt is missing: no token of this model's begins a text by itself", "prompt")
    if isinstance(value, str):
        return [_text(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"prompt must be a text, texts, token ids or lists of them, not {_kind(value)}", "prompt")
    if type(value[0]) is int:
        return [_ids(value, "prompt", served)]
    if len(value) > MAX_CHOICES:
        raise ApiError(400, f"there may be {MAX_CHOICES} prompts at once, not {len(value)}", "prompt")
    if all(isinstance(prompt, str) for prompt in value):
        return [_text(prompt, "prompt") for prompt in value]
    if all(isinstance(prompt, list) for prompt in value):
        return [_ids(prompt, "prompt", served) for prompt in value]
    raise ApiError(400, "prompt must hold texts alone, token ids alone, or lists of token ids alone", "prompt")


def _n(body: dict, served: Served) -> int:
    n = _whole(body, "n", 1, 1, served.rows)
    if _whole(body, "best_of", n, 1, WHOLE) != n:
        raise ApiError(400, "best_of is not supported here: leave it out, or let it be n", "best_of")
    return n


def _max_tokens(body: dict, echo: bool) -> int | None:
    wanted = _whole(body, "max_tokens", None, 0, WHOLE)
    if wanted == 0 and not echo:
        raise ApiError(400, "max_tokens must be at least 1; it may be 0 with echo", "max_tokens")
    return wanted


def _sampling(body: dict) -> Sampling:
    sampling = Sampling(
        repetition_penalty=_number(body, "repetition_penalty", 1.0),
        temperature=_number(body, "temperature", 1.0),
        top_k=max(_whole(body, "top_k", 0, -1, WHOLE), 0),  # -1 is off too
        top_p=_number(body, "top_p", 1.0),
        min_p=_number(body, "min_p", 0.0),
    )
    for problem in sampling.problems():
        raise ApiError(400, problem, problem.split()[0])
    return sampling


def _stops(body: dict) -> list[str]:
    value = _of_kind(body, "stop", str, list)
    stops = value if isinstance(value, list) else [] if value is None else [value]
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops):
        raise ApiError(400, f"stop must be up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters", "stop")
    return [_text(stop, "stop") for stop in stops]


def _stop_ids(body: dict, served: Served) -> frozenset[int]:
    own = [] if _flag(body, "ignore_eos") or served.end is None else [served.end]
    return frozenset([*_ids(_of_kind(body, "stop_token_ids", list) or [], "stop_token_ids", served), *own])


def _include_usage(body: dict, stream: bool) -> bool:
    options = _of_kind(body, "stream_options", dict)
    if options is not None and not stream:
        raise ApiError(400, "stream_options is for stream=true alone", "stream_options")
    return _flag(options or {}, "include_usage")


def chat(body: dict, served: Served) -> Asked:
    """What the body of /v1/chat/completions asks for. Raises ApiError: no model here has chat tokens yet."""
    check_model(body, served)
    raise ApiError(400, NO_CHAT, "messages", "no_chat_tokens")


# ----------------------------------------------------------------------------------------------------------------------
# What is answered


def spell(data: bytes) -> str:
    """A token as a text; one of parts of characters by its bytes, as in bytes:\\xe2\\x82."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Choice:
    """One text of an answer. What is new in it can be taken at any time; taken at the end, it is all there is."""

    def __init__(self, index: int, prompt: list[int], asked: Asked, served: Served):
        self.index, self.prompt, self.asked, self.served = index, prompt, asked, served
        decoder, self.offsets, text = codecs.getincrementaldecoder("utf-8")("replace"), [], ""
        for i in prompt:
            self.offsets.append(len(text))
            text += decoder.decode(served.tokens.token_bytes(i))
        self.start = len(text) if asked.echo else 0  # characters before the first that was drawn
        self.stream = TextStream(served.tokens, asked.stops, decoder.getstate()[0])
        self.text = text if asked.echo else ""
        self.told: list[tuple[int, Told]] = []  # with the character at which the token begins
        self.drawn: list[int] = []
        self.end: str | None = None
        self.is_read = self.is_told = False  # whether the prompt was, and the end

    def read(self, prompt: list[Told] | None) -> None:
        self.is_read = True
        if self.asked.echo and prompt is not None:
            self.told += zip(self.offsets, prompt, strict=True)

    def take(self, told: Told, end: str | None) -> None:
        """Adds a token, which may be the last. The token that ends a text is no part of it."""
        self.told.append((self.start + self.stream.decoded, told))
        self.drawn.append(told.token)
        if end != "stop":
            self.text += self.stream.feed(told.token)
        if end:
            self.text += self.stream.finish()
        self.end = "stop" if self.stream.is_done else end

    def news(self) -> dict | None:
        """What is new, as clients are told it; None for nothing."""
        shows_tokens = self.asked.logprobs is not None or self.asked.token_ids
        has_ended = self.end is not None and not self.is_told
        if not self.is_read or not (self.text or has_ended or (shows_tokens and self.told)):
            return None
        news = {"index": self.index, "text": self.text, "logprobs": None, "finish_reason": self.end}
        if self.asked.logprobs is not None:
            news["logprobs"] = self.logprobs()
        if self.asked.token_ids:
            news |= {"prompt_token_ids": self.prompt, "token_ids": self.drawn}
        self.text, self.told, self.drawn, self.is_told = "", [], [], self.end is not None
        return news

    def logprobs(self) -> dict:
        """Of the new tokens. Where two of the likeliest are spelled alike, the likelier counts."""
        told = [its for _, its in self.told]
        return {
            "tokens": [self.spell(its.token) for its in told],
            "token_logprobs": [_finite(its.logprob) for its in told],
            "top_logprobs": [self.top(its) for its in told],
            "text_offset": [offset for offset, _ in self.told],
        }

    def spell(self, i: int) -> str:
        return f"token_id:{i}" if self.asked.ids_as_tokens else self.served.spellings[i]

    def top(self, told: Told) -> dict[str, float] | None:
        if told.logprob is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in [*told.top, (told.token, told.logprob)]:
            name = self.spell(i)
            found[name] = max(_finite(logprob), found.get(name, LEAST_LOGPROB))
        return found


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, LEAST_LOGPROB)


class Answer:
    """A completion that grows with the events of its requests."""

    def __init__(self, asked: Asked, requests: list[Request], served: Served):
        self.asked, self.requests, n = asked, requests, len(asked.seeds)
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        prompts = [request.prompt for request in requests for _ in range(n)]
        self.choices = [Choice(k, prompt, asked, served) for k, prompt in enumerate(prompts)]
        self.cached_tokens = self.drawn_tokens = 0

    def of(self, which: int) -> list[Choice]:
        """The choices of a request."""
        n = len(self.asked.seeds)
        return self.choices[which * n : which * n + n]

    def take(self, which: int, event: Event) -> bool:
        """Takes an event of a request. Returns whether a string has ended a row whose tokens go on. Raises ApiError
        where the request has failed."""
        if isinstance(event, Failed):
            raise ApiError(500, event.message)
        if isinstance(event, Read):
            self.cached_tokens += event.cached_tokens
            for choice in self.of(which):
                choice.read(event.prompt)
                choice.end = None if self.requests[which].max_new_tokens else "length"
            return False
        choice = self.of(which)[event.row]
        if choice.end:
            return False
        self.drawn_tokens += 1
        choice.take(event.told, event.end)
        return choice.end is not None and event.end is None

    def is_over(self) -> bool:
        return all(choice.end for choice in self.choices)

    def usage(self) -> dict:
        prompt = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.drawn_tokens,
            "total_tokens": prompt + self.drawn_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def whole(self) -> dict:
        """All of it, once it is over."""
        return {**self.head, "choices": [choice.news() for choice in self.choices], "usage": self.usage()}

    def chunk(self) -> dict | None:
        """What is new since the last chunk; None for nothing."""
        choices = [news for choice in self.choices if (news := choice.news())]
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self.head, "choices": choices, **usage} if choices else None

    def last_chunk(self) -> dict | None:
        return {**self.head, "choices": [], "usage": self.usage()} if self.asked.include_usage else None


# ----------------------------------------------------------------------------------------------------------------------
# The model and its tokenizer


def model(served: Served) -> dict:
    its = {"id": served.name, "object": "model", "created": served.created, "owned_by": "quartzgpt"}
    return its | {"max_model_len": served.block_size, "system_fingerprint": served.fingerprint}


def tokenize(body: dict, served: Served) -> dict:
    """vLLM's names (prompt, return_token_strs) and llama.cpp's (content, with_pieces)."""
    check_model(body, served)
    if body.get("messages") is not None:
        raise ApiError(400, NO_CHAT, "messages", "no_chat_tokens")
    texts = {name: _of_kind(body, name, str) for name in ("content", "prompt")}
    name, text = next((its for its in texts.items() if its[1] is not None), ("prompt", None))
    if text is None:
        raise ApiError(400, "prompt is missing, the text to be encoded", "prompt")
    ids = encode_text(_text(text, name), name, served)
    shows = _flag(body, "return_token_strs")
    told = {"count": len(ids), "max_model_len": served.block_size, "tokens": ids}
    if _flag(body, "with_pieces"):
        told["tokens"] = [{"id": i, "piece": served.spellings[i]} for i in ids]
    return told | {"token_strs": [served.spellings[i] for i in ids] if shows else None}


def detokenize(body: dict, served: Served) -> dict:
    """The text by vLLM's name, and by llama.cpp's."""
    check_model(body, served)
    ids = _of_kind(body, "tokens", list)
    if ids is None:
        raise ApiError(400, "tokens is missing, the ids to be decoded", "tokens")
    text = served.tokens.decode(_ids(ids, "tokens", served))
    return {"prompt": text, "content": text}


def vocabulary(served: Served) -> dict:
    """What each id stands for: a text, or its bytes where these are no whole characters."""
    data = [served.tokens.token_bytes(i) for i in range(served.tokens.vocab_size)]
    texts = [its.decode(errors="ignore") for its in data]
    return {"tokens": [text if text.encode() == its else [*its] for text, its in zip(texts, data, strict=True)]}


def tokenizer_info(served: Served) -> dict:
    """What evaluation programs ask of a tokenizer that is not theirs."""
    end = None if served.end is None else END_OF_TEXT
    return {
        "tokenizer_class": type(served.tokens).__name__,
        "vocab_size": served.tokens.vocab_size,
        "model_max_length": served.block_size,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        "eos_token_id": served.end,
        "special_tokens": served.tokens.specials,
        "chat_template": None,
    }
