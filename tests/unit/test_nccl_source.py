"""One dense rank's part over the fake NCCL, without an engine."""

import threading
from typing import Any

from support.fake_nccl import FakeNccl, World
from support.local_cluster import pretended_gpu
from support.nccl_cluster import thrice
from support.nccl_rig import view_of

from remora.actors.launch import NcclLaunch
from remora.actors.nccl_dense import NcclSource
from remora.actors.view_inbox import ViewInbox
from remora.comm.nccl_messages import Build, Built, Stop
from remora.comm.nccl_plan import Roster


def source_in(world: World, said: list[Any]) -> NcclSource:
    return NcclSource(
        pretended_gpu(world, "dense-0"), uid="dense-0", incarnation=1, spec=None, dtype=None,
        presummed=True, launch=NcclLaunch(capacity_max=4, step_timeout_s=10.0), self_host="0",
        reply=said.append, wake=lambda: None, views=ViewInbox(lambda view: None, 0.0),
        adopt=lambda view: None,
    )  # type: ignore[arg-type]  # fmt: skip


def build(source: NcclSource, world: World, roster: Roster) -> None:
    """All members make the communicator; returns when the rank's engine has heard of it."""
    unique_id = FakeNccl(world, "root").get_unique_id()
    source.take(Build(roster, unique_id))
    source.attend()
    others = [
        threading.Thread(
            target=FakeNccl(world, uid).NcclCommunicator,
            args=(len(roster.uids), unique_id, rank),
            name=f"nccl-{uid}",
        )
        for rank, uid in enumerate(roster.uids)
        if rank
    ]
    for thread in others:
        thread.start()
    for thread in threading.enumerate():
        if thread.name.startswith("nccl-"):
            thread.join(10.0)
    source.attend()


def test_a_communicator_is_told_of_when_its_view_is_here() -> None:
    """Else the next ticket may be of it, and this rank does not know where experts are."""
    world, said = World(), list[Any]()
    source, view = source_in(world, said), view_of(1, thrice(5), epoch=2)
    source.see(view_of(1, thrice(4), epoch=1))
    build(source, world, Roster.of(view, 5))
    assert said == []
    source.see(view)
    source.attend()
    assert said == [Built("dense-0", 5)]
    source.close()


def test_a_communicator_that_was_stopped_meanwhile_is_not_told_of() -> None:
    world, said = World(), list[Any]()
    source, view = source_in(world, said), view_of(1, thrice(3), epoch=2)
    build(source, world, Roster.of(view, 5))
    source.take(Stop(5, "a newer view came"))
    source.see(view)
    source.attend()
    assert said == []
    source.close()


def test_members_that_are_left_of_a_view_need_no_other_one() -> None:
    """As long as they hold every expert; a rank knows nothing of who is gone."""
    world, said = World(), list[Any]()
    source = source_in(world, said)
    source.see(view_of(1, thrice(4), epoch=1))
    build(source, world, Roster.of(view_of(1, thrice(3)), 5))
    assert said == [Built("dense-0", 5)]
    source.close()
