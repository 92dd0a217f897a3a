"""Placement and view: what a dense rank must know of the expert pool, immutable and numbered.

A *logical expert* is expert `e` of MoE layer `l` of the checkpoint; a *slot* is room for one
expert's weights of one layer in one shard; a *replica* is a slot that holds a verified copy. A
*placement* maps (layer, expert) to replicas and is numbered by an *epoch*; a *view* is a placement
and the members that hold it. Frames name (layer, logical expert), never a slot.
"""

import hashlib
from collections.abc import Collection
from typing import Literal

import msgspec

Role = Literal["shard", "dense"]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process listens. `unix_path` is usable only on the same `host`."""

    host: str  # Ray node id (a label), not a DNS name: it decides what is local
    tcp_address: str  # "ip:port", port chosen by the system
    unix_path: str | None = None


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One living process of the cluster: `uid` names the role, `incarnation` this life of it."""

    uid: str  # "shard-0", "dense-0"
    incarnation: int  # grows with each restart of the same uid
    role: Role
    endpoint: Endpoint
    actor_name: str
    labels: dict[str, str] = {}


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Which shards hold which experts.

    `slots[uid][i]` are the logical experts that shard `uid` holds for the i-th MoE layer: in slot
    order at its start, those that came later behind them. Invariant (checked by `check`): every
    expert of every MoE layer has a replica, and no shard holds an expert twice.
    """

    num_experts: int
    moe_layers: tuple[int, ...]  # decoder-layer indices that have routed experts
    slots: dict[str, tuple[tuple[int, ...], ...]]

    def check(self) -> None:
        """Raises AssertionError with the numbers when an invariant is broken."""
        for index, layer in enumerate(self.moe_layers):
            held: set[int] = set()
            for uid, layers in self.slots.items():
                experts = layers[index]
                assert len(set(experts)) == len(experts), f"{uid} layer {layer}: twice in {experts}"
                held.update(experts)
            missing = set(range(self.num_experts)) - held
            assert not missing, f"layer {layer}: experts {sorted(missing)} have no replica"


def uncovered(placement: Placement, uids: Collection[str]) -> list[tuple[int, int]]:
    """(decoder layer, expert) of what none of the shards `uids` holds."""
    found = []
    for index, layer in enumerate(placement.moe_layers):
        held = {e for uid in placement.slots if uid in uids for e in placement.slots[uid][index]}
        found += [(layer, expert) for expert in range(placement.num_experts) if expert not in held]
    return found


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Placement and members under one epoch."""

    epoch: int
    members: tuple[Member, ...]
    placement: Placement

    @property
    def view_hash(self) -> str:
        """32 hex digits over the whole content; equal views have equal hashes."""
        data = msgspec.msgpack.encode(self, order="sorted")
        return hashlib.blake2b(data, digest_size=16).hexdigest()


def contiguous_placement(
    *,
    num_experts: int,
    moe_layers: tuple[int, ...],
    shard_uids: tuple[str, ...],
    slots: int | None = None,
) -> Placement:
    """Experts in equal contiguous runs over the shards: the placement before anything is known.

    Args:
        slots: of one shard in one layer. Those that its own run leaves over get replicas: of what
            has fewest, from the run half-way round the shards on, which is the one that is most
            likely on another host.

    Raises:
        ValueError: more shards than experts, or fewer slots than experts.
    """
    num_shards = len(shard_uids)
    if not 1 <= num_shards <= num_experts:
        raise ValueError(
            f"{num_shards} shards for {num_experts} experts: allowed is 1 to {num_experts}"
        )
    if slots is not None and slots * num_shards < num_experts:
        raise ValueError(
            f"{num_shards} shards x {slots} slots = {num_shards * slots} for {num_experts} experts:"
            f" at least {-(-num_experts // num_shards)} slots are needed"
        )
    bounds = [i * num_experts // num_shards for i in range(num_shards + 1)]
    held = {
        uid: list(range(bounds[shard], bounds[shard + 1])) for shard, uid in enumerate(shard_uids)
    }
    room = {uid: min(slots or 0, num_experts) - len(own) for uid, own in held.items()}
    copies = [1] * num_experts
    for _ in range(sum(max(0, spare) for spare in room.values())):
        shard = max(
            range(num_shards), key=lambda i: room[shard_uids[i]]
        )  # the first of the roomiest
        own = held[shard_uids[shard]]
        start = bounds[(shard + num_shards // 2) % num_shards]
        others = (expert % num_experts for expert in range(start, start + num_experts))
        chosen = min((e for e in others if e not in own), key=copies.__getitem__)
        own.append(chosen)
        copies[chosen] += 1
        room[shard_uids[shard]] -= 1
    return Placement(
        num_experts=num_experts,
        moe_layers=moe_layers,
        slots={uid: tuple(tuple(own) for _ in moe_layers) for uid, own in held.items()},
    )
