"""Calls to many data-plane actors at once, under one deadline, with errors that name the actor."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray

from remora.actors.launch import Progress
from remora.comm.errors import ClusterError, DeadlineError, RemoraError, first_line

logger = logging.getLogger(__name__)

STATUS_S = 5.0  # for all members to tell how they are
JOINING_S = 1.0  # for those that start: where they have no place yet, nobody answers
PROGRESS_S = 1.0
STOP_S = 10.0  # for all members of a role to stop by themselves
_UNANSWERED = (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError)
LOOK_S = 2.0  # for an actor to say how far it is, once it is late


def answers_within(pending: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """What each call (by uid) came to within `timeout_s` in all: its answer, or a `RayError`."""
    if pending:
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=timeout_s)
    found: dict[str, Any] = {}
    for uid, reference in pending.items():
        try:
            found[uid] = ray.get(reference, timeout=0)
        except ray.exceptions.RayError as broken:
            found[uid] = broken
    return found


def all_answers(pending: Mapping[str, Any], until_s: float) -> dict[str, Any]:
    """The answers of all calls (by uid), until `until_s` of the monotonic clock.

    Raises:
        RemoraError: what an actor raised, as soon as the first one does.
        ClusterError: an actor died, or raised something else; named.
        LateError: some have not answered in time.
    """
    uids = {reference: uid for uid, reference in pending.items()}
    found: dict[str, Any] = {}
    left = list(uids)
    while left:
        done, left = ray.wait(left, timeout=max(0.0, until_s - time.monotonic()))
        if not done:
            raise LateError([uids[reference] for reference in left])
        for reference in done:
            found[uids[reference]] = _answer(uids[reference], reference)
    return {uid: found[uid] for uid in pending}


def first_answer(pending: Mapping[str, Any], until_s: float) -> Any:
    """The answer of the call (by uid) that is first to have one.

    Raises:
        as `all_answers`.
    """
    done, _ = ray.wait(list(pending.values()), timeout=max(0.0, until_s - time.monotonic()))
    if not done:
        raise LateError(list(pending))
    [uid] = [uid for uid, reference in pending.items() if reference == done[0]]
    return _answer(uid, done[0])


def status_of(handles: Mapping[str, Any], joining: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What every member says of itself, or what keeps it from that; plain data.

    Args:
        joining: who starts, so that no answer means that there is no process yet, by uid; with what
            each asks of Ray.
    """
    members = {}
    pending = {uid: handle.status.remote() for uid, handle in handles.items()}
    there = {uid: call for uid, call in pending.items() if uid not in joining}
    answers = answers_within(there, STATUS_S)
    answers |= answers_within({uid: pending[uid] for uid in joining}, JOINING_S)
    for uid in handles:
        answer = answers[uid]
        if isinstance(answer, _UNANSWERED):
            why = "it does not answer"
            if uid in joining:
                why = f"no process yet: it begins, or waits for a place (asks for {joining[uid]})"
            phase = "starting" if uid in joining else "serving"
            members[uid] = {"alive": uid in joining, "phase": phase, "error": why}
        elif isinstance(answer, Exception):
            members[uid] = {"alive": False, "error": first_line(answer)}
        else:
            members[uid] = answer
    return members


def progress_of(handles: Mapping[str, Any]) -> dict[str, Progress]:
    """How far each actor has loaded."""
    report = {}
    pending = {uid: handle.progress.remote() for uid, handle in handles.items()}
    for uid, answer in answers_within(pending, PROGRESS_S).items():
        if isinstance(answer, _UNANSWERED):
            answer = Progress(phase="starting")
        elif isinstance(answer, Exception):
            answer = Progress(phase=f"died: {first_line(answer)}")
        report[uid] = answer
    return report


def stop_members(handles: Mapping[str, Any]) -> None:
    """Ask all to stop, within STOP_S a role. Dense groups first, their first ranks before the
    others: one whose shards vanish would report a fault."""
    dense = {uid for uid in handles if uid.startswith("dense-")}
    leaders = {uid for uid in dense if "." not in uid}
    for uids in (leaders, dense - leaders, handles.keys() - dense):
        pending = {u: h.stop.remote() for u, h in handles.items() if u in uids}
        for uid, answer in answers_within(pending, STOP_S).items():
            if isinstance(answer, Exception):
                logger.warning("%s did not stop by itself: %s", uid, first_line(answer))


class LateError(DeadlineError):
    """Actors that have not answered in time.

    Attributes:
        uids: theirs.
    """

    def __init__(self, uids: list[str]) -> None:
        super().__init__(f"{', '.join(uids)} did not answer in time")
        self.uids = uids


def why_late(handles: Mapping[str, Any], asked: Mapping[str, str]) -> str:
    """What keeps each of `handles` from having started: no place for it, or its loading.

    Args:
        asked: what each asks of Ray, as text.
    """
    progress = answers_within({u: h.progress.remote() for u, h in handles.items()}, LOOK_S)
    placeless: dict[str, list[str]] = {}
    lines = []
    for uid, answer in progress.items():
        if isinstance(answer, ray.exceptions.GetTimeoutError):
            placeless.setdefault(asked[uid], []).append(uid)
        elif isinstance(answer, Exception):
            lines.append(f"{uid}: {first_line(answer)}")
        else:
            lines.append(
                f"{uid} is {answer.phase} ({answer.bytes_done:,} of {answer.bytes_total:,} bytes)"
            )
    lines += [
        f"{', '.join(uids)} found no place (each asks for {what})"
        for what, uids in placeless.items()
    ]
    if placeless:
        lines.append(f"the Ray cluster has {_nodes()}: ask for less, or add nodes")
    return "; ".join(lines)


def asked_of_ray(options: Mapping[str, Any]) -> str:
    """What an actor with these options asks of Ray, as text."""
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    amounts |= options.get("resources", {})
    text = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)
    labels = options.get("label_selector", {})
    wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
    return (text or "nothing") + (f" on a node labelled {wanted}" if wanted else "")


def _nodes() -> str:
    kinds: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"]:
            amounts = {
                name: amount
                for name, amount in sorted(node["Resources"].items())
                if name not in ("memory", "object_store_memory") and not name.startswith("node:")
            }
            text = ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
            kinds[text] = kinds.get(text, 0) + 1
    return "; ".join(f"{count} node(s) of {text or 'nothing'}" for text, count in kinds.items())


def _answer(uid: str, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as failure:
        if isinstance(failure.cause, RemoraError):
            raise failure.cause from None
        kind = type(failure.cause).__name__
        raise ClusterError(f"{uid} failed: {kind}: {failure.cause}") from failure
    except ray.exceptions.RayError as broken:
        raise ClusterError(f"{uid} died: {broken}") from broken
