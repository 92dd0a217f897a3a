"""What an operation comes to: who joins, who retires, who holds what in the end. Pure."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from remora.cluster.former_places import counts_shards, slots_with
from remora.cluster.operation import (
    Drain,
    Held,
    PlaceAs,
    Restore,
    ScaleTo,
    TakeOver,
    Target,
    is_dense,
)
from remora.cluster.placement_steps import Room, pairs_of, spread
from remora.cluster.second_copies import Copies, taken_over
from remora.comm.errors import ConfigError
from remora.comm.view import View

SHARDS_MAX = 4096
DENSE_MAX = 1024


PROCESS_BYTES = 400 << 20  # of a shard without its slots (measured: 320 MiB are its own, and Ray's)


class FreeMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What hosts have left for shards that join."""

    slot_bytes: int  # one slot of every MoE layer
    by_host: Mapping[str, int]  # bytes; of the hosts of shards
    copies: Mapping[str, int] = {}  # bytes of second copies, which can be given up, by host
    others: int = 0  # hosts of which nothing is known, and on which shards may start


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan starts from."""

    view: View
    room: Room  # of the shards of the view
    lost: frozenset[str]  # members of the view that are not alive
    incarnations: Mapping[str, int]  # the last life of every uid there ever was
    replicas: int  # of an expert, where slots allow
    slots_of_joiners: int  # of a layer; at least
    memory: FreeMemory | None = None  # None: nothing is known
    former: Held = {}  # before living shards took over from dead ones
    copies: Copies = {}  # second copies of living shards


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """Where an operation leads."""

    slots: Held
    joiners: dict[str, int]
    retirees: tuple[str, ...]


def plan_target(target: Target, now: Situation) -> Planned:
    """The end of an operation.

    Raises:
        ConfigError: no such shards, not enough slots, or a placement that does not fit.
    """
    match target:
        case PlaceAs(slots):
            _check_place(slots, now)
            return Planned(slots=slots, joiners={}, retirees=())
        case Restore(uids):
            joiners = {uid: now.incarnations[uid] + 1 for uid in uids}
            slots = slots_with(uids, now.view.placement.slots, now.former, now.lost)
            return Planned(slots=slots, joiners=joiners, retirees=())
        case TakeOver(uids):
            slots, layers = now.view.placement.slots, now.view.placement.moe_layers
            taken = taken_over(slots, frozenset(uids), now.copies, layers)
            if not taken:
                raise ConfigError(f"there are no second copies of what {', '.join(uids)} served")
            return Planned(slots=dict(taken), joiners={}, retirees=uids)
        case Drain():
            return _drain(target, now)
        case ScaleTo():
            return _scale(target, now)


def _scale(target: ScaleTo, now: Situation) -> Planned:
    if target.shards is None and target.dense_groups is None:
        raise ConfigError("scale what? a number of shards or of dense groups is needed")
    if counts_shards(target):  # nobody is away any more
        now = msgspec.structs.replace(now, former={})
    dense = [m.uid for m in now.view.members if m.role == "dense"]
    retire = {
        kind: tuple(uid for uid in target.retire if is_dense(uid) == (kind == "dense groups"))
        for kind in ("shards", "dense groups")
    }
    for kind, count in (("shards", target.shards), ("dense groups", target.dense_groups)):
        if retire[kind] and count is None:
            raise ConfigError(f"{', '.join(retire[kind])}: say how many {kind} there are to be")
    leaving, num_joiners = _choose(
        "shards", target.shards, retire["shards"], list(now.view.placement.slots), SHARDS_MAX, now
    )
    planned = _scaled(now, leaving, num_joiners)
    groups, num_groups = _choose(
        "dense groups", target.dense_groups, retire["dense groups"], dense, DENSE_MAX, now
    )
    return _with_groups(planned, groups, num_groups, now)


def _drain(target: Drain, now: Situation) -> Planned:
    unknown = sorted(set(target.uids) - now.incarnations.keys())
    if unknown:
        there = ", ".join(sorted(m.uid for m in now.view.members))
        raise ConfigError(f"no such members: {', '.join(unknown)}; there are {there}")
    dense = [m.uid for m in now.view.members if m.role == "dense"]
    uids = dict.fromkeys(target.uids)  # each once
    served = now.view.placement.slots
    shards = [uid for uid in uids if uid in served]
    if served.keys() <= uids.keys() and target.joiners == "none":
        raise ConfigError(
            f"no shard would be left without {', '.join(shards)}: have another one first (scale to"
            f" {len(served) + 1} shards)"
        )
    groups = [uid for uid in uids if uid in dense]
    is_last = bool(groups) and not set(dense) - set(groups) - now.lost
    if is_last and target.joiners == "none":
        raise ConfigError(
            f"no dense group would be left without {', '.join(groups)}: have another one first"
            f" (scale to {len(dense) + 1} dense groups)"
        )
    planned = _drained(shards, target, now)
    return _with_groups(planned, groups, int(is_last), now)


def _drained(shards: list[str], target: Drain, now: Situation) -> Planned:
    """Of shards; with the smallest number of joiners that will do, where that is asked for. Those
    that died and stay are waited for only where experts have no slot without them."""
    most = 0 if target.joiners == "none" else len(shards)
    tries = [(again, number) for again in (False, True) for number in range(most + 1)]
    for again, num_joiners in tries[:-1]:
        try:
            return _scaled(now, shards, num_joiners, again=again)
        except ConfigError:  # experts without a slot
            continue
    return _scaled(now, shards, most)


def _with_groups(
    planned: Planned, retirees: Sequence[str], num_joiners: int, now: Situation
) -> Planned:
    """Dense groups retire and join, too."""
    dense = [m.uid for m in now.view.members if m.role == "dense"]
    names = itertools.islice(_free_uids("dense", DENSE_MAX, dense), num_joiners)
    return Planned(
        slots=planned.slots,
        joiners=planned.joiners | {uid: now.incarnations.get(uid, 0) + 1 for uid in names},
        retirees=(*planned.retirees, *retirees),
    )


def held_by_living(now: Situation) -> Held:
    """What living shards of the view hold."""
    slots = now.view.placement.slots
    return {uid: layers for uid, layers in slots.items() if uid not in now.lost}


def replicas_alive(now: Situation) -> dict[str, int]:
    """How many experts, over all layers, no living shard holds, one does, several do."""
    placement = now.view.placement
    held = held_by_living(now).values()
    pairs = Counter(pair for layers in held for pair in pairs_of(layers, placement.moe_layers))
    one = sum(count == 1 for count in pairs.values())
    none = len(placement.moe_layers) * placement.num_experts - len(pairs)
    return {"none": none, "one": one, "several": len(pairs) - one}


def _choose(
    kind: str, count: int | None, retire: tuple[str, ...], uids: list[str], most: int,
    now: Situation,
) -> tuple[list[str], int]:  # fmt: skip
    """Who of `uids` retires so that there are `count`, and how many join."""
    if count is None:
        return [], 0
    uids = sorted(uids, key=by_number)
    if not 1 <= count <= most:
        raise ConfigError(f"{count} {kind}: allowed is 1 to {most}")
    unknown = sorted(set(retire) - set(uids))
    if unknown and len(uids) != count:  # else it was done before: the target is absolute
        raise ConfigError(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(uids)}")
    retirees = [uid for uid in uids if uid in retire]
    staying = [uid for uid in uids if uid not in retire]
    while len(staying) > count:
        dead = [uid for uid in staying if uid in now.lost]
        retirees.append((dead or staying)[-1])
        staying.remove(retirees[-1])
    return retirees, count - len(staying)


def _scaled(
    now: Situation, retirees: list[str], num_joiners: int, *, again: bool = True
) -> Planned:
    """`again`: shards that died and stay join in a new life; else they are left as they are."""
    slots, placement = now.view.placement.slots, now.view.placement
    if not retirees and not num_joiners:
        return Planned(slots=dict(slots), joiners={}, retirees=())
    staying = [uid for uid in slots if uid not in retirees]
    dead = [uid for uid in staying if uid in now.lost]
    used = {*slots, *now.former}  # a shard that is away comes back by its name
    names = [*itertools.islice(_free_uids("shard", SHARDS_MAX, used), num_joiners)]
    names = [*dead, *names] if again else names
    joiners = {uid: now.incarnations.get(uid, 0) + 1 for uid in names}
    _check_memory(len(names), now)
    num_layers = len(placement.moe_layers)
    room = {uid: now.room[uid] for uid in staying if uid not in dead}
    room |= dict.fromkeys(joiners, (joiner_slots(now),) * num_layers)
    hosts = {m.uid: m.endpoint.host for m in now.view.members if m.role == "shard"}
    held = {uid: experts for uid, experts in held_by_living(now).items() if uid in staying}
    spread_slots = spread(
        held, room, hosts, num_experts=placement.num_experts, replicas=now.replicas
    )
    left = {} if again else {uid: slots[uid] for uid in dead}
    return Planned(slots=left | dict(spread_slots), joiners=joiners, retirees=tuple(retirees))


def same_slots(one: Held, other: Held) -> bool:
    """Whether two placements are the same, whatever the order in which experts are named."""
    return one.keys() == other.keys() and all(
        set(a) == set(b) for uid in one for a, b in zip(one[uid], other[uid], strict=True)
    )


def joiner_slots(now: Situation) -> int:
    """Slots of a layer that a shard gets which joins: as many as any shard has."""
    return max([now.slots_of_joiners, *(slots for room in now.room.values() for slots in room)])


def must_give_up_copies(num_joiners: int, now: Situation) -> bool:
    """Whether shards that join need the memory of second copies."""
    memory = now.memory
    if memory is None or not any(memory.copies.values()):
        return False
    each = joiner_slots(now) * memory.slot_bytes + PROCESS_BYTES
    return sum(free // each for free in memory.by_host.values()) < num_joiners


def _check_memory(num_joiners: int, now: Situation) -> None:
    """Raises ConfigError where known hosts have no room for all who join, not even instead of
    second copies."""
    memory = now.memory
    if memory is None or memory.others or not num_joiners:
        return
    slots = joiner_slots(now)
    each = slots * memory.slot_bytes + PROCESS_BYTES
    by_host = {host: free + memory.copies.get(host, 0) for host, free in memory.by_host.items()}
    if sum(free // each for free in by_host.values()) < num_joiners:
        free = ", ".join(f"{host[:12]}: {free:,}" for host, free in by_host.items())
        raise ConfigError(
            f"no memory for {num_joiners} more shards: each takes {each:,} bytes ({slots} slots of"
            f" {memory.slot_bytes:,} over all layers, {PROCESS_BYTES:,} for the process), free are"
            f" {free}: add hosts, or have fewer experts.slots"
        )


def _free_uids(role: str, most: int, used: Collection[str]) -> Iterator[str]:
    return (f"{role}-{i}" for i in range(2 * most) if f"{role}-{i}" not in used)


def by_number(uid: str) -> tuple[int, str]:
    """Order of uids: shard-2 before shard-10."""
    number = uid.rpartition("-")[2]
    return (int(number) if number.isdecimal() else 0, uid)


def _check_place(slots: Held, now: Situation) -> None:
    placement = msgspec.structs.replace(now.view.placement, slots=slots)
    if slots.keys() != now.view.placement.slots.keys():
        raise ConfigError(
            f"the placement is of {', '.join(sorted(slots))}, the deployment has"
            f" {', '.join(sorted(now.view.placement.slots))}"
        )
    dead = sorted(set(slots) & now.lost)
    if dead:
        raise ConfigError(f"{', '.join(dead)} died: restored, scaled or drained first")
    for uid, layers in slots.items():
        if len(layers) != len(placement.moe_layers):
            raise ConfigError(f"{uid}: {len(layers)} layers, not {len(placement.moe_layers)}")
        for layer, experts, room in zip(placement.moe_layers, layers, now.room[uid], strict=True):
            if len(experts) > room:
                raise ConfigError(f"{uid} layer {layer}: {len(experts)} experts in {room} slots")
    try:
        placement.check()
    except AssertionError as wrong:
        raise ConfigError(f"no placement: {wrong}") from None
