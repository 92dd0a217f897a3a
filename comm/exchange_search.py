"""Exchanges: local search over placements with replicas.

Two kinds of move keep slots full: a shard gives up one copy for another (`replace`), and two shards
swap a copy each. Candidates come from `replica_search.change_tables`; each is then tried on the
bundles that contain its experts, with the dispatch's own choice under prices that stay as the last
full replay left them. What improves is done at once; after a round of candidates everything is
replayed and priced anew, and the search ends when a whole round brings nothing.

Shape suffixes: B bundles, K top-k, E experts, R most replicas, S shards, H hosts.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.choice import GAIN, GAIN_ONE, PENDING, TOP_K_MAX, UNIT, choose_token
from remora.comm.objective import Objective
from remora.comm.partition_search import index_bundles
from remora.comm.replay import replicas_of
from remora.comm.replica_search import (
    hosts_holding,
    hosts_wanted,
    load_prices,
    replayed_value,
    tables_of,
)
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]
CANDIDATES: Final = 160  # of each kind, a round
TOP: Final = 10  # best gains and least losses of a shard that are combined

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _frozen_costs(bundles_N, ids_BK, source_B, weight_B, table_ER, host_S, num_hosts, price_S, b_dev, b_host, cost_N):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Rows and priced pairs of each of `bundles_N` under prices that stay as they are."""
    num_shards = host_S.shape[0]
    usable_S = np.ones(num_shards, np.uint8)
    cover_S = np.zeros(num_shards, np.int32)
    cover_H = np.zeros(num_hosts, np.int32)
    opened_H = np.zeros(num_hosts, np.uint8)
    candidates = np.empty(num_shards, np.int32)
    opened = np.empty(TOP_K_MAX, np.int32)
    top_k = ids_BK.shape[1]
    call_K = np.empty(top_k, np.int32)
    shard_K = np.empty(top_k, np.int32)
    for n in range(bundles_N.shape[0]):
        b = bundles_N[n]
        call_K[:] = PENDING
        choose_token(
            ids_BK[b], call_K, table_ER, host_S, source_B[b], usable_S, price_S, 0,
            cover_S, cover_H, opened_H, candidates, opened, shard_K,
        )  # fmt: skip
        cost = 0.0
        for k in range(top_k):
            if call_K[k] != PENDING:
                continue
            s = shard_K[k]
            cost += price_S[s] / UNIT
            new_shard = True
            new_host = host_S[s] != source_B[b]
            for j in range(k):
                if call_K[j] == PENDING:
                    new_shard = new_shard and shard_K[j] != s
                    new_host = new_host and host_S[shard_K[j]] != host_S[s]
            cost += b_dev * new_shard + b_host * new_host
        cost_N[n] = cost * weight_B[b]


Move = tuple[tuple[int, int], ...]  # (shard, expert) pairs whose being held flips


class _Exchanger:
    """State of one search: a placement, and what each bundle costs under the frozen prices."""

    def __init__(
        self,
        bundles: LayerBundles,
        topology: Topology,
        held_SE: Held,
        objective: Objective,
        old: Held | None,
    ) -> None:
        self._old = old
        self._a_move = objective.nu * bundles.num_tokens / objective.horizon_tokens
        self._hosts_min = hosts_wanted(topology, held_SE.shape[1])
        self.bundles, self.topology, self.objective = bundles, topology, objective
        self.held_SE = held_SE.copy()
        self._ids_BK = bundles.experts_BK.astype(np.int64)
        self._source_B = bundles.source_B.astype(np.int64)
        self._index = index_bundles(self._ids_BK, held_SE.shape[1])
        self._host_S = np.array(topology.host_of_S, np.int32)

    def refresh(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Replays, prices anew; the tables of `change_tables`."""
        gain_ES, loss_ES, load_S = tables_of(
            self.bundles, self.topology, self.held_SE, self.objective
        )
        price_S = load_prices(load_S, GAIN / GAIN_ONE)
        self._price_S = np.rint(price_S * UNIT).astype(np.int64)
        self._cost_B = self._costs(np.arange(len(self._ids_BK)), self.held_SE)
        return gain_ES, loss_ES

    def try_move(self, move: Move) -> bool:
        """Does it when the bundles with its experts get cheaper by more than it moves."""
        held_SE = self.held_SE.copy()
        moving = 0.0
        for shard, expert in move:
            held_SE[shard, expert] ^= True
            if self._old is not None and not self._old[shard, expert]:
                moving += self._a_move if held_SE[shard, expert] else -self._a_move
        experts = sorted({expert for _, expert in move})
        before_N = hosts_holding(self.held_SE[:, experts], self.topology)
        after_N = hosts_holding(held_SE[:, experts], self.topology)
        if (after_N < np.minimum(before_N, self._hosts_min)).any():
            return False
        start, bundle = self._index
        touched_N = np.unique(np.concatenate([bundle[start[e] : start[e + 1]] for e in experts]))
        cost_N = self._costs(touched_N, held_SE)
        tiny = 1e-7 * float(self.bundles.weight_B.sum())
        if cost_N.sum() + moving >= self._cost_B[touched_N].sum() - tiny:
            return False
        self.held_SE = held_SE
        self._cost_B[touched_N] = cost_N
        return True

    def _costs(self, bundles_N: NDArray[np.integer], held_SE: Held) -> NDArray[np.float64]:
        cost_N = np.empty(len(bundles_N))
        _frozen_costs(
            bundles_N.astype(np.int64), self._ids_BK, self._source_B, self.bundles.weight_B,
            replicas_of(held_SE), self._host_S, self.topology.num_hosts, self._price_S,
            self.objective.b_dev, self.objective.b_host, cost_N,
        )  # fmt: skip
        return cost_N


def exchange(
    bundles: LayerBundles,
    topology: Topology,
    held_SE: Held,
    objective: Objective,
    *,
    old: Held | None = None,
) -> Held:
    """The best placement that exchanges lead to from `held_SE`, by `replayed_value` and, where
    there is an `old` one, the weights to move against it."""
    state = _Exchanger(bundles, topology, held_SE, objective, old)

    def value_of(placement_SE: Held) -> float:
        moved = int((placement_SE & ~old).sum()) if old is not None else 0
        paid = objective.nu * moved / objective.horizon_tokens
        return replayed_value(bundles, topology, placement_SE, objective) + paid

    best_held, best = held_SE, value_of(held_SE)
    worse = 0
    for _ in range(objective.rounds):
        gain_ES, loss_ES = state.refresh()
        done = 0
        for move in _candidates(state.held_SE, gain_ES, loss_ES):
            fits = all(state.held_SE[s, e] == (i % 2 == 0) for i, (s, e) in enumerate(move))
            if fits:
                done += state.try_move(move)
        if not done:
            break
        value = value_of(state.held_SE)
        worse = 0 if value < best else worse + 1
        if value < best:
            best_held, best = state.held_SE, value
        elif worse == 3:  # prices and placement chase each other
            break
    return best_held


def _candidates(
    held_SE: Held, gain_ES: NDArray[np.float64], loss_ES: NDArray[np.float64]
) -> list[Move]:
    """Promising moves, best first; held and not held alternate in each."""
    num_shards = len(held_SE)
    gain_ES = np.where(held_SE.T, -np.inf, gain_ES)
    spare_ES = held_SE.T & (held_SE.sum(0) > 1)[:, None]
    loss_ES = np.where(spare_ES, loss_ES, np.inf)
    found: list[tuple[float, Move]] = []
    for shard in range(num_shards):
        new_N = np.argsort(-gain_ES[:, shard], kind="stable")[:TOP].tolist()
        out_N = np.argsort(loss_ES[:, shard], kind="stable")[:TOP].tolist()
        for new in new_N:
            for out in out_N:
                net = float(gain_ES[new, shard] - loss_ES[out, shard])
                if np.isfinite(net):
                    found.append((net, ((shard, out), (shard, new))))
    found = sorted(found, key=lambda f: (-f[0], f[1]))[:CANDIDATES]
    swaps: list[tuple[float, Move]] = []
    tops = [np.argsort(-gain_ES[:, s], kind="stable")[:TOP].tolist() for s in range(num_shards)]
    for one in range(num_shards):
        for two in range(one + 1, num_shards):
            for a in tops[two]:
                for b in tops[one]:
                    if held_SE[one, a] and held_SE[two, b] and a != b:
                        net = float(gain_ES[a, two] + gain_ES[b, one])
                        swaps.append((net, ((one, a), (two, a), (two, b), (one, b))))
    swaps = sorted(swaps, key=lambda f: (-f[0], f[1]))[:CANDIDATES]
    return [move for _, move in [*found, *swaps]]
