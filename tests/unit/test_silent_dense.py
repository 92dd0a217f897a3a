"""A dense group that answers nobody, and whom that keeps from what."""

import pytest
from support.coordinator_rig import LAYERS, World

from remora.cluster.coordinator_calls import Limits
from remora.cluster.operation import Drain, ScaleTo

ALL = (tuple(range(8)),) * len(LAYERS)
BOTH = {"shard-0": ALL, "shard-1": ALL}
LIMITS = Limits()


def deaf(*dead: str) -> World:
    """A dense group that answers nobody, as long as its process lives; these die then."""
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    it.hung.add("dense-1")
    for uid in dead:
        it.kill(uid)
    return it


@pytest.mark.parametrize("dead", [("shard-1",), ("shard-0", "shard-1"), ("shard-1", "dense-0")])
def test_a_dense_group_that_does_not_answer_keeps_nobody_from_coming_back(
    dead: tuple[str, ...],
) -> None:
    """Each try failed at its commit, and counted against those that were to come back."""
    it = deaf(*dead)
    it.settle(LIMITS.patience_s)
    assert it.state.lost | it.state.lost_dense == set() and it.state.view.epoch == 2
    assert it.in_use["dense-0"] == it.state.view, "its streams go on"
    it.settle()
    assert [op.outcome for op in it.settled] == ["done"] and it.state.fenced == {"dense-1"}
    assert it.settled[0].reason == (
        "dense-1 did not answer in step commit; dense-1 fenced: no answer to epoch 2"
    )
    assert it.now_s == LIMITS.patience_s + LIMITS.drain_s
    it.wake()
    it.check_all_back()


def test_a_node_is_left_in_time_although_a_dense_group_does_not_answer() -> None:
    it = deaf()
    it.ask("evacuate-shard-1.1:1", Drain(("shard-1",), "needed", 110.0))
    it.settle(110.0)
    [operation] = it.settled
    assert (operation.outcome, operation.safe_to_delete) == ("done", ("shard-1",))
    it.wake()
    it.check_at_rest()


def test_what_somebody_asked_for_is_undone_where_a_dense_group_does_not_answer() -> None:
    it = deaf()
    operation = it.run("up", ScaleTo(3))
    assert operation.reason == "dense-1 did not answer in step commit"
    assert (operation.outcome, operation.ended_s) == ("failed", LIMITS.commit_s)
    it.wake()
    it.check_at_rest()


def test_a_dense_group_that_joins_and_does_not_adopt_is_tried_again_alone() -> None:
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    it.hung.add("dense-1")
    it.kill("dense-1")
    it.kill("shard-1")
    it.settle(LIMITS.prepare_s - 1.0)
    assert it.state.lost == set() and it.state.lost_dense == {"dense-1"}
    it.wake()
    it.check_all_back()
