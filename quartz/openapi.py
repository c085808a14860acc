"""What serve.py speaks, as an OpenAPI document: routes, fields, defaults, limits, errors.

Read it where a field of quartz/api.py or a route of quartz/http.py comes, goes or changes: tests hold the three to each
other. It tells of every server of this kind, and nothing of the one that is asked: that has the narrower limits of its
rows, its context and its vocabulary.
"""

from quartz import api

JSON = "application/json"
ERRORS = {
    400: "a field is missing, wrong or out of range, or the prompt is too long",
    401: "the key is missing or wrong",
    403: "the Host is not known here, or the Origin is another",
    404: "there is no such model, or no run that is watched",
    408: "the body has not arrived in time",
    413: "the body is too large",
    415: "the content is not application/json",
    500: "the server has failed",
    503: "the model is being loaded, the queue is full, or the server is shutting down; see Retry-After",
    504: "the request has taken too long",
}
ASKED = (401, 403, 503)  # by a GET
SENT = (400, 401, 403, 404, 408, 413, 415, 503, 504)  # by a POST
LIST = {"type": "array"}
TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
IDS = {**LIST, "items": {**WHOLE, "minimum": 0}}
TEXTS, END = {**LIST, "items": TEXT}, {"type": ["string", "null"]}


def _field(kind: str, told: str, default: object = None, **limits: object) -> dict:
    """One that may be left out; null is the default."""
    return {"type": [kind, "null"], "description": told, "default": default, **limits}


def _any(told: str, *kinds: dict) -> dict:
    return {"anyOf": [*kinds, {"type": "null"}], "description": told, "default": None}


def _not_done(off: object) -> dict:
    return {"enum": [off, None], "description": "not supported but at the value that changes nothing", "default": None}


def _object(**properties: dict) -> dict:
    return {"type": "object", "properties": properties}


def _whole(**properties: dict) -> dict:
    """An object in which each of these is there."""
    return {**_object(**properties), "required": [*properties]}


MODEL = _field("string", "the model's name: it is compared, and need not be given")
STOP = {**TEXT, "minLength": 1, "maxLength": api.MAX_STOP}
PROMPTS = {**LIST, "minItems": 1, "maxItems": api.MAX_CHOICES}
CHOICES = {"minimum": 1, "maximum": api.MAX_CHOICES}

COMPLETION = _object(
    model=MODEL,
    prompt=_any(
        "a text, texts, ids or lists of ids; may be left out where the model has a token that ends a text",
        TEXT,
        {**PROMPTS, "items": TEXT},
        {**IDS, "minItems": 1},
        {**PROMPTS, "items": IDS},
    ),
    max_tokens=_field("integer", "16, if there is room; 0 with echo alone", minimum=0, maximum=api.WHOLE),
    n=_field("integer", "texts to each prompt, as many as the server has rows at the most", 1, **CHOICES),
    best_of=_field("integer", "not supported but as n", minimum=1, maximum=api.WHOLE),
    temperature=_field("number", "0 is greedy", 1.0, minimum=0, exclusiveMaximum=api.MAX_NUMBER),
    top_p=_field("number", "1 is off", 1.0, exclusiveMinimum=0, maximum=1),
    top_k=_field("integer", "0 and -1 are off", 0, minimum=-1, maximum=api.WHOLE),
    min_p=_field("number", "0 is off", 0.0, minimum=0, maximum=1),
    repetition_penalty=_field("number", "1 is off", 1.0, minimum=1e-6, maximum=1e6),
    seed=_field("integer", "of the first text; each draws with the next", minimum=-api.WHOLE, maximum=api.WHOLE - 1),
    stop=_any("texts before which a text ends", STOP, {**LIST, "items": STOP, "maxItems": api.MAX_STOPS}),
    stop_token_ids=_any("tokens with which a text ends", IDS),
    ignore_eos=_field("boolean", "goes on after the token that ends a text", False),
    echo=_field("boolean", "begins the text with the prompt", False),
    logprobs=_field("integer", "how many of the likeliest tokens are told of", minimum=0, maximum=api.MAX_LOGPROBS),
    stream=_field("boolean", "sends the text as server-sent events, as it is written", False),
    stream_options=_any("with stream alone", _object(include_usage=_field("boolean", "a last chunk tells it", False))),
    return_token_ids=_field("boolean", "tells the ids of prompt and text too", False),
    return_tokens_as_token_ids=_field("boolean", "spells tokens as token_id:N, in logprobs", False),
    **{name: _not_done(off) for name, off in api.NOT_DONE.items()},
)
TOKENIZE = _object(
    model=MODEL,
    prompt=_field("string", "the text"),
    content=_field("string", "the text, by llama.cpp's name; it goes before prompt"),
    messages={"type": "null", "description": "no model here has chat tokens yet"},
    return_token_strs=_field("boolean", "tells how tokens are spelled", False),
    with_pieces=_field("boolean", "tokens are objects, with how each is spelled", False),
) | {"anyOf": [{"required": [name], "properties": {name: TEXT}} for name in ("prompt", "content")]}
DETOKENIZE = {**_object(model=MODEL, tokens=IDS), "required": ["tokens"]}
CHAT = _object(model=MODEL, messages={**LIST, "items": {"type": "object"}})

LIKELIEST = {"type": ["object", "null"], "additionalProperties": NUMBER}
LOGPROBS = _whole(
    tokens=TEXTS,
    token_logprobs={**LIST, "items": {"type": ["number", "null"]}},
    top_logprobs={**LIST, "items": LIKELIEST},
    text_offset=IDS,
)
CHOICE = _whole(
    index=WHOLE,
    text=TEXT,
    logprobs={"anyOf": [LOGPROBS, {"type": "null"}]},
    finish_reason={"enum": ["stop", "length"]},
)
CHOICE["properties"] |= {"prompt_token_ids": IDS, "token_ids": IDS}  # where they are asked for
USAGE = _whole(
    prompt_tokens=WHOLE,
    completion_tokens=WHOLE,
    total_tokens=WHOLE,
    prompt_tokens_details=_whole(cached_tokens=WHOLE),
)
COMPLETED = _whole(
    id=TEXT,
    object={"const": "text_completion"},
    created=WHOLE,
    model=TEXT,
    system_fingerprint=TEXT,
    choices={**LIST, "items": CHOICE},
    usage=USAGE,
)
ITS = _whole(
    id=TEXT,
    object={"const": "model"},
    created=WHOLE,
    owned_by=TEXT,
    max_model_len=WHOLE,
    system_fingerprint=TEXT,
)
COLUMNS = {"type": "object", "additionalProperties": {**LIST, "items": {"type": ["number", "null"]}}}
RUN = _whole(
    fingerprint=END,
    iter={"type": ["integer", "null"]},
    best_val_loss={"type": ["number", "null"]},
    max_iters={"type": ["integer", "null"]},
    problem=END,
    updates=COLUMNS,
    evaluations=COLUMNS,
)
BYTES = {**LIST, "items": {**WHOLE, "minimum": 0, "maximum": 255}}
VOCABULARY = _whole(tokens={**LIST, "items": {"anyOf": [TEXT, BYTES]}})
TOKENIZED = _whole(
    count=WHOLE,
    max_model_len=WHOLE,
    tokens={**LIST, "items": {"anyOf": [WHOLE, _whole(id=WHOLE, piece=TEXT)]}},
    token_strs={"anyOf": [TEXTS, {"type": "null"}]},
)
TOKENIZER = _whole(
    tokenizer_class=TEXT,
    vocab_size=WHOLE,
    model_max_length=WHOLE,
    bos_token=END,
    eos_token=END,
    pad_token=END,
    eos_token_id={"type": ["integer", "null"]},
    special_tokens={"type": "object", "additionalProperties": WHOLE},
    chat_template=END,
)
ERROR = _whole(
    error=_whole(
        message=TEXT,
        type={"enum": ["invalid_request_error", "server_error"]},
        param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    ),
)


def _answer(told: str, **content: dict) -> dict:
    return {"description": told, "content": {kind: {"schema": schema} for kind, schema in content.items()}}


def _errors(*statuses: int) -> dict:
    schema = {"$ref": "#/components/schemas/Error"}
    return {str(status): _answer(ERRORS[status], **{JSON: schema}) for status in statuses}


def _get(told: str, kind: str, schema: dict, *statuses: int, **more: object) -> dict:
    answers = {"200": _answer(told, **{kind: schema}), **_errors(*statuses)}
    return {"get": {"summary": told, "responses": answers, **more}}


def _post(told: str, body: dict, schema: dict | None, *statuses: int, **more: dict) -> dict:
    """schema: of the answer; None where there is only refusal."""
    content = {"required": True, "content": {JSON: {"schema": body}}}
    answers = {"200": _answer(told, **{JSON: schema}, **more)} if schema else {}
    return {"post": {"summary": told, "requestBody": content, "responses": answers | _errors(*statuses)}}


def document() -> dict:
    """The whole of it."""
    events = {"text/event-stream": {"description": "chunks of the answer in JSON, at the end [DONE]"}}
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    for_all = {"security": []}
    listed = _whole(object={"const": "list"}, data={**LIST, "items": ITS})
    paths = {
        "/v1/completions": _post("Writes texts", COMPLETION, COMPLETED, *SENT, 500, **events),
        "/v1/chat/completions": _post("Not yet: no model here has chat tokens", CHAT, None, *SENT),
        "/v1/models": _get("The model, in a list", JSON, listed, *ASKED),
        "/v1/models/{name}": _get("The model", JSON, ITS, *ASKED, 404, parameters=[name]),
        "/tokenize": _post("The tokens of a text", TOKENIZE, TOKENIZED, *SENT),
        "/detokenize": _post("The text of tokens", DETOKENIZE, _whole(prompt=TEXT, content=TEXT), *SENT),
        "/tokenizer_info": _get("The tokenizer", JSON, TOKENIZER, *ASKED),
        "/vocabulary": _get("What each token stands for", JSON, VOCABULARY, *ASKED),
        "/run": _get("The run that is watched", JSON, RUN, 401, 403, 404),
        "/": _get("The page", "text/html", TEXT, 403, **for_all),
        "/health": _get("Whether it is ready", JSON, _whole(status={"const": "ok"}), 403, 503, **for_all),
        "/metrics": _get("For Prometheus", "text/plain", TEXT, *ASKED),
        "/openapi.json": _get("This", JSON, {"type": "object"}, 403, **for_all),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "quartzGPT", "version": "1", "description": "OpenAI's API, for one model"},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "where the server has one"}},
        },
    }
