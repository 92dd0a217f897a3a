"""EPLB: the expert-parallel load balancer that DeepSeek published, as the baseline to beat.

Written after the description and checked against the worked example of the public repository
`deepseek-ai/EPLB`. Two greedy steps: whoever has the highest load per replica gets the next
replica; replicas, heaviest first, go to the lightest pack that still has room. *Hierarchical* packs
groups of experts to nodes first and replicates within each node; *global* treats all GPUs as one
node. It looks at loads alone: which experts are picked together is not asked.

Shape suffixes: N items, P physical experts (slots), E logical experts, G GPUs (shards).
"""

import numpy as np
from numpy.typing import NDArray

from remora.comm.topology import Topology


def pack_balanced(weight_N: NDArray[np.floating], num_packs: int) -> list[list[int]]:
    """Items into `num_packs` packs of equal size: heaviest first, each to the lightest with room.

    Returns:
        Items of each pack in the order they came. Ties: the earlier item, the lower pack.
    """
    room = len(weight_N) // num_packs
    assert room * num_packs == len(weight_N), f"{len(weight_N)} items for {num_packs} equal packs"
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = np.zeros(num_packs, weight_N.dtype)
    for item in np.argsort(-weight_N, kind="stable").tolist():
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=sums.__getitem__)
        packs[pack].append(item)
        sums[pack] += weight_N[item]
    return packs


def replicate(weight_E: NDArray[np.floating], num_physical: int) -> list[int]:
    """Logical expert of each of `num_physical` replicas: first all once, then the one with most
    load per replica, again and again (ties: the lower index)."""
    count_E = np.ones(len(weight_E), weight_E.dtype)
    physical = list(range(len(weight_E)))
    while len(physical) < num_physical:
        hottest = int(np.argmax(weight_E / count_E))
        count_E[hottest] += 1
        physical.append(hottest)
    return physical


def eplb_slots(
    weight_E: NDArray[np.floating],
    *,
    num_physical: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> list[int]:
    """Logical expert of each slot of one layer, GPU after GPU.

    Args:
        weight_E: load of each expert, in any unit.
        num_physical: slots of all GPUs together; a multiple of `num_gpus`.
        num_groups: equal groups of consecutive experts that share a node; where `num_nodes` does
            not divide it the global variant is used, as in the original.
        num_nodes, num_gpus: a multiple of one another.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    weight_E = weight_E.astype(np.float32)  # as the original: ties fall alike
    group_size = len(weight_E) // num_groups
    assert group_size * num_groups == len(weight_E), f"{len(weight_E)} experts, {num_groups} groups"
    nodes = pack_balanced(weight_E.reshape(num_groups, group_size).sum(1), num_nodes)
    slots: list[int] = []
    for groups in nodes:
        experts = [group * group_size + i for group in groups for i in range(group_size)]
        weight_N = weight_E[experts]
        physical = np.array(replicate(weight_N, num_physical // num_nodes))
        share_P = (weight_N / np.bincount(physical))[physical]
        for pack in pack_balanced(share_P, num_gpus // num_nodes):
            slots += [experts[physical[p]] for p in pack]
    return slots


def eplb_held(
    load_E: NDArray[np.floating], topology: Topology, *, hierarchical: bool = False
) -> NDArray[np.bool_]:
    """One layer's placement `[S, E]` by EPLB.

    Args:
        load_E: pairs of each expert.
        topology: for `hierarchical`, equal slots in every shard and equal shards on every host, in
            order of hosts. Unequal slots, which the original does not know, are filled by the same
            greedy rule.
        hierarchical: experts are packed to hosts first (groups of one expert: the models here have
            no group-limited routing).

    EPLB may put one expert twice on a shard, which serves nobody: the slot goes to the expert with
    the highest load per replica that the shard does not hold.
    """
    num_shards, num_experts = topology.num_shards, len(load_E)
    rooms = [min(room, num_experts) for room in topology.slots_S]
    assert sum(rooms) >= num_experts, f"{num_experts} experts in {sum(rooms)} slots"
    if len(set(rooms)) > 1:
        return _held_in_unequal(load_E, rooms)
    num_nodes = topology.num_hosts if hierarchical else 1
    if hierarchical:
        shards_per_host = num_shards // num_nodes
        expected = tuple(s // shards_per_host for s in range(num_shards))
        assert topology.host_of_S == expected, f"hosts in order, got {topology.host_of_S}"
    room = rooms[0]
    slots = eplb_slots(
        load_E,
        num_physical=room * num_shards,
        num_groups=num_experts if num_experts % num_nodes == 0 else 1,
        num_nodes=num_nodes,
        num_gpus=num_shards,
    )
    held_SE = np.zeros((num_shards, num_experts), np.bool_)
    held_SE[np.repeat(np.arange(num_shards), room), slots] = True
    _fill(held_SE, load_E, rooms)
    return held_SE


def _held_in_unequal(load_E: NDArray[np.floating], rooms: list[int]) -> NDArray[np.bool_]:
    held_SE = np.zeros((len(rooms), len(load_E)), np.bool_)
    physical = np.array(replicate(load_E.astype(np.float64), sum(rooms)))
    share_P = (load_E / np.bincount(physical))[physical]
    sums = np.zeros(len(rooms))
    first_last = np.argsort(-share_P, kind="stable")
    for p in sorted(first_last.tolist(), key=lambda p: p >= len(load_E)):  # every expert first
        able = [s for s, room in enumerate(rooms) if held_SE[s].sum() < room]
        able = [s for s in able if not held_SE[s, physical[p]]]
        if able:
            shard = min(able, key=sums.__getitem__)
            held_SE[shard, physical[p]] = True
            sums[shard] += share_P[p]
    _fill(held_SE, load_E, rooms)
    return held_SE


def _fill(held_SE: NDArray[np.bool_], load_E: NDArray[np.floating], rooms: list[int]) -> None:
    """Free slots go to the expert with the highest load per replica that the shard lacks."""
    for shard, room in enumerate(rooms):
        while held_SE[shard].sum() < room:
            share_E = np.where(held_SE[shard], -1.0, load_E / held_SE.sum(0))
            held_SE[shard, int(np.argmax(share_E))] = True
