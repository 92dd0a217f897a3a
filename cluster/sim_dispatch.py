"""A step's rows through the MoE layers in the simulator: one call to a shard for each layer.

What `comm`'s dispatcher does about a shard that is lost, late or does not hold an expert is done
here with the same rules (`comm/python_dispatch.py`, `routes.py`, `actors/view_inbox.py`): another
replica, a newer view, a hold.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from remora.cluster.sim_model import LAYERS, next_row, picks
from remora.cluster.sim_routes import SimLink
from remora.cluster.sim_shard import Asked, Found, NotMine
from remora.cluster.sim_step import SimStep

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment
    from remora.cluster.sim_rank import SimRank

CALL_TIMEOUT_S: Final = 4.5
HOLD_S: Final = 240.0  # longer than it takes until a member is given up
LOOK_EVERY_S: Final = 0.5  # as view_inbox.LOOK_EVERY_S
RETRIES_MAX: Final = 3  # as python_dispatch.RETRIES_MAX, which imports torch


class SimDispatch:
    """Of one dense rank.

    Args:
        over: called with a step whose rows have gone through every layer, or that has failed.
        held: called when a step begins to wait for an expert.
    """

    def __init__(
        self,
        world: "Deployment",
        rank: "SimRank",
        *,
        over: Callable[[SimStep], None],
        held: Callable[[], None],
    ) -> None:
        self.step: SimStep | None = None
        self._world, self._rank = world, rank
        self._over, self._held = over, held
        self._calls = 0

    @property
    def is_holding(self) -> bool:
        """Whether the step waits for an expert."""
        return self.step is not None and self.step.held_since_s is not None

    def begin(self, step: SimStep) -> None:
        """Take its rows through the layers."""
        self.step = step
        self._next_layer()

    def go_on(self) -> None:
        """What the step waits for may be there."""
        step = self._running()
        assert step.held_since_s is not None, "nothing waits"
        step.held_s += self._world.clock.now_s - step.held_since_s
        step.held_since_s = None
        step.attempts = 0
        self._send_failed()

    def answered(self, call: int, found: Found) -> None:
        """Of a shard: outputs, or experts that it does not hold."""
        step, routes = self.step, self._rank.routes
        routes.late.pop(call, None)
        if step is None or call not in step.waiting:
            return  # late, or twice
        uid, pairs = step.waiting.pop(call)
        if isinstance(found, NotMine):
            routes.not_there(uid, LAYERS[step.layer], found.experts)
            step.failed += pairs
            step.error = f"{uid} does not hold {found.experts}"
        else:
            for number, output in found:
                step.outputs[number].append(output)
        self._collect(step)

    def is_waiting_for(self, call: int) -> bool:
        """Whether the answer would count."""
        return self.step is not None and call in self.step.waiting

    def lose(self, uid: str, link: SimLink) -> None:
        """A connection to a shard is gone, and with it what was asked over it."""
        step = self.step
        if not self._rank.routes.lose(uid, link):
            return  # nobody sends over it: there is none, or a later one
        calls = [c for c, (at, _) in step.waiting.items() if at == uid] if step is not None else []
        for call in calls:
            assert step is not None
            step.failed += step.waiting.pop(call)[1]
            step.error = f"{uid} is lost"
        if calls and step is not None:
            self._collect(step)

    # -- inside -------------------------------------------------------------------------------

    def _running(self) -> SimStep:
        assert self.step is not None, "no step"
        return self.step

    def _next_layer(self) -> None:
        step = self._running()
        if step.layer >= 0:
            step.rows = [
                next_row(row, outputs) for row, outputs in zip(step.rows, step.outputs, strict=True)
            ]
        step.layer += 1
        if step.layer == len(LAYERS):
            self._end(step, "")
            return
        step.outputs = [[] for _ in step.rows]
        step.attempts, step.held_s = 0, 0.0
        self._rank.routes.forgive()
        self._send([(n, expert, row) for n, row in enumerate(step.rows) for expert in picks(row)])

    def _send(self, asked: Asked) -> None:
        """One call to each shard that a replica is asked of; holds where there is none."""
        step, rank = self._running(), self._rank
        routes, layer = rank.routes, LAYERS[step.layer]
        tries = 0
        while (missing := routes.missing(layer, [expert for _, expert, _ in asked])) is not None:
            tries += 1
            if tries > RETRIES_MAX or not routes.refresh():
                step.failed = asked
                self._hold(layer, missing)
                return
        by_shard: dict[str, Asked] = {}
        for each in asked:
            usable = routes.usable(layer, each[1])
            by_shard.setdefault(usable[each[0] % len(usable)], []).append(each)
        calls = []
        for uid, pairs in by_shard.items():
            self._calls += 1
            calls.append(self._calls)
            step.waiting[self._calls] = (uid, pairs)
            link = routes.connected[uid]
            process = f"{uid}#{link.incarnation}"
            deliver = partial(self._world.on_call, process, rank, link, self._calls, layer, pairs)
            lost = partial(self.lose, uid, link)
            self._world.network.send_frame(rank.process, process, deliver, lost)
        if self._world.faults.planned:  # else nothing can be late
            self._later(CALL_TIMEOUT_S, partial(self._late, calls))

    def _send_failed(self) -> None:
        step = self._running()
        failed, step.failed = step.failed, []
        self._send(failed)

    def _late(self, calls: list[int]) -> None:
        step, routes = self.step, self._rank.routes
        late = [c for c in calls if step is not None and c in step.waiting]
        for call in late:
            assert step is not None
            uid, pairs = step.waiting.pop(call)
            routes.suspects.add(uid)
            routes.late[call] = uid
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
            self._end(step, step.error)
            return
        self._rank.routes.refresh()
        self._send_failed()

    def _hold(self, layer: int, expert: int) -> None:
        """An expert has no replica: until there is a newer view, or a shard is back."""
        step, world = self._running(), self._world
        epoch = self._rank.routes.epoch
        step.error = f"expert {expert} of layer {layer} has no live replica in view {epoch}"
        step.held_since_s = world.clock.now_s
        world.trace(f"{self._rank.process} holds a step: {step.error}")
        self._held()
        self._later(LOOK_EVERY_S, partial(self._look, step, step.held_since_s))

    def _look(self, step: SimStep, since_s: float) -> None:
        if self.step is not step or step.held_since_s != since_s:
            return
        if step.held_s + self._world.clock.now_s - since_s >= HOLD_S:
            self._end(step, step.error)
        elif self._rank.routes.look_again():
            self.go_on()
        else:
            self._later(LOOK_EVERY_S, partial(self._look, step, since_s))

    def _end(self, step: SimStep, failure: str) -> None:
        self.step = None
        step.failure = failure
        self._over(step)

    def _later(self, delay_s: float, work: Callable[[], None]) -> None:
        self._world.network.timer(self._rank.process, delay_s, work)
