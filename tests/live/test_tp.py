"""Tensor-parallel dense groups as Ray actors: two groups of two ranks over the same two shards."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from support.checkpoints import make_checkpoint
from support.dense_client import NUM_TOKENS, PROMPT, ask_member
from support.local_engine import reference_model
from support.programs import benchmarks_on_path, program
from support.ray_actors import living_names, process_of

from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "olmoe")


def data(model: Path) -> dict[str, Any]:
    small = {"num_cpus": 0.5, "threads": 1}
    return {
        "name": "tp",
        "model": str(model),
        "executor": "eager",
        "dense": small | {"groups": 2, "tensor_parallel": 2},
        "experts": small | {"shards": 2, "call_timeout_s": 10},
    }


def test_groups_serve_and_all_ranks_come_back_when_one_is_killed(
    one_ray: None, model: Path
) -> None:
    found = reference_model(model, torch.float32).generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    expected = found[0, len(PROMPT) :].tolist()
    with benchmarks_on_path():
        streams = program("live_streams")
    handle = ensure_cluster(parse_config(data(model)))
    try:
        first, second = handle.dense_members()
        assert [m.uid for m in (first, second)] == ["dense-0", "dense-1"]
        assert ask_member(handle, first).token_ids == expected
        assert ask_member(handle, second).token_ids == expected
        members = cluster_status("tp")["members"]
        assert {"dense-0", "dense-0.1", "dense-1", "dense-1.1"} <= members.keys()
        assert members["dense-0.1"]["steps_total"] == members["dense-0"]["steps_total"] > 0
        assert "tp=2" in members["dense-0"]["fingerprint"]
        groups = ray.util.placement_group_table().values()
        placed = [g for g in groups if g["state"] == "CREATED"]
        assert sorted(g["name"] for g in placed) == ["remora/tp/dense-0#1", "remora/tp/dense-1#1"]

        os.kill(process_of("remora/tp/dense-0.1#1"), signal.SIGKILL)
        assert ask_member(handle, second).token_ids == expected, "the other group goes on"
        assert asyncio.run(streams.over(handle, "restore-dense-0.2"))["outcome"] == "done"
        again, _ = handle.dense_members()
        assert (again.uid, again.incarnation) == ("dense-0", 2)
        assert ask_member(handle, again).token_ids == expected
        members = cluster_status("tp")["members"]
        assert members["dense-0.1"]["alive"] and members["dense-0.1"]["incarnation"] == 2
    finally:
        stop_cluster("tp")
    assert not living_names("tp")
    assert all(g["state"] == "REMOVED" for g in ray.util.placement_group_table().values())


@pytest.mark.long
def test_requests_are_held_while_a_shard_without_replicas_is_restored(
    live: Any, tmp_path: Path
) -> None:
    """Its experts are nowhere else: streams wait, no token differs, no request fails."""
    once = {"slots": None, "call_timeout_s": 10}
    config = live.deployment("tp", experts=once, elastic={"log_dir": str(tmp_path)})
    dense = config.dense.model_copy(update={"tensor_parallel": 2})
    config = config.model_copy(update={"dense": dense})
    handle = ensure_cluster(config)
    try:
        asyncio.run(a_shard_dies(live, config, handle))
    finally:
        stop_cluster("tp")
    assert not living_names("tp")


async def a_shard_dies(live: Any, config: RemoraConfig, handle: ClusterHandle) -> None:
    async with live.flowing(config, handle) as streams:
        slots = handle.view().placement.slots
        assert not {*slots["shard-0"][0]} & {*slots["shard-1"][0]}, "there are no replicas"
        await live.strike("remora/tp/shard-1#1", signal.SIGKILL)
        assert (await live.over(handle, "restore-shard-1.2"))["outcome"] == "done"
        await streams.one_more()
        members = await asyncio.to_thread(cluster_status, "tp")
        assert members["members"]["dense-0.1"]["incarnation"] == 1, "no rank has failed"
    assert streams.failed == [] and streams.num_different == 0 and streams.num_done > 0
