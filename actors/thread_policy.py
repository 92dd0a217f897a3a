"""How the system schedules a thread: last, for loading; without haste, for shards."""

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def go_idle(name: str) -> None:
    """Have the system schedule this thread, and those that it starts, last (`SCHED_IDLE`)."""
    _set_policy(name, os.SCHED_IDLE)


def let_senders_finish(name: str) -> None:
    """Have this thread and those that it starts take no core from who wakes it (`SCHED_BATCH`).

    A dense rank sends a layer's rows to one shard after the other. The system likes to run who is
    woken on the core of who wakes: as an ordinary thread the first shard would begin there at once,
    for a whole layer, and the second one of this host got its rows only then. Share and priority
    stay those of an ordinary thread. (On two cores, two shards, benchmarks' *small*: a decode step
    of 32 sequences takes 0.80 to 0.88 of the time, benchmarks/notes/2026-11-28-batch-policy.md.)
    """
    _set_policy(name, os.SCHED_BATCH)


def _set_policy(name: str, policy: int) -> None:
    try:
        os.sched_setscheduler(0, policy, os.sched_param(0))
    except OSError as refused:  # a sandbox; it works all the same
        logger.warning("%s: scheduling policy %d refused: %s", name, policy, refused.strerror)


def run_idle(name: str, work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own that the system schedules last (`SCHED_IDLE`); wait for it.

    The policy is the thread's, and so is that of threads which it starts: a process without
    privileges could not take it off a thread again that is to serve later.

    Raises:
        what `work` raises.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        go_idle(name)
        try:
            outcome.append(work())
        except BaseException as raised:  # handed to whoever waits
            failure.append(raised)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
