"""The data plane over real Ray: raylets with labels and fake GPUs, failures, no leftovers."""

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors
from support.checkpoints import make_checkpoint
from support.dense_client import NUM_TOKENS, PROMPT, ask_member
from support.local_engine import reference_model
from support.ray_actors import living_names

from remora.actors.launch import RAY_NAMESPACE, Progress, actor_name, coordinator_name
from remora.actors.model_spec import inspect_model
from remora.cluster import bootstrap
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    ensure_cluster,
    find_cluster,
    neutral_runtime_env,
    stop_cluster,
)
from remora.cluster.config import ElasticConfig, RemoraConfig, parse_config
from remora.cluster.placement_file import write_placement
from remora.comm.aio import connect_async
from remora.comm.errors import ClusterError, ConfigError, UnsupportedModelError, WeightsError
from remora.comm.messages import (
    Ping,
    Pong,
    SequenceOutput,
    decode_to_ingress,
    encode,
)
from remora.comm.view import Placement, contiguous_placement


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


def generate(handle: ClusterHandle) -> SequenceOutput:
    [member] = handle.dense_members()
    return ask_member(handle, member)


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
    settings = config(
        model,
        "placed",
        experts={"num_gpus": 1, "device": "cpu", "labels": {"remora/role": "expert"}},
    )
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
    assert living_names("placed") == []


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
        fast = config(model, "adopted").model_copy(update={"numerics": "fast"})
        with pytest.raises(ConfigError, match="already runs with numerics exact, not fast"):
            ensure_cluster(fast)
        with pytest.raises(ConfigError, match=r"with experts \{'shards': 2\}, not \{'shards': 1"):
            ensure_cluster(config(model, "adopted", experts={"shards": 1}))
        assert generate(second).token_ids == reference_tokens(model), "it still serves"
    finally:
        stop_cluster("adopted")
    assert find_cluster("adopted") is None


def test_tokens_do_not_depend_on_the_placement(
    raylets: Cluster, model: Path, tmp_path: Path
) -> None:
    """Replicas, no two layers alike, and a shard that holds nothing of one layer."""
    spec = inspect_model(model)
    experts = range(spec.num_experts)
    layers = range(len(spec.moe_layers))
    slots = {
        "shard-0": tuple(tuple(e for e in experts if (e + i) % 3 != 1)[::-1] for i in layers),
        "shard-1": tuple(tuple(e for e in experts if (e + i) % 3 != 0) for i in layers),
        "shard-2": tuple(tuple(experts)[i:] if i else () for i in layers),
    }
    placement = Placement(num_experts=spec.num_experts, moe_layers=spec.moe_layers, slots=slots)
    path = tmp_path / "placement.yaml"
    write_placement(path, placement)
    asked = {"shards": 3, "placement": str(path), "slots": spec.num_experts}
    handle = ensure_cluster(config(model, "scattered", experts=asked))
    try:
        assert handle.view().placement == placement
        assert generate(handle).token_ids == reference_tokens(model)
        shards = cluster_status("scattered")["members"]
        assert shards["shard-2"]["experts_per_layer"][0] == 0
        assert all(shards[uid]["calls_served"] for uid in ("shard-0", "shard-1", "shard-2"))
        write_placement(
            path, contiguous_placement(num_experts=2, moe_layers=(0,), shard_uids=("shard-0",))
        )
        with pytest.raises(ConfigError, match="num_experts = 2: the model has"):
            ensure_cluster(config(model, "misfit", experts=asked))
    finally:
        stop_cluster("scattered")
    assert living_names("scattered") == living_names("misfit") == []


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
    assert living_names("broken") == []


def test_what_finds_no_place_fails_in_time_and_says_what_it_asked_for(
    raylets: Cluster, model: Path
) -> None:
    asked = config(model, "placeless", experts={"num_gpus": 3, "labels": {"remora/role": "x"}})
    with pytest.raises(ClusterError) as caught:
        ensure_cluster(asked.model_copy(update={"start_timeout_s": 15.0}))
    message = str(caught.value)
    assert "start_timeout_s = 15" in message
    assert "shard-0, shard-1 found no place (each asks for 0.5 CPU, 3 GPU" in message
    assert "remora/role=x" in message and "2 node(s) of 2 CPU, 1 GPU" in message
    assert find_cluster("placeless") is None
    assert living_names("placeless") == []


def test_a_start_can_be_stopped(raylets: Cluster, model: Path) -> None:
    asked = config(model, "halted", experts={"num_gpus": 3})
    starting = threading.Event()
    num_callers = bootstrap.COORDINATOR_THREADS + 2  # ingresses that wait for the same start
    with ThreadPoolExecutor(num_callers) as pool:
        starts = [
            pool.submit(ensure_cluster, asked, lambda loading: loading and starting.set())
            for _ in range(num_callers)
        ]
        assert starting.wait(60)
        stop_cluster("halted")
        for start in starts:
            with pytest.raises(ClusterError, match=r"has been stopped|coordinator died"):
                start.result(timeout=60)
    assert find_cluster("halted") is None
    assert living_names("halted") == []


@pytest.mark.long
def test_a_coordinator_that_hangs_in_its_first_start_is_ended_and_leaves_nothing(
    raylets: Cluster, model: Path
) -> None:
    """Nobody serves yet who would look after it but those that wait for it."""
    name = "frozen"
    asked = config(model, name, experts={"num_gpus": 3})  # its shards find no place
    asked = asked.model_copy(update={"elastic": ElasticConfig(hang_s=5.0)})
    loading = threading.Event()

    def look(progress: dict[str, Progress]) -> None:
        if "dense-0" in progress and progress["dense-0"].phase == "ready":
            loading.set()

    def names() -> list[str]:
        every = [each["name"] for each in list_named_actors(all_namespaces=True)]
        return [each for each in every if each.startswith(f"remora/{name}/")]

    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(ensure_cluster, asked, look) for _ in range(2)]
        assert loading.wait(120)
        assert actor_name(name, "dense-0", 1) in names()
        actor: Any = ray.get_actor(coordinator_name(name), namespace=RAY_NAMESPACE)
        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGSTOP)
        for start in starts:
            with pytest.raises(ClusterError, match="coordinator died"):
                start.result(timeout=300)
    assert find_cluster(name) is None
    assert names() == []
    handle = ensure_cluster(config(model, name))
    try:
        assert generate(handle).finish_reason == "length"
    finally:
        stop_cluster(name)


def test_two_callers_share_a_failure_and_the_name_is_free_again(
    raylets: Cluster, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    victim = sorted(broken.glob("*.safetensors"))[3]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    asked = config(broken, "shared")
    with ThreadPoolExecutor(2) as pool:
        failures = [pool.submit(ensure_cluster, asked).exception(timeout=120) for _ in range(2)]
    assert all(isinstance(f, WeightsError | ClusterError) for f in failures), failures
    assert living_names("shared") == []
    victim.write_bytes(whole)
    handle = ensure_cluster(asked)
    try:
        assert generate(handle).finish_reason == "length"
    finally:
        stop_cluster("shared")


def test_a_failed_coordinator_that_was_left_behind_is_replaced(
    raylets: Cluster, model: Path, tmp_path: Path
) -> None:
    """Its maker may die before it could remove it."""
    asked = config(model, "left")
    bad = asked.model_copy(update={"model": str(tmp_path)})
    left = bootstrap._coordinator(bad)
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(left.deploy.remote())
    assert ray.get(left.status.remote())["phase"] == "failed"
    handle = ensure_cluster(asked)
    try:
        assert generate(handle).finish_reason == "length"
    finally:
        stop_cluster("left")


def test_an_address_that_cannot_be_bound_is_told_with_who_wants_it(
    raylets: Cluster, model: Path
) -> None:
    asked = config(model, "unbound").model_copy(update={"bind_address": "192.0.2.1"})
    with pytest.raises(ClusterError, match=r"the coordinator.* cannot listen on 192\.0\.2\.1"):
        ensure_cluster(asked)
    assert living_names("unbound") == []


def test_a_log_that_cannot_be_written_is_told_and_leaves_nothing(
    raylets: Cluster, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    asked = config(model, "unlogged")
    asked = asked.model_copy(update={"elastic": ElasticConfig(log_dir=tmp_path / "file")})
    with pytest.raises(ClusterError, match=r"coordinator\.wal: Not a directory"):
        ensure_cluster(asked)
    assert find_cluster("unlogged") is None and living_names("unlogged") == []


def test_more_shards_than_experts_are_refused(raylets: Cluster, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts\.shards = 100: the model has"):
        ensure_cluster(config(model, "many", experts={"shards": 100}))
    assert living_names("many") == []


def test_an_unservable_architecture_is_refused_at_start(raylets: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match="mamba"):
        ensure_cluster(config(tmp_path, "mamba"))
    assert living_names("mamba") == []


def test_requests_of_a_killed_shard_are_held_until_it_is_restored(
    raylets: Cluster, model: Path
) -> None:
    handle = ensure_cluster(config(model, "killed"))
    try:
        expected = generate(handle)
        assert expected.finish_reason == "length" and pong(handle).serving
        victim = next(m for m in handle.view().members if m.uid == "shard-1")
        ray.kill(ray.get_actor(victim.actor_name, namespace=RAY_NAMESPACE))
        held = generate(handle)
        assert (held.finish_reason, held.token_ids) == ("length", expected.token_ids)
        assert pong(handle).serving
        again = next(m for m in handle.view().members if m.uid == "shard-1")
        assert again.incarnation == 2
        status = cluster_status("killed")
        assert status["members"]["shard-1"]["incarnation"] == 2
        assert status["epoch"] == 2 and status["operations"]["lost"] == []
    finally:
        stop_cluster("killed")
    assert living_names("killed") == []
