"""Slices of rows in an order: a reduce-scatter has the bits of the sum, a gather puts rows back."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tp_engine import gloo_groups, shared_groups, together
from torch import Tensor

from remora.comm.collectives import DryGroup, part_of
from remora.comm.slices import gather_slices, sum_slice
from remora.kernels.native import native_available

KINDS = ["shared", "gloo"] if native_available() else ["gloo"]
CAPACITY = 320  # bytes: everything of some size goes in pieces


@functools.cache
def kept_groups(kind: str, size: int) -> list[Any]:
    """Groups that examples share, as steps of an engine do."""
    return gloo_groups(size) if kind == "gloo" else shared_groups(size, capacity=CAPACITY)


def a_group(kind: str, size: int) -> list[Any]:
    return gloo_groups(size) if kind == "gloo" else shared_groups(size)


def shuffled(rows: int, named: int, seed: int) -> Tensor:
    """An order of `named` of the rows."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:named]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    size=st.sampled_from([2, 3, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(0, 9),
    width=st.integers(1, 200),
    seed=st.integers(0, 99),
    left_out=st.integers(0, 2),
)
def test_a_slice_of_the_sum_has_the_bits_of_the_sum(
    kind: str, size: int, dtype: torch.dtype, rows: int, width: int, seed: int, left_out: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (torch.randn((rows, width), generator=generator) * 10.0**rank).to(dtype)
        for rank in range(size)
    ]
    order = shuffled(rows, max(0, rows - left_out), seed)
    groups = kept_groups(kind, size)

    def both(group: Any) -> tuple[Tensor, Tensor, Tensor]:
        total = group.sum(parts[group.rank])
        mine = sum_slice(parts[group.rank], order, group)
        return total, mine, gather_slices(mine, order, rows, group)

    for rank, (total, mine, whole) in enumerate(
        together([functools.partial(both, group) for group in groups])
    ):
        begin, end = part_of(rank, size, len(order))
        assert torch.equal(mine, total[order[begin:end]])
        assert torch.equal(whole[order], total[order])
        missing = sorted(set(range(rows)) - set(order.tolist()))
        assert not whole[missing].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", ["sum", "gather"])
def test_ranks_of_another_order_do_not_mix_rows_up(kind: str, operation: str) -> None:
    groups = a_group(kind, 2)
    orders = [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 3])]

    def call(group: Any) -> str:
        try:
            if operation == "sum":
                sum_slice(torch.ones(4, 8), orders[group.rank], group)
            else:
                gather_slices(torch.ones(2, 8), orders[group.rank], 4, group)
        except RuntimeError as error:
            return str(error)
        return "no error"

    errors = together([functools.partial(call, group) for group in groups])
    assert all("do not agree" in error or "abort" in error for error in errors), errors
    for group in groups:
        group.close()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_by_operation_and_direction(kind: str) -> None:
    """8 rows of 64 bytes on 2 ranks: a sum moves all rows, a slice of it half of them."""
    groups = a_group(kind, 2)
    order = torch.randperm(8)

    def call(group: Any) -> dict[str, dict[str, int]]:
        group.sum(torch.ones(8, 16))
        mine = sum_slice(torch.ones(8, 16), order, group)
        gather_slices(mine, order, 8, group)
        group.gather_rows(mine, 8)
        found: dict[str, dict[str, int]] = group.counters()
        return found

    head = 8 if kind == "gloo" else 0  # the digest of the order

    def moved(num_bytes: int) -> dict[str, int]:
        return {"calls": 1, "sent_bytes": num_bytes, "received_bytes": num_bytes}

    for counters in together([functools.partial(call, group) for group in groups]):
        assert counters == {
            "sum": moved(512),
            "gather_rows": moved(256),
            "sum_slice": moved(256 + head),
            "gather_slices": moved(256 + head),
        }
    for group in groups:
        group.close()


def test_a_dry_group_gives_shapes() -> None:
    group = DryGroup(1, 4)
    order = torch.arange(8)
    assert sum_slice(torch.ones(8, 3), order, group).shape == (2, 3)
    assert gather_slices(torch.ones(2, 3), order, 8, group).shape == (8, 3)
    assert group.counters() == {}
    group.close()
