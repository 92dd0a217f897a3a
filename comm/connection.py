"""One accepted connection of a `FrameServer`: handshake, frames in, bounded queue out."""

import os
import socket
from array import array
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

from remora.comm.accounting import LinkCounters
from remora.comm.arena import Memory
from remora.comm.auth import ATTACH, Grants, ServerHandshake
from remora.comm.errors import AuthError, FrameError, PeerLostError
from remora.comm.outbox import Outbox
from remora.comm.wire import (
    HEADER_BYTES,
    Flag,
    Header,
    Kind,
    answer_bytes_max,
    check_body,
    decode_header,
    encode_frame,
    pack_header,
)

RECEIVE_BYTES = 128 << 10  # first size of a connection's receive memory; grows to the frame bound

# plain ints: an enum's operators cost a microsecond a frame
_ARENA = int(Flag.ARENA)
_CHECKED = int(Flag.CHECKED)
_DISPATCH = int(Kind.DISPATCH)


class Frame(NamedTuple):
    """One received frame; its body is valid until the handler returns (copy what must outlive)."""

    header: Header
    memory: Memory
    offset: int  # of the body in `memory`

    @property
    def body(self) -> memoryview:
        """The body, zero-copy."""
        return self.memory.view[self.offset : self.offset + self.header.length]


class Connection:
    """A peer that dialled us. `send*` may be called from any thread and never blocks.

    Attributes:
        id: unique for the server's life.
        peer_name: what the peer calls itself (authenticated with the handshake).
        counters: traffic of this connection.
        outstanding: DISPATCH frames handed to the handler and not answered yet.
        close_reason: why it was closed; set before `on_lost`.
        last_call: sequence of the last DISPATCH.
        context: free for the handler's use.
    """

    def __init__(
        self,
        connection_id: int,
        sock: socket.socket,
        handshake: ServerHandshake,
        *,
        checked: bool,
        queue_bytes_max: int,
        on_backlog: Callable[["Connection", bool], None],
        on_doomed: Callable[["Connection", str], None],
    ) -> None:
        self.id = connection_id
        self.sock = sock
        self.fd = sock.fileno()
        self.peer_name = "?"
        self.counters = LinkCounters()
        self.outstanding = 0
        self.close_reason: str | None = None
        self.context: object = None
        self.head: Frame | None = None  # complete, not handled yet
        self.skipped = 0  # times another connection's frame went ahead of `head`
        self.opened = False
        self.grants: Grants | None = None
        self.arena: Memory | None = None
        self._handshake = handshake
        self._partial = bytearray()
        self._checked = checked
        self._outbox = Outbox(
            sock,
            self.counters,
            queue_bytes_max=queue_bytes_max,
            on_backlog=lambda waits: on_backlog(self, waits),
            on_doomed=lambda reason: on_doomed(self, reason),
        )
        self._control_sent = 0
        self._control_received = 0
        self.last_call = 0
        self._rx = Memory.anonymous(0)
        self._rx_start = 0
        self._rx_end = 0
        self._frame_bytes_max = 0

    def __repr__(self) -> str:
        return f"<connection {self.id} of {self.peer_name!r}>"

    # -- handshake ---------------------------------------------------------------------------

    def on_handshake_bytes(self) -> bool:
        """Reads what the handshake still needs; True once frames may follow. Never reads further.

        Raises:
            AuthError, FrameError, PeerLostError, OSError: close the connection.
        """
        handshake = self._handshake
        if handshake.accepted:
            return self._receive_arena()
        data = self.sock.recv(handshake.needed - len(self._partial))
        if not data:
            raise PeerLostError("closed in the handshake")
        self._partial += data
        if len(self._partial) < handshake.needed:
            return False
        answer = handshake.feed(bytes(self._partial))
        self._partial.clear()
        if self.sock.send(answer) != len(answer):  # 64 bytes into an empty buffer
            raise AuthError("handshake answer did not fit the socket's empty buffer")
        self.peer_name = handshake.peer_name
        if handshake.needed:
            return False
        if handshake.fenced:
            raise PeerLostError(f"{self.peer_name} is fenced: it did not take the newest view")
        if not handshake.accepted:
            raise AuthError(f"{self.peer_name!r} does not know the cluster token")
        self.grants = handshake.grants
        if not self.grants.arena:
            self._open()
        return self.opened

    def _receive_arena(self) -> bool:
        assert self.grants is not None
        wanted = len(ATTACH) - len(self._partial)
        data, ancillary, _, _ = self.sock.recvmsg(
            wanted, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC
        )
        descriptors = array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) // 4 * 4])
        try:
            if not data:
                raise PeerLostError("closed before the arena came")
            if descriptors and self.arena is None:
                total = self.grants.num_regions * self.grants.region_bytes
                self.arena = Memory.attach(descriptors[0], total)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._partial += data
        if len(self._partial) < len(ATTACH):
            return False
        if self._partial != ATTACH or self.arena is None:
            raise FrameError(f"arena message is {bytes(self._partial)!r} without a descriptor")
        self._open()
        return True

    def _open(self) -> None:
        assert self.grants is not None
        self._frame_bytes_max = self.grants.frame_bytes_max
        self._rx = Memory.anonymous(RECEIVE_BYTES)
        self.opened = True

    # -- incoming ----------------------------------------------------------------------------

    def on_readable(self) -> None:
        """Receives once and sets `head` when a frame is complete.

        Raises:
            FrameError, PeerLostError, OSError: close the connection.
        """
        received = self.sock.recv_into(self._rx.view[self._rx_end :])
        if received == 0:
            raise PeerLostError("closed by the peer")
        self._rx_end += received
        self.next_head()

    def next_head(self) -> None:
        """Sets `head` to the next complete frame of the receive memory. Raises FrameError."""
        self.head = None
        start = self._rx_start
        available = self._rx_end - start
        if available < HEADER_BYTES:
            self._make_room(HEADER_BYTES)
            return
        header = decode_header(self._rx.view, start, frame_bytes_max=self._frame_bytes_max)
        total = HEADER_BYTES + header.inline_bytes
        if available < total:
            self._make_room(total)
            return
        if start and header.kind == _DISPATCH:  # rows must lie aligned for their tensor view
            self._compact(self._rx)
            start = 0
        self.head = self._frame(header, start)

    def _frame(self, header: Header, start: int) -> Frame:
        counters = self.counters
        counters.received_frames += 1
        counters.received_bytes += HEADER_BYTES + header.length
        counters.received_rows += header.num_rows
        if not header.flags & _ARENA:
            frame = Frame(header, self._rx, start + HEADER_BYTES)
            if header.flags & _CHECKED:
                check_body(header, frame.body)
            return frame
        counters.arena_bytes += header.length
        if self.arena is None or self.grants is None:
            raise FrameError(f"frame {header.sequence} names an arena, this connection has none")
        size = self.grants.region_bytes
        if (
            header.region >= self.grants.num_regions
            or HEADER_BYTES + header.length > size
            or header.reply_offset > size
            or header.reply_offset % 64
        ):
            raise FrameError(
                f"frame {header.sequence} names region {header.region}, {header.length} bytes, "
                f"answer at {header.reply_offset}; the arena has {self.grants.num_regions} regions "
                f"of {size} bytes"
            )
        return Frame(header, self.arena, header.region * size + HEADER_BYTES)

    def consume_head(self) -> None:
        """Frees the handled head's bytes and looks for the next frame. Raises FrameError."""
        assert self.head is not None
        self._rx_start += HEADER_BYTES + self.head.header.inline_bytes
        if self._rx_start == self._rx_end:
            self._rx_start = self._rx_end = 0
            self.head = None
        else:
            self.next_head()

    def is_new_call(self, sequence: int) -> bool:
        """False for a call that came before: done twice, it would write into a region that the
        requester may be using for something else by now."""
        if sequence <= self.last_call:
            self.counters.stale_replies += 1
            return False
        self.last_call = sequence
        return True

    def check_control_sequence(self, sequence: int) -> bool:
        """True for the next control frame, False for a duplicate. Raises FrameError for a gap."""
        if sequence <= self._control_received:
            self.counters.stale_replies += 1
            return False
        if sequence != self._control_received + 1:
            raise FrameError(f"control frame {sequence} follows {self._control_received}")
        self._control_received = sequence
        return True

    def _make_room(self, num_bytes: int) -> None:
        """At least `num_bytes` from `_rx_start` on fit, compacting or growing when they do not."""
        if self._rx_start + num_bytes <= self._rx.num_bytes:
            return
        if num_bytes <= self._rx.num_bytes:
            self._compact(self._rx)
        else:
            size = max(num_bytes, min(2 * self._rx.num_bytes, self._frame_bytes_max))
            self._compact(Memory.anonymous(size))

    def _compact(self, target: Memory) -> None:
        count = self._rx_end - self._rx_start
        target.view[:count] = self._rx.view[self._rx_start : self._rx_end]
        self._rx, self._rx_start, self._rx_end = target, 0, count

    # -- while the native pump owns it ---------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Nothing is received, queued or under way here: the pump may own the connection."""
        return (
            self.opened
            and self.close_reason is None
            and not (self.head or self._rx_end or self.outstanding or self.queued_bytes)
        )

    @property
    def receive_memory(self) -> Memory:
        """Where bytes are received, from its start on; its owner may change while it is ours."""
        return self._rx

    def resume(self, received: int, last_call: int, unsent: bytes) -> None:
        """Goes on from what the pump left, and sets `head`. Raises FrameError.

        Args:
            received: bytes at the start of `receive_memory` that nobody has taken.
            last_call: sequence of the last DISPATCH that was answered.
            unsent: of its answer; counted.
        """
        self._rx_end = received
        self.last_call = last_call
        if unsent:
            self._outbox.queue(unsent)
        self.next_head()

    # -- outgoing ----------------------------------------------------------------------------

    def send(self, kind: int, body: bytes | memoryview = b"", **fields: int) -> bool:
        """Sends or queues one inline frame; `fields` as in `wire.pack_header`.

        Returns:
            False when the connection is closed, or is now because its queue went over its bound:
            `on_lost` reports both.
        """
        frame = encode_frame(body, checked=self._checked, kind=kind, **fields)
        return self.transmit(frame, len(frame), 0)

    def send_control(self, payload: bytes) -> bool:
        """Sends one CONTROL frame with the connection's next sequence number; result as `send`."""
        with self._outbox.lock:
            self._control_sent += 1
            frame = encode_frame(
                payload, checked=self._checked, kind=Kind.CONTROL, sequence=self._control_sent
            )
            return self._outbox.transmit_locked(memoryview(frame), len(frame), 0)

    def send_combined(
        self,
        request: Header,
        frame: memoryview,
        num_rows: int,
        epoch: int,
        incarnation: int,
        compute_us: int,
    ) -> bool:
        """Answers `request` with the rows at `frame[64:]`; writes the header. Copies only what
        the socket does not take at once. Result as `send`."""
        flags = body_crc = 0
        if request.flags & _CHECKED:  # the requester chose
            flags, body_crc = _CHECKED, crc32(frame[HEADER_BYTES:])
        pack_header(
            frame, 0, Kind.COMBINED, flags, request.layer, len(frame) - HEADER_BYTES, num_rows, 0,
            request.width, request.dtype, 0, epoch, incarnation, request.sequence, compute_us, 0,
            body_crc,
        )  # fmt: skip
        return self.transmit(frame, len(frame), num_rows)

    def send_combined_arena(
        self,
        request: Header,
        length: int,
        num_rows: int,
        epoch: int,
        incarnation: int,
        compute_us: int,
    ) -> bool:
        """Says that `length` bytes of rows are where `request` wanted them. Result as `send`."""
        frame = bytearray(HEADER_BYTES)
        pack_header(
            frame, 0, Kind.COMBINED, _ARENA, request.layer, length, num_rows, 0, request.width,
            request.dtype, request.region, epoch, incarnation, request.sequence, compute_us,
            request.reply_offset, 0,
        )  # fmt: skip
        return self.transmit(frame, HEADER_BYTES + length, num_rows)

    def transmit(
        self, frame: bytes | bytearray | memoryview, counted_bytes: int, num_rows: int
    ) -> bool:
        """Sends or queues encoded bytes and counts them. Result as `send`."""
        return self._outbox.transmit(frame, counted_bytes, num_rows)

    def on_writable(self) -> int:
        """Sends what waits; the number of bytes that the socket took. Raises OSError."""
        return self._outbox.on_writable()

    @property
    def has_room(self) -> bool:
        """Whether `head` may be handled: it is no call, or the socket may take nothing of its
        answer and there is still room for that."""
        assert self.head is not None and self.grants is not None
        if not self.queued_bytes or self.head.header.kind != _DISPATCH:
            return True
        region_bytes = self.grants.region_bytes if self.arena is not None else 0
        return self._outbox.has_room(answer_bytes_max(self.head.header, region_bytes))

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._outbox.queued_bytes

    def close(self, reason: str) -> None:
        """Closes the socket; called by the server's loop only."""
        self._outbox.close()
        self.close_reason = reason
        self.head = None
        self.arena = None
        self._rx = Memory.anonymous(0)
