"""The ingress' side of the control stream: one connection to each dense group's first rank.

Sequences go where the router says, and where it says nothing to the group that has the fewest of
ours under way plus those it says it queues. When a group is lost, its sequences go on where they
stood (`emit_log.py`) at another one, or wait, `hold_s` at most, until there is one: their clients
see a pause. Groups that come and go are learnt from the epoch that every message tells; one that
the view does not name any more gets no new sequences. Everything runs on one event loop; nothing
here blocks.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from remora.cluster.emit_log import EmitLog
from remora.cluster.inbox import Inbox
from remora.cluster.router_client import RouterClient
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.errors import AuthError, ClusterError, FrameError, PeerLostError, RemoraError
from remora.comm.messages import (
    Abort,
    EngineStats,
    Ping,
    Pong,
    StepOutputs,
    Submit,
    Traffic,
    decode_to_ingress,
    encode,
)
from remora.comm.view import Member

logger = logging.getLogger(__name__)

PING_EVERY_S = 1.0
PONG_WITHIN_S = 60.0  # a step may be long on a slow machine; the socket tells of a dead peer
REDIAL_FIRST_S = 0.1
REDIAL_MAX_S = 2.0
REPLAYS_MAX = 3  # of one sequence: more dense groups than that do not die by chance


class _Group:
    """One dense group that is connected."""

    def __init__(self, member: Member, link: AsyncConnection) -> None:
        self.member = member
        self.link = link
        self.logs: dict[str, EmitLog] = {}  # by request id
        self.stats = EngineStats()
        self.traffic: Traffic | None = None
        self.serving = True
        self.retiring = False  # the view names it no more
        self.retires = False  # it says so itself; the view that is known may be older
        self.why_not: str | None = None
        self.pong_s = asyncio.get_running_loop().time()
        self.lost = asyncio.Event()

    @property
    def load(self) -> int:
        return len(self.logs) + self.stats.num_waiting


class EngineClient:
    """Submits sequences to dense groups and hands their outputs to inboxes.

    Args:
        members: the first ranks that there are now; asked at the start and whenever one is missing.
        token: the cluster's token.
        self_host: label of the host this process is on; the same label means a Unix socket.
        router: asked for a group for each sequence where there are several; None: nobody is.
        hold_s: so long a sequence waits for a dense group to be connected; 0 fails it at once. How
            many wait is bounded by admission (`http.queue_max`).

    Attributes:
        num_replays: sequences that went on at another dense group, or at a new life of theirs.
    """

    def __init__(
        self,
        members: Callable[[], Awaitable[Sequence[Member]]],
        *,
        token: bytes,
        self_host: str,
        router: RouterClient | None = None,
        hold_s: float = 0.0,
    ) -> None:
        self._members = members
        self.router = router
        self._token = token
        self._self_host = self_host
        self._hold_s = hold_s
        self._groups: dict[str, _Group] = {}
        self._named: frozenset[str] = frozenset()  # groups of the newest view that was looked at
        self._epoch = 0  # of the newest view that a group has told of
        self._owner: dict[str, _Group] = {}  # request id -> group
        self._held: dict[str, EmitLog] = {}  # by request id; until a group is connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()  # a group was lost, or there is a newer view
        self._closing = False
        self._nonce = 0
        self.num_replays = 0

    async def start(self) -> None:
        """Connect to every group there is; those that cannot be reached are tried again.

        Raises:
            ClusterError: no group, or none that can be reached.
        """
        members = await self._members()
        if not members:
            raise ClusterError("the view names no dense group")
        failures = await self._look_at(members)
        if not self._groups:
            raise failures[0]
        if failures:
            self._changed.set()
        if self.router is not None:
            await self.router.start()
        self._spawn(self._keep_connected())
        self._spawn(self._keep_pinging())

    async def close(self) -> None:
        """Close every connection; what runs fails."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.router is not None:
            await self.router.close()
        for group in list(self._groups.values()):
            self._drop(group, PeerLostError("this ingress is closing"))
            await group.link.close()
        for log in list(self._held.values()):
            self._fail(log, ClusterError("this ingress is closing"))

    @property
    def num_groups(self) -> int:
        """Dense groups that the deployment has."""
        return max(1, len(self._named))

    @property
    def num_serving(self) -> int:
        """Dense groups that are connected and say that they serve."""
        now_s = asyncio.get_running_loop().time()
        return sum(
            g.serving and not g.retiring and now_s - g.pong_s < PONG_WITHIN_S
            for g in self._groups.values()
        )

    def why_not(self) -> str | None:
        """What groups that do not serve say about it."""
        return "; ".join(g.why_not for g in self._groups.values() if g.why_not) or None

    def stats(self) -> dict[str, EngineStats]:
        """Newest gauges by group uid."""
        return {uid: group.stats for uid, group in self._groups.items()}

    def traffic(self) -> dict[str, Traffic]:
        """What each group's newest pong told of its links to the shards, by group uid."""
        return {uid: g.traffic for uid, g in self._groups.items() if g.traffic is not None}

    def routed(self) -> dict[str, int]:
        """Sequences so far by who chose their group: the router, or this ingress alone."""
        router = self.router
        return {"router": router.num_routed, "alone": router.num_alone} if router else {}

    async def submit(self, submits: Sequence[Submit], inbox: Inbox) -> None:
        """Send a request's sequences to groups of the router's or our own choice; outputs come to
        `inbox`.

        Raises:
            ClusterError: no group is connected, and none is waited for. Nothing was sent then.
        """
        chosen: list[str | None] = [None] * len(submits)
        if self.router is not None and len(self._groups) > 1:
            able = {uid for uid, g in self._groups.items() if g.serving and not g.retiring}
            chosen = await self.router.groups(submits, (self._named | self._groups.keys()) - able)
        if self._closing or (not self._groups and self._hold_s <= 0):
            raise ClusterError("no dense group is connected; try again shortly")
        for submit, uid in zip(submits, chosen, strict=True):
            self._place(EmitLog(submit, inbox), self._groups.get(uid or ""))

    def abort(self, request_id: str) -> None:
        """Nobody waits for this sequence any more; unknown and finished ones are ignored."""
        self._release(self._held.pop(request_id, None))
        group = self._owner.pop(request_id, None)
        if group is not None:
            group.logs.pop(request_id, None)
            self._send(group, encode(Abort(request_id)))

    # -- where sequences run -----------------------------------------------------------------

    def _place(self, log: EmitLog, group: _Group | None = None) -> None:
        """Send a sequence, or the rest of it, to `group` or to the one with the least to do; it
        waits where there is none."""
        while True:
            if group is None or not group.serving or group.retiring:
                group = self._least_loaded()
            if group is None:
                self._hold(log)
                return
            try:
                group.link.send(encode(log.rest()))
            except PeerLostError as error:
                self._drop(group, error)
                group = None
                continue
            except FrameError as error:  # prompt and answer so far are over a frame's bound
                self._fail(log, error)
                return
            group.logs[log.request_id] = log
            self._owner[log.request_id] = group
            return

    def _least_loaded(self) -> _Group | None:
        groups = [group for group in self._groups.values() if not group.retiring]
        return min(groups, key=lambda g: (not g.serving, g.load), default=None)

    def _hold(self, log: EmitLog) -> None:
        """No dense group is connected: it waits for one."""
        if self._closing or self._hold_s <= 0:
            self._fail(log, ClusterError("no dense group is connected; try again shortly"))
            return
        text = f"no dense group was connected within {self._hold_s:g} s"
        loop = asyncio.get_running_loop()
        log.timer = loop.call_later(self._hold_s, self._fail, log, ClusterError(text))
        self._held[log.request_id] = log

    def _replay(self, log: EmitLog, failure: ClusterError, *, is_death: bool) -> None:
        """Its group is lost: the rest comes from another one, however often groups retire."""
        log.num_replays += is_death
        if log.num_replays > REPLAYS_MAX or self._hold_s <= 0:
            self._fail(log, failure)
            return
        self.num_replays += 1
        self._place(log)

    def _fail(self, log: EmitLog, failure: ClusterError) -> None:
        self._release(self._held.pop(log.request_id, None))
        log.inbox.fail(failure)

    def _release(self, log: EmitLog | None) -> None:
        """It is held no more."""
        if log is not None and log.timer is not None:
            log.timer.cancel()
            log.timer = None

    def _send(self, group: _Group, data: bytes) -> None:
        try:
            group.link.send(data)
        except PeerLostError as error:
            self._drop(group, error)

    # -- connections -------------------------------------------------------------------------

    async def _connect(self, member: Member) -> None:
        link = await connect_async(
            member.endpoint,
            self._token,
            self._self_host,
            name="ingress",
            incarnation=member.incarnation,
        )
        group = _Group(member, link)
        self._groups[member.uid] = group
        self._spawn(self._read(group))
        held, self._held = self._held, {}
        for log in held.values():
            self._release(log)
            self._place(log)

    async def _read(self, group: _Group) -> None:
        error: RemoraError = PeerLostError("this ingress closed the stream")
        try:
            async for data in group.link:
                self._on_message(group, data)
        except ClusterError as failure:
            error = failure
        except msgspec.DecodeError as failure:
            error = PeerLostError(f"{group.member.uid} sent what is no message: {failure}")
        self._drop(group, error)
        await group.link.close()

    def _on_message(self, group: _Group, data: bytes) -> None:
        message = decode_to_ingress(data)
        group.stats = message.stats
        if message.stats.epoch > self._epoch:
            self._epoch = message.stats.epoch
            self._changed.set()
        if isinstance(message, StepOutputs):
            logs = group.logs
            for output in message.outputs:
                request_id = output.request_id
                log = logs.get(request_id)
                if log is None:  # aborted meanwhile
                    continue
                if output.finish_reason is not None:
                    del logs[request_id]
                    del self._owner[request_id]
                log.take(output)
        elif isinstance(message, Pong):
            group.pong_s = asyncio.get_running_loop().time()
            group.serving, group.why_not = message.serving, message.why_not
            group.retires = message.retires
            group.traffic = message.traffic

    def _drop(self, group: _Group, error: RemoraError) -> None:
        if group.lost.is_set():
            return
        group.lost.set()
        uid = group.member.uid
        if self._groups.get(uid) is group:
            del self._groups[uid]
        logs, group.logs = group.logs, {}
        for request_id in logs:
            del self._owner[request_id]
        if logs or not isinstance(error, PeerLostError):
            logger.warning("dense group %s lost with %d sequences: %s", uid, len(logs), error)
        failure = ClusterError(f"dense group {uid} was lost: {error}")
        for log in logs.values():
            self._replay(log, failure, is_death=not (group.retiring or group.retires))
        self._changed.set()

    async def _keep_connected(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            delay_s = REDIAL_FIRST_S
            while not await self._look():
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, REDIAL_MAX_S)

    async def _look(self) -> bool:
        """Whether every group that there is now is connected."""
        try:
            members = await self._members()
        except ClusterError as error:
            logger.info("the members cannot be asked for yet: %s", error)
            return False
        return not await self._look_at(members) and bool(members)

    async def _look_at(self, members: Sequence[Member]) -> list[ClusterError]:
        """Connect to what the view names, let go of what it does not; why some are not reached."""
        by_uid = {member.uid: member for member in members}
        self._named = frozenset(by_uid)
        for uid, group in list(self._groups.items()):
            group.retiring = uid not in by_uid
            if not group.retiring and by_uid[uid].incarnation != group.member.incarnation:
                self._drop(group, PeerLostError("the view names another life of it"))
        missing = [member for uid, member in by_uid.items() if uid not in self._groups]
        dials = [self._connect(member) for member in missing]
        failures: list[ClusterError] = []
        for member, failure in zip(
            missing, await asyncio.gather(*dials, return_exceptions=True), strict=True
        ):
            if isinstance(failure, ClusterError):
                level = logging.ERROR if isinstance(failure, AuthError) else logging.INFO
                logger.log(level, "%s is not connected: %s", member.uid, failure)
                failures.append(failure)
            elif failure is not None:
                raise failure
        return failures

    async def _keep_pinging(self) -> None:
        while True:
            self._nonce += 1
            for group in list(self._groups.values()):
                self._send(group, encode(Ping(self._nonce)))
            await asyncio.sleep(PING_EVERY_S)

    def _spawn(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task of the engine client failed", exc_info=task.exception())
