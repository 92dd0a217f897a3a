"""Request homes: which host's dense group takes which request.

A token whose experts lie on its own host leaves it once less. Requests of one kind pick experts
alike, so that a request is cheap on the host that holds the experts of its kind, and a placement
planned for such sources (`plan_homes_and_placement`) makes them cheaper still.

*When it is decided.* A home is decided from what exists then: at admission from predicted bundles
of the prompt, or after the first chunk of the prompt (`probe_tokens`) has run under a provisional
home, from the bundles of that chunk alone. The latter is for traces: benchmarks and `joint_plan` do
it, by `assign_homes`. In a deployment KV pages stay where they are, and so does a request.

The router, which admits requests as they come, has no mean load to hold hosts to: `assign_admitted`
prices load instead, the more the higher it is (docs/router.md).

Shape suffixes: Q requests, T tokens, L MoE layers, K top-k, E experts, S shards, H hosts, G groups.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_matrix

CAPACITY_EPS: Final = 0.1  # tokens of a host over the mean that homes may cause


def assign_homes(
    cost_QH: NDArray[np.floating],
    size_Q: NDArray[np.floating],
    *,
    load_H: NDArray[np.floating] | None = None,
    eps: float = CAPACITY_EPS,
) -> NDArray[np.int64]:
    """Home of each request: least cost, no host over (1 + `eps`) of the mean load where possible.

    One min-cost flow from requests (supply `size_Q`) to hosts (capacity); its basic optimum splits
    at most H - 1 requests, which go, largest first, to the cheapest host that still has room, or to
    the one with most room.

    Args:
        cost_QH: of the whole request: expected remote copies, less what a reused prefix saves.
        size_Q: tokens that a request will occupy its host with.
        load_H: tokens that hosts have already.

    Returns:
        Index of a host for each request; deterministic.
    """
    num_requests, num_hosts = cost_QH.shape
    load_H = np.zeros(num_hosts) if load_H is None else np.asarray(load_H, np.float64)
    size_Q = np.asarray(size_Q, np.float64)
    if num_requests == 0:
        return np.zeros(0, np.int64)
    total = load_H.sum() + size_Q.sum()
    room_H = np.maximum((1 + eps) * total / num_hosts - load_H, 0.0)
    if room_H.sum() < size_Q.sum():  # some hosts are over already: the others share what is left
        room_H = np.maximum(room_H, 0) * (size_Q.sum() / max(room_H.sum(), 1e-9)) * (1 + 1e-9)
    variables = np.arange(num_requests * num_hosts)
    per_request = coo_matrix((np.ones(len(variables)), (variables // num_hosts, variables)))
    sizes = np.repeat(size_Q, num_hosts)
    per_host = coo_matrix((sizes, (variables % num_hosts, variables)))
    solved = linprog(
        cost_QH.ravel(), A_ub=per_host.tocsr(), b_ub=room_H + 1e-6, A_eq=per_request.tocsr(),
        b_eq=np.ones(num_requests), bounds=(0, 1), method="highs-ds",
    )  # fmt: skip
    assert solved.status == 0, f"the flow of {num_requests} requests: {solved.message}"
    share_QH = solved.x.reshape(num_requests, num_hosts)
    home_Q = np.full(num_requests, -1, np.int64)
    # The slack above lets a trifle of a request go elsewhere: it is whole all the same.
    whole_Q = share_QH.max(1) > 1 - 1e-3
    home_Q[whole_Q] = share_QH[whole_Q].argmax(1)
    room_H = room_H - np.bincount(home_Q[whole_Q], size_Q[whole_Q], num_hosts)
    for request in sorted(np.flatnonzero(~whole_Q).tolist(), key=lambda q: (-size_Q[q], q)):
        fits_H = room_H >= size_Q[request]
        masked_H = np.where(fits_H, cost_QH[request], np.inf)
        home = int(masked_H.argmin()) if fits_H.any() else int(room_H.argmax())
        home_Q[request] = home
        room_H[home] -= size_Q[request]
    return home_Q


def assign_admitted(
    cost_QG: NDArray[np.floating],
    load_G: NDArray[np.floating],
    *,
    size: float,
    price: float,
) -> NDArray[np.int64]:
    """Group of each of the requests that are admitted together: least cost of all, load included.

    A min-cost flow with convex costs: the request that comes to a group as its j-th pays for the
    load that is there and for the j before it. Each place is one column of an assignment problem
    (`linear_sum_assignment`), since prices of a group's places rise and the cheap ones fill first.

    Args:
        cost_QG: of a request in a group, without load; inf where it cannot go. Every request has a
            group.
        load_G: sequences that groups have.
        size: sequences of a request, on average.
        price: of one sequence that is there already.

    Returns:
        Index of a group for each request; lower ones first among equals. Deterministic.
    """
    num_requests, num_groups = cost_QG.shape
    place_GJ = price * (load_G[:, None] + size * np.arange(num_requests))
    cost_QGJ = cost_QG[:, :, None] + place_GJ
    if num_requests == 1:
        return np.array([cost_QGJ[0, :, 0].argmin()])
    flat = cost_QGJ.reshape(num_requests, num_groups * num_requests)
    chosen: NDArray[np.int64] = linear_sum_assignment(flat)[1] // num_requests
    return chosen


def hits_of(
    ids_TLK: NDArray[np.integer],
    request_T: NDArray[np.integer],
    num_requests: int,
    held_L: Sequence[NDArray[np.bool_]],
    host_of_S: Sequence[int],
    num_hosts: int,
) -> NDArray[np.float64]:
    """`[Q, H]` (token, layer) pairs of each request that find an expert on each host: the copies
    that the request saves when the host is its home."""
    hits_QH = np.zeros((num_requests, num_hosts))
    for index, held_SE in enumerate(held_L):
        held_HE = np.zeros((num_hosts, held_SE.shape[1]), np.bool_)
        np.logical_or.at(held_HE, np.asarray(host_of_S), held_SE)
        ids_TK = ids_TLK[:, index].astype(np.int64)
        for host in range(num_hosts):
            hit_T = (held_HE[host][ids_TK] & (ids_TK >= 0)).any(1)
            hits_QH[:, host] += np.bincount(request_T[hit_T], minlength=num_requests)
    return hits_QH
