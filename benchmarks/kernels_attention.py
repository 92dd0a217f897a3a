"""Attention's rows and bars of kernels.py: decode over 2,048 tokens of context.

A case has as many layers of KV pages as fill the memory, gone through in turn as a model does, with
block tables in random order. Bytes are those of keys and values; they are held against
`stream_read` of a buffer beyond the caches, by the same threads in the same rounds.
"""

import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import common
import torch
from engines_report import Bar, Spread

from remora.kernels.attention import KVPages, attend, build_plan

PAGES_BYTES: Final = 192 << 20  # of all layers of a case
STREAM_BYTES: Final = 256 << 20
CONTEXT: Final = 2048
BATCHES: Final = (1, 8, 32)


class Heads(NamedTuple):
    """One attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int

    def nbytes(self, batch: int) -> int:
        """Bytes of keys and values that a step of `batch` sequences reads, in bfloat16."""
        return 2 * batch * CONTEXT * self.num_kv_heads * (self.k_dim + self.v_dim)


HEADS: Final = (
    Heads("small", 16, 4, 64, 64),
    Heads("tiny", 8, 4, 64, 64),
    Heads("32/8x128", 32, 8, 128, 128),
    Heads("mla", 16, 16, 192, 128),
)


def decode_case(heads: Heads, batch: int) -> Callable[[], object]:
    """One call: a layer of a decode step."""
    num_blocks = batch * CONTEXT // 16
    layers = []
    for _ in range(max(1, PAGES_BYTES // heads.nbytes(batch))):
        pages = KVPages.allocate(
            num_blocks, heads.num_kv_heads, heads.k_dim, heads.v_dim, torch.bfloat16
        )
        pages.k_NJWBE.normal_()
        pages.v_NJPDE.normal_()
        layers.append(pages)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order[s * CONTEXT // 16 : (s + 1) * CONTEXT // 16] for s in range(batch)]
    plan = build_plan([CONTEXT - 1] * batch, [1] * batch, tables, batch)
    q = torch.randn(1, heads.num_heads, batch, heads.k_dim).bfloat16()
    k = torch.randn(1, heads.num_kv_heads, batch, heads.k_dim).bfloat16()
    v = torch.randn(1, heads.num_kv_heads, batch, heads.v_dim).bfloat16()
    turns = itertools.cycle(layers)
    return lambda: attend(q, k, v, next(turns), plan, scale=heads.k_dim**-0.5)


def attention_rows(threads: int, rounds: int, sample_s: float) -> list[dict[str, Any]]:
    """One row a shape and batch; `of bandwidth`: the share of what was measured beside it."""
    torch.set_num_threads(threads)
    stream = torch.ones(STREAM_BYTES // 8, dtype=torch.int64)
    rows = []
    for heads, batch in itertools.product(HEADS, BATCHES):
        seconds = common.alternate(
            {
                "stream": lambda: torch.ops.remora.stream_read(stream),
                "decode": decode_case(heads, batch),
            },
            rounds=rounds,
            sample_s=sample_s,
        )
        nbytes = heads.nbytes(batch)
        bandwidth = [STREAM_BYTES / s for s in seconds["stream"]]
        reached = [nbytes / s for s in seconds["decode"]]
        rows.append(
            {
                "kind": "attention decode",
                "shape": heads.name,
                "threads": threads,
                "rows": batch,
                "us": Spread.of([s * 1e6 for s in seconds["decode"]]),
                "GB/s": Spread.of([r / 1e9 for r in reached]),
                "of bandwidth": common.per_round(reached, bandwidth),
            }
        )
    return rows


def attention_bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """`attention_decode_bandwidth`: the worst shape and batch of the largest team measured."""
    mine = [row for row in rows if row["kind"] == "attention decode"]
    if not mine:
        return []
    most = max(row["threads"] for row in mine)
    worst = min(
        (row["of bandwidth"] for row in mine if row["threads"] == most), key=lambda s: s.median
    )
    return [Bar("attention_decode_bandwidth", worst, "x", ">=", 0.6)]
