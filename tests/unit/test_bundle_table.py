"""Bounded counting: equal to a dictionary while there is room, without bias when there is not."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.comm.bundle_table import NO_VALUE, BundleTable, priority_sample, sort_rows

rows_strategy = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 0xFFFF)), min_size=0, max_size=300
)


def contents(table: BundleTable) -> dict[tuple[int, ...], float]:
    return {
        tuple(row): weight
        for row, weight in zip(table.rows.tolist(), table.weights.tolist(), strict=True)
    }


@settings(max_examples=100)
@given(rows_strategy, st.integers(1, 50))
def test_counts_as_a_dictionary_does(rows: list[tuple[int, int]], chunk: int) -> None:
    table = BundleTable(2, 1024)
    wanted: Counter[tuple[int, ...]] = Counter()
    for begin in range(0, len(rows), chunk):
        part = rows[begin : begin + chunk]
        table.add(np.array(part, np.uint16).reshape(-1, 2), np.arange(1.0, len(part) + 1))
        for number, row in enumerate(part, 1):
            wanted[row] += number
    assert contents(table) == dict(wanted)
    table.clear()
    assert contents(table) == {}


@settings(max_examples=50)
@given(rows_strategy, st.integers(2, 60))
def test_memory_is_bounded(rows: list[tuple[int, int]], rows_max: int) -> None:
    table = BundleTable(2, rows_max)
    table.add(np.array(rows, np.uint16).reshape(-1, 2), np.ones(len(rows)))
    distinct = len(set(rows))
    assert table.num_rows <= rows_max
    assert table.num_rows >= min(distinct, rows_max // 2)
    assert set(contents(table)) <= {tuple(row) for row in rows}
    table.shrink(2)
    assert table.num_rows <= 2


def test_sums_over_any_set_of_rows_have_no_bias() -> None:
    """The estimate of a subset's weight, averaged over salts, is its weight; the heaviest-only
    estimate is far off on the same data. Repeated pruning keeps that."""
    rng = np.random.default_rng(1)
    rows_TW = np.stack([rng.zipf(1.3, 4000) % 3000, rng.integers(0, 3, 4000)], axis=1)
    rows_TW = rows_TW.astype(np.uint16)
    light = rows_TW[:, 0] > 50  # a set of many light rows
    wanted = light.sum()
    found, tables = [], []
    for salt in range(200):
        table = BundleTable(2, 256, salt=1000 * salt)
        table.add(rows_TW, np.ones(len(rows_TW)))
        found.append(table.weights[table.rows[:, 0] > 50].sum())
        tables.append(table)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - wanted) < 4 * error, (np.mean(found), wanted, error)
    assert error < 0.03 * wanted
    exact = Counter(map(tuple, rows_TW.tolist()))
    heaviest = sum(n for row, n in exact.most_common(256) if row[0] > 50)
    assert heaviest < 0.7 * wanted
    again = BundleTable(2, 256)
    again.add(rows_TW, np.ones(len(rows_TW)))
    twin = BundleTable(2, 256)
    twin.add(rows_TW, np.ones(len(rows_TW)))
    assert contents(again) == contents(twin)


def test_heavy_rows_keep_their_weight_and_empty_ones_go() -> None:
    keys = np.arange(20, dtype=np.uint16).reshape(20, 1)
    weights = np.array([1000.0, 500.0] + [1.0] * 17 + [0.0])
    kept, after = priority_sample(keys, weights, 6, salt=3)
    assert kept[:2].tolist() == [0, 1]
    assert after[:2].tolist() == [1000.0, 500.0]
    assert len(kept) == 6
    assert 19 not in kept
    assert len(set(after[2:].tolist())) == 1  # the light ones all stand for the same


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(-1, 500), min_size=4, max_size=4), min_size=1, max_size=20))
def test_rows_are_sorted(ids: list[list[int]]) -> None:
    ids_TK = np.array(ids, np.int64)
    out_TK = np.empty(ids_TK.shape, np.uint16)
    sort_rows(ids_TK, np.arange(len(ids))[::-1].copy(), out_TK)
    wanted = [sorted(NO_VALUE if e < 0 else e for e in row) for row in ids[::-1]]
    assert out_TK.tolist() == wanted
