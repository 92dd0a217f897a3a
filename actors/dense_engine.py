"""The loop of one dense rank: inbox -> state machine -> model runner -> one message per ingress.

    while not stopping:
        events from the inbox -> state.handle
        plan = state.next_step()          # pure: what to run
        results = rank.run(plan)          # tensors and sockets
        state.handle(StepDone(...))       # -> Emit: one message a step to each ingress

One thread runs it and calls torch; the frame server's thread only decodes and queues. An idle
engine waits for the inbox. Nothing here knows Ray.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from remora.actors.dense_events import (
    AbortRequested,
    Event,
    Instruction,
    RequestArrived,
    SourceLost,
    StatusChanged,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.dense_rank import DenseRank
from remora.actors.dense_state import DenseState
from remora.actors.executor import Executor
from remora.comm.connection import Connection, Frame
from remora.comm.errors import ClusterError, FrameError, GroupLostError
from remora.comm.messages import Abort, Ping, Pong, Submit, Traffic, decode_to_engine, encode
from remora.comm.view import View
from remora.comm.wire import Kind

logger = logging.getLogger(__name__)

RECONNECT_EVERY_S = 1.0  # at least this long between attempts to reach a lost shard
INBOX_MAX = 1 << 16  # messages that wait for the end of a step; over it their senders are cut off


@dataclass(frozen=True, slots=True)
class _Arrived:
    """One control message of one ingress."""

    connection: Connection
    message: Submit | Abort | Ping


@dataclass(frozen=True, slots=True)
class _Left:
    connection: Connection


@dataclass(frozen=True, slots=True)
class _Do:
    """Run something in the engine's thread, between steps."""

    action: Callable[[], None]
    done: Future[None]


class _Stop:
    """Leave the loop."""


_Item = _Arrived | _Left | _Do | _Stop


class DenseEngine:
    """Runs `state` and `rank` until `stop`. `on_frame` and `on_lost` are a FrameServer's handlers.

    Args:
        connect: makes the rank's shards those of a view; raises ClusterError when it cannot. With
            True, steps are held for shards that cannot be reached.
        traffic: what pongs tell of the links to the shards; asked in the engine's thread.
    """

    def __init__(
        self,
        *,
        state: DenseState,
        rank: DenseRank,
        executor: Executor,
        connect: Callable[[View, bool], None],
        traffic: Callable[[], Traffic | None],
    ) -> None:
        self._state = state
        self._rank = rank
        self._laps = rank.laps
        self._executor = executor
        self._connect = connect
        self._traffic = traffic
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._ending = threading.Lock()  # nobody may start to wait for a loop that has ended
        self._ended = False
        self._connections: dict[int, Connection] = {}
        self._view: View | None = None
        self._why_not: str | None = "no view yet: shards are still loading"
        self._reconnect_at_s = 0.0
        self._retires = False
        self._has_none = threading.Event()  # it retires, and has no request
        self._handled = 0  # that came by the inbox
        self._is_switching = False  # to layers that have been compiled, while idle
        self.step_s = 0.0  # time spent in steps, seconds

    # -- any thread ---------------------------------------------------------------------------

    def on_frame(self, connection: Connection, frame: Frame) -> None:
        """Queue one control message. Raises FrameError for anything else, and for a flood."""
        if self._inbox.qsize() >= INBOX_MAX:
            raise FrameError(f"{INBOX_MAX} messages wait for the dense rank: no more are taken")
        if frame.header.kind != Kind.CONTROL:
            raise FrameError(f"frame kind {frame.header.kind} sent to a dense rank")
        try:
            message = decode_to_engine(frame.body)
        except msgspec.DecodeError as error:
            raise FrameError(f"control message: {error}") from error
        self._inbox.put(_Arrived(connection, message))

    def on_lost(self, connection: Connection) -> None:
        """An ingress is gone: nobody waits for its requests."""
        self._inbox.put(_Left(connection))

    def adopt_view(
        self, view: View, *, or_none: bool = False, adopted: Future[None] | None = None
    ) -> None:
        """Use `view` from the next step on; returns when it is in use.

        Args:
            or_none: also where a shard of it cannot be reached: steps are held until it can, and
                the older view is never used again.
            adopted: who settles this one has it return earlier (`ViewInbox.tell`).

        Raises:
            ClusterError: a shard of the view cannot be reached (the old view stays), or the engine
                has stopped.
        """
        adopt = self._adopt_or_none if or_none else self._adopt
        self.between_steps(lambda: adopt(view), adopted)

    def between_steps(self, action: Callable[[], None], done: Future[None] | None = None) -> None:
        """Run `action` in the engine's thread when no step runs; returns when it is done, or `done`
        is settled otherwise.

        Raises:
            ClusterError: the engine has stopped.
        """
        done = done or Future()
        with self._ending:
            if self._ended:
                raise ClusterError("this dense rank has stopped")
            self._inbox.put(_Do(action, done))
        done.result()

    def run_soon(self, action: Callable[[], None]) -> None:
        """Run `action`, which raises nothing, in the engine's thread when no step runs."""
        self._inbox.put(_Do(action, Future()))

    def quiesce(self, within_s: float) -> bool:
        """Tell ingresses to send no more requests; returns when all that there are have ended, or
        the time is over. Whether they have."""
        self._retires = True
        self.run_soon(lambda: None)  # an idle loop looks at it
        return self._has_none.wait(within_s)

    def stop(self) -> None:
        """Leave the loop after the step in flight."""
        self._inbox.put(_Stop())

    def beat(self) -> tuple[int, int]:
        """What the loop has done so far, and what waits for it: steps, and what came by the inbox,
        views that are offered or committed included. Nothing waits while it switches to compiled
        layers, which takes as long as it takes."""
        stats = self._state.stats()
        waiting = stats.num_running + stats.num_waiting + self._inbox.qsize()
        return stats.steps_total + self._handled, 0 if self._is_switching else waiting

    @property
    def why_not_serving(self) -> str | None:
        """Why requests cannot be served now; None when they can."""
        return self._why_not

    # -- the engine's thread ------------------------------------------------------------------

    def run(self) -> None:
        """The loop; returns after `stop`, or when a rank of the group is gone: connections break
        then, and ingresses have their requests go on elsewhere."""
        self._executor.call_when_compiled(lambda: self._inbox.put(_Do(lambda: None, Future())))
        self._note_status()
        try:
            while self._take_inbox():
                self._laps.lap("inbox")
                plan = self._state.next_step()
                self._laps.lap("schedule")
                if plan is not None:
                    instructions = self._state.handle(self._run_step(plan))
                    self._laps.lap("schedule")
                    self._carry_out(instructions)
                    self._laps.lap("emit")
        except GroupLostError as lost:
            logger.error("%s", lost)
        finally:
            self._end()

    def _end(self) -> None:
        """Let go of whoever waits for the loop, and of the compiling child."""
        with self._ending:
            self._ended = True
        self._why_not = "this dense rank has stopped"
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Do) and not item.done.done():  # a hold may have settled it
                item.done.set_exception(ClusterError(self._why_not))
        self._executor.close()

    def _take_inbox(self) -> bool:
        """Handle everything that has arrived; wait for something while idle. False: stop."""
        while True:
            if not self._state.has_work:
                self._switch_if_compiled()
            is_idle = not self._state.has_work
            if is_idle and self._retires:
                self._has_none.set()
            try:
                item = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            self._handled += 1
            if is_idle:
                self._laps.skip()
            match item:
                case _Arrived(connection, message):
                    self._receive(connection, message)
                case _Left(connection):
                    self._connections.pop(connection.id, None)
                    self._handle(SourceLost(connection.id))
                case _Do(action, done):
                    _settle(action, done)
                case _Stop():
                    return False

    def _switch_if_compiled(self) -> None:
        self._is_switching = True
        if self._executor.when_idle():
            self._note_status()
        self._is_switching = False

    def _receive(self, connection: Connection, message: Submit | Abort | Ping) -> None:
        self._connections[connection.id] = connection
        match message:
            case Submit():
                self._handle(RequestArrived(message, connection.id))
            case Abort(request_id):
                self._handle(AbortRequested(request_id, connection.id))
            case Ping(nonce):
                self._look_again()
                pong = Pong(
                    nonce=nonce,
                    stats=self._state.stats(),
                    serving=self._why_not is None and not self._retires,
                    why_not="it retires" if self._retires else self._why_not,
                    retires=self._retires,
                    traffic=self._traffic(),
                )
                connection.send_control(encode(pong))

    def _run_step(self, plan: StepPlan) -> Event:
        started = time.perf_counter()
        try:
            if self._why_not is not None:
                self._reconnect()
            results = self._rank.run(plan)
        except GroupLostError:
            raise
        except ClusterError as failure:
            if self._why_not is None:  # said once, not for every request that comes meanwhile
                logger.error("step %d failed: %s", plan.step_id, failure)
            self._why_not = str(failure)
            return StepFailed(plan.step_id, str(failure))
        except Exception as failure:  # a fault of ours: its requests end, the engine goes on
            logger.exception("step %d failed", plan.step_id)
            return StepFailed(plan.step_id, f"{type(failure).__name__}: {failure}")
        finally:
            self.step_s += time.perf_counter() - started
        return StepDone(plan.step_id, results)

    def _reconnect(self) -> None:
        """Try the shards of the view again, not more often than RECONNECT_EVERY_S."""
        if self._view is None or time.monotonic() < self._reconnect_at_s:
            raise ClusterError(self._why_not or "not serving")
        try:
            self._adopt(self._view)
        finally:
            self._reconnect_at_s = time.monotonic() + RECONNECT_EVERY_S
        logger.warning("every shard of view %d is connected again", self._view.epoch)

    def _look_again(self) -> None:
        """Whether shards that were lost are back: an ingress that is not ready gets no requests."""
        if self._why_not is not None and self._view is not None:
            try:
                self._reconnect()
            except GroupLostError:
                raise
            except ClusterError as failure:
                self._why_not = str(failure)

    def _adopt(self, view: View, or_none: bool = False) -> None:
        if self._view is not None and view.epoch < self._view.epoch:
            return  # told before the one that is in use, and queued after it
        try:
            self._connect(view, or_none)
        except ClusterError:
            if self._view is not None and not or_none:  # some ranks may have gone on already
                self._connect(self._view, True)
            raise
        self._view = view
        self._why_not = None
        self._note_status()

    def _adopt_or_none(self, view: View) -> None:
        try:
            self._adopt(view, or_none=True)
        except ClusterError as failure:  # of a rank that cannot hold
            logger.warning("view %d is not in use yet, and no other: %s", view.epoch, failure)
            self._view, self._why_not = view, str(failure)

    def _note_status(self) -> None:
        epoch = self._view.epoch if self._view else 0
        self._state.handle(StatusChanged(executor=self._executor.name, epoch=epoch))

    def _handle(self, event: Event) -> None:
        self._carry_out(self._state.handle(event))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for emit in instructions:
            connection = self._connections.get(int(emit.source))
            if connection is not None:  # else it was lost meanwhile: `_Left` is in the inbox
                connection.send_control(encode(emit.outputs))


def _settle(action: Callable[[], None], done: Future[None]) -> None:
    """Run `action` and hand its outcome to whoever waits for `done`."""
    try:
        action()
    except Exception as failure:
        if done.done():
            logger.warning("what was acknowledged in a hold: %s", failure)
        else:
            done.set_exception(failure)
    else:
        if not done.done():
            done.set_result(None)
