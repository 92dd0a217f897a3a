"""Homes and placement planned together from a trace: each is planned given the other, in turn.

    plan = plan_homes_and_placement(ids_TLK, request_T, topology, num_experts=64, seed=0)
    home_Q = homes_from_probe(probe_ids_TLK, probe_request_T, size_Q, plan.result.held_L, topology)

Requests of the trace are first clustered by the experts they pick, into as many clusters of equal
weight as there are hosts (balanced k-means); a cluster's host is the source of its requests, the
placement is planned for these sources, the requests then choose their homes again, and so on.

Shape suffixes: Q requests, T tokens, L MoE layers, K top-k, E experts, H hosts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import count_bundles
from remora.comm.grouping import GroupingProblem, GroupingResult, Progress, plan_placement
from remora.comm.homes import CAPACITY_EPS, assign_homes, hits_of
from remora.comm.objective import Objective
from remora.comm.topology import Topology

_DIMENSIONS: Final = 16  # of the space that requests are clustered in
_STARTS: Final = 4
_STEPS: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPlan:
    """A placement, and the home of each request of the trace that it was planned for."""

    result: GroupingResult
    home_Q: NDArray[np.int64]


def plan_homes_and_placement(
    ids_TLK: NDArray[np.integer],
    request_T: NDArray[np.integer],
    topology: Topology,
    *,
    num_experts: int,
    seed: int,
    objective: Objective | None = None,
    rounds: int = 2,
    old_L: tuple[NDArray[np.bool_], ...] | None = None,
    progress: Progress | None = None,
) -> JointPlan:
    """Alternates homes and placement `rounds` times.

    Args:
        ids_TLK: experts of each token in each MoE layer; negative = none.
        request_T: request of each token, 0 .. Q-1.
        rounds: the last one is planned with all care, those before with a third of it.
    """
    objective = objective or Objective()
    size_Q = np.bincount(request_T).astype(np.float64)
    home_Q = cluster_requests(
        ids_TLK, request_T, num_experts=num_experts, num_clusters=topology.num_hosts, seed=seed
    )
    for number in range(rounds):
        last = number == rounds - 1
        layers = tuple(
            count_bundles(ids_TLK[:, index], home_Q[request_T]) for index in range(ids_TLK.shape[1])
        )
        problem = GroupingProblem(
            layers=layers, num_experts=num_experts, topology=topology, old_L=old_L
        )
        care = objective if last else replace(objective, rounds=max(1, objective.rounds // 3))
        result = plan_placement(
            problem, seed=seed, objective=care, progress=progress if last else None
        )
        if not last:
            hits_QH = hits_of(
                ids_TLK, request_T, len(size_Q), result.held_L, topology.host_of_S,
                topology.num_hosts,
            )  # fmt: skip
            home_Q = assign_homes(-hits_QH, size_Q)
    return JointPlan(result=result, home_Q=home_Q)


def homes_from_probe(
    ids_TLK: NDArray[np.integer],
    request_T: NDArray[np.integer],
    size_Q: NDArray[np.floating],
    held_L: Sequence[NDArray[np.bool_]],
    topology: Topology,
    *,
    load_H: NDArray[np.floating] | None = None,
    eps: float = CAPACITY_EPS,
) -> NDArray[np.int64]:
    """Homes of waiting requests from the bundles of their first chunk (or from predicted ones).

    Args:
        ids_TLK, request_T: the chunks' tokens; requests 0 .. Q-1, each with one at least.
        size_Q: tokens of each whole request.
    """
    num_requests = len(size_Q)
    probed_Q = np.maximum(np.bincount(request_T, minlength=num_requests), 1)
    hits_QH = hits_of(
        ids_TLK, request_T, num_requests, held_L, topology.host_of_S, topology.num_hosts
    )
    cost_QH = -hits_QH * (np.asarray(size_Q) / probed_Q)[:, None]
    return assign_homes(cost_QH, size_Q, load_H=load_H, eps=eps)


def cluster_requests(
    ids_TLK: NDArray[np.integer],
    request_T: NDArray[np.integer],
    *,
    num_experts: int,
    num_clusters: int,
    seed: int,
) -> NDArray[np.int64]:
    """Cluster of each request by the experts that its tokens pick; clusters of about equal weight.

    Balanced k-means on square roots of expert frequencies (Hellinger distance), in the space of
    their first principal components; the best of a few random starts.
    """
    size_Q = np.bincount(request_T).astype(np.float64)
    num_requests, (_, num_layers, top_k) = len(size_Q), ids_TLK.shape
    counts = np.zeros((num_requests, num_layers * num_experts))
    for index in range(num_layers):
        for k in range(top_k):
            ids_T = ids_TLK[:, index, k].astype(np.int64)
            there = ids_T >= 0
            np.add.at(counts, (request_T[there], index * num_experts + ids_T[there]), 1.0)
    roots = np.sqrt(counts / np.maximum(size_Q, 1)[:, None])
    left, scale, _ = np.linalg.svd(roots - roots.mean(0), full_matrices=False)
    points = left[:, :_DIMENSIONS] * scale[:_DIMENSIONS]
    rng = np.random.default_rng(seed)
    best, best_cost = np.zeros(num_requests, np.int64), np.inf
    for _ in range(_STARTS):
        chosen = rng.choice(num_requests, num_clusters, replace=num_requests < num_clusters)
        centres = points[chosen]
        for _ in range(_STEPS):
            cost_QC = ((points[:, None] - centres[None]) ** 2).sum(-1) * size_Q[:, None]
            cluster_Q = assign_homes(cost_QC, size_Q)
            for cluster in np.unique(cluster_Q):
                mine = cluster_Q == cluster
                centres[cluster] = np.average(points[mine], axis=0, weights=size_Q[mine])
        cost = float(cost_QC[np.arange(num_requests), cluster_Q].sum())
        if cost < best_cost:
            best, best_cost = cluster_Q, cost
    return best
