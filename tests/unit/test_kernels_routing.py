"""Sorting pairs by slot, gathering rows, combining expert outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remora.kernels import native, reference
from remora.kernels.routing import combine_ordered, gather_rows, presum, route_sort

DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")


def rows_of(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random rows; row and column decide the value."""
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(5)).to(dtype)


@settings(max_examples=60)
@given(slots=st.lists(st.integers(-1, 6), max_size=40))
def test_route_sort_against_the_reference(slots: list[int]) -> None:
    result = route_sort(torch.tensor(slots, dtype=torch.int64), 7)
    assert [part.tolist() for part in result] == list(reference.route_sort(slots, 7))


def test_route_sort_torch_path(path: str) -> None:
    slots = [3, -1, 0, 3, 3, 0, -1, 6]
    result = route_sort(torch.tensor(slots), 7)
    assert [part.tolist() for part in result] == list(reference.route_sort(slots, 7))
    empty = route_sort(torch.tensor([], dtype=torch.int64), 3)
    assert [part.tolist() for part in empty] == [[], [], [0, 0, 0, 0]]
    for bad in ([7], [-2]):
        with pytest.raises(IndexError, match=r"must be in -1\.\.6"):
            route_sort(torch.tensor(bad), 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows(path: str, dtype: torch.dtype) -> None:
    rows = rows_of(9, 37, dtype)
    index = [3, -1, 8, 3, 0]
    expected = reference.gather_rows(rows, index)
    assert torch.equal(gather_rows(rows, torch.tensor(index)), expected)
    wide = torch.cat([rows, rows], dim=1)
    assert torch.equal(gather_rows(wide[:, :37], torch.tensor(index)), expected)
    assert gather_rows(rows, torch.tensor([], dtype=torch.int64)).shape == (0, 37)
    assert torch.equal(gather_rows(rows[:0], torch.tensor([-1])), rows.new_zeros(1, 37))
    for bad in (9, -2):
        with pytest.raises(IndexError, match=r"must be in -1\.\.8"):
            gather_rows(rows, torch.tensor([bad]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 64, 1000])
def test_combine_ordered(
    path: str, dtype: torch.dtype, weight_dtype: torch.dtype, width: int
) -> None:
    rows = rows_of(40, width, dtype)
    generator = torch.Generator().manual_seed(width)
    index = torch.randint(-1, 40, (11, 4), generator=generator)
    index[3] = -1
    weights = torch.rand(11, 4, generator=generator).to(weight_dtype)
    weights[index < 0] = float("nan")  # of a term that is skipped: not read
    out = combine_ordered(rows, index, weights)
    expected = reference.combine_ordered(rows, index, weights)
    assert out.dtype == dtype and torch.equal(out, expected)  # the order is the contract: all bits
    assert (out[3] == 0).all()
    for count in (1, 2, 7):
        assert torch.equal(combine_ordered(rows, index[:count], weights[:count]), out[:count])
    assert combine_ordered(rows, index[:0], weights[:0]).shape == (0, width)
    with pytest.raises(IndexError):
        combine_ordered(rows, torch.full((1, 4), 40), weights[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_presum(path: str, dtype: torch.dtype, is_sorted: bool) -> None:
    num_pairs = 50
    rows = rows_of(num_pairs + 3, 70, dtype)
    generator = torch.Generator().manual_seed(3)
    pair_row = torch.randint(-1, 9, (num_pairs,), generator=generator)
    pair_row[pair_row == 4] = 5  # row 4 has no pair
    weights = torch.rand(num_pairs, generator=generator)
    place = torch.randperm(num_pairs, generator=generator) if is_sorted else None
    places = list(range(num_pairs)) if place is None else place.tolist()
    out = presum(rows, pair_row, weights, 9, place)
    expected = reference.presum(rows, pair_row.tolist(), weights, 9, places)
    assert torch.equal(out, expected) and (out[4] == 0).all()
    none = torch.tensor([], dtype=torch.int64)
    assert torch.equal(presum(rows, none, weights[:0], 2), rows.new_zeros(2, 70))
    with pytest.raises(IndexError):
        presum(rows, pair_row, weights, 8, place)
    with pytest.raises(IndexError):
        presum(rows[:10], pair_row, weights, 9, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_presum_and_ordered_agree_when_one_shard_has_all(path: str, dtype: torch.dtype) -> None:
    rows = rows_of(12, 32, dtype)
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    index = torch.arange(12).view(3, 4)
    pair_row = torch.arange(3).repeat_interleave(4)
    assert torch.equal(
        presum(rows, pair_row, weights.flatten(), 3), combine_ordered(rows, index, weights)
    )


@needs_native
def test_the_ops_describe_themselves_truly() -> None:
    rows = torch.randn(6, 8)
    index = torch.tensor([[0, 5], [2, -1]])
    slots = torch.tensor([0, 2, 1])
    for op, args in (
        (torch.ops.remora.route_sort.default, (slots, 3)),
        (torch.ops.remora.gather_rows.default, (rows, slots)),
        (torch.ops.remora.combine_ordered.default, (rows, index, torch.rand(2, 2))),
        (torch.ops.remora.presum.default, (rows, slots, torch.rand(3), 4, None)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
