"""The process of a dense group that joins: light until told to start, serving at full priority."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.imports import HEAVY, imported_at_once
from support.local_cluster import LocalCluster

from remora.actors import dense_load, draft
from remora.actors.dense_model import build_dense
from remora.actors.dense_process import DenseProcess
from remora.actors.draft import draft_model
from remora.actors.model_spec import inspect_model
from remora.comm import plan
from remora.comm.routing_counter import RoutingCounter


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    found = LocalCluster(path, num_shards=1, dtype="float32", exact=True)
    yield found
    found.close()


def test_nothing_heavy_is_imported_before_the_process_is_told_to_start() -> None:
    at_once = imported_at_once("remora.actors.dense_process")
    assert "remora.actors.dense_launch" in at_once and not at_once & HEAVY
    assert imported_at_once("remora.actors.dense_actor") & HEAVY, "the walk would see them"


def test_a_joiner_loads_idle_and_serves_at_normal_priority(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, policies = dense_load.build_dense, []

    def noted(*args: object, **kwargs: object) -> object:
        policies.append(os.sched_getscheduler(0))
        return build(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dense_load, "build_dense", noted)
    process = DenseProcess(cluster.launch(uid="dense-1", load_idle=True))
    assert process.progress().phase == process.status()["phase"] == "starting"
    try:
        assert process.start().uid == "dense-1"
        threads = {thread.name: thread.native_id for thread in threading.enumerate()}
        serving = threads["remora-dense-1"]
        assert serving is not None
        assert (policies, os.sched_getscheduler(serving)) == ([os.SCHED_IDLE], os.SCHED_OTHER)
        assert process.adopt_view(cluster.view) == cluster.view.view_hash
        assert process.status()["phase"] == "ready" and process.heartbeat()[1] == 0
        ended = threading.Thread(target=process.until_end)
        ended.start()
    finally:
        process.stop()
    ended.join(30)
    assert not ended.is_alive()


def test_a_standby_becomes_the_group_that_it_is_told_to_be(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = cluster.launch(uid="dense-7", incarnation=4, process_name="remora/standby")
    process = DenseProcess()
    compiled: list[object] = []
    monkeypatch.setattr(plan, "warm", lambda: compiled.append(plan))
    monkeypatch.setattr(RoutingCounter, "warm", lambda counter: compiled.append(counter.moe_layers))
    process.warm_up(launch.model)
    assert compiled == [plan, cluster.spec.moe_layers], "numba's code comes in advance, too"
    monkeypatch.setattr(dense_load, "inspect_model", None)  # it has looked
    monkeypatch.setattr(draft, "draft_model", None)
    assert process.status()["phase"] == "starting", "it holds nothing, and serves nobody"
    try:
        member = process.start(msgspec.structs.replace(launch, load_idle=True))
        assert (member.uid, member.incarnation) == ("dense-7", 4)
        assert member.actor_name == "remora/standby"
        assert process.adopt_view(cluster.view) == cluster.view.view_hash
    finally:
        process.stop()


LOADS = """
import re
import sys
from remora.actors import dense_actor
from remora.actors.draft import draft_model
from remora.actors.dense_model import build_dense
from remora.actors.model_spec import inspect_model, resolve_dtype

spec = inspect_model(sys.argv[1])
dtype, draft = resolve_dtype(spec, "auto"), None
if sys.argv[2] == "drafted":
    draft = draft_model(sys.argv[1], spec, dtype)
compile, patterns = re._compiler.compile, []
re._compiler.compile = lambda *args: patterns.append(args) or compile(*args)
build_dense(sys.argv[1], spec, dtype=dtype, exact=True, draft=draft)
print(len(patterns))
"""


@pytest.mark.long
def test_who_has_a_draft_loads_without_compiling_the_conversions(cluster: LocalCluster) -> None:
    counts = {}
    for how in ("drafted", "at once"):
        arguments = [sys.executable, "-c", LOADS, str(cluster.launch().model), how]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
        counts[how] = int(done.stdout.split()[-1])
    assert counts["drafted"] < 10 and counts["at once"] > 100, counts


def test_a_draft_is_of_files_as_they_were(tmp_path: Path) -> None:
    path, other = (make_checkpoint(tmp_path / name, "qwen3_moe") for name in ("one", "other"))
    spec, dtype = inspect_model(path), torch.float32
    drafted = draft_model(path, spec, dtype)
    assert drafted.is_of(str(path), dtype)
    assert not drafted.is_of(path, torch.bfloat16)
    assert not drafted.is_of(other, dtype)
    build = partial(build_dense, path, spec, dtype=dtype, exact=True)
    assert build(draft=drafted).model is drafted.model
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes())  # for all we know, others
    os.utime(file, ns=(0, 0))
    assert not drafted.is_of(path, dtype)
    assert build(draft=drafted).model is not drafted.model


def test_what_is_stopped_before_it_started_has_ended(cluster: LocalCluster) -> None:
    process = DenseProcess(cluster.launch())
    process.stop()
    process.until_end()
