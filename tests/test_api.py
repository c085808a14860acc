"""What a client's JSON means, and what it is told, without a server."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartz import api
from quartz.api import ApiError
from quartz.decoder import Sampling
from quartz.serving import Failed, Read, Service, Token, Told
from quartz.tokenizer import BPETokenizer, CharTokenizer

BYTES = BPETokenizer.of_merges([b"th", b"the", "日".encode()[:2]], "gpt4")  # ids 256, 257, 258; then <|endoftext|>
END = BYTES.specials["<|endoftext|>"]
SERVED = api.Served("tiny", BYTES, block_size=64, rows=4, max_queue=8, fingerprint="fp_1")


def asked(**body) -> api.Asked:
    return api.completion({"prompt": "the", **body}, SERVED)


def refused(**body) -> ApiError:
    with pytest.raises(ApiError) as found:
        asked(**body).encode(SERVED)
    return found.value


def told(token: int, logprob: float | None = -1.0, *top: tuple[int, float]) -> Told:
    return Told(token, logprob, list(top))


def written(tokens: list[int], end: str = "length", **body) -> tuple[api.Answer, list[int]]:
    """The answer to a request for which these are drawn, and after how many of them a row was to be cancelled."""
    its = asked(max_tokens=len(tokens), **body)
    answer = api.Answer(its, its.encode(SERVED), SERVED)
    answer.take(0, Read(None, 0, 0.0))
    ended = [len(tokens) == n + 1 and end or None for n in range(len(tokens))]
    stops = [n + 1 for n, i in enumerate(tokens) if answer.take(0, Token(0, told(i), ended[n]))]
    return answer, stops


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


def test_defaults_are_openais():
    its = asked()
    (request,) = its.encode(SERVED)
    assert request.prompt == [257] and len(request.seeds) == 1
    assert request.max_new_tokens == 16 and request.sampling == Sampling(top_k=0)
    assert request.stop_ids == {END} and request.logprobs is None and not request.echo
    assert (its.stops, its.stream, its.include_usage) == ([], False, False)


def test_null_is_the_default():
    names = "model max_tokens n stop temperature top_p logprobs stream stream_options echo top_k min_p suffix user"
    (request,) = asked(**dict.fromkeys([*names.split(), "repetition_penalty", "best_of"]), seed=3).encode(SERVED)
    assert asked(seed=None).seeds.start < 2**32
    (other,) = asked(seed=3).encode(SERVED)
    assert request == other


def test_every_setting_of_sampling_arrives():
    settings = {"repetition_penalty": 1.5, "temperature": 0, "top_k": 7, "top_p": 0.5, "min_p": 0.25}
    assert asked(**settings).sampling == Sampling(1.5, 0.0, 7, 0.5, 0.25)
    assert not asked(top_k=-1).sampling.top_k


def test_row_k_draws_with_seed_plus_k_for_every_prompt():
    requests = asked(prompt=["a", "b"], n=3, seed=40).encode(SERVED)
    assert [request.seeds for request in requests] == [[40, 41, 42]] * 2
    assert asked().seeds != asked().seeds  # without one, each request has another
    assert asked(seed=-5).seeds == range(-5, -4)


def test_prompts_are_a_text_texts_ids_or_lists_of_ids():
    def ids(prompt):
        return [request.prompt for request in asked(prompt=prompt).encode(SERVED)]

    assert ids("the<|endoftext|>") == [[257, END]]
    assert ids(["the", "a"]) == [[257], [97]]
    assert ids([257, 97]) == [[257, 97]]
    assert ids([[257], [97, 98]]) == [[257], [97, 98]]
    assert ids(None) == [[END]]


def test_a_model_without_an_end_of_text_needs_a_prompt():
    served = api.Served("tiny", CharTokenizer("ab"), 64, 4, 8, "fp")
    with pytest.raises(ApiError, match="prompt"):
        api.completion({}, served)
    assert api.completion({"prompt": "ab"}, served).stop_ids == frozenset()
    with pytest.raises(ApiError, match="'z'"):
        api.completion({"prompt": "az"}, served).encode(served)


def test_the_end_of_text_ends_a_text_unless_told_otherwise():
    assert asked(stop_token_ids=[5]).stop_ids == {5, END}
    assert asked(ignore_eos=True).stop_ids == set()


def test_what_does_not_fit_says_maximum_context_length():
    for body in (
        {"prompt": "a" * 64},
        {"prompt": [97] * 65},
        {"prompt": "the", "max_tokens": 64},
        {"prompt": "the", "max_tokens": 2**62},
        {"prompt": "a" * 10**7},
    ):
        error = refused(**body)
        assert (error.status, error.code) == (400, "context_length_exceeded")
        assert "maximum context length is 64 tokens" in str(error)
    assert asked(prompt="the", max_tokens=63).encode(SERVED)
    # By default no more is asked for than fits
    assert asked(prompt="a" * 60).encode(SERVED)[0].max_new_tokens == 4


def test_a_text_that_can_not_fit_is_never_encoded(monkeypatch):
    monkeypatch.setattr(BPETokenizer, "encode", lambda *a, **k: pytest.fail("encoded"))
    longest = max(len(BYTES.token_bytes(i)) for i in range(BYTES.vocab_size))
    assert refused(prompt="a" * (64 * longest + 1)).code == "context_length_exceeded"


def test_no_new_tokens_is_for_echo_alone():
    assert refused(max_tokens=0).param == "max_tokens"
    (request,) = asked(max_tokens=0, echo=True).encode(SERVED)
    assert request.max_new_tokens == 0 and request.echo
    (request,) = asked(max_tokens=1, echo=True, logprobs=1).encode(SERVED)
    assert request.max_new_tokens == 1 and request.echo and request.logprobs == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (True, 0, -1, 5, 1.0, "2", [1], 10**30)),
        *(("max_tokens", value) for value in (True, -1, 1.5, "x", {})),
        *(("temperature", value) for value in (True, -0.1, "1", math.inf, 10**400)),
        *(("top_p", value) for value in (0, 1.1, False)),
        *(("min_p", value) for value in (-0.1, 2)),
        *(("top_k", value) for value in (-2, 1.5, True)),
        *(("repetition_penalty", value) for value in (0, -1, 1e9)),
        *(("logprobs", value) for value in (-1, 21, True, 1.0)),
        *(("seed", value) for value in (True, 0.5, 2**63, "1")),
        *(("stop", value) for value in ("", [""], [1], ["a"] * 33, "a" * 257, {}, ["\ud800"])),
        *(("stop_token_ids", value) for value in ([-1], [True], [BYTES.vocab_size], "a")),
        *(("echo", value) for value in (1, "true")),
        *(("stream", value) for value in (1, "true")),
        *(("stream_options", value) for value in ({}, [], True)),
        *(("prompt", value) for value in ([], "", [[]], [""], [True], [-1], [BYTES.vocab_size], [1, "a"], ["a", [1]])),
        *(("prompt", value) for value in ({}, 1, [1.0], [[True]], [{}], "\ud800", ["a"] * 129, [None])),
        *(("suffix", value) for value in ("x", 1)),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 1),
        ("best_of", 2),
        ("model", 5),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_name(name, value):
    error = refused(**{name: value})
    assert (error.status, error.param) == (400, name)
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}
    assert name in str(error) and len(str(error)) < 500 and "\n" not in str(error)


def test_n_times_prompts_has_a_limit():
    assert asked(prompt=["a"] * 6, n=2).choices() == 12
    assert refused(prompt=["a"] * 5, n=3).param == "n"


def test_the_models_name_is_compared():
    assert asked(model="tiny")
    error = refused(model="../../etc/passwd")
    assert (error.status, error.code) == (404, "model_not_found")


def test_unknown_fields_and_those_that_change_nothing_are_ignored():
    assert asked(user="me", whatever=[1], presence_penalty=0, frequency_penalty=0.0, logit_bias={}, suffix="")


FIELDS = (
    "model prompt max_tokens n seed temperature top_p top_k min_p repetition_penalty stop stop_token_ids logprobs echo"
)
FIELDS += " stream stream_options best_of suffix logit_bias presence_penalty ignore_eos return_token_ids"
PLAIN = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    PLAIN, lambda its: st.lists(its, max_size=4) | st.dictionaries(st.text(max_size=3), its, max_size=2)
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=5), st.sampled_from([{}, {"prompt": "the"}]))
def test_whatever_is_not_refused_can_be_computed(body, more):
    service = SimpleNamespace(vocab_size=BYTES.vocab_size, block_size=64, rows=4)
    try:
        requests = api.completion(api.read_json(json.dumps({**body, **more}).encode()), SERVED).encode(SERVED)
    except ApiError as error:
        assert error.status in (400, 404) and json.dumps(error.body())
    else:
        assert requests and [problem for its in requests for problem in Service._problems(service, its)] == []


def test_a_chat_is_refused_with_the_reason():
    with pytest.raises(ApiError, match="no chat tokens") as error:
        api.chat({"messages": [{"role": "user", "content": "hi"}]}, SERVED)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"1", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b"[" * 10**6, b'{"a":' * 10**5]
    + [b'{"a": ' + b"9" * 10**5 + b"}", b"\xef\xbb\xbf{}"],
)
def test_a_body_that_is_no_object_is_refused(data):
    with pytest.raises(ApiError) as error:
        api.read_json(data)
    assert error.value.status == 400 and len(str(error.value)) <= 200


# ----------------------------------------------------------------------------------------------------------------------
# What is answered


def test_an_answer_has_openais_fields():
    answer, _ = written([97, 98], prompt="the a")
    whole = answer.whole()
    assert whole["id"].startswith("cmpl-") and whole["object"] == "text_completion" and whole["model"] == "tiny"
    assert whole["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]
    assert whole["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_token_that_ends_a_text_is_told_of_and_is_no_part_of_it():
    answer, _ = written([97, END], "stop", logprobs=0)
    (choice,) = answer.whole()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "<|endoftext|>"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_that_spans_tokens_and_its_row_is_cancelled(stream):
    answer, stops = written([97, 257, 98, 99, 100], stop=["heb", "zzz"], stream=stream)
    (choice,) = answer.whole()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("at", "stop")
    assert stops == [3] and answer.usage()["completion_tokens"] == 3


def test_a_stop_in_the_last_token_is_a_stop():
    answer, stops = written([97, 98], stop="b")
    assert answer.whole()["choices"][0]["finish_reason"] == "stop" and stops == []


def test_chunks_come_to_the_whole_and_hold_no_part_of_a_character_or_of_a_stop():
    tokens = [97, 258, 0xA5, *"é".encode(), 257, 120, 121]
    its = asked(max_tokens=9, stop="hexy", logprobs=0, stream=True)
    answer = api.Answer(its, its.encode(SERVED), SERVED)
    chunks, texts = [], []
    answer.take(0, Read(None, 0, 0.0))
    for i in tokens:
        answer.take(0, Token(0, told(i), None))
        if chunk := answer.chunk():
            chunks.append(chunk)
            texts.append(chunk["choices"][0]["text"])
    assert texts == ["a", "", "日", "", "é", "t", "", ""] and answer.is_over()
    assert {chunk["id"] for chunk in chunks} == {answer.head["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 7 + ["stop"]
    assert answer.chunk() is None
    whole, _ = written(tokens, stop="hexy", logprobs=0)
    (choice,) = whole.whole()["choices"]
    assert choice["text"] == "".join(texts) == "a日ét"
    for name, its in choice["logprobs"].items():
        assert its == [one for chunk in chunks for one in chunk["choices"][0]["logprobs"][name]], name


def test_a_prompt_of_ids_that_ends_within_a_character_is_continued_there():
    first, last = [258], 0xA5
    answer, _ = written([last, 97], prompt=first)
    assert answer.whole()["choices"][0]["text"] == "日a"
    answer, _ = written([last, 97], prompt=[97, *first], echo=True)
    assert answer.whole()["choices"][0]["text"] == "a日a"


def test_echo_puts_the_prompt_before_the_text_and_its_numbers_before_theirs():
    its = asked(prompt="the日a", echo=True, logprobs=1, max_tokens=1)
    answer = api.Answer(its, its.encode(SERVED), SERVED)
    prompt = [told(257, None), told(258, -2.0, (97, -0.5)), told(0xA5, -1.5, (0xA5, -1.5)), told(97, -0.5, (97, -0.5))]
    assert [entry.token for entry in prompt] == answer.requests[0].prompt
    assert answer.chunk() is None  # not before it was read
    answer.take(0, Read(prompt, 0, 0.0))
    answer.take(0, Token(0, told(END, -3.0, (98, -0.1)), "stop"))
    (choice,) = answer.whole()["choices"]
    assert choice["text"] == "the日a"
    assert choice["logprobs"] == {
        "tokens": ["the", "bytes:\\xe6\\x97", "bytes:\\xa5", "a", "<|endoftext|>"],
        "token_logprobs": [None, -2.0, -1.5, -0.5, -3.0],
        "top_logprobs": [
            None,
            {"a": -0.5, "bytes:\\xe6\\x97": -2.0},
            {"bytes:\\xa5": -1.5},
            {"a": -0.5},
            {"b": -0.1, "<|endoftext|>": -3.0},
        ],
        "text_offset": [0, 3, 3, 4, 5],
    }


def test_a_stop_in_the_prompt_ends_nothing():
    answer, _ = written([97, 98], prompt="the end", echo=True, stop="end")
    assert answer.whole()["choices"][0]["text"] == "the endab"


def test_of_tokens_that_are_spelled_alike_the_likelier_counts():
    tokens = CharTokenizer(["a", "b", None, None])
    served = api.Served("tiny", tokens, 64, 4, 8, "fp")
    its = api.completion({"prompt": "a", "logprobs": 3, "max_tokens": 1}, served)
    answer = api.Answer(its, its.encode(served), served)
    answer.take(0, Read(None, 0, 0.0))
    answer.take(0, Token(0, told(3, -5.0, (0, -0.5), (2, -1.0), (1, -math.inf)), "length"))
    assert answer.whole()["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5, "": -1.0, "b": -9999.0}]
    json.dumps(answer.whole(), allow_nan=False)


def test_a_prompt_alone_is_over_once_it_is_read():
    its = asked(max_tokens=0, echo=True, n=2)
    answer = api.Answer(its, its.encode(SERVED), SERVED)
    assert not answer.is_over()
    answer.take(0, Read(None, 0, 0.0))
    assert answer.is_over()
    assert [(c["text"], c["finish_reason"]) for c in answer.whole()["choices"]] == [("the", "length")] * 2


def test_choices_are_numbered_by_prompt_and_then_by_row():
    its = asked(prompt=["a", "b"], n=2, max_tokens=1, echo=True)
    answer = api.Answer(its, its.encode(SERVED), SERVED)
    for which in (1, 0):
        answer.take(which, Read(None, 5, 0.0))
        for row in (1, 0):
            answer.take(which, Token(row, told(48 + row), "length"))
    assert [(c["index"], c["text"]) for c in answer.whole()["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer.usage()["prompt_tokens"] == 2 and answer.usage()["completion_tokens"] == 4
    assert answer.usage()["prompt_tokens_details"]["cached_tokens"] == 10


def test_usage_in_a_stream_is_null_until_the_last_chunk():
    answer, _ = written([97], stream=True, stream_options={"include_usage": True})
    assert answer.chunk()["usage"] is None
    last = answer.last_chunk()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 1
    answer, _ = written([97], stream=True)
    assert "usage" not in answer.chunk() and answer.last_chunk() is None


def test_token_ids_are_told_where_they_are_wanted():
    answer, _ = written([97, 98], return_token_ids=True)
    (choice,) = answer.whole()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([257], [97, 98])


def test_a_text_of_the_wrong_kind_is_refused_beside_another_too():
    with pytest.raises(ApiError) as error:
        api.tokenize({"content": "the", "prompt": 5}, SERVED)
    assert error.value.param == "prompt"
    assert api.tokenize({"content": None, "prompt": "the"}, SERVED)["tokens"] == [257]


def test_a_request_that_failed_is_an_error():
    its = asked()
    with pytest.raises(ApiError, match="broken") as error:
        api.Answer(its, its.encode(SERVED), SERVED).take(0, Failed("it is broken"))
    assert error.value.status == 500 and error.value.body()["error"]["type"] == "server_error"


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def test_texts_and_ids_by_the_names_of_both_servers():
    assert api.tokenize({"prompt": "the日"}, SERVED) == {
        "count": 3,
        "max_model_len": 64,
        "tokens": [257, 258, 0xA5],
        "token_strs": None,
    }
    assert api.tokenize({"content": "the", "add_special": True}, SERVED)["tokens"] == [257]
    assert api.tokenize({"prompt": "the", "return_token_strs": True}, SERVED)["token_strs"] == ["the"]
    assert api.tokenize({"content": "the", "with_pieces": True}, SERVED)["tokens"] == [{"id": 257, "piece": "the"}]
    assert api.detokenize({"tokens": [257, 258, 0xA5, END]}, SERVED)["prompt"] == "the日<|endoftext|>"
    assert api.detokenize({"tokens": []}, SERVED)["content"] == ""
    info = api.tokenizer_info(SERVED)
    assert (info["eos_token"], info["eos_token_id"], info["chat_template"]) == ("<|endoftext|>", END, None)


@pytest.mark.parametrize(
    ("function", "body"),
    [
        (api.tokenize, {}),
        (api.tokenize, {"prompt": 5}),
        (api.tokenize, {"prompt": "\udc00"}),
        (api.tokenize, {"messages": []}),
        (api.detokenize, {}),
        (api.detokenize, {"tokens": [10**9]}),
        (api.detokenize, {"tokens": [True]}),
        (api.detokenize, {"tokens": "a"}),
    ],
)
def test_what_is_no_text_or_no_ids_is_refused(function, body):
    with pytest.raises(ApiError) as error:
        function(body, SERVED)
    assert error.value.status == 400
