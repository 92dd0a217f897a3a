"""Compiled layers: one compilation for equal layers, the same promise, kept artefacts, fallback."""

import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from support.checkpoints import VOCAB, make_checkpoint
from support.local_cluster import Ask, LocalCluster
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from remora.actors import dense_engine
from remora.actors import executor as executor_module
from remora.actors.dense_model import build_dense, build_hollow
from remora.actors.executor import Executor, artefact_key
from remora.actors.launch import take_threads
from remora.actors.model_spec import inspect_model
from remora.comm.collectives import DryGroup
from remora.comm.messages import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the module, so that the compiler runs once for each question asked of it."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("REMORA_CACHE_DIR", str(directory))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory / "inductor"))
        take_threads(1)  # compiled code is guarded by it, and other tests left theirs
        yield directory


NUM_GRAPHS = 4  # before the layers, the layer that all are like, the last norm, the head


def asks() -> list[Ask]:
    return [
        Ask(
            tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(3 + (i * 11) % 70)),
            SamplingParams(max_tokens=10, temperature=0.8, seed=i, ignore_eos=True),
        )
        for i in range(16)
    ]


def test_exact_holds_for_compiled_layers_too(model: Path) -> None:
    cluster = LocalCluster(model, num_shards=2, dtype="bfloat16", exact=True)
    try:
        with cluster.dense(executor="compiled", prefix_caching=False) as alone:
            assert alone.actor.status()["executor"] == "compiled"
            expected = [alone.ask([ask])[0].token_ids for ask in asks()]
        with cluster.dense(
            executor="compiled", max_num_seqs=8, max_tokens_per_step=40, num_kv_blocks=24
        ) as crowded:
            num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            answers = crowded.ask(asks())
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs > 0
    finally:
        cluster.close()
    assert [a.token_ids for a in answers] == expected


def test_a_shard_that_does_not_answer_is_named_through_compiled_layers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code knows texts only; what the engine makes of an error hangs on its class."""
    monkeypatch.setattr(dense_engine, "RECONNECT_EVERY_S", 0.0)
    cluster, hung = LocalCluster(model, num_shards=2, dtype="bfloat16", exact=True), Event()
    try:
        with cluster.dense(executor="compiled", call_timeout_s=1.0) as client:
            server = cluster.shards[1]._server
            assert server is not None
            server.call_soon(lambda: [hung.wait(60)])
            try:
                [lost] = client.ask(asks()[:1])
                assert "shard-1" in str(lost.outputs[-1].error)
                assert "Error" not in str(lost.outputs[-1].error), "a fault of ours, it says"
                assert not client.pong().serving
            finally:
                hung.set()
            assert client.ask(asks()[:1])[0].finish_reason == "length"
    finally:
        cluster.close()


def test_equal_layers_share_a_compilation_and_no_step_compiles_again(model: Path) -> None:
    spec = inspect_model(model)
    dense = build_dense(model, spec, dtype=torch.float32, exact=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    chosen = Executor(dense, wish="compiled", exact=False)
    assert chosen.name == "compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == NUM_GRAPHS
    assert all(layer.program is not None for layer in dense.layers), "no guards are left"


@pytest.mark.long
def test_widths_of_a_model_are_not_taken_for_row_counts(tmp_path: Path) -> None:
    """192 is DeepSeek's head, and a usual hidden size of small models; so are 64 and 320."""
    path = make_checkpoint(tmp_path, "mixtral", hidden_size=192, head_dim=64)
    dense = build_dense(path, inspect_model(path), dtype=torch.float32, exact=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert Executor(dense, wish="compiled", exact=True).name == "compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == NUM_GRAPHS


def test_what_was_compiled_once_is_compiled_before_serving(model: Path) -> None:
    spec = inspect_model(model)
    dense = build_dense(model, spec, dtype=torch.float32, exact=False)
    assert Executor(dense, wish="compiled", exact=False).phase == "compiled"
    assert Executor(dense, wish="auto", exact=False).phase == "compiled", "its marker is there"
    other = Executor(dense, wish="auto", exact=True)
    assert other.phase == "warming", "another question"
    other.close()


@pytest.mark.long
def test_auto_serves_eagerly_and_switches_only_when_told_that_nothing_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMORA_CACHE_DIR", str(tmp_path))
    spec = inspect_model(model)
    dense = build_dense(model, spec, dtype=torch.float32, exact=False)
    chosen = Executor(dense, wish="auto", exact=False)
    assert (chosen.phase, chosen.name) == ("warming", "eager")
    assert chosen._child is not None
    assert chosen._child.wait(timeout=300) == 0, (tmp_path / "compiled").glob("*.log")
    assert chosen.name == "eager", "not before it is told that no request runs"
    assert chosen.when_idle()
    assert chosen.name == "compiled"
    assert not chosen.when_idle(), "once"


def test_closing_ends_the_compiling_child(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMORA_CACHE_DIR", str(tmp_path))
    spec = inspect_model(model)
    chosen = Executor(
        build_dense(model, spec, dtype=torch.float32, exact=True), wish="auto", exact=True
    )
    child = chosen._child
    assert child is not None and child.poll() is None
    chosen.close()
    assert child.returncode is not None


@pytest.mark.parametrize("how", ["close", "parent dies"])
def test_what_the_compiling_child_has_started_ends_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A g++ takes many seconds at its priority."""
    started = tmp_path / "started"
    os.mkfifo(started)
    script = tmp_path / "python"
    watch = "from remora.actors.warm import _end_with_parent as end; end()"
    script.write_text(
        f"#!/bin/sh\nsleep 600 &\necho $! > {started}\nexec {sys.executable} -c '{watch}'\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("REMORA_CACHE_DIR", str(tmp_path))
    dense = build_dense(model, inspect_model(model), dtype=torch.float32, exact=False)
    chosen = Executor(dense, wish="auto", exact=False)
    child = chosen._child
    assert child is not None and child.stdin is not None
    grandchild = os.pidfd_open(int(started.read_text()))
    try:
        if how == "close":
            chosen.close()
        else:
            child.stdin.close()
        ended, _, _ = select.select([grandchild], [], [], 60)
        assert ended
    finally:
        os.close(grandchild)
        chosen.close()


def test_without_a_compiler_layers_stay_eager(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executor_module, "has_compiler", lambda: False)
    spec = inspect_model(model)
    dense = build_dense(model, spec, dtype=torch.float32, exact=False)
    chosen = Executor(dense, wish="compiled", exact=False)
    assert chosen.name == "eager"
    assert "no C++ compiler" in caplog.text


@pytest.mark.parametrize("wish", ["auto", "compiled"])
def test_a_cache_that_cannot_be_written_leaves_layers_eager(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wish: executor_module.Wish,
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory can be made under a file, not even by root")
    monkeypatch.setenv("REMORA_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked / "cache" / "inductor"))
    torch._dynamo.reset()
    dense = build_dense(model, inspect_model(model), dtype=torch.float32, exact=False)
    chosen = Executor(dense, wish=wish, exact=False)
    assert (chosen.phase, chosen.name) == ("eager", "eager")
    assert chosen.why_eager is not None and str(blocked) in chosen.why_eager
    assert chosen.why_eager in caplog.text
    assert not chosen.when_idle()


@pytest.mark.parametrize(("kind", "differ"), [("dynamic", True), ("default", False)])
def test_artefacts_are_of_the_longest_sequence_where_code_holds_it(
    tmp_path: Path, kind: str, differ: bool
) -> None:
    rope = dict(rope_type=kind, rope_theta=10000.0, factor=2.0)
    path = make_checkpoint(tmp_path, "qwen3_moe", rope_parameters=rope)
    spec = inspect_model(path)
    keys = {
        artefact_key(
            build_hollow(spec, dtype=torch.float32, exact=True, max_positions=longest), exact=True
        )
        for longest in (64, 128)
    }
    assert len(keys) == 1 + differ


def test_artefacts_are_of_the_way_in_which_ranks_exchange(model: Path) -> None:
    spec, keys = inspect_model(model), set()
    for is_native in (True, False):
        group = DryGroup(0, 2, is_native=is_native)
        try:
            hollow = build_hollow(spec, dtype=torch.float32, exact=True, group=group)
            keys.add(artefact_key(hollow, exact=True))
        finally:
            group.close()
    assert len(keys) == 2, "a child that compiles the other one's layers is of no use"


def test_our_cache_is_used_unless_another_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMORA_CACHE_DIR", str(tmp_path))
    for given, wanted in (
        # torch puts it there when imported; code is of one kind of processor
        (default_cache_dir(), str(tmp_path / "inductor" / executor_module.processor_tag())),
        ("/elsewhere", "/elsewhere"),
    ):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        executor_module.use_cache()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == wanted
