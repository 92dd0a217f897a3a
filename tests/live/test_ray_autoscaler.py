"""Ray's autoscaler (version 2, pretended nodes): shards that find no place have nodes added."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from support.autoscaled_ray import autoscaled_ray
from support.serving import DEMO_MODEL

from remora.actors.launch import host_label
from remora.cluster.bootstrap import ClusterHandle, ensure_cluster, stop_cluster
from remora.cluster.config import parse_config
from remora.cluster.operation import ScaleTo

pytestmark = pytest.mark.long

NAME = "grown"
SOON_S = 120.0
ROLE = {"remora/role": "expert"}


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[ClusterHandle]:
    """The head has room for a dense group and a shard; another shard needs another node."""
    host = {
        "resources": {"CPU": 1}, "labels": ROLE, "node_config": {},
        "min_workers": 0, "max_workers": 2,
    }  # fmt: skip
    head = {"resources": {"CPU": 2}, "labels": ROLE}
    config = parse_config(
        {
            "name": NAME,
            "model": str(DEMO_MODEL),
            "executor": "eager",
            "dense": {"num_cpus": 1, "threads": 1, "max_model_len": 256},
            "experts": {"num_cpus": 1, "threads": 1, "shards": 1, "slots": 32, "labels": ROLE},
            "elastic": {"log_dir": str(tmp_path / "log")},
        }
    )
    with autoscaled_ray(tmp_path, head=head, node_types={"host": host}, idle_s=3.0):
        yield ensure_cluster(config)
        stop_cluster(NAME)


def test_nodes_come_and_go_with_shards(handle: ClusterHandle) -> None:
    assert shard_hosts(handle) == {host_label()} and not added_hosts()
    up = handle.done("up", ScaleTo(2))
    assert (up["outcome"], up["joiners"]) == ("done", {"shard-1": 1}), up["reason"]
    assert len(added_hosts()) == 1
    assert shard_hosts(handle) == {host_label()} | added_hosts()

    down = handle.done("down", ScaleTo(1, retire=("shard-1",)))
    assert (down["outcome"], down["safe_to_delete"]) == ("done", ["shard-1"]), down["reason"]
    until(lambda: not added_hosts())
    assert shard_hosts(handle) == {host_label()}


def shard_hosts(handle: ClusterHandle) -> set[str]:
    return {m.endpoint.host for m in handle.view().members if m.role == "shard"}


def added_hosts() -> set[str]:
    """Nodes beside the head, where this process is."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {host_label()}


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not found():
        assert time.monotonic() < deadline, f"nodes after {SOON_S:g} s: {ray.nodes()}"
        time.sleep(0.2)
