"""Frames: the one format of everything that crosses a socket after the handshake.

    header (64 bytes, little endian)  |  body (`length` bytes, unless it lies in the arena)

A frame names what it carries by *(layer, logical expert)*, never by slot; every frame has an epoch,
an incarnation and a sequence number. The header carries a CRC-32 of itself, so that bytes that are
no header are never read as a length. Bodies carry one when `Flag.CHECKED` is set: links between
hosts set it (7 GB/s, measured), Unix sockets and shared memory do not.

The byte order is fixed to little endian on the wire, and rows travel as they lie in memory: hosts
of another byte order are refused at import.
"""

import struct
import sys
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

from remora.comm.errors import FrameError

assert sys.byteorder == "little", f"rows travel as little endian, this host is {sys.byteorder}"

MAGIC: Final = b"RM"
VERSION: Final = 1
HEADER_BYTES: Final = 64
FRAME_BYTES_MAX: Final = 64 << 20  # default bound of header and body together
PAIR_BYTES: Final = 12  # int32 row, int32 expert, float32 weight
ERROR_TEXT_BYTES_MAX: Final = 4096

_HEADER = struct.Struct("<2sBBHHIIIHBBQQQIIII")
_CHECKSUM = struct.Struct("<I")
_CHECKSUM_AT: Final = HEADER_BYTES - 4
assert _HEADER.size == HEADER_BYTES, f"{_HEADER.size} != {HEADER_BYTES}"


class Kind(IntEnum):
    """What a frame is."""

    DISPATCH = 1  # requester -> shard: rows and (row, expert, weight) pairs
    COMBINED = 2  # shard -> requester: rows back
    NOT_MINE = 3  # shard -> requester: int32 logical experts that it does not hold
    ERROR = 4  # answer to a call that failed: UTF-8 text, `num_rows` is the ErrorCode
    CONTROL = 5  # msgpack bytes of comm.messages
    PING = 6  # answered by the transport itself
    PONG = 7


class Flag(IntEnum):
    """Bits of `Header.flags`."""

    ARENA = 1  # the body lies in the requester's shared memory, `length` bytes of region `region`
    PRESUMMED = 2  # DISPATCH: one row back per row sent; else one per pair
    CHECKED = 4  # `body_crc` holds the CRC-32 of the body


class ErrorCode(IntEnum):
    """Why a call failed at the far end (`num_rows` of an ERROR frame)."""

    FAILED = 1  # the handler raised
    FENCED = 2  # the frame was for another incarnation
    BAD_CALL = 3  # a well-formed frame whose content cannot be


class Dtype(IntEnum):
    """Element type of rows."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2


ITEM_BYTES: Final = {int(Dtype.NONE): 0, int(Dtype.FLOAT32): 4, int(Dtype.BFLOAT16): 2}
_KIND_MAX: Final = max(Kind)
_FLAGS_ALL: Final = sum(Flag)


class Header(NamedTuple):
    """One decoded frame header; fields in wire order."""

    kind: int
    flags: int
    layer: int  # decoder-layer index, u16
    length: int  # bytes of the body, wherever it lies
    num_rows: int
    num_pairs: int
    width: int  # elements of one row (D), u16
    dtype: int
    region: int  # arena region, with Flag.ARENA
    epoch: int  # placement the frame was routed under
    incarnation: int  # request: whom it is for; answer: who answers
    sequence: int  # chosen by the requester, repeated by the answer
    deadline_us: int  # request: time left when sent, 0 = none stated; COMBINED: time computed
    reply_offset: int  # ARENA: where in the region the answer's body goes, bytes
    body_crc: int

    @property
    def inline_bytes(self) -> int:
        """Bytes of body that follow the header in the stream."""
        return 0 if self.flags & Flag.ARENA else self.length


def pack_header(
    out: bytearray | memoryview,
    offset: int,
    kind: int,
    flags: int = 0,
    layer: int = 0,
    length: int = 0,
    num_rows: int = 0,
    num_pairs: int = 0,
    width: int = 0,
    dtype: int = 0,
    region: int = 0,
    epoch: int = 0,
    incarnation: int = 0,
    sequence: int = 0,
    deadline_us: int = 0,
    reply_offset: int = 0,
    body_crc: int = 0,
) -> None:
    """Writes a header at `out[offset:offset + 64]`; fields in wire order (by position it is 1 us
    faster than by name). Raises FrameError for a field out of range."""
    try:
        _HEADER.pack_into(
            out, offset, MAGIC, VERSION, kind, flags, layer, length, num_rows, num_pairs, width,
            dtype, region, epoch, incarnation, sequence, deadline_us, reply_offset, body_crc, 0,
        )  # fmt: skip
    except struct.error as error:
        raise FrameError(f"header field out of range: {error}") from error
    check = offset + _CHECKSUM_AT
    _CHECKSUM.pack_into(out, check, crc32(memoryview(out)[offset:check]))


def encode_frame(body: bytes | memoryview = b"", *, checked: bool = False, **fields: int) -> bytes:
    """A whole frame as bytes; `fields` as in `pack_header` without length and body_crc."""
    frame = bytearray(HEADER_BYTES + len(body))
    frame[HEADER_BYTES:] = body
    flags = fields.pop("flags", 0) | (Flag.CHECKED if checked else 0)
    body_crc = crc32(body) if checked else 0
    pack_header(frame, 0, length=len(body), flags=flags, body_crc=body_crc, **fields)
    return bytes(frame)


def decode_header(
    buffer: memoryview, offset: int = 0, *, frame_bytes_max: int = FRAME_BYTES_MAX
) -> Header:
    """Reads and checks the header at `buffer[offset:offset + 64]`.

    Raises:
        FrameError: no frame of ours (magic, version, checksum), an unknown kind, flag or dtype, or
            over `frame_bytes_max`. The stream cannot be trusted any further.
    """
    fields = _HEADER.unpack_from(buffer, offset)
    if fields[0] != MAGIC:
        raise FrameError(f"magic is {fields[0]!r}, must be {MAGIC!r}")
    if fields[1] != VERSION:
        raise FrameError(f"frame version is {fields[1]}, this process speaks {VERSION}")
    found = crc32(buffer[offset : offset + _CHECKSUM_AT])
    if found != fields[17]:
        raise FrameError(f"header checksum is {fields[17]:#x}, content has {found:#x}")
    header = Header._make(fields[2:17])
    if not 1 <= header.kind <= _KIND_MAX:
        raise FrameError(f"frame kind is {header.kind}, must be 1 to {_KIND_MAX}")
    if header.flags & ~_FLAGS_ALL:
        raise FrameError(f"frame flags are {header.flags:#x}, known are {_FLAGS_ALL:#x}")
    if header.dtype not in ITEM_BYTES:
        raise FrameError(f"row dtype is {header.dtype}, must be one of {sorted(ITEM_BYTES)}")
    if HEADER_BYTES + header.length > frame_bytes_max:
        raise FrameError(
            f"frame of {HEADER_BYTES + header.length} bytes, allowed are {frame_bytes_max}"
        )
    return header


def check_body(header: Header, body: memoryview) -> None:
    """Raises FrameError when `body` is not what the sender's checksum says."""
    if header.flags & Flag.CHECKED and crc32(body) != header.body_crc:
        raise FrameError(
            f"body checksum of frame {header.sequence} is {header.body_crc:#x}, "
            f"content has {crc32(body):#x}"
        )


def pairs_offset(num_rows: int, row_bytes: int) -> int:
    """Where the pair columns start in a DISPATCH body: after the rows, 4-byte aligned."""
    return (num_rows * row_bytes + 3) & ~3


def dispatch_bytes(num_rows: int, num_pairs: int, row_bytes: int) -> int:
    """Body bytes of a DISPATCH: rows, then int32 row, int32 expert, float32 weight columns."""
    return pairs_offset(num_rows, row_bytes) + PAIR_BYTES * num_pairs


def combined_rows(num_rows: int, num_pairs: int, *, presummed: bool) -> int:
    """Rows that the answer to a DISPATCH has."""
    return num_rows if presummed else num_pairs


def answer_bytes_max(header: Header, region_bytes: int) -> int:
    """Largest frame that may answer this DISPATCH over the socket, whatever the answer is.

    Args:
        region_bytes: of the arena that rows go to when they fit; 0: there is none.
    """
    presummed = bool(header.flags & Flag.PRESUMMED)
    num_back = combined_rows(header.num_rows, header.num_pairs, presummed=presummed)
    num_bytes = num_back * header.width * ITEM_BYTES[header.dtype]
    if header.flags & Flag.ARENA and header.reply_offset + num_bytes <= region_bytes:
        num_bytes = 0
    not_mine_bytes = 4 * header.num_pairs
    return HEADER_BYTES + max(num_bytes, not_mine_bytes, ERROR_TEXT_BYTES_MAX)
