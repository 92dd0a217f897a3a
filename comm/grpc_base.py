"""gRPC services as both ends see them: methods, bounds, authentication.

What the router's services (`router_grpc.py`) and the coordinator's (`coordinator_grpc.py`) share.
Every call but those of the health service carries `authorization: Bearer ...`, which is derived
from the cluster's token and a label of the service (`bearer_of`): who listens to one call could
make others of that service, and nobody else. Nothing is encrypted.
"""

import hmac
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

MESSAGE_BYTES_MAX: Final = 4 << 20
METADATA_BYTES_MAX: Final = 8 << 10
CALLS_MAX: Final = 1024  # at once, streams included
HEALTH: Final = "/grpc.health.v1.Health/"  # open: probes carry no token, and learn nothing else
NOT_BUILT: Final = (
    "the modules of comm/*.proto are not built: run `make setup`, or, in a checkout that is set"
    " up but older than they are, `.venv/bin/python setup.py -q protos`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of a service."""

    service: str
    name: str
    request: Any
    response: Any
    limit_s: float  # the longest that one call may take; streams have none
    is_stream: bool = False

    @property
    def path(self) -> str:
        """As it travels."""
        return f"/{self.service}/{self.name}"


def bearer_of(token: bytes, label: bytes) -> str:
    """What callers of the service with this label send as `authorization: Bearer <this>`: 64 hex
    digits."""
    return hmac.digest(token, label, "sha256").hex()


def credentials(bearer: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call by somebody who has this bearer."""
    return (("authorization", f"Bearer {bearer}"),)


def channel_options() -> list[tuple[str, int]]:
    """Bounds of both ends."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.so_reuseport", 0),  # a port that is taken is an error
        ("grpc.enable_http_proxy", 0),  # peers are dialled as they are named
    ]


def unary_call(channel: Any, method: Method) -> Any:
    """A callable for one method of a channel (sync or aio): `(request, timeout=, metadata=)`."""
    return channel.unary_unary(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def stream_call(channel: Any, method: Method) -> Any:
    """As `unary_call`, for a method that answers with a stream."""
    return channel.unary_stream(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def generic_handlers(
    methods: Iterable[Method], behaviours: dict[str, Callable[..., Any]]
) -> list[Any]:
    """What a server is given: methods with their behaviours, by method name."""
    services: dict[str, dict[str, Any]] = {}
    for method in methods:
        make: Any = grpc.unary_unary_rpc_method_handler
        if method.is_stream:
            make = grpc.unary_stream_rpc_method_handler
        services.setdefault(method.service, {})[method.name] = make(
            _parsed(method, behaviours[method.name]),
            response_serializer=method.response.SerializeToString,
        )
    return [
        grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()
    ]


def _parsed(method: Method, behave: Callable[..., Any]) -> Callable[..., Any]:
    """`behave` with the request as a message; bytes that are none are refused. Behind the check of
    the bearer, which so reads nothing."""

    async def request_of(data: bytes, context: Any) -> Any:
        try:
            return method.request.FromString(data)
        except DecodeError:
            name = method.request.DESCRIPTOR.full_name
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"these bytes are no {name}")

    async def unary(data: bytes, context: Any) -> Any:
        return await behave(await request_of(data, context), context)

    async def stream(data: bytes, context: Any) -> Any:
        async with aclosing(behave(await request_of(data, context), context)) as answers:
            async for answer in answers:
                yield answer

    return stream if method.is_stream else unary


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses calls that do not carry the bearer, before they are parsed."""

    def __init__(self, bearer: str) -> None:
        self._wanted = f"Bearer {bearer}".encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], call: Any
    ) -> Any:
        """The handler of the call, or one that refuses it."""
        handler = await continuation(call)
        if handler is None or call.method.startswith(HEALTH):
            return handler
        given = next((v for k, v in call.invocation_metadata if k == "authorization"), "")
        data = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
        return handler if hmac.compare_digest(data, self._wanted) else _refusal(handler)


def _refusal(handler: Any) -> Any:
    """A handler of the same kind that aborts; it reads nothing of the request."""

    async def refuse(_: Any, context: Any) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "the bearer of the cluster's token is needed: metadata 'authorization: Bearer ...'",
        )

    async def refuse_stream(_: Any, context: Any) -> Any:
        await refuse(_, context)
        yield b""

    kinds: dict[tuple[bool, bool], tuple[Any, Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    make, behaviour = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour)
