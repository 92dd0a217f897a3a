"""Threads say to the system how they want to be scheduled."""

import os
import threading

import pytest
from support.checkpoints import make_checkpoint
from support.local_cluster import LocalCluster

from remora.actors.thread_policy import let_senders_finish, run_idle


def test_idle_work_is_idle_and_so_are_its_threads_and_nobody_else() -> None:
    def work() -> list[int]:
        below: list[int] = []
        thread = threading.Thread(target=lambda: below.append(os.sched_getscheduler(0)))
        thread.start()
        thread.join()
        return [os.sched_getscheduler(0), *below]

    assert run_idle("a test", work) == [os.SCHED_IDLE, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_idle_work_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="out of it"):
        run_idle("a test", lambda: exec("raise ValueError('out of it')"))


def test_a_refused_policy_is_said_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    let_senders_finish("shard-3")
    assert "shard-3: scheduling policy 3 refused: Operation not permitted" in caplog.text


def test_a_shard_takes_no_core_from_who_sends_to_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")
    cluster = LocalCluster(model, num_shards=1, dtype="float32", exact=True)
    try:
        [serving] = [t for t in threading.enumerate() if t.name == "remora-shard-0"]
        assert os.sched_getscheduler(serving.native_id or 0) == os.SCHED_BATCH
    finally:
        cluster.close()
