"""Devices and transports in the configuration: what reaches actors, and what is refused."""

from typing import Any

import pytest
from support.checkpoints import make_checkpoint

from remora.actors.hardware import Hardware
from remora.actors.model_spec import inspect_model
from remora.cluster.config import parse_config
from remora.cluster.launch import dense_launch, placement_of, shard_launch
from remora.comm.errors import ConfigError
from remora.kernels.device import CPU

GPU = {"num_gpus": 1}


@pytest.mark.parametrize(
    ("section", "device"),
    [
        ({}, "cpu"),
        (GPU, "cuda"),
        ({"num_gpus": 0.25}, "cuda"),
        ({"num_gpus": 1, "device": "cpu"}, "cpu"),
        ({"num_gpus": 1, "device": "cuda"}, "cuda"),
    ],
)
def test_auto_is_the_gpu_that_is_asked_for(section: dict[str, Any], device: str) -> None:
    config = parse_config({"model": "m", "dense": section, "experts": section})
    assert config.dense.computes_on == config.experts.computes_on == device


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dense": {"device": "cuda"}}, r"dense\.num_gpus = 0.*dense\.device: cpu"),
        ({"experts": {"device": "cuda"}}, r"experts\.num_gpus = 0.*experts\.device: cpu"),
        ({"dense": GPU, "numerics": "exact"}, r"numerics = exact.*numerics: fast"),
        ({"dense": GPU, "executor": "compiled"}, r"executor = compiled.*auto and eager"),
        ({"experts": GPU, "experts_dtype": "int8"}, r"int8.*experts\.device: cpu"),
        ({"experts": GPU, "experts_dtype": "int4"}, r"int4.*experts\.device: cpu"),
        (
            {"dense": {"num_gpus": 0.5, "tensor_parallel": 2}},
            r"tensor_parallel = 2 with dense\.num_gpus = 0\.5.*at least 1",
        ),
        ({"experts": {"transport": "nccl"}}, r"dense\.device = cpu.*num_gpus: 1.*auto or tcp"),
        ({"dense": GPU, "experts": {"transport": "nccl"}}, r"experts\.device = cpu.*num_gpus: 1"),
        (
            {"dense": GPU, "experts": {"num_gpus": 0.5, "transport": "nccl"}},
            r"experts\.num_gpus = 0\.5.*one for each",
        ),
        (
            {"dense": GPU | {"tensor_parallel": 2}, "experts": GPU | {"transport": "nccl"}},
            r"tensor_parallel = 2.*with nccl it is 1",
        ),
        (
            {
                "dense": GPU,
                "experts": GPU | {"transport": "nccl"},
                "elastic": {"warm_standby": 1},
            },
            r"warm_standby = 1 with experts\.transport = nccl.*allowed is 0",
        ),
        ({"experts": {"device": "tpu"}}, r"experts\.device.*'auto', 'cpu' or 'cuda'"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config({"model": "m", **settings})


def test_it_reaches_the_actors(tmp_path: Any) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    spec = inspect_model(path)
    base = {"model": str(path), "dense": GPU | {"max_num_seqs": 16}}
    config = parse_config(base | {"experts": GPU | {"transport": "nccl", "call_timeout_s": 3}})
    shard = shard_launch(config, "shard-0", placement_of(config, spec), b"t" * 32)
    dense = dense_launch(config, "dense-0", spec, b"t" * 32)
    assert shard.device == dense.device == "cuda" and shard.nccl == dense.nccl
    assert dense.nccl is not None
    assert (dense.nccl.capacity_max, dense.nccl.step_timeout_s, dense.use_unix) == (16, 3.0, True)
    config = parse_config(base | {"experts": GPU})  # rows over sockets
    assert dense_launch(config, "dense-0", spec, b"t" * 32).nccl is None


def test_an_actor_without_its_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"finds no GPU.*num_gpus.*cpu"):
        Hardware.of("cuda")
    assert Hardware.of("cpu").device == CPU
