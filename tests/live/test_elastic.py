"""Shards come, go and die while streams flow over real Ray: no token differs, no request fails."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from remora.actors.launch import coordinator_name
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    find_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_process import OVER
from remora.cluster.operation import Drain, PlaceAs, ScaleTo
from remora.cluster.wal import FILE
from remora.comm.errors import ClusterError, ConfigError

NAME = "elastic"


def test_streams_flow_through_operations_and_deaths(live: Any, tmp_path: Path) -> None:
    config = live.deployment(NAME, elastic={"log_dir": str(tmp_path), "warm_standby": 1})
    handle = ensure_cluster(config)
    try:
        asyncio.run(operations(live, config, handle))
        asyncio.run(deaths(live, config, handle))
        asyncio.run(a_coordinator_dies(live, config))
    finally:
        stop_cluster(NAME)
    assert live.living(NAME) == set()
    assert list(tmp_path.iterdir()) == [], "the log of what is over is removed"


async def until_warm(live: Any) -> int:
    """Standbys that are warm, once one is."""
    found = {"warm": 0}

    async def is_warm() -> bool:
        found.update((await asyncio.to_thread(cluster_status, NAME))["standbys"])
        return found["warm"] > 0

    await live.until(is_warm)
    return found["warm"]


async def operations(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    """2 -> 3 -> 2 shards, and a full turn of the placement; who joins was a standby."""
    assert await until_warm(live) == 1
    async with live.flowing(config, handle) as streams:
        up = await live.operate(handle, "up", ScaleTo(3))
        assert up["joiners"] == {"shard-2": 1} and up["moved"] > 0
        [joiner] = [m for m in handle.view().members if m.uid == "shard-2"]
        assert joiner.actor_name.startswith(f"remora/{NAME}/standby-")
        assert handle.request("up", ScaleTo(3))["operation_id"] == "up", "asked again"
        with pytest.raises(ConfigError, match="choose a new id"):
            handle.request("up", ScaleTo(4))
        await streams.one_more()
        down = await live.operate(handle, "down", ScaleTo(2, retire=("shard-0",)))
        assert down["safe_to_delete"] == ["shard-0"]
        await streams.one_more()
        slots = handle.view().placement.slots
        assert slots.keys() == {"shard-1", "shard-2"}
        half = tuple(tuple(range(16)) for _ in range(8))
        rest = tuple(tuple(range(16, 32)) for _ in range(8))
        await live.operate(handle, "halves", PlaceAs({"shard-1": half, "shard-2": rest}))
        turned = await live.operate(handle, "turned", PlaceAs({"shard-1": rest, "shard-2": half}))
        assert turned["moved"] == 8 * 32
        await streams.one_more()
        status = await asyncio.to_thread(cluster_status, NAME)
        members = status["members"]
        assert members["shard-1"]["experts_per_layer"] == [16] * 8
        assert status["epoch"] == handle.view().epoch == 5
        assert members["dense-0"]["shards_connected"] == ["shard-1", "shard-2"]
        joined, running = joiner.actor_name.removeprefix(f"remora/{NAME}/"), live.living(NAME)
        assert running >= {"shard-1#1", joined} and "shard-0#1" not in running
    check(streams)


async def deaths(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    """A shard whose experts have replicas is killed: masked at once, and restored."""
    async with live.flowing(config, handle) as streams:
        every = tuple(tuple(range(32)) for _ in range(8))
        await live.operate(handle, "replicas", PlaceAs({"shard-1": every, "shard-2": every}))
        [victim] = [m for m in handle.view().members if m.uid == "shard-2"]
        await live.strike(victim.actor_name, signal.SIGKILL)
        assert (await live.over(handle, "restore-shard-2.2"))["outcome"] == "done"
        await streams.one_more()
        with pytest.raises(ConfigError, match="no such members: shard-7"):
            handle.request("typo", Drain(("shard-7",)))
    check(streams)


async def a_coordinator_dies(live: Any, config: RemoraConfig) -> None:
    """Streams do not notice; the next one reads the log, adopts what lives, and operates."""
    handle = find_cluster(NAME)
    assert handle is not None
    before = handle.view()
    async with live.flowing(config, handle) as streams:
        await live.strike(coordinator_name(NAME), signal.SIGKILL)
        told = await asyncio.to_thread(handle.request, "up", ScaleTo(3))
        assert told["outcome"] == "done", "asked in the middle of it, and of who remembers"
        assert (await asyncio.to_thread(handle.wait, "down"))["outcome"] == "done"
        status = await asyncio.to_thread(cluster_status, NAME)
        assert status["phase"] not in OVER, "who asks just then is answered by its next life"
        await streams.one_more()

        async def adopted() -> bool:
            try:
                view = await asyncio.to_thread(handle.view)
            except ClusterError:  # Ray is starting it again
                return False
            return view == before

        await live.until(adopted)
        down = await live.operate(handle, "last", Drain(("shard-1",)))
        assert down["safe_to_delete"] == ["shard-1"]
        await streams.one_more()
        assert handle.view().placement.slots.keys() == {"shard-2"}
        assert (config.elastic.log_dir / NAME / FILE).exists()  # type: ignore[operator]
    check(streams)


def check(streams: Any) -> None:
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0
