"""The table of a shard's slots: what is filled is checked, what is bad is never used again."""

import pytest

from remora.actors.expert_state import ExpertDigest, ExpertState
from remora.comm.errors import ClusterError


def held(layer: int, expert: int) -> ExpertDigest:
    return ExpertDigest(layer=layer, expert=expert, digest=f"{layer}/{expert}", nbytes=1)


def test_slots_are_filled_settled_and_freed() -> None:
    state = ExpertState({3: 2, 1: 3})
    assert state.layers == (1, 3) and (state.room(1), state.room(2)) == (3, 0)
    assert (state.free_slots(3), state.free_slots(2)) == ([0, 1], [])
    assert state.slot_for(3, 7) == 0 == state.slot_for(3, 8), "choosing takes nothing"
    assert state.settle(1, held(3, 7), "3/7")
    assert (state.slot_of(3, 7), state.slot_of(3, 8)) == (1, None)
    assert (state.digest_of(3, 7), state.digest_of(3, 8)) == ("3/7", None)
    assert state.settle(0, held(3, 8), "3/8")
    assert state.experts_of(3) == (8, 7), "in the order of slots"
    assert state.not_mine(3, [8, 9, 7, 9]) == [9] and state.not_mine(2, [1]) == [1]
    with pytest.raises(ClusterError, match="layer 3: no slot is free for expert 9"):
        state.slot_for(3, 9)
    turn = state.turn
    state.check_turn(turn)
    assert state.keep({3: (8,)}) == [(3, 7)]
    with pytest.raises(ClusterError, match="not wanted any more"):
        state.check_turn(turn)
    assert state.drop(3, 7) == 1 and state.free_slots(3) == [1]
    assert state.digests.keys() == {(3, 8)}


def test_a_slot_that_holds_something_else_is_not_used_again() -> None:
    state = ExpertState({1: 2})
    assert not state.settle(0, held(1, 5), "what was to be there")
    assert (state.free_slots(1), state.room(1)) == ([1], 1)
    assert state.not_mine(1, [5]) == [5] and state.keep({}) == []
    with pytest.raises(AssertionError, match="slot 0 is not free"):
        state.settle(0, held(1, 5), "1/5")
