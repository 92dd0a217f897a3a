"""How members that died come back: nobody waits for one that cannot, nor does what is asked for."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.coordinator_rig import LAYERS, Fault, World

from remora.cluster.coordinator_calls import Limits
from remora.cluster.operation import (
    Ask,
    Drain,
    Log,
    ScaleTo,
    StartDense,
    StartShard,
    Target,
    Task,
)
from remora.cluster.restore_tries import RESTORES_MAX
from remora.comm.errors import ClusterError, ConfigError, OperationRunsError

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
ALL = (EIGHT,) * len(LAYERS)
BOTH = {"shard-0": ALL, "shard-1": ALL}
TWO = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH)}
LIMITS = Limits()
FAULTS: tuple[Fault, ...] = (
    "kill before", "kill after", "fail", "hang", "flip", "disk", "crash before", "crash after",
)  # fmt: skip


def without_place(*uids: str, twice: bool = True) -> World:
    """These have died, and there is no room for them."""
    it = World(BOTH if twice else TWO, num_experts=8, room=8, replicas=2 if twice else 1)
    it.placeless.update(uids)
    for uid in uids:
        it.kill(uid)
    it.answer_all()
    return it


def outcomes(it: World) -> list[tuple[str, str]]:
    return [(each.operation_id, each.outcome) for each in it.settled]


def starts(it: World) -> list[tuple[float, Task]]:
    """What is asked to start from now on, and when."""
    found: list[tuple[float, Task]] = []
    one = it._one

    def seen(effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Ask) and isinstance(effect.task, StartShard | StartDense):
            found.append((it.now_s, effect.task))
        one(effect, here)

    it._one = seen  # type: ignore[method-assign]
    return found


def test_dense_groups_come_back_although_a_shard_that_died_before_finds_no_place() -> None:
    it = without_place("shard-1")
    it.now_s = 10.0
    asked = starts(it)
    it.kill("dense-0")
    it.kill("dense-1")
    it.settle(2 * LIMITS.patience_s)
    assert {task.uid: at for at, task in asked} | {"shard-1": 0} == {
        "dense-0": 10.0, "dense-1": 10.0, "shard-1": 0
    }, "at once, in the operation that waits for the shard"  # fmt: skip
    assert it.dense == {"dense-0": 2, "dense-1": 2} and it.in_use.keys() == it.dense.keys()
    first = it.settled[0]
    assert (first.outcome, first.ended_s) == ("done", LIMITS.patience_s)
    assert first.reason == "without shard-1: shard-1 did not answer in step prepare"
    running = it.state.operation
    assert running is not None and running.joiners == {"shard-1": 3}
    it.place("shard-1")
    it.settle()
    it.check_at_rest()
    assert set(it.shards) == {("shard-0", 1), ("shard-1", 3)}


def test_a_shard_that_nobody_replaces_comes_back_although_a_dense_group_finds_no_place() -> None:
    """Their node died, and there is room for one of them."""
    it = World(TWO, num_experts=8, room=4)
    it.placeless.add("dense-1")
    it.kill("dense-1")
    it.kill("shard-1")
    it.settle(LIMITS.patience_s)
    assert set(it.shards) == {("shard-0", 1), ("shard-1", 2)}
    assert it.state.lost == set() and it.state.lost_dense == {"dense-1"}
    it.place("dense-1")
    it.settle()
    it.check_at_rest()


def hopeless() -> World:
    """A shard whose experts others have is given up."""
    it = without_place("shard-1")
    it.settle()
    assert [op.outcome for op in it.settled] == ["failed"] * RESTORES_MAX
    assert it.alarms[-1].startswith("shard-1 could not be restored")
    it.settled.clear()
    return it


@pytest.mark.parametrize(
    "target", [ScaleTo(dense_groups=3), Drain(("dense-1",)), Drain(("shard-1",)), ScaleTo(3)]
)
def test_who_is_given_up_keeps_nobody_from_anything(target: Target) -> None:
    it = hopeless()
    it.kill("dense-0")
    it.settle()
    assert outcomes(it) == [("restore-dense-0.2", "done")]
    assert it.dense == {"dense-0": 2, "dense-1": 1}
    it.placeless.clear()
    assert it.run("one", target).outcome == "done"
    it.settle()
    if target == Drain(("dense-1",)):
        assert it.state.lost == {"shard-1"}, "nobody has said how many there are to be"
        assert it.run("two", ScaleTo(shards=2)).reason == "it is so already"
        it.settle()
    it.check_at_rest()


def test_who_is_given_up_and_held_experts_alone_keeps_no_dense_group_away() -> None:
    """Its steps wait for the shard, and that is all that they do."""
    it = without_place("shard-1", twice=False)
    it.settle()
    assert it.state.lost == {"shard-1"} and it.state.next_time() is None
    for uid in ("dense-0", "dense-1"):
        it.kill(uid)
    it.settle()
    assert it.dense == {"dense-0": 2, "dense-1": 2} and it.in_use.keys() == it.dense.keys()
    it.placeless.clear()
    it.run("again", ScaleTo(dense_groups=2))
    it.settle()
    it.check_at_rest()
    assert ("shard-1", 10) in it.shards


def test_a_shard_that_somebody_else_brought_back_is_restored_when_it_dies_anew() -> None:
    it = hopeless()
    it.placeless.clear()
    assert it.run("up", ScaleTo(3)).joiners.keys() == {"shard-1", "shard-2"}
    it.kill("shard-1")
    it.settle()
    it.check_at_rest()
    assert it.state.lost == set()


@pytest.mark.parametrize("how", ["fail", "flip", "dies"])
def test_a_start_that_fails_is_left_out_and_tried_again_later(how: str) -> None:
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    answer = it._answer
    tried_s: list[float] = []

    def fails(ask: Ask, here: Fault) -> None:
        if isinstance(ask.task, StartShard) and it.now_s < 10.0:
            tried_s.append(it.now_s)
            answer(ask, "flip" if how == "flip" else "fail" if how == "fail" else "none")
            if how == "dies":
                it.kill("shard-1")
        else:
            answer(ask, here)

    it._answer = fails  # type: ignore[method-assign]
    for uid in ("dense-0", "dense-1", "shard-1"):
        it.kill(uid)
    it.settle(0.5)
    assert it.in_use.keys() == it.dense.keys() == {"dense-0", "dense-1"}
    assert it.state.lost == {"shard-1"} and it.state.lost_dense == set()
    it.settle()
    assert tried_s == [0.0, 1.0, 3.0, 7.0]
    it.check_at_rest()


def test_one_that_takes_a_few_times_as_long_is_waited_for() -> None:
    """A shard has gigabytes to load when a dense group has started already."""
    for took_s, num_operations in ((3.9, 1), (4.1, 2)):
        it = without_place("dense-0", "shard-1")
        first_s = 30.0
        it.now_s = first_s
        it.place("dense-0")
        it.settle(took_s * first_s)
        it.place("shard-1")
        it.settle()
        assert len(it.settled) == num_operations
        it.check_at_rest()


def test_who_dies_while_others_start_joins_them_also_in_the_log() -> None:
    it = without_place("shard-1")
    it.placeless.add("dense-1")
    it.now_s = 100.0
    it.kill("dense-1")
    it.answer_all()
    running = it.state.operation
    assert running is not None and running.joiners == {"shard-1": 2, "dense-1": 2}
    assert it.state.next_time() == 100.0 + LIMITS.prepare_s, "each has its whole time"
    it.place("dense-1")  # its start is known to nobody yet
    it.restart()
    it.settle(200.0)
    assert it.settled[0].reason == "the coordinator was started again before the first commit"
    assert it.dense == {"dense-0": 1, "dense-1": 3}, "the life that had begun was ended"
    it.place("shard-1")
    it.settle()
    it.check_at_rest()


def test_taking_over_goes_before_those_that_start() -> None:
    it = World(TWO, num_experts=8, room=4, num_copies=4)
    it.settle()
    it.placeless.update(("dense-1", "shard-1"))
    it.kill("dense-1")
    it.answer_all()
    it.kill("shard-1")
    it.settle(1.0)
    assert outcomes(it) == [("restore-dense-1.2", "failed"), ("take-over-shard-1.1", "done")]
    assert it.settled[0].reason == "shard-1 died"
    running = it.state.operation
    assert running is not None and running.joiners == {"dense-1": 3, "shard-1": 2}
    it.place("dense-1", "shard-1")
    it.settle()
    assert it.state.view.placement.slots == TWO
    it.check_at_rest()


@pytest.mark.parametrize("target", [Drain(("shard-1",)), ScaleTo(1), ScaleTo(dense_groups=3)])
def test_what_is_asked_for_goes_before_a_restore_that_is_stuck(target: Target) -> None:
    it = without_place("shard-1")
    with pytest.raises(OperationRunsError, match=r"restore-shard-1.2' runs \(step prepare\)"):
        it.ask("mine", target)  # it may be there any moment
    it.settle(LIMITS.patience_s)
    for nothing in (ScaleTo(dense_groups=2), ScaleTo(3, gives_way=True)):
        with pytest.raises(OperationRunsError):
            it.ask("other", nothing)
    it.ask("mine", target)
    it.answer_all()
    mine, waited = it.state.history["mine"], it.settled[0]
    assert (mine.outcome, it.now_s) == ("done", LIMITS.patience_s)
    assert waited.reason == "it gives way to 'mine'"
    assert not waited.gave_way, "nobody has to ask for it again"
    is_away = target == ScaleTo(dense_groups=3)
    running = it.state.operation
    assert (running.joiners if running else {}) == ({"shard-1": 3} if is_away else {})
    it.place("shard-1")
    it.settle()
    it.check_at_rest()


def test_the_last_dense_group_does_not_wait_for_what_somebody_asked_for() -> None:
    it = World(BOTH, num_experts=8, room=8)
    it.placeless.add("shard-2")
    it.ask("up", ScaleTo(3))
    it.kill("dense-1")
    it.answer_all()
    assert it.state.history["up"].outcome == "running", "dense-0 serves"
    it.kill("dense-0")
    it.settle()
    assert it.state.history["up"].reason == "dense-0 died"
    assert outcomes(it)[1:] == [("restore-dense-0.2-dense-1.2", "done")]
    it.check_at_rest()


def test_a_drain_waits_for_no_other_shard_where_the_living_have_room() -> None:
    three = {f"shard-{i}": ALL for i in range(3)}
    it = World(three, num_experts=8, room=8, replicas=2)
    it.placeless.add("shard-1")
    it.kill("shard-1")
    it.settle(LIMITS.patience_s)
    operation = it.run("away", Drain(("shard-0",), "needed"))
    assert (operation.outcome, operation.joiners) == ("done", {})
    it.placeless.clear()
    assert it.run("so many", ScaleTo(2)).outcome == "done"
    it.settle()
    it.check_at_rest()
    assert it.state.view.placement.slots.keys() == {"shard-1", "shard-2"}
    few = {f"shard-{i}": (EIGHT[2 * i : 2 * i + 2],) * 2 for i in range(4)}
    it = World(few, num_experts=8, room=3)
    it.kill("shard-1")
    it.ask("away", Drain(("shard-0",)))  # before the death is told
    it.settle()
    it.check_at_rest()


def died(*uids: str) -> Callable[[Fault, int], World]:
    def made(fault: Fault, at: int) -> World:
        it = World(BOTH, num_experts=8, room=8, replicas=2, fault=fault, at=at)
        it.placeless.add("shard-1")
        for uid in uids:
            it.kill(uid)
        return it

    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_at_every_event_of_coming_back_without_one(fault: Fault) -> None:
    """Whatever happens, who has room comes back, and once there is room everybody does."""
    made = died("shard-1", "dense-0", "dense-1")
    undisturbed = made("none", 0)
    undisturbed.settle(3 * LIMITS.patience_s)
    for at in range(1, undisturbed.events + 1):
        it = made(fault, at)
        it.settle(it.limits.prepare_s + 2 * LIMITS.drain_s)
        assert it.in_use, f"event {at}: no dense group"
        it.wake()
        it.place("shard-1")
        it.settle()
        if it.state.lost | it.state.lost_dense:  # who hung was given up
            it.run("again", ScaleTo(2, dense_groups=2))
            it.settle()
        it.check_all_back()
        assert it.run("then", ScaleTo(4)).outcome == "done", f"event {at}"
        it.check_at_rest()


UIDS = st.sampled_from(("shard-0", "shard-1", "shard-2", "dense-0", "dense-1"))


@given(
    st.integers(0, 8),
    st.lists(
        st.one_of(
            st.tuples(st.just("kill"), UIDS),
            st.tuples(st.just("no place"), UIDS),
            st.tuples(st.just("place"), UIDS),
            st.tuples(st.just("wait"), st.sampled_from((1.0, 20.0, 950.0))),
            st.tuples(st.just("restart"), st.none()),
            st.tuples(
                st.just("ask"),
                st.sampled_from(
                    (ScaleTo(dense_groups=3), ScaleTo(2), Drain(("shard-0",)), Drain(("dense-0",)))
                ),
            ),
        ),
        max_size=12,
    ),
)
def test_any_sequence_of_deaths_and_room(copies: int, steps: list[tuple[str, object]]) -> None:
    three = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH), "shard-2": (LOW, HIGH)}
    it = World(three, num_experts=8, room=8, replicas=2, num_copies=copies)
    for number, (what, which) in enumerate(steps):
        match what, which:
            case "kill", str():
                it.kill(which)
            case "no place", str():
                it.placeless.add(which)
            case "place", str():
                it.place(which)
            case "restart", None:
                it.restart()
            case "wait", float():
                it.settle(it.now_s + which)
            case _:
                ask_if_possible(it, f"operation-{number}", which)
        it.settle(it.now_s)
    it.place(*it.placeless)
    it.settle(it.now_s + LIMITS.prepare_s)
    ask_if_possible(it, "last", ScaleTo(dense_groups=2))
    it.settle()
    it.check_all_back()


def ask_if_possible(it: World, operation_id: str, target: Any) -> None:
    with contextlib.suppress(ClusterError, ConfigError):
        it.ask(operation_id, target)
