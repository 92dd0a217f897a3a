"""What a pod runs before it ends, on a deployment over two Ray nodes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support.dense_client import ask_member
from support.serving import DEMO_MODEL

from remora.actors.launch import RAY_NAMESPACE, host_label
from remora.cluster.bootstrap import (
    ClusterHandle,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import parse_config

pytestmark = pytest.mark.live
NAME = "drained"
ROOM = {"shard": 1, "group": 1}


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A node that has room for a dense group and a shard; tests add another one, or say what each
    node has room for."""
    room, *others = getattr(request, "param", [ROOM])
    head = {"num_cpus": 2, "resources": room, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for each in others:
        cluster.add_node(num_cpus=2, resources=each)
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
            "dense": {**small, "max_model_len": 256, "resources": {"group": 1}},
            "experts": {**small, "shards": 1, "resources": {"shard": 1}},
            "elastic": {"log_dir": str(tmp_path)},
        }
    )
    yield ensure_cluster(config)
    stop_cluster(NAME)


def members(handle: ClusterHandle) -> dict[str, str]:
    """Their Ray nodes."""
    return {member.uid: member.endpoint.host for member in handle.view().members}


@pytest.mark.long
def test_a_pod_waits_until_its_members_have_left(hosts: Cluster, handle: ClusterHandle) -> None:
    assert members(handle) == {"dense-0": host_label(), "shard-0": host_label()}
    other = hosts.add_node(num_cpus=2, resources=ROOM)
    first = run_hook(hosts.address)
    assert first.returncode == 0, first.stderr
    assert "preStop: dense-0, shard-0 left this node" in first.stderr
    assert members(handle) == {"dense-1": other.node_id, "shard-1": other.node_id}

    second = run_hook(hosts.address)
    assert second.returncode == 0, second.stderr
    assert "preStop: nothing left this node" in second.stderr


@pytest.mark.long
@pytest.mark.parametrize("hosts", [[{"group": 1}, {"shard": 1}]], indirect=True)
def test_a_pod_with_nowhere_to_go_says_so_at_once(hosts: Cluster, handle: ClusterHandle) -> None:
    """The other node has no room for a dense group, and nobody adds nodes."""
    hook = run_hook(hosts.address)
    assert hook.returncode == 1, hook.stderr
    assert "preStop: dense-0 cannot leave: no place for dense-1" in hook.stderr
    assert "no node that stays has room, and none is added" in hook.stderr
    operation = handle.wait("evacuate-dense-0.1:1")
    assert operation["outcome"] == "failed"
    assert operation["reason"].startswith("no place for dense-1"), "else its time was over"
    assert ask_member(handle, handle.dense_members()[0]).finish_reason == "length", "it serves on"


def run_hook(address: str) -> subprocess.CompletedProcess[str]:
    """The hook as a pod runs it: from no checkout, with its Ray cluster in the environment."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "RAY_ADDRESS": address,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [sys.executable, "-m", "remora.cluster.node_drain", NAME, "--within-s", "280"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
