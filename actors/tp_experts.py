"""Routed experts of a step that several ranks compute: each rank asks for its run of the rows.

Every rank has all rows and routes them alike. Legend: T token rows of the step (padding included),
D model width, K top-k.
"""

import torch
from torch import Tensor

from remora.actors.step_context import ExpertsFn
from remora.comm.collectives import Group, part_of


class SplitExperts:
    """The experts callable of one rank (`step_context.ExpertsFn`).

    Args:
        experts: answers this rank's rows, over connections of its own.
        group: the ranks.
    """

    def __init__(self, experts: ExpertsFn, group: Group) -> None:
        self._experts = experts
        self._group = group

    def __call__(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, num_tokens: int
    ) -> Tensor:
        """As `ExpertsFn`; rows of other ranks come from them."""
        self._group.settle()  # the rows are read by this host
        begin, end = part_of(self._group.rank, self._group.size, num_tokens)
        mine = slice(begin, end)
        if begin < end:
            rows = self._experts(
                layer, hidden_TD[mine], index_TK[mine], weights_TK[mine], end - begin
            )
        else:
            rows = hidden_TD[mine]
        gathered_ND = self._group.gather_rows(rows, num_tokens)
        if num_tokens == hidden_TD.shape[0]:
            return gathered_ND
        out_TD = torch.zeros_like(hidden_TD)
        out_TD[:num_tokens] = gathered_ND
        return out_TD
