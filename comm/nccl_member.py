"""A member at work: carries out what `nccl_member_state` says, with threads and communicators.

    member = NcclMember(nccl=load_nccl(), device=CudaDevice(), uid=..., incarnation=..., ...)
    member.post(message)     # from the control connection's thread, and from any other
    member.serve()           # the thread that owns torch; until `close`
    member.call_soon(work)   # from any thread: run by the owner between two events
    member.come_round()      # from any thread: a sign of life of the owner

A communicator is created on a side thread while the owner runs tickets: that call blocks until
every member has come, and nothing can interrupt it. One that is given up meanwhile is left to that
thread, which aborts it when it returns. With too many of them no more is begun, and where there is
none in use `serve` fails, so that the process is replaced.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from remora.comm import nccl_member_state as machine
from remora.comm.errors import ClusterError, DeadlineError, FencedError, PeerLostError
from remora.comm.nccl_api import Device, Nccl
from remora.comm.nccl_link import Link
from remora.comm.nccl_messages import (
    Built,
    NotBuilt,
    Stop,
    Ticket,
    TicketBroken,
    TicketOver,
    ToConductor,
)
from remora.comm.nccl_plan import Roster

log = logging.getLogger(__name__)

BUILDS_STUCK_MAX: Final = 4
SIGN_S: Final = 60.0  # for the owner to give a sign
SIGN_LOOK_S: Final = 1.0  # between two looks whether it has begun to connect meanwhile


class NcclMember:
    """One dense rank or shard of the communicator.

    Args:
        nccl, device: see `nccl_api`.
        uid, incarnation: this member.
        reply: sends a message to the conductor; from the owner's thread. A ClusterError says that
            there is none: what he misses is void for the next one, who builds anew.
        work: enqueues a "decode" or "exact" ticket's layers on a link; it may wait for counts.
        emit: step -> lets its results leave.
        step_deadline_s: of a ticket, from the moment that all of it is enqueued.
        wake: there is an event for `serve_one`; in the thread that put it. For an owner that does
            not wait in it.
    """

    def __init__(
        self,
        *,
        nccl: Nccl,
        device: Device,
        uid: str,
        incarnation: int,
        reply: Callable[[ToConductor], None],
        work: Callable[[Link, Ticket], None],
        emit: Callable[[int], None],
        step_deadline_s: float = 30.0,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._nccl = nccl
        self._device = device
        self._uid = uid
        self._reply = reply
        self._work = work
        self._emit = emit
        self._step_deadline_s = step_deadline_s
        self._wake = wake
        self.state = machine.MemberState(uid, incarnation)
        self._events: queue.SimpleQueue[machine.Event | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()  # over the two below: side threads and `post` use them
        self._links: dict[int, Link] = {}
        self._building: dict[int, bool] = {}  # generation -> still wanted
        self._asked: deque[threading.Event] = deque()  # for a sign of life
        self.signs_total = 0

    @property
    def roster_in_use(self) -> Roster | None:
        """Members of the communicator that tickets run on. From any thread."""
        return self.roster_of(self.state.in_use or 0)

    def roster_of(self, generation: int) -> Roster | None:
        """Members of a communicator that is there. From any thread."""
        with self._lock:
            link = self._links.get(generation)
        return None if link is None else link.roster

    def post(self, event: machine.Event) -> None:
        """Takes an event; a Stop reaches a step that waits at once. From any thread."""
        if isinstance(event, Stop):
            with self._lock:
                link = self._links.get(event.generation)
            if link is not None:
                link.note_lost(event.why)
        self._put(event)

    def _put(self, event: machine.Event | Callable[[], None]) -> None:
        self._events.put(event)
        self._wake()

    def lose_conductor(self, why: str) -> None:
        """Every generation is over, for who conducted counts us as lost. From any thread."""
        with self._lock:
            generations = [*self._links, *self._building]
        for generation in generations:
            self.post(Stop(generation, why))

    def call_soon(self, work: Callable[[], None]) -> None:
        """Has the owner run `work`, which raises nothing, between two events. From any thread."""
        self._put(work)

    def come_round(self) -> tuple[int, int]:
        """Returns once the owner has come round: between two events, or while it waits in a ticket
        for peers, which it does with open eyes. From any other thread.

        In a call that connects peers it cannot be told from one that hangs: then at once.

        Returns:
            Signs so far; 1 while it connects, else 0: work that is to move the first.

        Raises:
            DeadlineError: no sign within `SIGN_S`.
        """
        asked = threading.Event()
        self._asked.append(asked)
        self.call_soon(lambda: None)  # an owner that waits for events
        for _ in range(round(SIGN_S / SIGN_LOOK_S)):
            if self._connects():
                return self.signs_total, 1
            if asked.wait(SIGN_LOOK_S):
                return self.signs_total, 0
        raise DeadlineError(f"{self._uid}: its thread gave no sign for {SIGN_S:g} s")

    @property
    def is_behind(self) -> bool:
        """Whether there is something that is to move `signs_total`. From any thread."""
        return self.state.running is not None or not self._events.empty()

    def _connects(self) -> bool:
        running = self.state.running
        return running is not None and running.mode in ("warm", "split")

    def close(self) -> None:
        """Makes `serve` end after what it does now. From any thread."""
        self._events.put(None)

    def serve(self) -> None:
        """Handles events until `close`; then aborts every communicator.

        Raises:
            ClusterError: too many communicators that never came to be, and none in use.
            Exception: what `work` raised and is no error of the cluster's.
        """
        try:
            while self.serve_one(None):
                pass
        finally:
            self.end()

    def serve_one(self, timeout_s: float | None) -> bool:
        """Handles the next event, for an owner with a loop of its own; False after `close`.

        Args:
            timeout_s: for an event to come (0: only what has come); None: as long as it takes.

        Raises:
            queue.Empty: none came.
            ClusterError, Exception: as `serve`.
        """
        event = self._events.get(timeout_s != 0, timeout_s or None)
        self._give_sign()
        if callable(event):
            event()
        elif event is not None:
            self._handle(event)
        return event is not None

    def _give_sign(self) -> None:
        """By the owner, wherever it comes by."""
        self.signs_total += 1
        while self._asked:
            self._asked.popleft().set()

    def end(self) -> None:
        """Aborts every communicator, also those that are being made."""
        with self._lock:
            self._building = dict.fromkeys(self._building, False)
            links, self._links = self._links, {}
        for link in links.values():
            link.abort("closed")

    def _handle(self, event: machine.Event) -> None:
        for instruction in self.state.handle(event):
            match instruction:
                case machine.Run(ticket):
                    self._run(ticket)
                case machine.Reply(message):
                    self._tell(message)
                case machine.Emit(step):
                    self._emit(step)
                case machine.StartBuild(roster, unique_id):
                    self._start_build(roster, unique_id)
                case machine.Abandon(generation):
                    with self._lock:
                        if generation in self._building:  # else it has just come, or failed
                            self._building[generation] = False
                case machine.Abort(generation, why):
                    link = self._take(generation)
                    if link is not None:
                        link.abort(why)

    def _tell(self, message: ToConductor) -> None:
        try:
            self._reply(message)
        except ClusterError as error:
            log.warning("%s: %s is not told: %s", self._uid, type(message).__name__, error)

    def _take(self, generation: int) -> Link | None:
        with self._lock:
            return self._links.pop(generation, None)

    def _run(self, ticket: Ticket) -> None:
        """One ticket from its first operation until all are over."""
        link = self._links[ticket.generation]
        try:
            if ticket.mode == "warm":
                link.connect()
            elif ticket.into is not None:
                self._split(link, ticket.into)
            else:
                self._work(link, ticket)
            link.finish(self._step_deadline_s)
        except (PeerLostError, DeadlineError, FencedError) as error:
            log.warning("%s: ticket %d: %s", self._uid, ticket.number, error)
            self._handle(TicketBroken(self._uid, ticket.number, str(error)))
        except Exception as error:  # ours alone: the others must not wait for us
            self._handle(TicketBroken(self._uid, ticket.number, f"{type(error).__name__}: {error}"))
            raise
        else:
            self._handle(TicketOver(self._uid, ticket.number))

    def _split(self, link: Link, into: Roster) -> None:
        child = link.split(into)
        if child is not None:
            with self._lock:
                self._links[into.generation] = child

    def _start_build(self, roster: Roster, unique_id: bytes) -> None:
        with self._lock:
            stuck = sorted(g for g, wanted in self._building.items() if not wanted)
            if len(stuck) < BUILDS_STUCK_MAX:
                self._building[roster.generation] = True
        if len(stuck) >= BUILDS_STUCK_MAX:
            why = f"{self._uid}: communicators of {stuck} never came to be"
            self.post(NotBuilt(self._uid, roster.generation, why))  # an owner that goes on says so
            if self.state.in_use is None:  # else steps go on by that one
                raise ClusterError(why)
            return
        threading.Thread(
            target=self._build,
            args=(roster, unique_id),
            name=f"nccl-{roster.generation}",
            daemon=True,  # it may wait for ever: see the top
        ).start()

    def _build(self, roster: Roster, unique_id: bytes) -> None:
        """On the side thread: blocks until every member of the roster does the same."""
        generation = roster.generation
        rank = roster.rank_of(self._uid)
        try:
            with self._device.on_this_thread():
                comm = self._nccl.NcclCommunicator(len(roster.uids), unique_id, rank)
        except Exception as error:  # whatever it is: the others wait for a word of us
            log.warning("%s: generation %d is not built", self._uid, generation, exc_info=True)
            with self._lock:
                wanted = self._building.pop(generation)
            if wanted:
                why = f"{type(error).__name__}: {error}"
                self._put(NotBuilt(self._uid, generation, why))
            return
        link = Link(self._nccl, comm, self._device, roster, self._uid, watch=self._give_sign)
        with self._lock:
            wanted = self._building.pop(generation)
            if wanted:
                self._links[generation] = link
        if wanted:
            self._put(Built(self._uid, generation))
        else:
            link.abort("given up while it was created")
