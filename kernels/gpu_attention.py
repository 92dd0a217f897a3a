"""Paged causal attention on a GPU: how a step is cut into programs, and the call.

The counterpart of `paged_attention` of `remora.kernels.attention`, with the same rules. Nothing is
autotuned and nothing waits for the device.

Shapes: T token rows of a step (padding included), S sequences, M blocks of the longest table, B
tiles, R rows of a tile, P spans, H query heads, J key/value heads, N blocks of the pool, d width.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from remora.kernels import triton_attention as kernels
from remora.kernels.attention import BLOCK_SIZE
from remora.kernels.attention_torch import Rules
from remora.kernels.gpu_pages import GpuKVPages, GpuPlan, Tiles, dense_rows
from remora.kernels.triton_runtime import cdiv, power_of_two

SPAN: Final = 512  # keys of a span: how a long context is split
_SHORT_ROWS: Final = 16  # the fewest rows that a tensor core takes
_LONG_ROWS: Final = 64  # and of every tile in `exact`
_MERGE_COLUMNS: Final = 64
# What the spans of a launch leave for the merge. Beyond (at v_dim 128: 32,000 programs in `fast`)
# there are programs enough without splitting, and 64 sequences of 32,768 keys with the 128 heads
# of expanded MLA would take 4.3 GiB that no budget knows of.
SCRATCH_BYTES_MAX: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Block sizes of one launch, and how Triton is to compile it."""

    heads: int  # query heads of a tile, a power of two
    tokens: int  # a tile has heads * tokens rows
    keys: int  # of one product
    num_warps: int
    is_exact: bool  # no product and sum are fused: both ways to merge spans round alike

    @classmethod
    def of(cls, pages: GpuKVPages, num_heads: int, *, short: bool, exact: bool) -> "Cut":
        """For one kind of sequences: a function of these shapes, never of a timing."""
        rows = _LONG_ROWS if exact or not short else _SHORT_ROWS
        if pages.dtype == torch.float32:
            rows = _SHORT_ROWS  # multiplied without tensor cores: more rows spill registers
        heads = min(power_of_two(num_heads // pages.num_kv_heads), rows)
        widest = max(power_of_two(pages.k_dim), power_of_two(pages.v_dim))
        return cls(
            heads=heads,
            tokens=rows // heads,
            keys=32 if widest * pages.dtype.itemsize > 256 else 64,
            num_warps=8 if rows * widest > 64 * 128 else 4,
            is_exact=exact,
        )


class _Scratch(NamedTuple):
    """What the programs of one tile leave for the merge, P spans each."""

    part: Tensor  # float32 [B, J * parts, P, R, v_dim]
    weight: Tensor  # float32 [B, J * parts, P, R]
    maximum: Tensor  # float32 [B, J * parts, P, R]

    @classmethod
    def of(cls, shape: tuple[int, ...], v_dim: int, device: torch.device) -> "_Scratch":
        weight = torch.empty(shape, dtype=torch.float32, device=device)
        part = torch.empty((*shape, v_dim), dtype=torch.float32, device=device)
        return cls(part, weight, torch.empty_like(weight))


def spans_apart(num_units: int, cut: Cut, v_dim: int, num_keys: int) -> int:
    """Programs that share a tile of short sequences, one a span; 1: it is walked by one.

    A function of shapes alone. In `exact` both ways give the same bits.

    Args:
        num_units: tiles times the parts of the key/value heads.
        cut: block sizes.
        v_dim: width of a value.
        num_keys: of the longest context.
    """
    num_spans = cdiv(num_keys, SPAN)
    nbytes = 4 * num_units * num_spans * cut.heads * cut.tokens * (v_dim + 2)  # of `_Scratch`
    return num_spans if nbytes <= SCRATCH_BYTES_MAX else 1


def _constants(
    pages: GpuKVPages, cut: Cut, rules: Rules, group: int, has_sinks: bool
) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "HAS_SINKS": has_sinks,
        "HAS_WINDOW": rules.window > 0,
        "HAS_CHUNK": rules.chunk > 0,
        "GROUP": group,
        "HEADS": cut.heads,
        "TOKENS": cut.tokens,
        "V_DIM": pages.v_dim,
        "SPAN": SPAN,
        "num_warps": cut.num_warps,
        "enable_fp_fusion": not cut.is_exact,
    }


def _launch(
    out_THd: Tensor,
    q_THd: Tensor,
    pages: GpuKVPages,
    plan: GpuPlan,
    tiles: Tiles,
    cut: Cut,
    rules: Rules,
    sinks_H: Tensor | None,
    num_spans: int,
) -> None:
    """Fills the rows of `out_THd` that the tiles name.

    `num_spans` 1: a program walks all spans of its tile; more: one program a span (as many as the
    longest context has), and a second launch merges them.
    """
    assert SPAN % cut.keys == 0, f"a product of {cut.keys} keys would leave its span of {SPAN}"
    num_heads, group = q_THd.shape[1], q_THd.shape[1] // pages.num_kv_heads
    units = (tiles.seq_B.shape[0], pages.num_kv_heads * cdiv(group, cut.heads))
    scratch: _Scratch | tuple[None, None, None] = (None, None, None)
    if num_spans > 1:
        shape = (*units, num_spans, cut.heads * cut.tokens)
        scratch = _Scratch.of(shape, pages.v_dim, q_THd.device)
    where = (tiles.seq_B, tiles.first_B, plan.start_S, plan.query_start_S1)
    shared = _constants(pages, cut, rules, group, sinks_H is not None)
    kernels.attend_kernel[(*units, num_spans)](
        q_THd,
        pages.k_NJBd,
        pages.v_NJBd,
        sinks_H,
        out_THd,
        *scratch,
        *where,
        plan.block_table_SM,
        q_THd.stride(0),
        q_THd.stride(1),
        plan.block_table_SM.stride(0),
        num_heads,
        pages.num_kv_heads,
        num_spans,
        rules.scale,
        rules.window,
        rules.chunk,
        rules.soft_cap,
        HAS_CAP=rules.soft_cap > 0,
        IS_SPLIT=num_spans > 1,
        K_DIM=pages.k_dim,
        K_WIDTH=max(16, power_of_two(pages.k_dim)),
        V_WIDTH=max(16, power_of_two(pages.v_dim)),
        KEYS=cut.keys,
        PAGE=BLOCK_SIZE,
        num_stages=2,
        **shared,
    )
    if num_spans > 1:
        columns = min(_MERGE_COLUMNS, power_of_two(pages.v_dim))
        kernels.merge_kernel[(*units, cdiv(pages.v_dim, columns))](
            sinks_H,
            out_THd,
            *scratch,
            *where,
            num_heads,
            num_spans,
            rules.window,
            rules.chunk,
            COLUMNS=columns,
            **shared,
        )


def gpu_attend(
    q_THd: Tensor,
    pages: GpuKVPages,
    plan: GpuPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Causal attention of the step's rows over their sequences' pages -> [T, H, v_dim].

    Rules as in `remora.kernels.attention.paged_attention`. The step's own keys and values must have
    been written (`gpu_write_kv`).

    Args:
        q_THd: [T, H, k_dim] in the pages' dtype; the last dimension is contiguous.
        pages: of one layer.
        plan: of the step, on the device of the pages.
        scale: scores are q.k * scale.
        sliding_window: keys j > i - window are seen; None: all.
        attention_chunk: keys of the query's own chunk are seen; None: all.
        soft_cap: soft_cap * tanh(score / soft_cap); None: as they are.
        sinks_H: one logit a head that joins the softmax denominator only.
        exact: one fixed cut: a row's bits depend on its sequence alone, in prefill and decode.

    Returns:
        [T, H, v_dim]; padding rows are zeros.

    Raises:
        ValueError: shapes, dtypes or block ids that do not fit.
    """
    num_heads = q_THd.shape[1]
    if q_THd.shape[0] != plan.host.num_rows or q_THd.shape[2] != pages.k_dim:
        raise ValueError(
            f"queries {tuple(q_THd.shape)}: expected ({plan.host.num_rows}, H, {pages.k_dim})"
        )
    if num_heads % pages.num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads over {pages.num_kv_heads} key/value heads")
    if q_THd.dtype != pages.dtype:
        raise ValueError(f"queries {q_THd.dtype}: the pages hold {pages.dtype}")
    if sinks_H is not None and tuple(sinks_H.shape) != (num_heads,):
        raise ValueError(f"sinks {tuple(sinks_H.shape)}: expected ({num_heads},)")
    plan.check(pages)
    out_THd = q_THd.new_zeros((plan.host.num_rows, num_heads, pages.v_dim))
    rules = Rules(
        scale=scale,
        window=sliding_window or 0,
        chunk=attention_chunk or 0,
        soft_cap=soft_cap or 0.0,
    )
    q_THd = dense_rows(q_THd)
    for short in (True, False):
        cut = Cut.of(pages, num_heads, short=short, exact=exact)
        tiles = plan.tiles_of(cut.tokens, short=short)
        if tiles is not None:
            num_spans = 1
            if short:
                parts = cdiv(num_heads // pages.num_kv_heads, cut.heads)
                num_units = tiles.seq_B.shape[0] * pages.num_kv_heads * parts
                num_spans = spans_apart(num_units, cut, pages.v_dim, tiles.num_keys)
            _launch(out_THd, q_THd, pages, plan, tiles, cut, rules, sinks_H, num_spans)
    return out_THd
