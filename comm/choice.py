"""Replica choice: which shard computes each (token, expert) pair. A set cover with load prices.

A token's row travels once to each shard that computes a pair of it, and once over the network to
each remote host. So a token opens shards one after the other, each time the one with the least

    cost of opening its host, shared by all pairs the host could still take   (0 on our own host
    + cost of opening the shard, shared by the pairs it could still take       or on one in use)
    + price of the shard's load

per pair (the greedy rule for weighted set cover, Chvatal 1979). Then a shard whose pairs the others
could take for less is closed again, and pairs go to the cheapest shard among those in use. Prices
rise with the pairs that a shard got, recently (`begin_prices`) and in this very dispatch: they
repair at the moment of dispatch what a placement planned from yesterday's traffic got wrong. Shards
of our own host are priced as if they had a little less load than they have (`LOCAL_SHARE`): a pair
there costs no row back. What stays on our own host is then levelled between its shards
(`own_host`): there a row is a copy in memory.
(docs/routing.md, Replica choice.)

Everything is integer arithmetic, so that the numba code here, its C++ twin (`csrc/choice.cpp`) and
the slow twin `choose_naive` agree to the last bit and the result is a function of the arguments.

Shape suffixes: T tokens, K top-k, E experts, R most replicas of one expert, S shards, H hosts.
"""

from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.limits import TOP_K_MAX
from remora.comm.own_host import LOAD_PRIOR, level_own_host, level_own_host_naive

PENDING: Final = -1  # a pair that no call has taken yet
SKIPPED: Final = -2  # a pair whose expert index was negative: it contributes nothing

UNIT: Final = 720720 * 64  # the price of one copy to a remote host; divides by 1 .. 16
OPEN_SHARD: Final = UNIT // 8  # a row to one more shard of a host that gets it anyway
GAIN_ONE: Final = 16
LOCAL_SHARE: Final = 64  # shards of our own host: cheaper by the price of 1/64 of the mean load
PAIR: Final = 64  # load of one pair: decay needs fractions
DECAY_SHIFT: Final = 13  # load is forgotten over 2 ** 13 tokens
PRIOR: Final = LOAD_PRIOR  # load per shard that counts as none: no price on the first few pairs

HOST_SHARE_N: Final = np.array([0] + [UNIT // n for n in range(1, TOP_K_MAX + 1)], np.int64)
SHARD_SHARE_N: Final = np.array([0] + [OPEN_SHARD // n for n in range(1, TOP_K_MAX + 1)], np.int64)

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


def gain_for(num_shards: int) -> int:
    """Gain of the load prices, in 1 / GAIN_ONE.

    With 4 a shard that is a quarter over the mean load costs one copy a pair more. Among more than
    32 shards a token's pairs are spread thinner and rows to another shard of the same host are
    cheap, so that load needs an eighth of their number to come out as even.
    """
    return GAIN_ONE * max(4, num_shards // 8)


@_jit
def _count(bits):  # type: ignore[no-untyped-def]
    n = 0
    while bits:
        bits &= bits - 1
        n += 1
    return n


@_jit
def begin_prices(load_S, num_tokens, gain, price_S):  # type: ignore[no-untyped-def]
    """Sets the prices of a dispatch of `num_tokens` by the load so far.

    Args:
        load_S: int64 load in 1 / PAIR pairs.
        gain: in 1 / GAIN_ONE; 0 for no prices.
        price_S: int64 in UNIT, written.

    Returns:
        By how much one pair raises its shard's price.
    """
    num_shards = load_S.shape[0]
    forget = min(num_tokens, 1 << DECAY_SHIFT)
    total = 0
    for s in range(num_shards):
        price_S[s] = load_S[s] - ((load_S[s] * forget) >> DECAY_SHIFT)
        total += price_S[s]
    slope = gain * UNIT * num_shards // (GAIN_ONE * (total + PRIOR * num_shards))
    mean = total // num_shards
    for s in range(num_shards):
        price_S[s] = (price_S[s] - mean) * slope
    return PAIR * slope


@_jit
def discount_local(host_S, own_host, gain, price_S):  # type: ignore[no-untyped-def]
    """Lowers the prices of the shards of our own host, which `begin_prices` has set."""
    for s in range(host_S.shape[0]):
        if host_S[s] == own_host:
            price_S[s] -= gain * UNIT // (GAIN_ONE * LOCAL_SHARE)


@_jit
def decay(load_S, num_tokens):  # type: ignore[no-untyped-def]
    """Forgets of `load_S` what `num_tokens` further tokens make old; as `begin_prices` priced."""
    forget = min(num_tokens, 1 << DECAY_SHIFT)
    for s in range(load_S.shape[0]):
        load_S[s] -= (load_S[s] * forget) >> DECAY_SHIFT


@_jit
def choose_token(expert_K, call_K, replicas_ER, host_S, own_host, usable_S, price_S, pair_price, cover_S, cover_H, opened_H, candidates, opened, shard_K):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Sets `shard_K` for the PENDING pairs of one token and raises `price_S` by its pairs.

    Args:
        price_S: int64, in UNIT; `pair_price` is added for each pair.
        cover_S, cover_H, opened_H: zeroed scratch, zero again afterwards (int32, int32, uint8).
        candidates, opened: int32 scratch of S and TOP_K_MAX.

    Returns:
        -1, or the first expert that no usable shard holds (also one out of range).
    """
    top_k = expert_K.shape[0]
    num_experts, num_replicas = replicas_ER.shape
    num_candidates = 0
    remaining = 0
    missing = -1
    for k in range(top_k):
        if call_K[k] != PENDING:
            continue
        e = expert_K[k]
        if e < 0:
            call_K[k] = SKIPPED
            continue
        covered = False
        if e < num_experts:
            for r in range(num_replicas):
                s = replicas_ER[e, r]
                if s < 0:
                    break
                if usable_S[s]:
                    covered = True
                    if cover_S[s] == 0:
                        candidates[num_candidates] = s
                        num_candidates += 1
                    cover_S[s] |= 1 << k
                    cover_H[host_S[s]] |= 1 << k
        if not covered:
            missing = e
            break
        remaining |= 1 << k
    if missing < 0:
        num_opened = 0
        num_left = num_candidates  # those that can take a remaining pair come first
        while remaining:
            best = -1
            best_score = 0
            c = 0
            while c < num_left:
                s = candidates[c]
                n = _count(cover_S[s] & remaining)
                if n == 0:
                    num_left -= 1
                    candidates[c], candidates[num_left] = candidates[num_left], s
                    continue
                c += 1
                h = host_S[s]
                score = price_S[s] + SHARD_SHARE_N[n]
                if h != own_host and not opened_H[h]:
                    score += HOST_SHARE_N[_count(cover_H[h] & remaining)]
                if best < 0 or score < best_score or (score == best_score and s < best):
                    best, best_score = s, score
            taken = cover_S[best] & remaining
            for k in range(top_k):
                if taken & (1 << k):
                    shard_K[k] = best
            price_S[best] += pair_price * _count(taken)
            remaining &= ~taken
            opened[num_opened] = best
            num_opened += 1
            opened_H[host_S[best]] += 1
        if num_opened > 1 and _twice(num_opened, opened, cover_S):
            _close(num_opened, opened, host_S, own_host, price_S, pair_price, cover_S, opened_H, shard_K)  # fmt: skip  # noqa: E501
            _level(num_opened, opened, price_S, pair_price, cover_S, shard_K)
    for c in range(num_candidates):
        cover_S[candidates[c]] = 0
        cover_H[host_S[candidates[c]]] = 0
        opened_H[host_S[candidates[c]]] = 0
    return missing


@_jit
def _cheapest(k, without, num_opened, opened, price_S, cover_S):  # type: ignore[no-untyped-def]
    """The opened shard with the least price that could take pair `k`, not `without`; or -1."""
    best = -1
    for i in range(num_opened):
        s = opened[i]
        if s < 0 or s == without or not (cover_S[s] >> k) & 1:
            continue
        if best < 0 or price_S[s] < price_S[best] or (price_S[s] == price_S[best] and s < best):
            best = s
    return best


@_jit
def _twice(num_opened, opened, cover_S):  # type: ignore[no-untyped-def]
    """Pairs that two opened shards could take, or more: `_close` and `_level` change no others."""
    once = 0
    again = 0
    for i in range(num_opened):
        if opened[i] >= 0:
            again |= once & cover_S[opened[i]]
            once |= cover_S[opened[i]]
    return again


@_jit
def _close(num_opened, opened, host_S, own_host, price_S, pair_price, cover_S, opened_H, shard_K):  # type: ignore[no-untyped-def]  # fmt: skip
    """Closes opened shards, in the order of opening, whose pairs the others take for less."""
    movable = _twice(num_opened, opened, cover_S)
    for i in range(num_opened):
        s = opened[i]
        h = host_S[s]
        taken = 0
        for k in range(shard_K.shape[0]):
            if (cover_S[s] >> k) & 1 and shard_K[k] == s:
                taken |= 1 << k
        if taken & ~movable:
            continue
        saved = OPEN_SHARD
        if h != own_host and opened_H[h] == 1:
            saved += UNIT
        for k in range(shard_K.shape[0]):
            if (taken >> k) & 1:
                saved += price_S[s] - price_S[_cheapest(k, s, num_opened, opened, price_S, cover_S)]
        if saved <= 0:
            continue
        for k in range(shard_K.shape[0]):
            if (taken >> k) & 1:
                other = _cheapest(k, s, num_opened, opened, price_S, cover_S)
                shard_K[k] = other
                price_S[other] += pair_price
                price_S[s] -= pair_price
        opened[i] = -1
        opened_H[h] -= 1
        movable = _twice(num_opened, opened, cover_S)


@_jit
def _level(num_opened, opened, price_S, pair_price, cover_S, shard_K):  # type: ignore[no-untyped-def]  # fmt: skip
    """Pairs go to the cheapest opened shard that could take them: no row travels for it."""
    movable = _twice(num_opened, opened, cover_S)
    for k in range(shard_K.shape[0]):
        if not (movable >> k) & 1:
            continue
        s = shard_K[k]
        other = _cheapest(k, s, num_opened, opened, price_S, cover_S)
        if other >= 0 and price_S[other] + pair_price < price_S[s]:
            shard_K[k] = other
            price_S[other] += pair_price
            price_S[s] -= pair_price


@_jit
def choose(index_TK, num_tokens, replicas_ER, host_S, own_host, usable_S, load_S, gain, shard_TK, call_TK):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Sets `shard_TK` for every PENDING pair of the first `num_tokens` tokens.

    Args:
        index_TK: int64 logical experts; negative = SKIPPED.
        replicas_ER: int16 shards that hold each expert, padded with -1.
        host_S: int32 host of each shard, `own_host` is ours (-1: no shard is on it).
        usable_S: uint8: connected and not suspected.
        load_S: int64 recent load of this layer (see `begin_prices`); decayed and raised by the
            pairs chosen where there was something to choose (R > 1) and nothing is missing.
        gain: see `begin_prices`.
        shard_TK, call_TK: int32, written and read.

    Returns:
        -1, or the first expert that no usable shard holds (also one out of range).
    """
    num_shards = host_S.shape[0]
    price_S = np.empty(num_shards, np.int64)
    pair_price = begin_prices(load_S, num_tokens, gain, price_S)
    discount_local(host_S, own_host, gain, price_S)
    num_hosts = 0
    for s in range(num_shards):
        num_hosts = max(num_hosts, host_S[s] + 1)
    cover_S = np.zeros(num_shards, np.int32)
    cover_H = np.zeros(num_hosts, np.int32)
    opened_H = np.zeros(num_hosts, np.uint8)
    candidates = np.empty(num_shards, np.int32)
    opened = np.empty(TOP_K_MAX, np.int32)
    for t in range(num_tokens):
        missing = choose_token(
            index_TK[t], call_TK[t], replicas_ER, host_S, own_host, usable_S, price_S, pair_price,
            cover_S, cover_H, opened_H, candidates, opened, shard_TK[t],
        )  # fmt: skip
        if missing >= 0:
            return missing
    level_own_host(
        index_TK, num_tokens, replicas_ER, host_S, own_host, usable_S, load_S, PENDING, call_TK,
        shard_TK,
    )  # fmt: skip
    if replicas_ER.shape[1] > 1:
        decay(load_S, num_tokens)
        for t in range(num_tokens):
            for k in range(index_TK.shape[1]):
                if call_TK[t, k] == PENDING:
                    load_S[shard_TK[t, k]] += PAIR
    return -1


def warm() -> None:
    """Compiles `choose`."""
    none_T1, none32_T1 = np.zeros((0, 1), np.int64), np.zeros((0, 1), np.int32)
    host_S, usable_S, load_S = np.zeros(1, np.int32), np.zeros(1, np.uint8), np.zeros(1, np.int64)
    table_ER = np.zeros((1, 1), np.int16)
    choose(none_T1, 0, table_ER, host_S, 0, usable_S, load_S, GAIN_ONE, none32_T1, none32_T1)


def choose_naive(
    index_TK: NDArray[np.int64],
    holders: list[list[int]],
    hosts: list[int],
    own_host: int,
    load: list[int],
    gain: int,
) -> list[list[int]]:
    """Slow twin of `choose`: the shard of each pair, -1 for negative experts.

    Args:
        index_TK: logical experts.
        holders: usable shards per expert.
        hosts: host of each shard; `own_host` is ours.
        load: of each shard in 1 / PAIR pairs; changed as `load_S`.
    """
    load_before = list(load)
    forget = min(len(index_TK), 2**DECAY_SHIFT)
    load[:] = [x - x * forget // 2**DECAY_SHIFT for x in load]
    slope = gain * UNIT * len(load) // (GAIN_ONE * (sum(load) + PRIOR * len(load)))
    price = [(x - sum(load) // len(load)) * slope for x in load]
    local = gain * UNIT // (GAIN_ONE * LOCAL_SHARE)
    price = [p - local * (host == own_host) for p, host in zip(price, hosts, strict=True)]
    chosen: list[list[int]] = []
    for row in index_TK.tolist():
        pairs = {k: set(holders[e]) for k, e in enumerate(row) if e >= 0}
        of: dict[int, int] = {}  # pair -> shard
        opened: list[int] = []

        def give(k: int, shard: int, of: dict[int, int] = of) -> None:
            if k in of:
                price[of[k]] -= PAIR * slope
            of[k] = shard
            price[shard] += PAIR * slope

        def cost(s: int, left: dict[int, set[int]], opened: list[int] = opened) -> int:
            open_hosts = {own_host, *(hosts[o] for o in opened)}
            of_host = [k for k in left if any(hosts[r] == hosts[s] for r in left[k])]
            new_host = 0 if hosts[s] in open_hosts else UNIT // len(of_host)
            return price[s] + OPEN_SHARD // sum(s in left[k] for k in left) + new_host

        while left := {k: holds for k, holds in pairs.items() if k not in of}:
            best = min(set().union(*left.values()), key=lambda s: (cost(s, left), s))
            opened.append(best)
            for k in left:
                if best in left[k]:
                    give(k, best)
        for shard in list(opened):
            rest = [s for s in opened if s != shard]
            mine = [k for k in pairs if of[k] == shard]
            others = [[s for s in rest if s in pairs[k]] for k in mine]
            if not all(others):
                continue
            lone = hosts[shard] not in {own_host, *(hosts[s] for s in rest)}
            dearer = sum(min(price[s] for s in able) - price[shard] for able in others)
            if OPEN_SHARD + UNIT * lone > dearer:
                for k, able in zip(mine, others, strict=True):
                    give(k, min(able, key=lambda s: (price[s], s)))
                opened.remove(shard)
        for k in pairs:
            able = [s for s in opened if s in pairs[k] and s != of[k]]
            best = min(able, key=lambda s: (price[s], s), default=of[k])
            if able and price[best] + PAIR * slope < price[of[k]]:
                give(k, best)
        chosen.append([of.get(k, -1) for k in range(len(row))])
    level_own_host_naive(index_TK.tolist(), chosen, holders, hosts, own_host, load_before)
    for shard in (s for shards in chosen for s in shards if s >= 0):
        load[shard] += PAIR
    return chosen
