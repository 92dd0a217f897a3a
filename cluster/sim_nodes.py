"""Hosts in the simulator: where members are, and what happens on one that goes away.

As `node_watch.py` on the virtual clock: the real `next_evacuation` says what is to leave a host
that is being drained, and once its time is over everything that is still there dies with it.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

from remora.cluster.evacuation import next_evacuation
from remora.comm.errors import OperationRunsError, RemoraError

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment
    from remora.cluster.sim_rank import SimRank
    from remora.cluster.sim_shard import SimShard

NUM_HOSTS: Final = 3
EVERY_S: Final = 1.0  # as node_watch.EVERY_S, which imports Ray


class SimNodes:
    """Of one deployment."""

    def __init__(self, world: "Deployment") -> None:
        self.draining: dict[str, float] = {}  # host -> when it goes
        self._world = world
        self._refused: set[str] = set()  # operations

    def place(self, uid: str) -> str:
        """The host of a member that starts now: nothing starts on one that goes away."""
        first = int(uid.rpartition("-")[2])
        hosts = [f"host-{(first + i) % NUM_HOSTS}" for i in range(NUM_HOSTS)]
        return next((host for host in hosts if host not in self.draining), hosts[0])

    def drain(self, host: str, for_s: float) -> None:
        """Members have so long to leave a host."""
        if host in self.draining:
            return
        world = self._world
        self.draining[host] = world.clock.now_s + for_s
        world.clock.after(for_s, partial(self._gone, host))
        world.clock.after(EVERY_S * world.chance.random(), partial(self._look, host))

    # -- inside -------------------------------------------------------------------------------

    def _look(self, host: str) -> None:
        world, coordinator = self._world, self._world.coordinator
        if host not in self.draining:
            return
        world.clock.after(EVERY_S, partial(self._look, host))
        if not coordinator.is_up:
            return
        members = coordinator.state.view.members
        found = next_evacuation(
            {at: until_s - world.clock.now_s for at, until_s in self.draining.items()},
            {(m.uid, m.incarnation): {m.endpoint.host} for m in members},
            lambda name: name in self._refused or coordinator.outcome(name) is not None,
        )
        if found is None:
            return
        operation_id, target = found
        try:
            coordinator.request(operation_id, target)
        except OperationRunsError:
            return
        except RemoraError as refused:
            world.trace(f"{operation_id} cannot be: {refused}")
            self._refused.add(operation_id)

    def _gone(self, host: str) -> None:
        world = self._world
        del self.draining[host]
        members: list[SimShard | SimRank] = [*world.shards.values(), *world.ranks.values()]
        for each in members:
            if each.member.endpoint.host == host and each.process in world.network.alive:
                world.trace(f"{each.process} dies with {host}")
                world.network.kill(each.process)
