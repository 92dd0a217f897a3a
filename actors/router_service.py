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
import grpc.aio
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import remora.comm.router_pb2 as router_pb2
from remora.actors.router_loads import LoadExchange
from remora.actors.router_state import (
    Choice,
    LoadReported,
    Prompt,
    RouteAsked,
    RouterState,
    ViewAdopted,
)
from remora.actors.router_statistics import PlanOutcome, RouterStatistics
from remora.comm.errors import ClusterError, FrameError, RemoraError
from remora.comm.router_grpc import (
    CALLS_MAX,
    METHODS,
    PROMPT_TOKENS_MAX,
    PROMPTS_MAX,
    ROUTER,
    VIEWS,
    WATCHERS_MAX,
    Method,
    TokenInterceptor,
    channel_options,
    generic_handlers,
    placement_message,
    view_message,
)
from remora.comm.view import View

logger = logging.getLogger(__name__)

START_S: Final = 30.0
CLOSE_S: Final = 2.0  # for calls under way when the server stops
PAIRS_MAX: Final = 1 << 40  # in one report, to one shard: totals stay far from overflow


class RouterServer:
    """The router as a server.

    Args:
        token: the cluster's token.
        bind_ip, port: where it listens; port 0: one that is free.
        statistics: what was reported, restored by the caller.
        report_every_s: asked of dense groups.
        clock: monotonic seconds.

    Attributes:
        address: "ip:port" once `start` returned.
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
        self.address = ""
        self.statistics = statistics
        self._token = token
        self._bind = f"{bind_ip}:{port}"
        self._bind_ip = bind_ip
        self._report_every_s = report_every_s
        self._clock = clock
        self._state = RouterState()
        self._loads = LoadExchange()
        self._calls: dict[str, int] = dict.fromkeys((m.name for m in METHODS), 0)
        self._num_watchers = 0
        self._admitted: list[tuple[list[Prompt], asyncio.Future[list[Choice | None]]]] = []
        self._routed = {"flows": 0, "sequences": 0, "alone": 0}
        self._homes_epoch = 0  # of the view that `HomesLearned` was last made for
        self._changed: asyncio.Event | None = None
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._workers = ThreadPoolExecutor(2, "remora-router-plan")
        self._planning = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="remora-router", daemon=True)

    def start(self) -> str:
        """Listen; returns the address.

        Raises:
            ClusterError: the address cannot be bound.
        """
        self._thread.start()
        if not self._ready.wait(START_S):
            raise ClusterError(f"the router did not start within {START_S:g} s")
        if self._failure is not None:
            raise ClusterError(f"the router cannot listen on {self._bind}: {self._failure}")
        return self.address

    def stop(self) -> None:
        """Refuse new calls, end the others, join."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.ident is not None:
            self._thread.join(START_S)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def adopt_view(self, view: View) -> None:
        """Route by `view` from now on and tell who watches; an older one is ignored. Any thread."""
        done = threading.Event()

        def adopt() -> None:
            self._state.handle(ViewAdopted(view, self._clock()))
            if self._state.view is view:
                self._loads.adopt(view)
            assert self._changed is not None
            self._changed.set()
            self._changed = asyncio.Event()
            done.set()

        assert self._loop is not None, "adopt_view before start returned"
        self._loop.call_soon_threadsafe(adopt)
        done.wait(START_S)

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

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as failure:  # told by `start`, or logged when it comes later
            if self._ready.is_set():
                logger.exception("the router's server ended")
            self._failure = failure
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed, self._stop = asyncio.Event(), asyncio.Event()
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(self._token)],
            options=channel_options(),
            maximum_concurrent_rpcs=CALLS_MAX,
        )
        server.add_generic_rpc_handlers(generic_handlers(self._behaviours()))
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        names = [ROUTER, VIEWS, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        port = server.add_insecure_port(self._bind)  # raises where it is taken
        await server.start()
        for name in ("", ROUTER, VIEWS):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{self._bind_ip}:{port}"
        self._ready.set()
        await self._stop.wait()
        await checks.enter_graceful_shutdown()
        await server.stop(CLOSE_S)

    def _behaviours(self) -> dict[str, Callable[..., Any]]:
        own: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "Route": self._route,
            "Report": self._report,
            "Plan": self._plan,
            "GetView": self._get_view,
        }
        behaviours: dict[str, Callable[..., Any]] = {
            method.name: self._unary(method, own[method.name])
            for method in METHODS
            if not method.is_stream
        }
        return behaviours | {"WatchView": self._watch_view}

    def _unary(self, method: Method, answer: Callable[[Any], Awaitable[Any]]) -> Any:
        """`answer` under its limit, its errors as gRPC's statuses."""

        async def behave(request: Any, context: Any) -> Any:
            self._calls[method.name] += 1
            left_s = context.time_remaining()
            limit_s = method.limit_s if left_s is None else min(method.limit_s, left_s)
            try:
                return await asyncio.wait_for(answer(request), max(0.0, limit_s))
            except TimeoutError:
                code, text = grpc.StatusCode.DEADLINE_EXCEEDED, f"not done in {limit_s:.3g} s"
            except (ValueError, FrameError) as wrong:
                code, text = grpc.StatusCode.INVALID_ARGUMENT, str(wrong)
            except RemoraError as failed:
                code, text = grpc.StatusCode.UNAVAILABLE, str(failed)
            await context.abort(code, text)

        return behave

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
        assert self._loop is not None
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
        self._state.handle(
            LoadReported(
                group=request.group,
                incarnation=request.incarnation,
                num_running=request.num_running,
                num_waiting=request.num_waiting,
                now_s=self._clock(),
            )
        )
        if request.sketch:
            assert self._loop is not None
            add = self._loop.run_in_executor(self._workers, self.statistics.add, request.sketch)
            await add
            await self._learn_homes()
        return router_pb2.ReportResponse(
            epoch=self._state.epoch,
            report_after_s=self._report_every_s,
            others_sent=self._exchange_loads(request),
        )

    async def _learn_homes(self) -> None:
        view = self._state.view
        if view is None or not self.statistics.homes_are_due(view.epoch != self._homes_epoch):
            return
        self._homes_epoch = view.epoch
        assert self._loop is not None
        homes = await self._loop.run_in_executor(self._workers, self.statistics.homes, view)
        if self._state.view is view:
            self._state.handle(homes)

    def _exchange_loads(self, request: Any) -> list[Any]:
        if not request.sent:
            return []
        rows = [list(layer.pairs) for layer in request.sent]
        if len({len(row) for row in rows}) != 1 or max(map(max, rows)) > PAIRS_MAX:
            raise ValueError(f"pairs of {len(rows)} layers: as many shards in each, <= {PAIRS_MAX}")
        others_LS = self._loads.report(
            request.group, request.incarnation, request.epoch, np.array(rows, np.int64)
        )
        if others_LS is None:
            return []
        return [router_pb2.ShardPairs(pairs=others_S) for others_S in others_LS.tolist()]

    async def _plan(self, request: Any) -> Any:
        view = self._view()
        assert self._loop is not None
        outcome = await self._loop.run_in_executor(self._workers, self.plan, view, request.seed)
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

    def plan(self, view: View, seed: int) -> PlanOutcome:
        """As `RouterStatistics.plan`; one at a time. Any thread.

        Raises:
            ClusterError: one runs, or nothing was reported yet.
        """
        if not self._planning.acquire(blocking=False):
            raise ClusterError("a plan is being made; ask again when it is done")
        try:
            return self.statistics.plan(view, seed)
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
                if view is not None and view.epoch > epoch:
                    epoch = view.epoch
                    yield view_message(view)
                assert changed is not None
                await changed.wait()
        finally:
            self._num_watchers -= 1
