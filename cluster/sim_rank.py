"""A dense rank in the simulator: the real `DenseState` over simulated steps.

A step takes its rows through the MoE layers, one call to a shard for each layer; what `comm`'s
dispatcher does about a shard that is lost, late or does not hold an expert is done here with the
same rules (`comm/python_dispatch.py`, `routes.py`): another replica, a newer view, a hold.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from remora.actors.dense_events import (
    DenseLimits,
    Event,
    RequestArrived,
    Slice,
    SliceResult,
    StepDone,
    StepFailed,
    StepPlan,
)
from remora.actors.dense_state import DenseState
from remora.cluster.operation import Adopt, Offer, Started
from remora.cluster.sim_model import (
    LAYERS,
    NOTHING,
    VOCABULARY,
    Cell,
    first_row,
    next_cell,
    next_row,
    picks,
    token_of,
)
from remora.cluster.sim_routes import SimRoutes
from remora.cluster.sim_shard import (
    PROCESS_S,
    Found,
    NotMine,
    Reply,
    SimShard,
    member_of,
    rank_name,
)
from remora.cluster.sim_step import SimStep
from remora.comm.errors import ClusterError
from remora.comm.messages import Submit
from remora.comm.view import View

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

STEP_S: Final = 0.2
CALL_TIMEOUT_S: Final = 4.5
HOLD_S: Final = 120.0
RETRIES_MAX: Final = 3  # as python_dispatch.RETRIES_MAX, which imports torch
RECONNECT_EVERY_S: Final = 1.0
LIMITS: Final = DenseLimits(
    num_blocks=48, max_model_len=64, vocab_size=VOCABULARY, block_size=4, max_num_seqs=6,
    max_tokens_per_step=12,
)  # fmt: skip


class SimRank:
    """One life of one dense group."""

    def __init__(self, world: "Deployment", uid: str, incarnation: int) -> None:
        self.member = member_of(uid, incarnation)
        self.process = self.member.actor_name
        self.name = rank_name(self.process)
        self.state = DenseState(LIMITS)
        self.routes = SimRoutes(world, self.process, self.name)
        self._world = world
        self._cells: list[Cell] = [NOTHING] * (LIMITS.num_blocks * LIMITS.block_size)
        self._between: list[Callable[[], None]] = []  # to do between two steps
        self._offers: list[tuple[Offer, Reply]] = []
        self._adoptions: list[tuple[Adopt, int, Reply]] = []  # not answered yet; by epoch
        self._step: SimStep | None = None
        self._is_awake = False
        self._calls = 0
        self._why_not: str | None = None
        self._reconnect_at_s = 0.0

    # -- what it is asked ---------------------------------------------------------------------

    def start(self, reply: Reply) -> None:
        """Load, and listen."""
        low, high = PROCESS_S
        took_s = low + self._world.chance.random() * (high - low)
        self._later(took_s, partial(reply, Started(member=self.member)))

    @property
    def is_holding(self) -> bool:
        """Whether a step waits for an expert."""
        return self._step is not None and self._step.held_since_s is not None

    def submit(self, submit: Submit, source: str) -> None:
        """A request."""
        self._handle(RequestArrived(submit, source))
        self._wake()

    def perform(self, task: Offer | Adopt, reply: Reply) -> None:
        """A task of the coordinator."""
        if isinstance(task, Offer):
            self._offers.append((task, reply))
            if self.is_holding:
                self._take_offers()
        else:
            newest = self.routes.tell(task.view)
            self._adoptions.append((task, newest.epoch, reply))
            self._between.append(partial(self._adopt_for, task, newest))
            step = self._step
            if step is not None and step.held_since_s is not None:
                if newest.epoch > self.routes.epoch:
                    step.held_since_s = None
                    self.routes.apply(newest)
                    self._send_failed()
                else:
                    self._acknowledge()
        self._wake()

    def cut_off(self, shard: SimShard) -> None:
        """A shard that fences this rank has closed the connection."""
        uid = shard.member.uid
        if self.routes.connected.get(uid) == shard.member.incarnation:
            self.routes.lose(uid)
            self._lose_calls(uid)

    def adopt_now(self, view: View) -> None:
        """The first view, long ago."""
        self.routes.apply(self.routes.tell(view))

    # -- between steps ------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self._later(0.0, self._turn)

    def _turn(self) -> None:
        """Between two steps: what waits for that, then the next one."""
        self._is_awake = self._step is not None
        if self._step is not None:
            return
        between, self._between = self._between, []
        for action in between:
            action()
        self._take_offers()
        plan = self.state.next_step()
        if plan is None:
            return
        self._is_awake = True
        self._later(STEP_S, partial(self._begin, plan))

    def _take_offers(self) -> None:
        offers, self._offers = self._offers, []
        for task, reply in offers:
            try:
                self.routes.greet(task.view)
            except ClusterError as failed:
                reply(failed)
            else:
                reply(task.view.view_hash)

    def _adopt_for(self, task: Adopt, view: View) -> None:
        open_ = [each for each in self._adoptions if each[0] is task]
        self._adoptions = [each for each in self._adoptions if each[0] is not task]
        failure: ClusterError | None = None
        try:
            self._adopt(view, task.or_none)
        except ClusterError as failed:
            failure = failed
            if task.or_none:
                self._why_not = str(failed)
        for _, _, reply in open_:  # else a hold has answered
            reply(failure if failure and not task.or_none else task.view.view_hash)

    def _acknowledge(self) -> None:
        """A held step goes by these views already, as `ViewInbox.hold`."""
        adoptions, self._adoptions = self._adoptions, []
        for task, epoch, reply in adoptions:
            if epoch <= self.routes.epoch:
                reply(task.view.view_hash)
            else:
                self._adoptions.append((task, epoch, reply))

    def _adopt(self, view: View, or_none: bool = False) -> None:
        self.routes.adopt(view, or_none)
        self._why_not = None

    # -- a step -------------------------------------------------------------------------------

    def _begin(self, plan: StepPlan) -> None:
        if self._why_not is not None:
            try:
                self._reconnect()
            except ClusterError as failed:
                self._over(StepFailed(plan.step_id, str(failed)))
                return
        rows = [row for piece in plan.slices for row in self._rows_of(piece)]
        self._step = SimStep(plan, rows)
        self._next_layer()

    def _reconnect(self) -> None:
        now_s = self._world.clock.now_s
        if self.routes.view is None or now_s < self._reconnect_at_s:
            raise ClusterError(self._why_not or "not serving")
        self._reconnect_at_s = now_s + RECONNECT_EVERY_S
        self._adopt(self.routes.view)

    def _rows_of(self, piece: Slice) -> list[int]:
        """What the rows of a slice begin with; a page that is not this sequence's shows."""
        before = self._cells[self._cell(piece, piece.start - 1)] if piece.start else NOTHING
        rows = []
        for token_id in piece.token_ids:
            row = first_row(before, token_id)
            rows.append(row)
            before = (row, 0)
        return rows

    def _cell(self, piece: Slice, position: int) -> int:
        index, offset = divmod(position, LIMITS.block_size)
        return piece.block_table[index] * LIMITS.block_size + offset

    def _next_layer(self) -> None:
        step = self._step
        assert step is not None
        if step.layer >= 0:
            step.rows = [
                next_row(row, outputs) for row, outputs in zip(step.rows, step.outputs, strict=True)
            ]
        step.layer += 1
        if step.layer == len(LAYERS):
            self._over(StepDone(step.plan.step_id, self._results(step)))
            return
        step.outputs = [[] for _ in step.rows]
        step.attempts = 0
        asked = [(n, expert, row) for n, row in enumerate(step.rows) for expert in picks(row)]
        self._send(asked)

    def _send(self, asked: list[tuple[int, int, int]]) -> None:
        """One call to each shard that a replica is asked of; holds where there is none."""
        step, routes = self._step, self.routes
        assert step is not None
        layer = LAYERS[step.layer]
        by_shard: dict[str, list[tuple[int, int, int]]] = {}
        for each in asked:
            usable = routes.usable(layer, each[1])
            if not usable:
                step.failed = asked
                self._hold(layer, each[1])
                return
            by_shard.setdefault(usable[each[0] % len(usable)], []).append(each)
        calls = []
        for uid, pairs in by_shard.items():
            self._calls += 1
            calls.append(self._calls)
            step.waiting[self._calls] = (uid, pairs)
            process = f"{uid}#{routes.connected[uid]}"
            deliver = partial(self._world.on_call, process, self, self._calls, layer, pairs)
            lost = partial(self._lost, self._calls)
            self._world.network.send_frame(self.process, process, deliver, lost)
        if self._world.faults.planned:  # else nothing can be late
            self._later(CALL_TIMEOUT_S, partial(self._late, calls))

    def _hold(self, layer: int, expert: int) -> None:
        """An expert has no replica: a newer view that is known, else wait for one."""
        step, epoch = self._step, self.routes.epoch
        assert step is not None
        step.error = f"expert {expert} of layer {layer} has no live replica in view {epoch}"
        step.attempts += 1
        if step.attempts > RETRIES_MAX:
            self._fail_step()
            return
        if self.routes.refresh():
            self._send_failed()
            return
        step.held_since_s = self._world.clock.now_s
        self._acknowledge()
        self._world.trace(f"{self.process} holds a step: {step.error}")
        self._take_offers()
        self._later(HOLD_S, partial(self._held_too_long, step, step.held_since_s))

    def _held_too_long(self, step: SimStep, since_s: float) -> None:
        if self._step is step and step.held_since_s == since_s:
            self._fail_step()

    def _fail_step(self) -> None:
        step = self._step
        assert step is not None
        self._why_not = step.error
        self._over(StepFailed(step.plan.step_id, step.error))

    def _send_failed(self) -> None:
        step = self._step
        assert step is not None
        failed, step.failed = step.failed, []
        self._send(failed)

    # -- answers ------------------------------------------------------------------------------

    def answered(self, call: int, found: Found) -> None:
        """Of a shard: outputs, or experts that it does not hold."""
        step = self._step
        if step is None or call not in step.waiting:
            return  # late, or twice
        uid, pairs = step.waiting.pop(call)
        if isinstance(found, NotMine):
            self.routes.not_there(uid, LAYERS[step.layer], found.experts)
            step.failed += pairs
            step.error = f"{uid} does not hold {found.experts}"
        else:
            for number, output in found:
                step.outputs[number].append(output)
        self._collect(step)

    def is_waiting_for(self, call: int) -> bool:
        """Whether the answer would count."""
        return self._step is not None and call in self._step.waiting

    def _lost(self, call: int) -> None:
        step = self._step
        if step is None or call not in step.waiting:
            return
        uid = step.waiting[call][0]
        self.routes.lose(uid)
        self._lose_calls(uid)

    def _lose_calls(self, uid: str) -> None:
        step = self._step
        if step is None:
            return
        for call in [c for c, (there, _) in step.waiting.items() if there == uid]:
            step.failed += step.waiting.pop(call)[1]
            step.error = f"{uid} is lost"
        if step.held_since_s is None:
            self._collect(step)

    def _late(self, calls: list[int]) -> None:
        step = self._step
        late = [c for c in calls if step is not None and c in step.waiting]
        for call in late:
            assert step is not None
            uid, pairs = step.waiting.pop(call)
            self.routes.suspects.add(uid)
            step.failed += pairs
            step.error = f"{uid} is late"
        if late and step is not None:
            self._collect(step)

    def _collect(self, step: SimStep) -> None:
        if step.waiting:
            return
        if not step.failed:
            self._next_layer()
            return
        step.attempts += 1
        if step.attempts > RETRIES_MAX:
            self._fail_step()
            return
        self.routes.refresh()
        self._send_failed()

    # -- the end of a step --------------------------------------------------------------------

    def _results(self, step: SimStep) -> list[SliceResult]:
        results = []
        number = 0
        for piece in step.plan.slices:
            cell = self._cells[self._cell(piece, piece.start - 1)] if piece.start else NOTHING
            for position in range(piece.start, piece.position):
                cell = next_cell(cell, step.begun[number], step.rows[number])
                self._cells[self._cell(piece, position)] = cell
                number += 1
            results.append(SliceResult(token_id=token_of(cell) if piece.sample else None))
        return results

    def _over(self, event: Event) -> None:
        self._step = None
        self._handle(event)
        self._is_awake = True
        self._later(0.0, self._turn)

    def _handle(self, event: Event) -> None:
        for emit in self.state.handle(event):
            for output in emit.outputs.outputs:
                self._world.ingress.tell(self, str(emit.source), output)

    def _later(self, delay_s: float, work: Callable[[], None]) -> None:
        self._world.network.timer(self.process, delay_s, work)
