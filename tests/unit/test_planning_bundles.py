"""Counted bundles stand for their tokens while a placement is planned."""

from dataclasses import replace

import numpy as np
import pytest
from support.planning import layer

from remora.comm.bundles import LayerBundles, count_bundles, sample_bundles
from remora.comm.eplb import eplb_held
from remora.comm.grouping import GroupingProblem, plan_placement
from remora.comm.layer_plan import expert_loads
from remora.comm.replay import choose_bundles, replay, replay_bundles
from remora.comm.topology import uniform_topology


def test_a_sample_keeps_the_weight_and_takes_heavy_bundles_surely() -> None:
    rng = np.random.default_rng(0)
    weight_B = np.concatenate([rng.random(5000), [400.0, 90.0]])
    bundles = LayerBundles(
        experts_BK=np.arange(5002, dtype=np.int16)[:, None],
        source_B=np.zeros(5002, np.int16),
        weight_B=weight_B,
    )
    few = sample_bundles(bundles, 500, 0)
    assert len(few.weight_B) <= 500
    assert few.num_tokens == pytest.approx(bundles.num_tokens)
    each = bundles.num_tokens / 500
    for heavy in (5000, 5001):
        kept = few.weight_B[few.experts_BK[:, 0] == heavy]
        assert abs(kept.sum() - weight_B[heavy]) < 2 * each
        assert kept.max() < bundles.num_tokens / 256 + each, "its tokens go to several replicas"
    light, times = np.unique(few.experts_BK[few.experts_BK[:, 0] < 5000, 0], return_counts=True)
    assert len(light) > 300 and times.max() == 1, "a light bundle came twice"
    halves = few.experts_BK[:, 0] < 2500
    light = few.weight_B[halves].sum() / weight_B[:2500].sum()
    assert 0.85 < light < 1.15
    all_of_them = sample_bundles(bundles, 6000, 1)
    summed_E = np.bincount(all_of_them.experts_BK[:, 0], all_of_them.weight_B)
    assert np.allclose(summed_E, weight_B)


def test_the_unit_of_weights_changes_no_choice() -> None:
    """Old traffic weighs little, traces of days weigh much: load prices are of shares."""
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=6)
    bundles = layer(0, 4)
    held_SE = eplb_held(expert_loads(bundles, 16), topology)
    chosen_BK = choose_bundles(bundles, held_SE, topology)
    for scale in (1e-4, 1e4):
        scaled = replace(bundles, weight_B=bundles.weight_B * scale)
        np.testing.assert_array_equal(choose_bundles(scaled, held_SE, topology), chosen_BK)


def test_few_heavy_bundles_cost_what_their_tokens_do() -> None:
    """Two hosts whose requests stay at home, 8,000 tokens in four bundles: dispatched in one step,
    each source saw its own load alone and sent half of it away."""
    topology = uniform_topology(num_hosts=2, shards_per_host=1, slots=6)
    bundles = LayerBundles(
        experts_BK=np.array([[0, 4], [3, 7], [1, 5], [2, 6]], np.int16),
        source_B=np.array([0, 0, 1, 1], np.int16),
        weight_B=np.array([2000.0, 2100.0, 2000.0, 1900.0]),
    )
    held_SE = np.zeros((2, 8), np.bool_)
    held_SE[0, [0, 1, 2, 3, 4, 7]] = held_SE[1, [1, 2, 4, 5, 6, 7]] = True
    index_T = np.random.default_rng(0).permutation(
        np.repeat(np.arange(4), [2000, 2100, 2000, 1900])
    )
    tokens = replay(bundles.experts_BK[index_T], bundles.source_B[index_T], held_SE, topology)
    counted = replay_bundles(sample_bundles(bundles, 1000, 0), held_SE, topology)
    assert counted.copies_per_token == pytest.approx(tokens.copies_per_token, abs=0.05)
    assert counted.load_max_over_mean == pytest.approx(tokens.load_max_over_mean, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_with_few_experts_is_planned_as_evenly_as_its_tokens_run(seed: int) -> None:
    """It has a few hundred bundles, of which each is a good part of all tokens: dispatched whole in
    the search, they hid what load replicas even out."""
    rng = np.random.default_rng(seed)
    affinity_EF = rng.normal(size=(16, 4))

    def tokens(count: int) -> np.ndarray:
        scores = rng.normal(size=(count, 4)) @ affinity_EF.T + rng.gumbel(size=(count, 16))
        return np.argsort(-scores, axis=1)[:, :2].astype(np.int64)

    seen_TK, held_out_TK, source_T = tokens(8000), tokens(8000), np.arange(8000) % 4
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=5)
    bundles = count_bundles(seen_TK, source_T)
    problem = GroupingProblem(layers=(bundles,), num_experts=16, topology=topology)
    eplb = eplb_held(expert_loads(bundles, 16), topology)
    ours, theirs = (
        replay(held_out_TK, source_T, held, topology)
        for held in (plan_placement(problem, seed=0).held_L[0], eplb)
    )
    assert ours.load_max_over_mean < theirs.load_max_over_mean + 0.03
    assert ours.remote_copies < theirs.remote_copies
