"""The coordinator's state machine: events in, effects out; views, epochs, one operation at a time.

An operation goes through the steps of the design (elasticity): `prepare` starts who joins; then, in
one or more rounds, `copy` into spare slots, `verify` by digest and canary, `commit` a view of the
next epoch, `drain` until every dense rank has left the older one or is fenced, `free`. Until its
first commit is logged an operation that fails is undone, and the old view never stopped serving;
after it, it is rolled forward. Several rounds are needed where slots are few (`placement_steps`).

A member of the view that dies, shard or dense group, is restored by an operation of the machine's
own (`coordinator_restores`); one that fails is tried again, later each time. Where living shards
have second copies of all that only dead ones served, they take over first, by another one; the
restored shards get it back. Shards are asked for second copies whenever an operation is over.

An operation that nobody asked for (`Restore`, `ScaleTo.gives_way`) is undone while it waits for
room when another one is asked for, which begins then.

Time comes with every event, and `next_time` says when the next `Tick` is due.
"""

from collections.abc import Callable
from functools import partial

import msgspec

from remora.cluster.coordinator_cancels import CANCELLED, Cancellations
from remora.cluster.former_places import former_after
from remora.cluster.operation import (
    BEFORE_COMMIT,
    Adopt,
    Alarm,
    Answer,
    Answered,
    CallFailed,
    Canary,
    CanaryResult,
    Copy,
    Effect,
    Event,
    Fence,
    HoldCopies,
    Keep,
    LogFailed,
    Logged,
    MemberLost,
    Offer,
    Operation,
    Publish,
    Quiesce,
    Restore,
    StartDense,
    Started,
    StartShard,
    Stop,
    Target,
    Tick,
    gives_way,
    is_dense,
    taken_by,
)
from remora.cluster.operation_plan import FreeMemory, held_by_living, plan_target, same_slots
from remora.comm.errors import ConfigError, OperationRunsError


class CoordinatorState(Cancellations):
    """See the head of this file.

    Args:
        view: committed, and in force everywhere.
        room: slots of each MoE layer, by shard.
        manifest: digest of every expert, as loaded.
        incarnations: the last life of every uid there ever was.
        has_router: a router takes views too.

    Attributes:
        view: the committed one.
        operation: the one that runs.
        history: the last ones by id, that one included.
        accepted: begins when the one that runs has given way to it.
        fenced: dense ranks that shards refuse.
        lost, lost_dense: members of the view that died.
        former: the placement to which shards come back that others took over from.
        copies: second copies, as living shards told.
        heat: tokens of late by expert, for those to come.
        term: which life of the coordinator this is; shards refuse orders of earlier ones.
    """

    def begin(self, now_s: float) -> list[Effect]:
        """What is to be done for a deployment that has just come up."""
        self._now_s = now_s
        self._ask_copies()
        return self._taken()

    def request(self, operation_id: str, target: Target, now_s: float) -> list[Effect]:
        """Begin an operation; one of that id and target that is known is left as it is.

        Raises:
            ConfigError: what is asked for cannot be.
            OperationIdTakenError: the id stands for something else.
            OperationRunsError: another operation runs.
        """
        self._now_s = now_s
        self._request(operation_id, target)
        return self._taken()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """What follows from an event."""
        self._now_s = now_s
        match event:
            case Answered(call, answer):
                self._answered(call, answer)
            case CallFailed(call, reason):
                self._call_failed(call, reason)
            case Logged():
                self._logged()[0]()
            case LogFailed(reason):
                text = f"the log cannot be written: {reason}"
                self._put(Alarm(text))
                self._logged()[1](text)
            case MemberLost(uid, incarnation):
                self._member_lost(uid, incarnation)
            case Tick():
                self._tick()
        self._heed()
        self._restore_lost()
        is_calm = self.operation is None and self._logging is None
        if self._are_copies_due and (is_calm or self._is_stuck()):
            self._ask_copies()
        if self._logging is None:
            self.memory = None  # it gets old
        return self._taken()

    def resume(
        self, operation: Operation | None, now_s: float, memory: FreeMemory | None = None
    ) -> list[Effect]:
        """After a restart, with the view of the log: everybody is told it again, and an operation
        that was in flight is finished if it had committed anything, else undone. What is accepted
        begins then.

        Args:
            operation: in flight, with the number of rounds that are in the log.
            memory: for what is accepted.
        """
        self._now_s = now_s
        if self.accepted is not None:
            self.accepted = self.accepted[0], memory
        follow = partial(self._resumed, operation)
        # streams must not wait for an emptier disk
        self._log("term", follow, lambda _: follow())
        return self._taken()

    # -- inside -------------------------------------------------------------------------------

    def _resumed(self, operation: Operation | None) -> None:
        self._are_copies_due = True
        self._put(Publish(self.view))
        if self.fenced:  # who is let in again meanwhile is not in the log
            self._aside_all(self._fences())
        leaving = operation.retirees if operation is not None else ()
        self._unsure = {*self._living_dense(), *filter(is_dense, leaving)} - self.fenced
        if operation is None or operation.round == 0:
            living = self._living_dense()
            self._ask_fenced(uid for uid in living if uid in self.fenced)
            self._aside_all(
                Adopt(uid=uid, view=self.view) for uid in living if uid not in self.fenced
            )
        if self.accepted is not None:
            self._remember(self.accepted[0])
        if operation is None:
            self._begin_accepted()
            return
        self.operation = operation
        self._remember(operation)
        self.incarnations |= operation.joiners
        if operation.round == 0:
            operation.gave_way = gives_way(operation.target) and not operation.is_unwanted
            again = "the coordinator was started again before the first commit"
            self._abort(CANCELLED if operation.is_unwanted else again, ())
        else:
            self._drain()

    def _request(self, operation_id: str, target: Target) -> None:
        known = self.history.get(operation_id)
        if known is not None:
            if known.target != target:
                raise taken_by(operation_id, known.public())
            return
        if self.operation is not None and not self._yields_to(target):
            raise self._one_at_a_time()
        operation = Operation(operation_id=operation_id, target=target, begun_s=self._now_s)
        self._plan(operation)
        if self.operation is None:
            self._start(operation)
            return
        if self._is_restore() and self._is_so(operation):  # who is to come back is not kept off it
            raise self._one_at_a_time()
        self.accepted = operation, self.memory
        self._remember(operation)
        entry = msgspec.to_builtins(operation)
        self._log("accepted", self._give_way, self._not_accepted, operation=entry)

    def _give_way(self) -> None:
        """To what is accepted: from here on the next life knows it, too."""
        assert self.accepted is not None, "nothing waits"
        running = self._running()
        running.gave_way = gives_way(running.target)
        self._abort(f"it gives way to {self.accepted[0].operation_id!r}", ())

    def _not_accepted(self, reason: str) -> None:
        """The one that runs stays."""
        assert self.accepted is not None, "nothing waits"
        self._fail(self.accepted[0], reason)
        self.accepted = None
        self._go_on()

    def _fail(self, operation: Operation, reason: str) -> None:
        """Nothing has been done."""
        operation.outcome, operation.step, operation.reason = "failed", "over", reason
        operation.ended_s = self._now_s - operation.begun_s

    def _plan(self, operation: Operation) -> None:
        """As things are now. Raises ConfigError, OperationRunsError: it cannot be, or not now."""
        planned = plan_target(operation.target, self.situation())
        if planned.joiners and not isinstance(operation.target, Restore):
            self._check_served()
        operation.slots, operation.joiners = planned.slots, planned.joiners
        operation.retirees = planned.retirees

    def _one_at_a_time(self) -> OperationRunsError:
        running = self._running()
        what = f"operation {running.operation_id!r} runs (step {running.step})"
        return OperationRunsError(f"{what}: one at a time")

    def _is_so(self, operation: Operation) -> bool:
        """Whether it changes nothing, nor who is to come back."""
        slots = self.view.placement.slots
        is_same = former_after(operation.target, self.former, slots, slots) == self.former
        return is_same and not self._changes_members(operation)

    def _changes_members(self, operation: Operation) -> bool:
        """Or what they hold."""
        is_same = same_slots(operation.slots, self.view.placement.slots)
        return bool(operation.joiners or operation.retirees or not is_same)

    def _start(self, operation: Operation) -> None:
        """Raises ConfigError: full shards wait for each other."""
        self._joined.clear()
        self._left_out.clear()
        self._stopped.clear()
        # full shards that wait for each other are found before anything is started
        joiners = operation.joiners.keys() & operation.slots.keys()
        joined = {uid: operation.slots[uid] for uid in joiners}
        self._plan_rounds(operation, dict(held_by_living(self.situation())) | joined)
        self.operation = operation
        self._remember(operation)
        if not self._changes_members(operation):
            slots = self.view.placement.slots
            self.former = former_after(operation.target, self.former, slots, slots)
            self._end("done", "it is so already")
            return
        self.incarnations |= operation.joiners
        entry = msgspec.to_builtins(operation)
        self._log("begin", self._prepare, self._not_begun, operation=entry)

    def _not_begun(self, reason: str) -> None:
        self._fail(self._running(), reason)
        self._over()

    def _over(self) -> None:
        super()._over()
        self._begin_accepted()

    def _begin_accepted(self) -> None:
        if self.accepted is None:
            return
        (operation, self.memory), self.accepted = self.accepted, None
        try:
            self._plan(operation)  # somebody may have died since it was asked for
            self._start(operation)
        except (ConfigError, OperationRunsError) as cannot:
            self.operation = operation
            self._end("failed", str(cannot))

    def _answered(self, call: int, answer: Answer) -> None:
        task = self._waiting.pop(call, None) or self._aside.pop(call, None)
        if task is None:
            return  # of a step that is over
        fault: str | None = None
        match task, answer:
            case ((StartShard(uid=uid) | StartDense(uid=uid)), Started()):
                self._joined[uid] = answer
                fault = self._digest_fault(uid, answer.digests)
            case Copy(uid=uid), dict():
                missing = sorted(set(task.pairs) - answer.keys())
                fault = f"{uid} told nothing of {missing}" if missing else None
                fault = fault or self._digest_fault(uid, answer)
            case HoldCopies(uid=uid), dict():
                if uid not in self.lost:
                    self.copies[uid] = frozenset(p for p in answer if answer[p] == self.manifest[p])
            case Canary(uid=uid), CanaryResult():
                self._canaries[uid] = answer
            case ((Offer() | Adopt()), str()):
                if answer != task.view.view_hash:
                    fault = f"{task.uid} knows another view of epoch {task.view.epoch}: {answer}"
                elif isinstance(task, Adopt) and task.view.epoch == self.view.epoch:
                    if task.uid in self.fenced:
                        self._let_in(task.uid)
                    self._has_left_older_views(task.uid)
            case Keep(uid=uid), tuple():
                if uid in self.room:
                    self.room[uid] = answer
            case Stop(uid=uid), None:
                self._stopped.add(uid)
            case ((Fence() | Quiesce()), None):
                pass
            case _:
                fault = f"{task.uid} answered {type(task).__name__} with {answer!r}"
        if fault is not None and self._is_past_commit(task):
            self._put(Alarm(fault))
        elif fault is not None:
            self._failed_by(task.uid, fault)
            return
        elif isinstance(answer, Started):
            self._is_there(task.uid)
        self._go_on()

    def _call_failed(self, call: int, reason: str) -> None:
        aside = self._aside.pop(call, None)
        if aside is not None:  # a router takes the view from the coordinator when it starts
            if isinstance(aside, Adopt) and aside.uid in self.fenced | self._unsure:
                self._fenced_again_s[aside.uid] = self._now_s + self._limits.retry_s
            return
        task = self._waiting.pop(call, None)
        if task is None:
            return
        if isinstance(task, Quiesce):  # what it has goes on elsewhere when it is stopped
            self._go_on()
        elif self._may_do_without(task):
            self._try_again(task, reason)
        else:
            self._failed_by(task.uid, f"{task.uid}: {reason}")

    def _logged(self) -> tuple[Callable[[], None], Callable[[str], None]]:
        entry, self._logging = self._logging, None
        assert entry is not None, "nothing was being logged"
        return entry

    def _member_lost(self, uid: str, incarnation: int) -> None:
        member = next((m for m in self.view.members if m.uid == uid), None)
        joiners = self.operation.joiners if self.operation is not None else {}
        joins = joiners.get(uid) == incarnation
        if member is not None and member.incarnation == incarnation:
            if uid in self.lost | self.lost_dense:
                return  # told twice: by its process, and by whoever missed its progress
            (self.lost if member.role == "shard" else self.lost_dense).add(uid)
            if self._restores.died(uid, self._now_s):
                self._put(Alarm(f"{uid} dies each time soon after it has come back"))
            self.copies.pop(uid, None)
            if uid in self.fenced:  # its next life is another one
                self._let_in(uid)
            self._has_left_older_views(uid)
            # what is left of a process that serves no more, or of the group's other ranks
            self._aside_all([Stop(uid=uid, incarnation=incarnation)])
        elif not joins and (self.operation is None or uid not in self.operation.retirees):
            return  # of a life that is over anyway
        if self.operation is None:
            return
        self._again = [(at, task) for at, task in self._again if task.uid != uid]
        for call in [c for c, task in self._waiting.items() if task.uid == uid]:
            del self._waiting[call]
        if self.operation.step not in BEFORE_COMMIT or self._logging is not None:
            self._go_on()
        elif joins:
            self._failed_by(uid, f"{uid} died")
        elif self._is_in_the_way(uid):
            self._abort(f"{uid} died", ())
        else:
            self._go_on()

    def _tick(self) -> None:
        due = [task for at, task in self._again if at <= self._now_s]
        self._again = [(at, task) for at, task in self._again if at > self._now_s]
        for task in due:
            self._ask(self._adoption(task.uid) if isinstance(task, Adopt) else task)
        again = [uid for uid, at in self._fenced_again_s.items() if at <= self._now_s]
        for uid in again:
            del self._fenced_again_s[uid]
        self._ask_fenced(uid for uid in again if uid in self.fenced | self._unsure)
        if self._until_s is None or self._now_s < self._until_s:
            return
        step = self._running().step
        if step == "drain":
            self._fence()
        elif step in ("free", "undo"):
            self._odd(f"{', '.join(self._silent())} did not answer in step {step}")
            self._forget_calls()
            self._go_on()
        else:
            self._late()
