"""Our own admission: a bounded number of sequences per ingress, then 429 with `Retry-After`.

What is admitted is never dropped. Pure: the time is an argument.
"""

import math

from remora.comm.errors import OverloadedError

RETRY_AFTER_S_MAX = 60
RATE_HALF_LIFE_S = 5.0  # of the smoothed finishing rate


class Admission:
    """Counts sequences between admission and their end."""

    def __init__(self, queue_max: int) -> None:
        self.queue_max = queue_max
        self.num_admitted = 0
        self._rate = 0.0  # sequences finished per second, smoothed
        self._last_s: float | None = None

    def admit(self, num_sequences: int) -> None:
        """Take room for a request's sequences.

        Raises:
            OverloadedError: 429, with the seconds after which there should be room.
        """
        if self.num_admitted + num_sequences > self.queue_max:
            raise OverloadedError(
                f"the queue is full: {self.num_admitted} sequences are running or waiting and"
                f" {num_sequences} more were asked for; at most {self.queue_max} are admitted",
                retry_after_s=self.retry_after_s(num_sequences),
            )
        self.num_admitted += num_sequences

    def release(self, num_sequences: int, now_s: float) -> None:
        """Give room back at the end of a request, however it ended."""
        assert num_sequences <= self.num_admitted, f"{num_sequences} > {self.num_admitted} admitted"
        self.num_admitted -= num_sequences
        if self._last_s is not None and now_s > self._last_s:
            elapsed_s = now_s - self._last_s
            keep = 0.5 ** (elapsed_s / RATE_HALF_LIFE_S)
            self._rate = keep * self._rate + (1 - keep) * num_sequences / elapsed_s
        self._last_s = now_s

    def retry_after_s(self, num_sequences: int) -> int:
        """Whole seconds until that many should have finished, 1 to `RETRY_AFTER_S_MAX`."""
        over = self.num_admitted + num_sequences - self.queue_max
        if self._rate <= 0:
            return 1
        return max(1, min(RETRY_AFTER_S_MAX, math.ceil(over / self._rate)))
