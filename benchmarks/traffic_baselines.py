"""Placements that Remora's grouping is compared with: B0-B2 contiguous, B3 EPLB, B4 co-activation.

Each takes a planning trace's experts of one layer and a topology. Shape suffixes: T tokens, K
top-k, E experts, S shards, H hosts.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.replay import replicas_of
from remora.comm.topology import Topology

_jit: Any = numba.njit(cache=True, nogil=True)


def contiguous(num_experts: int, topology: Topology) -> NDArray[np.bool_]:
    """Equal runs of experts, as `view.contiguous_placement`; spare slots stay empty."""
    shard_E = np.arange(num_experts) * topology.num_shards // num_experts
    return np.arange(topology.num_shards)[:, None] == shard_E[None, :]


def loads(experts_TK: NDArray[np.integer], num_experts: int) -> NDArray[np.float64]:
    """`[E]` pairs of each expert."""
    return np.bincount(experts_TK.reshape(-1), minlength=num_experts).astype(np.float64)


def coactivation(experts_TK: NDArray[np.integer], num_experts: int) -> NDArray[np.float64]:
    """`[E, E]` tokens that picked both experts; the diagonal is 0."""
    picked_TE = np.zeros((len(experts_TK), num_experts), np.float32)
    np.put_along_axis(picked_TE, experts_TK.astype(np.int64), 1.0, axis=1)
    both_EE = (picked_TE.T @ picked_TE).astype(np.float64)
    np.fill_diagonal(both_EE, 0.0)
    return both_EE


def partition(both_EE: NDArray[np.float64], sizes: list[int]) -> NDArray[np.int64]:
    """Group of each expert: groups of exactly these sizes, most co-activation within them.

    Each group grows from the most connected expert that is left; then pairs of experts are swapped,
    best gain first, until none gains (Kernighan and Lin's swaps without their look-ahead).
    """
    num_experts = len(both_EE)
    assert sum(sizes) == num_experts, f"groups of {sizes} for {num_experts} experts"
    group_E = np.full(num_experts, -1)
    for group, size in enumerate(sizes):
        for _ in range(size):
            free = group_E < 0
            inside = group_E == group
            pull_E = both_EE[:, inside].sum(1) if inside.any() else both_EE[:, free].sum(1)
            group_E[np.where(free, pull_E, -np.inf).argmax()] = group
    while True:
        to_EG = both_EE @ np.eye(len(sizes))[group_E]
        own_E = to_EG[np.arange(num_experts), group_E]
        toward_EE = to_EG[:, group_E] - own_E[:, None]
        gain_EE = toward_EE + toward_EE.T - 2 * both_EE
        gain_EE[group_E[:, None] == group_E[None, :]] = -np.inf
        e, f = np.unravel_index(int(gain_EE.argmax()), gain_EE.shape)
        if not gain_EE[e, f] > 1e-9:
            return group_E
        group_E[e], group_E[f] = group_E[f], group_E[e]


def coactivation_placement(
    experts_TK: NDArray[np.integer], num_experts: int, topology: Topology
) -> NDArray[np.bool_]:
    """B4: experts partitioned over hosts, then over a host's shards; loads are not asked for.

    Spare slots: the expert with the most load per replica goes to the shard with room whose experts
    it is most co-activated with, again and again.
    """
    both_EE = coactivation(experts_TK, num_experts)
    host_S = np.asarray(topology.host_of_S)
    host_E = partition(both_EE, _even(num_experts, topology.num_hosts))
    held_SE = np.zeros((topology.num_shards, num_experts), np.bool_)
    for host in range(topology.num_hosts):
        shards, experts = np.flatnonzero(host_S == host), np.flatnonzero(host_E == host)
        sizes = _even(len(experts), len(shards))
        group_N = partition(both_EE[np.ix_(experts, experts)], sizes)
        held_SE[shards[group_N], experts] = True
    load_E = loads(experts_TK, num_experts)
    room_S = np.asarray(topology.slots_S) - held_SE.sum(1)
    assert (room_S >= 0).all(), f"slots {topology.slots_S} are too few for {num_experts} experts"
    while room_S.any():
        possible_SE = ~held_SE & (room_S > 0)[:, None]
        share_E = np.where(possible_SE.any(0), load_E / held_SE.sum(0), -1.0)
        expert = int(share_E.argmax())
        pull_S = np.where(possible_SE[:, expert], held_SE @ both_EE[:, expert], -1.0)
        shard = int(pull_S.argmax())
        held_SE[shard, expert] = True
        room_S[shard] -= 1
    return held_SE


def _even(total: int, parts: int) -> list[int]:
    """Whole numbers that sum to `total` and differ by one at most."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def cover(
    experts_TK: NDArray[np.integer],
    source_T: NDArray[np.integer],
    held_SE: NDArray[np.bool_],
    topology: Topology,
) -> NDArray[np.int32]:
    """B3b's choice of replicas, `[T, K]` shards: local copies first, then greedy set cover.

    Ties go to the shard with fewest pairs so far, over all sources and all tokens before: more than
    a dense rank could know.
    """
    local_HS = np.arange(topology.num_hosts)[:, None] == np.asarray(topology.host_of_S)
    return _cover(  # type: ignore[no-any-return]
        experts_TK.astype(np.int64), source_T.astype(np.int64), replicas_of(held_SE), local_HS
    )


@_jit
def _cover(experts_TK, source_T, replicas_ER, local_HS):  # type: ignore[no-untyped-def]
    num_tokens, top_k = experts_TK.shape
    num_shards = local_HS.shape[1]
    shard_TK = np.full((num_tokens, top_k), -1, np.int32)
    load_S = np.zeros(num_shards, np.int64)
    covers_S = np.zeros(num_shards, np.int64)
    for t in range(num_tokens):
        left = top_k
        while left:
            covers_S[:] = 0
            for k in range(top_k):
                if shard_TK[t, k] < 0:
                    for s in replicas_ER[experts_TK[t, k]]:
                        if s >= 0:
                            covers_S[s] += 1
            best, best_score = -1, 0
            for s in range(num_shards):
                if covers_S[s] == 0:
                    continue
                score = covers_S[s] + (top_k + 1 if local_HS[source_T[t], s] else 0)
                fewer = best >= 0 and score == best_score and load_S[s] < load_S[best]
                if score > best_score or fewer:
                    best, best_score = s, score
            for k in range(top_k):
                if shard_TK[t, k] < 0:
                    for s in replicas_ER[experts_TK[t, k]]:
                        if s == best:
                            shard_TK[t, k] = best
                            load_S[best] += 1
                            left -= 1
    return shard_TK
