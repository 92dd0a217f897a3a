"""What actors are told: threads shared out, bounds of `exact`, lengths that the model knows."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from support.checkpoints import make_checkpoint

from remora.actors.model_spec import inspect_model
from remora.cluster.config import RemoraConfig, parse_config
from remora.cluster.launch import (
    copies_of,
    dense_launch,
    dense_options,
    dense_threads,
    placement_of,
    shard_launch,
    shard_threads,
)
from remora.cluster.local_ray import check_room
from remora.cluster.memory_plan import plan_deployment, plan_text
from remora.comm.errors import ConfigError
from remora.kernels.experts_dtype import ExpertsDtype


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    config = parse_config({"model": "m", "experts": {"shards": 4}})
    assert (dense_threads(config), shard_threads(config)) == (16, 4)
    asked = parse_config({"model": "m", "dense": {"threads": 3}, "experts": {"threads": 5}})
    assert (dense_threads(asked), shard_threads(asked)) == (3, 5)


@pytest.mark.parametrize(
    ("cpus", "alive", "expected"),
    [
        ([8.0, 8.0], [True, True], (8, 4)),  # a group and two of four shards on each
        ([0.0, 8.0, 8.0, 8.0, 8.0], [True] * 5, (8, 8)),  # a head that computes nothing
        ([8.0, 8.0], [True, False], (8, 2)),
        ([64.0], [True], (16, 4)),  # Ray was told of more than this machine has
        ([6.0], [True], (6, 1)),  # a container's limit
        ([0.0], [True], (16, 4)),  # nobody has come yet
    ],
)
def test_cores_are_those_of_rays_nodes(
    monkeypatch: pytest.MonkeyPatch,
    cpus: list[float],
    alive: list[bool],
    expected: tuple[int, int],
) -> None:
    nodes = [{"Alive": a, "Resources": {"CPU": c}} for c, a in zip(cpus, alive, strict=True)]
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    config = parse_config({"model": "m", "experts": {"shards": 4}})
    assert (dense_threads(config), shard_threads(config)) == expected


def test_exact_takes_no_more_threads_than_it_can_promise_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert dense_threads(parse_config({"model": "m", "numerics": "exact"})) == 2
    asked = parse_config({"model": "m", "numerics": "exact", "experts": {"threads": 3}})
    with pytest.raises(ConfigError, match=r"experts\.threads = 3: exact numerics allow at most 2"):
        shard_threads(asked)


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.5, 0.55), ("int4", 0.25, 0.28)])
def test_quantised_experts_want_bfloat16_rows(
    kind: ExpertsDtype, least: float, most: float, tmp_path: Path
) -> None:
    spec = inspect_model(make_checkpoint(tmp_path, "qwen3_moe"))
    asked = {"model": str(tmp_path), "experts_dtype": kind}
    with pytest.raises(ConfigError, match=f"experts_dtype = {kind}: .* served in float32"):
        placement_of(parse_config(asked), spec)
    config = parse_config(asked | {"dtype": "bfloat16"})
    placement = placement_of(config, spec)
    assert shard_launch(config, "shard-0", placement, b"t" * 32).experts_dtype == kind
    plan = plan_deployment(config)
    assert plan["experts_dtype"] == kind
    plain = plan_deployment(parse_config({"model": str(tmp_path), "dtype": "bfloat16"}))
    ratio = plan["shards"]["shard-0"]["weights_bytes"] / plain["shards"]["shard-0"]["weights_bytes"]
    assert least < ratio < most


def test_second_copies_have_slots_of_whole_experts_and_are_planned_with(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    spec = inspect_model(path)
    each_mib = len(spec.moe_layers) * spec.expert_nbytes(torch.float32) / (1 << 20)

    def having(mib: float, **more: Any) -> RemoraConfig:
        elastic = {"dram_copies_mib": mib}
        return parse_config({"model": str(path), "dtype": "float32", "elastic": elastic, **more})

    assert copies_of(having(0), spec) == 0 and copies_of(having(3.5 * each_mib), spec) == 3
    assert copies_of(having(1000 * each_mib), spec) == spec.num_experts
    with pytest.raises(ConfigError, match=r"one expert of each layer takes .* MiB; allowed"):
        copies_of(having(0.9 * each_mib), spec)
    with pytest.raises(ConfigError, match=r"elastic\.dram_copies_mib = 1\.0 with .* nccl"):
        having(1, experts={"transport": "nccl", "num_gpus": 1}, dense={"num_gpus": 1})
    config = having(2 * each_mib)
    shard = plan_deployment(config)["shards"]["shard-0"]
    assert shard["second_copies_bytes_max"] == pytest.approx(2 * each_mib * (1 << 20))
    assert "second copies up to" in plan_text(plan_deployment(config))
    assert "second copies" not in plan_text(plan_deployment(having(0)))
    placement = placement_of(config, spec)
    assert shard_launch(config, "shard-0", placement, b"t" * 32, num_copies=2).num_copies == 2


def test_a_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    spec = inspect_model(path)
    config = parse_config({"model": str(path), "dense": {"max_model_len": 513}})
    with pytest.raises(ConfigError, match=r"max_model_len = 513.*up to 512"):
        dense_launch(config, "dense-0", spec, b"t" * 32)
    fits = parse_config({"model": str(path), "dense": {"max_model_len": 100}})
    assert dense_launch(fits, "dense-0", spec, b"t" * 32).max_model_len == 100


def test_an_own_ray_cluster_is_asked_for_no_more_than_the_machine_has() -> None:
    """Nobody would ever give those actors a place."""
    config = parse_config({"model": "m", "experts": {"shards": 3, "num_cpus": 0.5}})
    check_room(config, {"CPU": 2.5})
    with pytest.raises(ConfigError, match=r"ask for 2\.5 CPU of Ray, this machine has 2"):
        check_room(config, {"CPU": 2})
    ranks = parse_config(
        {
            "model": "m",
            "dense": {"tensor_parallel": 4},
            "elastic": {"warm_standby": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"4 dense rank\(s\) and 3 .* 7 CPU of Ray, .* has 6"):
        check_room(ranks, {"CPU": 6})
    gpus = parse_config({"model": "m", "experts": {"num_gpus": 1}})
    with pytest.raises(ConfigError, match=r"2 GPU of Ray, this machine has 0.*num_gpus"):
        check_room(gpus, {"CPU": 64})
    other = parse_config({"model": "m", "dense": {"resources": {"fast": 0.5}}})
    with pytest.raises(ConfigError, match=r"0\.5 fast"):
        check_room(other, {"CPU": 64})


def test_labels_and_resources_reach_ray() -> None:
    config = parse_config(
        {
            "model": "m",
            "dense": {"labels": {"role": "dense"}, "resources": {"fast": 0.5}, "num_gpus": 1},
        }
    )
    options = dense_options(config)
    assert options["label_selector"] == {"role": "dense"}
    assert (options["resources"], options["num_gpus"]) == ({"fast": 0.5}, 1)
    assert options["lifetime"] == "detached" and options["max_restarts"] == 0
