"""Shards that others took over from come back, unless somebody decides that they do not."""

import pytest
from support.coordinator_rig import World

from remora.cluster.former_places import former_after, slots_with
from remora.cluster.operation import Drain, PlaceAs, Restore, ScaleTo, TakeOver, Target
from remora.cluster.operation_plan import plan_target

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
TWO = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH)}
FOUR = {f"shard-{i}": ((2 * i, 2 * i + 1),) * 2 for i in range(4)}
WHERE = {"shard-0": ((0,),), "shard-1": ((1, 2),), "shard-2": ((3,),), "shard-3": ((0, 3),)}


def away(*uids: str, four: bool = False, room: int = 8) -> World:
    """These have died, others have taken over, and there is no room for them."""
    it = World(FOUR if four else TWO, num_experts=8, room=room, num_copies=8)
    it.settle()
    it.placeless.update(uids)
    for uid in uids:
        it.kill(uid)
        it.settle(it.now_s + it.limits.patience_s)  # the next has second copies again
    assert not set(uids) & it.state.view.placement.slots.keys()
    it.now_s += it.limits.patience_s
    it.settled.clear()
    return it


@pytest.mark.parametrize("target", [ScaleTo(dense_groups=3), Drain(("dense-1",))])
@pytest.mark.parametrize("restarts", [False, True])
def test_what_others_do_meanwhile_makes_nobody_forget_a_shard(
    target: Target, restarts: bool
) -> None:
    it = away("shard-1")
    assert it.run_until_over("one", target).outcome == "done"
    if restarts:
        it.restart()
    it.settle(it.now_s)
    it.place("shard-1")
    it.settle()
    it.check_all_back()
    assert it.state.view.placement.slots == TWO and it.state.former == {}


@pytest.mark.parametrize("target", [ScaleTo(1), Drain(("shard-1",))])
def test_who_is_away_is_forgotten_when_somebody_says_so(target: Target) -> None:
    """Also when there is nothing else to do, and in the log."""
    it = away("shard-1")
    operation = it.run_until_over("less", target)
    assert (operation.outcome, operation.reason) == ("done", "it is so already")
    for _ in range(2):
        it.settle()
        assert it.state.former == {} and it.state.operation is None
        assert it.state.view.placement.slots.keys() == {"shard-0"}
        it.restart()
    assert it.state.history["less"].outcome == "done"


def test_a_shard_that_is_away_is_counted_with_the_others() -> None:
    it = away("shard-1")
    it.placeless.clear()
    assert it.run_until_over("two", ScaleTo(2)).joiners == {"shard-1": 3}
    it.settle()
    it.check_all_back()


def test_what_is_moved_meanwhile_stays_there_when_a_shard_comes_back() -> None:
    it = away("shard-3", four=True)
    slots = dict(it.state.view.placement.slots)
    moved = {u: tuple(tuple(sorted({*e, 0})) for e in held) for u, held in slots.items()}
    assert it.run_until_over("moved", PlaceAs(moved)).outcome == "done"
    it.place("shard-3")
    it.settle()
    it.check_all_back()
    now = it.state.view.placement.slots
    assert {u: tuple(map(set, h)) for u, h in now.items()} == {
        u: tuple(map(set, h)) for u, h in (moved | {"shard-3": FOUR["shard-3"]}).items()
    }


def test_one_comes_back_while_another_stays_away() -> None:
    it = away("shard-2", "shard-3", four=True, room=2)
    it.place("shard-2")
    it.settle(it.now_s + 300.0)  # it has not been much faster
    slots = it.state.view.placement.slots
    assert slots.keys() == {"shard-0", "shard-1", "shard-2"}
    assert slots["shard-2"] == FOUR["shard-2"], "no more than it has room for"
    assert it.state.former == FOUR
    it.place("shard-3")
    it.settle()
    it.check_all_back()
    assert it.state.view.placement.slots == FOUR and it.state.former == {}


def test_a_shard_that_took_over_and_died_comes_back_before_the_one_that_it_took_over_from() -> None:
    """It has more to load then than if both came back."""
    it = World(TWO, num_experts=8, room=4, num_copies=8)
    it.settle()
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.settle(20.0)
    it.kill("shard-0")
    it.settle(100.0)
    assert it.state.view.placement.slots == {"shard-0": (EIGHT, EIGHT)}
    assert set(it.shards) == {("shard-0", 3)}
    it.place("shard-1")
    it.settle()
    it.check_all_back()
    assert it.state.view.placement.slots == TWO


def test_nobody_takes_the_name_of_a_shard_that_is_away() -> None:
    it = away("shard-1", four=True)
    it.run_until_over("evacuated", Drain(("shard-0",), "needed"))
    replaced = plan_target(ScaleTo(3, gives_way=True), it.state.situation())
    assert replaced.joiners == {"shard-0": 2}
    more = plan_target(ScaleTo(4, gives_way=True), it.state.situation())
    assert more.joiners == {"shard-0": 2, "shard-4": 1}
    assert plan_target(ScaleTo(4), it.state.situation()).joiners.keys() == {"shard-0", "shard-1"}
    it.place("shard-1")
    it.settle()
    it.check_all_back()


def test_until_when_it_is_known_where_shards_come_back_to() -> None:
    after = {uid: held for uid, held in WHERE.items() if uid != "shard-1"}
    other = after | {"shard-2": ((2, 3),)}
    assert former_after(TakeOver(("shard-1",)), {}, WHERE, after) == WHERE
    assert former_after(TakeOver(("shard-2",)), WHERE, after, other) == WHERE, "the first placement"
    for target in (ScaleTo(dense_groups=1), Drain(("dense-0",)), Restore(("dense-0",))):
        assert former_after(target, WHERE, after, after) == WHERE
    assert former_after(PlaceAs(other), WHERE, after, other) == other | {
        "shard-1": WHERE["shard-1"]
    }
    assert former_after(Restore(("shard-1",)), WHERE, after, WHERE) == {}
    assert former_after(ScaleTo(3), WHERE, after, after) == {}
    assert former_after(ScaleTo(3, gives_way=True), WHERE, after, after) == WHERE
    assert former_after(Drain(("shard-1",)), WHERE, after, after) == {}
    fewer = {uid: held for uid, held in after.items() if uid != "shard-3"}
    assert former_after(Drain(("shard-3",)), WHERE, after, fewer) == {
        uid: held for uid, held in WHERE.items() if uid != "shard-3"
    }


def test_what_shards_hold_once_some_are_back() -> None:
    now = {"shard-0": ((0, 1),), "shard-3": ((0, 3, 2),)}  # 1 and 2 are away
    assert slots_with(("dense-0",), now, WHERE, ()) == now
    assert slots_with(("shard-1", "shard-2"), now, WHERE, ()) == WHERE
    assert slots_with(("shard-2",), now, WHERE, ()) == now | {"shard-2": ((3,),)}
    split = {"shard-0": ((0, 1),), "shard-3": ((0, 2, 3),)}
    fewer = {uid: held for uid, held in WHERE.items() if uid != "shard-2"}
    assert slots_with(("shard-1",), split, fewer, ()) == fewer
    assert slots_with(("shard-1",), now, {**WHERE, "shard-3": ((0,),)}, ()) == {
        "shard-0": ((0,),), "shard-3": ((0, 3),), "shard-1": ((1, 2),)
    }, "3 is where it was taken over, since who held it stays away"  # fmt: skip
    dead = {**WHERE, "shard-0": ((0, 3),), "shard-3": ((0,),)}
    now = {"shard-0": ((0, 3, 1),), "shard-3": ((0, 3, 2),)}
    assert slots_with(("shard-1",), now, dead, {"shard-0"}) == {
        "shard-0": ((0, 3),), "shard-3": ((0, 3),), "shard-1": ((1, 2),)
    }, "nobody counts on who is dead"  # fmt: skip
