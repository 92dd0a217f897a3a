"""Shards that others took over from: where they come back to, and until when that is known. Pure.

`former` is a placement: of shards that are away what they held, of the others what they held before
they took over. It is empty where nobody is away.
"""

from collections.abc import Collection

from remora.cluster.operation import Drain, Held, Restore, ScaleTo, TakeOver, Target


def counts_shards(target: Target) -> bool:
    """Whether somebody says by it how many shards there are to be, those included that are away."""
    return isinstance(target, ScaleTo) and target.shards is not None and not target.gives_way


def former_after(target: Target, former: Held, before: Held, after: Held) -> Held:
    """`former` once an operation has committed a placement, or has found that it is so already.

    A shard comes back unless somebody counts shards, or names it. What else moves experts leaves it
    away, and the others come to hold for good what they then hold.

    Args:
        before: the placement that is no more; `after`: the one in its stead.
    """
    if isinstance(target, TakeOver):
        return former or dict(before)
    if counts_shards(target):
        return {}
    gone: Collection[str] = target.uids if isinstance(target, Drain) else ()
    former = {uid: held for uid, held in former.items() if uid not in gone}
    if not isinstance(target, Restore) and before != after:
        former |= after
    return {} if former.keys() <= after.keys() else former


def slots_with(back: Collection[str], slots: Held, former: Held, lost: Collection[str]) -> Held:
    """What shards hold once those of `back` are there again: these what they held, the others what
    they held before, and what they took over from somebody who stays away.

    Args:
        slots: of the view; `lost`: who of it is dead, and comes back only with `back`.
    """
    if not any(uid in former and uid not in slots for uid in back):
        return dict(slots)
    there = {uid: former.get(uid, held) for uid, held in slots.items()}
    there |= {uid: former[uid] for uid in back if uid in former}
    serving = [held for uid, held in there.items() if uid in back or uid not in lost]
    served = [frozenset().union(*layer) for layer in zip(*serving, strict=True)]
    return {
        uid: tuple(
            (*experts, *(e for e in had if e not in experts and e not in others))
            for experts, had, others in zip(own, slots.get(uid, own), served, strict=True)
        )
        for uid, own in there.items()
    }
