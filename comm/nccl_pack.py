"""Decode messages on the device: static buffers, written and read without allocating or syncing.

Every line here may be captured in a CUDA graph: sizes are those of a `DecodeShape`, each operation
writes into a buffer made beforehand, and nothing is read by the host. What to skip is masked: an
expert of -1 is none, a masked pair adds the zero row.

Shape suffixes: C capacity, K top-k, D model width, E experts, N sources, M = N C rows at a shard,
S shards, W words of a message's meta.
"""

import torch
from torch import Tensor

from remora.comm.nccl_plan import HEADER_WORDS, DecodeShape


class SourceBuffers:
    """What a dense rank sends and gets back in decode, for one bucket.

    Args:
        shape: sizes.
        dtype: of rows.
        device: where.
        tag: of the generation (`Roster.tag`), written into every message, so that a shard can tell
            a stray one.
    """

    def __init__(
        self, shape: DecodeShape, *, dtype: torch.dtype, device: torch.device, tag: int
    ) -> None:
        self.shape = shape
        c, k, d, s = shape.capacity, shape.top_k, shape.width, shape.num_shards

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.rows_CD = zeros(c, d, dtype=dtype)
        self.meta_W = zeros(shape.meta_words, dtype=torch.int32)
        self.meta_W[0] = tag
        self.back_BD = zeros(s * shape.back_rows + 1, d, dtype=dtype)  # the last row stays zero
        columns = self.meta_W[HEADER_WORDS:].view(3, c, k)
        self._expert_CK, self._shard_CK = columns[0], columns[1]
        self._weight_CK = columns[2].view(torch.float32)
        self._choice_CK = zeros(c, k, dtype=torch.int64)
        self._safe_CK = zeros(c, k, dtype=torch.int64)
        self._none_CK = zeros(c, k, dtype=torch.bool)
        self._again_CK = zeros(c, k, dtype=torch.bool)
        self._same_CKK = zeros(c, k, k, dtype=torch.bool)
        self._before_KK = torch.ones(k, k, dtype=torch.bool, device=device).tril(-1)
        self._place_CK = zeros(c, k, dtype=torch.int64)
        self._place_KC = zeros(k, c, dtype=torch.int64)
        self._gain_KC1 = zeros(k, c, 1, dtype=torch.float32)
        first = torch.arange(c, device=device)[:, None]
        lane = torch.zeros(1, k, dtype=torch.int64, device=device)
        if not shape.presummed:
            first, lane = first * k, torch.arange(k, device=device)[None]
        self._own_CK = (first + lane).contiguous()  # where a pair's row lies in a shard's answer
        self._row_CD = zeros(c, d, dtype=dtype)
        self._term_CD = zeros(c, d, dtype=torch.float32)
        self._sum_CD = zeros(c, d, dtype=torch.float32)

    def back_of(self, shard: int) -> Tensor:
        """Where shard number `shard`'s answer lands: [C or C K, D]."""
        rows = self.shape.back_rows
        return self.back_BD[shard * rows : (shard + 1) * rows]

    def pack(
        self, layer: int, home_E: Tensor, hidden_CD: Tensor, index_CK: Tensor, weight_CK: Tensor
    ) -> None:
        """Writes the message, and where in the answers each pair's row will be.

        Args:
            layer: decoder layer.
            home_E: int64 [E + 1], shard of each expert, S for none (`nccl_plan.home_shards`).
            hidden_CD: rows.
            index_CK: int64 logical experts, negative = none (padding rows have none).
            weight_CK: float32.
        """
        shape = self.shape
        self.meta_W[1].fill_(layer)
        self.rows_CD.copy_(hidden_CD)
        self._expert_CK.copy_(index_CK)
        self._weight_CK.copy_(weight_CK)
        torch.lt(index_CK, 0, out=self._none_CK)
        self._safe_CK.copy_(index_CK)
        self._safe_CK.masked_fill_(self._none_CK, shape.num_experts)
        torch.index_select(home_E, 0, self._safe_CK.view(-1), out=self._choice_CK.view(-1))
        self._shard_CK.copy_(self._choice_CK)
        if shape.presummed:  # one row of a shard stands for all its pairs: the first takes it
            torch.eq(
                self._choice_CK[:, :, None], self._choice_CK[:, None, :], out=self._same_CKK
            ).logical_and_(self._before_KK)
            self._none_CK.logical_or_(torch.any(self._same_CKK, 2, out=self._again_CK))
        torch.mul(self._choice_CK, shape.back_rows, out=self._place_CK)
        self._place_CK.add_(self._own_CK)
        self._place_CK.masked_fill_(self._none_CK, self.back_BD.shape[0] - 1)
        self._place_KC.copy_(self._place_CK.t())
        gain_KC = self._gain_KC1[:, :, 0]
        if shape.presummed:
            gain_KC.fill_(1.0)
        else:
            gain_KC.copy_(weight_CK.t())
        gain_KC.masked_fill_(self._none_CK.t(), 0.0)

    def combine(self, out_CD: Tensor) -> None:
        """Sums the answers' rows in float32 in top-k order, one rounding at the end."""
        self._sum_CD.zero_()
        for place_C, gain_C1 in zip(self._place_KC, self._gain_KC1, strict=True):
            torch.index_select(self.back_BD, 0, place_C, out=self._row_CD)
            self._term_CD.copy_(self._row_CD)
            self._term_CD.mul_(gain_C1)
            self._sum_CD.add_(self._term_CD)
        out_CD.copy_(self._sum_CD)


class ShardBuffers:
    """What an expert shard receives and returns in decode, for one bucket.

    Attributes:
        rows_MD: all sources' rows, one source after the other.
        expert_MK: int32, the pairs that chose this shard; -1 elsewhere.
        weight_MK: float32, of those pairs.
        back_BD: where the experts' outputs go: [M, D] presummed, else [M K, D].
        fault_1: int32, nonzero when a message was of another generation or layer.
    """

    def __init__(
        self,
        shape: DecodeShape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tag: int,
        shard: int,
    ) -> None:
        self.shape = shape
        self._tag = tag
        self._shard = shard
        n, c, k, d = shape.num_sources, shape.capacity, shape.top_k, shape.width

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.rows_MD = zeros(n * c, d, dtype=dtype)
        self.meta_NW = zeros(n, shape.meta_words, dtype=torch.int32)
        self.expert_MK = zeros(n * c, k, dtype=torch.int32)
        self.weight_MK = zeros(n * c, k, dtype=torch.float32)
        self.back_BD = zeros(n * shape.back_rows, d, dtype=dtype)
        self.fault_1 = zeros(1, dtype=torch.int32)
        columns = self.meta_NW[:, HEADER_WORDS:].unflatten(1, (3, c, k))
        self._sent_NCK, self._choice_NCK = columns[:, 0], columns[:, 1]
        self._weight_NCK = self.meta_NW.view(torch.float32)[:, HEADER_WORDS:].unflatten(
            1, (3, c, k)
        )[:, 2]
        self._other_NCK = zeros(n, c, k, dtype=torch.bool)
        self._stray_N = zeros(n, dtype=torch.bool)
        self._any_1 = zeros(1, dtype=torch.bool)

    def rows_of(self, source: int) -> Tensor:
        """Where source number `source`'s rows land: [C, D]."""
        c = self.shape.capacity
        return self.rows_MD[source * c : (source + 1) * c]

    def back_of(self, source: int) -> Tensor:
        """What goes back to source number `source`: [C or C K, D]."""
        rows = self.shape.back_rows
        return self.back_BD[source * rows : (source + 1) * rows]

    def unpack(self, layer: int) -> None:
        """Masks the pairs that other shards compute, and notes messages that are not expected."""
        torch.ne(self._choice_NCK, self._shard, out=self._other_NCK)
        expert_NCK = self.expert_MK.view(self._other_NCK.shape)
        expert_NCK.copy_(self._sent_NCK)
        expert_NCK.masked_fill_(self._other_NCK, -1)
        self.weight_MK.view(self._other_NCK.shape).copy_(self._weight_NCK)
        for word, value in ((0, self._tag), (1, layer)):
            torch.ne(self.meta_NW[:, word], value, out=self._stray_N)
            torch.any(self._stray_N, 0, keepdim=True, out=self._any_1)
            self.fault_1.add_(self._any_1)
