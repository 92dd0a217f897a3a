"""B5: co-clustering and token shuffling after *Speculative MoE / Semantic Parallelism*.

Written anew from the paper's description (arXiv 2503.04398: Algorithm 1, alternating greedy swaps;
the token-id table; the table over the devices of two layers before; the argmax shuffle). A *device*
is a shard. Replicas are no part of it: spare slots stay empty.

Shape suffixes: V token ids, E experts, D devices, L MoE layers, T tokens, K top-k.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from traffic_data import SEED, Trace

ROUNDS_MAX = 12  # of Algorithm 1; it usually stands still after three or four
SLACK = 1.05  # most token weight of a device over the mean
RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CoClusters:
    """Experts' devices, and the tables that predict a token's device in each layer."""

    device_LE: NDArray[np.int64]
    affinity_LVD: NDArray[np.float32]  # token-id table: share of its activations on each device
    seen_V: NDArray[np.bool_]
    chain_LDDD: NDArray[np.float32]  # [l, device of l-2, device of l-1, device of l]: P(last)
    prior_LD: NDArray[np.float32]  # mean of the affinities: for ids never seen


def co_cluster(trace: Trace, num_devices: int, num_ids: int) -> CoClusters:
    """Algorithm 1 in every layer of a planning trace, then the tables of its result.

    Args:
        num_ids: V, at least the largest id and one more.

    Raises:
        AssertionError: the trace has no token ids, or experts do not divide over the devices.
    """
    token_T = trace.token_T
    assert token_T is not None, f"trace {trace.name} has no token ids"
    assert trace.num_experts % num_devices == 0, f"{trace.num_experts} over {num_devices}"
    device_LE = np.empty((trace.num_layers, trace.num_experts), np.int64)
    affinity_LVD = np.zeros((trace.num_layers, num_ids, num_devices), np.float32)
    counts_V = np.bincount(token_T, minlength=num_ids)
    for layer in range(trace.num_layers):
        count_VE = token_expert_counts(
            trace.experts_TLK[:, layer], token_T, num_ids, trace.num_experts
        )
        device_LE[layer] = alternate(count_VE, counts_V, num_devices)
        on_VD = count_VE @ np.eye(num_devices)[device_LE[layer]]
        affinity_LVD[layer] = on_VD / np.maximum(on_VD.sum(1, keepdims=True), 1)
    used_TLD = used_devices(trace.experts_TLK, device_LE, num_devices)
    return CoClusters(
        device_LE=device_LE,
        affinity_LVD=affinity_LVD,
        seen_V=counts_V > 0,
        chain_LDDD=_chain(used_TLD.argmax(2), num_devices),
        prior_LD=(used_TLD.mean(0) / used_TLD.mean(0).sum(1, keepdims=True)).astype(np.float32),
    )


def token_expert_counts(
    experts_TK: NDArray[np.integer],
    token_T: NDArray[np.integer],
    num_ids: int,
    num_experts: int,
) -> NDArray[np.float64]:
    """The token-id -> expert table of one layer, `[V, E]` activations."""
    keys = token_T[:, None].astype(np.int64) * num_experts + experts_TK
    flat = np.bincount(keys.reshape(-1), minlength=num_ids * num_experts)
    return flat.reshape(num_ids, num_experts).astype(np.float64)


def alternate(
    count_VE: NDArray[np.float64],
    count_V: NDArray[np.integer],
    num_devices: int,
    seed: int = SEED,
) -> NDArray[np.int64]:
    """Algorithm 1: the device of each expert, as many on each, so that token ids find their
    experts together.

    In turn: token ids go to the device that holds most of their activations, frequent ids first,
    under a cap on a device's tokens; then pairs of experts are swapped, best gain first, as long as
    a swap raises local activations by more than it costs in load. The best of RESTARTS random
    beginnings.
    """
    chance = np.random.default_rng(seed)
    num_experts = count_VE.shape[1]
    best, best_value = np.zeros(0, np.int64), -np.inf
    ids = np.flatnonzero(count_V)
    ids = ids[np.argsort(-count_V[ids], kind="stable")]
    for _ in range(RESTARTS):
        device_E = chance.permutation(np.arange(num_experts) % num_devices)
        value = -np.inf
        for _ in range(ROUNDS_MAX):
            device_I = _tokens_to_devices(count_VE[ids], count_V[ids], device_E, num_devices)
            by_device_DE = np.zeros((num_devices, num_experts))
            np.add.at(by_device_DE, device_I, count_VE[ids])
            device_E, new_value = _swap(by_device_DE, device_E)
            if new_value <= value + 1e-9:
                break
            value = new_value
        if value > best_value:
            best, best_value = device_E, value
    return best


def _tokens_to_devices(
    count_IE: NDArray[np.float64],
    count_I: NDArray[np.integer],
    device_E: NDArray[np.int64],
    num_devices: int,
) -> NDArray[np.int64]:
    """Most affine device with room, frequent ids first (they are sorted so)."""
    on_ID = count_IE @ np.eye(num_devices)[device_E]
    preference_ID = np.argsort(-on_ID, axis=1, kind="stable")
    room_D = np.full(num_devices, SLACK * count_I.sum() / num_devices)
    device_I = np.empty(len(count_I), np.int64)
    for i, weight in enumerate(count_I.tolist()):
        for d in preference_ID[i]:
            if room_D[d] >= weight:
                break
        else:
            d = int(room_D.argmax())
        device_I[i] = d
        room_D[d] -= weight
    return device_I


def _swap(
    by_device_DE: NDArray[np.float64], device_E: NDArray[np.int64]
) -> tuple[NDArray[np.int64], float]:
    """Best swap first until none helps; returns the devices and the objective: activations that
    are local, less the sum of loads over the mean."""
    device_E = device_E.copy()
    num_devices = len(by_device_DE)
    load_E = by_device_DE.sum(0)
    experts = np.arange(len(device_E))
    load_D = np.bincount(device_E, load_E, num_devices)
    mean = load_D.mean()
    excess = np.maximum(load_D - mean, 0).sum()
    while True:
        gain_ED = by_device_DE.T - by_device_DE[device_E, experts][:, None]
        local_EE = gain_ED[:, device_E] + gain_ED[:, device_E].T  # e to f's device and f to e's
        moved_EE = load_E[None, :] - load_E[:, None]  # what e's device gains, f's loses
        e_load, f_load = load_D[device_E][:, None], load_D[device_E][None, :]
        before = np.maximum(e_load - mean, 0) + np.maximum(f_load - mean, 0)
        after = np.maximum(e_load + moved_EE - mean, 0) + np.maximum(f_load - moved_EE - mean, 0)
        value_EE = local_EE - (after - before)
        value_EE[device_E[:, None] == device_E[None, :]] = -np.inf
        e, f = np.unravel_index(int(value_EE.argmax()), value_EE.shape)
        if not value_EE[e, f] > 1e-9:
            break
        device_E[e], device_E[f] = device_E[f], device_E[e]
        load_D = np.bincount(device_E, load_E, num_devices)
        excess = np.maximum(load_D - mean, 0).sum()
    return device_E, float(by_device_DE[device_E, experts].sum() - excess)


def used_devices(
    experts_TLK: NDArray[np.integer], device_LE: NDArray[np.int64], num_devices: int
) -> NDArray[np.int64]:
    """`[T, L, D]`: how many of a token's experts each device holds."""
    layer_L1 = np.arange(len(device_LE))[None, :, None]
    on_TLK = device_LE[layer_L1, experts_TLK]
    return (on_TLK[..., None] == np.arange(num_devices)).sum(2)


def _chain(main_TL: NDArray[np.int64], num_devices: int) -> NDArray[np.float32]:
    """The two-layer table: P(device | devices of the two layers before), one seen added to each."""
    num_layers = main_TL.shape[1]
    chain_LDDD = np.ones((num_layers, num_devices, num_devices, num_devices), np.float64)
    for layer in range(2, num_layers):
        np.add.at(
            chain_LDDD[layer], (main_TL[:, layer - 2], main_TL[:, layer - 1], main_TL[:, layer]), 1
        )
    return (chain_LDDD / chain_LDDD.sum(3, keepdims=True)).astype(np.float32)


def predicted_devices(clusters: CoClusters, trace: Trace, layer: int) -> NDArray[np.float32]:
    """`[T, D]`: the more confident of the two tables, before the layer's gate has run."""
    token_T = trace.token_T
    assert token_T is not None, f"trace {trace.name} has no token ids"
    score_TD = np.where(
        clusters.seen_V[token_T][:, None],
        clusters.affinity_LVD[layer][token_T],
        clusters.prior_LD[layer],
    )
    if layer < 2:
        return score_TD
    num_devices = score_TD.shape[1]
    before_T2D = used_devices(
        trace.experts_TLK[:, layer - 2 : layer],
        clusters.device_LE[layer - 2 : layer],
        num_devices,
    )
    first_T, second_T = before_T2D.argmax(2).T
    chain_TD = clusters.chain_LDDD[layer][first_T, second_T]
    surer_T = chain_TD.max(1) > score_TD.max(1)
    return np.where(surer_T[:, None], chain_TD, score_TD)


def shuffle(score_TD: NDArray[np.floating], step_tokens: int) -> NDArray[np.int64]:
    """The argmax shuffle: each batch's tokens sorted by their likeliest device and cut into equal
    slices, one a device. Returns the device of each token."""
    num_tokens, num_devices = score_TD.shape
    device_T = np.empty(num_tokens, np.int64)
    for begin in range(0, num_tokens, step_tokens):
        likeliest = score_TD[begin : begin + step_tokens].argmax(1)
        order = np.argsort(likeliest, kind="stable")
        device_T[begin + order] = np.arange(len(order)) * num_devices // len(order)
    return device_T


def request_devices(
    clusters: CoClusters, prompts: list[NDArray[np.integer]], weight_Q: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Inter-request scheduling: each request goes to the device that its prompt's token ids make
    likeliest over all layers, long requests first, under the cap on a device's tokens."""
    mean_VD = clusters.affinity_LVD.mean(0)
    prior_D = clusters.prior_LD.mean(0)
    num_devices = len(prior_D)
    score_QD = np.array(
        [np.where(clusters.seen_V[p][:, None], mean_VD[p], prior_D).mean(0) for p in prompts]
    )
    room_D = np.full(num_devices, SLACK * weight_Q.sum() / num_devices)
    device_Q = np.empty(len(prompts), np.int64)
    for q in np.argsort(-weight_Q, kind="stable"):
        fits = room_D >= weight_Q[q]
        if not fits.any():
            fits = room_D == room_D.max()
        device_Q[q] = np.where(fits, score_QD[q] - prior_D, -np.inf).argmax()
        room_D[device_Q[q]] -= weight_Q[q]
    return device_Q
