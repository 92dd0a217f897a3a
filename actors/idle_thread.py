"""Work that takes only the time that nobody else wants: loading beside processes that serve."""

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def go_idle(name: str) -> None:
    """Have the system schedule this thread, and those that it starts, last (`SCHED_IDLE`)."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as refused:  # a sandbox; it works all the same
        logger.warning("%s: no idle priority: %s", name, refused.strerror)


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
