"""Nodes that go away: what leaves them, how often it is tried, and what takes its place."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.coordinator_rig import LAYERS, World

from remora.actors.health_state import Life
from remora.cluster.evacuation import WITHIN_S_MIN, next_evacuation, next_replacement
from remora.cluster.node_watch import NodeWatch
from remora.cluster.operation import Drain, Operation, Restore, ScaleTo, Target
from remora.cluster.operation_steps import STEP_S_MIN
from remora.comm.errors import ClusterError, ConfigError, OperationRunsError

EIGHT = tuple(range(8))
TWO = {"shard-0": (EIGHT[:4],) * len(LAYERS), "shard-1": (EIGHT[4:],) * len(LAYERS)}
HOMES: Mapping[Life, set[str]] = {
    ("shard-0", 1): {"a"},
    ("shard-1", 3): {"b"},
    ("dense-0", 2): {"a"},
    ("dense-1", 1): {"b", "c"},  # ranks on two nodes
}


def tried(*ids: str) -> "set[str]":
    return set(ids)


def test_nothing_leaves_nodes_that_stay() -> None:
    assert next_evacuation({}, HOMES, lambda _: False) is None
    assert next_evacuation({"d": 10.0}, HOMES, lambda _: False) is None


def test_members_leave_with_all_the_time_that_their_nodes_have_and_try_twice() -> None:
    name = "evacuate-dense-0.2-shard-0.1"
    uids = ("dense-0", "shard-0")
    first = next_evacuation({"a": 60.0}, HOMES, lambda _: False)
    assert first == (f"{name}:1", Drain(uids, "needed", 60.0))
    second = next_evacuation({"a": 30.0}, HOMES, tried(f"{name}:1").__contains__)
    assert second == (f"{name}:2", Drain(uids, "needed", 30.0))
    assert next_evacuation({"a": 9.0}, HOMES, tried(f"{name}:1", f"{name}:2").__contains__) is None


def test_a_group_leaves_with_any_of_its_ranks_and_the_earliest_deadline_counts() -> None:
    found = next_evacuation({"c": None}, HOMES, lambda _: False)
    assert found == ("evacuate-dense-1.1:1", Drain(("dense-1",), "needed", None))
    found = next_evacuation({"a": 500.0, "b": 20.0, "x": 1.0}, HOMES, lambda _: False)
    assert found is not None and found[1].within_s == 20.0
    assert found[1].uids == ("dense-0", "dense-1", "shard-0", "shard-1")
    late = next_evacuation({"a": -5.0}, HOMES, lambda _: False)
    assert late is not None and late[1].within_s == WITHIN_S_MIN


def over(operation_id: str, target: Target, joiners: Sequence[str] = (), **other: Any) -> Operation:
    """An operation that is done, unless told otherwise."""
    retirees = target.uids if isinstance(target, Drain) else ()
    fields = {"outcome": "done", "joiners": dict.fromkeys(joiners, 1), "retirees": retirees} | other
    return Operation(operation_id=operation_id, target=target, **fields)


LEFT = Drain(("dense-0", "shard-0", "shard-1"), "needed", 60.0)
NOW = ("dense-1", "shard-2")  # members


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([over("evacuate-x:1", LEFT)], ScaleTo(3, dense_groups=2)),
        ([over("evacuate-x:1", LEFT, ["shard-2"])], ScaleTo(2, dense_groups=2)),
        ([over("evacuate-x:1", LEFT, ["shard-2", "dense-1"])], ScaleTo(2)),
        ([over("evacuate-x:1", LEFT, ["shard-2", "shard-3"])], ScaleTo(None, dense_groups=2)),
        ([over("evacuate-x:1", Drain(("shard-0",)), ["shard-2"])], None),  # all are there again
        ([over("evacuate-x:1", LEFT, outcome="running")], None),
        ([over("evacuate-x:1", LEFT, outcome="failed")], None),  # they are restored
        ([over("evacuate-x:1", LEFT), over("restore-shard-2.2", Restore(("shard-2",)))],
         ScaleTo(3, dense_groups=2)),
        ([over("evacuate-x:1", LEFT), over("less", ScaleTo(1))], None),  # somebody decided
        ([over("drained", LEFT)], None),
    ],
)  # fmt: skip
def test_what_was_not_replaced_is_brought_back(
    history: list[Operation], expected: ScaleTo | None
) -> None:
    found = next_replacement(history, NOW, lambda _: False)
    assert found == (None if expected is None else ("replace-x:1", expected))
    assert next_replacement(history, NOW, tried("replace-x:1").__contains__) is None


class Deployment:
    """What `NodeWatch` asks and is asked."""

    def __init__(self) -> None:
        self.draining: dict[str, float | None] = {}
        self.homes = {life: set(nodes) for life, nodes in HOMES.items()}
        self.history: list[Operation] = []
        self.left: list[set[str]] = []
        self.fails: Exception | None = None
        self.is_silent = False
        self.watch = NodeWatch(
            draining=self.look,
            homes=lambda: self.homes,
            members=lambda: HOMES.keys() & self.homes.keys(),
            history=lambda: self.history,
            request=self.request,
            leave=lambda nodes: self.left.append(set(nodes)),
        )

    def look(self) -> dict[str, float | None]:
        if self.is_silent:
            raise ClusterError("no GCS")
        return self.draining

    def request(self, operation_id: str, target: Target) -> None:
        if self.fails is not None:
            raise self.fails
        self.history.append(over(operation_id, target, outcome="running"))


def test_an_operation_that_runs_is_waited_for_and_a_refusal_is_final() -> None:
    it = Deployment()
    it.watch.look(100.0)
    assert it.history == [] and it.left == []
    it.draining = {"a": 160.0}
    it.fails = OperationRunsError("another one")
    it.watch.look(100.0)
    it.watch.look(101.0)
    there = {"a": ["dense-0", "shard-0"]}
    assert it.history == []
    assert it.watch.status() == {"draining": there, "stay": [], "refused": {}}
    it.fails = ConfigError("no memory")
    it.watch.look(102.0)
    [(refused, why)] = it.watch.status()["refused"].items()
    assert refused.endswith(":1") and why == "no memory"
    it.fails = None
    for now_s in (103.0, 104.0):
        it.watch.look(now_s)
    [operation] = it.history
    assert operation.operation_id.endswith(":2")
    assert operation.target == Drain(("dense-0", "shard-0"), "needed", 57.0)
    assert it.watch.status()["stay"] == [], "it may yet come off"
    assert it.left == [{"a"}] * 5, "nothing new is begun there"
    operation.outcome = "failed"
    it.watch.look(105.0)
    assert it.watch.status()["stay"] == ["dense-0", "shard-0"], "they die with their node"
    it.draining = {}
    it.is_silent = True
    it.watch.look(106.0)
    assert it.watch.nodes == {"a"}, "it may still be so"
    it.is_silent = False
    it.watch.look(107.0)
    assert it.watch.nodes == frozenset() and it.watch.status()["stay"] == []


def test_who_retires_is_there_until_it_has_ended_and_then_others_are_brought_back() -> None:
    it = Deployment()
    it.draining = {"a": 160.0}
    it.homes["dense-9", 1] = {"a"}  # finishes its requests: no member any more
    it.watch.look(100.0)
    assert it.watch.status()["draining"] == {"a": ["dense-0", "dense-9", "shard-0"]}
    [operation] = it.history
    assert operation.target == Drain(("dense-0", "shard-0"), "needed", 60.0)
    it.homes = {life: nodes for life, nodes in it.homes.items() if "a" not in nodes}
    it.watch.look(101.0)
    assert it.watch.status()["draining"] == {"a": []} and len(it.history) == 1
    operation.outcome = "done"
    it.watch.look(102.0)
    assert it.history[1].operation_id == "replace-dense-0.2-shard-0.1:1"
    assert it.history[1].target == ScaleTo(2, dense_groups=2), "one of each is left"
    it.history[1].outcome = "failed"
    it.watch.look(103.0)
    assert len(it.history) == 2, "somebody must look"


@pytest.mark.parametrize(
    ("room", "target", "joiners"),
    [
        (4, Drain(("shard-0",), "needed"), {"shard-2": 1}),  # its experts have no slot elsewhere
        (8, Drain(("shard-0",), "needed"), {}),
        (8, Drain(("dense-0",), "needed"), {}),
        (8, Drain(("dense-0", "dense-1"), "needed"), {"dense-2": 1}),
        (8, Drain(("dense-0", "shard-1"), "none"), {}),
    ],
)
def test_who_joins_instead(room: int, target: Drain, joiners: dict[str, int]) -> None:
    it = World(TWO, num_experts=8, room=room)
    operation = it.run("one", target)
    assert (operation.outcome, operation.joiners) == ("done", joiners)
    assert set(operation.safe_to_delete) == set(target.uids)
    it.check_at_rest()


def test_an_operation_ends_with_its_deadline() -> None:
    it = World(TWO, num_experts=8, room=4, fault="hang", at=2)  # its first task
    operation = it.run("one", Drain(("shard-0",), "needed", within_s=40.0))
    assert operation.outcome == "failed" and "prepare" in operation.reason
    assert operation.ended_s is not None
    assert operation.ended_s == pytest.approx(40.0 + STEP_S_MIN)  # and undone
    it = World(TWO, num_experts=8, room=4, fault="hang", at=2)
    operation = it.run("one", Drain(("shard-0",), "needed", within_s=1.0))
    assert operation.ended_s == pytest.approx(2 * STEP_S_MIN)
