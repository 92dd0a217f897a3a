"""Shards come, go and die while streams flow over real Ray: no token differs, no request fails."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors
from support.serving import DEMO_MODEL

from remora.actors.launch import RAY_NAMESPACE, coordinator_name
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    find_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.connect import connected_service
from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.operation import DrainShards, PlaceAs, ScaleTo, Target
from remora.cluster.service import Service
from remora.cluster.sse import collect
from remora.cluster.wal import FILE
from remora.comm.errors import ClusterError, ConfigError

NAME = "elastic"
PROMPTS = ["def f(x):\n    return", "import os\n", "class A:\n    def", "for i in range("]
NUM_TOKENS = 64
SOON_S = 120.0


@pytest.fixture(scope="module")
def one_node() -> Iterator[None]:
    ray.init(
        num_cpus=16,
        namespace=RAY_NAMESPACE,
        runtime_env=neutral_runtime_env(),
        include_dashboard=True,  # the list of actors comes from it
    )
    yield
    ray.shutdown()


def settings(log_dir: Path) -> RemoraConfig:
    small = {"num_cpus": 0.5, "threads": 1}
    return parse_config(
        {
            "name": NAME,
            "model": str(DEMO_MODEL),
            "numerics": "exact",
            "executor": "eager",
            "dense": {**small, "max_model_len": 256, "prefix_caching": False},
            "experts": {**small, "shards": 2, "slots": 32},  # a shard can hold every expert
            "elastic": {"log_dir": str(log_dir), "warm_standby": 1},
        }
    )


async def answers(service: Service) -> list[tuple[str, str]]:
    """Text and finish reason of every prompt, all at once."""

    async def one(prompt: str) -> tuple[str, str]:
        request = CompletionRequest.model_validate(
            {"prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        )
        answer = await collect(*await service.completion(request), None)
        assert answer is not None
        [choice] = answer["choices"]
        return choice["text"], choice["finish_reason"]

    return await asyncio.gather(*(one(prompt) for prompt in PROMPTS))


class Streams:
    """Requests again and again, in the background; every answer must be `expected`."""

    def __init__(self, service: Service, expected: list[tuple[str, str]]) -> None:
        self._service, self._expected = service, expected
        self.rounds = 0
        self._stopping = False
        self._progress = asyncio.Event()

    async def run(self) -> None:
        while not self._stopping:
            assert await answers(self._service) == self._expected, f"round {self.rounds}"
            self.rounds += 1
            self._progress.set()

    def stop(self) -> None:
        self._stopping = True

    async def one_more(self) -> None:
        """Until a round that began after this call has ended."""
        wanted = self.rounds + 2
        async with asyncio.timeout(SOON_S):
            while self.rounds < wanted:
                self._progress.clear()
                await self._progress.wait()


@asynccontextmanager
async def flowing(config: RemoraConfig, handle: ClusterHandle) -> AsyncIterator[Streams]:
    """Streams over the deployment; their failure is the test's."""
    service = await connected_service(config, handle)
    try:
        expected = await answers(service)
        assert {reason for _, reason in expected} == {"length"}
        streams = Streams(service, expected)
        running = asyncio.ensure_future(streams.run())
        await streams.one_more()
        yield streams
        streams.stop()
        await asyncio.wait_for(running, SOON_S)
    finally:
        await service.close()


async def operate(handle: ClusterHandle, operation_id: str, target: Target) -> dict[str, Any]:
    operation = await asyncio.to_thread(handle.done, operation_id, target)
    assert operation["outcome"] == "done", operation
    return operation


async def until(found: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON_S):
        while not await found():
            await asyncio.sleep(0.2)


async def until_warm() -> int:
    """Standbys that are warm, once one is."""
    found = {"warm": 0}

    async def is_warm() -> bool:
        found.update((await asyncio.to_thread(cluster_status, NAME))["standbys"])
        return found["warm"] > 0

    await until(is_warm)
    return found["warm"]


def living() -> set[str]:
    return {
        actor.name.removeprefix(f"remora/{NAME}/")
        for actor in list_actors(filters=[("state", "=", "ALIVE")])
        if actor.name.startswith(f"remora/{NAME}/")
    }


def test_streams_flow_through_operations_and_deaths(one_node: None, tmp_path: Path) -> None:
    config = settings(tmp_path)
    handle = ensure_cluster(config)
    try:
        asyncio.run(operations(config, handle))
        asyncio.run(deaths(config, handle))
        asyncio.run(a_coordinator_dies(config))
    finally:
        stop_cluster(NAME)
    assert living() == set()
    assert list(tmp_path.iterdir()) == [], "the log of what is over is removed"


async def operations(config: RemoraConfig, handle: ClusterHandle) -> None:
    """2 -> 3 -> 2 shards, and a full turn of the placement; who joins was a standby."""
    assert await until_warm() == 1
    async with flowing(config, handle) as streams:
        up = await operate(handle, "up", ScaleTo(3))
        assert up["joiners"] == {"shard-2": 1} and up["moved"] > 0
        [joiner] = [m for m in handle.view().members if m.uid == "shard-2"]
        assert joiner.actor_name.startswith(f"remora/{NAME}/standby-")
        assert handle.request("up", ScaleTo(3))["operation_id"] == "up", "asked again"
        with pytest.raises(ConfigError, match="choose a new id"):
            handle.request("up", ScaleTo(4))
        await streams.one_more()
        down = await operate(handle, "down", ScaleTo(2, retire=("shard-0",)))
        assert down["safe_to_delete"] == ["shard-0"]
        await streams.one_more()
        slots = handle.view().placement.slots
        assert slots.keys() == {"shard-1", "shard-2"}
        half = tuple(tuple(range(16)) for _ in range(8))
        rest = tuple(tuple(range(16, 32)) for _ in range(8))
        await operate(handle, "halves", PlaceAs({"shard-1": half, "shard-2": rest}))
        turned = await operate(handle, "turned", PlaceAs({"shard-1": rest, "shard-2": half}))
        assert turned["moved"] == 8 * 32
        await streams.one_more()
        status = await asyncio.to_thread(cluster_status, NAME)
        members = status["members"]
        assert members["shard-1"]["experts_per_layer"] == [16] * 8
        assert status["epoch"] == handle.view().epoch == 5
        assert members["dense-0"]["shards_connected"] == ["shard-1", "shard-2"]
        joined = joiner.actor_name.removeprefix(f"remora/{NAME}/")
        assert living() >= {"shard-1#1", joined} and "shard-0#1" not in living()


async def deaths(config: RemoraConfig, handle: ClusterHandle) -> None:
    """A shard whose experts have replicas is killed: masked at once, and restored."""
    async with flowing(config, handle) as streams:
        every = tuple(tuple(range(32)) for _ in range(8))
        await operate(handle, "replicas", PlaceAs({"shard-1": every, "shard-2": every}))
        victim = next(m for m in handle.view().members if m.uid == "shard-2")
        pid = await asyncio.to_thread(process_of, victim.actor_name)
        os.kill(pid, signal.SIGKILL)

        async def restored() -> bool:
            view = await asyncio.to_thread(handle.view)
            return any(m.uid == "shard-2" and m.incarnation == 2 for m in view.members)

        await until(restored)
        await streams.one_more()
        with pytest.raises(ConfigError, match="no such shards: shard-7"):
            handle.request("typo", DrainShards(("shard-7",)))


async def a_coordinator_dies(config: RemoraConfig) -> None:
    """Streams do not notice; the next one reads the log, adopts what lives, and operates."""
    handle = find_cluster(NAME)
    assert handle is not None
    before = handle.view()
    async with flowing(config, handle) as streams:
        pid = await asyncio.to_thread(process_of, coordinator_name(NAME))
        os.kill(pid, signal.SIGKILL)
        await streams.one_more()

        async def adopted() -> bool:
            try:
                view = await asyncio.to_thread(handle.view)
            except ClusterError:  # Ray is starting it again
                return False
            return view == before

        await until(adopted)
        assert handle.request("up", ScaleTo(3))["outcome"] == "done", "it is remembered"
        down = await operate(handle, "last", DrainShards(("shard-1",)))
        assert down["safe_to_delete"] == ["shard-1"]
        await streams.one_more()
        assert handle.view().placement.slots.keys() == {"shard-2"}
        assert (config.elastic.log_dir / NAME / FILE).exists()  # type: ignore[operator]


def process_of(name: str) -> int:
    """Process of a living actor of ours."""
    [actor] = list_actors(filters=[("name", "=", name), ("state", "=", "ALIVE")], detail=True)
    pid = actor.pid
    assert isinstance(pid, int) and pid > 0
    return pid
