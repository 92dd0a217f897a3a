"""The router's gRPC server: an event loop in a thread of its own, over `RouterState`.

Usable by anybody who has the cluster's token (docs/router.md): health and reflection are served
beside `Router` and `Views`. Nothing here knows Ray; `router_actor.py` does.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import numpy as np

import remora.comm.router_pb2 as router_pb2
from remora.actors.plan_outcome import PlanOutcome
from remora.actors.router_loads import LoadExchange
from remora.actors.router_state import (
    Choice,
    LoadReported,
    Prompt,
    RouteAsked,
    RouterState,
    ViewAdopted,
)
from remora.actors.router_statistics import RouterStatistics
from remora.comm.errors import ClusterError, FrameError
from remora.comm.grpc_server import START_S, GrpcServer, bounded
from remora.comm.objective import Objective
from remora.comm.router_grpc import (
    METHODS,
    PROMPT_TOKENS_MAX,
    PROMPTS_MAX,
    WATCHERS_MAX,
    bearer_of,
    placement_message,
    view_message,
)
from remora.comm.view import View

logger = logging.getLogger(__name__)

PAIRS_MAX: Final = 1 << 40  # in one report, to one shard: totals stay far from overflow
PRICE_MAX: Final = 1e15  # rows or tokens of a plan's prices
GROUP_CHARS_MAX: Final = 256  # names are remembered
SEQUENCES_MAX: Final = 1 << 16  # of one prompt: a group that is said to have more gets nothing else


class RouterServer:
    """The router as a server.

    Args:
        token: the cluster's token.
        bind_ip, port: where it listens; port 0: one that is free.
        statistics: what was reported, restored by the caller.
        report_every_s: asked of dense groups.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        token: bytes,
        bind_ip: str,
        port: int,
        statistics: RouterStatistics,
        report_every_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.statistics = statistics
        self._report_every_s = report_every_s
        self._clock = clock
        self._state = RouterState(report_every_s)
        self._loads = LoadExchange()
        self._calls: dict[str, int] = dict.fromkeys((m.name for m in METHODS), 0)
        self._num_watchers = 0
        self._rounds = 0
        self._admitted: list[tuple[list[Prompt], asyncio.Future[list[Choice | None]]]] = []
        self._routed = {"flows": 0, "sequences": 0, "alone": 0}
        self._homes_epoch = 0  # of the view that `HomesLearned` was last made for, or is
        self._learning: asyncio.Task[None] | None = None
        self._refused: set[str] = set()  # groups of the view whose last sketch could not be used
        self._changed = asyncio.Event()
        self._workers = ThreadPoolExecutor(3, "remora-router-plan")  # plan, homes, a sketch
        self._planning = threading.Lock()
        self._server = GrpcServer(
            name="router",
            bearer=bearer_of(token),
            bind_ip=bind_ip,
            port=port,
            methods=METHODS,
            behaviours=self._behaviours(),
        )

    @property
    def address(self) -> str:
        """ "ip:port" once `start` returned."""
        return self._server.address

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._server.loop

    def start(self) -> str:
        """Listen; returns the address.

        Raises:
            ClusterError: the address cannot be bound.
        """
        return self._server.start()

    def stop(self) -> None:
        """Refuse new calls, end the others, join."""
        self._server.stop()  # its loop ends, and `_learning` with it
        self._workers.shutdown(wait=False, cancel_futures=True)

    def adopt_view(self, view: View) -> None:
        """Route by `view` from now on and tell who watches; an older one is ignored. Any thread."""
        done = threading.Event()

        def adopt() -> None:
            self._state.handle(ViewAdopted(view, self._clock()))
            if self._state.view is view:
                self._loads.adopt(view)
            self._changed.set()
            self._changed = asyncio.Event()
            done.set()

        self._loop.call_soon_threadsafe(adopt)
        done.wait(START_S)

    def come_round(self) -> int:
        """Returns once the loop has handled what waited before; how often it was asked to. Any
        thread, one at a time."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(done.set)
        done.wait()
        self._rounds += 1
        return self._rounds

    def status(self) -> dict[str, Any]:
        """For `remora status`: address, calls by method, sequences routed here (by how many flows)
        and by ingresses alone, load by group, statistics."""
        return {
            "address": self.address,
            "epoch": self._state.epoch,
            "calls": dict(self._calls),
            "watchers": self._num_watchers,
            "routed": dict(self._routed),
            "groups": self._state.loads(self._clock()),
            "statistics": self.statistics.status(),
        }

    # -- the loop's thread --------------------------------------------------------------------

    def _behaviours(self) -> dict[str, Callable[..., Any]]:
        own: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "Route": self._route,
            "Report": self._report,
            "Plan": self._plan,
            "GetView": self._get_view,
        }
        behaviours: dict[str, Callable[..., Any]] = {
            method.name: bounded(method, own[method.name], self._calls)
            for method in METHODS
            if not method.is_stream
        }
        return behaviours | {"WatchView": self._watch_view}

    async def _route(self, request: Any) -> Any:
        if not 1 <= len(request.prompts) <= PROMPTS_MAX:
            raise ValueError(f"{len(request.prompts)} prompts: 1 to {PROMPTS_MAX} are allowed")
        unreachable = frozenset(request.unreachable)
        prompts = []
        for prompt in request.prompts:
            if len(prompt.token_ids) > PROMPT_TOKENS_MAX:
                raise ValueError(
                    f"{len(prompt.token_ids)} token ids: at most {PROMPT_TOKENS_MAX} of a prompt"
                )
            if prompt.num_sequences > SEQUENCES_MAX:
                raise ValueError(
                    f"{prompt.num_sequences} sequences: at most {SEQUENCES_MAX} of a prompt"
                )
            ids = tuple(prompt.token_ids)
            prompts.append(
                Prompt(
                    token_ids=ids,
                    num_tokens=max(prompt.num_tokens, len(ids)),
                    num_sequences=max(1, prompt.num_sequences),
                    unreachable=unreachable,
                )
            )
        choices = await self._choices(prompts)
        self._routed["sequences"] += sum(prompt.num_sequences for prompt in prompts)
        self._routed["alone"] += request.num_alone
        return router_pb2.RouteResponse(
            epoch=self._state.epoch,
            choices=[
                router_pb2.RouteChoice(
                    group=choice.group,
                    prefix_tokens=choice.prefix_tokens,
                    expected_remote_copies=choice.expected_copies,
                )
                for choice in choices
            ],
        )

    async def _choices(self, prompts: list[Prompt]) -> list[Choice]:
        """With those of all calls that the loop finds ready together: one flow decides."""
        answer: asyncio.Future[list[Choice | None]] = self._loop.create_future()
        if not self._admitted:
            self._loop.call_soon(self._admit)
        self._admitted.append((prompts, answer))
        choices = [choice for choice in await answer if choice is not None]
        if len(choices) < len(prompts):
            raise ClusterError("no dense group is known that can be reached")
        return choices

    def _admit(self) -> None:
        admitted, self._admitted = self._admitted, []
        together = tuple(prompt for prompts, _ in admitted for prompt in prompts)
        self._routed["flows"] += 1
        choices = self._state.handle(RouteAsked(prompts=together, now_s=self._clock()))
        for prompts, answer in admitted:
            if not answer.done():  # else its caller gave up
                answer.set_result(choices[: len(prompts)])
            choices = choices[len(prompts) :]

    async def _report(self, request: Any) -> Any:
        if len(request.group) > GROUP_CHARS_MAX:
            raise ValueError(
                f"a group of {len(request.group)} characters, at most {GROUP_CHARS_MAX}"
            )
        self._state.handle(
            LoadReported(
                group=request.group,
                incarnation=request.incarnation,
                num_running=request.num_running,
                num_waiting=request.num_waiting,
                now_s=self._clock(),
            )
        )
        others = self._exchange_loads(request)
        if request.sketch:
            await self._count(request, is_answered=bool(others))
            self._learn_homes()
        return router_pb2.ReportResponse(
            epoch=self._state.epoch, report_after_s=self._report_every_s, others_sent=others
        )

    async def _count(self, request: Any, *, is_answered: bool) -> None:
        """Take in a report's sketch. One that cannot be used is refused, unless that would cost
        the group an answer that it prices shards by: then the log says so, once."""
        view = self._state.view
        placement = view.placement if view is not None else None
        try:
            await self._loop.run_in_executor(
                self._workers,
                self.statistics.add,
                request.sketch,
                request.group or None,
                placement,
            )
        except FrameError as unusable:
            if not is_answered:
                raise
            if request.group not in self._refused:
                logger.warning("a sketch of %s is not counted: %s", request.group, unusable)
            self._refused.add(request.group)
        else:
            self._refused.discard(request.group)

    def _learn_homes(self) -> None:
        """Have it learned, if it is due, beside the report: it may take longer than one waits."""
        view = self._state.view
        if view is None or (self._learning is not None and not self._learning.done()):
            return
        if self.statistics.homes_are_due(view.epoch != self._homes_epoch):
            self._homes_epoch = view.epoch
            self._learning = self._loop.create_task(self._homes_of(view))

    async def _homes_of(self, view: View) -> None:
        try:
            homes = await self._loop.run_in_executor(self._workers, self.statistics.homes, view)
        except Exception:  # nobody awaits it
            logger.exception("what tokens cost by host was not learned")
            self._homes_epoch = 0  # the next report tries again
            return
        if self._state.view is view:
            self._state.handle(homes)

    def _exchange_loads(self, request: Any) -> list[Any]:
        if not request.sent:
            return []
        rows = [list(layer.pairs) for layer in request.sent]
        most = max((pairs for row in rows for pairs in row), default=0)
        if len({len(row) for row in rows}) != 1 or most > PAIRS_MAX:
            raise ValueError(f"pairs of {len(rows)} layers: as many shards in each, <= {PAIRS_MAX}")
        others_LS = self._loads.report(
            request.group, request.incarnation, request.epoch, np.array(rows, np.int64)
        )
        if others_LS is None:
            return []
        return [router_pb2.ShardPairs(pairs=others_S) for others_S in others_LS.tolist()]

    async def _plan(self, request: Any) -> Any:
        view = self._view()
        objective = _objective_of(request)
        outcome = await self._loop.run_in_executor(
            self._workers, self.plan, view, request.seed, objective
        )
        return router_pb2.PlanResponse(
            epoch=view.epoch,
            placement=placement_message(outcome.placement),
            tokens=outcome.tokens,
            copies_before=outcome.mean("copies_before"),
            copies_after=outcome.mean("copies_after"),
            load_before=outcome.mean("load_before"),
            load_after=outcome.mean("load_after"),
            moved_experts=outcome.moved_experts,
        )

    def plan(self, view: View, seed: int, objective: Objective) -> PlanOutcome:
        """As `RouterStatistics.plan`; one at a time. Any thread.

        Raises:
            ClusterError: one runs, or nothing was reported yet.
        """
        if not self._planning.acquire(blocking=False):
            raise ClusterError("a plan is being made; ask again when it is done")
        try:
            return self.statistics.plan(view, seed, objective)
        finally:
            self._planning.release()

    def _view(self) -> View:
        if self._state.view is None:
            raise ClusterError("there is no view yet")
        return self._state.view

    async def _get_view(self, _: Any) -> Any:
        return view_message(self._view())

    async def _watch_view(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._calls["WatchView"] += 1
        if self._num_watchers >= WATCHERS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS_MAX} callers watch already"
            )
        self._num_watchers += 1
        try:
            epoch = request.after_epoch
            while True:
                changed, view = self._changed, self._state.view
                if view is not None and view.epoch != epoch:  # a lower one: of a later start
                    epoch = view.epoch
                    yield view_message(view)
                await changed.wait()
        finally:
            self._num_watchers -= 1


def _objective_of(request: Any) -> Objective:
    """Of a `PlanRequest`, whose zeros are the planner's own figures."""
    for name in ("move_rows", "horizon_tokens"):
        value = getattr(request, name)
        if not 0 <= value <= PRICE_MAX:  # nor what is no number
            raise ValueError(f"{name} {value:g}: 0 to {PRICE_MAX:g} are allowed")
    own = Objective()
    return Objective(
        nu=request.move_rows or own.nu,
        horizon_tokens=request.horizon_tokens or own.horizon_tokens,
    )
