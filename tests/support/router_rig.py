"""A router's server on loopback, and what calls it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from remora.actors.router_service import RouterServer
from remora.actors.router_statistics import RouterStatistics
from remora.comm.grpc_base import channel_options
from remora.comm.view import Endpoint, Member, Placement, View, contiguous_placement

TOKEN = b"a token for the tests, 32 bytes."


def member(uid: str, host: str, incarnation: int = 1) -> Member:
    """A dense group or a shard that nobody dials."""
    return Member(
        uid=uid,
        incarnation=incarnation,
        role="dense" if uid.startswith("dense") else "shard",
        endpoint=Endpoint(host=host, tcp_address="127.0.0.1:1"),
        actor_name=uid,
        labels={"zone": host},
    )


def view_of(
    epoch: int = 1,
    *,
    hosts: tuple[str, ...] = ("a", "b"),
    num_experts: int = 8,
    moe_layers: tuple[int, ...] = (1, 2),
    placement: Placement | None = None,
) -> View:
    """A dense group and a shard on each host."""
    shards = tuple(f"shard-{i}" for i in range(len(hosts)))
    members = [member(f"dense-{i}", host) for i, host in enumerate(hosts)]
    members += [member(uid, host) for uid, host in zip(shards, hosts, strict=True)]
    placement = placement or contiguous_placement(
        num_experts=num_experts, moe_layers=moe_layers, shard_uids=shards
    )
    return View(epoch=epoch, members=tuple(members), placement=placement)


@contextmanager
def running_router(
    view: View | None = None, kind: type[RouterServer] = RouterServer, **options: Any
) -> Iterator[RouterServer]:
    """A server that listens."""
    statistics = RouterStatistics(slots=None, path=None)
    server = kind(
        bind_ip="127.0.0.1", **{"token": TOKEN, "port": 0, "statistics": statistics, **options}
    )
    server.start()
    try:
        if view is not None:
            server.adopt_view(view)
        yield server
    finally:
        server.stop()


@contextmanager
def channel_to(server: RouterServer) -> Iterator[grpc.Channel]:
    """A channel of a caller that is no process of ours."""
    with grpc.insecure_channel(server.address, options=channel_options()) as channel:
        yield channel


def wait_for(is_so: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Look until something is so."""
    end_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end_s, f"not so within {limit_s:g} s"
        time.sleep(0.01)
