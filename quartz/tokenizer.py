"""Text to token ids and back. A tokenizer is plain data, and travels as such in meta.json and in checkpoints.

{"type": "char", "chars": ["\\n", " ", "!", ...]}   one id a character, in this order
{"type": "gpt2"}                                   GPT-2's byte-level BPE, by the tiktoken package
{"type": "bpe", "pattern": "gpt4", "tokens": ["th", " a", ...]}
    a byte-level BPE of one's own: ids 0 to 255 are the bytes, then come these tokens in the order in which they merge,
    each byte written as the character of that number; without any it is a tokenizer of bytes

"specials": ["<|endoftext|>", ...] may stand in the first and in the last; these have the ids after all others.

{"type": "bpe", "pattern": "qwen2", "vocab": ["!", null, ...], "specials": {"<|endoftext|>": 1, ...}}
    one from elsewhere: all tokens by their ids, which are in the order of merging; null where an id is special, or free
"""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from quartz.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")  # of a BPE that is trained here; two wait for chats (ChatML)
LONGEST_SPACE = 10_000  # characters of white space; tiktoken's patterns fail on hundreds of thousands
# How text is split before bytes are merged: in GPT-2, in GPT-4 (OpenAI's tiktoken, cl100k_base) and Llama 3, in Qwen 2
# and 3, and where GPT-2's comes after each digit was set apart (SmolLM).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    r"""|\s+(?!\S)|\s+""",
    "qwen2": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    r"""|\s+(?!\S)|\s+""",
    "smollm": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+""",
}


class CharTokenizer:
    """One token a character. `chars` lists the characters by id; an id without one holds None."""

    def __init__(self, chars: Sequence[str | None], specials: Sequence[str] = ()):
        self.chars = list(chars)
        self.specials = {name: len(self.chars) + i for i, name in enumerate(specials)}
        self.vocab_size = len(self.chars) + len(self.specials)
        self._names = [*self.chars, *self.specials]
        self._ids = {char: i for i, char in enumerate(self.chars) if char is not None}
        self._table = np.full(max(map(ord, self._ids), default=0) + 2, -1, dtype=np.int32)  # the last one: no character
        self._table[[ord(char) for char in self._ids]] = list(self._ids.values())

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The characters of `text`, sorted, as nanoGPT numbers them."""
        return cls(sorted(set(text)))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """With `special`, as in a prompt, <|endoftext|> becomes its one id, if it has one; else it is text.

        Raises UserError that names the characters which have no id.
        """
        if special and self.specials:
            parts = re.split(f"({'|'.join(map(re.escape, self.specials))})", text)
            return [
                i for part in parts for i in ([self.specials[part]] if part in self.specials else self.encode(part))
            ]
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As encode, without special tokens; int32."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if (ids < 0).any():
            missing = " ".join(repr(char) for char in sorted(set(text) - self._ids.keys()))
            raise UserError(f"the tokenizer knows {len(self._ids)} characters, and these are not among them: {missing}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._names[i] or "" for i in ids)

    def token_bytes(self, i: int) -> bytes:
        return (self._names[i] or "").encode("utf-8", "surrogatepass")

    def can_write(self, text: str) -> bool:
        for name in self.specials:
            text = text.replace(name, "")
        return set(text) <= self._ids.keys()

    def to_nanogpt(self) -> dict:
        """What nanoGPT keeps in meta.pkl."""
        return {"vocab_size": self.vocab_size, "itos": dict(enumerate(self._names)), "stoi": self._ids}

    def to_data(self) -> dict:
        return {"type": "char", "chars": self.chars, **({"specials": [*self.specials]} if self.specials else {})}


class BPETokenizer:
    """Byte pairs, merged by the tiktoken package. Any text and any bytes have ids, and come back as they were."""

    def __init__(self, vocab: Sequence[bytes | None], pattern: str, specials: dict[str, int]):
        """vocab: the tokens by id, in the order in which they merge. pattern: one of PATTERNS."""
        import tiktoken

        self._vocab, self.pattern, self.specials = list(vocab), pattern, specials
        self.vocab_size = max(len(self._vocab), max(specials.values(), default=-1) + 1)
        self._bpe = tiktoken.Encoding(
            "bpe", pat_str=PATTERNS[pattern], mergeable_ranks=self.ranks(), special_tokens=specials
        )

    @classmethod
    def of_merges(cls, tokens: Sequence[bytes], pattern: str, specials: Sequence[str] = SPECIALS) -> "BPETokenizer":
        """One of our own: the 256 bytes, then `tokens` in the order in which they merge, then the special ones."""
        vocab = [*(bytes([byte]) for byte in range(256)), *tokens]
        return cls(vocab, pattern, {name: len(vocab) + i for i, name in enumerate(specials)})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str) -> "BPETokenizer":
        """Merges the pairs that are most frequent in `texts` until there are vocab_size tokens, special ones included.

        The same texts give the same tokens. Training is the tokenizers package's (the extra `data`). Raises UserError
        where the texts hold too few pairs.
        """
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        room = vocab_size - len(SPECIALS)
        by_pattern = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
        shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # each byte as a printable character
        trainee = tokenizers.Tokenizer(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, shown])
        trainer = trainers.BpeTrainer(
            vocab_size=room, initial_alphabet=shown.alphabet(), show_progress=False, special_tokens=[]
        )
        trainee.train_from_iterator(texts, trainer)
        vocab = trainee.get_vocab()
        if len(vocab) < room:
            raise UserError(
                f"vocab_size={vocab_size} is more than this text allows: it has pairs for "
                f"{len(vocab) + len(SPECIALS)} tokens"
            )
        byte_of = printable_bytes()
        tokens = [bytes(byte_of[char] for char in token) for token in sorted(vocab, key=vocab.__getitem__)]
        return cls.of_merges([token for token in tokens if len(token) > 1], pattern)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """With `special`, as in a prompt, the names of special tokens become their ids; else they are text."""
        allowed = set(self.specials) if special else set()
        found = self._in_parts(
            lambda part: self._bpe.encode(part, allowed_special=allowed, disallowed_special=()), text
        )
        return found[0] if len(found) == 1 else [i for ids in found for i in ids]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As encode, without special tokens; uint32. Other threads can run meanwhile."""
        found = self._in_parts(lambda part: self._bpe.encode_to_numpy(part, disallowed_special=()), text)
        return found[0] if len(found) == 1 else np.concatenate(found)

    @staticmethod
    def _in_parts(encode: Callable, text: str) -> list:
        """What `encode` makes of the text; of its parts, where white space is too long for tiktoken's patterns."""
        try:
            return [encode(text)]
        except ValueError:
            parts = re.split(rf"(\s{{{LONGEST_SPACE}}})", text)
            if len(parts) == 1:
                raise
            return [encode(part) for part in parts if part]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes. What is no UTF-8 is encoded byte by byte."""
        parts = re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape"))
        encoded = [
            self.encode(part) if n % 2 == 0 else [self._bpe.encode_single_token(bytes([ord(part) - 0xDC00]))]
            for n, part in enumerate(parts)
        ]
        return [i for ids in encoded for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Invalid UTF-8 shows as U+FFFD; a character whose last bytes are still to come is left out."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self.decode_bytes(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        try:
            return self._bpe.decode_bytes(list(ids))
        except KeyError:  # an id that is free
            return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, i: int) -> bytes:
        """Nothing for an id that is free."""
        try:
            return self._bpe.decode_single_token_bytes(i)
        except KeyError:
            return b""

    def can_write(self, text: str) -> bool:
        return True

    def ranks(self) -> dict[bytes, int]:
        """The ids of all but special tokens, in the order in which they merge."""
        return {token: i for i, token in enumerate(self._vocab) if token is not None}

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The two parts of which each token is made, in order: what its bytes come to by the merges before its own."""
        ranks, found = self.ranks(), []
        for token, rank in ranks.items():
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                made, place = min((ranks.get(parts[n] + parts[n + 1], rank), n) for n in range(len(parts) - 1))
                if made >= rank:  # no merges lead to it: it stands only for a piece that is just this
                    break
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            if len(parts) == 2:
                found.append((parts[0], parts[1]))
        return found

    def to_data(self) -> dict:
        shown, first = [token and token.decode("latin-1") for token in self._vocab], [*map(chr, range(256))]
        data = {"type": "bpe", "pattern": self.pattern}
        after = {name: len(shown) + i for i, name in enumerate(self.specials)}
        if shown[:256] == first and None not in shown and self.specials == after:
            return data | {"tokens": shown[256:], "specials": list(self.specials)}
        return data | {"vocab": shown, "specials": self.specials}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's 50,257 byte pairs. tiktoken fetches them once, and finds them again in TIKTOKEN_CACHE_DIR."""

    vocab_size, pattern = 50257, "gpt2"

    def __init__(self):
        import tiktoken

        self.specials = {END_OF_TEXT: self.vocab_size - 1}
        try:
            self._bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network, a proxy or a broken cache raises
            raise UserError(
                f"tiktoken could not fetch GPT-2's tokens ({type(error).__name__}): go online once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds them"
            ) from error

    def ranks(self) -> dict[bytes, int]:
        return {self.token_bytes(i): i for i in range(self.vocab_size - 1)}

    def to_data(self) -> dict:
        return {"type": "gpt2"}


Tokenizer = CharTokenizer | BPETokenizer


def printable(data: bytes) -> str:
    """Bytes as other BPEs write their tokens: one character of GPT-2's printable alphabet each."""
    return data.decode("latin-1").translate(_PRINTABLE)


def printable_bytes() -> dict[str, int]:
    """The byte that each character of GPT-2's printable alphabet stands for: printable ones of Latin-1 are themselves,
    the rest are numbered on from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(moved)}


_PRINTABLE = {byte: char for char, byte in printable_bytes().items()}


class TextStream:
    """The text of ids that come one by one, up to whichever of `stops` is complete first; they may span tokens.

    What is given out is final: a character waits for its last byte, and what may be the beginning of a stop waits until
    it is one or is none. `is_done` tells that a stop was met; what comes after it is ignored. `decoded` counts
    characters, those that wait included. The text begins with the rest of the character that `before` begins, in bytes.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: bytes = b""):
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(before)
        self._held, self.decoded = "", 0
        self.is_done = False

    def feed(self, i: int) -> str:
        """Takes the next id; returns the text that is certain now."""
        if self.is_done:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(i))
        self.decoded += len(text)
        self._held += text
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
    elif kind == "bpe" and data.get("pattern") in [*PATTERNS] and isinstance(data.get("tokens"), list):
        _check_tokens(data["tokens"], 2)
        size = 256 + len(data["tokens"])
    elif kind == "bpe" and data.get("pattern") in [*PATTERNS] and isinstance(data.get("vocab"), list):
        vocab, specials = data["vocab"], data.get("specials")
        _check_tokens([token for token in vocab if token is not None], 1)
        if sum(token is not None and len(token) == 1 for token in vocab) < 256:
            raise UserError("the tokenizer has no token for some bytes")
        ids = list(specials.values()) if isinstance(specials, dict) else [None]
        if not all(type(i) is int and 0 <= i < 2**24 for i in ids):
            raise UserError("the tokenizer's special tokens have no ids")
        if len(set(ids)) < len(ids) or any(i < len(vocab) and vocab[i] is not None for i in ids):
            raise UserError("the tokenizer has two tokens of one id")
        size = max(len(vocab), max(ids, default=-1) + 1) - len(ids)
    else:
        raise UserError(f"the data describes no tokenizer that is known here (type {kind!r})")
    if kind != "gpt2":
        specials = data.get("specials", [])
        names = list(specials) if isinstance(specials, list | dict) else [None]
        if not all(isinstance(name, str) and len(name) > 1 for name in names) or len(set(names)) < len(names):
            raise UserError(
                "the tokenizer's special tokens are not names of two characters and more, each of them once"
            )
        if isinstance(specials, dict) and "vocab" not in data:
            raise UserError("the tokenizer's special tokens are no list")
        size += len(names)
    if vocab_size is not None and size > vocab_size:
        raise UserError(f"the tokenizer has {size} tokens, and the vocabulary only {vocab_size}")


def _check_tokens(tokens: list, shortest: int) -> None:
    of_bytes = all(isinstance(token, str) and len(token) >= shortest and max(token) < "\u0100" for token in tokens)
    if not of_bytes or len(set(tokens)) < len(tokens):
        raise UserError(f"the tokenizer's tokens are not strings of {shortest} bytes and more, each of them once")


def from_data(data: dict) -> Tokenizer:
    """The tokenizer that `to_data` described. Raises UserError for data that describes none."""
    check_data(data)
    if data["type"] == "gpt2":
        return GPT2Tokenizer()
    if data["type"] == "char":
        return CharTokenizer(data["chars"], data.get("specials", []))
    if "tokens" in data:
        tokens = [token.encode("latin-1") for token in data["tokens"]]
        return BPETokenizer.of_merges(tokens, data["pattern"], data.get("specials", []))
    vocab = [token if token is None else token.encode("latin-1") for token in data["vocab"]]
    return BPETokenizer(vocab, data["pattern"], data["specials"])


def read_text(path: str | Path, what: str) -> str:
    """The text of a file. Raises UserError, which begins with `what`, where that can't be read or is no UTF-8."""
    try:
        return decode_text(Path(path).expanduser().read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


def decode_text(data: bytes, name: str) -> str:
    """The text of a UTF-8 file, with newlines as line ends. Raises UserError, which calls it `name`, for any other."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error
    if not text:
        raise UserError(f"{name} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")
