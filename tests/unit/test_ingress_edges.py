"""Clients that do not read, failures that nobody foresaw, tokens that the tokenizer adds."""

import asyncio
import json
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import DEMO_MODEL, STORY, demo_tokenizer, make_engine, running_service

from remora.actors.tokenizer import Tokenizer
from remora.cluster import sse
from remora.cluster.chat import encode_chat
from remora.cluster.completions import _check_answer, _own_tokens
from remora.cluster.ingress import build_app
from remora.cluster.logprob_text import echo_logprobs
from remora.cluster.openai_schema import ChatRequest, CompletionRequest
from remora.cluster.service import Service
from remora.cluster.sse import EventStream
from remora.comm.errors import RequestError
from remora.comm.messages import TokenLogprobs, encode
from remora.comm.wire import FRAME_BYTES_MAX

C = "/v1/completions"


def test_a_client_that_reads_nothing_gives_its_room_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "LAST_WRITE_S", 0.1)

    async def main() -> None:
        async with running_service(engine, request_timeout_s=0.2) as service:
            body = CompletionRequest(model=None, prompt="x", max_tokens=100, stream=True)
            generation, form = await service.completion(body)
            stuck = asyncio.Event()

            async def send(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.body":
                    stuck.set()
                    await asyncio.Event().wait()  # its socket takes no more

            async def receive() -> MutableMapping[str, Any]:
                await asyncio.Event().wait()  # nor does it hang up
                raise AssertionError

            answering = asyncio.ensure_future(EventStream(generation, form)({}, receive, send))
            await asyncio.wait_for(stuck.wait(), 20)
            assert service.serving.admission.num_admitted == 1
            await asyncio.wait_for(answering, 20)
            assert service.serving.admission.num_admitted == 0

    with make_engine() as engine:
        asyncio.run(main())


def counted(service: Service, line: str) -> bool:
    return line in service.serving.metrics.render().decode().splitlines()


def test_what_nobody_foresaw_is_a_500_in_every_book(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running_service(engine) as service:

            def broken(text: str, *, add_special_tokens: bool = True) -> list[int]:
                raise ValueError("a secret")

            monkeypatch.setattr(service.tokenizer, "encode", broken)
            transport = httpx.ASGITransport(app=build_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                headers = {"x-request-id": "req-9"}
                answer = await client.post(C, json={"prompt": "x"}, headers=headers)
            assert answer.status_code == 500 and answer.headers["x-request-id"] == "req-9"
            assert answer.json()["error"]["code"] == "internal_error"
            assert "secret" not in answer.text
            line = f'remora_http_responses_total{{route="{C}",status="500"}} 1.0'
            assert counted(service, line)

    with make_engine() as engine:
        asyncio.run(main())


def test_a_timeout_is_counted_as_one() -> None:
    async def main() -> None:
        async with running_service(engine, request_timeout_s=0.1) as service:
            engine.hold()
            transport = httpx.ASGITransport(app=build_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert (await client.post(C, json={"prompt": "x"})).status_code == 504
            engine.release()
            assert counted(service, 'remora_requests_finished_total{reason="timeout"} 1.0')

    with make_engine() as engine:
        asyncio.run(main())


def test_a_large_answer_is_built_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "ANSWER_ON_LOOP_TOKENS", 5)
    threads: list[Any] = []
    to_thread = asyncio.to_thread

    async def noted(function: Any, *args: Any) -> Any:
        threads.append(function)
        return await to_thread(function, *args)

    monkeypatch.setattr(asyncio, "to_thread", noted)

    async def main() -> None:
        async with running_service(engine) as service:
            for max_tokens in (1, 100):
                body = CompletionRequest(
                    model=None, prompt="x", max_tokens=max_tokens, temperature=0
                )
                answer = await sse.collect(*await service.completion(body), None)
                assert answer is not None
            assert answer["choices"][0]["text"] == STORY

    with make_engine() as engine:
        asyncio.run(main())
    assert len(threads) == 1


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo model's tokenizer, which here puts a token before every text."""
    path = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL) / name, path)
    data = json.loads((path / "tokenizer.json").read_text())
    first = data["added_tokens"][0]
    token = {"SpecialToken": {"id": first["content"], "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            first["content"]: {
                "id": first["content"],
                "ids": [first["id"]],
                "tokens": [first["content"]],
            }
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer(path)


def test_a_token_that_the_tokenizer_adds_has_no_place_in_the_text(beginning: Tokenizer) -> None:
    text = "The whale swam"
    ids = beginning.encode(text)
    own = _own_tokens(ids, text, beginning)
    assert own == slice(1, len(ids))
    entry = TokenLogprobs(token_id=1, logprob=-1.0, rank=1, top_ids=[], top_logprobs=[])
    found = echo_logprobs(ids, [entry] * (len(ids) - 1), beginning, own)
    assert found["text_offset"][:2] == [0, 0]
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[1:]:
        assert text[offset:].startswith(token)
    assert _own_tokens([5, 6], "something else", beginning) == slice(0, 2), "all of it, at worst"


def test_a_message_that_is_continued_is_left_open() -> None:
    turns = [{"role": "user", "content": "Tell"}, {"role": "assistant", "content": "Once upon"}]
    tokenizer = demo_tokenizer()

    def rendered(**fields: Any) -> str:
        request = ChatRequest.model_validate({"messages": turns, **fields})
        ids = encode_chat(request.messages, request.template_kwargs, tokenizer)
        return tokenizer.decode(ids, skip_special_tokens=False)

    assert rendered(continue_final_message=True).endswith("Once upon")
    closed = rendered(add_generation_prompt=False)
    assert "Once upon" in closed and not closed.endswith("Once upon")
    assert rendered().startswith(closed) and len(rendered()) > len(closed)


@pytest.mark.parametrize("num_top", [0, 5, 20, 100])
def test_scores_of_a_prompt_fit_into_a_message_or_are_refused(num_top: int) -> None:
    entry = TokenLogprobs(
        token_id=2**31,
        logprob=-1.234567890123,
        rank=2**31,
        top_ids=[2**31] * num_top,
        top_logprobs=[-1.234567890123] * num_top,
    )
    with pytest.raises(RequestError, match="at most") as refused:
        _check_answer(2**20, num_top)
    allowed = int(refused.value.message.partition("at most ")[2].partition(" ")[0])
    assert len(encode([entry] * 100)) / 100 * allowed < FRAME_BYTES_MAX
