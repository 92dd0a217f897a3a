"""Admission, lost engines, readiness, metrics, request ids: what there is beside answering."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import MODEL, STORY, make_engine, running_service

from remora.cluster.admission import RETRY_AFTER_S_MAX, Admission
from remora.cluster.ingress import build_app
from remora.cluster.metrics import EXPERTS_WITHOUT_REPLICA
from remora.cluster.request_plan import sequence_seed
from remora.cluster.service import Service
from remora.comm.errors import OverloadedError

C = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def run(
    test: Callable[[httpx.AsyncClient, Service], Awaitable[None]],
    *engines: FakeEngine,
    **http_options: Any,
) -> None:
    """Run a test against an application in process (no port), over engines on real sockets."""

    async def main() -> None:
        async with running_service(*engines, **http_options) as service:
            transport = httpx.ASGITransport(app=build_app(service), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await test(client, service)

    asyncio.run(main())


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_over_the_queue_is_429_with_retry_after_and_nothing_admitted_is_dropped() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        engine.hold()
        body = {"prompt": "x", "max_tokens": 100, "temperature": 0}
        running = [asyncio.create_task(client.post(C, json=body)) for _ in range(4)]
        await until(lambda: service.serving.admission.num_admitted == 4)
        refused = await client.post(C, json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        streamed = await client.post(C, json={**body, "stream": True})
        assert streamed.status_code == 429
        engine.release()
        for task in running:
            answer = await task
            assert answer.json()["choices"][0]["text"] == STORY
        assert service.serving.admission.num_admitted == 0
        assert (await client.post(C, json=body)).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert "remora_requests_rejected_total 2.0" in metrics

    with make_engine() as engine:
        run(check, engine, queue_max=4)


def test_a_domain_reaches_the_engine() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        messages = [{"role": "user", "content": "x"}]
        for path, body in ((C, {"prompt": "x"}), (CHAT, {"messages": messages})):
            answer = await client.post(path, json=body | {"max_tokens": 1, "domain": "law.v2"})
            assert answer.status_code == 200, answer.text
        await client.post(C, json={"prompt": "x", "max_tokens": 1})

    with make_engine() as engine:
        run(check, engine)
        assert [submit.domain for submit in engine.submitted] == ["law.v2", "law.v2", None]


def test_a_lost_engine_is_503_and_its_successor_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        assert (await client.get("/ready")).json()["status"] == "ready"
        engine.hold()
        waiting = asyncio.create_task(client.post(C, json=LONG))
        await until(lambda: len(engine.submitted) == 1)
        await asyncio.to_thread(engine.close)
        answer = await waiting
        assert answer.status_code == 503
        assert "dense-0" in answer.json()["error"]["message"]
        assert (await client.post(C, json=LONG)).status_code == 503
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert service.serving.admission.num_admitted == 0
        with make_engine() as successor:  # a new incarnation under another address
            monkeypatch.setattr(engine, "member", successor.member)
            await until(lambda: service.serving.engine.num_serving == 1)
            assert (await client.post(C, json=LONG)).status_code == 200

    with make_engine() as engine:
        run(check, engine)


def test_an_error_in_a_stream_is_an_event_and_other_groups_go_on() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        first.pace_s = second.pace_s = 0.005
        tasks = [asyncio.create_task(client.post(C, json={**LONG, "stream": True})) for _ in "ab"]
        await until(lambda: bool(first.submitted) and bool(second.submitted))  # least loaded first
        await asyncio.to_thread(first.close)
        texts = [(await task).text for task in tasks]
        broken = [text for text in texts if '"error"' in text]
        assert len(broken) == 1 and broken[0].endswith("data: [DONE]\n\n")
        assert "cluster_unavailable" in broken[0]
        whole = next(text for text in texts if '"error"' not in text)
        assert '"finish_reason":"length"' in whole
        assert (await client.get("/ready")).json()["status"] == "degraded"

    with make_engine() as first, make_engine(uid="dense-1") as second:
        run(check, first, second)


def test_experts_that_no_living_shard_holds_make_a_deployment_degraded() -> None:
    """Each request waited, and it was ready."""

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        metrics = service.serving.metrics
        for told, status in ((None, "ready"), (3.0, "degraded"), (0.0, "ready")):
            metrics.coordinator = {} if told is None else {EXPERTS_WITHOUT_REPLICA: told}
            answer = await client.get("/ready")
            assert (answer.status_code, answer.json()["status"]) == (200, status)
            assert answer.json()["experts_without_replica"] == told

    with make_engine() as engine:
        run(check, engine)


def test_load_balancers_may_probe_with_head() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for path in ("/health", "/ready", "/v1/models"):
            assert (await client.head(path)).status_code == 200
        assert (await client.head(C)).status_code == 405
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert not any("head" in operations for operations in paths.values())

    with make_engine() as engine:
        run(check, engine)


def test_ready_says_why_not() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        engine.serving = False
        await until(lambda: service.serving.engine.num_serving == 0)
        answer = await client.get("/ready")
        assert answer.status_code == 503
        assert "shard-1 does not answer" in answer.json()["error"]["message"]

    with make_engine() as engine:
        engine.serving = False
        run(check, engine)


def test_a_request_over_its_time_is_504_and_aborted() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        engine.hold()
        answer = await client.post(C, json=LONG)
        assert answer.status_code == 504
        engine.release()
        await until(lambda: engine.submitted[0].request_id in engine.aborted)

    with make_engine() as engine:
        run(check, engine, request_timeout_s=0.1)


class Lines(logging.Handler):
    """As Serve's, of its file or of standard error."""

    def __init__(self, *attributes: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        for name in attributes:
            self.addFilter(lambda record, name=name: getattr(record, name, True))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def kept_by_serve(*attributes: str) -> Iterator[list[str]]:
    handler, log = Lines(*attributes), logging.getLogger("ray.serve")
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


def test_request_ids_and_trace_context() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        headers = {"X-Request-Id": "abc-1", "traceparent": trace}
        answer = await client.get("/v1/models", headers=headers)
        assert answer.headers["x-request-id"] == "abc-1"
        bad = {"X-Request-Id": "x" * 200, "traceparent": "00-zz"}
        other = await client.get("/nowhere", headers=bad)
        assert len(other.headers["x-request-id"]) == 32

    with (
        make_engine() as engine,
        kept_by_serve() as lines,
        kept_by_serve("log_to_stderr") as errors,
    ):
        run(check, engine)
        first, other = lines
        assert first.startswith("GET /v1/models 200 ")
        assert first.endswith(f" ms request_id=abc-1 traceparent={trace}")
        assert other.startswith("GET other 404 ") and "00-zz" not in other
        assert errors == [], "which nobody rotates"
        run(check, engine, access_log=False)
        assert len(lines) == 2


def test_metrics_count_what_happened() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        body = {"prompt": "The whale", "max_tokens": 5, "temperature": 0}
        for stream in (False, True):
            await client.post(C, json={**body, "stream": stream})
        text = (await client.get("/metrics")).text
        values = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }
        assert values["remora_generation_tokens_total"] == 10
        assert values["remora_time_to_first_token_seconds_count"] == 2
        assert values["remora_inter_token_latency_seconds_count"] == 8
        assert values["remora_request_duration_seconds_count"] == 2
        assert values['remora_requests_finished_total{reason="length"}'] == 2
        assert values['remora_engine_steps_total{group="dense-0"}'] >= 10
        assert values['remora_http_responses_total{route="/v1/completions",status="200"}'] == 2
        assert values["remora_ingress_sequences"] == 0

    with make_engine() as engine:
        run(check, engine)


def test_tokenize_and_detokenize_are_inverse() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        text = "A whale \U0001f433 swam."
        ids = (await client.post("/tokenize", json={"prompt": text})).json()
        assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 256
        back = await client.post("/detokenize", json={"tokens": ids["tokens"]})
        assert back.json() == {"prompt": text}
        messages = [{"role": "user", "content": "hi"}]
        chat = (await client.post("/tokenize", json={"messages": messages})).json()
        spelled = await client.post("/detokenize", json={"tokens": chat["tokens"]})
        assert spelled.json()["prompt"].endswith("<|im_start|>assistant\n")

    with make_engine() as engine:
        run(check, engine)


def test_chat_stops_at_the_end_of_a_turn() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}],
            "logit_bias": {str(service.tokenizer.turn_end_id): 100},
        }
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert choice["message"]["content"] == ""
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)

    with make_engine() as engine:
        run(check, engine)


def test_admission_tells_when_to_come_back() -> None:
    admission = Admission(10)
    admission.admit(10)
    with pytest.raises(OverloadedError) as caught:
        admission.admit(1)
    assert caught.value.retry_after_s == 1  # nothing known of the rate yet
    for second in range(1, 30):
        admission.release(1, float(second))
        admission.admit(1)
    assert admission.retry_after_s(5) == pytest.approx(5, abs=1)  # one ends each second
    assert admission.retry_after_s(10_000) == RETRY_AFTER_S_MAX


def test_seeds_are_derived_and_in_range() -> None:
    seeds = [sequence_seed(42, choice) for choice in range(100)]
    assert seeds[0] == 42 and len(set(seeds)) == 100
    for seed in (-1, 2**64 - 1, -(2**63), 0):
        assert all(0 <= sequence_seed(seed, choice) < 2**63 for choice in range(3))
    assert sequence_seed(None, 0) != sequence_seed(None, 0)
    grid = {sequence_seed(seed, choice) for seed in range(32) for choice in range(32)}
    assert len(grid) == 32 * 32, "neighbouring seeds share no choice"


def test_a_stop_string_aborts_the_sequence_in_the_engine() -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        body = {**LONG, "stop": [" a remora"]}
        answer = await client.post(C, json=body)
        assert answer.json()["choices"][0]["text"] == STORY[: STORY.index(" a remora")]
        await until(lambda: engine.submitted[0].request_id in engine.aborted)

    with make_engine(pace_s=0.02) as engine:  # 200 tokens would take 4 s: it is far from its end
        run(check, engine)
