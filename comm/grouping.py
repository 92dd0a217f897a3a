"""Grouping: which shards hold which experts, from what tokens picked together. Pure functions.

    problem = GroupingProblem(layers=(count_bundles(ids_TK, source_T), ...), num_experts=64,
                              topology=topology)
    result = plan_placement(problem, seed=0)
    result.held_L       # per layer [S, E]; `topology.placement_from` makes a Placement of it
    result.costs_L      # per layer `replay.LayerCost` on the planning bundles
    result.eplb_costs_L # the same of EPLB with the same slots and the same replica choice
    result.moved        # copies that a shard must fetch, against `problem.old_L`

What a placement costs on other tokens: `replay.replay(ids_TK, source_T, held_SE, topology)`.
To try another planner, give `plan_placement` another `plan_layer` (docs/routing.md).

Method (traffic.md, Objective and Method 2 to 4, 8): seeds, exact local search over partitions
(`partition_search.py`), replicas by marginal gain (`replica_search.py`), shards relabelled so that
weights stay. On the planning bundles no layer is worse than EPLB in copies or in load: where a
plan is, EPLB's placement is taken.

Shape suffixes: S shards, H hosts, E experts, L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.choice import GAIN
from remora.comm.eplb import eplb_held
from remora.comm.partition_search import PartitionSearch
from remora.comm.replay import LayerCost, choose_all, replay
from remora.comm.replica_search import change_tables, load_prices
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]
ROUNDS: Final = 30  # kicks of the local search


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights of traffic.md's objective, per token of the planning trace."""

    b_host: float = 1.0  # a row to a remote host
    b_dev: float = 0.125  # a row to a shard, wherever it is
    mu: float = 0.0  # times the largest load, in pairs, beyond what the cap does
    kappa: float = 0.0  # times the largest host's ingress, in rows
    nu: float = 1.0  # moving one expert's weights, in rows; divided by the horizon
    horizon_tokens: float = 1e6  # tokens that the new placement will serve
    load_eps: float = 0.02  # load of every shard <= (1 + load_eps) x mean, where it can be


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupingProblem:
    """What a plan is made from.

    Attributes:
        layers: bundles of each MoE layer, with sources.
        num_experts: E.
        topology: shards, hosts, slots.
        old_L: placement in force, `[S, E]` per layer; None = none.
    """

    layers: tuple[LayerBundles, ...]
    num_experts: int
    topology: Topology
    old_L: tuple[Held, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupingResult:
    """A placement and what it is predicted to cost; see the module's docstring."""

    held_L: tuple[Held, ...]
    costs_L: tuple[LayerCost, ...]
    eplb_costs_L: tuple[LayerCost, ...]
    moved: int


LayerPlanner = Callable[[LayerBundles, Topology, int, Held | None, Objective, int], Held]
Progress = Callable[[int, int], None]  # layers done, of how many


def plan_placement(
    problem: GroupingProblem,
    *,
    seed: int,
    objective: Objective | None = None,
    progress: Progress | None = None,
    plan_layer: LayerPlanner | None = None,
) -> GroupingResult:
    """Placement of all layers; deterministic in its arguments.

    Args:
        seed: of every random decision.
        progress: called after each layer, for long plans.
        plan_layer: (bundles, topology, num_experts, old or None, objective, seed) -> held; None is
            `plan_layer_by_search`.
    """
    objective = objective or Objective()
    plan = plan_layer or plan_layer_by_search
    held_L, costs_L, eplb_L = [], [], []
    for index, bundles in enumerate(problem.layers):
        old = problem.old_L[index] if problem.old_L is not None else None
        held = plan(
            bundles, problem.topology, problem.num_experts, old, objective, seed * 1009 + index
        )
        load_E = expert_loads(bundles, problem.num_experts)
        eplb = eplb_held(load_E, problem.topology)
        cost, eplb_cost = (
            bundle_cost(bundles, h, problem.topology, seed=seed) for h in (held, eplb)
        )
        bound = max(eplb_cost.load_max_over_mean, 1 + objective.load_eps)
        if cost.remote_copies > eplb_cost.remote_copies or cost.load_max_over_mean > bound:
            held, cost = eplb, eplb_cost
        held_L.append(held)
        costs_L.append(cost)
        eplb_L.append(eplb_cost)
        if progress is not None:
            progress(index + 1, len(problem.layers))
    moved = 0
    if problem.old_L is not None:
        moved = sum(int((h & ~o).sum()) for h, o in zip(held_L, problem.old_L, strict=True))
    return GroupingResult(
        held_L=tuple(held_L), costs_L=tuple(costs_L), eplb_costs_L=tuple(eplb_L), moved=moved
    )


def expert_loads(bundles: LayerBundles, num_experts: int) -> NDArray[np.float64]:
    """Pairs of each expert, `[E]`."""
    ids_BK = bundles.experts_BK
    weight_BK = np.broadcast_to(bundles.weight_B[:, None], ids_BK.shape)
    there = ids_BK >= 0
    return np.bincount(ids_BK[there], weight_BK[there], num_experts).astype(np.float64)


def bundle_cost(
    bundles: LayerBundles, held_SE: Held, topology: Topology, *, seed: int = 0, gain: int = GAIN
) -> LayerCost:
    """`replay` of a layer's bundles, in an order drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(bundles.weight_B))
    return replay(
        bundles.experts_BK[order], bundles.source_B[order], held_SE, topology,
        weight_T=bundles.weight_B[order], gain=gain,
    )  # fmt: skip


def plan_layer_by_search(
    bundles: LayerBundles,
    topology: Topology,
    num_experts: int,
    old: Held | None,
    objective: Objective,
    seed: int,
) -> Held:
    """One layer `[S, E]`: partition by local search from EPLB's packing, then replicas."""
    load_E = expert_loads(bundles, num_experts)
    rng = np.random.default_rng(seed)
    shards = topology.num_shards
    base = _base_slots(num_experts, topology)
    seed_E = eplb_held(load_E, base).argmax(0)
    weights = (objective.b_dev, objective.b_host, objective.mu, objective.kappa)
    search = PartitionSearch(bundles, topology, load_E, weights)
    cap = (1 + objective.load_eps) * load_E.sum() / shards
    best_E, best = search.descend(seed_E, cap=cap)
    for _ in range(ROUNDS):
        kicked_E = best_E.copy()
        for _ in range(4):
            a, b = rng.integers(0, num_experts, 2)
            kicked_E[a], kicked_E[b] = kicked_E[b], kicked_E[a]
        found_E, cost = search.descend(kicked_E, cap=cap)
        if cost < best and np.bincount(found_E, load_E, shards).max() <= cap:
            best_E, best = found_E, cost
    held_SE = np.zeros((shards, num_experts), np.bool_)
    held_SE[best_E, np.arange(num_experts)] = True
    _add_replicas(bundles, topology, held_SE, objective, rng)
    return held_SE


def _base_slots(num_experts: int, topology: Topology) -> Topology:
    """The topology with just the slots for one copy of each expert, evenly."""
    assert num_experts % topology.num_shards == 0, f"{num_experts} experts, {topology.num_shards}"
    return Topology(
        uids=topology.uids, hosts=topology.hosts, host_of_S=topology.host_of_S,
        slots_S=(num_experts // topology.num_shards,) * topology.num_shards,
    )  # fmt: skip


def _add_replicas(
    bundles: LayerBundles,
    topology: Topology,
    held_SE: Held,
    objective: Objective,
    rng: np.random.Generator,
) -> None:
    """Fills spare slots of `held_SE`, best gain first, a few between two passes of the choice."""
    host_S = np.array(topology.host_of_S, np.int64)
    order = rng.permutation(len(bundles.weight_B))
    ids_BK, source_B = bundles.experts_BK[order], bundles.source_B[order].astype(np.int64)
    weight_B = bundles.weight_B[order]
    slots_S = np.minimum(topology.slots_S, held_SE.shape[1])
    while (num_free := int((slots_S - held_SE.sum(1)).sum())) > 0:
        shard_BK = choose_all(ids_BK, source_B, held_SE, topology, weight_T=weight_B)
        weight_BK = np.where(shard_BK >= 0, weight_B[:, None], 0.0)
        load_S = np.bincount(
            np.maximum(shard_BK, 0).ravel(), weight_BK.ravel(), len(host_S)
        ).astype(float)
        gain_ES, _ = change_tables(
            ids_BK, source_B, weight_B, shard_BK, held_SE, host_S, topology.num_hosts,
            load_prices(load_S, GAIN), objective.b_dev, objective.b_host,
        )  # fmt: skip
        gain_ES[held_SE.T] = -1.0
        for _ in range(max(1, num_free // 8)):
            gain_ES[:, held_SE.sum(1) >= slots_S] = -1.0
            expert, shard = divmod(int(np.argmax(gain_ES)), len(host_S))
            if gain_ES[expert, shard] < 0:  # every expert had its turn in this pass
                break
            held_SE[shard, expert] = True
            gain_ES[expert] = -1.0
