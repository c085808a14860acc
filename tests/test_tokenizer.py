import json

import pytest

import tokenizer
from configurator import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer, TextStream


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
