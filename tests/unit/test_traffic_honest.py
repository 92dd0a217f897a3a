"""benchmarks/traffic*.py decide nothing from what does not exist yet: homes, shuffles, folds.

What may be known is changed not at all and everything else is: the decision must stay the same.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.programs import benchmarks_on_path
from support.programs import program as module

from remora.comm.topology import uniform_topology


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with benchmarks_on_path():
        yield


def random_trace(seed: int) -> Any:
    """Three layers, 12 experts, top-2, eight sequences of 60 tokens with tastes of their own."""
    chance = np.random.default_rng(seed)
    sequence_T = np.repeat(np.arange(8, dtype=np.int32), 60)
    taste_QE = chance.normal(0, 2, (8, 12))
    score_TLE = taste_QE[sequence_T][:, None, :] + chance.gumbel(size=(480, 3, 12))
    return module("traffic_data").Trace(
        name="random",
        experts_TLK=np.argsort(-score_TLE, axis=2)[:, :, :2].astype(np.int16),
        sequence_T=sequence_T,
        domain_Q=np.arange(8, dtype=np.int32) % 2,
        split_Q=np.zeros(8, np.int8),
        domains=("even", "odd"),
        num_experts=12,
        row_bytes=64,
        expert_bytes=100,
        token_T=(sequence_T * 3 + chance.integers(0, 5, 480)).astype(np.int32),
    )


TOPOLOGY = uniform_topology(num_hosts=4, shards_per_host=1, slots=3)


def contiguous() -> Any:
    """The same placement in each of three layers."""
    return [module("traffic_baselines").contiguous(12, TOPOLOGY)] * 3


def test_homes_of_prompts_read_no_routing_of_the_judged() -> None:
    homes = module("traffic_homes")
    plan, judge = random_trace(0), random_trace(1).decode_order()
    other = replace(judge, experts_TLK=np.random.default_rng(2).permuted(judge.experts_TLK, axis=0))
    first, second = (homes.home_sources(plan, j, contiguous(), TOPOLOGY) for j in (judge, other))
    assert np.array_equal(first, second)
    assert len(set(first.tolist())) > 1
    for q in range(8):
        assert len(set(first[judge.sequence_T == q].tolist())) == 1


def test_homes_of_prompts_read_no_generated_ids() -> None:
    homes = module("traffic_homes")
    plan, judge = random_trace(0), random_trace(1).decode_order()
    generated_T = homes.positions(judge) >= 15
    other = replace(judge, token_T=np.where(generated_T, 0, judge.token_T).astype(np.int32))
    first, second = (homes.home_sources(plan, j, contiguous(), TOPOLOGY) for j in (judge, other))
    assert np.array_equal(first, second)


def test_without_ids_homes_read_the_probe_alone_and_the_probe_runs_before() -> None:
    homes = module("traffic_homes")
    judge = replace(random_trace(1), token_T=None).decode_order()
    probe_T = homes.positions(judge) < homes.PROBE_TOKENS
    experts_TLK = judge.experts_TLK.copy()
    experts_TLK[~probe_T] = np.random.default_rng(3).permuted(experts_TLK[~probe_T], axis=0)
    other = replace(judge, experts_TLK=experts_TLK)
    first, second = (homes.home_sources(judge, j, contiguous(), TOPOLOGY) for j in (judge, other))
    assert np.array_equal(first, second)
    assert np.array_equal(first[probe_T], judge.sequence_T[probe_T] % 4)
    for q in range(8):
        assert len(set(first[~probe_T & (judge.sequence_T == q)].tolist())) == 1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_shuffles_read_no_layer_that_has_not_run(layer: int) -> None:
    tokens, b5 = module("traffic_token_ids"), module("traffic_cocluster")
    plan, judge = random_trace(0), random_trace(1).decode_order()
    experts_TLK = judge.experts_TLK.copy()
    experts_TLK[:, layer:] = np.random.default_rng(4).permuted(experts_TLK[:, layer:], axis=0)
    other = replace(judge, experts_TLK=experts_TLK)
    ours = [tokens.shuffles(plan, j, contiguous(), TOPOLOGY) for j in (judge, other)]
    assert np.array_equal(ours[0]["shuffle"][layer], ours[1]["shuffle"][layer])
    assert not np.array_equal(ours[0]["shuffle oracle"][layer], ours[1]["shuffle oracle"][layer])
    clusters = b5.co_cluster(plan, 4, 30)
    theirs = [tokens.b5_sources(clusters, j, TOPOLOGY) for j in (judge, other)]
    for name in ("homes", "shuffle"):
        assert np.array_equal(theirs[0][name][layer], theirs[1][name][layer])


def test_slices_are_equal_in_every_step() -> None:
    tokens = module("traffic_token_ids")
    plan, judge = random_trace(0), random_trace(1).decode_order()
    for source_L in tokens.shuffles(plan, judge, contiguous(), TOPOLOGY).values():
        for source_T in source_L:
            steps_MR = [np.bincount(s, minlength=4).tolist() for s in source_T.reshape(-1, 32)]
            assert steps_MR == [[8] * 4] * 15


def test_parts_of_a_shift_are_apart() -> None:
    shift = module("traffic_shift")
    trace = random_trace(1)
    trace = replace(trace, token_T=np.arange(480, dtype=np.int32))
    old_seen = shift.SEEN_TOKENS
    shift.SEEN_TOKENS = 90
    try:
        old, seen, own, judge = shift.parts(trace, 1)
    finally:
        shift.SEEN_TOKENS = old_seen
    assert set(old.domain_Q) == {0}
    assert set(judge.domain_Q) == set(seen.domain_Q) == {1}
    assert len(seen.token_T) == 120 and np.array_equal(own.token_T, seen.token_T)
    everything = np.concatenate([old.token_T, seen.token_T, judge.token_T])
    assert np.array_equal(np.sort(everything), np.arange(480))
