"""What a pod with expert shards runs before it ends, on a deployment over two Ray nodes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support.ray_actors import living_actors
from support.serving import DEMO_MODEL

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bootstrap import (
    ClusterHandle,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import parse_config
from remora.cluster.node_drain import shard_uids

pytestmark = pytest.mark.live
NAME = "drained"


@pytest.fixture
def hosts() -> Iterator[Cluster]:
    """Two nodes that have room for a shard each."""
    room = {"shard": 1}
    # Ray lists actors through its dashboard; None: on any port, others may run one here
    head = {"num_cpus": 4, "resources": room, "include_dashboard": True, "dashboard_port": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, resources=room)
    ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def handle(hosts: Cluster, tmp_path: Path) -> Iterator[ClusterHandle]:
    small = {"num_cpus": 0.5, "threads": 1}
    config = parse_config(
        {
            "name": NAME,
            "model": str(DEMO_MODEL),
            "executor": "eager",
            "dense": {**small, "max_model_len": 256},
            "experts": {**small, "shards": 2, "slots": 32, "resources": {"shard": 1}},
            "elastic": {"log_dir": str(tmp_path)},
        }
    )
    yield ensure_cluster(config)
    stop_cluster(NAME)


def shards_of(node_id: str) -> list[str]:
    """Uids of the shards that Ray says live on a node."""
    actors = living_actors(("node_id", "=", node_id))
    return shard_uids((actor.name for actor in actors if actor.name), NAME)


def test_a_node_is_drained_and_only_then_safe(hosts: Cluster, handle: ClusterHandle) -> None:
    here = shards_of(ray.get_runtime_context().get_node_id())
    assert len(here) == 1, "a shard a node"

    first = run_hook(hosts.address)
    assert first.returncode == 0, first.stderr
    assert f"preStop: safe to delete: {here[0]}" in first.stderr
    view = handle.view()
    left = [member.uid for member in view.members if member.role == "shard"]
    assert len(left) == 1 and left != here
    assert set(view.placement.slots) == set(left)

    second = run_hook(hosts.address)
    assert second.returncode == 0, second.stderr
    assert "there was nothing to drain" in second.stderr


def run_hook(address: str) -> subprocess.CompletedProcess[str]:
    """The hook as a pod runs it: from no checkout, with its Ray cluster in the environment."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "RAY_ADDRESS": address,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [sys.executable, "-m", "remora.cluster.node_drain", NAME, "--within-s", "120"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
