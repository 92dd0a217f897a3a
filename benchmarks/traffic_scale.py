"""Seconds to plan a problem of DeepSeek-V3's shape, on bundles whose skew is fitted to real traces.

58 layers, 256 experts, top-8, 64 shards on 8 hosts, 288 slots a layer, 100,000 bundles a layer.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from routing_generator import FITTED, generate
from traffic_data import SEED

from remora.comm.bundles import LayerBundles, count_bundles
from remora.comm.choice import gain_for
from remora.comm.grouping import GroupingProblem, plan_placement
from remora.comm.replay import replicas_of
from remora.comm.topology import Topology

EXPERTS, TOP_K, HOSTS, SHARDS, SLOTS = 256, 8, 8, 64, 288
BUNDLES = 100_000
CHOICE_TOKENS, CHOICE_CALLS, CHOICE_ROUNDS = 64, 50, 100
DRIFT = 5  # one in so many bundles is another one when the plan is made again


@dataclass(frozen=True, slots=True)
class ScaleTimes:
    """Seconds, and what the plans cost on their own bundles."""

    cold_s: float
    warm_s: float
    copies_vs_eplb: float
    moved: int
    choice_us: list[float]  # rounds of the compiled replica choice under the first layer's plan


def topology() -> Topology:
    """4.5 slots a shard: even shards have 5, odd ones 4."""
    return Topology(
        uids=tuple(f"shard-{s}" for s in range(SHARDS)),
        hosts=tuple(f"host-{h}" for h in range(HOSTS)),
        host_of_S=tuple(s * HOSTS // SHARDS for s in range(SHARDS)),
        slots_S=tuple(SLOTS // SHARDS + (s % 2 == 0) for s in range(SHARDS)),
    )


def layers_of(num_layers: int, num_tokens: int, seed: int) -> tuple[LayerBundles, ...]:
    """Bundles of each layer; sources in turn."""
    drawn = (
        generate(
            num_tokens=num_tokens,
            num_experts=EXPERTS,
            top_k=TOP_K,
            skew=FITTED,
            seed=seed * 1000 + layer,
        )
        for layer in range(num_layers)
    )
    return tuple(count_bundles(ids_TK, np.arange(num_tokens) % HOSTS) for ids_TK, _ in drawn)


def measure(num_layers: int) -> ScaleTimes:
    """A plan from nothing, then one from its result for traffic of which a part has changed."""
    where = topology()
    small = layers_of(1, 2000, 2)
    plan_placement(  # compiles
        GroupingProblem(layers=small, num_experts=EXPERTS, topology=where), seed=0
    )
    layers = layers_of(num_layers, BUNDLES, 0)
    begin = time.perf_counter()
    first = plan_placement(
        GroupingProblem(layers=layers, num_experts=EXPERTS, topology=where), seed=0, threads=2
    )
    cold_s = time.perf_counter() - begin
    other = layers_of(num_layers, BUNDLES // DRIFT, 1)
    drifted = tuple(_drifted(a, b) for a, b in zip(layers, other, strict=True))
    warm = GroupingProblem(layers=drifted, num_experts=EXPERTS, topology=where, old_L=first.held_L)
    begin = time.perf_counter()
    second = plan_placement(warm, seed=0, threads=2)
    warm_s = time.perf_counter() - begin
    copies = [
        ours.copies_per_token / theirs.copies_per_token
        for ours, theirs in zip(first.costs_L, first.eplb_costs_L, strict=True)
    ]
    return ScaleTimes(
        cold_s=cold_s,
        warm_s=warm_s,
        copies_vs_eplb=float(np.mean(copies)),
        moved=second.moved,
        choice_us=choice_us(first.held_L[0]),
    )


def choice_us(held_SE: NDArray[np.bool_]) -> list[float]:
    """Microseconds of the compiled replica choice for CHOICE_TOKENS tokens, one value a round; none
    where the extension is not built."""
    try:
        from remora.comm import _C
    except ImportError:
        return []
    ids_TK, _ = generate(
        num_tokens=CHOICE_TOKENS, num_experts=EXPERTS, top_k=TOP_K, skew=FITTED, seed=SEED
    )
    ids_TK, table_ER = ids_TK.astype(np.int64), np.ascontiguousarray(replicas_of(held_SE))
    host_S = np.array(topology().host_of_S, np.int32)
    usable_S, gain = np.ones(SHARDS, np.uint8), np.array([gain_for(SHARDS)], np.int64)
    load_S, shard_TK = np.zeros(SHARDS, np.int64), np.zeros(ids_TK.shape, np.int32)
    found = []
    for _ in range(CHOICE_ROUNDS):
        begin = time.perf_counter()
        for _ in range(CHOICE_CALLS):
            _C.choose(
                ids_TK.ctypes.data, CHOICE_TOKENS, TOP_K, table_ER.ctypes.data, EXPERTS,
                table_ER.shape[1], host_S.ctypes.data, 0, usable_S.ctypes.data, gain.ctypes.data,
                SHARDS, load_S.ctypes.data, shard_TK.ctypes.data,
            )  # fmt: skip
        found.append((time.perf_counter() - begin) / CHOICE_CALLS * 1e6)
    return found


def _drifted(old: LayerBundles, new: LayerBundles) -> LayerBundles:
    """A random part of the old bundles and all new ones."""
    count = len(old.weight_B) - len(new.weight_B)
    kept = np.random.default_rng(SEED).choice(len(old.weight_B), count, replace=False)
    return LayerBundles(
        experts_BK=np.concatenate([old.experts_BK[kept], new.experts_BK]),
        source_B=np.concatenate([old.source_B[kept], new.source_B]),
        weight_B=np.concatenate([old.weight_B[kept], new.weight_B]),
    )
