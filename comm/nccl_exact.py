"""Layout of an exact exchange: which rows and pairs go to which shard, by the CPU's own planner.

The choice of replicas and the order of rows and pairs are those of `comm/plan.py`, so a shard gets
in one message what the framed transport would send it, and results are bitwise the same.

Shape suffixes: T tokens, K top-k, E experts, R replicas, S shards, M rows sent in all, P pairs in
all, W words of meta (int32; for each shard its pairs' rows, experts and weights, a column each).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.comm import choice, plan
from remora.comm.errors import PeerLostError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """One source's part of an exact exchange."""

    rows_S: tuple[int, ...]  # rows to each shard
    pairs_S: tuple[int, ...]  # pairs to each shard
    token_M: NDArray[np.int64]  # token of each row, shard after shard
    meta_W: NDArray[np.int32]
    place_TK: NDArray[np.int64]  # row of each pair in the answers; the row behind all: none
    gain_TK: NDArray[np.float32]  # what it is multiplied with
    num_back: int  # rows of all answers


def starts(sizes: Sequence[int]) -> list[int]:
    """Offsets of runs of the given sizes that lie behind each other."""
    return list(accumulate(sizes, initial=0))[:-1]


def plan_source(
    index_TK: NDArray[np.int64],
    weight_TK: NDArray[np.float32],
    num_tokens: int,
    replicas_ER: NDArray[np.int16],
    local_S: NDArray[np.uint8],
    *,
    presummed: bool,
) -> SourcePlan:
    """Chooses replicas and lays out what goes to each shard.

    Args:
        index_TK: logical experts, negative = none.
        weight_TK: of the pairs.
        num_tokens: rows that are real.
        replicas_ER: shards that hold each expert, padded with -1.
        local_S: 1 for shards on this host.
        presummed: one row back for a row, else one for a pair.

    Raises:
        PeerLostError: an expert without a replica in this generation.
    """
    num_shards, (num_rows, top_k) = len(local_S), index_TK.shape
    shard_TK = np.empty(index_TK.shape, np.int32)
    call_TK, row_TK, pos_TK = np.full((3, num_rows, top_k), choice.PENDING, np.int32)
    usable_S = np.ones(num_shards, np.uint8)
    host_S = np.where(local_S, 0, np.arange(1, num_shards + 1)).astype(np.int32)
    load_S = np.zeros(num_shards, np.int64)  # of this dispatch alone: all ranks plan alike
    missing = choice.choose(
        index_TK, num_tokens, replicas_ER, host_S, 0, usable_S, load_S,
        choice.gain_for(num_shards), shard_TK, call_TK,
    )  # fmt: skip
    if missing >= 0:
        raise PeerLostError(f"expert {missing} has no replica in this generation")
    call_3C = np.zeros((3, num_shards), np.int32)  # rows are unbounded: one call for each shard
    num_calls: int = plan.lay_out(
        index_TK, num_tokens, len(replicas_ER), num_shards, max(1, num_tokens), 0,
        shard_TK, call_TK, row_TK, pos_TK, *call_3C,
    )  # fmt: skip
    call_shard_C, call_rows_C, call_pairs_C = call_3C[:, :num_calls]
    rows_S, pairs_S = np.zeros((2, num_shards), np.int64)
    rows_S[call_shard_C], pairs_S[call_shard_C] = call_rows_C, call_pairs_C
    row_start_S, pair_start_S = (np.array(starts(sizes.tolist())) for sizes in (rows_S, pairs_S))

    t, k = np.nonzero(call_TK[:num_tokens] >= 0)
    s = shard_TK[t, k]
    row, pos = row_TK[t, k].astype(np.int64), pos_TK[t, k].astype(np.int64)
    token_M = np.empty(int(rows_S.sum()), np.int64)
    token_M[row_start_S[s] + row] = t
    meta_W = _meta(pairs_S[s], pair_start_S[s], pos, row, index_TK[t, k], weight_TK[t, k])
    num_back = int((rows_S if presummed else pairs_S).sum())
    place_TK = np.full(index_TK.shape, num_back, np.int64)
    gain_TK = np.zeros(index_TK.shape, np.float32)
    if presummed:
        earlier = np.tril(np.ones((top_k, top_k), bool), -1)
        again_TK = ((call_TK[:, :, None] == call_TK[:, None, :]) & earlier).any(2)
        first = ~again_TK[t, k]
        place_TK[t[first], k[first]] = (row_start_S[s] + row)[first]
        gain_TK[t[first], k[first]] = 1.0
    else:
        place_TK[t, k] = pair_start_S[s] + pos
        gain_TK[t, k] = weight_TK[t, k]
    return SourcePlan(
        rows_S=tuple(rows_S.tolist()),
        pairs_S=tuple(pairs_S.tolist()),
        token_M=token_M,
        meta_W=meta_W,
        place_TK=place_TK,
        gain_TK=gain_TK,
        num_back=num_back,
    )


def _meta(num_P: Any, start_P: Any, pos_P: Any, row_P: Any, expert_P: Any, weight_P: Any) -> Any:
    """The words of all shards: three columns of its pairs for each shard."""
    meta_W = np.empty(3 * len(pos_P), np.int32)
    first_P = 3 * start_P + pos_P
    meta_W[first_P] = row_P
    meta_W[first_P + num_P] = expert_P
    meta_W[first_P + 2 * num_P] = weight_P.astype(np.float32).view(np.int32)
    return meta_W
