"""Histories of a deployment from seeds: operations, faults and requests, and what must hold.

One seed is one history: it draws the deployment, a few operations, the faults (unless a file names
them) and every delay, so that it happens again in the same way.
"""

import contextlib
import logging
import random
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Final

import msgspec

from remora.cluster.operation import Drain, PlaceAs, Restore, ScaleTo, Target
from remora.cluster.operation_plan import same_slots
from remora.cluster.placement_steps import spread
from remora.cluster.restore_tries import RESTORES_MAX
from remora.cluster.sim_coordinator import DEATH_TOLD_S, LIMITS
from remora.cluster.sim_deployment import Deployment
from remora.cluster.sim_dispatch import CALL_TIMEOUT_S, HOLD_S
from remora.cluster.sim_faults import Fault, draw_faults
from remora.cluster.sim_health import EVERY_S, HANG_S, SILENT, STALL_S
from remora.cluster.sim_model import LAYERS, NUM_EXPERTS
from remora.cluster.sim_network import Violation, uid_of
from remora.cluster.sim_operator import EVERY_S as LOOK_S
from remora.cluster.sim_rank import STEP_S
from remora.cluster.sim_shard import EXPERT_S, PROCESS_S
from remora.comm.errors import ClusterError, ConfigError, RemoraError

RUNNER_LOG: Final = "remora.cluster.operation_runner"
WALK: Final = (2, 4, 8, 4, 2)  # shards of a walk; histories take a part of it
OPERATIONS: Final = (1, 3)
ASK_AGAIN_S: Final = 0.3
BETWEEN_S: Final = (0.1, 1.5)  # operations
CANCELLED_SHARE: Final = 0.1  # of operations
CANCEL_S: Final = 2.0  # after their begin, at most
# Every step of an operation has its limit; several rounds and a restart of the coordinator fit in.
OPERATION_S: Final = 80 * LIMITS.drain_s
REST_S: Final = HOLD_S + 2 * OPERATION_S  # for requests and restored shards, after the last fault
GAP_PLANNED_S: Final = 6 * STEP_S  # longest of a stream while only operations happen
# A death is told, a process starts, loads every expert, and a view with it goes through its steps.
RESTORE_S: Final = DEATH_TOLD_S + PROCESS_S[1] + EXPERT_S * len(LAYERS) * NUM_EXPERTS + 1.0
OTHERS_S: Final = LIMITS.prepare_s + 5.0  # of an operation that is waited for, and waits for room
FOUND_S: Final = HANG_S + 2 * EVERY_S  # who hangs, at the latest
STALLED_S: Final = STALL_S + 2 * EVERY_S  # who answers, and does nothing of what waits
EVENTS_MAX: Final = 400_000


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one seed came to."""

    seed: int
    violation: str | None = None
    faults: list[str] = []  # that struck
    operations: list[str] = []  # as "ScaleTo done"
    num_tokens: int = 0
    num_events: int = 0
    longest_gap_s: float = 0.0
    virtual_s: float = 0.0
    trace: list[str] = []


def run_seed(
    seed: int, faults: tuple[Fault, ...] | None = None, *, traced: bool = False
) -> Outcome:
    """One history. Whatever a machine asserts is a violation as much as what is checked here.

    Args:
        faults: instead of those that the seed draws.
        traced: with what happened, line by line.
    """
    history = History(seed, faults, traced=traced)
    violation = None
    with _quiet():
        try:
            history.run()
        except Violation as found:
            violation = str(found)
        except Exception as broken:  # an assertion of a machine, or a fault of its code
            where = traceback.extract_tb(broken.__traceback__)[-1]
            violation = f"{type(broken).__name__} in {where.name}: {broken}"
    world = history.world
    return Outcome(
        seed=seed,
        violation=violation,
        faults=[str(fault) for fault in world.faults.struck],
        operations=history.ended,
        num_tokens=world.ingress.num_tokens,
        num_events=world.clock.num_events,
        longest_gap_s=world.ingress.longest_gap_s,
        virtual_s=world.clock.now_s,
        trace=world.lines or [],
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Faults are to be expected: the runner's log lines are no news here."""
    log = logging.getLogger(RUNNER_LOG)
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


class History:
    """A deployment and what is done to it."""

    def __init__(
        self, seed: int, faults: tuple[Fault, ...] | None = None, *, traced: bool = False
    ) -> None:
        chance = self._chance = random.Random(seed)
        drawn = draw_faults(chance)  # also with a file, so that the rest of the history is the same
        num_shards = chance.choice((2, 2, 2, 3, 4))
        least = -(-NUM_EXPERTS // num_shards)
        self.ended: list[str] = []
        self.world = Deployment(
            chance,
            num_shards=num_shards,
            num_dense=chance.choice((1, 2, 2)),
            room=chance.randint(least, NUM_EXPERTS),
            num_copies=chance.choice((0, 2, NUM_EXPERTS)),
            faults=drawn if faults is None else faults,
            traced=traced,
        )

    def run(self) -> None:
        """To the end. Raises Violation, or what a machine asserts."""
        world, chance = self.world, self._chance
        world.ingress.begin()
        number = chance.randint(*OPERATIONS)
        at = chance.randrange(len(WALK) - 1)
        for index in range(number):
            self._pass_by(*BETWEEN_S)
            operation_id = f"operation-{index + 1}"
            if chance.random() < CANCELLED_SHARE:
                world.clock.after(chance.random() * CANCEL_S, partial(self._cancel, operation_id))
            self._operate(operation_id, self._draw_target(WALK[(at + index + 1) % 5]))
        world.faults.end()
        self._rest("after the last fault")
        kinds = {fault.kind for fault in world.faults.struck}
        if not kinds & {*SILENT, "full disk"}:  # else a Keep may be lost, or a shard be given up
            self._check_slots()
        last = ScaleTo(len(world.view.placement.slots) + 1)
        if self._operate("last", last) != "done":
            reason = self._reason("last")
            raise Violation(f"7: after everything {last} does not succeed: {reason}")
        world.ingress.close()
        if not world.clock.run(lambda: not world.ingress.num_running, world.clock.now_s + REST_S):
            raise Violation(f"2: {world.ingress.num_running} requests do not end")
        self._rest("at the end")
        self._check_rest()

    # -- inside -------------------------------------------------------------------------------

    def _pass_by(self, low_s: float, high_s: float) -> None:
        clock = self.world.clock
        clock.run(lambda: False, clock.now_s + low_s + self._chance.random() * (high_s - low_s))

    def _draw_target(self, shards: int) -> Target:
        chance, view = self._chance, self.world.view
        slots = view.placement.slots
        dense = sorted(m.uid for m in view.members if m.role == "dense")
        kind, names_one = chance.random(), chance.random() < 0.3
        if kind < 0.5:
            retire = chance.sample(sorted(slots), 1) if names_one else []
            return ScaleTo(chance.choice((shards, shards, 3, 5)), retire=tuple(retire))
        if kind < 0.62:
            retire = chance.sample(dense, 1) if names_one else []
            return ScaleTo(dense_groups=chance.choice((1, 2, 3)), retire=tuple(retire))
        if kind < 0.78:
            uid = chance.choice([*slots, *dense, *dense])
            return Drain((uid,), chance.choice(("none", "needed")))
        room = {uid: tuple(max(map(len, s)) for _ in LAYERS) for uid, s in slots.items()}
        experts = list(range(NUM_EXPERTS))
        chance.shuffle(experts)
        uids = sorted(slots)
        chance.shuffle(uids)
        named = {uid: f"{i:02}" for i, uid in enumerate(uids)}
        mixed = spread(
            {}, {named[u]: room[u] for u in uids}, {}, num_experts=NUM_EXPERTS, replicas=2
        )
        renamed = {
            uid: tuple(tuple(experts[e] for e in layer) for layer in mixed[named[uid]])
            for uid in slots
        }
        return PlaceAs(renamed)

    def _operate(self, operation_id: str, target: Target) -> str:
        """Ask for an operation until it is over, as a client would. Raises Violation."""
        world = self.world
        until_s = world.clock.now_s + OPERATION_S
        asked = False
        world.trace(f"ask for {operation_id}: {target}")
        while world.clock.now_s < until_s:
            if asked and world.coordinator.is_up and not world.coordinator.outcome(operation_id):
                raise Violation(f"7: {operation_id} was accepted, and nobody knows it")
            try:
                world.coordinator.request(operation_id, target)
            except ConfigError as refused:
                world.trace(f"{operation_id} is refused: {refused}")
                self.ended.append(f"{type(target).__name__} refused")
                return f"refused: {refused}"
            except ClusterError as failed:
                world.trace(f"{operation_id}: {failed}")
            else:
                if not asked and self._chance.random() < 0.3:
                    self._ask_for_another()
                asked = True
            found = world.coordinator.outcome(operation_id)
            if found is not None and found.outcome != "running":
                self.ended.append(f"{type(target).__name__} {found.outcome}")
                if found.outcome == "done" and not world.faults.struck:
                    self._check_done(target)
                world.trace(f"{operation_id} {found.outcome} {found.reason}")
                return found.outcome
            world.clock.run(lambda: False, world.clock.now_s + ASK_AGAIN_S)
            if world.clock.num_events > EVENTS_MAX:
                raise Violation(f"7: {EVENTS_MAX} events")
        found = world.coordinator.outcome(operation_id)
        raise Violation(f"7: {operation_id} does not end within {OPERATION_S:g} s: {found}")

    def _cancel(self, operation_id: str) -> None:
        """Somebody does not want it any more."""
        try:
            self.world.coordinator.cancel(operation_id)
            self.world.trace(f"{operation_id} is not wanted any more")
        except RemoraError as refused:
            self.world.trace(f"{operation_id} is not cancelled: {refused}")

    def _check_done(self, target: Target) -> None:
        """Invariant 7, where nothing went wrong: what is said to be done is so."""
        view = self.world.view
        shards, dense = list(view.placement.slots), [m for m in view.members if m.role == "dense"]
        gone: tuple[str, ...] = ()
        match target:
            case ScaleTo(shards=wanted, retire=gone, dense_groups=groups):
                is_so = wanted in (None, len(shards)) and groups in (None, len(dense))
            case Drain(uids=gone):
                is_so = True
            case PlaceAs(slots=slots):
                is_so = same_slots(slots, view.placement.slots)
        if not is_so or {m.uid for m in view.members} & set(gone):
            raise Violation(f"7: {target} is done, and there are {view.members}")

    def _ask_for_another(self) -> None:
        """One operation at a time: the second one is refused while the first one runs."""
        coordinator = self.world.coordinator
        running = coordinator.operation
        if coordinator.is_up and running is not None and not isinstance(running.target, Restore):
            with contextlib.suppress(ClusterError):
                coordinator.request("another", ScaleTo(2))
                if coordinator.is_up:
                    raise Violation("7: two operations at a time")

    def _reason(self, operation_id: str) -> str:
        found = self.world.coordinator.outcome(operation_id)
        return found.reason if found is not None else "nobody knows it"

    def _rest(self, when: str) -> None:
        """Until there is room, the coordinator is up and has nothing to do, everybody is back that
        is silent or died, and no step waits for an expert."""
        world = self.world
        silent_s = max((until for _, _, until in world.faults.silent), default=0.0)

        def is_calm() -> bool:
            state = world.coordinator
            if world.clock.now_s <= silent_s + 1.0 or not state.is_idle or state.state.fenced:
                return False
            if world.places.wanting or world.operator.missing():
                return False
            # the view of one more operation would end a hold that must end by itself
            alive = world.network.alive
            return not any(r.dispatch.is_holding for p, r in world.ranks.items() if p in alive)

        if not world.clock.run(is_calm, world.clock.now_s + REST_S):
            operation, missing = world.coordinator.operation, sorted(world.operator.missing())
            raise Violation(f"7: no rest {when}: {operation}; away: {missing}")

    def _check_rest(self) -> None:
        """Invariants 4, 6, 8 and 11, when nothing happens any more."""
        world, view = self.world, self.world.coordinator.state.view
        self._check_slots()
        for process, rank in world.ranks.items():
            if process not in world.network.alive:
                continue
            used = rank.routes.view
            if used is None or used.view_hash != view.view_hash:
                raise Violation(f"4: {process} is at epoch {rank.routes.epoch}, not {view.epoch}")
            rank.state.check_integrity()
        wait_s, bound_s = world.ingress.longest_wait_s, gap_bound_s(world.faults.struck)
        if wait_s > bound_s:
            raise Violation(f"8: a stream waited {wait_s:.2f} s; {bound_s:.2f} s are allowed")
        away_s, bound_s = world.operator.longest_away_s, bound_s + OTHERS_S
        if away_s > bound_s:
            raise Violation(
                f"11: a member was away for {away_s:.1f} s; {bound_s:.1f} s are allowed"
            )

    def _check_slots(self) -> None:
        """Invariants 4 and 6: who lives is a member, and holds what the view says."""
        world, view = self.world, self.world.coordinator.state.view
        members = {m.actor_name for m in view.members if m.role == "shard"}
        alive = {p for p in world.shards if p in world.network.alive}
        groups = {p for p in world.ranks if p in world.network.alive}
        everybody = {m.actor_name for m in view.members}
        if alive | groups != everybody:
            raise Violation(f"6: {sorted(alive | groups)} live, {sorted(everybody)} are members")
        for process in sorted(alive & members):
            shard = world.shards[process]
            held = shard.state
            if shard.damaged() or held.copies.keys() & held.digests.keys():
                raise Violation(f"4: {process} has wrong second copies: {held.copies}")
            slots = view.placement.slots[uid_of(process)]
            for layer, experts in zip(LAYERS, slots, strict=True):
                if set(held.experts_of(layer)) != set(experts):
                    raise Violation(
                        f"6: {process} holds {held.experts_of(layer)} of layer {layer}, the view"
                        f" says {experts}"
                    )


def gap_bound_s(struck: list[Fault]) -> float:
    """Longest that a stream may wait for a token under these faults (invariant 8).

    Each fault adds what it takes to find it, where somebody must, and to restore what it took. A
    process that hangs is found by its progress; a link that is cut by nobody but its ends, so it
    adds as long as it is cut, and a call that is under way then, to its time-out. A member that has
    found no place is tried again some time after there is room, or when somebody has looked.
    """
    bound_s = GAP_PLANNED_S
    for fault in struck:
        match fault.kind:
            case "stop":
                bound_s += min(fault.for_s, FOUND_S) + RESTORE_S
            case "block":
                bound_s += min(fault.for_s, STALLED_S) + RESTORE_S
            case "cut" | "cut one way":
                bound_s += fault.for_s + CALL_TIMEOUT_S + RESTORE_S
            case "no place":
                num_tries = min(int(fault.for_s / LIMITS.prepare_s), RESTORES_MAX - 1)
                bound_s += LIMITS.restore_s * 2.0**num_tries + LOOK_S + RESTORE_S
            case _:
                bound_s += RESTORE_S
    return bound_s
