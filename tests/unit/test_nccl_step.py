"""A dense rank's step over NCCL: which ticket's result leaves, and what ends a wait.

The test conducts; one shard that computes nothing takes part. NCCL is the fake one. What a
conductor makes of faults in its own process is here, too.
"""

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.fake_nccl import CpuDevice, FakeNccl, World
from support.local_cluster import pretended_gpu
from support.nccl_cluster import thrice
from support.nccl_rig import view_of
from torch import Tensor

from remora.actors.launch import NcclLaunch
from remora.actors.nccl_conductor import PEER_NAME, NcclConductor
from remora.actors.nccl_dense import NcclSource
from remora.actors.nccl_stream import ConductorStream
from remora.actors.view_inbox import ViewInbox
from remora.comm.errors import ClusterError
from remora.comm.nccl_conductor_state import ViewCame
from remora.comm.nccl_member import NcclMember
from remora.comm.nccl_messages import (
    Build,
    Built,
    Commit,
    Ticket,
    TicketBroken,
    TicketOver,
    Wants,
    encode,
)
from remora.comm.nccl_plan import Roster
from remora.comm.wire import Kind

WAIT_S = 30.0


class Conducted:
    """A dense rank and a shard without a layer to exchange, and what they say to the test."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.world = World()
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.view = view_of(1, thrice(1))
        self.roster = Roster.of(self.view, 1 << 16)
        views = ViewInbox(lambda view: None, WAIT_S)
        views.tell(self.view)
        spec: Any = SimpleNamespace(num_experts=12, top_k=4, hidden_size=8, moe_layers=())
        self.source = NcclSource(
            pretended_gpu(self.world, "dense-0"), uid="dense-0", incarnation=1, spec=spec,
            dtype=torch.float32, presummed=True, self_host="0", views=views,
            launch=NcclLaunch(capacity_max=8, step_timeout_s=WAIT_S), reply=self.said.put,
            wake=lambda: None, adopt=lambda view: None,
        )  # fmt: skip
        self.source.see(self.view)
        nccl: Any = FakeNccl(self.world, "shard-0")
        self.shard = NcclMember(
            nccl=nccl, device=CpuDevice(nccl), uid="shard-0", incarnation=1, reply=self.said.put,
            work=lambda link, ticket: None, emit=lambda step: None,
        )  # fmt: skip
        self._serving = threading.Thread(target=self.shard.serve)
        self._serving.start()

    def tell(self, message: Any) -> None:
        """To both."""
        self.source.take(message)
        self.shard.post(message)

    def heard(self, kind: type) -> list[Any]:
        """The next message of each member, which are of that kind."""
        both = [self.said.get(timeout=WAIT_S) for _ in range(2)]
        assert [type(message) for message in both] == [kind] * 2, both
        return both

    def step(self, run: Callable[[Any], Tensor]) -> "Future[Tensor]":
        """A step that has asked for its ticket on a communicator that is connected."""
        stepping = self._pool.submit(self.source.step, 3, run)
        assert self.said.get(timeout=WAIT_S) == Wants("dense-0", 3)
        self.tell(Build(self.roster, FakeNccl(self.world, "root").get_unique_id()))
        self.heard(Built)
        self.run(Ticket(number=1, generation=self.roster.generation, mode="warm"))
        return stepping

    def run(self, ticket: Ticket) -> None:
        self.tell(ticket)
        self.heard(TicketOver)

    def close(self) -> None:
        self.shard.close()
        self._serving.join()
        self.source.close()
        self.world.close()


@pytest.fixture
def conducted() -> Iterator[Conducted]:
    with ThreadPoolExecutor(1) as pool:
        made = Conducted(pool)
        yield made
        made.close()


def test_what_a_ticket_made_that_was_not_committed_never_leaves(conducted: Conducted) -> None:
    """Another rank's step is committed next: a new conductor heard of that one first."""
    ran: list[Tensor] = []

    def run(experts: Any) -> Tensor:
        ran.append(torch.full((1,), len(ran)))
        return ran[-1]

    c = conducted
    ticket = functools.partial(Ticket, generation=c.roster.generation, mode="exact", capacity=1)
    stepping = c.step(run)
    c.run(ticket(number=2, step=1, sources=("dense-0",)))  # a member elsewhere breaks it
    c.run(ticket(number=3, step=1, sources=("dense-7",)))
    c.tell(Commit(1))
    c.run(ticket(number=4, step=2, sources=("dense-0",)))
    c.tell(Commit(2))
    assert stepping.result(WAIT_S).item() == 1


def test_what_fails_in_a_ticket_of_others_is_told_by_the_next_step(
    conducted: Conducted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for what an idle rank does."""
    c = conducted
    c.tell(Build(c.roster, FakeNccl(c.world, "root").get_unique_id()))
    for _ in range(2):  # it is told to build; it has built
        c.source.member.serve_one(WAIT_S)
    c.heard(Built)
    c.tell(Ticket(number=1, generation=c.roster.generation, mode="warm"))
    c.source.attend()
    c.heard(TicketOver)

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(c.source, "_take_part", fails)
    c.tell(Ticket(number=2, generation=c.roster.generation, mode="exact", sources=("dense-7",)))
    c.source.attend()
    said = {type(c.said.get(timeout=WAIT_S)) for _ in range(2)}
    assert said == {TicketBroken, TicketOver}
    with pytest.raises(ClusterError, match="CUDA error: out of memory"):
        c.source.step(1, lambda experts: torch.zeros(1))


@pytest.fixture
def conductor() -> Iterator[Any]:
    """One whose thread has not begun."""

    def fails() -> bytes:
        raise KeyError(7)

    nccl: Any = SimpleNamespace(get_unique_id=fails)
    made = NcclConductor(lambda: nccl, token=bytes(32), self_host="0", capacity_max=8, build_s=60.0)
    yield made
    made._loop.close()


def test_an_id_that_is_not_made_is_a_failed_build(conductor: Any) -> None:
    """Whatever cupy raises: KeyError(7) is its "in progress"."""
    conductor._handle(ViewCame(view_of(1, thrice(1))))
    assert conductor._refused.why == (
        "the communicator failed 3 times: dense-0: NCCL makes no id: KeyError: 7"
    )


def test_a_member_whose_message_the_conductor_fails_on_is_dialled_again(conductor: Any) -> None:
    class Stream:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield encode(Built("shard-0", 1))

        async def close(self) -> None:
            said.append("closed")

    async def listens() -> None:
        conductor._tasks["shard-0"] = asyncio.current_task()
        await conductor._listen("shard-0", conductor._streams["shard-0"])

    def fails(payload: bytes) -> None:
        raise RuntimeError("not expected")

    said: list[str] = []
    shard = view_of(1, thrice(1)).members[-1]
    conductor._members["shard-0"], conductor._streams["shard-0"] = shard, Stream()
    conductor._receive = fails
    asyncio.run(listens())
    assert said == ["closed"] and not conductor._has(shard)
    assert "not expected" in conductor._unreached["shard-0"]


def test_a_new_conductor_ends_what_the_one_before_began() -> None:
    """The host of that one lost its power: its stream has not ended here. A step that has asked it
    for a ticket asks anew."""
    heard: list[Any] = []
    stream = ConductorStream("dense-1", heard.append, heard.append)
    old: Any = SimpleNamespace(id=3, peer_name=PEER_NAME)
    new: Any = SimpleNamespace(id=5, peer_name=PEER_NAME)

    def comes(connection: Any, step: int) -> None:
        header, body = SimpleNamespace(kind=Kind.CONTROL), encode(Commit(step))
        frame: Any = SimpleNamespace(header=header, body=body)
        assert stream.takes(connection, frame)

    comes(old, 1)
    comes(new, 2)
    comes(old, 3)  # sent before it was gone
    stream.on_lost(old)
    assert heard == [Commit(1), "another dense-0 conducts", Commit(2)]
