"""The steps of an operation: what each asks for, and what follows when it has been done. Pure."""

from collections.abc import Callable, Collection, Mapping
from typing import Final

import msgspec

from remora.cluster.coordinator_calls import ROUTER
from remora.cluster.coordinator_fences import CoordinatorFences
from remora.cluster.copy_sources import copy_sources
from remora.cluster.former_places import former_after
from remora.cluster.operation import (
    Adopt,
    Canary,
    Copy,
    Drain,
    Held,
    HoldCopies,
    Keep,
    Offer,
    Operation,
    Outcome,
    Pair,
    Publish,
    Quiesce,
    Settled,
    StartDense,
    StartShard,
    Step,
    Stop,
    TakeOver,
    Task,
    is_dense,
)
from remora.cluster.operation_plan import (
    held_by_living,
    joiner_slots,
    must_give_up_copies,
    same_slots,
)
from remora.cluster.placement_steps import additions, pairs_of, rounds
from remora.cluster.second_copies import plan_copies
from remora.comm.errors import ConfigError
from remora.comm.view import View, uncovered

STEP_S_MIN: Final = 2.0
QUIESCE_SHARE: Final = 0.8  # of the time for a drain: a retiring dense group finishes within it


class OperationSteps(CoordinatorFences):
    """See `CoordinatorState`."""

    def _go_on(self) -> None:
        operation = self.operation
        if operation is None or self._waiting or self._again or self._logging is not None:
            return
        self._until_s = None
        follow: dict[Step, Callable[[], None]] = {
            "prepare": self._copy,
            "copy": self._verify,
            "verify": self._offer,
            "commit": self._commit,
            "drain": self._free,
            "free": self._freed,
            "undo": lambda: self._end("failed", operation.reason),
        }
        follow[operation.step]()

    def _prepare(self) -> None:
        """Who joins starts, loads what it will hold, and listens; nobody asks it anything yet."""
        joiners = self._running().joiners
        self._held = dict(held_by_living(self.situation()))
        self._joined.clear()
        self._asked_s, self._loads = {}, {}
        num_shards = sum(not is_dense(uid) for uid in joiners)
        if must_give_up_copies(num_shards, self.situation()):
            self.copies.clear()
            self._aside_all(HoldCopies(uid=uid, pairs=()) for uid in self._held)
        self._begin("prepare", self._within(self._limits.prepare_s), self._starts(joiners))

    def _starts(self, uids: Collection[str]) -> list[Task]:
        """Of some who join."""
        operation = self._running()
        slots = joiner_slots(self.situation())
        layers = self.view.placement.moe_layers
        joining = {u: pairs_of(operation.slots[u], layers) for u in uids if not is_dense(u)}
        self._asked_s |= dict.fromkeys(uids, self._now_s)
        self._loads |= {uid: operation.slots[uid] for uid in joining}
        copies = copy_sources(joining, self._held, layers, self.copies)
        served = {pair for held in self._held.values() for pair in pairs_of(held, layers)}
        urgent = {uid for uid, pairs in joining.items() if not served.issuperset(pairs)}
        return [
            StartDense(
                uid=uid,
                incarnation=operation.joiners[uid],
                is_urgent=not self._living_dense(),
            )
            if is_dense(uid)
            else StartShard(
                uid=uid,
                incarnation=operation.joiners[uid],
                experts=operation.slots[uid],
                num_slots=max(slots, *map(len, operation.slots[uid])),
                replicas=copies.get(uid, {}),
                is_urgent=uid in urgent,
                yields=self._deadline_s() is None and uid not in urgent,
            )
            for uid in uids
        ]

    def _copy(self) -> None:
        operation = self._running()
        if operation.round == 0:
            for uid in self._joined_shards():
                self.room[uid] = self._joined[uid].room
                self._held[uid] = self._loads[uid]
        dead = self._dead(operation)
        self._held = {uid: held for uid, held in self._held.items() if uid not in dead}
        members = self.view.placement.slots
        wanting = {uid: operation.slots[uid] for uid in dead}
        if additions(members, wanting, self.view.placement.moe_layers):
            self._abort(f"{', '.join(dead)} died")
            return
        try:
            self._rounds = self._plan_rounds(operation, self._held)
        except ConfigError as stuck:
            self._abort(str(stuck))
            return
        operation.num_rounds = operation.round + len(self._rounds)
        layers = self.view.placement.moe_layers
        wanted = additions(self._held, self._rounds[0], layers)
        copies = copy_sources(wanted, self._held, layers, self.copies)
        urgent = isinstance(operation.target, TakeOver)
        yields = self._deadline_s() is None and not urgent
        tasks = [
            Copy(uid=uid, pairs=tuple(each), replicas=each, is_urgent=urgent, yields=yields)
            for uid, each in copies.items()
        ]
        self._begin("copy", self._within(self._limits.copy_s), tasks)

    def _verify(self) -> None:
        """One forward of every new copy, and of a replica that serves (whoever is asked least)."""
        placement = self.view.placement
        new = additions(self._held, self._rounds[0], placement.moe_layers)
        if self._running().round == 0:
            held = {u: self._held[u] for u in self._joined_shards()}
            new |= {u: pairs_of(held[u], placement.moe_layers) for u in held}
        asked: dict[str, set[Pair]] = {uid: set(pairs) for uid, pairs in new.items()}
        serving = sorted(set(placement.slots) - self.lost - self._joined.keys())
        for pair in sorted({pair for pairs in new.values() for pair in pairs}):
            index = placement.moe_layers.index(pair[0])
            holders = [uid for uid in serving if pair[1] in placement.slots[uid][index]]
            if holders:
                least = min(holders, key=lambda uid: (len(asked.get(uid, ())), uid))
                asked.setdefault(least, set()).add(pair)
        self._canaries.clear()
        tasks = [Canary(uid=uid, pairs=tuple(sorted(pairs))) for uid, pairs in asked.items()]
        self._begin("verify", self._within(self._limits.verify_s), tasks)

    def _offer(self) -> None:
        """The next view to every dense rank, while the older one serves. Who joins has no older
        one: nobody asks it anything before the commit, so it may adopt this one."""
        operation = self._running()
        fault = self._canary_fault()
        if fault is not None:
            self._abort(fault)
            return
        members = {m.uid: m for m in self.view.members}
        members |= {uid: started.member for uid, started in self._joined.items()}
        dead = self._dead(operation)
        if len(self._rounds) == 1:
            slots = {uid: self._rounds[0].get(uid, held) for uid, held in operation.slots.items()}
        else:  # who is dead holds, in its next life, what the view says
            slots = self._rounds[0] | {uid: self.view.placement.slots[uid] for uid in dead}
        placement = msgspec.structs.replace(self.view.placement, slots=slots)
        try:
            placement.check()
        except AssertionError as uncovered:  # what only a dead retiree had did not fit at once
            self._abort(str(uncovered))
            return
        stay = tuple(
            member
            for uid, member in sorted(members.items())
            if (uid not in operation.retirees if is_dense(uid) else uid in slots)
        )
        self._next = View(epoch=self.view.epoch + 1, members=stay, placement=placement)
        # nobody can connect to who is dead, and nobody has to before it is restored
        living = tuple(member for member in stay if member.uid not in dead)
        offered = msgspec.structs.replace(self._next, members=living)
        or_none = self._has_gaps(self._next, dead)
        uids = [uid for uid in self._living_dense() if uid not in self.fenced]
        tasks: list[Task] = [Offer(uid=uid, view=offered) for uid in uids]
        joined = [uid for uid in self._joined if is_dense(uid)]
        tasks += [Adopt(uid=uid, view=self._next, or_none=or_none) for uid in joined]
        limit_s = self._limits.patience_s if self._is_pressing() else self._limits.commit_s
        self._begin("commit", self._within(limit_s), tasks)

    def _commit(self) -> None:
        assert self._next is not None, "nothing was offered"
        operation = msgspec.to_builtins(self._running())
        view = msgspec.to_builtins(self._next)
        self._log("committed", self._committed, self._abort, view=view, operation=operation)

    def _committed(self) -> None:
        assert self._next is not None, "nothing was offered"
        operation = self._running()
        layers = self._next.placement.moe_layers
        new = additions(self._held, self._rounds[0], layers)
        if operation.round == 0:
            new |= {uid: pairs_of(operation.slots[uid], layers) for uid in self._joined_shards()}
            self.lost -= operation.joiners.keys()
            self.lost_dense -= operation.joiners.keys()
            if self._is_restore():  # they serve from now on
                self._restores.back(operation.joiners, self._now_s)
        operation.moved += sum(map(len, new.values()))
        operation.round += 1
        before, after = self.view.placement.slots, self._next.placement.slots
        self.former = former_after(operation.target, self.former, before, after)
        self.view, self._next = self._next, None
        members = self.view.placement.slots
        self.copies = {uid: found for uid, found in self.copies.items() if uid in members}
        self.lost &= self.view.placement.slots.keys()
        self.lost_dense &= self._members() | set(operation.retirees)
        self._held = dict(self._rounds[0])
        self._put(Publish(self.view))
        if self.fenced:
            self._aside_all(self._fences())
        self._drain()

    def _drain(self) -> None:
        """Until no dense rank sends by an older view: each swaps at its own step boundary. Who
        retires swaps too, as it finishes what it has; what it does not finish goes on elsewhere."""
        leaving = self._leaving() if self._running().round == 1 else []
        uids = [*self._living_dense(), *leaving, *([ROUTER] if self._has_router else [])]
        tasks = [self._adoption(uid) for uid in uids]
        self._aside_all(t for t in tasks if t.uid == ROUTER or t.uid in self.fenced)
        waited: list[Task] = [t for t in tasks if t.uid != ROUTER and t.uid not in self.fenced]
        drain_s = self._within(self._limits.drain_s)
        within_s = QUIESCE_SHARE * drain_s
        waited += [Quiesce(uid=uid, within_s=within_s) for uid in leaving]
        self._begin("drain", drain_s, waited)

    def _adoption(self, uid: str) -> Adopt:
        """Of the view that is committed; where experts died, steps are held until they are back."""
        or_none = uid in self.fenced or self._has_gaps(self.view, self.lost)
        return Adopt(uid=uid, view=self.view, or_none=or_none)

    def _free(self) -> None:
        operation = self._running()
        if operation.serving_s is None and not self.fenced:
            operation.serving_s = self._now_s - operation.begun_s
        slots = self.view.placement.slots
        tasks: list[Task] = [Keep(uid=u, experts=slots[u]) for u in slots if u not in self.lost]
        gone = [uid for uid in operation.retirees if uid not in self._members()]
        lives = [(uid, self.incarnations[uid]) for uid in gone]
        tasks += [Stop(uid=uid, incarnation=life) for uid, life in [*lives, *self._left_out]]
        self._begin("free", self._within(self._limits.free_s), tasks)

    def _freed(self) -> None:
        operation = self._running()
        slots = self.view.placement.slots
        members = self._members()
        operation.safe_to_delete = tuple(u for u in operation.retirees if u not in members)
        for uid in operation.safe_to_delete:
            self.room.pop(uid, None)
            if uid in self.fenced and uid in self._stopped:  # its next life is another one
                self._let_in(uid)
        self.lost_dense &= members
        self._held = {uid: slots[uid] for uid in slots if uid not in self.lost}
        self._joined.clear()
        if same_slots(slots, operation.slots):
            self._end("done", operation.reason)
        else:
            self._copy()

    def _abort(self, reason: str, blamed: Collection[str] | None = None) -> None:
        """Back to the committed view: nobody has left it.

        Args:
            blamed: members that died and for which this counts as a try in vain; None: all that
                were to come back.
        """
        operation = self._running()
        if operation.step == "undo":
            return
        operation.reason, self._blamed = reason, blamed
        self._next = None
        slots = self.view.placement.slots
        members = {(m.uid, m.incarnation) for m in self.view.members}
        joiners = [j for j in operation.joiners.items() if j not in members]
        lives = [*joiners, *self._left_out]
        tasks: list[Task] = [Stop(uid=uid, incarnation=life) for uid, life in lives]
        tasks += [Keep(uid=u, experts=slots[u]) for u in slots if u not in self.lost]
        for uid, _ in joiners:
            if uid not in slots:
                self.room.pop(uid, None)
        self._begin("undo", self._within(self._limits.free_s), tasks)

    def _end(self, outcome: Outcome, reason: str) -> None:
        operation = self._running()
        operation.outcome, operation.reason, operation.step = outcome, reason, "over"
        operation.ended_s = self._now_s - operation.begun_s
        self._until_s = None
        self._forget_calls()
        # not in the log, it is undone or finished once more after a restart
        entry = msgspec.to_builtins(operation)
        self._log("ended", self._over, lambda _: self._over(), operation=entry)

    def _over(self) -> None:
        operation = self._running()
        self.operation = None
        self._are_copies_due = True
        self._put(Settled(operation))

    # -- second copies ------------------------------------------------------------------------

    def _ask_copies(self) -> None:
        """Every shard for the second copies that it is to hold by the view; nothing waits."""
        self._are_copies_due = False
        if not self._limits.num_copies:
            return
        held, layers = held_by_living(self.situation()), self.view.placement.moe_layers
        hosts = {m.uid: m.endpoint.host for m in self.view.members if m.role == "shard"}
        planned = plan_copies(
            held, layers, hosts, num_copies=self._limits.num_copies, now=self.copies,
            heat=self.heat,
        )  # fmt: skip
        sources = copy_sources(planned, held, layers)
        self._aside_all(
            HoldCopies(uid=uid, pairs=pairs, replicas=sources.get(uid, {}))
            for uid, pairs in planned.items()
        )

    # -- times and members --------------------------------------------------------------------

    def _within(self, limit_s: float) -> float:
        """How long a step may take: where the operation has a deadline, not beyond it."""
        operation, within_s = self._running(), self._deadline_s()
        if within_s is None:
            return limit_s
        return min(limit_s, max(STEP_S_MIN, operation.begun_s + within_s - self._now_s))

    def _deadline_s(self) -> float | None:
        target = self._running().target
        return target.within_s if isinstance(target, Drain) else None

    def _leaving(self) -> list[str]:
        """Dense groups that retire by this operation and are not in the view any more."""
        members = self._members()
        left = [u for u in self._running().retirees if is_dense(u) and u not in members]
        return [uid for uid in left if uid not in self.lost_dense]

    def _joined_shards(self) -> list[str]:
        return [uid for uid in self._joined if not is_dense(uid)]

    def _dead(self, operation: Operation) -> list[str]:
        """Shards of the view that the operation leaves dead."""
        anew = operation.joiners.keys() if operation.round == 0 else set()
        return sorted(self.lost - anew - set(operation.retirees))

    @staticmethod
    def _has_gaps(view: View, dead: Collection[str]) -> bool:
        """Whether there is an expert that dead shards alone hold."""
        return bool(uncovered(view.placement, view.placement.slots.keys() - dead))

    # -- checks and plans ---------------------------------------------------------------------

    def _digest_fault(self, uid: str, digests: Mapping[Pair, str]) -> str | None:
        for pair, digest in sorted(digests.items()):
            if self.manifest[pair] != digest:
                return f"{uid}: layer {pair[0]} expert {pair[1]} is {digest}, not what was loaded"
        return None

    def _canary_fault(self) -> str | None:
        """Two shards with the same kernels whose outputs of one expert differ."""
        seen: dict[tuple[str, Pair], tuple[str, str]] = {}
        for uid, result in sorted(self._canaries.items()):
            for pair, output in result.outputs.items():
                other, there = seen.setdefault((result.kernels, pair), (uid, output))
                if there != output:
                    return f"layer {pair[0]} expert {pair[1]}: {uid} and {other} compute otherwise"
        return None

    def _plan_rounds(self, operation: Operation, held: Held) -> list[Held]:
        """What shards hold after each round; one where only members change."""
        room = dict(self.room)
        slots = joiner_slots(self.situation())
        if isinstance(operation.target, TakeOver):  # second copies have slots of their own
            room |= {uid: tuple(map(len, held)) for uid, held in operation.slots.items()}
        for uid in operation.joiners.keys() & operation.slots.keys():
            if uid not in self._joined and operation.round == 0:
                room[uid] = tuple(max(slots, len(experts)) for experts in operation.slots[uid])
        dead = self._dead(operation)  # these take nothing, and nobody counts on them
        target = {uid: layers for uid, layers in operation.slots.items() if uid not in dead}
        found = rounds(held, target, room) if target else []
        return [dict(each) for each in found] or [dict(held)]
