"""The OpenAPI document beside what quartz/api.py reads and answers, and quartz/http.py routes."""

import pytest

from quartz import api, openapi
from quartz.api import ApiError
from quartz.tokenizer import BPETokenizer, CharTokenizer

http, gate = pytest.importorskip("quartz.http"), pytest.importorskip("quartz.gate")

TOKENS = BPETokenizer.of_merges([b"th", b"the"], "gpt4")
SERVED = api.Served("tiny", TOKENS, block_size=64, rows=api.MAX_CHOICES, max_queue=8, fingerprint="fp_1")
PATHS = openapi.document()["paths"]
MEANS = {
    "/v1/completions": (api.completion, {"prompt": "the", "seed": 1}),
    "/tokenize": (api.tokenize, {"prompt": "the"}),
    "/detokenize": (api.detokenize, {"tokens": [97]}),
}


def schema(path: str) -> dict:
    return PATHS[path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def fields(path: str) -> dict[str, dict]:
    return schema(path)["properties"]


class Reads(dict):
    """A body that notes which of its fields are looked for."""

    def __init__(self, *its):
        super().__init__(*its)
        self.names: set[str] = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)


@pytest.mark.parametrize("path", MEANS)
def test_each_field_that_is_read_is_told_of_and_no_other(path):
    means, body = MEANS[path]
    reads = Reads(body)
    means(reads, SERVED)
    assert reads.names == {*fields(path)}


def test_the_options_of_a_stream_are_told_of():
    (_, options) = (kind for kind in fields("/v1/completions")["stream_options"]["anyOf"][::-1])
    assert [*options["properties"]] == ["include_usage"]
    for value in (True, False):
        asked = api.completion({"prompt": "a", "stream": True, "stream_options": {"include_usage": value}}, SERVED)
        assert asked.include_usage == value


def test_each_route_is_told_of_with_its_method():
    site = http.Site(lambda: None, "", set(), 1.0)
    routes = {route.path.replace(":path", ""): route.methods - {"HEAD"} for route in site.app().app.routes}
    assert routes == {path: {method.upper() for method in its} for path, its in PATHS.items()}
    assert {path for path, its in PATHS.items() for way in its.values() if way.get("security") == []} == {*gate.OPEN}


@pytest.mark.parametrize("path", MEANS)
def test_defaults_are_what_is_done_without_a_field(path):
    means, body = MEANS[path]
    expected = means(body, SERVED)
    for name, its in fields(path).items():
        if "default" in its and name not in body:
            assert means({**body, name: its["default"]}, SERVED) == means({**body, name: None}, SERVED) == expected


def limits(its: dict):
    """Values of a field that are just within its limits, and just outside."""
    step = 1 if "integer" in its["type"] else 1e-9
    for side, way in (("minimum", 1), ("maximum", -1)):
        if side in its:
            yield its[side], its[side] - way * step
        if (bound := its.get(f"exclusive{side.capitalize()}")) is not None:
            yield bound + way * max(abs(bound), 1) * 1e-9, bound


NUMBERS = {name: its for name, its in fields("/v1/completions").items() if "type" in its and name != "best_of"}


@pytest.mark.parametrize(
    ("name", "within", "outside"), [(name, *pair) for name, its in NUMBERS.items() for pair in limits(its)]
)
def test_limits_are_those_that_are_kept(name, within, outside):
    body = {"prompt": "the", "echo": True}
    api.completion({**body, name: within}, SERVED)
    with pytest.raises(ApiError) as error:
        api.completion({**body, name: outside}, SERVED)
    assert error.value.status == 400 and error.value.param == name


def test_lengths_are_those_that_are_kept():
    stop, stops, _ = fields("/v1/completions")["stop"]["anyOf"]
    _, prompts, ids, lists, _ = fields("/v1/completions")["prompt"]["anyOf"]
    assert stops["items"] == stop and stop["minLength"] == prompts["minItems"] == ids["minItems"] == 1
    for name, values in {
        "stop": ("a" * stop["maxLength"], ["a"] * stops["maxItems"]),
        "prompt": (["a"] * prompts["maxItems"], [[97]] * lists["maxItems"]),
    }.items():
        for value in values:
            api.completion({"prompt": "a", name: value}, SERVED)
            with pytest.raises(ApiError) as error:
                api.completion({"prompt": "a", name: value + value[:1]}, SERVED)
            assert error.value.param == name
            with pytest.raises(ApiError):
                api.completion({"prompt": "a", name: value[:0] or [""]}, SERVED).encode(SERVED)


@pytest.mark.parametrize("name", api.NOT_DONE)
def test_what_is_not_done_is_refused_but_for_the_values_that_change_nothing(name):
    for value in fields("/v1/completions")[name]["enum"]:
        api.completion({"prompt": "a", name: value}, SERVED)
    for value in (1, "x", {"1": 2}, True, False, []):
        with pytest.raises(ApiError) as error:
            api.completion({"prompt": "a", name: value}, SERVED)
        assert error.value.param == name


def test_a_model_without_a_token_that_ends_a_text_wants_a_prompt():
    served = api.Served("tiny", CharTokenizer(["a", "b"]), block_size=64, rows=2, max_queue=8, fingerprint="fp_1")
    with pytest.raises(ApiError, match="prompt is missing"):
        api.completion({}, served)
