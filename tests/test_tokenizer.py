import json

import pytest

import tokenizer
from configurator import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer


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
