"""The frame header: round trip, fixed bytes, bounds, and no garbage gets through."""

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.comm.accounting import expected_call_bytes
from remora.comm.errors import FrameError
from remora.comm.wire import (
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    Flag,
    Header,
    Kind,
    check_body,
    decode_header,
    dispatch_bytes,
    encode_frame,
    pack_header,
)

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
FIELDS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([int(k) for k in Kind]),
        "flags": st.integers(0, sum(Flag)),
        "layer": U16,
        "length": st.integers(0, FRAME_BYTES_MAX - HEADER_BYTES),
        "num_rows": U32,
        "num_pairs": U32,
        "width": U16,
        "dtype": st.integers(0, 2),
        "region": st.integers(0, 255),
        "epoch": U64,
        "incarnation": U64,
        "sequence": U64,
        "deadline_us": U32,
        "reply_offset": U32,
        "body_crc": U32,
    }
)


@given(FIELDS)
def test_round_trip(fields: dict[str, int]) -> None:
    out = bytearray(HEADER_BYTES + 5)
    pack_header(out, 5, **fields)
    assert decode_header(memoryview(out), 5) == Header(**fields)


def test_bytes_on_the_wire_are_fixed() -> None:
    """Little endian at fixed offsets whatever the machine: golden bytes, written out by hand."""
    frame = encode_frame(
        b"\x11\x22",
        kind=Kind.DISPATCH,
        flags=Flag.PRESUMMED,
        layer=0x0102,
        num_rows=0x03040506,
        num_pairs=0x0708090A,
        width=0x0B0C,
        dtype=2,
        epoch=0x1112131415161718,
        incarnation=0x2122232425262728,
        sequence=0x3132333435363738,
        deadline_us=0x41424344,
    )
    head = bytes.fromhex(
        "524d 01 01 0200 0201 02000000 06050403 0a090807 0c0b 02 00"
        "1817161514131211 2827262524232221 3837363534333231 44434241 00000000 00000000"
    )
    assert frame == head + struct.pack("<I", crc32(head)) + b"\x11\x22"


@given(FIELDS, st.integers(0, 8 * HEADER_BYTES - 1))
def test_any_flipped_bit_is_noticed(fields: dict[str, int], bit: int) -> None:
    out = bytearray(HEADER_BYTES)
    pack_header(out, 0, **fields)
    out[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        decode_header(memoryview(out))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_header(memoryview(data))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("kind", 0, "frame kind is 0"),
        ("kind", 99, "frame kind is 99"),
        ("flags", 0x8000, "frame flags"),
        ("dtype", 9, "row dtype is 9"),
        ("length", FRAME_BYTES_MAX, "allowed are"),
    ],
)
def test_values_that_cannot_be(field: str, value: int, text: str) -> None:
    out = bytearray(HEADER_BYTES)
    pack_header(out, 0, **{"kind": int(Kind.PING), field: value})
    with pytest.raises(FrameError, match=text):
        decode_header(memoryview(out))


@pytest.mark.parametrize("field", ["layer", "width", "region", "sequence", "deadline_us"])
def test_fields_out_of_range_are_refused_at_the_sender(field: str) -> None:
    for value in (-1, 2**64):
        with pytest.raises(FrameError, match="out of range"):
            pack_header(bytearray(HEADER_BYTES), 0, **{"kind": int(Kind.PING), field: value})


def test_version_is_named() -> None:
    frame = bytearray(encode_frame(kind=Kind.PING))
    frame[2] = 9
    with pytest.raises(FrameError, match="version is 9, this process speaks 1"):
        decode_header(memoryview(frame))


@given(st.binary(min_size=1, max_size=200), st.integers(0, 10**6))
def test_a_checked_body_notices_a_flip(body: bytes, bit: int) -> None:
    frame = bytearray(encode_frame(body, checked=True, kind=Kind.CONTROL))
    header = decode_header(memoryview(frame))
    check_body(header, memoryview(frame)[HEADER_BYTES:])
    bit %= 8 * len(body)
    frame[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError, match="body checksum"):
        check_body(header, memoryview(frame)[HEADER_BYTES:])


def test_call_bytes_formula() -> None:
    assert dispatch_bytes(3, 5, 10) == 32 + 5 * 12  # rows padded to 4 bytes
    out, back = expected_call_bytes(num_rows=8, num_pairs=32, row_bytes=2048, presummed=True)
    assert (out, back) == (64 + 8 * 2048 + 32 * 12, 64 + 8 * 2048)
    assert expected_call_bytes(num_rows=8, num_pairs=32, row_bytes=2048, presummed=False)[1] == (
        64 + 32 * 2048
    )
