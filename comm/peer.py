"""One shard as a dense rank sees it: non-blocking connection, arena, calls under way."""

import ctypes
import socket
from typing import Final
from zlib import crc32

import msgspec

from remora.comm.accounting import LinkCounters
from remora.comm.arena import Memory, align64
from remora.comm.call import Call
from remora.comm.errors import ClusterError, FencedError, FrameError, PeerLostError
from remora.comm.peer_handshake import shake_hands
from remora.comm.transport import dial
from remora.comm.view import Member
from remora.comm.wire import (
    ERROR_TEXT_BYTES_MAX,
    HEADER_BYTES,
    ErrorCode,
    Flag,
    Header,
    Kind,
    check_body,
    decode_header,
    pack_header,
)

RECEIVE_BYTES: Final = 256 << 10
# plain ints: an enum's operators cost a microsecond a frame
_ARENA: Final = int(Flag.ARENA)
_CHECKED: Final = int(Flag.CHECKED)
_COMBINED: Final = int(Kind.COMBINED)


class PeerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a requester asks for at connect; the server may grant less."""

    region_bytes: int = 8 << 20  # one call's request and answer; pages are touched on use only
    num_regions: int = 4  # credits: calls under way per peer
    arena_bytes_min: int = 16 << 10  # smaller calls go through the socket
    # CRC-32 of bodies between hosts, both ways: 0.15 ms for 1 MiB at each end. Of 1.5-2.5 ms for
    # 2 x 1 MiB each way over loopback it is about 1 ms (four alternating runs, loaded machine).
    checksums: bool = True
    connect_s: float = 5.0


class PeerCell(ctypes.Structure):
    """What of a connection the native client writes or reads where it lies (`csrc/client.h`)."""

    sequence: int  # of the last call
    lost: int  # not 0: the connection is gone
    _fields_ = [("sequence", ctypes.c_uint64), ("lost", ctypes.c_uint64)]


class Peer:
    """A connection to `member`; made by `PeerSet.connect`, used from one thread.

    Raises (constructor):
        PeerLostError: not reachable. AuthError: tokens differ. FencedError: another incarnation
            answers at that endpoint.
    """

    def __init__(
        self,
        member: Member,
        *,
        token: bytes,
        self_host: str,
        name: str,
        limits: PeerLimits,
        counters: LinkCounters,
    ) -> None:
        self.member = member
        self.uid = member.uid
        self.counters = counters
        self.limits = limits
        self.in_flight: dict[int, Call] = {}
        self.error: PeerLostError | None = None
        self.sock = dial(member.endpoint, self_host, timeout_s=limits.connect_s)
        self.checked = limits.checksums and self.sock.family != socket.AF_UNIX
        try:
            self.grants, self.memory = shake_hands(
                self.sock,
                token,
                name=name,
                num_regions=limits.num_regions,
                region_bytes=limits.region_bytes,
            )
            if self.grants.incarnation not in (0, member.incarnation):
                raise FencedError(
                    f"{member.uid} is incarnation {self.grants.incarnation}, "
                    f"the view says {member.incarnation}"
                )
        except BaseException:
            self.sock.close()
            raise
        self.sock.setblocking(False)
        self.fd = self.sock.fileno()
        self.free_regions = list(range(self.grants.num_regions))
        self.cell = PeerCell()
        self._out: memoryview | None = None  # what the socket did not take yet
        self._rx = bytearray(RECEIVE_BYTES)
        self._rx_view = memoryview(self._rx)
        self._rx_end = 0
        self._sink: memoryview | None = None  # where the rest of a large answer goes
        self._sink_header: Header | None = None
        self._skip_bytes = 0  # of a large answer that nobody waits for

    def begin(self, body_bytes: int, reply_bytes: int) -> Call | None:
        """Reserves room for a call; None when every credit of this peer is in use.

        Raises:
            PeerLostError: the connection is gone.
            FrameError: request or answer would be over the granted frame bound.
        """
        if self.error is not None:
            raise self.error
        if not self.free_regions:
            return None
        largest = HEADER_BYTES + max(body_bytes, reply_bytes)
        if largest > self.grants.frame_bytes_max:
            raise FrameError(
                f"call of {largest} bytes to {self.uid}: allowed are {self.grants.frame_bytes_max}"
            )
        region = self.free_regions.pop()
        if align64(HEADER_BYTES + body_bytes) + reply_bytes <= self.grants.region_bytes:
            start = region * self.grants.region_bytes
            return Call(self, self.memory, start, region, body_bytes, reply_bytes)
        own = Memory.anonymous(align64(HEADER_BYTES + body_bytes) + reply_bytes)
        return Call(self, own, 0, region, body_bytes, reply_bytes)

    def give_back(self, region: int) -> None:
        """Frees a credit."""
        self.free_regions.append(region)
        assert len(self.free_regions) <= self.grants.num_regions, f"{self.uid}: region freed twice"

    def send(
        self, call: Call, kind: int, flags: int, deadline_us: int, epoch: int, layer: int,
        num_rows: int, num_pairs: int, width: int, dtype: int,
    ) -> bool:  # fmt: skip
        """Sends `call`; True when the socket took all of it, else wait for it to be writable.

        Raises PeerLostError.
        """
        if self.error is not None:
            raise self.error
        self.cell.sequence += 1
        call.sequence = self.cell.sequence
        length = call.body_bytes
        view = call.memory.view
        region = reply_offset = body_crc = 0
        end = call.start + HEADER_BYTES
        largest = max(length, call.reply_bytes)
        if (
            self.grants.arena
            and call.memory is self.memory
            and largest >= self.limits.arena_bytes_min
        ):
            assert call.region is not None
            flags |= _ARENA
            call.shared = True
            region = call.region
            reply_offset = call.reply_start - call.start
            self.counters.arena_bytes += length
        else:
            end += length
            if self.checked:
                flags |= _CHECKED
                body_crc = crc32(call.body)
        pack_header(
            view, call.start, kind, flags, layer, length, num_rows, num_pairs, width, dtype, region,
            epoch, self.member.incarnation, call.sequence, deadline_us, reply_offset, body_crc,
        )  # fmt: skip
        counters = self.counters
        counters.sent_frames += 1
        counters.sent_bytes += HEADER_BYTES + length
        counters.sent_rows += num_rows
        counters.sent_pairs += num_pairs
        self.in_flight[call.sequence] = call
        return self._transmit(view[call.start : end])

    def _transmit(self, frame: memoryview) -> bool:
        if self._out is not None:  # keep the order; rare, so a copy is cheap enough
            self._out = memoryview(bytes(self._out) + bytes(frame))
            return False
        try:
            sent = self.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self.lose(f"send failed: {error}") from error
        if sent == len(frame):
            return True
        self._out = frame[sent:]
        return False

    @property
    def has_credit(self) -> bool:
        """A call could begin now."""
        return bool(self.free_regions)

    @property
    def has_live_calls(self) -> bool:
        """Calls that somebody still waits for are under way."""
        return any(not call.abandoned for call in self.in_flight.values())

    @property
    def has_backlog(self) -> bool:
        """Bytes wait for the socket to be writable."""
        return self._out is not None

    def on_writable(self) -> None:
        """Sends what waits. Raises PeerLostError."""
        if self._out is not None:
            frame, self._out = self._out, None
            self._transmit(frame)

    def on_readable(self) -> None:
        """Receives once and books the answers that came.

        Raises:
            PeerLostError: the connection is gone, or sent what is no frame.
        """
        try:
            if self._sink is not None:
                self._receive_sink()
                return
            received = self.sock.recv_into(self._rx_view[self._rx_end :])
        except BlockingIOError:
            return
        except OSError as error:
            raise self.lose(f"receive failed: {error}") from error
        if received == 0:
            raise self.lose("closed by the peer")
        self._on_received(received)

    def _on_received(self, num_bytes: int) -> None:
        self._rx_end += num_bytes
        try:
            self._take_frames()
        except FrameError as error:
            raise self.lose(f"no frame: {error}") from error

    def _receive_sink(self) -> None:
        assert self._sink is not None and self._sink_header is not None
        received = self.sock.recv_into(self._sink)
        if received == 0:
            raise self.lose("closed by the peer")
        self._sink = self._sink[received:]
        if len(self._sink) == 0:
            header, self._sink, self._sink_header = self._sink_header, None, None
            call = self.in_flight.get(header.sequence)
            assert call is not None, "the sink's call was forgotten"
            try:
                if header.flags & _CHECKED:
                    start = call.reply_start
                    check_body(header, call.memory.view[start : start + header.length])
            except FrameError as error:
                raise self.lose(f"no frame: {error}") from error
            self._finish(call, header)

    def _take_frames(self) -> None:
        start, end, rx = 0, self._rx_end, self._rx_view
        if self._skip_bytes:
            start = min(self._skip_bytes, end)
            self._skip_bytes -= start
        while end - start >= HEADER_BYTES:
            header = decode_header(rx, start, frame_bytes_max=self.grants.frame_bytes_max)
            body = start + HEADER_BYTES
            inline = header.inline_bytes
            if end - body >= inline:
                self._take(header, rx[body : body + inline])
                start = body + inline
                continue
            if inline <= RECEIVE_BYTES // 2:
                break  # it fits once the rest has come
            call = self._match(header)
            if call is None:
                self._skip_bytes = inline - (end - body)
            else:
                target = call.memory.view[call.reply_start : call.reply_start + inline]
                target[: end - body] = rx[body:end]
                self._sink, self._sink_header = target[end - body :], header
            start = end
        if start < end and start:
            rx[: end - start] = rx[start:end]
        self._rx_end = end - start

    def _match(self, header: Header) -> Call | None:
        """The call that a frame answers; None (counted) when it is stale. Raises FrameError."""
        kind, length, num_rows = header.kind, header.length, header.num_rows
        counters = self.counters
        counters.received_frames += 1
        counters.received_bytes += HEADER_BYTES + length
        call = self.in_flight.get(header.sequence)
        if call is None or header.incarnation != self.member.incarnation:
            counters.stale_replies += 1
            return None
        if kind == _COMBINED:
            counters.received_rows += num_rows
        elif kind not in (Kind.NOT_MINE, Kind.ERROR, Kind.PONG):
            raise FrameError(f"frame kind {kind} is no answer")
        limit = ERROR_TEXT_BYTES_MAX if kind == Kind.ERROR else call.reply_bytes
        if length > limit:
            raise FrameError(f"answer {header.sequence} has {length} bytes, allowed are {limit}")
        if header.flags & _ARENA:
            counters.arena_bytes += length
            place = (header.region, header.reply_offset)
            if not call.shared or place != (call.region, call.reply_start - call.start):
                raise FrameError(f"answer {header.sequence} lies at {place} of the arena")
        return call

    def _take(self, header: Header, body: memoryview) -> None:
        call = self._match(header)
        if call is None:
            return
        if header.flags & _CHECKED:
            check_body(header, body)
        if header.kind == Kind.ERROR:
            call.error = _as_error(self.uid, header, bytes(body))
        elif not header.flags & _ARENA:
            call.memory.view[call.reply_start : call.reply_start + len(body)] = body
        self._finish(call, header)

    def _finish(self, call: Call, header: Header) -> None:
        del self.in_flight[header.sequence]
        call.reply = header
        if call.abandoned:
            self.counters.late_replies += 1
            call.release()

    # -- what the native client leaves behind --------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Nothing is under way, unsent or half received."""
        return self.error is None and not (
            self.in_flight or self._out or self._rx_end or self._sink_header or self._skip_bytes
        )

    def adopt(
        self, region: int, body_bytes: int, reply_bytes: int, sequence: int, shared: bool
    ) -> Call:
        """A call that has left, or begun to leave, as if it had been sent here."""
        self.free_regions.remove(region)
        start = region * self.grants.region_bytes
        call = Call(self, self.memory, start, region, body_bytes, reply_bytes)
        call.sequence, call.shared = sequence, shared
        self.in_flight[sequence] = call
        return call

    def resume(
        self, unsent: bytes, partial: tuple[Call, Header, int] | None, unread: bytes
    ) -> None:
        """Goes on with the streams where they were left.

        Args:
            unsent: bytes of adopted calls that the socket has not taken.
            partial: an answer whose header was counted, and how much of its body is in place.
            unread: bytes received that nobody has looked at. One of these two at most.

        Raises:
            PeerLostError: `unread` is no frame of ours.
        """
        self._out = memoryview(unsent) if unsent else None
        if partial is not None:
            call, self._sink_header, received = partial
            end = call.reply_start + self._sink_header.length
            self._sink = call.memory.view[call.reply_start + received : end]
        self._rx[: len(unread)] = unread
        self._on_received(len(unread))

    def lose(self, reason: str) -> PeerLostError:
        """Closes the connection and fails its calls; returns the error to raise."""
        if self.error is None:
            self.error = PeerLostError(
                f"{self.uid} (incarnation {self.member.incarnation}): {reason}"
            )
            self.counters.losses += 1
            self.cell.lost = 1
            self.sock.close()
            for call in self.in_flight.values():
                call.error = self.error
            self.in_flight.clear()
            self._out = self._sink = self._sink_header = None
        return self.error


def _as_error(uid: str, header: Header, text: bytes) -> ClusterError:
    message = f"{uid}: {text[:ERROR_TEXT_BYTES_MAX].decode('utf-8', errors='replace')}"
    if header.num_rows == ErrorCode.FENCED:
        return FencedError(message)
    return ClusterError(message)
