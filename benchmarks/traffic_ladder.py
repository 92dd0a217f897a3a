"""The ladder of `traffic.py`: every method on the same trace, folds, slots and decode order.

Shape suffixes: T tokens, K top-k, L MoE layers, E experts, S shards, Q sequences.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import traffic_baselines as baselines
from numpy.typing import NDArray
from traffic_data import Trace
from traffic_homes import home_sources, round_robin
from traffic_metrics import Dedup, LayerTraffic, Steps, mean_of, tally

from remora.comm.bundles import count_bundles
from remora.comm.eplb import eplb_held
from remora.comm.grouping import GroupingProblem, plan_placement
from remora.comm.joint_plan import plan_homes_and_placement
from remora.comm.replay import choose_all
from remora.comm.topology import Topology, uniform_topology

Held = list[NDArray[np.bool_]]  # [S, E] for each layer
SOURCES = "round-robin", "homes"
Choose = Callable[[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_], Topology], Any]
Place = Callable[[Trace, Topology], Held]


@dataclass(frozen=True, slots=True)
class Method:
    """A rung: where experts lie, which replica a pair goes to, and what a row is sent once for."""

    name: str
    place: Place
    choose: Choose
    dedup: Dedup = "shard"
    place_with_homes: Place | None = None  # when requests will have homes; None: `place`

    def placed(self, plan: Trace, topology: Topology, sources: str) -> Held:
        """The placement for "round-robin" sources or for "homes"."""
        if sources == "homes" and self.place_with_homes is not None:
            return self.place_with_homes(plan, topology)
        return self.place(plan, topology)


@dataclass(frozen=True, slots=True)
class Shape:
    """Hosts x shards of each, and spare slots as a share of the experts."""

    hosts: int
    per_host: int
    spare: float

    def topology(self, num_experts: int) -> Topology | None:
        """None where the slots do not divide over the shards: EPLB wants equal shards."""
        slots = num_experts * (1 + self.spare) / (self.hosts * self.per_host)
        if slots != int(slots):
            return None
        return uniform_topology(
            num_hosts=self.hosts, shards_per_host=self.per_host, slots=int(slots)
        )

    def __str__(self) -> str:
        return f"{self.hosts}x{self.per_host} +{self.spare:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A method on one fold."""

    method: str
    shape: Shape
    scenario: str  # trace, one of its domains alone, or shift
    sources: str  # "round-robin" or "homes"
    fold: int
    layers: tuple[LayerTraffic, ...]
    plan_s: float
    migrated_bytes: float = 0.0
    turned_to: str = ""  # of a shift: the domain

    @property
    def mean(self) -> LayerTraffic:
        """Over the layers."""
        return mean_of(list(self.layers))


def by_layer(place: Callable[[NDArray[np.int16], int, Topology], NDArray[np.bool_]]) -> Place:
    """A placement of one layer from its experts alone, as one of all layers."""

    def all_layers(trace: Trace, topology: Topology) -> Held:
        return [
            place(trace.experts_TLK[:, layer], trace.num_experts, topology)
            for layer in range(trace.num_layers)
        ]

    return all_layers


def _contiguous(_: NDArray[np.int16], num_experts: int, topology: Topology) -> NDArray[np.bool_]:
    return baselines.contiguous(num_experts, topology)


def _eplb(experts_TK: NDArray[np.int16], num_experts: int, topology: Topology) -> NDArray[np.bool_]:
    return eplb_held(baselines.loads(experts_TK, num_experts), topology)


priced = choose_all  # the dispatcher's choice: set cover with load prices
BASELINES = (
    Method("B0 pairs", by_layer(_contiguous), baselines.cover, "pair"),
    Method("B1 shard-dedup", by_layer(_contiguous), baselines.cover),
    Method("B2 host-dedup", by_layer(_contiguous), baselines.cover, "host"),
    Method("B3a EPLB random", by_layer(_eplb), partial(choose_all, policy="random")),
    Method("B3b EPLB cover", by_layer(_eplb), baselines.cover),
    Method("B3c EPLB, our choice", by_layer(_eplb), priced),
    Method("B4 co-activation", by_layer(baselines.coactivation_placement), baselines.cover),
)


def _remora(trace: Trace, topology: Topology) -> Held:
    layers = tuple(
        count_bundles(trace.experts_TLK[:, layer], round_robin(trace, topology))
        for layer in range(trace.num_layers)
    )
    problem = GroupingProblem(layers=layers, num_experts=trace.num_experts, topology=topology)
    return list(plan_placement(problem, seed=0).held_L)


def _remora_with_homes(trace: Trace, topology: Topology) -> Held:
    plan = plan_homes_and_placement(
        trace.experts_TLK, trace.sequence_T, topology, num_experts=trace.num_experts, seed=0
    )
    return list(plan.result.held_L)


REMORA = Method("B6 Remora", _remora, priced, place_with_homes=_remora_with_homes)


def judge_layers(
    method: Method,
    held_L: Held,
    judge: Trace,
    sources_T: NDArray[np.integer] | Sequence[NDArray[np.integer]],
    topology: Topology,
) -> tuple[LayerTraffic, ...]:
    """Every layer's figures on tokens in decode order.

    Args:
        sources_T: source host of each token; or one such array for each layer.
    """
    shared = Steps.of(sources_T) if isinstance(sources_T, np.ndarray) else None
    figures = []
    for layer in range(judge.num_layers):
        own_T = sources_T if isinstance(sources_T, np.ndarray) else sources_T[layer]
        index_TK = judge.experts_TLK[:, layer]
        shard_TK = method.choose(index_TK, own_T, held_L[layer], topology)
        figures.append(
            tally(
                index_TK,
                shard_TK,
                shared or Steps.of(own_T),
                topology,
                judge.num_experts,
                method.dedup,
                judge.row_bytes,
            )
        )
    return tuple(figures)


def run_fold(
    methods: Iterable[Method],
    plan: Trace,
    judges: Mapping[str, Trace],
    shape: Shape,
    fold: int,
    kept: dict[str, Held] | None = None,
) -> list[Result]:
    """Every method, planned on one trace and judged on others, with both kinds of sources.

    Args:
        judges: by scenario.
        kept: filled with the placements for round-robin sources, by method.
    """
    topology = shape.topology(plan.num_experts)
    if topology is None:
        return []
    ordered = {scenario: judge.decode_order() for scenario, judge in judges.items()}
    results = []
    for method in methods:
        held_L: Held = []
        for sources in SOURCES:
            begin = time.perf_counter()
            if sources == SOURCES[0] or method.place_with_homes is not None:
                held_L = method.placed(plan, topology, sources)
                plan_s = time.perf_counter() - begin
            if kept is not None and sources == SOURCES[0]:
                kept[method.name] = held_L
            for scenario, judge in ordered.items():
                source_T = sources_of(sources, plan, judge, held_L, topology)
                results.append(
                    Result(
                        method=method.name,
                        shape=shape,
                        scenario=scenario,
                        sources=sources,
                        fold=fold,
                        layers=judge_layers(method, held_L, judge, source_T, topology),
                        plan_s=plan_s,
                    )
                )
    return results


def sources_of(
    sources: str, plan: Trace, judge: Trace, held_L: Held, topology: Topology
) -> NDArray[np.int64]:
    """Source host of each token of `judge`; homes are decided under this placement."""
    if sources == "homes":
        return home_sources(plan, judge, held_L, topology)
    return round_robin(judge, topology)
