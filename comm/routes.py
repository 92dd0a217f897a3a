"""Where the pairs of a layer may go: a view as tables, and which of its shards can be used.

Shape suffixes: S shards, E experts, R most replicas of one expert.
"""

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from remora.comm.choice import GAIN, PAIR
from remora.comm.errors import ClusterError, PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.replicas import replica_tables
from remora.comm.view import View

log = logging.getLogger(__name__)


class Routes:
    """The view in force, as `choice.choose` reads it.

    Args:
        peers: connections; views are applied to it.
        refresh_view: called with the epoch that disappointed; returns the newest view. None keeps
            the view for good.

    Attributes:
        view: the view in force.
        uids: its shards; their order numbers them.
        host_S: int32 host of each shard; `own_host` is ours, with or without a shard on it.
        usable_S: uint8 flags: connected and not suspected. Changed in place.
        load: decoder layer -> int64 `[S]`, recent pairs by shard in 1 / choice.PAIR. Changed in
            place by each choice.
        gain: int64 `[1]`, of the load prices (`choice.begin_prices`). While nobody tells what the
            other dense groups send (`note_load`), their pairs are taken for as many as ours and
            evenly spread, which makes our own unevenness weigh less by their number.
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
        names = sorted({host for uid in self.uids if (host := hosts.get(uid)) is not None} | {own})
        self.host_S = np.array([names.index(hosts.get(uid, own)) for uid in self.uids], np.int32)
        self.own_host = names.index(own)
        self.usable_S = np.zeros(len(self.uids), np.uint8)
        self.suspects: set[str] = set()
        self.tables = replica_tables(view, self.uids)
        self.load = {layer: np.zeros(len(self.uids), np.int64) for layer in self.tables}
        num_dense = sum(m.role == "dense" for m in view.members)
        self.gain = np.array([max(1, GAIN // max(1, num_dense))], np.int64)
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

    def note_load(self, layer: int, pairs_S: NDArray[np.floating]) -> None:
        """Pairs that other dense groups sent to each shard (by `uids`) since the last note."""
        self.load[layer] += np.rint(np.asarray(pairs_S) * PAIR).astype(np.int64)
        self.gain[0] = GAIN

    def _note_usable(self) -> None:
        live = set(self._peers.live_uids) - self.suspects
        self.usable_S[:] = [uid in live for uid in self.uids]
