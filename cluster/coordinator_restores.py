"""How members that died come back: together where they can, and nobody waits for one that cannot.

Those that are due begin an operation (`Restore`); who becomes due while processes start is taken
in. Where some are there and others take much longer, these are left out and come back by themselves
afterwards; so is one whose start fails. Where none is there after a while, for want of room, the
operation gives way to whatever is asked for. Pure.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import partial
from typing import Final

import msgspec

from remora.cluster.operation import (
    Alarm,
    Restore,
    ScaleTo,
    Stop,
    TakeOver,
    Target,
    Task,
    gives_way,
    has_deadline,
    is_dense,
)
from remora.cluster.operation_plan import plan_target
from remora.cluster.operation_steps import OperationSteps
from remora.cluster.placement_steps import additions
from remora.cluster.second_copies import taken_over
from remora.comm.errors import OperationRunsError

STRAGGLE_FACTOR: Final = 4.0  # times the shortest start: shards may have more to load than groups


class MemberRestores(OperationSteps):
    """See `CoordinatorState`."""

    @abstractmethod
    def _request(self, operation_id: str, target: Target) -> None:
        """Begin an operation."""

    def _restore_lost(self) -> None:
        """Members that died come back, as an operation of our own; what is served by nobody else
        is taken over first."""
        if not self._may_restore():
            return
        due = self._restores.due(self._lacking(), self._now_s)
        # who is not due may be missed all the same: what it alone had is not to wait for it
        if not due and (self._is_restore() or not self._may_take_over()):
            return
        if self.operation is None:
            self._begin_own(due)
        elif self._is_restore() and not self._may_take_over():
            self._take_in(due)
        else:
            self.operation.gave_way = gives_way(self.operation.target)
            self._abort(f"{', '.join(due or sorted(self.lost))} died", ())

    def _begin_own(self, due: list[str]) -> None:
        if self._may_take_over():
            self._taken_over = self._lost_lives()
            names = "-".join(f"{uid}.{life}" for uid, life in sorted(self._taken_over))
            self._request(f"take-over-{names}", TakeOver(tuple(sorted(self.lost))))
        else:
            names = "-".join(f"{uid}.{self.incarnations[uid] + 1}" for uid in due)
            self._request(f"restore-{names}", Restore(tuple(due)))

    def _may_take_over(self) -> bool:
        """Whether living shards can serve what only dead ones did; tried once a life."""
        placement, lives = self.view.placement, self._lost_lives()
        if lives <= self._taken_over:
            return False
        lost = frozenset(self.lost)
        if taken_over(placement.slots, lost, self.copies, placement.moe_layers):
            return True
        self._taken_over = lives
        return False

    def _lost_lives(self) -> set[tuple[str, int]]:
        return {(uid, self.incarnations[uid]) for uid in self.lost}

    def _take_in(self, uids: list[str]) -> None:
        """These come back with those whose processes start already."""
        operation = self._running()
        operation.joiners = operation.joiners | {u: self.incarnations[u] + 1 for u in uids}
        self.incarnations |= operation.joiners
        operation.target = Restore(tuple(sorted(operation.joiners)))
        operation.slots = plan_target(operation.target, self.situation()).slots
        self._held = {uid: held for uid, held in self._held.items() if uid not in self.lost}
        entry = msgspec.to_builtins(operation)
        self._log("begin", partial(self._taken_in, uids), self._abort, operation=entry)

    def _taken_in(self, uids: list[str]) -> None:
        if self._running().step == "prepare":
            self._until_s = self._now_s + self._limits.prepare_s
            for task in self._starts(uids):
                self._ask(task)
        self._go_on()

    def _is_there(self, uid: str) -> None:
        """One that comes back has started: the others get a few times as long as it took."""
        if not self._is_restore() or self._until_s is None:
            return
        took_s = self._now_s - self._asked_s[uid]
        more_s = max(self._limits.patience_s, STRAGGLE_FACTOR * took_s)
        until_s = self._last_asked_s(self._silent()) + more_s
        self._until_s = min(self._until_s, max(self._now_s, until_s))

    def _yields_to(self, target: Target) -> bool:
        """Whether the operation that runs is undone, as it waits for who joins, for another one.

        What nobody asked for yields to what is asked for; a restore, for which streams may wait,
        not before it had some time; and what somebody asked for, after as long, to members alone
        that must leave a node in time.
        """
        if self._is_restore():
            return self._is_stuck() and not gives_way(target)
        is_urgent = has_deadline(target) and not has_deadline(self._running().target)
        is_asked_for = self._may_restore() and not gives_way(target)
        return is_asked_for or (is_urgent and self._finds_no_room())

    def _is_in_the_way(self, uid: str) -> bool:
        """Whether the operation that runs is undone for the sake of a member that has died."""
        target = self._running().target
        is_own = isinstance(target, Restore | TakeOver)
        if self._is_preparing() and (is_own or gives_way(target)):
            return False  # the one takes it in, the other gives way to it
        return uid in self.lost or not (is_own or self._living_dense())

    def _check_served(self) -> None:
        """Raises OperationRunsError: nobody can be served before members are back that died, so
        that no operation is to wait for room in their stead."""
        dead = self._restores.hopeful(self.missing())
        if dead and (not self._living_dense() or self._has_gaps(self.view, self.lost)):
            raise OperationRunsError(
                f"requests wait for {', '.join(dead)}: nobody else joins before they are back, or"
                " are given up"
            )

    def _is_stuck(self) -> bool:
        return self._is_restore() and self._may_restore() and self._finds_no_room()

    def _finds_no_room(self) -> bool:
        """Nobody of those that join is there, as far as one can tell for want of room."""
        is_open = self._is_preparing() and not self._joined
        return is_open and self._now_s >= self._stuck_from_s()

    def _late(self) -> None:
        """A step that may be undone takes too long."""
        operation, silent = self._running(), self._silent()
        reason = f"{', '.join(silent)} did not answer in step {operation.step}"
        needless = [task for task in self._open() if self._may_do_without(task)]
        if needless:
            self._do_without(needless)
            return
        if not (self._is_restore() and self._is_preparing() and self._joined):
            self._abort(reason, [uid for uid in silent if uid in operation.joiners] or None)
            return
        whole_s = self._limits.prepare_s
        tried = [uid for uid in silent if self._now_s - self._asked_s[uid] >= whole_s]
        self._leave_out(tried or silent, reason, is_try=bool(tried))

    def _do_without(self, tasks: Sequence[Task]) -> None:
        """Nobody answers these. Ranks that have not connected in advance go by the older view,
        which costs nobody anything, until they adopt the next one or are fenced; what a shard that
        serves computes is for comparison alone."""
        self._waiting = {c: t for c, t in self._waiting.items() if t not in tasks}
        self._again = [each for each in self._again if each[1] not in tasks]
        silent = ", ".join(sorted({task.uid for task in tasks}))
        self._odd(f"{silent} did not answer in step {self._running().step}")
        self._until_s = self._now_s + self._within(self._limits.commit_s)
        self._go_on()

    def _failed_by(self, uid: str, reason: str) -> None:
        """What was asked of `uid`, or its life, has come to nothing before the commit."""
        joins = uid in self._running().joiners
        if joins and self._is_restore() and self._is_preparing():
            self._leave_out([uid], reason, is_try=True)
        else:
            self._abort(reason, [uid] if joins else None)

    def _leave_out(self, uids: Collection[str], reason: str, *, is_try: bool) -> None:
        """These come back later: the operation goes on without them.

        Args:
            is_try: it counts as one.
        """
        operation, layers = self._running(), self.view.placement.moe_layers
        rest = {uid: life for uid, life in operation.joiners.items() if uid not in uids}
        target = Restore(tuple(sorted(rest)))
        slots = plan_target(target, self.situation()).slots
        loads = {uid: self._loads[uid] for uid in rest if not is_dense(uid)}
        # a shard that had taken over from one which now stays away is to load more than it was told
        if not rest or additions(loads, {uid: slots[uid] for uid in loads}, layers):
            self._abort(reason, uids)
            return
        if is_try:
            self._count(uids, reason)
        self._odd(f"without {', '.join(sorted(uids))}: {reason}")
        self._waiting = {c: task for c, task in self._waiting.items() if task.uid not in uids}
        lives = [(uid, operation.joiners[uid]) for uid in sorted(uids)]
        self._left_out += lives  # and once more when the operation ends, which waits for it
        self._aside_all(Stop(uid=uid, incarnation=life) for uid, life in lives)
        for uid in uids:
            self._joined.pop(uid, None)
        operation.target, operation.joiners, operation.slots = target, rest, slots
        self._go_on()

    def _count(self, uids: Collection[str], reason: str) -> None:
        for uid in uids:
            if self._restores.failed(uid, self._now_s):
                self._put(Alarm(f"{uid} could not be restored: {reason}"))

    def _over(self) -> None:
        operation, blamed = self._running(), self._blamed
        self._blamed = None
        target, is_done = operation.target, operation.outcome == "done"
        if isinstance(target, Restore) and not is_done:
            self._count(target.uids if blamed is None else blamed, operation.reason)
        elif isinstance(target, ScaleTo) and is_done and not target.gives_way:
            self._restores.forget_all()
        super()._over()
