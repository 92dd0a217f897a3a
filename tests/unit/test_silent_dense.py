"""Members that are there and answer nobody, or with errors, and whom that keeps from what."""

import pytest
from support.coordinator_rig import LAYERS, Fault, World

from remora.cluster.coordinator_calls import RETRIES_MAX, Limits
from remora.cluster.operation import Ask, CallFailed, Canary, Drain, Offer, ScaleTo

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


def cut_off(uid: str, num_times: int) -> World:
    """A dense group that says so often that it cannot connect to a view to come."""
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    answer, left = it._answer, [num_times]

    def refuses(ask: Ask, here: Fault) -> None:
        if isinstance(ask.task, Offer) and ask.task.uid == uid and left[0]:
            left[0] -= 1
            it.queue.append(CallFailed(ask.call, "shard-0 cannot be reached"))
        else:
            answer(ask, here)

    it._answer = refuses  # type: ignore[method-assign]
    return it


@pytest.mark.parametrize("num_times", [1, RETRIES_MAX, 1000])
def test_a_dense_group_that_cannot_connect_keeps_nobody_from_coming_back(num_times: int) -> None:
    """One link that was cut had every try undone, and counted against the shard that was back."""
    it = cut_off("dense-1", num_times)
    it.kill("shard-1")
    it.settle()
    [operation] = it.settled
    assert (operation.outcome, it.now_s) == ("done", min(num_times, RETRIES_MAX))
    without = "Offer dense-1: shard-0 cannot be reached; given up after 5 tries"
    assert operation.reason == (without if num_times > RETRIES_MAX else "")
    it.check_all_back()


def test_a_shard_that_dies_before_groups_have_connected_counts_as_a_try() -> None:
    it = cut_off("dense-1", 1000)
    it.kill("shard-1")
    it.settle(1.0)
    it.kill("shard-1")
    it.settle(1.5)
    assert [op.reason for op in it.settled] == ["shard-1 died"]
    assert it.state.operation is None, "the next try comes later"
    it.settle()
    it.check_all_back()


def test_what_somebody_asked_for_is_undone_where_a_dense_group_cannot_connect() -> None:
    it = cut_off("dense-1", 1)
    operation = it.run("up", ScaleTo(3))
    assert (operation.outcome, operation.reason) == ("failed", "dense-1: shard-0 cannot be reached")
    assert it.run("again", ScaleTo(3)).outcome == "done"
    it.check_at_rest()


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


@pytest.mark.parametrize("is_told", [True, False])
def test_a_shard_that_serves_and_computes_no_canary_keeps_nobody_from_coming_back(
    is_told: bool,
) -> None:
    """It is for comparison alone; a start was undone for it, and counted as a try."""
    it = World(BOTH, num_experts=8, room=8, replicas=2)
    answer = it._answer

    def unreachable(ask: Ask, here: Fault) -> None:
        if not (isinstance(ask.task, Canary) and ask.task.uid == "shard-0"):
            answer(ask, here)
        elif is_told:
            it.queue.append(CallFailed(ask.call, "it is cut off"))

    it._answer = unreachable  # type: ignore[method-assign]
    it.kill("shard-1")
    it.settle()
    [operation] = it.settled
    assert operation.outcome == "done"
    given_up = "Canary shard-0: it is cut off; given up after 5 tries"
    silent = "shard-0 did not answer in step verify"
    assert operation.reason == (given_up if is_told else silent)
    why = "shard-0: it is cut off" if is_told else silent
    assert it.run("up", ScaleTo(3)).reason == why, "nobody waits for that"
    it.check_at_rest()
