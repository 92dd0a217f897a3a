"""The router's gRPC services as both ends see them: methods, bounds, bearer, views.

The messages are made from `router.proto` and `coordinator.proto` by setup.py.
"""

from typing import Any, Final

from remora.comm.grpc_base import NOT_BUILT, Method, credentials
from remora.comm.grpc_base import bearer_of as labelled_bearer_of
from remora.comm.view import Placement, View

try:
    import remora.comm.coordinator_pb2 as coordinator_pb2
    import remora.comm.router_pb2 as router_pb2
except ImportError as missing:  # a checkout that is older than its .proto files
    raise ImportError(NOT_BUILT) from missing

PROMPTS_MAX: Final = 64  # of one Route
PROMPT_TOKENS_MAX: Final = 4096  # of one prompt that Route is told
WATCHERS_MAX: Final = 512

_LABEL: Final = b"remora router v1: bearer\0"

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
    return labelled_bearer_of(token, _LABEL)


def credentials_of(token: bytes) -> tuple[tuple[str, str], ...]:
    """Metadata of a call by somebody who knows the cluster's token."""
    return credentials(bearer_of(token))


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
