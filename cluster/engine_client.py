"""The ingress' side of the control stream: one connection to each dense group's first rank.

Sequences go where the router says, and where it says nothing to the group that has the fewest of
ours under way plus those it says it queues. A lost group fails its sequences with a `ClusterError`
(503) and is dialled again, under whatever address the members then have. Everything runs on one
event loop; nothing here blocks.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from remora.cluster.inbox import Inbox
from remora.cluster.router_client import RouterClient
from remora.comm.aio import AsyncConnection, connect_async
from remora.comm.errors import AuthError, ClusterError, PeerLostError, RemoraError
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


class _Group:
    """One dense group that is connected."""

    def __init__(self, member: Member, link: AsyncConnection) -> None:
        self.member = member
        self.link = link
        self.inboxes: dict[str, Inbox] = {}  # request id -> who waits
        self.stats = EngineStats()
        self.traffic: Traffic | None = None
        self.serving = True
        self.why_not: str | None = None
        self.pong_s = asyncio.get_running_loop().time()
        self.lost = asyncio.Event()

    @property
    def load(self) -> int:
        return len(self.inboxes) + self.stats.num_waiting


class EngineClient:
    """Submits sequences to dense groups and hands their outputs to inboxes.

    Args:
        members: the first ranks that there are now; asked at the start and whenever one is missing.
        token: the cluster's token.
        self_host: label of the host this process is on; the same label means a Unix socket.
        router: asked for a group for each sequence where there are several; None: nobody is.
    """

    def __init__(
        self,
        members: Callable[[], Awaitable[Sequence[Member]]],
        *,
        token: bytes,
        self_host: str,
        router: RouterClient | None = None,
    ) -> None:
        self._members = members
        self.router = router
        self._token = token
        self._self_host = self_host
        self._groups: dict[str, _Group] = {}
        self._num_groups = 0
        self._owner: dict[str, _Group] = {}  # request id -> group
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost = asyncio.Event()
        self._nonce = 0

    async def start(self) -> None:
        """Connect to every group there is.

        Raises:
            ClusterError: no group, or one that cannot be reached.
        """
        members = await self._members()
        if not members:
            raise ClusterError("the view names no dense group")
        self._num_groups = len(members)
        for member in members:
            await self._connect(member)
        if self.router is not None:
            await self.router.start()
        self._spawn(self._keep_connected())
        self._spawn(self._keep_pinging())

    async def close(self) -> None:
        """Close every connection; what runs fails."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.router is not None:
            await self.router.close()
        for group in list(self._groups.values()):
            self._drop(group, PeerLostError("this ingress is closing"))
            await group.link.close()

    @property
    def num_groups(self) -> int:
        """Dense groups that the deployment has."""
        return self._num_groups

    @property
    def num_serving(self) -> int:
        """Dense groups that are connected and say that they serve."""
        now_s = asyncio.get_running_loop().time()
        return sum(g.serving and now_s - g.pong_s < PONG_WITHIN_S for g in self._groups.values())

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
            ClusterError: no group is connected. Nothing was sent then.
        """
        chosen: list[str | None] = [None] * len(submits)
        if self.router is not None and len(self._groups) > 1:
            silent = [uid for uid, group in self._groups.items() if not group.serving]
            chosen = await self.router.groups(submits, silent)
        if not self._groups:
            raise ClusterError("no dense group is connected; try again shortly")
        for submit, uid in zip(submits, chosen, strict=True):
            group = self._groups.get(uid or "")
            if group is None or not group.serving:  # none was chosen, or it is gone meanwhile
                group = min(self._groups.values(), key=lambda g: (not g.serving, g.load))
            group.inboxes[submit.request_id] = inbox
            self._owner[submit.request_id] = group
            self._send(group, encode(submit))
            if not self._groups:  # the send found the last one gone, and the inbox knows
                return

    def abort(self, request_id: str) -> None:
        """Nobody waits for this sequence any more; unknown and finished ones are ignored."""
        group = self._owner.pop(request_id, None)
        if group is not None:
            group.inboxes.pop(request_id, None)
            self._send(group, encode(Abort(request_id)))

    def _send(self, group: _Group, data: bytes) -> None:
        try:
            group.link.send(data)
        except PeerLostError as error:
            self._drop(group, error)

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
        if isinstance(message, StepOutputs):
            inboxes = group.inboxes
            for output in message.outputs:
                request_id = output.request_id
                inbox = inboxes.get(request_id)
                if inbox is None:  # aborted meanwhile
                    continue
                if output.finish_reason is not None:
                    del inboxes[request_id]
                    del self._owner[request_id]
                inbox.put(output)
        elif isinstance(message, Pong):
            group.pong_s = asyncio.get_running_loop().time()
            group.serving, group.why_not = message.serving, message.why_not
            group.traffic = message.traffic

    def _drop(self, group: _Group, error: RemoraError) -> None:
        if group.lost.is_set():
            return
        group.lost.set()
        uid = group.member.uid
        if self._groups.get(uid) is group:
            del self._groups[uid]
        inboxes, group.inboxes = group.inboxes, {}
        for request_id in inboxes:
            del self._owner[request_id]
        if inboxes or not isinstance(error, PeerLostError):
            logger.warning("dense group %s lost with %d sequences: %s", uid, len(inboxes), error)
        failure = ClusterError(f"dense group {uid} was lost: {error}")
        for inbox in set(inboxes.values()):
            inbox.fail(failure)
        self._lost.set()

    async def _keep_connected(self) -> None:
        while True:
            await self._lost.wait()
            self._lost.clear()
            delay_s = REDIAL_FIRST_S
            while not await self._redial():
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, REDIAL_MAX_S)

    async def _redial(self) -> bool:
        """Whether every group that there is now is connected."""
        try:
            members = await self._members()
            for member in members:
                if member.uid not in self._groups:
                    await self._connect(member)
        except AuthError:
            logger.exception("a dense group refused this ingress")
            return False
        except ClusterError as error:
            logger.info("a dense group cannot be reached yet: %s", error)
            return False
        self._num_groups = max(1, len(members))
        return len(self._groups) >= len(members) > 0

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
