"""Ray's autoscaler (version 2, pretended nodes): members that find no place have nodes added."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import list_named_actors
from support.autoscaled_ray import autoscaled_ray
from support.serving import DEMO_MODEL

from remora.actors.launch import host_label
from remora.cluster.bootstrap import (
    NEUTRAL_DIR,
    ClusterHandle,
    ensure_cluster,
    stop_cluster,
)
from remora.cluster.config import parse_config
from remora.cluster.operation import ScaleTo

pytestmark = pytest.mark.long

NAME = "grown"
SOON_S = 120.0
ROLE = {"remora/role": "expert"}


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[ClusterHandle]:
    """The head has no room for members: a node has, for a dense group and a shard."""
    host = {
        "resources": {"CPU": 2}, "labels": ROLE, "node_config": {},
        "min_workers": 0, "max_workers": 2,
    }  # fmt: skip
    head: dict[str, Any] = {"resources": {"CPU": 0}, "labels": {}}
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


def test_nodes_come_and_go_with_members(handle: ClusterHandle) -> None:
    first = added_hosts()
    assert len(first) == 1, "a dense group and a shard, on a node that was not there before"
    assert hosts(handle) == first
    up = handle.done("up", ScaleTo(2))
    assert (up["outcome"], up["joiners"]) == ("done", {"shard-1": 1}), up["reason"]
    assert len(added_hosts()) == 2
    assert hosts(handle) == added_hosts()
    # A second node must not take the working directory from under the workers of the first.
    assert set(working_directories()) == {NEUTRAL_DIR}

    down = handle.done("down", ScaleTo(1, retire=("shard-1",)))
    assert (down["outcome"], down["safe_to_delete"]) == ("done", ["shard-1"]), down["reason"]
    until(lambda: added_hosts() == first)
    assert hosts(handle) == first


def hosts(handle: ClusterHandle) -> set[str]:
    return {member.endpoint.host for member in handle.view().members}


def added_hosts() -> set[str]:
    """Nodes beside the head, where this process is."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {host_label()}


def working_directories() -> list[str]:
    """Of the processes of all actors; the kernel adds " (deleted)" to one that is gone."""
    named = list_named_actors(all_namespaces=True)
    assert len(named) == 5, "coordinator, router, dense group, two shards"
    handles = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]
    pids = [ray._private.state.actors(handle._actor_id.hex())["Pid"] for handle in handles]
    return [os.readlink(f"/proc/{pid}/cwd") for pid in pids]


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not found():
        assert time.monotonic() < deadline, f"nodes after {SOON_S:g} s: {ray.nodes()}"
        time.sleep(0.2)
