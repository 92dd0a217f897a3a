"""Processes that live and do not get on: found by their progress, and not waited for."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.local_cluster import Ask, DenseClient, LocalCluster

from remora.actors.coordinator_watch import CoordinatorWatch, turn_of
from remora.actors.expert_actor import ExpertActor
from remora.actors.health_state import ENDING_S, Beat, HealthState, Life
from remora.comm.call_deadline import LEAST_S, CallDeadline
from remora.comm.errors import ClusterError
from remora.comm.messages import SamplingParams
from remora.comm.view import Endpoint, Member, Placement, View

A, B = ("shard-0", 1), ("dense-0", 3)
ROUTER: Life = ("router", 0)


def health(*lives: Life) -> HealthState:
    state = HealthState(hang_s=10.0, stall_s=40.0)
    state.watch(set(lives), 0.0)
    return state


def seconds(state: HealthState, begin: int, end: int, **beats: Beat | None) -> list[str]:
    """Look every second; members that `beats` names answer at once. Who hangs."""
    found = []
    for now in range(begin, end):
        found += [f"{uid}: {why}" for (uid, _), why in state.look(float(now))]
        for life in state.to_ask(float(now)):
            if (name := life[0].replace("-", "_")) in beats:
                state.answered(life, beats[name], float(now))
    return found


def test_who_does_not_answer_hangs_and_is_said_once() -> None:
    state = health(A, B)
    assert seconds(state, 0, 10, dense_0=Beat()) == []
    assert seconds(state, 10, 30, dense_0=Beat()) == [
        "shard-0: it has given no sign of progress for 11.0 s"
    ]


def test_who_answers_and_does_not_move_hangs_only_while_work_waits() -> None:
    state = health(B)
    assert seconds(state, 0, 100, dense_0=Beat(progress=7)) == []
    assert seconds(state, 100, 130, dense_0=Beat(progress=7, waiting=2)) == []
    assert seconds(state, 130, 131, dense_0=Beat(progress=8, waiting=2)) == []
    assert seconds(state, 131, 171, dense_0=Beat(progress=8, waiting=2)) == []
    [found] = seconds(state, 171, 180, dense_0=Beat(progress=8, waiting=2))
    assert "work waits and nothing has moved for 41.0 s" in found


def test_a_watcher_that_was_stopped_himself_blames_nobody() -> None:
    state = health(A, B)
    seconds(state, 0, 3, dense_0=Beat(progress=1, waiting=1))
    assert state.look(500.0) == [] and state.look(501.0) == []
    assert [life for life, _ in state.look(504.5) + state.look(509.0) + state.look(511.0)] == [A]


def test_a_new_life_and_failed_calls_are_not_blamed() -> None:
    state = health(A)
    state.to_ask(0.0)
    state.look(4.0)
    state.watch({("shard-0", 2)}, 4.0)
    state.look(8.0)
    assert state.look(12.0) == [], "the new life has not been asked yet"
    state.to_ask(12.0)
    state.answered(("shard-0", 2), None, 13.0)  # the call failed: asked again
    assert state.to_ask(13.0) == [("shard-0", 2)]


def test_who_has_ended_does_not_hang() -> None:
    state = health(A, B)
    seconds(state, 0, 2, dense_0=Beat())
    state.forget(A)
    assert seconds(state, 2, 60, dense_0=Beat()) == []


def test_who_is_always_watched_is_watched_afresh_after_it_hung() -> None:
    state = health(A)
    state.also({ROUTER}, 0.0)
    assert seconds(state, 0, 12, shard_0=Beat()) == [
        "router: it has given no sign of progress for 11.0 s"
    ]
    state.also({ROUTER, A}, 12.0)
    assert state.to_ask(12.0) == [A], "the router is being ended"
    state.answered(A, Beat(), 12.0)
    state.also({ROUTER, A}, 11.0 + ENDING_S)
    assert seconds(state, 21, 32, shard_0=Beat()) == [], "its next life has time, too"
    assert len(seconds(state, 32, 40, shard_0=Beat())) == 1


class Coordinator:
    """One whose lives answer or not, as dense groups see it."""

    def __init__(self) -> None:
        self.answers = False
        self.asked: list[Future[Beat]] = []
        self.ended_by: list[str] = []
        self.ended = threading.Event()

    def ask(self) -> "Future[Beat]":
        beat: Future[Beat] = Future()
        if self.answers:
            beat.set_result(Beat())
        else:
            self.asked.append(beat)
        return beat

    def end(self, uid: str) -> None:
        """All that waits fails, and the next life answers."""
        self.ended_by.append(uid)
        self.answers = True
        for beat in self.asked:
            beat.set_exception(ClusterError("ended"))
        self.ended.set()


def view_of(*groups: str) -> View:
    endpoint = Endpoint(host="here", tcp_address="127.0.0.1:1")
    members = tuple(
        Member(uid=uid, incarnation=1, role="dense", endpoint=endpoint, actor_name=uid)
        for uid in groups
    )
    placement = Placement(num_experts=1, moe_layers=(0,), slots={"shard-0": ((0,),)})
    return View(epoch=1, members=members, placement=placement)


def test_dense_groups_end_a_hung_coordinator_in_turn() -> None:
    view = view_of("dense-2", "dense-0", "dense-10")
    assert [turn_of(m.uid, view) for m in view.members] == [2, 0, 1]
    assert turn_of("dense-1", view) == 3, "it retires: whoever stays goes first"


def test_a_coordinator_that_hangs_is_ended_once_and_one_that_answers_never() -> None:
    view, coordinator = view_of("dense-0", "dense-1"), Coordinator()

    def watch(uid: str) -> CoordinatorWatch:
        return CoordinatorWatch(
            uid, hang_s=0.4, start_s=60.0, ask=coordinator.ask, end=lambda: coordinator.end(uid)
        )

    watches = [watch("dense-0"), watch("dense-1")]
    try:
        for each in watches:
            each.adopt_view(view)
        assert coordinator.ended.wait(30)
        answered = len(coordinator.asked)
        assert answered in (1, 2), "a call waits at a time"
    finally:
        for each in watches:
            each.close()
    assert coordinator.ended_by == ["dense-0"]


@given(st.lists(st.floats(0.0, 50.0), max_size=40), st.floats(0.1, 60.0))
def test_the_deadline_of_a_call_is_bounded(took: list[float], most_s: float) -> None:
    deadline = CallDeadline(most_s)
    for each in took:
        deadline.note(each)
    found = deadline.seconds(is_redundant=True)
    assert min(LEAST_S, most_s) <= found <= most_s
    assert found >= min(most_s, 4 * max(took, default=0.0)), "far above what was measured"
    assert deadline.seconds(is_redundant=False) == most_s


def test_the_deadline_forgets_a_slow_layer() -> None:
    deadline = CallDeadline(30.0)
    deadline.note(2.0)
    assert deadline.seconds(is_redundant=True) == 16.0
    for _ in range(10_000):
        deadline.note(0.001)
    assert deadline.seconds(is_redundant=True) == LEAST_S


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Two shards that hold every expert."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    found = LocalCluster(path, num_shards=2, dtype="float32", exact=True, slots=8)
    yield found
    found.close()


@contextmanager
def stopped(shard: ExpertActor) -> Iterator[None]:
    """The thread that serves does nothing meanwhile, as after SIGSTOP."""
    begun, go_on = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        assert go_on.wait(60)

    blocker = threading.Thread(target=lambda: shard._changing().between_calls(block))
    blocker.start()
    assert begun.wait(30)
    try:
        yield
    finally:
        go_on.set()
        blocker.join()


def tokens(client: DenseClient, count: int = 12) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    answers = client.ask([Ask((5, 9, 3, 7), params), Ask((11, 2), params)])
    assert [a.finish_reason for a in answers] == ["length"] * 2, answers
    return [a.token_ids for a in answers]


def test_a_step_is_held_for_a_shard_that_stops_longer_than_a_call_may_take(
    tmp_path: Path,
) -> None:
    """Nobody else has its experts, and nobody restores it: no view comes that ends the hold."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    cluster = LocalCluster(path, num_shards=2, dtype="float32", exact=True)
    try:
        with cluster.dense(call_timeout_s=0.2, hold_s=60.0) as client:
            expected = tokens(client)
            with ThreadPoolExecutor(1) as pool:
                with stopped(cluster.shards[1]):
                    held = pool.submit(tokens, client)
                    client.wait_until_held()
                    assert not held.done()
                assert held.result(60) == expected
    finally:
        cluster.close()


def test_a_shard_that_stops_is_masked_and_asked_again_once_it_goes_on(
    cluster: LocalCluster,
) -> None:
    with cluster.dense(call_timeout_s=600.0) as client:  # nobody waits for that here
        expected = tokens(client)
        dispatcher = client.actor._dispatcher
        assert dispatcher is not None
        with stopped(cluster.shards[1]):
            assert tokens(client) == expected
            assert dispatcher.suspects == {"shard-1"}
        served = cluster.shards[1].status()["calls_served"]
        assert cluster.shards[1].heartbeat()[1] == 0  # what waited has been answered
        while dispatcher.suspects:  # the answers are taken with those of the next steps
            assert tokens(client) == expected
        assert tokens(client) == expected
        late = dispatcher.counters.link("shard-1").late_replies
        assert late >= 1, "dropped by their sequence"
        assert cluster.shards[1].status()["calls_served"] > served
