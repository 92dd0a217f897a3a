"""What the fake NCCL runs over: cliques of ranks, what they posted, who is dead, who waits."""

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support.fake_graph import ContractError

if TYPE_CHECKING:
    from support.fake_nccl import NcclCommunicator

STATUSES = {
    0: "NCCL_ERROR_SUCCESS",
    1: "NCCL_ERROR_UNHANDLED_CUDA_ERROR",
    2: "NCCL_ERROR_SYSTEM_ERROR",
    3: "NCCL_ERROR_INTERNAL_ERROR",
    4: "NCCL_ERROR_INVALID_ARGUMENT",
    5: "NCCL_ERROR_INVALID_USAGE",
    6: "NCCL_ERROR_REMOTE_ERROR",
}  # no 7: cupy's table has none either, so NcclError(7) is a KeyError
ITEM_BYTES = {2: 4, 6: 2, 7: 4, 9: 2}
INVALID_ARGUMENT, INVALID_USAGE = 4, 5


class Killed(BaseException):
    """This member's process is dead."""


class NcclError(RuntimeError):
    """As cupy's: `status` and a text."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{STATUSES[status]}: of the fake")


@dataclass(frozen=True)
class Op:
    is_send: bool
    address: int
    count: int
    datatype: int
    peer: int


@dataclass
class Clique:
    """All ranks of one communicator."""

    size: int
    ranks: dict[int, "NcclCommunicator"] = field(default_factory=dict)
    # (source, target) -> posted and not yet matched operations, in order; both ends in turn
    sends: dict[tuple[int, int], deque[tuple[Op, list[int]]]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    recvs: dict[tuple[int, int], deque[tuple[Op, list[int]]]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    splits: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    parts: dict[tuple[int, int], "Clique"] = field(default_factory=dict)


class World:
    """The network, its processes, and what is wrong with them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.cliques: dict[bytes, Clique] = {}
        self.dead: set[str] = set()
        self.closed = False
        self.on_kill: Callable[[str], None] = lambda name: None
        self.num_copied_bytes = 0
        self.patience_s: float | None = None  # a launch that waits longer returns, unfinished
        self.ids = itertools.count(1)
        self._running: set[int] = set()  # threads of `run` that are not over
        self._waiting: dict[int, tuple[Callable[[], bool], Callable[[], str]]] = {}  # for what
        self.broken: str | None = None

    def kill(self, name: str) -> None:
        """SIGKILL: the process never calls again, and nobody is told."""
        with self.changed:
            if name in self.dead:
                return
            self.dead.add(name)
            self.changed.notify_all()
        self.on_kill(name)

    def close(self) -> None:
        """Wakes whoever still waits (a build that nobody joined), with a remote error."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def run(self, parts: dict[str, Callable[[], Any]], timeout_s: float = 90.0) -> dict[str, Any]:
        """Runs one function for each member in a thread of its own.

        Returns:
            What each returned; nothing of members that were killed. The first error is raised.
        """
        results: dict[str, Any] = {}
        errors: list[BaseException] = []
        start = threading.Barrier(len(parts))

        def body(name: str, part: Callable[[], Any]) -> None:
            me = threading.get_ident()
            with self.changed:
                self._running.add(me)
            start.wait(timeout_s)
            try:
                results[name] = part()
            except Killed:
                self.kill(name)
            except BaseException as error:
                errors.append(error)
            finally:
                with self.changed:
                    self._running.discard(me)
                    self._find_deadlock()
                    self.changed.notify_all()

        threads = [
            threading.Thread(target=body, args=item, name=item[0], daemon=True)
            for item in parts.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
        alive = [thread.name for thread in threads if thread.is_alive()]
        self.close()
        if errors:
            raise errors[0]
        assert not alive, f"still running after {timeout_s} s: {alive}"
        return results

    def vanish(self) -> None:
        """The calling thread's process is dead: a main thread ends, a side thread is not there."""
        if threading.get_ident() in self._running:
            raise Killed
        with self.changed:
            self.changed.wait_for(lambda: self.closed)
        raise NcclError(6)

    def wait_for(
        self,
        done: Callable[[], bool],
        what: Callable[[], str],
        owner: str,
        patience_s: float | None = None,
    ) -> None:
        """Waits, holding `changed`, until `done`. Raises ContractError in a deadlock."""
        me = threading.get_ident()
        until = None if patience_s is None else time.monotonic() + patience_s
        while not done():
            if owner in self.dead:
                self.vanish()
            if self.broken:
                raise ContractError(self.broken)
            if self.closed:
                raise NcclError(6)
            if until is not None and time.monotonic() > until:
                return
            self._waiting[me] = (done, what)
            self._find_deadlock()
            try:
                if not self.broken:
                    self.changed.wait(patience_s or 20.0)
            finally:
                self._waiting.pop(me, None)

    def _find_deadlock(self) -> None:
        if self.broken or not self._running or not self._running <= self._waiting.keys():
            return
        waits = [self._waiting[thread] for thread in self._running]
        if not any(done() for done, _ in waits):  # else it was notified and is about to go on
            self.broken = "nobody can go on: " + "; ".join(sorted(what() for _, what in waits))
            self.changed.notify_all()
