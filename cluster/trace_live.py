"""Records the routing of a deployment that runs: asks its dense groups, and writes what they have.

The groups go on serving: rows are taken by the thread that counts routing anyway. Blocks are
fetched every `TAKE_EVERY_S`; a group whose blocks nobody fetches keeps a bounded number of them.

Groups come and go meanwhile. One that dies ends neither the recording of the others nor that of its
next life, and one that hangs keeps nobody waiting but the end.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from remora.actors.launch import RAY_NAMESPACE
from remora.actors.trace_recorder import Recorded
from remora.cluster.manage_command import deployment_at
from remora.cluster.members import answers_within
from remora.cluster.ray_calls import our_error
from remora.comm.errors import ClusterError, DeadlineError, first_line
from remora.comm.trace import Trace, TraceHeader, TraceWriter
from remora.comm.trace_reader import decode_record
from remora.comm.view import View

TAKE_EVERY_S = 0.5
ANSWER_S = 60.0  # for a group to answer, between two steps
STOP_S = 5.0  # for all groups to hear that it is over

Say = Callable[[str], None]


def record_deployment(
    name: str,
    address: str | None,
    output: Path,
    *,
    tokens_max: int,
    seconds: float,
    overwrite: bool,
    progress: Callable[[int], None],
    say: Say,
) -> int | None:
    """Write a trace of the next tokens of a deployment, whichever dense groups it has meanwhile.

    Args:
        tokens_max, seconds: whichever is reached first ends it.
        progress: told how many tokens there are.
        say: told which groups have come, have ended, or do not answer.

    Returns:
        Tokens that were routed meanwhile and are not in it; None: there is no such deployment.

    Raises:
        ClusterError: nothing serves, no dense group answers, or another recording began.
        TraceError: the file exists or cannot be written.
    """
    with deployment_at(name, address) as handle:
        if handle is None:
            return None
        groups = Groups(handle.coordinator.view.remote, tokens_max, say)
        return record(groups, handle.view(), output, seconds, overwrite, progress)


def record(
    groups: "Groups",
    view: View,
    output: Path,
    seconds: float,
    overwrite: bool,
    progress: Callable[[int], None],
) -> int:
    """As `record_deployment`, of `groups`; `view` has those that there are now."""
    numbers: dict[tuple[str, int], int] = {}
    never = threading.Event()
    try:
        header = groups.begin(view)
        until_s = time.monotonic() + seconds
        with TraceWriter(output, header, overwrite=overwrite) as writer:
            while True:
                left_s = until_s - time.monotonic()
                never.wait(max(0.0, min(TAKE_EVERY_S, left_s)))
                is_last = left_s <= TAKE_EVERY_S
                for group, recorded in groups.take() if not is_last else groups.take_last():
                    _write(writer, header, group, recorded, numbers, groups.tokens_max)
                writer.flush()  # what has been taken is in the file, whatever happens next
                progress(writer.num_tokens)
                if is_last or writer.num_tokens >= groups.tokens_max:
                    return groups.left_out()
    finally:
        groups.stop()


@dataclass
class Group:
    """One life of a dense group."""

    name: str  # of its actor: another life has another
    uid: str
    actor: Any
    asked: Any = None  # the call that it has not answered
    is_recording: bool = False
    has_ended: bool = False
    left_out: int = 0


class Groups:
    """The dense groups that a deployment has at each moment, and what they record.

    Each is asked one thing at a time: what a group gives is gone there, so that no answer is given
    up while it may still come.

    Args:
        look: asks for the view; a reference of Ray's.
        say: as in `record_deployment`.
    """

    def __init__(self, look: Callable[[], Any], tokens_max: int, say: Say) -> None:
        self.tokens_max = tokens_max
        self._look = look
        self._say = say
        self._mine = secrets.token_hex(8)  # two at once would take each other's tokens
        self._groups: dict[str, Group] = {}
        self._header: TraceHeader | None = None
        self._looking: Any = None

    def begin(self, view: View) -> TraceHeader:
        """Have those of the view record; what traces of them begin with.

        Raises:
            ClusterError: none has begun within `ANSWER_S`.
        """
        self._adopt(view)
        until_s, never = time.monotonic() + ANSWER_S, threading.Event()
        while True:
            taken = self.take()
            assert not taken, "nothing is taken of who has not begun"
            if self._header is not None:
                return self._header
            if time.monotonic() > until_s:
                raise DeadlineError(f"no dense group began to record within {ANSWER_S:g} s")
            never.wait(TAKE_EVERY_S)

    def take(self) -> list[tuple[Group, Recorded]]:
        """What those have recorded that answer within `TAKE_EVERY_S`.

        Raises:
            ClusterError: another recording began, or nothing serves any more.
        """
        if self._looking is None:
            self._looking = self._look()
        for group in self._living():
            if group.asked is None:
                group.asked = (
                    group.actor.take_recorded.remote(self._mine)
                    if group.is_recording
                    else group.actor.start_recording.remote(self.tokens_max, self._mine)
                )
        taken = self._answers(self._living(), TAKE_EVERY_S)
        self._see()
        return taken

    def take_last(self) -> list[tuple[Group, Recorded]]:
        """What all have recorded; who does not answer within `ANSWER_S` is said."""
        recording = [group for group in self._living() if group.is_recording]
        for group in recording:
            if group.asked is None:
                group.asked = group.actor.take_recorded.remote(self._mine)
        taken = self._answers(recording, ANSWER_S)
        for group in recording:
            if group.asked is not None:
                self._say(f"{group.uid} does not answer: what it recorded last is missing")
        return taken

    def left_out(self) -> int:
        """Tokens that were routed and not recorded, as far as groups have told."""
        return sum(group.left_out for group in self._groups.values())

    def stop(self) -> None:
        """Have them record no more."""
        answers_within(
            {group.name: group.actor.stop_recording.remote(self._mine) for group in self._living()},
            STOP_S,
        )

    # -- inside -------------------------------------------------------------------------------

    def _living(self) -> list[Group]:
        return [group for group in self._groups.values() if not group.has_ended]

    def _adopt(self, view: View) -> list[Group]:
        """Add those of a view that are new; returns them."""
        found = []
        for member in view.members:
            if member.role == "dense" and member.actor_name not in self._groups:
                try:
                    actor = ray.get_actor(member.actor_name, namespace=RAY_NAMESPACE)
                except ValueError:  # it is dead already, and the next view has its next life
                    continue
                found.append(Group(name=member.actor_name, uid=member.uid, actor=actor))
        self._groups |= {group.name: group for group in found}
        return found

    def _see(self) -> None:
        """Go by a newer view, if one has come."""
        done, _ = ray.wait([self._looking], timeout=0)
        if not done:
            return
        try:
            view = ray.get(self._looking)
        except ray.exceptions.ActorUnavailableError:
            return  # Ray is starting the coordinator again
        except ray.exceptions.RayError as failure:
            if not self._living():
                raise _ours(failure) from failure
            return  # groups serve, and record, without it
        finally:
            self._looking = None
        for group in self._adopt(view):
            self._say(f"{group.uid} has come: its tokens are recorded from now on")

    def _answers(self, groups: Iterable[Group], timeout_s: float) -> list[tuple[Group, Recorded]]:
        pending = {group.asked: group for group in groups}
        if not pending:
            return []
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
        taken = []
        for reference in done:
            group = pending[reference]
            group.asked = None
            recorded = self._answer(group, reference)
            if recorded is not None:
                group.left_out = recorded.tokens_left_out
                taken.append((group, recorded))
        return taken

    def _answer(self, group: Group, reference: Any) -> Recorded | None:
        """What a group has recorded; None: it has begun to, or has ended."""
        try:
            answer = ray.get(reference)
        except ray.exceptions.ActorUnavailableError:  # between the two of us: it is asked again
            self._say(f"{group.uid} was out of reach: some of what it recorded may be missing")
            return None
        except ray.exceptions.RayActorError:
            group.has_ended = True
            self._say(f"{group.uid} has ended: what it recorded last may be missing")
            return None
        except ray.exceptions.RayError as failure:
            raise _ours(failure) from failure
        if isinstance(answer, Recorded):
            return answer
        self._header, group.is_recording = answer, True
        return None


def _ours(failure: Exception) -> Exception:
    """A failure of Ray's in the words of whoever raised it."""
    if isinstance(failure, ray.exceptions.RayTaskError):
        return our_error(failure.cause)
    return ClusterError(f"nothing serves any more: {first_line(failure)}")


def _write(
    writer: TraceWriter,
    header: TraceHeader,
    group: Group,
    recorded: Recorded,
    numbers: dict[tuple[str, int], int],
    tokens_max: int,
) -> None:
    for data in recorded.blocks:
        block = decode_record(header, data)
        room = tokens_max - writer.num_tokens
        if room > 0:
            writer.append(_named(block.select(slice(0, room)), group, numbers))


def _named(block: Trace, group: Group, numbers: dict[tuple[str, int], int]) -> Trace:
    """With its source, and requests numbered through all groups and their lives."""
    own, index_T = np.unique(block.request_T, return_inverse=True)
    number = [numbers.setdefault((group.name, int(request)), len(numbers)) for request in own]
    return replace(
        block,
        request_T=np.array(number, np.int32)[index_T],
        source_T=np.zeros(block.num_tokens, np.int16),
        sources=(group.uid,),
    )
