"""Which replica computes which (token, expert) pair, and how the rows of a call are laid out.

Compiled with numba: the integer work of a dispatch is a few microseconds, in Python it would be
milliseconds. `choose_naive` and `combine_naive` are the slow twins that tests compare with.

Shape suffixes: T tokens, K top-k, E experts, R most replicas of one expert, S shards, C calls,
D model width. Addresses are of this process, as int64.

Choice (traffic.md, method 5): per token a greedy set cover over its k <= 16 experts, shards of our
own host first, then whoever covers most of the rest; ties go to the shard with fewer pairs in this
dispatch so far, then to the lower index. Deterministic in its arguments.
"""

from typing import Any, Final

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.comm.addresses import (
    as_float32,
    as_int32,
    as_uint16,
    bits_of_float32,
    carray,
    copy_bytes,
    float32_of_bits,
)

TOP_K_MAX: Final = 16
PENDING: Final = -1  # a pair that no call has taken yet
SKIPPED: Final = -2  # a pair whose expert index was negative: it contributes nothing

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _best(candidates, cover_S, remaining, local_S, load_S):  # type: ignore[no-untyped-def]
    """The shard that comes next: local before remote, most covered, least load, lowest index."""
    best = -1
    best_score = 0
    for s in candidates:
        bits = cover_S[s] & remaining
        score = 0
        while bits:
            bits &= bits - 1
            score += 1
        if score == 0:
            continue
        score += local_S[s] * (TOP_K_MAX + 1)
        tie = score == best_score and best >= 0
        lighter = tie and (load_S[s] < load_S[best] or (load_S[s] == load_S[best] and s < best))
        if score > best_score or lighter:
            best, best_score = s, score
    return best


@_jit
def choose(index_TK, num_tokens, replicas_ER, local_S, usable_S, shard_TK, call_TK):  # type: ignore[no-untyped-def]
    """Sets `shard_TK` for every PENDING pair of the first `num_tokens` tokens.

    Args:
        index_TK: int64 logical experts; negative = SKIPPED.
        replicas_ER: int16 shards that hold each expert, padded with -1.
        local_S, usable_S: uint8 flags: on our host; connected and not suspected.
        shard_TK, call_TK: int32, written and read.

    Returns:
        -1, or the first expert that no usable shard holds (also one out of range).
    """
    top_k = index_TK.shape[1]
    num_experts, num_replicas = replicas_ER.shape
    num_shards = local_S.shape[0]
    cover_S = np.zeros(num_shards, np.int32)
    load_S = np.zeros(num_shards, np.int64)
    candidates = np.empty(num_shards, np.int32)
    for t in range(num_tokens):
        num_candidates = 0
        remaining = 0
        for k in range(top_k):
            if call_TK[t, k] != PENDING:
                continue
            e = index_TK[t, k]
            if e < 0:
                call_TK[t, k] = SKIPPED
                continue
            if e >= num_experts:
                return e
            covered = False
            for r in range(num_replicas):
                s = replicas_ER[e, r]
                if s < 0:
                    break
                if usable_S[s]:
                    covered = True
                    if cover_S[s] == 0:
                        candidates[num_candidates] = s
                        num_candidates += 1
                    cover_S[s] |= 1 << k
            if not covered:
                for c in range(num_candidates):
                    cover_S[candidates[c]] = 0
                return e
            remaining |= 1 << k
        while remaining:
            best = _best(candidates[:num_candidates], cover_S, remaining, local_S, load_S)
            for k in range(top_k):
                if cover_S[best] & remaining & (1 << k):
                    shard_TK[t, k] = best
                    load_S[best] += 1
            remaining &= ~cover_S[best]
        for c in range(num_candidates):
            cover_S[candidates[c]] = 0
    return -1


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
def pairs_fit(row_address, num_pairs, num_rows):  # type: ignore[no-untyped-def]
    """True when all of a call's int32 pair rows at `row_address` are rows of that call."""
    row_P = carray(as_int32(row_address), num_pairs)
    fit = True
    for p in range(num_pairs):
        fit &= (row_P[p] >= 0) & (row_P[p] < num_rows)
    return fit


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
    flag_S = np.zeros(1, np.uint8)
    call_C, address_C = np.zeros(0, np.int32), np.zeros(0, np.int64)
    choose(none_T1, 0, np.zeros((1, 1), np.int16), flag_S, flag_S, none32_T1, none32_T1)
    lay_out(none_T1, 0, 1, 1, 1, 0, none32_T1, none32_T1, none32_T1, none32_T1, call_C, call_C, call_C)  # fmt: skip  # noqa: E501
    pack(none_T1, weight_T1, 0, 0, 2, 0, 0, none32_T1, none32_T1, none32_T1, call_C, call_C, address_C)  # fmt: skip  # noqa: E501
    pairs_fit(0, 0, 0)
    combine(weight_T1, 0, 1, True, True, none32_T1, none32_T1, none32_T1, address_C, 0, 0)


def choose_naive(
    index_TK: NDArray[np.int64],
    holders: list[list[int]],
    local: set[int],
) -> list[list[int]]:
    """Slow twin of `choose`: the shard of each pair, -1 for negative experts.

    Args:
        index_TK: logical experts.
        holders: usable shards per expert.
        local: shards of our host.
    """
    load: dict[int, int] = {}
    chosen: list[list[int]] = []
    for row in index_TK.tolist():
        left = {k: set(holders[e]) for k, e in enumerate(row) if e >= 0}
        shard_K = [-1] * len(row)
        while left:
            candidates = set().union(*left.values())
            cover = {s: [k for k in left if s in left[k]] for s in candidates}
            best = min(
                candidates, key=lambda s: (s not in local, -len(cover[s]), load.get(s, 0), s)
            )
            for k in cover[best]:
                shard_K[k] = best
                del left[k]
            load[best] = load.get(best, 0) + len(cover[best])
        chosen.append(shard_K)
    return chosen


def combine_naive(rows_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """Slow twin of ordered `combine`: `[T, D]` of the rows' dtype, float32 sums in top-k order."""
    sum_TD = torch.zeros(rows_TKD.shape[0], rows_TKD.shape[2])
    for k in range(rows_TKD.shape[1]):
        sum_TD = sum_TD + weight_TK[:, k, None].float() * rows_TKD[:, k].float()
    return sum_TD.to(rows_TKD.dtype)
