"""Which shard holds second copies of which experts, in case those that serve them die. Pure.

A second copy takes memory of a host and is asked nothing (`actors/expert_state.py`). What it is for
is an expert whose replicas go all at once: with their process where there is one, with their host
where there are more.
"""

from collections.abc import Mapping
from typing import Final

from remora.cluster.operation import Held, Pair
from remora.cluster.placement_steps import pairs_of

Copies = Mapping[str, frozenset[Pair]]  # shard -> second copies

_ONE_PROCESS: Final = 0  # an expert's replicas, by what they are lost with
_ONE_HOST: Final = 1
_SEVERAL: Final = 2


def plan_copies(
    held: Held,
    layers: tuple[int, ...],
    hosts: Mapping[str, str],
    *,
    num_copies: int,
    now: Copies,
    heat: Mapping[Pair, float],
) -> dict[str, tuple[Pair, ...]]:
    """What each shard is to hold second copies of, most wanted first.

    Experts with one replica come before those whose replicas share a host; those with replicas on
    several hosts get none. Among equals the hottest come first. A copy goes to a shard without a
    replica, on a host without one where there is any (always for the second kind), to where it is
    already, to the shard with the fewest.

    Args:
        held: of shards that live and serve.
        layers: decoder layers of the MoE layers.
        hosts: of shards; any that is missing counts as a host of its own.
        num_copies: that a shard has room for in each layer.
        now: what there is.
        heat: pairs of tokens of late, by expert; none: cold.

    Returns:
        An entry for every shard, empty where it is to hold none.
    """
    host_of = {uid: hosts.get(uid, uid) for uid in held}
    holders: dict[Pair, list[str]] = {}
    for uid in sorted(held):
        for pair in pairs_of(held[uid], layers):
            holders.setdefault(pair, []).append(uid)
    kind = {pair: _kind(uids, host_of) for pair, uids in holders.items()}
    wanted = [pair for pair in holders if kind[pair] != _SEVERAL]
    wanted.sort(key=lambda pair: (kind[pair], -heat.get(pair, 0.0), pair))
    planned: dict[str, list[Pair]] = {uid: [] for uid in sorted(held)}
    used: dict[tuple[str, int], int] = {}
    for pair in wanted:
        layer, there = pair[0], {host_of[uid] for uid in holders[pair]}
        able = [
            uid
            for uid in planned
            if uid not in holders[pair]
            and used.get((uid, layer), 0) < num_copies
            and (kind[pair] == _ONE_PROCESS or host_of[uid] not in there)
        ]
        if not able:
            continue
        uid = min(
            able,
            key=lambda u: (
                host_of[u] in there, pair not in now.get(u, ()), used.get((u, layer), 0), u
            ),
        )  # fmt: skip
        planned[uid].append(pair)
        used[uid, layer] = used.get((uid, layer), 0) + 1
    return {uid: tuple(pairs) for uid, pairs in planned.items()}


def _kind(uids: list[str], host_of: Mapping[str, str]) -> int:
    if len(uids) == 1:
        return _ONE_PROCESS
    return _ONE_HOST if len({host_of[uid] for uid in uids}) == 1 else _SEVERAL


def taken_over(slots: Held, lost: frozenset[str], copies: Copies, layers: tuple[int, ...]) -> Held:
    """What living shards serve when they take over what only `lost` ones held; empty: nothing has
    to be taken over, or not all of it can be.

    Args:
        slots: of the view.
        copies: second copies that there are.
    """
    living = {uid: held for uid, held in slots.items() if uid not in lost}
    served = {pair for held in living.values() for pair in pairs_of(held, layers)}
    alone = {pair for uid in lost & slots.keys() for pair in pairs_of(slots[uid], layers)} - served
    more: dict[str, set[Pair]] = {uid: set() for uid in living}
    for pair in sorted(alone):
        able = [uid for uid in living if pair in copies.get(uid, ())]
        if not able:
            return {}
        more[min(able, key=lambda uid: (len(more[uid]), uid))].add(pair)
    if not alone:
        return {}
    return {
        uid: tuple(
            (*experts, *sorted(e for n, e in more[uid] if n == layer))
            for layer, experts in zip(layers, held, strict=True)
        )
        for uid, held in living.items()
    }
