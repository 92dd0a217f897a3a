"""Exact local search over partitions: swaps of experts between shards, each by its true cost.

A partition puts every expert on one shard. What a bundle pays follows from how many of its experts
each shard and each host has, so the change that a move would make is exact and cheap, and tables of
it are kept up to date swap by swap (`_Tables` below; tests compare them with a recount):

    used[e, s]  weight of bundles with expert e that use shard s
    lone[e]     weight of bundles with e that would no longer use e's shard without it

and the same for hosts, where a bundle's own source counts as used and never as lone.

Shape suffixes: B bundles, K top-k, E experts, S shards, H hosts.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.topology import Topology

TINY: Final = 1e-9  # an improvement smaller than this share of the weight is rounding
_TRIES: Final = 64  # promising swaps that are looked at exactly before a search gives up

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def index_bundles(ids_BK, num_experts):  # type: ignore[no-untyped-def]
    """Bundles of each expert: (start_E1, bundle_N)."""
    start = np.zeros(num_experts + 1, np.int64)
    for b in range(ids_BK.shape[0]):
        for k in range(ids_BK.shape[1]):
            if ids_BK[b, k] >= 0:
                start[ids_BK[b, k] + 1] += 1
    for e in range(num_experts):
        start[e + 1] += start[e]
    at = start[:-1].copy()
    bundle = np.empty(start[-1], np.int32)
    for b in range(ids_BK.shape[0]):
        for k in range(ids_BK.shape[1]):
            e = ids_BK[b, k]
            if e >= 0:
                bundle[at[e]] = b
                at[e] += 1
    return start, bundle


@_jit
def _count_uses(ids_BK, shard_E, host_S, count_BS, count_BH):  # type: ignore[no-untyped-def]
    count_BS[:] = 0
    count_BH[:] = 0
    for b in range(ids_BK.shape[0]):
        for k in range(ids_BK.shape[1]):
            e = ids_BK[b, k]
            if e >= 0:
                count_BS[b, shard_E[e]] += 1
                count_BH[b, host_S[shard_E[e]]] += 1


@_jit
def _book(b, sign, ids_BK, source_B, weight_B, shard_E, host_S, count_BS, count_BH, used_ES, used_EH, lone_E, lone_host_E, ingress_H):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Adds (`sign` 1) or takes away (-1) what bundle `b` has in the tables."""
    w = sign * weight_B[b]
    source = source_B[b]
    for k in range(ids_BK.shape[1]):
        e = ids_BK[b, k]
        if e < 0:
            continue
        for j in range(ids_BK.shape[1]):  # each used shard once: at its first expert
            f = ids_BK[b, j]
            if f < 0:
                continue
            s = shard_E[f]
            first = True
            first_host = True
            for i in range(j):
                g = ids_BK[b, i]
                if g >= 0 and shard_E[g] == s:
                    first = False
                    first_host = False
                    break
                if g >= 0 and host_S[shard_E[g]] == host_S[s]:
                    first_host = False
            if first:
                used_ES[e, s] += w
            if first_host and host_S[s] != source:
                used_EH[e, host_S[s]] += w
        if source >= 0:
            used_EH[e, source] += w
        if count_BS[b, shard_E[e]] == 1:
            lone_E[e] += w
        h = host_S[shard_E[e]]
        if h != source and count_BH[b, h] == 1:
            lone_host_E[e] += w
    for h in range(ingress_H.shape[0]):
        if count_BH[b, h] > 0 and h != source:
            ingress_H[h] += w


@_jit
def _moved(e, s1, s2, skip, ids_BK, source_B, weight_B, start, bundle, host_S, count_BS, count_BH, b_dev, b_host):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Exact change of (cost, ingress of s1's host, of s2's host) when `e` goes from s1 to s2,
    over bundles without `skip` (which takes its place: such bundles do not change)."""
    h1, h2 = host_S[s1], host_S[s2]
    cost = 0.0
    in1 = 0.0
    in2 = 0.0
    for i in range(start[e], start[e + 1]):
        b = bundle[i]
        both = False
        for k in range(ids_BK.shape[1]):
            if ids_BK[b, k] == skip:
                both = True
                break
        if both:
            continue
        w = weight_B[b]
        if count_BS[b, s1] == 1:
            cost -= b_dev * w
        if count_BS[b, s2] == 0:
            cost += b_dev * w
        if h1 != h2:
            source = source_B[b]
            if h1 != source and count_BH[b, h1] == 1:
                cost -= b_host * w
                in1 -= w
            if h2 != source and count_BH[b, h2] == 0:
                cost += b_host * w
                in2 += w
    return cost, in1, in2


@_jit
def swap_change(e1, e2, ids_BK, source_B, weight_B, start, bundle, shard_E, host_S, count_BS, count_BH, ingress_H, load_S, load_E, stay_ES, weights):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Exact change of the whole objective when `e1` and `e2` change places.

    Args:
        stay_ES: what having `e` on `s` costs in moved bytes (0 where it is held already).
        weights: (b_dev, b_host, mu, kappa).
    """
    b_dev, b_host, mu, kappa = weights
    s1, s2 = shard_E[e1], shard_E[e2]
    h1, h2 = host_S[s1], host_S[s2]
    cost1, out1, in2 = _moved(e1, s1, s2, e2, ids_BK, source_B, weight_B, start, bundle, host_S, count_BS, count_BH, b_dev, b_host)  # fmt: skip  # noqa: E501
    cost2, out2, in1 = _moved(e2, s2, s1, e1, ids_BK, source_B, weight_B, start, bundle, host_S, count_BS, count_BH, b_dev, b_host)  # fmt: skip  # noqa: E501
    change = cost1 + cost2
    change += stay_ES[e1, s2] + stay_ES[e2, s1] - stay_ES[e1, s1] - stay_ES[e2, s2]
    if mu > 0:
        before = load_S.max()
        moved = load_E[e1] - load_E[e2]
        after = max(load_S[s1] - moved, load_S[s2] + moved)
        for s in range(load_S.shape[0]):
            if s != s1 and s != s2:
                after = max(after, load_S[s])
        change += mu * (after - before)
    if kappa > 0 and h1 != h2:
        before = ingress_H.max()
        after = max(ingress_H[h1] + out1 + in1, ingress_H[h2] + out2 + in2)
        for h in range(ingress_H.shape[0]):
            if h != h1 and h != h2:
                after = max(after, ingress_H[h])
        change += kappa * (after - before)
    return change


@_jit
def _do_swap(e1, e2, ids_BK, source_B, weight_B, start, bundle, shard_E, host_S, count_BS, count_BH, used_ES, used_EH, lone_E, lone_host_E, ingress_H, load_S, load_E):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    s1, s2 = shard_E[e1], shard_E[e2]
    for sign in (-1.0, 1.0):
        for x in range(2):
            e, other = (e1, e2) if x == 0 else (e2, e1)
            for i in range(start[e], start[e + 1]):
                b = bundle[i]
                both = False
                for k in range(ids_BK.shape[1]):
                    if ids_BK[b, k] == other:
                        both = True
                        break
                if both and x == 1:
                    continue
                if sign > 0 and not both:
                    frm, to = (s1, s2) if x == 0 else (s2, s1)
                    count_BS[b, frm] -= 1
                    count_BS[b, to] += 1
                    count_BH[b, host_S[frm]] -= 1
                    count_BH[b, host_S[to]] += 1
                _book(b, sign, ids_BK, source_B, weight_B, shard_E, host_S, count_BS, count_BH, used_ES, used_EH, lone_E, lone_host_E, ingress_H)  # fmt: skip  # noqa: E501
        if sign < 0:
            shard_E[e1], shard_E[e2] = s2, s1
    moved = load_E[e1] - load_E[e2]
    load_S[s1] -= moved
    load_S[s2] += moved


@_jit
def _promising(shard_E, host_S, total_E, used_ES, used_EH, lone_E, lone_host_E, load_S, load_E, cap, stay_ES, weights, value_N, e1_N, e2_N):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """The best swaps by the tables (exact but for bundles with both experts); how many."""
    num_experts = shard_E.shape[0]
    b_dev, b_host = weights[0], weights[1]
    found = 0
    worst = 0
    for e1 in range(num_experts):
        s1 = shard_E[e1]
        h1 = host_S[s1]
        for e2 in range(e1 + 1, num_experts):
            s2 = shard_E[e2]
            if s1 == s2:
                continue
            moved = load_E[e1] - load_E[e2]
            top = max(load_S[s1] - moved, load_S[s2] + moved)
            if top > cap and top >= max(load_S[s1], load_S[s2]):
                continue
            h2 = host_S[s2]
            value = b_dev * (
                total_E[e1] - used_ES[e1, s2] - lone_E[e1]
                + total_E[e2] - used_ES[e2, s1] - lone_E[e2]
            )  # fmt: skip
            if h1 != h2:
                value += b_host * (
                    total_E[e1] - used_EH[e1, h2] - lone_host_E[e1]
                    + total_E[e2] - used_EH[e2, h1] - lone_host_E[e2]
                )  # fmt: skip
            value += stay_ES[e1, s2] + stay_ES[e2, s1] - stay_ES[e1, s1] - stay_ES[e2, s2]
            if max(load_S[s1], load_S[s2]) > cap:  # towards the cap at any price
                value -= 1e12 * (max(load_S[s1], load_S[s2]) - top) / cap
            if value >= 0 and weights[2] == 0 and weights[3] == 0:
                continue
            if found < value_N.shape[0]:
                value_N[found], e1_N[found], e2_N[found] = value, e1, e2
                found += 1
                if found == value_N.shape[0]:
                    worst = int(np.argmax(value_N))
            elif value < value_N[worst]:
                value_N[worst], e1_N[worst], e2_N[worst] = value, e1, e2
                worst = int(np.argmax(value_N))
    return found


@_jit
def _descend(ids_BK, source_B, weight_B, start, bundle, shard_E, host_S, count_BS, count_BH, ingress_H, load_S, load_E, cap, stay_ES, weights, swaps_max):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Best swaps first until none of the promising ones improves; the number of swaps."""
    num_experts, num_shards = shard_E.shape[0], host_S.shape[0]
    used_ES = np.zeros((num_experts, num_shards))
    used_EH = np.zeros((num_experts, ingress_H.shape[0]))
    lone_E = np.zeros(num_experts)
    lone_host_E = np.zeros(num_experts)
    ingress_H[:] = 0.0
    _count_uses(ids_BK, shard_E, host_S, count_BS, count_BH)
    for b in range(ids_BK.shape[0]):
        _book(b, 1.0, ids_BK, source_B, weight_B, shard_E, host_S, count_BS, count_BH, used_ES, used_EH, lone_E, lone_host_E, ingress_H)  # fmt: skip  # noqa: E501
    tiny = TINY * weight_B.sum()
    value_N = np.empty(_TRIES)
    e1_N = np.empty(_TRIES, np.int64)
    e2_N = np.empty(_TRIES, np.int64)
    done = 0
    while done < swaps_max:
        found = _promising(shard_E, host_S, load_E, used_ES, used_EH, lone_E, lone_host_E, load_S, load_E, cap, stay_ES, weights, value_N, e1_N, e2_N)  # fmt: skip  # noqa: E501
        order = np.argsort(value_N[:found])
        swapped = False
        for i in order:
            e1, e2 = e1_N[i], e2_N[i]
            s1, s2 = shard_E[e1], shard_E[e2]
            over = max(load_S[s1], load_S[s2])
            moved = load_E[e1] - load_E[e2]
            relief = over > cap and max(load_S[s1] - moved, load_S[s2] + moved) < over - tiny
            change = swap_change(e1, e2, ids_BK, source_B, weight_B, start, bundle, shard_E, host_S, count_BS, count_BH, ingress_H, load_S, load_E, stay_ES, weights)  # fmt: skip  # noqa: E501
            if change < -tiny or relief:
                _do_swap(e1, e2, ids_BK, source_B, weight_B, start, bundle, shard_E, host_S, count_BS, count_BH, used_ES, used_EH, lone_E, lone_host_E, ingress_H, load_S, load_E)  # fmt: skip  # noqa: E501
                done += 1
                swapped = True
                break
        if not swapped:
            break
    return done


@_jit
def _cost(source_B, weight_B, count_BS, count_BH, load_S, ingress_H, shard_E, stay_ES, weights):  # type: ignore[no-untyped-def]  # fmt: skip
    """The objective from the counts."""
    b_dev, b_host, mu, kappa = weights
    cost = mu * load_S.max() + kappa * ingress_H.max()
    for e in range(shard_E.shape[0]):
        cost += stay_ES[e, shard_E[e]]
    for b in range(weight_B.shape[0]):
        for s in range(count_BS.shape[1]):
            if count_BS[b, s] > 0:
                cost += b_dev * weight_B[b]
        for h in range(count_BH.shape[1]):
            if count_BH[b, h] > 0 and h != source_B[b]:
                cost += b_host * weight_B[b]
    return cost


class PartitionSearch:
    """Local search on one layer's bundles; searches from several seeds share its index.

    Args:
        bundles: of the layer.
        load_E: load of each expert that the cap is about: pairs, unless one wants another measure.
        weights: (b_dev, b_host, mu, kappa) of the objective (`grouping.Objective`).
        stay_ES: cost of having an expert on a shard where it was not; None = nothing.
    """

    def __init__(
        self,
        bundles: LayerBundles,
        topology: Topology,
        load_E: NDArray[np.float64],
        weights: tuple[float, float, float, float],
        stay_ES: NDArray[np.float64] | None = None,
    ) -> None:
        num_bundles, num_experts = len(bundles.weight_B), len(load_E)
        self._ids_BK = np.ascontiguousarray(bundles.experts_BK)
        self._source_B = bundles.source_B.astype(np.int64)
        self._weight_B = bundles.weight_B
        self._index = index_bundles(self._ids_BK, num_experts)
        self._host_S = np.array(topology.host_of_S, np.int64)
        self._load_E = load_E
        self._weights = weights
        shape = (num_experts, topology.num_shards)
        self._stay_ES = np.zeros(shape) if stay_ES is None else stay_ES
        self._count_BS = np.zeros((num_bundles, topology.num_shards), np.int8)
        self._count_BH = np.zeros((num_bundles, topology.num_hosts), np.int8)
        self._ingress_H = np.zeros(topology.num_hosts)

    def descend(
        self, shard_E: NDArray[np.int64], *, cap: float, swaps_max: int = 100_000
    ) -> tuple[NDArray[np.int64], float]:
        """Swaps from `shard_E` on while the objective falls and no load passes `cap` (or while an
        overloaded shard gets lighter); slots per shard stay as they are.

        Returns:
            The shard of each expert, and the objective.
        """
        shard_E = shard_E.copy()
        load_S = np.bincount(shard_E, self._load_E, len(self._host_S))
        start, bundle = self._index
        _descend(
            self._ids_BK, self._source_B, self._weight_B, start, bundle, shard_E, self._host_S,
            self._count_BS, self._count_BH, self._ingress_H, load_S, self._load_E, cap,
            self._stay_ES, self._weights, swaps_max,
        )  # fmt: skip
        cost = _cost(
            self._source_B, self._weight_B, self._count_BS, self._count_BH, load_S,
            self._ingress_H, shard_E, self._stay_ES, self._weights,
        )  # fmt: skip
        return shard_E, float(cost)
