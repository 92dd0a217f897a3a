"""Paged causal attention over per-layer key/value pages, and the metadata of one step.

Shape suffixes: T token rows of a step (padding included), S sequences of the step, M blocks of the
longest table, H query heads, J key/value heads, G = H/J query heads that share one, N blocks of the
pool, W 32-bit words of a key (two bfloat16 or one float32 each), E elements of a word, d width.

Every (token, head) is computed over absolute chunks of 64 keys, and absolute spans of 256 keys are
merged in ascending order, so its bits do not depend on what else is in the step, on how a prompt
was cut, on prefill or decode, on the number of threads, or on how they share a context. Method:
online softmax (Milakov & Gimelshein 2018) over paged keys (Kwon et al. 2023), long contexts split
and merged (Flash-Decoding, Dao et al. 2023), with fixed cuts. Only `exact=False` gives that up, for
prompts on AMX.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.kernels.attention_torch import BLOCK_SIZE, Rules, attention_torch, write_torch
from remora.kernels.memory import huge_zeros
from remora.kernels.native import native_available
from remora.kernels.page_pair import PagePair, check_pages

__all__ = [
    "BLOCK_SIZE",
    "PAD_SLOT",
    "AttentionPlan",
    "KVPages",
    "attend",
    "build_plan",
    "paged_attention",
    "write_kv",
]

PAD_SLOT = -1  # slot of a padding row: nothing is written

_ISA_MAX = 3  # of the C++ path: avx512_bf16; tests lower it down to 0, portable
_ISA_MAX_FAST = 4  # the same in `fast`: amx_bf16; 5, in tests: tiles emulated on any machine
_PLAN_HEAD = 5  # numbers before the arrays of `AttentionPlan.packed`
_WORD_ELEMENTS = {torch.bfloat16: 2, torch.float32: 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVPages(PagePair):
    """Keys and values of one layer. The layout is private to this file and the C++ kernel.

    A key is cut into 32-bit words and the sixteen keys of a block lie side by side, a value's words
    pair neighbouring keys: both products of attention are then vector x broadcast word. Of a block
    and head, keys and values lie side by side in memory: both tensors are views of one.
    """

    k_NJWBE: Tensor  # [N, J, ceil(k_dim / E), 16, E]
    v_NJPDE: Tensor  # [N, J, 16 / E, v_dim rounded up to 16, E]
    k_dim: int
    v_dim: int

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        k_dim: int,
        v_dim: int,
        dtype: torch.dtype,
        block_size: int = BLOCK_SIZE,
    ) -> "KVPages":
        """Zero-filled pages for `num_blocks * block_size` tokens; they take memory when first used.

        Raises ValueError for dtypes other than bfloat16 and float32, block sizes other than 16.
        """
        check_pages(num_blocks, num_kv_heads, k_dim, v_dim, dtype, tuple(_WORD_ELEMENTS))
        if block_size != BLOCK_SIZE:
            raise ValueError(f"KV block size {block_size}: only {BLOCK_SIZE} is supported")
        e = _WORD_ELEMENTS[dtype]
        words, width = -(-k_dim // e), -(-v_dim // 16) * 16
        k_size, v_size = words * BLOCK_SIZE * e, BLOCK_SIZE * width
        shape = (num_blocks, num_kv_heads, k_size + v_size)
        # Not filled: that would take all of it at once (1 GiB for benchmarks' *small*, of which a
        # run of 32 sequences uses a tenth).
        both = huge_zeros(*shape, dtype=dtype)
        k, v = both.split((k_size, v_size), 2)
        return cls(
            k_NJWBE=k.view(num_blocks, num_kv_heads, words, BLOCK_SIZE, e),
            v_NJPDE=v.view(num_blocks, num_kv_heads, BLOCK_SIZE // e, width, e),
            k_dim=k_dim,
            v_dim=v_dim,
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """See `PagePair`."""
        return self.k_NJWBE, self.v_NJPDE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """Where the rows of one step stand; built once a step, read by every layer.

    Rows of a sequence are consecutive and sequences follow each other; rows from `num_tokens` on
    are padding: they write nothing and attend to nothing (zeros).
    """

    num_rows: int  # T
    num_tokens: int  # real rows, the first ones
    num_sequences: int  # S
    table_width: int  # M, the most blocks of a sequence
    block_id_max: int  # the largest block named; -1 without sequences
    positions_T: Tensor  # int64 [T]: absolute positions; 0 in padding rows
    packed: Tensor  # int32, what the C++ kernel reads: T, num_tokens, S, M, block_id_max, then the
    # values of query_start_S1, start_S and block_table_SM, which are views of it

    @property
    def query_start_S1(self) -> Tensor:
        """int32 [S + 1]: first row of each sequence; the last is num_tokens."""
        return self.packed.narrow(0, _PLAN_HEAD, self.num_sequences + 1)

    @property
    def start_S(self) -> Tensor:
        """int32 [S]: position of each sequence's first row of this step."""
        return self.packed.narrow(0, _PLAN_HEAD + self.num_sequences + 1, self.num_sequences)

    @property
    def block_table_SM(self) -> Tensor:
        """int32 [S, M]: blocks by position // 16; -1 beyond the context."""
        first = _PLAN_HEAD + 1 + 2 * self.num_sequences
        return self.packed[first:].view(self.num_sequences, self.table_width)

    @property
    def slot_mapping_T(self) -> Tensor:
        """int64 [T]: block * 16 + offset; -1 in padding rows."""
        lengths_S = self.query_start_S1.diff().long()
        seq_T = torch.arange(self.num_sequences).repeat_interleave(lengths_S)
        positions_T = self.positions_T[: self.num_tokens]
        block_T = self.block_table_SM[seq_T, positions_T // BLOCK_SIZE].long()
        slots_T = torch.full((self.num_rows,), PAD_SLOT, dtype=torch.int64)
        slots_T[: self.num_tokens] = block_T * BLOCK_SIZE + positions_T % BLOCK_SIZE
        return slots_T


def build_plan(
    starts: Sequence[int],
    lengths: Sequence[int],
    block_tables: Sequence[Sequence[int] | NDArray[np.int32]],
    num_rows: int,
    block_size: int = BLOCK_SIZE,
) -> AttentionPlan:
    """The metadata of one step.

    `starts[s]`: position of sequence s's first new token (tokens before it are in the pages);
    `lengths[s]` >= 1: number of its new tokens; `block_tables[s]`: its block ids by position // 16,
    at least enough for `starts[s] + lengths[s]` tokens (longer ones are cut; blocks that a sliding
    window has left behind may be -1). `num_rows` >= sum(lengths) rows are described.

    Raises ValueError when the numbers do not fit together.
    """
    if block_size != BLOCK_SIZE:
        raise ValueError(f"KV block size {block_size}: only {BLOCK_SIZE} is supported")
    num_sequences = len(starts)
    if not num_sequences == len(lengths) == len(block_tables):
        raise ValueError(
            f"{num_sequences} starts, {len(lengths)} lengths, {len(block_tables)} block tables"
        )
    # Python's own lists where they are short: an array costs more than a step of few sequences has.
    query_start, positions, needed_S = [0], list[int](), list[int]()
    for s, (start, length, table) in enumerate(zip(starts, lengths, block_tables, strict=True)):
        if start < 0 or length < 1:
            raise ValueError(f"starts must be >= 0 and lengths >= 1: {starts}, {lengths}")
        needed = -(-(start + length) // BLOCK_SIZE)
        if len(table) < needed:
            raise ValueError(
                f"sequence {s}: {len(table)} blocks for {start + length} tokens, needs {needed}"
            )
        if min(table[start // BLOCK_SIZE : needed]) < 0:
            raise ValueError("a block to be written has a negative id")
        needed_S.append(needed)
        query_start.append(query_start[-1] + length)
        positions.extend(range(start, start + length))
    num_tokens = len(positions)
    if num_tokens > num_rows:
        raise ValueError(f"{num_tokens} tokens do not fit in {num_rows} rows")
    positions.extend([0] * (num_rows - num_tokens))
    width = max(needed_S, default=1)
    head = _PLAN_HEAD + 1 + 2 * num_sequences
    packed = np.full(head + num_sequences * width, -1, np.int32)
    for s, needed in enumerate(needed_S):
        first = head + s * width
        packed[first : first + needed] = block_tables[s][:needed]
    block_id_max = int(packed[head:].max(initial=-1))
    packed[:head] = (
        num_rows, num_tokens, num_sequences, width, block_id_max, *query_start, *starts,
    )  # fmt: skip
    return AttentionPlan(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        table_width=width,
        block_id_max=block_id_max,
        positions_T=torch.tensor(positions, dtype=torch.int64),
        packed=torch.from_numpy(packed),
    )


def isa_max(*, exact: bool) -> int:
    """The highest instruction set that attention takes, as the C++ kernels number them."""
    return _ISA_MAX if exact else _ISA_MAX_FAST


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: KVPages,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    exact: bool = True,
) -> Tensor:
    """Stores the step's keys and values, then attends -> [1, T, H, v_dim] in the dtype of `q`.

    One call for the hot path: the same bits as `write_kv` of every row's slot and then
    `paged_attention`, whose rules it takes, without a copy of anything. `q`: [1, H, T, k_dim], `k`:
    [1, J, T, k_dim], `v`: [1, J, T, v_dim] in any strides; what is not in the pages' dtype is
    converted. Nothing that the step writes may be in another sequence's context.
    Padding rows give zeros. Raises ValueError for shapes, dtypes or block ids that do not fit.
    """
    if native_available():
        out: Tensor = torch.ops.remora.attend(
            q,
            k,
            v,
            pages.k_NJWBE,
            pages.v_NJPDE,
            plan.packed,
            scale,
            sliding_window or 0,
            attention_chunk or 0,
            soft_cap or 0.0,
            sinks_H,
            isa_max(exact=exact),
        )
        return out
    q_THd, k_TJd, v_TJd = (x[0].transpose(0, 1).to(pages.dtype) for x in (q, k, v))
    write_kv(pages, k_TJd, v_TJd, plan.slot_mapping_T)
    out_THd = paged_attention(
        q_THd,
        pages,
        plan,
        scale=scale,
        sliding_window=sliding_window,
        attention_chunk=attention_chunk,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
        exact=exact,
    )
    return out_THd.to(q.dtype)[None]


def write_kv(pages: KVPages, k_TJd: Tensor, v_TJd: Tensor, slot_mapping_T: Tensor) -> None:
    """Stores each row's key [J, k_dim] and value [J, v_dim] at its slot; slot -1 stores nothing.

    `slot_mapping_T`: int64, block * 16 + offset. Keys and values have the pages' dtype.
    Raises ValueError for shapes or dtypes that do not fit, and for slots beyond the pages.
    """
    num_rows = slot_mapping_T.shape[0]
    k_shape = (num_rows, pages.num_kv_heads, pages.k_dim)
    v_shape = (num_rows, pages.num_kv_heads, pages.v_dim)
    if tuple(k_TJd.shape) != k_shape or tuple(v_TJd.shape) != v_shape:
        raise ValueError(
            f"keys {tuple(k_TJd.shape)} and values {tuple(v_TJd.shape)}: "
            f"the pages take {k_shape} and {v_shape}"
        )
    if k_TJd.dtype != pages.dtype or v_TJd.dtype != pages.dtype:
        raise ValueError(f"keys {k_TJd.dtype}, values {v_TJd.dtype}: the pages hold {pages.dtype}")
    if native_available():
        torch.ops.remora.write_kv(
            _dense_rows(k_TJd), _dense_rows(v_TJd), pages.k_NJWBE, pages.v_NJPDE, slot_mapping_T
        )
    else:
        write_torch(pages, k_TJd, v_TJd, slot_mapping_T)


def paged_attention(
    q_THd: Tensor,
    pages: KVPages,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    exact: bool = True,
) -> Tensor:
    """Causal attention of the step's rows over their sequences' pages -> [T, H, v_dim].

    `q_THd`: [T, H, k_dim] in the pages' dtype, H a multiple of the key/value heads (query head h
    reads head h // G). The step's own keys and values must have been written (`write_kv`).
    A row at position i sees keys j <= i with j > i - `sliding_window` (if given) and
    j // `attention_chunk` == i // `attention_chunk` (if given). Scores are q.k * `scale`, then
    `soft_cap` * tanh(score / `soft_cap`). `sinks_H`: one logit per head that joins the softmax
    denominator only (gpt_oss). Not `exact`: 16 or more rows of a prompt that share a key/value head
    run on AMX tiles where there are any, and a row's last bits depend on the rows beside it.
    Padding rows give zeros. Raises ValueError for shapes, dtypes or block ids that do not fit.
    """
    num_heads = q_THd.shape[1]
    if q_THd.shape[0] != plan.num_rows or q_THd.shape[2] != pages.k_dim:
        raise ValueError(
            f"queries {tuple(q_THd.shape)}: expected ({plan.num_rows}, H, {pages.k_dim})"
        )
    if num_heads < 1 or num_heads % pages.num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads over {pages.num_kv_heads} key/value heads")
    if q_THd.dtype != pages.dtype:
        raise ValueError(f"queries {q_THd.dtype}: the pages hold {pages.dtype}")
    if plan.block_id_max >= pages.num_blocks:
        raise ValueError(f"block {plan.block_id_max} of {pages.num_blocks}")
    if sinks_H is not None and tuple(sinks_H.shape) != (num_heads,):
        raise ValueError(f"sinks {tuple(sinks_H.shape)}: expected ({num_heads},)")
    rules = Rules(
        scale=scale,
        window=sliding_window or 0,
        chunk=attention_chunk or 0,
        soft_cap=soft_cap or 0.0,
    )
    if native_available():
        return _attention_native(q_THd, pages, plan, rules, sinks_H, exact)
    return attention_torch(q_THd, pages, plan, rules, sinks_H)


def _dense_rows(x_THd: Tensor) -> Tensor:
    return x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()


def _attention_native(
    q_THd: Tensor,
    pages: KVPages,
    plan: AttentionPlan,
    rules: Rules,
    sinks_H: Tensor | None,
    exact: bool,
) -> Tensor:
    out_THd: Tensor = torch.ops.remora.paged_attention(
        _dense_rows(q_THd),
        pages.k_NJWBE,
        pages.v_NJPDE,
        pages.v_dim,
        plan.packed,
        rules.scale,
        rules.window,
        rules.chunk,
        rules.soft_cap,
        sinks_H,
        isa_max(exact=exact),
    )
    return out_THd


def _fake_paged_attention(
    q_THd: Tensor, k_NJWBE: Tensor, v_NJPDE: Tensor, v_dim: int, *rest: object
) -> Tensor:
    return q_THd.new_empty((q_THd.shape[0], q_THd.shape[1], v_dim))


def _fake_attend(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


def _fake_write_kv(
    k_TJd: Tensor, v_TJd: Tensor, k_NJWBE: Tensor, v_NJPDE: Tensor, slot_mapping_T: Tensor
) -> None:
    return None


if native_available():
    torch.library.register_fake("remora::paged_attention", _fake_paged_attention)
    torch.library.register_fake("remora::attend", _fake_attend)
    torch.library.register_fake("remora::write_kv", _fake_write_kv)
