"""benchmarks/traffic*.py: metrics by hand and against the transport's accounting, folds, baselines,
co-clustering on clusters that are known, and the integer programme under every method."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.programs import benchmarks_on_path
from support.programs import program as module

from remora.comm import plan as dispatch_plan
from remora.comm.accounting import expected_call_bytes
from remora.comm.bundles import count_bundles
from remora.comm.replay import choose_all
from remora.comm.topology import Topology, uniform_topology


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with benchmarks_on_path():
        yield


def held(*shards: list[int], num_experts: int) -> Any:
    """`[S, E]` from the experts of each shard."""
    held_SE = np.zeros((len(shards), num_experts), np.bool_)
    for shard, experts in enumerate(shards):
        held_SE[shard, experts] = True
    return held_SE


def figures(
    experts: list[list[int]],
    sources: list[int],
    held_SE: Any,
    topology: Topology,
    *,
    dedup: str = "shard",
    row_bytes: int = 8,
    step_tokens: int = 32,
) -> Any:
    """One layer's figures with the dispatcher's own choice."""
    metrics = module("traffic_metrics")
    steps, index_TK = metrics.Steps.of(np.array(sources), step_tokens), np.array(experts)
    shard_TK = choose_all(index_TK, np.array(sources), held_SE, topology, gain=0)
    return metrics.tally(index_TK, shard_TK, steps, topology, held_SE.shape[1], dedup, row_bytes)


def random_trace(seed: int, *, tokens: int = 300, experts: int = 16, k: int = 3) -> Any:
    """Two layers, two domains that prefer different experts, ten sequences, token ids."""
    chance = np.random.default_rng(seed)
    sequence_T = np.sort(chance.integers(0, 10, tokens)).astype(np.int32)
    taste = np.where((sequence_T % 2)[:, None] == 0, np.arange(experts), np.arange(experts)[::-1])
    score_TLE = -0.3 * taste[:, None, :] + chance.gumbel(size=(tokens, 2, experts))
    return module("traffic_data").Trace(
        name="random",
        experts_TLK=np.argsort(-score_TLE, axis=2)[:, :, :k].astype(np.int16),
        sequence_T=sequence_T,
        domain_Q=np.arange(10, dtype=np.int32) % 2,
        split_Q=np.zeros(10, np.int8),
        domains=("even", "odd"),
        num_experts=experts,
        row_bytes=64,
        expert_bytes=100,
        token_T=chance.integers(0, 50, tokens).astype(np.int32),
    )


def test_figures_of_two_hosts_by_hand() -> None:
    # shards 0, 1 on host 0; 2, 3 on host 1; experts 0..7, two on each shard
    topology = uniform_topology(num_hosts=2, shards_per_host=2, slots=2)
    held_SE = held([0, 1], [2, 3], [4, 5], [6, 7], num_experts=8)
    experts, sources = [[0, 4, 5], [4, 6, 7], [1, 2, 3]], [0, 0, 1]
    got = figures(experts, sources, held_SE, topology)
    assert got.copies == pytest.approx(3 / 3)  # each token leaves for one host
    assert got.local_rate == pytest.approx(1 / 9)
    assert got.load == pytest.approx(3 / (9 / 4))  # pairs 2, 2, 3, 2
    assert got.active == pytest.approx(8 / 4)  # 0 1 | 2 3 | 4 5 | 6 7
    assert got.active_max == pytest.approx(2)
    # rows over the network: token 0 to shard 2; token 1 to 2 and 3; token 2 to 0 and 1
    assert got.ingress_rows == pytest.approx(3 / 3)
    assert got.ingress == pytest.approx(3 / 2.5)
    calls = [(2, 3), (1, 2), (1, 1), (1, 2)]  # (rows, pairs) of host 0's two calls, host 1's two
    for presummed, back in ((False, got.back_ordered), (True, got.back_presummed)):
        sums = np.sum(
            [
                expected_call_bytes(num_rows=r, num_pairs=p, row_bytes=8, presummed=presummed)
                for r, p in calls
            ],
            axis=0,
        )
        assert (got.out_bytes * 3, back * 3) == pytest.approx(tuple(sums))


@pytest.mark.parametrize(("dedup", "rows"), [("pair", 8), ("shard", 5), ("host", 3)])
def test_a_row_travels_once_per_pair_shard_or_host(dedup: str, rows: int) -> None:
    topology = uniform_topology(num_hosts=2, shards_per_host=2, slots=2)
    held_SE = held([0, 1], [2, 3], [4, 5], [6, 7], num_experts=8)
    experts, sources = [[0, 4, 5], [4, 6, 7], [1, 2, 3]], [0, 0, 1]
    got = figures(experts, sources, held_SE, topology, dedup=dedup, row_bytes=1000)
    calls = {"pair": 4, "shard": 4, "host": 2}[dedup]
    assert got.out_bytes * 3 == pytest.approx(calls * 64 + rows * 1000 + 8 * 12)
    assert got.back_presummed * 3 == pytest.approx(calls * 64 + rows * 1000)
    assert got.copies == 1.0


def test_load_of_steps_is_not_load_of_the_whole() -> None:
    topology = uniform_topology(num_hosts=2, shards_per_host=1, slots=1)
    got = figures(
        [[0], [0], [1], [1]], [0, 1, 0, 1], held([0], [1], num_experts=2), topology, step_tokens=2
    )
    assert got.load == 1.0
    assert got.step_load == 2.0
    assert got.active == 0.5


@pytest.mark.parametrize("row_bytes", [62, 64])
def test_bytes_are_those_of_the_transports_calls(row_bytes: int) -> None:
    """Against the dispatcher's own layout of calls, dispatch after dispatch."""
    trace = random_trace(3)
    topology = uniform_topology(num_hosts=3, shards_per_host=2, slots=4)
    chance = np.random.default_rng(0)
    held_SE = module("traffic_baselines").contiguous(16, topology)
    held_SE |= chance.random(held_SE.shape) < 0.2
    source_T = chance.integers(0, 3, len(trace.sequence_T))
    metrics = module("traffic_metrics")
    steps, index_TK = metrics.Steps.of(source_T), trace.experts_TLK[:, 0].astype(np.int64)
    shard_TK = choose_all(index_TK, source_T, held_SE, topology)
    got = metrics.tally(index_TK, shard_TK, steps, topology, 16, "shard", row_bytes)
    index_TK, shard_TK = index_TK[steps.order_T], shard_TK[steps.order_T]
    totals = np.zeros(3, np.int64)
    for g, source in enumerate(steps.source_G):
        group = slice(steps.start_G[g], steps.start_G[g + 1])
        part, shard = index_TK[group], np.ascontiguousarray(shard_TK[group])
        call = np.full(part.shape, dispatch_plan.PENDING, np.int32)
        rows, at = np.zeros(part.shape, np.int32), np.zeros(part.shape, np.int32)
        of_call = [np.zeros(6, np.int32) for _ in range(3)]
        count = dispatch_plan.lay_out(
            part, len(part), 16, 6, 512, 0, shard, call, rows, at, *of_call
        )
        for c in range(count):
            if topology.host_of_S[of_call[0][c]] == source:
                continue
            sizes = {"num_rows": int(of_call[1][c]), "num_pairs": int(of_call[2][c])}
            out, ordered = expected_call_bytes(row_bytes=row_bytes, presummed=False, **sizes)
            presummed = expected_call_bytes(row_bytes=row_bytes, presummed=True, **sizes)[1]
            totals += [out, ordered, presummed]
    measured = np.array([got.out_bytes, got.back_ordered, got.back_presummed]) * len(index_TK)
    assert measured == pytest.approx(totals)


def test_folds_part_sequences_and_every_domain_is_in_each() -> None:
    data = module("traffic_data")
    trace = random_trace(5)
    judged = []
    for plan, judge in data.folds(trace, 5):
        assert plan.num_sequences + judge.num_sequences == 10
        assert set(judge.domain_Q) == {0, 1}
        assert len(plan.sequence_T) + len(judge.sequence_T) == 300
        judged.append(judge)
    together = np.concatenate([j.experts_TLK.reshape(-1) for j in judged])
    assert np.array_equal(np.sort(together), np.sort(trace.experts_TLK.reshape(-1)))


def test_folds_keep_to_the_split_of_the_data() -> None:
    data = module("traffic_data")
    split_Q = np.array([1, 1, 2, 2, 1, 1, 2, 2, 1, 1], np.int8)
    for plan, judge in data.folds(replace(random_trace(5), split_Q=split_Q), 2):
        assert set(plan.split_Q) == {1}
        assert set(judge.split_Q) == {2}


def test_decode_order_mixes_sequences_and_keeps_each_in_order() -> None:
    trace = random_trace(6)
    numbered = trace.layers([0])
    numbered.experts_TLK[:, 0, 0] = np.arange(300)
    ordered = numbered.decode_order()
    for q in range(10):
        own = ordered.experts_TLK[ordered.sequence_T == q, 0, 0]
        assert (np.diff(own) > 0).all()
    assert len(set(ordered.sequence_T[:32].tolist())) == 10


def test_partition_finds_groups_that_are_there() -> None:
    baselines = module("traffic_baselines")
    chance = np.random.default_rng(1)
    group_E = chance.permutation(np.arange(12) % 3)
    experts_TK = np.array(
        [chance.permutation(np.flatnonzero(group_E == g))[:3] for g in chance.integers(0, 3, 200)]
    )
    both_EE = baselines.coactivation(experts_TK, 12)
    found_E = baselines.partition(both_EE, [4, 4, 4])
    assert all(len(set(found_E[group_E == g])) == 1 for g in range(3))
    assert both_EE[0, 1] == sum({0, 1} <= set(row) for row in experts_TK.tolist())


@pytest.mark.parametrize("slots", [4, 5, 6])
def test_coactivation_fills_every_slot_once(slots: int) -> None:
    topology = uniform_topology(num_hosts=2, shards_per_host=2, slots=slots)
    held_SE = module("traffic_baselines").coactivation_placement(
        random_trace(2).experts_TLK[:, 0], 16, topology
    )
    assert (held_SE.sum(1) == slots).all()
    assert held_SE.any(0).all()


def test_co_clustering_finds_ids_and_experts_that_belong_together() -> None:
    b5 = module("traffic_cocluster")
    chance = np.random.default_rng(4)
    group_E = chance.permutation(np.arange(16) % 4)
    group_V = chance.permutation(np.arange(40) % 4)
    token_T = chance.integers(0, 40, 2000)
    experts_TK = np.array(
        [chance.permutation(np.flatnonzero(group_E == group_V[v]))[:3] for v in token_T]
    )
    count_VE = b5.token_expert_counts(experts_TK, token_T, 40, 16)
    device_E = b5.alternate(count_VE, np.bincount(token_T, minlength=40), 4)
    assert all(len(set(device_E[group_E == g])) == 1 for g in range(4))
    assert sorted(np.bincount(device_E)) == [4, 4, 4, 4]


def test_shuffle_is_in_equal_slices_of_the_likeliest() -> None:
    b5 = module("traffic_cocluster")
    score_TD = np.eye(4)[[3, 0, 2, 1, 1, 3, 2, 0]]
    assert b5.shuffle(score_TD, 8).tolist() == [3, 0, 2, 1, 1, 3, 2, 0]
    crowded = b5.shuffle(np.eye(4)[[0, 0, 0, 0, 0, 0, 0, 3]], 8)
    assert sorted(crowded) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert crowded[7] == 3


def test_tables_of_co_clusters_foretell_what_always_happens() -> None:
    """Each id's experts are on one device in every layer: both tables must say which."""
    b5, data = module("traffic_cocluster"), module("traffic_data")
    chance = np.random.default_rng(8)
    token_T = chance.integers(0, 20, 800).astype(np.int32)
    group_T = token_T % 4
    experts_TLK = np.stack([group_T[:, None] * 4 + chance.permutation(4)[:3] for _ in range(3)], 1)
    trace = data.Trace(
        name="known",
        experts_TLK=experts_TLK.astype(np.int16),
        sequence_T=np.zeros(800, np.int32),
        domain_Q=np.zeros(1, np.int32),
        split_Q=np.zeros(1, np.int8),
        domains=("one",),
        num_experts=16,
        row_bytes=64,
        expert_bytes=100,
        token_T=token_T,
    )
    clusters = b5.co_cluster(trace, 4, 20)
    used_TLD = b5.used_devices(trace.experts_TLK, clusters.device_LE, 4)
    for layer in range(3):
        guess_TD = b5.predicted_devices(clusters, trace, layer)
        assert np.array_equal(guess_TD.argmax(1), used_TLD[:, layer].argmax(1))
    chain_TD = clusters.chain_LDDD[2][tuple(used_TLD.argmax(2)[:, :2].T)]
    assert np.array_equal(chain_TD.argmax(1), used_TLD[:, 2].argmax(1))


@pytest.mark.parametrize("slots", [3, 4])
def test_integer_programme_bounds_every_method(slots: int) -> None:
    metrics, ladder, bounds = map(module, ("traffic_metrics", "traffic_ladder", "traffic_bounds"))
    trace = random_trace(7, tokens=60, experts=9, k=2).layers([0])
    topology = uniform_topology(num_hosts=3, shards_per_host=1, slots=slots)
    source_T = ladder.round_robin(trace, topology)
    bundles = count_bundles(trace.experts_TLK[:, 0], source_T)
    bound = bounds.least_copies(bundles, topology, 9, load_max=3.0, seconds_max=20)
    assert bound.lower <= bound.found + 1e-9
    assert (bound.held_SE.sum(1) <= slots).all() and bound.held_SE.any(0).all()
    for method in ladder.BASELINES:
        held_L = method.place(trace, topology)
        (got,) = ladder.judge_layers(method, held_L, trace, source_T, topology)
        assert got.copies >= bound.lower - 1e-9, method.name
    found = ladder.judge_layers(
        ladder.Method("milp", lambda *_: [], ladder.priced),
        [bound.held_SE],
        trace,
        source_T,
        topology,
    )
    assert found[0].copies <= bound.found + 1e-6  # the same placement, without a cap on load
    assert isinstance(found[0], metrics.LayerTraffic)


def test_cover_takes_local_copies_then_the_widest_then_the_idlest() -> None:
    baselines = module("traffic_baselines")
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=3)
    held_SE = held([0, 1], [2, 3, 4], [2, 5], [4, 5], num_experts=6)
    got = baselines.cover(
        np.array([[0, 2, 3, 5], [5, 0, 1, 2]]), np.array([0, 0]), held_SE, topology
    )
    assert got.tolist() == [[0, 1, 1, 2], [2, 0, 0, 2]]
    even = baselines.cover(np.array([[4]] * 4), np.zeros(4, int), held_SE, topology)
    assert sorted(even.ravel().tolist()) == [1, 1, 3, 3]


def test_a_cap_on_load_costs_copies() -> None:
    """Six tokens pick {0, 1}, two {2, 3}: together is free for a token's own host and lopsided."""
    bounds = module("traffic_bounds")
    bundles = count_bundles(np.array([[0, 1]] * 6 + [[2, 3]] * 2), np.arange(8) % 2)
    topology = uniform_topology(num_hosts=2, shards_per_host=1, slots=2)
    loose, tight = (
        bounds.least_copies(bundles, topology, 4, load_max=cap, seconds_max=20)
        for cap in (1.5, 1.1)
    )
    assert (loose.lower, loose.found) == pytest.approx((0.5, 0.5))
    assert (tight.lower, tight.found) == pytest.approx((1.0, 1.0))


def result(method: str, sources: str, fold: int, *, copies: float, load: float) -> Any:
    """One fold of a method at 8 hosts and a quarter of spare slots, two equal layers."""
    ladder, metrics = module("traffic_ladder"), module("traffic_metrics")
    names = [f.name for f in fields(metrics.LayerTraffic)]
    layer = metrics.LayerTraffic(**dict.fromkeys(names, 1.0) | {"copies": copies, "load": load})
    return ladder.Result(
        method=method,
        shape=ladder.Shape(8, 1, 0.25),
        scenario="v2lite",
        sources=sources,
        fold=fold,
        layers=(layer, layer),
        plan_s=1.0,
    )


def test_bars_pair_folds_and_take_the_stronger_eplb() -> None:
    report = module("traffic_report")
    results = []
    for fold, scale in enumerate((1.0, 2.0)):  # the second fold's copies are twice as many
        for method, copies, load in (
            ("B3a EPLB random", 4.0, 1.06),
            ("B3b EPLB cover", 3.2, 1.08),
            ("B6 Remora", 2.4, 1.10),
        ):
            results.append(result(method, "round-robin", fold, copies=copies * scale, load=load))
        results.append(result("B6 Remora", "homes", fold, copies=2.0 * scale, load=1.08))
    bars = {bar.name: bar for bar in report.bars(results)}
    assert bars["v2lite_d8_spare25_copies_vs_eplb"].value.median == pytest.approx(0.5)
    assert bars["v2lite_d8_spare25_copies_vs_eplb_cover"].value.median == pytest.approx(0.625)
    assert bars["v2lite_d8_spare25_copies_vs_eplb_round_robin"].value.max == pytest.approx(0.6)
    assert bars["v2lite_d8_spare25_load_minus_eplb"].value.median == pytest.approx(0.02)
    assert bars["v2lite_d8_spare25_load_minus_eplb"].holds
    assert bars["v2lite_d8_spare25_load_minus_eplb_round_robin"].holds is None
    assert "v2lite_d8_spare0_copies_vs_eplb" not in bars  # nothing of it ran
    (ours,) = [r for r in report.rows(results) if r["sources"] == "homes"]
    assert ours["copies"].median == pytest.approx(3.0)


def test_a_placement_is_judged_on_each_scenario() -> None:
    """Planned once, on the mix; judged on it, and on each of its domains alone."""
    ladder = module("traffic_ladder")
    trace = random_trace(7, tokens=60, experts=9, k=2).layers([0])
    alone = trace.by_domain()
    assert {name: own.num_sequences for name, own in alone.items()} == {"even": 5, "odd": 5}
    judges = {"mix": trace} | alone
    results = ladder.run_fold(ladder.BASELINES[:1], trace, judges, ladder.Shape(3, 1, 0.0), 0)
    assert [(r.scenario, r.sources) for r in results] == [
        (scenario, sources) for sources in ladder.SOURCES for scenario in judges
    ]
    copies = {r.scenario: r.mean.copies for r in results if r.sources == "round-robin"}
    assert min(copies.values()) <= copies["mix"] <= max(copies.values())


def test_each_shift_has_a_row_beside_their_mean() -> None:
    report = module("traffic_report")
    results = [
        replace(
            result("B6 Remora", "homes", fold, copies=copies, load=1.0),
            scenario="v2lite shift",
            turned_to=name,
        )
        for fold, (name, copies) in enumerate({"law": 2.0, "intent": 3.0}.items())
    ]
    rows = {row["scenario"][12:]: row["copies"].median for row in report.rows(results)}
    assert rows == {"": 2.5, " to law": 2.0, " to intent": 3.0}


def test_a_run_that_is_resumed_takes_what_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    tasks, ladder = module("traffic_tasks"), module("traffic_ladder")
    wanted = [
        tasks.Task(kind="ladder", trace="v2lite", shape=ladder.Shape(8, 1, 0.0), index=index)
        for index in range(2)
    ]
    ran: list[int] = []

    def run(task: Any) -> list[Any]:
        ran.append(task.index)
        return [f"of fold {task.index}"]

    monkeypatch.setattr(tasks, "run", run)
    expected = [["of fold 0"], ["of fold 1"]]
    assert list(tasks.run_all(wanted[:1], 1, tmp_path)) == expected[:1] and ran == [0]
    assert list(tasks.run_all(wanted, 1, tmp_path)) == expected and ran == [0, 1]
    monkeypatch.setattr(tasks, "_sources", lambda: "another planner")
    assert list(tasks.run_all(wanted[:1], 1, tmp_path)) == expected[:1] and ran == [0, 1, 0]
    assert list(tasks.run_all(wanted[:1], 1, None)) == expected[:1] and ran == [0, 1, 0, 0]
