"""Ingress and dense group as the router's clients: asked, lost, found again; nothing fails."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support.fake_engine import HOST, TOKEN, FakeEngine
from support.router_rig import running_router
from support.router_traffic import encoded, paired_tokens
from support.serving import make_engine

from remora.actors.launch import Launch
from remora.actors.load_sharing import NOTHING, LoadSharing, Sent
from remora.actors.router_reporter import RouterReporter
from remora.actors.router_service import RouterServer
from remora.cluster.engine_client import EngineClient
from remora.cluster.inbox import Inbox
from remora.cluster.router_client import RouterClient
from remora.comm.messages import EngineStats, SamplingParams, Submit
from remora.comm.view import Member, View, contiguous_placement

SOON_S = 30.0


def view_over(*engines: FakeEngine) -> View:
    placement = contiguous_placement(num_experts=8, moe_layers=(1, 2), shard_uids=("shard-0",))
    members = tuple(
        Member(
            uid=m.uid, incarnation=m.incarnation, role=m.role, endpoint=m.endpoint,
            actor_name=m.actor_name,
        )
        for m in (engine.member() for engine in engines)
    )  # fmt: skip
    return View(epoch=1, members=members, placement=placement)


def submit(name: str, first: int = 1, num_tokens: int = 50) -> Submit:
    params = SamplingParams(max_tokens=2, temperature=0.0)
    ids = list(range(first, first + num_tokens))
    return Submit(request_id=name, prompt_ids=ids, params=params)


@contextlib.asynccontextmanager
async def client_over(
    engines: tuple[FakeEngine, ...], where: list[str | None], timeout_s: float = 5.0
) -> AsyncIterator[EngineClient]:
    """An ingress whose router is at `where[0]` now."""

    async def members() -> list[Member]:
        return [engine.member() for engine in engines]

    async def find() -> str | None:
        return where[0]

    router = RouterClient(find, token=TOKEN, timeout_s=timeout_s)
    client = EngineClient(members, token=TOKEN, self_host=HOST, router=router)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def finished(client: EngineClient, *submits: Submit) -> None:
    inbox = Inbox()
    await client.submit(submits, inbox)
    left = {s.request_id for s in submits}
    async with asyncio.timeout(SOON_S):
        while left:
            for output in await inbox.take():
                assert output.finish_reason != "error", output.error
                if output.finish_reason is not None:
                    left.discard(output.request_id)


class NoLoads(LoadSharing):
    """Of a dense group without a dispatcher."""

    def __init__(self) -> None:
        pass

    def take(self) -> Sent:
        return NOTHING

    def note(self, epoch: int, others_LS: object) -> None:
        assert epoch == 0 and others_LS is None


def counts(*engines: FakeEngine) -> list[int]:
    return [len(engine.submitted) for engine in engines]


@pytest.fixture
def router() -> Iterator[RouterServer]:
    with running_router(token=TOKEN) as server:
        yield server


def test_requests_of_one_prefix_go_to_one_group(router: RouterServer) -> None:
    """Least loaded first would spread them."""
    with make_engine(uid="dense-0") as one, make_engine(uid="dense-1") as two:
        router.adopt_view(view_over(one, two))

        async def run() -> None:
            async with client_over((one, two), [router.address]) as client:
                await finished(client, submit("a", num_tokens=200))
                for number in range(3):  # 200 tokens known are worth less than one sequence
                    await finished(client, submit(f"b{number}", 1000 + number, 3))
                assert client.routed() == {"router": 4, "alone": 0}

        asyncio.run(run())
        assert sum(counts(one, two)) == 4 and min(counts(one, two)) >= 1
        assert router.status()["calls"]["Route"] == 4


def test_choices_of_one_prompt_are_asked_about_once(router: RouterServer) -> None:
    with make_engine(uid="dense-0") as one, make_engine(uid="dense-1") as two:
        router.adopt_view(view_over(one, two))

        async def run() -> None:
            async with client_over((one, two), [router.address]) as client:
                await finished(client, *(submit(f"s{i}") for i in range(4)), submit("x", 500))

        asyncio.run(run())
        assert router.status()["calls"]["Route"] == 1
        assert sorted(counts(one, two)) == [1, 4]


def test_without_a_router_the_least_loaded_takes_it_and_a_new_router_is_found() -> None:
    with make_engine(uid="dense-0") as one, make_engine(uid="dense-1") as two:
        where: list[str | None] = [None]

        async def run() -> None:
            async with client_over((one, two), where) as client:
                await finished(client, *(submit(f"a{i}") for i in range(4)))
                assert counts(one, two) == [2, 2]
                assert client.router is not None and not client.router.is_connected
                for life in range(2):
                    with running_router(view_over(one, two), token=TOKEN) as server:
                        where[0] = server.address
                        async with asyncio.timeout(SOON_S):
                            while not client.router.is_connected:
                                await asyncio.sleep(0.01)
                        await finished(client, submit(f"b{life}"))
                        assert server.status()["calls"]["Route"] == 1
                        alone = 1 if life else 4  # since a router was last told
                        counted = {"flows": 1, "sequences": 1, "alone": alone}
                        assert server.status()["routed"] == counted
                    before = client.routed()["alone"]
                    await finished(client, submit(f"c{life}"))  # it is gone
                    assert client.routed()["alone"] == before + 1

        asyncio.run(run())


def test_a_router_that_hangs_costs_one_deadline() -> None:
    asked = threading.Event()

    class Hung(RouterServer):
        async def _route(self, request: object) -> object:
            asked.set()
            return await asyncio.Future()

    with (
        make_engine(uid="dense-0") as one,
        make_engine(uid="dense-1") as two,
        running_router(kind=Hung, token=TOKEN) as hung,
    ):

        async def run() -> None:
            async with client_over((one, two), [hung.address], timeout_s=0.2) as client:
                await finished(client, submit("a"))
                assert client.routed() == {"router": 0, "alone": 1}

        asyncio.run(run())
        assert asked.is_set()


def test_a_call_that_fails_takes_no_other_request_with_it() -> None:
    """The channel is closed under the second call, which grpc tells as a cancellation."""

    class Failing(RouterServer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.calls, self.second = 0, asyncio.Event()

        async def _route(self, request: object) -> object:
            self.calls += 1
            if self.calls == 1:
                await self.second.wait()
                raise RuntimeError("the first call fails while the second waits")
            self.second.set()
            return await asyncio.Future()

    with (
        make_engine(uid="dense-0") as one,
        make_engine(uid="dense-1") as two,
        running_router(kind=Failing, token=TOKEN) as failing,
    ):

        async def run() -> None:
            async with client_over((one, two), [failing.address], timeout_s=SOON_S) as client:
                await asyncio.gather(*(finished(client, submit(name)) for name in "ab"))
                assert client.routed() == {"router": 0, "alone": 2}

        asyncio.run(run())


def test_a_group_that_the_ingress_cannot_reach_is_not_chosen(router: RouterServer) -> None:
    with make_engine(uid="dense-0") as one, make_engine(uid="dense-1") as two:
        router.adopt_view(
            view_over(
                one,
                two,
            )
        )

        async def run() -> None:
            async with client_over((two,), [router.address]) as client:
                await finished(client, submit("a"))  # one group: nobody needs to be asked
            one.serving = False
            async with client_over((one, two), [router.address]) as client:
                async with asyncio.timeout(SOON_S):
                    while client.num_serving == 2:
                        await asyncio.sleep(0.01)
                await finished(client, submit("b"), submit("c", 900))

        asyncio.run(run())
        assert counts(one, two) == [0, 3]
        assert router.status()["calls"]["Route"] == 1


def test_a_group_that_is_not_connected_is_not_named(router: RouterServer) -> None:
    """Else the router counts as sent there what goes elsewhere, and names it again: it is idle."""
    with make_engine(uid="dense-0") as one, make_engine(uid="dense-1") as two:
        with make_engine(uid="dense-2") as gone:
            pass
        router.adopt_view(view_over(one, two, gone))

        async def run() -> None:
            async with client_over((one, two, gone), [router.address]) as client:
                await finished(client, submit("a"), submit("b", 900), submit("c", 1800))

        asyncio.run(run())
        loads = router.status()["groups"]
        assert (loads["dense-2"], loads["dense-0"] + loads["dense-1"]) == (0, 3)
        assert sorted(counts(one, two)) == [1, 2]


def test_a_dense_group_reports_until_it_is_closed_and_survives_the_router() -> None:
    sketches = [encoded(paired_tokens(2, 500), "a", (1, 2))]
    launch = Launch(
        deployment="d", uid="dense-0", incarnation=0, model="", dtype="auto", exact=False,
        token=TOKEN, num_threads=1,
    )  # fmt: skip
    where: list[str | None] = [None]
    with make_engine(uid="dense-0") as engine:
        asked = threading.Event()

        def find(deployment: str) -> str | None:
            assert deployment == "d"
            asked.set()
            return where[0]

        def stats() -> EngineStats:
            return EngineStats(num_running=2, num_waiting=5)

        reporter = RouterReporter(
            launch, 0.02, stats, lambda: sketches.pop() if sketches else b"", NoLoads(), find
        )
        try:
            assert asked.wait(SOON_S), "it looks for a router that is not there"
            assert len(sketches) == 1, "nothing is taken that cannot be sent"
            for life in range(2):
                with running_router(view_over(engine), token=TOKEN, report_every_s=0.02) as server:
                    where[0] = server.address
                    before = reporter.reports
                    waiting = threading.Event()
                    for _ in range(1000):
                        if reporter.reports > before:
                            break
                        waiting.wait(0.02)
                    assert server.status()["groups"] == {"dense-0": 7}
                    reported = server.status()["statistics"]["tokens"]
                    assert reported == (500.0 if life == 0 else 0.0)
        finally:
            reporter.close()
