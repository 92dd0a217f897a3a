"""What one connection has to send: at once as far as the socket takes it, the rest in order."""

import socket
import threading
from collections import deque
from collections.abc import Callable

from remora.comm.accounting import LinkCounters


class Outbox:
    """Usable from any thread; never blocks.

    Args:
        sock: non-blocking.
        counters: sent frames, bytes and rows are counted here.
        queue_bytes_max: unsent bytes; a peer that lets more pile up is given up. One frame alone
            may always wait.
        on_backlog: called with True when bytes begin to wait, with False when none do any more.
        on_doomed: called with the reason when the connection must be closed.

    Attributes:
        lock: held while frames are sent; take it to number what `transmit_locked` sends.
    """

    def __init__(
        self,
        sock: socket.socket,
        counters: LinkCounters,
        *,
        queue_bytes_max: int,
        on_backlog: Callable[[bool], None],
        on_doomed: Callable[[str], None],
    ) -> None:
        self.lock = threading.Lock()
        self._sock = sock
        self._counters = counters
        self._queue_bytes_max = queue_bytes_max
        self._on_backlog = on_backlog
        self._on_doomed = on_doomed
        self._closed = False
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._out_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes may wait behind those that do."""
        return not self._out or self._out_bytes + num_bytes <= self._queue_bytes_max

    def transmit(
        self, frame: bytes | bytearray | memoryview, counted_bytes: int, num_rows: int
    ) -> bool:
        """Sends or queues encoded bytes and counts them; False when the connection is closed, or
        is now because its queue went over its bound."""
        with self.lock:
            return self.transmit_locked(memoryview(frame), counted_bytes, num_rows)

    def transmit_locked(self, frame: memoryview, counted_bytes: int, num_rows: int) -> bool:
        """`transmit`, for who holds `lock`."""
        if self._closed:
            return False
        counters = self._counters
        counters.sent_frames += 1
        counters.sent_bytes += counted_bytes
        counters.sent_rows += num_rows
        counters.arena_bytes += counted_bytes - len(frame)
        if not self._out:
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._doom(f"send failed: {error}")
                return False
            if sent == len(frame):
                return True
            frame = frame[sent:]
        return self._queue(frame)

    def queue(self, rest: bytes) -> None:
        """Appends what is left of a frame that was counted and begun elsewhere."""
        with self.lock:
            self._queue(memoryview(rest))

    def on_writable(self) -> int:
        """Sends what waits; the number of bytes that the socket took. Raises OSError."""
        taken = 0
        with self.lock:
            while self._out:
                try:
                    sent = self._sock.send(self._out[0])
                except BlockingIOError:
                    return taken
                taken += sent
                self._out_bytes -= sent
                if sent < len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                    return taken
                self._out.popleft()
            if not self._closed:  # under the lock, or a send in between would wait for ever
                self._on_backlog(False)
        return taken

    def close(self) -> None:
        """Closes the socket; called by the server's loop only."""
        with self.lock:
            self._closed = True
            self._out.clear()
            self._out_bytes = 0
            self._sock.close()

    def _queue(self, frame: memoryview) -> bool:
        if not self.has_room(len(frame)):
            num_bytes = self._out_bytes + len(frame)
            self._doom(f"slow peer: {num_bytes} bytes wait, allowed are {self._queue_bytes_max}")
            return False
        self._out.append(memoryview(bytes(frame)))
        self._out_bytes += len(frame)
        if len(self._out) == 1:
            self._on_backlog(True)
        return True

    def _doom(self, reason: str) -> None:
        """Stops sending at once; the loop closes the socket (it alone may, or the fd is reused)."""
        self._closed = True
        self._out.clear()
        self._out_bytes = 0
        self._on_doomed(reason)
