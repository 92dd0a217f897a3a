"""The coordinator's gRPC service: operations for whoever has the cluster's token.

Who may call: the bearer is derived from the cluster's token (`comm/coordinator_grpc.py`), as the
router's is and under another label. Requests go through the same bodies as the command line's and
HTTP's (`operation_request.py`); what they begin goes on whether or not the caller stays.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from typing import Any, Final

from remora.cluster.operation_request import (
    DrainBody,
    Operations,
    PlaceBody,
    RebalanceBody,
    ScaleBody,
    begin,
)
from remora.comm.checked import parse_section
from remora.comm.coordinator_grpc import (
    METHODS,
    WAIT_S_MAX,
    WAITERS_MAX,
    bearer_of,
    operation_message,
    rebalance_message,
    status_message,
)
from remora.comm.errors import OverloadedError
from remora.comm.grpc_server import GrpcServer, bounded
from remora.comm.router_grpc import placement_from_message

THREADS: Final = 8  # that ask the coordinator, waiters apart


class CoordinatorServer:
    """See the head of this file.

    Args:
        operations: the coordinator; called in threads of our own.
        token: the cluster's token.
        bind_ip, port: where it listens; port 0: one that is free.
    """

    def __init__(self, operations: Operations, *, token: bytes, bind_ip: str, port: int) -> None:
        self._operations = operations
        self._calls = dict.fromkeys((method.name for method in METHODS), 0)
        self._num_waiting = 0
        self._workers = ThreadPoolExecutor(THREADS, "remora-operator")
        self._waiters = ThreadPoolExecutor(WAITERS_MAX, "remora-operation-wait")
        own: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "Scale": self._scale,
            "Drain": self._drain,
            "Rebalance": self._rebalance,
            "ImportPlacement": self._import_placement,
            "GetOperation": self._get_operation,
            "Cancel": self._cancel,
            "GetStatus": self._get_status,
        }
        self._server = GrpcServer(
            name="coordinator",
            bearer=bearer_of(token),
            bind_ip=bind_ip,
            port=port,
            methods=METHODS,
            behaviours={m.name: bounded(m, own[m.name], self._calls) for m in METHODS},
        )

    @property
    def address(self) -> str:
        """ "ip:port" once `start` returned."""
        return self._server.address

    def start(self) -> str:
        """Listen; returns the address. Raises ClusterError: it cannot be bound, so far."""
        return self._server.start()

    def stop(self) -> None:
        """Refuse new calls, end the others."""
        self._server.stop()
        for pool in (self._workers, self._waiters):
            pool.shutdown(wait=False, cancel_futures=True)

    def status(self) -> dict[str, Any]:
        """For `remora status`."""
        return {"address": self.address, "calls": dict(self._calls)}

    # -- in the server's loop -----------------------------------------------------------------

    async def _ask(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def _begin(self, body: ScaleBody | DrainBody | PlaceBody) -> Any:
        return operation_message(await self._ask(partial(begin, self._operations, body)))

    async def _scale(self, request: Any) -> Any:
        fields = {name: getattr(request, name) or None for name in ("shards", "dense_groups")}
        fields["retire"] = tuple(request.retire)
        return await self._begin(_body(request, ScaleBody, fields))

    async def _drain(self, request: Any) -> Any:
        return await self._begin(_body(request, DrainBody, {"uids": tuple(request.uids)}))

    async def _import_placement(self, request: Any) -> Any:
        asked = placement_from_message(request.placement)
        fields = {name: getattr(asked, name) for name in ("num_experts", "moe_layers", "slots")}
        return await self._begin(_body(request, PlaceBody, {"placement": fields}))

    async def _rebalance(self, request: Any) -> Any:
        body = _body(request, RebalanceBody, {"dry_run": request.dry_run})
        call = partial(self._operations.rebalance, body.operation_id, dry_run=body.dry_run)
        return rebalance_message(await self._ask(call))

    async def _get_operation(self, request: Any) -> Any:
        wait_s = request.wait_s
        if not isfinite(wait_s) or not 0 <= wait_s <= WAIT_S_MAX:
            raise ValueError(f"wait_s = {wait_s:g}: 0 to {WAIT_S_MAX:g} is allowed")
        if self._num_waiting >= WAITERS_MAX:
            raise OverloadedError(f"{WAITERS_MAX} callers wait for operations already")
        self._num_waiting += 1
        try:
            operation = await asyncio.get_running_loop().run_in_executor(
                self._waiters, self._operations.wait, request.operation_id, wait_s
            )
        finally:
            self._num_waiting -= 1
        return operation_message(operation)

    async def _cancel(self, request: Any) -> Any:
        call = partial(self._operations.cancel, request.operation_id or None)
        return operation_message(await self._ask(call))

    async def _get_status(self, _: Any) -> Any:
        return status_message(await self._ask(self._operations.status))


def _body(request: Any, kind: Any, fields: dict[str, Any]) -> Any:
    """A checked body of one message. Raises ConfigError."""
    source = type(request).DESCRIPTOR.name
    return parse_section({"operation_id": request.operation_id, **fields}, kind, source=source)
