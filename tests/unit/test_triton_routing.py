"""Routing kernels for GPUs under Triton's interpreter: sorting, tiles, sums, against the twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.kernels import reference, triton_routing
from remora.kernels.triton_routing import map_tiles, num_tiles_max, sort_pairs, sum_pairs

pytest.importorskip("triton")


@pytest.fixture(params=["counting", "torch"])
def sorter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to sort: our kernel, and torch for many pairs."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(triton_routing, "SORT_PAIRS_MAX", -1)
    return name


ADVERSARIAL = {
    "no_pairs": [],
    "one": [2],
    "one_of_nothing": [-1],
    "all_of_nothing": [-1] * 70,
    "one_slot": [1] * 65,
    "descending": [4, 3, 2, 1, 0, -1] * 30,
    "beyond_the_slots": [5, 0, 6, 1000, 4],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_sort(name: str, dtype: torch.dtype, sorter: str) -> None:
    keys = ADVERSARIAL[name]
    known = [key if key < 5 else -1 for key in keys]
    order, _, offsets = reference.route_sort(known, 5)
    found = sort_pairs(torch.tensor(keys, dtype=dtype), 5)
    assert found.order_N.tolist() == order
    assert found.offsets_C1.tolist() == offsets
    assert found.order_N.dtype == found.offsets_C1.dtype == torch.int32


@settings(max_examples=15)
@given(st.lists(st.integers(-1, 200), max_size=300), st.integers(1, 200))
def test_sort_random(keys: list[int], num_keys: int) -> None:
    known = [key if key < num_keys else -1 for key in keys]
    order, _, offsets = reference.route_sort(known, num_keys)
    found = sort_pairs(torch.tensor(keys, dtype=torch.int32), num_keys)
    assert (found.order_N.tolist(), found.offsets_C1.tolist()) == (order, offsets)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.sampled_from([16, 64]))
def test_tiles_cover_each_row_once(counts: list[int], tile_rows: int) -> None:
    """Tiles of a slot, in order, from its first row to its last; nothing but that."""
    num_pairs = max(1, sum(counts) + 3)  # three pairs of no slot
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    tiles = map_tiles(offsets, num_pairs, tile_rows)
    assert tiles.slot_B.shape[0] == num_tiles_max(num_pairs, len(counts), tile_rows)
    expected = [
        (slot, start)
        for slot, count in enumerate(counts)
        for start in range(int(offsets[slot]), int(offsets[slot]) + count, tile_rows)
    ]
    found = list(zip(tiles.slot_B.tolist(), tiles.start_B.tolist(), strict=True))
    assert found[: len(expected)] == expected
    assert all(slot == -1 for slot, _ in found[len(expected) :])


@pytest.mark.parametrize("num_columns", [1, 37, 700])
def test_sums_pairs_in_order(num_columns: int) -> None:
    """The same bits as adding one pair after the other; rows without pairs are zeros."""
    generator = torch.Generator().manual_seed(1)
    pair_row = [3, 0, 3, -1, 3, 0, 6]
    weighted = torch.randn((len(pair_row), num_columns), generator=generator)
    weighted[3] = torch.nan  # of no row: not read
    ones, place = torch.ones(len(pair_row)), list(range(len(pair_row)))
    expected = reference.presum(weighted, pair_row, ones, 8, place)
    found = sum_pairs(weighted, torch.tensor(pair_row), 8, torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(sum_pairs(weighted, torch.tensor(pair_row), 0, torch.float32), found[:0])
