"""Planner: invariants, exact increments against a recount, small cases against brute force."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import layer

from remora.comm import partition_search
from remora.comm.bundles import LayerBundles, count_bundles
from remora.comm.eplb import eplb_held
from remora.comm.errors import PlannerError
from remora.comm.exchange_search import exchange, within_load
from remora.comm.grouping import GroupingProblem, plan_placement
from remora.comm.layer_plan import expert_loads, one_copy, relabel, warm_layer
from remora.comm.objective import Objective
from remora.comm.partition_search import PartitionSearch
from remora.comm.replay import replay_bundles
from remora.comm.replica_search import hosts_holding, tables_of, value_of
from remora.comm.topology import Topology, uniform_topology

QUICK = Objective(rounds=3)


def brute_cost(
    bundles: LayerBundles, shard_E: np.ndarray, topology: Topology, objective: Objective
) -> float:
    """The objective by its definition, bundle by bundle."""
    rows, ingress = 0.0, np.zeros(topology.num_hosts)
    for ids, source, weight in zip(
        bundles.experts_BK.tolist(), bundles.source_B, bundles.weight_B, strict=True
    ):
        shards = {int(shard_E[e]) for e in ids if e >= 0}
        hosts = {topology.host_of_S[s] for s in shards} - {int(source)}
        rows += weight * (objective.b_dev * len(shards) + objective.b_host * len(hosts))
        ingress[list(hosts)] += weight
    load = np.bincount(shard_E, expert_loads(bundles, len(shard_E)), topology.num_shards)
    return float(rows + objective.mu * load.max() + objective.kappa * ingress.max())


def searcher(
    bundles: LayerBundles, topology: Topology, objective: Objective, num_experts: int
) -> PartitionSearch:
    weights = (objective.b_dev, objective.b_host, objective.mu, objective.kappa)
    return PartitionSearch(bundles, topology, expert_loads(bundles, num_experts), weights)


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from([(4, 1), (2, 2), (1, 4)]), st.booleans())
def test_every_swap_changes_the_objective_by_what_is_predicted(
    seed: int, shape: tuple[int, int], worst: bool
) -> None:
    topology = uniform_topology(num_hosts=shape[0], shards_per_host=shape[1], slots=4)
    objective = Objective(mu=0.3 * worst, kappa=0.7 * worst)
    bundles = layer(seed, shape[0], tokens=80)
    search = searcher(bundles, topology, objective, 16)
    shard_E = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 4))
    _, cost = search.descend(shard_E, cap=np.inf, swaps_max=0)
    assert cost == pytest.approx(brute_cost(bundles, shard_E, topology, objective))
    load_S = np.bincount(shard_E, search._load_E, 4)
    for a, b in itertools.combinations(range(0, 16, 3), 2):
        if shard_E[a] == shard_E[b]:
            continue
        swapped_E = shard_E.copy()
        swapped_E[[a, b]] = shard_E[[b, a]]
        change = partition_search.swap_change(
            a, b, search._ids_BK, search._source_B, search._weight_B, *search._index, shard_E,
            search._host_S, search._count_BS, search._count_BH, search._ingress_H, load_S,
            search._load_E, search._stay_ES, search._weights,
        )  # fmt: skip
        expected = brute_cost(bundles, swapped_E, topology, objective) - cost
        assert change == pytest.approx(expected, abs=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from([(4, 1), (2, 2)]))
def test_what_the_search_books_is_what_a_recount_finds(seed: int, shape: tuple[int, int]) -> None:
    topology = uniform_topology(num_hosts=shape[0], shards_per_host=shape[1], slots=4)
    bundles, objective = layer(seed, shape[0]), Objective()
    search = searcher(bundles, topology, objective, 16)
    start_E = np.repeat(np.arange(4), 4)
    cap = 1.3 * search._load_E.sum() / 4
    found_E, cost = search.descend(start_E, cap=cap)
    assert cost == pytest.approx(brute_cost(bundles, found_E, topology, objective))
    assert (np.bincount(found_E, minlength=4) == 4).all()
    loads = np.bincount(found_E, search._load_E, 4)
    assert loads.max() <= max(cap, np.bincount(start_E, search._load_E, 4).max()) + 1e-9


def test_the_optimum_of_a_small_case_is_found() -> None:
    """Eight experts on two hosts of four: all 70 partitions are tried."""
    topology = uniform_topology(num_hosts=2, shards_per_host=1, slots=4)
    objective = Objective(load_eps=10.0, rounds=20)
    for seed in range(5):
        bundles = layer(seed, 2, experts=8, tokens=120)
        result = plan_placement(
            GroupingProblem(layers=(bundles,), num_experts=8, topology=topology),
            seed=seed, objective=objective,
        )  # fmt: skip
        optimum = min(
            brute_cost(bundles, np.isin(np.arange(8), first).astype(int), topology, objective)
            for first in itertools.combinations(range(8), 4)
        )
        found_E = result.held_L[0].argmax(0)
        assert brute_cost(bundles, found_E, topology, objective) == pytest.approx(optimum)


@settings(max_examples=6)
@given(st.integers(0, 50), st.sampled_from([(4, 1), (2, 2)]), st.integers(4, 7))
def test_invariants_of_a_plan(seed: int, shape: tuple[int, int], slots: int) -> None:
    topology = uniform_topology(num_hosts=shape[0], shards_per_host=shape[1], slots=slots)
    problem = GroupingProblem(
        layers=(layer(seed, shape[0]), layer(seed + 1, shape[0])), num_experts=16, topology=topology
    )
    done: list[int] = []
    result = plan_placement(
        problem, seed=seed, objective=QUICK, progress=lambda at, of: done.append(at * 10 + of)
    )
    assert done == [12, 22]
    for held_SE, cost, eplb in zip(result.held_L, result.costs_L, result.eplb_costs_L, strict=True):
        assert held_SE.any(0).all(), "an expert without a copy"
        assert (held_SE.sum(1) <= slots).all()
        assert cost.remote_copies <= eplb.remote_copies
        bound = max(eplb.load_max_over_mean + QUICK.load_margin, 1 + QUICK.load_eps)
        assert cost.load_max_over_mean <= bound + QUICK.load_margin + 1e-9
    again = plan_placement(problem, seed=seed, objective=QUICK, threads=2)
    assert all(np.array_equal(a, b) for a, b in zip(result.held_L, again.held_L, strict=True))


def test_a_warm_start_keeps_what_it_need_not_move() -> None:
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=5)
    one, other = layer(3, 4), layer(4, 4)
    fresh = plan_placement(
        GroupingProblem(layers=(one,), num_experts=16, topology=topology), seed=0, objective=QUICK
    )
    assert fresh.moved == 0  # nothing was there before
    dear, free = Objective(rounds=3, nu=1e12), Objective(rounds=3, nu=0.0)
    kept, moved = (
        plan_placement(
            GroupingProblem(layers=(other,), num_experts=16, topology=topology, old_L=fresh.held_L),
            seed=0,
            objective=objective,
        )
        for objective in (dear, free)
    )
    assert kept.moved == 0 and np.array_equal(kept.held_L[0], fresh.held_L[0])
    assert moved.moved == int((moved.held_L[0] & ~fresh.held_L[0]).sum())
    assert value_of(moved.costs_L[0], free) <= value_of(kept.costs_L[0], free)


def test_an_old_placement_that_no_longer_fits_is_repaired() -> None:
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=5)
    old = np.zeros((4, 16), bool)
    old[0, :8] = True  # too many here, and experts 8 .. 15 nowhere
    held = warm_layer(layer(1, 4), topology, old, QUICK)
    assert held.any(0).all() and (held.sum(1) == 5).all()


def test_two_hosts_hold_every_expert_where_slots_allow() -> None:
    topology = uniform_topology(num_hosts=2, shards_per_host=2, slots=9)
    result = plan_placement(
        GroupingProblem(layers=(layer(2, 2),), num_experts=16, topology=topology),
        seed=1, objective=QUICK,
    )  # fmt: skip
    assert (hosts_holding(result.held_L[0], topology) == 2).all()


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_relabelling_brings_weights_back_to_where_they_were(shape: tuple[int, int]) -> None:
    topology = uniform_topology(num_hosts=shape[0], shards_per_host=shape[1], slots=4)
    held = one_copy(np.repeat(np.arange(4), 4), topology)
    names = [2, 3, 1, 0] if shape == (2, 2) else [3, 1, 0, 2]
    bundles = layer(0, shape[0])
    heavy = Objective(nu=1e9)
    assert np.array_equal(relabel(held[names], held, bundles, topology, heavy), held)
    free = relabel(held, None, bundles, topology, heavy)
    assert sorted(map(tuple, free.tolist())) == sorted(map(tuple, held.tolist()))


def test_unequal_shards_are_filled_as_far_as_they_go() -> None:
    topology = Topology(
        uids=("a", "b", "c"), hosts=("x", "y"), host_of_S=(0, 0, 1), slots_S=(3, 7, 10)
    )
    result = plan_placement(
        GroupingProblem(layers=(layer(5, 2),), num_experts=16, topology=topology),
        seed=0, objective=QUICK,
    )  # fmt: skip
    held = result.held_L[0]
    assert held.any(0).all() and held.sum(1).tolist() == [3, 7, 10]


def test_a_planner_of_ones_own_is_measured_as_it_is() -> None:
    """Neither repair nor EPLB's placement, whatever load and copies come of it."""
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=13)
    bundles = layer(0, 4)
    heavy = np.zeros((4, 16), np.bool_)
    heavy[0, :13] = heavy[1, 13:] = True
    result = plan_placement(
        GroupingProblem(layers=(bundles,), num_experts=16, topology=topology),
        seed=0,
        plan_layer=lambda *_: heavy.copy(),
    )
    assert (result.held_L[0] == heavy).all()
    cost = replay_bundles(bundles, heavy, topology)
    assert result.costs_L[0].load_max_over_mean > 2 > result.eplb_costs_L[0].load_max_over_mean
    assert result.costs_L[0].remote_copies == pytest.approx(cost.remote_copies, rel=0.02)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda held: held.T, r"returned bool \[16, 4\], needed is .* bool \[4, 16\]"),
        (lambda held: held[:, :-1], r"returned bool \[4, 15\]"),
        (lambda held: held.astype(np.int64), r"returned int64 \[4, 16\]"),
        (lambda held: held.tolist(), "returned list"),
        (lambda held: None, "returned NoneType"),
        (lambda held: held & (np.arange(16) % 7 != 3), "no shard holds experts 3, 10"),
        (lambda held: held | (np.arange(4) == 2)[:, None], "shard-2 holds 16 experts in 5 slots"),
    ],
)
def test_a_planner_of_ones_own_is_told_what_is_wrong(
    spoil: Callable[[np.ndarray], object], said: str
) -> None:
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=5)

    def mine(*_: object) -> Any:
        return spoil(one_copy(np.arange(16) % 4, topology))

    problem = GroupingProblem(layers=(layer(0, 4),), num_experts=16, topology=topology)
    with pytest.raises(PlannerError, match=f"plan_layer, MoE layer number 0: {said}"):
        plan_placement(problem, seed=0, plan_layer=mine)


def test_a_plan_over_the_load_is_repaired_and_not_given_up() -> None:
    """Groups by topic, one topic being more frequent: exchanges bring the load under the cap and
    keep much of what grouping saves, which EPLB's placement has none of."""
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=4)
    rng = np.random.default_rng(0)
    topic_T = rng.choice(4, (2000, 1), p=[0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3])
    scores = rng.gumbel(size=(2000, 16)) + 4.0 * (np.arange(16) % 4 == topic_T)
    bundles = count_bundles(np.argsort(-scores, 1)[:, :3], np.arange(2000) % 4)
    held = one_copy(np.arange(16) % 4, topology)
    load_max = 1.1
    before = replay_bundles(bundles, held, topology)
    repaired = within_load(bundles, topology, held, QUICK, load_max=load_max)
    after = replay_bundles(bundles, repaired, topology)
    eplb = replay_bundles(bundles, eplb_held(expert_loads(bundles, 16), topology), topology)
    assert before.load_max_over_mean > load_max >= after.load_max_over_mean
    assert after.remote_copies < 0.75 * eplb.remote_copies


@pytest.mark.parametrize("seed", [9, 37, 59])
def test_eplb_replaces_a_plan_that_it_is_better_than_and_no_other(seed: int) -> None:
    """Of these few heavy bundles EPLB has fewer copies, in two cases for more load than they are
    worth."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 9, (30, 2))
    kinds = kinds[kinds[:, 0] != kinds[:, 1]]
    share = rng.exponential(size=len(kinds)) ** 1.5
    ids_TK = kinds[rng.choice(len(kinds), 600, p=share / share.sum())]
    topology = uniform_topology(num_hosts=3, shards_per_host=1, slots=4)
    bundles = count_bundles(ids_TK, np.arange(600) % 3)
    problem = GroupingProblem(layers=(bundles,), num_experts=9, topology=topology)
    result = plan_placement(problem, seed=0)
    eplb = eplb_held(expert_loads(bundles, 9), topology)
    assert (result.held_L[0] == eplb).all() == (seed == 37)
    values = [value_of(costs[0], Objective()) for costs in (result.costs_L, result.eplb_costs_L)]
    assert values[0] <= values[1]


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([(4, 1), (2, 2)]), st.sampled_from([1.0, 8.0]))
def test_exchanges_keep_slots_and_never_make_it_worse(
    seed: int, shape: tuple[int, int], steepness: float
) -> None:
    topology = uniform_topology(num_hosts=shape[0], shards_per_host=shape[1], slots=5)
    bundles, rng = layer(seed, shape[0]), np.random.default_rng(seed)
    held = one_copy(rng.permutation(np.repeat(np.arange(4), 4)), topology)
    for shard in range(4):
        held[shard, rng.choice(np.flatnonzero(~held[shard]))] = True
    found = exchange(bundles, topology, held, QUICK, steepness=steepness)
    assert found.any(0).all() and (found.sum(1) == 5).all()
    values = [value_of(tables_of(bundles, topology, h, QUICK)[2], QUICK) for h in (held, found)]
    assert values[1] <= values[0]


def test_exchanges_improve_a_random_placement() -> None:
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=5)
    bundles, rng = layer(0, 4), np.random.default_rng(0)
    held = one_copy(rng.permutation(np.repeat(np.arange(4), 4)), topology)
    for shard in range(4):
        held[shard, rng.choice(np.flatnonzero(~held[shard]))] = True
    found = exchange(bundles, topology, held, QUICK)
    before, after = (
        value_of(tables_of(bundles, topology, h, QUICK)[2], QUICK) for h in (held, found)
    )
    assert after < 0.98 * before


@pytest.mark.parametrize("num_bundles", [0, 5])
def test_a_layer_that_nothing_is_known_of_is_left_as_it_is(num_bundles: int) -> None:
    seen = layer(0, 2)
    nothing = LayerBundles(
        experts_BK=seen.experts_BK[:num_bundles],
        source_B=seen.source_B[:num_bundles],
        weight_B=np.zeros(num_bundles),
    )
    topology = uniform_topology(num_hosts=2, shards_per_host=1, slots=8)
    held_SE = np.arange(16) // 8 == np.arange(2)[:, None]
    assert (exchange(nothing, topology, held_SE, QUICK) == held_SE).all()
