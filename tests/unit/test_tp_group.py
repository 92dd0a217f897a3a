"""A tensor-parallel dense group over real sockets: rank 0 schedules, the others follow.

Ranks are threads of this process; `tests/live` has them as Ray actors. Eager only: compiled code
holds the interpreter's lock, which threads that wait for each other cannot share.
"""

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support.checkpoints import VOCAB, make_checkpoint
from support.comm_rig import WAIT_S
from support.fake_nccl import World
from support.local_cluster import Ask, DenseClient, LocalCluster

from remora.actors import dense_actor, tp_actor, tp_group
from remora.actors.expert_actor import ExpertActor
from remora.comm.errors import ClusterError, PeerLostError
from remora.comm.messages import SamplingParams
from remora.comm.peer import PeerLimits
from remora.comm.sketch import decode_sketch
from remora.comm.view import Endpoint


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")
    cluster = LocalCluster(path, num_shards=2, dtype="float32", exact=True)
    yield cluster
    cluster.close()


def asks(count: int = 6) -> list[Ask]:
    """Greedy and sampled requests of several lengths."""
    return [
        Ask(
            tuple((i * 97 + j * j * 13 + j) % VOCAB for j in range(5 + i * 9)),
            SamplingParams(
                max_tokens=10 + i, temperature=0.8 * (i % 2), seed=i, ignore_eos=True, logprobs=2
            ),
        )
        for i in range(count)
    ]


def tokens(dense: DenseClient) -> list[list[int]]:
    return [answer.token_ids for answer in dense.ask(asks())]


@pytest.fixture(scope="module")
def expected(cluster: LocalCluster) -> list[list[int]]:
    """What one rank says."""
    with cluster.dense() as dense:
        return tokens(dense)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_group_says_what_one_rank_says(
    cluster: LocalCluster, expected: list[list[int]], num_ranks: int
) -> None:
    with cluster.dense(num_ranks=num_ranks, max_tokens_per_step=64) as dense:
        assert tokens(dense) == expected
        assert f"tp={num_ranks} " in dense.actor.fingerprint()
        status = dense.actor.status()
        assert status["tensor_parallel"] == num_ranks
        assert "mlp.gate.weight" in status["whole_on_every_rank"]
        steps = {other.status()["steps_total"] for other in dense.others}
        assert steps == {status["steps_total"]}


@pytest.mark.parametrize(
    ("form", "num_ranks", "use_unix"),
    [("exact", 2, True), ("speculative", 2, True), ("speculative", 4, True),
     ("speculative", 2, False)],
)  # fmt: skip
def test_shuffled_rows_say_the_same(
    cluster: LocalCluster, expected: list[list[int]], form: str, num_ranks: int, use_unix: bool
) -> None:
    """Over real sockets, twice: the second time ranks have learned from the first."""
    options: dict[str, Any] = dict(num_ranks=num_ranks, token_shuffle=form, use_unix=use_unix)
    with cluster.dense(**options, max_tokens_per_step=64) as dense:
        assert tokens(dense) == expected
        first = dense.actor.phases()["token_shuffle"]
        assert tokens(dense) == expected
        second = dense.actor.phases()["token_shuffle"]
        assert second["form"] == form and second["layers"].startswith(form)
        assert 0 < first["far_copies"] < second["far_copies"] < second["copies"]
        moved = second["group_bytes"]
        assert ("sum_slice" in moved) == (form == "speculative")
        assert moved["gather_slices"]["sent_bytes"] > 0
        ranks = [dense.actor.status(), *(other.status() for other in dense.others)]
        calls = [{k: v["calls"] for k, v in r["token_shuffle"]["group_bytes"].items()}
                 for r in ranks]  # fmt: skip
        assert all(c == calls[0] for c in calls)


def test_statistics_are_those_of_all_rows(cluster: LocalCluster) -> None:
    """Whoever sees a slice only, the router learns what every token chose."""
    loads, counted = [], []
    for form in ("none", "speculative"):
        options: dict[str, Any] = dict(num_ranks=2, token_shuffle=form)
        with cluster.dense(**options, prefix_caching=False) as dense:
            tokens(dense)
            sketch = decode_sketch(dense.actor.take_sketch())
        assert sketch.counted_ratio == 1.0
        counted.append(sketch.tokens_counted)
        load_LE = np.zeros((len(sketch.moe_layers), sketch.num_experts))
        for cell in (cell for domain in sketch.domains for cell in domain.cells):
            load_LE[cell.layer] += cell.load_E()
        loads.append(load_LE.tolist())
    assert counted[0] == counted[1] and loads[0] == loads[1]


@pytest.mark.parametrize("form", ["exact", "speculative"])
def test_ranks_agree_again_after_a_step_that_failed_on_one(
    cluster: LocalCluster, expected: list[list[int]], form: str
) -> None:
    """Rank 1 fails behind rows that rank 0 may have learned from: both begin anew."""
    with cluster.dense(num_ranks=2, token_shuffle=form) as dense:
        assert tokens(dense) == expected
        follower = dense.others[0]._follower
        assert follower is not None
        experts = follower._experts

        def fails(layer: int, *rest: Any) -> Any:
            if layer > 0:
                raise ClusterError("rank 1 does not like it")
            assert experts is not None
            return experts(layer, *rest)

        follower._experts = fails
        broken = dense.ask(asks(1))[0]
        assert "rank 1 does not like it" in str(broken.outputs[-1].error)
        follower._experts = experts
        assert tokens(dense) == expected


def test_without_shared_memory_gloo_carries_the_same(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    with cluster.dense(num_ranks=2, use_unix=False) as dense:
        assert tokens(dense) == expected


@pytest.mark.parametrize(
    ("form", "num_ranks"), [("none", 2), ("none", 4), ("exact", 2), ("speculative", 2)]
)
def test_nccl_carries_the_same(
    cluster: LocalCluster, expected: list[list[int]], form: str, num_ranks: int
) -> None:
    world = World()
    options: dict[str, Any] = dict(num_ranks=num_ranks, token_shuffle=form)
    with cluster.dense(**options, world=world) as dense:
        assert tokens(dense) == expected
    assert world.num_copied_bytes > 0


def test_over_nccl_a_rank_that_goes_ends_the_group(cluster: LocalCluster) -> None:
    with cluster.dense(num_ranks=2, world=World()) as dense:
        dense.ask(asks(1))
        dense.others[0].stop()
        with pytest.raises(PeerLostError):
            dense.ask(asks(1))


def test_over_nccl_a_step_that_nccl_fails_is_told_and_the_next_one_runs(
    cluster: LocalCluster, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous error on rank 1: all leave the step, meet anew, and serve again. Rank 1 comes
    after rank 0 has looked at what it last said: that the step failed."""
    looked, is_gone = threading.Event(), tp_group._is_gone

    def look(uid: str, link: tp_group.Link) -> str | None:
        found = is_gone(uid, link)
        if uid == "dense-0.1":
            looked.set()
        return found

    def create_late(*args: Any) -> Any:
        assert looked.wait(WAIT_S)
        return create(*args)

    monkeypatch.setattr(tp_group, "_is_gone", look)
    with cluster.dense(num_ranks=2, world=World()) as dense:
        assert tokens(dense) == expected
        nccl: Any = dense.others[0].hardware.nccl()
        nccl.communicators[-1].inject(6)
        create = nccl.NcclCommunicator
        nccl.NcclCommunicator = create_late
        answer = dense.ask(asks(1))[0]
        assert answer.finish_reason == "error"
        error = str(answer.outputs[-1].error)
        assert "tensor-parallel group of dense-0" in error and "REMOTE_ERROR" in error, error
        assert tokens(dense) == expected
        assert len(nccl.communicators) == 2


def test_groups_stand_side_by_side_over_the_same_shards(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    with cluster.dense(num_ranks=2) as one, cluster.dense(num_ranks=2) as two:
        assert tokens(one) == expected
        assert tokens(two) == expected


def test_a_rank_that_goes_ends_the_group_and_no_request(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections break without an answer: ingresses have the requests go on elsewhere."""
    with cluster.dense(num_ranks=2) as dense:
        dense.ask(asks(1))
        dense.others[0].stop()
        with pytest.raises(PeerLostError):
            dense.ask(asks(1))
        dense.actor.until_end()
        assert "dense-0.1 is gone" in caplog.text
        status = dense.actor.status()  # which the coordinator may ask before it restores the group
        assert not status["alive"] and status["token_shuffle"]["group_bytes"]["sum"]["calls"] > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("use_unix", [True, False])
def test_a_rank_that_goes_within_a_step_ends_the_group_and_no_request(
    cluster: LocalCluster, use_unix: bool
) -> None:
    with cluster.dense(num_ranks=2, use_unix=use_unix, exchange_timeout_s=3.0) as dense:
        dense.ask(asks(1))
        follower: Any = dense.others[0]._follower

        def ends(*_: Any) -> Any:  # as its process would: all of its sockets close
            follower._link.shut_down()
            follower._link.close()
            if not use_unix:
                follower._group._gloo = None
            raise SystemExit

        follower._experts = ends
        with pytest.raises(PeerLostError):
            dense.ask(asks(1))


def test_a_view_that_one_rank_cannot_take_leaves_all_at_the_old_one(own: LocalCluster) -> None:
    with own.dense(num_ranks=4, hold_s=5.0) as dense:
        dense.ask(asks(1))
        launch = own.shard_launch("shard-1", own.view.placement, incarnation=2)
        late = ExpertActor(launch)
        members = (own.view.members[0], late.join().member)
        view = msgspec.structs.replace(own.view, epoch=2, members=members)
        late.fence(["dense-0.2"])  # one rank alone cannot reach it
        try:
            with pytest.raises(ClusterError, match="cannot be reached"):
                dense.actor.adopt_view(view)
            answer = dense.ask(asks(1))[0]
            assert answer.finish_reason == "length", answer.outputs[-1].error
        finally:
            late.stop()


def test_shards_that_do_not_answer_cost_time_and_not_the_group(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is gone with its shards: every rank dials them one by one, for longer than a rank may
    be late in an exchange."""
    for module in (dense_actor, tp_actor):
        quick: Any = functools.partial(_with_connect_s, module.peer_limits, 0.3)
        monkeypatch.setattr(module, "peer_limits", quick)
    with cluster.dense(num_ranks=2, exchange_timeout_s=0.5) as dense, ExitStack() as silent:
        first, second = cluster.view.members
        dead = []
        for number in range(3):
            listener = silent.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            endpoint = Endpoint(host="elsewhere", tcp_address=address)
            uid = f"shard-{2 + number}"
            dead.append(msgspec.structs.replace(first, uid=uid, endpoint=endpoint))
        members = (first, second, *dead)
        view = msgspec.structs.replace(cluster.view, epoch=2, members=members)
        assert dense.actor.adopt_view(view, or_none=True) == view.view_hash
        assert dense.actor._leader is not None and dense.actor._leader.epoch == 2


def _with_connect_s(limits: Callable[..., PeerLimits], connect_s: float, *args: Any) -> PeerLimits:
    return msgspec.structs.replace(limits(*args), connect_s=connect_s)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[LocalCluster]:
    """Shards that a test may end."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    cluster = LocalCluster(path, num_shards=2, dtype="float32", exact=True)
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("form", "num_ranks", "use_unix"),
    [("none", 2, True), ("none", 4, True), ("speculative", 2, True), ("none", 2, False)],
)
def test_a_step_is_held_while_an_expert_is_nowhere(
    own: LocalCluster, expected: list[list[int]], form: str, num_ranks: int, use_unix: bool
) -> None:
    """A shard dies without a replica: every rank lacks it, and all take the view that has it."""
    options: dict[str, Any] = dict(num_ranks=num_ranks, token_shuffle=form, use_unix=use_unix)
    with own.dense(**options, hold_s=60.0, max_tokens_per_step=64) as dense:
        assert tokens(dense) == expected
        own.shards[1].stop()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(tokens, dense)
            dense.wait_until_held()
            launch = own.shard_launch("shard-1", own.view.placement, incarnation=2)
            own.shards[1] = ExpertActor(launch)
            members = (own.view.members[0], own.shards[1].join().member)
            view = msgspec.structs.replace(own.view, epoch=2, members=members)
            dense.actor.offer_view(view)
            # nobody need wait for the step to know that no rank goes by an older view
            assert dense.actor.adopt_view(own.view) == own.view.view_hash
            assert not held.done()
            dense.actor.adopt_view(view)
            assert held.result(60) == expected
        assert dense.actor._leader is not None and dense.actor._leader.epoch == 2
        ranks = [dense.actor, *dense.others]
        assert {r._dispatcher.view.epoch for r in ranks if r._dispatcher is not None} == {2}
        assert dense.actor._engine is not None and dense.actor._engine.why_not_serving is None


@pytest.mark.parametrize("fenced", ["dense-0", "dense-0.1"])
def test_a_step_is_held_until_every_rank_reaches_what_it_lacks(
    own: LocalCluster, expected: list[list[int]], fenced: str
) -> None:
    """No newer view comes: ranks that a shard refuses look again. A group's name is all of it."""
    with own.dense(num_ranks=2, hold_s=60.0) as dense:
        assert tokens(dense) == expected
        own.shards[1].fence([fenced])
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(tokens, dense)
            dense.wait_until_held()
            assert own.shards[1].status()["peers"] == (0 if fenced == "dense-0" else 1)
            assert not held.done()
            own.shards[1].fence([])
            assert held.result(60) == expected


def test_a_rank_that_goes_while_a_step_is_held_ends_the_group(own: LocalCluster) -> None:
    with own.dense(num_ranks=2, hold_s=60.0) as dense, ThreadPoolExecutor(1) as pool:
        own.shards[1].stop()
        held = pool.submit(dense.ask, asks(1))
        dense.wait_until_held()
        dense.others[0].stop()
        with pytest.raises(PeerLostError):
            held.result(60)
        dense.actor.until_end()


def test_a_step_that_fails_otherwise_is_not_held(
    cluster: LocalCluster, expected: list[list[int]]
) -> None:
    with cluster.dense(num_ranks=2, hold_s=3600.0) as dense:
        assert tokens(dense) == expected
        follower = dense.others[0]._follower
        assert follower is not None
        experts = follower._experts

        def fails(*_: Any) -> Any:
            raise ClusterError("the shard failed on a call")

        follower._experts = fails
        assert "the shard failed on a call" in str(dense.ask(asks(1))[0].outputs[-1].error)
        follower._experts = experts
        assert tokens(dense) == expected


def test_a_shard_that_is_lost_is_named_whichever_rank_asked_it(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    cluster = LocalCluster(path, num_shards=2, dtype="float32", exact=True)
    with cluster.dense(num_ranks=2) as dense:
        assert tokens(dense) == expected
        other = cluster.shards[1]
        other.stop()
        answer = dense.ask(asks(1))[0]
        assert answer.finish_reason == "error"
        assert "shard-1" in str(answer.outputs[-1].error)
        assert not any("gone" in str(output.error) for output in answer.outputs)
    cluster.shards[0].stop()
