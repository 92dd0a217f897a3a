"""Experts of our own host, levelled: which of its shards computes which expert of one dispatch.

`choice` decides which pairs stay on our own host, by what rows over the network and uneven load
cost. Between the shards of that one host a row is a copy in memory, and what counts is when the
last of them is done. A shard streams the weights of each expert that it was given rows of, however
few: in decode that is nearly all of its time. So whole experts are given out, never a few pairs of
one here and a few there, and the one with most rows first, each to the shard with least to do so
far (longest processing time first; Graham 1969: at most a third over the best there is).

An expert that only one shard holds stays where it is. So do the pairs of one with more rows than
`SPLIT_ROWS`: there the rows cost more than the weights, and `choice` has spread them by load. And
nothing moves while our shards' recent load differs by more than a quarter of its mean: other dense
groups use them unevenly then, which the load prices of `choice` know of and one dispatch does not.

Shape suffixes as in `choice`: T tokens, K top-k, E experts, R most replicas of one, S shards.
"""

from typing import Any, Final

import numba
import numpy as np

# Reading an expert's weights takes as long as computing this many rows. A property of a processor:
# 8 (AVX-512 bf16) to 50 (AMX) on the machines we measured; in decode there are few rows and any
# such number gives the same result.
READ_ROWS: Final = 32
SPLIT_ROWS: Final = 128
UNEVEN: Final = 4  # a load that differs by more than 1/4 of its mean
LOAD_PRIOR: Final = 256 * 64  # 256 pairs in 1 / `choice.PAIR`: loads far below it say nothing yet

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def level_own_host(index_TK, num_tokens, replicas_ER, host_S, own_host, usable_S, load_S, pending, call_TK, shard_TK):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Changes `shard_TK` of pairs on our own host, for those with `call_TK == pending`.

    Args:
        index_TK, replicas_ER, host_S, own_host, usable_S, load_S: as `choice.choose`.
        pending: `choice.PENDING`.
        call_TK: int32.
        shard_TK: int32, chosen; written.
    """
    num_shards = host_S.shape[0]
    num_experts, num_replicas = replicas_ER.shape
    num_own = 0
    least = most = total = 0
    for s in range(num_shards):
        if host_S[s] == own_host and usable_S[s]:
            least = load_S[s] if num_own == 0 else min(least, load_S[s])
            most = max(most, load_S[s])
            total += load_S[s]
            num_own += 1
    if num_own < 2 or num_replicas < 2:
        return
    if UNEVEN * (most - least) > total // num_own + LOAD_PRIOR:
        return
    rows_E = np.zeros(num_experts, np.int32)
    for t in range(num_tokens):
        for k in range(index_TK.shape[1]):
            if call_TK[t, k] == pending and host_S[shard_TK[t, k]] == own_host:
                rows_E[index_TK[t, k]] += 1
    cost_S = np.zeros(num_shards, np.int64)
    given_E = np.full(num_experts, -1, np.int32)
    free = np.empty(num_experts, np.int32)
    num_free = 0
    for e in range(num_experts):
        if rows_E[e] == 0 or rows_E[e] > SPLIT_ROWS:
            continue
        holders = 0
        for r in range(num_replicas):
            s = replicas_ER[e, r]
            if s < 0:
                break
            if host_S[s] == own_host and usable_S[s]:
                holders += 1
                given_E[e] = s
        if holders == 1:
            cost_S[given_E[e]] += READ_ROWS + rows_E[e]
            continue
        i = num_free  # insertion keeps them by rows, most first, then by expert
        while i > 0 and rows_E[free[i - 1]] < rows_E[e]:
            free[i] = free[i - 1]
            i -= 1
        free[i] = e
        num_free += 1
    for t in range(num_tokens):
        for k in range(index_TK.shape[1]):
            if call_TK[t, k] == pending and host_S[shard_TK[t, k]] == own_host:
                cost_S[shard_TK[t, k]] += rows_E[index_TK[t, k]] > SPLIT_ROWS
    for i in range(num_free):
        e = free[i]
        best = -1
        for r in range(num_replicas):
            s = replicas_ER[e, r]
            if s < 0:
                break
            if host_S[s] != own_host or not usable_S[s]:
                continue
            if best < 0 or cost_S[s] < cost_S[best] or (cost_S[s] == cost_S[best] and s < best):
                best = s
        cost_S[best] += READ_ROWS + rows_E[e]
        given_E[e] = best
    for t in range(num_tokens):
        for k in range(index_TK.shape[1]):
            if call_TK[t, k] == pending and host_S[shard_TK[t, k]] == own_host:
                if given_E[index_TK[t, k]] >= 0:
                    shard_TK[t, k] = given_E[index_TK[t, k]]


def level_own_host_naive(
    index_TK: list[list[int]],
    chosen_TK: list[list[int]],
    holders: list[list[int]],
    hosts: list[int],
    own_host: int,
    load: list[int],
) -> None:
    """Slow twin of `level_own_host`: changes `chosen_TK`.

    Args:
        index_TK: logical experts, negative = none.
        chosen_TK: shards.
        holders: usable shards per expert, ascending.
        hosts: host of each shard.
        load: of each shard.
    """
    loads = [x for x, host in zip(load, hosts, strict=True) if host == own_host] or [0]
    if UNEVEN * (max(loads) - min(loads)) > sum(loads) // len(loads) + LOAD_PRIOR:
        return
    pairs: dict[int, list[tuple[int, int]]] = {}
    for t, (row, shards) in enumerate(zip(index_TK, chosen_TK, strict=True)):
        for k, (e, s) in enumerate(zip(row, shards, strict=True)):
            if e >= 0 and hosts[s] == own_host:
                pairs.setdefault(e, []).append((t, k))
    own = {e: [s for s in holders[e] if hosts[s] == own_host] for e in pairs}
    whole = {e: own[e] for e, found in pairs.items() if len(found) <= SPLIT_ROWS}
    cost = dict.fromkeys(range(len(hosts)), 0)
    for t, k in (pair for e, found in pairs.items() if e not in whole for pair in found):
        cost[chosen_TK[t][k]] += 1
    bound_first = sorted(whole, key=lambda e: (len(whole[e]) > 1, -len(pairs[e]), e))
    for e in bound_first:
        shard = min(whole[e], key=lambda s: (cost[s], s))
        cost[shard] += READ_ROWS + len(pairs[e])
        for t, k in pairs[e]:
            chosen_TK[t][k] = shard
