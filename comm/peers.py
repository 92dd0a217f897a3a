"""`PeerSet`: every shard of a view as one dense rank sees them, and calls to several at once.

    call = peers.peer("shard-0").begin(body_bytes, reply_bytes)
    call.body[:] = ...
    peers.start(call, layer=3, ...)
    replies = peers.exchange([call, ...], deadline_s=5.0)     # or: peers.finish(calls, 5.0)

Synchronous and single-threaded by intent: a layer's rows leave, the thread waits, rows come back.
While it waits it reads from every peer and writes what a socket did not take before, so no send
ever blocks on a peer that waits for us.
"""

import ctypes
import logging
import select
import time
from typing import Final

from remora.comm.accounting import TrafficCounters
from remora.comm.auth import check_token
from remora.comm.call import Call
from remora.comm.errors import ClusterError, DeadlineError, PeerLostError
from remora.comm.peer import Peer, PeerLimits
from remora.comm.view import Member, View
from remora.comm.wire import FRAME_BYTES_MAX, Header, Kind

log = logging.getLogger(__name__)

DEADLINE_US_MAX: Final = (1 << 32) - 1


class PeerSet:
    """Connections of one dense rank.

    Args:
        token: the cluster's token.
        self_host: host label of this process; equal labels use Unix sockets and shared memory.
        name: what peers call us in their logs.
        limits: what to ask of every peer.
    """

    def __init__(
        self,
        *,
        token: bytes,
        self_host: str,
        name: str = "",
        limits: PeerLimits | None = None,
    ) -> None:
        self._token = check_token(token)
        self.self_host = self_host
        self._name = name
        self.limits = limits or PeerLimits()
        self.counters = TrafficCounters()
        self._peers: dict[str, Peer] = {}
        self._ahead: dict[str, Peer] = {}  # of a view to come: used by nobody yet
        self._by_fd: dict[int, Peer] = {}
        self._epoll = select.epoll()
        self._tried = ""  # the last one that `reconnect` dialled
        self._settled = ctypes.c_uint64(0)  # where the native client reads it

    @property
    def settled(self) -> bool:
        """Nobody but the native client has used a connection, or taken a view, since it looked."""
        return self._settled.value != 0

    @settled.setter
    def settled(self, settled: bool) -> None:
        self._settled.value = settled

    @property
    def settled_address(self) -> int:
        """Of a 64-bit word that is not 0 while `settled`, for this object's life."""
        return ctypes.addressof(self._settled)

    # -- members -----------------------------------------------------------------------------

    def connect(self, member: Member) -> Peer:
        """Connects to `member`, replacing an older connection of that uid; one that `greet` has
        made is taken into use.

        Raises PeerLostError, AuthError, FencedError.
        """
        self.disconnect(member.uid)
        peer = self._greeted(member)
        if peer is None:
            peer = self._open(member)
        else:
            del self._ahead[member.uid]
        self._peers[member.uid] = peer
        self.settled = False
        return peer

    def greet(self, view: View) -> None:
        """Connects to shards of a view to come, beside those in use.

        Nothing is sent over these connections before the view is applied. A shard may be there in
        a new life that holds other experts than its old one, of which the view in force speaks.
        What was greeted for another view is closed.

        Raises:
            PeerLostError, AuthError, FencedError: one cannot be reached.
        """
        coming = {m.uid: m for m in view.members if m.role == "shard"}
        for uid, peer in list(self._ahead.items()):
            if peer.error is not None or coming.get(uid) != peer.member:
                self._drop(self._ahead.pop(uid), "not needed any more")
        for uid, member in coming.items():
            if not self.is_connected(member) and self._greeted(member) is None:
                self._ahead[uid] = self._open(member)

    def _greeted(self, member: Member) -> Peer | None:
        """The open connection to this life that waits for its view."""
        peer = self._ahead.get(member.uid)
        return peer if peer is not None and (peer.error, peer.member) == (None, member) else None

    def _open(self, member: Member) -> Peer:
        peer = Peer(
            member,
            token=self._token,
            self_host=self.self_host,
            name=self._name,
            limits=self.limits,
            counters=self.counters.link(member.uid),
        )
        self._by_fd[peer.fd] = peer
        self._epoll.register(peer.fd, select.EPOLLIN)
        return peer

    def disconnect(self, uid: str) -> None:
        """Closes the connection to `uid`, if there is one; its calls under way fail."""
        peer = self._peers.pop(uid, None)
        if peer is not None:
            self._drop(peer, "closed by us")

    def apply_view(self, view: View) -> dict[str, ClusterError]:
        """Connects to every shard of `view` and closes the rest; keeps what is already right.

        Returns:
            Shards that could not be reached, with the reason.
        """
        members = {m.uid: m for m in view.members if m.role == "shard"}
        for uid in [uid for uid in self._peers if uid not in members]:
            self.disconnect(uid)
        failed: dict[str, ClusterError] = {}
        for uid, member in members.items():
            if not self.is_connected(member):
                try:
                    self.connect(member)
                except ClusterError as error:
                    failed[uid] = error
        return failed

    def reconnect(self, view: View, within_s: float) -> None:
        """Dials shards of `view` that are lost, one after the other, as far as the time goes; the
        next call goes on behind the last one. Who cannot be reached costs a handshake's time."""
        until_s = time.monotonic() + within_s
        lost = [m for m in view.members if m.role == "shard" and not self.is_connected(m)]
        for member in sorted(lost, key=lambda m: (m.uid <= self._tried, m.uid)):
            if time.monotonic() >= until_s:
                return
            self._tried = member.uid
            try:
                self.connect(member)
            except ClusterError as error:
                log.debug("%s cannot be reached: %s", member.uid, error)

    def is_connected(self, member: Member) -> bool:
        """Whether there is an open connection to this life of it."""
        peer = self._peers.get(member.uid)
        return peer is not None and peer.error is None and peer.member == member

    def peer(self, uid: str) -> Peer:
        """The live connection to `uid`. Raises PeerLostError."""
        peer = self._peers.get(uid)
        if peer is None:
            raise PeerLostError(f"not connected to {uid}")
        if peer.error is not None:
            raise peer.error
        return peer

    def status(self) -> dict[str, object]:
        """For `remora status`: who is connected, and bytes out and back so far, by uid."""
        return {"shards_connected": self.live_uids, "shard_bytes": self.counters.num_bytes()}

    @property
    def live_uids(self) -> list[str]:
        """Peers whose connection is open, sorted. The one thing that any thread may ask."""
        return sorted(uid for uid, peer in list(self._peers.items()) if peer.error is None)

    @property
    def frame_bytes_max(self) -> int:
        """What every open connection lets a frame have."""
        live = (peer for peer in self._peers.values() if peer.error is None)
        return min((peer.grants.frame_bytes_max for peer in live), default=FRAME_BYTES_MAX)

    def close(self) -> None:
        """Closes every connection and frees every arena. Idempotent."""
        for uid in list(self._peers):
            self.disconnect(uid)
        for uid in list(self._ahead):
            self._drop(self._ahead.pop(uid), "closed by us")
        if not self._epoll.closed:
            self._epoll.close()

    # -- calls -------------------------------------------------------------------------------

    def start(
        self, call: Call, kind: int = Kind.DISPATCH, flags: int = 0, deadline_s: float = 0.0,
        epoch: int = 0, layer: int = 0, num_rows: int = 0, num_pairs: int = 0, width: int = 0,
        dtype: int = 0,
    ) -> None:  # fmt: skip
        """Sends one call without waiting; a lost peer shows as `call.error` in `finish`."""
        self.settled = False
        peer = call.peer
        deadline_us = min(int(deadline_s * 1e6), DEADLINE_US_MAX)
        try:
            if not peer.send(
                call, kind, flags, deadline_us, epoch, layer, num_rows, num_pairs, width, dtype
            ):
                self._epoll.modify(peer.fd, select.EPOLLIN | select.EPOLLOUT)
        except PeerLostError as error:
            call.error = error
            self._forget(peer)

    def finish(self, calls: list[Call], deadline_s: float, *, until_s: float | None = None) -> None:
        """Waits until every started call has `reply` or `error`; raises nothing.

        The wait ends after `deadline_s`, or at `until_s` (monotonic) when it began elsewhere. A
        call that is not answered by then gets DeadlineError and is given up: its
        region stays reserved until the late answer comes or the connection ends.
        """
        pending = _num_pending(calls)
        until = time.monotonic() + deadline_s if until_s is None else until_s
        poll = self._epoll.poll
        while pending > 0:
            events = poll(max(0.0, until - time.monotonic()))
            if not events and time.monotonic() >= until:
                break
            for fd, event in events:
                self._on_event(fd, event)
            pending = _num_pending(calls)
        for call in calls:
            if call.reply is None and call.error is None:
                call.peer.counters.deadlines += 1
                call.abandoned = True
                call.error = DeadlineError(f"{call.peer.uid} did not answer within {deadline_s} s")

    def exchange(self, calls: list[Call], deadline_s: float) -> list[Call]:
        """`finish`, then the calls with their replies, in order.

        Raises:
            PeerLostError, DeadlineError, FencedError, ClusterError: of the first call that failed,
                naming its peer; every call is released.
        """
        self.finish(calls, deadline_s)
        for call in calls:
            if call.error is not None:
                for each in calls:
                    each.release()
                raise call.error
        return calls

    def resume(
        self,
        peer: Peer,
        unsent: bytes,
        partial: tuple[Call, Header, int] | None,
        unread: bytes,
        damaged: bool,
    ) -> None:
        """`Peer.resume`, and what follows for the poll set. `damaged`: the partial answer's body
        is complete and is not what its checksum says."""
        self.settled = False
        try:
            if damaged:
                raise peer.lose("no frame: body checksum of an answer is wrong")
            peer.resume(unsent, partial, unread)
        except PeerLostError:
            self._forget(peer)
            return
        if peer.has_backlog:
            self._epoll.modify(peer.fd, select.EPOLLIN | select.EPOLLOUT)

    def drain(self) -> None:
        """Takes what has arrived without waiting: late answers give their regions back."""
        for fd, event in self._epoll.poll(0):
            self._on_event(fd, event)

    def _on_event(self, fd: int, event: int) -> None:
        """Writes what a socket takes now, takes what it has; a lost peer leaves the poll set."""
        peer = self._by_fd[fd]
        try:
            if event & select.EPOLLOUT:
                peer.on_writable()
                if not peer.has_backlog:
                    self._epoll.modify(fd, select.EPOLLIN)
            if event & ~select.EPOLLOUT:
                peer.on_readable()
        except PeerLostError:
            self._forget(peer)

    def _drop(self, peer: Peer, reason: str) -> None:
        if peer.error is None:
            peer.lose(reason)
        self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        """Takes a lost peer off the poll set (its closed socket left epoll by itself)."""
        if self._by_fd.get(peer.fd) is peer:
            del self._by_fd[peer.fd]


def _num_pending(calls: list[Call]) -> int:
    return sum(call.reply is None and call.error is None for call in calls)
