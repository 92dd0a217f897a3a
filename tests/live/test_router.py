"""The router in a real deployment: it routes, it dies under load, nobody notices, it comes back."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from support.ray_actors import living_names, process_of
from support.serving import DEMO_MODEL

from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    find_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.connect import connected_service
from remora.cluster.manage_command import status_text
from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.service import Service
from remora.cluster.sse import collect
from remora.comm import coordinator_pb2
from remora.comm.errors import ClusterError
from remora.comm.grpc_base import unary_call
from remora.comm.router_grpc import GET_VIEW, credentials_of

PROMPTS = [f"Once upon a time there were {n} remoras and" for n in range(6)]
SOON_S = 60.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RemoraConfig:
    small = {"num_cpus": 0.5, "threads": 1}
    return parse_config(
        {
            "name": "routed",
            "model": str(DEMO_MODEL),
            "numerics": "exact",
            "executor": "eager",
            "dense": {**small, "groups": 2, "max_model_len": 256},
            "experts": {**small, "shards": 2},
            "router": {
                "report_every_s": 0.2,
                "route_timeout_s": 2.0,  # a loaded machine is no reason to route alone here
                "state_dir": str(tmp_path_factory.mktemp("state")),
            },
        }
    )


@pytest.fixture(scope="module")
def handle(one_ray: None, config: RemoraConfig) -> Iterator[ClusterHandle]:
    yield ensure_cluster(config)
    stop_cluster(config.name)
    assert living_names(config.name) == []


def smallest(config: RemoraConfig, name: str, **router: Any) -> RemoraConfig:
    """One dense group and one shard beside `config`, with another router."""
    return config.model_copy(
        update={
            "name": name,
            "dense": config.dense.model_copy(update={"groups": 1}),
            "experts": config.experts.model_copy(update={"shards": 1}),
            "router": config.router.model_copy(update=router),
        }
    )


def router_pid() -> int:
    return process_of("remora/routed/router")


async def until(ready: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON_S):
        while not await ready():
            await asyncio.sleep(0.05)


async def complete(service: Service, prompt: str, **body: Any) -> str:
    request = CompletionRequest.model_validate({"prompt": prompt, "temperature": 0, **body})
    answer = await collect(*await service.completion(request), None)
    assert answer is not None and answer["choices"][0]["finish_reason"] == "length"
    return str(answer["choices"][0]["text"])


def test_the_router_dies_under_load_and_no_request_fails(
    config: RemoraConfig, handle: ClusterHandle
) -> None:
    asyncio.run(_dies_under_load(config, handle))


async def _dies_under_load(config: RemoraConfig, handle: ClusterHandle) -> None:
    service = await connected_service(config, handle)
    router = service.serving.engine.router
    assert router is not None and router.is_connected
    try:
        expected = [await complete(service, prompt, max_tokens=60) for prompt in PROMPTS]
        assert (router.num_routed, router.num_alone) == (len(PROMPTS), 0)
        status = await asyncio.to_thread(cluster_status, config.name)
        assert status["router"]["calls"]["Route"] == len(PROMPTS)
        assert f"{len(PROMPTS)} sequences routed, 0 by ingresses alone" in status_text(status)
        served = {uid: status["members"][uid]["steps_total"] for uid in ("dense-0", "dense-1")}
        assert all(served.values()), f"both groups were used: {served}"

        streams = [asyncio.create_task(complete(service, p, max_tokens=60)) for p in PROMPTS]

        async def running() -> bool:
            return service.serving.admission.num_admitted == len(PROMPTS)

        await until(running)
        first = await asyncio.to_thread(router_pid)
        os.kill(first, signal.SIGKILL)
        more = [asyncio.create_task(complete(service, p, max_tokens=60)) for p in PROMPTS]
        assert await asyncio.gather(*streams) == expected
        assert await asyncio.gather(*more) == expected

        async def back() -> bool:
            if not router.is_connected:
                await complete(service, PROMPTS[0], max_tokens=2)
            return router.is_connected and await asyncio.to_thread(router_pid) != first

        await until(back)
        before = router.num_routed

        async def routed_again() -> bool:
            await complete(service, PROMPTS[1], max_tokens=2)
            return router.num_routed > before

        await until(routed_again)
    finally:
        await service.close()


def test_dense_groups_report_and_outsiders_see_the_view(handle: ClusterHandle) -> None:
    async def reported() -> bool:
        status = await asyncio.to_thread(cluster_status, "routed")
        return bool(status["router"]["calls"]["Report"] >= 2)

    asyncio.run(until(reported))
    address = handle.router_address()
    assert address is not None
    with grpc.insecure_channel(address) as channel:
        ask = unary_call(channel, GET_VIEW)
        view = ask(
            coordinator_pb2.GetViewRequest(),
            timeout=SOON_S,
            metadata=credentials_of(handle.token),
        )
    assert view.view_hash == handle.view().view_hash
    assert {m.uid for m in view.members} == {"dense-0", "dense-1", "shard-0", "shard-1"}


def test_a_port_that_is_taken_fails_the_start_by_name(
    config: RemoraConfig, handle: ClusterHandle
) -> None:
    address = handle.router_address()
    assert address is not None
    port = int(address.rpartition(":")[2])
    with pytest.raises(ClusterError, match=f"router.*cannot listen on 127.0.0.1:{port}"):
        ensure_cluster(smallest(config, "taken", port=port))
    assert find_cluster("taken") is None


def test_without_a_router_ingresses_choose_alone(
    config: RemoraConfig, handle: ClusterHandle
) -> None:
    off = smallest(config, "alone", enabled=False)
    alone = ensure_cluster(off)
    try:
        assert alone.router_address() is None
        assert cluster_status("alone")["router"] is None

        async def serve() -> None:
            service = await connected_service(off, alone)
            try:
                assert service.serving.engine.router is None
                await complete(service, PROMPTS[0], max_tokens=4)
                async with asyncio.timeout(SOON_S):  # the coordinator knows more than its loops
                    while "remora_members_hung" not in service.serving.metrics.coordinator:
                        await asyncio.sleep(0.1)
            finally:
                await service.close()

        asyncio.run(serve())
    finally:
        stop_cluster("alone")
