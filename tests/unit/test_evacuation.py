"""Nodes that go away: what leaves them, how often it is tried, and what takes its place."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.coordinator_rig import LAYERS, World

from remora.actors.health_state import Life
from remora.cluster.config import parse_config
from remora.cluster.evacuation import WITHIN_S_MIN, next_evacuation, next_replacement
from remora.cluster.node_watch import PLACELESS_LOOKS, NodeWatch
from remora.cluster.operation import Drain, Operation, PlaceAs, Restore, ScaleTo, Target
from remora.cluster.operation_steps import STEP_S_MIN
from remora.cluster.places import why_placeless
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


def wanted(shards: int | None = None, dense_groups: int | None = None) -> ScaleTo:
    """So many, once there is room and nobody asks for something else."""
    return ScaleTo(shards, dense_groups=dense_groups, gives_way=True)


LEFT = Drain(("dense-0", "shard-0", "shard-1"), "needed", 60.0)
NOW = ("dense-1", "shard-2")  # members


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([over("evacuate-x:1", LEFT)], wanted(3, 2)),
        ([over("evacuate-x:1", LEFT, ["shard-2"])], wanted(2, 2)),
        ([over("evacuate-x:1", LEFT, ["shard-2", "dense-1"])], wanted(2)),
        ([over("evacuate-x:1", LEFT, ["shard-2", "shard-3"])], wanted(None, 2)),
        ([over("evacuate-x:1", Drain(("shard-0",)), ["shard-2"])], None),  # all are there again
        ([over("evacuate-x:1", LEFT, outcome="running")], None),
        ([over("evacuate-x:1", LEFT, outcome="failed")], None),  # they are restored
        ([over("evacuate-x:1", LEFT), over("restore-shard-2.2", Restore(("shard-2",)))],
         wanted(3, 2)),
        ([over("evacuate-y:1", LEFT), over("evacuate-x:1", Drain(("shard-3",)))], wanted(4, 2)),
        ([over("evacuate-x:1", LEFT), over("less", ScaleTo(1))], wanted(None, 2)),
        ([over("evacuate-x:1", LEFT), over("less", ScaleTo(1, dense_groups=1))], None),
        ([over("evacuate-x:1", LEFT), over("replace-x:1", wanted(3, 2))], None),
        ([over("evacuate-x:1", LEFT), over("replace-x:1", wanted(3, 2), outcome="failed")], None),
        ([over("evacuate-x:1", LEFT), over("moved", PlaceAs({}))], wanted(3, 2)),
        ([over("evacuate-x:1", LEFT), over("drained", Drain(("shard-9",)))], wanted(3, 2)),
        ([over("drained", LEFT)], None),
    ],
)  # fmt: skip
def test_what_was_not_replaced_is_brought_back(
    history: list[Operation], expected: ScaleTo | None
) -> None:
    found = next_replacement(history, NOW, lambda _: False)
    assert found == (None if expected is None else ("replace-x:1", expected))
    assert next_replacement(history, NOW, tried("replace-x:1").__contains__) is None


def test_a_replacement_that_gave_way_is_due_again_unless_somebody_has_scaled() -> None:
    first = over("replace-x:1", wanted(3, 2), outcome="failed", gave_way=True)
    history = [over("evacuate-x:1", LEFT), first, over("moved", PlaceAs({}))]
    assert next_replacement(history, NOW, tried("replace-x:1").__contains__) == (
        "replace-x:1:2",
        wanted(3, 2),
    )
    second = over("replace-x:1:2", wanted(3, 2), outcome="failed", gave_way=True)
    history += [second, over("more", ScaleTo(4))]
    assert next_replacement(history, NOW, lambda _: False) == ("replace-x:1:3", wanted(None, 2))
    history += [over("more", ScaleTo(dense_groups=1))]
    assert next_replacement(history, NOW, lambda _: False) is None


class Deployment:
    """What `NodeWatch` asks and is asked."""

    def __init__(self) -> None:
        self.draining: dict[str, float | None] = {}
        self.homes = {life: set(nodes) for life, nodes in HOMES.items()}
        self.history: list[Operation] = []
        self.left: list[tuple[set[str], bool]] = []
        self.fails: Exception | None = None
        self.why: str | None = None  # who joins finds no place
        self.given_up: list[tuple[str, str]] = []
        self.is_silent = False
        self.places_are_silent = False
        self.watch = NodeWatch(
            draining=self.look,
            homes=lambda: self.homes,
            members=lambda: HOMES.keys() & self.homes.keys(),
            history=lambda: self.history,
            request=self.request,
            leave=lambda nodes, is_over: self.left.append((set(nodes), is_over)),
            why_placeless=self.why_placeless,
            give_up=lambda operation_id, why: self.given_up.append((operation_id, why)),
        )

    def look(self) -> dict[str, float | None]:
        if self.is_silent:
            raise ClusterError("no GCS")
        return self.draining

    def why_placeless(self, operation: Operation) -> str | None:
        assert operation is self.history[-1]
        if self.places_are_silent:
            raise ClusterError("no GCS")
        return self.why

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
    assert it.left == [({"a"}, False)] * 5, "nothing new is begun there, and members may yet come"
    operation.outcome = "failed"
    it.watch.look(105.0)
    assert it.left[5:] == [({"a"}, True)], "what waited for that may begin elsewhere"
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
    assert it.history[1].target == wanted(2, 2), "one of each is left"
    it.history[1].outcome = "failed"
    it.watch.look(103.0)
    assert len(it.history) == 2, "somebody must look"


def leaving() -> tuple[Deployment, Operation]:
    """An evacuation has begun, and waits for who joins."""
    it = Deployment()
    it.draining = {"a": 640.0}
    it.watch.look(100.0)
    [operation] = it.history
    operation.step = "prepare"
    it.fails = OperationRunsError("one at a time")
    return it, operation


def test_an_evacuation_that_has_nowhere_to_go_is_given_up_and_not_tried_again() -> None:
    it, operation = leaving()
    it.why = "no place"
    for now_s in range(PLACELESS_LOOKS - 1):
        it.watch.look(101.0 + now_s)
    it.why = None  # it was about to be placed
    it.watch.look(110.0)
    it.why = "no place"
    for now_s in range(PLACELESS_LOOKS - 1):
        it.watch.look(111.0 + now_s)
    assert it.given_up == []
    it.watch.look(120.0)
    assert it.given_up == [(operation.operation_id, "no place")]
    operation.outcome, operation.step, it.fails = "failed", "over", None
    it.watch.look(121.0)
    assert it.history == [operation], "it would wait in vain again"
    status = it.watch.status()
    assert status["stay"] == ["dense-0", "shard-0"]
    assert set(status["refused"].values()) == {"no place"}


@pytest.mark.parametrize("target", [ScaleTo(shards=9), Drain(("shard-1",), "needed")])
def test_what_somebody_waits_for_is_given_up_too_and_may_be_asked_for_again(target: Target) -> None:
    it = Deployment()
    it.history.append(over("mine", target, outcome="running", step="prepare"))
    it.why = "no place"
    for now_s in range(PLACELESS_LOOKS):
        it.watch.look(101.0 + now_s)
    assert it.given_up == [("mine", "no place")]
    assert it.watch.status()["refused"] == {}


@pytest.mark.parametrize("case", ["copying", "a restore", "the autoscaler's", "nobody tells"])
def test_what_is_under_way_or_in_nobodys_way_is_not_given_up(case: str) -> None:
    it, operation = leaving()
    it.why = "no place"
    if case == "copying":
        operation.step = "copy"
    elif case == "a restore":
        operation.target = Restore(("shard-0",))
    elif case == "the autoscaler's":
        operation.target = ScaleTo(shards=9, gives_way=True)
    else:
        it.places_are_silent = True
    for now_s in range(2 * PLACELESS_LOOKS):
        it.watch.look(101.0 + now_s)
    assert it.given_up == []


class Nodes:
    """A Ray cluster with one thing that waits for a place."""

    def __init__(self, unplaced: dict[str, float], may_come: bool = False) -> None:
        self._unplaced, self._may_come = unplaced, may_come

    def unplaced(self) -> list[dict[str, float]]:
        return [{"CPU": 7.0}, self._unplaced]

    def may_come(self) -> bool:
        return self._may_come


@pytest.mark.parametrize(
    ("unplaced", "may_come", "key", "is_placeless"),
    [
        ({"CPU": 0.3, "group": 1.0}, False, None, True),
        ({"group": 1.0, "CPU": 0.30000000001}, False, None, True),
        ({"CPU": 0.3}, False, None, False),  # somebody else's
        ({"CPU": 0.3, "group": 1.0}, True, None, False),  # Ray's autoscaler may add a node
        ({"CPU": 0.3, "group": 1.0}, True, False, True),  # it may not: we know better
        ({"CPU": 0.3, "group": 1.0}, False, True, False),  # whoever adds nodes here, Ray does not
    ],
)
def test_who_finds_no_place(
    unplaced: dict[str, float], may_come: bool, key: bool | None, is_placeless: bool
) -> None:
    config = parse_config(
        {
            "model": "m",
            "dense": {"num_cpus": 0.3, "resources": {"group": 1}, "threads": 1},
            "elastic": {"nodes_may_come": key},
        }
    )
    operation = over("evacuate-dense-0.1:1", LEFT, ["dense-1"], outcome="running", step="prepare")
    nodes = Nodes(unplaced, may_come)
    why = why_placeless(config, nodes, lambda: {("shard-2", 1): {"a"}}, operation)
    assert (why is not None) == is_placeless
    assert why is None or "dense-1 (0.3 CPU, 1 group each)" in why
    it_starts = {("dense-1", 1): {"a"}}
    assert why_placeless(config, nodes, lambda: it_starts, operation) is None, "it has a place"
    nobody_joins = over("evacuate-dense-0.1:1", LEFT, outcome="running", step="prepare")
    assert why_placeless(config, nodes, dict, nobody_joins) is None


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
