"""Text to token ids and back. A tokenizer is plain data, and travels as such in meta.json and in checkpoints.

{"type": "char", "chars": ["\\n", " ", "!", ...]}   one id a character, in this order
{"type": "gpt2"}                                   GPT-2's byte-level BPE, by the tiktoken package
"""

import codecs
from collections.abc import Sequence

from configurator import UserError


class CharTokenizer:
    """One token a character. `chars` lists the characters by id; an id without one holds None."""

    def __init__(self, chars: Sequence[str | None]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars) if char is not None}

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The characters of `text`, sorted, as nanoGPT numbers them."""
        return cls(sorted(set(text)))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Raises UserError that names the characters which have no id. There are no special tokens."""
        try:
            return [self._ids[char] for char in text]
        except KeyError:
            missing = " ".join(repr(char) for char in sorted(set(text) - self._ids.keys()))
            raise UserError(
                f"the tokenizer knows {len(self._ids)} characters, and these are not among them: {missing}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chars[i] or "" for i in ids)

    def token_bytes(self, i: int) -> bytes:
        return (self.chars[i] or "").encode("utf-8", "surrogatepass")

    def can_write(self, text: str) -> bool:
        return set(text) <= self._ids.keys()

    def to_data(self) -> dict:
        return {"type": "char", "chars": self.chars}


class GPT2Tokenizer:
    """GPT-2's 50,257 byte pairs. tiktoken fetches them once, and finds them again in TIKTOKEN_CACHE_DIR."""

    vocab_size = 50257

    def __init__(self):
        import tiktoken

        try:
            self._bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, a proxy or a broken cache raises
            raise UserError(
                f"tiktoken could not fetch GPT-2's tokens ({type(error).__name__}): go online once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds them"
            ) from error

    def encode(self, text: str, special: bool = False) -> list[int]:
        """With `special`, as in a prompt, <|endoftext|> becomes its one id; else it is text like any other."""
        return self._bpe.encode(text, allowed_special={"<|endoftext|>"}) if special else self._bpe.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Invalid UTF-8 shows as U+FFFD; a character whose last bytes are still to come is left out."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bpe.decode_bytes(list(ids)))

    def token_bytes(self, i: int) -> bytes:
        return self._bpe.decode_single_token_bytes(i)

    def can_write(self, text: str) -> bool:
        return True

    def to_data(self) -> dict:
        return {"type": "gpt2"}


Tokenizer = CharTokenizer | GPT2Tokenizer


class TextStream:
    """The text of ids that come one by one, up to whichever of `stops` is complete first; they may span tokens.

    What is given out is final: a character waits for its last byte, and what may be the beginning of a stop waits until
    it is one or is none. `is_done` tells that a stop was met; what comes after it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.is_done = False

    def feed(self, i: int) -> str:
        """Takes the next id; returns the text that is certain now."""
        if self.is_done:
            return ""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(i))
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_done = True
            return self.finish(min(found)[1])
        longest = max(map(len, self._stops), default=0) - 1  # of the beginnings of stops
        tails = (self._held[-n:] for n in range(min(longest, len(self._held)), 0, -1))
        tail = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        text, self._held = self._held[: len(self._held) - len(tail)], tail
        return text

    def finish(self, end: int | None = None) -> str:
        """What was still held back. An incomplete character at the end is left out."""
        text, self._held = self._held[:end], ""
        return text


def check_data(data: object, vocab_size: int | None = None) -> None:
    """Raises UserError where `data` describes no tokenizer, or one that is not of vocab_size; fetches nothing."""
    kind = data.get("type") if isinstance(data, dict) else None
    if kind == "gpt2":
        size = GPT2Tokenizer.vocab_size
    elif kind == "char" and isinstance(data.get("chars"), list) and data["chars"]:
        size, chars = len(data["chars"]), [char for char in data["chars"] if char is not None]
        if not all(isinstance(char, str) and len(char) == 1 for char in chars) or len(set(chars)) < len(chars):
            raise UserError("the tokenizer's chars are not single characters, each of them once")
    else:
        raise UserError(f"the data describes no tokenizer that is known here (type {kind!r})")
    if vocab_size is not None and size > vocab_size:
        raise UserError(f"the tokenizer has {size} tokens, and the vocabulary only {vocab_size}")


def from_data(data: dict) -> Tokenizer:
    """The tokenizer that `to_data` described. Raises UserError for data that describes none."""
    check_data(data)
    return GPT2Tokenizer() if data["type"] == "gpt2" else CharTokenizer(data["chars"])


def decode_text(data: bytes, name: str) -> str:
    """The text of a UTF-8 file, with newlines as line ends. Raises UserError, which calls it `name`, for any other."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error
    if not text:
        raise UserError(f"{name} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")
