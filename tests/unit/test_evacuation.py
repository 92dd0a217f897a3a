"""Nodes that go away: what leaves them, how often it is tried, and what takes its place."""

from collections.abc import Mapping

import pytest
from support.coordinator_rig import LAYERS, World

from remora.actors.health_state import Life
from remora.cluster.evacuation import WITHIN_S_MIN, next_evacuation
from remora.cluster.node_watch import NodeWatch
from remora.cluster.operation import Drain, Target
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


def test_members_leave_within_what_their_nodes_have_left_first_with_new_ones() -> None:
    name = "evacuate-dense-0.2-shard-0.1"
    uids = ("dense-0", "shard-0")
    first = next_evacuation({"a": 60.0}, HOMES, lambda _: False)
    assert first == (f"{name}:1", Drain(uids, "all", 30.0)), "the other half is for a second try"
    second = next_evacuation({"a": 30.0}, HOMES, tried(f"{name}:1").__contains__)
    assert second == (f"{name}:2", Drain(uids, "needed", 30.0))
    assert next_evacuation({"a": 9.0}, HOMES, tried(f"{name}:1", f"{name}:2").__contains__) is None


def test_a_group_leaves_with_any_of_its_ranks_and_the_earliest_deadline_counts() -> None:
    found = next_evacuation({"c": None}, HOMES, lambda _: False)
    assert found == ("evacuate-dense-1.1:1", Drain(("dense-1",), "all", None))
    found = next_evacuation({"a": 500.0, "b": 20.0, "x": 1.0}, HOMES, lambda _: False)
    assert found is not None and found[1].within_s == 10.0
    assert found[1].uids == ("dense-0", "dense-1", "shard-0", "shard-1")
    late = next_evacuation({"a": -5.0}, HOMES, lambda _: False)
    assert late is not None and late[1].within_s == WITHIN_S_MIN / 2


class Deployment:
    """What `NodeWatch` asks and is asked."""

    def __init__(self) -> None:
        self.draining: dict[str, float | None] = {}
        self.begun: list[tuple[str, Target]] = []
        self.left: list[set[str]] = []
        self.fails: Exception | None = None
        self.is_silent = False
        self.watch = NodeWatch(
            draining=self.look,
            homes=lambda: HOMES,
            request=self.request,
            is_known=lambda operation_id: operation_id in dict(self.begun),
            leave=lambda nodes: self.left.append(set(nodes)),
        )

    def look(self) -> dict[str, float | None]:
        if self.is_silent:
            raise ClusterError("no GCS")
        return self.draining

    def request(self, operation_id: str, target: Drain) -> None:
        if self.fails is not None:
            raise self.fails
        self.begun.append((operation_id, target))


def test_an_operation_that_runs_is_waited_for_and_a_refusal_is_final() -> None:
    it = Deployment()
    it.watch.look(100.0)
    assert it.begun == [] and it.left == []
    it.draining = {"a": 160.0}
    it.fails = OperationRunsError("another one")
    it.watch.look(100.0)
    it.watch.look(101.0)
    assert it.begun == [] and it.watch.status() == {"draining": ["a"], "refused": {}}
    it.fails = ConfigError("no memory")
    it.watch.look(102.0)
    [(refused, why)] = it.watch.status()["refused"].items()
    assert refused.endswith(":1") and why == "no memory"
    it.fails = None
    for now_s in (103.0, 104.0):
        it.watch.look(now_s)
    [(operation_id, target)] = it.begun
    assert operation_id.endswith(":2") and target == Drain(("dense-0", "shard-0"), "needed", 57.0)
    assert it.left == [{"a"}] * 5, "nothing new is begun there"
    it.draining = {}
    it.is_silent = True
    it.watch.look(105.0)
    assert it.watch.nodes == {"a"}, "it may still be so"
    it.is_silent = False
    it.watch.look(106.0)
    assert it.watch.nodes == frozenset()


@pytest.mark.parametrize(
    ("room", "target", "joiners"),
    [
        (4, Drain(("shard-0",), "needed"), {"shard-2": 1}),  # its experts have no slot elsewhere
        (8, Drain(("shard-0",), "needed"), {}),
        (8, Drain(("shard-0",), "all"), {"shard-2": 1}),
        (8, Drain(("dense-0",), "needed"), {}),
        (8, Drain(("dense-0", "dense-1"), "needed"), {"dense-2": 1}),
        (8, Drain(("dense-0", "dense-1"), "all"), {"dense-2": 1, "dense-3": 1}),
        (8, Drain(("dense-0", "shard-1"), "none"), {}),
    ],
)
def test_who_joins_instead(room: int, target: Drain, joiners: dict[str, int]) -> None:
    it = World(TWO, num_experts=8, room=room)
    operation = it.run("one", target)
    assert (operation.outcome, operation.joiners) == ("done", joiners)
    assert set(operation.safe_to_delete) == set(target.uids)
    it.check_at_rest()


def test_each_step_leaves_time_for_the_next() -> None:
    it = World(TWO, num_experts=8, room=8, fault="hang", at=2)  # its first task
    operation = it.run("one", Drain(("shard-0",), "all", within_s=40.0))
    assert operation.outcome == "failed" and "prepare" in operation.reason
    assert operation.ended_s is not None and operation.ended_s == pytest.approx(30.0)  # and undone
    it = World(TWO, num_experts=8, room=8, fault="hang", at=2)
    operation = it.run("one", Drain(("shard-0",), "all", within_s=1.0))
    assert operation.ended_s == pytest.approx(2 * STEP_S_MIN)
