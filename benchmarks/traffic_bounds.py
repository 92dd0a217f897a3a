"""The least remote copies that any placement and choice of replicas can have: small cases only.

An integer programme for one MoE layer, solved by HiGHS (`scipy.optimize.milp`). Shape suffixes: B
unique (source, bundle), K top-k, E experts, S shards, H hosts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from remora.comm.bundles import LayerBundles
from remora.comm.topology import Topology


@dataclass(frozen=True, slots=True)
class Bound:
    """`lower` is proved; `found` is the best placement's copies per token, found in time."""

    lower: float
    found: float
    held_SE: NDArray[np.bool_]


def least_copies(
    bundles: LayerBundles,
    topology: Topology,
    num_experts: int,
    *,
    load_max: float,
    seconds_max: float = 60.0,
) -> Bound:
    """Remote copies per token, at loads of at most `load_max` times the mean.

    Variables: x[e, s] expert e on shard s (0 or 1); y[b, k, s] share of pair k of bundle b that s
    computes; u[b, h] whether a copy of b goes to host h. Pairs may be shared out between replicas,
    as the copies of equal tokens can be.

    Raises:
        RuntimeError: HiGHS found no placement in time, or there is none.
    """
    pair_b, pair_k = np.nonzero(bundles.experts_BK >= 0)
    pair_e = bundles.experts_BK[pair_b, pair_k].astype(np.int64)
    weight_P = bundles.weight_B[pair_b]
    num_shards, num_hosts = topology.num_shards, topology.num_hosts
    num_pairs, num_bundles = len(pair_b), len(bundles.weight_B)
    host_S = np.asarray(topology.host_of_S)
    y_at = num_experts * num_shards
    u_at = y_at + num_pairs * num_shards
    size = u_at + num_bundles * num_hosts
    rows = _Rows(size)
    for e in range(num_experts):
        rows.add([(e * num_shards + s, 1.0) for s in range(num_shards)], 1, np.inf)
    for s in range(num_shards):
        slots = [(e * num_shards + s, 1.0) for e in range(num_experts)]
        rows.add(slots, 0, topology.slots_S[s])
        load = [(y_at + p * num_shards + s, float(weight_P[p])) for p in range(num_pairs)]
        rows.add(load, 0, load_max * float(weight_P.sum()) / num_shards)
    for p in range(num_pairs):
        shares = [y_at + p * num_shards + s for s in range(num_shards)]
        rows.add([(at, 1.0) for at in shares], 1, 1)
        for s, at in enumerate(shares):
            rows.add([(at, 1.0), (int(pair_e[p]) * num_shards + s, -1.0)], -np.inf, 0)
        for h in range(num_hosts):
            on_host = [(at, 1.0) for s, at in enumerate(shares) if host_S[s] == h]
            copy = (u_at + int(pair_b[p]) * num_hosts + h, -1.0)
            rows.add([*on_host, copy], -np.inf, 0)
    cost = np.zeros(size)
    cost_BH = np.repeat(bundles.weight_B[:, None], num_hosts, 1)
    known = np.flatnonzero(bundles.source_B >= 0)
    cost_BH[known, bundles.source_B[known]] = 0.0
    cost[u_at:] = cost_BH.reshape(-1) / bundles.num_tokens
    integral = np.zeros(size)
    integral[:y_at] = 1
    found = optimize.milp(
        cost,
        constraints=rows.constraints(),
        bounds=optimize.Bounds(0, 1),
        integrality=integral,
        options={"time_limit": seconds_max},
    )
    if found.x is None:
        raise RuntimeError(f"integer programme: {found.message}")
    held_ES = found.x[:y_at].reshape(num_experts, num_shards) > 0.5
    return Bound(float(found.mip_dual_bound), float(found.fun), held_ES.T)


class _Rows:
    """Rows of a sparse constraint matrix."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._row: list[int] = []
        self._column: list[int] = []
        self._value: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        """low <= sum of value x variable <= high."""
        for column, value in terms:
            self._row.append(len(self._low))
            self._column.append(column)
            self._value.append(value)
        self._low.append(low)
        self._high.append(high)

    def constraints(self) -> optimize.LinearConstraint:
        """All rows so far."""
        shape = (len(self._low), self._size)
        matrix = sparse.csr_array((self._value, (self._row, self._column)), shape=shape)
        return optimize.LinearConstraint(matrix, self._low, self._high)
