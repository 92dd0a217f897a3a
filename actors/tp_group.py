"""How the ranks of a tensor-parallel dense group come together, and what they exchange with.

Ranks of one host (by Ray's label, as everywhere) with C++ kernels share memory that rank 0 makes
and passes on; it has no name and goes with its last process. Ranks with a GPU each use NCCL, others
gloo. Neither's connections know a token: they need a network that is ours alone.
"""

import dataclasses
import datetime
import logging
import os
from collections.abc import Callable

import torch
from torch._C._distributed_c10d import TCPStore

from remora.actors.dense_launch import RankLaunch
from remora.actors.hardware import Hardware
from remora.actors.launch import advertised_ip, host_label
from remora.comm.arena import Memory
from remora.comm.collectives import CAPACITY_BYTES_MAX, GlooGroup, SharedGroup
from remora.comm.errors import ClusterError, FrameError
from remora.comm.nccl_group import NcclGroup
from remora.comm.rank_link import (
    Broke,
    Hello,
    Link,
    RankListener,
    Recover,
    Setup,
    dial_rank_0,
)
from remora.comm.view import Endpoint
from remora.kernels.fingerprint import kernel_fingerprint
from remora.kernels.native import native_available

logger = logging.getLogger(__name__)

DIAL_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A group as rank 0 has it."""

    group: SharedGroup | GlooGroup | NcclGroup
    links: dict[int, Link]
    hosts: list[str]  # of each rank
    kernels: list[str]  # `kernels_of` each rank


def gather_ranks(listener: RankListener, launch: RankLaunch, hardware: Hardware) -> Ranks:
    """Wait for the other ranks and agree on how to exchange.

    Raises:
        DeadlineError, PeerLostError, ClusterError: ranks that did not come, or went.
        ConfigError: GPUs without cupy or NCCL.
    """
    found = listener.accept(launch.num_ranks, launch.start_timeout_s)
    listener.close()
    links = {rank: link for rank, (_, link) in sorted(found.items())}
    hellos = [found[rank][0] for rank in sorted(found)]
    hosts = [host_label(), *(hello.host for hello in hellos)]
    kernels = [kernels_of(hardware), *(hello.kernels for hello in hellos)]
    if len(set(kernels)) > 1:
        logger.warning("ranks compute with kernels that differ in last bits: %s", kernels)
    group: SharedGroup | GlooGroup | NcclGroup
    if launch.device == "cuda":
        group = _meet_over_nccl(links, launch, hardware)
    elif len(set(hosts)) == 1 and launch.use_unix and native_available():
        group = _share_memory(links, launch)
    else:
        logger.warning("ranks on %d hosts exchange over gloo, which is slower", len(set(hosts)))
        group = _meet_over_gloo(links, launch)
    return Ranks(group=group, links=links, hosts=hosts, kernels=kernels)


def join_ranks(
    endpoint: Endpoint, launch: RankLaunch, hardware: Hardware
) -> tuple[SharedGroup | GlooGroup | NcclGroup, Link]:
    """The same for any other rank.

    Raises:
        PeerLostError, AuthError, DeadlineError, FrameError, ClusterError, ConfigError.
    """
    hello = Hello(rank=launch.rank, host=host_label(), kernels=kernels_of(hardware))
    link = dial_rank_0(endpoint, launch.token, hello, DIAL_S)
    setup = link.receive(launch.start_timeout_s)
    if not isinstance(setup, Setup):
        raise FrameError(f"rank 0 sent {type(setup).__name__}, expected is Setup")
    if setup.kind == "shared":
        descriptor = link.receive_descriptor()
        try:
            size = SharedGroup.bytes_needed(launch.num_ranks, setup.capacity)
            memory = Memory.attach(descriptor, size)
        finally:
            os.close(descriptor)
        return _shared(memory, launch, setup.capacity, {0: link}), link
    if setup.kind == "nccl":

        def tell(reason: str) -> None:
            link.send(Broke(reason=reason))

        group = _nccl(
            launch, hardware, lambda: _wants_out(link), lambda: _is_gone("rank 0", link), tell
        )
        group.connect(setup.unique_id)
        return group, link
    store = _store(setup.store_ip, setup.store_port, launch, is_master=False)
    return _gloo(store, launch), link


def kernels_of(hardware: Hardware) -> str:
    """What the last bits of a rank's results depend on: equal strings, equal bits."""
    if hardware.device.type != "cuda":
        return kernel_fingerprint()
    return f"{kernel_fingerprint()} gpu={torch.cuda.get_device_name(hardware.device)}"


def _share_memory(links: dict[int, Link], launch: RankLaunch) -> SharedGroup:
    capacity = CAPACITY_BYTES_MAX
    size = SharedGroup.bytes_needed(launch.num_ranks, capacity)
    memory, descriptor = Memory.create_shared(size)
    try:
        for link in links.values():
            link.send(Setup(kind="shared", capacity=capacity))
            link.send_descriptor(descriptor)
    finally:
        os.close(descriptor)
    return _shared(memory, launch, capacity, links)


def _meet_over_gloo(links: dict[int, Link], launch: RankLaunch) -> GlooGroup:
    ip = _own_ip(launch)
    store = _store(ip, 0, launch, is_master=True)
    for link in links.values():
        link.send(Setup(kind="gloo", store_ip=ip, store_port=store.port))
    return _gloo(store, launch)


def _meet_over_nccl(links: dict[int, Link], launch: RankLaunch, hardware: Hardware) -> NcclGroup:
    def first(why: Callable[[str, Link], str | None]) -> str | None:
        reasons = (why(f"{launch.uid}.{rank}", link) for rank, link in links.items())
        return next(filter(None, reasons), None)

    group = _nccl(
        launch,
        hardware,
        lambda: first(_has_broken),
        lambda: first(_is_gone),
        lambda reason: None,  # the leader tells: `Recover`
    )
    unique_id = group.make_id()
    for link in links.values():
        link.send(Setup(kind="nccl", unique_id=unique_id))
    group.connect(unique_id)
    return group


def _has_broken(uid: str, link: Link) -> str | None:
    """Why rank 0 must not wait for rank `uid` in an exchange, if so."""
    try:
        message = link.peek()
    except ClusterError as error:
        return f"{uid} is gone ({error})"
    return message.reason if isinstance(message, Broke) else None


def _is_gone(uid: str, link: Link) -> str | None:
    """Why rank `uid` does not come to meet the others, if so. What it says of the step that all
    have left is taken off the link: its end could not be seen behind that."""
    try:
        while isinstance(link.peek(), Broke):
            link.receive()
    except ClusterError as error:
        return f"{uid} is gone ({error})"
    return None


def _wants_out(link: Link) -> str | None:
    """Why another rank must leave what it does, as rank 0 says."""
    try:
        message = link.peek()
    except ClusterError as error:
        return f"rank 0 is gone ({error})"
    return "rank 0 ended the step" if isinstance(message, Recover) else None


def _nccl(
    launch: RankLaunch,
    hardware: Hardware,
    watch: Callable[[], str | None],
    gone: Callable[[], str | None],
    tell: Callable[[str], None],
) -> NcclGroup:
    assert hardware.nccl_device is not None, "ranks of a group over NCCL have GPUs"
    return NcclGroup(
        hardware.nccl(),
        hardware.nccl_device,
        rank=launch.rank,
        size=launch.num_ranks,
        name=launch.uid.partition(".")[0],
        deadline_s=launch.exchange_timeout_s,
        watch=watch,
        gone=gone,
        tell=tell,
    )


def _shared(
    memory: Memory, launch: RankLaunch, capacity: int, links: dict[int, Link]
) -> SharedGroup:
    return SharedGroup(
        memory,
        rank=launch.rank,
        size=launch.num_ranks,
        capacity=capacity,
        deadline_s=launch.exchange_timeout_s,
        peers={rank: link.fileno() for rank, link in links.items()},
    )


def _store(ip: str, port: int, launch: RankLaunch, *, is_master: bool) -> TCPStore:
    timeout = datetime.timedelta(seconds=launch.exchange_timeout_s)
    return TCPStore(
        ip, port, launch.num_ranks, is_master=is_master, timeout=timeout, wait_for_workers=False
    )


def _gloo(store: TCPStore, launch: RankLaunch) -> GlooGroup:
    return GlooGroup(
        store,
        rank=launch.rank,
        size=launch.num_ranks,
        ip=_own_ip(launch),
        deadline_s=launch.exchange_timeout_s,
    )


def _own_ip(launch: RankLaunch) -> str:
    return advertised_ip(launch.bind_ip) or launch.bind_ip
