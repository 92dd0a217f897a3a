"""Paged causal attention over per-layer key/value pages, and the metadata of one step.

Shape suffixes: T token rows of a step (padding included), S sequences of the step, M blocks of the
longest table, H query heads, J key/value heads, G = H/J query heads that share one, N blocks of the
pool, W 32-bit words of a key (two bfloat16 or one float32 each), E elements of a word, d width.

Every (token, head) is computed over absolute key chunks in one fixed order, so its bits do not
depend on what else is in the step, on how a prompt was cut, on prefill or decode, or on the number
of threads. Method: online softmax (Milakov & Gimelshein 2018) over paged keys (Kwon et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.kernels.native import native_available

BLOCK_SIZE = 16  # keys of a block: one 64-byte vector of 32-bit words
PAD_SLOT = -1  # slot of a padding row: nothing is written

_ISA_MAX = 3  # of the C++ path: avx512_bf16; tests lower it down to 0, portable
_CHUNK = 128  # keys per online-softmax step of the torch path
_WORD_ELEMENTS = {torch.bfloat16: 2, torch.float32: 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVPages:
    """Keys and values of one layer. The layout is private to this file and the C++ kernel.

    A key is cut into 32-bit words and the sixteen keys of a block lie side by side, a value's words
    pair neighbouring keys: both products of attention are then vector x broadcast word.
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
        """Zero-filled pages for `num_blocks * block_size` tokens.

        Raises ValueError for dtypes other than bfloat16 and float32, block sizes other than 16.
        """
        if dtype not in _WORD_ELEMENTS:
            raise ValueError(f"KV dtype {dtype}: allowed are bfloat16 and float32")
        if block_size != BLOCK_SIZE:
            raise ValueError(f"KV block size {block_size}: only {BLOCK_SIZE} is supported")
        if min(num_blocks, num_kv_heads, k_dim, v_dim) < 1:
            raise ValueError(
                f"KV pages need positive sizes, got blocks {num_blocks}, heads {num_kv_heads}, "
                f"key width {k_dim}, value width {v_dim}"
            )
        e = _WORD_ELEMENTS[dtype]
        k_shape = (num_blocks, num_kv_heads, -(-k_dim // e), BLOCK_SIZE, e)
        v_shape = (num_blocks, num_kv_heads, BLOCK_SIZE // e, -(-v_dim // 16) * 16, e)
        return cls(
            k_NJWBE=torch.zeros(k_shape, dtype=dtype),
            v_NJPDE=torch.zeros(v_shape, dtype=dtype),
            k_dim=k_dim,
            v_dim=v_dim,
        )

    @staticmethod
    def block_nbytes(num_kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer: what a memory budget is divided by."""
        e = _WORD_ELEMENTS[dtype]
        return num_kv_heads * BLOCK_SIZE * 4 * (-(-k_dim // e) + -(-v_dim // 16) * 16 // e)

    @property
    def num_blocks(self) -> int:
        return self.k_NJWBE.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k_NJWBE.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.k_NJWBE.dtype

    @property
    def nbytes(self) -> int:
        return self.k_NJWBE.nbytes + self.v_NJPDE.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """Where the rows of one step stand; built once a step, read by every layer.

    Rows of a sequence are consecutive and sequences follow each other; rows from `num_tokens` on
    are padding: they write nothing and attend to nothing (zeros).
    """

    num_rows: int  # T
    num_tokens: int  # real rows, the first ones
    num_sequences: int
    block_id_max: int  # the largest block named; -1 without sequences
    query_start_S1: Tensor  # int32 [S + 1]: first row of each sequence; the last is num_tokens
    start_S: Tensor  # int32 [S]: position of each sequence's first row of this step
    block_table_SM: Tensor  # int32 [S, M]: blocks by position // 16; -1 beyond the context
    positions_T: Tensor  # int64 [T]: absolute positions; 0 in padding rows
    seq_of_token_T: Tensor  # int64 [T]: index into S; 0 in padding rows
    slot_mapping_T: Tensor  # int64 [T]: block * 16 + offset; -1 in padding rows
    last_row_S: Tensor  # int64 [S]: the row of each sequence's last token


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
    start_S = np.asarray(starts, dtype=np.int64).reshape(num_sequences)
    length_S = np.asarray(lengths, dtype=np.int64).reshape(num_sequences)
    if num_sequences and (int(start_S.min()) < 0 or int(length_S.min()) < 1):
        raise ValueError(f"starts must be >= 0 and lengths >= 1: {starts}, {lengths}")
    query_start_S1 = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(length_S, out=query_start_S1[1:])
    num_tokens = int(query_start_S1[-1])
    if num_tokens > num_rows:
        raise ValueError(f"{num_tokens} tokens do not fit in {num_rows} rows")
    num_blocks_S = (start_S + length_S + BLOCK_SIZE - 1) // BLOCK_SIZE
    table_SM = np.full((num_sequences, int(num_blocks_S.max(initial=1))), -1, dtype=np.int32)
    for s, table in enumerate(block_tables):
        needed = int(num_blocks_S[s])
        if len(table) < needed:
            raise ValueError(
                f"sequence {s}: {len(table)} blocks for {int(start_S[s] + length_S[s])} tokens, "
                f"needs {needed}"
            )
        table_SM[s, :needed] = table[:needed]
    seq_T = np.zeros(num_rows, dtype=np.int64)
    seq_T[:num_tokens] = np.repeat(np.arange(num_sequences), length_S)
    seq = seq_T[:num_tokens]
    positions_T = np.zeros(num_rows, dtype=np.int64)
    positions_T[:num_tokens] = np.arange(num_tokens) - query_start_S1[seq] + start_S[seq]
    positions = positions_T[:num_tokens]
    block_T = table_SM[seq, positions // BLOCK_SIZE].astype(np.int64)
    if num_tokens and int(block_T.min()) < 0:
        raise ValueError("a block to be written has a negative id")
    slots_T = np.full(num_rows, PAD_SLOT, dtype=np.int64)
    slots_T[:num_tokens] = block_T * BLOCK_SIZE + positions % BLOCK_SIZE
    return AttentionPlan(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        block_id_max=int(table_SM.max(initial=-1)),
        query_start_S1=torch.from_numpy(query_start_S1.astype(np.int32)),
        start_S=torch.from_numpy(start_S.astype(np.int32)),
        block_table_SM=torch.from_numpy(table_SM),
        positions_T=torch.from_numpy(positions_T),
        seq_of_token_T=torch.from_numpy(seq_T),
        slot_mapping_T=torch.from_numpy(slots_T),
        last_row_S=torch.from_numpy(query_start_S1[1:] - 1),
    )


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
        _write_torch(pages, k_TJd, v_TJd, slot_mapping_T)


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
) -> Tensor:
    """Causal attention of the step's rows over their sequences' pages -> [T, H, v_dim].

    `q_THd`: [T, H, k_dim] in the pages' dtype, H a multiple of the key/value heads (query head h
    reads head h // G). The step's own keys and values must have been written (`write_kv`).
    A row at position i sees keys j <= i with j > i - `sliding_window` (if given) and
    j // `attention_chunk` == i // `attention_chunk` (if given). Scores are q.k * `scale`, then
    `soft_cap` * tanh(score / `soft_cap`). `sinks_H`: one logit per head that joins the softmax
    denominator only (gpt_oss).
    Padding rows give zeros. Raises ValueError for shapes, dtypes or block ids that do not fit.
    """
    num_heads = q_THd.shape[1]
    if q_THd.shape[0] != plan.num_rows or q_THd.shape[2] != pages.k_dim:
        raise ValueError(
            f"queries {tuple(q_THd.shape)}: expected ({plan.num_rows}, H, {pages.k_dim})"
        )
    if num_heads % pages.num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads over {pages.num_kv_heads} key/value heads")
    if q_THd.dtype != pages.dtype:
        raise ValueError(f"queries {q_THd.dtype}: the pages hold {pages.dtype}")
    if plan.block_id_max >= pages.num_blocks:
        raise ValueError(f"block {plan.block_id_max} of {pages.num_blocks}")
    if sinks_H is not None and tuple(sinks_H.shape) != (num_heads,):
        raise ValueError(f"sinks {tuple(sinks_H.shape)}: expected ({num_heads},)")
    rules = _Rules(
        scale=scale,
        window=sliding_window or 0,
        chunk=attention_chunk or 0,
        soft_cap=soft_cap or 0.0,
    )
    if native_available():
        return _attention_native(q_THd, pages, plan, rules, sinks_H)
    return _attention_torch(q_THd, pages, plan, rules, sinks_H)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What a row sees and how scores are shaped; 0 switches a rule off."""

    scale: float
    window: int
    chunk: int
    soft_cap: float

    def first_visible(self, position: int) -> int:
        first = max(0, position - self.window + 1) if self.window else 0
        return max(first, position // self.chunk * self.chunk) if self.chunk else first


def _dense_rows(x_THd: Tensor) -> Tensor:
    return x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()


def _attention_native(
    q_THd: Tensor,
    pages: KVPages,
    plan: AttentionPlan,
    rules: _Rules,
    sinks_H: Tensor | None,
) -> Tensor:
    out_THd: Tensor = torch.ops.remora.paged_attention(
        _dense_rows(q_THd),
        pages.k_NJWBE,
        pages.v_NJPDE,
        pages.v_dim,
        plan.query_start_S1,
        plan.start_S,
        plan.block_table_SM,
        rules.scale,
        rules.window,
        rules.chunk,
        rules.soft_cap,
        None if sinks_H is None else sinks_H.float().contiguous(),
        _ISA_MAX,
    )
    return out_THd


def _write_torch(pages: KVPages, k_TJd: Tensor, v_TJd: Tensor, slot_mapping_T: Tensor) -> None:
    rows = torch.nonzero(slot_mapping_T >= 0).squeeze(1)
    slots = slot_mapping_T[rows]
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    if slots.numel() and int(block.max()) >= pages.num_blocks:
        raise ValueError(f"block {int(block.max())} of {pages.num_blocks}")
    words, e = pages.k_NJWBE.shape[2], pages.k_NJWBE.shape[4]
    k = torch.zeros((rows.numel(), pages.num_kv_heads, words * e), dtype=pages.dtype)
    k[:, :, : pages.k_dim] = k_TJd[rows]
    pages.k_NJWBE[block, :, :, offset, :] = k.view(-1, pages.num_kv_heads, words, e)
    pages.v_NJPDE[block, :, offset // e, : pages.v_dim, offset % e] = v_TJd[rows]


def _attention_torch(
    q_THd: Tensor, pages: KVPages, plan: AttentionPlan, rules: _Rules, sinks_H: Tensor | None
) -> Tensor:
    """The path without a compiler: slow, but as row-independent as the C++ one.

    Sixteen positions that share a block are computed together, each always in the row of its own
    offset and in products of one fixed shape, whether or not the others are in the step.
    """
    out_THd = q_THd.new_zeros((plan.num_rows, q_THd.shape[1], pages.v_dim))
    starts, firsts = plan.start_S.tolist(), plan.query_start_S1.tolist()
    for s, start in enumerate(starts):
        end = start + firsts[s + 1] - firsts[s]
        row_of_position = firsts[s] - start
        for tile in range(start - start % BLOCK_SIZE, end, BLOCK_SIZE):
            low, high = max(start, tile), min(end, tile + BLOCK_SIZE)
            rows = slice(low + row_of_position, high + row_of_position)
            q_BHd = torch.zeros((BLOCK_SIZE, *q_THd.shape[1:]))
            q_BHd[low - tile : high - tile] = q_THd[rows].float()
            o_BHd = _tile_torch(
                q_BHd, pages, plan.block_table_SM[s], tile, (low, high), rules, sinks_H
            )
            out_THd[rows] = o_BHd[low - tile : high - tile].to(out_THd.dtype)
    return out_THd


def _tile_torch(
    q_BHd: Tensor,
    pages: KVPages,
    table_M: Tensor,
    tile: int,
    present: tuple[int, int],
    rules: _Rules,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of positions tile..tile+15 -> float32 [16, H, v_dim]; `present`: the real rows."""
    num_heads, j = q_BHd.shape[1], pages.num_kv_heads
    q_BJGd = q_BHd.view(BLOCK_SIZE, j, -1, pages.k_dim)
    q_JRd = q_BJGd.permute(1, 2, 0, 3).reshape(j, -1, pages.k_dim)
    position_R = torch.arange(tile, tile + BLOCK_SIZE).repeat(num_heads // j)
    first_B = [rules.first_visible(tile + b) for b in range(BLOCK_SIZE)]
    first_R = torch.tensor(first_B).repeat(num_heads // j)
    shape = (j, q_JRd.shape[1], 1)
    if sinks_H is None:
        max_JR1, sum_JR1 = torch.full(shape, -torch.inf), torch.zeros(shape)
    else:
        max_JR1 = sinks_H.float().reshape(j, -1, 1).repeat_interleave(BLOCK_SIZE, 1)
        sum_JR1 = torch.ones(shape)
    out_JRd = torch.zeros((j, q_JRd.shape[1], pages.v_dim))
    low, high = first_B[present[0] - tile], present[1]
    for key in range(low - low % _CHUNK, high, _CHUNK):
        k_JCd, v_JCd, position_C = _gather_chunk(pages, table_M, key, (low, high))
        score_JRC = torch.bmm(q_JRd, k_JCd.transpose(1, 2)) * rules.scale
        if rules.soft_cap:
            score_JRC = torch.tanh(score_JRC / rules.soft_cap) * rules.soft_cap
        hidden_RC = (position_C > position_R[:, None]) | (position_C < first_R[:, None])
        score_JRC = score_JRC.masked_fill(hidden_RC, -torch.inf)
        new_max_JR1 = torch.maximum(max_JR1, score_JRC.amax(2, keepdim=True))
        shift_JR1 = new_max_JR1.masked_fill(new_max_JR1 == -torch.inf, 0.0)  # nothing seen yet
        p_JRC = torch.exp(score_JRC - shift_JR1)
        decay_JR1 = torch.exp(max_JR1 - shift_JR1)
        sum_JR1 = sum_JR1 * decay_JR1 + p_JRC.sum(2, keepdim=True)
        out_JRd = out_JRd * decay_JR1 + torch.bmm(p_JRC, v_JCd)
        max_JR1 = new_max_JR1
    out_JGBd = (out_JRd / sum_JR1).view(j, -1, BLOCK_SIZE, pages.v_dim)
    return out_JGBd.permute(2, 0, 1, 3).flatten(1, 2)


def _gather_chunk(
    pages: KVPages, table_M: Tensor, key: int, valid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [J, C, k_dim], values [J, C, v_dim] (float32) and positions [C] of the chunk at `key`.

    Keys outside `valid` are zeros: a page's stale bytes may be NaN, and 0 * NaN is NaN.
    """
    first = key // BLOCK_SIZE
    index = torch.arange(first, first + _CHUNK // BLOCK_SIZE).clamp(max=table_M.numel() - 1)
    blocks = table_M[index].long().clamp(min=0)
    k = pages.k_NJWBE[blocks].permute(1, 0, 3, 2, 4)  # [J, blocks, 16, W, E]
    v = pages.v_NJPDE[blocks].permute(1, 0, 2, 4, 3)  # [J, blocks, 16/E, E, D]
    k_JCd = k.reshape(pages.num_kv_heads, _CHUNK, -1)[:, :, : pages.k_dim].float()
    v_JCd = v.reshape(pages.num_kv_heads, _CHUNK, -1)[:, :, : pages.v_dim].float()
    position_C = torch.arange(key, key + _CHUNK)
    stale_C1 = ((position_C < valid[0]) | (position_C >= valid[1]))[:, None]
    return k_JCd.masked_fill(stale_C1, 0.0), v_JCd.masked_fill(stale_C1, 0.0), position_C
