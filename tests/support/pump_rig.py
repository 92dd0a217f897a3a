"""A shard with a native pump, and raw frames to it: for the tests of `comm/csrc/pump.cpp`."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from support.comm_rig import TOKEN, WAIT_S, echo_body, member
from torch import Tensor

from remora.comm.auth import CHALLENGE_BYTES, VERDICT_BYTES, ClientHandshake
from remora.comm.expert_protocol import ExpertCall, ExpertService
from remora.comm.native_echo import native_echo
from remora.comm.native_pump import NativePump
from remora.comm.peer import PeerLimits
from remora.comm.peers import PeerSet
from remora.comm.server import FrameServer
from remora.comm.transport import dial, receive_exactly
from remora.comm.view import Endpoint
from remora.comm.wire import HEADER_BYTES, Dtype, Flag, Kind, decode_header, encode_frame

FLOAT32 = int(Dtype.FLOAT32)
WIDTH = 16


def pump_of(shard: ExpertService) -> NativePump:
    assert shard.pump is not None
    return shard.pump


def not_python(call: ExpertCall) -> Tensor:
    raise AssertionError("this call was not to reach Python")


def echo_shard(compute: Callable[[ExpertCall], Tensor] = not_python) -> ExpertService:
    return ExpertService(compute, incarnation=1, native=native_echo(WIDTH, FLOAT32))


@contextlib.contextmanager
def connected(endpoint: Endpoint, host: str = "a", **limits: Any) -> Iterator[PeerSet]:
    peers = PeerSet(token=TOKEN, self_host=host, limits=PeerLimits(**limits))
    peers.connect(member(endpoint))
    try:
        yield peers
    finally:
        peers.close()


def ask(peers: PeerSet, num_rows: int, width: int = WIDTH, **fields: int) -> bytes:
    """One echo call through Python; the answer's body."""
    rows_ND, body = echo_body(num_rows, width)
    call = peers.peer("shard-0").begin(len(body), rows_ND.nbytes)
    assert call is not None, "no credit"
    call.body[:] = body
    sizes = {"num_rows": num_rows, "num_pairs": num_rows, "width": width, "dtype": FLOAT32}
    peers.start(call, flags=Flag.PRESUMMED, **(sizes | fields))
    peers.exchange([call], WAIT_S)
    answer = bytes(call.reply_body)
    call.release()
    return answer


def rows_of(num_rows: int, width: int = WIDTH) -> bytes:
    return echo_body(num_rows, width)[0].numpy().tobytes()


def raw(server: FrameServer, *, unix: bool = True) -> socket.socket:
    """A blocking, authenticated socket without an arena."""
    sock = dial(server.endpoint("a"), "a" if unix else "b", timeout_s=WAIT_S)
    handshake = ClientHandshake(TOKEN, num_regions=16, region_bytes=1 << 16)
    sock.sendall(handshake.hello)
    sock.sendall(handshake.on_challenge(receive_exactly(sock, CHALLENGE_BYTES)))
    handshake.on_verdict(receive_exactly(sock, VERDICT_BYTES))
    return sock


def frame(sequence: int, num_rows: int = 1, **changes: Any) -> bytes:
    """An echo call as bytes; `changes` to its header."""
    fields: dict[str, Any] = {
        "kind": int(Kind.DISPATCH), "flags": int(Flag.PRESUMMED), "num_rows": num_rows,
        "num_pairs": num_rows, "width": WIDTH, "dtype": FLOAT32, "incarnation": 1,
        "sequence": sequence,
    }  # fmt: skip
    return encode_frame(changes.pop("body", echo_body(num_rows, WIDTH)[1]), **(fields | changes))


def receive(sock: socket.socket) -> tuple[int, int, int, bytes]:
    """kind, sequence, rows and body of the next frame."""
    header = decode_header(memoryview(receive_exactly(sock, HEADER_BYTES)))
    return (
        header.kind, header.sequence, header.num_rows, receive_exactly(sock, header.inline_bytes),
    )  # fmt: skip
