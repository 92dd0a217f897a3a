"""Bundles: which experts a token picked together, counted; what routing statistics are made of.

A *bundle* is the sorted set of experts of one token in one MoE layer. Placement, replicas and
request homes are planned from weighted unique bundles, apart by the host that the token's dense
group runs on (its *source*).

Shape suffixes: T tokens, K top-k, B unique bundles.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

NO_EXPERT = -1
NO_SOURCE = -1
PIECES_MIN: Final = 256  # of a sample: none has a larger share of all weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBundles:
    """Unique (source, bundle) of one MoE layer with their weights.

    Rows of `experts_BK` ascend, with NO_EXPERT behind where a token has fewer experts. The same
    bundle stands once for each source.
    """

    experts_BK: NDArray[np.int16]
    source_B: NDArray[np.int16]  # host index of the topology; NO_SOURCE when unknown
    weight_B: NDArray[np.float64]  # tokens, decayed where they are old

    @property
    def num_tokens(self) -> float:
        """Weight of all bundles."""
        return float(self.weight_B.sum())


def sample_bundles(bundles: LayerBundles, count: int, seed: int) -> LayerBundles:
    """About `count` bundles that stand for all of them, in an order drawn by `seed`.

    Systematic sampling by weight: a bundle is drawn once for each multiple of (weight of all /
    `count`) that its own weight reaches, and the fraction left over by chance, so that every
    expert's weight stays what it is but for less than the weight of a few draws. All of them, in
    that order, when there are no more than `count`.

    Who plans dispatches each row of a sample as if it were one token, but the tokens of a bundle
    spread over replicas: one of more than 1/PIECES_MIN of all weight, as most are of a model with
    few experts, comes in pieces.
    """
    share_B = bundles.weight_B / max(bundles.num_tokens, np.finfo(np.float64).tiny)
    pieces_B = np.maximum(1, np.ceil(PIECES_MIN * share_B)).astype(np.int64)
    pieces = np.repeat(np.arange(len(pieces_B)), pieces_B)
    order = np.random.default_rng(seed).permutation(pieces)
    weight_B = (bundles.weight_B / pieces_B)[order]
    if len(order) > count:
        each = float(weight_B.sum()) / count
        drawn_B = np.diff(np.floor(np.cumsum(weight_B) / each), prepend=0.0)
        each = float(weight_B.sum() / drawn_B.sum())  # rounding may lose the last draw
        order, weight_B = order[drawn_B > 0], drawn_B[drawn_B > 0] * each
    return LayerBundles(
        experts_BK=bundles.experts_BK[order],
        source_B=bundles.source_B[order],
        weight_B=weight_B,
    )


def count_bundles(
    expert_ids_TK: NDArray[np.integer],
    source_T: NDArray[np.integer],
    weight_T: NDArray[np.floating] | None = None,
) -> LayerBundles:
    """Unique bundles of one layer.

    Args:
        expert_ids_TK: in any order within a row; negative = none.
        source_T: host index of each token.
        weight_T: 1 for each token when None.
    """
    num_tokens, top_k = expert_ids_TK.shape
    ids_TK = expert_ids_TK.astype(np.int32)
    ids_TK = np.where(ids_TK < 0, np.iinfo(np.int16).max, ids_TK)
    keys = np.empty((num_tokens, top_k + 1), np.int16)
    keys[:, 0] = source_T
    keys[:, 1:] = np.sort(ids_TK, axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    weights = np.ones(num_tokens) if weight_T is None else np.asarray(weight_T, np.float64)
    experts_BK = unique[:, 1:].copy()
    experts_BK[experts_BK == np.iinfo(np.int16).max] = NO_EXPERT
    return LayerBundles(
        experts_BK=experts_BK,
        source_B=unique[:, 0].copy(),
        weight_B=np.bincount(inverse.reshape(-1), weights, len(unique)).astype(np.float64),
    )
