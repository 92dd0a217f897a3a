"""The data plane over real Ray: raylets with labels and fake GPUs, failures, no leftovers."""

import asyncio
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from remora.comm.errors import ClusterError, ConfigError, RemoraError, WeightsError
from remora.comm.messages import (
    Ping,
    Pong,
    SequenceOutput,
    decode_to_ingress,
    encode,
)
from remora.comm.view import Placement


@pytest.fixture(scope="module")
def raylets() -> Iterator[Cluster]:
    """A head and two workers; each worker has one (fake) GPU and a role label."""
    head = {"num_cpus": 6, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
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


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """What transformers answers to `PROMPT`."""
    import torch

    found = reference_model(model, torch.float32).generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def of_placed(model: Path) -> RemoraConfig:
    asked = {"num_gpus": 1, "device": "cpu", "labels": {"remora/role": "expert"}}
    return config(model, "placed", experts=asked)


@pytest.fixture(scope="module")
def placed(raylets: Cluster, model: Path) -> Iterator[ClusterHandle]:
    """A deployment that several tests use; each leaves it serving."""
    yield ensure_cluster(of_placed(model))
    stop_cluster("placed")
    assert find_cluster("placed") is None and living_names("placed") == []


def test_shards_go_where_gpus_and_labels_are(placed: ClusterHandle, expected: list[int]) -> None:
    node_of = {m.uid: m.endpoint.host for m in placed.view().members}
    workers = {n["NodeID"] for n in ray.nodes() if n["Labels"].get("remora/role") == "expert"}
    assert {node_of["shard-0"], node_of["shard-1"]} == workers, (node_of, workers)
    assert node_of["dense-0"] not in workers, "the dense rank asked for no GPU and no label"
    assert generate(placed).token_ids == expected


def test_ensure_adopts_what_runs_and_refuses_another_model(
    placed: ClusterHandle, model: Path, expected: list[int]
) -> None:
    asked = of_placed(model)
    second = ensure_cluster(asked)
    assert second.view().view_hash == placed.view().view_hash
    manifest = ray.get(second.coordinator.manifest.remote())
    spec = inspect_model(model)
    assert set(manifest.by_expert()) == {
        (layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)
    }
    assert second.token == placed.token
    with pytest.raises(ConfigError, match="already serves"):
        ensure_cluster(of_placed(model.parent))
    with pytest.raises(ConfigError, match="already runs with numerics exact, not fast"):
        ensure_cluster(asked.model_copy(update={"numerics": "fast"}))
    fewer = asked.experts.model_copy(update={"shards": 1})
    with pytest.raises(ConfigError, match=r"with experts \{'shards': 2\}, not \{'shards': 1"):
        ensure_cluster(asked.model_copy(update={"experts": fewer}))
    assert generate(second).token_ids == expected, "it still serves"


def test_tokens_depend_neither_on_the_placement_nor_on_who_stands_beside(
    placed: ClusterHandle, model: Path, expected: list[int], tmp_path: Path
) -> None:
    """Replicas, no two layers alike, and a shard that holds nothing of one layer; another
    deployment is there before, and after."""
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
        assert generate(handle).token_ids == expected
        shards = cluster_status("scattered")["members"]
        assert shards["shard-2"]["experts_per_layer"][0] == 0
        assert all(shards[uid]["calls_served"] for uid in ("shard-0", "shard-1", "shard-2"))
        assert handle.token != placed.token
    finally:
        stop_cluster("scattered")
    assert find_cluster("scattered") is None and living_names("scattered") == []
    assert generate(placed).token_ids == expected, "it does not end with the other"


def test_requests_of_a_killed_shard_are_held_until_it_is_restored(
    placed: ClusterHandle, expected: list[int]
) -> None:
    assert pong(placed).serving
    before = placed.view()
    [victim] = [m for m in before.members if m.uid == "shard-1"]
    ray.kill(ray.get_actor(victim.actor_name, namespace=RAY_NAMESPACE))
    held = generate(placed)
    assert (held.finish_reason, held.token_ids) == ("length", expected)
    assert pong(placed).serving
    [again] = [m for m in placed.view().members if m.uid == "shard-1"]
    assert again.incarnation == victim.incarnation + 1
    assert again.endpoint.host == victim.endpoint.host, "the one node that has a GPU left"
    status = cluster_status("placed")
    assert status["members"]["shard-1"]["incarnation"] == again.incarnation
    assert status["epoch"] == before.epoch + 1 and status["operations"]["lost"] == []


@dataclass(frozen=True)
class Failed:
    """A start that failed, and what there was of it then."""

    error: RemoraError
    living: list[str]
    is_found: bool


def failed(asked: RemoraConfig) -> Failed:
    with pytest.raises(RemoraError) as caught:
        ensure_cluster(asked)
    is_found = find_cluster(asked.name) is not None
    return Failed(caught.value, living_names(asked.name), is_found)


Failures = dict[str, "Future[Failed]"]


@pytest.fixture(scope="module")
def failures(
    raylets: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Failures]:
    """Starts that must fail, begun at once: one of them takes its time."""
    folder = tmp_path_factory.mktemp("failures")
    (folder / "file").write_text("")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    odd = make_checkpoint(folder / "odd", "mixtral", **heads)
    placeless = config(model, "placeless", experts={"num_gpus": 3, "labels": {"remora/role": "x"}})
    no_log = ElasticConfig(log_dir=folder / "file")
    asked = [
        placeless.model_copy(update={"start_timeout_s": 30.0}),
        config(model, "unbound").model_copy(update={"bind_address": "192.0.2.1"}),
        config(model, "unlogged").model_copy(update={"elastic": no_log}),
        config(odd, "indivisible", dense={"tensor_parallel": 4}),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        yield {each.name: pool.submit(failed, each) for each in asked}


def failure_of(failures: Failures, name: str) -> RemoraError:
    """What a start failed with, having left nothing."""
    found = failures[name].result(timeout=120)
    assert (found.living, found.is_found) == ([], False), name
    return found.error


def test_an_address_that_cannot_be_bound_is_told_with_who_wants_it(failures: Failures) -> None:
    error = failure_of(failures, "unbound")
    assert isinstance(error, ClusterError)
    assert re.search(r"the coordinator.* cannot listen on 192\.0\.2\.1", str(error))


def test_a_log_that_cannot_be_written_is_told(failures: Failures) -> None:
    error = failure_of(failures, "unlogged")
    assert isinstance(error, ClusterError) and "coordinator.wal: Not a directory" in str(error)


def test_heads_that_do_not_divide_fail_a_start_that_has_begun(failures: Failures) -> None:
    """Shards are there already when the ranks are planned."""
    error = failure_of(failures, "indivisible")
    assert isinstance(error, ConfigError)
    assert re.search(r"2 query heads and 1 key/value heads.* 1, 2 ranks", str(error))


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


@pytest.mark.long
def test_two_callers_share_a_failure_and_the_name_is_free_again(
    raylets: Cluster, model: Path, expected: list[int], tmp_path: Path
) -> None:
    """Also where a coordinator that failed is still there: its maker may die before it could
    remove it."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    victim = sorted(broken.glob("*.safetensors"))[3]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    asked = config(broken, "shared")
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(ensure_cluster, asked) for _ in range(2)]
        errors = [start.exception(timeout=120) for start in starts]
    assert all(isinstance(error, WeightsError | ClusterError) for error in errors), errors
    named = [str(error) for error in errors if isinstance(error, WeightsError)]
    assert named and all(victim.name in text for text in named), errors
    assert living_names("shared") == []

    victim.write_bytes(whole)
    left = bootstrap._coordinator(asked.model_copy(update={"model": str(tmp_path)}))
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(left.deploy.remote())
    assert ray.get(left.status.remote())["phase"] == "failed"
    handle = ensure_cluster(asked)
    try:
        assert generate(handle).token_ids == expected
    finally:
        stop_cluster("shared")


def test_what_finds_no_place_fails_in_time_and_says_what_it_asked_for(failures: Failures) -> None:
    error = failure_of(failures, "placeless")
    assert isinstance(error, ClusterError)
    message = str(error)
    assert "start_timeout_s = 30" in message
    assert "shard-0, shard-1 found no place (each asks for 0.5 CPU, 3 GPU" in message
    assert "remora/role=x" in message and "2 node(s) of 2 CPU, 1 GPU" in message
