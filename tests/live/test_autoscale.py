"""Load rises on a real deployment: one scale-up follows, streams go on, and the log replays.

What the autoscaler did is asked over the coordinator's gRPC service, as an operator would.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support.ray_actors import living_names
from support.serving import DEMO_MODEL

from remora.autoscale.decision_lines import replay
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.connect import connected_service
from remora.cluster.ingress import build_app
from remora.cluster.manage_command import status_text
from remora.cluster.openai_schema import CompletionRequest
from remora.cluster.security import ADMIN_KEYS_ENV
from remora.cluster.service import Service
from remora.cluster.sse import collect
from remora.comm import coordinator_pb2 as pb
from remora.comm.coordinator_grpc import DRAIN, GET_OPERATION, GET_STATUS, SCALE, credentials_of
from remora.comm.grpc_base import channel_options, unary_call

SOON_S = 240.0
ADMIN_KEY = "operators-only"
POLICY = {
    "kind": "AutoscalePolicy", "version": 1, "pool": "experts", "mode": "act",
    "targets": {"queue_per_unit": 2},
    "bounds": {"min_units": 2, "max_units": 4, "step_up_max": 1},
    "reactive": {"window_s": 2, "samples_min": 2, "down_window_s": 500},
    "cooldowns": {"up_s": 3600, "down_s": 3600},
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RemoraConfig:
    small = {"num_cpus": 0.5, "threads": 1}
    return parse_config(
        {
            "name": "scaled",
            "model": str(DEMO_MODEL),
            "numerics": "exact",
            "executor": "eager",
            "dense": {**small, "max_model_len": 256, "max_num_seqs": 2},
            "experts": {**small, "shards": 2},
            "autoscale": {
                "policy": POLICY,
                "sample_every_s": 0.5,
                "log_dir": str(tmp_path_factory.mktemp("autoscale")),
            },
        }
    )


@pytest.fixture(scope="module")
def handle(one_ray: None, config: RemoraConfig) -> Iterator[ClusterHandle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_KEYS_ENV, ADMIN_KEY)
        yield ensure_cluster(config)
    stop_cluster(config.name)
    assert living_names(config.name) == []


async def complete(service: Service, number: int) -> str:
    body = CompletionRequest(
        model=None, prompt=f"Once upon a time {number}", max_tokens=60, temperature=0,
        ignore_eos=True,
    )  # fmt: skip
    answer = await collect(*await service.completion(body), None)
    assert answer is not None
    text: str = answer["choices"][0]["text"]
    return text


async def rising_load(config: RemoraConfig, handle: ClusterHandle) -> tuple[list[str], list[str]]:
    """One request at a time, then twelve until a shard has been added; texts before and after."""
    service = await connected_service(config, handle)
    try:
        before = [await complete(service, number) for number in range(3)]
        assert cluster_status(config.name)["autoscale"]["decided"]["up"] == 0

        async def client(number: int) -> None:
            while len(await asyncio.to_thread(shards, handle)) < 3:
                await complete(service, number)

        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*(client(number) for number in range(12)))
        after = [await complete(service, number) for number in range(3)]
        # samples of a pool that is idle again
        async with asyncio.timeout(SOON_S):
            while (await asyncio.to_thread(last, config))["units"] != 3:
                await asyncio.sleep(0.1)
            while service.serving.metrics.coordinator.get("remora_autoscale_units") != 3.0:
                await asyncio.sleep(0.1)
        await over_http(service, config)
        return before, after
    finally:
        await service.close()


async def over_http(service: Service, config: RemoraConfig) -> None:
    """The same deployment by `/v1/ep/*`."""
    transport = httpx.ASGITransport(app=build_app(service))
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://ingress", headers=headers, timeout=60
    ) as client:
        status = (await client.get("/v1/ep/status")).json()
        assert status["autoscale"]["decided"]["up"] == 1
        placement = (await client.get("/v1/ep/placement")).json()
        assert sorted(placement["placement"]["slots"]) == ["shard-0", "shard-1", "shard-2"]
        body = {"operation_id": "same", "placement": placement["placement"]}
        answer = await client.put("/v1/ep/placement", json=body)
        assert answer.json()["reason"] == "it is so already", answer.text
        metrics = (await client.get("/metrics")).text
        assert "remora_autoscale_units 3.0" in metrics and "remora_autoscale_up 1.0" in metrics
        refused = await client.get("/v1/ep/status", headers={"authorization": "Bearer other"})
        assert refused.status_code == 401


def shards(handle: ClusterHandle) -> list[str]:
    return sorted(handle.view().placement.slots)


def last(config: RemoraConfig) -> Any:
    return cluster_status(config.name)["autoscale"]["last"]


def test_one_scale_up_follows_and_the_log_replays(
    config: RemoraConfig, handle: ClusterHandle
) -> None:
    before, after = asyncio.run(rising_load(config, handle))
    assert after == before, "exact: scaling changes no token"
    assert shards(handle) == ["shard-0", "shard-1", "shard-2"]
    status = cluster_status(config.name)
    scaler = status["autoscale"]
    assert scaler["decided"] == {"up": 1, "down": 0, "rebalance": 0}
    assert "autoscale  experts, mode act" in status_text(status)
    with Path(scaler["log"]).open() as lines:
        found = replay(lines)
    assert found.num_differences == 0 and found.decisions > 5
    with grpc.insecure_channel(status["operator"]["address"], options=channel_options()) as channel:
        known: dict[str, Any] = {"timeout": 60.0, "metadata": credentials_of(handle.token)}
        told = unary_call(channel, GET_STATUS)(pb.GetStatusRequest(), **known)
        operation = told.last[0]
        assert operation.operation_id == scaler["action"]["operation_id"]
        assert (operation.outcome, dict(operation.joiners)) == ("done", {"shard-2": 1})
        assert {m.uid for m in told.members if m.alive} >= set(shards(handle))
        with pytest.raises(grpc.RpcError) as caught:
            request = pb.ScaleRequest(operation_id=operation.operation_id, shards=2)
            unary_call(channel, SCALE)(request, **known)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        request = pb.DrainRequest(operation_id="by-hand", uids=["shard-2"])
        done = unary_call(channel, DRAIN)(request, **known)
        while done.outcome == "running":
            request = pb.GetOperationRequest(operation_id="by-hand", wait_s=20)
            done = unary_call(channel, GET_OPERATION)(request, **known)
        assert (done.outcome, list(done.safe_to_delete)) == ("done", ["shard-2"])
    assert shards(handle) == ["shard-0", "shard-1"]
