"""The thread that asks members for signs of progress, and tells of those that give none."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from typing import Final

from remora.actors.health_state import Beat, HealthState, Life
from remora.comm.errors import ClusterError
from remora.comm.view import View

logger = logging.getLogger(__name__)

EVERY_S: Final = 1.0
SHOWN: Final = 8  # of those that hung, in the status


class HealthWatch:
    """Of one deployment, from its first view to `close`.

    Args:
        ask: begins to ask a life of a member for a beat. Raises ClusterError: there is none.
        hung: told of a life that is to be ended.
        others: lives beside the view's; each is watched again after it hung.
    """

    def __init__(
        self,
        state: HealthState,
        *,
        ask: Callable[[str, int], "Future[Beat]"],
        hung: Callable[[str, int], None],
        others: AbstractSet[Life] = frozenset(),
    ) -> None:
        self._state, self._ask, self._hung = state, ask, hung
        self._others = others
        self._looks = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._total = 0
        self._last: list[str] = []
        self._thread = threading.Thread(target=self._run, name="remora-health", daemon=True)

    def start(self, view: View) -> None:
        """Watch the members of a view, and of those that come after it."""
        self.adopt_view(view)
        self._thread.start()

    def adopt_view(self, view: View) -> None:
        """Watch these members."""
        with self._lock:
            lives = {(m.uid, m.incarnation) for m in view.members}
            self._state.watch(lives | self._others, time.monotonic())

    @property
    def looks_total(self) -> int:
        """How often it has looked: who stays at one number does not look any more."""
        return self._looks

    @property
    def hung_total(self) -> int:
        """How many hung so far."""
        return self._total

    def status(self) -> dict[str, object]:
        """How many hung so far, and the last ones."""
        with self._lock:
            return {"hung_total": self._total, "last": list(self._last)}

    def close(self) -> None:
        """Stop. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            now_s = time.monotonic()
            with self._lock:
                found = self._state.look(now_s)
                self._state.also(self._others, now_s)
                lives = self._state.to_ask(now_s)
                self._total += len(found)
                self._last = [*self._last, *(f"{named(life)}: {why}" for life, why in found)][
                    -SHOWN:
                ]
            for life, why in found:
                logger.error("%s hangs: %s", named(life), why)
                self._hung(*life)
            for life in lives:
                self._ask_one(life)
            self._looks += 1

    def _ask_one(self, life: Life) -> None:
        def told(done: "Future[Beat]") -> None:
            beat = done.result() if done.exception() is None else None
            with self._lock:
                self._state.answered(life, beat, time.monotonic())

        try:
            self._ask(*life).add_done_callback(told)
        except ClusterError:  # its end is told by whoever watches for that
            with self._lock:
                self._state.forget(life)


def named(life: Life) -> str:
    """A life in words; what has no incarnations is named alone."""
    uid, incarnation = life
    return f"{uid}#{incarnation}" if incarnation else uid
