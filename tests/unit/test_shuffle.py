"""Which rank takes which rows: against the assignment problem and a brute force over copies."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from remora.comm import shuffle
from remora.comm.collectives import part_of
from remora.comm.shuffle import (
    HOST_PRICE,
    PIECE_ROWS,
    assign,
    copy_costs,
    copy_prices,
    prices_differ,
    real_rows,
    slice_order,
)


def assign_naive(score_TR: NDArray[np.int64], room_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Slow twin of `assign`: the assignment problem with one column for each place of a rank."""
    places = np.repeat(np.arange(len(room_R)), room_R)
    rows, columns = linear_sum_assignment(score_TR[:, places], maximize=True)
    rank_T: NDArray[np.int64] = np.empty(len(score_TR), np.int64)
    rank_T[rows] = places[columns]
    return rank_T


def even_room(num_rows: int, num_ranks: int) -> NDArray[np.int64]:
    spans = [part_of(rank, num_ranks, num_rows) for rank in range(num_ranks)]
    return np.array([end - begin for begin, end in spans])


def total(score_TR: NDArray[np.int64], rank_T: NDArray[np.int64]) -> int:
    return int(score_TR[np.arange(len(rank_T)), rank_T].sum())


@settings(max_examples=150)
@given(
    num_rows=st.integers(0, 40),
    num_ranks=st.integers(1, 8),
    most=st.sampled_from([1, 3, 1000, 1 << 40]),
    skew=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_assignment_is_better(
    num_rows: int, num_ranks: int, most: int, skew: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    score_TR = generator.integers(-most + 1, most, (num_rows, num_ranks))
    if skew:  # all want the same rank
        score_TR[:, 0] += most // 2
    room_R = even_room(num_rows, num_ranks)
    rank_T = np.full(num_rows, -1)
    assign(score_TR, room_R, rank_T)
    assert np.bincount(rank_T, minlength=num_ranks).tolist() == room_R.tolist()
    assert total(score_TR, rank_T) == total(score_TR, assign_naive(score_TR, room_R))


def test_an_assignment_of_a_prefill_chunk_is_the_best() -> None:
    generator = np.random.default_rng(7)
    score_TR = np.sort(generator.integers(0, 5000, (512, 4)), axis=1)  # all like the last rank
    room_R = even_room(512, 4)
    rank_T = np.empty(512, np.int64)
    assign(score_TR, room_R, rank_T)
    assert np.bincount(rank_T).tolist() == [128] * 4
    assert total(score_TR, rank_T) == total(score_TR, assign_naive(score_TR, room_R))


def fewest(row: list[int], holders: list[list[int]], prices: list[int]) -> int:
    """Brute force over replica choices: near shards are free."""
    experts = [e for e in row if e >= 0]
    choices = itertools.product(*(holders[e] for e in experts))
    return min(sum(prices[s] for s in set(choice)) for choice in choices)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), replicas=st.integers(1, 2))
def test_costs_are_prices_of_copies(seed: int, replicas: int) -> None:
    generator = np.random.default_rng(seed)
    holders = [sorted(generator.permutation(5)[:replicas].tolist()) for _ in range(12)]
    index_TK = np.stack([generator.permutation(12)[:4] for _ in range(9)])
    index_TK[3, 2] = -1
    price_RS = copy_prices(["a", "a", "b"], ["a", "a", "b", "c", "a"])
    cost_TR = np.full((9, 3), -1)
    copy_costs(index_TK, np.array(holders, np.int16), price_RS, cost_TR)
    for t, r in itertools.product(range(9), range(3)):
        least = fewest(index_TK[t].tolist(), holders, price_RS[r].tolist())
        if replicas == 1:
            assert cost_TR[t, r] == least
        else:  # a greedy cover, as dispatch makes it
            assert least <= cost_TR[t, r] <= 4 * HOST_PRICE


def test_ranks_of_a_host_share_its_shards() -> None:
    prices = copy_prices(["a", "a"], ["a"] * 4)
    assert (prices == 0).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert prices_differ(prices)
    assert not prices_differ(copy_prices(["a", "b"], ["c", "c"]))
    assert (copy_prices(["a"] * 4, ["a", "a"]) == 0).sum(axis=0).tolist() == [2, 2]
    apart = copy_prices(["a", "b"], ["b", "a"])
    assert apart.tolist() == [[HOST_PRICE, 0], [0, HOST_PRICE]]


@pytest.mark.parametrize(("num_real", "num_rows"), [(0, 4), (1, 4), (5, 8), (8, 8), (3, 12)])
def test_padding_fills_slices_behind_their_rows(num_real: int, num_rows: int) -> None:
    score_TR = np.random.default_rng(1).integers(0, 9, (num_real, 4))
    order = slice_order(score_TR, num_rows).reshape(4, -1)
    assert sorted(order.flatten().tolist()) == list(range(num_rows))
    for rank, rows in enumerate(order.tolist()):
        count = real_rows(rank, 4, num_real)
        assert all(row < num_real for row in rows[:count])
        assert all(row >= num_real for row in rows[count:])
        assert rows == sorted(rows)


@settings(max_examples=20)
@given(num_real=st.integers(500, 1600), num_ranks=st.integers(1, 5), seed=st.integers(0, 99))
def test_long_steps_are_divided_in_pieces(num_real: int, num_ranks: int, seed: int) -> None:
    """Slices are as even as ever, and each piece's are the best that there are."""
    score_TR = np.random.default_rng(seed).integers(0, 9, (num_real, num_ranks))
    order = slice_order(score_TR)
    slices = np.split(order, np.cumsum(even_room(num_real, num_ranks))[:-1])
    rank_T = np.empty(num_real, np.int64)
    for rank, rows in enumerate(slices):
        assert rows.tolist() == sorted(rows.tolist())
        rank_T[rows] = rank
    piece = PIECE_ROWS // num_ranks * num_ranks
    for begin in range(0, num_real, piece):
        part = slice(begin, min(begin + piece, num_real))
        room_R = even_room(part.stop - begin, num_ranks)
        assert np.bincount(rank_T[part], minlength=num_ranks).tolist() == room_R.tolist()
        best_T = assign_naive(score_TR[part], room_R)
        assert total(score_TR[part], rank_T[part]) == total(score_TR[part], best_T)


def test_rows_that_like_all_ranks_alike_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody knows anything of yet needs no search, however long the step."""
    looks: list[int] = []

    def look(rank: int, *_: object) -> None:
        looks.append(rank)
        assert len(looks) <= 4, "once each, at the start"

    monkeypatch.setattr(shuffle, "_cheapest_of", look)
    rank_T = np.empty(64, np.int64)
    shuffle.assign.py_func(np.zeros((64, 4), np.int64), even_room(64, 4), rank_T)
    assert np.bincount(rank_T).tolist() == [16] * 4


def test_without_padding_slices_are_as_even_as_runs() -> None:
    order = slice_order(np.zeros((7, 4), np.int64))
    assert sorted(order.tolist()) == list(range(7))
