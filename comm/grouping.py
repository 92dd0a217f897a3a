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

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.choice import GAIN
from remora.comm.eplb import eplb_held
from remora.comm.layer_plan import expert_loads, plan_layer_by_search
from remora.comm.objective import Objective
from remora.comm.replay import LayerCost, replay
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]


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
        assert held.any(0).all() and (held.sum(1) <= problem.topology.slots_S).all(), (
            f"layer {index}: {held.sum(1)} slots used, {held.sum(0).min()} copies of an expert"
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


def bundle_cost(
    bundles: LayerBundles, held_SE: Held, topology: Topology, *, seed: int = 0, gain: int = GAIN
) -> LayerCost:
    """`replay` of a layer's bundles, in an order drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(bundles.weight_B))
    return replay(
        bundles.experts_BK[order], bundles.source_B[order], held_SE, topology,
        weight_T=bundles.weight_B[order], gain=gain,
    )  # fmt: skip
