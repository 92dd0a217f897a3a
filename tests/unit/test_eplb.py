"""EPLB against its published worked example, and its invariants."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.comm.eplb import eplb_held, eplb_slots, pack_balanced, replicate
from remora.comm.topology import uniform_topology

# README of the public repository deepseek-ai/EPLB: two layers of 12 experts, 16 slots, 4 groups,
# 2 nodes, 8 GPUs, and `phy2log` as printed there.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_worked_example() -> None:
    for weight_E, expected in zip(WEIGHT, PUBLISHED, strict=True):
        slots = eplb_slots(weight_E, num_physical=16, num_groups=4, num_nodes=2, num_gpus=8)
        assert slots == expected


def test_groups_that_nodes_do_not_divide_mean_global() -> None:
    odd = eplb_slots(WEIGHT[0], num_physical=16, num_groups=3, num_nodes=2, num_gpus=8)
    assert odd == eplb_slots(WEIGHT[0], num_physical=16, num_groups=1, num_nodes=1, num_gpus=8)


def test_packing_by_hand() -> None:
    assert pack_balanced(np.array([5.0, 4.0, 3.0, 3.0]), 2) == [[0, 3], [1, 2]]
    assert replicate(np.array([9.0, 2.0, 4.0]), 5) == [0, 1, 2, 0, 0]


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 9),
)
def test_slots_are_full_and_every_expert_is_held(
    hosts: int, per_host: int, rooms: int, spare: int, hierarchical: bool, seed: int
) -> None:
    shards = hosts * per_host
    load_E = np.random.default_rng(seed).pareto(1.0, shards * rooms) + 0.01
    topology = uniform_topology(num_hosts=hosts, shards_per_host=per_host, slots=rooms + spare)
    held_SE = eplb_held(load_E, topology, hierarchical=hierarchical)
    assert held_SE.any(0).all()
    assert (held_SE.sum(1) == min(rooms + spare, len(load_E))).all()
