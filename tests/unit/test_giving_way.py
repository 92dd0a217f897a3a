"""Operations that wait for room: what they give way to, and how they are given up."""

from typing import Any

import pytest
from support.coordinator_rig import LAYERS, Fault, World

from remora.cluster.operation import Drain, PlaceAs, ScaleTo, Target
from remora.comm.errors import ConfigError, OperationRunsError

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
TWO = {"shard-0": (LOW,) * len(LAYERS), "shard-1": (HIGH,) * len(LAYERS)}
SWAPPED = {"shard-0": (HIGH,) * len(LAYERS), "shard-1": (LOW,) * len(LAYERS)}


def id_of(record: dict[str, Any]) -> str | None:
    operation: dict[str, Any] = record.get("operation", {})
    return operation.get("operation_id")


def logs_at_restarts(it: World) -> list[list[dict[str, Any]]]:
    """What is in the log whenever the coordinator dies from now on."""
    seen: list[list[dict[str, Any]]] = []
    restart = it.restart

    def noted() -> None:
        seen.append(list(it.log))
        restart()

    it.restart = noted  # type: ignore[method-assign]
    return seen


def waiting_for_room() -> World:
    """A replacement that nobody asked for finds no place."""
    it = World(TWO, num_experts=8, room=8)
    it.placeless.add("shard-2")
    it.ask("replace-x:1", ScaleTo(3, gives_way=True))
    it.answer_all()
    running = it.state.operation
    assert running is not None and running.step == "prepare"
    return it


@pytest.mark.parametrize(
    "target",
    [ScaleTo(1), ScaleTo(dense_groups=3), Drain(("dense-1",)), PlaceAs(SWAPPED)],
)
def test_what_waits_for_room_gives_way_to_what_is_asked_for(target: Target) -> None:
    it = waiting_for_room()
    it.ask("mine", target)
    mine, waited = it.state.history["mine"], it.state.history["replace-x:1"]
    assert mine.outcome == "running", "it is known at once"
    assert waited.step == "undo", "who was to join is ended first"
    with pytest.raises(OperationRunsError, match="'replace-x:1' runs"):
        it.state.request("third", ScaleTo(4), it.now_s)
    it.settle()
    assert (mine.outcome, mine.reason) == ("done", "")
    assert (waited.outcome, waited.gave_way) == ("failed", True)
    assert waited.reason == "it gives way to 'mine'"
    assert [each.operation_id for each in it.settled] == ["replace-x:1", "mine"]
    it.check_at_rest()


def test_what_nobody_asked_for_gives_way_to_nothing_of_that_kind() -> None:
    """An autoscaler decides, and a replacement begins before it has asked."""
    it = waiting_for_room()
    with pytest.raises(OperationRunsError, match="'replace-x:1' runs"):
        it.state.request("autoscale-scale-1", ScaleTo(4, gives_way=True), it.now_s)


def test_a_request_that_cannot_be_leaves_what_waits_alone() -> None:
    it = waiting_for_room()
    with pytest.raises(ConfigError, match="no such members: shard-9"):
        it.state.request("mine", Drain(("shard-9",)), it.now_s)
    running = it.state.operation
    assert running is not None and (running.step, running.gave_way) == ("prepare", False)


def test_what_an_operator_asked_for_gives_way_to_nobody() -> None:
    it = World(TWO, num_experts=8, room=8)
    it.placeless.add("shard-2")
    it.ask("up", ScaleTo(3))
    it.answer_all()
    with pytest.raises(OperationRunsError, match=r"'up' runs \(step prepare\)"):
        it.state.request("mine", ScaleTo(1), it.now_s)


def test_what_finds_no_place_gives_way_to_members_that_must_leave_a_node() -> None:
    """They would die with it, while an operation waits for a place as long as a start may take."""
    leave = Drain(("shard-0",), "needed", 100.0)
    it = World(TWO, num_experts=8, room=8)
    it.placeless.add("shard-2")
    it.ask("up", ScaleTo(3))
    it.answer_all()
    with pytest.raises(OperationRunsError, match="'up' runs"):
        it.state.request("evacuate-shard-0.1:1", leave, it.now_s)
    it.now_s += it.limits.patience_s
    with pytest.raises(OperationRunsError, match="'up' runs"):
        it.state.request("by hand", Drain(("shard-0",)), it.now_s)
    it.ask("evacuate-shard-0.1:1", leave)
    it.settle()
    up, left = it.state.history["up"], it.state.history["evacuate-shard-0.1:1"]
    assert (up.outcome, up.reason) == ("failed", "it gives way to 'evacuate-shard-0.1:1'")
    assert (left.outcome, left.safe_to_delete) == ("done", ("shard-0",))
    it.check_at_rest()


def test_a_dead_member_is_restored_before_what_waits_for_room() -> None:
    it = waiting_for_room()
    it.kill("dense-1")
    it.settle()
    waited = it.state.history["replace-x:1"]
    assert (waited.gave_way, waited.reason) == (True, "dense-1 died")
    assert it.state.history["restore-dense-1.2"].outcome == "done"
    it.check_at_rest()


@pytest.mark.parametrize("dead", [("shard-0",), ("dense-0", "dense-1")])
def test_who_dies_while_something_gives_way_is_not_kept_waiting_by_what_begins_then(
    dead: tuple[str, ...],
) -> None:
    """It had been planned before they died: it waited for room, and they for it."""
    it = waiting_for_room()
    it.placeless.add("shard-3")
    it.ask("mine", ScaleTo(3))
    undo, it.queue = it.queue, []
    for uid in dead:
        it.kill(uid)
    it.queue += undo
    it.settle(it.limits.retry_s)
    mine = it.state.history["mine"]
    assert mine.outcome == "failed" and f"requests wait for {', '.join(dead)}" in mine.reason
    restored = "restore-" + "-".join(f"{uid}.2" for uid in dead)
    assert it.state.history[restored].outcome == "done"
    it.check_at_rest()


def test_a_replacement_that_a_coordinator_left_behind_may_be_asked_for_again() -> None:
    it = waiting_for_room()
    it.restart()
    it.settle()
    waited = it.state.history["replace-x:1"]
    assert (waited.outcome, waited.gave_way) == ("failed", True)
    it.check_at_rest()


@pytest.mark.parametrize("fault", ["crash before", "crash after"])
@pytest.mark.parametrize("target", [ScaleTo(dense_groups=3), PlaceAs(SWAPPED)])
def test_what_was_accepted_is_known_to_the_next_coordinator_and_done(
    target: Target, fault: Fault
) -> None:
    """It was in the log only once it had begun: who waited for it heard that nobody knows it."""
    undisturbed = waiting_for_room()
    first = undisturbed.events + 1
    undisturbed.run("mine", target)
    waited = set()
    for at in range(first, undisturbed.events + 1):
        it = waiting_for_room()
        it.fault, it.at = fault, at
        seen = logs_at_restarts(it)
        it.ask("mine", target)
        it.settle()
        [log] = seen
        mine = it.state.history.get("mine")
        kinds = [record["t"] for record in log if id_of(record) == "mine"]
        assert (mine is not None) == bool(kinds), f"event {at}"
        if kinds == ["accepted"]:
            assert mine is not None and (mine.outcome, mine.reason) == ("done", "")
            waited.add(log[-1]["t"])
        it.check_at_rest()
    assert waited == {"accepted", "ended"}, "also where the other is over"


def test_what_cannot_be_logged_is_not_accepted_and_nothing_gives_way_to_it() -> None:
    it = waiting_for_room()
    it.fault, it.at = "disk", it.events + 1
    it.ask("mine", ScaleTo(dense_groups=3))
    mine = it.state.history["mine"]
    assert (mine.outcome, mine.ended_s) == ("failed", 0.0)
    assert mine.reason == "the log cannot be written: no space left on device"
    running = it.state.operation
    assert running is not None and (running.step, running.gave_way) == ("prepare", False)
    it.place("shard-2")
    it.settle()
    assert running.outcome == "done"
    it.check_at_rest()


def test_what_is_given_up_is_undone() -> None:
    it = World(TWO, num_experts=8, room=4)
    it.placeless.add("shard-2")
    it.ask("evacuate-shard-0.1:1", Drain(("shard-0",), "needed", 540.0))
    it.answer_all()
    it.give_up("another", "why")
    it.answer_all()
    operation = it.state.history["evacuate-shard-0.1:1"]
    assert operation.outcome == "running"
    it.give_up("evacuate-shard-0.1:1", "no place for shard-2")
    it.answer_all()
    assert (operation.outcome, operation.reason) == ("failed", "no place for shard-2")
    assert operation.ended_s == 0.0
    it.check_at_rest()
