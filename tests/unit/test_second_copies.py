"""Second copies: who holds them, and that living shards take over with them from dead ones."""

import pytest
from support.coordinator_rig import LAYERS, Fault, World

from remora.cluster.operation import (
    Canary,
    Drain,
    HoldCopies,
    Pair,
    PlaceAs,
    ScaleTo,
    StartShard,
)
from remora.cluster.operation_plan import FreeMemory
from remora.cluster.placement_steps import pairs_of
from remora.cluster.restore_tries import RESTORES_MAX
from remora.cluster.second_copies import plan_copies, taken_over

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
TWO = {"shard-0": (LOW, LOW), "shard-1": (HIGH, HIGH)}
FOUR = {f"shard-{i}": ((2 * i, 2 * i + 1),) * 2 for i in range(4)}
FAULTS: tuple[Fault, ...] = (
    "kill before", "kill after", "fail", "hang", "flip", "odd canary", "disk", "crash before",
    "crash after",
)  # fmt: skip


def planned(
    slots: dict[str, tuple[tuple[int, ...], ...]], *hosts: str, **more: object
) -> dict[str, tuple[Pair, ...]]:
    options = {"num_copies": 8, "now": {}, "heat": {}} | more
    return plan_copies(slots, (1,), dict(zip(sorted(slots), hosts, strict=True)), **options)  # type: ignore[arg-type]


def test_experts_with_one_replica_first_and_the_hottest_of_them() -> None:
    slots = {"a": ((0, 1),), "b": ((0, 2),), "c": ((3,),)}
    assert planned(slots, "x", "x", "y") == {
        "a": ((1, 3),), "b": (), "c": ((1, 1), (1, 2), (1, 0))
    }, "0 is on one host twice, 3 was to go to another host"  # fmt: skip
    heat = {(1, 0): 9.0, (1, 2): 5.0}
    assert planned(slots, "x", "x", "y", num_copies=1, heat=heat) == {
        "a": ((1, 3),), "b": ((1, 1),), "c": ((1, 2),)
    }, "1 finds room on its own host alone"  # fmt: skip
    apart = planned(slots, "x", "z", "y")
    assert sorted(pair for each in apart.values() for pair in each) == [(1, 1), (1, 2), (1, 3)]
    assert planned({"a": ((0,),)}, "x") == {"a": ()}, "nobody else is there"


def test_what_is_there_stays_where_it_is() -> None:
    slots = {"a": ((0, 1, 2),), "b": ((),), "c": ((),)}
    now = {"c": frozenset({(1, 0), (1, 1), (1, 2)})}
    assert planned(slots, "x", "y", "z", now=now) == {
        "a": (), "b": (), "c": ((1, 0), (1, 1), (1, 2))
    }  # fmt: skip
    fresh = planned(slots, "x", "y", "z")
    assert fresh == {"a": (), "b": ((1, 0), (1, 2)), "c": ((1, 1),)}


def test_taking_over_takes_a_second_copy_of_everything() -> None:
    every: frozenset[Pair] = frozenset((1, e) for e in EIGHT)
    slots = {"a": ((0, 1),), "b": ((1, 2),), "c": ((3,),)}
    lost = frozenset({"a"})
    assert taken_over(slots, lost, {"c": every}, (1,)) == {"b": ((1, 2),), "c": ((3, 0),)}
    assert taken_over(slots, lost, {"c": every - {(1, 0)}}, (1,)) == {}
    assert taken_over(slots, lost, {"a": every}, (1,)) == {}, "they died with it"
    assert taken_over(slots, frozenset(slots), {"c": every}, (1,)) == {}
    twice = {"a": ((0, 1),), "b": ((0, 1),), "c": ((3,),)}
    assert taken_over(twice, lost, {"c": every}, (1,)) == {}, "nothing has to be taken over"


def two(fault: Fault = "none", at: int = 0) -> World:
    it = World(TWO, num_experts=8, room=4, num_copies=4)
    it.settle()
    it.fault, it.at = fault, at
    return it


def test_a_shard_without_replicas_dies_and_others_take_over_until_it_is_back() -> None:
    it = two()
    assert it.copies == {("shard-0", 1): set(pairs_of((HIGH, HIGH), LAYERS)),
                         ("shard-1", 1): set(pairs_of((LOW, LOW), LAYERS))}  # fmt: skip
    it.kill("shard-0")
    it.settle()
    assert [(op.operation_id, op.outcome) for op in it.settled] == [
        ("take-over-shard-0.1", "done"), ("restore-shard-0.2", "done")
    ]  # fmt: skip
    alone = it.published[1]
    assert alone.epoch == 2 and alone.placement.slots == {"shard-1": (HIGH + LOW,) * 2}
    assert it.state.view.epoch == 3 and it.state.view.placement.slots == TWO
    assert it.state.former == {}
    it.check_at_rest()
    assert it.copies["shard-0", 2] == set(pairs_of((HIGH, HIGH), LAYERS))
    assert it.copies["shard-1", 1] == set(pairs_of((LOW, LOW), LAYERS))
    assert it.state.copies.keys() == set(TWO)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_at_every_event_of_taking_over(fault: Fault) -> None:
    undisturbed = two()
    begun = undisturbed.events
    undisturbed.kill("shard-0")
    undisturbed.settle()
    for at in range(begun + 1, undisturbed.events + 1):
        it = two(fault, at)
        it.kill("shard-0")
        it.settle()
        it.wake()
        if fault != "hang":  # who hangs does so in every life: it is given up
            it.check_at_rest()
            assert it.state.view.placement.slots == TWO and it.state.former == {}, f"event {at}"
        then = it.run("two", ScaleTo(5))
        assert then.outcome == "done", f"event {at}, {fault}: {then.reason}"
        it.check_at_rest()


def test_two_that_die_one_after_the_other_come_back_together() -> None:
    it = World(FOUR, num_experts=8, room=2, num_copies=8)
    it.settle()
    start = it._do
    it._do = lambda task, here: (  # type: ignore[method-assign]
        None if isinstance(task, StartShard) else start(task, here)
    )
    it.kill("shard-0")
    while it.state.view.epoch == 1:
        it._tell(it.queue.pop(0))
    it.kill("shard-1")
    it._do = start  # type: ignore[method-assign]
    it.settle()
    assert it.state.view.placement.slots == FOUR and it.state.former == {}
    it.check_at_rest()


def test_one_that_cannot_be_restored_stays_away_until_somebody_decides() -> None:
    it = two()
    start = it._do
    it._do = lambda task, here: (  # type: ignore[method-assign]
        None if isinstance(task, StartShard) else start(task, here)
    )
    it.kill("shard-0")
    it.settle()
    assert [op.outcome for op in it.settled] == ["done", *["failed"] * RESTORES_MAX]
    assert it.state.view.placement.slots.keys() == {"shard-1"}
    it.restart()
    it.settle()
    assert it.state.former == TWO, "a new coordinator knows, and tries again"
    it._do = start  # type: ignore[method-assign]
    assert it.run("more", ScaleTo(2)).outcome == "done"
    assert it.state.former == {}
    it.check_at_rest()
    slots = it.state.view.placement.slots
    assert all(len(experts) <= 4 for layers in slots.values() for experts in layers)


def test_second_copies_give_way_to_shards_that_join() -> None:
    it = two()
    memory = FreeMemory(slot_bytes=100 << 20, by_host={"x": 1 << 20}, copies={"x": 900 << 20})
    asked: list[HoldCopies] = []
    do = it._do

    def seen(task: object, here: Fault) -> object:
        if isinstance(task, HoldCopies):
            asked.append(task)
        return do(task, here)  # type: ignore[arg-type]

    it._do = seen  # type: ignore[method-assign,assignment]
    it.state.memory = memory
    assert it.run("more", ScaleTo(3)).outcome == "done"
    first = [(task.uid, task.pairs) for task in asked[:2]]
    assert first == [("shard-0", ()), ("shard-1", ())]
    assert len(asked) == 5 and all(task.pairs for task in asked[2:]), "made anew afterwards"


def test_a_coordinator_of_an_earlier_term_is_known_by_its_number() -> None:
    it = two()
    assert it.state.term == 1
    for term in (2, 3):
        it.restart()
        assert it.state.term == term
    it.settle()
    assert it.run("one", PlaceAs(TWO)).outcome == "done"


def noted(it: World, field: str) -> dict[str, bool]:
    """A field of each task that has it from now on, by the names of task and member."""
    asked: dict[str, bool] = {}
    do = it._do

    def seen(task: object, here: Fault) -> object:
        if hasattr(task, field):
            asked[f"{type(task).__name__} {task.uid}"] = getattr(task, field)  # type: ignore[attr-defined]
        return do(task, here)  # type: ignore[arg-type]

    it._do = seen  # type: ignore[method-assign,assignment]
    return asked


def test_what_has_time_yields_to_streams() -> None:
    it = two()
    asked = noted(it, "yields")
    it.run("more", ScaleTo(3))
    it.run("back", PlaceAs(TWO | {"shard-2": ((), ())}))
    assert {"StartShard shard-2", "Copy shard-0"} <= asked.keys() and all(asked.values())
    asked.clear()
    it.run("away", Drain(("shard-0",), "needed", within_s=60.0))
    assert asked and not any(asked.values()), "the node goes away"
    it = two()
    asked = noted(it, "yields")
    it.kill("shard-0")
    it.settle()
    waited_for = {name: yields for name, yields in asked.items() if name.startswith("Copy")}
    assert not all(waited_for.values()), "requests wait for what is taken over"


def test_canaries_are_computed_by_whoever_is_asked_least() -> None:
    slots = {f"shard-{i}": (LOW, LOW) for i in range(3)} | {"shard-3": (HIGH, HIGH)}
    it = World(slots, num_experts=8, room=8)
    it.settle()
    asked: dict[str, int] = {}
    do = it._do

    def seen(task: object, here: Fault) -> object:
        if isinstance(task, Canary):
            asked[task.uid] = len(task.pairs)
        return do(task, here)  # type: ignore[arg-type]

    it._do = seen  # type: ignore[method-assign,assignment]
    assert it.run("one", PlaceAs(slots | {"shard-3": (EIGHT, EIGHT)})).outcome == "done"
    assert asked == {"shard-3": 8, "shard-0": 3, "shard-1": 3, "shard-2": 2}


def test_what_requests_wait_for_is_not_loaded_at_idle_priority() -> None:
    it = two()
    asked = noted(it, "is_urgent")
    it.run("more", ScaleTo(3, dense_groups=3))
    assert asked and not any(asked.values()), "others serve"
    asked.clear()
    it.kill("shard-0")
    it.settle()
    took_over = {name for name, is_urgent in asked.items() if name.startswith("Copy") and is_urgent}
    assert took_over and not asked["StartShard shard-0"], "what it served is served"
    alone = World(TWO, num_experts=8, room=4)
    asked = noted(alone, "is_urgent")
    for uid in ("dense-0", "dense-1", "shard-0"):
        alone.kill(uid)
    alone.settle()
    assert asked == {"StartDense dense-0": False, "StartDense dense-1": True,
                     "StartShard shard-0": True}, "dense-1 died last"  # fmt: skip
