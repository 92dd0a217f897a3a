"""Replica choice: numba, C++ and the slow twin agree to the last bit; and what it should do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.choice_rig import problems, run_choose, table_of

from remora.comm import choice, native

Problem = tuple[np.ndarray, list[list[int]], set[int]]
loads = st.lists(st.integers(0, 1 << 22), min_size=7, max_size=7)
gains = st.sampled_from([0, 1, 4 * choice.GAIN_ONE, 160 * choice.GAIN_ONE])


@settings(max_examples=150)
@given(problems(), st.lists(st.integers(0, 3), min_size=7, max_size=7), loads, gains)
def test_the_three_twins_agree(
    problem: Problem, hosts: list[int], load: list[int], gain: int
) -> None:
    index_TK, holders, _ = problem
    missing, shard_TK, call_TK, load_after = run_choose(
        index_TK, holders, set(), set(range(7)), hosts=hosts, load=load, gain=gain
    )
    slow_load = list(load)
    chosen = choice.choose_naive(index_TK, holders, hosts, 0, slow_load, gain)
    assert missing == -1
    there = index_TK >= 0
    assert np.where(there, shard_TK, -1).tolist() == chosen
    assert np.array_equal(call_TK == choice.SKIPPED, ~there)
    assert load_after == slow_load
    for shard, expert in zip(shard_TK[there].tolist(), index_TK[there].tolist(), strict=True):
        assert shard in holders[expert]
    extension = native.native_extension()
    if extension is not None:
        native_TK = np.full(index_TK.shape, -7, np.int32)
        load_S = np.array(load, np.int64)
        table_ER = table_of(holders)
        arrays = (np.array(hosts, np.int32), np.ones(7, np.uint8), np.array([gain]))
        host_S, usable_S, gain_1 = arrays
        assert extension.choose(
            index_TK.ctypes.data, *index_TK.shape, table_ER.ctypes.data, *table_ER.shape,
            host_S.ctypes.data, 0, usable_S.ctypes.data, gain_1.ctypes.data, 7,
            load_S.ctypes.data, native_TK.ctypes.data,
        )  # fmt: skip
        assert np.where(there, native_TK, -1).tolist() == chosen
        assert load_S.tolist() == slow_load


def test_own_host_first_then_fewest_hosts() -> None:
    holders = [[0, 2], [1, 2], [2], [0, 1]]
    index_TK = np.array([[0, 1, 2, 3]], np.int64)
    for local, expected in ((set(), [2, 2, 2, 0]), ({0}, [0, 2, 2, 0]), ({1}, [2, 1, 2, 1])):
        found = run_choose(index_TK, holders, local, {0, 1, 2}, gain=0)[1]
        assert found.tolist() == [expected]
    levelled = run_choose(index_TK, holders, set(), {0, 1, 2})[1]
    assert levelled.tolist() == [[0, 2, 2, 0]]  # two pairs each, and no row more


def test_a_host_in_use_costs_nothing_more() -> None:
    """Expert 1 is held by shard 1 of the host that expert 0 needs, and by shard 2 elsewhere."""
    holders = [[0], [1, 2]]
    index_TK = np.array([[0, 1]], np.int64)
    for hosts, expected in (([1, 1, 2], 1), ([1, 2, 1], 2)):
        found = run_choose(index_TK, holders, set(), {0, 1, 2}, hosts=hosts)[1]
        assert found.tolist() == [[0, expected]]


def test_load_has_its_price_and_locality_too() -> None:
    """A remote replica is worth a copy exactly from the load on that the gain says."""
    mean = 1 << 18
    for over, expected in ((0.05, 0), (0.5, 1)):
        load = [int(mean * (1 + over)), int(mean * (1 - over))]
        found = run_choose(np.zeros((1, 1), np.int64), [[0, 1]], {0}, {0, 1}, load=load)[1]
        assert found.tolist() == [[expected]]
    load = [2 * mean, 0]
    found = run_choose(np.zeros((1, 1), np.int64), [[0, 1]], {0}, {0, 1}, load=load, gain=0)[1]
    assert found.tolist() == [[0]]


@pytest.mark.parametrize("num_pairs", [1, 2, 4])
def test_our_own_host_keeps_pairs_until_its_load_is_worse_by_the_rule(num_pairs: int) -> None:
    """Pairs that one other host could take all stay until ours has 1/64 of the mean, and 1/4 of it
    for each copy a pair, more than theirs."""
    mean = 1 << 20  # so much that the prior hardly matters
    index_TK = np.arange(num_pairs)[None].astype(np.int64)
    rule = 1 / choice.LOCAL_SHARE + 1 / (4 * num_pairs)
    for share, expected in ((0.94 * rule, 0), (1.06 * rule, 1)):
        load = [int(mean * (1 + share / 2)), int(mean * (1 - share / 2))]
        found = run_choose(index_TK, [[0, 1]] * num_pairs, {0}, {0, 1}, load=load)[1]
        assert found.tolist() == [[expected] * num_pairs]


def test_ties_spread_the_load() -> None:
    _, shard_TK, _, load = run_choose(np.zeros((6, 1), np.int64), [[0, 1, 2]], set(), {0, 1, 2})
    assert shard_TK.ravel().tolist() == [0, 1, 2, 0, 1, 2]
    assert load == [2 * choice.PAIR] * 3


def test_old_load_is_forgotten() -> None:
    load = [1 << 20, 0]
    index_TK = np.full((1 << choice.DECAY_SHIFT, 1), -1, np.int64)
    assert run_choose(index_TK, [[0, 1]], set(), {0, 1}, load=load)[3] == [0, 0]


def test_a_suspect_is_not_chosen() -> None:
    index_TK = np.zeros((4, 1), np.int64)
    _, shard_TK, _, _ = run_choose(index_TK, [[0, 1, 2]], {0}, {1, 2})
    assert set(shard_TK.ravel().tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("index", "usable", "missing"), [([0, 1], {0}, 1), ([0, 2], {0, 1}, 2), ([0, 1], set(), 0)]
)
def test_an_expert_without_a_usable_holder_is_named(
    index: list[int], usable: set[int], missing: int
) -> None:
    found, _, _, load = run_choose(np.array([index], np.int64), [[0], [1]], set(), usable)
    assert found == missing and not any(load)
