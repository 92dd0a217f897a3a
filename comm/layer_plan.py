"""One layer's placement, from nothing or from the one in force.

From nothing: EPLB's packing and a hypergraph partition as seeds, local search over partitions,
replicas into spare slots, exchanges (`partition_search`, `replica_search`, `exchange_search`). From
an old placement: exchanges alone, each of which must save more rows over the horizon than moving
weights costs; what need not move stays.

Shape suffixes: S shards, H hosts, E experts, B bundles.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from remora.comm.bundles import LayerBundles, sample_bundles
from remora.comm.exchange_search import exchange
from remora.comm.hypergraph_seed import hypergraph_seed
from remora.comm.objective import Objective
from remora.comm.partition_search import PartitionSearch
from remora.comm.replica_search import add_coverage, add_replicas, tables_of, value_of
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]
SPARE_EPS: Final = (0.05, 0.25)  # caps of the partition under replicas
PAIRS_MAX: Final = 640_000  # of (bundle, shard) that a search looks at
KICKED_EXPERTS: Final = 64  # more of them: fewer kicks, since a descent takes longer by the square


def sample_size(topology: Topology, objective: Objective) -> int:
    """Bundles of a layer that a search looks at: what one costs grows with the shards."""
    return min(objective.bundles_max, PAIRS_MAX // topology.num_shards)


def expert_loads(bundles: LayerBundles, num_experts: int) -> NDArray[np.float64]:
    """Pairs of each expert, `[E]`."""
    ids_BK = bundles.experts_BK
    weight_BK = np.broadcast_to(bundles.weight_B[:, None], ids_BK.shape)
    there = ids_BK >= 0
    return np.bincount(ids_BK[there], weight_BK[there], num_experts).astype(np.float64)


def plan_layer_by_search(
    bundles: LayerBundles,
    topology: Topology,
    num_experts: int,
    old: Held | None,
    objective: Objective,
    seed: int,
) -> Held:
    """`[S, E]`; deterministic. Arguments as `grouping.plan_placement` says of `plan_layer`."""
    rng = np.random.default_rng(seed)
    size = sample_size(topology, objective)
    if old is not None:
        few = sample_bundles(bundles, size // 2, seed)
        return warm_layer(few, topology, old, objective)
    mixed = sample_bundles(bundles, size, seed)
    load_E = expert_loads(bundles, num_experts)
    weights = (objective.b_dev, objective.b_host, objective.mu, objective.kappa)
    search = PartitionSearch(mixed, topology, load_E, weights)
    mean = load_E.sum() / topology.num_shards
    shard_E, least = search.descend(packed(load_E, topology), cap=(1 + objective.load_eps) * mean)
    parted_E = hypergraph_seed(mixed, num_experts, topology, seed=seed)
    if parted_E is not None:
        parted_E, cost = search.descend(parted_E, cap=(1 + objective.load_eps) * mean)
        if cost < least and np.bincount(parted_E, load_E).max() <= (1 + objective.load_eps) * mean:
            shard_E = parted_E
    has_spares = sum(topology.slots_S) > num_experts
    best_held, best = None, np.inf
    for eps in SPARE_EPS if has_spares else (objective.load_eps,):
        held_SE = relabel(one_copy(shard_E, topology), None, mixed, topology, objective)
        shard_E = _kicked(search, held_SE.argmax(0), load_E, (1 + eps) * mean, objective, rng)
        held_SE = one_copy(shard_E, topology)
        if has_spares:
            add_coverage(mixed, topology, held_SE, objective)
            add_replicas(mixed, topology, held_SE, objective)
            held_SE = exchange(mixed, topology, held_SE, objective)
        value = value_of(tables_of(mixed, topology, held_SE, objective)[2], objective)
        if value < best:
            best_held, best = held_SE, value
    assert best_held is not None
    return best_held


def warm_layer(bundles: LayerBundles, topology: Topology, old: Held, objective: Objective) -> Held:
    """Exchanges from the old placement, made to fit first: experts without a copy get one (in
    place of the copy that others have most of), free slots are filled."""
    held_SE = old.copy()
    slots_S = np.array(topology.slots_S)
    for shard in np.flatnonzero(held_SE.sum(1) > slots_S).tolist():
        held = np.flatnonzero(held_SE[shard])
        spare_first = held[np.argsort(-held_SE[:, held].sum(0), kind="stable")]
        held_SE[shard, spare_first[: len(held) - slots_S[shard]]] = False
    for expert in np.flatnonzero(~held_SE.any(0)).tolist():
        free = np.flatnonzero(held_SE.sum(1) < slots_S)
        if len(free):
            held_SE[free[0], expert] = True
            continue
        shard, out = divmod(int(np.argmax(held_SE * held_SE.sum(0))), held_SE.shape[1])
        held_SE[shard, out], held_SE[shard, expert] = False, True
    add_coverage(bundles, topology, held_SE, objective)
    add_replicas(bundles, topology, held_SE, objective)
    return exchange(bundles, topology, held_SE, objective, old=old)


def packed(load_E: NDArray[np.float64], topology: Topology) -> NDArray[np.int64]:
    """One copy of each expert, heaviest first to the lightest shard with room: EPLB's rule. Shards
    get their share of the experts by their slots."""
    num_experts, slots_S = len(load_E), np.array(topology.slots_S, np.float64)
    room_S = np.floor(slots_S * num_experts / slots_S.sum()).astype(np.int64)
    left = np.argsort(room_S - slots_S * num_experts / slots_S.sum(), kind="stable")
    room_S[left[: num_experts - room_S.sum()]] += 1
    shard_E = np.empty(num_experts, np.int64)
    load_S = np.zeros(len(room_S))
    for expert in np.argsort(-load_E, kind="stable").tolist():
        shard = int(np.where(room_S > 0, load_S, np.inf).argmin())
        shard_E[expert] = shard
        room_S[shard] -= 1
        load_S[shard] += load_E[expert]
    return shard_E


def one_copy(shard_E: NDArray[np.int64], topology: Topology) -> Held:
    """A partition as a placement."""
    held_SE = np.zeros((topology.num_shards, len(shard_E)), np.bool_)
    held_SE[shard_E, np.arange(len(shard_E))] = True
    return held_SE


def relabel(
    held_SE: Held,
    old: Held | None,
    bundles: LayerBundles,
    topology: Topology,
    objective: Objective,
) -> Held:
    """The same groups under other names: hosts, then shards within a host, so that tokens find
    experts on their source and weights stay where they are (assignment problems, by rows).

    Hosts trade places only when their shards and slots are alike.
    """
    host_S, slots_S = np.array(topology.host_of_S), np.array(topology.slots_S)
    shards_of = [np.flatnonzero(host_S == h) for h in range(topology.num_hosts)]
    if len({tuple(slots_S[shards].tolist()) for shards in shards_of}) > 1:
        return held_SE
    a_move = objective.nu * bundles.num_tokens / objective.horizon_tokens
    stays_SS = np.zeros((len(host_S), len(host_S)))
    if old is not None:
        stays_SS = a_move * (held_SE.astype(np.float64) @ old.T.astype(np.float64))
    known = bundles.source_B >= 0
    ids_BK = bundles.experts_BK[known]
    worth_HH = np.zeros((topology.num_hosts, topology.num_hosts))
    inner: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for group, mine in enumerate(shards_of):
        held_E: NDArray[np.bool_] = np.logical_or.reduce(held_SE[mine])
        uses_B = (held_E[np.maximum(ids_BK, 0)] & (ids_BK >= 0)).any(1)
        weight_B = uses_B * bundles.weight_B[known]
        worth_HH[group] = objective.b_host * np.bincount(
            bundles.source_B[known], weight_B, topology.num_hosts
        )
        for host, theirs in enumerate(shards_of):
            block = stays_SS[np.ix_(mine, theirs)]
            inner[group, host] = linear_sum_assignment(-block)
            worth_HH[group, host] += block[inner[group, host]].sum()
    result_SE = np.zeros_like(held_SE)
    for group, host in zip(*linear_sum_assignment(-worth_HH), strict=True):
        rows, columns = inner[int(group), int(host)]
        result_SE[shards_of[host][columns]] = held_SE[shards_of[group][rows]]
    return result_SE


def _num_kicks(objective: Objective, num_experts: int) -> int:
    return round(objective.rounds * min(1.0, KICKED_EXPERTS / num_experts) ** 2)


def _kicked(
    search: PartitionSearch,
    shard_E: NDArray[np.int64],
    load_E: NDArray[np.float64],
    cap: float,
    objective: Objective,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Iterated local search: a few random swaps, down again, kept when better."""
    best_E, best = search.descend(shard_E, cap=cap)
    for _ in range(_num_kicks(objective, len(load_E))):
        kicked_E = best_E.copy()
        for _ in range(4):
            a, b = rng.integers(0, len(load_E), 2)
            kicked_E[a], kicked_E[b] = kicked_E[b], kicked_E[a]
        found_E, cost = search.descend(kicked_E, cap=cap)
        if cost < best and np.bincount(found_E, load_E).max() <= cap:
            best_E, best = found_E, cost
    return best_E
