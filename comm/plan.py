"""How the rows of a dispatch are laid out in calls, packed, and summed when they come back.

Which replica computes which (token, expert) pair is decided before (`choice.py`).

Compiled with numba: the integer work of a dispatch is a few microseconds, in Python it would be
milliseconds. `combine_naive` is the slow twin that tests compare with.

Shape suffixes: T tokens, K top-k, E experts, R most replicas of one expert, S shards, C calls,
D model width. Addresses are of this process, as int64.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from remora.comm import choice
from remora.comm.addresses import (
    as_float32,
    as_int32,
    as_uint16,
    bits_of_float32,
    carray,
    copy_bytes,
    float32_of_bits,
)
from remora.comm.choice import PENDING

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def lay_out(index_TK, num_tokens, num_experts, num_shards, rows_max, first_call, shard_TK, call_TK, row_TK, pos_TK, call_shard_C, call_rows_C, call_pairs_C):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Cuts the PENDING pairs into calls of at most `rows_max` rows to one shard each.

    A token's row goes into a call once, in token order. Pairs of a call are sorted by (expert,
    row). Calls are numbered from `first_call` in order of their first token.

    Args:
        call_TK, row_TK, pos_TK: int32, written: call, row and pair position in it.
        call_shard_C, call_rows_C, call_pairs_C: int32, written from `first_call` on.

    Returns:
        The number of calls, the first `first_call` included.
    """
    top_k = index_TK.shape[1]
    open_S = np.full(num_shards, -1, np.int32)
    num_calls = first_call
    for t in range(num_tokens):
        for k in range(top_k):
            if call_TK[t, k] != PENDING:
                continue
            s = shard_TK[t, k]
            row = -1
            for j in range(k):
                if call_TK[t, j] >= first_call and call_TK[t, j] == open_S[s]:
                    row = row_TK[t, j]
                    break
            c = open_S[s]
            if row < 0:
                if c < 0 or call_rows_C[c] >= rows_max:
                    c = num_calls
                    num_calls += 1
                    open_S[s] = c
                    call_shard_C[c] = s
                    call_rows_C[c] = 0
                    call_pairs_C[c] = 0
                row = call_rows_C[c]
                call_rows_C[c] += 1
            call_TK[t, k] = c
            row_TK[t, k] = row
            call_pairs_C[c] += 1
    # counting sort of each call's pairs by expert; tokens in order keep rows in order
    start_CE = np.zeros((num_calls - first_call, num_experts + 1), np.int32)
    for t in range(num_tokens):
        for k in range(top_k):
            c = call_TK[t, k] - first_call
            if c >= 0:
                start_CE[c, index_TK[t, k] + 1] += 1
    for c in range(num_calls - first_call):
        for e in range(num_experts):
            start_CE[c, e + 1] += start_CE[c, e]
    for t in range(num_tokens):
        for k in range(top_k):
            c = call_TK[t, k] - first_call
            if c >= 0:
                pos_TK[t, k] = start_CE[c, index_TK[t, k]]
                start_CE[c, index_TK[t, k]] += 1
    return num_calls


@_jit
def pack(index_TK, weight_TK, num_tokens, hidden_address, row_bytes, first_call, end_call, call_TK, row_TK, pos_TK, call_rows_C, call_pairs_C, body_address_C):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Writes the bodies of calls `first_call <= c < end_call` at `body_address_C[c]`.

    Body as in `wire.dispatch_bytes`: rows, then int32 row, int32 expert, float32 weight columns.
    """
    top_k = index_TK.shape[1]
    for t in range(num_tokens):
        for k in range(top_k):
            c = call_TK[t, k]
            if c < first_call or c >= end_call:
                continue
            body = body_address_C[c]
            if body == 0:  # its peer was lost before it could be begun
                continue
            num_pairs = call_pairs_C[c]
            row = row_TK[t, k]
            pairs = body + ((call_rows_C[c] * row_bytes + 3) & ~3)
            row_P = carray(as_int32(pairs), num_pairs)
            expert_P = carray(as_int32(pairs + 4 * num_pairs), num_pairs)
            weight_P = carray(as_float32(pairs + 8 * num_pairs), num_pairs)
            at = pos_TK[t, k]
            row_P[at] = row
            expert_P[at] = index_TK[t, k]
            weight_P[at] = weight_TK[t, k]
            first = True
            for j in range(k):
                if call_TK[t, j] == c:
                    first = False
                    break
            if first:
                copy_bytes(
                    body + np.int64(row) * row_bytes, hidden_address + t * row_bytes, row_bytes
                )


@_jit
def combine(weight_TK, num_tokens, width, is_bfloat16, presummed, call_TK, row_TK, pos_TK, reply_address_C, out_address, out_rows):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Sums the answers' rows into `[out_rows, width]` at `out_address`, in float32, in top-k order.

    Ordered: row of pair k times its weight, k = 0 .. K-1. Presummed: one row per call, in order of
    the call's first k. One rounding to the rows' dtype at the end (to nearest even). Rows from
    `num_tokens` on are zeros.
    """
    top_k = call_TK.shape[1]
    sum_D = np.empty(width, np.float32)
    row_bytes = width * (2 if is_bfloat16 else 4)
    for t in range(out_rows):
        sum_D[:] = 0.0
        for k in range(top_k if t < num_tokens else 0):
            c = call_TK[t, k]
            if c < 0:
                continue
            weight = np.float32(1.0)
            if presummed:
                seen = False
                for j in range(k):
                    if call_TK[t, j] == c:
                        seen = True
                        break
                if seen:
                    continue
                source = reply_address_C[c] + np.int64(row_TK[t, k]) * row_bytes
            else:
                source = reply_address_C[c] + np.int64(pos_TK[t, k]) * row_bytes
                weight = weight_TK[t, k]
            if is_bfloat16:
                bits_D = carray(as_uint16(source), width)
                for d in range(width):
                    sum_D[d] += weight * float32_of_bits(np.uint32(bits_D[d]) << np.uint32(16))
            else:
                row_D = carray(as_float32(source), width)
                for d in range(width):
                    sum_D[d] += weight * row_D[d]
        target = out_address + t * row_bytes
        if is_bfloat16:
            out_bits_D = carray(as_uint16(target), width)
            for d in range(width):
                bits = bits_of_float32(sum_D[d])
                rounded = (
                    bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                ) >> np.uint32(16)
                if sum_D[d] != sum_D[d]:
                    rounded = (bits >> np.uint32(16)) | np.uint32(0x40)  # NaN stays NaN
                out_bits_D[d] = np.uint16(rounded)
        else:
            out_D = carray(as_float32(target), width)
            for d in range(width):
                out_D[d] = sum_D[d]


def warm() -> None:
    """Compiles everything above (5 s once on a machine, 0.2 s from numba's cache afterwards)."""
    none_T1 = np.zeros((0, 1), np.int64)
    none32_T1 = np.zeros((0, 1), np.int32)
    weight_T1 = np.zeros((0, 1), np.float32)
    call_C, address_C = np.zeros(0, np.int32), np.zeros(0, np.int64)
    choice.warm()
    lay_out(none_T1, 0, 1, 1, 1, 0, none32_T1, none32_T1, none32_T1, none32_T1, call_C, call_C, call_C)  # fmt: skip  # noqa: E501
    pack(none_T1, weight_T1, 0, 0, 2, 0, 0, none32_T1, none32_T1, none32_T1, call_C, call_C, address_C)  # fmt: skip  # noqa: E501
    combine(weight_T1, 0, 1, True, True, none32_T1, none32_T1, none32_T1, address_C, 0, 0)


def combine_naive(rows_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """Slow twin of ordered `combine`: `[T, D]` of the rows' dtype, float32 sums in top-k order."""
    sum_TD = torch.zeros(rows_TKD.shape[0], rows_TKD.shape[2])
    for k in range(rows_TKD.shape[1]):
        sum_TD = sum_TD + weight_TK[:, k, None].float() * rows_TKD[:, k].float()
    return sum_TD.to(rows_TKD.dtype)
