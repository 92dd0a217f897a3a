"""The coordinator's gRPC service on loopback, over the real state machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.operations import HeldOperations, world_operations
from support.router_rig import TOKEN

from remora.cluster.coordinator_server import CoordinatorServer
from remora.comm import coordinator_pb2 as pb
from remora.comm.coordinator_grpc import (
    CANCEL,
    COORDINATOR,
    DRAIN,
    GET_OPERATION,
    GET_STATUS,
    IMPORT_PLACEMENT,
    METHODS,
    REBALANCE,
    SCALE,
    credentials_of,
)
from remora.comm.errors import ClusterError
from remora.comm.grpc_base import Method, channel_options, unary_call
from remora.comm.router_grpc import credentials_of as router_credentials_of
from remora.comm.router_grpc import placement_message

SOON_S = 20.0


class Rig:
    """A server and its world."""

    def __init__(self, operations: HeldOperations, server: CoordinatorServer) -> None:
        self.operations, self.server = operations, server
        self.channel = grpc.insecure_channel(server.address, options=channel_options())

    def call(self, method: Method, request: Any, **options: Any) -> Any:
        known = {"timeout": SOON_S, "metadata": credentials_of(TOKEN), **options}
        return unary_call(self.channel, method)(request, **known)

    def refused(self, method: Method, request: Any, **options: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, request, **options)
        return caught.value.code(), caught.value.details()

    def done(self, operation_id: str) -> Any:
        return self.call(GET_OPERATION, pb.GetOperationRequest(operation_id=operation_id, wait_s=9))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with world_operations(tmp_path) as operations:
        server = CoordinatorServer(operations, token=TOKEN, bind_ip="127.0.0.1", port=0)
        server.start()
        rig = Rig(operations, server)
        yield rig
        rig.channel.close()
        server.stop()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        credentials_of(b"another token, also 32 bytes...."),
        router_credentials_of(TOKEN),
        (("authorization", f"Bearer {TOKEN.hex()}"),),
    ],
    ids=["none", "of another token", "the router's", "the token itself"],
)
def test_who_may_not_call(rig: Rig, method: Method, metadata: Any) -> None:
    code, _ = rig.refused(method, method.request(), metadata=metadata)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert rig.operations.asked == [] and rig.server.status()["calls"][method.name] == 0


def test_scale_is_done_once_under_one_id(rig: Rig) -> None:
    asked = pb.ScaleRequest(operation_id="up", shards=3)
    begun = rig.call(SCALE, asked)
    assert (begun.operation_id, begun.kind) == ("up", "scale")
    done = rig.done("up")
    assert done.outcome == "done" and dict(done.joiners) == {"shard-2": 1}
    assert done.HasField("ended_s") and done.serving_s <= done.ended_s
    again = rig.call(SCALE, asked)
    assert MessageToDict(again) == MessageToDict(done)
    assert rig.operations.view().epoch == 1 + done.num_rounds
    code, why = rig.refused(SCALE, pb.ScaleRequest(operation_id="up", shards=4))
    assert code is grpc.StatusCode.ALREADY_EXISTS and "'up'" in why
    down = rig.call(DRAIN, pb.DrainRequest(operation_id="down", uids=["shard-0"]))
    assert down.kind == "drain"
    assert list(rig.done("down").safe_to_delete) == ["shard-0"]


def test_an_operation_that_is_not_wanted_is_undone(rig: Rig) -> None:
    rig.operations.holds = True
    rig.call(SCALE, pb.ScaleRequest(operation_id="up", shards=3))
    assert rig.call(CANCEL, pb.CancelRequest()).step == "undo"
    rig.operations.release()
    assert (rig.done("up").outcome, rig.done("up").reason) == ("failed", "it was cancelled")
    code, why = rig.refused(CANCEL, pb.CancelRequest())
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "no operation runs" in why
    code, why = rig.refused(CANCEL, pb.CancelRequest(operation_id="who"))
    assert code is grpc.StatusCode.NOT_FOUND and "'who'" in why


def test_one_operation_at_a_time(rig: Rig) -> None:
    rig.operations.holds = True
    begun = rig.call(SCALE, pb.ScaleRequest(operation_id="up", shards=3))
    assert begun.outcome == "running" and not begun.HasField("ended_s")
    code, why = rig.refused(SCALE, pb.ScaleRequest(operation_id="more", shards=4))
    assert code is grpc.StatusCode.ABORTED and "'up' runs" in why
    status = rig.call(GET_STATUS, pb.GetStatusRequest())
    assert status.running.operation_id == "up" and [o.operation_id for o in status.last] == ["up"]
    request = pb.GetOperationRequest(operation_id="up", wait_s=0)
    assert rig.call(GET_OPERATION, request).outcome == "running"
    # a caller that goes away early: the operation does not
    late = pb.GetOperationRequest(operation_id="up", wait_s=9)
    assert rig.refused(GET_OPERATION, late, timeout=0.05)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    rig.operations.release()
    assert rig.done("up").outcome == "done"


@pytest.mark.parametrize(
    ("method", "request_", "code", "complaint"),
    [
        (SCALE, pb.ScaleRequest(shards=3), "INVALID_ARGUMENT", "operation_id"),
        (SCALE, pb.ScaleRequest(operation_id="a b", shards=3), "INVALID_ARGUMENT", "operation_id"),
        (SCALE, pb.ScaleRequest(operation_id="restore-1", shards=3), "INVALID_ARGUMENT", "own"),
        (SCALE, pb.ScaleRequest(operation_id="a"), "INVALID_ARGUMENT", "shards"),
        (SCALE, pb.ScaleRequest(operation_id="a", shards=9, retire=["shard-7"]),
         "INVALID_ARGUMENT", "shard-7"),
        (DRAIN, pb.DrainRequest(operation_id="a"), "INVALID_ARGUMENT", "uids"),
        (IMPORT_PLACEMENT, pb.ImportPlacementRequest(operation_id="a"), "INVALID_ARGUMENT",
         "num_experts"),
        (REBALANCE, pb.RebalanceRequest(), "INVALID_ARGUMENT", "operation_id"),
        (GET_OPERATION, pb.GetOperationRequest(operation_id="who"), "NOT_FOUND", "'who'"),
        (GET_OPERATION, pb.GetOperationRequest(operation_id="who", wait_s=31),
         "INVALID_ARGUMENT", "wait_s = 31"),
        (GET_OPERATION, pb.GetOperationRequest(operation_id="who", wait_s=float("nan")),
         "INVALID_ARGUMENT", "wait_s"),
    ],
)  # fmt: skip
def test_codes_of_what_cannot_be(
    rig: Rig, method: Method, request_: Any, code: str, complaint: str
) -> None:
    found, why = rig.refused(method, request_)
    assert found is grpc.StatusCode[code] and complaint in why, why
    assert rig.operations.view().epoch == 1


def test_nothing_serves_and_what_is_no_error_of_ours(rig: Rig) -> None:
    rig.operations.fails = ClusterError("deployment 'world' is starting")
    code, why = rig.refused(GET_STATUS, pb.GetStatusRequest())
    assert code is grpc.StatusCode.UNAVAILABLE and "is starting" in why
    rig.operations.fails = KeyError("secret")
    code, why = rig.refused(GET_STATUS, pb.GetStatusRequest())
    assert code is grpc.StatusCode.INTERNAL and "secret" not in why


def test_a_placement_is_imported_if_it_is_of_this_model(rig: Rig) -> None:
    held = placement_message(rig.operations.view().placement)
    rig.call(IMPORT_PLACEMENT, pb.ImportPlacementRequest(operation_id="same", placement=held))
    assert rig.done("same").reason == "it is so already"
    held.slots["shard-0"].layers[0].experts.append(2)
    rig.call(IMPORT_PLACEMENT, pb.ImportPlacementRequest(operation_id="more", placement=held))
    assert rig.done("more").outcome == "done"
    assert rig.operations.view().placement.slots["shard-0"][0] == (0, 1, 2)
    held.moe_layers[0] = 7
    wrong = pb.ImportPlacementRequest(operation_id="odd", placement=held)
    code, why = rig.refused(IMPORT_PLACEMENT, wrong)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "moe_layers = [7, 3]" in why


def test_rebalance_says_what_it_found_and_what_it_began(rig: Rig) -> None:
    shown = rig.call(REBALANCE, pb.RebalanceRequest(operation_id="look", dry_run=True))
    assert (shown.verdict, shown.copies_after) == ("confirm", 1.0)
    assert not shown.HasField("operation")
    moved = rig.call(REBALANCE, pb.RebalanceRequest(operation_id="move"))
    assert moved.verdict == "move" and moved.operation.operation_id == "move"
    assert rig.done("move").outcome == "done"


def test_status_health_and_reflection(rig: Rig) -> None:
    status = rig.call(GET_STATUS, pb.GetStatusRequest())
    assert (status.name, status.epoch, status.phase) == ("world", 1, "serving")
    assert not status.HasField("running")
    assert [(m.uid, m.alive, m.why_not_serving) for m in status.members] == [
        ("dense-0", False, "killed"),
        ("shard-0", True, ""),
    ]
    health = health_pb2_grpc.HealthStub(rig.channel)
    answer = health.Check(health_pb2.HealthCheckRequest(service=COORDINATOR), timeout=SOON_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    [listed] = stub.ServerReflectionInfo(
        iter(asked), timeout=SOON_S, metadata=credentials_of(TOKEN)
    )
    assert COORDINATOR in {s.name for s in listed.list_services_response.service}


def test_a_port_that_is_taken_is_an_error(rig: Rig) -> None:
    port = int(rig.server.address.rpartition(":")[2])
    second = CoordinatorServer(rig.operations, token=TOKEN, bind_ip="127.0.0.1", port=port)
    with pytest.raises(ClusterError, match="cannot listen"):
        second.start()
    second.stop()
