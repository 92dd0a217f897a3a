"""Ray drains a node while streams flow: experts and dense groups leave it, and it goes."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.programs import benchmarks_on_path, program

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig
from remora.cluster.node_watch import RayNodes
from remora.cluster.operation import ScaleTo

pytestmark = pytest.mark.long

NAME = "evacuated"
ROOM = {"num_cpus": 2, "resources": {"shard": 2, "group": 1}}
DEADLINE_S = 240.0  # two cores, shared; far more than it takes


@pytest.fixture
def hosts() -> Iterator[Cluster]:
    """A head that has no room for members; tests add nodes that have."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_what_is_on_a_node_that_is_drained_leaves_it(hosts: Cluster, tmp_path: Path) -> None:
    with benchmarks_on_path():
        live: Any = program("live_streams")
        asks = {"num_cpus": 0.2, "resources": {"shard": 1}}
        config = live.deployment(NAME, experts=asks, elastic={"log_dir": str(tmp_path)})
        dense = config.dense.model_copy(update={"num_cpus": 0.2, "resources": {"group": 1}})
        config = config.model_copy(update={"dense": dense})
        first, handle = started_on_one_node(hosts, config)
        try:
            second = hosts.add_node(**ROOM)
            asyncio.run(drained(live, config, handle, first.node_id, second.node_id))
        finally:
            stop_cluster(NAME)


def started_on_one_node(hosts: Cluster, config: RemoraConfig) -> tuple[Any, ClusterHandle]:
    """A node that has all members: it comes when the coordinator has been placed elsewhere."""
    nodes: list[Any] = []

    def add_node(loading: dict[str, Any]) -> None:
        if loading and not nodes:
            nodes.append(hosts.add_node(**ROOM))

    handle = ensure_cluster(config, add_node)
    [first] = nodes
    assert {member.endpoint.host for member in handle.view().members} == {first.node_id}
    return first, handle


async def drained(
    live: Any, config: RemoraConfig, handle: ClusterHandle, first: str, second: str
) -> None:
    deadline_s = time.time() + DEADLINE_S
    async with live.flowing(config, handle) as streams:
        await asyncio.to_thread(RayNodes().drain, first, "a test takes it back", deadline_s)
        operation = await live.over(handle, "evacuate-dense-0.1-shard-0.1-shard-1.1:1")
        assert operation["outcome"] == "done", operation["reason"]
        assert set(operation["safe_to_delete"]) == {"dense-0", "shard-0", "shard-1"}
        assert operation["joiners"] == {"dense-1": 1, "shard-2": 1}, "it holds all experts"
        operation = await live.over(handle, "replace-dense-0.1-shard-0.1-shard-1.1:1")
        assert operation["outcome"] == "done", operation["reason"]
        assert operation["joiners"] == {"shard-0": 2}, "there were two; the name is free again"
        await streams.one_more()
        members = handle.view().members
        assert {member.endpoint.host for member in members} == {second}
        assert {member.uid for member in members} == {"dense-1", "shard-0", "shard-2"}
        await live.until(lambda: is_gone(first))  # idle and drained: its raylet ends
        await streams.one_more()
        status = await asyncio.to_thread(cluster_status, NAME)
        assert status["health"]["nodes"]["refused"] == {}
        assert status["operations"]["lost"] == []
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0


def test_a_replacement_that_waits_for_room_gives_way(hosts: Cluster, tmp_path: Path) -> None:
    with benchmarks_on_path():
        live: Any = program("live_streams")
        asks = {"num_cpus": 0.2, "resources": {"shard": 1}}
        config = live.deployment(NAME, experts=asks, elastic={"log_dir": str(tmp_path)})
        dense = config.dense.model_copy(update={"resources": {"group": 1}})
        config = config.model_copy(update={"dense": dense})
        nodes: list[Any] = []

        def add_nodes(loading: dict[str, Any]) -> None:
            if loading and not nodes:
                for room in ({"shard": 1, "group": 1}, {"shard": 1}):
                    nodes.append(hosts.add_node(num_cpus=2, resources=room))

        handle = ensure_cluster(config, add_nodes)
        try:
            asyncio.run(given_way(live, handle, hosts, nodes[1].node_id))
        finally:
            stop_cluster(NAME)


async def given_way(live: Any, handle: ClusterHandle, hosts: Cluster, node: str) -> None:
    """A shard's node goes; the next one comes only after somebody has asked for something."""
    [uid] = [member.uid for member in handle.view().members if member.endpoint.host == node]
    deadline_s = time.time() + DEADLINE_S
    await asyncio.to_thread(RayNodes().drain, node, "a test takes it back", deadline_s)
    evacuated = await live.over(handle, f"evacuate-{uid}.1:1")
    assert (evacuated["outcome"], evacuated["joiners"]) == ("done", {}), evacuated["reason"]
    await live.until(lambda: waits(f"replace-{uid}.1:1"))
    await live.operate(handle, "mine", ScaleTo(dense_groups=1))
    replaced = await live.over(handle, f"replace-{uid}.1:1")
    assert (replaced["outcome"], replaced["reason"]) == ("failed", "it gives way to 'mine'")
    await live.until(lambda: waits(f"replace-{uid}.1:1:2"))
    added = hosts.add_node(num_cpus=2, resources={"shard": 1})  # in no other thread
    again = await live.over(handle, f"replace-{uid}.1:1:2")
    assert again["outcome"] == "done", again["reason"]
    shards = [member for member in handle.view().members if member.role == "shard"]
    assert len(shards) == 2 and added.node_id in {member.endpoint.host for member in shards}


async def waits(operation_id: str) -> bool:
    status = await asyncio.to_thread(cluster_status, NAME)
    running = status["operations"]["running"]
    return running is not None and (running["operation_id"], running["step"]) == (
        operation_id,
        "prepare",
    )


async def is_gone(node_id: str) -> bool:
    nodes = await asyncio.to_thread(ray.nodes)
    return not any(node["Alive"] for node in nodes if node["NodeID"] == node_id)
