"""Token shuffle: which rank of a tensor-parallel dense group takes which rows to the expert shards.

Ranks of a group hold the same rows; each asks for an equal slice of them. A rank is *near* some
shards (same host, or same device where ranks share a host), and a row that reaches a near shard
costs nothing. So rows go to the ranks that are near what they need (docs/token-shuffle.md):

    copy_costs(bundles) or a predictor's scores -> assign (equal slices, least cost) -> slice_order

All of it is integer arithmetic and deterministic: every rank computes the same order by itself.
`assign` is exact, not a heuristic: rows start at the rank they like best, then ranks that have too
many pass rows on along the cheapest paths between ranks (successive shortest paths; Ahuja, Magnanti
and Orlin, *Network Flows*, 1993, chapter 9). Its time grows with the square of the rows, so long
steps are divided in pieces of `PIECE_ROWS`, each with slices of its own.

Shape suffixes: T rows, R ranks, S shards, E experts, K top-k, H most replicas of one expert.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.collectives import part_of

Form = Literal["none", "exact", "speculative"]

DEVICE_PRICE: Final = 1  # of a copy between devices of one host
HOST_PRICE: Final = 8  # of a copy between hosts: links are slower by about that or more
PIECE_ROWS: Final = 512  # on four ranks at most 1.4 ms, where 4,096 rows at once took 98
_FAR: Final = np.int64(1) << 62

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


def copy_prices(rank_hosts: Sequence[str], shard_hosts: Sequence[str]) -> NDArray[np.int64]:
    """[R, S]: what one row costs from a rank to a shard; 0 = near.

    Ranks that share a host share its shards in even runs, as devices of a host would lie side by
    side; with fewer shards than ranks, several ranks are near one shard.
    """
    prices = np.full((len(rank_hosts), len(shard_hosts)), HOST_PRICE, np.int64)
    for host in dict.fromkeys(rank_hosts):
        ranks = [r for r, of in enumerate(rank_hosts) if of == host]
        shards = [s for s, of in enumerate(shard_hosts) if of == host]
        prices[np.ix_(ranks, shards)] = DEVICE_PRICE
        for i, rank in enumerate(ranks):
            for j, shard in enumerate(shards):
                if len(shards) >= len(ranks):
                    is_near = j * len(ranks) // len(shards) == i
                else:
                    is_near = i * len(shards) // len(ranks) == j
                if is_near:
                    prices[rank, shard] = 0
    return prices


def prices_differ(price_RS: NDArray[np.int64]) -> bool:
    """Whether it matters at all which rank takes a row."""
    return bool((price_RS != price_RS[0]).any())


@_jit
def copy_costs(index_TK, replicas_EH, price_RS, cost_TR):  # type: ignore[no-untyped-def]
    """Sets `cost_TR`: the price of the copies of each row if a rank took it.

    A rank covers a row's experts as dispatch does: near shards first, then whoever holds most of
    the rest, lower price and lower index first among equals.

    Args:
        index_TK: int64 logical experts, K <= 16; negative = none.
        replicas_EH: int16 shards that hold each expert, padded with -1.
        price_RS: int64, `copy_prices`.
        cost_TR: int64, written.
    """
    num_rows, top_k = index_TK.shape
    num_ranks, num_shards = price_RS.shape
    cover_S = np.zeros(num_shards, np.int32)
    used_S = np.empty(num_shards, np.int64)
    for t in range(num_rows):
        num_used = 0
        wanted = 0
        for k in range(top_k):
            e = index_TK[t, k]
            if e < 0:
                continue
            for h in range(replicas_EH.shape[1]):
                s = replicas_EH[e, h]
                if s < 0:
                    break
                if cover_S[s] == 0:
                    used_S[num_used] = s
                    num_used += 1
                cover_S[s] |= 1 << k
                wanted |= 1 << k
        for r in range(num_ranks):
            left = wanted
            cost = 0
            for i in range(num_used):
                if price_RS[r, used_S[i]] == 0:
                    left &= ~cover_S[used_S[i]]
            while left:
                best, best_bits = -1, 0
                for i in range(num_used):
                    s = used_S[i]
                    bits, rest = 0, cover_S[s] & left
                    while rest:
                        rest &= rest - 1
                        bits += 1
                    if bits == 0 or bits < best_bits:
                        continue
                    if bits == best_bits:
                        dearer = price_RS[r, s] - price_RS[r, best]
                        if dearer > 0 or (dearer == 0 and s > best):
                            continue
                    best, best_bits = s, bits
                cost += price_RS[r, best]
                left &= ~cover_S[best]
            cost_TR[t, r] = cost
        for i in range(num_used):
            cover_S[used_S[i]] = 0


@_jit
def _cheapest_of(rank, score_TR, rank_T, loss_RR, mover_RR):  # type: ignore[no-untyped-def]
    """Which of a rank's rows leaves it for each other rank at the least loss, and that loss."""
    loss_RR[rank, :] = _FAR
    for t in range(score_TR.shape[0]):
        if rank_T[t] != rank:
            continue
        for r in range(score_TR.shape[1]):
            loss = score_TR[t, rank] - score_TR[t, r]
            if loss < loss_RR[rank, r]:
                loss_RR[rank, r] = loss
                mover_RR[rank, r] = t


@_jit
def assign(score_TR, room_R, rank_T):  # type: ignore[no-untyped-def]
    """Sets `rank_T`: every row to a rank, `room_R[r]` rows to rank r, at the highest sum of scores.

    Args:
        score_TR: int64, higher is better; |score| < 2^40.
        room_R: int64, sums to T.
        rank_T: int64, written.
    """
    num_rows, num_ranks = score_TR.shape
    free_R = room_R.copy()
    for t in range(num_rows):
        best = 0
        for r in range(1, num_ranks):  # among equals the one with most room: nobody is moved then
            better = score_TR[t, r] - score_TR[t, best]
            if better > 0 or (better == 0 and free_R[r] > free_R[best]):
                best = r
        rank_T[t] = best
        free_R[best] -= 1
    loss_RR = np.empty((num_ranks, num_ranks), np.int64)
    mover_RR = np.zeros((num_ranks, num_ranks), np.int64)
    for r in range(num_ranks):
        _cheapest_of(r, score_TR, rank_T, loss_RR, mover_RR)
    cost_R = np.empty(num_ranks, np.int64)
    from_R = np.empty(num_ranks, np.int64)
    while True:
        num_full = 0
        for r in range(num_ranks):
            cost_R[r], from_R[r] = _FAR, -1
            if free_R[r] < 0:
                cost_R[r] = 0
                num_full += 1
        if num_full == 0:
            return
        for _ in range(num_ranks):  # Bellman-Ford: a move back may gain something
            for a in range(num_ranks):
                for b in range(num_ranks):
                    if cost_R[a] < _FAR and loss_RR[a, b] < _FAR:
                        if cost_R[a] + loss_RR[a, b] < cost_R[b]:
                            cost_R[b] = cost_R[a] + loss_RR[a, b]
                            from_R[b] = a
        target = -1
        for r in range(num_ranks):
            if free_R[r] > 0 and (target < 0 or cost_R[r] < cost_R[target]):
                target = r
        free_R[target] -= 1
        while from_R[target] >= 0:
            rank_T[mover_RR[from_R[target], target]] = target
            target = from_R[target]
        free_R[target] += 1
        for r in range(num_ranks):
            if from_R[r] >= 0 or r == target:
                _cheapest_of(r, score_TR, rank_T, loss_RR, mover_RR)


def slice_order(score_TR: NDArray[np.int64], num_rows: int | None = None) -> NDArray[np.int64]:
    """Rows in the order of the slices that `slices.sum_slice` and `gather_slices` take.

    Args:
        score_TR: of the rows that are real, higher is better; |score| < 2^40.
        num_rows: rows with padding, a multiple of R; padding fills every slice up behind its real
            rows. None: as many as are real, in slices as even as can be.

    Returns:
        int64 [num_rows]; each slice's rows ascend.
    """
    num_real, num_ranks = score_TR.shape
    rank_T = np.empty(num_real, np.int64)
    piece = PIECE_ROWS // num_ranks * num_ranks  # as many for each rank: the last one decides
    for begin in range(0, num_real, piece):
        score_PR = score_TR[begin : begin + piece]
        spans = [part_of(rank, num_ranks, len(score_PR)) for rank in range(num_ranks)]
        room_R = np.array([end - first for first, end in spans])
        assign(score_PR, room_R, rank_T[begin : begin + piece])
    slices = [np.flatnonzero(rank_T == rank) for rank in range(num_ranks)]
    if num_rows is None:
        return np.concatenate(slices)
    each, rest = divmod(num_rows, num_ranks)
    assert rest == 0 and each * num_ranks >= num_real, f"{num_rows} rows, {num_ranks} slices"
    padding = np.arange(num_real, num_rows)
    filled = []
    for rows in slices:
        taken = each - len(rows)
        filled.append(np.concatenate([rows, padding[:taken]]))
        padding = padding[taken:]
    return np.concatenate(filled)


def real_rows(rank: int, num_ranks: int, num_real: int) -> int:
    """Real rows at the head of a rank's slice."""
    begin, end = part_of(rank, num_ranks, num_real)
    return end - begin


def warm(num_ranks: int) -> None:
    """Compiles everything above (3 s once on a machine, then from numba's cache)."""
    score_TR = np.zeros((num_ranks, num_ranks), np.int64)
    copy_costs(
        np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int16),
        np.zeros((num_ranks, 1), np.int64), np.zeros((1, num_ranks), np.int64),
    )  # fmt: skip
    slice_order(score_TR)
