"""What needs token ids: B5's co-clusters, and shuffles of tokens inside a tensor-parallel group.

A group has a rank on every host; a step's tokens are cut into equal slices, one a rank, in every
layer anew. Sources of a layer are the ranks of its slices. Shape suffixes: T tokens, R ranks, L
layers, K top-k.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from traffic_baselines import cover
from traffic_cocluster import CoClusters, co_cluster, predicted_devices, request_devices, shuffle
from traffic_data import STEP_TOKENS, Trace
from traffic_homes import PROMPT_SHARE, positions, round_robin
from traffic_ladder import BASELINES, REMORA, Held, Method, Result, Shape, judge_layers, run_fold

from remora.comm.collectives import part_of
from remora.comm.replay import replicas_of
from remora.comm.shuffle import HOST_PRICE, copy_costs, copy_prices, slice_order
from remora.comm.shuffle_scores import LAYERS_BEFORE, OnlineScores
from remora.comm.topology import Topology

Scores = Callable[[int, slice], NDArray[np.int64]]  # (layer, tokens of a step) -> [T, R]


def run_token_ids(plan: Trace, judge: Trace, shape: Shape, fold: int) -> list[Result]:
    """The ladder, B5 and the shuffles on one fold."""
    topology = shape.topology(plan.num_experts)
    if topology is None:
        return []
    kept: dict[str, Held] = {}
    results = run_fold([*BASELINES, REMORA], plan, {plan.name: judge}, shape, fold, kept)
    ordered, held_L = judge.decode_order(), kept[REMORA.name]
    plan_s = results[-2].plan_s

    def add(method: Method, sources: str, placed: Held, source_L: list[NDArray[np.int64]]) -> None:
        results.append(
            Result(
                method=method.name,
                shape=shape,
                scenario=plan.name,
                sources=sources,
                fold=fold,
                layers=judge_layers(method, placed, ordered, source_L, topology),
                plan_s=plan_s,
            )
        )

    if topology.num_shards == topology.num_hosts:
        for name, source_L in shuffles(plan, ordered, held_L, topology).items():
            add(REMORA, name, held_L, source_L)
        begin = time.perf_counter()
        num_ids = 1 + max(int(_ids(t).max()) for t in (plan, judge))
        clusters = co_cluster(plan, topology.num_shards, num_ids)
        plan_s = time.perf_counter() - begin
        b5 = Method("B5 co-clustering", lambda *_: [], cover)
        for name, source_L in b5_sources(clusters, ordered, topology).items():
            add(b5, name, b5_placement(clusters, topology), source_L)
    return results


def _ids(trace: Trace) -> NDArray[np.int32]:
    assert trace.token_T is not None, f"trace {trace.name} has no token ids"
    return trace.token_T


def b5_placement(clusters: CoClusters, topology: Topology) -> Held:
    """`[S, E]` of each layer; spare slots stay empty, the method knows no replicas."""
    shards = np.arange(topology.num_shards)[:, None]
    return [device_E[None, :] == shards for device_E in clusters.device_LE]


def b5_sources(
    clusters: CoClusters, ordered: Trace, topology: Topology
) -> dict[str, list[NDArray[np.int64]]]:
    """Sources of each layer by name: none, its requests' devices, its shuffle."""
    length_Q = np.bincount(ordered.sequence_T, minlength=ordered.num_sequences)
    position_T, ids_T = positions(ordered), _ids(ordered)
    prompt_T = position_T < np.ceil(PROMPT_SHARE * length_Q)[ordered.sequence_T]
    prompts = [ids_T[prompt_T & (ordered.sequence_T == q)] for q in range(ordered.num_sequences)]
    device_Q = request_devices(clusters, prompts, length_Q)
    layers = range(ordered.num_layers)
    return {
        "round-robin": [round_robin(ordered, topology) for _ in layers],
        "homes": [device_Q[ordered.sequence_T] for _ in layers],
        "shuffle": [
            shuffle(predicted_devices(clusters, ordered, layer), STEP_TOKENS) for layer in layers
        ],
    }


def shuffles(
    plan: Trace, ordered: Trace, held_L: Held, topology: Topology
) -> dict[str, list[NDArray[np.int64]]]:
    """Sources of each layer by name: "shuffle" predicted before the gate from tables learned on
    the planning trace, and "shuffle oracle" from the true bundles."""
    hosts = [topology.hosts[h] for h in topology.host_of_S]
    price_RS = copy_prices(topology.hosts, hosts)
    tables = [replicas_of(held_SE) for held_SE in held_L]
    scores = OnlineScores(
        num_layers=plan.num_layers,
        num_experts=plan.num_experts,
        num_ranks=topology.num_hosts,
        vocab_size=int(max(_ids(plan).max(), _ids(ordered).max())) + 1,
    )
    for layer in range(plan.num_layers):
        cost_TR = _costs(plan.experts_TLK[:, layer], tables[layer], price_RS)
        scores.learn(layer, _ids(plan).astype(np.int64), _before(plan, layer), cost_TR)
    true_L = [
        HOST_PRICE - _costs(ordered.experts_TLK[:, layer], tables[layer], price_RS)
        for layer in range(ordered.num_layers)
    ]

    def predicted(layer: int, step: slice) -> NDArray[np.int64]:
        before = [index_TK[step] for index_TK in _before(ordered, layer)]
        return scores.scores(layer, _ids(ordered)[step].astype(np.int64), before)

    return {
        "shuffle": _sliced(predicted, ordered, topology),
        "shuffle oracle": _sliced(lambda layer, step: true_L[layer][step], ordered, topology),
    }


def _before(trace: Trace, layer: int) -> list[NDArray[np.int64]]:
    depths = range(1, min(layer, LAYERS_BEFORE) + 1)
    return [trace.experts_TLK[:, layer - depth].astype(np.int64) for depth in depths]


def _costs(
    experts_TK: NDArray[np.integer], table_ER: NDArray[np.int16], price_RS: NDArray[np.int64]
) -> NDArray[np.int64]:
    cost_TR = np.empty((len(experts_TK), len(price_RS)), np.int64)
    copy_costs(experts_TK.astype(np.int64), table_ER, price_RS, cost_TR)
    return cost_TR


def _sliced(scores: Scores, trace: Trace, topology: Topology) -> list[NDArray[np.int64]]:
    """The rank of each token in each layer, slices of every step by the scores."""
    num_tokens = len(trace.sequence_T)
    source_L = []
    for layer in range(trace.num_layers):
        source_T = np.empty(num_tokens, np.int64)
        for begin in range(0, num_tokens, STEP_TOKENS):
            step = slice(begin, min(begin + STEP_TOKENS, num_tokens))
            order = slice_order(scores(layer, step))
            for rank in range(topology.num_hosts):
                first, end = part_of(rank, topology.num_hosts, len(order))
                source_T[begin + order[first:end]] = rank
        source_L.append(source_T)
    return source_L
