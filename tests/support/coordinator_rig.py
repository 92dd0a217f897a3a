"""A world of shards and dense ranks for the coordinator's state machine, in which things go wrong.

Every effect of the machine is one numbered event of the world; a fault happens before, instead of
or after one. The world keeps what shards really hold and what dense ranks really use, and says so
when a rank could ask a living shard for an expert that it does not hold.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from remora.cluster.coordinator_calls import ROUTER, Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import (
    Adopt,
    Alarm,
    Answer,
    Answered,
    Ask,
    CallFailed,
    Canary,
    CanaryResult,
    Copy,
    Effect,
    Event,
    Fence,
    HoldCopies,
    Keep,
    Log,
    LogFailed,
    Logged,
    MemberLost,
    Offer,
    Operation,
    Pair,
    Publish,
    Quiesce,
    Settled,
    StartDense,
    Started,
    StartShard,
    Stop,
    Target,
    Task,
    Tick,
    is_dense,
)
from remora.cluster.placement_steps import pairs_of
from remora.comm.view import Endpoint, Member, Placement, View

LAYERS = (1, 3)
Fault = Literal[
    "none", "kill before", "kill after", "fail", "hang", "flip", "odd canary", "disk",
    "crash before", "crash after",
]  # fmt: skip


def digest(pair: Pair) -> str:
    return f"digest of {pair[0]}/{pair[1]}"


def member(uid: str, incarnation: int = 1) -> Member:
    role: Literal["shard", "dense"] = "shard" if uid.startswith("shard") else "dense"
    number = uid.rpartition("-")[2]
    endpoint = Endpoint(host=f"host-{number}", tcp_address=f"{uid}:{incarnation}")
    name = f"{uid}#{incarnation}"
    return Member(uid=uid, incarnation=incarnation, role=role, endpoint=endpoint, actor_name=name)


class World:
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
        self.shards = {(uid, 1): set(pairs_of(slots[uid], LAYERS)) for uid in slots}
        self.slots_of = {(uid, 1): room for uid in slots}
        self.copies: dict[tuple[str, int], set[Pair]] = {}  # second ones
        self.copies_wanted: dict[tuple[str, int], set[Pair]] = {}
        self.in_use = {uid: self.view for uid in ("dense-0", "dense-1")}
        self.dense = dict.fromkeys(self.in_use, 1)  # lives; who has adopted no view is not in use
        self.quiet: list[str] = []  # retiring groups that finished what they had
        self.refused: dict[str, tuple[str, ...]] = {}  # by shard
        self.events = 0
        self.fault, self.at = fault, at
        self.now_s = 0.0
        self.settled: list[Operation] = []
        self.alarms: list[str] = []
        self.published = [self.view]
        self.queue: list[Event] = []
        self.hung: set[str] = set()
        self.placeless: set[str] = set()  # Ray finds no place for these when they start
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

    def settle(self) -> None:
        for _ in range(2000):
            if self.queue:
                self._tell(self.queue.pop(0))
                continue
            due = self.state.next_time()
            if due is None:
                return
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

    def restart(self) -> None:
        """The coordinator dies, and another one reads the log."""
        log = msgspec.json.decode(msgspec.json.encode(self.log))
        self.state, operation = recovered(log, self.limits, has_router=True)
        view = self.state.view
        self.queue.clear()
        self._carry_out(self.state.resume(operation, self.now_s))
        for m in view.members:
            if m.role == "shard" and (m.uid, m.incarnation) not in self.shards:
                self.queue.append(MemberLost(m.uid, m.incarnation))
            if m.role == "dense" and self.dense.get(m.uid) != m.incarnation:
                self.queue.append(MemberLost(m.uid, m.incarnation))

    # -- inside -------------------------------------------------------------------------------

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
        done = self._do(ask.task, here)
        if done is not None:
            self.queue.append(Answered(ask.call, done[0]))

    def _do(self, task: Task, here: Fault) -> tuple[Answer] | None:
        """What came of it; None: nobody answers, since it is dead."""
        living = next((key for key in self.shards if key[0] == task.uid), None)
        match task:
            case StartShard(uid=uid) | StartDense(uid=uid) if uid in self.placeless:
                return None
            case StartShard(uid=uid, incarnation=incarnation, experts=experts):
                key = (uid, incarnation)
                pairs = pairs_of(experts, LAYERS)
                self.shards[key], self.slots_of[key] = set(pairs), task.num_slots
                digests = {pair: digest(pair) for pair in pairs}
                if here == "flip" and pairs:
                    digests[pairs[0]] = "other bytes"
                room = (task.num_slots,) * len(LAYERS)
                return (Started(member=member(uid, incarnation), digests=digests, room=room),)
            case StartDense(uid=uid, incarnation=incarnation):
                self.dense[uid] = incarnation
                return (Started(member=member(uid, incarnation)),)
            case Quiesce(uid=uid):
                if uid not in self.dense:
                    return None
                assert all(uid != m.uid for m in self.state.view.members), "it may get requests"
                self.quiet.append(uid)
                return (None,)
            case Stop(uid=uid) if is_dense(uid):
                if self.dense.get(uid) == task.incarnation:
                    del self.dense[uid]
                    self.in_use.pop(uid, None)
                return (None,)
            case Stop():
                self.shards.pop((task.uid, task.incarnation), None)
                return (None,)
            case Offer() | Adopt():
                return self._on_view(task)
        if living is None:
            return None
        held = self.shards[living]
        copies = self.copies.setdefault(living, set())
        match task:
            case HoldCopies(pairs=pairs):
                assert not held & set(pairs), f"{living} serves {held & set(pairs)}"
                copies.clear()
                copies.update(pairs)
                self.copies_wanted[living] = set(pairs)
                for n in LAYERS:
                    assert sum(layer == n for layer, _ in copies) <= self.limits.num_copies
                return ({pair: digest(pair) for pair in pairs},)
            case Copy(pairs=pairs):
                own = set(pairs) & copies  # in slots of their own
                copies -= own
                held.update(pairs)
                for n in LAYERS:
                    used = sum(layer == n for layer, _ in held - own)
                    assert used <= self.slots_of[living], f"{living}: {used} experts of layer {n}"
                told = {pair: digest(pair) for pair in pairs}
                return (told | ({pairs[0]: "other bytes"} if here == "flip" else {}),)
            case Canary(pairs=pairs):
                assert held >= set(pairs), f"{living} has no {set(pairs) - held}"
                odd = " odd" if here == "odd canary" else ""
                return (CanaryResult(kernels="k", outputs={p: f"{p}{odd}" for p in pairs}),)
            case Fence(fenced=fenced):
                self.refused[task.uid] = fenced
                return (None,)
            case Keep(experts=experts):
                kept = set(pairs_of(experts, LAYERS))
                copies |= (held - kept) & self.copies_wanted.get(living, set())
                held &= kept
                return ((self.slots_of[living],) * len(LAYERS),)
        raise AssertionError(task)

    def _on_view(self, task: Offer | Adopt) -> tuple[Answer] | None:
        if task.uid == ROUTER:
            return (task.view.view_hash,)
        if task.uid not in self.dense:
            return None
        used = self.in_use.get(task.uid)
        if isinstance(task, Adopt) and (used is None or task.view.epoch >= used.epoch):
            self.in_use[task.uid] = task.view
        return (task.view.view_hash,)
