"""Attention's rows and bars of kernels.py: decode over 2,048 tokens of context, and prompts.

Decode: a shape has one pool of KV pages, far more than it gives to one call, gone through in turn
as a model goes through its layers, with block tables in random order. Bytes are those of keys and
values; they are held against `stream_read` of a buffer beyond the caches, by the same threads in
the same rounds. Caches may be large (480 MiB in one Xeon, shared with other tenants): so the pool
and the buffer are together larger than that.

Prefill: a prompt, and a chunk behind a context that is in the pages, against torch's own attention
(`scaled_dot_product_attention`) on contiguous keys and values, repeated for every query head before
the clock starts. Ours pays for writing the pages and reads them through a table; it is that of
`fast` numerics, which may use AMX, and `exact us` is the other's.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import common
import torch
from engines_report import Bar, Spread
from torch import Tensor

from remora.kernels.attention import KVPages, attend, build_plan
from remora.kernels.memory import huge_zeros

PAGES_BYTES: Final = 512 << 20  # of all layers of a shape
STREAM_BYTES: Final = 1 << 30
CONTEXT: Final = 2048
BATCHES: Final = (1, 8, 32)
PROMPTS: Final = ((0, 512), (1536, 512), (0, 2048))  # tokens in the pages before, and new ones


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

    def pages(self, num_blocks: int) -> KVPages:
        """Written pages, so that they have memory of their own."""
        pages = KVPages.allocate(
            num_blocks, self.num_kv_heads, self.k_dim, self.v_dim, torch.bfloat16
        )
        some = torch.randn(self.num_kv_heads, 1 << 15).bfloat16()  # drawing all takes seconds
        for part in (pages.k_NJWBE, pages.v_NJPDE):
            part.copy_(some[:, : part[0, 0].numel()].view(part.shape[1:]))
        return pages

    def rows(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of new tokens, [1, heads, tokens, d]."""
        return (
            torch.randn(1, self.num_heads, num_tokens, self.k_dim).bfloat16(),
            torch.randn(1, self.num_kv_heads, num_tokens, self.k_dim).bfloat16(),
            torch.randn(1, self.num_kv_heads, num_tokens, self.v_dim).bfloat16(),
        )


HEADS: Final = (
    Heads("small", 16, 4, 64, 64),
    Heads("tiny", 8, 4, 64, 64),
    Heads("32/8x128", 32, 8, 128, 128),
    Heads("mla", 16, 16, 192, 128),
)


def layers_of(pages: KVPages, num_blocks: int) -> Iterator[KVPages]:
    """The pool as layers of `num_blocks`, one after the other, for ever."""
    return itertools.cycle(
        KVPages(
            k_NJWBE=pages.k_NJWBE[first : first + num_blocks],
            v_NJPDE=pages.v_NJPDE[first : first + num_blocks],
            k_dim=pages.k_dim,
            v_dim=pages.v_dim,
        )
        for first in range(0, pages.num_blocks - num_blocks + 1, num_blocks)
    )


def decode_case(heads: Heads, pages: KVPages, batch: int) -> Callable[[], object]:
    """One call: a layer of a decode step."""
    num_blocks = batch * CONTEXT // 16
    turns = layers_of(pages, num_blocks)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order[s * CONTEXT // 16 : (s + 1) * CONTEXT // 16] for s in range(batch)]
    plan = build_plan([CONTEXT - 1] * batch, [1] * batch, tables, batch)
    q, k, v = heads.rows(batch)
    return lambda: attend(q, k, v, next(turns), plan, scale=heads.k_dim**-0.5)


def decode_rows(threads: int, rounds: int, sample_s: float) -> Iterator[dict[str, Any]]:
    """One row a shape and batch; `of bandwidth`: the share of what was measured beside it."""
    stream = huge_zeros(STREAM_BYTES // 8, dtype=torch.int64).fill_(1)
    for heads in HEADS:
        # A step of the largest batch may be more than that.
        nbytes = max(PAGES_BYTES, heads.nbytes(BATCHES[-1]))
        pages = heads.pages(nbytes // heads.nbytes(1) * CONTEXT // 16)
        for batch in BATCHES:
            cases = {
                "stream": lambda: torch.ops.remora.stream_read(stream),
                "decode": decode_case(heads, pages, batch),
            }
            seconds = common.alternate(cases, rounds=rounds, sample_s=sample_s)
            reached = [heads.nbytes(batch) / s for s in seconds["decode"]]
            yield {
                "kind": "attention decode",
                "shape": heads.name,
                "threads": threads,
                "rows": batch,
                "us": Spread.of([s * 1e6 for s in seconds["decode"]]),
                "GB/s": Spread.of([r / 1e9 for r in reached]),
                "of bandwidth": common.per_round(
                    reached, [STREAM_BYTES / s for s in seconds["stream"]]
                ),
            }


def prefill_rows(threads: int, rounds: int, sample_s: float) -> Iterator[dict[str, Any]]:
    """One row a shape and prompt; `vs torch`: its time over ours."""
    for heads, (start, length) in itertools.product(HEADS, PROMPTS):
        end, scale = start + length, heads.k_dim**-0.5
        q, k, v = heads.rows(end)
        pages = heads.pages(end // 16)
        table = torch.randperm(end // 16, generator=torch.Generator().manual_seed(1)).tolist()
        attend(q, k, v, pages, build_plan([0], [end], [table], end), scale=scale)
        plan = build_plan([start], [length], [table], length)
        new = tuple(x[:, :, start:].contiguous() for x in (q, k, v))
        group = heads.num_heads // heads.num_kv_heads
        all_k, all_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        seen = None if start == 0 else torch.ones(length, end).tril(start).bool()

        def ours(
            new: Any = new,
            pages: Any = pages,
            plan: Any = plan,
            scale: Any = scale,
            exact: bool = False,
        ) -> Any:
            return attend(*new, pages, plan, scale=scale, exact=exact)

        def torchs(
            q: Any = new[0], k: Any = all_k, v: Any = all_v, seen: Any = seen, scale: Any = scale
        ) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale
            )

        torch.testing.assert_close(ours().transpose(1, 2), torchs(), rtol=3e-2, atol=3e-2)
        seconds = common.alternate(
            {"ours": ours, "exact": lambda ours=ours: ours(exact=True), "torch": torchs},
            rounds=rounds,
            sample_s=sample_s,
        )
        macs = heads.num_heads * (heads.k_dim + heads.v_dim) * length * (start + (length + 1) / 2)
        yield {
            "kind": "attention prefill",
            "shape": heads.name,
            "threads": threads,
            "rows": length,
            "context": end,
            "us": Spread.of([s * 1e6 for s in seconds["ours"]]),
            "GMAC/s": Spread.of([macs / s / 1e9 for s in seconds["ours"]]),
            "exact us": Spread.of([s * 1e6 for s in seconds["exact"]]),
            "torch us": Spread.of([s * 1e6 for s in seconds["torch"]]),
            "vs torch": common.per_round(seconds["torch"], seconds["ours"]),
        }


def attention_rows(threads: int, rounds: int, sample_s: float) -> list[dict[str, Any]]:
    """All rows of a number of threads."""
    torch.set_num_threads(threads)
    return [
        *decode_rows(threads, rounds, sample_s),
        *prefill_rows(threads, rounds, sample_s),
    ]


def attention_bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """`attention_decode_bandwidth`: the worst shape and batch of the largest team measured."""
    mine = [row for row in rows if row["kind"] == "attention decode"]
    if not mine:
        return []
    most = max(row["threads"] for row in mine)
    worst = min(
        (row["of bandwidth"] for row in mine if row["threads"] == most), key=lambda s: s.median
    )
    return [Bar(name="attention_decode_bandwidth", value=worst, unit="x", op=">=", target=0.6)]
