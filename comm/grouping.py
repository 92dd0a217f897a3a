"""Grouping: which shards hold which experts, from what tokens picked together. Pure functions.

    problem = GroupingProblem(layers=(count_bundles(ids_TK, source_T), ...), num_experts=64,
                              topology=topology)
    result = plan_placement(problem, seed=0)
    result.held_L       # per layer [S, E]; `topology.placement_from` makes a Placement of it
    result.costs_L      # per layer `replay.LayerCost` on the planning bundles
    result.eplb_costs_L # the same of EPLB with the same slots and the same replica choice
    result.moved        # copies that a shard must fetch, against `problem.old_L`

What a placement costs on other tokens: `replay.replay(ids_TK, source_T, held_SE, topology)`.
To try another planner, give `plan_placement` another `plan_layer` (docs/routing.md); what it
returns is neither repaired nor replaced.

Method (docs/routing.md): seeds, exact local search over partitions (`partition_search.py`),
replicas by marginal gain (`replica_search.py`), shards relabelled so that weights stay. A layer of
this search whose load on the planning bundles is more than `Objective.load_margin` over EPLB's is
repaired: exchanges under steeper load prices. EPLB's placement is taken only where that does not
help either, or where it is the better one by the objective, and never in place of an old placement,
all of which it would move.

Shape suffixes: S shards, H hosts, E experts, L MoE layers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles, sample_bundles
from remora.comm.eplb import eplb_held
from remora.comm.errors import PlannerError
from remora.comm.exchange_search import within_load
from remora.comm.layer_plan import expert_loads, plan_layer_by_search, sample_size
from remora.comm.objective import Objective
from remora.comm.replay import LayerCost, replay_bundles
from remora.comm.replica_search import value_of
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]
COST_BUNDLES_MAX: Final = 50_000


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
    threads: int = 1,
) -> GroupingResult:
    """Placement of all layers; deterministic in its arguments.

    Args:
        seed: of every random decision.
        progress: called after each layer, for long plans.
        threads: that plan layers at once; the result does not depend on it.
        plan_layer: (bundles, topology, num_experts, old or None, objective, seed) -> held, which is
            taken as it is, so that the result measures this planner alone. None is
            `plan_layer_by_search`, with repair of the load and EPLB's placement as last resort.

    Raises:
        PlannerError: `plan_layer` returned no placement; the text says what is wrong with it. What
            it raises itself comes through as it is.
    """
    objective = objective or Objective()

    def plan_one(index: int) -> tuple[Held, LayerCost, LayerCost]:
        return _plan_one(problem, index, plan_layer, objective, seed)

    found = []
    with ThreadPoolExecutor(threads) as pool:  # the searches are compiled and hold no lock
        for one in pool.map(plan_one, range(len(problem.layers))):
            found.append(one)
            if progress is not None:
                progress(len(found), len(problem.layers))
    held_L = tuple(held for held, _, _ in found)
    moved = 0
    if problem.old_L is not None:
        moved = sum(int((h & ~o).sum()) for h, o in zip(held_L, problem.old_L, strict=True))
    return GroupingResult(
        held_L=held_L,
        costs_L=tuple(cost for _, cost, _ in found),
        eplb_costs_L=tuple(eplb for _, _, eplb in found),
        moved=moved,
    )


def _plan_one(
    problem: GroupingProblem,
    index: int,
    plan_layer: LayerPlanner | None,
    objective: Objective,
    seed: int,
) -> tuple[Held, LayerCost, LayerCost]:
    """A layer's placement, its cost, and that of EPLB; repaired unless `plan_layer` is given."""
    bundles, topology = problem.layers[index], problem.topology
    old = problem.old_L[index] if problem.old_L is not None else None
    plan = plan_layer or plan_layer_by_search
    held = plan(bundles, topology, problem.num_experts, old, objective, seed * 1009 + index)
    fault = held_fault(held, topology, problem.num_experts)
    assert plan_layer is not None or fault is None, f"layer {index}: {fault}"
    if fault is not None:
        raise PlannerError(f"plan_layer, MoE layer number {index}: {fault}")
    eplb = eplb_held(expert_loads(bundles, problem.num_experts), topology)
    cost, eplb_cost = (bundle_cost(bundles, h, topology, seed=seed) for h in (held, eplb))
    if plan_layer is not None:
        return held, cost, eplb_cost
    load_max = max(eplb_cost.load_max_over_mean + objective.load_margin, 1 + objective.load_eps)
    if cost.load_max_over_mean > load_max:
        sample = sample_bundles(bundles, sample_size(topology, objective), seed)
        held = within_load(sample, topology, held, objective, load_max=load_max, old=old)
        cost = bundle_cost(bundles, held, topology, seed=seed)
    far_over = cost.load_max_over_mean > load_max + objective.load_margin
    is_worse = value_of(cost, objective) > value_of(eplb_cost, objective)
    if old is None and (far_over or is_worse):
        return eplb, eplb_cost, eplb_cost
    return held, cost, eplb_cost


def held_fault(held: object, topology: Topology, num_experts: int) -> str | None:
    """What makes something no placement `[S, E]` of a layer, if anything does."""
    shape = (topology.num_shards, num_experts)
    if not isinstance(held, np.ndarray) or held.dtype != np.bool_ or held.shape != shape:
        got = type(held).__name__
        if isinstance(held, np.ndarray):
            got = f"{held.dtype} {list(held.shape)}"
        return f"returned {got}, needed is a numpy array of bool {list(shape)} (shards, experts)"
    nowhere = np.flatnonzero(~held.any(0)).tolist()
    if nowhere:
        return f"no shard holds experts {', '.join(map(str, nowhere))}"
    for uid, used, slots in zip(topology.uids, held.sum(1), topology.slots_S, strict=True):
        if used > slots:
            return f"{uid} holds {used} experts in {slots} slots"
    return None


def bundle_cost(
    bundles: LayerBundles, held_SE: Held, topology: Topology, *, seed: int = 0
) -> LayerCost:
    """`replay_bundles` of a layer, of COST_BUNDLES_MAX at most, in an order drawn by `seed`."""
    return replay_bundles(sample_bundles(bundles, COST_BUNDLES_MAX, seed), held_SE, topology)
