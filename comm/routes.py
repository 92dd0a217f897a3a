"""Where the pairs of a layer may go: a view as tables, and which of its shards can be used.

Shape suffixes: S shards, E experts, R most replicas of one expert.
"""

import logging
import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from remora.comm.choice import DECAY_SHIFT, PAIR, gain_for
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.peers import PeerSet
from remora.comm.replicas import replica_tables
from remora.comm.view import View

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5  # for handshakes in one look; the last one may take longer

# A view newer than this epoch, or the newest one when the look has found something; None: neither
# came in time, of which so many seconds were used before.
Hold = Callable[[int, Callable[[], bool], float], View | None]


class Routes:
    """The view in force, as `choice.choose` reads it.

    Args:
        peers: connections; views are applied to it.
        refresh_view: called with the epoch that disappointed; returns the newest view. None keeps
            the view for good.
        hold: as `Dispatcher`'s.

    Attributes:
        view: the view in force.
        uids: its shards; their order numbers them.
        host_S: int32 host of each shard; `own_host` is ours, with or without a shard on it.
        usable_S: uint8 flags: connected and not suspected. Changed in place.
        load: decoder layer -> int64 `[S]`, recent pairs by shard in 1 / choice.PAIR. Changed in
            place by each choice.
        sent: decoder layer -> int64 `[S]`, pairs of our own by shard under this view; counted where
            there is a choice. Changed in place by each choice.
        gain: int64 `[1]`, of the load prices (`choice.begin_prices`). While nobody tells what the
            other dense groups send (`note_others`), their pairs are taken for as many as ours and
            evenly spread, which makes our own unevenness weigh less by their number.
        tables: decoder layer -> int16 `[E, R]`. Changed in place.
        suspects: late, or of another life: not asked again before a newer view, or before what
            was late has come after all.
        is_redundant: every expert has replicas on two shards that can be used, at least.
    """

    def __init__(
        self,
        view: View,
        peers: PeerSet,
        refresh_view: Callable[[int], View] | None,
        hold: Hold | None = None,
    ) -> None:
        self._peers = peers
        self._hold = hold
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
        self._late: set[str] = set()  # of them
        self.tables = replica_tables(view, self.uids)
        self.load = {layer: np.zeros(len(self.uids), np.int64) for layer in self.tables}
        self.sent = {layer: np.zeros(len(self.uids), np.int64) for layer in self.tables}
        self._told = {layer: sent_S.copy() for layer, sent_S in self.sent.items()}
        self._noted = {layer: sent_S.copy() for layer, sent_S in self.sent.items()}
        self._num_dense = max(1, sum(m.role == "dense" for m in view.members))
        self.gain = np.array([max(1, gain_for(len(self.uids)) // self._num_dense)], np.int64)
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

    def wait_for_replicas(self, held_s: float) -> bool:
        """Waits for a newer view, where somebody may bring one, or for a shard of this one that
        can be used again; True when it is so.

        Args:
            held_s: waited before for the same rows.
        """
        if self._hold is None:
            return False
        view = self._hold(self.view.epoch, self.look_again, held_s)
        if view is None:
            return False
        if view.epoch > self.view.epoch:
            self.apply(view)
        return True

    def look_again(self) -> bool:
        """Takes late answers and dials lost shards; whether one can be used that could not.

        A link that was cut, or a rank that shards refused until it had taken the view, needs no
        newer view, and none comes.
        """
        before_S = self.usable_S.copy()
        self._peers.drain()
        self._peers.reconnect(self.view, LOOK_S)
        self.forgive()
        self._note_usable()
        return bool((self.usable_S > before_S).any())

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a replica that can be used, as far as is known."""
        return self._num_usable_min() > 0

    def avoid(self, shard: int, error: ClusterError) -> None:
        """`shard` failed on a call: it is not asked again before a view says so, or, when its
        connection was lost, before there is a new one."""
        self.usable_S[shard] = 0
        if not isinstance(error, PeerLostError):
            self.suspects.add(self.uids[shard])
        if isinstance(error, DeadlineError):
            self._late.add(self.uids[shard])
        self.note_redundant()

    def forgive(self) -> None:
        """Shards that were late and have answered everything by now are asked again."""
        for uid in sorted(self._late & set(self._peers.live_uids)):
            if not self._peers.peer(uid).in_flight:
                log.warning("%s answers again", uid)
                self._late.discard(uid)
                self.suspects.discard(uid)
                self._note_usable()

    def count_sent(self, layer: int, shard_P: NDArray[np.integer]) -> None:
        """Pairs that Python chose these shards for; the native client counts its own."""
        if self.tables[layer].shape[1] > 1:
            self.sent[layer] += np.bincount(shard_P, minlength=len(self.uids))

    def take_sent(self) -> NDArray[np.int64]:
        """`[L, S]` pairs of our own since the last call; the placement's MoE layers and `uids`."""
        fresh_LS = np.stack([self.sent[layer] - self._told[layer] for layer in self.sent])
        self._told = {layer: sent_S.copy() for layer, sent_S in self.sent.items()}
        return fresh_LS

    def note_others(
        self,
        pairs_LS: NDArray[np.integer] | None,
        top_k: int,
        ranks_LS: NDArray[np.integer] | None = None,
    ) -> None:
        """What all other dense groups sent since the last note; None: nobody can tell.

        Load of before fades by their tokens as it does by ours, so that all groups together forget
        over `1 << choice.DECAY_SHIFT` tokens, as `replay` does. What we sent meanwhile is as new as
        what they did, and does not fade.

        Args:
            pairs_LS: as of `take_sent`.
            top_k: experts of a token.
            ranks_LS: the same of the other ranks of our own dense group.
        """
        gain = gain_for(len(self.uids))
        self.gain[0] = max(1, gain // self._num_dense) if pairs_LS is None else gain
        for index, (layer, sent_S) in enumerate(self.sent.items()):
            load_S = self.load[layer]
            own_S = np.minimum(PAIR * (sent_S - self._noted[layer]), load_S)
            self._noted[layer] = sent_S.copy()
            others = [each[index] for each in (pairs_LS, ranks_LS) if each is not None]
            others_S = np.sum(others, axis=0, dtype=np.int64) if others else np.zeros(1, np.int64)
            if not others_S.any():
                continue
            faded = math.exp(-float(others_S.sum()) / top_k / (1 << DECAY_SHIFT))
            old_S = np.rint(faded * (load_S - own_S)).astype(np.int64)
            load_S[:] = old_S + own_S + PAIR * others_S

    def _note_usable(self) -> None:
        live = set(self._peers.live_uids) - self.suspects
        self.usable_S[:] = [uid in live for uid in self.uids]
        self.note_redundant()

    def note_redundant(self) -> None:
        """The tables or what can be used has changed."""
        self.is_redundant = self._num_usable_min() > 1

    def _num_usable_min(self) -> int:
        """Replicas that can be used, of the expert that has fewest."""
        usable = np.append(self.usable_S, 0)  # the tables' -1, for nothing
        return min(int(usable[table_ER].sum(axis=1).min()) for table_ER in self.tables.values())
