"""Operations that somebody wants no more: undone as far as they are not committed."""

import pytest
from support.coordinator_rig import LAYERS, World

from remora.cluster.operation import Drain, PlaceAs, ScaleTo, Target
from remora.comm.errors import ConfigError, UnknownOperationError

EIGHT = tuple(range(8))
LOW, HIGH = EIGHT[:4], EIGHT[4:]
TWO = {"shard-0": (LOW,) * len(LAYERS), "shard-1": (HIGH,) * len(LAYERS)}
SWAPPED = {"shard-0": (HIGH,) * len(LAYERS), "shard-1": (LOW,) * len(LAYERS)}
EVENTS_MAX = 200


def world(room: int) -> World:
    return World(TWO, num_experts=8, room=room)


@pytest.mark.parametrize(
    ("target", "room"),
    [
        (ScaleTo(3), 8),
        (ScaleTo(1), 8),
        (ScaleTo(dense_groups=3), 8),
        (ScaleTo(dense_groups=1), 8),
        (Drain(("shard-0",), "needed"), 4),
        (PlaceAs(SWAPPED), 5),  # in several rounds
    ],
    ids=["more", "fewer", "more groups", "fewer groups", "drain", "rounds"],
)
def test_cancelled_after_any_event_nothing_is_left_half_done(target: Target, room: int) -> None:
    outcomes = []
    for num_events in range(EVENTS_MAX):
        it = world(room)
        it.ask("one", target)
        for _ in range(num_events):
            it.settle_one()
        operation = it.state.history["one"]
        if operation.outcome != "running":
            break
        rounds, epoch = operation.round, it.state.view.epoch
        try:
            it.cancel("one")
        except ConfigError:
            assert operation.step in ("drain", "free")
            outcomes.append("refused")
            continue
        it.settle()
        outcomes.append(operation.outcome)
        if operation.outcome == "failed":
            assert operation.reason == "it was cancelled"
            assert operation.round <= rounds + 1, "no round begins after it"
            assert it.state.view.epoch <= epoch + 1
        it.check_at_rest()
        assert it.run("again", target).outcome == "done", "it may be asked for again"
    else:
        raise AssertionError("it does not end")
    assert outcomes[0] == "failed" and "refused" in outcomes
    commits = sum(outcome == "done" for outcome in outcomes)
    assert commits <= 1, "only while the log of its last commit is written"


def test_what_was_cancelled_between_two_rounds_stays_so_in_the_next_life() -> None:
    """It was in no log, and all rounds that were left followed."""
    undisturbed = world(5).run("one", PlaceAs(SWAPPED))
    assert undisturbed.round > 1
    it = world(5)
    it.ask("one", PlaceAs(SWAPPED))
    while it.state.view.epoch == 1:
        it.settle_one()
    assert it.state.history["one"].step == "drain"
    it.cancel("one")
    it.restart()
    it.settle()
    operation = it.state.history["one"]
    assert (operation.outcome, operation.reason) == ("failed", "it was cancelled")
    assert (operation.round, it.state.view.epoch) == (1, 2)
    it.check_at_rest()


def test_what_cannot_be_logged_is_cancelled_all_the_same() -> None:
    it = placeless()
    it.fault, it.at = "disk", it.events + 1
    it.cancel("up")
    it.answer_all()
    assert it.state.history["up"].reason == "it was cancelled"
    it.check_at_rest()


def placeless() -> World:
    """An operation waits for a place."""
    it = world(8)
    it.placeless.add("shard-2")
    it.ask("up", ScaleTo(3))
    it.answer_all()
    return it


def test_what_waits_for_a_place_is_cancelled_at_once() -> None:
    it = placeless()
    it.cancel("up")
    it.answer_all()
    operation = it.state.history["up"]
    assert (operation.outcome, operation.ended_s) == ("failed", 0.0)
    it.check_at_rest()


@pytest.mark.parametrize("dies", [False, True])
def test_what_waits_until_another_has_given_way_is_cancelled_before_it_has_done_anything(
    dies: bool,
) -> None:
    it = world(8)
    it.placeless.add("shard-2")
    it.ask("replace-x:1", ScaleTo(3, gives_way=True))
    it.answer_all()
    it.ask("mine", ScaleTo(1))
    it.cancel("mine")
    it.cancel("replace-x:1")
    if dies:
        it.restart()
    it.settle()
    assert it.state.history["mine"].reason == "it was cancelled"
    assert it.state.history["replace-x:1"].outcome == "failed"
    assert it.state.view.placement.slots == TWO
    it.check_at_rest()


def test_who_died_comes_back_whatever_anybody_says() -> None:
    it = world(8)
    it.kill("shard-1")
    it.settle_one()
    [restore] = [each for each in it.state.history if each.startswith("restore-")]
    with pytest.raises(ConfigError, match="brings back members that died"):
        it.cancel(restore)
    it.settle()
    it.check_all_back()


def test_what_is_over_stays_as_it_is_and_what_nobody_knows_is_refused() -> None:
    it = world(8)
    it.run("up", ScaleTo(3))
    it.cancel("up")
    assert it.state.history["up"].outcome == "done"
    with pytest.raises(UnknownOperationError, match="'who'"):
        it.cancel("who")


def test_a_member_that_dies_while_it_is_cancelled_comes_back() -> None:
    it = placeless()
    it.cancel("up")
    it.kill("shard-0")
    it.settle()
    it.check_all_back()


def test_what_was_cancelled_says_so_in_the_next_life_and_is_told_of_once() -> None:
    it = placeless()
    it.cancel("up")
    records = len(it.log)
    it.cancel("up")
    assert len(it.log) == records
    it.restart()
    it.settle()
    assert it.state.history["up"].reason == "it was cancelled"
    it.check_at_rest()
