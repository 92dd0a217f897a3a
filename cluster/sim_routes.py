"""Where a dense rank of the simulator may send rows: its view, connections, and whom it avoids.

The rules of `comm/routes.py`, `actors/shard_links.py` and `view_inbox.py`, which need sockets.
"""

from typing import TYPE_CHECKING

from remora.cluster.sim_model import LAYERS
from remora.comm.errors import ClusterError
from remora.comm.view import Member, View, uncovered

if TYPE_CHECKING:
    from remora.cluster.sim_deployment import Deployment


class SimLink:
    """One connection to a life of a shard; what is said of it is said of no later one."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.is_closed = False  # by the shard, which fences us; what comes over it is not read


class SimRoutes:
    """Of one rank.

    Attributes:
        view: in use; None: not yet.
        connected: shard -> connection to a life that the view names.
        ahead: shard -> connection to a life that a view to come names.
        suspects: late; not asked again by this view, or before they have answered.
        late: calls that were given up, and of which shard.
    """

    def __init__(self, world: "Deployment", process: str, name: str) -> None:
        self.view: View | None = None
        self.connected: dict[str, SimLink] = {}
        self.ahead: dict[str, SimLink] = {}
        self.suspects: set[str] = set()
        self.late: dict[int, str] = {}
        self._world = world
        self._process, self._name = process, name
        self._newest: View | None = None
        self._holders: dict[tuple[int, int], list[str]] = {}

    @property
    def epoch(self) -> int:
        """Of the view in use."""
        return self.view.epoch if self.view is not None else 0

    def tell(self, view: View) -> View:
        """This view is committed; the newest that is."""
        if self._newest is None or view.epoch > self._newest.epoch:
            self._newest = view
        return self._newest

    def missing(self, layer: int, experts: list[int]) -> int | None:
        """One of these that nobody can be asked for."""
        return next((e for e in experts if not self.usable(layer, e)), None)

    def usable(self, layer: int, expert: int) -> list[str]:
        """Shards that may be asked for an expert."""
        return [
            uid
            for uid in self._holders[layer, expert]
            if uid in self.connected and uid not in self.suspects
        ]

    def not_there(self, uid: str, layer: int, experts: list[int]) -> None:
        """A shard holds less than the view says."""
        for expert in experts:
            self._holders[layer, expert].remove(uid)

    def apply(self, view: View) -> None:
        """Route by a view, and connect to its shards."""
        self.view = view
        self.suspects = set()
        slots = view.placement.slots
        self._holders = {
            (layer, expert): [uid for uid in sorted(slots) if expert in slots[uid][index]]
            for index, layer in enumerate(LAYERS)
            for expert in range(view.placement.num_experts)
        }
        self._connect()

    def refresh(self) -> bool:
        """Use a newer view that is known, else connect again; whether anything changed."""
        if self._newest is not None and self._newest.epoch > self.epoch:
            self.apply(self._newest)
            return True
        before = self._usable()
        self._connect()
        return self._usable() != before

    def look_again(self) -> bool:
        """As `Routes.look_again`."""
        before = self._usable()
        self._connect()
        self.forgive()
        return bool(self._usable() - before)

    def forgive(self) -> None:
        """Shards that were late and have answered everything by now are asked again."""
        self.suspects -= self.connected.keys() - set(self.late.values())

    def adopt(self, view: View, or_none: bool = False) -> None:
        """As `DenseEngine.adopt_view`. Raises ClusterError: the old view stays in force."""
        for uid in self.suspects:
            self._disconnect(uid)
        before = self.view, self._holders, self.suspects
        self.apply(view)
        live = {uid for uid in view.placement.slots if uid in self.connected}
        if not or_none and uncovered(view.placement, live):
            self.view, self._holders, self.suspects = before
            missing = sorted(set(view.placement.slots) - live)
            raise ClusterError(f"shards {missing} of view {view.epoch} cannot be reached")
        self._world.trace(f"{self._process} uses epoch {view.epoch}")

    def greet(self, view: View) -> None:
        """As `PeerSet.greet`. Raises ClusterError: one cannot be reached."""
        coming = {m.uid: m for m in view.members if m.role == "shard"}
        self.ahead = {
            uid: link
            for uid, link in self.ahead.items()
            if uid in coming and link.incarnation == coming[uid].incarnation
        }
        lost = []
        for member in coming.values():
            if self.link_to(member) is None:
                link = self._open(member)
                if link is None:
                    lost.append(member.uid)
                else:
                    self.ahead[member.uid] = link
        if lost:
            raise ClusterError(f"{lost} cannot be reached by {self._process}")

    def link_to(self, member: Member) -> SimLink | None:
        """The connection to this life, in use or not yet."""
        for links in (self.connected, self.ahead):
            link = links.get(member.uid)
            if link is not None and link.incarnation == member.incarnation:
                return link
        return None

    def lose(self, uid: str, link: SimLink) -> bool:
        """A connection to a shard is gone; whether it was in use."""
        if self.ahead.get(uid) is link:
            del self.ahead[uid]
        if self.connected.get(uid) is not link:
            return False
        self._disconnect(uid)
        return True

    def _disconnect(self, uid: str) -> None:
        self.connected.pop(uid, None)
        self.late = {call: late for call, late in self.late.items() if late != uid}

    def _usable(self) -> set[str]:
        return self.connected.keys() - self.suspects

    def _connect(self) -> None:
        """As `PeerSet.apply_view`."""
        assert self.view is not None, "before the first view"
        members = {m.uid: m for m in self.view.members if m.role == "shard"}
        for uid, link in list(self.connected.items()):
            if uid not in members or link.incarnation != members[uid].incarnation:
                self._disconnect(uid)
        for uid, member in members.items():
            if uid not in self.connected:
                found = self.link_to(member)
                if found is not None:
                    del self.ahead[uid]
                else:
                    found = self._open(member)
                if found is not None:
                    self.connected[uid] = found

    def _open(self, member: Member) -> SimLink | None:
        shard = self._world.shards.get(member.actor_name)
        if shard is None or not self._world.network.reaches(self._process, shard.process):
            return None
        return None if self._name in shard.fenced else SimLink(member.incarnation)
