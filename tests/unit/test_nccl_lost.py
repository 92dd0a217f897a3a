"""Members that are lost under streams over NCCL: done without, and brought back.

The actors and the coordinator's machine are the product's own, NCCL and GPUs are pretended as in
`test_nccl_actors.py`.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.checkpoints import VOCAB, make_checkpoint
from support.fake_nccl import World
from support.local_cluster import Ask, DenseClient, LocalCluster
from support.local_coordinator import LocalCoordinator
from support.router_rig import wait_for
from support.triton_threads import one_launch_at_a_time

from remora.comm.messages import SamplingParams
from remora.comm.view import View

pytest.importorskip("triton")
__all__ = ["one_launch_at_a_time"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_launch_at_a_time")

SOON_S = 300.0
CALLS = 25  # of NCCL by a shard: in the middle of the streams here
REPLICATED = 6  # slots of three shards for eight experts: any of them may go


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the socket transport says, on the CPU, with nobody lost."""
    cluster = LocalCluster(model, num_shards=2, dtype="float32", exact=False)
    with cluster.dense() as dense:
        said = tokens(dense)
    cluster.close()
    return said


def tokens(dense: DenseClient) -> list[list[int]]:
    """Two prompts, together over the largest bucket, and decode behind them."""
    asks = [
        Ask(
            tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(3 + i * 6)),
            SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
        )
        for i in range(2)
    ]
    answers = dense.ask(asks)
    assert [a.finish_reason for a in answers] == ["length"] * 2, answers
    return [answer.token_ids for answer in answers]


@pytest.fixture
def deployed(model: Path, tmp_path: Path) -> Iterator[Callable[..., "Deployed"]]:
    """Makes a cluster of shards and dense ranks with a coordinator; closes it."""
    with ThreadPoolExecutor(1) as pool:
        made: list[Deployed] = []

        def make(*uids: str, num_shards: int, slots: int | None = None) -> Deployed:
            made.append(Deployed(model, tmp_path / "log", uids, num_shards, slots, pool))
            return made[-1]

        yield make
        for each in made:
            each.close()
            assert each.world.broken is None, each.world.broken


class Deployed:
    def __init__(
        self,
        model: Path,
        folder: Path,
        uids: tuple[str, ...],
        num_shards: int,
        slots: int | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.world = World()
        self.cluster = LocalCluster(
            model, num_shards=num_shards, dtype="float32", exact=False, world=self.world,
            slots=slots,
        )  # fmt: skip
        self._started = self.cluster.dense_over_nccl(*uids, hold_s=SOON_S)
        self.dense = self._started.__enter__()
        members = (*(client.member for client in self.dense), *self.cluster.view.members)
        view = View(epoch=1, members=members, placement=self.cluster.view.placement)
        self.coordinator = LocalCoordinator(self.cluster, view, self.dense, folder)
        self._pool = pool

    def stream(self) -> "Callable[[], list[list[int]]]":
        """Streams of the last dense group, under way; its result waits for them."""
        asked = self._pool.submit(tokens, self.dense[-1])
        return lambda: asked.result(SOON_S)

    def shards_in_use(self) -> list[str]:
        shards: list[str] = self.dense[-1].actor.status()["shards_connected"]
        return shards

    def dies_at(self, uid: str, num_calls: int) -> None:
        """The process ends so many calls of NCCL from now."""
        nccl = self.cluster.processes[uid]
        nccl.die_at = nccl.num_calls + num_calls

    def wait_until_restored(self, name: str) -> None:
        """Until the operation that brings members back is done."""
        runner = self.coordinator.runner
        wait_for(lambda: name in [each.operation_id for each in runner.history()], SOON_S)
        found = runner.wait(name, SOON_S)
        assert found["outcome"] == "done", found

    def close(self) -> None:
        self.coordinator.close()
        self._started.__exit__(None, None, None)
        self.cluster.close()


def test_a_shard_that_dies_is_done_without_and_comes_back(
    deployed: Callable[..., Deployed], expected: list[list[int]]
) -> None:
    """Every expert has another replica: the step runs again, and waits for no restore."""
    d = deployed("dense-0", num_shards=3, slots=REPLICATED)
    d.dies_at("shard-1", CALLS)
    stream = d.stream()
    assert stream() == expected
    assert "shard-1" in d.world.dead
    d.wait_until_restored("restore-shard-1.2")
    assert d.shards_in_use() == ["shard-0", "shard-1", "shard-2"]
    assert d.stream()() == expected
    again = d.coordinator.members["shard-1", 2]
    assert again.status()["tickets"] > 0


def test_a_step_is_held_for_experts_that_died_with_their_only_replica(
    deployed: Callable[..., Deployed], expected: list[list[int]]
) -> None:
    d = deployed("dense-0", num_shards=2)
    d.dies_at("shard-1", CALLS)
    assert d.stream()() == expected
    d.wait_until_restored("restore-shard-1.2")
    assert "shard-1" in d.world.dead and d.shards_in_use() == ["shard-0", "shard-1"]


@contextmanager
def hung(d: Deployed, uid: str) -> Iterator[None]:
    """The thread of a shard that NCCL is called from does nothing, while others answer."""
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert go_on.wait(2 * SOON_S)

    d.coordinator.members[uid, 1]._nccl.member.call_soon(hang)
    assert begun.wait(SOON_S)
    try:
        yield
    finally:
        go_on.set()


def test_who_hangs_gives_no_sign_and_who_waits_for_it_does(
    deployed: Callable[..., Deployed], expected: list[list[int]]
) -> None:
    """What the coordinator's `HealthWatch` goes by; one that hangs is replaced like a dead one."""
    d = deployed("dense-0", num_shards=3, slots=REPLICATED)
    shards = d.cluster.shards
    with ThreadPoolExecutor(4) as pool, hung(d, "shard-1"):
        d.world.patience_s = 0.2  # a launch is asynchronous
        stream = d.stream()
        waiting = [shards[i]._nccl.member for i in (0, 2)]  # type: ignore[union-attr]
        wait_for(lambda: all(member.state.running for member in waiting), SOON_S)
        silent = pool.submit(shards[1].heartbeat)
        before = d.dense[0].actor.heartbeat()
        for _ in range(2):
            assert all(shards[i].heartbeat()[1] == 0 for i in (0, 2))
        wait_for(lambda: d.dense[0].actor.heartbeat()[0] > before[0], SOON_S)
        assert before[1] > 0 and not silent.done()
        d.world.patience_s = None
        d.coordinator.die("shard-1")
        assert stream() == expected
        d.wait_until_restored("restore-shard-1.2")
    assert d.shards_in_use() == ["shard-0", "shard-1", "shard-2"]


def test_a_dense_group_that_dies_leaves_the_others_in_step_and_comes_back(
    deployed: Callable[..., Deployed], expected: list[list[int]]
) -> None:
    d = deployed("dense-1", "dense-0", num_shards=2)
    d.coordinator.die("dense-1")
    assert d.stream()() == expected
    d.wait_until_restored("restore-dense-1.2")
    member = next(m for m in d.coordinator.views[-1].members if m.uid == "dense-1")
    again = DenseClient(d.coordinator.members["dense-1", 2], member)
    assert tokens(again) == expected


def test_the_conductor_comes_back_with_dense_0(
    deployed: Callable[..., Deployed], expected: list[list[int]]
) -> None:
    """Steps of other dense groups are held meanwhile."""
    d = deployed("dense-0", "dense-1", num_shards=2)
    d.coordinator.die("dense-0")
    assert d.stream()() == expected
    d.wait_until_restored("restore-dense-0.2")
    assert d.shards_in_use() == ["shard-0", "shard-1"]
