"""Ray's GCS dies under streams and comes back with what it had written: nobody notices."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.programs import benchmarks_on_path, program
from support.ray_actors import living_actors

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bootstrap import (
    ClusterHandle,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.operation import PlaceAs, ScaleTo
from remora.comm.errors import ClusterError

pytestmark = pytest.mark.long

NAME = "headless"
SHARDS = ("shard-0", "shard-1")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Any]:
    """A head node whose GCS keeps its tables on the disk."""
    storage = {"gcs_storage": "rocksdb", "gcs_storage_path": str(tmp_path / "gcs")}
    head_args = {"num_cpus": 8, "include_dashboard": False, "_system_config": storage}
    cluster = Cluster(initialize_head=True, head_node_args=head_args)
    ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    yield cluster.head_node
    ray.shutdown()
    cluster.shutdown()


def test_streams_and_operations_outlive_the_gcs(head: Any, tmp_path: Path) -> None:
    with benchmarks_on_path():
        live: Any = program("live_streams")
        config = live.deployment(NAME, elastic={"log_dir": str(tmp_path / "log")})
        handle = ensure_cluster(config)
        try:
            asyncio.run(story(live, config, handle, head))
        finally:
            stop_cluster(NAME)


async def story(live: Any, config: RemoraConfig, handle: ClusterHandle, head: Any) -> None:
    experts = tuple(range(live.NUM_EXPERTS))
    halves, every = (
        PlaceAs({uid: (held,) * live.NUM_LAYERS for uid, held in zip(SHARDS, slots, strict=True)})
        for slots in ((experts[:16], experts[16:]), (experts, experts))
    )
    async with live.flowing(config, handle) as streams:
        await live.operate(handle, "halves", halves)
        pids = await asyncio.to_thread(processes)
        async with without_gcs(head):
            await streams.one_more()
            # no process is started or ended in it
            moved = await live.operate(handle, "moved", every)
            assert moved["moved"] == live.NUM_EXPERTS * live.NUM_LAYERS
            os.kill(pids["shard-1#1"], signal.SIGKILL)  # masked by its replicas, not restored yet
            await streams.one_more()
        assert (await live.over(handle, "restore-shard-1.2"))["outcome"] == "done"
        await streams.one_more()
        grown = await live.operate(handle, "grown", ScaleTo(3))
        assert grown["joiners"] == {"shard-2": 1}
        os.kill(pids["coordinator"], signal.SIGKILL)
        await live.until(lambda: answers(handle))
        await streams.one_more()
        living = await asyncio.to_thread(processes)
        same = {name for name in pids if living.get(name) == pids[name]}
        assert same == {"dense-0#1", "shard-0#1", "router"}
        assert living.keys() - same == {"shard-1#2", "shard-2#1", "coordinator"}
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0


@asynccontextmanager
async def without_gcs(head: Any) -> AsyncIterator[None]:
    """The GCS is killed, and started again after the block."""
    await asyncio.to_thread(head.kill_gcs_server)
    try:
        yield
    finally:
        head.start_gcs_server()  # it ends with the thread that starts it: this is the main one


async def answers(handle: ClusterHandle) -> bool:
    try:
        return (await asyncio.to_thread(handle.view)).placement.slots.keys() > set(SHARDS)
    except ClusterError:  # Ray is starting it again
        return False


def processes() -> dict[str, int]:
    """Process of each living actor of the deployment, by its name there."""
    prefix = f"remora/{NAME}/"
    living = living_actors().items()
    return {name.removeprefix(prefix): pid for name, pid in living if name.startswith(prefix)}
