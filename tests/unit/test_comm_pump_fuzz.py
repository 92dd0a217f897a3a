"""Frames that no requester of ours sends: the pump must be as Python is, and never crash."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_rig import TOKEN, WAIT_S, at_end, echo_body, member, serve
from support.pump_rig import FLOAT32, WIDTH, echo_shard, frame, raw, receive, rows_of
from torch import Tensor

from remora.comm import native
from remora.comm.errors import PeerLostError
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer, ServerLimits
from remora.comm.wire import HEADER_BYTES, Flag, Kind, encode_frame, pack_header

pytestmark = pytest.mark.skipif(native.native_extension() is None, reason="not built")

FIELDS = {
    "kind": st.integers(0, 9),
    "flags": st.integers(0, 15),
    "layer": st.integers(0, 3),
    "length": st.integers(0, 1 << 20),
    "num_rows": st.sampled_from([0, 1, 3, 4, 5, 1 << 20, (1 << 32) - 1]),
    "num_pairs": st.sampled_from([0, 1, 3, 4, 5, 1 << 20, (1 << 32) - 1]),
    "width": st.sampled_from([0, 1, 8, 15, 16, 17, 65535]),
    "dtype": st.integers(0, 4),
    "region": st.integers(0, 5),
    "incarnation": st.integers(0, 3),
    "sequence": st.integers(0, 3),
    "reply_offset": st.sampled_from([0, 63, 64, 1 << 15, (1 << 16) - 64, 1 << 16, (1 << 32) - 64]),
    "body_crc": st.integers(0, 1),
}


@pytest.fixture(scope="module")
def twins() -> Iterator[dict[bool, FrameServer]]:
    """One server with a pump, one without; small frames only, so that fuzzing stays small."""
    limits = ServerLimits(frame_bytes_max=1 << 17)

    def compute(call: ExpertCall) -> Tensor:
        return call.out_MD.copy_(call.rows_ND) if call.presummed else call.rows_ND[call.pair_row_P]

    with contextlib.ExitStack() as stack:
        made = {}
        for pumped in (True, False):
            shard = echo_shard(compute) if pumped else ExpertService(compute, incarnation=1)
            made[pumped] = stack.enter_context(serve(shard, limits=limits))[0]
        yield made


@settings(max_examples=150)
@given(
    changes=st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), max_size=3),
    data=st.data(),
)
def test_no_header_tells_pump_and_python_apart(
    twins: dict[bool, FrameServer], changes: dict[str, None], data: st.DataObject
) -> None:
    """Well-formed but senseless frames, with an arena: same answers, or the same end."""
    drawn = {name: data.draw(FIELDS[name], name) for name in sorted(changes)}
    pairs = data.draw(st.lists(st.integers(-2, 5), min_size=4, max_size=4), "pair rows")
    rows, body = echo_body(4, WIDTH)
    body = (
        body[: rows.nbytes]
        + b"".join(p.to_bytes(4, "little", signed=True) for p in pairs)
        + (body[rows.nbytes + 16 :])
    )
    heard = {pumped: _answers(server, drawn, body) for pumped, server in twins.items()}
    assert heard[True] == heard[False]


def _answers(server: FrameServer, changes: dict[str, int], body: bytes) -> list[Any]:
    """What comes back for a good call, a changed one and a ping; the arena's answers too."""
    limits = PeerLimits(region_bytes=1 << 16, num_regions=2)
    peers = PeerSet(token=TOKEN, self_host="a", limits=limits)
    peer = peers.connect(member(server.endpoint("a")))
    sock = peer.sock
    sock.settimeout(WAIT_S)
    memory = peer.memory.view
    for region in range(2):
        memory[region << 16 : (region << 16) + 64 + len(body)] = bytes(64) + body
    good = {
        "kind": int(Kind.DISPATCH), "flags": int(Flag.PRESUMMED), "num_rows": 4, "num_pairs": 4,
        "width": WIDTH, "dtype": FLOAT32, "incarnation": 1, "sequence": 2, "reply_offset": 1 << 15,
    }  # fmt: skip
    changed = good | changes
    length = changed.pop("length", len(body))
    in_arena = changed["flags"] & Flag.ARENA
    head = bytearray(HEADER_BYTES)
    pack_header(head, 0, length=length, **changed)
    inline = b"" if in_arena else (body + bytes(max(0, length - len(body))))[:length]
    heard: list[Any] = []
    try:
        sock.sendall(frame(1, 4, body=echo_body(4, WIDTH)[1]))
        sock.sendall(bytes(head) + inline + encode_frame(b"!", kind=Kind.PING, sequence=9))
        while True:
            heard.append(receive(sock))
            if heard[-1][0] == Kind.PONG:
                break
    except (PeerLostError, ConnectionError):
        heard.append("closed")
    heard.append(bytes(memory[1 << 15 : (1 << 15) + 1024]))
    peers.close()
    return heard


@settings(max_examples=60)
@given(data=st.binary(min_size=1, max_size=400), at=st.integers(0, 400))
def test_damaged_bytes_never_hurt_others(
    twins: dict[bool, FrameServer], data: bytes, at: int
) -> None:
    good = frame(1, 4)
    with raw(twins[True]) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(good[:at] + data + good[at:])
            sock.shutdown(socket.SHUT_WR)
        assert at_end(sock)
    with raw(twins[True]) as sock:
        sock.sendall(good)
        assert receive(sock) == (Kind.COMBINED, 1, 4, rows_of(4))
