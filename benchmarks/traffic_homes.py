"""Sources of held-out tokens: request homes, decided from what exists then (`comm/homes.py`).

Without token ids a request's first PROBE_TOKENS run on a provisional host (requests in turn), and
its home is decided from their bundles alone; the probe's rows are counted where they ran. With
token ids the home is decided at admission, from the ids of the prompt and a table of what such ids
did in the planning trace. Sizes are the sequences' lengths. Requests are taken WINDOW at a time,
with the load of those before.

Shape suffixes: T tokens, Q requests, H hosts, V token ids.
"""

import numpy as np
from numpy.typing import NDArray
from traffic_data import SEED, Trace

from remora.comm.homes import assign_homes, hits_of
from remora.comm.topology import Topology

PROBE_TOKENS = 16
PROMPT_SHARE = 0.25  # of a sequence with token ids: the rest counts as generated
WINDOW = 16

Held = list[NDArray[np.bool_]]


def round_robin(trace: Trace, topology: Topology) -> NDArray[np.int64]:
    """Source hosts that say nothing about their tokens: one after another."""
    return np.arange(len(trace.sequence_T)) % topology.num_hosts


def positions(trace: Trace) -> NDArray[np.int64]:
    """Of each token in its sequence, for tokens in order within their sequences."""
    order = np.argsort(trace.sequence_T, kind="stable")
    length_Q = np.bincount(trace.sequence_T, minlength=trace.num_sequences)
    position_T = np.empty(len(order), np.int64)
    position_T[order] = np.arange(len(order)) - np.repeat(np.cumsum(length_Q) - length_Q, length_Q)
    return position_T


def home_sources(plan: Trace, judge: Trace, held_L: Held, topology: Topology) -> NDArray[np.int64]:
    """Source host of each token of `judge` when requests get homes for this placement."""
    length_Q = np.bincount(judge.sequence_T, minlength=judge.num_sequences)
    position_T = positions(judge)
    if judge.token_T is not None:
        prompt_T = position_T < np.ceil(PROMPT_SHARE * length_Q)[judge.sequence_T]
        table_VH, prior_H = _hit_table(plan, held_L, topology, int(judge.token_T.max()) + 1)
        seen_T = np.isfinite(table_VH[judge.token_T, 0])
        hit_TH = np.where(seen_T[:, None], table_VH[judge.token_T], prior_H)
        hits_QH = np.zeros((judge.num_sequences, topology.num_hosts))
        np.add.at(hits_QH, judge.sequence_T[prompt_T], hit_TH[prompt_T])
        known_Q = np.bincount(judge.sequence_T[prompt_T], minlength=judge.num_sequences)
        return assign(hits_QH, known_Q, length_Q)[judge.sequence_T]
    probe_T = position_T < PROBE_TOKENS
    hits_QH = hits_of(
        judge.experts_TLK[probe_T],
        judge.sequence_T[probe_T],
        judge.num_sequences,
        held_L,
        topology.host_of_S,
        topology.num_hosts,
    )
    home_Q = assign(hits_QH, np.minimum(length_Q, PROBE_TOKENS), length_Q)
    provisional_T = judge.sequence_T % topology.num_hosts
    return np.where(probe_T, provisional_T, home_Q[judge.sequence_T]).astype(np.int64)


def assign(
    hits_QH: NDArray[np.floating], known_Q: NDArray[np.integer], length_Q: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Homes from the copies saved on `known_Q` tokens of each request, extrapolated to all."""
    num_requests, num_hosts = hits_QH.shape
    cost_QH = -hits_QH * (length_Q / np.maximum(known_Q, 1))[:, None]
    home_Q = np.empty(num_requests, np.int64)
    arrival = np.random.default_rng(SEED).permutation(num_requests)
    for begin in range(0, num_requests, WINDOW):
        now = arrival[begin : begin + WINDOW]
        before = arrival[:begin]
        load_H = np.bincount(home_Q[before], length_Q[before], num_hosts)
        home_Q[now] = assign_homes(cost_QH[now], length_Q[now], load_H=load_H)
    return home_Q


def _hit_table(
    plan: Trace, held_L: Held, topology: Topology, num_ids: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[V, H]` copies that host h saves for a token of this id, nan where it was not seen; mean."""
    assert plan.token_T is not None, f"trace {plan.name} has no token ids"
    num_ids = max(num_ids, int(plan.token_T.max()) + 1)
    hits_VH = hits_of(
        plan.experts_TLK, plan.token_T, num_ids, held_L, topology.host_of_S, topology.num_hosts
    )
    seen_V = np.bincount(plan.token_T, minlength=num_ids)
    table_VH = hits_VH / np.where(seen_V > 0, seen_V, np.nan)[:, None]
    return table_VH, hits_VH.sum(0) / seen_V.sum()
