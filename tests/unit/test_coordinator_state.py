"""The coordinator's machine: operations as they should go, and every fault at every event."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.coordinator_rig import LAYERS, Fault, World

from remora.cluster.coordinator_calls import Limits
from remora.cluster.operation import (
    Ask,
    Drain,
    Log,
    LogFailed,
    MemberLost,
    PlaceAs,
    ScaleTo,
    StartShard,
    Stop,
    Target,
    Tick,
)
from remora.cluster.restore_tries import RESTORES_MAX
from remora.comm.errors import ClusterError, ConfigError

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
TWO = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH)}
SWAPPED = {"shard-0": (HIGH, LOW), "shard-1": (LOW, HIGH)}
MIXED = {"shard-0": ((0, 2, 4, 6), LOW), "shard-1": ((1, 3, 5, 7), HIGH)}
FAULTS: tuple[Fault, ...] = (
    "kill before", "kill after", "fail", "hang", "flip", "odd canary", "disk", "crash before",
    "crash after",
)  # fmt: skip
SCENARIOS: dict[str, tuple[int, int, Target]] = {  # room, replicas, target
    "two to three": (4, 1, ScaleTo(3)),
    "two to four with replicas": (4, 2, ScaleTo(4)),
    "two to one": (8, 1, ScaleTo(1)),
    "retire the first": (4, 1, ScaleTo(2, retire=("shard-0",))),
    "drain": (8, 1, Drain(("shard-0",))),
    "move with a spare slot": (5, 1, PlaceAs(MIXED)),
    "swap with two spare slots": (6, 1, PlaceAs(SWAPPED)),
    "a dense group more": (4, 1, ScaleTo(dense_groups=3)),
    "a named dense group less": (4, 1, ScaleTo(dense_groups=1, retire=("dense-0",))),
    "a shard more, another dense group": (4, 1, ScaleTo(3, ("dense-1",), dense_groups=2)),
    "a dense group drained": (4, 1, Drain(("dense-0",))),
    "a host evacuated": (4, 1, Drain(("dense-0", "shard-0"), "needed", within_s=90.0)),
}
HARMLESS: set[tuple[str, Fault]] = {  # no expert moves; a rank that dies keeps nobody from going on
    ("a dense group more", "flip"), ("a dense group more", "odd canary"),
    ("a named dense group less", "flip"), ("a named dense group less", "odd canary"),
    ("a named dense group less", "kill before"), ("a named dense group less", "kill after"),
    ("a dense group drained", "flip"), ("a dense group drained", "odd canary"),
    ("a dense group drained", "kill before"), ("a dense group drained", "kill after"),
}  # fmt: skip


def world(scenario: str, fault: Fault = "none", at: int = 0) -> tuple[World, Target]:
    room, replicas, target = SCENARIOS[scenario]
    return World(TWO, num_experts=8, room=room, replicas=replicas, fault=fault, at=at), target


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_undisturbed(scenario: str) -> None:
    it, target = world(scenario)
    operation = it.run("one", target)
    assert (operation.outcome, operation.reason) == ("done", "")
    assert operation.round == operation.num_rounds >= 1
    assert operation.serving_s is not None and operation.ended_s is not None
    it.check_at_rest()
    assert it.state.view.epoch == 1 + operation.round
    if isinstance(target, ScaleTo):
        assert len(it.state.view.placement.slots) == (target.shards or 2)
        assert len(it.in_use) == (target.dense_groups or 2)
        assert not set(target.retire) & set(it.in_use)
        assert it.quiet == [uid for uid in target.retire if uid.startswith("dense")]
    elif isinstance(target, PlaceAs):
        held = {u: [set(e) for e in s] for u, s in it.state.view.placement.slots.items()}
        assert held == {u: [set(e) for e in s] for u, s in target.slots.items()}
    assert not it.alarms


def test_several_rounds_are_taken_where_slots_are_few() -> None:
    it, target = world("move with a spare slot")
    assert it.run("one", target).num_rounds == 2
    it, target = world("swap with two spare slots")
    assert it.run("one", target).num_rounds == 2


def test_full_shards_that_wait_for_each_other_are_refused_before_anything_starts() -> None:
    it = World(TWO, num_experts=8, room=4)
    with pytest.raises(ConfigError, match="spare slot"):
        it.run("one", PlaceAs(MIXED))
    assert it.state.operation is None and it.events == 0
    assert it.run("two", ScaleTo(3)).outcome == "done"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_fault_at_every_event(scenario: str, fault: Fault) -> None:
    """It ends; what a rank may ask for is always there; and the next operation succeeds."""
    undisturbed, target = world(scenario)
    undisturbed.run("one", target)
    struck = 0
    for at in range(1, undisturbed.events + 1):
        it, target = world(scenario, fault, at)
        first = it.run("one", target)
        it.wake()
        assert it.events >= at
        assert first.outcome in ("done", "failed"), first
        struck += first.outcome == "failed"
        if first.outcome == "failed":
            assert first.reason
        it.check_at_rest()
        then = it.run("two", ScaleTo(5))
        assert then.outcome == "done", f"event {at}, {fault}: {then.reason}; first: {first.reason}"
        it.check_at_rest()
        assert len(it.state.view.placement.slots) == 5
    assert (struck > 0) == ((scenario, fault) not in HARMLESS), "whether it ever mattered"


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(FAULTS), st.integers(1, 40)), max_size=6)
)
def test_any_sequence_of_sizes_and_faults(steps: list[tuple[int, Fault, int]]) -> None:
    it = World(TWO, num_experts=8, room=8, replicas=2)
    for number, (shards, fault, at) in enumerate(steps):
        it.fault, it.at = fault, it.events + at
        operation = it.run(f"operation-{number}", ScaleTo(shards))
        it.wake()
        it.check_at_rest()
        assert operation.outcome == "failed" or len(it.state.view.placement.slots) == shards
    it.fault = "none"
    assert it.run("last", ScaleTo(3)).outcome == "done"
    it.check_at_rest()


def test_an_operation_has_one_id_and_one_target() -> None:
    it = World(TWO, num_experts=8, room=8)
    first = it.run("one", ScaleTo(3))
    events = it.events
    assert it.run("one", ScaleTo(3)) is first and it.events == events
    with pytest.raises(ConfigError, match="choose a new id"):
        it.state.request("one", ScaleTo(4), 0.0)
    again = it.run("two", ScaleTo(3))
    assert (again.outcome, again.reason) == ("done", "it is so already")
    assert it.state.view.epoch == 2


def test_one_at_a_time() -> None:
    it = World(TWO, num_experts=8, room=8)
    it.state.request("one", ScaleTo(3), 0.0)
    with pytest.raises(ClusterError, match="'one' runs"):
        it.state.request("two", ScaleTo(4), 0.0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ScaleTo(0), "0 shards"),
        (ScaleTo(1), "4 slots in MoE layer"),
        (ScaleTo(1, retire=("shard-9",)), "no such shards: shard-9"),
        (Drain(("shard-9",)), "members: shard-9; there are dense-0, dense-1, shard-0, shard-1$"),
        (Drain(("shard-1", "shard-0")), r"no shard would be left .* \(scale to 3 shards\)"),
        (Drain(("dense-0", "dense-1")), "no dense group would be left without dense-0, dense-1"),
        (ScaleTo(), "scale what"),
        (ScaleTo(dense_groups=0), "0 dense groups: allowed is 1"),
        (ScaleTo(dense_groups=1, retire=("dense-7",)), "no such dense groups: dense-7"),
        (ScaleTo(2, retire=("dense-0",)), "dense-0: say how many dense groups"),
        (ScaleTo(dense_groups=2, retire=("shard-0",)), "shard-0: say how many shards"),
        (PlaceAs({"shard-0": (EIGHT, EIGHT)}), "the deployment has shard-0, shard-1"),
        (PlaceAs({"shard-0": (LOW, LOW), "shard-1": (LOW, HIGH)}), "have no replica"),
        (PlaceAs({"shard-0": (EIGHT, LOW), "shard-1": (HIGH, HIGH)}), "8 experts in 4 slots"),
    ],
)
def test_what_cannot_be_is_refused(target: Target, message: str) -> None:
    it = World(TWO, num_experts=8, room=4)
    with pytest.raises(ConfigError, match=message):
        it.state.request("one", target, 0.0)
    assert it.state.operation is None


def test_retirees_are_named_or_the_last_ones() -> None:
    it = World(TWO, num_experts=8, room=8)
    it.run("more", ScaleTo(4))
    assert it.run("named", ScaleTo(3, retire=("shard-1",))).safe_to_delete == ("shard-1",)
    assert it.run("last", ScaleTo(2)).safe_to_delete == ("shard-3",)
    assert sorted(it.state.view.placement.slots) == ["shard-0", "shard-2"]
    grown = it.run("again", ScaleTo(3))
    assert grown.joiners == {"shard-1": 2}, "a uid that is used again has a new life"
    assert it.run("gone", Drain(("shard-3",))).reason == "it is so already"


def test_who_is_named_twice_is_drained_once() -> None:
    it = World(TWO, num_experts=8, room=8)
    drained = it.run("twice", Drain(("shard-0", "dense-1", "shard-0", "dense-1")))
    assert (drained.outcome, drained.safe_to_delete) == ("done", ("shard-0", "dense-1"))
    it.check_at_rest()


def test_replicas_on_other_hosts_where_slots_allow() -> None:
    it = World(TWO, num_experts=8, room=8, replicas=2)
    it.run("more", ScaleTo(3))
    slots = it.state.view.placement.slots
    for index in range(len(LAYERS)):
        counts = [sum(e in slots[uid][index] for uid in slots) for e in EIGHT]
        assert counts == [2] * 8, counts


def test_a_shard_that_dies_is_restored_in_a_new_life() -> None:
    it = World(TWO, num_experts=8, room=8)
    it.kill("shard-1")
    it.settle()
    assert set(it.shards) == {("shard-0", 1), ("shard-1", 2)}
    it.check_at_rest()
    assert [op.operation_id for op in it.settled] == ["restore-shard-1.2"]


def test_a_dense_group_that_dies_is_restored_in_a_new_life() -> None:
    it = World(TWO, num_experts=8, room=8)
    it.kill("dense-1")
    it.settle()
    assert it.dense == {"dense-0": 1, "dense-1": 2}
    it.check_at_rest()
    assert [op.operation_id for op in it.settled] == ["restore-dense-1.2"]
    assert it.settled[0].moved == 0


def test_a_death_that_is_told_twice_is_one() -> None:
    """Also while the new life starts, which has the same uid."""
    it = World(TWO, num_experts=8, room=8)
    one, told = it._one, []

    def tells_again(effect: Log | Ask, here: Fault) -> None:
        one(effect, here)
        if isinstance(effect, Ask) and isinstance(effect.task, StartShard) and not told:
            told.append(MemberLost("shard-1", 1))
            it.queue.insert(0, told[0])

    it._one = tells_again  # type: ignore[method-assign]
    it.kill("shard-1")
    it.settle()
    assert told and [(op.operation_id, op.outcome) for op in it.settled] == [
        ("restore-shard-1.2", "done")
    ]
    it.check_at_rest()


def test_members_that_die_together_are_restored_together() -> None:
    """A dense group can adopt no view whose experts are nowhere: shards come first."""
    it = World(TWO, num_experts=8, room=8)
    for uid in ("dense-0", "dense-1", "shard-0"):
        it.kill(uid)
    it.settle()
    it.check_at_rest()
    assert it.dense.keys() == {"dense-0", "dense-1"}
    assert set(it.shards) == {("shard-0", 2), ("shard-1", 1)}


def test_a_retiring_group_that_hangs_is_ended_and_its_name_is_free_again() -> None:
    it = World(TWO, num_experts=8, room=8)
    one = it._one

    def hangs_when_it_is_to_leave(effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Ask) and isinstance(effect.task, Stop):
            it.hung.discard(effect.task.uid)  # a killed process hangs no more
            it.late.clear()
        elif isinstance(effect, Ask) and it.state.view.epoch == 2:
            it.hung.update({effect.task.uid} & {"dense-1"})
        one(effect, here)

    it._one = hangs_when_it_is_to_leave  # type: ignore[method-assign]
    operation = it.run("less", ScaleTo(dense_groups=1))
    assert (operation.outcome, operation.safe_to_delete) == ("done", ("dense-1",))
    assert it.state.fenced == set() and set(it.refused.values()) == {()}
    assert it.run("more", ScaleTo(dense_groups=2)).joiners == {"dense-1": 2}
    it.check_at_rest()


def test_a_shard_that_cannot_be_restored_is_given_up_and_can_be_drained_or_scaled_away() -> None:
    it = World(TWO, num_experts=8, room=8)
    start = it._do
    it._do = lambda task, here: (  # type: ignore[method-assign]
        None if type(task).__name__ == "StartShard" else start(task, here)
    )
    it.kill("shard-1")
    it.settle()
    assert [op.outcome for op in it.settled] == ["failed"] * RESTORES_MAX
    assert "shard-1 could not be restored" in it.alarms[-1]
    it._do = start  # type: ignore[method-assign]
    assert it.run("away", Drain(("shard-1",))).outcome == "done"
    it.check_at_rest()
    assert it.state.view.placement.slots.keys() == {"shard-0"}


def test_a_rank_that_was_fenced_by_a_coordinator_that_died_is_let_in_again() -> None:
    """Whom it had fenced last is not in its log."""
    it = World(TWO, num_experts=8, room=8)
    answer, one = it._on_view, it._one
    it._on_view = lambda task: (  # type: ignore[method-assign]
        it.hung.add("dense-1") if task.uid == "dense-1" and task.view.epoch == 2 else None,
        answer(task),
    )[1]

    def dies(effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Log) and effect.record["t"] == "ended" and it.state.fenced:
            it._one = one  # type: ignore[method-assign]
            it.restart()
        else:
            one(effect, here)

    it._one = dies  # type: ignore[method-assign]
    it._carry_out(it.state.request("one", ScaleTo(3), it.now_s))
    while it._one is dies:
        it._tell(it.queue.pop(0) if it.queue else Tick())
        it.now_s = max(it.now_s, it.state.next_time() or 0.0) if not it.queue else it.now_s
    assert it.refused["shard-0"] == ("dense-1",) and it.state.fenced == set()
    it._on_view = answer  # type: ignore[method-assign]
    it.wake()
    assert set(it.refused.values()) == {()}
    it.check_at_rest()


def test_a_restore_that_fails_is_tried_again_later_each_time_until_the_disk_has_room() -> None:
    it = World(TWO, num_experts=8, room=8)
    one = it._one
    tried_s: list[float] = []

    def full_disk(effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Log) and it.now_s < 30.0:
            tried_s.append(it.now_s)
            it._tell(LogFailed("no space left on device"))
        else:
            one(effect, here)

    it._one = full_disk  # type: ignore[method-assign]
    it.kill("shard-1")
    it.settle()
    assert [b - a for a, b in pairwise(tried_s)] == [1.0, 2.0, 4.0, 8.0]
    assert [op.outcome for op in it.settled] == ["failed"] * 5 + ["done"]
    assert "7" in it.settled[-1].operation_id, "each try has an id of its own"
    it.check_at_rest()


def test_a_rank_that_hangs_is_fenced_before_its_slots_are_freed_and_let_in_when_it_wakes() -> None:
    it = World(TWO, num_experts=8, room=8)
    answer = it._on_view
    it._on_view = lambda task: (  # type: ignore[method-assign]
        it.hung.add("dense-1") if task.uid == "dense-1" else None,
        answer(task),
    )[1]
    operation = it.run("one", ScaleTo(3))
    assert operation.outcome == "done" and "dense-1 fenced" in operation.reason
    assert it.state.fenced == {"dense-1"}
    assert it.in_use["dense-1"].epoch == 1 and it.refused["shard-0"] == ("dense-1",)
    other = it.run("two", ScaleTo(2))
    assert other.outcome == "done", "a fenced rank keeps nobody from the next operation"
    it.wake()
    assert it.state.fenced == set() and it.refused["shard-0"] == ()
    it.check_at_rest()
    assert it.now_s >= Limits().drain_s
