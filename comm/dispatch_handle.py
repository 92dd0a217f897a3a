"""`Dispatch`: what has left a dense rank and is not combined yet.

Shape suffixes: T tokens (padding included), K top-k, D model width, C calls.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.comm.arena import Memory
from remora.comm.call import Call
from remora.comm.choice import PENDING
from remora.comm.errors import ClusterError

_NO_CALLS_C = np.zeros(0, np.int32)
_NO_ADDRESSES_C = np.zeros(0, np.int64)


@dataclass(slots=True, kw_only=True)
class Dispatch:
    """Rows leaving one dense rank for the shards their tokens chose; `combine` consumes it."""

    epoch: int  # placement they were routed under
    layer: int  # decoder-layer index
    num_tokens: int  # rows of hidden_TD that are real
    hidden_TD: Tensor  # kept for retries
    width: int  # D
    row_bytes: int
    index_TK: NDArray[np.int64]
    weight_TK: NDArray[np.float32]
    plan_3TK: NDArray[np.int32]  # the three below
    call_TK: NDArray[np.int32] = field(init=False)  # call of each pair, or PENDING, SKIPPED
    row_TK: NDArray[np.int32] = field(init=False)  # its row in that call
    pos_TK: NDArray[np.int32] = field(init=False)  # its pair position in that call
    call_shard_C: NDArray[np.int32] = field(default_factory=lambda: _NO_CALLS_C)
    call_rows_C: NDArray[np.int32] = field(default_factory=lambda: _NO_CALLS_C)
    call_pairs_C: NDArray[np.int32] = field(default_factory=lambda: _NO_CALLS_C)
    reply_address_C: NDArray[np.int64] = field(default_factory=lambda: _NO_ADDRESSES_C)
    num_calls: int = 0  # laid out; <= C
    num_sent: int = 0  # of those, sent: the rest waits for credits
    waiting: list[tuple[int, Call]] = field(default_factory=list)
    answered: list[tuple[int, Call]] = field(default_factory=list)  # their rows lie in regions
    spilled: list[Memory] = field(default_factory=list)  # rows copied out to free credits
    failed: list[int] = field(default_factory=list)  # calls whose pairs need another shard
    error: ClusterError | None = None  # why the last of `failed` failed
    held_s: float = 0.0  # waited for replicas so far
    until_s: float | None = None  # monotonic: a wait for `waiting` that began elsewhere ends there

    def __post_init__(self) -> None:
        self.call_TK, self.row_TK, self.pos_TK = self.plan_3TK

    @classmethod
    def of(
        cls,
        epoch: int,
        layer: int,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
    ) -> "Dispatch":
        """One with every pair PENDING; arguments as `Dispatcher.dispatch`."""
        plan_3TK = np.empty((3, *index_TK.shape), np.int32)
        plan_3TK[0] = PENDING
        if weights_TK.dtype is not torch.float32:
            weights_TK = weights_TK.float()
        return cls(
            epoch=epoch,
            layer=layer,
            num_tokens=num_tokens,
            hidden_TD=hidden_TD.contiguous(),
            width=hidden_TD.shape[1],
            row_bytes=hidden_TD.shape[1] * hidden_TD.element_size(),
            index_TK=index_TK.contiguous().numpy(),
            weight_TK=weights_TK.contiguous().numpy(),
            plan_3TK=plan_3TK,
        )

    def reserve_calls(self, num_calls_max: int) -> None:
        """Makes the arrays over C long enough; keeps what they hold."""
        count = self.num_calls
        call_3C = np.zeros((3, num_calls_max), np.int32)
        address_C = np.zeros(num_calls_max, np.int64)
        if count:
            call_3C[0, :count] = self.call_shard_C[:count]
            call_3C[1, :count] = self.call_rows_C[:count]
            call_3C[2, :count] = self.call_pairs_C[:count]
            address_C[:count] = self.reply_address_C[:count]
        self.call_shard_C, self.call_rows_C, self.call_pairs_C = call_3C
        self.reply_address_C = address_C

    def release(self) -> None:
        """Gives every region back; calls under way are given up."""
        for _, call in self.waiting + self.answered:
            call.release()
        self.waiting.clear()
        self.answered.clear()
        self.spilled.clear()
