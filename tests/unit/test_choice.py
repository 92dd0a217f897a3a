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
    assert _native(index_TK, holders, hosts, load, gain) in (None, (chosen, slow_load))


def _native(
    index_TK: np.ndarray, holders: list[list[int]], hosts: list[int], load: list[int], gain: int
) -> tuple[list[list[int]], list[int]] | None:
    """(shards, load afterwards) by the C++ twin; None without a compiler."""
    extension = native.native_extension()
    if extension is None:
        return None
    native_TK = np.full(index_TK.shape, -7, np.int32)
    load_S = np.array(load, np.int64)
    table_ER = table_of(holders)
    host_S, gain_1 = np.array(hosts, np.int32), np.array([gain])
    usable_S = np.ones(len(hosts), np.uint8)
    assert extension.choose(
        index_TK.ctypes.data, *index_TK.shape, table_ER.ctypes.data, *table_ER.shape,
        host_S.ctypes.data, 0, usable_S.ctypes.data, gain_1.ctypes.data, len(hosts),
        load_S.ctypes.data, native_TK.ctypes.data,
    )  # fmt: skip
    return np.where(index_TK >= 0, native_TK, -1).tolist(), load_S.tolist()


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


def test_a_token_is_shared_by_the_shards_of_our_own_host() -> None:
    """Each reads half of the weights, where opening as few shards as can be would read all in one;
    another host gets none of them."""
    index_TK = np.arange(8)[None].astype(np.int64)
    found = run_choose(index_TK, [[0, 1, 2]] * 8, {0, 1}, {0, 1, 2})[1]
    assert np.bincount(found.ravel(), minlength=3).tolist() == [4, 4, 0]
    bound = [[0]] * 3 + [[0, 1]] * 5  # three must be on shard 0: it gets one more
    found = run_choose(index_TK, bound, {0, 1}, {0, 1})[1]
    assert np.bincount(found.ravel()).tolist() == [4, 4]


def test_an_expert_is_read_by_one_shard_of_our_own_host_only() -> None:
    rng = np.random.default_rng(0)
    index_TK = np.array([rng.permutation(12)[:4] for _ in range(32)], np.int64)
    found = run_choose(index_TK, [[0, 1]] * 12, {0, 1}, {0, 1})[1]
    shards = [set(found[index_TK == e].tolist()) for e in range(12)]
    assert all(len(of_one) == 1 for of_one in shards)
    assert sorted(sum(s in of_one for of_one in shards) for s in (0, 1)) == [6, 6]


@pytest.mark.parametrize("num_tokens", [128, 129, 400])
def test_rows_of_a_hot_expert_are_spread_and_the_twins_agree(num_tokens: int) -> None:
    """Every token goes to expert 0: up to 128 rows it is one shard's, then split by load."""
    rng = np.random.default_rng(num_tokens)
    index_TK = np.array([[0, 1 + rng.integers(5)] for _ in range(num_tokens)], np.int64)
    holders, hosts, load = [[0, 1]] * 6, [0, 0], [0, 0]
    _, shard_TK, _, load_after = run_choose(index_TK, holders, set(), {0, 1}, hosts=hosts)
    chosen = choice.choose_naive(index_TK, holders, hosts, 0, load, 4 * choice.GAIN_ONE)
    assert shard_TK.tolist() == chosen and load_after == load
    assert _native(index_TK, holders, hosts, [0, 0], 4 * choice.GAIN_ONE) in (None, (chosen, load))
    assert (len(set(shard_TK[:, 0].tolist())) == 2) == (num_tokens > 128)
    assert max(load) <= 1.2 * sum(load) / 2 or num_tokens == 128


def test_shards_of_our_own_host_that_others_load_unevenly_are_not_levelled() -> None:
    index_TK = np.arange(8)[None].astype(np.int64)
    for load, expected in (([1 << 20, 1 << 20], [4, 4]), ([1 << 20, 1 << 21], [8, 0])):
        found = run_choose(index_TK, [[0, 1]] * 8, {0, 1}, {0, 1}, load=load)[1]
        assert np.bincount(found.ravel(), minlength=2).tolist() == expected
