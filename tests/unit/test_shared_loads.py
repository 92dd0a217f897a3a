"""Dense groups hear through the router what the others send to which shard, and price it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.comm_rig import TOKEN, everywhere, random_batch, shards
from support.local_cluster import Ask, DenseClient, LocalCluster
from support.router_rig import running_router, view_of

from remora.actors.load_sharing import NOTHING, LoadSharing
from remora.actors.router_loads import LoadExchange
from remora.actors.router_reporter import RouterReporter
from remora.comm.choice import PAIR, gain_for
from remora.comm.dispatch import Dispatcher
from remora.comm.messages import EngineStats, SamplingParams
from remora.comm.peers import PeerSet
from remora.comm.view import Member, View

SOON_S = 30.0
GROUPS = ("dense-0", "dense-1", "dense-2")
reports = st.lists(st.tuples(st.sampled_from(GROUPS), st.integers(0, 9)), max_size=40)


@given(reports)
def test_each_group_hears_once_of_what_the_others_sent(script: list[tuple[str, int]]) -> None:
    exchange = LoadExchange()
    exchange.adopt(view_of(hosts=("a", "b", "c")))
    sent: list[tuple[str, np.ndarray]] = []
    last: dict[str, int] = {}
    for group, pairs in script:
        mine_LS = np.array([[pairs, 0, 1], [0, 2 * pairs, 0]])
        heard_LS = exchange.report(group, 1, 1, mine_LS)
        assert heard_LS is not None
        since = sent[last[group] :] if group in last else []
        expected_LS = sum((p for g, p in since if g != group), np.zeros((2, 3), np.int64))
        assert heard_LS.tolist() == expected_LS.tolist()
        sent.append((group, mine_LS))
        last[group] = len(sent)


def test_who_speaks_of_something_else_hears_nothing() -> None:
    exchange, none_LS = LoadExchange(), np.zeros((2, 2), np.int64)
    exchange.adopt(view_of(epoch=3))
    assert exchange.report("dense-0", 1, 2, none_LS) is None, "another view"
    assert exchange.report("dense-0", 2, 3, none_LS) is None, "another life"
    assert exchange.report("dense-7", 1, 3, none_LS) is None, "a stranger"
    assert exchange.report("dense-0", 1, 3, none_LS) is not None
    with pytest.raises(ValueError, match=r"pairs of \(1, 2\) layers and shards, not \(2, 2\)"):
        exchange.report("dense-0", 1, 3, np.zeros((1, 2), np.int64))
    exchange.adopt(view_of(epoch=4, hosts=("a",)))
    assert exchange.report("dense-0", 1, 4, np.zeros((2, 1), np.int64)) is None, "it is alone"


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_load_of_others_decides_between_replicas(native: bool) -> None:
    """Our own shard is taken until the others have loaded it; they are forgotten as we are."""
    peers = PeerSet(token=TOKEN, self_host="a")
    with shards(hosts="ab", placement=everywhere("shard-0", "shard-1")) as rig:
        dispatcher = Dispatcher(view=rig.view, peers=peers, combine="presummed", native=native)
        dispatcher.moe(0, *random_batch(2), 2)
        assert dispatcher.take_sent().tolist() == [[8, 0], [0, 0]]
        assert dispatcher.take_sent().tolist() == [[0, 0], [0, 0]]
        dispatcher.note_others(np.array([[4000, 0], [0, 0]]), top_k=4)
        dispatcher.moe(0, *random_batch(2), 2)
        dispatcher.moe(2, *random_batch(2), 2)
        assert dispatcher.take_sent().tolist() == [[0, 8], [8, 0]], "each layer has its own load"
        dispatcher.note_others(np.array([[0, 400_000], [0, 0]]), top_k=4)
        load_S = dispatcher._routes.load[0]
        assert load_S[0] < PAIR, "what was before is forgotten"
        assert PAIR * 400_000 < load_S[1] <= PAIR * 400_008, "what we sent meanwhile is not"
    peers.close()


def test_without_word_of_the_others_own_load_weighs_less() -> None:
    peers = PeerSet(token=TOKEN, self_host="a")
    with shards(hosts="ab", placement=everywhere("shard-0", "shard-1")) as rig:
        dense = view_of(hosts=("a", "b")).members[:2]
        view = View(epoch=1, members=(*dense, *rig.view.members), placement=rig.view.placement)
        dispatcher = Dispatcher(view=view, peers=peers, combine="presummed")
        gains = []
        for others_LS in (None, np.zeros((2, 2), np.int64), None):
            dispatcher.note_others(others_LS, top_k=4)
            gains.append(int(dispatcher._routes.gain[0]))
        whole = gain_for(2)
        assert gains == [whole // 2, whole, whole // 2]
    peers.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Every shard holds every expert."""
    path: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "olmoe")
    made = LocalCluster(path, num_shards=2, dtype="float32", exact=True, slots=8)
    yield made
    made.close()


def test_two_dense_groups_tell_each_other(cluster: LocalCluster) -> None:
    """Dense ranks, shards, reporters and the router's server are the product's own."""
    with cluster.dense(uid="dense-0") as first, cluster.dense(uid="dense-1") as second:
        groups = (first, second)
        view = View(
            epoch=2,
            members=(*(_dense_member(g) for g in groups), *cluster.view.members),
            placement=cluster.view.placement,
        )
        for group in groups:
            group.actor.adopt_view(view)
        with running_router(view) as server:
            reporters = [_reporter(group, server.address) for group in groups]
            try:
                _until(lambda: all(r.reports >= 1 for r in reporters))
                greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
                first.ask([Ask(tuple(range(3, 13)), greedy)])
                sent_LS = np.stack(list(_dispatcher(first)._routes.sent.values()))
                assert sent_LS.sum() == 17 * cluster.spec.top_k * len(cluster.spec.moe_layers)
                _until(lambda: bool(_loads(second).sum()))
                before = reporters[0].reports, reporters[1].reports
                _until(lambda: reporters[0].reports > before[0] + 1)
                _until(lambda: reporters[1].reports > before[1] + 1)
                heard_LS = _loads(second) / PAIR
                assert np.allclose(heard_LS, sent_LS, rtol=0.02), "faded a little between reports"
                assert not any(_dispatcher(second)._routes.sent[0])
                assert [_dispatcher(g)._routes.gain[0] for g in groups] == [gain_for(2)] * 2
            finally:
                for reporter in reporters:
                    reporter.close()


def test_every_rank_of_a_group_hears_of_the_others(cluster: LocalCluster) -> None:
    with cluster.dense(num_ranks=2) as group:
        follower = group.others[0]
        sharing = _sharing(group)

        def loads_of_follower() -> np.ndarray:
            assert follower._dispatcher is not None
            return np.stack(list(follower._dispatcher._routes.load.values()))

        layers = len(cluster.spec.moe_layers)
        sharing.note(1, np.full((layers, 2), 1000))
        _until(lambda: bool((loads_of_follower() == PAIR * 1000).all()))
        sharing.note(2, np.full((layers, 2), 1000))  # of a view that is not in force
        sharing.note(1, np.full((layers, 2), 500))
        _until(lambda: bool((loads_of_follower() > PAIR * 1000).all()))
        assert loads_of_follower().max() <= PAIR * 1500
        assert np.array_equal(loads_of_follower(), _loads(group)), "all ranks price alike"
        sharing.note(1, None)
        whole = gain_for(2)
        assert follower._dispatcher is not None
        routes = follower._dispatcher._routes
        _until(lambda: int(routes.gain[0]) == int(_dispatcher(group)._routes.gain[0]) <= whole)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_of_a_group_hear_of_each_other(cluster: LocalCluster, num_ranks: int) -> None:
    """What is reported is what all ranks sent, and each prices what those beside it sent."""
    layers = len(cluster.spec.moe_layers)
    with cluster.dense(num_ranks=num_ranks) as group:
        sharing = _sharing(group)
        greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        group.ask([Ask(tuple(range(3, 14)), greedy)])
        dispatchers = [_dispatcher(group), *(other._dispatcher for other in group.others)]
        sent = [np.stack(list(d._routes.sent.values())) for d in dispatchers if d is not None]
        assert len(sent) == num_ranks and all(each.any() for each in sent)
        assert not all(np.array_equal(each, sent[0]) for each in sent), "rows of their own"
        epoch, told_LS = sharing.take()
        assert (epoch, told_LS.tolist()) == (1, sum(sent).tolist())
        assert told_LS.sum() == 18 * cluster.spec.top_k * layers
        assert sharing.take()[1].sum() == 0, "told once"
        sharing.note(epoch, None)

        def all_know() -> bool:
            loads = [np.stack(list(d._routes.load.values())) for d in dispatchers if d is not None]
            return all(np.allclose(each / PAIR, told_LS, rtol=0.02) for each in loads)

        _until(all_know)
        sharing.note(epoch, np.ones((layers, 2), np.int64))
        told_LS = told_LS + 1
        _until(all_know)


def test_what_a_rank_that_is_gone_has_sent_is_not_waited_for(cluster: LocalCluster) -> None:
    with cluster.dense(num_ranks=2) as group:
        sharing = _sharing(group)
        group.others[0].stop()
        epoch, told_LS = sharing.take()
        assert epoch == 1 and not told_LS.any()


def test_an_engine_that_has_stopped_has_nothing_to_tell(cluster: LocalCluster) -> None:
    with cluster.dense(uid="dense-0") as group:
        loads = _sharing(group)
        assert loads.take()[0] == 1
    assert loads.take() is NOTHING


def _dense_member(group: DenseClient) -> Member:
    assert group.member.role == "dense"
    return group.member


def _dispatcher(group: DenseClient) -> Dispatcher:
    assert group.actor._dispatcher is not None
    return group.actor._dispatcher


def _loads(group: DenseClient) -> np.ndarray:
    return np.stack(list(_dispatcher(group)._routes.load.values()))


def _sharing(group: DenseClient) -> LoadSharing:
    actor = group.actor
    assert actor._engine is not None and actor._rank is not None
    top_k = actor._rank.model.spec.top_k
    return LoadSharing(actor._engine, lambda: actor._dispatcher, top_k, actor._leader)


def _reporter(group: DenseClient, address: str) -> RouterReporter:
    return RouterReporter(
        group.actor._launch, 0.02, EngineStats, lambda: b"", _sharing(group), lambda _: address
    )


def _until(ready: object) -> None:
    assert callable(ready)
    pause = threading.Event()
    for _ in range(round(SOON_S / 0.02)):
        if ready():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come about")
