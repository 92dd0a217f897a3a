"""`/v1/ep/*` in process, over the real state machine: who may call, bodies, codes, the document."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.operations import HeldOperations, world_operations
from support.serving import make_engine, running_service

from remora.cluster.ingress import build_app
from remora.cluster.operation_request import OperationAnswer, PlacementAnswer
from remora.cluster.operation_routes import CALLS_MAX, OperationCalls
from remora.cluster.security import ADMIN_KEYS_ENV, API_KEYS_ENV
from remora.comm.errors import DeadlineError
from remora.comm.view import View

ADMIN = {"authorization": "Bearer admin-key"}
ROUTES = [
    ("GET", "/v1/ep/status"),
    ("POST", "/v1/ep/scale"),
    ("POST", "/v1/ep/drain"),
    ("POST", "/v1/ep/rebalance"),
    ("GET", "/v1/ep/placement"),
    ("PUT", "/v1/ep/placement"),
    ("GET", "/v1/ep/operations/up"),
    ("POST", "/v1/ep/operations/up/cancel"),
    ("HEAD", "/v1/ep/status"),
]
Test = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def operations(tmp_path: Path) -> Iterator[HeldOperations]:
    with world_operations(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEYS_ENV, "admin-key")
    monkeypatch.setenv(API_KEYS_ENV, "api-key")


def run(test: Test, operations: HeldOperations, headers: dict[str, str] = ADMIN) -> None:
    async def main() -> None:
        with make_engine() as engine:
            async with running_service(engine, body_bytes_max=4096) as service:
                service.operations = OperationCalls(operations)
                app = build_app(service)
                paths = {route.path for route in app.routes if "/v1/ep" in route.path}
                assert paths <= {path.replace("/up", "/{operation_id}") for _, path in ROUTES}
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://test", headers=headers
                ) as client:
                    await test(client)

    asyncio.run(main())


async def finished(client: httpx.AsyncClient, operation_id: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/ep/operations/{operation_id}?wait_s=5")
    assert answer.status_code == 200, answer.text
    operation: dict[str, Any] = answer.json()
    OperationAnswer.model_validate(operation)
    assert operation["outcome"] != "running"
    return operation


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"authorization": "Bearer api-key"}, 401), ({"authorization": "Bearer "}, 401)],
    ids=["no key", "an API key", "an empty one"],
)
def test_only_admin_keys_open(
    operations: HeldOperations, headers: dict[str, str], status: int
) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for method, path in ROUTES:
            answer = await client.request(method, path, json={"operation_id": "a", "shards": 3})
            assert answer.status_code == status, (method, path)
        assert operations.asked == [] and operations.view().epoch == 1

    run(check, operations, headers)


def test_without_admin_keys_they_are_closed_to_everybody(
    operations: HeldOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for method, path in ROUTES:
            answer = await client.request(method, path)
            assert answer.status_code == 403, (method, path)
            assert method == "HEAD" or answer.json()["error"]["code"] == "admin_closed"
        assert operations.asked == []

    monkeypatch.delenv(ADMIN_KEYS_ENV)
    for headers in ({}, {"authorization": "Bearer api-key"}, ADMIN):
        run(check, operations, headers)


def test_an_operation_that_is_not_wanted_is_undone(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        operations.holds = True
        await client.post("/v1/ep/scale", json={"operation_id": "up", "shards": 3})
        cancelled = await client.post("/v1/ep/operations/up/cancel")
        assert (cancelled.status_code, cancelled.json()["step"]) == (202, "undo")
        assert cancelled.headers["location"] == "/v1/ep/operations/up"
        operations.release()
        over = await finished(client, "up")
        assert (over["outcome"], over["reason"]) == ("failed", "it was cancelled")
        again = await client.post("/v1/ep/operations/up/cancel")
        assert (again.status_code, again.json()) == (200, over)
        unknown = await client.post("/v1/ep/operations/who/cancel")
        assert unknown.status_code == 404, unknown.text

    run(check, operations)


def test_an_operation_from_begin_to_end(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        operations.holds = True
        body = {"operation_id": "up", "shards": 3}
        begun = await client.post("/v1/ep/scale", json=body)
        assert begun.status_code == 202, begun.text
        assert begun.headers["location"] == "/v1/ep/operations/up"
        target = {
            "type": "scale",
            "shards": 3,
            "retire": [],
            "dense_groups": None,
            "gives_way": False,
        }
        assert begun.json()["target"] == target
        again = await client.post("/v1/ep/scale", json=body)
        assert (again.status_code, again.json()["outcome"]) == (202, "running")
        other = await client.post("/v1/ep/drain", json={"operation_id": "d", "uids": ["shard-1"]})
        assert other.status_code == 409, other.text
        assert other.json()["error"]["code"] == "operation_runs"
        status = (await client.get("/v1/ep/status")).json()
        assert status["operations"]["running"]["operation_id"] == "up"
        operations.release()
        assert (await finished(client, "up"))["joiners"] == {"shard-2": 1}
        over = await client.post("/v1/ep/scale", json=body)
        assert (over.status_code, over.json()["outcome"]) == (200, "done")
        taken = await client.post("/v1/ep/scale", json=body | {"shards": 4})
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "operation_id_taken")

    run(check, operations)


def test_a_placement_goes_out_and_comes_back(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.get("/v1/ep/placement")).json()
        PlacementAnswer.model_validate_json((await client.get("/v1/ep/placement")).content)
        placement = answer["placement"]
        placement["slots"]["shard-1"][0].append(0)
        body = {"operation_id": "p", "placement": placement}
        put = await client.put("/v1/ep/placement", json=body)
        assert put.status_code in (200, 202), put.text
        assert (await finished(client, "p"))["outcome"] == "done"
        now = (await client.get("/v1/ep/placement")).json()
        assert now["placement"]["slots"]["shard-1"] == [[2, 3, 0], [2, 3]]
        assert now["epoch"] > answer["epoch"] and now["view_hash"] != answer["view_hash"]
        moved = await client.post("/v1/ep/rebalance", json={"operation_id": "r", "dry_run": True})
        assert moved.json()["verdict"] == "confirm"

    run(check, operations)


BAD = [
    ("scale", {}, 400, "operation_id is required"),
    ("scale", {"operation_id": "a"}, 400, "shards or dense_groups is required"),
    ("scale", {"operation_id": "a", "shards": 3, "shard": 1}, 400, "mean shards?); allowed: "),
    ("scale", {"operation_id": "a", "shards": "3"}, 400, "shards"),
    ("scale", {"operation_id": "a", "shards": True}, 400, "shards"),
    ("scale", {"operation_id": "a", "shards": 2.0}, 400, "shards"),
    ("scale", {"operation_id": "a", "shards": 0}, 400, "shards"),
    ("scale", {"operation_id": "a", "shards": 3, "retire": "shard-0"}, 400, "retire"),
    ("scale", {"operation_id": "../x", "shards": 3}, 400, "operation_id"),
    ("scale", {"operation_id": "restore-x", "shards": 3}, 400, "own"),
    ("scale", {"operation_id": "take-over-x", "shards": 3}, 400, "own"),
    ("scale", {"operation_id": "a", "shards": 1, "retire": ["shard-8"]}, 400, "shard-8"),
    ("drain", {"operation_id": "a", "uids": []}, 400, "uids"),
    ("drain", {"operation_id": "a", "uids": ["x" * 5000]}, 413, "larger than 4096"),
    ("rebalance", {"operation_id": "a", "dry_run": 1}, 400, "dry_run"),
    ("placement", {"operation_id": "a", "placement": {}}, 400, "num_experts"),
    ("placement", {"operation_id": "a", "placement": {"slot": {}}}, 400, "num_experts, slots"),
]


def test_bodies_are_strict(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for route, body, status, text in BAD:
            method = "PUT" if route == "placement" else "POST"
            answer = await client.request(method, f"/v1/ep/{route}", json=body)
            assert answer.status_code == status, (body, answer.text)
            assert text in answer.json()["error"]["message"], (body, answer.text)
        short = {"num_experts": 4, "moe_layers": [1, 3], "slots": {"shard-0": [[0], [0]]}}
        body = {"operation_id": "a", "placement": short}
        answer = await client.put("/v1/ep/placement", json=body)
        assert answer.status_code == 400 and "no shard holds experts" in answer.text
        for query in ("wait_s=6", "wait_s=nan", "wait_s=x", "wait=1"):
            answer = await client.get(f"/v1/ep/operations/a?{query}")
            assert answer.status_code == 400 and "wait_s" in answer.text
        answer = await client.get("/v1/ep/operations/a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "operation_not_found")
        assert operations.view().epoch == 1 and "request" not in operations.asked[:-2]

    run(check, operations)


def test_a_coordinator_that_hangs_costs_operators_alone(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        hang = threading.Event()
        real = operations.view

        def late() -> View:
            assert hang.wait(20)
            return real()

        operations.view = late  # type: ignore[method-assign]
        calls = [asyncio.create_task(client.get("/v1/ep/placement")) for _ in range(CALLS_MAX)]
        while True:
            await asyncio.sleep(0)
            answer = await client.get("/v1/ep/status")
            if answer.status_code == 429:
                break
        api = {"authorization": "Bearer api-key"}
        assert (await client.get("/v1/models", headers=api)).status_code == 200
        hang.set()
        assert {(await call).status_code for call in calls} == {200}
        operations.fails = DeadlineError("the coordinator did not answer within 30 s")
        answer = await client.get("/v1/ep/status")
        assert answer.status_code == 503 and "did not answer" in answer.text

    run(check, operations)


def test_the_document_has_them(operations: HeldOperations) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        paths = (await client.get("/openapi.json")).json()["paths"]
        for method, path in ROUTES[:-1]:
            operation = paths[path.replace("/up", "/{operation_id}")][method.lower()]
            assert operation["summary"] and {"401", "403"} <= operation["responses"].keys()
            assert ("requestBody" in operation) == (
                method in ("POST", "PUT") and not path.endswith("/cancel")
            )

    run(check, operations)
