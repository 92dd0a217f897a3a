"""Routing on the device: sorting pairs by slot, cutting slots into tiles, summing pairs by row.

Nothing here waits for the device: grids follow from shapes that the host knows, and everything
else is computed and read where it lies, so a call can be captured in a CUDA graph. There are no
atomics: places are counted and sums run in pair order, so equal input gives equal bits.

Shapes: N pairs, C keys (slots or rows), M rows, D model width, S slots, B tiles. A key outside
0..C-1 (usually -1) belongs to nothing: its pair is sorted last, behind `offsets[C]`.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from remora.kernels.triton_runtime import cdiv, jit, power_of_two, tl

SORT_PAIRS_MAX: Final = 8192  # counting compares all pairs with all; beyond, torch sorts
_SORT_BLOCK: Final = 64
_SORT_SPAN: Final = 128
_TILES_BLOCK: Final = 32
_SUM_COLUMNS: Final = 512


class DeviceSort(NamedTuple):
    """Pairs sorted by key, stable."""

    order_N: Tensor  # int32: sorted place -> pair
    offsets_C1: Tensor  # int32 [C+1]: places of key c are offsets[c]..offsets[c+1]


class TileMap(NamedTuple):
    """Which rows each program of a grouped matrix product works on."""

    slot_B: Tensor  # int32: slot of the tile, -1 where the grid is larger than the work
    start_B: Tensor  # int32: first sorted place of the tile; it ends with its slot at the latest


@jit
def _sort_kernel(  # type: ignore[no-untyped-def]
    key_ptr,
    order_ptr,
    offsets_ptr,
    num_pairs,
    num_keys,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Each program places BLOCK pairs and counts BLOCK offsets, against all pairs."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + own, mask=own < num_pairs, other=-1).to(tl.int32)
    key = tl.where((key < 0) | (key > num_keys), num_keys, key)
    place = tl.zeros((BLOCK,), tl.int32)
    below = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, SPAN):
        other = start + tl.arange(0, SPAN)
        there = other < num_pairs
        other_key = tl.load(key_ptr + other, mask=there, other=-1).to(tl.int32)
        other_key = tl.where((other_key < 0) | (other_key > num_keys), num_keys, other_key)
        is_before = (other_key[None, :] < key[:, None]) | (
            (other_key[None, :] == key[:, None]) & (other[None, :] < own[:, None])
        )
        place += tl.sum((is_before & there[None, :]).to(tl.int32), axis=1)
        is_below = (other_key[None, :] < own[:, None]) & there[None, :]
        below += tl.sum(is_below.to(tl.int32), axis=1)
    tl.store(order_ptr + place, own, mask=own < num_pairs)
    tl.store(offsets_ptr + own, below, mask=own <= num_keys)


@jit
def _tile_map_kernel(  # type: ignore[no-untyped-def]
    offsets_ptr,
    slot_ptr,
    start_ptr,
    num_slots,
    num_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Each program names slot and first row of BLOCK tiles; SLOTS >= num_slots."""
    slot = tl.arange(0, SLOTS)
    start = tl.load(offsets_ptr + slot, mask=slot < num_slots, other=0)
    stop = tl.load(offsets_ptr + slot + 1, mask=slot < num_slots, other=0)
    tiles = (stop - start + TILE_ROWS - 1) // TILE_ROWS
    last = tl.cumsum(tiles, axis=0)  # one past the last tile of each slot
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_mine = (tile[:, None] < last[None, :]) & (tile[:, None] >= (last - tiles)[None, :])
    row = start[None, :] + (tile[:, None] - (last - tiles)[None, :]) * TILE_ROWS
    tile_slot = tl.sum(tl.where(is_mine, slot[None, :] + 1, 0), axis=1) - 1
    tl.store(slot_ptr + tile, tile_slot, mask=tile < num_tiles)
    tile_start = tl.sum(tl.where(is_mine, row, 0), axis=1)
    tl.store(start_ptr + tile, tile_start, mask=tile < num_tiles)


@jit
def _sum_pairs_kernel(  # type: ignore[no-untyped-def]
    pair_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    num_columns,
    BLOCK: tl.constexpr,
):
    """out[m] = sum over the pairs of row m, in pair order; one program a row and BLOCK columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)):
        pair = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(pair_ptr + pair * num_columns + column, mask=is_column, other=0.0)
    out = out_ptr + row.to(tl.int64) * num_columns + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_column)


def sort_pairs(key_N: Tensor, num_keys: int) -> DeviceSort:
    """Stable sort of pairs by key, on the device of `key_N`.

    Args:
        key_N: int32 or int64; outside 0..num_keys-1 a pair belongs to nothing.
        num_keys: C >= 1.
    """
    num_pairs = key_N.shape[0]
    if num_pairs > SORT_PAIRS_MAX:
        key_N = torch.where((key_N < 0) | (key_N > num_keys), num_keys, key_N)
        sorted_N, order_N = torch.sort(key_N, stable=True)
        limit_C1 = torch.arange(num_keys + 1, dtype=key_N.dtype, device=key_N.device)
        offsets_C1 = torch.searchsorted(sorted_N, limit_C1, out_int32=True)
        return DeviceSort(order_N.to(torch.int32), offsets_C1)
    order_N = torch.empty(num_pairs, dtype=torch.int32, device=key_N.device)
    offsets_C1 = torch.empty(num_keys + 1, dtype=torch.int32, device=key_N.device)
    grid = (cdiv(max(num_pairs, num_keys + 1), _SORT_BLOCK),)
    _sort_kernel[grid](
        key_N, order_N, offsets_C1, num_pairs, num_keys, BLOCK=_SORT_BLOCK, SPAN=_SORT_SPAN
    )
    return DeviceSort(order_N, offsets_C1)


def num_tiles_max(num_pairs: int, num_slots: int, tile_rows: int) -> int:
    """Tiles of `tile_rows` rows that N pairs over S slots can need, however they fall."""
    return min(num_pairs, num_pairs // tile_rows + num_slots)


def map_tiles(offsets_S1: Tensor, num_pairs: int, tile_rows: int) -> TileMap:
    """Cuts each slot's run of sorted pairs into tiles of `tile_rows` rows (the last is shorter).

    Args:
        offsets_S1: int32, of `sort_pairs`.
        num_pairs: N >= 1; with S it bounds the number of tiles.
        tile_rows: rows of a tile.
    """
    num_slots = offsets_S1.shape[0] - 1
    num_tiles = num_tiles_max(num_pairs, num_slots, tile_rows)
    slot_B = torch.empty(num_tiles, dtype=torch.int32, device=offsets_S1.device)
    start_B = torch.empty_like(slot_B)
    _tile_map_kernel[(cdiv(num_tiles, _TILES_BLOCK),)](
        offsets_S1,
        slot_B,
        start_B,
        num_slots,
        num_tiles,
        TILE_ROWS=tile_rows,
        BLOCK=_TILES_BLOCK,
        SLOTS=power_of_two(num_slots),
    )
    return TileMap(slot_B, start_B)


def sum_pairs(weighted_ND: Tensor, pair_row_N: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """out[m] = sum of the rows of `weighted_ND` whose pair belongs to row m, in pair order.

    Args:
        weighted_ND: float32, contiguous.
        pair_row_N: row of each pair; -1 leaves the pair out (its row is not read).
        num_rows: M.
        dtype: of the result; sums are float32 and rounded once.

    Returns:
        [M, D]; rows without pairs are zeros.
    """
    num_columns = weighted_ND.shape[1]
    out_MD = torch.empty(num_rows, num_columns, dtype=dtype, device=weighted_ND.device)
    if num_rows:
        by_row = sort_pairs(pair_row_N, num_rows)
        block = min(_SUM_COLUMNS, power_of_two(num_columns))
        grid = (num_rows, cdiv(num_columns, block))
        _sum_pairs_kernel[grid](
            weighted_ND, out_MD, by_row.order_N, by_row.offsets_C1, num_columns, BLOCK=block
        )
    return out_MD
