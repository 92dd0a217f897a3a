"""The coordinator in the simulator: the real machine and runner over a virtual disk and network.

A crash takes the process between two effects, or in the middle of a write; another one reads the
log, as `elastic.py` does, and takes over what lives.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from remora.cluster.coordinator_calls import ROUTER, Limits
from remora.cluster.coordinator_recovery import recovered
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.evacuation import EVACUATE
from remora.cluster.operation import (
    Adopt,
    Answer,
    Copy,
    Effect,
    Offer,
    Operation,
    Pair,
    Quiesce,
    StartDense,
    StartShard,
    Stop,
    Target,
    Task,
)
from remora.cluster.operation_runner import OperationRunner
from remora.cluster.sim_health import SimHealth
from remora.cluster.sim_log import SimCrash, SimLog
from remora.cluster.sim_network import Violation, Work, uid_of
from remora.cluster.sim_operator import LOOK
from remora.comm.errors import ClusterError
from remora.comm.view import Member, View

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

LIMITS: Final = Limits(
    prepare_s=20.0,
    copy_s=10.0,
    verify_s=5.0,
    commit_s=5.0,
    drain_s=2.5,  # below HANG_S: a dense group that does not answer is fenced before it is ended
    free_s=5.0,
    retry_s=0.5,
    restore_s=0.1,
    settled_s=1.0,
    patience_s=2.5,  # over what any start takes
    replicas=2,
)
RESTART_S: Final = (0.5, 1.5)
DEATH_TOLD_S: Final = 0.3  # at most
LATE_S: Final = 6.0  # at most, for an order of a coordinator that died
EFFECTS_BEFORE_CRASH: Final = 4
TICKS_MAX: Final = 20  # for one time


class SimCoordinator:
    """One life after the other."""

    def __init__(self, world: "Deployment") -> None:
        self.log = SimLog(world)
        self.life = 0
        self._world = world
        self._state: CoordinatorState | None = None
        self._runner: OperationRunner | None = None
        self._newest: dict[str, int] = {}  # incarnations that tasks go to
        self._watched: set[tuple[str, int]] = set()
        self._crash_in: int | None = None  # effects
        self._seen: tuple[str, str, int] | None = None  # operation, step, round
        self._numbers: dict[str, int] = {}  # operation -> number
        self._tick_s: float | None = None
        self._ticked: tuple[float, int] = (0.0, 0)  # when last, and how often at that time
        self._health: SimHealth | None = None
        self._last_order: tuple[str, Work] | None = None  # to a shard
        world.network.on_death.append(self._on_death)

    @property
    def process(self) -> str:
        """The name of this life."""
        return f"coordinator#{self.life}"

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return self._runner is not None and self._world.network.is_up(self.process)

    @property
    def operation(self) -> Operation | None:
        """The one that runs, as far as anybody knows."""
        return self._state.operation if self._state is not None else None

    @property
    def state(self) -> CoordinatorState:
        """The machine of the life that is."""
        assert self._state is not None, "the coordinator is down"
        return self._state

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and nothing is about to."""
        state = self._state
        is_done = state is not None and state.operation is None and state.next_time() is None
        return self.is_up and is_done

    def begin(
        self, view: View, room: dict[str, tuple[int, ...]], manifest: dict[Pair, str]
    ) -> None:
        """Take over a deployment that has just come up."""
        lives = {m.uid: m.incarnation for m in view.members if m.role == "shard"}
        state = CoordinatorState(
            view=view, room=room, manifest=manifest, incarnations=lives,
            limits=self._world.limits, has_router=True,
        )  # fmt: skip
        self.log.replace(state.snapshot())
        self._live(state, state.begin(self._world.clock.now_s))

    def request(self, operation_id: str, target: Target) -> None:
        """As a client's call. Raises ClusterError, ConfigError."""
        runner = self._answering()
        if not operation_id.startswith((EVACUATE, LOOK)):  # not of the history
            self._numbers.setdefault(operation_id, len(self._numbers) + 1)
        self._call(partial(runner.request, operation_id, target))

    def cancel(self, operation_id: str) -> None:
        """As a client's call. Raises ClusterError, ConfigError."""
        self._call(partial(self._answering().cancel, operation_id))

    def _answering(self) -> OperationRunner:
        if self._runner is None or not self.is_up:
            raise ClusterError("the coordinator does not answer")
        return self._runner

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except SimCrash:
            self._crash()
            raise ClusterError("the coordinator died") from None
        self._pump()

    def outcome(self, operation_id: str) -> Operation | None:
        """How an operation is; None: nobody knows."""
        return self._state.history.get(operation_id) if self._state is not None else None

    def crash_soon(self) -> None:
        """SIGKILL, at one of the next effects, or now if there are none."""
        self._crash_in = self._world.chance.randrange(EFFECTS_BEFORE_CRASH)
        self._world.clock.after(0.05, self._crash_if_due)

    # -- effects ------------------------------------------------------------------------------

    def before_effect(self) -> None:
        """An effect is about to happen: this may be the end."""
        self._observe()
        if self._crash_in is not None:
            self._crash_in -= 1
            if self._crash_in < 0:
                raise SimCrash

    def after_effect(self) -> None:
        """An effect has happened; nothing that follows from it has."""
        if self._crash_in == 0 and self._world.chance.random() < 0.5:
            raise SimCrash

    def _perform(self, task: Task) -> "Future[Answer]":
        self.before_effect()
        world, answered = self._world, Future[Answer]()
        world.trace(f"{type(task).__name__} {task.uid}")
        settle = partial(self._settle, self._runner, answered)
        lost = partial(settle, ClusterError(f"{task.uid} is dead"))
        match task:
            case (
                StartShard(uid=uid, incarnation=incarnation)
                | StartDense(uid=uid, incarnation=incarnation)
            ):
                self._newest[uid] = incarnation
                self._watched.add((uid, incarnation))
                reply = self._answer_to(f"{uid}#{incarnation}", settle)
                self._watch_start(world.start(task, reply), lost)
            case Stop(uid=uid, incarnation=incarnation):
                self._watched.discard((uid, incarnation))
                world.end(f"{uid}#{incarnation}")
                answered.set_result(None)
            case Adopt(uid=uid) if uid == ROUTER:
                answered.set_result(task.view.view_hash)
            case _:
                self._send(task, settle, lost)
        self.after_effect()
        return answered

    def _send(self, task: Any, settle: Any, lost: Any) -> None:
        world = self._world
        process = f"{task.uid}#{self._newest.get(task.uid, 0)}"
        is_of_rank = isinstance(task, Offer | Adopt | Quiesce)
        member = world.ranks.get(process) if is_of_rank else None
        target = member or world.shards.get(process)
        if target is None:
            world.clock.after(0.0, lost)
            return
        reply = self._answer_to(process, settle)
        perform: Any = target.perform
        deliver = partial(perform, task, reply)
        if member is None:
            deliver = partial(perform, task, reply, self.state.term)
            self._last_order = (process, partial(perform, task, lambda _: None, self.state.term))
        world.network.send(self.process, process, deliver, lost)
        if isinstance(task, Copy | Quiesce):
            self._watch_start(process, lost)

    def _answer_to(self, process: str, settle: Any) -> Any:
        """What a member calls with its answer: a message to the life that asked, which hears of it
        when the connection is lost instead."""
        network, asker = self._world.network, self.process
        gone = partial(settle, ClusterError(f"the answer of {process} is lost"))

        def reply(answer: Answer | Exception) -> None:
            lost = partial(network.timer, asker, 0.0, gone)
            network.send(process, asker, partial(settle, answer), lost)

        return reply

    def _watch_start(self, process: str, lost: Any) -> None:
        """A call that takes its time fails when the process dies."""
        world, asker = self._world, self.process

        def told(dead: str) -> None:
            if dead == process:
                world.network.timer(asker, world.network.latency_s(), lost)
                world.network.on_death.remove(told)

        world.network.on_death.append(told)

    def _settle(
        self, runner: OperationRunner | None, answered: "Future[Answer]", answer: Answer | Exception
    ) -> None:
        if runner is not self._runner or answered.done():
            return
        if isinstance(answer, Exception):
            answered.set_exception(answer)
        else:
            answered.set_result(answer)
        self._pump()

    # -- lives --------------------------------------------------------------------------------

    def _live(
        self, state: CoordinatorState, effects: list[Effect], leaving: tuple[Member, ...] = ()
    ) -> None:
        world = self._world
        self.life += 1
        world.network.start(self.process)
        self._state, self._crash_in, self._tick_s = state, None, None
        members = (*state.view.members, *leaving)
        living = [m for m in members if m.actor_name in world.network.alive]
        self._newest = {m.uid: m.incarnation for m in living}
        self._watched = {(m.uid, m.incarnation) for m in living}
        self._runner = OperationRunner(
            state, self.log, perform=self._perform, publish=self._published,
            clock=lambda: world.clock.now_s,
        )  # fmt: skip
        self._health = SimHealth(world, self.process, self._hung)
        self._health.adopt_view(state.view)
        try:
            self._runner.begin(effects)
        except SimCrash:
            self._crash()
            return
        for m in members:
            if m not in living:
                self._runner.lost(m.uid, m.incarnation)
        self._pump()

    def _published(self, view: View) -> None:
        if self._health is not None:
            self._health.adopt_view(view)
        self._world.published(view)

    def _hung(self, uid: str, incarnation: int) -> None:
        if self._runner is not None:
            self._runner.lost(uid, incarnation)
            self._pump()

    def _pump(self) -> None:
        """Handle what has come, and be woken when the next deadline is."""
        runner, world = self._runner, self._world
        if runner is None:
            return
        try:
            while runner.has_events:
                runner.turn(0.0)
                self._observe()
        except SimCrash:
            self._crash()
            return
        due_s = runner.next_time()
        if due_s is not None and due_s != self._tick_s:
            self._tick_s = due_s
            delay_s = max(0.0, due_s - world.clock.now_s)
            world.network.timer(self.process, delay_s, partial(self._tick, runner, due_s))

    def _tick(self, runner: OperationRunner, due_s: float) -> None:
        if runner is not self._runner or self._tick_s != due_s:
            return
        self._tick_s = None
        ticked_s, times = self._ticked
        self._ticked = (due_s, times + 1 if due_s == ticked_s else 1)
        if self._ticked[1] > TICKS_MAX:
            raise Violation(f"7: the coordinator is busy at {due_s} s: {self.operation}")
        try:
            runner.turn(0.0)
            self._observe()
        except SimCrash:
            self._crash()
            return
        self._pump()

    def _crash_if_due(self) -> None:
        if self._crash_in is not None:
            self._crash()

    def _crash(self) -> None:
        world = self._world
        world.trace(f"{self.process} dies")
        world.network.kill(self.process)
        if self._last_order is not None and world.chance.random() < 0.5:  # as if it were late
            process, deliver = self._last_order
            world.network.timer(process, LATE_S * world.chance.random(), deliver)
        self._runner = self._state = self._last_order = None
        self._crash_in = None
        low, high = RESTART_S
        world.clock.after(low + world.chance.random() * (high - low), self._resume)

    def _resume(self) -> None:
        state, operation, leaving = recovered(self.log.read(), self._world.limits, has_router=True)
        in_flight = operation.operation_id if operation else "nothing"
        self._world.trace(f"coordinator#{self.life + 1} resumes; in flight: {in_flight}")
        self._live(state, state.resume(operation, self._world.clock.now_s), leaving)

    def _on_death(self, process: str) -> None:
        uid, _, incarnation = process.partition("#")
        if uid_of(process) == "coordinator" or (uid, int(incarnation)) not in self._watched:
            return
        runner, world = self._runner, self._world

        def told() -> None:
            if runner is not None and runner is self._runner:
                runner.lost(uid, int(incarnation))
                self._pump()

        delay_s = world.chance.random() * DEATH_TOLD_S
        world.network.timer(self.process, delay_s, told)

    def _observe(self) -> None:
        """Faults strike at the steps of operations."""
        operation = self.operation
        now = None
        if operation is not None:
            now = (operation.operation_id, operation.step, operation.round)
        before, self._seen = self._seen, now
        if before == now:
            return
        if before is not None:
            self._at(before, "after")
            ended = self.outcome(before[0])
            if ended is not None and ended.outcome != "running":
                self._world.operator.ended(ended)
        if now is not None:
            self._world.trace(f"operation {now[0]}: {now[1]}")
            self._at(now, "before")

    def _at(self, seen: tuple[str, str, int], when: Any) -> None:
        number = self._numbers.get(seen[0], 0)  # 0: of the machine's own
        self._world.faults.at(number, seen[1], when)
