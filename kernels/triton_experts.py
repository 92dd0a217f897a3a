"""The two grouped matrix products of an expert layer, in Triton.

`up`: rows gathered by index times the up projection of their slot, bias and gate fused.
`down`: the result times the down projection, bias and the router's weight fused; each pair's
row goes to the pair's own place, so what follows reads no permutation.

A program computes one tile of rows of one slot and one block of columns. An output element is
accumulated in float32 over k in blocks, from the first to the last, by one program: with one fixed
`Tiles` its bits depend on its own row and weights alone. Nothing is autotuned: tiles come from the
table below by the mean number of rows of a slot (`fast`) or are always the same (`exact`).

Shapes: M rows, N pairs in slot order, D model width, I expert width, O outputs, K inputs, S slots.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from remora.kernels.gates import SILU, Gate
from remora.kernels.triton_routing import TileMap
from remora.kernels.triton_runtime import cdiv, jit, tl


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Block sizes of one launch, and how Triton is to compile it."""

    rows: int
    columns: int
    inputs_nbytes: int  # of one block of k: twice as many bfloat16 as float32
    num_warps: int
    num_stages: int


EXACT_TILES: Final = Tiles(rows=64, columns=64, inputs_nbytes=128, num_warps=4, num_stages=3)
# float32 is multiplied without tensor cores: larger tiles spill registers (docs/gpu.md).
FLOAT32_TILES: Final = Tiles(rows=32, columns=64, inputs_nbytes=128, num_warps=4, num_stages=3)
# (mean rows of a slot up to which, tiles); chosen by arithmetic, not yet by measurement: see
# docs/gpu.md. Few rows: the weights' bytes decide, so long blocks of k; many: large squares.
FAST_TILES: Final = (
    (16.0, Tiles(rows=16, columns=64, inputs_nbytes=256, num_warps=4, num_stages=3)),
    (48.0, Tiles(rows=32, columns=64, inputs_nbytes=128, num_warps=4, num_stages=3)),
    (96.0, EXACT_TILES),
    (float("inf"), Tiles(rows=128, columns=64, inputs_nbytes=128, num_warps=8, num_stages=3)),
)


def choose_tiles(num_pairs: int, num_slots: int, dtype: torch.dtype, *, exact: bool) -> Tiles:
    """Tiles for N pairs over S slots: a function of these numbers, never of a timing."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    if exact:
        return EXACT_TILES
    return next(tiles for limit, tiles in FAST_TILES if num_pairs / num_slots <= limit)


@jit
def _activate(x, alpha, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation in float32; sigmoids by exp, which keeps their relative precision."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-alpha * x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2z))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive
    else:
        return tl.where(x < 0.0, 0.0, x)


@jit
def _up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, hidden_ptr,
    order_ptr, pair_row_ptr, offsets_ptr, tile_slot_ptr, tile_start_ptr,
    x_stride, num_inputs, num_columns, up_step, alpha, gate_max, up_max, act_max, up_shift,
    IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """hidden[place] = gate(x[row of the pair] W_slot^T + b); gated weights: gate rows, then up."""
    tile = tl.program_id(0)
    slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    place = tl.load(tile_start_ptr + tile) + tl.arange(0, ROWS)
    is_place = place < tl.load(offsets_ptr + slot + 1)
    pair = tl.load(order_ptr + place, mask=is_place, other=0)
    row = tl.load(pair_row_ptr + pair, mask=is_place, other=-1).to(tl.int64)
    is_row = (row >= 0)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    rows_per_slot = num_columns * 2 if IS_GATED else num_columns
    first = slot * rows_per_slot + column
    k = tl.arange(0, INPUTS)
    x = x_ptr + row[:, None] * x_stride + k[None, :]
    weight = weight_ptr + first[None, :] * num_inputs + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, num_inputs, INPUTS):
        is_k = k < num_inputs - done
        block = tl.load(x + done, mask=is_row & is_k[None, :], other=0.0)
        is_weight = is_k[:, None] & is_column[None, :]
        w = tl.load(weight + done, mask=is_weight, other=0.0).to(block.dtype)
        total = tl.dot(block, w, total, input_precision="ieee")
        if IS_GATED:
            w_up = tl.load(weight + up_step + done, mask=is_weight, other=0.0).to(block.dtype)
            total_up = tl.dot(block, w_up, total_up, input_precision="ieee")
    if HAS_SCALE:
        total *= tl.load(scale_ptr + first, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + first, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        if HAS_SCALE:
            scale = tl.load(scale_ptr + first + num_columns, mask=is_column, other=0.0)
            total_up *= scale[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first + num_columns, mask=is_column, other=0.0)
            total_up += bias.to(tl.float32)[None, :]
        if HAS_LIMIT:
            total_up = tl.where(total_up > up_max, up_max, total_up)
            total_up = tl.where(total_up < -up_max, -up_max, total_up)
    if HAS_LIMIT:  # comparisons, not minimum: a NaN stays one
        total = tl.where(total > gate_max, gate_max, total)
    if ACTIVATION != "none":
        total = _activate(total, alpha, ACTIVATION)
    if HAS_LIMIT:
        total = tl.where(total > act_max, act_max, total)
    if IS_GATED:
        total *= total_up + up_shift
    hidden = hidden_ptr + place.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(
        hidden,
        total.to(hidden_ptr.dtype.element_ty),
        mask=is_place[:, None] & is_column[None, :],
    )


@jit
def _down_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    pair_weight_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    num_inputs,
    num_columns,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """out[pair] = (hidden[place] W_slot^T + b) * weight of the pair."""
    tile = tl.program_id(0)
    slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    place = tl.load(tile_start_ptr + tile) + tl.arange(0, ROWS)
    is_place = place < tl.load(offsets_ptr + slot + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    first = slot * num_columns + column
    k = tl.arange(0, INPUTS)
    hidden = hidden_ptr + place.to(tl.int64)[:, None] * num_inputs + k[None, :]
    weight = weight_ptr + first[None, :] * num_inputs + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for done in range(0, num_inputs, INPUTS):
        is_k = k < num_inputs - done
        block = tl.load(hidden + done, mask=is_place[:, None] & is_k[None, :], other=0.0)
        w = tl.load(weight + done, mask=is_k[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(block, w.to(block.dtype), total, input_precision="ieee")
    if HAS_SCALE:
        total *= tl.load(scale_ptr + first, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + first, mask=is_column, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order_ptr + place, mask=is_place, other=0).to(tl.int64)
    if HAS_WEIGHT:
        pair_weight = tl.load(pair_weight_ptr + pair, mask=is_place, other=0.0)
        total *= pair_weight.to(tl.float32)[:, None]
    out = out_ptr + pair[:, None] * num_columns + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_place[:, None] & is_column[None, :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Weights of one projection of all slots, as the kernels read them."""

    weight_SOK: Tensor  # contiguous; bfloat16, float16, float32, or int8 with a scale
    scale_SO: Tensor | None  # float32: weight = int8 * scale
    bias_SO: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        parts = (self.weight_SOK, self.scale_SO, self.bias_SO)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """What both products read about the pairs of one call; all of it on the device."""

    order_N: Tensor  # int32: place in slot order -> pair
    offsets_S1: Tensor  # int32
    pair_row_N: Tensor  # int32 or int64; -1: a row of zeros
    tile_map: TileMap


def up(
    x_MD: Tensor, projection: Projection, routing: Routing, gate: Gate | None, tiles: Tiles
) -> Tensor:
    """Gated up projection of the pairs in slot order.

    Args:
        x_MD: bfloat16, float16 or float32; the last dimension is contiguous.
        projection: [S, U, D]; with a gate the I gate rows first, then the I up rows, whatever the
            model's own order (`gate.layout` says only whether there is a gate).
        routing: pairs in slot order, cut into tiles of `tiles.rows`.
        gate: None: no gate and no activation, all U columns as they are.
        tiles: block sizes.

    Returns:
        [N, I], or [N, U] without a gate, in the dtype of `x_MD`; rows of pairs that belong to no
        slot are whatever the memory held.
    """
    _, num_outputs, num_inputs = projection.weight_SOK.shape
    is_gated = gate is not None and gate.columns == 2
    num_columns = num_outputs // 2 if is_gated else num_outputs
    num_pairs = routing.order_N.shape[0]
    hidden_NI = torch.empty(num_pairs, num_columns, dtype=x_MD.dtype, device=x_MD.device)
    grid = (routing.tile_map.slot_B.shape[0], cdiv(num_columns, tiles.columns))
    form = gate or SILU
    _up_kernel[grid](
        x_MD,
        projection.weight_SOK,
        projection.scale_SO,
        projection.bias_SO,
        hidden_NI,
        routing.order_N,
        routing.pair_row_N,
        routing.offsets_S1,
        routing.tile_map.slot_B,
        routing.tile_map.start_B,
        x_MD.stride(0),
        num_inputs,
        num_columns,
        num_columns * num_inputs,
        *form.numbers,
        IS_GATED=is_gated,
        ACTIVATION="none" if gate is None else gate.activation,
        HAS_LIMIT=min(form.gate_max, form.up_max, form.act_max) < math.inf,
        HAS_SCALE=projection.scale_SO is not None,
        HAS_BIAS=projection.bias_SO is not None,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INPUTS=tiles.inputs_nbytes // x_MD.element_size(),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return hidden_NI


def down(
    hidden_NI: Tensor,
    projection: Projection,
    routing: Routing,
    tiles: Tiles,
    pair_weight_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Down projection of the pairs: row n of the result is that of pair n, not of place n.

    Args:
        hidden_NI: of `up`, contiguous.
        projection: [S, D, I].
        routing: the same as `up` was given.
        tiles: block sizes.
        pair_weight_N: the router's weights, in which the rows are multiplied; None: not.
        dtype: of the result.

    Returns:
        [N, D]; rows of pairs that belong to no slot are zeros.
    """
    _, num_columns, num_inputs = projection.weight_SOK.shape
    num_pairs = routing.order_N.shape[0]
    out_ND = torch.zeros(num_pairs, num_columns, dtype=dtype, device=hidden_NI.device)
    grid = (routing.tile_map.slot_B.shape[0], cdiv(num_columns, tiles.columns))
    _down_kernel[grid](
        hidden_NI,
        projection.weight_SOK,
        projection.scale_SO,
        projection.bias_SO,
        pair_weight_N,
        out_ND,
        routing.order_N,
        routing.offsets_S1,
        routing.tile_map.slot_B,
        routing.tile_map.start_B,
        num_inputs,
        num_columns,
        HAS_SCALE=projection.scale_SO is not None,
        HAS_BIAS=projection.bias_SO is not None,
        HAS_WEIGHT=pair_weight_N is not None,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INPUTS=tiles.inputs_nbytes // hidden_NI.element_size(),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out_ND
