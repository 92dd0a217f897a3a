"""Shards and dense ranks for the coordinator's state machine: what they hold, use and answer."""

from typing import Literal

from remora.cluster.coordinator_calls import ROUTER, Limits
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.operation import (
    Adopt,
    Answer,
    Canary,
    CanaryResult,
    Copy,
    Fence,
    HoldCopies,
    Keep,
    Offer,
    Pair,
    Quiesce,
    StartDense,
    Started,
    StartShard,
    Stop,
    Task,
    is_dense,
)
from remora.cluster.placement_steps import pairs_of
from remora.comm.errors import ClusterError
from remora.comm.view import Endpoint, Member, View, uncovered

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


class Members:
    """Those that live, by uid and incarnation."""

    state: CoordinatorState
    limits: Limits

    def __init__(self, view: View, room: int) -> None:
        slots = view.placement.slots
        self.shards = {(uid, 1): set(pairs_of(slots[uid], LAYERS)) for uid in slots}
        self.slots_of = {(uid, 1): room for uid in slots}
        self.copies: dict[tuple[str, int], set[Pair]] = {}  # second ones
        self.adopted: dict[tuple[str, int], set[Pair]] = {}  # served in the slots of copies
        self.copies_wanted: dict[tuple[str, int], set[Pair]] = {}
        self.in_use = {m.uid: view for m in view.members if m.role == "dense"}
        self.dense = dict.fromkeys(self.in_use, 1)  # lives; who has adopted no view is not in use
        self.quiet: list[str] = []  # retiring groups that finished what they had
        self.refused: dict[str, tuple[str, ...]] = {}  # by shard

    def _do(self, task: Task, here: Fault) -> tuple[Answer] | None:
        """What came of it; None: nobody answers, since it is dead."""
        living = next((key for key in self.shards if key[0] == task.uid), None)
        match task:
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
                own = self.adopted.setdefault(living, set())
                own |= set(pairs) & copies
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
        shards = {m.uid for m in task.view.members if (m.uid, m.incarnation) in self.shards}
        missing = {m.uid for m in task.view.members if m.role == "shard"} - shards
        if missing and isinstance(task, Offer):
            raise ClusterError(f"{missing} cannot be reached")
        if isinstance(task, Adopt) and not task.or_none and uncovered(task.view.placement, shards):
            raise ClusterError(f"{missing} of view {task.view.epoch} cannot be reached")
        used = self.in_use.get(task.uid)
        if isinstance(task, Adopt) and (used is None or task.view.epoch >= used.epoch):
            self.in_use[task.uid] = task.view
        return (task.view.view_hash,)
