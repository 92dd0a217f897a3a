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

from remora.comm.bundles import LayerBundles
from remora.comm.choice import GAIN_ONE, gain_for
from remora.comm.objective import Objective
from remora.comm.replay import LayerCost, choose_bundles, cost_of_choice, replicas_of
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def change_tables(ids_BK, source_B, weight_B, shard_BK, held_SE, table_ER, host_S, num_hosts, price_S, b_dev, b_host):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """(gain_ES, loss_ES) as above, in weight x copies.

    Args:
        shard_BK: the shard of each pair (`replay.choose_bundles`).
        table_ER: `replay.replicas_of(held_SE)`.
        price_S: price of one pair's load on each shard, in copies.
    """
    num_shards, num_experts = held_SE.shape
    gain_ES = np.zeros((num_experts, num_shards))
    loss_ES = np.zeros((num_experts, num_shards))
    count_S = np.zeros(num_shards, np.int64)
    count_H = np.zeros(num_hosts, np.int64)
    cost_S = np.empty(num_shards)  # of a further pair of the bundle there
    from_S = np.empty(num_shards)  # the same for the only pair of a host, which leaves it
    top_k = ids_BK.shape[1]
    for b in range(ids_BK.shape[0]):
        w, source = weight_B[b], source_B[b]
        for k in range(top_k):
            if ids_BK[b, k] >= 0:
                count_S[shard_BK[b, k]] += 1
                count_H[host_S[shard_BK[b, k]]] += 1
        for s in range(num_shards):
            h = host_S[s]
            cost = price_S[s]
            if count_S[s] == 0:
                cost += b_dev
            if h != source and count_H[h] == 0:
                cost += b_host
            cost_S[s] = cost
        for k in range(top_k):
            e = ids_BK[b, k]
            if e < 0:
                continue
            r = shard_BK[b, k]
            hr = host_S[r]
            left = price_S[r]
            if count_S[r] == 1:
                left += b_dev
            costs_S = cost_S
            if hr != source and count_H[hr] == 1:
                left += b_host
                for s in range(num_shards):
                    from_S[s] = cost_S[s] + (b_host if host_S[s] == hr else 0.0)
                costs_S = from_S
            gain_S = gain_ES[e]
            for s in range(num_shards):  # without branches: compilers make vectors of it
                saved = left - costs_S[s]
                gain_S[s] += w * (saved if saved > 0.0 else 0.0)
            cheapest = np.inf
            for i in range(table_ER.shape[1]):
                s = table_ER[e, i]
                if s < 0:
                    break
                if s != r:
                    cheapest = min(cheapest, costs_S[s])
            loss_ES[e, r] += w * max(0.0, cheapest - left)
        for k in range(top_k):
            if ids_BK[b, k] >= 0:
                count_S[shard_BK[b, k]] = 0
                count_H[host_S[shard_BK[b, k]]] = 0
    for s in range(num_shards):
        for e in range(num_experts):
            if held_SE[s, e]:
                gain_ES[e, s] = 0.0  # it is there
    return gain_ES, loss_ES


def load_prices(load_S: NDArray[np.float64], gain: float) -> NDArray[np.float64]:
    """Copies that a pair costs on each shard: `gain` times its share over the mean."""
    mean = load_S.mean()
    return gain * (load_S / mean - 1.0) if mean > 0 else np.zeros_like(load_S)


def value_of(cost: LayerCost, objective: Objective) -> float:
    """The objective per token of a cost; load over the cap is dear."""
    tokens = max(cost.tokens, 1e-30)
    rows = objective.b_host * cost.remote_copies + objective.b_dev * cost.shard_copies
    worst = objective.mu * cost.load_S.max() + objective.kappa * cost.ingress_H.max()
    over = max(0.0, cost.load_max_over_mean - 1 - objective.load_eps)
    return float((rows + worst) / tokens + objective.load_price * over)


def tables_of(
    bundles: LayerBundles,
    topology: Topology,
    held_SE: Held,
    objective: Objective,
    *,
    steepness: float = 1.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64], LayerCost]:
    """`change_tables` of a replay, load at `steepness` times its price, and what it cost."""
    shard_BK = choose_bundles(bundles, held_SE, topology)
    cost = cost_of_choice(shard_BK, bundles.source_B, bundles.weight_B, topology)
    gain_ES, loss_ES = change_tables(
        bundles.experts_BK, bundles.source_B.astype(np.int64), bundles.weight_B, shard_BK, held_SE,
        replicas_of(held_SE), np.array(topology.host_of_S, np.int64), topology.num_hosts,
        load_prices(cost.load_S, steepness * gain_for(topology.num_shards) / GAIN_ONE),
        objective.b_dev, objective.b_host,
    )  # fmt: skip
    return gain_ES, loss_ES, cost


def hosts_wanted(topology: Topology, num_experts: int) -> int:
    """Hosts that each expert should have a copy on: 2 where slots allow, else 1."""
    room = sum(min(slots, num_experts) for slots in topology.slots_S)
    return 2 if topology.num_hosts > 1 and room >= 2 * num_experts else 1


def hosts_holding(held_SE: Held, topology: Topology) -> NDArray[np.int64]:
    """`[E]` hosts that hold each expert."""
    held_HE = np.zeros((topology.num_hosts, held_SE.shape[1]), np.bool_)
    np.logical_or.at(held_HE, np.array(topology.host_of_S), held_SE)
    count_E: NDArray[np.int64] = held_HE.sum(0)
    return count_E


def add_coverage(
    bundles: LayerBundles, topology: Topology, held_SE: Held, objective: Objective
) -> None:
    """Copies on a second host where slots allow (`hosts_wanted`), where they save most."""
    if hosts_wanted(topology, held_SE.shape[1]) < 2:
        return
    host_S, slots_S = np.array(topology.host_of_S), np.array(topology.slots_S)
    gain_ES, _, _ = tables_of(bundles, topology, held_SE, objective)
    order = np.argsort(-gain_ES.max(1), kind="stable")
    for expert in order[hosts_holding(held_SE, topology)[order] < 2].tolist():
        other_S = ~np.isin(host_S, host_S[held_SE[:, expert]]) & (held_SE.sum(1) < slots_S)
        if other_S.any():
            # ties, and what saves nothing: to the emptiest shard
            key_S = gain_ES[expert] + 1e-9 * (slots_S - held_SE.sum(1))
            held_SE[int(np.where(other_S, key_S, -np.inf).argmax()), expert] = True


def add_replicas(
    bundles: LayerBundles, topology: Topology, held_SE: Held, objective: Objective
) -> None:
    """Fills spare slots of `held_SE`, best gain first, a few between two passes of the choice."""
    slots_S = np.minimum(topology.slots_S, held_SE.shape[1])
    while (num_free := int((slots_S - held_SE.sum(1)).sum())) > 0:
        gain_ES, _, _ = tables_of(bundles, topology, held_SE, objective)
        gain_ES[held_SE.T] = -1.0
        for _ in range(max(1, num_free // 6)):
            gain_ES[:, held_SE.sum(1) >= slots_S] = -1.0
            expert, shard = divmod(int(np.argmax(gain_ES)), topology.num_shards)
            if gain_ES[expert, shard] < 0:  # every expert had its turn in this pass
                break
            held_SE[shard, expert] = True
            gain_ES[expert] = -1.0
