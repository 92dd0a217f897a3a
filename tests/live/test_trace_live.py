"""A recording goes on while the dense groups that it asks die and come, over real Ray."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from remora.actors.launch import RAY_NAMESPACE, actor_name
from remora.actors.trace_recorder import Recorded, TraceRecorder
from remora.cluster.trace_live import Groups, record
from remora.comm.errors import ClusterError
from remora.comm.routing_counter import Run
from remora.comm.trace import DECODE, TraceHeader
from remora.comm.trace_reader import read_trace
from remora.comm.view import Endpoint, Member, Placement, View

NAME = f"recorded-{os.getpid()}"
SOON_S = 60.0
HEADER = TraceHeader(model="m", num_experts=4, top_k=1, moe_layers=(0,), vocab_size=100)


class Recorder:
    """What a dense group does for a recording, with its own recorder; tokens come from the test."""

    def __init__(self) -> None:
        self._recorder: TraceRecorder | None = None
        self._lock = threading.Condition()

    def start_recording(self, tokens_max: int, name: str) -> TraceHeader:
        with self._lock:
            self._recorder = TraceRecorder(HEADER, tokens_max, name)
            self._lock.notify_all()
        return HEADER

    def take_recorded(self, name: str) -> Recorded:
        with self._lock:
            if self._recorder is None or self._recorder.name != name:
                raise ClusterError("another recording of this deployment began")
            return self._recorder.take()

    def stop_recording(self, name: str) -> None:
        pass

    def route(self, num_tokens: int) -> int:
        """Tokens of request 0, once they are recorded; returns the process."""
        run = Run(0, DECODE, num_tokens, 0, [7] * num_tokens, "")
        with self._lock:
            assert self._lock.wait_for(lambda: self._recorder is not None, SOON_S)
            assert self._recorder is not None
            self._recorder.note(np.full((1, num_tokens, 1), 3), [run])
        return os.getpid()


class Coordinator:
    """Who says which dense groups there are."""

    def __init__(self, view: View) -> None:
        self._view = view

    def view(self) -> View:
        return self._view

    def publish(self, view: View) -> None:
        self._view = view


def view_of(epoch: int, **lives: int) -> View:
    """Of dense groups, each with its incarnation."""
    members = tuple(
        Member(
            uid=uid.replace("_", "-"),
            incarnation=incarnation,
            role="dense",
            endpoint=Endpoint(host="h", tcp_address="127.0.0.1:1"),
            actor_name=actor_name(NAME, uid.replace("_", "-"), incarnation),
        )
        for uid, incarnation in lives.items()
    )
    placement = Placement(num_experts=4, moe_layers=(0,), slots={})
    return View(epoch=epoch, members=members, placement=placement)


class Recording:
    """A recording in a thread of its own, and what it has told so far."""

    def __init__(self, coordinator: Any, view: View, output: Path, tokens_max: int) -> None:
        self.said: list[str] = []
        self._num_tokens = 0
        self._changed = threading.Condition()
        groups = Groups(coordinator.view.remote, tokens_max, self._say)
        self._pool = ThreadPoolExecutor(1)
        self.over = self._pool.submit(record, groups, view, output, SOON_S, False, self._count)

    def until(self, *, num_tokens: int = 0, num_said: int = 0) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: self._num_tokens >= num_tokens and len(self.said) >= num_said, SOON_S
            ), (self._num_tokens, self.said, self.over)

    def _say(self, change: str) -> None:
        with self._changed:
            self.said.append(change)
            self._changed.notify_all()

    def _count(self, num_tokens: int) -> None:
        with self._changed:
            self._num_tokens = num_tokens
            self._changed.notify_all()


@pytest.fixture
def begin(one_ray: None) -> Iterator[Any]:
    """Starts actors; they are ended behind the test."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    remote: Any = ray.remote
    actors = []

    def begun(kind: type, name: str, *given: Any) -> Any:
        options = {"name": name, "namespace": RAY_NAMESPACE, "num_cpus": 0, "max_concurrency": 2}
        actors.append(remote(kind).options(**options).remote(*given))
        return actors[-1]

    yield begun
    for actor in actors:
        ray.kill(actor)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_it_goes_on_with_the_groups_that_are_left_and_with_those_that_come(
    begin: Any, tmp_path: Path
) -> None:
    """It ended with an error when one of them died; of one that hung all waited."""
    dead, other = (begin(Recorder, actor_name(NAME, uid, 1)) for uid in ("dense-0", "dense-1"))
    view = view_of(1, dense_0=1, dense_1=1)
    coordinator = begin(Coordinator, f"{NAME}-coordinator", view)
    recording = Recording(coordinator, view, tmp_path / "t", tokens_max=40)
    ray.get(dead.route.remote(5))
    recording.until(num_tokens=5)
    ray.kill(dead)
    recording.until(num_said=1)
    pid = ray.get(other.route.remote(5))
    recording.until(num_tokens=10)
    os.kill(pid, signal.SIGSTOP)
    try:
        again = begin(Recorder, actor_name(NAME, "dense-0", 2))
        new = begin(Recorder, actor_name(NAME, "dense-2", 1))
        ray.get(coordinator.publish.remote(view_of(2, dense_0=2, dense_1=1, dense_2=1)))
        ray.get([again.route.remote(8), new.route.remote(12)])
        recording.until(num_tokens=30)
    finally:
        os.kill(pid, signal.SIGCONT)
    ray.get(other.route.remote(50))
    assert recording.over.result(SOON_S) == 0
    trace = read_trace(tmp_path / "t")
    assert trace.is_whole and trace.num_tokens == 40
    count = dict(zip(trace.sources, np.bincount(trace.source_T).tolist(), strict=True))
    assert count == {"dense-0": 13, "dense-1": 15, "dense-2": 12}
    assert sorted(np.bincount(trace.request_T).tolist()) == [5, 8, 12, 15], "a life is no other's"
    assert [change.partition(":")[0] for change in recording.said] == [
        "dense-0 has ended", "dense-0 has come", "dense-2 has come"
    ]  # fmt: skip


def test_it_ends_when_nothing_serves_any_more_or_another_one_began(
    begin: Any, tmp_path: Path
) -> None:
    group = begin(Recorder, actor_name(NAME, "dense-0", 9))
    view = view_of(1, dense_0=9)
    coordinator = begin(Coordinator, f"{NAME}-another", view)
    taken_over = Recording(coordinator, view, tmp_path / "one", tokens_max=40)
    ray.get(group.route.remote(5))
    taken_over.until(num_tokens=5)
    recording = Recording(coordinator, view, tmp_path / "two", tokens_max=40)
    with pytest.raises(ClusterError, match="another recording"):
        taken_over.over.result(SOON_S)
    ray.get(group.route.remote(5))
    recording.until(num_tokens=5)
    for actor in (group, coordinator):
        ray.kill(actor)
    with pytest.raises(ClusterError, match="nothing serves any more"):
        recording.over.result(SOON_S)
    for name in ("one", "two"):
        trace = read_trace(tmp_path / name)
        assert trace.num_tokens == 5 and not trace.is_whole
