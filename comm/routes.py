"""Where the pairs of a layer may go: a view as tables, and which of its shards can be used.

Shape suffixes: S shards, E experts, R most replicas of one expert.
"""

import logging
from collections.abc import Callable

import numpy as np

from remora.comm.errors import ClusterError, PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.replicas import replica_tables
from remora.comm.view import View

log = logging.getLogger(__name__)


class Routes:
    """The view in force, as `plan.choose` reads it.

    Args:
        peers: connections; views are applied to it.
        refresh_view: called with the epoch that disappointed; returns the newest view. None keeps
            the view for good.

    Attributes:
        view: the view in force.
        uids: its shards; their order numbers them.
        local_S, usable_S: uint8 flags: on our host; connected and not suspected. Changed in place.
        tables: decoder layer -> int16 `[E, R]`. Changed in place.
        suspects: late, or of another life: not asked again before a newer view.
    """

    def __init__(
        self, view: View, peers: PeerSet, refresh_view: Callable[[int], View] | None
    ) -> None:
        self._peers = peers
        self._refresh_view = refresh_view
        self.apply(view)

    def apply(self, view: View) -> None:
        """Routes by `view` from now on, and connects to its shards."""
        failed = self._peers.apply_view(view)
        self._peers.settled = False
        for uid, error in failed.items():
            log.warning("%s cannot be reached: %s", uid, error)
        self.view = view
        self.uids = sorted(view.placement.slots)
        hosts = {m.uid: m.endpoint.host for m in view.members}
        own = self._peers.self_host
        self.local_S = np.array([hosts.get(uid) == own for uid in self.uids], np.uint8)
        self.usable_S = np.zeros(len(self.uids), np.uint8)
        self.suspects: set[str] = set()
        self.tables = replica_tables(view, self.uids)
        self._note_usable()

    def refresh(self) -> bool:
        """Asks for a newer view and reconnects what was lost; True when anything changed."""
        view = self.view
        if self._refresh_view is not None:
            view = self._refresh_view(self.view.epoch)
        if view.epoch > self.view.epoch:
            self.apply(view)
            return True
        self._peers.apply_view(self.view)
        before = self.usable_S.copy()
        self._note_usable()
        return bool((self.usable_S != before).any())

    def avoid(self, shard: int, error: ClusterError) -> None:
        """`shard` failed on a call: it is not asked again before a view says so, or, when its
        connection was lost, before there is a new one."""
        self.usable_S[shard] = 0
        if not isinstance(error, PeerLostError):
            self.suspects.add(self.uids[shard])

    def _note_usable(self) -> None:
        live = set(self._peers.live_uids) - self.suspects
        self.usable_S[:] = [uid in live for uid in self.uids]
