"""Routed experts of a step that several ranks compute: each rank asks for a slice of the rows.

Before a layer's experts either every rank has all rows and routes them alike, then the slices are
runs of them or what `TokenShuffle` makes of their bundles; or the layer divides its rows before its
gate (`shuffle_surgery.py`), then a rank has its slice only. Legend: T token rows of the step
(padding included), D model width, K top-k.
"""

import torch
from torch import Tensor

from remora.actors.step_context import ExpertsFn
from remora.actors.tp_shuffle import TokenShuffle
from remora.comm.collectives import Group, part_of
from remora.comm.slices import gather_slices


class SplitExperts:
    """The experts callable of one rank (`step_context.ExpertsFn`).

    Args:
        experts: answers this rank's rows, over connections of its own.
        group: the ranks.
        shuffle: of the same group; None: slices are runs.
    """

    def __init__(
        self, experts: ExpertsFn, group: Group, shuffle: TokenShuffle | None = None
    ) -> None:
        self._experts = experts
        self._group = group
        self._shuffle = shuffle

    def __call__(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Tensor:
        """As `ExpertsFn`; rows of other ranks come from them, unless the rows are a slice."""
        self._group.settle()  # the rows are read by this host
        if self._shuffle is not None and self._shuffle.is_open:
            num_own = self._shuffle.note_slice(index_TK)
            return self._experts(layer, hidden_TD, index_TK, weights_TK, num_own)
        begin, end = part_of(self._group.rank, self._group.size, num_tokens)
        order_T = None
        if self._shuffle is not None:
            order_T = self._shuffle.exact_order(layer, index_TK[:num_tokens], begin, end)
        mine = slice(begin, end) if order_T is None else order_T[begin:end]
        rows = hidden_TD[mine]
        if begin < end:
            rows = self._experts(layer, rows, index_TK[mine], weights_TK[mine], end - begin)
        if order_T is not None:
            return gather_slices(rows, order_T, len(hidden_TD), self._group)
        gathered_ND = self._group.gather_rows(rows, num_tokens)
        if num_tokens == hidden_TD.shape[0]:
            return gathered_ND
        out_TD = torch.zeros_like(hidden_TD)
        out_TD[:num_tokens] = gathered_ND
        return out_TD
