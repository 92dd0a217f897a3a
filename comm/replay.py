"""Replay: what a placement costs on given tokens, by the very choice that a dispatch makes.

    cost = replay(tokens, held_SE, topology)

Tokens come in steps of `step_tokens`, all sources together. Within a step a source sees the load
that was known when the step began and its own pairs since; between steps the loads of all sources
are added up, as dense groups hear of each other through the router. `random` is the choice of
systems that look at nothing (EPLB as published): one of an expert's replicas at random, by seed.

Shape suffixes: T tokens, K top-k, E experts, R most replicas, S shards, H hosts.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.bundles import LayerBundles
from remora.comm.choice import (
    PAIR,
    PENDING,
    begin_prices,
    choose_token,
    decay,
    discount_local,
    gain_for,
)
from remora.comm.limits import TOP_K_MAX
from remora.comm.own_host import level_own_host
from remora.comm.topology import Topology

STEP_TOKENS: Final = 256  # between two exchanges of load
BUNDLE_STEPS: Final = 32

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What the tokens of one layer cost; sums, not means, so that costs of parts can be added."""

    tokens: float
    pairs: float
    remote_copies: float  # rows to hosts that are not the token's source, one way
    shard_copies: float  # rows to shards, the source host's own included, one way
    remote_shard_copies: float  # rows to shards of other hosts
    local_pairs: float
    remote_pairs: float
    load_S: NDArray[np.float64]  # pairs of each shard
    ingress_H: NDArray[np.float64]  # rows that reach each host from others
    egress_H: NDArray[np.float64]  # rows that leave each host

    @property
    def load_max_over_mean(self) -> float:
        """1 = perfectly even."""
        return float(self.load_S.max() / self.load_S.mean()) if self.pairs else 1.0

    @property
    def copies_per_token(self) -> float:
        """The headline for placement: remote hosts that a token's row is sent to."""
        return self.remote_copies / max(self.tokens, 1e-30)


def replicas_of(held_SE: NDArray[np.bool_]) -> NDArray[np.int16]:
    """`[E, R]` shards that hold each expert in ascending order, padded with -1."""
    count_E = held_SE.sum(0)
    table_ER = np.full((held_SE.shape[1], max(1, int(count_E.max()))), -1, np.int16)
    experts_C, shards_C = np.nonzero(held_SE.T)
    table_ER[experts_C, np.arange(len(experts_C)) - (np.cumsum(count_E) - count_E)[experts_C]] = (
        shards_C
    )
    return table_ER


def replay(
    expert_ids_TK: NDArray[np.integer],
    source_T: NDArray[np.integer],
    held_SE: NDArray[np.bool_],
    topology: Topology,
    *,
    policy: Literal["cover", "random"] = "cover",
    gain: int | None = None,
    step_tokens: int = STEP_TOKENS,
    seed: int = 0,
) -> LayerCost:
    """One layer's tokens through one placement; arguments as `choose_all`."""
    shard_TK = choose_all(
        expert_ids_TK, source_T, held_SE, topology, policy=policy, gain=gain,
        step_tokens=step_tokens, seed=seed,
    )  # fmt: skip
    return cost_of_choice(shard_TK, source_T, np.ones(len(expert_ids_TK)), topology)


def replay_bundles(
    bundles: LayerBundles, held_SE: NDArray[np.bool_], topology: Topology
) -> LayerCost:
    """The same of counted bundles, each as often as its weight says; see `choose_bundles`."""
    shard_BK = choose_bundles(bundles, held_SE, topology)
    return cost_of_choice(shard_BK, bundles.source_B, bundles.weight_B, topology)


def cost_of_choice(
    shard_TK: NDArray[np.int32],
    source_T: NDArray[np.integer],
    weight_T: NDArray[np.float64],
    topology: Topology,
) -> LayerCost:
    """What tokens cost whose pairs go to `shard_TK` (`choose_all`), each `weight_T` times."""
    host_S = np.array(topology.host_of_S, np.int64)
    sums, load_S, ingress_H, egress_H = _account(
        shard_TK, np.asarray(source_T, np.int64), weight_T, host_S, topology.num_hosts
    )
    return LayerCost(
        tokens=float(weight_T.sum()),
        pairs=float(load_S.sum()),
        remote_copies=sums[0],
        shard_copies=sums[1],
        remote_shard_copies=sums[2],
        local_pairs=sums[3],
        remote_pairs=sums[4],
        load_S=load_S,
        ingress_H=ingress_H,
        egress_H=egress_H,
    )


def choose_all(
    expert_ids_TK: NDArray[np.integer],
    source_T: NDArray[np.integer],
    held_SE: NDArray[np.bool_],
    topology: Topology,
    *,
    policy: Literal["cover", "random"] = "cover",
    gain: int | None = None,
    step_tokens: int = STEP_TOKENS,
    seed: int = 0,
) -> NDArray[np.int32]:
    """The shard of each pair, `[T, K]`, -1 where there is no expert.

    Args:
        expert_ids_TK: logical experts; negative = none.
        source_T: host of each token, an index into `topology.hosts`; negative: no host of it.
        policy: "cover" is `choice.choose`; "random" any replica, evenly, by `seed`.
        gain: of the load prices, in 1 / GAIN_ONE; 0 switches them off, None: `choice.gain_for`.
        step_tokens: tokens between two exchanges of load.
    """
    if policy == "random":
        table_ER = replicas_of(held_SE)
        count_E = (table_ER >= 0).sum(1)
        drawn_TK = np.random.default_rng(seed).random(expert_ids_TK.shape)
        safe_TK = np.maximum(expert_ids_TK, 0)
        pick_TK = (drawn_TK * count_E[safe_TK]).astype(np.int64)
        return np.where(expert_ids_TK >= 0, table_ER[safe_TK, pick_TK], -1).astype(np.int32)
    gain = gain_for(topology.num_shards) if gain is None else gain
    load_T = np.full(len(expert_ids_TK), PAIR, np.int64)
    return _cover(expert_ids_TK, source_T, load_T, held_SE, topology, gain, step_tokens)


def choose_bundles(
    bundles: LayerBundles, held_SE: NDArray[np.bool_], topology: Topology
) -> NDArray[np.int32]:
    """The shard of each pair of counted bundles, `[B, K]`, as tokens like them go in long serving.

    A bundle is dispatched as one token, its load PAIR in the mean of all: prices are of shares of
    the load, and must not depend on what unit weights are in. Few bundles stand for as long a
    time as many, in which what other sources send is known but for a small part: load is
    exchanged BUNDLE_STEPS times at least.
    """
    num_bundles = len(bundles.weight_B)
    mean = bundles.num_tokens / max(num_bundles, 1) or 1.0
    load_B = np.rint(bundles.weight_B * (PAIR / mean)).astype(np.int64)
    step_tokens = max(1, min(STEP_TOKENS, num_bundles // BUNDLE_STEPS))
    gain = gain_for(topology.num_shards)
    return _cover(
        bundles.experts_BK, bundles.source_B, load_B, held_SE, topology, gain, step_tokens
    )


def _cover(
    expert_ids_TK: NDArray[np.integer],
    source_T: NDArray[np.integer],
    load_T: NDArray[np.int64],
    held_SE: NDArray[np.bool_],
    topology: Topology,
    gain: int,
    step_tokens: int,
) -> NDArray[np.int32]:
    """`choose_all` of the priced set cover; `load_T` in 1 / PAIR pairs for each of a token's."""
    ids_TK = np.ascontiguousarray(expert_ids_TK, np.int64)
    top_k = ids_TK.shape[1]
    assert top_k <= TOP_K_MAX, f"top-k {top_k}, at most {TOP_K_MAX}"
    shard_TK = np.full(ids_TK.shape, -1, np.int32)
    missing = _choose_steps(
        ids_TK, np.asarray(source_T, np.int64), load_T, replicas_of(held_SE),
        np.array(topology.host_of_S, np.int32), topology.num_hosts, gain, step_tokens, shard_TK,
    )  # fmt: skip
    assert missing < 0, f"expert {missing} has no replica"
    return shard_TK


@_jit
def _choose_steps(ids_TK, source_T, load_T, table_ER, host_S, num_hosts, gain, step_tokens, shard_TK):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """`choose_token` over all tokens; see `replay` for what a source knows of the load."""
    num_tokens, top_k = ids_TK.shape
    num_shards = host_S.shape[0]
    usable_S = np.ones(num_shards, np.uint8)
    load_S = np.zeros(num_shards, np.int64)
    price_S = np.empty(num_shards, np.int64)
    price_XS = np.empty((num_hosts + 1, num_shards), np.int64)
    cover_S = np.zeros(num_shards, np.int32)
    cover_H = np.zeros(num_hosts, np.int32)
    opened_H = np.zeros(num_hosts, np.uint8)
    candidates = np.empty(num_shards, np.int32)
    opened = np.empty(TOP_K_MAX, np.int32)
    call_TK = np.empty((step_tokens, top_k), np.int32)
    of_N = np.empty(step_tokens, np.int64)  # tokens of one source, and what is theirs
    some_ids_NK = np.empty((step_tokens, top_k), np.int64)
    some_calls_NK = np.empty((step_tokens, top_k), np.int32)
    some_shards_NK = np.empty((step_tokens, top_k), np.int32)
    for first in range(0, num_tokens, step_tokens):
        end = min(first + step_tokens, num_tokens)
        pair_price = begin_prices(load_S, end - first, gain, price_S)
        for x in range(num_hosts + 1):
            price_XS[x] = price_S
            discount_local(host_S, x, gain, price_XS[x])
        decay(load_S, end - first)
        call_TK[:] = PENDING
        for t in range(first, end):
            call_K = call_TK[t - first]
            source = source_T[t]
            known = source if source >= 0 else num_hosts
            missing = choose_token(
                ids_TK[t], call_K, table_ER, host_S, source, usable_S, price_XS[known],
                pair_price * load_T[t] // PAIR,
                cover_S, cover_H, opened_H, candidates, opened, shard_TK[t],
            )  # fmt: skip
            if missing >= 0:
                return missing
        for x in range(num_hosts if num_hosts < num_shards else 0):
            count = 0
            for t in range(first, end):
                if source_T[t] == x:
                    of_N[count] = t
                    some_ids_NK[count] = ids_TK[t]
                    some_calls_NK[count] = call_TK[t - first]
                    some_shards_NK[count] = shard_TK[t]
                    count += 1
            level_own_host(
                some_ids_NK, count, table_ER, host_S, x, usable_S, load_S, PENDING, some_calls_NK,
                some_shards_NK,
            )  # fmt: skip
            for n in range(count):
                shard_TK[of_N[n]] = some_shards_NK[n]
        for t in range(first, end):
            for k in range(top_k):
                if call_TK[t - first, k] == PENDING:
                    load_S[shard_TK[t, k]] += load_T[t]
    return -1


@_jit
def _account(shard_TK, source_T, weight_T, host_S, num_hosts):  # type: ignore[no-untyped-def]
    """(remote copies, shard copies, remote shard copies, local pairs, remote pairs), load,
    ingress and egress."""
    sums = np.zeros(5)
    num_shards = host_S.shape[0]
    load_S = np.zeros(num_shards)
    ingress_H = np.zeros(num_hosts)
    egress_H = np.zeros(num_hosts)
    seen_S = np.full(num_shards, -1, np.int64)
    seen_H = np.full(num_hosts, -1, np.int64)
    for t in range(shard_TK.shape[0]):
        source = source_T[t]
        for k in range(shard_TK.shape[1]):
            s = shard_TK[t, k]
            if s < 0:
                continue
            h = host_S[s]
            load_S[s] += weight_T[t]
            sums[3 if h == source else 4] += weight_T[t]
            if seen_S[s] != t:
                seen_S[s] = t
                sums[1] += weight_T[t]
                if h != source:
                    sums[2] += weight_T[t]
            if seen_H[h] != t and h != source:
                seen_H[h] = t
                sums[0] += weight_T[t]
                ingress_H[h] += weight_T[t]
                if source >= 0:
                    egress_H[source] += weight_T[t]
    return sums, load_S, ingress_H, egress_H
