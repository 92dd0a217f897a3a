"""`/v1/ep/*`: operations on the deployment over HTTP, for operators (docs/elasticity.md).

Who may call: the gate lets nobody in without one of the admin keys, which are others than the API
keys; without any configured the routes are closed (`gate.py`). Calls go through a few threads of
their own, bounded in number: whatever the coordinator does, completions go on.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.responses import Response

from remora.cluster.http_body import json_response, read_json
from remora.cluster.openapi import error_responses
from remora.cluster.operation_request import (
    Body,
    DrainBody,
    OperationAnswer,
    Operations,
    PlaceBody,
    PlacementAnswer,
    PlacementBody,
    RebalanceBody,
    ScaleBody,
    begin,
)
from remora.comm.checked import refuse_unknown
from remora.comm.errors import ClusterError, ConfigError, OverloadedError, RequestError

THREADS: Final = 4
CALLS_MAX: Final = 16  # at once; more are answered 429
WAIT_S_MAX: Final = 5.0
_ERRORS: Final = (400, 401, 403, 404, 409, 413, 415, 429, 500, 503)

R = TypeVar("R")
BodyT = TypeVar("BodyT", bound=Body)


class OperationCalls:
    """Asks the coordinator off the event loop, a bounded number of calls at a time.

    Args:
        operations: the deployment; None: there is none to ask (an ingress of tests).
    """

    def __init__(self, operations: Operations | None) -> None:
        self._operations = operations
        self._num_calls = 0
        self._pool = ThreadPoolExecutor(THREADS, "remora-operations")

    async def ask(self, call: Callable[[Operations], R]) -> R:
        """What `call` returns.

        Raises:
            OverloadedError: too many calls wait.
            RemoraError: as the call.
        """
        if self._operations is None:
            raise ClusterError("this ingress knows no coordinator")
        if self._num_calls >= CALLS_MAX:
            raise OverloadedError(f"{CALLS_MAX} calls of operators wait already")
        self._num_calls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, call, self._operations)
        finally:
            self._num_calls -= 1

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def body_from(data: bytes, kind: type[BodyT]) -> BodyT:
    """A checked body of JSON bytes.

    Raises:
        RequestError: a field that `kind` does not have; named, with those that it has.
        ValidationError: not JSON, or a bad value.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = error.errors(include_input=False)
        unknown = [fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"]
        if not unknown:
            raise
    try:
        refuse_unknown(json.loads(data), kind, source="the body")
    except ConfigError as error:
        raise RequestError(str(error), param=str(unknown[0][0])) from None
    raise AssertionError(f"{unknown} is unknown to pydantic alone")


def add_operation_routes(app: FastAPI, calls: OperationCalls, body_bytes_max: int) -> None:
    """The routes of an application."""
    responses: Any = error_responses(*_ERRORS)
    begun: Any = {**responses, 202: {"model": OperationAnswer, "description": "It runs"}}

    async def body_of(request: Request, kind: type[Body]) -> Any:
        return body_from(await read_json(request, body_bytes_max), kind)

    async def begin_of(request: Request, kind: type[Body]) -> Response:
        body = await body_of(request, kind)
        operation = await calls.ask(lambda operations: begin(operations, body))
        return _operation_response(operation)

    @app.get("/v1/ep/status", responses=responses)
    async def ep_status() -> dict[str, Any]:
        """Phase, members, operations: what `remora status --json` prints."""
        return await calls.ask(lambda operations: operations.status())

    @app.post("/v1/ep/scale", response_model=OperationAnswer, responses=begun)
    async def ep_scale(request: Request) -> Response:
        """So many expert shards and dense groups there are to be. 202 while it runs, 200 once it is
        over."""
        return await begin_of(request, ScaleBody)

    @app.post("/v1/ep/drain", response_model=OperationAnswer, responses=begun)
    async def ep_drain(request: Request) -> Response:
        """Move all experts off some shards, all requests off some dense groups, and end those."""
        return await begin_of(request, DrainBody)

    @app.put("/v1/ep/placement", response_model=OperationAnswer, responses=begun)
    async def ep_put_placement(request: Request) -> Response:
        """Have the shards that there are hold a placement."""
        return await begin_of(request, PlaceBody)

    @app.get("/v1/ep/placement", response_model=PlacementAnswer, responses=responses)
    async def ep_get_placement() -> Response:
        """Which shards hold which experts."""
        view = await calls.ask(lambda operations: operations.view())
        placement = PlacementBody.of(view.placement).model_dump()
        fields = {"epoch": view.epoch, "view_hash": view.view_hash, "placement": placement}
        return json_response(fields)

    @app.post("/v1/ep/rebalance", responses=responses)
    async def ep_rebalance(request: Request) -> dict[str, Any]:
        """Plan from counted traffic, and begin to move what is worth it: a report with the
        `verdict`, and, where it is `move`, the `operation`."""
        body = await body_of(request, RebalanceBody)
        again = partial(_rebalance, body.operation_id, body.dry_run)
        return await calls.ask(again)

    @app.get(
        "/v1/ep/operations/{operation_id}", response_model=OperationAnswer, responses=responses
    )
    async def ep_operation(request: Request, operation_id: str) -> Response:
        """How an operation is; with `?wait_s=5`, once it is over or the time is."""
        wait_s = _wait_s(request)
        operation = await calls.ask(lambda operations: operations.wait(operation_id, wait_s))
        return json_response(operation)

    @app.post(
        "/v1/ep/operations/{operation_id}/cancel", response_model=OperationAnswer, responses=begun
    )
    async def ep_cancel(operation_id: str) -> Response:
        """Undo an operation as far as it is not committed. 202 while it is undone, 200 once it is
        over."""
        operation = await calls.ask(lambda operations: operations.cancel(operation_id))
        return _operation_response(operation)


def _rebalance(operation_id: str, dry_run: bool, operations: Operations) -> dict[str, Any]:
    return operations.rebalance(operation_id, dry_run=dry_run)


def _operation_response(operation: dict[str, Any]) -> Response:
    answer = json_response(operation)
    answer.headers["Location"] = f"/v1/ep/operations/{operation['operation_id']}"
    answer.status_code = 202 if operation["outcome"] == "running" else 200
    return answer


def _wait_s(request: Request) -> float:
    """Raises RequestError: another query, or a value out of range."""
    unknown = sorted(set(request.query_params) - {"wait_s"})
    if unknown:
        raise RequestError(f"unknown query parameter {unknown[0]!r}; allowed: wait_s")
    text = request.query_params.get("wait_s", "0")
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= WAIT_S_MAX:
        raise RequestError(
            f"wait_s = {text[:32]!r}: 0 to {WAIT_S_MAX:g} seconds are allowed", param="wait_s"
        )
    return wait_s
