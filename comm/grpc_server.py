"""A gRPC server in a thread of its own, with health and reflection beside its services.

The router and the coordinator are served by it. Errors of the tree leave as gRPC's status codes
(`status_of`), and every call ends at its caller's deadline or its method's limit.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from remora.comm.errors import (
    ClusterError,
    FrameError,
    OperationIdTakenError,
    OperationRunsError,
    OverloadedError,
    RemoraError,
    UnknownOperationError,
    UserError,
)
from remora.comm.grpc_base import (
    CALLS_MAX,
    Method,
    TokenInterceptor,
    channel_options,
    generic_handlers,
)

logger = logging.getLogger(__name__)

START_S: Final = 30.0
CLOSE_S: Final = 2.0  # for calls under way when the server stops

# the first that fits
_CODES: Final[tuple[tuple[type[Exception], grpc.StatusCode], ...]] = (
    (OperationIdTakenError, grpc.StatusCode.ALREADY_EXISTS),
    (OperationRunsError, grpc.StatusCode.ABORTED),
    (UnknownOperationError, grpc.StatusCode.NOT_FOUND),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ValueError, grpc.StatusCode.INVALID_ARGUMENT),
    (FrameError, grpc.StatusCode.INVALID_ARGUMENT),
    (UserError, grpc.StatusCode.INVALID_ARGUMENT),
    (RemoraError, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: Exception) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for one that is not in the tree."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def bounded(
    method: Method, answer: Callable[[Any], Awaitable[Any]], calls: dict[str, int]
) -> Callable[..., Any]:
    """The behaviour of a unary method: `answer` under its limit, its errors as status codes.

    Args:
        calls: counts them by the method's name.
    """

    async def behave(request: Any, context: Any) -> Any:
        calls[method.name] += 1
        left_s = context.time_remaining()
        limit_s = method.limit_s if left_s is None else min(method.limit_s, left_s)
        try:
            return await asyncio.wait_for(answer(request), max(0.0, limit_s))
        except TimeoutError:
            code, text = grpc.StatusCode.DEADLINE_EXCEEDED, f"not done in {limit_s:.3g} s"
        except Exception as error:
            code, text = status_of(error), str(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.exception("%s failed", method.path)
                text = "internal error; the server's log has the details"
        await context.abort(code, text)

    return behave


class GrpcServer:
    """Services of one process.

    Args:
        name: of its thread, and in errors.
        bearer: that every call but health's must carry.
        bind_ip, port: where it listens; port 0: one that is free.
        methods, behaviours: what is served, by method name. Behaviours run in the server's loop.

    Attributes:
        address: "ip:port" once `start` returned.
    """

    def __init__(
        self,
        *,
        name: str,
        bearer: str,
        bind_ip: str,
        port: int,
        methods: Sequence[Method],
        behaviours: dict[str, Callable[..., Any]],
    ) -> None:
        self.address = ""
        self._name, self._bearer = name, bearer
        self._bind_ip, self._bind = bind_ip, f"{bind_ip}:{port}"
        self._methods, self._behaviours = methods, behaviours
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that behaviours run in, once `start` returned."""
        assert self._loop is not None, f"the loop of {self._name} before start returned"
        return self._loop

    def start(self) -> str:
        """Listen; returns the address. Where it could not be bound it may be tried again.

        Raises:
            ClusterError: the address cannot be bound.
        """
        self._ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._main, name=f"remora-{self._name}", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            raise ClusterError(f"the {self._name} did not start within {START_S:g} s")
        if self._failure is not None:
            raise ClusterError(f"the {self._name} cannot listen on {self._bind}: {self._failure}")
        return self.address

    def stop(self) -> None:
        """Refuse new calls, end the others, join. Idempotent."""
        if self._thread is None:
            return
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as failure:  # told by `start`, or logged when it comes later
            if self._ready.is_set():
                logger.exception("the server of the %s ended", self._name)
            self._failure = failure
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(self._bearer)],
            options=channel_options(),
            maximum_concurrent_rpcs=CALLS_MAX,
        )
        server.add_generic_rpc_handlers(generic_handlers(self._methods, self._behaviours))
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        services = list(dict.fromkeys(method.service for method in self._methods))
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        port = server.add_insecure_port(self._bind)  # raises where it is taken
        await server.start()
        for name in ("", *services):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{self._bind_ip}:{port}"
        self._ready.set()
        await self._stop.wait()
        await checks.enter_graceful_shutdown()
        await server.stop(CLOSE_S)
