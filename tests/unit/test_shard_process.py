"""The process of a shard that joins: light until it is told to start, serving at full priority."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.imports import HEAVY, imported_at_once
from support.local_cluster import LocalCluster

from remora.actors import draft, expert_actor, model_spec
from remora.actors.model_spec import ModelSpec
from remora.actors.shard_process import ShardProcess


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    found = LocalCluster(path, num_shards=1, dtype="float32", exact=True, num_slots=8)
    yield found
    found.close()


def test_nothing_heavy_is_imported_before_the_process_is_told_to_start() -> None:
    at_once = imported_at_once("remora.actors.shard_process")
    assert "remora.comm.view" in at_once, "the walk sees imports of imports"
    assert not at_once & HEAVY
    assert imported_at_once("remora.actors.expert_actor") & HEAVY, "the walk would see them"


def test_a_joiner_loads_idle_and_serves_at_normal_priority(cluster: LocalCluster) -> None:
    launch = msgspec.structs.replace(
        cluster.shard_launch("shard-0", cluster.view.placement), uid="shard-1", load_idle=True
    )
    process = ShardProcess(launch)
    assert process.progress().phase == process.status()["phase"] == "starting"
    assert process.host_memory().slot == 0, "it does not know yet"
    try:
        facts = process.join()
        assert process.host_memory().slot == process.status()["weights_bytes"] // 8
        assert facts.manifest == cluster.shards[0].facts().manifest
        threads = {thread.name: thread.native_id for thread in threading.enumerate()}
        serving = threads["remora-shard-1"]
        assert serving is not None
        assert os.sched_getscheduler(serving) == os.SCHED_BATCH
        assert process.status()["phase"] == process.progress().phase == "ready"
        ended = threading.Thread(target=process.until_end)
        ended.start()
    finally:
        process.stop()
    ended.join(30)
    assert not ended.is_alive()


@pytest.mark.parametrize("looked_before", [True, False])
def test_one_that_is_begun_before_it_is_told_looks_once(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, looked_before: bool
) -> None:
    launch = cluster.shard_launch("shard-0", cluster.view.placement)
    look, looks = model_spec.inspect_model, []

    def noted(path: str) -> ModelSpec:
        looks.append(os.sched_getscheduler(0))
        return look(path)

    monkeypatch.setattr(model_spec, "inspect_model", noted)
    monkeypatch.setattr(expert_actor, "inspect_model", noted)
    process = ShardProcess()
    if looked_before:
        process.warm_up(launch.model, idle=False)
    try:
        assert process.join(launch).manifest == cluster.shards[0].facts().manifest
        assert len(looks) == 1
        assert os.SCHED_IDLE not in looks, "requests wait for it"
    finally:
        process.stop()


def test_what_is_stopped_before_it_started_has_ended(cluster: LocalCluster) -> None:
    process = ShardProcess(cluster.shard_launch("shard-0", cluster.view.placement))
    process.stop()
    process.until_end()


def test_a_standby_becomes_the_shard_that_it_is_told_to_be(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = cluster.shard_launch("shard-0", cluster.view.placement)
    process = ShardProcess()
    seen = process.warm_up(launch.model)
    assert process.status()["phase"] == "starting", "it holds nothing, and serves nobody"
    spec = process._spec
    assert spec is not None and spec.config is not None
    assert seen == dataclasses.replace(spec, config=None), "without what only transformers reads"
    try:
        told = msgspec.structs.replace(
            launch, uid="shard-7", incarnation=4, load_idle=True, process_name="remora/standby"
        )
        monkeypatch.setattr(draft, "draft_model", None)  # it has made one
        facts = process.join(told)
        assert process._actor is not None
        known = process._actor._known
        assert known.spec is spec, "looked at once"
        assert (facts.member.uid, facts.member.incarnation) == ("shard-7", 4)
        assert facts.member.actor_name == "remora/standby"
        assert facts.manifest == cluster.shards[0].facts().manifest
    finally:
        process.stop()
