"""Request homes: capacity, cost against brute force, and a joint plan that finds its requests."""

import itertools

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remora.comm.homes import assign_homes, hits_of
from remora.comm.joint_plan import homes_from_probe, plan_homes_and_placement
from remora.comm.objective import Objective
from remora.comm.replay import replay
from remora.comm.topology import uniform_topology


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 3))
@example(seed=0, num_requests=6, num_hosts=3)  # the flow gave a trifle of one to another host
def test_equal_requests_get_the_cheapest_homes_that_fit(
    seed: int, num_requests: int, num_hosts: int
) -> None:
    cost_QH = np.random.default_rng(seed).integers(0, 50, (num_requests, num_hosts)).astype(float)
    room = -(-num_requests // num_hosts)
    eps = room * num_hosts / num_requests - 1
    home_Q = assign_homes(cost_QH, np.ones(num_requests), eps=eps)
    assert np.bincount(home_Q, minlength=num_hosts).max() <= room
    best = min(
        sum(cost_QH[q, h] for q, h in enumerate(homes))
        for homes in itertools.product(range(num_hosts), repeat=num_requests)
        if np.bincount(homes, minlength=num_hosts).max() <= room
    )
    assert cost_QH[np.arange(num_requests), home_Q].sum() == best


def test_busy_hosts_get_less_and_nobody_is_turned_away() -> None:
    cost_QH = np.tile([0.0, 1.0], (6, 1))
    home_Q = assign_homes(cost_QH, np.ones(6), load_H=np.array([4.0, 0.0]), eps=0.0)
    assert np.bincount(home_Q, minlength=2).tolist() == [1, 5]
    giant = assign_homes(cost_QH[:1], np.array([1000.0]), load_H=np.zeros(2))
    assert giant.tolist() in ([0], [1])
    assert assign_homes(np.zeros((0, 2)), np.zeros(0)).shape == (0,)


def test_hits_are_tokens_that_find_an_expert() -> None:
    held = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    ids = np.array([[[0, 1]], [[2, 3]], [[3, -1]]])
    hits = hits_of(ids, np.array([0, 0, 1]), 2, [held], (0, 1, 1), 2)
    assert hits.tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_requests_come_home_to_their_kind() -> None:
    """Four kinds of requests, each with four experts of its own in both layers."""
    rng = np.random.default_rng(0)
    kind_Q = np.arange(32) % 4
    request_T = np.repeat(np.arange(32), 20)
    draws = rng.permuted(np.tile(np.arange(4), (len(request_T), 2, 1)), axis=2)[:, :, :2]
    ids = draws + 4 * kind_Q[request_T][:, None, None]
    topology = uniform_topology(num_hosts=4, shards_per_host=1, slots=4)
    joint = plan_homes_and_placement(
        ids, request_T, topology, num_experts=16, seed=0, objective=Objective(rounds=3)
    )
    assert sum(cost.remote_copies for cost in joint.result.costs_L) == 0
    assert all(len(set(joint.home_Q[kind_Q == kind])) == 1 for kind in range(4))
    probe = np.isin(np.arange(len(request_T)) % 20, range(2))  # the first two tokens of each
    home_Q = homes_from_probe(
        ids[probe], request_T[probe], np.full(32, 20), joint.result.held_L, topology
    )
    for index, held in enumerate(joint.result.held_L):
        assert replay(ids[:, index], home_Q[request_T], held, topology).remote_copies == 0
