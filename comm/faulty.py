"""`FaultyLink`: a seeded, faulty wire between a peer and a server, for tests of what survives it.

    link = FaultyLink(server.endpoint("a"), self_host="b", seed=7, to_client=Faults(drop=0.1))
    peers.connect(replace_endpoint(member, link.endpoint("a")))

A relay of real sockets, so it works between processes, under asyncio and under `PeerSet` alike. The
handshake (and the arena's descriptor) passes untouched; every frame after it may be dropped, sent
twice, delayed, have one bit flipped, or be cut in the middle together with its connection. What
happens to the n-th frame of a connection and direction follows from the seed alone.
"""

import os
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final

from remora.comm.auth import (
    ATTACH,
    CHALLENGE_BYTES,
    HELLO_BYTES,
    PROOF_BYTES,
    VERDICT_BYTES,
)
from remora.comm.errors import PeerLostError
from remora.comm.transport import (
    dial,
    format_tcp,
    listen_tcp,
    listen_unix,
    receive_exactly,
)
from remora.comm.view import Endpoint
from remora.comm.wire import HEADER_BYTES, decode_header

CONNECT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per frame, tried in this order; at most one happens to a frame.

    `skip_frames` leaves the first frames of every connection alone. A flipped bit in a body is
    noticed on links between hosts only: Unix sockets do not checksum bodies.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    flip: float = 0.0
    cut: float = 0.0
    delay: float = 0.0
    delay_ms: float = 5.0  # later frames queue behind a delayed one
    skip_frames: int = 0


class FaultyLink:
    """Listens like the server at `target` and relays to it, with faults.

    Args:
        target: where to relay to.
        self_host: as whom to dial it (the target's host label: by Unix socket).
        seed: of all chance.
        to_server, to_client: faults by direction.
    """

    def __init__(
        self,
        target: Endpoint,
        *,
        self_host: str,
        seed: int,
        to_server: Faults | None = None,
        to_client: Faults | None = None,
    ) -> None:
        self._target = target
        self._self_host = self_host
        self._seed = seed
        self._faults = {"to_server": to_server or Faults(), "to_client": to_client or Faults()}
        self.counts: Counter[str] = Counter()  # "drop", "flip", ... that happened
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._tcp = listen_tcp("127.0.0.1")
        self._tcp_address = format_tcp(self._tcp)
        self._unix, self._unix_path = listen_unix()
        for listener in (self._tcp, self._unix):
            listener.setblocking(True)
            self._spawn(self._accept, listener)

    def endpoint(self, host_label: str) -> Endpoint:
        """What to dial instead of the target."""
        return Endpoint(host=host_label, tcp_address=self._tcp_address, unix_path=self._unix_path)

    def close(self) -> None:
        """Cuts every connection and waits for the relay's threads. Idempotent."""
        self._stop.set()
        with self._lock:
            sockets = [*self._sockets, self._tcp, self._unix]
        for sock in sockets:
            _shut(sock)
        for thread in self._threads:
            thread.join()
        for sock in sockets:
            sock.close()

    def _spawn(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                near, _ = listener.accept()
            except OSError:
                return  # closed
            try:
                far = dial(self._target, self._self_host, timeout_s=CONNECT_S)
            except PeerLostError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            number += 1
            self._spawn(self._relay, near, far, number)

    def _relay(self, near: socket.socket, far: socket.socket, number: int) -> None:
        """The handshake in this thread, then one thread for each direction."""
        try:
            far.sendall(receive_exactly(near, HELLO_BYTES))
            challenge = receive_exactly(far, CHALLENGE_BYTES)
            near.sendall(challenge)
            far.sendall(receive_exactly(near, PROOF_BYTES))
            near.sendall(receive_exactly(far, VERDICT_BYTES))
            if challenge[8] & 1:  # an arena was granted
                data, descriptors, _, _ = socket.recv_fds(near, len(ATTACH), 1)
                try:
                    socket.send_fds(far, [data], descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
        except (OSError, PeerLostError):
            _shut(near)
            _shut(far)
            return
        self._spawn(self._pump, far, near, "to_client", number)
        self._pump(near, far, "to_server", number)

    def _pump(
        self, source: socket.socket, target: socket.socket, direction: str, number: int
    ) -> None:
        chance = random.Random(f"{self._seed}/{number}/{direction}")
        faults = self._faults[direction]
        count = 0
        try:
            while not self._stop.is_set():
                head = receive_exactly(source, HEADER_BYTES)
                header = decode_header(memoryview(head))
                frame = bytearray(head + receive_exactly(source, header.inline_bytes))
                fault = _pick(faults, chance) if count >= faults.skip_frames else None
                count += 1
                if fault is not None:
                    with self._lock:
                        self.counts[fault] += 1
                if fault == "drop":
                    continue
                if fault == "delay" and self._stop.wait(faults.delay_ms / 1e3):
                    return
                if fault == "flip":
                    frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
                if fault == "cut":
                    target.sendall(frame[: chance.randrange(len(frame))])
                    return
                target.sendall(frame * 2 if fault == "duplicate" else frame)
        except (OSError, PeerLostError):
            return  # one side is gone: so is the other
        finally:
            _shut(source)
            _shut(target)


def _pick(faults: Faults, chance: random.Random) -> str | None:
    for name in ("drop", "duplicate", "flip", "cut", "delay"):
        if chance.random() < getattr(faults, name):
            return name
    return None


def _shut(sock: socket.socket) -> None:
    """Ends both directions, which also wakes a thread that waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected (any more): nothing to end
