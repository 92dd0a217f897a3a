"""How fast a shard that serves, or joins those who do, takes experts in: a token bucket."""

import threading
import time
from collections.abc import Callable
from typing import Final

BURST_S: Final = 0.05  # of the rate, that may be taken at once


class Pace:
    """Bytes may be taken at a rate that others change.

    Args:
        bytes_per_s: at first; None: as fast as it goes.
    """

    def __init__(
        self, bytes_per_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._changed = threading.Condition()
        self._level = 0.0  # bytes that may be taken now; below zero: owed
        self._at_s = clock()

    @property
    def bytes_per_s(self) -> float | None:
        """The rate; None: none."""
        return self._rate

    def set_rate(self, bytes_per_s: float | None) -> None:
        """From now on; also for who waits."""
        with self._changed:
            self._refill()
            self._rate = bytes_per_s
            self._changed.notify_all()

    def take(self, size_bytes: int) -> None:
        """Wait until nothing is owed, then owe `size_bytes`: long takes are paid for afterwards."""
        with self._changed:
            while True:
                self._refill()
                if self._rate is None or self._level >= 0:
                    break
                self._changed.wait(-self._level / self._rate)
            if self._rate is not None:
                self._level -= size_bytes

    def _refill(self) -> None:
        now_s = self._clock()
        if self._rate is None:
            self._level = 0.0
        else:
            more = (now_s - self._at_s) * self._rate
            self._level = min(self._level + more, BURST_S * self._rate)
        self._at_s = now_s
