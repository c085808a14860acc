import collections
import json

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configurator import UserError
from quartz import tokenizer
from quartz.tokenizer import PATTERNS, SPECIALS, BPETokenizer, CharTokenizer, GPT2Tokenizer, TextStream


def test_characters_make_the_round_trip_and_are_numbered_in_order():
    chars = CharTokenizer.train("héllo\nworld")
    assert chars.chars == sorted(set("héllo\nworld"))
    again = tokenizer.from_data(json.loads(json.dumps(chars.to_data())))
    assert again.decode(again.encode("hello"[:1] + "é\nw")) == "hé\nw"


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="'x' 'y'"):
        CharTokenizer.train("abc").encode("axyb")


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"type": "word"},
        {"type": "char"},
        {"type": "char", "chars": [1]},
        {"type": "char", "chars": ["a", "a"]},
        {"type": "char", "chars": ["a"], "specials": "<|x|>"},
        {"type": "char", "chars": ["a"], "specials": ["x"]},
        {"type": "char", "chars": ["a"], "specials": ["<|x|>", "<|x|>"]},
        {"type": "bpe"},
        {"type": "bpe", "pattern": "gpt4"},
        {"type": "bpe", "pattern": "(a+)+", "tokens": []},
        {"type": "bpe", "pattern": ["gpt4"], "tokens": []},
        {"type": "bpe", "pattern": "gpt4", "tokens": ["a"]},
        {"type": "bpe", "pattern": "gpt4", "tokens": ["ab", "ab"]},
        {"type": "bpe", "pattern": "gpt4", "tokens": ["a\u0100"]},
        {"type": "bpe", "pattern": "gpt4", "tokens": [["a", "b"]]},
        {"type": "bpe", "pattern": "gpt4", "tokens": [], "specials": [1]},
        3,
    ],
)
def test_data_that_describes_no_tokenizer_is_refused(data):
    with pytest.raises(UserError):
        tokenizer.from_data(data)


def test_gpt2_tokens(gpt2_bpe):
    bpe = tokenizer.from_data(GPT2Tokenizer().to_data())
    assert bpe.encode("Hello world<|endoftext|>", special=True) == [15496, 995, 50256]
    assert bpe.decode(bpe.encode("<|endoftext|>")) == "<|endoftext|>" and 50256 not in bpe.encode("<|endoftext|>")
    assert bpe.decode(bpe.encode("naïve 🙂 日本")) == "naïve 🙂 日本"
    assert all("�" not in bpe.decode(bpe.encode("é🙂日本")[:n]) for n in range(8)), "a character was cut"


def test_missing_gpt2_tokens_are_one_problem(monkeypatch, tmp_path):
    import tiktoken

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


def test_line_ends_become_newlines_and_a_byte_order_mark_goes():
    assert tokenizer.decode_text(b"\xef\xbb\xbfa\r\nb\rc\n", "x") == "a\nb\nc\n"


def streamed(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    return [stream.feed(i) for i in ids] + [stream.finish()], stream.is_done


@pytest.mark.parametrize(
    ("stops", "text", "done"),
    [
        ([], "abcabd", False),
        (["abd"], "abc", True),  # the first "ab" was held back, and given out with the c
        (["bd", "ca"], "ab", True),
        (["x"], "abcabd", False),
        (["dx"], "abcabd", False),  # held back to the end, and given out there
        (["a"], "", True),
        (["abcab", "c"], "ab", True),  # the c is complete first, wherever the tokens end
    ],
)
def test_a_text_ends_before_a_stop_also_across_tokens(stops, text, done):
    chars = CharTokenizer.train("abcdx")
    pieces, is_done = streamed(chars, chars.encode("abcabd"), stops)
    assert "".join(pieces) == text and is_done == done


def test_no_piece_ever_shows_a_part_of_a_stop():
    chars = CharTokenizer.train("abc")
    stream, shown = TextStream(chars, ["aab", "ca"]), ""
    for char in "abaaabbb":
        shown += stream.feed(chars.encode(char)[0])
        assert "abaaabbb".startswith(shown) and not shown.endswith("aab")
    assert shown == "aba" and stream.is_done


def test_pieces_are_whole_characters(gpt2_bpe):
    bpe, text = GPT2Tokenizer(), "naïve 🙂🙃 日本語 <|endoftext|>"
    ids = bpe.encode(text)
    pieces, _ = streamed(bpe, ids)
    assert "".join(pieces) == text and len(ids) > len(text) // 2
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(streamed(bpe, bpe.encode("🙂")[:-1])[0]) == ""
    assert "".join(streamed(bpe, ids, ["本語"])[0]) == "naïve 🙂🙃 日"


def test_characters_with_special_tokens():
    chars = tokenizer.from_data(CharTokenizer("abc", ["<|endoftext|>"]).to_data())
    assert chars.vocab_size == 4 and chars.specials == {"<|endoftext|>": 3}
    assert chars.encode("ab<|endoftext|>c", special=True) == [0, 1, 3, 2]
    with pytest.raises(UserError, match="'<'"):
        chars.encode("ab<|endoftext|>c")
    assert chars.decode([0, 3, 1]) == "a<|endoftext|>b" and chars.token_bytes(3) == b"<|endoftext|>"
    assert chars.can_write("<|endoftext|>a") and not chars.can_write("<a")


@given(st.text(st.sampled_from("aé日🙂\ud800\x00"), max_size=30))
def test_characters_give_the_same_ids_as_a_dictionary(text):
    chars = CharTokenizer(["🙂", None, "a", "\ud800", "é", "\x00", "日"])
    ids = {char: i for i, char in enumerate(chars.chars)}
    assert chars.encode(text) == [ids[char] for char in text] and chars.decode(chars.encode(text)) == text


# ----------------------------------------------------------------------------------------------------------------------
# Byte pairs of one's own

TEXT = "".join(f"It's {n} bottles; I'LL drink {n * 37} of them, naïve 日本語 🙂\r\n\n  \tOK?! " for n in range(200))


@pytest.fixture(scope="module", params=[("gpt4", 400), ("gpt2", 400), ("gpt4", 259)], ids=["gpt4", "gpt2", "bytes"])
def bpe(request) -> BPETokenizer:
    pytest.importorskip("tokenizers")
    pattern, size = request.param
    return BPETokenizer.train([TEXT], size, pattern)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text())
@example(text="")
@example(text="\x00\ufeff\u2028<|endoftext|>\x85  \n")
@example(text=" " * 3000 + "a" * 3000)
@example(text=TEXT)
def test_any_text_comes_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and bpe.encode_to_numpy(text).tolist() == ids
    assert all(0 <= i < bpe.vocab_size - len(SPECIALS) for i in ids), "text never becomes a special token"
    assert b"".join(map(bpe.token_bytes, ids)) == text.encode()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.binary() | st.text().map(str.encode))
@example(data=bytes(range(256)) * 2)
@example(data=b"\xed\xa0\x80 \xf0\x9f\x99")
def test_any_bytes_come_back(bpe, data):
    assert bpe.decode_bytes(bpe.encode_bytes(data)) == data


@given(text=st.text())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_text_as_bytes_has_the_ids_of_the_text(bpe, text):
    assert bpe.encode_bytes(text.encode()) == bpe.encode(text)


def test_a_tokenizer_of_ones_own_is_plain_data(bpe):
    again = tokenizer.from_data(json.loads(json.dumps(bpe.to_data())))
    assert again.to_data() == bpe.to_data() and again.encode(TEXT) == bpe.encode(TEXT)
    assert (again.vocab_size, again.specials) == (bpe.vocab_size, bpe.specials)


def test_special_tokens_are_the_last_ones(bpe):
    last = [bpe.vocab_size - 3, bpe.vocab_size - 2, bpe.vocab_size - 1]
    assert [*bpe.specials.items()] == [*zip(SPECIALS, last, strict=True)]
    assert bpe.encode("".join(SPECIALS), special=True) == last
    assert not set(bpe.encode("".join(SPECIALS))) & {*last}
    assert bpe.decode(last) == "".join(SPECIALS)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_training_merges_the_most_frequent_pair_each_time(pattern):
    """Replayed by hand: no pair was more frequent than the one that became the next token."""
    pytest.importorskip("tokenizers")
    words = collections.Counter(word.encode() for word in regex.findall(PATTERNS[pattern], TEXT))
    split = {word: [bytes([byte]) for byte in word] for word in words}
    assert sum(len(word) * count for word, count in words.items()) == len(TEXT.encode())
    tokens = [token.encode("latin-1") for token in BPETokenizer.train([TEXT], 360, pattern).to_data()["tokens"]]
    assert len(tokens) == 360 - 256 - 3
    for token in tokens:
        pairs = collections.Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        made = [pair for pair in pairs if b"".join(pair) == token and pairs[pair] == max(pairs.values())]
        assert made, token
        for word, parts in split.items():
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == made[0]:
                    merged[-1] += part
                else:
                    merged.append(part)
            split[word] = merged


def test_training_is_deterministic(monkeypatch):
    """However the texts come, and on however many cores."""
    pytest.importorskip("tokenizers")
    lines = TEXT.splitlines(keepends=True)
    found = []
    for parallel, texts in (("true", [*lines]), ("false", [*lines]), ("true", [*lines][::-1])):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        found.append(BPETokenizer.train(texts, 380, "gpt4").to_data())
    assert found[0] == found[1] == found[2]


def test_encoding_merges_by_rank(bpe):
    """As a naive loop does it, word by word."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode("latin-1"): 256 + n for n, token in enumerate(bpe.to_data()["tokens"])}
    for word in {*regex.findall(PATTERNS[bpe.to_data()["pattern"]], TEXT)}:
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, place = min((ranks.get(parts[n] + parts[n + 1], 2**30), n) for n in range(len(parts) - 1))
            if rank == 2**30:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        assert bpe.encode(word) == [ranks[part] for part in parts], word


def test_merges_encode_as_ranks_do(bpe):
    """In the tokenizers package, which knows only merges."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {tokenizer.printable(token): i for token, i in bpe.ranks().items()}
    merges = [tuple(map(tokenizer.printable, pair)) for pair in bpe.merges()]
    assert len(merges) == len(vocab) - 256
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pattern = tokenizers.Regex(PATTERNS[bpe.to_data()["pattern"]])
    shown = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, shown])
    assert theirs.encode(TEXT).ids == bpe.encode(TEXT)


def test_merges_of_gpt2_are_those_that_openai_published(gpt2_bpe):
    from tiktoken.load import read_file_cached

    bpe = GPT2Tokenizer()
    published = read_file_cached("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe")
    lines = published.decode().splitlines()[1:]
    assert [" ".join(map(tokenizer.printable, pair)) for pair in bpe.merges()] == lines and len(lines) == 50000


def test_a_token_that_no_two_others_make_has_no_merge():
    bpe = BPETokenizer.of_merges([b"ab", b"xyz", b"abc", b"abab"], "gpt4")
    assert bpe.merges() == [(b"a", b"b"), (b"ab", b"c"), (b"ab", b"ab")]
    assert bpe.encode("xyz") == [257] and len(bpe.encode("xyzx")) == 4


def test_too_little_text_for_the_vocabulary_is_refused():
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match="vocab_size=1000 is more than this text allows"):
        BPETokenizer.train(["abcabc"], 1000, "gpt4")


def test_what_the_texts_raise_while_training_arrives():
    pytest.importorskip("tokenizers")

    def texts():
        yield "abc"
        raise UserError("a bad file")

    with pytest.raises(UserError, match="a bad file"):
        BPETokenizer.train(texts(), 300, "gpt4")


def test_text_shows_whole_characters_of_ones_own_tokens(bpe):
    stream = TextStream(bpe, ["🙂"])
    shown = "".join(stream.feed(i) for i in bpe.encode("日本語 naïve 🙂 more")) + stream.finish()
    assert shown == "日本語 naïve " and stream.is_done
    assert np.array_equal(bpe.encode_to_numpy(""), [])


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n"])
def test_a_million_spaces_are_encoded(bpe, space):
    text = "a" + space * 1_000_000 + "b"
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode_to_numpy(text).tolist()) == text


def test_ids_that_are_free_stand_for_nothing():
    data = {
        "type": "bpe",
        "pattern": "gpt2",
        "vocab": [*map(chr, range(256)), None, None, "th"],
        "specials": {"<|x|>": 256},
    }
    bpe = tokenizer.from_data(data)
    assert bpe.token_bytes(257) == b"" and bpe.decode([258, 257, 101]) == "the"
