"""Dense groups look after the coordinator: one that hangs is ended, and Ray starts it again.

The coordinator watches members and the router for signs of progress; who watches it must be there
wherever something is served, so the dense groups do. Each asks for a beat, which the coordinator
gives once its thread of operations has come round. After `hang_s` without one the first group of
the view (by uid) ends it; the second waits `TURN_S` longer, as the first may hang too, and so on.
Before there is a dense group whoever waits for the deployment to come up does it.
The call that waits fails when somebody else was faster: its next life is not blamed.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import ray

from remora.actors.health_state import Beat, HealthState, Life
from remora.actors.launch import RAY_NAMESPACE, coordinator_name
from remora.comm.errors import ClusterError
from remora.comm.view import View

logger = logging.getLogger(__name__)

HEARTBEATS: Final = "heartbeats"  # the coordinator's thread for them: others may fill its own
TURN_S: Final = 5.0
LOOKS: Final = 8  # in `hang_s`: each group asks once in that time, however many there are
COORDINATOR: Final[Life] = ("coordinator", 0)


class CoordinatorWatch:
    """Of one dense group, from its first view to `close`; or of who waits for a start.

    Args:
        uid: the group's; "" of who waits.
        hang_s: longest wait for a beat of who is first in line.
        start_s: longest time that a new life may take before it answers.
        ask: begins to ask for a beat. Raises ClusterError: there is nobody.
        end: ends the coordinator that there is.
    """

    def __init__(
        self,
        uid: str,
        *,
        hang_s: float,
        start_s: float,
        ask: Callable[[], "Future[Beat]"],
        end: Callable[[], None],
    ) -> None:
        self._uid, self._hang_s, self._start_s = uid, hang_s, start_s
        self._ask, self._end = ask, end
        self._lock = threading.Lock()  # guards the state
        self._state: HealthState | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remora-coordinator", daemon=True)

    def begin(self) -> None:
        """Be the first in line: there is no view yet."""
        self._take_turn(0)

    def adopt_view(self, view: View) -> None:
        """Take this group's place in line. Any thread."""
        self._take_turn(turn_of(self._uid, view))

    def _take_turn(self, turn: int) -> None:
        hang_s = self._hang_s + TURN_S * turn
        with self._lock:
            is_first = self._state is None
            self._state = HealthState(hang_s=hang_s, stall_s=hang_s + self._start_s)
            self._state.watch({COORDINATOR}, time.monotonic())
        if is_first:
            self._thread.start()

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._hang_s / LOOKS):
            now_s = time.monotonic()
            with self._lock:
                assert self._state is not None, "started with the first turn"
                found, state = self._state.look(now_s), self._state
                state.also({COORDINATOR}, now_s)  # its next life
                is_due = bool(state.to_ask(now_s))
            for _, why in found:
                logger.error("the coordinator hangs and is ended: %s", why)
                self._end()
            if is_due:
                self._ask_once(state)

    def _ask_once(self, state: HealthState) -> None:
        def told(done: "Future[Beat]") -> None:
            beat = done.result() if done.exception() is None else None
            with self._lock:
                state.answered(COORDINATOR, beat, time.monotonic())

        try:
            self._ask().add_done_callback(told)
        except ClusterError:  # none of that name: it is stopped for good, and we shall be
            with self._lock:
                state.answered(COORDINATOR, None, time.monotonic())


def turn_of(uid: str, view: View) -> int:
    """The place of a dense group among those that look after the coordinator, 0 first; who is not
    in the view comes last."""
    uids = sorted(m.uid for m in view.members if m.role == "dense")
    return uids.index(uid) if uid in uids else len(uids)


def watch_coordinator(
    deployment: str, uid: str, *, hang_s: float, start_s: float
) -> CoordinatorWatch:
    """A watch over the coordinator of a deployment, by Ray."""

    def actor() -> Any:
        try:
            return ray.get_actor(coordinator_name(deployment), namespace=RAY_NAMESPACE)
        except ValueError:
            raise ClusterError(f"deployment {deployment!r} has no coordinator") from None

    def ask() -> "Future[Beat]":
        beat: Future[Beat] = Future()

        def told(done: "Future[tuple[int, int]]") -> None:
            failure = done.exception()
            if failure is None:
                beat.set_result(Beat(*done.result()))
            else:
                beat.set_exception(failure)

        asked = actor().heartbeat.options(concurrency_group=HEARTBEATS).remote()
        asked.future().add_done_callback(told)
        return beat

    def end() -> None:
        try:
            ray.kill(actor(), no_restart=False)
        except ClusterError as gone:
            logger.info("%s", gone)

    return CoordinatorWatch(uid, hang_s=hang_s, start_s=start_s, ask=ask, end=end)
