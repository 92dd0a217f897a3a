"""Room for processes in the simulator: who starts waits for a place where there is none.

It may be that there is none for more members than there are: then who died left one. Or a member
has died with its place, and no other is found for a while.

And how long nobody could have been served for want of room, which no stream's wait is blamed for.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from remora.cluster.sim_network import uid_of
from remora.comm.view import uncovered

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment

MORE: Final = "*"  # members
EVERY_S: Final = 0.25


class SimPlaces:
    """Of one deployment.

    Attributes:
        wanting: uids for which there is no room, or `MORE`; one may be there more than once.
        hopeless_s: so long there has been none for a member without which no stream gets on.
    """

    def __init__(self, world: "Deployment") -> None:
        self.wanting: list[str] = []
        self.hopeless_s = 0.0
        self._world = world
        self._waiting: dict[str, Callable[[], None]] = {}  # by process

    def want(self, uid: str, for_s: float) -> None:
        """There is no room for somebody, or for more than there are, for a while."""
        if not self.wanting:
            self._world.clock.after(EVERY_S, self._look)
        self.wanting.append(uid)
        self._world.clock.after(for_s, partial(self._have, uid))

    def start(self, process: str, begin: Callable[[], None]) -> None:
        """Begin when there is room."""
        self._waiting[process] = begin
        self._find()

    def forget(self, process: str) -> None:
        """It does not wait any more."""
        self._waiting.pop(process, None)

    def has_place(self, uid: str) -> bool:
        """Whether somebody who starts now finds one."""
        if MORE in self.wanting and uid not in self._world.operator.members():
            return False
        return uid not in self.wanting

    def is_waiting(self, process: str) -> bool:
        """Whether it has not found a place yet."""
        return process in self._waiting

    # -- inside -------------------------------------------------------------------------------

    def _have(self, uid: str) -> None:
        self.wanting.remove(uid)
        self._world.trace(f"there is room again: {uid}")
        self._find()

    def _find(self) -> None:
        for process, begin in list(self._waiting.items()):
            if self.has_place(uid_of(process)):
                del self._waiting[process]
                begin()
            else:
                self._world.trace(f"{process} finds no place")

    def _look(self) -> None:
        if self._is_hopeless():
            self.hopeless_s += EVERY_S
        if self.wanting:
            self._world.clock.after(EVERY_S, self._look)

    def _is_hopeless(self) -> bool:
        """No dense group lives and none has room, or there is an expert of which that is true."""
        world, placement = self._world, self._world.view.placement
        alive = {uid_of(m.actor_name) for m in world.view.members if world.lives(m.actor_name)}
        able = alive | {m.uid for m in world.view.members if self.has_place(m.uid)}
        dense = {m.uid for m in world.view.members if m.role == "dense"}
        return not dense & able or bool(uncovered(placement, able))
