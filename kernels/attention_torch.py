"""Paged attention through torch, for machines without a compiler: slow, with the same promises.

Shape suffixes as in `remora.kernels.attention`, and: B positions of one block (16), C keys of a
chunk, R = G * 16 rows of one key/value head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from remora.kernels.attention import AttentionPlan, KVPages

BLOCK_SIZE = 16  # keys of a block: one 64-byte vector of 32-bit words

_CHUNK = 128  # keys of one online-softmax step


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a row sees and how scores are shaped; 0 switches a rule off."""

    scale: float
    window: int
    chunk: int
    soft_cap: float

    def first_visible(self, position: int) -> int:
        """The first key that a row at `position` sees."""
        first = max(0, position - self.window + 1) if self.window else 0
        return max(first, position // self.chunk * self.chunk) if self.chunk else first


def write_torch(pages: "KVPages", k_TJd: Tensor, v_TJd: Tensor, slot_mapping_T: Tensor) -> None:
    """`write_kv`, its arguments already checked. Raises ValueError for slots beyond the pages."""
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


def attention_torch(
    q_THd: Tensor, pages: "KVPages", plan: "AttentionPlan", rules: Rules, sinks_H: Tensor | None
) -> Tensor:
    """`paged_attention`, its arguments already checked -> [T, H, v_dim].

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
    pages: "KVPages",
    table_M: Tensor,
    tile: int,
    present: tuple[int, int],
    rules: Rules,
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
    pages: "KVPages", table_M: Tensor, key: int, valid: tuple[int, int]
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
