"""Which experts a token will choose in a MoE layer, before its gate has run.

    counts = RoutingCounts(num_layers=L, num_experts=E, top_k=K, vocab_size=V)
    counts.learn(token_T, experts_LTK)             # as often as tokens come; `merge`, `decay`
    predictor = fit(counts)                        # seconds, from counts alone
    score_TE = predictor.scores(layer, token_T, previous_TK)

The model is additive: the chance that a token chooses expert e of layer l is

    score[e] = token[l][id][e] + sum over f in the token's bundle of layer l - 1 of near[l][f][e]
                               + sum over g in its bundle of layer l - 2 of far[l][g][e]

fitted by ridge regression, all tables at once. What that needs are counts of pairs (token id and
expert; experts of one layer; of neighbouring layers), so learning is counting: bounded, mergeable,
decayable. The plain token-id table, and previous-layer bundles alone, are the same fit with fewer
tables (`Use`). Scores are expected activations, so their sum over what a device holds is the
expected number of its pairs, and confidence is the expected share of hits.

Tables are integers (`SCALE` is one activation): every rank computes the same from the same.

Shape suffixes: T tokens, K top-k, L MoE layers, E experts, V rows of the token table, D devices.
"""

from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

SCALE: Final = 1 << 12
TOKEN_BYTES_MAX: Final = 256 << 20  # of the counts by token id; over it, ids share rows
TOKEN_RIDGE: Final = 4.0  # tokens: what has been seen so often is believed half
NEAR_RIDGE: Final = 30.0
SWEEPS: Final = 12  # of alternating between the token table and the others

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


@_jit
def _count(row_T, ids_LTK, token_LVE, seen_V, pair_LEE, near_LEE, far_LEE):  # type: ignore[no-untyped-def]
    num_layers, num_tokens, top_k = ids_LTK.shape
    num_experts = token_LVE.shape[2]
    with_context = pair_LEE.shape[1] > 0
    for t in range(num_tokens):
        v = row_T[t]
        seen_V[v] += 1.0
        for layer in range(num_layers):
            for k in range(top_k):
                e = ids_LTK[layer, t, k]
                if e < 0 or e >= num_experts:
                    continue
                token_LVE[layer, v, e] += 1.0
                if not with_context:
                    continue
                for j in range(top_k):
                    f = ids_LTK[layer, t, j]
                    if 0 <= f < num_experts:
                        pair_LEE[layer, f, e] += 1.0
                    if layer >= 1:
                        f = ids_LTK[layer - 1, t, j]
                        if 0 <= f < num_experts:
                            near_LEE[layer, f, e] += 1.0
                    if layer >= 2:
                        f = ids_LTK[layer - 2, t, j]
                        if 0 <= f < num_experts:
                            far_LEE[layer, f, e] += 1.0


@_jit
def _score(row_T, near_TK, far_TK, token_VE, near_EE, far_EE, score_TE):  # type: ignore[no-untyped-def]
    num_experts = score_TE.shape[1]
    for t in range(row_T.shape[0]):
        score_E = score_TE[t]
        token_E = token_VE[row_T[t]]
        for e in range(num_experts):
            score_E[e] = token_E[e]
        for k in range(near_TK.shape[1]):
            f = near_TK[t, k]
            if 0 <= f < num_experts:
                near_E = near_EE[f]
                for e in range(num_experts):
                    score_E[e] += near_E[e]
        for k in range(far_TK.shape[1]):
            f = far_TK[t, k]
            if 0 <= f < num_experts:
                far_E = far_EE[f]
                for e in range(num_experts):
                    score_E[e] += far_E[e]


@_jit
def _device_scores(score_TE, held_ED, scale, score_TD):  # type: ignore[no-untyped-def]
    for t in range(score_TE.shape[0]):
        for d in range(score_TD.shape[1]):
            score_TD[t, d] = 0
        for e in range(score_TE.shape[1]):
            chance = min(max(score_TE[t, e], 0), scale)
            if chance:
                for d in range(score_TD.shape[1]):
                    score_TD[t, d] += chance * held_ED[e, d]


class RoutingCounts:
    """What a predictor is fitted from. Not thread-safe.

    Args:
        vocab_size: of the model.
        token_bytes_max: of the counts by token id.
        context: count what layers choose together too; without, `fit` can use token ids alone.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        vocab_size: int,
        token_bytes_max: int = TOKEN_BYTES_MAX,
        context: bool = True,
    ) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        fitting = max(1, token_bytes_max // (4 * num_layers * num_experts))
        self.num_rows = min(vocab_size, fitting)
        square = (num_layers, *(2 * [num_experts if context else 0]))
        self.token_LVE = np.zeros((num_layers, self.num_rows, num_experts), np.float32)
        self.seen_V = np.zeros(self.num_rows)
        self.pair_LEE, self.near_LEE, self.far_LEE = (np.zeros(square) for _ in range(3))

    @property
    def num_tokens(self) -> float:
        """Tokens counted, decayed."""
        return float(self.seen_V.sum())

    def learn(
        self, token_T: NDArray[np.integer[Any]], experts_LTK: NDArray[np.integer[Any]]
    ) -> None:
        """Count tokens; negative experts are none."""
        shape = (self.num_layers, len(token_T), self.top_k)
        assert experts_LTK.shape == shape, f"experts {experts_LTK.shape}, not {shape}"
        row_T = token_T.astype(np.int64) % self.num_rows
        _count(
            row_T, experts_LTK.astype(np.int16), self.token_LVE, self.seen_V, self.pair_LEE,
            self.near_LEE, self.far_LEE,
        )  # fmt: skip

    def merge(self, other: "RoutingCounts") -> None:
        """Add another's counts, of the same shapes."""
        assert self.token_LVE.shape == other.token_LVE.shape, "counts of different models"
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            mine += theirs

    def decay(self, factor: float) -> None:
        """Multiply every count."""
        for counts in self._all():
            counts *= factor

    def _all(self) -> tuple[NDArray[Any], ...]:
        return (self.token_LVE, self.seen_V, self.pair_LEE, self.near_LEE, self.far_LEE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Which tables a predictor has: what is known of a token where it is asked."""

    token: bool = True
    layers: int = 1  # previous MoE layers, 0 to 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Scores experts; immutable. Layers without a previous one are scored by the rest."""

    top_k: int
    token_LVE: NDArray[np.int16]  # times SCALE; V = 1: the same for every token
    near_LEE: NDArray[np.int16]
    far_LEE: NDArray[np.int16]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.token_LVE.nbytes + self.near_LEE.nbytes + self.far_LEE.nbytes

    def scores(
        self,
        layer: int,
        token_T: NDArray[np.int64],
        previous_TK: NDArray[np.int64] | None = None,
        before_TK: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int32]:
        """[T, E]: chance that a token chooses an expert, times SCALE; may lie outside 0 to SCALE.

        Args:
            layer: MoE layer, counted from 0.
            previous_TK: experts that the MoE layer before chose; None where it is not known.
            before_TK: those of the one before that.
        """
        score_TE = np.empty((len(token_T), self.token_LVE.shape[2]), np.int32)
        none_T0 = np.empty((len(token_T), 0), np.int64)
        _score(
            token_T % self.token_LVE.shape[1],
            none_T0 if previous_TK is None else previous_TK,
            none_T0 if before_TK is None else before_TK,
            self.token_LVE[layer],
            self.near_LEE[layer],
            self.far_LEE[layer],
            score_TE,
        )
        return score_TE


def device_scores(score_TE: NDArray[np.int32], held_ED: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T, D]: pairs that a token is expected to have on each device, times SCALE.

    Args:
        held_ED: 1 where a device holds an expert; other weights (prices) work too.
    """
    score_TD = np.empty((len(score_TE), held_ED.shape[1]), np.int64)
    _device_scores(score_TE, held_ED, SCALE, score_TD)
    return score_TD


def top_experts(
    score_TE: NDArray[np.int32], top_k: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The k likeliest experts [T, K] in no order, and the expected share of hits [T]."""
    best_TK = np.argpartition(-score_TE, top_k - 1, axis=1)[:, :top_k]
    chance_TK = np.clip(np.take_along_axis(score_TE, best_TK, axis=1) / SCALE, 0.0, 1.0)
    return best_TK, chance_TK.mean(axis=1)


def fit(
    counts: RoutingCounts,
    use: Use | None = None,
    *,
    token_ridge: float = TOKEN_RIDGE,
    near_ridge: float = NEAR_RIDGE,
) -> Predictor:
    """The additive model of the counts.

    Token tables and the others are fitted in turns, each exactly for what the other leaves, until
    the sum of squares does not fall any more (`SWEEPS` at most).

    Args:
        token_ridge, near_ridge: tokens that the zero of each table counts for.
    """
    use = use or Use()
    assert use.layers == 0 or counts.pair_LEE.size, "counts without context"
    num_rows = counts.num_rows if use.token else 1
    square = (counts.num_layers, counts.num_experts, counts.num_experts)
    token_LVE = np.zeros((counts.num_layers, num_rows, counts.num_experts), np.int16)
    near_LEE, far_LEE = np.zeros(square, np.int16), np.zeros(square, np.int16)
    for layer in range(counts.num_layers):
        base_E, token_VE, context_PE = _fit_layer(counts, layer, use, token_ridge, near_ridge)
        token_LVE[layer] = _rounded(base_E + token_VE)
        parts = np.split(context_PE, max(1, min(use.layers, layer)))
        if use.layers >= 1 and layer >= 1:
            near_LEE[layer] = _rounded(parts[0])
        if use.layers >= 2 and layer >= 2:
            far_LEE[layer] = _rounded(parts[1])
    return Predictor(top_k=counts.top_k, token_LVE=token_LVE, near_LEE=near_LEE, far_LEE=far_LEE)


def _fit_layer(
    counts: RoutingCounts, layer: int, use: Use, token_ridge: float, near_ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Base rates [E], token table [V or 1, E] and context table [P, E] of one layer.

    P are the experts of the previous layers that are used, nearest first. Everything is centred:
    tables say how much more or less than the base rate.
    """
    seen_V = counts.seen_V
    total = max(float(seen_V.sum()), 1e-9)
    target_VE = counts.token_LVE[layer].astype(np.float64)
    base_E = target_VE.sum(axis=0) / total
    target_VE -= seen_V[:, None] * base_E
    depth = min(use.layers, layer)
    if depth == 0:
        table_VE = target_VE / (seen_V + token_ridge)[:, None]
        return base_E, table_VE if use.token else np.zeros((1, len(base_E))), np.zeros((0, 0))
    context_VP = np.concatenate(
        [counts.token_LVE[layer - 1 - d] for d in range(depth)], axis=1
    ).astype(np.float64)
    gram_PP, cross_PE = _context(counts, layer, depth)
    mean_P = context_VP.sum(axis=0) / total
    gram_PP = gram_PP - total * np.outer(mean_P, mean_P)
    cross_PE = cross_PE - total * np.outer(mean_P, base_E)
    solve = np.linalg.inv(gram_PP + near_ridge * np.eye(len(gram_PP)))
    if not use.token:
        table_PE = solve @ cross_PE
        return base_E - mean_P @ table_PE, np.zeros((1, len(base_E))), table_PE
    context_VP -= seen_V[:, None] * mean_P
    shrink_V1 = 1.0 / (seen_V + token_ridge)[:, None]
    token_VE = np.zeros_like(target_VE)
    table_PE = np.zeros_like(cross_PE)
    for _ in range(SWEEPS):
        before = table_PE
        table_PE = solve @ (cross_PE - context_VP.T @ token_VE)
        token_VE = shrink_V1 * (target_VE - context_VP @ table_PE)
        if np.abs(table_PE - before).max() < 0.5 / SCALE:
            break
    return base_E - mean_P @ table_PE, token_VE, table_PE


def _context(
    counts: RoutingCounts, layer: int, depth: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts of pairs within the previous layers' experts [P, P], and with this one's [P, E]."""
    if depth == 1:
        return counts.pair_LEE[layer - 1], counts.near_LEE[layer]
    between_EE = counts.near_LEE[layer - 1]  # from layer - 2 to layer - 1
    gram_PP = np.block(
        [
            [counts.pair_LEE[layer - 1], between_EE.T],
            [between_EE, counts.pair_LEE[layer - 2]],
        ]
    )
    return gram_PP, np.concatenate([counts.near_LEE[layer], counts.far_LEE[layer]])


def _rounded(table: NDArray[np.float64]) -> NDArray[np.int16]:
    limit = np.iinfo(np.int16).max
    return np.clip(np.rint(table * SCALE), -limit, limit).astype(np.int16)
