"""Which dense ranks run a step together: those that wait when the last one was committed. Pure.

A step moves fixed sizes (`decode`) when the busiest of them fits a bucket, else exact ones. A rank
that asks while a step runs waits for the next; the others take part with no rows.
"""

from remora.comm.nccl_conductor_state import StepWanted
from remora.comm.nccl_plan import capacity_for


class WantsState:
    """What waits, and what runs.

    Args:
        capacity_max: rows of a source in the largest bucket.
    """

    def __init__(self, capacity_max: int) -> None:
        self._capacity_max = capacity_max
        self._waiting: dict[str, int] = {}  # uid -> tokens
        self._running: StepWanted | None = None

    def want(self, uid: str, num_tokens: int) -> None:
        """`uid` has a step of so many tokens; asking again replaces what it asked before."""
        self._waiting[uid] = num_tokens

    def lost(self, uid: str) -> None:
        """`uid` is gone and wants nothing."""
        self._waiting.pop(uid, None)

    def begin(self) -> StepWanted | None:
        """The next step, unless one runs or nobody wants one."""
        if self._running is not None or not self._waiting:
            return None
        capacity = capacity_for(max(self._waiting.values()), self._capacity_max)
        self._running = StepWanted(
            mode="exact" if capacity is None else "decode",
            capacity=capacity or 1,
            sources=tuple(sorted(self._waiting)),
        )
        self._waiting.clear()
        return self._running

    def committed(self) -> None:
        """The step that runs is over for all."""
        self._running = None
