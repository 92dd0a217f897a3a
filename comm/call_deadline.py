"""How long a dense rank waits for the answers of a layer: a bound from measured service time.

A shard that has stopped costs its callers one deadline, so it should be short; one that computes a
long prefill beside others on a busy machine is slow and not gone, so it must not be too short. It
is a multiple of the slowest layer of late, between `LEAST_S` and what the configuration allows; and
where an expert has one replica only, nobody could be asked instead: then it is the latter.
"""

from typing import Final

LEAST_S: Final = 1.0  # a process that is not scheduled, or pages that are read, on a busy machine
TIMES_SLOWEST: Final = 8.0
DECAY: Final = 0.9995  # of the slowest, a layer: half of it after 1,400


class CallDeadline:
    """Of one dense rank.

    Args:
        most_s: what the configuration allows.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._slowest_s = 0.0

    def note(self, took_s: float, layers: int = 1) -> None:
        """Layers were answered, the slowest of them in this time, without a retry."""
        self._slowest_s = max(took_s, DECAY**layers * self._slowest_s)

    def seconds(self, *, is_redundant: bool) -> float:
        """For the next layer; a power of two of `LEAST_S`, so that it seldom changes.

        Args:
            is_redundant: whatever shard is late, others hold all of its experts.
        """
        if not is_redundant:
            return self._most_s
        wanted_s, found_s = TIMES_SLOWEST * self._slowest_s, LEAST_S
        while found_s < wanted_s and found_s < self._most_s:
            found_s *= 2.0
        return min(found_s, self._most_s)
