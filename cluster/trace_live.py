"""Records the routing of a deployment that runs: asks its dense groups, and writes what they have.

The groups go on serving: rows are taken by the thread that counts routing anyway. Blocks are
fetched every `TAKE_EVERY_S`; a group whose blocks nobody fetches keeps a bounded number of them.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from remora.actors.launch import RAY_NAMESPACE
from remora.actors.trace_recorder import Recorded
from remora.cluster.manage_command import deployment_at
from remora.cluster.members import all_answers
from remora.comm.trace import Trace, TraceHeader, TraceWriter
from remora.comm.trace_reader import decode_record

TAKE_EVERY_S = 0.5
ANSWER_S = 60.0  # for a group to answer, between two steps


def record_deployment(
    name: str,
    address: str | None,
    output: Path,
    *,
    tokens_max: int,
    seconds: float,
    overwrite: bool,
    progress: Callable[[int], None],
) -> int | None:
    """Write a trace of the next tokens of a deployment.

    Args:
        tokens_max, seconds: whichever is reached first ends it.

    Returns:
        Tokens that were routed meanwhile and are not in it; None: there is no such deployment.

    Raises:
        ClusterError: a dense group does not answer, or nothing serves.
        TraceError: the file exists or cannot be written.
    """
    with deployment_at(name, address) as handle:
        if handle is None:
            return None
        groups = {
            member.uid: ray.get_actor(member.actor_name, namespace=RAY_NAMESPACE)
            for member in handle.dense_members()
        }
        return _record(groups, output, tokens_max, seconds, overwrite, progress)


def _record(
    groups: dict[str, Any],
    output: Path,
    tokens_max: int,
    seconds: float,
    overwrite: bool,
    progress: Callable[[int], None],
) -> int:
    mine = secrets.token_hex(8)  # two at once would take each other's tokens
    headers = _asked({u: g.start_recording.remote(tokens_max, mine) for u, g in groups.items()})
    header: TraceHeader = next(iter(headers.values()))
    numbers: dict[tuple[str, int], int] = {}
    left_out: dict[str, int] = {}
    never = threading.Event()
    until_s = time.monotonic() + seconds
    try:
        with TraceWriter(output, header, overwrite=overwrite) as writer:
            while True:
                left_s = until_s - time.monotonic()
                never.wait(max(0.0, min(TAKE_EVERY_S, left_s)))
                taken = _asked({uid: g.take_recorded.remote(mine) for uid, g in groups.items()})
                for uid, recorded in taken.items():
                    _write(writer, header, uid, recorded, numbers, tokens_max)
                    left_out[uid] = recorded.tokens_left_out
                writer.flush()  # what has been taken is in the file, whatever happens next
                progress(writer.num_tokens)
                if writer.num_tokens >= tokens_max or left_s <= TAKE_EVERY_S:
                    return sum(left_out.values())
    finally:
        _asked({uid: g.stop_recording.remote(mine) for uid, g in groups.items()})


def _write(
    writer: TraceWriter,
    header: TraceHeader,
    uid: str,
    recorded: Recorded,
    numbers: dict[tuple[str, int], int],
    tokens_max: int,
) -> None:
    for data in recorded.blocks:
        block = decode_record(header, data)
        room = tokens_max - writer.num_tokens
        if room > 0:
            writer.append(_named(block.select(slice(0, room)), uid, numbers))


def _named(block: Trace, uid: str, numbers: dict[tuple[str, int], int]) -> Trace:
    """With its source, and requests numbered through all groups."""
    own, index_T = np.unique(block.request_T, return_inverse=True)
    number = [numbers.setdefault((uid, int(request)), len(numbers)) for request in own]
    return replace(
        block,
        request_T=np.array(number, np.int32)[index_T],
        source_T=np.zeros(block.num_tokens, np.int16),
        sources=(uid,),
    )


def _asked(pending: dict[str, Any]) -> dict[str, Any]:
    return all_answers(pending, time.monotonic() + ANSWER_S)
