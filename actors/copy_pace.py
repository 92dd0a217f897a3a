"""How fast a shard that serves, or joins those who do, takes experts in.

A token bucket of bytes, and rest after work: of a thread that may take a share of a core. At idle
priority alone it takes every moment in which a serving thread waits, and each of those costs them:
caches, the interpreter's lock, the core's other hyperthread.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

BURST_S: Final = 0.05  # of the rate, that may be taken at once
REST_S_MIN: Final = 0.002  # shorter ones are put together: a wake-up is work, too


class Pace:
    """Bytes and CPU time may be taken, a share of which others change.

    Args:
        bytes_per_s: at most; None: as fast as it goes.
        share: 0 < share <= 1, of those bytes/s and of a core.
    """

    def __init__(
        self,
        bytes_per_s: float | None = None,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = bytes_per_s
        self._share = share
        self._clock = clock
        self._changed = threading.Condition()
        self._level = 0.0  # bytes that may be taken now; below zero: owed
        self._at_s = clock()

    @property
    def bytes_per_s(self) -> float | None:
        """The rate; None: none."""
        return None if self._most is None else self._most * self._share

    @property
    def share(self) -> float:
        """Of a core, and of the most bytes/s."""
        return self._share

    def set_share(self, share: float) -> None:
        """From now on; also for who waits."""
        with self._changed:
            self._refill()
            self._share = share
            self._changed.notify_all()

    def take(self, size_bytes: int) -> None:
        """Wait until nothing is owed, then owe `size_bytes`: long takes are paid for afterwards."""
        with self._changed:
            while True:
                self._refill()
                rate = self.bytes_per_s
                if rate is None or self._level >= 0:
                    break
                self._changed.wait(-self._level / rate)
            if rate is not None:
                self._level -= size_bytes

    def rest(self, worked_s: float) -> None:
        """Wait as long as makes `worked_s` of a core's time the share of both."""
        with self._changed:
            while True:
                share = self._share
                rest_s = worked_s * (1 / share - 1)
                if rest_s <= 0:
                    return
                begin_s = self._clock()
                self._changed.wait(rest_s)
                worked_s *= 1 - (self._clock() - begin_s) / rest_s

    def _refill(self) -> None:
        now_s = self._clock()
        rate = self.bytes_per_s
        if rate is None:
            self._level = 0.0
        else:
            self._level = min(self._level + (now_s - self._at_s) * rate, BURST_S * rate)
        self._at_s = now_s


class Effort:
    """CPU time of the calling thread, after which it rests. Create it in that thread."""

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.thread_time) -> None:
        self._pace = pace
        self._clock = clock
        self._from_s = clock()

    def pause(self) -> None:
        """Rest after what was done since the last rest, if that makes one worth it."""
        worked_s = self._clock() - self._from_s
        share = self._pace.share
        if worked_s * (1 / share - 1) >= REST_S_MIN:
            self._pace.rest(worked_s)
            self._from_s = self._clock()
