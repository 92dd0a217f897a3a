"""Experts copied from a replica's memory: parts of bytes as a shard holds them, asked for in turn.

One CONTROL frame asks for a part (`Part`, msgpack), one answers: a byte that says whether it is
there, then the bytes or, in UTF-8, why not. Who copies checks the digest of the whole: nothing here
says that bytes are right, links between hosts carry a checksum.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final
from zlib import crc32

import msgspec

from remora.comm.connection import Connection, Frame
from remora.comm.errors import ClusterError, FrameError, PeerLostError
from remora.comm.peer_handshake import shake_hands
from remora.comm.transport import dial, receive_exactly
from remora.comm.view import Endpoint
from remora.comm.wire import HEADER_BYTES, Flag, Header, Kind, decode_header, encode_frame

log = logging.getLogger(__name__)

PART_BYTES_MAX: Final = 1 << 20
ANSWER_S: Final = 10.0  # for one part; a source that takes longer is given up
REASON_BYTES_MAX: Final = 4096
_GIVEN: Final = 1
_REFUSED: Final = 0


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of one expert."""

    layer: int  # decoder layer
    expert: int  # logical
    layout: str  # that the asker's slots have
    offset: int  # into all bytes of the expert
    size_bytes: int


_decoder: Final = msgspec.msgpack.Decoder(Part)


class CopyRefusedError(ClusterError):
    """The source has not got that, or not in this layout; another source may."""


class CopyService:
    """Handler of a `FrameServer` that gives parts of experts.

    Args:
        read: gives the bytes of a part, in pieces as they lie. Raises CopyRefusedError.
    """

    def __init__(self, read: Callable[[Part], Sequence[memoryview]]) -> None:
        self._read = read
        self.bytes_sent = 0

    def on_frame(self, connection: Connection, frame: Frame) -> None:
        """Answer one part. Raises FrameError for what no asker of ours sends."""
        if frame.header.kind != Kind.CONTROL:
            raise FrameError(f"frame kind {frame.header.kind} sent to a source of copies")
        try:
            part = _decoder.decode(frame.body)
        except msgspec.DecodeError as error:
            raise FrameError(f"what is asked for cannot be read: {error}") from error
        if not (0 < part.size_bytes <= PART_BYTES_MAX and part.offset >= 0):
            raise FrameError(f"{part}: allowed are 1 to {PART_BYTES_MAX} bytes from 0 on")
        try:
            answer = b"".join((bytes((_GIVEN,)), *self._read(part)))
        except CopyRefusedError as refused:
            answer = bytes((_REFUSED,)) + str(refused).encode()[:REASON_BYTES_MAX]
        else:
            self.bytes_sent += part.size_bytes
        connection.send_control(answer)


class CopySource:
    """A connection to a shard whose experts are copied; one thread uses it.

    Args:
        self_host: label of this process's host.
        incarnation: the life of the shard that is meant.

    Raises:
        PeerLostError, AuthError: it cannot be reached, or is no shard of this cluster.
    """

    def __init__(
        self, endpoint: Endpoint, token: bytes, self_host: str, name: str, incarnation: int
    ) -> None:
        self._sequence = 0
        self._incarnation = incarnation
        self._sock = dial(endpoint, self_host, timeout_s=ANSWER_S)
        self._checked = self._sock.family != socket.AF_UNIX
        try:
            shake_hands(self._sock, token, name=name, num_regions=1, region_bytes=0)
        except ClusterError:
            self._sock.close()
            raise

    def read_into(
        self, layer: int, expert: int, layout: str, parts: Sequence[memoryview],
        before: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """All bytes of one expert, into memory of that layout.

        Args:
            parts: of a slot, in order; writable, contiguous bytes.
            before: called with the bytes of each part before it is asked for; may wait.

        Raises:
            CopyRefusedError: not there, or another layout.
            PeerLostError, FrameError: the connection is of no more use.
        """
        total = sum(map(len, parts))
        for offset in range(0, total, PART_BYTES_MAX):
            size = min(PART_BYTES_MAX, total - offset)
            before(size)
            self._one(Part(layer, expert, layout, offset, size), pieces(parts, offset, size))

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _one(self, part: Part, targets: Sequence[memoryview]) -> None:
        self._sequence += 1
        frame = encode_frame(
            msgspec.msgpack.encode(part),
            checked=self._checked,
            kind=Kind.CONTROL,
            sequence=self._sequence,
            incarnation=self._incarnation,
        )
        try:
            self._sock.sendall(frame)
            header = decode_header(memoryview(receive_exactly(self._sock, HEADER_BYTES)))
            self._answer(header, part, targets)
        except OSError as error:  # also a time-out
            raise PeerLostError(f"no copy of {part}: {error}") from error

    def _answer(self, header: Header, part: Part, targets: Sequence[memoryview]) -> None:
        if header.kind == Kind.ERROR:
            text = receive_exactly(self._sock, header.length)
            raise PeerLostError(f"no copy of {part}: {text.decode(errors='replace')}")
        if header.kind != Kind.CONTROL or not 1 <= header.length <= 1 + PART_BYTES_MAX:
            raise FrameError(f"{header} answers {part}")
        [verdict] = status = receive_exactly(self._sock, 1)
        length = header.length - 1
        if verdict != _GIVEN:
            reason = receive_exactly(self._sock, length)
            raise CopyRefusedError(reason.decode(errors="replace"))
        if length != part.size_bytes:
            raise FrameError(f"{length} bytes answer {part}")
        crc = crc32(status)
        for target in targets:
            received = 0
            while received < len(target):
                count = self._sock.recv_into(target[received:])
                if not count:
                    raise PeerLostError(f"closed in the middle of {part}")
                received += count
            if header.flags & Flag.CHECKED:
                crc = crc32(target, crc)
        if header.flags & Flag.CHECKED and crc != header.body_crc:
            raise FrameError(f"checksum of {part} does not hold")


def pieces(memory: Sequence[memoryview], offset: int, size_bytes: int) -> list[memoryview]:
    """Where `size_bytes` lie from `offset` on, if `memory` is read one after the other; fewer bytes
    where it ends before that."""
    found = []
    for piece in memory:
        part = piece[offset : offset + size_bytes]
        offset = max(0, offset - len(piece))
        size_bytes -= len(part)
        if len(part):
            found.append(part)
    return found
