"""Calls of Ray actors as futures of ours: what they came to, in the words of whoever raised."""

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any, Final

import ray

from remora.cluster.operation import Answer
from remora.comm.errors import ClusterError, RemoraError, first_line

ENDS: Final = "ends"  # the concurrency group of a member in which callers wait for its end


def first_of_all(pending: "Mapping[str, Future[Answer]]") -> "Future[Answer]":
    """The answer of the first of several calls once all have answered, or any failure at once."""
    outcome: Future[Answer] = Future()
    first = next(iter(pending.values()))
    lock, missing = threading.Lock(), set(pending)

    def told(name: str, done: "Future[Answer]") -> None:
        with lock:
            missing.discard(name)
            is_last = not missing
            if outcome.done():
                return
            failure = done.exception()
            if failure is not None:
                outcome.set_exception(ClusterError(f"{name}: {failure}"))
            elif is_last:
                outcome.set_result(first.result())

    for name, each in pending.items():
        each.add_done_callback(functools.partial(told, name))
    return outcome


def answer_of(
    reference: Any, convert: Callable[[Any], Any] = lambda answer: answer
) -> "Future[Any]":
    """What a call came to, with errors in the words of whoever raised them."""
    answered: Future[Any] = Future()

    def told(done: "Future[Any]") -> None:
        failure = done.exception()
        if failure is None:
            try:
                answered.set_result(convert(done.result()))
            except Exception as wrong:  # an answer of another form
                answered.set_exception(wrong)
        elif isinstance(failure, ray.exceptions.RayTaskError):
            cause = failure.cause
            known = cause if isinstance(cause, RemoraError) else ClusterError(repr(cause))
            answered.set_exception(known)
        else:
            answered.set_exception(ClusterError(first_line(failure)))

    reference.future().add_done_callback(told)
    return answered


def make_member(kind: type, name: str, options: Mapping[str, Any], *told: Any) -> Any:
    """The actor of a member, or of a standby. Who waits for its end has a thread of its own there
    (`end_of`): a coordinator that died leaves one that waits, and the next ones must be heard."""
    return _actor_class(kind).options(name=name, **options).remote(*told)


@cache
def _actor_class(kind: type) -> Any:
    """Ray's class of a kind of member, made once: to tell Ray of one takes 30 ms of a core, and Ray
    keeps each that it was told of."""
    remote: Any = ray.remote  # its overloads know no groups of a class given later
    return remote(concurrency_groups={ENDS: 1})(kind)


def end_of(handle: Any) -> "Future[None]":
    """Is done when a member has ended, however it did."""
    ended: Future[None] = handle.until_end.options(concurrency_group=ENDS).remote().future()
    return ended


def is_next_life() -> bool:
    """Whether Ray has started this actor again."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def our_error(failure: BaseException) -> RemoraError:
    """A failure as one of ours: what callers are told, and Ray carries to them."""
    if isinstance(failure, RemoraError):
        return failure
    return ClusterError(f"{type(failure).__name__}: {failure}")
