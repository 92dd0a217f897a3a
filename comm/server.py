"""`FrameServer`: one loop, one thread, many authenticated peers; the listening side of all links.

    server = FrameServer(host_ip="127.0.0.1", token=token, on_frame=handle, on_lost=forget)
    publish(server.endpoint(host_label))
    server.run()                 # in this thread until server.stop(); or start() / close()

The handler runs in the loop's thread: an expert shard computes right there, so that nothing but
one socket wake-up lies between a request and its rows; a dense rank only queues what came. Frames
of several peers are handled smallest first (`turns.py`). Nothing in the loop blocks: sends that the
socket does not take are queued, calls wait while their answers would not fit there, and a peer
whose queue goes over its bound all the same is closed with a logged reason.
"""

import itertools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from remora.comm.auth import ServerHandshake, check_token
from remora.comm.connection import Connection, Frame
from remora.comm.errors import AuthError, FrameError, PeerLostError
from remora.comm.listeners import Listeners
from remora.comm.native_pump import Handed, NativePump
from remora.comm.transport import tune
from remora.comm.turns import Turns
from remora.comm.view import Endpoint
from remora.comm.wire import FRAME_BYTES_MAX, ErrorCode, Kind

log = logging.getLogger(__name__)

# All that a connection with a held call is looked at for; a send says what is wrong with a socket.
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one server; every one of them closes the connection that goes over it."""

    frame_bytes_max: int = FRAME_BYTES_MAX
    queue_bytes_max: int = 64 << 20  # unsent bytes of one connection
    stall_s: float = 20.0  # that a peer takes none of them while a call of its waits for room
    connections_max: int = 1024
    handshakes_max: int = 64  # unauthenticated connections; over it the oldest goes
    handshake_s: float = 5.0
    num_regions_max: int = 16  # calls of one connection under way
    region_bytes_max: int = 256 << 20


class FrameServer:
    """Listens, authenticates, hands frames to `on_frame(connection, frame)`.

    Args:
        host_ip: address to bind (loopback or what the config names), port chosen by the system.
        token: the cluster's token, at least 16 bytes.
        on_frame: called in the loop's thread. FrameError from it closes the connection; any other
            exception is logged with its traceback and closes the connection too.
        on_lost: called in the loop's thread for each *authenticated* connection that closed.
        unix: listen on an abstract Unix socket too, for peers of the same host.
        incarnation: of this process; frames for another one are answered with an ERROR frame
            (code FENCED). 0 accepts any.
        pump: answers ordinary DISPATCH frames before `on_frame` sees them; then nothing but this
            server's thread may send.
        advertise_ip: address in `endpoint` when it is not `host_ip` (needed for a wildcard bind).
        limits: bounds.

    Raises:
        ValueError: token too short, or a wildcard address without `advertise_ip`.
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        *,
        host_ip: str,
        token: bytes,
        on_frame: Callable[[Connection, Frame], None],
        on_lost: Callable[[Connection], None] | None = None,
        unix: bool = True,
        incarnation: int = 0,
        pump: NativePump | None = None,
        advertise_ip: str | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._token = check_token(token)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self.limits = limits or ServerLimits()
        self.incarnation = incarnation
        self._pump = pump
        self._epoll = select.epoll()
        self._listeners = Listeners(
            host_ip, unix=unix, advertise_ip=advertise_ip, epoll=self._epoll
        )
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._ids = itertools.count(1)
        self._connections: dict[int, Connection] = {}  # by fd
        self._handshakes: dict[Connection, float] = {}  # -> give up at; in order of time
        self._turns = Turns(self.limits.stall_s, self._on_hold)
        self._fenced: frozenset[str] = frozenset()  # names of peers
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._running = False
        self._closed = False
        self._wake_lock = threading.RLock()  # re-entrant: a signal handler may call `stop`
        self._thread: threading.Thread | None = None

    def endpoint(self, host_label: str) -> Endpoint:
        """What to publish; `host_label` is this process's Ray node."""
        return self._listeners.endpoint(host_label)

    def start(self, name: str = "frame-server") -> None:
        """Runs the loop in a thread of its own, ended by `close`."""
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Makes `run` return; callable from any thread, and from a signal handler."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Stops, waits for the thread of `start`, closes every socket. Idempotent."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if not self._running:  # else `run` shuts on its way out
            self._shut()

    def call_soon(self, function: Callable[[], None]) -> None:
        """Runs `function` in the loop's thread; callable from any thread."""
        self._calls.append(function)
        self._wake()

    def fence(self, names: frozenset[str]) -> None:
        """Closes the connections of peers of these names (a dense group's: of all its ranks) and
        shakes no hands with them, until told otherwise; in the loop's thread."""
        self._fenced = names
        for connection in list(self._connections.values()):  # in a handshake too
            if self._is_fenced(connection.peer_name):
                self._close(connection, "fenced")

    def _is_fenced(self, name: str) -> bool:
        return not self._fenced.isdisjoint((name, name.partition(".")[0]))

    @property
    def connections(self) -> list[Connection]:
        """Authenticated connections as of now."""
        return [c for c in list(self._connections.values()) if c.opened]

    def run(self) -> None:
        """The loop; returns after `stop` and closes every socket."""
        self._running = True
        try:
            while not self._stopping:
                self._poll()
                while self._calls:
                    self._calls.popleft()()
                connection = self._turns.take()
                if connection is not None:
                    self._handle(connection)
        finally:
            self._running = False
            self._shut()

    # -- inside ------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._wake_lock:  # the descriptor must not be closed (and reused) under the write
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def _poll(self) -> None:
        timeout_s = self._timeout_s()  # timers run while frames wait, too
        for fd, events in self._wait(0 if self._turns.any_ready else timeout_s):
            connection = self._connections.get(fd)
            if connection is not None:
                self._on_socket(connection, events)
                self._give(connection)
            elif fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._listeners:
                self._accept(fd)

    def _wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Descriptors with events; with a pump, those that it leaves to us."""
        if self._pump is None:
            return self._epoll.poll(timeout_s)
        found = self._pump.poll(self._epoll.fileno(), timeout_s)
        for fd, _, handed in found:
            if handed is not None:
                self._resume(self._connections[fd], handed)
        return [(fd, events) for fd, events, _ in found if events]

    def _give(self, connection: Connection) -> None:
        if self._pump is not None and connection.is_settled:
            self._pump.give(connection)

    def _resume(self, connection: Connection, handed: Handed) -> None:
        """Goes on with a connection that was the pump's."""
        try:
            connection.resume(*handed)
        except FrameError as error:
            self._close(connection, str(error))
        if connection.head is not None:
            self._turns.add(connection)

    def _timeout_s(self) -> float | None:
        """Seconds until the next timer, having run those that are due; None = no timer."""
        turns, listeners = self._turns, self._listeners
        if not self._handshakes and not turns.held and listeners.again_at is None:
            return None
        now = time.monotonic()
        for connection, until in list(self._handshakes.items()):
            if until > now:
                break
            self._close(connection, f"no handshake within {self.limits.handshake_s} s")
        for connection in turns.due(now):
            self._on_socket(connection, select.EPOLLOUT)  # the loop may have been busy until now
        for connection in turns.due(now):
            stall_s, num_bytes = self.limits.stall_s, connection.queued_bytes
            self._close(connection, f"slow peer: took none of {num_bytes} bytes in {stall_s} s")
        if listeners.again_at is not None and listeners.again_at <= now:
            listeners.resume()
        times = [t for d in (self._handshakes, turns.held) for t in itertools.islice(d.values(), 1)]
        if listeners.again_at is not None:
            times.append(listeners.again_at)
        return max(0.0, min(times) - now) if times else None

    def _accept(self, listener_fd: int) -> None:
        sock = self._listeners.accept(listener_fd)
        if sock is None:
            return
        limits = self.limits
        if len(self._connections) >= limits.connections_max:
            log.warning("connection refused: %d are open", limits.connections_max)
            sock.close()
            return
        if len(self._handshakes) >= limits.handshakes_max:
            self._close(next(iter(self._handshakes)), "oldest of too many handshakes")
        sock.setblocking(False)
        tune(sock)
        is_unix = sock.family == socket.AF_UNIX
        connection = Connection(
            next(self._ids),
            sock,
            ServerHandshake(
                self._token,
                allow_arena=is_unix,
                num_regions_max=limits.num_regions_max,
                region_bytes_max=limits.region_bytes_max,
                frame_bytes_max=limits.frame_bytes_max,
                incarnation=self.incarnation,
                refuses=self._is_fenced,
            ),
            checked=not is_unix,
            queue_bytes_max=limits.queue_bytes_max,
            on_backlog=self._on_backlog,
            on_doomed=self._on_doomed,
        )
        self._connections[connection.fd] = connection
        self._handshakes[connection] = time.monotonic() + limits.handshake_s
        self._epoll.register(connection.fd, select.EPOLLIN)

    def _on_socket(self, connection: Connection, events: int) -> None:
        try:
            if events & _WRITABLE and connection.on_writable():
                self._turns.on_written(connection)
            if not events & ~select.EPOLLOUT or connection.head is not None:
                return  # its next frame waits for its turn: read no further
            if not connection.opened:
                if connection.on_handshake_bytes():
                    del self._handshakes[connection]
                return
            connection.on_readable()
            if connection.head is not None:
                self._turns.add(connection)
        except BlockingIOError:
            return
        except (FrameError, AuthError, PeerLostError, OSError) as error:
            self._close(connection, str(error))

    def _handle(self, connection: Connection) -> None:
        frame = connection.head
        assert frame is not None, f"{connection} is ready without a frame"
        try:
            self._dispatch(connection, frame)
            if connection.close_reason is not None:
                return
            del frame  # its memory must be free to be compacted
            connection.consume_head()
            if connection.head is not None:
                self._turns.add(connection)
            else:
                self._give(connection)
        except FrameError as error:
            self._close(connection, str(error))
        except Exception:
            log.exception("handler failed on a frame of %r", connection)
            self._close(connection, "the handler failed")

    def _dispatch(self, connection: Connection, frame: Frame) -> None:
        header = frame.header
        if header.kind == Kind.PING:
            connection.send(Kind.PONG, frame.body, sequence=header.sequence)
            return
        if self.incarnation and header.incarnation != self.incarnation:
            connection.send(
                Kind.ERROR,
                f"this is incarnation {self.incarnation}".encode(),
                num_rows=ErrorCode.FENCED,
                incarnation=self.incarnation,
                sequence=header.sequence,
            )
            return
        if header.kind == Kind.CONTROL and not connection.check_control_sequence(header.sequence):
            return
        if header.kind == Kind.DISPATCH:
            assert connection.grants is not None
            if not connection.is_new_call(header.sequence):
                return
            if connection.outstanding >= connection.grants.num_regions:
                raise FrameError(f"{connection.outstanding} calls under way: credits used up")
            connection.outstanding += 1
        self._on_frame(connection, frame)

    def _on_backlog(self, connection: Connection, waits: bool) -> None:
        handed = self._pump.take(connection) if waits and self._pump is not None else None
        if handed is not None:  # what it would send must not go ahead
            self._resume(connection, handed)
        events = select.EPOLLIN | select.EPOLLOUT if waits else select.EPOLLIN
        self._epoll.modify(connection.fd, events)

    def _on_hold(self, connection: Connection, held: bool) -> None:
        events = 0 if held else select.EPOLLIN  # what it sent, unread, would wake us all the time
        if connection.queued_bytes:
            events |= select.EPOLLOUT
        self._epoll.modify(connection.fd, events)

    def _on_doomed(self, connection: Connection, reason: str) -> None:
        self.call_soon(lambda: self._close(connection, reason))

    def _close(self, connection: Connection, reason: str) -> None:
        if self._connections.get(connection.fd) is not connection:
            return
        log.info("closing %r: %s", connection, reason)
        if self._pump is not None:
            self._pump.take(connection)
        del self._connections[connection.fd]
        self._handshakes.pop(connection, None)
        self._turns.remove(connection)
        connection.close(reason)
        self._listeners.resume()  # there is a descriptor again
        if connection.opened and self._on_lost is not None:
            self._on_lost(connection)

    def _shut(self) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        for connection in list(self._connections.values()):
            self._close(connection, "server stopped")
        self._listeners.close()
        self._epoll.close()
