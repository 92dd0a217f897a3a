"""A dense rank's side of a MoE layer over NCCL.

    source.decode(layer, hidden_CD, index_CK, weight_CK, out_CD)   # fixed sizes, capturable
    rows = source.exact(layer, hidden_TD, index_TK, weight_TK, num_tokens)
    link.finish(deadline_s)          # at the step's end: waits, polls, raises what went wrong

Shape suffixes: T tokens, C capacity, K top-k, D model width, E experts, M rows, S shards.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.comm.nccl_exact import plan_source, starts
from remora.comm.nccl_link import Link
from remora.comm.nccl_pack import SourceBuffers
from remora.comm.nccl_plan import DecodeShape, Part, phase


class SourceExchange:
    """A dense rank's side.

    Args:
        link: its communicator.
        shape: sizes of decode, for one bucket.
        dtype: of rows.
        home_tables: layer -> int64 [E + 1] (`nccl_plan.home_shards`), for decode.
        replica_tables: layer -> int16 [E, R] (`replicas.replica_tables`), for exact.
        local_S: 1 for shards on this host.
        deadline_s: until the layer before an exact one is over.
    """

    def __init__(
        self,
        link: Link,
        shape: DecodeShape,
        *,
        dtype: torch.dtype,
        home_tables: Mapping[int, NDArray[np.int64]],
        replica_tables: Mapping[int, NDArray[np.int16]],
        local_S: NDArray[np.uint8],
        deadline_s: float = 30.0,
    ) -> None:
        self._link = link
        self._deadline_s = deadline_s
        self.shape = shape
        self._dtype = dtype
        self._at = link.device.torch_device
        self.home_tables = {i: torch.from_numpy(h).to(self._at) for i, h in home_tables.items()}
        self._replicas = dict(replica_tables)
        self._local_S = local_S
        roster = link.roster
        self.buffers = SourceBuffers(shape, dtype=dtype, device=self._at, tag=roster.tag)
        self._peers = roster.partners(link.rank)
        self._tensors: dict[tuple[Part, int], Tensor] = {}
        for shard, peer in enumerate(self._peers):
            self._tensors["rows", peer] = self.buffers.rows_CD
            self._tensors["meta", peer] = self.buffers.meta_W
            self._tensors["back", peer] = self.buffers.back_of(shard)
        self._out = tuple(phase(roster, link.rank, ("rows", "meta"), to_shards=True))
        self._back = tuple(phase(roster, link.rank, ("back",), to_shards=False))
        self._counts = tuple(phase(roster, link.rank, ("counts",), to_shards=True))

    def decode(
        self, layer: int, hidden_CD: Tensor, index_CK: Tensor, weight_CK: Tensor, out_CD: Tensor
    ) -> None:
        """Enqueues one layer at fixed sizes; may be captured in a graph.

        Args:
            layer: decoder layer.
            hidden_CD: rows, padded to the capacity.
            index_CK: int64 logical experts; negative = none, as in all of a padding row.
            weight_CK: float32.
            out_CD: written, dtype of the rows; zeros where a row has no expert.
        """
        self.buffers.pack(layer, self.home_tables[layer], hidden_CD, index_CK, weight_CK)
        self._link.run(self._out, self._tensors)
        self._link.run(self._back, self._tensors)
        self.buffers.combine(out_CD)

    def exact(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, num_tokens: int
    ) -> Tensor:
        """One layer with exact counts. The host reads `index_TK`; not for capture.

        Such a read synchronises the stream, and so does a copy from the host. Behind an operation
        whose peer is gone that would never end, and nobody could abort: so what came before is
        waited for first, and nothing is copied behind what is enqueued here.

        Returns:
            [T, D] of the rows' dtype, zeros from `num_tokens` on.

        Raises:
            PeerLostError, DeadlineError: as `Link.wait`; an expert without a replica.
        """
        self._link.wait(self._deadline_s)
        made = plan_source(
            index_TK.cpu().numpy(), weight_TK.float().cpu().numpy(), num_tokens,
            self._replicas[layer], self._local_S, presummed=self.shape.presummed,
        )  # fmt: skip
        link, tag = self._link, self._link.roster.tag
        rows_MD = hidden_TD.index_select(0, torch.from_numpy(made.token_M).to(self._at))
        meta_W = torch.from_numpy(made.meta_W).to(self._at)
        back_BD = hidden_TD.new_zeros(made.num_back + 1, hidden_TD.shape[1])
        counts_S = [
            [rows, pairs, layer, tag] for rows, pairs in zip(made.rows_S, made.pairs_S, strict=True)
        ]
        counts = torch.tensor(counts_S, dtype=torch.int32).to(self._at)
        place_KT = torch.from_numpy(np.ascontiguousarray(made.place_TK.T)).to(self._at)
        gain_KT = torch.from_numpy(np.ascontiguousarray(made.gain_TK.T)).to(self._at)
        back_S = made.rows_S if self.shape.presummed else made.pairs_S
        tensors: dict[tuple[Part, int], Tensor] = {}
        for shard, peer in enumerate(self._peers):
            tensors["counts", peer] = counts[shard]
        for part, whole, sizes in (
            ("rows", rows_MD, made.rows_S),
            ("meta", meta_W, [3 * pairs for pairs in made.pairs_S]),
            ("back", back_BD, back_S),
        ):
            for peer, start, size in zip(self._peers, starts(sizes), sizes, strict=True):
                tensors[part, peer] = whole[start : start + size]  # type: ignore[index]
        for ops in (self._counts, self._out, self._back):
            link.run(ops, tensors)
        sum_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=self._at)
        for place_T, gain_T in zip(place_KT, gain_KT, strict=True):
            sum_TD += back_BD.index_select(0, place_T).float() * gain_T[:, None]
        return sum_TD.to(hidden_TD.dtype)
