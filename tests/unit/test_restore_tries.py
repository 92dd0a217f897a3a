"""When members that died are tried again, and when they are given up."""

import math

from support.coordinator_rig import LAYERS, World

from remora.cluster.operation import ScaleTo
from remora.cluster.restore_tries import RESTORES_MAX, RestoreTries

ALL = (tuple(range(8)),) * len(LAYERS)


def test_each_member_has_its_own_tries() -> None:
    tries = RestoreTries(1.0, settled_s=5.0)
    both = ("shard-0", "shard-1")
    assert tries.next_s((), 9.0) is None and tries.next_s(both, 9.0) == 9.0
    assert not tries.failed("shard-0", 10.0) and not tries.failed("shard-0", 11.0)
    assert tries.due(both, 12.0) == ["shard-1"], "it died meanwhile"
    assert tries.next_s(("shard-0",), 12.0) == 13.0 and tries.due(both, 13.0) == [*both]
    tries.back(["shard-0"], 12.0)
    assert not tries.died("shard-0", 17.0) and tries.due(both, 17.0) == [*both]
    given_up = [tries.failed("shard-0", 20.0) for _ in range(RESTORES_MAX + 1)]
    assert given_up.index(True) == RESTORES_MAX - 1 and sum(given_up) == 1, "it is said once"
    assert tries.due(both, math.inf) == ["shard-1"] and tries.next_s(["shard-0"], 0.0) is None
    tries.forget_all()
    assert tries.due(both, 20.0) == [*both]


def test_who_dies_soon_after_coming_back_was_brought_back_in_vain() -> None:
    """Each time it is due later, and in the end it is given up; one long life, and all is well."""
    tries = RestoreTries(1.0, settled_s=5.0)
    now_s, waits = 0.0, []
    assert not tries.died("shard-0", now_s), "the first death of all is due at once"
    for life in range(1, RESTORES_MAX + 1):
        due_s = tries.next_s(["shard-0"], now_s)
        assert due_s is not None
        waits.append(due_s - now_s)
        tries.back(["shard-0"], due_s)
        now_s = due_s + 4.0
        assert tries.died("shard-0", now_s) == (life == RESTORES_MAX)
    assert waits == [0.0] + [2.0**n for n in range(RESTORES_MAX - 1)]
    assert tries.hopeful(["shard-0"]) == []
    tries.forget_all()
    tries.back(["shard-0"], now_s)
    assert not tries.died("shard-0", now_s + 4.0) and tries.next_s(["shard-0"], 0.0) == now_s + 5.0
    tries.back(["shard-0"], now_s)
    assert not tries.died("shard-0", now_s + 5.0) and tries.next_s(["shard-0"], 0.0) == 0.0


def test_a_shard_that_its_first_requests_kill_is_given_up() -> None:
    """Its experts have replicas: who serves them is left in peace."""
    it = World({"shard-0": ALL, "shard-1": ALL}, num_experts=8, room=8, replicas=2)
    for life in range(1, RESTORES_MAX + 2):
        assert set(it.shards) == {("shard-0", 1), ("shard-1", life)}
        it.kill("shard-1")
        it.settle()
    assert set(it.shards) == {("shard-0", 1)} and it.state.given_up() == {"shard-1"}
    assert it.alarms == ["shard-1 dies each time soon after it has come back"]
    it.ask("again", ScaleTo(2))
    it.settle()
    it.check_all_back()


def test_who_dies_while_its_return_ends_was_brought_back_in_vain() -> None:
    """It serves from the commit on, and dies while older views are drained."""
    it = World({"shard-0": ALL, "shard-1": ALL}, num_experts=8, room=8, replicas=2)
    it.kill("shard-1")
    for life in range(2, RESTORES_MAX + 2):
        while it.state.view.members[-1].incarnation != life:
            it.settle_one()
        assert it.state.operation is not None and it.state.operation.step == "drain"
        it.kill("shard-1")
    it.settle()
    assert it.state.given_up() == {"shard-1"} and it.now_s > 2.0 ** (RESTORES_MAX - 2)
    assert it.alarms == ["shard-1 dies each time soon after it has come back"]


def test_what_it_alone_had_does_not_wait_until_it_is_tried_again() -> None:
    """A living shard has second copies, and takes over at once."""
    halves = {"shard-0": (tuple(range(4)),) * 2, "shard-1": (tuple(range(4, 8)),) * 2}
    it = World(halves, num_experts=8, room=8, num_copies=4)
    for _ in range(3):
        it.settle()
        assert it.state.view.placement.slots == halves
        known, killed_s = len(it.published), it.now_s
        it.kill("shard-1")
        it.answer_all()
        assert it.now_s == killed_s
        assert it.published[known].placement.slots.keys() == {"shard-0"}
    it.settle()
    it.check_all_back()
