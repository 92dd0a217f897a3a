"""Where a dense rank's time goes, step by step: laps of one clock, so that nothing is left out.

    laps.skip()                 # what passed until now is nobody's: the engine was idle
    plan = state.next_step()
    laps.lap("schedule")        # everything since the last mark

A lap costs some 100 ns, a step has six. What happens inside a lap is told by the kernels' own
counters (`kernels/phases.py`) and the dispatcher's; `remora bench --phases` puts them together.
"""

import time
from collections.abc import Callable

# inbox: messages taken in; schedule: the state machine; inputs: plan and tensors of a step; model:
# all layers and the head, experts included; sampling; emit: messages out.
LAPS = ("inbox", "schedule", "inputs", "model", "sampling", "emit")


class Laps:
    """Nanoseconds by lap since the beginning. Marked by one thread, read by any.

    Attributes:
        spent_ns: running totals, one for each of `LAPS`.
    """

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.spent_ns = dict.fromkeys(LAPS, 0)
        self._now_ns = now_ns
        self._last_ns = now_ns()

    def lap(self, name: str) -> None:
        """What passed since the last mark was `name`, one of `LAPS`."""
        now_ns = self._now_ns()
        self.spent_ns[name] += now_ns - self._last_ns
        self._last_ns = now_ns

    def skip(self) -> None:
        """What passed since the last mark counts for nothing."""
        self._last_ns = self._now_ns()
