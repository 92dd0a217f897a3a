"""The thread team: every worker once, errors to the caller, no core burned by idle helpers."""

import os
import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remora.kernels import native

pytestmark = pytest.mark.skipif(not native.native_available(), reason="C++ kernels not built")


def probe(num_workers: int, throw_in: int = -1) -> tuple[list[int], int]:
    """(calls of each worker, threads that were used)."""
    *calls, num_threads = torch.ops.remora.team_probe(num_workers, throw_in)
    return calls, num_threads


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 7])
def test_every_worker_is_called_once(num_workers: int) -> None:
    for _ in range(200):
        calls, num_threads = probe(num_workers)
        assert calls == [1] * num_workers and num_threads <= num_workers


def test_an_exception_reaches_the_caller_and_the_team_lives_on() -> None:
    for worker in range(3):
        with pytest.raises(RuntimeError, match=f"worker {worker} was asked to fail"):
            probe(3, throw_in=worker)
        assert probe(3)[0] == [1, 1, 1]


def test_a_second_thread_gets_its_work_done_too() -> None:
    done: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: done.extend(probe(2)[0] for _ in range(300)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [[1, 1]] * 900


def test_idle_helpers_burn_no_core() -> None:
    probe(2)
    torch.ops.remora.team_park()
    before = time.process_time()
    threading.Event().wait(0.1)
    assert time.process_time() - before < 0.02
    assert probe(2)[0] == [1, 1]  # asleep, they still come


def test_park_while_they_come_and_go() -> None:
    for _ in range(300):
        assert probe(2)[0] == [1, 1]
        torch.ops.remora.team_park()
    assert torch.ops.remora.team_park_address() != 0


def test_wake_while_they_come_and_go() -> None:
    """Whatever a helper is at, no task is lost; awake and without work, it falls asleep again."""
    for i in range(300):
        assert probe(3)[0] == [1, 1, 1]
        if i % 2:
            torch.ops.remora.team_park()
        torch.ops.remora.team_wake()
    before = time.process_time()
    threading.Event().wait(0.1)
    assert time.process_time() - before < 0.02
    assert torch.ops.remora.team_wake_address() != 0


def test_workers_take_their_own_from_the_front_and_others_from_the_back() -> None:
    tasks, following = torch.ops.remora.task_runs_probe(7, 2, [0, 1, 0, 0, 0, 0, 0, 1, 0])
    assert tasks == [0, 3, 1, 2, 6, 5, 4, -1, -1]
    assert following == [1, 4, 2, -1, 5, 4, -1, -1, -1]


@given(
    num_tasks=st.integers(0, 40),
    num_workers=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_task_is_taken_once(num_tasks: int, num_workers: int, seed: int) -> None:
    """Whoever comes when: and one that takes all its own alone always knew what came next."""
    rng = random.Random(seed)
    takers = [rng.randrange(num_workers) for _ in range(num_tasks + 3)]
    tasks, _ = torch.ops.remora.task_runs_probe(num_tasks, num_workers, takers)
    assert sorted(tasks[:num_tasks]) == list(range(num_tasks)) and tasks[num_tasks:] == [-1] * 3
    alone, following = torch.ops.remora.task_runs_probe(num_tasks, 1, [0] * num_tasks)
    assert alone == list(range(num_tasks))
    assert following == [*range(1, num_tasks), -1][:num_tasks]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own() -> None:
    assert probe(2)[0] == [1, 1]
    child = os.fork()
    if child == 0:
        os._exit(0 if probe(2)[0] == [1, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
