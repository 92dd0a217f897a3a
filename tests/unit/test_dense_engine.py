"""The engine's thread under faults: what hangs, dies or floods, and what ingresses are told."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import msgspec
import pytest
from support.checkpoints import make_checkpoint
from support.local_cluster import TOKEN, Ask, LocalCluster

from remora.actors import dense_actor, dense_engine, dense_load
from remora.comm.aio import connect_async
from remora.comm.errors import ClusterError
from remora.comm.messages import Abort, SamplingParams, encode

ASK = Ask((5, 9, 200, 31, 77), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")
    made = LocalCluster(path, num_shards=2, dtype="float32", exact=False)
    yield made
    made.close()


def test_a_rank_finds_a_shard_that_answers_again_without_a_request(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A balancer sends no request to an ingress that is not ready: pings must be enough."""
    quick = dense_actor.peer_limits
    monkeypatch.setattr(
        dense_actor, "peer_limits", lambda *a: msgspec.structs.replace(quick(*a), connect_s=0.2)
    )
    monkeypatch.setattr(dense_engine, "RECONNECT_EVERY_S", 0.0)
    hung = threading.Event()
    with cluster.dense(call_timeout_s=0.2) as client:
        server = cluster.shards[1]._server
        assert server is not None
        server.call_soon(lambda: [hung.wait(60)])
        try:
            [lost] = client.ask([ASK])
            assert lost.finish_reason == "error" and "shard-1" in str(lost.outputs[-1].error)
            told = client.pong()
            assert not told.serving, "it is connected, but nobody answers there"
            assert "shard-1" in str(told.why_not)
            caplog.clear()
            assert [a.finish_reason for a in client.ask([ASK] * 3)] == ["error"] * 3
            failures = [r for r in caplog.records if r.name == dense_engine.__name__]
            assert failures == [], "said once, not for every request"
        finally:
            hung.set()
        assert client.pong().serving
        assert client.ask([ASK])[0].finish_reason == "length"


def test_calls_to_an_engine_that_has_stopped_fail_at_once(cluster: LocalCluster) -> None:
    with cluster.dense() as client:
        actor = client.actor
    with pytest.raises(ClusterError, match="stopped"):
        actor.adopt_view(cluster.view)


def test_what_waits_for_an_engine_that_dies_is_told(cluster: LocalCluster) -> None:
    with cluster.dense() as client:
        engine = client.actor._engine
        assert engine is not None
        caught: list[BaseException] = []
        inside, waiting = threading.Event(), threading.Event()

        def hold() -> None:
            inside.set()
            waiting.wait(60)

        def adopt() -> None:
            try:
                engine.adopt_view(cluster.view)
            except ClusterError as error:
                caught.append(error)

        holder = threading.Thread(target=lambda: engine.between_steps(hold))
        holder.start()
        assert inside.wait(60)
        engine.stop()  # its order stands before that of `adopt`
        late = threading.Thread(target=adopt)
        late.start()
        waiting.set()
        holder.join(60)
        late.join(60)
        assert not late.is_alive() and not holder.is_alive()
        assert len(caught) == 1


def until_queued(engine: dense_engine.DenseEngine, number: int) -> None:
    for _ in range(6000):
        if engine._inbox.qsize() == number:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{engine._inbox.qsize()} are queued")


def test_an_idle_engine_that_is_stuck_tells_that_a_view_waits_and_nothing_moves(
    cluster: LocalCluster,
) -> None:
    """It had no request, so it was taken to get on, whatever the coordinator offered it."""
    with cluster.dense() as client:
        actor, engine = client.actor, client.actor._engine
        assert engine is not None
        stuck, go_on = threading.Event(), threading.Event()

        def block() -> None:
            stuck.set()
            go_on.wait(60)

        engine.run_soon(block)
        assert stuck.wait(60)
        done, waiting = actor.heartbeat()
        assert waiting == 0, "nobody wants anything of it"
        newer = msgspec.structs.replace(cluster.view, epoch=2)
        offering = threading.Thread(target=actor.offer_view, args=(newer,))
        offering.start()
        until_queued(engine, 1)
        assert actor.heartbeat() == (done, 1)
        go_on.set()
        offering.join(60)
        assert actor.heartbeat() == (done + 1, 0)


def test_what_a_hold_has_settled_keeps_nobody_waiting_when_the_engine_ends(
    cluster: LocalCluster,
) -> None:
    """The thread died of a future that was set twice, and who waited behind it did so for ever."""
    with cluster.dense() as client:
        engine, views = client.actor._engine, client.actor._views
        assert engine is not None and views is not None
        inside, go_on = threading.Event(), threading.Event()
        newer = msgspec.structs.replace(cluster.view, epoch=2)
        settled: Future[None] = Future()

        def step() -> None:
            inside.set()
            go_on.wait(60)
            views.hold(2, lambda: True, views.hold_s)

        engine.run_soon(step)
        assert inside.wait(60)
        engine.stop()
        views.tell(newer, settled)
        caught: list[BaseException] = []

        def ask() -> None:
            try:
                engine.between_steps(lambda: None)
            except ClusterError as error:
                caught.append(error)

        adopting = threading.Thread(
            target=lambda: engine.adopt_view(newer, adopted=settled), daemon=True
        )
        late = threading.Thread(target=ask, daemon=True)
        for number, each in enumerate((adopting, late), 2):  # behind the order to stop
            each.start()
            until_queued(engine, number)
        go_on.set()
        adopting.join(60)
        late.join(60)
        assert not adopting.is_alive() and not late.is_alive()
        assert len(caught) == 1 and "has stopped" in str(caught[0])


def test_views_that_are_in_use_leave_nothing_behind(cluster: LocalCluster) -> None:
    with cluster.dense() as client:
        for epoch in range(2, 7):
            client.actor.adopt_view(msgspec.structs.replace(cluster.view, epoch=epoch))
        assert client.actor._views is not None
        assert len(client.actor._views._adoptions) <= 1


def test_an_actor_stopped_while_it_loads_ends(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go = threading.Event(), threading.Event()
    build = dense_load.build_dense

    def slow(*args: object, **kwargs: object) -> object:
        loading.set()
        assert go.wait(60)
        return build(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dense_load, "build_dense", slow)
    actor = dense_actor.DenseActor(cluster.launch())
    starter = threading.Thread(target=actor.start)
    starter.start()
    assert loading.wait(60)
    stopper = threading.Thread(target=actor.stop)
    stopper.start()
    go.set()
    stopper.join(60)
    starter.join(60)
    assert not stopper.is_alive() and not starter.is_alive()
    assert not actor.status()["alive"]


def test_a_flood_of_messages_closes_its_connection_alone(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_engine, "INBOX_MAX", 8)
    with cluster.dense() as client:
        engine = client.actor._engine
        assert engine is not None
        inside, go = threading.Event(), threading.Event()
        holder = threading.Thread(target=lambda: engine.between_steps(lambda: _hold(inside, go)))
        holder.start()
        assert inside.wait(60)

        async def flood() -> None:
            endpoint = client.member.endpoint
            connection = await connect_async(endpoint, TOKEN, endpoint.host, name="flood")
            with pytest.raises(ClusterError):  # while it sends, where the machine is busy
                for number in range(20):
                    connection.send(encode(Abort(f"request-{number}")))
                async for _ in connection:
                    raise AssertionError("nothing was asked for")
            await connection.close()

        try:
            asyncio.run(flood())
        finally:
            go.set()
            holder.join(60)
        assert client.ask([ASK])[0].finish_reason == "length"


def _hold(inside: threading.Event, go: threading.Event) -> None:
    inside.set()
    go.wait(60)
