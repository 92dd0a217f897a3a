"""Where experts may lie: hosts, the shards on them, and their room.

A *host* is what Ray's node labels call one (`Endpoint.host`); copies between shards of one host are
cheap, between hosts they cross the network. Everything here is index based, so that planners work
on arrays; `uids` and `hosts` give the names back.

Shape suffixes: S shards, H hosts, E logical experts, L MoE layers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora.comm.view import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Shards, the host of each, and how many slots each has.

    Invariants (checked at construction): as many `host_of_S` and `slots_S` as `uids`; host indices
    within `hosts`.
    """

    uids: tuple[str, ...]  # S shard uids
    hosts: tuple[str, ...]  # H host names
    host_of_S: tuple[int, ...]  # index into `hosts`
    slots_S: tuple[int, ...]  # slots of one shard in one MoE layer, on average over the layers

    def __post_init__(self) -> None:
        num_shards = len(self.uids)
        assert len(self.host_of_S) == len(self.slots_S) == num_shards, (
            f"{num_shards} shards, {len(self.host_of_S)} hosts of them, {len(self.slots_S)} rooms"
        )
        assert all(0 <= h < len(self.hosts) for h in self.host_of_S), (
            f"hosts of shards {self.host_of_S} are not all within {len(self.hosts)} hosts"
        )

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.uids)

    @property
    def num_hosts(self) -> int:
        """H."""
        return len(self.hosts)


def uniform_topology(*, num_hosts: int, shards_per_host: int, slots: int) -> Topology:
    """`num_hosts` x `shards_per_host` shards of `slots` slots a layer, for plans and tests."""
    return Topology(
        uids=tuple(f"shard-{i}" for i in range(num_hosts * shards_per_host)),
        hosts=tuple(f"host-{h}" for h in range(num_hosts)),
        host_of_S=tuple(h for h in range(num_hosts) for _ in range(shards_per_host)),
        slots_S=(slots,) * (num_hosts * shards_per_host),
    )


def held_of(placement: Placement, uids: tuple[str, ...]) -> list[NDArray[np.bool_]]:
    """A placement as one matrix `[S, E]` for each MoE layer: whether a shard holds an expert."""
    held_L = []
    for index in range(len(placement.moe_layers)):
        held_SE = np.zeros((len(uids), placement.num_experts), np.bool_)
        for shard, uid in enumerate(uids):
            held_SE[shard, list(placement.slots[uid][index])] = True
        held_L.append(held_SE)
    return held_L


def replica_counts(placement: Placement) -> dict[str, int]:
    """Over all experts of all layers: the fewest and the most replicas, and how many are spare."""
    count_LE = np.sum(held_of(placement, tuple(placement.slots)), axis=1)
    return {
        "least": int(count_LE.min()),
        "most": int(count_LE.max()),
        "beyond_the_first": int((count_LE - 1).sum()),
    }


def placement_from(
    held_L: list[NDArray[np.bool_]], *, uids: tuple[str, ...], moe_layers: tuple[int, ...]
) -> Placement:
    """The inverse of `held_of`; experts of a shard in ascending order."""
    assert len(held_L) == len(moe_layers), f"{len(held_L)} matrices, {len(moe_layers)} layers"
    placement = Placement(
        num_experts=held_L[0].shape[1],
        moe_layers=moe_layers,
        slots={
            uid: tuple(tuple(np.flatnonzero(held_SE[s]).tolist()) for held_SE in held_L)
            for s, uid in enumerate(uids)
        },
    )
    placement.check()
    return placement
