"""How much of what a perfect token shuffle saves does a guessed one save? On recorded routing.

Ranks of one tensor-parallel group stand beside one shard each; steps decode `STEP_TOKENS` documents
side by side, as an engine does. A copy is a row that goes to a shard beside another rank. The
scores (`comm/shuffle_scores.py`, the very ones that engines use) have learned from other documents
and learn nothing more while they are judged.

Shape suffixes: N tokens, L MoE layers, K top-k, E experts, T rows of a step, R ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.collectives import part_of
from remora.comm.shuffle import copy_costs, slice_order
from remora.comm.shuffle_scores import LAYERS_BEFORE, OnlineScores

STEP_TOKENS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Documents and the experts that their tokens chose."""

    token_N: NDArray[np.int64]
    experts_NLK: NDArray[np.int16]
    length_Q: NDArray[np.int64]  # tokens of each document; they stand one behind the other

    def steps(self, step_tokens: int) -> Iterator[NDArray[np.int64]]:
        """Tokens of steps that decode `step_tokens` documents side by side."""
        starts = np.concatenate([[0], np.cumsum(self.length_Q)[:-1]])
        order = np.random.default_rng(0).permutation(len(starts))
        for first in range(0, len(order) - step_tokens + 1, step_tokens):
            batch = order[first : first + step_tokens]
            for position in range(int(self.length_Q[batch].min())):
                yield starts[batch] + position


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Copies per token and layer, by who takes which rows, and the share of the gap closed."""

    none: float
    speculative: float
    oracle: float
    closed_by_layer: tuple[float, ...]

    @property
    def closed(self) -> float:
        """`shuffle_oracle_gap_closed`."""
        return (self.none - self.speculative) / (self.none - self.oracle)


def shuffle_gap(
    plan: Routed, heldout: Routed, shard_LE: NDArray[np.int64], step_tokens: int = STEP_TOKENS
) -> Gap:
    """Learn from `plan`, judge on `heldout`.

    Args:
        shard_LE: where each expert is; as many shards as ranks, rank r beside shard r.
    """
    num_layers, num_experts = shard_LE.shape
    num_ranks = int(shard_LE.max()) + 1
    vocabulary = 1 + int(max(plan.token_N.max(), heldout.token_N.max()))
    scores = OnlineScores(
        num_layers=num_layers, num_experts=num_experts, num_ranks=num_ranks, vocab_size=vocabulary
    )
    served = np.concatenate(list(plan.steps(step_tokens)))  # as an engine meets them
    for layer in range(num_layers):
        costs = _costs(plan, layer, served, shard_LE, num_ranks)
        scores.learn(layer, plan.token_N[served], _before(plan, layer, served), costs)
    rank_T = np.concatenate(
        [np.full(e - b, r) for r, (b, e) in enumerate(_spans(num_ranks, step_tokens))]
    )
    paid = np.zeros((3, num_layers))
    num_rows = 0
    for rows in heldout.steps(step_tokens):
        num_rows += len(rows)
        for layer in range(num_layers):
            cost_TR = _costs(heldout, layer, rows, shard_LE, num_ranks)
            guess_TR = scores.scores(layer, heldout.token_N[rows], _before(heldout, layer, rows))
            orders = (np.arange(step_tokens), slice_order(guess_TR), slice_order(-cost_TR))
            paid[:, layer] += [cost_TR[order, rank_T].sum() for order in orders]
    none_L, speculative_L, oracle_L = paid / num_rows
    return Gap(
        none=float(none_L.mean()),
        speculative=float(speculative_L.mean()),
        oracle=float(oracle_L.mean()),
        closed_by_layer=tuple(((none_L - speculative_L) / (none_L - oracle_L)).tolist()),
    )


def _spans(num_ranks: int, count: int) -> list[tuple[int, int]]:
    return [part_of(rank, num_ranks, count) for rank in range(num_ranks)]


def _costs(
    routed: Routed, layer: int, rows: NDArray[np.int64], shard_LE: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    price_RS = (~np.eye(num_ranks, dtype=np.bool_)).astype(np.int64)
    cost_TR = np.empty((len(rows), num_ranks), np.int64)
    index_TK = routed.experts_NLK[rows, layer].astype(np.int64)
    copy_costs(index_TK, shard_LE[layer].astype(np.int16)[:, None], price_RS, cost_TR)
    return cost_TR


def _before(routed: Routed, layer: int, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    depths = range(1, min(layer, LAYERS_BEFORE) + 1)
    return [routed.experts_NLK[rows, layer - depth].astype(np.int64) for depth in depths]
