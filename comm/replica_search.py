"""Replicas into spare slots: each where it saves most, by what the tokens would really do.

One pass of the dispatch's own choice over a layer's bundles says which shard every pair goes to.
From that, two tables follow at once:

    gain[e, s]  what a copy of `e` on `s` would save: pairs of bundles that use `s` (or `s`'s host)
                anyway go there, rows to shards and hosts that only they needed are saved, and load
                moves from dear shards to cheap ones
    loss[e, s]  what taking the copy of `e` away from `s` would cost, the same way

Both look at one change at a time with everything else as it is: bundles that would rearrange
themselves more cleverly make the truth a little better than `gain` and `loss` say.

Shape suffixes: B bundles, K top-k, E experts, R most replicas, S shards, H hosts.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def change_tables(ids_BK, source_B, weight_B, shard_BK, held_SE, host_S, num_hosts, price_S, b_dev, b_host):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """(gain_ES, loss_ES) as above, in weight x copies.

    Args:
        shard_BK: the shard of each pair (`replay.choose_all`).
        price_S: price of one pair's load on each shard, in copies.
    """
    num_shards, num_experts = held_SE.shape
    gain_ES = np.zeros((num_experts, num_shards))
    loss_ES = np.zeros((num_experts, num_shards))
    count_S = np.zeros(num_shards, np.int64)
    count_H = np.zeros(num_hosts, np.int64)
    top_k = ids_BK.shape[1]
    for b in range(ids_BK.shape[0]):
        w, source = weight_B[b], source_B[b]
        for k in range(top_k):
            if ids_BK[b, k] >= 0:
                count_S[shard_BK[b, k]] += 1
                count_H[host_S[shard_BK[b, k]]] += 1
        for k in range(top_k):
            e = ids_BK[b, k]
            if e < 0:
                continue
            r = shard_BK[b, k]
            hr = host_S[r]
            left = price_S[r]
            if count_S[r] == 1:
                left += b_dev
            if hr != source and count_H[hr] == 1:
                left += b_host
            cheapest = np.inf
            for s in range(num_shards):
                if s == r:
                    continue
                h = host_S[s]
                cost = price_S[s]
                if count_S[s] == 0:
                    cost += b_dev
                if h != source and (count_H[h] == 0 or (h == hr and count_H[h] == 1)):
                    cost += b_host
                if held_SE[s, e]:
                    cheapest = min(cheapest, cost)
                elif cost < left:
                    gain_ES[e, s] += w * (left - cost)
            loss_ES[e, r] += w * max(0.0, cheapest - left)
        for k in range(top_k):
            if ids_BK[b, k] >= 0:
                count_S[shard_BK[b, k]] = 0
                count_H[host_S[shard_BK[b, k]]] = 0
    return gain_ES, loss_ES


def load_prices(load_S: NDArray[np.float64], gain: float) -> NDArray[np.float64]:
    """Copies that a pair costs on each shard: `gain` times its share over the mean."""
    mean = load_S.mean()
    return gain * (load_S / mean - 1.0) if mean > 0 else np.zeros_like(load_S)
