"""An expert shard's end of dispatch and combine: `ExpertService` is a `FrameServer` handler.

    service = ExpertService(compute=shard.compute, incarnation=7)
    server = FrameServer(
        host_ip=..., token=..., incarnation=7, on_frame=service.on_frame, pump=service.pump
    )

Shape suffixes: N rows received, P pairs (row, expert), D model width, M rows back (N or P).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remora.comm.arena import Memory
from remora.comm.connection import Connection, Frame
from remora.comm.errors import ClusterError, FrameError
from remora.comm.limits import TOP_K_MAX
from remora.comm.native import native_extension
from remora.comm.native_pump import NativeCompute, NativePump
from remora.comm.wire import (
    ERROR_TEXT_BYTES_MAX,
    HEADER_BYTES,
    ITEM_BYTES,
    ErrorCode,
    Flag,
    Header,
    Kind,
    combined_rows,
    dispatch_bytes,
    pairs_offset,
)

log = logging.getLogger(__name__)


class NotMineError(ClusterError):
    """This shard does not hold these logical experts of the layer; the requester looks again."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(f"experts not held: {list(experts)[:16]}")
        self.experts = tuple(experts)


class BadCallError(ClusterError):
    """A call whose content cannot be; the text goes back to the requester."""


@dataclass(slots=True)
class ExpertCall:
    """One DISPATCH. Tensors are zero-copy views (of the requester's arena, or of the receive
    memory) and are **valid until `compute` returns**: copy what must live longer. Pairs are never
    in the arena: what they say was checked.

    Pairs are sorted by (expert, row); no (row, expert) occurs twice.
    """

    epoch: int  # placement the requester routed under
    layer: int  # decoder-layer index
    presummed: bool  # one row back per row: sum of weight * output; else one row per pair, as is
    rows_ND: Tensor  # bfloat16 or float32
    pair_row_P: Tensor  # int32, 0 <= row < N
    pair_expert_P: Tensor  # int32, logical expert
    pair_weight_P: Tensor  # float32
    out_MD: Tensor  # where the answer goes, dtype of rows; filling it saves a copy
    deadline_us: int  # time left when the requester sent it; 0 = none stated
    peer_name: str


class ExpertService:
    """Parses DISPATCH frames, calls `compute`, answers COMBINED, NOT_MINE or ERROR.

    Args:
        compute: `ExpertCall -> Tensor [M, D]` of the rows' dtype: `call.out_MD` itself, or another
            tensor, which is copied. Raises NotMineError for experts that it does not hold; any
            other exception is logged and answered with an ERROR frame.
        incarnation: of this shard, in every answer.
        epoch: in every answer; set it when a new view is published.
        native: a kernel that computes what `compute` does, with the same bits, and refuses what
            it cannot.

    Attributes:
        pump: for the server: answers with `native`, so that `on_frame` gets the rest only. None
            where there is no such kernel, or no native data plane.
    """

    def __init__(
        self,
        compute: Callable[[ExpertCall], Tensor],
        *,
        incarnation: int,
        epoch: int = 0,
        native: NativeCompute | None = None,
    ) -> None:
        self._compute = compute
        self.incarnation = incarnation
        self.pump: NativePump | None = None
        if native is not None and native_extension() is not None:
            self.pump = NativePump(native, incarnation=incarnation)
        self.epoch = epoch
        self._scratch = Memory.anonymous(1 << 20)

    @property
    def epoch(self) -> int:
        """In every answer."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self.pump is not None:
            self.pump.set_epoch(epoch)

    def on_frame(self, connection: Connection, frame: Frame) -> None:
        """Handler of a `FrameServer`. Raises FrameError for what no requester of ours sends."""
        header = frame.header
        if header.kind != Kind.DISPATCH:
            raise FrameError(f"frame kind {header.kind} sent to an expert shard")
        try:
            call, reply = self._parse(connection, frame)
            begun_ns = time.perf_counter_ns()
            rows = self._compute(call)
            out = call.out_MD
            if rows is not out:
                if rows.shape != out.shape:
                    raise BadCallError(f"shard made {tuple(rows.shape)} of {tuple(out.shape)}")
                out.copy_(rows)
            compute_us = min((time.perf_counter_ns() - begun_ns) // 1000, 0xFFFFFFFF)
        except NotMineError as error:
            body = np.asarray(error.experts, dtype="<i4").tobytes()
            self._answer(connection, header, Kind.NOT_MINE, body)
        except BadCallError as error:
            self._error(connection, header, ErrorCode.BAD_CALL, str(error))
        except Exception as error:
            log.exception("call of layer %d from %r failed", header.layer, connection)
            self._error(connection, header, ErrorCode.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._combined(connection, header, reply, out, compute_us)

    def _parse(self, connection: Connection, frame: Frame) -> tuple[ExpertCall, Memory | None]:
        header, memory, offset = frame
        num_rows, num_pairs, width = header.num_rows, header.num_pairs, header.width
        item = ITEM_BYTES[header.dtype]
        row_bytes = width * item
        expected = dispatch_bytes(num_rows, num_pairs, row_bytes)
        if not item or not width or header.length != expected:
            raise BadCallError(
                f"{num_rows} rows of {row_bytes} bytes and {num_pairs} pairs make "
                f"{expected} bytes, the body has {header.length}"
            )
        if num_pairs > num_rows * TOP_K_MAX:  # the memory that a call takes goes by its pairs
            raise BadCallError(
                f"{num_pairs} pairs of {num_rows} rows, allowed are {TOP_K_MAX} of each"
            )
        presummed = bool(header.flags & Flag.PRESUMMED)
        num_back = combined_rows(num_rows, num_pairs, presummed=presummed)
        pairs = offset + pairs_offset(num_rows, row_bytes)
        arena, reply_at = self._reply_place(connection, header, num_back * row_bytes)
        columns = memory.int32(pairs, 3 * num_pairs)
        if header.flags & Flag.ARENA:  # the requester can write there after we have looked
            columns = columns.clone()
        row_P, expert_P, weight_P = columns.view(3, num_pairs)
        if num_pairs and not (row_P.min() >= 0 and row_P.max() < num_rows):
            raise BadCallError(f"pair rows {row_P.min()}..{row_P.max()} of {num_rows} rows")
        call = ExpertCall(
            header.epoch,
            header.layer,
            presummed,
            memory.rows(header.dtype, offset, num_rows, width),
            row_P,
            expert_P,
            weight_P.view(torch.float32),
            (arena or self._scratch).rows(header.dtype, reply_at, num_back, width),
            header.deadline_us,
            connection.peer_name,
        )
        return call, arena

    def _reply_place(
        self, connection: Connection, header: Header, num_bytes: int
    ) -> tuple[Memory | None, int]:
        """The requester's arena and the place in it, or None and the place in our scratch."""
        grants = connection.grants
        assert grants is not None
        if header.flags & Flag.ARENA and header.reply_offset + num_bytes <= grants.region_bytes:
            return connection.arena, header.region * grants.region_bytes + header.reply_offset
        if HEADER_BYTES + num_bytes > grants.frame_bytes_max:
            raise BadCallError(
                f"answer of {num_bytes} bytes, frames are bounded at {grants.frame_bytes_max}"
            )
        if self._scratch.num_bytes < HEADER_BYTES + num_bytes:
            self._scratch = Memory.anonymous(HEADER_BYTES + num_bytes)
        return None, HEADER_BYTES

    def _combined(
        self,
        connection: Connection,
        header: Header,
        arena: Memory | None,
        out: Tensor,
        compute_us: int,
    ) -> None:
        connection.outstanding -= 1
        num_rows = out.shape[0]
        length = num_rows * header.width * ITEM_BYTES[header.dtype]
        if arena is None:
            frame = self._scratch.view[: HEADER_BYTES + length]
            connection.send_combined(
                header, frame, num_rows, self.epoch, self.incarnation, compute_us
            )
        else:
            connection.send_combined_arena(
                header, length, num_rows, self.epoch, self.incarnation, compute_us
            )

    def _error(self, connection: Connection, header: Header, code: int, text: str) -> None:
        body = text.encode()[:ERROR_TEXT_BYTES_MAX]
        self._answer(connection, header, Kind.ERROR, body, num_rows=code)

    def _answer(
        self, connection: Connection, header: Header, kind: int, body: bytes, num_rows: int = 0
    ) -> None:
        connection.outstanding -= 1
        connection.send(
            kind,
            body,
            layer=header.layer,
            num_rows=num_rows,
            epoch=self.epoch,
            incarnation=self.incarnation,
            sequence=header.sequence,
        )
