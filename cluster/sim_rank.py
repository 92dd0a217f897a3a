"""A dense rank in the simulator: the real `DenseState` over simulated steps.

What it is told, and does between two steps, as `actors/dense_engine.py` and `view_inbox.py`;
`sim_dispatch.py` takes a step's rows through the MoE layers.
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
from remora.actors.health_state import Beat
from remora.cluster.operation import Adopt, Offer, Quiesce, Started
from remora.cluster.sim_dispatch import SimDispatch
from remora.cluster.sim_model import NOTHING, VOCABULARY, Cell, first_row, next_cell, token_of
from remora.cluster.sim_routes import SimLink, SimRoutes
from remora.cluster.sim_shard import PROCESS_S, Reply, SimShard, member_of, rank_name
from remora.cluster.sim_step import SimStep
from remora.comm.errors import ClusterError
from remora.comm.messages import Submit
from remora.comm.view import View

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

STEP_S: Final = 0.2
RECONNECT_EVERY_S: Final = 1.0
LIMITS: Final = DenseLimits(
    num_blocks=48, max_model_len=64, vocab_size=VOCABULARY, block_size=4, max_num_seqs=6,
    max_tokens_per_step=12,
)  # fmt: skip


class SimRank:
    """One life of one dense group."""

    def __init__(self, world: "Deployment", uid: str, incarnation: int) -> None:
        self.member = member_of(uid, incarnation, world.nodes.place(uid))
        self.process = self.member.actor_name
        self.name = rank_name(self.process)
        self.state = DenseState(LIMITS)
        self.routes = SimRoutes(world, self.process, self.name)
        self._world = world
        self._cells: list[Cell] = [NOTHING] * (LIMITS.num_blocks * LIMITS.block_size)
        self._between: list[Callable[[], None]] = []  # to do between two steps
        self._offers: list[tuple[Offer, Reply]] = []
        self._adoptions: list[tuple[Adopt, int, Reply]] = []  # not answered yet; by epoch
        self.dispatch = SimDispatch(world, self, over=self._ended, held=self._in_hold)
        self._is_awake = False
        self._blocked_until_s = 0.0
        self._num_turns = 0
        self._why_not: str | None = None
        self.retires = False
        self.quiet_until_s = 0.0  # time for the last requests of one that retires
        self._quiet: Reply | None = None  # to be told when the last request has ended
        self._reconnect_at_s = 0.0

    # -- what it is asked ---------------------------------------------------------------------

    def start(self, reply: Reply) -> None:
        """Load, and listen."""
        low, high = PROCESS_S
        took_s = low + self._world.chance.random() * (high - low)
        self._later(took_s, partial(reply, Started(member=self.member)))

    def submit(self, submit: Submit, source: str) -> None:
        """A request."""
        self._between.append(partial(self._handle, RequestArrived(submit, source)))
        self._wake()

    def block(self, for_s: float) -> None:
        """Its engine does nothing between two steps for so long; its process answers."""
        self._blocked_until_s = self._world.clock.now_s + for_s
        self._wake()

    def beat(self) -> Beat:
        """As `DenseActor.heartbeat`."""
        stats = self.state.stats()
        waiting = stats.num_running + stats.num_waiting + len(self._between) + len(self._offers)
        done = stats.steps_total + self._num_turns
        return Beat(done, 0 if self.dispatch.is_holding else waiting)

    def perform(self, task: Offer | Adopt | Quiesce, reply: Reply) -> None:
        """A task of the coordinator."""
        if isinstance(task, Quiesce):
            self.retires, self._quiet = True, reply
            self.quiet_until_s = self._world.clock.now_s + task.within_s
            self._later(task.within_s, self._is_quiet)
        elif isinstance(task, Offer):
            self._offers.append((task, reply))
            if self.dispatch.is_holding:
                self._take_offers()
        else:
            newest = self.routes.tell(task.view)
            self._adoptions.append((task, newest.epoch, reply))
            self._between.append(partial(self._adopt_for, task, newest))
            if self.dispatch.is_holding:
                if newest.epoch > self.routes.epoch:
                    self.routes.apply(newest)
                    self.dispatch.go_on()
                else:
                    self._acknowledge()
        self._wake()

    def cut_off(self, shard: SimShard, link: SimLink | None) -> None:
        """A shard that fences this rank has closed the connection that there was."""
        if link is not None:
            self.dispatch.lose(shard.member.uid, link)

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
        self._is_awake = self.dispatch.step is not None
        if self._is_awake:
            return
        blocked_s = self._blocked_until_s - self._world.clock.now_s
        if blocked_s > 0:
            self._is_awake = True
            self._later(blocked_s, self._turn)
            return
        self._num_turns += 1
        between, self._between = self._between, []
        for action in between:
            action()
        self._take_offers()
        plan = self.state.next_step()
        if plan is None:
            self._is_quiet()
            return
        self._is_awake = True
        self._later(STEP_S, partial(self._begin, plan))

    def _is_quiet(self) -> None:
        """No request is left, or the time for that is over."""
        quiet, self._quiet = self._quiet, None
        if quiet is not None:
            quiet(None)

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
        for _, _, reply in open_:  # else a hold has answered
            reply(failure or task.view.view_hash)

    def _in_hold(self) -> None:
        self._acknowledge()
        self._take_offers()

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
        self.dispatch.begin(SimStep(plan, rows))

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

    def _ended(self, step: SimStep) -> None:
        if step.failure:
            self._why_not = step.failure
            self._over(StepFailed(step.plan.step_id, step.failure))
        else:
            self._over(StepDone(step.plan.step_id, self._results(step)))

    def _over(self, event: Event) -> None:
        self._handle(event)
        self._is_awake = True
        self._later(0.0, self._turn)

    def _handle(self, event: Event) -> None:
        for emit in self.state.handle(event):
            for output in emit.outputs.outputs:
                self._world.ingress.tell(self, str(emit.source), output)

    def _later(self, delay_s: float, work: Callable[[], None]) -> None:
        self._world.network.timer(self.process, delay_s, work)
