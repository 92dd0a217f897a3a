"""Rows over NCCL through the actors' own code: conductor, dense ranks and shards, no Ray.

NCCL is the fake one with its rules of order, GPUs are pretended (Triton interpreted), everything
else is real: sockets, handshakes, threads, state machines, the engine's loop.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.checkpoints import VOCAB, make_checkpoint
from support.fake_nccl import World
from support.local_cluster import Ask, DenseClient, LocalCluster
from support.tp_engine import together
from support.triton_threads import one_launch_at_a_time

from remora.comm.errors import ClusterError
from remora.comm.messages import SamplingParams
from remora.comm.view import View

pytest.importorskip("triton")
__all__ = ["one_launch_at_a_time"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_launch_at_a_time")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture
def cluster(model: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(model, num_shards=2, dtype="float32", exact=False, world=World())
    yield cluster
    cluster.close()
    assert cluster.world is not None
    assert cluster.world.broken is None, cluster.world.broken


def asks(first: int = 0, count: int = 3) -> list[Ask]:
    """A prompt over the largest bucket (exact exchange), shorter ones, and decode behind them."""
    return [
        Ask(
            tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(3 + i * 5)),
            SamplingParams(max_tokens=4 + i, temperature=0.0, ignore_eos=True),
        )
        for i in range(first, first + count)
    ]


def over(cluster: LocalCluster, *dense: DenseClient, epoch: int = 1) -> View:
    """The shards' view with these dense ranks."""
    members = (*(one.member for one in dense), *cluster.view.members)
    return msgspec.structs.replace(cluster.view, epoch=epoch, members=members)


def tokens(dense: DenseClient, some: list[Ask]) -> list[list[int]]:
    return [answer.token_ids for answer in dense.ask(some)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the socket transport says, on the CPU."""
    cluster = LocalCluster(model, num_shards=2, dtype="float32", exact=False)
    with cluster.dense() as dense:
        said = tokens(dense, asks(0, 4))
    cluster.close()
    return said


def test_tokens_are_those_of_the_socket_transport(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    with cluster.dense_over_nccl("dense-0") as (dense,):
        assert tokens(dense, asks(0, 4)) == expected
        steps = dense.actor.status()["steps_total"]
        assert all(shard.status()["tickets"] >= steps > 0 for shard in cluster.shards)
        assert all(shard.status()["calls_served"] == 0 for shard in cluster.shards)
    assert cluster.world is not None and cluster.world.num_copied_bytes > 0


def test_two_dense_groups_run_in_step(cluster: LocalCluster, expected: list[list[int]]) -> None:
    """Different requests at once, and one rank alone while the other is idle."""
    with cluster.dense_over_nccl("dense-0", "dense-1") as (one, two):
        said = together([lambda: tokens(one, asks(0, 2)), lambda: tokens(two, asks(2, 2))])
        assert [*said[0], *said[1]] == expected
        assert tokens(two, asks(1, 1)) == expected[1:2]


def test_a_view_with_other_members_is_a_generation_beside(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    """A second dense rank joins and leaves: a communicator of four takes the place of three."""
    with cluster.dense_over_nccl("dense-0") as (one,):
        assert tokens(one, asks(0, 1)) == expected[:1]
        second = cluster.more_dense("dense-1")
        member = second.start()
        try:
            two = DenseClient(second, member)
            view = over(cluster, one, two, epoch=2)
            together([lambda: one.actor.adopt_view(view), lambda: second.adopt_view(view)])
            said = together([lambda: tokens(one, asks(0, 2)), lambda: tokens(two, asks(2, 2))])
            assert [*said[0], *said[1]] == expected
            one.actor.adopt_view(over(cluster, one, epoch=3))
            assert tokens(one, asks(1, 1)) == expected[1:2]
        finally:
            second.stop()
        assert tokens(one, asks(0, 1)) == expected[:1]


def test_a_member_that_cannot_join_leaves_steps_as_they_were(cluster: LocalCluster) -> None:
    """Its GPU hangs or fails before it meets the others, which wait for it in vain at each try;
    they say why the view has no communicator, and go on with the one that there is."""
    with cluster.dense_over_nccl("dense-0") as (one,):
        second = cluster.more_dense("dense-1")
        member = second.start()
        ends = threading.Event()

        def hangs(*_: Any) -> Any:
            ends.wait()
            raise RuntimeError("the test has ended")

        def fails(*_: Any) -> Any:
            raise RuntimeError("CUDA error: no device")

        assert one.actor._node is not None
        conductor: Any = one.actor._node._conductor
        try:
            view = over(cluster, one, DenseClient(second, member), epoch=2)
            second.offer_view(view)  # what it is told of the communicator it can tell then
            for create, build_s, why in (
                (hangs, 0.2, r"within 0\.2 s: no word of .*dense-1"),
                (fails, 600.0, "the communicator failed 3 times"),
            ):
                conductor._build_s = build_s
                cluster.processes["dense-1"].NcclCommunicator = create
                with pytest.raises(ClusterError, match=why):
                    one.actor.adopt_view(view)
                (answer,) = one.ask([Ask((5, 6, 7), SamplingParams(max_tokens=1))])
                assert answer.finish_reason == "length", answer
            assert all(shard.status()["alive"] for shard in cluster.shards)
        finally:
            ends.set()
            assert cluster.world is not None
            cluster.world.close()  # who waits in vain
            second.stop()


def test_an_error_of_nccl_repeats_the_step(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    """Nobody is lost: the same members meet anew, and the client sees nothing of it."""
    with cluster.dense_over_nccl("dense-0") as (dense,):
        assert tokens(dense, asks(0, 1)) == expected[:1]
        nccl = cluster.processes["shard-1"]
        nccl.communicators[-1].inject(6)
        assert tokens(dense, asks(0, 4)) == expected
        assert len(nccl.communicators) == 2


def test_an_expert_that_is_not_where_the_view_says_fails_the_step(cluster: LocalCluster) -> None:
    """It is never taken for zeros."""
    with cluster.dense_over_nccl("dense-0") as (dense,):
        tokens(dense, asks(0, 1))
        shard = cluster.shards[1]._shard
        assert shard is not None
        layer = shard.state.layers[0]
        for expert in shard.state.experts_of(layer):
            shard.drop_expert(layer, expert)
        answer = dense.ask(asks(0, 1))[0]
        assert answer.finish_reason == "error"
        error = str(answer.outputs[-1].error)
        assert "shard-1" in error and "placement" in error, error


def test_a_shard_that_is_lost_is_named(cluster: LocalCluster) -> None:
    with cluster.dense_over_nccl("dense-0") as (dense,):
        tokens(dense, asks(0, 1))
        cluster.shards[1].stop()
        answer = dense.ask(asks(0, 1))[0]
        assert answer.finish_reason == "error"
        assert "shard-1 is gone" in str(answer.outputs[-1].error)
        with pytest.raises(ClusterError, match="shard-1"):
            dense.actor.adopt_view(over(cluster, dense))
