"""Which rank a row will want, guessed before its gate has run: what speculative shuffles sort by.

Two tables for each MoE layer, learned from the rows that the group itself has served: copies that a
rank saved for a *token id*, and for each *expert that the layer before chose* (the token-id table
and the two-layer table of arXiv 2503.04398, at device level and in fixed point). A row's score is
the sum of both. Taking the more confident of the two instead, as the paper has it, closed 0.73 of
the gap to an oracle where the sum closed 0.84 (benchmarks/notes/2026-11-28-token-shuffle.md).

All ranks of a group learn the same rows in the same order, and all arithmetic is on integers, so
they agree without a word. Old counts fade: a row of a table is halved when it is full.

Shape suffixes: T rows, K top-k, R ranks, V rows of the token table, E experts.
"""

from typing import Any, Final, Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from remora.comm.shuffle import SCALE

TABLE_ROWS_MAX: Final = 1 << 15  # token ids beyond share rows
SEEN_MAX: Final = 1024  # then a row of the token table is halved; experts: a thousand times as many
PRIOR: Final = 1  # rows that saved nothing, before the first: what was seen once is not certain

_jit: Any = numba.njit(cache=True, nogil=True, boundscheck=False)


class RowScores(Protocol):
    """A predictor. Every rank of a group must get the same answers from its own."""

    def scores(
        self, layer: int, token_ids_T: NDArray[np.int64], previous_TK: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        """[T, R]: the higher, the more copies rank r is expected to save for a row; |score| < 2^40.

        Args:
            layer: MoE layer, counted from 0.
            previous_TK: experts that the MoE layer before chose; None in the first.
        """

    def learn(
        self,
        layer: int,
        token_ids_T: NDArray[np.int64],
        previous_TK: NDArray[np.int64] | None,
        cost_TR: NDArray[np.int64],
    ) -> None:
        """Rows of a layer with what they cost each rank in truth (`shuffle.copy_costs`)."""

    def forget(self) -> None:
        """Start anew: ranks may have learned different rows, or prices have changed."""


@_jit
def _learn(rows_T, cost_TR, seen_max, saved_VR, seen_V):  # type: ignore[no-untyped-def]
    num_ranks = cost_TR.shape[1]
    for t in range(len(rows_T)):
        v = rows_T[t]
        if v < 0:
            continue
        if seen_V[v] >= seen_max:
            seen_V[v] //= 2
            for r in range(num_ranks):
                saved_VR[v, r] //= 2
        seen_V[v] += 1
        dearest = cost_TR[t].max()
        for r in range(num_ranks):
            saved_VR[v, r] += dearest - cost_TR[t, r]


@_jit
def _score(token_T, previous_TK, saved_VR, seen_V, saved_ER, seen_E, prior, scale, score_TR):  # type: ignore[no-untyped-def]  # fmt: skip
    num_rows, num_ranks = score_TR.shape
    top_k = previous_TK.shape[1]
    for t in range(num_rows):
        v = token_T[t]
        for r in range(num_ranks):
            score_TR[t, r] = scale * saved_VR[v, r] // (seen_V[v] + prior)
        for k in range(top_k):
            e = previous_TK[t, k]
            if e >= 0:
                for r in range(num_ranks):
                    score_TR[t, r] += scale * saved_ER[e, r] // ((seen_E[e] + prior) * top_k)


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
        self._saved_LVR = np.zeros((num_layers, self._num_rows, num_ranks), np.int32)
        self._seen_LV = np.zeros((num_layers, self._num_rows), np.int32)
        self._saved_LER = np.zeros((num_layers, num_experts, num_ranks), np.int64)
        self._seen_LE = np.zeros((num_layers, num_experts), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, touched or not."""
        tables = (self._saved_LVR, self._seen_LV, self._saved_LER, self._seen_LE)
        return sum(table.nbytes for table in tables)

    def scores(
        self, layer: int, token_ids_T: NDArray[np.int64], previous_TK: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        """See `RowScores`."""
        score_TR = np.empty((len(token_ids_T), self._shape[2]), np.int64)
        previous_TK = _nothing(token_ids_T) if previous_TK is None else previous_TK
        _score(
            token_ids_T % self._num_rows, previous_TK, self._saved_LVR[layer],
            self._seen_LV[layer], self._saved_LER[layer], self._seen_LE[layer], PRIOR, SCALE,
            score_TR,
        )  # fmt: skip
        return score_TR

    def learn(
        self,
        layer: int,
        token_ids_T: NDArray[np.int64],
        previous_TK: NDArray[np.int64] | None,
        cost_TR: NDArray[np.int64],
    ) -> None:
        """See `RowScores`."""
        rows_T = token_ids_T % self._num_rows
        _learn(rows_T, cost_TR, SEEN_MAX, self._saved_LVR[layer], self._seen_LV[layer])
        if previous_TK is not None:
            for k in range(previous_TK.shape[1]):
                column_T = np.ascontiguousarray(previous_TK[:, k])
                saved_ER, seen_E = self._saved_LER[layer], self._seen_LE[layer]
                _learn(column_T, cost_TR, 1000 * SEEN_MAX, saved_ER, seen_E)


def _nothing(token_ids_T: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.empty((len(token_ids_T), 0), np.int64)
