"""The page, in a real browser, as people use it: tests/server.py's models behind it, or a stand-in that misbehaves."""

import contextlib
import dataclasses
import http.server
import itertools
import json
import math
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from conftest import ROOT, program
from server import END, TOKENS, Server, served, until, write_model

from model import GPT, GPTConfig
from quartz import checkpoint
from quartz.tokenizer import BPETokenizer, CharTokenizer

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.clients
AXE = [
    Path(os.environ.get("QUARTZGPT_NODE_MODULES", ROOT / "tests" / "npm" / "node_modules"), "axe-core", "axe.min.js")
]
PAGE = (ROOT / "quartz" / "page.html").read_bytes()
BEGINNING = "In the beginning"
DONE = re.compile("^Written")
STEPS = (0.5, 0.25, 0.1, 0.03, 0.01)  # where the legend says that a colour ends


@pytest.fixture(scope="module")
def browser():
    chromium = program("chromium", "chromium-browser", "google-chrome")
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as its:
        browser = its.chromium.launch(executable_path=chromium, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    yield from served(folder)


@pytest.fixture
def opens(browser):
    """Opens a page in a browser that has nothing of it yet. Whatever a test does: nobody else is asked for anything, no
    script fails, and nothing is refused by the page's own Content-Security-Policy."""
    contexts, requests, problems = [], [], []

    def open_page(url: str, **settings):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
        context.set_default_timeout(20000)
        page = context.new_page()
        page.on("request", lambda request: requests.append((urlsplit(url).netloc, request)))
        page.on("pageerror", lambda error: problems.append(error.stack))
        page.on("console", lambda its: "Content Security Policy" in its.text and problems.append(its.text))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        contexts.append(context)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    asked = [(host, urlsplit(request.url)) for host, request in requests]
    assert not [its for host, its in asked if its.scheme != "data" and its.netloc != host]
    assert not problems


def write(page, text: str | None = None, key: str = "Control+Enter", **settings) -> str:
    """Has the page write on after a text, and returns what there is then."""
    if text is not None:
        page.fill("#text", text)
    for name, value in settings.items():
        page.fill(f"[name={name}]", str(value))
    page.press("#text", key)
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#status")).to_have_text(DONE)
    return page.input_value("#text")


def tokens(page, text: str = "doc") -> list[dict]:
    """The tokens of the document, as the page's script has them."""
    return page.evaluate(f"{text}.tokens")


def known(page) -> list[dict]:
    """Once the page has read all of them."""
    until(lambda: page.evaluate("!doc.rest && doc.tokens.length > 0 && doc.tokens.every(isKnown)"), 20)
    return tokens(page)


def ids(page) -> list[int]:
    return [its["id"] for its in tokens(page)]


def ask(server, **body) -> dict:
    response = server.post(
        **{"logprobs": 5, "return_tokens_as_token_ids": True, "temperature": 0.8, "top_k": 200} | body
    )
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def numbered(its: dict[str, float]) -> list[list]:
    return [[int(name.removeprefix("token_id:")), value] for name, value in its.items()]


# ----------------------------------------------------------------------------------------------------------------------
# One document


def test_the_page_shows_the_numbers_and_the_text_of_the_api(opens, server):
    page = opens(server.url)
    text = write(page, BEGINNING, max_tokens=40, seed=7)
    prompt = TOKENS.encode(BEGINNING)
    answer = ask(server, prompt=BEGINNING, max_tokens=40, seed=7, echo=True)["logprobs"]
    read = ask(server, prompt=ids(page), max_tokens=0, echo=True)[
        "logprobs"
    ]  # which differs from the drawn's by rounding
    for key in ("token_logprobs", "top_logprobs"):
        answer[key][: len(prompt)] = read[key][: len(prompt)]
    shown = known(page)
    assert [its["id"] for its in shown] == [int(name[9:]) for name in answer["tokens"]] and len(shown) == len(
        prompt
    ) + 40
    assert [its["logprob"] for its in shown] == answer["token_logprobs"]
    assert [its["drawn"] for its in shown] == [False] * len(prompt) + [True] * 40
    for its, top in zip(shown[1:], answer["top_logprobs"][1:], strict=True):
        assert sorted(its["top"]) == sorted(numbered(top))
    assert text.startswith(BEGINNING) and text == "".join(its["piece"] for its in shown)


def test_colours_are_those_of_the_legend(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=40, temperature=3)
    known(page)
    for k, its in enumerate(tokens(page)):
        if not its["piece"] or (k and not tokens(page)[k - 1]["piece"]):
            continue
        p = 1 if its["logprob"] is None else math.exp(its["logprob"])
        wanted = f"b{sum(p < step for step in STEPS)}" + ("" if its["drawn"] else " written")
        assert page.evaluate(f"doc.spans[{k}].className") == wanted
    legend = page.locator("#legend li").all_inner_texts()
    assert legend == ["probability", "≥ 50 %", "≥ 25 %", "≥ 10 %", "≥ 3 %", "≥ 1 %", "less", "written by you"]


def test_the_mirror_lies_under_the_text_letter_by_letter(opens, server):
    """Else colours would stand beside the tokens that they are of."""
    page = opens(server.url)
    write(page, BEGINNING + " of a line that is long enough to be broken, more than once\n\n日本 é\n", max_tokens=200)
    assert page.locator("#mirror").inner_text().rstrip("\u200b\n") == page.input_value("#text").rstrip("\n")
    heights = page.evaluate("[$('text').scrollHeight, $('mirror').scrollHeight, $('text').clientHeight]")
    assert heights[0] == heights[1] == heights[2]


def test_same_seed_same_text_and_another_by_the_button(opens, server):
    page = opens(server.url)
    first = write(page, BEGINNING, max_tokens=60, seed=3)
    assert write(page, key="Control+Shift+Enter") == first
    page.click("#dice")
    expect(page.locator("#stop")).to_be_disabled()
    assert page.input_value("[name=seed]") != "3"
    other = page.input_value("#text")
    assert other != first and other.startswith(BEGINNING)
    assert write(page, key="Control+Shift+Enter", seed=3) == first


def test_writing_goes_on_from_the_end(opens, server):
    page = opens(server.url)
    first = write(page, BEGINNING, max_tokens=20, seed=3)
    before = ids(page)
    second = write(page)
    assert second.startswith(first) and ids(page)[: len(before)] == before and len(ids(page)) == len(before) + 20


def test_an_edit_keeps_the_tokens_before_it_and_their_numbers(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=60, seed=3)
    before = known(page)
    place = len(before) - 20
    offset = len("".join(its["piece"] for its in before[: place + 1]))
    page.evaluate(f"$('text').focus(), $('text').setSelectionRange({offset}, {offset})")
    sent = []
    page.on("request", lambda request: sent.append(request))
    page.keyboard.type("the sea ")
    after = known(page)
    assert after[:place] == before[:place]
    assert page.input_value("#text")[offset:].startswith("the sea ")
    assert [its["id"] for its in after] == [
        *(its["id"] for its in before[: place + 1]),
        *TOKENS.encode(page.input_value("#text")[offset:]),
    ]
    echoed = ask(server, prompt=[its["id"] for its in after], max_tokens=0, echo=True)
    numbers = echoed["logprobs"]["token_logprobs"]  # which differ from those of drawn tokens by rounding
    assert [its["logprob"] for its in after[1:]] == pytest.approx(numbers[1:], abs=1e-5)
    assert [urlsplit(request.url).path for request in sent].count("/v1/completions") <= 2  # not one for each key


def test_typing_gives_the_tokens_of_the_whole(opens, server):
    page = opens(server.url)
    page.focus("#text")
    for word in ("the", " th", "e th", "e a"):
        page.keyboard.type(word)
        known(page)
    assert ids(page) == TOKENS.encode("the the the a")
    page.keyboard.press("Home")
    page.keyboard.type("a")
    known(page)
    assert ids(page) == TOKENS.encode("athe the the a")


def test_characters_of_several_tokens_arrive_whole(opens, server):
    page = opens(server.url)
    text = "日本語 – é 😀 das 日"
    assert len(TOKENS.encode(text)) > len(text)
    page.fill("#text", text)
    known(page)
    assert page.input_value("#text") == text == page.locator("#mirror").inner_text().rstrip("\u200b")
    page.evaluate("$('text').focus(), $('text').setSelectionRange(1, 1)")
    page.keyboard.press("Backspace")
    known(page)
    assert page.input_value("#text") == text[1:] and ids(page) == TOKENS.encode(text[1:])


def test_undo_and_redo_go_over_what_was_written_too(opens, server):
    page = opens(server.url)
    page.focus("#text")
    page.keyboard.type(BEGINNING)
    first = write(page, max_tokens=20)
    second = write(page)
    for wanted in (first, BEGINNING, ""):
        page.keyboard.press("Control+z")
        assert page.input_value("#text") == wanted
    for wanted in (BEGINNING, first, second):
        page.keyboard.press("Control+Shift+z")
        assert page.input_value("#text") == wanted
    page.click("#undo")
    assert page.input_value("#text") == first


def test_copy(opens, server):
    page = opens(server.url, permissions=["clipboard-read", "clipboard-write"])
    text = write(page, BEGINNING, max_tokens=20)
    page.click("#copy")
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == text.replace("␍", "\r")


# ----------------------------------------------------------------------------------------------------------------------
# The likeliest


def test_hovering_shows_the_five_likeliest_and_a_click_goes_on_from_one(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=30, seed=3)
    shown = known(page)
    place = next(k for k in range(len(shown) - 20, len(shown)) if shown[k]["piece"].isprintable() and shown[k]["piece"])
    box = page.evaluate(f"doc.spans[{place}].getBoundingClientRect().toJSON()")
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    expect(page.locator("#likeliest")).to_be_visible()
    its = shown[place]
    told = page.locator("#likeliest button").all_inner_texts()
    wanted = its["top"][:5] + ([] if its["id"] in [i for i, _ in its["top"][:5]] else [[its["id"], its["logprob"]]])
    shares = [f"{100 * math.exp(value):.1f} %" if math.exp(value) >= 0.001 else "< 0.1 %" for _, value in wanted]
    assert [text.split("\n")[-1] for text in told] == shares
    assert f"{-its['logprob'] / math.log(2):.2f} bits" in page.locator("#likeliest").inner_text()
    chosen = next(k for k, (i, _) in enumerate(wanted) if i not in (its["id"], END))
    with page.expect_request("**/v1/completions") as sent:
        page.locator("#likeliest button").nth(chosen).click()
    expect(page.locator("#stop")).to_be_disabled()
    prefix = [*(token["id"] for token in shown[:place]), wanted[chosen][0]]
    assert sent.value.post_data_json["prompt"] == prefix
    assert ids(page)[: len(prefix)] == prefix and len(ids(page)) == len(prefix) + 30
    assert tokens(page)[place]["logprob"] == wanted[chosen][1] and not tokens(page)[place]["drawn"]
    expect(page.locator("#likeliest")).to_be_hidden()


def test_the_pointer_can_go_from_a_token_to_its_likeliest(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=30, seed=3)
    known(page)
    box = page.evaluate("doc.spans[2].getBoundingClientRect().toJSON()")
    page.mouse.move(box["x"] + 2, box["y"] + 5)
    expect(page.locator("#likeliest")).to_be_visible()
    shown = page.locator("#likeliest").inner_text()
    to = page.locator("#likeliest button").nth(2).bounding_box()
    page.mouse.move(to["x"] + 20, to["y"] + 5, steps=15)
    page.wait_for_timeout(500)
    assert page.locator("#likeliest").inner_text() == shown
    page.mouse.move(5, 890, steps=3)
    expect(page.locator("#likeliest")).to_be_hidden()


def test_the_likeliest_of_every_token_are_reached_by_keys(opens, server):
    page = opens(server.url)
    page.fill("#text", "a 日")
    shown = known(page)
    page.keyboard.press("Alt+ArrowDown")
    seen = []
    for its in shown:
        expect(page.locator("#likeliest")).to_be_visible()
        seen.append(page.evaluate("looked.i"))
        assert page.evaluate("$('likeliest').contains(document.activeElement)"), its
        page.keyboard.press("ArrowLeft")
    assert seen == [*reversed(range(len(shown)))]  # those too that only begin a character
    expect(page.locator("#likeliest")).to_contain_text("nothing stands before it")
    page.keyboard.press("Escape")
    expect(page.locator("#text")).to_be_focused()


# ----------------------------------------------------------------------------------------------------------------------
# Several texts, stopping, long texts


def test_texts_side_by_side_are_those_of_the_next_seeds_and_one_is_taken(opens, server):
    page = opens(server.url)
    alone = [write(page, BEGINNING, max_tokens=40, seed=seed) for seed in (5, 6, 7)]
    write(page, BEGINNING, n=3, seed=5)
    assert page.input_value("#text") == BEGINNING
    cards = page.locator("#cards .card")
    assert [
        BEGINNING + text for text in cards.locator(".tokens").evaluate_all("all => all.map(its => its.textContent)")
    ] == alone
    cards.nth(1).get_by_role("button").click()
    assert page.input_value("#text") == alone[1] and cards.count() == 0
    assert write(page, key="Control+Shift+Enter", n=1, seed=6) == alone[1]


def test_stop_ends_it_and_frees_the_row(opens, server):
    page = opens(server.url)
    page.fill("#text", BEGINNING)
    page.fill("[name=max_tokens]", "8000")
    page.fill("[name=temperature]", "0")  # which goes on and on, where a draw may be the token that ends a text
    page.fill("[name=n]", "3")
    page.click("#write")
    until(lambda: server.metric("num_requests_running") == 3)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped; what has come is kept.")
    until(server.is_idle, 5)
    page.fill("[name=n]", "1")
    page.click("#write")
    until(lambda: len(ids(page)) > 40)
    page.click("#stop")
    until(server.is_idle, 5)
    text = page.input_value("#text")
    assert text.startswith(BEGINNING) and len(text) > len(BEGINNING) and "kept" in page.inner_text("#status")
    expect(page.locator("#trouble")).to_have_text("")


def test_stops_end_a_text_and_do_not_show(opens, server):
    page = opens(server.url)
    whole = write(page, BEGINNING, max_tokens=100, seed=3)
    drawn = whole[len(BEGINNING) :]
    stop = next(drawn[k : k + 2] for k in range(30, 90) if drawn[k : k + 2].isalnum() and drawn[k : k + 2].isascii())
    text = write(page, key="Control+Shift+Enter", stop=f"never so\n{stop}")
    assert text == whole[: whole.index(stop, len(BEGINNING))]
    assert write(page, key="Control+Shift+Enter", stop="") == whole
    assert page.evaluate(r"stopsOf('a\\nb\n\\\\\n\n c')") == ["a\nb", "\\", " c"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model whose context is 32 tokens."""
    folder = tmp_path_factory.mktemp("short")
    write_model(folder, block_size=32)
    yield from served(folder)


def test_a_text_may_be_longer_than_the_context(opens, short):
    page = opens(short.url)
    text = write(page, BEGINNING, max_tokens=100, seed=3)
    prompt = TOKENS.encode(BEGINNING)
    wanted, seed = prompt, 3
    while (left := 100 - len(wanted) + len(prompt)) > 0:
        seen = wanted if len(wanted) < 32 else wanted[-16:]
        answer = ask(short, prompt=seen, max_tokens=min(left, 32 - len(seen)), seed=seed, return_token_ids=True)
        wanted, seed = wanted + answer["token_ids"], seed + 2**32
    assert ids(page) == wanted
    assert write(page, key="Control+Shift+Enter") == text


# ----------------------------------------------------------------------------------------------------------------------
# Surprise


def shown_score(page) -> tuple[float, ...]:
    return tuple(float(page.inner_text(f"#{name}")) for name in ("bits", "bits-per-byte", "perplexity"))


def test_surprise_of_a_pasted_text_is_the_models(opens, server, folder):
    """Beside the network itself, without a server."""
    text = "It is a truth, acknowledged: 日本 – é.\n"
    page = opens(server.url)
    page.fill("#text", text)
    known(page)
    state = checkpoint.load(folder / "tiny" / "ckpt.pt")
    network = GPT(GPTConfig(**state["model_args"]))
    network.load_state_dict(state["model"])
    its = torch.tensor([TOKENS.encode(text)])
    nats = network.eval()(its[:, :-1], its[:, 1:])[1].item()
    size = len(text.encode()) - len(TOKENS.token_bytes(its[0, 0].item()))
    bits = nats / math.log(2) * (its.size(1) - 1)
    expected = (bits / (its.size(1) - 1), bits / size, math.exp(nats))
    assert shown_score(page) == pytest.approx(expected, abs=6e-3, rel=1e-3)
    assert page.inner_text("#count") == str(its.size(1))


def test_a_text_longer_than_the_context_is_read_in_windows(opens, short):
    text = "the sea and the land, " * 9
    page = opens(short.url)
    page.fill("#text", text)
    shown, its = known(page), TOKENS.encode(text)
    for k in range(1, len(its)):
        start = 0 if k < 32 else (k - 32) // 16 * 16 + 16  # half a context before the window's new tokens
        end = min(max(32, start + 32), len(its))
        told = ask(short, prompt=its[start:end], max_tokens=0, echo=True)["logprobs"]["token_logprobs"]
        assert shown[k]["logprob"] == told[k - start] and k - start >= min(k, 16)
    assert "at least the 16 before it" in page.inner_text("#how")


def test_what_is_selected_has_a_surprise_of_its_own(opens, server):
    page = opens(server.url)
    page.fill("#text", "the sea and the land")
    shown = known(page)
    page.evaluate("$('text').focus(), $('text').setSelectionRange(4, 11)")
    until(lambda: "selected" in page.inner_text("#how"))
    start, end = len(TOKENS.encode("the ")), len(TOKENS.encode("the sea and"))
    starts = list(itertools.accumulate((len(its["piece"]) for its in shown), initial=0))
    nats = [-its["logprob"] for its, at in zip(shown, starts, strict=False) if at + len(its["piece"]) > 4 and at < 11]
    assert abs(len(nats) - (end - start)) <= 1
    assert shown_score(page)[0] == pytest.approx(sum(nats) / len(nats) / math.log(2), abs=6e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Links and history


def link(page) -> str:
    page.click("#link")
    expect(page.locator("#status")).to_have_text(re.compile("copied|let the page copy"))
    return page.url


def test_a_link_brings_back_the_text_in_another_browser(opens, server):
    page = opens(server.url, permissions=["clipboard-write", "clipboard-read"])
    text = write(page, "Was, ä & #日\n= ?", max_tokens=50, seed=11, temperature=1.3, top_k=0, top_p=0.9, min_p=0.01)
    url = link(page)
    assert page.evaluate("navigator.clipboard.readText()") == url and urlsplit(url).fragment
    other = opens(url)
    expect(other.locator("#status")).to_have_text(DONE)
    assert other.input_value("#text") == text and known(other) == known(page)
    assert other.inner_text("#notice") == ""
    assert [other.input_value(f"[name={name}]") for name in ("seed", "top_p", "min_p")] == ["11", "0.9", "0.01"]


def test_a_link_holds_ids_where_the_text_alone_would_be_encoded_otherwise(opens, server):
    page = opens(server.url)
    write(page, "t", max_tokens=1)
    page.evaluate(f"goOnFrom(doc, 1, {TOKENS.encode('h')[0]}, -1)")  # t and h, where "th" would be one token
    page.fill("[name=max_tokens]", "30")
    expect(page.locator("#stop")).to_be_disabled()
    page.press("#text", "Control+Shift+Enter")
    expect(page.locator("#stop")).to_be_disabled()
    url = link(page)
    assert parse_qs(urlsplit(url).fragment)["ids"] == [",".join(map(str, ids(page)[:2]))]
    other = opens(url)
    expect(other.locator("#status")).to_have_text(DONE)
    assert ids(other) == ids(page)


def test_a_link_to_several_texts_brings_back_all(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=30, n=2)
    texts = page.locator(".card .tokens").all_inner_texts()
    other = opens(link(page))
    expect(other.locator("#status")).to_have_text(DONE)
    assert other.locator(".card .tokens").all_inner_texts() == texts


def test_a_link_of_another_model_is_told_of(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=10)
    other = opens(link(page).replace("fingerprint=fp_", "fingerprint=fp_0"))
    expect(other.locator("#status")).to_have_text(DONE)
    expect(other.locator("#notice")).to_contain_text("another model")


def test_what_a_link_says_never_reaches_the_server(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=10)
    sent = []
    url = link(page)
    page.on("request", lambda request: sent.append(request.url))
    page.goto("about:blank")
    page.goto(url)
    expect(page.locator("#status")).to_have_text(DONE)
    got = [its for its in sent if its.startswith("http")]
    assert got and all("prompt=" not in its.partition("#")[0] for its in got)


def test_history_brings_back_texts_and_can_be_cleared(opens, server):
    page = opens(server.url)
    first = write(page, BEGINNING, max_tokens=20)
    shown = known(page)
    write(page, "Another", max_tokens=20)
    page.reload()
    page.click("#open-history")
    entries = page.locator("#past button")
    assert entries.count() == 2
    entries.nth(1).click()
    assert page.input_value("#text") == first
    again = known(page)  # which is read now, so that its numbers may be rounded otherwise
    for key in ("id", "drawn", "piece"):
        assert [its[key] for its in again] == [its[key] for its in shown]
    numbers = [[its["logprob"] for its in its_tokens[1:]] for its_tokens in (again, shown)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert write(page, key="Control+Shift+Enter") == first
    page.click("#open-history")
    page.click("#clear-history")
    assert page.locator("#past button").count() == 0
    page.reload()
    assert page.evaluate("localStorage.getItem('quartzgpt.history')") == "[]"


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def sse(data: dict | str) -> bytes:
    return b"data: " + (data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)).encode() + b"\n\n"


def chunk(token: int, end: str | None = None) -> bytes:
    """What the stand-in tells of a token, with characters of several bytes where the server writes ASCII."""
    logprobs = {
        "tokens": [f"token_id:{token}"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{f"token_id:{token}": -1.0}],
    }
    choice = {"index": 0, "text": "日本", "logprobs": logprobs, "finish_reason": end}
    return sse({"system_fingerprint": "fp", "choices": [choice], "note": "日本語😀"})


class StandIn(http.server.BaseHTTPRequestHandler):
    """A server that does with completions what a test wants."""

    protocol_version = "HTTP/1.1"
    vocabulary = ["日", "本", "語", "😀", [0xF0, 0x9F], [0x98, 0x80], "the"]

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, data: bytes, kind: str = "application/json", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        told = {
            "/v1/models": {"data": [{"id": "it", "max_model_len": 64, "system_fingerprint": "fp"}]},
            "/tokenizer_info": {"eos_token_id": None},
            "/vocabulary": {"tokens": self.vocabulary},
        }
        if self.path == "/":
            self.answer(200, PAGE, "text/html; charset=utf-8")
        elif self.path in told:
            self.answer(200, json.dumps(told[self.path]).encode())
        else:
            self.answer(404, b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.answer(200, json.dumps({"tokens": [6] * (len(body["prompt"]) // 3)}).encode())
        elif body["max_tokens"]:
            self.server.its.completes(self, body)
        else:
            told = {"tokens": [f"token_id:{i}" for i in body["prompt"]], "token_logprobs": [-1.0] * len(body["prompt"])}
            told["top_logprobs"] = [{}] * len(body["prompt"])
            self.answer(200, json.dumps({"system_fingerprint": "fp", "choices": [{"logprobs": told}]}).encode())

    def streams(self, *parts: bytes, length: int | None = None):
        """Sends each part on its own; the connection ends where `length` says more than there is."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(sum(map(len, parts)) if length is None else length))
        self.end_headers()
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()
            time.sleep(self.server.its.pause)
        self.close_connection = True


@pytest.fixture
def stand_in():
    its = SimpleNamespace(completes=None, pause=0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.daemon_threads, server.its = True, its
    its.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield its
    server.shutdown()
    server.server_close()


def test_reads_cut_anywhere_arrive_whole(opens, stand_in):
    """Inside of characters, of lines, and between the two ends of lines; the tokens' own bytes too."""
    whole = b"".join(map(chunk, (0, 1, 4, 5, 2))) + chunk(3, "length") + sse("[DONE]")
    parts = [whole[k : k + 1] for k in range(len(whole))]
    stand_in.completes, stand_in.pause = lambda handler, body: handler.streams(*parts), 2e-4
    page = opens(stand_in.url)
    assert write(page, "the", max_tokens=6) == "the日本😀語😀"
    assert (
        ids(page) == [6, 0, 1, 4, 5, 2, 3] and page.locator("#mirror").inner_text().rstrip("\u200b") == "the日本😀語😀"
    )


def test_lines_may_end_as_on_windows(opens, stand_in):
    whole = (chunk(0) + chunk(1, "length") + sse("[DONE]")).replace(b"\n", b"\r\n")
    stand_in.completes = lambda handler, body: handler.streams(*(whole[k : k + 7] for k in range(0, len(whole), 7)))
    assert write(opens(stand_in.url), "the", max_tokens=2) == "the日本"


@pytest.mark.parametrize("how", ["error", "cut", "ends"])
def test_a_text_that_is_not_finished_is_kept_and_told_of(opens, stand_in, how):
    failure = sse({"error": {"message": "the device is out of memory"}})
    parts = [chunk(0), chunk(1), *([failure, sse("[DONE]")] if how == "error" else [])]
    stand_in.completes = lambda handler, body: handler.streams(*parts, length=10**6 if how == "cut" else None)
    stand_in.pause = 0.3  # or the browser may not give out what came right before a cut
    page = opens(stand_in.url)
    page.fill("#text", "the")
    page.press("#text", "Control+Enter")
    why = "the device is out of memory" if how == "error" else "the connection broke off"
    told = f"Not finished: {why}; what has come is kept. Again writes it anew."
    expect(page.locator("#trouble")).to_have_text(told)
    known(page)  # which the server answers, and that is no reason to forget
    expect(page.locator("#trouble")).to_have_text(told)
    assert page.input_value("#text") == "the日本" and page.inner_text("#status") == ""
    expect(page.locator("#write")).to_be_enabled()


def test_a_full_server_is_asked_again(opens, stand_in):
    asked = []

    def completes(handler, body):
        asked.append(time.monotonic())
        if len(asked) < 3:
            told = json.dumps({"error": {"message": "there is no room now", "code": "queue_full"}})
            return handler.answer(503, told.encode(), Retry_After=1)
        return handler.streams(chunk(0, "length"), sse("[DONE]"))

    stand_in.completes = completes
    page = opens(stand_in.url)
    page.fill("#text", "the")
    page.fill("[name=max_tokens]", "1")
    page.click("#write")
    expect(page.locator("#trouble")).to_have_text("Not now: there is no room now. Trying again …")
    expect(page.locator("#status")).to_have_text(DONE)
    assert page.inner_text("#trouble") == "" and page.input_value("#text") == "the日"
    assert len(asked) == 3 and asked[1] - asked[0] > 0.9


def test_what_is_refused_is_one_line(opens, server):
    page = opens(server.url)
    page.fill("[name=top_p]", "7")
    page.click("#write")
    expect(page.locator("#trouble")).to_contain_text("top_p: ")
    expect(page.locator("[name=top_p]")).to_be_focused()
    page.fill("[name=top_p]", "1")
    page.fill("[name=stop]", "x" * 300)
    page.click("#write")
    expect(page.locator("#trouble")).to_contain_text("stop must be up to")
    page.fill("[name=stop]", "")
    page.click("#write")
    expect(page.locator("#status")).to_have_text(DONE)
    expect(page.locator("#trouble")).to_have_text("")


def test_characters_that_a_model_does_not_know_are_told_of_and_stay(opens, tmp_path):
    state_of(CharTokenizer("the sanrol"), tmp_path)
    for server in served(tmp_path):
        page = opens(server.url)
        page.fill("#text", "the 日")
        expect(page.locator("#trouble")).to_contain_text("日")
        page.click("#write")
        expect(page.locator("#trouble")).to_contain_text("日")
        assert page.input_value("#text") == "the 日"
        assert write(page, "the ", max_tokens=5).startswith("the ")


def test_a_server_that_goes_and_comes_back(opens, folder):
    server = Server(folder)
    page = opens(server.url)
    first = write(page, BEGINNING, max_tokens=20)
    server.process.kill()
    server.process.communicate()
    page.press("#text", "Control+Shift+Enter")
    expect(page.locator("#trouble")).to_contain_text("can't be reached")
    for other in served(folder, port=server.port):
        assert other.port == server.port
        expect(page.locator("#status")).to_have_text(DONE)
        assert page.input_value("#text") == first and page.inner_text("#trouble") == ""


def test_another_model_at_the_same_address_is_noticed(opens, folder, tmp_path):
    server = Server(folder)
    page = opens(server.url)
    write(page, "the sea", max_tokens=2)
    server.process.kill()
    server.process.communicate()
    state_of(CharTokenizer("the sanrol"), tmp_path)
    for other in served(tmp_path, port=server.port):
        page.fill("#text", "the lar")
        known(page)
        assert ids(page) == CharTokenizer("the sanrol").encode("the lar")
        assert write(page, max_tokens=5).startswith("the lar")
        assert other.port == server.port


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("chars", ["the sanrol", "".join(map(chr, range(32, 1400)))], ids=["fewer", "more"])
def test_ids_of_one_model_are_not_gone_on_with_by_another(opens, folder, tmp_path, n, chars):
    server = Server(folder)
    page = opens(server.url)
    page.fill("#text", "the lar")
    before = [its["id"] for its in known(page)]
    server.process.kill()
    server.process.communicate()
    state_of(CharTokenizer(chars), tmp_path)
    for other in served(tmp_path, port=server.port):
        page.fill("[name=n]", str(n))
        page.press("#text", "Control+Enter")
        expect(page.locator("#trouble")).to_contain_text("The server has another model now")
        expect(page.locator("#cards .card")).to_have_count(0)
        assert page.input_value("#text") == "the lar"
        known(page)
        assert ids(page) == CharTokenizer(chars).encode("the lar") != before
        assert write(page, n=1, max_tokens=5).startswith("the lar")
        assert other.port == server.port


# ----------------------------------------------------------------------------------------------------------------------
# Who may ask, and what models may write


def test_the_key_is_asked_for_and_used(opens, folder):
    for server in served(folder, key="a-key"):
        page = opens(server.url)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#key-dialog")).to_be_visible()  # nothing goes without
        page.fill("#key", "another")
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "a-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        assert write(page, BEGINNING, max_tokens=5).startswith(BEGINNING)
        page.reload()
        expect(page.locator("#model")).to_contain_text("tiny")
        assert page.evaluate("sessionStorage.getItem('quartzgpt.key')") == "a-key"
        assert "a-key" not in page.evaluate("JSON.stringify(localStorage)")


MARKUP = '<img src=x onerror="alert(1)">'


def state_of(
    its,
    folder: Path,
    block_size: int = 64,
    favourite: int | None = None,
    seed: int = 1,
    iter_num: int = 1,
    out: str = "tiny",
):
    """A checkpoint with this tokenizer, of random weights that like one token best."""
    (folder / out).mkdir(exist_ok=True)
    config = GPTConfig(block_size=block_size, vocab_size=its.vocab_size, n_layer=1, n_head=2, n_embd=32, dropout=0.0)
    torch.manual_seed(seed)
    network = GPT(config)
    with torch.no_grad():
        network.transformer.wte.weight *= 6
        if favourite is not None:
            network.transformer.wte.weight[:] = network.transformer.wte.weight[favourite]
    state = {"model": network.state_dict(), "model_args": dataclasses.asdict(config), "tokenizer": its.to_data()}
    checkpoint.save(
        folder / out / "ckpt.pt", {**state, "iter_num": iter_num, "best_val_loss": 2.0 / iter_num, "config": {}}
    )


def test_markup_of_models_prompts_names_and_links_does_nothing(opens, tmp_path):
    names = [MARKUP, "</textarea><script>alert(2)</script>"]
    its = BPETokenizer.of_merges([b"th", b"<i", b"<im"], "gpt4", names)
    state_of(its, tmp_path, favourite=its.specials[MARKUP])
    for server in served(tmp_path, model_name=f"<b onclick=alert(3)>{MARKUP}"):
        page = opens(server.url)
        write(page, MARKUP, max_tokens=60, temperature=0)
        write(page, key="Control+Shift+Enter", n=2, temperature=1)
        page.click("#open-history")
        assert MARKUP in page.locator("#past").inner_text()
        page.keyboard.press("Escape")
        page.focus("#text")
        page.keyboard.press("Alt+ArrowDown")
        expect(page.locator("#likeliest")).to_be_visible()
        assert MARKUP in page.inner_text("#model")
        other = opens(
            f"{server.url}/#prompt={MARKUP}&seed={MARKUP}&n=1&ids={MARKUP}&fingerprint={MARKUP}&stop={MARKUP}"
        )
        expect(other.locator("#stop")).to_be_disabled()
        for shown in (page, other):
            assert shown.locator("img, b[onclick], script").count() == 1  # the page's own script


# ----------------------------------------------------------------------------------------------------------------------
# Everybody


def contrast(page, selector: str) -> float:
    """WCAG's, between the text of the document and what lies under it."""
    colours = page.evaluate(
        """selector => {
            const pixel = (...layers) => {
                const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
                const context = canvas.getContext("2d");
                for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
                return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const style = (its) => getComputedStyle(document.querySelector(its));
            const ground = pixel(style(".paper").backgroundColor, style(selector).backgroundColor);
            return [ground, pixel(style("#text").color)];
        }""",
        selector,
    )

    def luminance(colour) -> float:
        parts = [c / 255 for c in colour]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_on_and_told_apart_without_seeing_hues(opens, server, scheme):
    page = opens(server.url, color_scheme=scheme)
    found = [contrast(page, f"#legend .b{k}") for k in range(6)]
    assert min(found) >= 4.5
    assert all(before > after * 1.05 for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_axe_finds_nothing_serious(opens, server, scheme, width):
    if not (path := next(filter(Path.exists, AXE), None)):
        pytest.skip("axe-core is not installed: make test-clients does it")
    page = opens(server.url, color_scheme=scheme, bypass_csp=True)
    page.set_viewport_size({"width": width, "height": 800})
    write(page, BEGINNING, max_tokens=40)
    write(page, n=2)
    page.add_script_tag(path=path)
    for opened in (None, "#look", "#open-help", "#open-history"):
        if opened:
            page.click(opened)
        found = page.evaluate("axe.run().then(({ violations }) => violations)")
        assert not [its for its in found if its["impact"] in ("serious", "critical")], found
        page.keyboard.press("Escape")


def test_everything_is_done_by_keys(opens, server):
    page = opens(server.url)
    page.keyboard.press("Tab")
    order = []
    for _ in range(40):
        order.append(
            page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
        page.keyboard.press("Tab")
    places = [
        order.index(its)
        for its in ("open-history", "text", "write", "dice", "copy", "link", "temperature", "seed", "stop")
    ]
    assert places == sorted(places)
    page.focus("#text")
    page.keyboard.type("the sea")
    known(page)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#text")).to_be_focused()
    known(page)
    page.keyboard.press("Control+Home")
    for _ in "the s":
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Alt+ArrowDown")
    place = page.evaluate("looked.i")
    page.keyboard.press("ArrowDown")
    chosen = page.evaluate("document.activeElement.firstChild.textContent")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_disabled()
    assert place and page.evaluate(f"visible(doc.tokens[{place}].id)") == chosen
    page.focus("[name=n]")
    page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stop")).to_be_disabled()
    page.get_by_role("button", name="Go on with this").first.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.locator("#open-help").press("Enter")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#open-help")).to_be_focused()


def test_screen_readers_hear_of_ends_and_not_of_tokens(opens, server):
    page = opens(server.url)
    page.evaluate(
        "heard = [], new MutationObserver((all) => heard.push($('status').textContent))"
        ".observe($('status'), { childList: true, characterData: true, subtree: true })"
    )
    write(page, BEGINNING, max_tokens=100)
    assert len(page.evaluate("heard")) <= 3
    live = page.evaluate(
        "[...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].map(({ id }) => id)"
    )
    assert sorted(live) == ["notice", "status", "trouble"]
    assert page.locator("#mirror").get_attribute("aria-hidden") == "true"


@pytest.mark.parametrize("width", [375, 320])
def test_a_phone_needs_no_sideways_scrolling(opens, server, width):
    page = opens(server.url, has_touch=True, is_mobile=True)
    page.set_viewport_size({"width": width, "height": 700})
    write(page, "long" * 60, max_tokens=60, n=1)
    write(page, n=3)
    page.locator("#text").tap()
    expect(page.locator("#likeliest")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator("#likeliest").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    heights = [its.bounding_box()["height"] for its in page.locator(".tools > button:visible").all()]
    assert min(heights) >= 44


def test_themes_follow_the_system_until_one_is_chosen(opens, server):
    page = opens(server.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(ground) == light


def test_nothing_moves_where_that_is_not_wanted(opens, server):
    page = opens(server.url, reduced_motion="reduce")
    times = "[...document.querySelectorAll('*')].map((its) => getComputedStyle(its))"
    times += ".map((its) => its.transitionDuration + its.animationName)"
    assert set(page.evaluate(times)) == {"0snone"}


def test_typing_in_a_long_document_stays_quick(opens, server):
    page = opens(server.url)
    text = "the sea and the land, and a the 日 " * 320
    page.fill("#text", text)
    shown = known(page)
    assert len(shown) > 8000
    measure = """async (place) => {
        const box = $("text"), times = [];
        box.focus();
        for (let k = 0; k < 20; k++) {
            box.setSelectionRange(place + k, place + k);
            const began = performance.now();
            document.execCommand("insertText", false, "x");
            void box.offsetHeight;
            void $("mirror").offsetHeight;
            times.push(performance.now() - began);
            await new Promise(requestAnimationFrame);
        }
        return times.sort((a, b) => a - b)[10];
    }"""
    at_end, in_the_middle = page.evaluate(measure, len(text)), page.evaluate(measure, len(text) // 2)
    print(
        f"a key in a document of {len(shown)} tokens: {at_end:.1f} ms at its end, {in_the_middle:.1f} ms in its middle"
    )
    assert page.input_value("#text").count("x" * 20) == 2


# ----------------------------------------------------------------------------------------------------------------------
# A run in training


def evaluation(step: int, loss: float) -> str:
    return json.dumps({"step": step, "train_loss": loss - 0.1, "val_loss": loss}) + "\n"


def update(step: int, loss: float) -> str:
    return json.dumps({"iter": step, "loss": loss, "lr": 1e-3, "ms": 10.0, "tokens_per_s": 1e4}) + "\n"


def test_without_a_run_there_is_no_word_of_one(opens, server):
    page = opens(server.url)
    write(page, BEGINNING, max_tokens=5)
    expect(page.locator("#run")).to_be_hidden()


def test_a_run_is_watched_and_its_checkpoints_are_served_as_they_come(opens, tmp_path):
    log = tmp_path / "tiny" / "log.jsonl"
    state_of(TOKENS, tmp_path, seed=1, iter_num=10)
    log.write_text(evaluation(0, 4.5) + "".join(update(k, 4.5 - k / 10) for k in range(10)) + evaluation(10, 3.5))
    for server in served(tmp_path, watch=True):
        page = opens(server.url)
        expect(page.locator("#served")).to_contain_text("Iteration 10")
        expect(page.locator("#value")).to_contain_text("iteration 10: validation 3.500, train 3.400")
        first, before = write(page, BEGINNING, max_tokens=30), known(page)
        page.check("#keep-writing")
        expect(page.locator("#versions .card")).to_have_count(1)
        curve = page.locator(".val").first.get_attribute("d")
        assert curve.count("L") == 1
        state_of(TOKENS, tmp_path, seed=2, iter_num=20)
        log.write_text(
            log.read_text() + "".join(update(k, 3.5 - k / 100) for k in range(10, 20)) + evaluation(20, 3.25)
        )
        expect(page.locator("#served")).to_contain_text("Iteration 20")
        expect(page.locator("#value")).to_contain_text("iteration 20: validation 3.250")
        cards = page.locator("#versions .card")
        expect(cards).to_have_count(2)
        assert page.locator(".val").first.get_attribute("d").count("L") == 2
        expect(cards.first.locator("h2")).to_contain_text("Iteration 20")
        expect(page.locator("#stop")).to_be_disabled()
        assert page.input_value("#text") == first  # what a person has is left alone
        assert [its["id"] for its in known(page)] == [its["id"] for its in before]
        assert [its["logprob"] for its in tokens(page)] != [its["logprob"] for its in before]
        answer = ask(server, prompt=BEGINNING, max_tokens=30, seed=1337)
        assert cards.first.locator(".tokens").text_content() == answer["text"].replace("\r", "␍")
        assert cards.last.locator(".tokens").text_content() == first[len(BEGINNING) :]


def test_a_checkpoint_of_other_tokens_writes_the_same_beginning_too(opens, tmp_path):
    state_of(TOKENS, tmp_path, iter_num=10)
    for server in served(tmp_path, watch=True):
        page = opens(server.url)
        expect(page.locator("#served")).to_contain_text("Iteration 10")
        page.fill("#text", "the lar")
        page.fill("[name=max_tokens]", "20")
        page.check("#keep-writing")
        expect(page.locator("#status")).to_have_text(DONE)
        state_of(CharTokenizer("the sanrol"), tmp_path, iter_num=20)
        cards = page.locator("#versions .card")
        expect(cards.locator("h2")).to_contain_text(["Iteration 20"])
        answer = ask(server, prompt="the lar", max_tokens=20, seed=1337)
        expect(cards.locator(".tokens")).to_have_text(answer["text"])
        assert page.inner_text("#trouble") == ""


def test_checkpoints_write_where_nothing_is_begun(opens, tmp_path):
    state_of(CharTokenizer("the sanrol\n"), tmp_path, iter_num=10)
    for server in served(tmp_path, watch=True):
        page = opens(server.url)
        page.fill("[name=max_tokens]", "20")
        page.check("#keep-writing")
        expect(page.locator("#status")).to_have_text(DONE)
        answer = ask(server, prompt="\n", max_tokens=20, seed=1337)
        assert page.locator("#versions .tokens").text_content() == answer["text"]
        assert page.input_value("#text") == "" and page.inner_text("#trouble") == ""


def test_curves_tell_their_values_by_pointer_and_keys(opens, tmp_path):
    state_of(TOKENS, tmp_path, iter_num=40)
    log = "".join(update(k, 4 - k / 50) + (evaluation(k, 4 - k / 50) if k % 10 == 0 else "") for k in range(41))
    (tmp_path / "tiny" / "log.jsonl").write_text(log)
    for server in served(tmp_path, watch=True):
        page = opens(server.url)
        curves, value = page.locator("#curves"), page.locator("#value")
        expect(value).to_contain_text("iteration 40")
        box = curves.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 50)
        expect(value).to_contain_text("iteration 20: validation 3.600")
        page.mouse.move(box["x"] - 50, box["y"])
        expect(value).to_contain_text("iteration 40")
        curves.press("ArrowLeft")
        expect(value).to_contain_text("iteration 30")
        assert "iteration 30" in curves.get_attribute("aria-valuetext")
        before = page.locator(".val").first.get_attribute("d")
        page.check("#log-x")
        assert page.locator(".val").first.get_attribute("d") != before


def test_a_checkpoint_that_cannot_be_read_is_told_of(opens, tmp_path):
    state_of(TOKENS, tmp_path, iter_num=10)
    for server in served(tmp_path, watch=True):
        page = opens(server.url)
        expect(page.locator("#served")).to_contain_text("Iteration 10")
        with contextlib.suppress(OSError):
            (tmp_path / "tiny" / "ckpt.pt").write_bytes(b"no checkpoint")
        expect(page.locator("#served")).to_contain_text("The newest checkpoint can't be")
        assert write(page, BEGINNING, max_tokens=5).startswith(BEGINNING)
