"""Exchanges: local search over placements with replicas.

Two kinds of move keep slots full: a shard gives up one copy for another, and two shards swap a copy
each. Candidates come from `replica_search.change_tables`. Each is tried on the bundles that it
concerns, with the dispatch's own choice of replicas, under prices that stay as the last full replay
left them; load that tried moves shift is paid for beyond that, by the quadratic that those prices
are the slope of:

    rows + steepness x sum over shards of gain x (load - mean)^2 / (2 x mean)

What improves is done at once; after a round of candidates everything is replayed and priced anew,
and the search ends when a whole round brings nothing.

Shape suffixes: B bundles, K top-k, E experts, R replicas, S shards, H hosts, M moves, F flips.
"""

from dataclasses import replace
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.choice import (
    GAIN_ONE,
    PENDING,
    UNIT,
    choose_token,
    discount_local,
    gain_for,
)
from remora.comm.limits import TOP_K_MAX
from remora.comm.objective import Objective
from remora.comm.partition_search import index_bundles
from remora.comm.replay import replicas_of
from remora.comm.replica_search import (
    hosts_wanted,
    load_prices,
    tables_of,
    value_of,
)
from remora.comm.topology import Topology

Held = NDArray[np.bool_]  # [S, E]
CANDIDATES: Final = 160  # of each kind, a round
TOP: Final = 10  # best gains and least losses of a shard that are combined
WORSE_MAX: Final = 3  # rounds without a better placement: prices and placement chase each other
STEEPNESS: Final = (2.0, 8.0, 32.0)  # of load prices, when a plan is over a load
OVER_PRICE: Final = 1e3  # rows a token for the load over it
FLIPS: Final = 4  # of one move: (shard, expert) gives up, (shard, expert) takes, twice or once

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _promising_moves(held_SE, gain_ES, loss_ES, top, moves_MF2, value_M):  # type: ignore[no-untyped-def]  # fmt: skip
    """Fills replacements, then swaps, the best of each kind; how many of both."""
    num_shards, num_experts = held_SE.shape
    limit = moves_MF2.shape[0] // 2
    copies_E = np.zeros(num_experts, np.int64)
    for s in range(num_shards):
        copies_E += held_SE[s]
    in_ST = np.full((num_shards, top), -1, np.int64)
    out_ST = np.full((num_shards, top), -1, np.int64)
    for s in range(num_shards):
        for n, e in enumerate(np.argsort(np.where(held_SE[s], np.inf, -gain_ES[:, s]))[:top]):
            if not held_SE[s, e]:
                in_ST[s, n] = e
        alone_E = ~held_SE[s] | (copies_E < 2)
        for n, e in enumerate(np.argsort(np.where(alone_E, np.inf, loss_ES[:, s]))[:top]):
            if not alone_E[e]:
                out_ST[s, n] = e
    moves_MF2[:] = -1
    found = 0
    for kind in range(2):
        base, worst = found, found
        for one in range(num_shards):
            for two in range(one + 1 if kind else one, num_shards if kind else one + 1):
                for a in out_ST[one] if kind == 0 else in_ST[two]:
                    if a < 0 or (kind == 1 and not held_SE[one, a]):
                        continue
                    for b in in_ST[one]:
                        if b < 0 or a == b or (kind == 1 and not held_SE[two, b]):
                            continue
                        value = gain_ES[b, one]
                        value += gain_ES[a, two] if kind == 1 else -loss_ES[a, one]
                        at = found
                        if found - base == limit:
                            if value <= value_M[worst]:
                                continue
                            at = worst
                        else:
                            found += 1
                        value_M[at] = value
                        moves_MF2[at, 0, 0], moves_MF2[at, 0, 1] = one, a
                        last = 3 if kind else 1
                        moves_MF2[at, last, 0], moves_MF2[at, last, 1] = one, b
                        if kind:
                            moves_MF2[at, 1, 0], moves_MF2[at, 1, 1] = two, a
                            moves_MF2[at, 2, 0], moves_MF2[at, 2, 1] = two, b
                        if found - base == limit:
                            worst = base + int(np.argmin(value_M[base:found]))
        order = base + np.argsort(-value_M[base:found], kind="mergesort")
        moves_MF2[base:found] = moves_MF2[order].copy()
    return found


@_jit
def _flip(shard, expert, held_SE, table_ER):  # type: ignore[no-untyped-def]
    """Holds the copy or no longer; `table_ER` lists holders in any order, -1 behind them."""
    held_SE[shard, expert] = not held_SE[shard, expert]
    row = table_ER[expert]
    at = 0
    while row[at] >= 0 and row[at] != shard:
        at += 1
    if held_SE[shard, expert]:
        row[at] = shard
        return
    last = at
    while last + 1 < row.shape[0] and row[last + 1] >= 0:
        last += 1
    row[at] = row[last]
    row[last] = -1


@_jit
def _hosts_of(expert, table_ER, host_S):  # type: ignore[no-untyped-def]
    """Hosts with a copy, 2 at most."""
    first = -1
    for s in table_ER[expert]:
        if s < 0:
            break
        if first >= 0 and host_S[s] != first:
            return 2
        first = host_S[s]
    return 1 if first >= 0 else 0


@_jit
def _concerned(b, move_F2, ids_BK, source_B, shard_BK, held_SE, host_S):  # type: ignore[no-untyped-def]
    """Whether the bundle would choose otherwise (held_SE is that after the move): it uses a copy
    that goes, or has a reason to go where one comes."""
    for f in range(move_F2.shape[0]):
        s, e = move_F2[f, 0], move_F2[f, 1]
        if s < 0:
            break
        comes = held_SE[s, e]
        for k in range(ids_BK.shape[1]):
            if ids_BK[b, k] != e:
                continue
            if not comes:
                if shard_BK[b, k] == s:
                    return True
                break
            if host_S[s] == source_B[b]:
                return True
            for j in range(ids_BK.shape[1]):
                g = ids_BK[b, j]
                if g >= 0 and j != k and (held_SE[s, g] or host_S[shard_BK[b, j]] == host_S[s]):
                    return True
            break
    return False


@_jit
def _rows(ids_K, shard_K, host_S, source, b_dev, b_host):  # type: ignore[no-untyped-def]
    """What the rows of one token cost."""
    cost = 0.0
    for k in range(ids_K.shape[0]):
        if ids_K[k] < 0:
            continue
        s = shard_K[k]
        new_shard = True
        new_host = host_S[s] != source
        for j in range(k):
            if ids_K[j] >= 0:
                new_shard = new_shard and shard_K[j] != s
                new_host = new_host and host_S[shard_K[j]] != host_S[s]
        cost += b_dev * new_shard + b_host * new_host
    return cost


@_jit
def _shift(ids_K, before_K, after_K, weight, change_S):  # type: ignore[no-untyped-def]
    for k in range(ids_K.shape[0]):
        if ids_K[k] >= 0 and after_K[k] != before_K[k]:
            change_S[after_K[k]] += weight
            change_S[before_K[k]] -= weight


@_jit
def _load_change(change_S, shifted_S, price_S, bend):  # type: ignore[no-untyped-def]
    """What a change of load costs after what was shifted already; see the module's docstring."""
    cost = 0.0
    for s in range(price_S.shape[0]):
        bent = (2 * shifted_S[s] + change_S[s]) * change_S[s] * bend
        cost += price_S[s] / UNIT * change_S[s] + bent
    return cost


@_jit
def _try_moves(moves_MF2, found, ids_BK, source_B, weight_B, start, bundle, held_SE, table_ER, move_SE, host_S, num_hosts, hosts_min, price_S, price_XS, gain, mean, steepness, b_dev, b_host, shard_BK, rows_B, tiny):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Tries moves in turn and does those that improve; how many.

    Args:
        held_SE, table_ER: the placement, changed by what is done.
        move_SE: what having a copy there costs in moved weights.
        price_S: int64 frozen prices in UNIT, of slope `gain` per (load / `mean`).
        price_XS: the same as each source host sees them, and last as one of no host does.
        shard_BK, rows_B: written first: each bundle's choice under the frozen prices, its rows.
    """
    num_bundles, top_k = ids_BK.shape
    num_shards = host_S.shape[0]
    usable_S = np.ones(num_shards, np.uint8)
    cover_S = np.zeros(num_shards, np.int32)
    cover_H = np.zeros(num_hosts, np.int32)
    opened_H = np.zeros(num_hosts, np.uint8)
    candidates = np.empty(num_shards, np.int32)
    opened = np.empty(TOP_K_MAX, np.int32)
    call_K = np.empty(top_k, np.int32)
    for b in range(num_bundles):
        call_K[:] = PENDING
        choose_token(ids_BK[b], call_K, table_ER, host_S, source_B[b], usable_S, price_XS[source_B[b]], 0, cover_S, cover_H, opened_H, candidates, opened, shard_BK[b])  # fmt: skip  # noqa: E501
        rows_B[b] = _rows(ids_BK[b], shard_BK[b], host_S, source_B[b], b_dev, b_host)
    tried_B = np.full(num_bundles, -1, np.int64)
    touched_N = np.empty(num_bundles, np.int64)
    shard_NK = np.empty((num_bundles, top_k), np.int32)
    rows_N = np.empty(num_bundles)
    shifted_S = np.zeros(num_shards)  # load that moves done so far have shifted
    change_S = np.zeros(num_shards)
    hosts_F = np.zeros(FLIPS, np.int64)
    done = 0
    for m in range(found):
        fits = True
        flips = 0
        for f in range(FLIPS):
            if moves_MF2[m, f, 0] < 0:
                break
            fits = fits and held_SE[moves_MF2[m, f, 0], moves_MF2[m, f, 1]] == (f % 2 == 0)
            hosts_F[f] = min(hosts_min, _hosts_of(moves_MF2[m, f, 1], table_ER, host_S))
            flips += 1
        if not fits:
            continue
        change = 0.0
        for f in range(flips):
            s, e = moves_MF2[m, f, 0], moves_MF2[m, f, 1]
            _flip(s, e, held_SE, table_ER)
            change += move_SE[s, e] if held_SE[s, e] else -move_SE[s, e]
        for f in range(flips):
            fits = fits and _hosts_of(moves_MF2[m, f, 1], table_ER, host_S) >= hosts_F[f]
        count = 0
        change_S[:] = 0.0
        for f in range(flips if fits else 0):
            e = moves_MF2[m, f, 1]
            for i in range(start[e], start[e + 1]):
                b = bundle[i]
                if tried_B[b] == m:
                    continue
                tried_B[b] = m
                if not _concerned(b, moves_MF2[m], ids_BK, source_B, shard_BK, held_SE, host_S):
                    continue
                call_K[:] = PENDING
                choose_token(ids_BK[b], call_K, table_ER, host_S, source_B[b], usable_S, price_XS[source_B[b]], 0, cover_S, cover_H, opened_H, candidates, opened, shard_NK[count])  # fmt: skip  # noqa: E501
                rows_N[count] = _rows(ids_BK[b], shard_NK[count], host_S, source_B[b], b_dev, b_host)  # fmt: skip  # noqa: E501
                change += weight_B[b] * (rows_N[count] - rows_B[b])
                _shift(ids_BK[b], shard_BK[b], shard_NK[count], weight_B[b], change_S)
                touched_N[count] = b
                count += 1
        change += steepness * _load_change(change_S, shifted_S, price_S, gain / (2 * mean))
        if not fits or change >= -tiny:
            for f in range(flips):
                _flip(moves_MF2[m, f, 0], moves_MF2[m, f, 1], held_SE, table_ER)
            continue
        for n in range(count):
            shard_BK[touched_N[n]] = shard_NK[n]
            rows_B[touched_N[n]] = rows_N[n]
        shifted_S += change_S
        done += 1
    return done


def within_load(
    bundles: LayerBundles,
    topology: Topology,
    held_SE: Held,
    objective: Objective,
    *,
    load_max: float,
    old: Held | None = None,
) -> Held:
    """Exchanges under steeper and steeper load prices, until no shard has more than `load_max`
    times the mean load or STEEPNESS is at its end."""
    strict = replace(objective, load_eps=load_max - 1, load_price=OVER_PRICE)
    for steepness in STEEPNESS:
        held_SE = exchange(bundles, topology, held_SE, strict, old=old, steepness=steepness)
        if tables_of(bundles, topology, held_SE, strict)[2].load_max_over_mean <= load_max:
            break
    return held_SE


def exchange(
    bundles: LayerBundles,
    topology: Topology,
    held_SE: Held,
    objective: Objective,
    *,
    old: Held | None = None,
    steepness: float = 1.0,
    rounds: int | None = None,
) -> Held:
    """The best placement that exchanges lead to from `held_SE`, by `value_of` and, where
    there is an `old` one, the weights to move against it.

    Args:
        steepness: of the price of load while moves are tried, over that of the dispatch.
        rounds: of candidates, at most; None: `objective.rounds`.
    """
    if not bundles.num_tokens:  # nothing to weigh an exchange by
        return held_SE.copy()
    num_shards, num_experts = held_SE.shape
    ids_BK = bundles.experts_BK.astype(np.int64)
    source_B = bundles.source_B.astype(np.int64)
    start, bundle = index_bundles(ids_BK, num_experts)
    host_S = np.array(topology.host_of_S, np.int32)
    a_move = objective.nu / objective.horizon_tokens
    move_SE = np.zeros(held_SE.shape) if old is None else np.where(old, 0.0, a_move)
    gain = gain_for(num_shards) / GAIN_ONE
    shard_BK, rows_B = np.zeros(ids_BK.shape, np.int32), np.zeros(len(ids_BK))
    moves_MF2 = np.empty((2 * CANDIDATES, FLIPS, 2), np.int64)
    held_SE = held_SE.copy()

    best_held, best, worse = held_SE.copy(), np.inf, 0
    for _ in range((objective.rounds if rounds is None else rounds) + 1):
        gain_ES, loss_ES, cost = tables_of(
            bundles, topology, held_SE, objective, steepness=steepness
        )
        value = value_of(cost, objective) + float(move_SE[held_SE].sum())
        worse = 0 if value < best else worse + 1
        if value < best:
            best_held, best = held_SE.copy(), value
        elif worse == WORSE_MAX:
            break
        found = _promising_moves(
            held_SE, gain_ES, loss_ES, min(TOP, num_experts), moves_MF2, np.empty(len(moves_MF2))
        )
        table_ER = np.full((num_experts, num_shards + 1), -1, np.int16)
        listed_ER = replicas_of(held_SE)
        table_ER[:, : listed_ER.shape[1]] = listed_ER
        price_S = np.rint(load_prices(cost.load_S, gain) * UNIT).astype(np.int64)
        price_XS = np.repeat(price_S[None], topology.num_hosts + 1, axis=0)
        for host in range(topology.num_hosts):
            discount_local(host_S, host, gain_for(num_shards), price_XS[host])
        weight = float(bundles.weight_B.sum())
        done = _try_moves(
            moves_MF2, found, ids_BK, source_B, bundles.weight_B, start, bundle, held_SE, table_ER,
            move_SE * weight, host_S, topology.num_hosts, hosts_wanted(topology, num_experts),
            price_S, price_XS, gain, float(cost.load_S.mean()), steepness, objective.b_dev,
            objective.b_host, shard_BK, rows_B, 1e-7 * weight,
        )  # fmt: skip
        if not done:
            break
    return best_held
