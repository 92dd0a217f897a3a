"""A dense group dies under its requests: they go on elsewhere, and nothing of it can be read."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.fake_engine import HOST, FakeEngine
from support.fake_engine import TOKEN as FAKE_TOKEN
from support.local_cluster import TOKEN, Ask, LocalCluster
from support.serving import make_engine, running_service

from remora.actors.dense_events import DenseLimits
from remora.actors.finish import refusal
from remora.cluster import engine_client
from remora.cluster.emit_log import EmitLog
from remora.cluster.engine_client import REPLAYS_MAX, EngineClient
from remora.cluster.inbox import Inbox
from remora.cluster.ingress import build_app
from remora.cluster.service import Service
from remora.comm.messages import SamplingParams, SequenceOutput, Submit
from remora.comm.view import Member

C = "/v1/completions"
HOLD_S = 60.0
LONG = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": LONG,
    "seeded": LONG | {"temperature": 1.0, "seed": 7, "n": 3},
    "log-probabilities": LONG | {"logprobs": 2, "echo": True},
    "length": LONG | {"max_tokens": 33},
    "a stop string": LONG | {"stop": ["said: stop"]},
    "the end of the story": LONG | {"ignore_eos": False, "max_tokens": 150},
    "several prompts": LONG | {"prompt": ["x", "y z"], "logprobs": 0},
}


async def until(condition: Any, timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@contextmanager
def engines(count: int, pace_s: float = 0.004) -> Iterator[list[FakeEngine]]:
    made = [make_engine(uid=f"dense-{i}", pace_s=pace_s) for i in range(count)]
    try:
        for engine in made:
            engine.__enter__()
        yield made
    finally:
        for engine in made:
            engine.close()


def client_of(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=build_app(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    found = await client.post(C, json=body)
    assert found.status_code == 200, found.text
    if body.get("stream"):
        return [line for line in found.text.splitlines() if line.startswith("data: ")]
    return {key: found.json()[key] for key in ("choices", "usage")}


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_an_answer_across_two_dense_groups_is_the_same(body: dict[str, Any]) -> None:
    async def check(first: FakeEngine, second: FakeEngine) -> None:
        async with running_service(first, second, hold_s=HOLD_S) as service:
            async with client_of(service) as client:
                expected = await answer(client, body)
                first.submitted.clear()
                second.submitted.clear()
                task = asyncio.ensure_future(answer(client, body))
                await until(lambda: bool(first.submitted or second.submitted))
                victim, other = (first, second) if first.submitted else (second, first)
                steps = victim.state.stats().steps_total
                await until(lambda: victim.state.stats().steps_total >= steps + 12)
                await asyncio.to_thread(victim.close)
                assert await task == expected
        replayed = [submit for submit in other.submitted if submit.output_ids]
        assert replayed and all(5 < len(s.output_ids) < 60 for s in replayed)
        assert service.serving.engine.num_replays == len(victim.submitted)

    with engines(2) as (first, second):
        asyncio.run(check(first, second))


def test_without_another_group_requests_wait_for_a_new_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = LONG | {"stream": True, "logprobs": 1}

    async def check(engine: FakeEngine) -> None:
        async with running_service(engine, hold_s=HOLD_S) as service:
            async with client_of(service) as client:
                expected = texts(await answer(client, body))
                task = asyncio.ensure_future(answer(client, body))
                await until(lambda: len(engine.submitted) == 2)
                steps = engine.state.stats().steps_total
                await until(lambda: engine.state.stats().steps_total >= steps + 10)
                await asyncio.to_thread(engine.close)
                await until(lambda: service.serving.engine.num_serving == 0)
                new = asyncio.ensure_future(answer(client, LONG))  # intake stays open
                dropped = asyncio.ensure_future(answer(client, LONG))
                await until(lambda: service.serving.admission.num_admitted == 3)
                dropped.cancel()  # its client leaves meanwhile
                with make_engine() as successor:
                    monkeypatch.setattr(engine, "member", successor.member)
                    assert texts(await task) == expected
                    await new
                    assert len(successor.submitted) == 2

    with engines(1) as (engine,):
        asyncio.run(check(engine))


def texts(lines: list[str]) -> list[str]:
    """Without what differs between any two requests: ids and times."""
    return [line.partition('"choices"')[2] for line in lines]


def test_nobody_waits_for_ever() -> None:
    async def check(engine: FakeEngine) -> None:
        async with running_service(engine, hold_s=0.2) as service:
            async with client_of(service) as client:
                task = asyncio.ensure_future(client.post(C, json=LONG))
                await until(lambda: len(engine.submitted) == 1)
                await asyncio.to_thread(engine.close)
                found = await task
                assert found.status_code == 503
                assert "within 0.2 s" in found.json()["error"]["message"]
                assert service.serving.admission.num_admitted == 0

    with engines(1) as (engine,):
        asyncio.run(check(engine))


def test_a_request_that_kills_whoever_runs_it_is_given_up() -> None:
    async def check(made: list[FakeEngine]) -> None:
        async with running_service(*made, hold_s=HOLD_S) as service:
            async with client_of(service) as client:
                task = asyncio.ensure_future(client.post(C, json=LONG))
                for _ in range(REPLAYS_MAX + 1):
                    living = [engine for engine in made if not engine.closed]
                    await until(lambda here=living: any(e.submitted for e in here))
                    await asyncio.to_thread(next(e for e in living if e.submitted).close)
                found = await task
                assert found.status_code == 503, found.text
                assert "was lost" in found.json()["error"]["message"]

    with engines(REPLAYS_MAX + 2, pace_s=0.05) as made:
        asyncio.run(check(made))
        [left] = [engine for engine in made if not engine.closed]
        assert left.submitted == []


def test_a_request_outlives_any_number_of_groups_that_retire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes are drained one after the other: no fault of the request's."""
    monkeypatch.setattr(engine_client, "PING_EVERY_S", 0.01)

    async def check(made: list[FakeEngine]) -> None:
        async with running_service(*made, hold_s=HOLD_S) as service:
            async with client_of(service) as client:
                task = asyncio.ensure_future(client.post(C, json=LONG))
                for _ in range(REPLAYS_MAX + 1):
                    living = [engine for engine in made if not engine.closed]
                    await until(lambda here=living: any(e.submitted for e in here))
                    owner = next(engine for engine in living if engine.submitted)
                    owner.retires, told = True, owner.pongs
                    await until(lambda e=owner, told=told: e.pongs > told + 2)  # it was heard
                    await asyncio.to_thread(owner.close)
                found = await task
                assert found.status_code == 200, found.text

    with engines(REPLAYS_MAX + 2, pace_s=0.05) as made:
        asyncio.run(check(made))


def test_a_group_that_the_view_names_no_more_gets_nothing_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check(first: FakeEngine, second: FakeEngine) -> None:
        named = [first]

        async def members() -> list[Member]:
            return [engine.member() for engine in named]

        client = EngineClient(members, token=FAKE_TOKEN, self_host=HOST, hold_s=HOLD_S)
        await client.start()
        try:
            old, new = Inbox(), Inbox()
            await client.submit([ask("old")], old)
            named[:] = [second]
            first.adopt(2)  # what it tells has an ingress ask for the view
            await until(lambda: "dense-1" in client.stats())
            await client.submit([ask("new")], new)
            assert await tokens_of(old) == await tokens_of(new)
            assert [s.request_id for s in first.submitted] == ["old"], "it finishes what it has"
            assert [s.request_id for s in second.submitted] == ["new"]
            assert client.num_serving == client.num_groups == 1
        finally:
            await client.close()

    with engines(2, pace_s=0.02) as (first, second):
        asyncio.run(check(first, second))


def ask(request_id: str, **params: Any) -> Submit:
    chosen = SamplingParams(**({"max_tokens": 60, "temperature": 0.0, "ignore_eos": True} | params))
    return Submit(request_id=request_id, prompt_ids=[5, 6, 7, 8], params=chosen)


async def tokens_of(inbox: Inbox) -> list[int]:
    found: list[int] = []
    while True:
        for output in await inbox.take():
            assert output.error is None, output.error
            found += output.token_ids
            if output.finish_reason is not None:
                return found


def test_the_rest_of_a_sequence() -> None:
    log = EmitLog(ask("a", prompt_logprobs=1), Inbox())
    assert log.rest() is log.submit, "nothing came yet: the prompt's log-probabilities neither"
    for token_id in (3, 4):
        log.take(SequenceOutput(request_id="a", token_ids=[token_id]))
    rest = log.rest()
    assert rest.output_ids == [3, 4] and rest.params.prompt_logprobs is None
    assert rest.prompt_ids == log.submit.prompt_ids and rest.request_id == "a"


@pytest.mark.parametrize(
    ("params", "output_ids", "reason"),
    [
        ({"max_tokens": 2}, [3, 4], "2 tokens were generated before, max_tokens is 2"),
        ({"prompt_logprobs": 1}, [3], "prompt_logprobs come with the first token"),
        ({}, [99], "token id 99 is outside the vocabulary"),
        ({}, [3], None),
        ({"prompt_logprobs": 1}, [], None),
    ],
)
def test_what_a_dense_group_takes_over(
    params: dict[str, Any], output_ids: list[int], reason: str | None
) -> None:
    submit = msgspec.structs.replace(ask("a", **params), output_ids=output_ids)
    limits = DenseLimits(num_blocks=64, max_model_len=256, vocab_size=50, max_tokens_per_step=512)
    found = refusal(submit, limits)
    assert found == reason if reason is None else reason in (found or "")


REAL: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "penalties": {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.9, "top_p": 0.8},
    "min_tokens": {"temperature": 1.0, "seed": 5, "min_tokens": 20, "ignore_eos": False},
}


def test_the_tokens_of_a_real_model_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The position keys the RNG, penalties count what was sent, recomputed KV is bitwise the
    same: `exact` numerics over a cut."""
    cluster = LocalCluster(
        make_checkpoint(tmp_path, "qwen3_moe"), num_shards=2, dtype="float32", exact=True
    )
    asks = [ask(name, **params) for name, params in REAL.items()]
    try:
        with cluster.dense() as first, cluster.dense(uid="dense-1") as second:

            def steps() -> int:
                found: int = first.actor.status()["steps_total"]
                return found

            async def run(cut_after: int | None) -> list[list[int]]:
                named = [first.member]

                async def members() -> list[Member]:
                    return named

                host = first.member.endpoint.host
                client = EngineClient(members, token=TOKEN, self_host=host, hold_s=HOLD_S)
                await client.start()
                inboxes = [Inbox() for _ in asks]
                for submit, inbox in zip(asks, inboxes, strict=True):
                    await client.submit([submit], inbox)
                pending = [asyncio.ensure_future(tokens_of(inbox)) for inbox in inboxes]
                if cut_after is not None:
                    await until(lambda: steps() >= cut_after)
                    named[:] = [second.member]
                    await asyncio.to_thread(first.actor.stop)
                found = await asyncio.gather(*pending)
                assert client.num_replays == (len(asks) if cut_after is not None else 0)
                await client.close()
                return list(found)

            expected = asyncio.run(run(None))
            assert len({tuple(tokens) for tokens in expected}) == len(asks)
            assert asyncio.run(run(steps() + 12)) == expected
            assert 0 < second.actor.status()["steps_total"] < 55, "the rest, and no more"
    finally:
        cluster.close()


CLIENT = """
import asyncio, msgspec, sys
from remora.comm.aio import connect_async
from remora.comm.messages import SamplingParams, Submit, encode
from remora.comm.view import Endpoint

async def main() -> None:
    endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
    link = await connect_async(endpoint, sys.argv[2].encode(), endpoint.host, name="ingress")
    params = SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True)
    for name in "abc":
        link.send(encode(Submit(request_id=name, prompt_ids=[5, 6, 7, 8], params=params)))
    async for _ in link:
        pass

asyncio.run(main())
"""


def test_an_ingress_that_is_killed_frees_its_kv_and_disturbs_nobody(tmp_path: Path) -> None:
    cluster = LocalCluster(
        make_checkpoint(tmp_path, "qwen3_moe"), num_shards=1, dtype="float32", exact=True
    )
    ours = Ask((9, 9, 8), SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
    try:
        with cluster.dense(prefix_caching=False) as dense:
            expected = dense.ask([ours])[0].token_ids
            endpoint = msgspec.json.encode(dense.member.endpoint).decode()
            command = [sys.executable, "-P", "-c", CLIENT, endpoint, TOKEN.decode()]
            with subprocess.Popen(command) as process:

                async def kill_it_meanwhile() -> list[int]:
                    await until(lambda: dense.actor.status()["num_running"] == 3)
                    asked = asyncio.ensure_future(asyncio.to_thread(dense.ask, [ours]))
                    await until(lambda: dense.actor.status()["num_running"] == 4)
                    process.kill()
                    steps = dense.actor.status()["steps_total"]
                    await until(lambda: dense.actor.status()["num_running"] <= 1)
                    taken = dense.actor.status()["steps_total"] - steps
                    assert taken < 60, f"{taken} steps: they ran on for nobody"
                    [found] = await asked
                    return found.token_ids

                assert asyncio.run(kill_it_meanwhile()) == expected
            assert dense.actor.status()["kv_blocks_used"] == 0
    finally:
        cluster.close()
