"""A first partition by hypergraph partitioning: experts are nodes, bundles are edges.

What an edge pays in the connectivity metric, (parts it touches) - 1, is exactly the rows that its
tokens send beyond the first. mt-kahypar (MIT licence) partitions hosts first, then the shards of
each host; its deterministic preset depends on the seed alone.

Shape suffixes: B bundles, E experts, S shards.
"""

import threading
from typing import Any, Final

import mtkahypar
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.topology import Topology

EDGES_MAX: Final = 4_000  # heaviest bundles; the seed need not see the tail

_threads: list[Any] = []  # mt-kahypar is initialised once in a process
_one_at_a_time = threading.Lock()  # it has one seed for all


def hypergraph_seed(
    bundles: LayerBundles, num_experts: int, topology: Topology, *, seed: int
) -> NDArray[np.int64] | None:
    """Shard of each expert, equal numbers everywhere; None where experts do not divide evenly."""
    shards_of = [
        np.flatnonzero(np.array(topology.host_of_S) == h) for h in range(topology.num_hosts)
    ]
    sizes = {len(shards) for shards in shards_of}
    if len(sizes) > 1 or num_experts % topology.num_shards or len(set(topology.slots_S)) > 1:
        return None
    heaviest = np.argsort(-bundles.weight_B, kind="stable")[:EDGES_MAX]
    ids_BK, weight_B = bundles.experts_BK[heaviest], bundles.weight_B[heaviest]
    host_E = _parts(ids_BK, weight_B, np.arange(num_experts), topology.num_hosts, seed)
    shard_E = np.empty(num_experts, np.int64)
    for host, shards in enumerate(shards_of):
        experts = np.flatnonzero(host_E == host)
        shard_E[experts] = shards[_parts(ids_BK, weight_B, experts, len(shards), seed)]
    return shard_E


def _parts(
    ids_BK: NDArray[np.int16],
    weight_B: NDArray[np.float64],
    experts: NDArray[np.int64],
    num_parts: int,
    seed: int,
) -> NDArray[np.int64]:
    """Part of each of `experts`, parts of equal size."""
    room = len(experts) // num_parts
    if num_parts == 1 or room == 0:
        return np.zeros(len(experts), np.int64)
    node_E = {int(expert): node for node, expert in enumerate(experts)}
    edges, weights = [], []
    scale = 100.0 / max(float(weight_B.max()), 1e-30)
    for ids, weight in zip(ids_BK.tolist(), weight_B.tolist(), strict=True):
        edge = [node_E[e] for e in ids if e in node_E]
        if len(edge) > 1:
            edges.append(edge)
            weights.append(max(1, round(weight * scale)))
    part_N = np.arange(len(experts)) % num_parts
    if edges:
        part_N = _partitioned(edges, weights, len(experts), num_parts, seed)
    return _equalised(part_N, num_parts, room)


def _partitioned(
    edges: list[list[int]], weights: list[int], num_nodes: int, num_parts: int, seed: int
) -> NDArray[np.int64]:
    """Part of each node, by mt-kahypar."""
    with _one_at_a_time:
        if not _threads:
            _threads.append(mtkahypar.initialize(1))
        mtkahypar.set_seed(seed % 2**31)
        maker = _threads[0]
        context = maker.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
        context.set_partitioning_parameters(num_parts, 0.0, mtkahypar.Objective.KM1)
        context.logging = False
        graph = maker.create_hypergraph(
            context, num_nodes, len(edges), edges, [1] * num_nodes, weights
        )
        partition = graph.partition(context)
        return np.array([partition.block_id(n) for n in range(num_nodes)])


def _equalised(part_N: NDArray[np.int64], num_parts: int, room: int) -> NDArray[np.int64]:
    """Parts of exactly `room`: what is too many goes, last first, where there is room."""
    part_N = part_N.copy()
    for part in range(num_parts):
        for node in np.flatnonzero(part_N == part)[room:].tolist():
            part_N[node] = int(np.bincount(part_N, minlength=num_parts).argmin())
    return part_N
