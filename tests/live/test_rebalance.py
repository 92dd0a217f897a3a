"""The whole loop on two hosts: dense groups count, the router plans, experts move."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.serving import DEMO_MODEL

from remora.actors.launch import RAY_NAMESPACE
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.connect import connected_service
from remora.cluster.decision_log import DecisionLog
from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.operation_plan import same_slots
from remora.cluster.placement_file import read_placement
from remora.cluster.rebalance_report import report_text
from remora.cluster.rebalancer import LATEST
from remora.cluster.sse import collect
from remora.comm.errors import ClusterError

SOON_S = 120.0
TEXTS = [
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, x):\n",
    "import os\nimport sys\n\nif __name__ == '__main__':\n    print(os.listdir('.'))\n",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    """Two nodes that have room for a shard each."""
    room = {"shard": 1}
    head = {"num_cpus": 4, "resources": room, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, resources=room)
    ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def config(state: Path, **experts: Any) -> RemoraConfig:
    small = {"num_cpus": 0.5, "threads": 1}
    return parse_config(
        {
            "name": "balanced",
            "model": str(DEMO_MODEL),
            "numerics": "exact",
            "executor": "eager",
            "dense": {**small, "max_model_len": 256, "prefix_caching": False},
            "experts": {**small, "shards": 2, "resources": {"shard": 1}, "slots": 20, **experts},
            "router": {
                "report_every_s": 0.2,
                "state_dir": str(state),
                "rebalance": {"tokens_min": 300, "horizon_tokens": 1e9, "gain_min": 0.01},
            },
        }
    )


async def texts_of(settings: RemoraConfig, handle: ClusterHandle) -> list[str]:
    """Greedy continuations; and the router has heard of their tokens."""
    service = await connected_service(settings, handle)
    try:
        found = []
        for text in TEXTS * 4:
            request = CompletionRequest.model_validate(
                {"prompt": text, "temperature": 0, "max_tokens": 24}
            )
            answer = await collect(*await service.completion(request), None)
            assert answer is not None
            found.append(answer["choices"][0]["text"])
        async with asyncio.timeout(SOON_S):
            while True:
                status = await asyncio.to_thread(cluster_status, settings.name)
                if status["router"]["statistics"]["tokens"] > 400:
                    return found
                await asyncio.sleep(0.1)
    finally:
        await service.close()


@pytest.mark.long
def test_what_is_planned_serves_at_once_and_after_the_next_start(
    hosts: Cluster, tmp_path: Path
) -> None:
    first = config(tmp_path)
    handle = ensure_cluster(first)
    try:
        with pytest.raises(ClusterError, match="tokens were reported"):
            handle.rebalance("look", dry_run=True)
        before = asyncio.run(texts_of(first, handle))
        shown = handle.rebalance("look", dry_run=True)
        assert not (tmp_path / LATEST).exists()
        assert shown["copies_after"] < shown["copies_before"], shown
        assert shown["moves"] and "layer" in report_text(shown)
        done = handle.rebalance("move", dry_run=False)
        operation = handle.over("move")
        assert done["verdict"] == "move" and done["written"] == str(tmp_path / LATEST)
        planned = read_placement(tmp_path / LATEST)
        assert same_slots(handle.view().placement.slots, planned.slots)
        assert handle.view().epoch > 1
        assert handle.rebalance("move", dry_run=False)["operation"] == operation
        assert operation["moved"] == done["moved_experts"] > 0
        assert asyncio.run(texts_of(first, handle)) == before, "exact: moving changes nothing"
        gauges = handle.exchange(None)
        assert gauges["remora_rebalance_predicted_gain_ratio"] == done["predicted_gain_ratio"] > 0
    finally:
        stop_cluster("balanced")

    second = config(tmp_path, placement="latest")
    handle = ensure_cluster(second)
    try:
        assert handle.view().placement.slots == planned.slots
        status = cluster_status("balanced")["router"]
        assert status["statistics"]["tokens"] > 400, "they outlived the router"
        assert asyncio.run(texts_of(second, handle)) == before, "exact: placement changes nothing"
        [line] = [line for line in DecisionLog(tmp_path).lines() if line["verdict"] == "move"]
        assert line["moved_experts"] == done["moved_experts"]
    finally:
        stop_cluster("balanced")
