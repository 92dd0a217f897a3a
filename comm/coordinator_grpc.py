"""The coordinator's gRPC service as both ends see it: methods, limits, bearer, answers.

The messages are made from `coordinator.proto` by setup.py. The bearer is another one than the
router's: who may ask where a request goes may not thereby scale the deployment.
"""

from collections.abc import Mapping
from typing import Any, Final

from remora.comm.grpc_base import NOT_BUILT, Method, credentials
from remora.comm.grpc_base import bearer_of as labelled_bearer_of

try:
    import remora.comm.coordinator_pb2 as pb
except ImportError as missing:  # a checkout that is older than its .proto files
    raise ImportError(NOT_BUILT) from missing

COORDINATOR: Final = "remora.v1.Coordinator"
WAIT_S_MAX: Final = 30.0  # of one GetOperation
WAITERS_MAX: Final = 64  # at once
BEGIN_S: Final = 30.0  # an operation is planned and logged within this
_LABEL: Final = b"remora coordinator v1: bearer\0"

SCALE = Method(
    service=COORDINATOR, name="Scale", limit_s=BEGIN_S,
    request=pb.ScaleRequest, response=pb.Operation,
)  # fmt: skip
DRAIN = Method(
    service=COORDINATOR, name="Drain", limit_s=BEGIN_S,
    request=pb.DrainRequest, response=pb.Operation,
)  # fmt: skip
REBALANCE = Method(
    service=COORDINATOR, name="Rebalance", limit_s=900.0,
    request=pb.RebalanceRequest, response=pb.RebalanceResponse,
)  # fmt: skip
IMPORT_PLACEMENT = Method(
    service=COORDINATOR, name="ImportPlacement", limit_s=BEGIN_S,
    request=pb.ImportPlacementRequest, response=pb.Operation,
)  # fmt: skip
GET_OPERATION = Method(
    service=COORDINATOR, name="GetOperation", limit_s=WAIT_S_MAX + 5.0,
    request=pb.GetOperationRequest, response=pb.Operation,
)  # fmt: skip
CANCEL = Method(
    service=COORDINATOR, name="Cancel", limit_s=BEGIN_S,
    request=pb.CancelRequest, response=pb.Operation,
)  # fmt: skip
GET_STATUS = Method(
    service=COORDINATOR, name="GetStatus", limit_s=15.0,
    request=pb.GetStatusRequest, response=pb.DeploymentStatus,
)  # fmt: skip
METHODS: Final = (SCALE, DRAIN, REBALANCE, IMPORT_PLACEMENT, GET_OPERATION, CANCEL, GET_STATUS)

_OPERATION: Final = (
    "operation_id", "kind", "outcome", "step", "reason", "joiners", "retirees", "round",
    "num_rounds", "moved", "safe_to_delete", "serving_s", "ended_s",
)  # fmt: skip
_STATUS: Final = ("name", "model", "phase", "error", "epoch", "view_hash", "uptime_s")
_REBALANCE: Final = (
    "verdict", "reason", "moved_experts", "copies_before", "copies_after", "load_before",
    "load_after", "not_applied",
)  # fmt: skip


def bearer_of(token: bytes) -> str:
    """What callers send as `authorization: Bearer <this>`: 64 hex digits."""
    return labelled_bearer_of(token, _LABEL)


def credentials_of(token: bytes) -> tuple[tuple[str, str], ...]:
    """Metadata of a call by somebody who knows the cluster's token."""
    return credentials(bearer_of(token))


def operation_message(operation: Mapping[str, Any]) -> Any:
    """An operation (`Operation.public`) as it travels."""
    return pb.Operation(**{name: operation[name] for name in _OPERATION})


def rebalance_message(report: Mapping[str, Any]) -> Any:
    """What came of a round of rebalancing, as it travels."""
    known = {name: report[name] for name in _REBALANCE if report.get(name) is not None}
    if report.get("operation") is not None:
        known["operation"] = operation_message(report["operation"])
    return pb.RebalanceResponse(**known)


def status_message(status: Mapping[str, Any]) -> Any:
    """The status of a deployment, as it travels; members in ascending order of uid."""
    operations = status["operations"] or {"running": None, "last": [], "fenced": [], "lost": []}
    running = operations["running"]
    return pb.DeploymentStatus(
        **{name: status[name] for name in _STATUS if status[name] is not None},
        members=[
            pb.MemberStatus(
                uid=uid,
                alive=member["alive"],
                phase=member.get("phase") or "",
                why_not_serving=member.get("why_not_serving") or member.get("error") or "",
            )
            for uid, member in sorted(status["members"].items())
        ],
        running=None if running is None else operation_message(running),
        last=[operation_message(operation) for operation in operations["last"]],
        fenced=operations["fenced"],
        lost=operations["lost"],
    )
