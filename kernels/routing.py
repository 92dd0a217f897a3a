"""Rows to slots and back: sorting routed pairs, gathering rows, combining expert outputs.

Shapes: T tokens, K top-k, N pairs (token, expert) or rows, M rows of a source, D model width, S
slots. A row's result depends on that row's own inputs only. Sums accumulate in float32, in the
order written down here, and are rounded once. Index -1 means "nothing here": the term is skipped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remora.kernels import native


class RouteSort(NamedTuple):
    """Pairs sorted by slot, stable. Pairs of slot -1 come last, behind `offsets_S1[S]`."""

    order_N: Tensor  # int64: sorted place -> pair
    place_N: Tensor  # int64: pair -> sorted place
    offsets_S1: Tensor  # int64 [S+1]: rows of slot s are offsets[s]..offsets[s+1]


def route_sort(slot_N: Tensor, num_slots: int) -> RouteSort:
    """Stable counting sort of pairs by slot.

    Args:
        slot_N: int64, slot of each pair, -1 for a pair that belongs to no slot.
        num_slots: S.

    Raises:
        IndexError: a slot outside -1..S-1.
    """
    if native.native_available():
        return RouteSort(*torch.ops.remora.route_sort(slot_N, num_slots))
    if slot_N.numel() and (int(slot_N.min()) < -1 or int(slot_N.max()) >= num_slots):
        raise IndexError(f"slots must be in -1..{num_slots - 1}, got {slot_N.tolist()}")
    key_N = torch.where(slot_N < 0, num_slots, slot_N)
    order_N = torch.sort(key_N, stable=True).indices
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(slot_N.numel())
    counts_S = torch.bincount(key_N, minlength=num_slots + 1)[:num_slots]
    offsets_S1 = torch.zeros(num_slots + 1, dtype=torch.int64)
    offsets_S1[1:] = torch.cumsum(counts_S, 0)
    return RouteSort(order_N, place_N, offsets_S1)


def gather_rows(rows_MD: Tensor, index_N: Tensor) -> Tensor:
    """out[n] = rows[index[n]], zeros where the index is -1.

    Args:
        rows_MD: bfloat16 or float32; rows may be strided.
        index_N: int64.

    Raises:
        IndexError: an index outside -1..M-1.
    """
    if native.native_available():
        out: Tensor = torch.ops.remora.gather_rows(rows_MD, index_N)
        return out
    _check_index(index_N, rows_MD.shape[0])
    skip_N1 = (index_N < 0)[:, None]
    if rows_MD.shape[0] == 0:
        return rows_MD.new_zeros(index_N.shape[0], rows_MD.shape[1])
    return rows_MD[index_N.clamp(min=0)].masked_fill_(skip_N1, 0)


def combine_ordered(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """out[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]: the `ordered` combine.

    Args:
        rows_ND: expert outputs, one row per (token, expert), in any order.
        index_TK: int64, row of each term; -1 skips the term (its weight is not read).
        weights_TK: bfloat16 or float32.

    Returns:
        [T, D] in the dtype of the rows; float32 accumulation, rounded once.

    Raises:
        IndexError: an index outside -1..N-1.
    """
    if native.native_available():
        out: Tensor = torch.ops.remora.combine_ordered(rows_ND, index_TK, weights_TK)
        return out
    _check_index(index_TK, rows_ND.shape[0])
    out_TD = torch.zeros(index_TK.shape[0], rows_ND.shape[1], dtype=torch.float32)
    for k in range(index_TK.shape[1]):
        weight_T1 = weights_TK[:, k, None].float().masked_fill(index_TK[:, k, None] < 0, 0)
        out_TD += weight_T1 * gather_rows(rows_ND, index_TK[:, k]).float()
    return out_TD.to(rows_ND.dtype)


def presum(
    rows_ND: Tensor,
    pair_row_N: Tensor,
    pair_weight_N: Tensor,
    num_rows: int,
    place_N: Tensor | None = None,
) -> Tensor:
    """A shard's `presummed` answer: out[pair_row[p]] += pair_weight[p] * rows[place[p]], in order.

    Args:
        rows_ND: expert outputs; row p belongs to pair p, or row place[p] where `place_N` is given
            (rows still sorted by slot: `RouteSort.place_N`).
        pair_row_N: int64, output row of each pair; -1 skips the pair.
        pair_weight_N: bfloat16 or float32.
        num_rows: output rows, T' of this shard; a row without pairs is zero.
        place_N: int64 or None.

    Returns:
        [num_rows, D] in the dtype of the rows; float32 accumulation in pair order, rounded once.

    Raises:
        IndexError: an output row or a place out of range.
    """
    if native.native_available():
        out: Tensor = torch.ops.remora.presum(rows_ND, pair_row_N, pair_weight_N, num_rows, place_N)
        return out
    _check_index(pair_row_N, num_rows)
    kept_N = (pair_row_N >= 0).nonzero()[:, 0]
    source_N = kept_N if place_N is None else place_N[kept_N]
    _check_index(source_N, rows_ND.shape[0])
    out_TD = torch.zeros(num_rows, rows_ND.shape[1], dtype=torch.float32)
    terms_ND = rows_ND[source_N].float() * pair_weight_N[kept_N, None].float()
    # index_add_ on the CPU goes through the pairs in order (one thread for two-dimensional rows).
    out_TD.index_add_(0, pair_row_N[kept_N], terms_ND)
    return out_TD.to(rows_ND.dtype)


def _check_index(index: Tensor, limit: int) -> None:
    if index.numel() and (int(index.min()) < -1 or int(index.max()) >= limit):
        low, high = int(index.min()), int(index.max())
        raise IndexError(f"indices must be in -1..{limit - 1}, got {low}..{high}")


def _fake_route_sort(slot_N: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(slot_N),
        torch.empty_like(slot_N),
        slot_N.new_empty(num_slots + 1),
    )


def _fake_gather_rows(rows_MD: Tensor, index_N: Tensor) -> Tensor:
    return rows_MD.new_empty((index_N.shape[0], rows_MD.shape[1]))


def _fake_combine_ordered(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return rows_ND.new_empty((index_TK.shape[0], rows_ND.shape[1]))


def _fake_presum(
    rows_ND: Tensor,
    pair_row_N: Tensor,
    pair_weight_N: Tensor,
    num_rows: int,
    place_N: Tensor | None,
) -> Tensor:
    return rows_ND.new_empty((num_rows, rows_ND.shape[1]))


if native.native_available():
    torch.library.register_fake("remora::route_sort", _fake_route_sort)
    torch.library.register_fake("remora::gather_rows", _fake_gather_rows)
    torch.library.register_fake("remora::combine_ordered", _fake_combine_ordered)
    torch.library.register_fake("remora::presum", _fake_presum)
