"""What a placement and a choice of replicas send, layer by layer: the columns of `traffic.py`.

Replicas are chosen by `comm.replay.choose_all`, which is the dispatcher's own choice; calls, rows
and bytes are those of the transport (a test holds them to `comm.accounting.expected_call_bytes`).

A *step* is STEP_TOKENS tokens of the whole deployment; the tokens of a step that share a source
host are one dispatch. Shape suffixes: T tokens in decode order, K top-k, E experts, S shards, H
hosts, G dispatches.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray
from traffic_data import STEP_TOKENS

from remora.comm.topology import Topology
from remora.comm.wire import HEADER_BYTES, PAIR_BYTES

Dedup = Literal["pair", "shard", "host"]  # a row travels once per ...
PER_ROW = {"pair": 0, "shard": 1, "host": 2}
_jit: Any = numba.njit(cache=True, nogil=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraffic:
    """One MoE layer over a held-out set. Bytes cross between hosts, headers included."""

    copies: float  # remote hosts a token's row goes to, mean over tokens
    out_bytes: float  # per token
    back_ordered: float  # per token, one row back per pair
    back_presummed: float  # per token, one row back per row sent
    local_rate: float  # pairs that stay on the token's host / all
    load: float  # pairs of the busiest shard / mean, over the whole set
    step_load: float  # the same per step, mean over steps
    active: float  # experts a shard computes in a step, mean over shards and steps
    active_max: float  # the same for the step's busiest shard
    ingress: float  # rows entering the busiest host in a step over the mean host's, mean over steps
    ingress_rows: float  # rows entering the busiest host, per token of the step


@dataclass(frozen=True, slots=True)
class Steps:
    """A held-out set cut into dispatches; `order` sorts tokens by (step, source).

    Tokens of group g are `order[start_G[g]:start_G[g + 1]]`.
    """

    order_T: NDArray[np.int64]
    start_G: NDArray[np.int64]
    step_G: NDArray[np.int64]
    source_G: NDArray[np.int64]

    @classmethod
    def of(cls, source_T: NDArray[np.integer], step_tokens: int = STEP_TOKENS) -> "Steps":
        """From the source host of each token in decode order."""
        step_T = np.arange(len(source_T)) // step_tokens
        order_T = np.lexsort((source_T, step_T))
        step_T, source_T = step_T[order_T], source_T[order_T].astype(np.int64)
        starts = np.ones(len(source_T), np.bool_)
        starts[1:] = (step_T[1:] != step_T[:-1]) | (source_T[1:] != source_T[:-1])
        start_G = np.flatnonzero(starts)
        return cls(
            order_T,
            np.append(start_G, len(source_T)),
            step_T[start_G],
            source_T[start_G],
        )


@_jit
def _tally(index_TK, shard_TK, start_G, step_G, source_G, host_S, num_hosts, num_experts, per_row, rows_GS, pairs_GS, load_MS, active_MS, ingress_MH):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Fills rows and pairs of each (dispatch, shard), and what each step brings to whom.

    Returns (copies to other hosts, pairs on the token's own host). With `per_row` 2, a host's rows
    stand at the first of its shards that any token of the dispatch uses.
    """
    num_shards = len(host_S)
    seen_SE = np.full((num_shards, num_experts), -1, np.int64)
    row_S = np.full(num_shards, -1, np.int64)
    copy_H = np.full(num_hosts, -1, np.int64)
    door_H = np.zeros(num_hosts, np.int64)
    copies = local = 0
    for g in range(len(source_G)):
        source, step = source_G[g], step_G[g]
        door_H[:] = -1
        for t in range(start_G[g], start_G[g + 1]):
            for k in range(index_TK.shape[1]):
                e = index_TK[t, k]
                if e < 0:
                    continue
                s = shard_TK[t, k]
                h = host_S[s]
                load_MS[step, s] += 1
                if seen_SE[s, e] != step:
                    seen_SE[s, e] = step
                    active_MS[step, s] += 1
                new_copy = copy_H[h] != t
                copy_H[h] = t
                if h == source:
                    local += 1
                elif new_copy:
                    copies += 1
                if door_H[h] < 0:
                    door_H[h] = s
                at = door_H[h] if per_row == 2 else s
                pairs_GS[g, at] += 1
                new_row = new_copy if per_row == 2 else row_S[s] != t
                row_S[s] = t
                if per_row == 0 or new_row:
                    rows_GS[g, at] += 1
                    if h != source:
                        ingress_MH[step, h] += 1
    return copies, local


def tally(
    index_TK: NDArray[np.integer],
    shard_TK: NDArray[np.integer],
    steps: Steps,
    topology: Topology,
    num_experts: int,
    dedup: Dedup,
    row_bytes: int,
) -> LayerTraffic:
    """The figures of one layer.

    Args:
        index_TK, shard_TK: experts and the shard that computes each, in decode order.
    """
    index_TK = index_TK[steps.order_T].astype(np.int64)
    shard_TK = shard_TK[steps.order_T].astype(np.int64)
    host_S = np.asarray(topology.host_of_S, np.int64)
    num_groups, num_steps = len(steps.source_G), int(steps.step_G[-1]) + 1
    shards = (num_groups, topology.num_shards)
    rows_GS, pairs_GS = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
    load_MS = np.zeros((num_steps, topology.num_shards), np.int64)
    active_MS = np.zeros_like(load_MS)
    ingress_MH = np.zeros((num_steps, topology.num_hosts), np.int64)
    copies, local = _tally(
        index_TK, shard_TK, steps.start_G, steps.step_G, steps.source_G, host_S,
        topology.num_hosts, num_experts, PER_ROW[dedup], rows_GS, pairs_GS, load_MS, active_MS,
        ingress_MH,
    )  # fmt: skip
    num_tokens = len(index_TK)
    tokens_M = np.bincount(steps.step_G, np.diff(steps.start_G))
    remote_GS = host_S[None, :] != steps.source_G[:, None]
    rows, pairs = int(rows_GS[remote_GS].sum()), int(pairs_GS[remote_GS].sum())
    headers = int((rows_GS[remote_GS] > 0).sum()) * HEADER_BYTES
    out = headers + _padded(rows_GS[remote_GS] * row_bytes) + pairs * PAIR_BYTES
    peak_ingress_M = ingress_MH.max(1)
    return LayerTraffic(
        copies=copies / num_tokens,
        out_bytes=out / num_tokens,
        back_ordered=(headers + pairs * row_bytes) / num_tokens,
        back_presummed=(headers + rows * row_bytes) / num_tokens,
        local_rate=local / int(load_MS.sum()),
        load=float(load_MS.sum(0).max() / load_MS.sum(0).mean()),
        step_load=float((load_MS.max(1) / load_MS.mean(1)).mean()),
        active=float(active_MS.mean()),
        active_max=float(active_MS.max(1).mean()),
        ingress=float((peak_ingress_M / np.maximum(ingress_MH.mean(1), 1e-9)).mean()),
        ingress_rows=float((peak_ingress_M / tokens_M).mean()),
    )


def _padded(bytes_: NDArray[np.int64]) -> int:
    """Rows of a call are padded to 4 bytes before the pairs (`wire.dispatch_bytes`)."""
    return int(((bytes_ + 3) & ~3).sum())


def mean_of(layers: list[LayerTraffic]) -> LayerTraffic:
    """Mean of every figure."""
    return LayerTraffic(
        **{f.name: float(np.mean([getattr(x, f.name) for x in layers])) for f in fields(layers[0])}
    )
