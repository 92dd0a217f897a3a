"""The watch over members in the simulator: the real `HealthState` on the virtual clock and network.

As `health_watch.py`: a beat that does not come back in `HANG_S` ends its life.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from remora.actors.health_state import Beat, HealthState, Life
from remora.cluster.sim_dispatch import CALL_TIMEOUT_S
from remora.comm.view import View

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

EVERY_S: Final = 1.0
HANG_S: Final = 3.0  # below CALL_TIMEOUT_S, as `elastic.hang_s` is below `experts.call_timeout_s`
SILENT: Final = ("stop", "block", "cut", "cut one way")  # beats stay away, or tell of no progress
STALL_S: Final = HANG_S + 4 * CALL_TIMEOUT_S


class SimHealth:
    """Of one life of the coordinator.

    Args:
        process: that life.
        hung: told of a life that is to be ended.
    """

    def __init__(self, world: "Deployment", process: str, hung: Callable[[str, int], None]) -> None:
        self._world, self._process, self._hung = world, process, hung
        self._state = HealthState(hang_s=HANG_S, stall_s=STALL_S)
        self._later()

    def adopt_view(self, view: View) -> None:
        """Watch these members."""
        lives = {(m.uid, m.incarnation) for m in view.members}
        self._state.watch(lives, self._world.clock.now_s)

    # -- inside -------------------------------------------------------------------------------

    def _later(self) -> None:
        if any(fault.kind in SILENT for fault in self._world.faults.planned):  # else nobody hangs
            self._world.network.timer(self._process, EVERY_S, self._turn)

    def _turn(self) -> None:
        now_s = self._world.clock.now_s
        for (uid, incarnation), why in self._state.look(now_s):
            self._world.trace(f"{uid}#{incarnation} hangs: {why}")
            self._hung(uid, incarnation)
        for life in self._state.to_ask(now_s):
            self._ask(life)
        self._later()

    def _ask(self, life: Life) -> None:
        world, member = self._world, f"{life[0]}#{life[1]}"
        failed = partial(self._answered, life, None)

        def beat() -> None:
            told = partial(self._answered, life, self._beat_of(member))
            world.network.send(member, self._process, told, lost)

        lost = partial(world.network.timer, self._process, 0.0, failed)
        world.network.send(self._process, member, beat, failed)

    def _beat_of(self, member: str) -> Beat:
        """As `heartbeat` of the actors."""
        rank = self._world.ranks.get(member)
        if rank is None:
            return Beat(self._world.shards[member].calls_answered, 0)
        return rank.beat()

    def _answered(self, life: Life, beat: Beat | None) -> None:
        self._state.answered(life, beat, self._world.clock.now_s)
