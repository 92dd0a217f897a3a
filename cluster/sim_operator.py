"""Somebody who runs the simulator's deployment: knows what was decided, and looks after it.

As an operator who reads the coordinator's alarms: when it has given members up, and there is room
again, he says how many there are to be.
"""

from typing import TYPE_CHECKING, Final

from remora.cluster.operation import Drain, Operation, ScaleTo, is_dense
from remora.cluster.sim_network import Violation
from remora.comm.errors import RemoraError

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

LOOK: Final = "look-"  # begins the ids of his operations
EVERY_S: Final = 1.0


class SimOperator:
    """Of one deployment.

    Attributes:
        shards: those that there are to be, whether they live or not.
        longest_away_s: of a member, counted while there was room for it.
    """

    def __init__(self, world: "Deployment", shards: set[str]) -> None:
        self.shards = shards
        self.longest_away_s = 0.0
        self._world = world
        self._num_looks = 0
        self._since_s: dict[str, float] = {}  # that members are away for which there is room
        if world.faults.planned:  # else nobody is given up
            self._later()

    def ended(self, operation: Operation) -> None:
        """An operation is over."""
        target, is_done = operation.target, operation.outcome == "done"
        if isinstance(target, ScaleTo) and target.shards is not None and is_done:
            self.shards = set(operation.slots)
        elif isinstance(target, ScaleTo | Drain) and (is_done or operation.round):
            self.shards = self.shards | {u for u in operation.joiners if not is_dense(u)}
            # of a failed one, too, rounds that are committed stay
            self.shards -= set(operation.retirees) - self._world.view.placement.slots.keys()
        if isinstance(target, Drain) and is_done:
            self.shards = self.shards - set(target.uids)

    def members(self) -> set[str]:
        """Those that there are to be, whether they live or not."""
        return self.shards | {m.uid for m in self._world.view.members}

    def missing(self) -> set[str]:
        """Members that are to be there, and are not."""
        coordinator = self._world.coordinator
        if not coordinator.is_up:
            return set()
        state = coordinator.state
        return state.lost | state.lost_dense | (self.shards - state.view.placement.slots.keys())

    # -- inside -------------------------------------------------------------------------------

    def _note_times(self) -> None:
        if not self._world.coordinator.is_up:
            return
        now_s, has_place = self._world.clock.now_s, self._world.places.has_place
        able = [uid for uid in self.missing() if has_place(uid)]
        self._since_s = {uid: self._since_s.get(uid, now_s) for uid in able}
        away_s = now_s - min(self._since_s.values(), default=now_s)
        self.longest_away_s = max(self.longest_away_s, away_s)

    def _later(self) -> None:
        self._world.clock.after(EVERY_S, self._look)

    def _look(self) -> None:
        self._later()
        world, coordinator = self._world, self._world.coordinator
        self._note_times()
        if not coordinator.is_idle or world.places.wanting or not self.missing():
            return
        state = coordinator.state
        unknown = self.missing() - state.lost - state.lost_dense - state.former.keys()
        if unknown:
            raise Violation(f"7: {sorted(unknown)} died, and nobody will bring them back")
        dense = sum(m.role == "dense" for m in world.view.members)
        shards_too = world.chance.random() < 0.5
        self._num_looks += 1
        name = f"{LOOK}{self._num_looks}"
        target = ScaleTo(len(self.shards) if shards_too else None, dense_groups=dense)
        world.trace(f"{sorted(self.missing())} were given up: {name}, {target}")
        try:
            coordinator.request(name, target)
        except RemoraError as failed:
            world.trace(f"{name}: {failed}")
