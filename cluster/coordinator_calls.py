"""What the coordinator's state machine keeps, and how it asks, waits, tries again and logs. Pure.

`OperationSteps` says what each step asks for, `CoordinatorState` what events mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import msgspec

from remora.cluster.operation import (
    Adopt,
    Alarm,
    Ask,
    Canary,
    CanaryResult,
    Effect,
    Fence,
    Held,
    Keep,
    Log,
    Offer,
    Operation,
    Pair,
    Quiesce,
    Restore,
    Started,
    Step,
    Stop,
    TakeOver,
    Task,
    gives_way,
    has_deadline,
)
from remora.cluster.operation_plan import FreeMemory, Situation
from remora.cluster.restore_tries import RestoreTries
from remora.comm.errors import UnknownOperationError
from remora.comm.view import View

HISTORY_MAX: Final = 64  # operations that are remembered by their id
RETRIES_MAX: Final = 5  # of a task that must be done in the end
ROUTER: Final = "router"  # adopts views too, and nothing waits for it


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a step may take, and what the deployment wants."""

    prepare_s: float = 900.0
    copy_s: float = 900.0
    verify_s: float = 120.0
    commit_s: float = 60.0
    drain_s: float = 60.0  # then dense ranks that have not answered are fenced
    free_s: float = 60.0
    retry_s: float = 1.0
    restore_s: float = 1.0  # after a try to restore a member that failed; doubled each time
    settled_s: float = 10.0  # a member that came back and dies sooner was brought back in vain
    patience_s: float = 15.0  # with who comes back, before those that are there go on without it
    replicas: int = 1  # of an expert, where slots allow
    slots_of_joiners: int = 1  # of a layer; at least
    num_copies: int = 0  # second copies of a layer that a shard has room for


class CoordinatorCalls(ABC):
    """Fields and plumbing; see `CoordinatorState`."""

    def __init__(
        self,
        *,
        view: View,
        room: Mapping[str, tuple[int, ...]],
        manifest: Mapping[Pair, str],
        incarnations: Mapping[str, int],
        limits: Limits,
        has_router: bool = False,
    ) -> None:
        self.view = view
        self.room = dict(room)
        self.incarnations = {m.uid: m.incarnation for m in view.members} | dict(incarnations)
        self.operation: Operation | None = None
        # begins when the one that runs has given way; with the memory that it was planned with
        self.accepted: tuple[Operation, FreeMemory | None] | None = None
        self.memory: FreeMemory | None = None  # for the next request
        self.history: dict[str, Operation] = {}
        self.fenced: set[str] = set()
        self.lost: set[str] = set()
        self.lost_dense: set[str] = set()
        self.manifest = dict(manifest)
        self.copies: dict[str, frozenset[Pair]] = {}  # second copies, by living shard
        self.former: Held = {}  # placement before living shards took over from dead ones
        self.heat: Mapping[Pair, float] = {}  # tokens of late, by expert
        self.term = 1  # of this life of the coordinator, counted over all of them
        self._limits = limits
        self._has_router = has_router
        self._calls = 0
        self._waiting: dict[int, Task] = {}  # the step is over when it is empty
        self._aside: dict[int, Task] = {}  # nothing waits for these
        self._again: list[tuple[float, Task]] = []  # to be asked again, and when
        self._fenced_again_s: dict[str, float] = {}  # the same for ranks that are fenced
        # ranks that shards may refuse by order of a coordinator that died before it could log that
        self._unsure: set[str] = set()
        self._tries: dict[str, int] = {}  # of tasks of this step
        self._stopped: set[str] = set()  # members that this operation has ended
        self._restores = RestoreTries(limits.restore_s, limits.settled_s)
        self._until_s: float | None = None  # of the step
        # what follows the log entry, and what follows where it cannot be written
        self._logging: tuple[Callable[[], None], Callable[[str], None]] | None = None
        self._are_copies_due = False  # to be planned anew, once nothing runs that gets on
        self._taken_over: set[tuple[str, int]] = set()  # lives that were tried to be taken over
        self._asked_s: dict[str, float] = {}  # when who joins was asked to start
        self._loads: Held = {}  # and what it was told to hold
        self._joined: dict[str, Started] = {}
        self._left_out: list[tuple[str, int]] = []  # lives that were to join, and do not
        self._blamed: Collection[str] | None = None  # see `_abort`
        self._canaries: dict[str, CanaryResult] = {}
        self._rounds: list[Held] = []
        self._held: Held = {}  # living shards, joiners included
        self._next: View | None = None
        self._effects: list[Effect] = []
        self._now_s = 0.0

    def situation(self) -> Situation:
        """What a plan starts from now."""
        return Situation(
            view=self.view,
            room=self.room,
            lost=frozenset(self.lost | self.lost_dense),
            incarnations=self.incarnations,
            replicas=self._limits.replicas,
            slots_of_joiners=self._limits.slots_of_joiners,
            memory=self.memory,
            former=self.former,
            copies=self.copies,
        )

    def snapshot(self) -> dict[str, object]:
        """The record that makes all earlier ones unnecessary; between operations."""
        assert self.operation is None, f"operation {self.operation} runs"
        over = [msgspec.to_builtins(operation) for operation in self.history.values()]
        manifest = [[*pair, digest] for pair, digest in self.manifest.items()]
        view = msgspec.to_builtins(self.view)
        return self._record("base", view=view, manifest=manifest, history=over)

    def next_time(self) -> float | None:
        """When a `Tick` is due; None: never, as it stands."""
        times = [at for at, _ in self._again] + list(self._fenced_again_s.values())
        if self._until_s is not None:
            times.append(self._until_s)
        if self._may_restore():
            due_s = self._restores.next_s(self._lacking(), self._now_s)
            times += [due_s] if due_s is not None else []
        if self._are_copies_due and self._is_restore() and self._may_restore():
            times.append(self._stuck_from_s())
        return min(times, default=None)

    def missing(self) -> set[str]:
        """Members that died and are to come back, those included that others took over from."""
        return self.lost | self.lost_dense | (self.former.keys() - self.view.placement.slots.keys())

    def given_up(self) -> set[str]:
        """Those of them that are not tried any more, unless somebody scales."""
        missing = self.missing()
        return missing - set(self._restores.hopeful(missing))

    # -- steps and calls ----------------------------------------------------------------------

    def _begin(self, step: Step, limit_s: float, tasks: Iterable[Task]) -> None:
        self._running().step = step
        self._until_s = self._now_s + limit_s
        self._forget_calls()
        self._tries.clear()
        for task in tasks:
            self._ask(task)
        self._go_on()

    @abstractmethod
    def _go_on(self) -> None:
        """The next step, once nothing of this one is open."""

    def _forget_calls(self) -> None:
        """Answers to what was asked count no more."""
        self._waiting.clear()
        self._again.clear()

    def _ask(self, task: Task) -> None:
        self._calls += 1
        self._waiting[self._calls] = task
        self._put(Ask(self._calls, task))

    def _aside_all(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            self._calls += 1
            self._aside[self._calls] = task
            self._put(Ask(self._calls, task))

    def _try_again(self, task: Task, reason: str) -> None:
        """Where there is no way back, or going back is worse: again, and in the end without."""
        name = f"{type(task).__name__} {task.uid}"
        self._tries[name] = self._tries.get(name, 0) + 1
        if self._tries[name] <= RETRIES_MAX or isinstance(task, Adopt):  # a rank is fenced instead
            self._again.append((self._now_s + self._limits.retry_s, task))
            return
        self._odd(f"{name}: {reason}; given up after {RETRIES_MAX} tries")
        self._go_on()

    def _is_past_commit(self, task: Task) -> bool:
        """Whether there is no way back from where this was asked: it must be done in the end."""
        if isinstance(task, Adopt):
            return task.view.epoch <= self.view.epoch
        return isinstance(task, Keep | Stop | Fence | Quiesce)

    def _may_do_without(self, task: Task) -> bool:
        """Whether what fails of this undoes nothing: it may not any more, or somebody comes back,
        whom nobody keeps away that is there."""
        if isinstance(task, Canary):  # of a shard that serves, for comparison
            return self._is_restore() and task.uid not in self._running().joiners
        return self._is_past_commit(task) or (isinstance(task, Offer) and self._is_pressing())

    def _may_restore(self) -> bool:
        """Whether a member that is due can begin to come back now."""
        if self.operation is None:
            return self._logging is None
        target = self.operation.target
        is_open = gives_way(target) or (isinstance(target, Restore) and not self._joined)
        return is_open and self._is_preparing()

    def known(self, operation_id: str) -> Operation:
        """An operation of `history`. Raises UnknownOperationError."""
        found = self.history.get(operation_id)
        if found is None:
            raise UnknownOperationError(f"no operation {operation_id!r} is known")
        return found

    def _is_restore(self) -> bool:
        return self.operation is not None and isinstance(self.operation.target, Restore)

    def _is_pressing(self) -> bool:
        """Whether it does not wait long for dense ranks that might be asked to connect in advance:
        requests may wait for it, or a node goes away."""
        target = self._running().target
        return isinstance(target, Restore | TakeOver) or has_deadline(target)

    def _stuck_from_s(self) -> float:
        """When an operation finds no room of whose joiners none is there, as far as can be told."""
        return self._last_asked_s(self._running().joiners) + self._limits.patience_s

    def _last_asked_s(self, uids: Iterable[str]) -> float:
        return max((self._asked_s[uid] for uid in uids), default=self._now_s)

    def _is_preparing(self) -> bool:
        return self._running().step == "prepare" and self._logging is None

    def _open(self) -> list[Task]:
        """What is still to be answered, or to be asked again."""
        return [*self._waiting.values(), *(task for _, task in self._again)]

    def _silent(self) -> list[str]:
        """Who is still to answer."""
        return sorted({task.uid for task in self._open()})

    def _lacking(self) -> set[str]:
        """Those of them that do not join already."""
        joiners = self.operation.joiners.keys() if self.operation is not None else set()
        return self.missing() - joiners

    def _living_dense(self) -> list[str]:
        dense = [m.uid for m in self.view.members if m.role == "dense"]
        return [uid for uid in dense if uid not in self.lost_dense]

    def _members(self) -> set[str]:
        return {m.uid for m in self.view.members}

    # -- words --------------------------------------------------------------------------------

    def _running(self) -> Operation:
        assert self.operation is not None, "no operation runs"
        return self.operation

    def _remember(self, operation: Operation) -> None:
        self.history[operation.operation_id] = operation
        while len(self.history) > HISTORY_MAX:
            del self.history[next(iter(self.history))]

    def _odd(self, text: str) -> None:
        operation = self._running()
        operation.reason = f"{operation.reason}; {text}" if operation.reason else text
        self._put(Alarm(text))

    def _log(
        self, kind: str, follow: Callable[[], None], failed: Callable[[str], None], **fields: object
    ) -> None:
        assert self._logging is None, "one entry after the other"
        self._logging = follow, failed
        self._put(Log(self._record(kind, **fields)))

    def _record(self, kind: str, **fields: object) -> dict[str, object]:
        room = {uid: list(slots) for uid, slots in self.room.items()}
        return {
            "t": kind,
            "room": room,
            "incarnations": dict(self.incarnations),
            "fenced": sorted(self.fenced),
            "former": self.former,
            "term": self.term,
            **fields,
        }

    def _put(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _taken(self) -> list[Effect]:
        taken, self._effects = self._effects, []
        return taken
