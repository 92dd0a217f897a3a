"""A world of shards and dense ranks for the coordinator's state machine, in which things go wrong.

Every effect of the machine is one numbered event of the world; a fault happens before, instead of
or after one. The world keeps what shards really hold and what dense ranks really use, and says so
when a rank could ask a living shard for an expert that it does not hold.
"""

import math
from collections.abc import Callable
from typing import Any

import msgspec
from support.coordinator_members import LAYERS, Fault, Members, digest, member

from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import (
    Alarm,
    Answered,
    Ask,
    CallFailed,
    Drain,
    Effect,
    Event,
    Log,
    LogFailed,
    Logged,
    MemberLost,
    Operation,
    Publish,
    ScaleTo,
    Settled,
    StartDense,
    StartShard,
    Stop,
    Target,
    Task,
    Tick,
    is_dense,
)
from remora.cluster.placement_steps import pairs_of
from remora.comm.errors import ClusterError
from remora.comm.view import Placement, View

IDLE_MAX = 3  # ticks in a row from which nothing follows


def _life_of(task: Task) -> tuple[str, int]:
    assert isinstance(task, StartShard | StartDense)
    return task.uid, task.incarnation


class World(Members):
    """Two dense ranks over shards of `placement`, with `room` slots of each layer.

    Args:
        fault: what goes wrong, at event number `at` (counted from 1).
    """

    def __init__(
        self,
        slots: dict[str, tuple[tuple[int, ...], ...]],
        *,
        num_experts: int,
        room: int,
        replicas: int = 1,
        num_copies: int = 0,
        fault: Fault = "none",
        at: int = 0,
    ) -> None:
        placement = Placement(num_experts=num_experts, moe_layers=LAYERS, slots=slots)
        members = tuple(member(uid) for uid in ("dense-0", "dense-1", *slots))
        self.num_experts = num_experts
        self.limits = Limits(replicas=replicas, num_copies=num_copies)
        self.view = View(epoch=1, members=members, placement=placement)
        super().__init__(self.view, room)
        self.events = 0
        self.fault, self.at = fault, at
        self.now_s = 0.0
        self.settled: list[Operation] = []
        self.wanted = set(slots)  # shards, by what was decided
        self.alarms: list[str] = []
        self.published = [self.view]
        self.queue: list[Event] = []
        self.hung: set[str] = set()
        self.placeless: set[str] = set()  # Ray finds no place for these when they start
        self.unplaced: list[Ask] = []  # and keeps looking
        self.late: list[Callable[[], None]] = []  # what hung ranks do when they wake up
        self.manifest = {(n, e): digest((n, e)) for n in LAYERS for e in range(num_experts)}
        self.state = self._machine(
            self.view, {uid: (room,) * len(LAYERS) for uid in slots}, dict.fromkeys(slots, 1)
        )
        self.log: list[dict[str, Any]] = [self.state.snapshot()]
        self._carry_out(self.state.begin(self.now_s))

    def ask(self, operation_id: str, target: Target) -> None:
        """Ask for an operation."""
        self._carry_out(self.state.request(operation_id, target, self.now_s))

    def give_up(self, operation_id: str, why: str) -> None:
        """Have an operation that waits for who joins undone."""
        self._carry_out(self.state.give_up(operation_id, why, self.now_s))

    def cancel(self, operation_id: str) -> None:
        """Have an operation undone that is not wanted any more."""
        self._carry_out(self.state.cancel(operation_id, self.now_s))

    def answer_all(self) -> None:
        """Let the world go on until nothing happens at this time any more."""
        while self.queue:
            self._tell(self.queue.pop(0))

    def run(self, operation_id: str, target: Target) -> Operation:
        """Ask for an operation, and let the world go on until nothing happens any more."""
        self.ask(operation_id, target)
        self.settle()
        if operation_id not in self.state.history:  # the coordinator died before its first entry
            return self.run(operation_id, target)
        return self.state.history[operation_id]

    def run_until_over(self, operation_id: str, target: Target) -> Operation:
        """As `run`, without waiting for what else is to happen."""
        self.ask(operation_id, target)
        operation = self.state.history[operation_id]
        while operation.outcome == "running":
            self.settle(self.state.next_time() or self.now_s)
        return operation

    def settle_one(self) -> None:
        """The next event, or the next time."""
        if self.queue:
            self._tell(self.queue.pop(0))
            return
        due = self.state.next_time()
        assert due is not None, f"nothing is to happen: {self.state.operation}"
        self.now_s = max(self.now_s, due)
        self._tell(Tick())

    def settle(self, until_s: float = math.inf) -> None:
        """Let the world go on until nothing happens any more, or until a time."""
        num_idle = 0  # ticks in a row from which nothing followed
        for _ in range(2000):
            if self.queue:
                self._tell(self.queue.pop(0))
                num_idle = 0
                continue
            due = self.state.next_time()
            if due is None or due > until_s:
                self.now_s = max(self.now_s, until_s if until_s < math.inf else 0.0)
                return
            num_idle = num_idle + 1 if due <= self.now_s else 0
            assert num_idle < IDLE_MAX, f"busy at {self.now_s} s: {self.state.operation}"
            self.now_s = max(self.now_s, due)
            self._tell(Tick())
        raise AssertionError(f"it does not end: {self.state.operation}")

    def check(self) -> None:
        """Invariant 5: what a rank may ask for under the view that it uses is there."""
        for uid, view in self.in_use.items():
            for m in view.members:
                key = (m.uid, m.incarnation)
                if m.role != "shard" or key not in self.shards:
                    continue
                if uid in self.refused.get(m.uid, ()):
                    continue
                claimed = set(pairs_of(view.placement.slots[m.uid], LAYERS))
                missing = claimed - self.shards[key]
                assert not missing, f"{uid} (epoch {view.epoch}) may ask {key} for {missing}"

    def check_at_rest(self) -> None:
        """When nothing runs: one view everywhere, shards hold just that, nobody else lives."""
        assert self.state.operation is None
        view = self.state.view
        view.placement.check()
        assert {(m.uid, m.incarnation) for m in view.members if m.role == "shard"} == set(
            self.shards
        )
        for uid, incarnation in self.shards:
            claimed = set(pairs_of(view.placement.slots[uid], LAYERS))
            assert self.shards[uid, incarnation] == claimed
            assert not claimed & self.copies.get((uid, incarnation), set())
        assert {(m.uid, m.incarnation) for m in view.members if m.role == "dense"} == set(
            self.dense.items()
        )
        assert self.in_use.keys() == self.dense.keys()
        for uid, used in self.in_use.items():
            assert used.view_hash == view.view_hash, f"{uid} is at epoch {used.epoch}"
        epochs = [v.epoch for v in self.published]
        assert epochs == sorted(epochs)
        hashes = {(v.epoch, v.view_hash) for v in self.published}
        assert len(hashes) == len({epoch for epoch, _ in hashes}), "one view for each epoch"

    def check_all_back(self) -> None:
        """Besides that everybody has come back whom nobody has decided against."""
        self.check_at_rest()
        assert self.state.lost | self.state.lost_dense == set()
        assert self.state.view.placement.slots.keys() == self.wanted

    def wake(self) -> None:
        """Ranks that hung go on."""
        self.hung.clear()
        late, self.late = self.late, []
        for each in late:
            each()
        self.settle()

    def kill(self, uid: str) -> None:
        """A process is gone, whatever its life."""
        for key in [k for k in self.shards if k[0] == uid]:
            del self.shards[key]
            self.queue.append(MemberLost(*key))
        if uid in self.dense:
            self.in_use.pop(uid, None)
            self.queue.append(MemberLost(uid, self.dense.pop(uid)))

    def place(self, *uids: str) -> None:
        """There is room for these again."""
        self.placeless.difference_update(uids)
        ready = [ask for ask in self.unplaced if ask.task.uid in uids]
        self.unplaced = [ask for ask in self.unplaced if ask not in ready]
        for ask in ready:
            self._answer(ask, "none")

    def restart(self) -> None:
        """The coordinator dies, and another one reads the log."""
        log = msgspec.json.decode(msgspec.json.encode(self.log))
        self.state, operation, leaving = recovered(log, self.limits, has_router=True)
        members = (*self.state.view.members, *leaving)
        self.queue.clear()
        self.unplaced.clear()
        self._carry_out(self.state.resume(operation, self.now_s))
        for m in members:
            if m.role == "shard" and (m.uid, m.incarnation) not in self.shards:
                self.queue.append(MemberLost(m.uid, m.incarnation))
            if m.role == "dense" and self.dense.get(m.uid) != m.incarnation:
                self.queue.append(MemberLost(m.uid, m.incarnation))

    # -- inside -------------------------------------------------------------------------------

    def _decided(self, operation: Operation) -> None:
        match operation.target:
            case ScaleTo(shards=int()) if operation.outcome == "done":
                self.wanted = set(self.state.view.placement.slots)
            case ScaleTo() | Drain():
                if operation.round or operation.outcome == "done":
                    self.wanted |= {uid for uid in operation.joiners if not is_dense(uid)}
                gone = operation.target.uids if isinstance(operation.target, Drain) else ()
                self.wanted -= set(gone) if operation.outcome == "done" else set()

    def _machine(self, view: View, room: Any, incarnations: Any) -> CoordinatorState:
        return CoordinatorState(
            view=view, room=room, manifest=self.manifest, incarnations=incarnations,
            limits=self.limits, has_router=True,
        )  # fmt: skip

    def _tell(self, event: Event) -> None:
        self._carry_out(self.state.handle(event, self.now_s))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.check()
            if isinstance(effect, Settled):
                self.settled.append(effect.operation)
                self._decided(effect.operation)
            elif isinstance(effect, Alarm):
                self.alarms.append(effect.text)
            elif isinstance(effect, Publish):
                self.published.append(effect.view)
            else:
                self.events += 1
                here = self.fault if self.events == self.at else "none"
                if here == "crash before":
                    self.restart()
                    return
                self._one(effect, here)
                if here == "crash after":
                    self.restart()
                    return
            self.check()

    def _one(self, effect: Log | Ask, here: Fault) -> None:
        if isinstance(effect, Log):
            if here == "disk":
                self._tell(LogFailed("no space left on device"))
                return
            self.log.append(effect.record)
            if here == "crash after":
                return
            self._tell(Logged())
            return
        uid = effect.task.uid
        if here == "kill before":
            self.kill(uid)
        if here == "hang":
            self.hung.add(uid)
        if uid in self.hung or here == "hang":
            self.late.append(lambda: self._answer(effect, "none"))
            return
        self._answer(effect, here)
        if here == "kill after":
            self.kill(uid)

    def _answer(self, ask: Ask, here: Fault) -> None:
        if here == "fail":
            self.queue.append(CallFailed(ask.call, "it says no"))
            return
        task = ask.task
        if isinstance(task, StartShard | StartDense) and task.uid in self.placeless:
            self.unplaced.append(ask)
            return
        if isinstance(task, Stop):
            life = (task.uid, task.incarnation)
            self.unplaced = [a for a in self.unplaced if _life_of(a.task) != life]
        try:
            done = self._do(task, here)
        except ClusterError as failed:
            self.queue.append(CallFailed(ask.call, str(failed)))
            return
        if done is not None:
            self.queue.append(Answered(ask.call, done[0]))
