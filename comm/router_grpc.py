"""The router's gRPC services as both ends see them: methods, bounds, authentication, views.

The messages are made from `router.proto` and `coordinator.proto` by setup.py. Every call but those
of the health service carries `authorization: Bearer ...`, which is derived from the cluster's token
(`bearer_of`): who listens to one call could ask the router, and nobody else. Nothing is encrypted.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

try:
    import remora.comm.coordinator_pb2 as coordinator_pb2
    import remora.comm.router_pb2 as router_pb2
except ImportError as missing:  # a checkout that is older than its .proto files
    raise ImportError(
        "the modules of comm/*.proto are not built: run `make setup`, or, in a checkout that is set"
        " up but older than they are, `.venv/bin/python setup.py -q protos`"
    ) from missing

from remora.comm.view import Placement, View

MESSAGE_BYTES_MAX: Final = 4 << 20
METADATA_BYTES_MAX: Final = 8 << 10
PROMPTS_MAX: Final = 64  # of one Route
PROMPT_TOKENS_MAX: Final = 4096  # of one prompt that Route is told
CALLS_MAX: Final = 1024  # at once, streams included
WATCHERS_MAX: Final = 512
HEALTH: Final = "/grpc.health.v1.Health/"  # open: probes carry no token, and learn nothing else

_LABEL: Final = b"remora router v1: bearer\0"


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


ROUTER: Final = "remora.v1.Router"
VIEWS: Final = "remora.v1.Views"
ROUTE = Method(
    service=ROUTER, name="Route", limit_s=5.0,
    request=router_pb2.RouteRequest, response=router_pb2.RouteResponse,
)  # fmt: skip
REPORT = Method(
    service=ROUTER, name="Report", limit_s=10.0,
    request=router_pb2.ReportRequest, response=router_pb2.ReportResponse,
)  # fmt: skip
PLAN = Method(
    service=ROUTER, name="Plan", limit_s=900.0,
    request=router_pb2.PlanRequest, response=router_pb2.PlanResponse,
)  # fmt: skip
GET_VIEW = Method(
    service=VIEWS, name="GetView", limit_s=5.0,
    request=coordinator_pb2.GetViewRequest, response=coordinator_pb2.View,
)  # fmt: skip
WATCH_VIEW = Method(
    service=VIEWS, name="WatchView", limit_s=0.0, is_stream=True,
    request=coordinator_pb2.WatchViewRequest, response=coordinator_pb2.View,
)  # fmt: skip
METHODS: Final = (ROUTE, REPORT, PLAN, GET_VIEW, WATCH_VIEW)


def bearer_of(token: bytes) -> str:
    """What callers send as `authorization: Bearer <this>`: 64 hex digits."""
    return hmac.digest(token, _LABEL, "sha256").hex()


def credentials_of(token: bytes) -> tuple[tuple[str, str], ...]:
    """Metadata of a call by somebody who knows the cluster's token."""
    return (("authorization", f"Bearer {bearer_of(token)}"),)


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


def generic_handlers(behaviours: dict[str, Callable[..., Any]]) -> list[Any]:
    """What a server is given: `METHODS` with their behaviours, by method name."""
    services: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        make: Any = grpc.unary_unary_rpc_method_handler
        if method.is_stream:
            make = grpc.unary_stream_rpc_method_handler
        services.setdefault(method.service, {})[method.name] = make(
            behaviours[method.name],
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )
    return [
        grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()
    ]


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses calls that do not carry the bearer of the cluster's token, before they are parsed."""

    def __init__(self, token: bytes) -> None:
        self._wanted = f"Bearer {bearer_of(token)}".encode()

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


def view_message(view: View) -> Any:
    """A view as it travels."""
    return coordinator_pb2.View(
        epoch=view.epoch,
        view_hash=view.view_hash,
        members=[
            coordinator_pb2.Member(
                uid=member.uid,
                incarnation=member.incarnation,
                role=member.role,
                host=member.endpoint.host,
                tcp_address=member.endpoint.tcp_address,
                actor_name=member.actor_name,
                labels=member.labels,
            )
            for member in view.members
        ],
        placement=placement_message(view.placement),
    )


def placement_message(placement: Placement) -> Any:
    """A placement as it travels."""
    message = coordinator_pb2.Placement(
        num_experts=placement.num_experts, moe_layers=placement.moe_layers
    )
    for uid, layers in placement.slots.items():
        message.slots[uid].layers.extend(
            coordinator_pb2.LayerSlots(experts=experts) for experts in layers
        )
    return message


def placement_from_message(message: Any) -> Placement:
    """Inverse of `placement_message`."""
    return Placement(
        num_experts=message.num_experts,
        moe_layers=tuple(message.moe_layers),
        slots={
            uid: tuple(tuple(layer.experts) for layer in slots.layers)
            for uid, slots in sorted(message.slots.items())
        },
    )
