"""Generations of a communicator under running steps: swapped, split, broken, rebuilt."""

import threading
from collections.abc import Callable

import pytest
from support.fake_nccl import FakeNccl
from support.nccl_cluster import Cluster, thrice, without
from support.nccl_rig import view_of

from remora.comm.nccl_link import Link
from remora.comm.nccl_messages import Ticket
from remora.comm.view import View


def view_at(epoch: int, num_shards: int, num_sources: int = 2) -> View:
    return view_of(num_sources, thrice(num_shards), epoch=epoch)


def test_steps_run_on_one_generation() -> None:
    cluster = Cluster(view_at(1, 3), 6)
    cluster.run()
    cluster.check_emitted()
    assert len(set(cluster.used.values())) == 1
    assert [t.mode for t in cluster.tickets][:3] == ["warm", "decode", "exact"]


def test_the_next_generation_is_built_beside_and_swapped_at_a_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard joins after step 2, and is slow: steps 3 to 5 run on the old generation meanwhile."""
    small, large = without(view_at(2, 3), "shard-2"), view_at(4, 3)
    cluster = Cluster(small, 9, everybody=large, at_commit={2: large})
    may_come = threading.Event()
    slow, create = cluster.processes["shard-2"], FakeNccl.NcclCommunicator
    monkeypatch.setattr(
        slow,
        "NcclCommunicator",
        lambda *args: (may_come.wait(10.0), create(slow, *args))[1],
    )

    def let_it_come(step: int) -> None:
        if step == 5:
            may_come.set()
            cluster.patient = True  # step 6 waits for the swap, so that there is one to look at

    cluster.on_commit = let_it_come
    cluster.run()
    cluster.check_emitted()
    old, new = cluster.used[1], cluster.used[9]
    assert old < new and [cluster.used[step] for step in range(1, 6)] == [old] * 5
    assert sorted(cluster.used.values()) == list(cluster.used.values())
    for uid in ("dense-0", "shard-0"):
        first, second = cluster.processes[uid].communicators
        assert first.is_gone and second.is_gone  # after the swap; at the end


def test_shrinking_splits_and_growing_builds() -> None:
    full = view_at(1, 4)
    small = without(without(full, "shard-3"), "shard-2")
    again = view_at(9, 4)
    cluster = Cluster(full, 9, at_commit={3: small, 6: again}, split=True, patient=True)
    cluster.run()
    cluster.check_emitted()
    modes = [ticket.mode for ticket in cluster.tickets]
    assert modes.count("split") == 1 and modes.count("warm") == 3
    by_build = Cluster(full, 6, at_commit={3: small}, patient=True)
    by_build.run()
    by_build.check_emitted()
    assert "split" not in [ticket.mode for ticket in by_build.tickets]


def steady() -> Cluster:
    return Cluster(view_at(1, 3), 3)


def growing() -> Cluster:
    """shard-3 joins after step 1."""
    grown = {1: view_at(2, 4)}
    return Cluster(view_at(1, 3), 3, everybody=view_at(1, 4), at_commit=grown, patient=True)


def shrinking() -> Cluster:
    """shard-3 leaves after step 1, by a split."""
    full = view_at(1, 4)
    return Cluster(full, 3, at_commit={1: without(full, "shard-3")}, split=True, patient=True)


@pytest.mark.parametrize(
    ("make", "uid"),
    [
        (steady, "shard-1"),
        (steady, "dense-0"),
        (growing, "shard-1"),
        (growing, "shard-3"),
        (growing, "dense-1"),
        (shrinking, "shard-1"),
        (shrinking, "shard-3"),
    ],
)
def test_a_member_dies_at_any_point(make: Callable[[], Cluster], uid: str) -> None:
    """Creating, splitting, connecting, packing, between counts and rows, waiting: at every third of
    its calls of NCCL. The step runs again, and what is emitted is what it always is."""
    healthy = make()
    healthy.run()
    for die_at in range(1, healthy.processes[uid].num_calls + 1, 3):
        cluster = make()
        cluster.processes[uid].die_at = die_at
        cluster.run()
        cluster.check_emitted()
        assert cluster.gave_up is None, die_at
        assert len(cluster.used) == 3, die_at


def test_two_members_die_in_one_step() -> None:
    cluster = Cluster(view_at(1, 4), 4)
    killed = []

    def kill_two(link: Link, ticket: Ticket) -> None:
        if ticket.step == 2 and not killed:
            killed.append(ticket)
            cluster.processes["shard-0"].die_at = 0
            cluster.processes["shard-2"].die_at = 0

    cluster.on_work = kill_two
    cluster.run()
    cluster.check_emitted()
    assert cluster.conductor.current is not None and cluster.gave_up is None
    assert cluster.conductor.current.shard_uids == ("shard-1", "shard-3")


def test_an_error_that_nccl_reports_rebuilds_with_the_same_members() -> None:
    cluster = Cluster(view_at(1, 3), 4)
    injected = []

    def inject(link: Link, ticket: Ticket) -> None:
        if ticket.step == 2 and link.uid == "shard-1" and not injected:
            injected.append(ticket)
            link.comm.inject(6)

    cluster.on_work = inject
    cluster.run()
    cluster.check_emitted()
    assert cluster.used[1] < cluster.used[2] == cluster.used[4]
    assert cluster.view.epoch == 1
    assert any("NCCL_ERROR_REMOTE_ERROR" in why for why in cluster.broken)


def test_a_communicator_that_always_fails_is_given_up() -> None:
    cluster = Cluster(view_at(1, 3), 4)

    def inject(link: Link, ticket: Ticket) -> None:
        if link.uid == "shard-1":
            link.comm.inject(2)

    cluster.on_work = inject
    cluster.run()
    assert cluster.gave_up is not None and "shard-1" in cluster.gave_up
    assert not cluster.emitted["dense-0"]


def test_a_member_that_hangs_meets_the_deadline() -> None:
    """Alive, and silent: the others abort at the deadline, and so does it when it wakes."""
    cluster = Cluster(view_at(1, 3), 3, deadline_s=1.0)
    cluster.world.patience_s = 0.3
    hung = []

    def hang(link: Link, ticket: Ticket) -> None:
        if ticket.step == 2 and link.uid == "shard-1" and not hung:
            hung.append(ticket)
            link._lost.wait(10.0)  # until the conductor stops the generation

    cluster.on_work = hang
    cluster.run()
    cluster.check_emitted()
    assert cluster.used[1] < cluster.used[2]
