"""The ingress' side of the router: a dense group for each sequence, quickly or not at all.

Nothing here fails a request: without an answer in time (`router.route_timeout_s`) the ingress takes
the least loaded group that it is connected to, and leaves the router alone for a while, in which it
is looked for again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import grpc
import grpc.aio

import remora.comm.router_pb2 as router_pb2
from remora.comm.grpc_base import channel_options, unary_call
from remora.comm.messages import Submit
from remora.comm.router_grpc import PROMPT_TOKENS_MAX, PROMPTS_MAX, ROUTE, credentials_of

logger = logging.getLogger(__name__)

PAUSE_FIRST_S: Final = 0.25
PAUSE_MAX_S: Final = 5.0
CONNECT_S: Final = 2.0


class RouterClient:
    """Asks the router on behalf of one ingress; used on one event loop.

    Args:
        find: the router's address, or None while there is none.
        token: the cluster's token.
        timeout_s: for one answer.

    Attributes:
        num_routed, num_alone: sequences that went where the router said, and that did not.
    """

    def __init__(
        self, find: Callable[[], Awaitable[str | None]], *, token: bytes, timeout_s: float
    ) -> None:
        self._find = find
        self._credentials = credentials_of(token)
        self._timeout_s = timeout_s
        self._channel: Any = None
        self._route: Any = None
        self._search: asyncio.Task[None] | None = None
        self.num_routed = 0
        self.num_alone = 0
        self._told_alone = 0  # of them, the router knows

    async def start(self) -> None:
        """Look for the router once; one that is not there is looked for in the background."""
        if not await self._connect():
            self._look_for_it()

    async def close(self) -> None:
        """Let go of the router."""
        if self._search is not None:
            self._search.cancel()
            await asyncio.gather(self._search, return_exceptions=True)
        await self._disconnect()

    @property
    def is_connected(self) -> bool:
        """Whether the next request will be asked about."""
        return self._route is not None

    async def groups(
        self, submits: Sequence[Submit], unreachable: Iterable[str] = ()
    ) -> list[str | None]:
        """A dense group for each sequence; None: decide yourself. Never raises a ClusterError."""
        prompts: dict[tuple[int, ...], int] = {}
        for submit in submits:
            key = tuple(submit.prompt_ids)
            prompts[key] = prompts.get(key, 0) + 1
        nothing: list[str | None] = [None] * len(submits)
        if self._route is None or len(prompts) > PROMPTS_MAX:
            self.num_alone += len(submits)
            return nothing
        num_alone = self.num_alone - self._told_alone  # another call may tell meanwhile
        self._told_alone += num_alone
        request = router_pb2.RouteRequest(
            prompts=[
                router_pb2.RoutePrompt(
                    token_ids=ids[:PROMPT_TOKENS_MAX], num_tokens=len(ids), num_sequences=count
                )
                for ids, count in prompts.items()
            ],
            unreachable=sorted(unreachable),
            num_alone=num_alone,
        )
        route = self._route
        try:
            answer = await route(request, timeout=self._timeout_s, metadata=self._credentials)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            # else another call closed the channel under this one, which grpc tells in that way
            if self._route is route:
                why = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "closed"
                logger.warning("the router does not answer (%s): routing alone", why)
                await self._disconnect()
                self._look_for_it()
            self.num_alone += len(submits)
            self._told_alone -= num_alone
            return nothing
        chosen = {ids: c.group for ids, c in zip(prompts, answer.choices, strict=False)}
        self.num_routed += len(submits)
        return [chosen.get(tuple(submit.prompt_ids)) for submit in submits]

    async def _connect(self) -> bool:
        address = await self._find()
        if address is None:
            return False
        channel = grpc.aio.insecure_channel(address, options=channel_options())
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
        except TimeoutError:
            await channel.close()
            return False
        self._channel, self._route = channel, unary_call(channel, ROUTE)
        return True

    async def _disconnect(self) -> None:
        channel, self._channel, self._route = self._channel, None, None
        if channel is not None:
            await channel.close()

    def _look_for_it(self) -> None:
        if self._search is None or self._search.done():
            self._search = asyncio.ensure_future(self._reconnect())

    async def _reconnect(self) -> None:
        pause_s = PAUSE_FIRST_S
        while True:
            await asyncio.sleep(pause_s)
            if await self._connect():
                logger.info("the router answers again")
                return
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
