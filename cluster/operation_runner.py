"""Drives the coordinator's state machine: carries its effects out, and brings it what came of them.

One thread waits for events (answers of members, deaths, deadlines) and handles them one after the
other; requests are handled in the caller's thread, under the same lock. A log entry is on the disk
before the next effect. Nothing here knows Ray: `perform` starts a task and returns at once.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import (
    Alarm,
    Answer,
    Answered,
    Ask,
    CallFailed,
    Effect,
    Event,
    Log,
    LogFailed,
    Logged,
    MemberLost,
    Operation,
    Publish,
    Settled,
    Target,
    Task,
    Tick,
)
from remora.cluster.operation_plan import FreeMemory, replicas_alive
from remora.cluster.wal import RecordLog, WalError
from remora.comm.errors import ClusterError, ConfigError
from remora.comm.view import View

logger = logging.getLogger(__name__)

LOG_BYTES_MAX: Final = 4 << 20  # then a snapshot takes the place of it, between operations
OPERATIONS_SHOWN: Final = 8
ALIVE_EVERY_S: Final = 1.0


class OperationRunner:
    """See the head of this file.

    Args:
        perform: starts a task; its future holds the answer, or an exception.
        publish: called with every view that is committed.
        settled: called when an operation is over and none runs.
    """

    def __init__(
        self,
        state: CoordinatorState,
        wal: RecordLog,
        *,
        perform: Callable[[Task], "Future[Answer]"],
        publish: Callable[[View], None],
        settled: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._wal = wal
        self._perform = perform
        self._publish = publish
        self._settled = settled
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())  # guards the state
        self._events: queue.SimpleQueue[Event | Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._replicas: tuple[tuple[int, frozenset[str]], dict[str, int]] | None = None
        self._thread = threading.Thread(target=self._run, name="remora-operations", daemon=True)

    def start(self, effects: list[Effect]) -> None:
        """Carry the first effects out, and go on until `close`."""
        self.begin(effects)
        self._thread.start()

    def begin(self, effects: list[Effect]) -> None:
        """Carry the first effects out; the caller goes on with `turn`, instead of a thread."""
        with self._changed:
            self._carry_out(effects)

    @property
    def has_events(self) -> bool:
        """Whether `turn` has something to do at once."""
        return not self._events.empty()

    def next_time(self) -> float | None:
        """As `CoordinatorState.next_time`."""
        with self._changed:
            return self._state.next_time()

    def turn(self, wait_s: float | None) -> bool:
        """Handle the next event; none in so many seconds is a `Tick`. False: closed."""
        try:
            event = self._events.get(timeout=wait_s)
        except queue.Empty:
            event = Tick()
        if event is None:
            return False
        if callable(event):
            event()
            return True
        with self._changed:
            if self._closed:
                return False
            self._carry_out(self._state.handle(event, self._clock()))
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """Stop: an operation that runs stays where it is, in the log too. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._events.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def request(
        self, operation_id: str, target: Target, memory: FreeMemory | None = None
    ) -> dict[str, Any]:
        """Begin an operation, or find the one of that id; how it is.

        Args:
            memory: that hosts have left; None: it is not planned with.

        Raises:
            ConfigError, ClusterError: as `CoordinatorState.request`; or this deployment stops.
        """
        with self._changed:
            if self._closed:
                raise ClusterError("this deployment is being stopped")
            self._state.memory = memory
            self._carry_out(self._state.request(operation_id, target, self._clock()))
        self._events.put(Tick())  # the loop looks when the next deadline is
        return self.operation(operation_id)

    def give_up(self, operation_id: str, reason: str) -> None:
        """Undo an operation that still waits for who joins."""
        with self._changed:
            if not self._closed:
                self._carry_out(self._state.give_up(operation_id, reason, self._clock()))
        self._events.put(Tick())

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        """Undo an operation (None: the one that runs) as far as it is not committed; how it is.

        Raises:
            ConfigError, UnknownOperationError: as `CoordinatorState.cancel`; or none runs.
            ClusterError: this deployment stops.
        """
        with self._changed:
            if self._closed:
                raise ClusterError("this deployment is being stopped")
            operation_id = operation_id or self.running()
            if operation_id is None:
                raise ConfigError("no operation runs: there is nothing to cancel")
            self._carry_out(self._state.cancel(operation_id, self._clock()))
        self._events.put(Tick())
        return self.operation(operation_id)

    def operation(self, operation_id: str) -> dict[str, Any]:
        """How an operation is. Raises UnknownOperationError."""
        with self._changed:
            return self._state.known(operation_id).public()

    def history(self) -> list[Operation]:
        """The last operations, the newest last; also the one that runs."""
        with self._changed:
            return list(self._state.history.values())

    def wait(self, operation_id: str, timeout_s: float) -> dict[str, Any]:
        """As `operation`, once it is over or the time is."""
        with self._changed:
            known = self._state.known
            self._changed.wait_for(
                lambda: self._closed or known(operation_id).outcome != "running", timeout_s
            )
            return known(operation_id).public()

    def status(self) -> dict[str, Any]:
        """The operation that runs, the last ones, and who is missing or fenced."""
        with self._changed:
            state = self._state
            last = list(state.history.values())[-OPERATIONS_SHOWN:]
            return {
                "running": state.operation.public() if state.operation else None,
                "last": [operation.public() for operation in last],
                "fenced": sorted(state.fenced),
                "lost": sorted(state.missing()),
                "given_up": sorted(state.given_up()),
                "shards": sorted(state.view.placement.slots),
                "replicas": dict(self.replicas_alive()),
            }

    def replicas_alive(self) -> dict[str, int]:
        """As the function of that name; counted once for a view and those who died of it."""
        with self._changed:
            key = self._state.view.epoch, frozenset(self._state.lost)
            if self._replicas is None or self._replicas[0] != key:
                self._replicas = key, replicas_alive(self._state.situation())
            return self._replicas[1]

    def joiners(self) -> set[str]:
        """Who joins by the operation that runs, and is no member yet."""
        with self._changed:
            operation = self._state.operation
            joiners = operation.joiners if operation is not None else {}
            members = {(m.uid, m.incarnation) for m in self._state.view.members}
            return {uid for uid, life in joiners.items() if (uid, life) not in members}

    def running(self) -> str | None:
        """Id of the operation that runs."""
        with self._changed:
            operation = self._state.operation
            return operation.operation_id if operation is not None else None

    def lost(self, uid: str, incarnation: int) -> None:
        """This life of a member is over. Any thread."""
        self._events.put(MemberLost(uid, incarnation))

    def soon(self, work: Callable[[], None]) -> None:
        """Run something that raises nothing, in this thread. Any thread."""
        self._events.put(work)

    def come_round(self) -> None:
        """Returns once this thread has handled what was there before, or is closed; never, if it
        has failed: whoever watches this coordinator then ends it, and its next life reads the log.
        """
        done = threading.Event()
        self.soon(done.set)
        while not done.wait(ALIVE_EVERY_S) and not self._closed:
            pass

    # -- inside -------------------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        try:
            while is_open:
                due_s = self.next_time()
                wait_s = None if due_s is None else max(0.0, due_s - self._clock())
                is_open = self.turn(wait_s)
        except Exception:  # the machine may be half way; `come_round` lets nobody believe it lives
            logger.exception("operations cannot go on")

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Log(record):
                    self._carry_out(self._state.handle(self._log(record), self._clock()))
                case Ask():
                    self._ask(effect)
                case Publish(view):
                    logger.info("epoch %d is committed (%s)", view.epoch, view.view_hash)
                    self._publish(view)
                case Alarm(text):
                    logger.error("%s", text)
                case Settled(operation):
                    self._over(operation)

    def _log(self, record: Mapping[str, object]) -> Logged | LogFailed:
        try:
            self._wal.append(dict(record))
        except WalError as failed:
            return LogFailed(str(failed))
        return Logged()

    def _ask(self, ask: Ask) -> None:
        logger.info("%s of %s", type(ask.task).__name__, ask.task.uid)
        try:
            pending = self._perform(ask.task)
        except Exception as failure:
            logger.exception("%s of %s", type(ask.task).__name__, ask.task.uid)
            self._events.put(CallFailed(ask.call, f"{type(failure).__name__}: {failure}"))
            return

        def told(done: "Future[Answer]") -> None:
            failure = done.exception()
            if failure is None:
                self._events.put(Answered(ask.call, done.result()))
            else:
                self._events.put(CallFailed(ask.call, str(failure)))

        pending.add_done_callback(told)

    def _over(self, operation: Operation) -> None:
        say = logger.info if operation.outcome == "done" else logger.error
        say("operation %s: %s %s", operation.operation_id, operation.outcome, operation.reason)
        is_due = self._wal.num_bytes > LOG_BYTES_MAX or self._wal.is_broken
        if is_due and self._state.operation is None:
            try:
                self._wal.replace(self._state.snapshot())
            except WalError as failed:
                logger.warning("the log stays as it is: %s", failed)
        self._changed.notify_all()
        self.soon(self._settle)

    def _settle(self) -> None:
        """Who waits for the operation has been told before: what comes now may take long."""
        with self._changed:
            is_settled = self._state.operation is None and not self._closed
        if is_settled:
            self._settled()
