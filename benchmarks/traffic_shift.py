"""A shift of domains: planned on some, then all traffic turns to another; before, and after.

The online loop has seen SEEN_TOKENS of the new domain. Its statistics weigh domains as
`comm.statistics` does: what is old has lost half its share each `share_half_life_tokens`. It plans
from the placement in force, so that weights stay where they can. Beside it a placement planned for
the new domain alone, from documents that are neither seen nor judged where the trace has such, else
from those that were seen.

Shape suffixes: T tokens, L MoE layers, S shards, E experts.
"""

import time
from dataclasses import replace

import numpy as np
from traffic_data import SEED, Trace
from traffic_ladder import (
    BASELINES,
    REMORA,
    SOURCES,
    Held,
    Method,
    Result,
    Shape,
    judge_layers,
    sources_of,
)

from remora.comm.bundles import count_bundles
from remora.comm.grouping import GroupingProblem, plan_placement
from remora.comm.statistics import HistoryLimits
from remora.comm.topology import Topology

SEEN_TOKENS = 5000
OLD_TOKENS_MAX = 40_000  # of the other domains, to plan on
AFTER = replace(REMORA, name="B6 after 5,000 tokens")
MADE_FOR_IT = replace(REMORA, name="B6 planned for it")


def run_shift(trace: Trace, domain: int, shape: Shape) -> list[Result]:
    """Every method planned on the other domains, then the loop, judged on the same sequences."""
    topology = shape.topology(trace.num_experts)
    assert topology is not None, f"{trace.num_experts} experts do not divide over {shape}"
    old, seen, own, judge = parts(trace, domain)
    ordered = judge.decode_order()
    results = []

    def add(method: Method, sources: str, held_L: Held, was_L: Held, begin: float) -> None:
        plan_s = time.perf_counter() - begin
        known = seen if method is AFTER else own if method is MADE_FOR_IT else old
        moved = sum(int((new & ~was).sum()) for new, was in zip(held_L, was_L, strict=True))
        source_T = sources_of(sources, known, ordered, held_L, topology)
        results.append(
            Result(
                method=method.name,
                shape=shape,
                scenario=f"{trace.name} shift",
                sources=sources,
                fold=domain,
                layers=judge_layers(method, held_L, ordered, source_T, topology),
                plan_s=plan_s,
                migrated_bytes=float(moved * trace.expert_bytes),
                turned_to=trace.domains[domain],
            )
        )

    for sources in SOURCES:
        placed: Held = []
        for method in (*BASELINES, REMORA):
            begin = time.perf_counter()
            placed = method.placed(old, topology, sources)
            add(method, sources, placed, placed, begin)
        begin = time.perf_counter()
        held_L = replan(old, seen, placed, topology, sources)
        add(AFTER, sources, held_L, placed, begin)
        begin = time.perf_counter()
        add(MADE_FOR_IT, sources, REMORA.placed(own, topology, sources), placed, begin)
    return results


def parts(trace: Trace, domain: int) -> tuple[Trace, Trace, Trace, Trace]:
    """(other domains, SEEN_TOKENS of this one, what to plan for it on, what to judge on)."""
    is_new = trace.domain_Q == domain
    length_Q = np.bincount(trace.sequence_T, minlength=trace.num_sequences)
    online = np.flatnonzero(is_new & (trace.split_Q != 1))
    online = np.random.default_rng(SEED + domain).permutation(online)
    count = int(np.searchsorted(np.cumsum(length_Q[online]), SEEN_TOKENS)) + 1
    seen, judge = online[:count], online[count:]
    assert len(judge), f"domain {domain} of {trace.name} has only {length_Q[online].sum()} tokens"
    planned = np.flatnonzero(is_new & (trace.split_Q == 1))
    old = np.flatnonzero(~is_new & (trace.split_Q != 2))
    old = np.random.default_rng(SEED).permutation(old)
    old = old[: int(np.searchsorted(np.cumsum(length_Q[old]), OLD_TOKENS_MAX)) + 1]
    own = planned if len(planned) else seen
    return trace.of(old), trace.of(seen), trace.of(own), trace.of(judge)


def replan(old: Trace, seen: Trace, placed: Held, topology: Topology, sources: str) -> Held:
    """The loop's plan from the placement in force. Tokens came from the sources that requests have
    under it."""
    kept = 0.5 ** (len(seen.sequence_T) / HistoryLimits().share_half_life_tokens)
    old_T, seen_T = (sources_of(sources, old, t, placed, topology) for t in (old, seen))
    num_old, num_new = len(old_T), len(seen_T)
    weight_T = np.concatenate(  # the old ones with a share of `kept`, all as heavy as what is seen
        [np.full(num_old, kept * num_new / num_old), np.full(num_new, 1 - kept)]
    )
    source_T = np.concatenate([old_T, seen_T])
    layers = tuple(
        count_bundles(
            np.concatenate([old.experts_TLK[:, layer], seen.experts_TLK[:, layer]]),
            source_T,
            weight_T,
        )
        for layer in range(old.num_layers)
    )
    problem = GroupingProblem(
        layers=layers, num_experts=old.num_experts, topology=topology, old_L=tuple(placed)
    )
    return list(plan_placement(problem, seed=0).held_L)
