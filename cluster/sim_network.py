"""The simulator's clock and network: processes that die, stop and go on, links that are cut.

Processes are named as actors are (`shard-0#1`); a link is cut between uids. Messages of one sender
to one receiver arrive in the order in which they were sent. What is on its way when a link is cut,
or for a process that is stopped, arrives later, or is lost with the connection.
"""

import heapq
import random
from collections.abc import Callable
from functools import partial
from typing import Final

Work = Callable[[], None]


class Violation(AssertionError):
    """Something that must hold does not."""


LATENCY_S: Final = (0.001, 0.004)  # one way
RESET_RATIO: Final = 0.5  # of connections that do not outlive a cut
DUPLICATE_LATE_S: Final = 2.0  # at most


def _nothing() -> None:
    """Of what has no sender."""


class Clock:
    """Virtual time: the next event is always at once."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._count = 0
        self._heap: list[tuple[float, int, Work]] = []

    def after(self, delay_s: float, work: Work) -> None:
        """Run `work` so many seconds from now."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, work))

    @property
    def num_events(self) -> int:
        """Events that have happened or will."""
        return self._count

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Let events happen until something holds (True), nothing happens any more, or the time is
        over."""
        heap = self._heap
        while not until():
            if not heap or heap[0][0] > limit_s:
                self.now_s = max(self.now_s, limit_s)
                return until()
            self.now_s, _, work = heapq.heappop(heap)
            work()
        return True


def uid_of(process: str) -> str:
    """`shard-0` of `shard-0#3`."""
    return process.partition("#")[0]


class Network:
    """Who lives, and what is on its way between them."""

    def __init__(self, clock: Clock, chance: random.Random) -> None:
        self._clock = clock
        self._chance = chance
        self.alive: set[str] = set()
        # process -> what waits for it; and what its sender hears if it never wakes up
        self._stopped: dict[str, list[tuple[Work, Work]]] = {}
        self._cuts: dict[tuple[str, str], int] = {}  # (from, to) -> how many cuts
        self._parked: list[tuple[str, str, Work, Work | None]] = []
        self._doubling: set[str] = set()  # uids to which frames come twice
        self._last_s: dict[tuple[str, str], float] = {}
        self.on_death: list[Callable[[str], None]] = []

    def latency_s(self) -> float:
        """Of one message."""
        return LATENCY_S[0] + self._chance.random() * (LATENCY_S[1] - LATENCY_S[0])

    # -- processes ----------------------------------------------------------------------------

    def start(self, process: str) -> None:
        """A process lives."""
        self.alive.add(process)

    def kill(self, process: str) -> None:
        """SIGKILL; nothing it has begun goes on."""
        if process in self.alive:
            self.alive.discard(process)
            for _, lost in self._stopped.pop(process, []):
                lost()
            for told in self.on_death:
                told(process)

    def stop(self, process: str) -> None:
        """SIGSTOP."""
        if process in self.alive:
            self._stopped.setdefault(process, [])

    def go_on(self, process: str) -> None:
        """SIGCONT: what came meanwhile is seen to, in order."""
        for work, lost in self._stopped.pop(process, []):
            self._clock.after(0.0, partial(self._when_running, process, work, lost))

    def is_up(self, process: str) -> bool:
        """Alive and not stopped."""
        return process in self.alive and process not in self._stopped

    def timer(self, process: str, delay_s: float, work: Work) -> None:
        """Something that a process does later, if it lives then; once it is not stopped."""
        self._clock.after(delay_s, partial(self._when_running, process, work))

    # -- links --------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing of one uid reaches the other."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        """One cut less; what is on its way arrives now, or its connection is lost."""
        left = self._cuts.pop((source, target)) - 1
        if left:
            self._cuts[source, target] = left
            return
        parked, self._parked = self._parked, []
        is_reset = self._chance.random() < RESET_RATIO
        for a, b, deliver, lost in parked:
            if (uid_of(a), uid_of(b)) != (source, target):
                self._parked.append((a, b, deliver, lost))
            elif is_reset:
                self._lose(a, b, lost)
            else:
                self._clock.after(0.0, partial(self._arrive, a, b, deliver, lost))

    def double(self, uid: str, on: bool) -> None:
        """Whether frames to a uid come twice, the second time late."""
        (self._doubling.add if on else self._doubling.discard)(uid)

    def reaches(self, source: str, target: str) -> bool:
        """Whether a handshake between two processes would succeed."""
        there = (uid_of(source), uid_of(target))
        return self.is_up(target) and there not in self._cuts and there[::-1] not in self._cuts

    def send_frame(self, source: str, target: str, deliver: Work, lost: Work) -> None:
        """As `send`, of the data plane: it may come twice."""
        self.send(source, target, deliver, lost)
        if self._doubling and uid_of(target) in self._doubling:
            late_s = self._chance.random() * DUPLICATE_LATE_S
            self._clock.after(late_s, partial(self._arrive, source, target, deliver, None))

    def send(self, source: str, target: str, deliver: Work, lost: Work | None = None) -> None:
        """A message. `lost` happens at the source when the target is dead or the link is lost."""
        link, now_s = (source, target), self._clock.now_s
        at_s = max(now_s + self.latency_s(), self._last_s.get(link, 0.0))
        self._last_s[link] = at_s
        self._clock.after(at_s - now_s, partial(self._arrive, source, target, deliver, lost))

    def answer(self, source: str, target: str, deliver: Work, lost: Work | None = None) -> None:
        """As `send`, with the latency of both ways on the way there, where nothing is wrong."""
        if self._cuts or self._stopped:
            self.send(source, target, deliver, lost)
        elif target in self.alive:
            deliver()

    # -- inside -------------------------------------------------------------------------------

    def _arrive(self, source: str, target: str, deliver: Work, lost: Work | None) -> None:
        if target not in self.alive:
            self._lose(source, target, lost)
        elif self._cuts and (uid_of(source), uid_of(target)) in self._cuts:
            self._parked.append((source, target, deliver, lost))
        else:
            self._when_running(target, deliver, partial(self._lose, source, target, lost))

    def _lose(self, source: str, target: str, lost: Work | None) -> None:
        if lost is not None:
            self._clock.after(self.latency_s(), partial(self._when_running, source, lost))

    def _when_running(self, process: str, work: Work, lost: Work = _nothing) -> None:
        if process not in self.alive:
            lost()
            return
        waiting = self._stopped.get(process) if self._stopped else None
        if waiting is not None:
            waiting.append((work, lost))
        else:
            work()
