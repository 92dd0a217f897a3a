"""While no request can be served: what goes first, and views that name members which are dead."""

import pytest
from support.coordinator_members import LAYERS, Fault
from support.coordinator_rig import World

from remora.cluster.coordinator_calls import Limits
from remora.cluster.operation import (
    Adopt,
    Ask,
    Copy,
    Drain,
    HoldCopies,
    Log,
    Offer,
    ScaleTo,
    Target,
)
from remora.comm.errors import OperationRunsError

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
ALL = (EIGHT,) * len(LAYERS)
BOTH = {"shard-0": ALL, "shard-1": ALL}
TWO = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH)}
FOUR = {f"shard-{i}": ((2 * i, 2 * i + 1),) * 2 for i in range(4)}
LIMITS = Limits()


def asked(it: World, *kinds: type) -> list[object]:
    """Tasks of these kinds from now on."""
    found: list[object] = []
    one = it._one

    def seen(effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Ask) and isinstance(effect.task, kinds):
            found.append(effect.task)
        one(effect, here)

    it._one = seen  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("took_s", [1.0, 60.0])
def test_who_requests_wait_for_does_not_wait_for_others(took_s: float) -> None:
    """However long it took to find a place."""
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    uids = ("dense-0", "dense-1", "shard-1")
    it.placeless.update(uids)
    for uid in uids:
        it.kill(uid)
    it.settle(took_s)
    it.place("dense-1")
    it.answer_all()
    it.settle(max(took_s, LIMITS.patience_s))
    assert it.in_use.keys() == {"dense-1"}


@pytest.mark.parametrize("target", [ScaleTo(3), Drain(("shard-0",), "needed")])
def test_nobody_else_joins_before_those_are_back_for_whom_requests_wait(target: Target) -> None:
    """It might wait for room, which they would then wait for as well."""
    it = World(TWO, num_experts=8, room=4)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    for within_s in (LIMITS.patience_s, LIMITS.prepare_s):  # it is stuck; it is tried again soon
        it.settle(within_s)
        with pytest.raises(OperationRunsError, match="before shard-1 are back"):
            it.ask("mine", target)
    it.settle()
    assert it.state.lost == {"shard-1"}, "given up"
    it.placeless.clear()
    assert it.run("mine", ScaleTo(3)).outcome == "done"
    it.check_all_back()


def test_what_needs_nobody_else_may_bring_back_what_requests_wait_for() -> None:
    """The others load what the dead shard held."""
    it = World(TWO, num_experts=8, room=8)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.settle(LIMITS.patience_s)
    assert it.run("mine", Drain(("shard-1",))).outcome == "done"
    it.check_all_back()
    assert it.state.view.placement.slots.keys() == {"shard-0"}


def test_a_view_with_a_dead_shard_is_offered_without_it() -> None:
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.settle()
    views = asked(it, Offer, Adopt)
    assert it.run("more", ScaleTo(dense_groups=3)).outcome == "done"
    for task in views:
        assert isinstance(task, Offer | Adopt)
        names = {member.uid for member in task.view.members}
        assert ("shard-1" in names) == isinstance(task, Adopt)
        assert not isinstance(task, Adopt) or not task.or_none, "shard-0 has all of it"


@pytest.mark.parametrize("dies", [False, True])
def test_ranks_adopt_a_view_whose_experts_died_without_being_fenced(dies: bool) -> None:
    """They hold their steps until somebody is restored."""
    it = World(TWO, num_experts=8, room=4)
    one = it._one

    def while_ranks_leave_the_older_view(effect: Log | Ask, here: Fault) -> None:
        is_adoption = isinstance(effect, Ask) and isinstance(effect.task, Adopt)
        if dies and is_adoption and it.state.view.epoch == 2 and ("shard-1", 1) in it.shards:
            it.kill("shard-1")
        one(effect, here)

    it._one = while_ranks_leave_the_older_view  # type: ignore[method-assign]
    if not dies:
        it.placeless.add("shard-1")
        it.kill("shard-1")
        it.settle()
        it.placeless.clear()
    operation = it.run_until_over("more", ScaleTo(dense_groups=3))
    assert (operation.outcome, operation.reason) == ("done", "")
    it.settle()
    it.check_all_back()
    assert not any("fenced" in text for text in it.alarms)


@pytest.mark.parametrize("twice", [False, True])
def test_a_shard_that_dies_while_others_are_waited_for(twice: bool) -> None:
    """It is waited for as well, if requests do; else it comes back afterwards."""
    it = World(BOTH if twice else TWO, num_experts=8, room=8)
    it.placeless.add("dense-1")
    it.kill("dense-0")
    it.kill("dense-1")
    it.settle(1.0)
    it.kill("shard-1")
    it.settle(2.0)
    assert (("shard-1", 2) in it.shards) == (not twice)
    it.settle(LIMITS.patience_s)
    assert [op.operation_id for op in it.settled] == [
        "restore-dense-0.2",
        "restore-dense-1.3-shard-1.2",
    ][: 1 + twice]
    assert it.in_use.keys() == {"dense-0"} and ("shard-1", 2) in it.shards
    it.place("dense-1")
    it.settle()
    it.check_all_back()


def test_no_view_is_committed_that_is_of_no_use_without_others() -> None:
    """A shard may take minutes to load what nobody else has, and is not to begin anew."""
    it = World(TWO, num_experts=8, room=4)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.kill("dense-0")
    it.settle(300.0)
    running = it.state.operation
    assert running is not None and (running.begun_s, running.step) == (0.0, "prepare")
    it.kill("dense-1")
    it.settle(300.0)
    assert it.dense.keys() == {"dense-0", "dense-1"}, "it starts meanwhile"
    it.place("shard-1")
    it.settle()
    assert [op.outcome for op in it.settled] == ["done"]
    it.check_all_back()


def test_who_was_left_out_is_not_waited_for_again_until_it_has_been_back() -> None:
    it = World(BOTH, num_experts=8, room=8)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.kill("dense-0")
    it.settle(LIMITS.patience_s)
    for life in (2, 3):
        assert it.dense["dense-0"] == life
        it.kill("dense-0")
        it.settle(it.now_s)
    it.place("shard-1")
    it.settle()
    it.check_all_back()
    died_s = it.now_s = 100.0
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.kill("dense-0")
    it.settle(died_s + LIMITS.patience_s - 0.1)
    assert it.in_use.keys() == {"dense-1"}
    it.settle(died_s + LIMITS.patience_s)
    assert it.in_use.keys() == {"dense-0", "dense-1"}


def test_a_shard_that_dies_once_it_has_joined_is_not_counted_on() -> None:
    """In an operation of several rounds."""
    it = World(TWO, num_experts=8, room=4, replicas=2)
    it.ask("more", ScaleTo(4))
    operation = it.state.history["more"]
    while operation.round == 0:
        it._tell(it.queue.pop(0))
    assert operation.num_rounds > 1
    it.kill("shard-2")
    tasks = asked(it, Copy)
    while operation.outcome == "running":
        it._tell(it.queue.pop(0))
    assert all(isinstance(task, Copy) and task.uid != "shard-2" for task in tasks)
    it.settle()
    it.check_all_back()


def test_second_copies_are_made_while_a_shard_finds_no_place() -> None:
    """Another one that dies is taken over from as well."""
    it = World(FOUR, num_experts=8, room=2, num_copies=8)
    it.settle()
    it.placeless.update(("shard-2", "shard-3"))
    it.kill("shard-2")
    it.settle(1.0)
    tasks = asked(it, HoldCopies)
    it.settle(LIMITS.patience_s - 0.1)
    assert not tasks, "it may be back any moment"
    it.settle(LIMITS.patience_s)
    assert {task.uid for task in tasks} == {"shard-0", "shard-1", "shard-3"}  # type: ignore[attr-defined]
    it.kill("shard-3")
    it.settle(it.now_s + 1.0)
    assert it.state.view.placement.slots.keys() == {"shard-0", "shard-1"}
    it.place("shard-2", "shard-3")
    it.settle()
    it.check_all_back()
    assert it.state.view.placement.slots == FOUR
