"""A member and what goes wrong around it: no conductor, builds that fail, hang or come too late."""

import queue
import threading
from typing import Any

import pytest
from support.fake_nccl import CpuDevice, FakeNccl, NcclError, World
from support.nccl_cluster import thrice
from support.nccl_rig import view_of

from remora.comm import nccl_member
from remora.comm.errors import ClusterError, PeerLostError
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import Build, NotBuilt, Stop, Ticket, TicketBroken
from remora.comm.nccl_plan import Roster


class Creating:
    """`NcclCommunicator` of a test: it waits to be let go, and then raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.may_end = threading.Event()
        self.others = set(threading.enumerate())  # of tests that leave one hanging

    def __call__(self, *_: Any) -> Any:
        self.may_end.wait(10.0)
        raise self.error

    def end(self) -> None:
        self.may_end.set()
        for thread in set(threading.enumerate()) - self.others:
            if thread.name.startswith("nccl-"):
                thread.join(10.0)


def member_of(nccl: Any, reply: Any) -> NcclMember:
    return NcclMember(
        nccl=nccl, device=CpuDevice(nccl), uid="shard-0", incarnation=1, reply=reply,
        work=lambda link, ticket: None, emit=lambda step: None,
    )  # fmt: skip


def build_of(generation: int) -> Build:
    return Build(Roster.of(view_of(1, thrice(3)), generation), bytes(128))


def handle_all(member: NcclMember) -> None:
    try:
        while True:
            member.serve_one(0)
    except queue.Empty:
        return


def test_a_member_outlives_its_conductor() -> None:
    """What it would have said is void for the next one, who must find it alive."""
    said: list[Any] = []

    def reply(message: Any) -> None:
        if not said:
            said.append(message)
            raise PeerLostError("dense rank 0 is gone")
        said.append(message)

    member = member_of(FakeNccl(World(), "shard-0"), reply)
    member.post(Ticket(number=1, generation=7, mode="exact"))
    member.post(Ticket(number=2, generation=7, mode="exact"))
    member.close()
    member.serve()
    assert [type(message) for message in said] == [TicketBroken] * 2


@pytest.mark.parametrize("error", [KeyError(7), RuntimeError("CUDA error: out of memory")])
def test_a_build_that_fails_in_any_way_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The conductor waits for every member's word; cupy has errors beside NcclError."""
    nccl, said = FakeNccl(World(), "shard-0"), list[Any]()
    creating = Creating(error)
    monkeypatch.setattr(nccl, "NcclCommunicator", creating)
    member = member_of(nccl, said.append)
    member.post(build_of(1))
    handle_all(member)
    creating.end()
    handle_all(member)
    (told,) = said
    assert isinstance(told, NotBuilt) and type(error).__name__ in told.why


def test_a_build_that_ended_before_it_was_given_up_is_not_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Stop that lay in the queue of a busy member while its side thread came back."""
    nccl, said = FakeNccl(World(), "shard-0"), list[Any]()
    member = member_of(nccl, said.append)
    for generation in range(1, nccl_member.BUILDS_STUCK_MAX + 3):
        creating = Creating(NcclError(6))
        monkeypatch.setattr(nccl, "NcclCommunicator", creating)
        member.post(build_of(generation))
        handle_all(member)
        member.post(Stop(generation, "a member died"))
        creating.end()
        handle_all(member)
    assert [type(message) for message in said] == [NotBuilt] * (nccl_member.BUILDS_STUCK_MAX + 2)


def test_builds_that_hang_are_bounded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once one of them has returned there is room for the next."""
    nccl, said = FakeNccl(World(), "shard-0"), list[Any]()
    creating = Creating(NcclError(6))
    monkeypatch.setattr(nccl, "NcclCommunicator", creating)
    member = member_of(nccl, said.append)
    last = nccl_member.BUILDS_STUCK_MAX + 1
    for generation in range(1, last):
        member.post(build_of(generation))
        member.post(Stop(generation, "a newer view came"))
    handle_all(member)
    member.post(build_of(last))
    with pytest.raises(ClusterError, match="never came to be"):
        handle_all(member)
    handle_all(member)
    (told,) = said
    assert isinstance(told, NotBuilt) and "never came to be" in told.why
    creating.end()
    member.post(build_of(last + 1))
    handle_all(member)
    creating.end()
    handle_all(member)
    assert said[1:] == [NotBuilt("shard-0", last + 1, f"NcclError: {creating.error}")]
