"""The data plane over real Ray: raylets with labels and fake GPUs, failures, no leftovers."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from support.checkpoints import make_checkpoint
from support.local_engine import reference_model

from remora.actors.launch import RAY_NAMESPACE
from remora.actors.model_spec import inspect_model
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    find_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import RemoraConfig, parse_config
from remora.comm.aio import connect_async
from remora.comm.errors import ConfigError, UnsupportedModelError, WeightsError
from remora.comm.messages import (
    Ping,
    Pong,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
    Submit,
    decode_to_ingress,
    encode,
)

PROMPT = [5, 9, 200, 31, 77, 8, 150]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def raylets() -> Iterator[Cluster]:
    """A head and two workers; each worker has one (fake) GPU and a role label."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6})
    for _ in range(2):
        cluster.add_node(num_cpus=2, num_gpus=1, labels={"remora/role": "expert"})
    ray.init(address=cluster.address, namespace=RAY_NAMESPACE, runtime_env=neutral_runtime_env())
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


def config(model: Path, name: str, **sections: Any) -> RemoraConfig:
    data = {
        "name": name,
        "model": str(model),
        "numerics": "exact",
        "executor": "eager",
        "dense": {"num_cpus": 0.5, "threads": 1},
        "experts": {"shards": 2, "num_cpus": 0.5, "threads": 1},
    }
    for section, values in sections.items():
        data[section] = data[section] | values  # type: ignore[operator]
    return parse_config(data)


def alive_actors(deployment: str) -> list[str]:
    found = list_actors(filters=[("state", "=", "ALIVE")])
    return [a.name for a in found if a.name.startswith(f"remora/{deployment}/")]


def generate(handle: ClusterHandle) -> SequenceOutput:
    """All of one greedy request, as one output."""
    [member] = handle.dense_members()

    async def ask() -> SequenceOutput:
        host = ray.get_runtime_context().get_node_id()
        connection = await connect_async(member.endpoint, handle.token, host)
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        connection.send(encode(Submit(request_id="r", prompt_ids=PROMPT, params=params)))
        tokens: list[int] = []
        async for payload in connection:
            message = decode_to_ingress(payload)
            assert isinstance(message, StepOutputs)
            [output] = message.outputs
            tokens += output.token_ids
            if output.finish_reason is not None:
                break
        await connection.close()
        return SequenceOutput(
            request_id="r",
            token_ids=tokens,
            finish_reason=output.finish_reason,
            error=output.error,
        )

    return asyncio.run(ask())


def pong(handle: ClusterHandle) -> Pong:
    [member] = handle.dense_members()

    async def ask() -> Pong:
        host = ray.get_runtime_context().get_node_id()
        connection = await connect_async(member.endpoint, handle.token, host)
        connection.send(encode(Ping(7)))
        async for payload in connection:
            message = decode_to_ingress(payload)
            assert isinstance(message, Pong) and message.nonce == 7
            break
        await connection.close()
        return message

    return asyncio.run(ask())


def reference_tokens(model: Path) -> list[int]:
    import torch

    found = reference_model(model, torch.float32).generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def test_shards_go_where_gpus_and_labels_are(raylets: Cluster, model: Path) -> None:
    settings = config(model, "placed", experts={"num_gpus": 1, "labels": {"remora/role": "expert"}})
    handle = ensure_cluster(settings)
    try:
        view = handle.view()
        node_of = {m.uid: m.endpoint.host for m in view.members}
        workers = {n["NodeID"] for n in ray.nodes() if n["Labels"].get("remora/role") == "expert"}
        assert {node_of["shard-0"], node_of["shard-1"]} == workers, (node_of, workers)
        assert node_of["dense-0"] not in workers, "the dense rank asked for no GPU and no label"
        assert generate(handle).token_ids == reference_tokens(model)
    finally:
        stop_cluster("placed")
    assert alive_actors("placed") == []


def test_ensure_adopts_what_runs_and_refuses_another_model(raylets: Cluster, model: Path) -> None:
    first = ensure_cluster(config(model, "adopted"))
    try:
        second = ensure_cluster(config(model, "adopted"))
        assert second.view().view_hash == first.view().view_hash
        manifest = ray.get(second.coordinator.manifest.remote())
        spec = inspect_model(model)
        assert set(manifest.by_expert()) == {
            (layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)
        }
        assert second.token == first.token
        with pytest.raises(ConfigError, match="already serves"):
            ensure_cluster(config(model.parent, "adopted"))
        assert generate(second).token_ids == reference_tokens(model), "it still serves"
    finally:
        stop_cluster("adopted")
    assert find_cluster("adopted") is None


def test_two_deployments_stand_beside_each_other(raylets: Cluster, model: Path) -> None:
    one, other = ensure_cluster(config(model, "one")), ensure_cluster(config(model, "other"))
    try:
        stop_cluster("one")
        assert generate(other).token_ids == reference_tokens(model)
    finally:
        stop_cluster("other")
    assert one.token != other.token


def test_bad_weights_fail_the_start_by_name_and_leave_nothing(
    raylets: Cluster, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    victim = sorted(broken.glob("*.safetensors"))[3]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=victim.name):
        ensure_cluster(config(broken, "broken"))
    assert alive_actors("broken") == []


def test_an_unservable_architecture_is_refused_at_start(raylets: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match="mamba"):
        ensure_cluster(config(tmp_path, "mamba"))
    assert alive_actors("mamba") == []


def test_a_killed_shard_ends_requests_with_an_error_that_names_it(
    raylets: Cluster, model: Path
) -> None:
    handle = ensure_cluster(config(model, "killed"))
    try:
        assert generate(handle).finish_reason == "length"
        assert pong(handle).serving
        victim = next(m for m in handle.view().members if m.uid == "shard-1")
        ray.kill(ray.get_actor(victim.actor_name, namespace=RAY_NAMESPACE))
        lost = generate(handle)
        assert lost.finish_reason == "error"
        assert lost.error is not None and "shard-1" in lost.error
        answer = pong(handle)
        assert not answer.serving and answer.why_not is not None and "shard-1" in answer.why_not
        assert cluster_status("killed")["members"]["shard-1"]["alive"] is False
    finally:
        stop_cluster("killed")
    assert alive_actors("killed") == []
