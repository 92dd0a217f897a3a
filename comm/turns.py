"""Whose frame a server handles next, and whose call waits until its peer has read.

A connection with a complete frame is *ready*. The frame with the fewest rows goes first (decode
ahead of sliced prefill), one that was passed over `SKIPS_MAX` times ahead of all.

A call whose answer would not fit behind what its peer has not read yet is *held*. A shard computes
faster than a link carries, and credits allow more answers than a queue has room for: computed at
once, they would be kept without bound, or cost an honest requester its connection. Held calls take
nothing from others, and end with their connection when the peer takes no byte for `stall_s`.
"""

import time
from collections.abc import Callable

from remora.comm.connection import Connection
from remora.comm.native_pump import SKIPS_MAX


class Turns:
    """Of one server, used in its loop's thread.

    Args:
        stall_s: a held call's peer must take something of its answers in this time.
        on_hold: called with True when a call is held, with False when it is ready again.

    Attributes:
        held: connection -> when it is to be given up (monotonic); in order of time.
    """

    def __init__(self, stall_s: float, on_hold: Callable[[Connection, bool], None]) -> None:
        self._stall_s = stall_s
        self._on_hold = on_hold
        self._ready: list[Connection] = []
        self.held: dict[Connection, float] = {}

    @property
    def any_ready(self) -> bool:
        """Whether `take` may find one."""
        return bool(self._ready)

    def add(self, connection: Connection) -> None:
        """It has a complete frame."""
        self._ready.append(connection)

    def take(self) -> Connection | None:
        """Whose frame is to be handled now; it leaves. None: nobody's, all are held by now."""
        ready = self._ready
        while ready:
            connection = ready[0] if len(ready) == 1 else min(ready, key=_turn)
            ready.remove(connection)
            if not connection.has_room:
                self.held[connection] = time.monotonic() + self._stall_s
                self._on_hold(connection, True)
                continue
            connection.skipped = 0
            for other in ready:
                other.skipped += 1
            return connection
        return None

    def on_written(self, connection: Connection) -> None:
        """Its peer took some of what waited: a held call may go on, or has time again."""
        if self.held.pop(connection, None) is None:
            return
        if connection.has_room:
            self._ready.append(connection)
            self._on_hold(connection, False)
        else:
            self.held[connection] = time.monotonic() + self._stall_s

    def due(self, now: float) -> list[Connection]:
        """Held ones whose time is over."""
        return [connection for connection, until in self.held.items() if until <= now]

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        self.held.pop(connection, None)
        if connection in self._ready:
            self._ready.remove(connection)


def _turn(connection: Connection) -> tuple[bool, int]:
    """Sort key: passed over too often first, then fewest rows."""
    assert connection.head is not None
    return connection.skipped < SKIPS_MAX, connection.head.header.num_rows
