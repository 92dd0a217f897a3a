"""An expert shard's side of a MoE layer over NCCL: receives from all sources, computes, returns.

After an abort, what was enqueued behind the operation that never ended still runs, on whatever the
buffers hold by then. So indices that come from a peer lie in memory that was written with zeros
first: row 0 of a source that sends pairs exists, and expert 0 must do no harm where it is not held.

Shape suffixes: C capacity, K top-k, D model width, M rows of all sources, P pairs of all sources,
N sources, B rows of an answer, W words of meta.
"""

from typing import Protocol

import torch
from torch import Tensor

from remora.comm.errors import FencedError
from remora.comm.nccl_exact import starts
from remora.comm.nccl_link import Link
from remora.comm.nccl_pack import ShardBuffers
from remora.comm.nccl_plan import COUNT_WORDS, DecodeShape, Part, phase


class DeviceExperts(Protocol):
    """A shard's experts, as the exchange calls them. Rows and outputs are on the device.

    A pair whose expert is not held must be harmless, whatever comes out for it: it happens in a
    step that was aborted, and only there.
    """

    def masked(
        self,
        layer: int,
        rows_MD: Tensor,
        expert_MK: Tensor,
        weight_MK: Tensor,
        out_BD: Tensor,
        *,
        presummed: bool,
    ) -> None:
        """Decode: fixed sizes, int32 experts, -1 = none; no sync, no allocation outside a pool.

        Presummed: B = M, the weighted float32 sum of a row's pairs in K order. Else B = M K, each
        pair's output, unweighted. Rows of `out_BD` without a pair may hold anything.
        """

    def exact(
        self,
        layer: int,
        rows_MD: Tensor,
        row_P: Tensor,
        expert_P: Tensor,
        weight_P: Tensor,
        *,
        presummed: bool,
    ) -> Tensor:
        """[M, D] presummed, in pair order, else [P, D]; int32 rows and experts, float32 weights."""


class ShardExchange:
    """An expert shard's side. Each call answers all sources of the generation at once.

    Args:
        link: its communicator.
        shape: sizes of decode, for one bucket.
        dtype: of rows.
        experts: computes.
        deadline_s: until the counts of an exact layer are there.
    """

    def __init__(
        self,
        link: Link,
        shape: DecodeShape,
        *,
        dtype: torch.dtype,
        experts: DeviceExperts,
        deadline_s: float = 30.0,
    ) -> None:
        self._link = link
        self.shape = shape
        self._dtype = dtype
        self._experts = experts
        self._deadline_s = deadline_s
        self._at = link.device.torch_device
        roster = link.roster
        self.buffers = ShardBuffers(
            shape,
            dtype=dtype,
            device=self._at,
            tag=roster.tag,
            shard=link.rank - roster.num_sources,
        )
        link.watch_fault(self.buffers.fault_1)
        self._peers = roster.partners(link.rank)
        self._tensors: dict[tuple[Part, int], Tensor] = {}
        for peer in self._peers:
            self._tensors["rows", peer] = self.buffers.rows_of(peer)
            self._tensors["meta", peer] = self.buffers.meta_NW[peer]
            self._tensors["back", peer] = self.buffers.back_of(peer)
        self._in = tuple(phase(roster, link.rank, ("rows", "meta"), to_shards=True))
        self._back = tuple(phase(roster, link.rank, ("back",), to_shards=False))
        self._counts = tuple(phase(roster, link.rank, ("counts",), to_shards=True))

    def decode(self, layer: int) -> None:
        """Enqueues one layer at fixed sizes; may be captured in a graph."""
        buffers = self.buffers
        self._link.run(self._in, self._tensors)
        buffers.unpack(layer)
        self._experts.masked(
            layer, buffers.rows_MD, buffers.expert_MK, buffers.weight_MK, buffers.back_BD,
            presummed=self.shape.presummed,
        )  # fmt: skip
        self._link.run(self._back, self._tensors)

    def exact(self, layer: int) -> None:
        """One layer with exact counts; waits for them.

        Raises:
            PeerLostError, DeadlineError: as `Link.wait`.
            FencedError: a source is at another layer or generation.
        """
        link, shape, at = self._link, self.shape, self._at
        counts_N4 = torch.zeros(len(self._peers), COUNT_WORDS, dtype=torch.int32, device=at)
        tensors: dict[tuple[Part, int], Tensor] = {}
        for peer in self._peers:
            tensors["counts", peer] = counts_N4[peer]
        link.run(self._counts, tensors)
        link.wait(self._deadline_s)
        counts = counts_N4.tolist()
        for peer, (_, _, *of) in zip(self._peers, counts, strict=True):
            if of != [layer, link.roster.tag]:
                why = f"{link.roster.uids[peer]} is at {of}, we at layer {layer}"
                link.abort(why)
                raise FencedError(why)
        rows_N, pairs_N = ([count[i] for count in counts] for i in (0, 1))
        rows_MD = torch.empty(sum(rows_N), shape.width, dtype=self._dtype, device=at)
        meta_W = torch.zeros(3 * sum(pairs_N), dtype=torch.int32, device=at)  # see the top
        sizes_W = [3 * pairs for pairs in pairs_N]
        for peer, row, num, word, words in zip(
            self._peers, starts(rows_N), rows_N, starts(sizes_W), sizes_W, strict=True
        ):
            tensors["rows", peer] = rows_MD[row : row + num]
            tensors["meta", peer] = meta_W[word : word + words]
        link.run(self._in, tensors)
        columns = [tensors["meta", peer].view(3, -1) for peer in self._peers]
        row_P = torch.cat([c[0] + row for c, row in zip(columns, starts(rows_N), strict=True)])
        expert_P, weight_P = (torch.cat([c[i] for c in columns]) for i in (1, 2))
        back_BD = self._experts.exact(
            layer, rows_MD, row_P, expert_P, weight_P.view(torch.float32),
            presummed=shape.presummed,
        )  # fmt: skip
        back_N = rows_N if shape.presummed else pairs_N
        for peer, start, size in zip(self._peers, starts(back_N), back_N, strict=True):
            tensors["back", peer] = back_BD[start : start + size]
        link.run(self._back, tensors)
