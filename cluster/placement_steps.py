"""Placements for other numbers of shards, and the way from one placement to another. Pure.

Slots are written as in `comm.view.Placement.slots`: uid -> for each MoE layer the experts held.
`room` is uid -> slots of each MoE layer.
"""

from collections.abc import Mapping
from typing import Final

from remora.comm.errors import ConfigError

Layers = tuple[tuple[int, ...], ...]  # of one shard
Slots = Mapping[str, Layers]
Room = Mapping[str, tuple[int, ...]]

ROUNDS_MAX: Final = 64  # of one operation
LENT_MAX: Final = 4  # slots of a shard in a layer that replicas give to others for a while


def spread(
    slots: Slots, room: Room, hosts: Mapping[str, str], *, num_experts: int, replicas: int
) -> Slots:
    """A placement on the shards of `room` that moves few experts.

    What a shard holds stays there as far as even loads allow. Experts that only shards outside of
    `room` hold go where there is least; then the fullest give to the emptiest; then experts with
    fewer than `replicas` replicas get more, on other hosts first, where slots are left.

    Args:
        hosts: of shards whose host is known; any other counts as a host of its own.

    Raises:
        ConfigError: fewer slots than experts in some layer.
    """
    if not room:
        raise ConfigError("a placement needs at least one shard")
    host_of = {uid: hosts.get(uid, uid) for uid in room}
    num_layers = len(next(iter(room.values())))
    layers = []
    for index in range(num_layers):
        held = {
            # shards that took over from dead ones hold more than they have room for
            uid: list(slots[uid][index][: room[uid][index]]) if uid in slots else []
            for uid in sorted(room)
        }
        layer = _Layer(held, {uid: room[uid][index] for uid in room}, host_of)
        if sum(layer.room.values()) < num_experts:
            raise ConfigError(
                f"{len(room)} shards have {sum(layer.room.values())} slots in MoE layer number"
                f" {index} for {num_experts} experts: keep more shards, or start with more slots"
            )
        layer.cover(num_experts)
        layer.level()
        layer.replicate(num_experts, replicas)
        layers.append(layer.held)
    return {uid: tuple(tuple(held[uid]) for held in layers) for uid in sorted(room)}


class _Layer:
    """One MoE layer while it is spread."""

    def __init__(
        self, held: dict[str, list[int]], room: Mapping[str, int], host_of: Mapping[str, str]
    ) -> None:
        self.held, self.room, self._host_of = held, room, host_of

    def cover(self, num_experts: int) -> None:
        """Every expert somewhere; where all is full a second replica gives its slot."""
        for expert in range(num_experts):
            if self._holders(expert):
                continue
            if not self._with_room():
                self._give_up_a_replica()
            self._emptiest(self._with_room()).append(expert)

    def level(self) -> None:
        """The fullest give to the emptiest until they differ by one at most."""
        while True:
            takers = self._with_room()
            if not takers:
                return
            to = self._emptiest(takers)
            fullest = max(sorted(self.held), key=lambda uid: len(self.held[uid]))
            if len(self.held[fullest]) - len(to) <= 1:
                return
            to_uid = next(uid for uid in self.held if self.held[uid] is to)
            movable = [e for e in self.held[fullest] if e not in to]
            host = self._host_of[to_uid]
            expert = max(movable, key=lambda e: (not self._is_on(e, host, fullest), e))
            self.held[fullest].remove(expert)
            to.append(expert)

    def replicate(self, num_experts: int, replicas: int) -> None:
        """More replicas where slots are left, one after the other for every expert."""
        for count in range(1, replicas):
            for expert in range(num_experts):
                holders = self._holders(expert)
                takers = [uid for uid in self._with_room() if uid not in holders]
                if len(holders) > count or not takers:
                    continue
                hosts = {self._host_of[uid] for uid in holders}
                elsewhere = [uid for uid in takers if self._host_of[uid] not in hosts]
                self._emptiest(elsewhere or takers).append(expert)

    def _holders(self, expert: int) -> list[str]:
        return [uid for uid, experts in self.held.items() if expert in experts]

    def _with_room(self) -> list[str]:
        return [uid for uid in self.held if len(self.held[uid]) < self.room[uid]]

    def _emptiest(self, uids: list[str]) -> list[int]:
        return self.held[min(uids, key=lambda uid: (len(self.held[uid]), uid))]

    def _is_on(self, expert: int, host: str, besides: str) -> bool:
        return any(self._host_of[u] == host for u in self._holders(expert) if u != besides)

    def _give_up_a_replica(self) -> None:
        for uid in sorted(self.held, key=lambda uid: (-len(self.held[uid]), uid)):
            for expert in reversed(self.held[uid]):
                if len(self._holders(expert)) > 1:
                    self.held[uid].remove(expert)
                    return
        raise AssertionError(f"no room and no replica to give up: {self.held} in {self.room}")


def rounds(held: Slots, target: Slots, room: Room) -> list[Slots]:
    """What shards hold after each commit on the way from `held` to `target`; the last is `target`.

    In a round a shard takes what it lacks into slots that are free, and lets go, once nobody asks
    it any more, of what it is not to hold and what is where it is to be. So full shards first drop
    replicas, and then take. Where that frees no slot, replicas that are to stay give theirs for a
    while, and are copied again at the end.

    Args:
        held: of living shards; those that are not in `target` are to hold nothing.
        room: of every shard of `target`.

    Raises:
        ConfigError: there is no such way: full shards without replicas, or too long a one.
    """
    num_layers = len(next(iter(target.values())))
    uids = sorted({*held, *target})
    empty: Layers = ((),) * num_layers
    now = {uid: held.get(uid, empty) for uid in uids}
    aim = {uid: target.get(uid, empty) for uid in uids}
    found: list[Slots] = []
    while any(set(now[u][i]) != set(aim[u][i]) for u in uids for i in range(num_layers)):
        layers = [
            _layer_round(
                {uid: now[uid][index] for uid in uids},
                {uid: aim[uid][index] for uid in uids},
                {uid: room[uid][index] if uid in target else 0 for uid in uids},
            )
            for index in range(num_layers)
        ]
        if len(found) == ROUNDS_MAX:
            raise ConfigError(f"over {ROUNDS_MAX} rounds of moves are needed: give more slots")
        now = {uid: tuple(layer[uid] for layer in layers) for uid in uids}
        found.append(now)
    return found


Experts = dict[str, tuple[int, ...]]  # of one layer, by shard


def _layer_round(now: Experts, aim: Experts, room: Mapping[str, int]) -> Experts:
    """One layer after one round; as it is where nothing is left to do."""
    out_of_place = {e for uid, held in now.items() for e in held if e not in aim[uid]}
    grown: Experts = {}
    for uid, held in now.items():
        wanted = [expert for expert in aim[uid] if expert not in held]
        wanted.sort(key=lambda expert: expert not in out_of_place)  # those free a slot elsewhere
        grown[uid] = (*held, *wanted[: max(0, room[uid] - len(held))])
    home = {e for uid, held in grown.items() for e in held if e in aim[uid]}
    after = {
        uid: tuple(e for e in held if e in aim[uid] or e not in home) for uid, held in grown.items()
    }
    if after != now or all(set(now[uid]) == set(aim[uid]) for uid in now):
        return after
    return _lend_slots(now, aim)


def _lend_slots(now: Experts, aim: Experts) -> Experts:
    """Full shards that wait for each other drop replicas, a few each.

    Raises:
        ConfigError: there are none.
    """
    count: dict[int, int] = {}
    for held in now.values():
        for expert in held:
            count[expert] = count.get(expert, 0) + 1
    after = dict(now)
    for uid, held in now.items():
        wanted = len(set(aim[uid]) - set(held))
        for expert in [e for e in reversed(held) if count[e] > 1][: min(wanted, LENT_MAX)]:
            if count[expert] > 1:
                count[expert] -= 1
                after[uid] = tuple(e for e in after[uid] if e != expert)
    if after == now:
        raise ConfigError(
            "no slot is free to begin with: where no expert has a replica, every move needs a spare"
            " slot in the shard that takes the expert (experts.slots above what is held)"
        )
    return after


def pairs_of(held: Layers, layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """(decoder layer, expert) of everything that one shard holds."""
    return [(n, expert) for n, experts in zip(layers, held, strict=True) for expert in experts]


def additions(
    before: Slots, after: Slots, layers: tuple[int, ...]
) -> dict[str, list[tuple[int, int]]]:
    """(decoder layer, expert) that each shard must fetch between two placements; shards with none
    are left out."""
    found = {}
    for uid, slots in after.items():
        had = before.get(uid, ((),) * len(layers))
        pairs = [
            (layer, expert)
            for index, layer in enumerate(layers)
            for expert in slots[index]
            if expert not in had[index]
        ]
        if pairs:
            found[uid] = pairs
    return found
