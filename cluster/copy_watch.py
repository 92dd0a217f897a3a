"""Sees to it that copies do not slow decoding down: looks at dense ranks, and tells who copies.

A thread that sleeps until something is copied. What it decides by is pure
(`autoscale/copy_rate.py`).
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from remora.autoscale.copy_rate import CopyRate, StepTotals
from remora.cluster.members import answers_within

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.5
ANSWER_S: Final = 1.0  # for dense ranks to tell


class CopyWatch:
    """Used by any thread.

    Args:
        members: handles of living members by uid, asked anew at each look.
    """

    def __init__(self, members: Callable[[], Mapping[str, Any]]) -> None:
        self._rate = CopyRate()
        self._members = members
        self._changed = threading.Condition()
        self._takers: dict[str, int] = {}  # uid -> its copies under way
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="remora-copy-watch", daemon=True)
        self._thread.start()

    @property
    def share(self) -> float:
        """That an order is to begin with."""
        return self._rate.share

    def begun(self, uid: str) -> None:
        """A shard begins to take experts."""
        with self._changed:
            self._takers[uid] = self._takers.get(uid, 0) + 1
            self._changed.notify_all()

    def ended(self, uid: str) -> None:
        """It has taken them, or will not."""
        with self._changed:
            self._takers[uid] -= 1
            if not self._takers[uid]:
                del self._takers[uid]
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, without waiting for it: it may be asking somebody."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- inside -------------------------------------------------------------------------------

    def _run(self) -> None:
        self._rate.end(self._totals())
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._takers or self._closed)
                if self._closed:
                    return
            self._tell(self._rate.begin(self._totals()))
            while self._copying():
                self._tell(self._rate.observe(self._totals()))
            self._rate.end(self._totals())

    def _copying(self) -> bool:
        """Until the next look; whether there is still something to look at."""
        with self._changed:
            return not self._changed.wait_for(
                lambda: not self._takers or self._closed, LOOK_EVERY_S
            )

    def _totals(self) -> dict[str, StepTotals]:
        dense = {u: h for u, h in self._members().items() if u.startswith("dense-")}
        answers = answers_within({u: h.status.remote() for u, h in dense.items()}, ANSWER_S)
        return {
            uid: StepTotals(told["steps_total"], told["step_s"], told["num_running"])
            for uid, told in answers.items()
            if isinstance(told, dict) and "step_s" in told
        }

    def _tell(self, share: float) -> None:
        with self._changed:
            takers = set(self._takers)
        for uid, handle in self._members().items():
            if uid in takers:
                handle.set_copy_share.remote(share)
