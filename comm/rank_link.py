"""The connections of a tensor-parallel group: rank 0 to every other rank, and what goes over them.

Rank 0 listens, the others dial and prove that they know the cluster's token (`comm/auth.py`).
Afterwards each message is a length of four bytes and msgpack; rank 0 asks, the others answer where
an answer is due. A connection that ends tells that the rank is gone.
"""

import logging
import select
import socket
import struct
import time
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from remora.comm.auth import (
    CHALLENGE_BYTES,
    VERDICT_BYTES,
    ClientHandshake,
    ServerHandshake,
)
from remora.comm.errors import AuthError, ClusterError, DeadlineError, FrameError, PeerLostError
from remora.comm.transport import dial, format_tcp, listen_tcp, listen_unix, receive_exactly, tune
from remora.comm.view import Endpoint, View

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 1 << 26
PEEK_BYTES_MAX: Final = 1 << 16
HANDSHAKE_S: Final = 10.0
_LENGTH: Final = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank says who it is."""

    rank: int
    host: str  # label, as in endpoints
    kernels: str  # what the last bits of its results depend on (`tp_group.kernels_of`)


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How the group exchanges. With shared memory a descriptor follows (`send_descriptor`)."""

    kind: str  # "shared", "gloo" or "nccl"
    capacity: int = 0  # of one buffer in shared memory
    store_ip: str = ""  # of torch.distributed's store
    store_port: int = 0
    unique_id: bytes = b""  # of NCCL's communicator


class Shuffle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How rows are divided among the ranks (`comm/shuffle.py`); follows `Setup`, before loading."""

    form: Literal["none", "exact", "speculative"]
    alike: bool  # all ranks compute with the same kernels, hence the same bits


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step: everything that a rank must know to run it."""

    epoch: int  # of the view that rank 0 has adopted
    sequence: int  # of the group's last exchange
    is_compiled: bool
    num_rows: int  # padding included
    starts: list[int]
    lengths: list[int]
    block_tables: list[list[int]]
    token_ids: list[int]
    logit_rows: list[int]


class Adopt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Connect to the shards of a view. Answered."""

    view: View
    rank_hosts: list[str]  # host of each rank: which shards it is near
    or_none: bool = False  # also where an expert has no replica that this rank can reach


class Look(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take late answers of shards, and dial lost ones. Answered."""


class TakeSent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Say what you sent to each shard since the last one. Answered with `Sent`."""


class Pairs(msgspec.Struct, frozen=True, kw_only=True):
    """(token, expert) pairs by layer and shard."""

    shape: tuple[int, int]  # L, S
    data: bytes  # int64 [L, S]

    @classmethod
    def of(cls, pairs_LS: NDArray[np.int64]) -> "Pairs":
        """Of an array `[L, S]`."""
        data = np.ascontiguousarray(pairs_LS, np.int64).tobytes()
        return cls(shape=(pairs_LS.shape[0], pairs_LS.shape[1]), data=data)

    def array(self) -> NDArray[np.int64]:
        """int64 `[L, S]`. Raises FrameError: it is of another size."""
        if len(self.data) != 8 * self.shape[0] * self.shape[1]:
            raise FrameError(f"pairs of shape {self.shape} in {len(self.data)} bytes")
        return np.frombuffer(self.data, np.int64).reshape(self.shape)


class Sent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a rank sent since the last one (`Dispatcher.take_sent`)."""

    epoch: int  # of the view whose layers and shards these are; 0: of none
    pairs: Pairs | None = None


class Loads(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What others sent to each shard since the last one (`Dispatcher.note_others`)."""

    epoch: int  # of the view whose layers and shards these are
    groups: Pairs | None  # of other dense groups; None: nobody can tell
    ranks: Pairs | None  # of the ranks beside this one; None: nobody has told
    top_k: int


class Compile(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Compile the layers and warm them up. Answered."""


class UseEager(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run layers as they are. Answered."""


class Recover(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step failed: leave it, and meet again as `generation`. Answered with what went wrong."""

    generation: int
    unique_id: bytes = b""  # of NCCL's new communicator


class Broke(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank's step failed. Unasked, and only where exchanges do not tell it themselves (NCCL)."""

    reason: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer of a rank."""

    error: str | None = None  # what went wrong with it
    lacks_experts: bool = False  # some have no replica that it can use; of `Recover` and `Look`


Message = (
    Hello | Setup | Shuffle | Order | Adopt | Look | TakeSent | Sent | Loads | Compile | UseEager
    | Recover | Broke | Done
)  # fmt: skip
_decoder: Final = msgspec.msgpack.Decoder(Message)
_encoder: Final = msgspec.msgpack.Encoder()


class Link:
    """One end of a connection, after the handshake."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Descriptor that hangs up when the other end is gone."""
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """Raises PeerLostError."""
        body = _encoder.encode(message)
        try:
            self._sock.settimeout(HANDSHAKE_S)
            self._sock.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise PeerLostError(f"connection lost: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message; None: wait as long as the other end lives.

        Raises:
            PeerLostError, DeadlineError, FrameError.
        """
        try:
            self._sock.settimeout(timeout_s)
            (length,) = _LENGTH.unpack(receive_exactly(self._sock, _LENGTH.size))
            if length > MESSAGE_BYTES_MAX:
                raise FrameError(f"message of {length} bytes: at most {MESSAGE_BYTES_MAX}")
            message: Message = _decoder.decode(receive_exactly(self._sock, length))
            return message
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {timeout_s:g} s") from error
        except OSError as error:
            raise PeerLostError(f"connection lost: {error}") from error
        except msgspec.DecodeError as error:
            raise FrameError(f"message: {error}") from error

    def peek(self) -> Message | None:
        """The next message if it has come whole and is not long; it stays to be received.

        Raises:
            PeerLostError, FrameError.
        """
        try:
            if not select.select([self._sock], [], [], 0)[0]:
                return None
            data = self._sock.recv(PEEK_BYTES_MAX, socket.MSG_PEEK)
            if not data:
                raise PeerLostError("connection lost: its other end is closed")
            end = _LENGTH.size + (_LENGTH.unpack_from(data)[0] if len(data) >= 4 else 1)
            if len(data) < end:
                return None
            message: Message = _decoder.decode(data[_LENGTH.size : end])
            return message
        except OSError as error:
            raise PeerLostError(f"connection lost: {error}") from error
        except msgspec.DecodeError as error:
            raise FrameError(f"message: {error}") from error

    def send_descriptor(self, descriptor: int) -> None:
        """Pass a descriptor over a Unix socket. Raises PeerLostError."""
        try:
            socket.send_fds(self._sock, [b"D"], [descriptor])
        except OSError as error:
            raise PeerLostError(f"connection lost: {error}") from error

    def receive_descriptor(self) -> int:
        """A descriptor that is ours to close. Raises PeerLostError, FrameError."""
        try:
            self._sock.settimeout(HANDSHAKE_S)
            data, descriptors, _, _ = socket.recv_fds(self._sock, 1, 1)
        except OSError as error:
            raise PeerLostError(f"connection lost: {error}") from error
        if data != b"D" or len(descriptors) != 1:
            raise FrameError(f"{data!r} and {len(descriptors)} descriptors, expected is one")
        return descriptors[0]

    def shut_down(self) -> None:
        """End the connection from another thread than the one that receives."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("the connection has ended already: %s", error)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


class RankListener:
    """Where the other ranks of a group find rank 0."""

    def __init__(self, *, host_ip: str, use_unix: bool, token: bytes) -> None:
        self._token = token
        self._tcp = listen_tcp(host_ip)
        self._listeners = [self._tcp]
        self._unix_path: str | None = None
        if use_unix:
            unix, self._unix_path = listen_unix()
            self._listeners.append(unix)

    def endpoint(self, host: str, advertised_ip: str | None) -> Endpoint:
        """Where to dial; `advertised_ip` stands for a wildcard address."""
        address = format_tcp(self._tcp)
        if advertised_ip is not None:
            address = f"{advertised_ip}:{address.rpartition(':')[2]}"
        return Endpoint(host=host, tcp_address=address, unix_path=self._unix_path)

    def accept(self, size: int, timeout_s: float) -> dict[int, tuple[Hello, Link]]:
        """The other `size - 1` ranks, each once.

        Raises:
            DeadlineError: naming the ranks that have not come.
        """
        found: dict[int, tuple[Hello, Link]] = {}
        until_s = time.monotonic() + timeout_s
        while len(found) < size - 1:
            left_s = max(0.0, until_s - time.monotonic())
            ready, _, _ = select.select(self._listeners, [], [], left_s)
            if not ready:
                missing = sorted(set(range(1, size)) - found.keys())
                raise DeadlineError(f"ranks {missing} did not come within {timeout_s:g} s")
            for listener in ready:
                sock, _ = listener.accept()
                try:
                    link = Link(self._greet(sock))
                    hello = link.receive(HANDSHAKE_S)
                except (ClusterError, OSError):  # a stranger: whoever is missing is told above
                    sock.close()
                    continue
                if isinstance(hello, Hello) and 0 < hello.rank < size and hello.rank not in found:
                    found[hello.rank] = (hello, link)
                else:
                    link.close()
        return found

    def close(self) -> None:
        """Listen no more."""
        for listener in self._listeners:
            listener.close()

    def _greet(self, sock: socket.socket) -> socket.socket:
        """The server's side of the handshake. Raises AuthError, PeerLostError, OSError."""
        tune(sock)
        sock.settimeout(HANDSHAKE_S)
        server = ServerHandshake(
            self._token,
            allow_arena=False,
            num_regions_max=1,
            region_bytes_max=0,
            frame_bytes_max=MESSAGE_BYTES_MAX,
            incarnation=0,
        )
        sock.sendall(server.feed(receive_exactly(sock, server.needed)))
        sock.sendall(server.feed(receive_exactly(sock, server.needed)))
        if not server.accepted:
            raise AuthError("peer could not prove that it knows the cluster token")
        return sock


def dial_rank_0(endpoint: Endpoint, token: bytes, hello: Hello, timeout_s: float) -> Link:
    """Connect to rank 0, prove that we know the token, and say who we are.

    Raises:
        PeerLostError, AuthError.
    """
    sock = dial(endpoint, hello.host, timeout_s=timeout_s)
    try:
        client = ClientHandshake(token, name=f"rank-{hello.rank}")
        sock.sendall(client.hello)
        sock.sendall(client.on_challenge(receive_exactly(sock, CHALLENGE_BYTES)))
        client.on_verdict(receive_exactly(sock, VERDICT_BYTES))
    except OSError as error:
        sock.close()
        raise PeerLostError(f"rank 0 does not shake hands: {error}") from error
    except ClusterError:
        sock.close()
        raise
    link = Link(sock)
    link.send(hello)
    return link
