"""serve.py by programs that others made and that ask it: lm-eval, OpenAI's client for JavaScript, schemathesis."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT, flags, program
from server import leave, openai, served, until, write_model

from model import GPT, GPTConfig
from quartz import checkpoint
from quartz.tokenizer import GPT2Tokenizer

pytestmark = pytest.mark.clients

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# ----------------------------------------------------------------------------------------------------------------------
# lm-eval, whose own hf model is what the server is held to

CONTEXT = 256  # tokens of the models'
NEW_TOKENS = 24
STOPS = ["Question:", "\n\n", "x"]
TASKS = {
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "continued": """
output_type: loglikelihood
doc_to_text: "{{before}}"
doc_to_target: "{{after}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "chosen": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer: ####"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "written": f"""
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: {json.dumps(STOPS)}, do_sample: false, max_gen_toks: {NEW_TOKENS}}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture
def gsm8k() -> list[dict]:
    """The training questions of GSM8K, with their answers."""
    path = Path(DATA or "") / "gsm8k_train.jsonl"
    if not DATA or not path.exists():
        pytest.skip("QUARTZGPT_TEST_DATA names no folder with gsm8k_train.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, docs: list[dict]) -> None:
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))


def train(run, docs: list[str]) -> None:
    """A small Qwen3 that has seen a little of the documents, by a tokenizer of their own."""
    write_lines(Path("docs.jsonl"), [{"text": doc} for doc in docs])
    source = {"source": "docs.jsonl", "out": "data/docs", "tokenizer": "bpe", "vocab_size": 600}
    plain = {"device": "cpu", "dtype": "float32", "compile": False, "dropout": 0.0, "eval_iters": 1}
    size = {"arch": "qwen3", "n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": CONTEXT}
    length = {"max_iters": 400, "batch_size": 4, "gradient_accumulation_steps": 1, "eval_interval": 400}
    pace = {"learning_rate": 1e-2, "warmup_iters": 5, "log_interval": 50}
    for script, its in (
        (str(ROOT / "data" / "text" / "prepare.py"), source),
        ("train.py", {"dataset": "docs", **plain, **size, **length, **pace}),
    ):
        result = run(script, *flags(**its))
        assert result.code == 0, result.err


def write_gpt2() -> None:
    """A small GPT of GPT-2's vocabulary: to train it would take minutes, so its weights are random, and such that it
    writes ASCII."""
    tokens = GPT2Tokenizer()
    config = GPTConfig(CONTEXT, 50304, n_layer=2, n_head=2, n_embd=48, dropout=0.0, bias=True)
    torch.manual_seed(1)
    network = GPT(config)
    is_ascii = [tokens.token_bytes(i).isascii() for i in range(tokens.vocab_size - 1)]
    with torch.no_grad():
        for weight in network.transformer.h.parameters():
            weight *= 15 if weight.dim() == 2 else 1  # so that what is next depends on more than the last token
        network.transformer.wte.weight *= 8  # so that it has preferences
        network.transformer.wte.weight[: len(is_ascii)] *= torch.tensor(is_ascii)[:, None]
        network.transformer.wte.weight[len(is_ascii) :] = 0.0
    state = {"model": network.state_dict(), "model_args": config.to_args(), "tokenizer": tokens.to_data()}
    Path("out").mkdir()
    checkpoint.save(Path("out/ckpt.pt"), {**state, "iter_num": 1, "best_val_loss": 1.0, "config": {}})


def write_tasks(folder: Path, text: str, questions: list[dict], greedy) -> None:
    """lm-eval's files of the four tasks. greedy(prompt, max_tokens, stop) is what the model itself would write: of what
    is asked some is that, so that there are answers that are right."""
    numbers = [its["answer"].rpartition("#### ")[2] for its in questions]
    chosen = []
    for k, number in enumerate(numbers[:16]):
        choices = [*dict.fromkeys(its for its in numbers[k + 1 :] if its != number)][:3]
        choices.insert(k % 4, number)
        chosen.append({"question": questions[k]["question"], "choices": choices, "right": k % 4})
    continued = [{"before": text[k : k + 120], "after": text[k + 120 : k + 140]} for k in range(0, 8000, 1000)]
    before = [f"Question: {its['question']}\nAnswer" for its in questions[:8]]
    continued += [{"before": its, "after": greedy(its, 1)} for its in before]
    short = [its["question"] for its in questions if len(its["question"]) < 200]  # so that none is cut
    written = [{"prompt": f"Question: {its}\nAnswer:", "text": "other"} for its in short[:10]]
    for doc in written[::2]:
        doc["text"] = greedy(doc["prompt"], NEW_TOKENS, STOPS)
    rolling = [{"text": text[k : k + 3000]} for k in (9000, 12000, 15000)]
    docs = {"rolling": rolling, "continued": continued, "chosen": chosen, "written": written}
    for name, body in TASKS.items():
        write_lines(folder / f"{name}.jsonl", docs[name])
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}\ntest_split: test{body}")


def lm_eval(folder: Path, name: str, *arguments: str, **model: object) -> tuple[dict, dict]:
    """Runs it on all tasks: the results of each, and what it kept of each document."""
    told = ",".join(f"{key}={value}" for key, value in model.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model_args", told, "--include_path", str(folder / "tasks")]
    command += ["--tasks", ",".join(TASKS), "--output_path", str(folder / name), "--log_samples", *arguments]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / name).glob("*/results_*.json")
    samples = {}
    for path in results.parent.glob("samples_*.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        samples[path.name.split("_")[1]] = sorted(lines, key=lambda its: its["doc_id"])
    return json.loads(results.read_text())["results"], samples


def likelihoods(sample: dict) -> list[tuple[float, bool]]:
    """Of each of a document's answers: log-likelihood, and whether it is what greedy decoding writes."""
    return [(float(number), str(is_greedy) == "True") for ((number, is_greedy),) in sample["resps"]]


@pytest.mark.parametrize(
    ("tokenizer", "arguments", "model"),
    [
        ("gpt2", ["--batch_size", "4"], {"tokenizer": "out/hf", "num_concurrent": 4}),
        ("bpe", [], {"tokenizer_backend": "remote"}),
    ],
)
def test_lm_eval_over_http_gives_what_its_own_model_gives(
    tokenizer, arguments, model, shakespeare, gsm8k, gpt2_bpe, tmp_path, monkeypatch, run
):
    """Its own is transformers', on the exported folder; with two tokens fewer it has the windows that HTTP gives it."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    text = shakespeare.read_text()
    if tokenizer == "gpt2":
        write_gpt2()
    else:
        docs = [f"Question: {its['question']}\nAnswer: {its['answer']}" for its in gsm8k[:400]]
        train(run, docs + [text[k : k + 1000] for k in range(0, 200_000, 1000)])
    assert run("export.py", "--to=hf").code == 0
    (tmp_path / "tasks").mkdir()
    for server in served(tmp_path, out_dir=tmp_path / "out"):

        def greedy(prompt: str, max_tokens: int, stop: tuple = (), server=server) -> str:
            body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": [*stop]}
            return server.post(**body).json()["choices"][0]["text"]

        write_tasks(tmp_path / "tasks", text[-20_000:], gsm8k[6000:6100], greedy)
        url = {"model": "out", "base_url": f"{server.url}/v1/completions", "max_length": CONTEXT}
        told, its = lm_eval(tmp_path, "http", "--model", "local-completions", *arguments, **url, **model)
    own = {"pretrained": tmp_path / "out" / "hf", "max_length": CONTEXT - 2}
    expected, theirs = lm_eval(tmp_path, "own", "--model", "hf", "--device", "cpu", "--batch_size", "4", **own)
    assert its.keys() == theirs.keys() == TASKS.keys()
    check_answers(its, theirs)
    check_metrics(told, expected)


def check_answers(its: dict, theirs: dict) -> None:
    for name in ("continued", "chosen"):
        for ours, own in zip(its[name], theirs[name], strict=True):
            for (number, is_greedy), (expected, also) in zip(likelihoods(ours), likelihoods(own), strict=True):
                assert abs(number - expected) < 1e-4 and is_greedy == also, (name, ours["doc"])
            assert ours["acc"] == own["acc"]
    assert {is_greedy for its in theirs["continued"] for _, is_greedy in likelihoods(its)} == {True, False}
    for ours, own in zip(its["rolling"], theirs["rolling"], strict=True):
        number, expected = (float(sample["resps"][0][0]) for sample in (ours, own))
        # A window's sum alone, in float32, is of hundreds, where two neighbours are 3e-5 apart and more
        assert abs(number - expected) < 1e-6 * abs(expected) and expected < -1000
    texts, own = ([sample["resps"] for sample in samples["written"]] for samples in (its, theirs))
    assert texts == own and len({*map(str, texts)}) > 3


def check_metrics(told: dict, expected: dict) -> None:
    """Shares are equal, perplexities nearly."""
    for name, metrics in expected.items():
        assert metrics.keys() == told[name].keys()
        for metric, value in metrics.items():
            if re.match("acc|exact_match", metric):
                assert told[name][metric] == value, (name, metric)
            elif re.match("(word|byte)?_?perplexity,|bits_per_byte,", metric):
                assert told[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert all(0 < expected[name][metric] < 1 for name, metric in (("continued", "acc,none"), ("chosen", "acc,none")))
    assert expected["written"]["exact_match,none"] == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# OpenAI's client for JavaScript, beside the one for Python

NPM = ROOT / "tests" / "npm"
LONG = {"model": "tiny", "prompt": "the", "max_tokens": 8000, "ignore_eos": True}  # many seconds' work
SAMPLED = {"model": "tiny", "prompt": "the a", "max_tokens": 12, "seed": 7}
BODIES = [
    {"model": "tiny", "prompt": "the 日本", "temperature": 0, "logprobs": 3},
    {**SAMPLED, "n": 3, "logprobs": 1, "echo": True, "return_token_ids": True},
    {**SAMPLED, "prompt": ["the", " a"], "n": 2, "top_p": 0.9, "temperature": 0.7, "top_k": 40},
    {**SAMPLED, "prompt": [[97, 98], [256, 99]], "echo": True, "max_tokens": 0, "logprobs": 0},
    {**SAMPLED, "max_tokens": 200, "stop": ["e", "a"]},
    {**SAMPLED, "max_tokens": 200, "stop": "t"},
]
STREAMS = [{**body, "stream": True, "stream_options": {"include_usage": k % 2 == 0}} for k, body in enumerate(BODIES)]
WRONG = [
    {"model": "other", "prompt": "the"},
    {"model": "tiny", "prompt": "the", "n": 17},
    {"model": "tiny", "prompt": "the", "max_tokens": 9000},
    {"model": "tiny", "prompt": [99999]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    yield from served(folder)


class Node:
    """A process of client.js, that does these acts."""

    def __init__(self, server, *acts: dict):
        node = program("node", "nodejs")
        if not (NPM / "node_modules" / "openai").exists():
            program("npm")
            pytest.skip("npm's package openai is not in tests/npm: make test-clients installs it")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([node, str(NPM / "client.js"), server.url], **pipes)
        self.process.stdin.write(json.dumps(acts))
        self.process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def hear(self, *wanted: str) -> tuple[str, object]:
        """The next line, or the next of these names."""
        for line in self.process.stdout:
            ((name, value),) = json.loads(line).items()
            if not wanted or name in wanted:
                return name, value
        raise AssertionError(self.process.stderr.read())


def timeless(answer: dict) -> dict:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def by_python(server, body: dict) -> dict | list[dict]:
    """The same answer by the other client; what OpenAI does not know goes as extra_body."""
    extra = {name: body[name] for name in ("return_token_ids", "top_k", "ignore_eos") if name in body}
    known = {name: value for name, value in body.items() if name not in extra}
    answer = server.client.completions.create(**known, extra_body=extra)
    if body.get("stream"):
        return [chunk.model_dump(exclude_unset=True) for chunk in answer]
    return answer.model_dump(exclude_unset=True)


def joined(chunks: list[dict]) -> list[tuple]:
    """Each choice's text and end, however the stream was cut."""
    choices = sorted((choice for chunk in chunks for choice in chunk["choices"]), key=lambda its: its["index"])
    return [
        ("".join(its["text"] for its in own), [its["finish_reason"] for its in own if its["finish_reason"]])
        for own in ([c for c in choices if c["index"] == k] for k in range(choices[-1]["index"] + 1))
    ]


def test_javascript_is_answered_what_python_is(server):
    with Node(server, *({"act": "create", "body": body} for body in (*BODIES, *STREAMS))) as node:
        whole = [node.hear("answer", "error") for _ in BODIES]
        streams = [node.hear("answer", "error") for _ in STREAMS]
        assert node.hear("end")
    for body, (name, answer) in zip(BODIES, whole, strict=True):
        assert name == "answer" and timeless(answer) == timeless(cached_alike(by_python(server, body), answer)), body
    for body, (name, chunks), (_, answer) in zip(STREAMS, streams, whole, strict=True):
        assert name == "answer" and joined(chunks) == joined(by_python(server, body)) == joined([answer])
        assert len({chunk["id"] for chunk in chunks}) == 1
        has_usage = body["stream_options"]["include_usage"]
        assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [has_usage]
        assert not has_usage or (chunks[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"])


def cached_alike(answer: dict, other: dict) -> dict:
    """With the other's count of tokens that came from the cache, which is not the answer's own."""
    details = other["usage"]["prompt_tokens_details"]
    return {**answer, "usage": {**answer["usage"], "prompt_tokens_details": details}}


def test_javascript_is_refused_as_python_is(server):
    acts = [{"act": "create", "body": body} for body in WRONG]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with Node(server, *acts, {"act": "chat", "body": chat}, {"act": "models"}) as node:
        heard = [node.hear("answer", "error") for _ in (*WRONG, chat)]
        assert node.hear("answer")[1] == [its.model_dump(exclude_unset=True) for its in server.client.models.list()]
    for body, (name, error) in zip((*WRONG, chat), heard, strict=True):
        create = server.client.chat.completions.create if body is chat else server.client.completions.create
        with pytest.raises(openai.APIStatusError) as theirs:
            create(**body)
        own = theirs.value
        assert name == "error" and error["kind"] == type(own).__name__
        for field in ("code", "param", "type"):
            assert error[field] == getattr(own, field)
        assert error["status"] == own.status_code and own.body["message"] in error["message"]


def test_javascript_that_leaves_in_mid_stream_or_gives_up_frees_the_rows(server):
    before = server.metric("request_success_total")
    acts = [{"act": "abort", "body": {**LONG, "n": 2, "stream": True}}]
    acts += [{"act": "create", "body": LONG, "options": {"timeout": 300}}]
    with Node(server, *acts) as node:
        assert node.hear("chunk")[1]["choices"]
        name, error = node.hear("error", "answer")
        assert name == "error" and error["kind"] == "APIConnectionTimeoutError"
        assert node.hear("end")
        until(lambda: server.metric("request_success_total") == before + 3)  # counted as aborted
        until(server.is_idle)
    assert server.post(prompt="the", n=16, max_tokens=2).status_code == 200


def test_javascript_that_is_refused_for_want_of_room_tries_again_when_it_was_told(folder):
    for small in served(folder, max_rows=2, max_queue=0):
        with small.connect() as sock:
            sock.sendall(small.request(**LONG, n=2))
            until(lambda small=small: small.metric("num_requests_running") == 2)
            with Node(small, {"act": "create", "body": SAMPLED, "options": {"maxRetries": 5}}) as node:
                _, first = node.hear("attempt")
                leave(sock)
                _, second = node.hear("attempt")
                while second["status"] == 503:  # the rows may be freed later than it is back
                    _, second = node.hear("attempt")
                assert node.hear("answer", "error")[0] == "answer"
        assert first["status"] == 503 and second["status"] == 200
        assert second["at"] - first["at"] > 900  # ms, of the second that Retry-After names


# ----------------------------------------------------------------------------------------------------------------------
# schemathesis, which asks what /openapi.json allows, and what it does not


def test_whatever_schemathesis_asks_it_is_answered_as_openapi_json_tells(tmp_path):
    """No 500, no status, content or field that is not told of, nothing taken that is not allowed, nothing without the
    key. What two fields allow together can't be told, so of what is allowed some is refused; and that of all POSTs
    those of another content are refused before the method is, test_serve holds."""
    pytest.importorskip("schemathesis")
    write_model(tmp_path, block_size=64)
    for server in served(tmp_path, key="a-key"):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["-H", "Authorization: Bearer a-key", "--max-examples=100", "--workers=1"]
        command += ["--phases=examples,coverage,fuzzing", "--continue-on-failure", "--generation-deterministic"]
        command += ["--exclude-checks=positive_data_acceptance,unsupported_method"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout
        count = len(server.http.get("/openapi.json").json()["paths"]) - 1  # but for the document itself
        assert f"{count} selected / {count} total" in done.stdout
        assert int(re.search(r"(\d+) generated, \1 passed", done.stdout)[1]) > 500
        until(server.is_idle)
