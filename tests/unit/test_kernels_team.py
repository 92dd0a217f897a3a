"""The thread team: every worker once, errors to the caller, no core burned by idle helpers."""

import os
import threading
import time

import pytest
import torch

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


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own() -> None:
    assert probe(2)[0] == [1, 1]
    child = os.fork()
    if child == 0:
        os._exit(0 if probe(2)[0] == [1, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
