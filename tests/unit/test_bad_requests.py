"""Malformed requests: each gets its status and the one error body, and none disturbs a stream.

A stream runs through the whole table on the same server; it must come out as if it were alone.
"""

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import MAX_MODEL_LEN, MODEL, STORY, Server, make_engine, serving

C, CHAT, TOK, DETOK = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
USER = [{"role": "user", "content": "hi"}]
KEY = "sk-right-key"
BODY_BYTES_MAX = 1 << 20


def c(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", **fields}


def ch(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, **fields}


# path, body (dict -> JSON, str or bytes as they are), status, param, word in the message
BAD: list[tuple[str, str, Any, int, str | None, str]] = [
    ("no body", C, b"", 400, None, "json"),
    ("not json", C, "{nope", 400, None, "json"),
    ("json list", C, "[1,2]", 400, None, "object"),
    ("json null", C, "null", 400, None, "object"),
    ("json string", CHAT, '"hi"', 400, None, "object"),
    ("truncated", CHAT, '{"messages": [', 400, None, "json"),
    ("not utf-8", C, b'{"prompt": "\xff\xfe"}', 400, None, "json"),
    ("lone surrogate", C, '{"prompt": "\\ud800"}', 400, None, ""),
    ("two documents", C, '{"prompt": "a"} {}', 400, None, "json"),
    ("deep json", C, '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", 400, None, ""),
    ("deep unknown field", C, '{"prompt":"x","z":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}", 400,
     None, "json"),
    ("no prompt", C, {"model": MODEL}, 400, "prompt", "required"),
    ("prompt null", C, c(prompt=None), 400, "prompt", "allowed"),
    ("prompt empty", C, c(prompt=""), 400, "prompt", "empty"),
    ("prompt no items", C, c(prompt=[]), 400, "prompt", ""),
    ("prompt empty item", C, c(prompt=["a", ""]), 400, "prompt", ""),
    ("prompt empty ids", C, c(prompt=[[]]), 400, "prompt", ""),
    ("prompt number", C, c(prompt=7), 400, "prompt", "7"),
    ("prompt object", C, c(prompt={"a": 1}), 400, "prompt", ""),
    ("prompt mixed", C, c(prompt=["a", 1]), 400, "prompt", ""),
    ("prompt bools", C, c(prompt=[True, False]), 400, "prompt", ""),
    ("prompt floats", C, c(prompt=[1.5]), 400, "prompt", ""),
    ("prompt negative id", C, c(prompt=[-1]), 400, "prompt", ""),
    ("prompt id over vocabulary", C, c(prompt=[999999]), 400, "prompt", "vocabulary"),
    ("prompt id huge", C, c(prompt=[10**30]), 400, "prompt", ""),
    ("prompt nested thrice", C, c(prompt=[[[1]]]), 400, "prompt", ""),
    ("too many prompts", C, c(prompt=["a"] * 33), 400, "prompt", "33"),
    ("too many sequences", C, c(prompt=["a"] * 32, n=8), 400, "n", "sequences"),
    ("context exceeded by prompt", C, c(prompt=[5] * (MAX_MODEL_LEN + 1)), 400, "prompt",
     "context"),
    ("context exceeded by max_tokens", C, c(max_tokens=MAX_MODEL_LEN), 400, "max_tokens",
     "context"),
    ("max_tokens zero without echo", C, c(max_tokens=0), 400, "max_tokens", "echo"),
    ("max_tokens negative", C, c(max_tokens=-5), 400, "max_tokens", "-5"),
    ("max_tokens text", C, c(max_tokens="5"), 400, "max_tokens", "integer"),
    ("max_tokens float", C, c(max_tokens=1.5), 400, "max_tokens", ""),
    ("max_tokens bool", C, c(max_tokens=True), 400, "max_tokens", ""),
    ("max_tokens huge", C, c(max_tokens=10**40), 400, "max_tokens", ""),
    ("max_tokens of 10,000 digits", C, '{"prompt":"x","max_tokens":' + "9" * 10000 + "}", 400,
     None, ""),
    ("temperature NaN", C, '{"prompt":"x","temperature":NaN}', 400, "temperature", ""),
    ("temperature infinite", C, '{"prompt":"x","temperature":Infinity}', 400, "temperature", ""),
    ("temperature overflow", C, '{"prompt":"x","temperature":1e999}', 400, "temperature", ""),
    ("temperature negative", C, c(temperature=-0.1), 400, "temperature", "-0.1"),
    ("temperature high", C, c(temperature=2.1), 400, "temperature", "2"),
    ("temperature text", C, c(temperature="hot"), 400, "temperature", "hot"),
    ("temperature bool", C, c(temperature=True), 400, "temperature", ""),
    ("top_p high", C, c(top_p=1.5), 400, "top_p", ""),
    ("top_k low", C, c(top_k=-2), 400, "top_k", ""),
    ("min_p high", C, c(min_p=2), 400, "min_p", ""),
    ("repetition_penalty zero", C, c(repetition_penalty=0), 400, "repetition_penalty", ""),
    ("presence_penalty", CHAT, ch(presence_penalty=3), 400, "presence_penalty", ""),
    ("frequency_penalty", CHAT, ch(frequency_penalty=-3), 400, "frequency_penalty", ""),
    ("n zero", C, c(n=0), 400, "n", ""),
    ("n many", C, c(n=129), 400, "n", "128"),
    ("seed text", C, c(seed="1"), 400, "seed", ""),
    ("seed huge", C, c(seed=2**64), 400, "seed", ""),
    ("stops many", C, c(stop=["a"] * 65), 400, "stop", "64"),
    ("stop empty", C, c(stop=""), 400, "stop", ""),
    ("stop empty item", C, c(stop=["a", ""]), 400, "stop", ""),
    ("stop number", C, c(stop=3), 400, "stop", ""),
    ("stop_token_ids", C, c(stop_token_ids=[99999]), 400, "stop_token_ids", "vocabulary"),
    ("logit_bias list", C, c(logit_bias=[1]), 400, "logit_bias", ""),
    ("logit_bias name", C, c(logit_bias={"the": 1}), 400, "logit_bias", ""),
    ("logit_bias large", C, c(logit_bias={"5": 101}), 400, "logit_bias", "101"),
    ("logit_bias outside", C, c(logit_bias={"99999": 1}), 400, "logit_bias", "vocabulary"),
    ("logit_bias many", C, c(logit_bias={str(i): 1 for i in range(2000)}), 400, "logit_bias",
     "1024"),
    ("logprobs many", C, c(logprobs=21), 400, "logprobs", "20"),
    ("logprobs bool", C, c(logprobs=True), 400, "logprobs", ""),
    ("min over max tokens", C, c(min_tokens=9, max_tokens=8), 400, "min_tokens", "9"),
    ("suffix", C, c(suffix="end"), 400, "suffix", "not supported"),
    ("best_of", C, c(best_of=2), 400, "best_of", "not supported"),
    ("stream text", C, c(stream="yes"), 400, "stream", ""),
    ("stream_options list", C, c(stream=True, stream_options=[]), 400, "stream_options", ""),
    ("echo number", C, c(echo=1), 400, "echo", ""),
    ("priority", C, c(priority=2**40), 400, "priority", ""),
    ("domain", C, c(domain="a domain"), 400, "domain", ""),
    ("long domain", C, c(domain="x" * 65), 400, "domain", ""),
    ("model unknown", C, c(model="gpt-4"), 404, "model", "gpt-4"),
    ("model number", C, c(model=4), 400, "model", ""),
    ("no messages", CHAT, {"model": MODEL}, 400, "messages", "required"),
    ("messages empty", CHAT, ch(messages=[]), 400, "messages", ""),
    ("messages text", CHAT, ch(messages="hi"), 400, "messages", ""),
    ("message without role", CHAT, ch(messages=[{"content": "x"}]), 400, "messages", "role"),
    ("role unknown", CHAT, ch(messages=[{"role": "king", "content": "x"}]), 400, "messages", ""),
    ("content number", CHAT, ch(messages=[{"role": "user", "content": 3}]), 400, "messages", ""),
    ("content image", CHAT,
     ch(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400,
     "messages", "text"),
    ("chat max_tokens zero", CHAT, ch(max_tokens=0), 400, "max_tokens", ""),
    ("chat max_completion_tokens", CHAT, ch(max_completion_tokens=10**6), 400,
     "max_completion_tokens", "context"),
    ("chat logprobs number", CHAT, ch(logprobs=2), 400, "logprobs", ""),
    ("top_logprobs alone", CHAT, ch(top_logprobs=2), 400, "top_logprobs", "logprobs"),
    ("top_logprobs many", CHAT, ch(logprobs=True, top_logprobs=21), 400, "top_logprobs", "20"),
    ("tools", CHAT, ch(tools=[{"type": "function"}]), 400, "tools", "not supported yet"),
    ("tool_choice", CHAT, ch(tool_choice="required"), 400, "tool_choice", "not supported yet"),
    ("response_format", CHAT, ch(response_format={"type": "json_object"}), 400, "response_format",
     "not supported yet"),
    ("tool calls", CHAT,
     ch(messages=[{"role": "assistant", "tool_calls": [{"id": "a"}]}]), 400, "messages",
     "tool_calls"),
    ("guided_choice", C, c(guided_choice=["a"]), 400, "guided_choice", "not supported"),
    ("structured_outputs", CHAT, ch(structured_outputs={"json": {}}), 400, "structured_outputs",
     "not supported"),
    ("prompt_logprobs", C, c(prompt_logprobs=0), 400, "prompt_logprobs", "not supported"),
    ("chat echo", CHAT, ch(echo=True), 400, "echo", ""),
    ("a template of the client's", CHAT, ch(chat_template_kwargs={"chat_template": "x"}), 400,
     "chat_template_kwargs", "add_generation_prompt"),
    ("to tokenize by it", TOK,
     {"messages": USER, "chat_template_kwargs": {"chat_template": "{% for i in range(9) %}"}}, 400,
     "chat_template_kwargs", "chat_template"),
    ("template options", CHAT, ch(chat_template_kwargs={"max_length": 1, "truncation": True}), 400,
     "chat_template_kwargs", "max_length, truncation"),
    ("chat template kwargs", CHAT, ch(chat_template_kwargs=[1]), 400, "chat_template_kwargs", ""),
    ("context exceeded by chat", CHAT, ch(messages=[{"role": "user", "content": "a b " * 900}]),
     400, None, "context"),
    ("tokenize nothing", TOK, {}, 400, "prompt", "needed"),
    ("tokenize both", TOK, {"prompt": "x", "messages": USER}, 400, "prompt", "needed"),
    ("detokenize nothing", DETOK, {}, 400, "tokens", "required"),
    ("detokenize text", DETOK, {"tokens": "x"}, 400, "tokens", ""),
    ("detokenize outside", DETOK, {"tokens": [8192]}, 400, "tokens", "vocabulary"),
    ("body too large", C, b'{"prompt":"' + b"x" * BODY_BYTES_MAX + b'"}', 413, None, "larger"),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with make_engine(pace_s=0.005) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Server]:
    patch = pytest.MonkeyPatch()
    patch.setenv("REMORA_API_KEYS", f"{KEY},sk-other")
    with serving(engine, body_bytes_max=BODY_BYTES_MAX, batch_max=32, queue_max=128) as server:
        yield server
    patch.undo()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def story(server: Server) -> Iterator[list[str]]:
    """A stream that runs while this module's requests are refused; checked when they are over."""
    done: list[str] = []
    failures: list[BaseException] = []
    stop = threading.Event()
    body = {"prompt": "x", "temperature": 0, "max_tokens": 100, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}

    def run() -> None:
        try:
            with httpx.Client(base_url=server.url, headers=headers, timeout=60) as own:
                while not stop.is_set():
                    done.append(_streamed_text(own, body))
        except BaseException as failure:  # re-raised in the test's thread below
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    yield done
    stop.set()
    thread.join()
    assert not failures, failures
    assert done and set(done) == {STORY}, "a refused request disturbed a stream"


def _streamed_text(client: httpx.Client, body: dict[str, Any]) -> str:
    text = ""
    with client.stream("POST", C, json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["text"]
    return text


def assert_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 500
    assert isinstance(error["type"], str)
    return error


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case[0]))
def test_malformed(
    client: httpx.Client, story: list[str], case: tuple[str, str, Any, int, str | None, str]
) -> None:
    _, path, body, status, param, word = case
    content = json.dumps(body) if isinstance(body, dict) else body
    headers = {"Content-Type": "application/json", "X-Request-Id": "req-7"}
    error = assert_error(client.post(path, content=content, headers=headers), status)
    if param is not None:
        assert error["param"] == param, error
    assert word.lower() in error["message"].lower(), error
    assert "value error" not in error["message"].lower(), "pydantic's words, not ours"


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("POST", "/v1/completions/", 404, "route_not_found"),
        ("GET", C, 405, "method_not_allowed"),
        ("DELETE", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/ep/view", 403, "admin_closed"),
    ],
)
def test_routes(
    client: httpx.Client, story: list[str], method: str, path: str, status: int, code: str
) -> None:
    error = assert_error(client.request(method, path), status)
    assert error["code"] == code


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Basic c2stcmlnaHQ=", "Bearer sk-wrong", f"Bearer {KEY}x",
     KEY, "Bearer \u00fc"],
)  # fmt: skip
def test_keys(server: Server, story: list[str], authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("utf-8")}
    with httpx.Client(base_url=server.url) as client:
        for path in (C, CHAT, "/tokenize"):
            response = client.post(path, json=c(), headers=headers)  # type: ignore[arg-type]
            error = assert_error(response, 401)
            assert "sk-" not in response.text and "right" not in response.text
            assert error["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200


def test_content_type(client: httpx.Client, story: list[str]) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = client.post(C, content=json.dumps(c()), headers={"Content-Type": kind})
        assert_error(response, 415)
    fine = client.post(
        C, content=json.dumps(c()), headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert fine.status_code == 200


def test_a_body_without_length_is_bounded_too(server: Server, story: list[str]) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (BODY_BYTES_MAX // 16)

    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        connection.request("POST", C, body=chunks(), headers=headers, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # answered and closed before it had read everything
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_unknown_fields_and_nulls_are_ignored(client: httpx.Client, story: list[str]) -> None:
    nulls = dict.fromkeys(
        ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "logit_bias",
         "stream", "stream_options", "suffix", "best_of", "user", "echo", "presence_penalty")
    )  # fmt: skip
    response = client.post(C, json={**c(), **nulls, "frobnicate": {"a": [1]}, "store": True})
    assert response.status_code == 200
    response = client.post(
        CHAT, json=ch(tools=None, tool_choice="none", response_format={"type": "text"}, tools_=1)
    )
    assert response.status_code == 200
