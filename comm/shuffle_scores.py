"""Which rank a row will want, guessed before its gate has run: what speculative shuffles sort by.

For each MoE layer one additive model of the copies that a rank saves for a row,

    score[r] = token[id][r] + sum over f in the row's bundle of the MoE layer before   of near[f][r]
                            + sum over g in its bundle of the one before that          of far[g][r]

as `comm/predict.py` has it for experts, learned from the rows that the group itself serves by the
delta rule (Widrow and Hoff, IRE WESCON 1960): each table moves towards what all of them together
miss. All ranks of a group learn the same rows in the same order, and all arithmetic is on integers,
so they agree without a word. That is why `predict.fit` is not used, which guesses better: it is
linear algebra in floating point, which processors of two kinds round differently, and takes seconds
of a core. Figures of both, and of two tables that do not know of each other (arXiv 2503.04398):
benchmarks/notes/2026-11-28-token-shuffle.md.

Steps get smaller with the rows seen, to a bound, so that what is learned follows the traffic.

Shape suffixes: T rows, K top-k, R ranks, V rows of the token table, E experts, C context entries.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numba
import numpy as np
from numpy.typing import NDArray

TABLE_ROWS_MAX: Final = 1 << 15  # token ids beyond share rows
SCALE: Final = 1 << 16  # fixed point: a score of one saved copy at price 1
LAYERS_BEFORE: Final = 2
TOKEN_PRIOR: Final = 4  # a token table takes 1 / (rows of its id + this) of what is missed,
TOKEN_ROWS_MAX: Final = 256  # at least 1 / this
CONTEXT_FIRST: Final = 50  # the others 1 / (this + rows of the layer / CONTEXT_ROWS),
CONTEXT_ROWS: Final = 40
CONTEXT_MAX: Final = 2000  # at least 1 / this

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


class RowScores(Protocol):
    """A predictor. Every rank of a group must get the same answers from its own."""

    def scores(
        self, layer: int, token_ids_T: NDArray[np.int64], before: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """[T, R]: the higher, the more copies rank r is expected to save for a row; |score| < 2^40.

        Args:
            layer: MoE layer, counted from 0.
            before: [T, K] experts that the MoE layers before chose, nearest first, LAYERS_BEFORE
                at most; negative = none.
        """

    def learn(
        self,
        layer: int,
        token_ids_T: NDArray[np.int64],
        before: Sequence[NDArray[np.int64]],
        cost_TR: NDArray[np.int64],
    ) -> None:
        """Rows of a layer with what they cost each rank in truth (`shuffle.copy_costs`)."""

    def forget(self) -> None:
        """Start anew: ranks may have learned different rows, or prices have changed."""


@_jit
def _score(row_T, context_TC, token_VR, context_CR, score_TR):  # type: ignore[no-untyped-def]
    for t in range(score_TR.shape[0]):
        for r in range(score_TR.shape[1]):
            score_TR[t, r] = token_VR[row_T[t], r]
            for c in range(context_TC.shape[1]):
                if context_TC[t, c] >= 0:
                    score_TR[t, r] += context_CR[context_TC[t, c], r]


@_jit
def _learn(row_T, context_TC, cost_TR, scale, limits, token_VR, seen_V, context_CR, seen_1):  # type: ignore[no-untyped-def]  # fmt: skip
    prior, rows_max, first, every, most = limits
    num_ranks = cost_TR.shape[1]
    for t in range(len(row_T)):
        v = row_T[t]
        seen_V[v] = min(seen_V[v] + 1, rows_max)
        token_part = min(seen_V[v] + prior, rows_max)
        context_part = min(first + seen_1[0] // every, most)
        seen_1[0] += 1
        dearest = cost_TR[t].max()
        for r in range(num_ranks):
            missed = scale * (dearest - cost_TR[t, r]) - token_VR[v, r]
            for c in range(context_TC.shape[1]):
                if context_TC[t, c] >= 0:
                    missed -= context_CR[context_TC[t, c], r]
            token_VR[v, r] += (missed + token_part // 2) // token_part
            for c in range(context_TC.shape[1]):
                if context_TC[t, c] >= 0:
                    context_CR[context_TC[t, c], r] += (missed + context_part // 2) // context_part


_LIMITS: Final = (TOKEN_PRIOR, TOKEN_ROWS_MAX, CONTEXT_FIRST, CONTEXT_ROWS, CONTEXT_MAX)


class OnlineScores:
    """`RowScores` learned from what has been served; knows nothing at first and scores zeros.

    Args:
        num_layers: MoE layers.
        num_experts: of one layer.
        num_ranks: of the group.
        vocab_size: of the model.
    """

    def __init__(
        self, *, num_layers: int, num_experts: int, num_ranks: int, vocab_size: int
    ) -> None:
        self._num_rows = min(vocab_size, TABLE_ROWS_MAX)
        self._shape = (num_layers, num_experts, num_ranks)
        self.forget()

    def forget(self) -> None:
        """See `RowScores`."""
        num_layers, num_experts, num_ranks = self._shape
        self._token_LVR = np.zeros((num_layers, self._num_rows, num_ranks), np.int32)
        self._seen_LV = np.zeros((num_layers, self._num_rows), np.int32)
        num_entries = LAYERS_BEFORE * num_experts
        self._context_LCR = np.zeros((num_layers, num_entries, num_ranks), np.int64)
        self._seen_L1 = np.zeros((num_layers, 1), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, touched or not."""
        tables = (self._token_LVR, self._seen_LV, self._context_LCR, self._seen_L1)
        return sum(table.nbytes for table in tables)

    def scores(
        self, layer: int, token_ids_T: NDArray[np.int64], before: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """See `RowScores`."""
        score_TR = np.empty((len(token_ids_T), self._shape[2]), np.int64)
        _score(
            token_ids_T % self._num_rows, self._context(token_ids_T, before),
            self._token_LVR[layer], self._context_LCR[layer], score_TR,
        )  # fmt: skip
        return score_TR

    def learn(
        self,
        layer: int,
        token_ids_T: NDArray[np.int64],
        before: Sequence[NDArray[np.int64]],
        cost_TR: NDArray[np.int64],
    ) -> None:
        """See `RowScores`."""
        _learn(
            token_ids_T % self._num_rows, self._context(token_ids_T, before), cost_TR, SCALE,
            _LIMITS, self._token_LVR[layer], self._seen_LV[layer], self._context_LCR[layer],
            self._seen_L1[layer],
        )  # fmt: skip

    def _context(
        self, token_ids_T: NDArray[np.int64], before: Sequence[NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """[T, C] rows of the context table: those of the second layer stand behind the first's."""
        if not before:
            return np.empty((len(token_ids_T), 0), np.int64)
        parts = [
            np.where(index_TK >= 0, index_TK + depth * self._shape[1], -1)
            for depth, index_TK in enumerate(before[:LAYERS_BEFORE])
        ]
        return np.concatenate(parts, axis=1)


def warm() -> None:
    """Compiles what `OnlineScores` computes with (2 s once on a machine, then from a cache)."""
    scores = OnlineScores(num_layers=1, num_experts=1, num_ranks=1, vocab_size=1)
    token_T, before = np.zeros(1, np.int64), [np.zeros((1, 1), np.int64)]
    scores.learn(0, token_T, before, scores.scores(0, token_T, before))
