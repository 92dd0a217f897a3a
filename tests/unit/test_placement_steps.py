"""Placements for other numbers of shards, and the rounds from one to another."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.cluster.placement_steps import ROUNDS_MAX, Slots, additions, rounds, spread
from remora.comm.errors import ConfigError
from remora.comm.view import Placement, contiguous_placement

LAYERS = (0, 2)


def contiguous(num_experts: int, num_shards: int, slots: int | None = None) -> Slots:
    return contiguous_placement(
        num_experts=num_experts,
        moe_layers=LAYERS,
        shard_uids=tuple(f"shard-{i}" for i in range(num_shards)),
        slots=slots,
    ).slots


def room_of(slots: int, num_shards: int) -> dict[str, tuple[int, ...]]:
    return {f"shard-{i}": (slots,) * len(LAYERS) for i in range(num_shards)}


def check(slots: Slots, num_experts: int) -> None:
    Placement(num_experts=num_experts, moe_layers=LAYERS, slots=dict(slots)).check()


def shuffled(num_experts: int, num_shards: int, slots: int, seed: int) -> Slots:
    """Every expert somewhere, and the slots that are left filled with replicas, at random."""
    drawn = random.Random(seed)
    layers = []
    for _ in LAYERS:
        held: dict[str, list[int]] = {f"shard-{i}": [] for i in range(num_shards)}
        experts = drawn.sample(range(num_experts), num_experts)
        for expert in experts:
            open_uids = [uid for uid in held if len(held[uid]) < slots]
            held[drawn.choice(open_uids)].append(expert)
        for uid in held:
            others = [e for e in range(num_experts) if e not in held[uid]]
            held[uid] += drawn.sample(others, min(len(others), slots - len(held[uid])))
        layers.append(held)
    return {uid: tuple(tuple(held[uid]) for held in layers) for uid in layers[0]}


@given(
    st.integers(1, 24), st.integers(1, 5), st.integers(1, 5), st.integers(0, 8), st.integers(1, 3)
)
def test_spread_covers_levels_and_replicates(
    num_experts: int, before: int, after: int, spare: int, replicas: int
) -> None:
    before, after = min(before, num_experts), min(after, num_experts)
    slots = -(-num_experts // min(before, after)) + spare
    held = contiguous(num_experts, before)
    found = spread(held, room_of(slots, after), {}, num_experts=num_experts, replicas=replicas)
    check(found, num_experts)
    for index in range(len(LAYERS)):
        counts = [len(found[uid][index]) for uid in found]
        assert max(counts) <= slots
        assert max(counts) - min(counts) <= 1 or replicas > 1
        wanted = min(replicas, after)
        if slots * after >= wanted * num_experts + after * wanted:
            held_by = [sum(e in found[u][index] for u in found) for e in range(num_experts)]
            assert min(held_by) >= wanted


def test_spread_moves_few() -> None:
    held = contiguous(32, 2)
    found = spread(held, room_of(16, 3), {}, num_experts=32, replicas=1)
    assert {u: len(p) for u, p in additions(held, found, LAYERS).items()} == {"shard-2": 20}
    back = spread(
        {u: s for u, s in found.items() if u != "shard-2"}, room_of(16, 2), {},
        num_experts=32, replicas=1,
    )  # fmt: skip
    moved = additions(found, back, LAYERS)
    assert sum(map(len, moved.values())) == 20, "what the retiree held, and nothing else"


def test_replicas_go_to_other_hosts_first() -> None:
    hosts = {"shard-0": "a", "shard-1": "a", "shard-2": "b", "shard-3": "b"}
    held = contiguous(8, 4)
    found = spread(held, room_of(4, 4), hosts, num_experts=8, replicas=2)
    for expert in range(8):
        on = {hosts[uid] for uid in found if expert in found[uid][0]}
        assert on == {"a", "b"}


def test_spread_says_how_many_slots_there_are() -> None:
    with pytest.raises(ConfigError, match="1 shards have 4 slots in MoE layer number 0 for 8"):
        spread(contiguous(8, 2), room_of(4, 1), {}, num_experts=8, replicas=1)


@given(
    st.integers(2, 24), st.integers(2, 4), st.integers(1, 6), st.integers(0, 99), st.integers(0, 99)
)
def test_rounds_lead_there_and_never_lose_an_expert(
    num_experts: int, num_shards: int, spare: int, one: int, other: int
) -> None:
    """Full shards, with replicas: slots are lent."""
    slots = min(num_experts, -(-num_experts // num_shards) + spare)
    held = shuffled(num_experts, num_shards, slots, one)
    target = shuffled(num_experts, num_shards, slots, other)
    room = room_of(slots, num_shards)
    found = rounds(held, target, room)
    assert len(found) <= ROUNDS_MAX
    now = held
    for each in found:
        check(each, num_experts)
        for uid in each:
            for index in range(len(LAYERS)):
                taken = set(each[uid][index]) - set(now[uid][index])
                assert len(now[uid][index]) + len(taken) <= slots, "into slots that are free"
        now = each
    for uid in target:
        assert [set(e) for e in now[uid]] == [set(e) for e in target[uid]]


def test_full_shards_without_replicas_cannot_move() -> None:
    held = contiguous(8, 2)
    target = {"shard-0": held["shard-1"], "shard-1": held["shard-0"]}
    with pytest.raises(ConfigError, match="spare slot"):
        rounds(held, target, room_of(4, 2))
    assert rounds(held, held, room_of(4, 2)) == []
