"""Decisions as JSON lines, and their replay.

A log begins with a line of kind `autoscale_start` (the policy and the state that it starts with)
and has a line of kind `autoscale_decision` (the sample and what was decided from it) for every
sample. A rotated log begins with such a start of its own, so each file replays alone. Lines of
other kinds and keys besides `kind`, such as a time stamp, are left alone.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import Decision, decide, recall
from remora.comm.checked import Section, parse_section
from remora.comm.errors import ConfigError

START: Final = "autoscale_start"
DECISION: Final = "autoscale_decision"
LINE_BYTES_MAX: Final = 16 << 20
DIFFERENCES_MAX: Final = 1000  # that a report lists; all are counted
COMPARED: Final = ("verdict", "effect", "units", "target_units")  # not the wording of reasons


class _NotWholeError(ConfigError):
    """A line that is not JSON."""


class _Start(Section):
    policy: AutoscalePolicy
    state: AutoscaleState


class _Line(Section):
    sample: Sample
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A decision that is another one now. `field`: the first of `COMPARED` that differs."""

    line: int  # of the log, from 1
    at_s: float
    field: str
    logged: Decision
    replayed: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a log came to."""

    decisions: int
    num_differences: int
    differences: tuple[Difference, ...]  # the first `DIFFERENCES_MAX`
    cut_off: str | None = None  # what is wrong with the last line, which was left out


def start_line(policy: AutoscalePolicy, state: AutoscaleState) -> str:
    """The first line of a log, without its newline."""
    fields = {"policy": policy.model_dump(mode="json"), "state": state.model_dump(mode="json")}
    return json.dumps({"kind": START, **fields}, allow_nan=False)


def decision_line(sample: Sample, decision: Decision) -> str:
    """A decision with its inputs, without its newline."""
    fields = {
        "sample": sample.model_dump(mode="json"),
        "decision": decision.model_dump(mode="json"),
    }
    return json.dumps({"kind": DECISION, **fields}, allow_nan=False)


def replay(
    lines: Iterable[str], *, source: str = "log", policy: AutoscalePolicy | None = None
) -> Replay:
    """Decides again from the samples of a log and compares.

    Args:
        lines: of a log.
        source: its name in errors.
        policy: instead of the one in the log, and from an empty state. The samples stay those that
            came of the logged decisions: it shows where another policy would first have done
            something else, not what would have come of it.

    Raises:
        ConfigError: a line before the last that is cut off, no such line, a decision before a
            start, no decision at all, or a policy of another pool than the log's.
    """
    state: AutoscaleState | None = None
    decider: AutoscalePolicy | None = None
    decisions, num_differences = 0, 0
    differences: list[Difference] = []
    cut_off: list[_NotWholeError] = []
    for number, entry in _entries(lines, source, cut_off):
        if isinstance(entry, _Start):
            if policy is not None and policy.pool != entry.policy.pool:
                where, pools = f"{source}:{number}", (entry.policy.pool, policy.pool)
                raise ConfigError(f"{where}: a log of pool {pools[0]}; the policy is of {pools[1]}")
            if policy is None:
                decider, state = entry.policy, entry.state
            elif state is None:  # windows and series of the log are in steps of its own policy
                decider, state = policy, AutoscaleState()
        else:
            if state is None or decider is None:
                where = f"{source}:{number}"
                raise ConfigError(f"{where}: a decision before a line of kind {START}")
            replayed, state = decide(decider, state, entry.sample)
            decisions += 1
            field = _first_difference(entry.decision, replayed)
            if field is not None:
                num_differences += 1
                if len(differences) < DIFFERENCES_MAX:
                    differences.append(
                        Difference(
                            line=number,
                            at_s=entry.sample.at_s,
                            field=field,
                            logged=entry.decision,
                            replayed=replayed,
                        )
                    )
    if not decisions:
        nothing = ConfigError(f"{source}: no line of kind {DECISION}: nothing to replay")
        raise cut_off[0] if cut_off else nothing
    return Replay(
        decisions=decisions,
        num_differences=num_differences,
        differences=tuple(differences),
        cut_off=str(cut_off[0]) if cut_off else None,
    )


def recalled(
    lines: Iterable[str], policy: AutoscalePolicy, *, source: str = "log"
) -> AutoscaleState:
    """What a policy remembers at the end of a log; nothing where that is another policy's, but for
    its mode: who has looked at what one advises, and has it act, keeps the load that it saw.

    Decides nothing again, so it takes no forecast's time. A last line that is cut off is left out.

    Raises:
        ConfigError: as `replay`, but for a log without decisions.
    """
    state = AutoscaleState()
    for _, entry in _entries(lines, source, []):
        if isinstance(entry, _Line):
            state = recall(policy, state, entry.sample, entry.decision)
        elif entry.policy.model_copy(update={"mode": policy.mode}) == policy:
            state = entry.state
        else:
            return AutoscaleState()
    return state


def _entries(
    lines: Iterable[str], source: str, cut_off: list[_NotWholeError]
) -> Iterator[tuple[int, _Start | _Line]]:
    """Starts and decisions, each with the number of its line; what is wrong with the last line,
    where a disk was full or a host died, goes into `cut_off`.

    Raises:
        ConfigError: a line that is none, or an earlier one that is cut off.
    """
    for number, text in enumerate(lines, 1):
        if cut_off:  # more follows: it is damaged
            raise cut_off[0]
        where = f"{source}:{number}"
        try:
            kind, fields = _fields(text, where)
        except _NotWholeError as error:
            cut_off.append(error)
            continue
        if kind == START:
            yield number, parse_section(fields, _Start, source=where)
        elif kind == DECISION:
            yield number, parse_section(fields, _Line, source=where)


def _fields(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """Kind of a line, and what we put into it; nothing of lines of other kinds."""
    if len(text) > LINE_BYTES_MAX:
        raise ConfigError(f"{where}: {len(text)} bytes; a line has at most {LINE_BYTES_MAX}")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise _NotWholeError(f"{where}: not a whole JSON line: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: an object is needed, got {type(data).__name__}")
    kind = str(data.get("kind"))
    names = {START: ("policy", "state"), DECISION: ("sample", "decision")}.get(kind, ())
    missing = [name for name in names if name not in data]
    if missing:
        raise ConfigError(f"{where}: a line of kind {kind} needs {', '.join(missing)}")
    return kind, {name: data[name] for name in names}


def _first_difference(logged: Decision, replayed: Decision) -> str | None:
    for name in COMPARED:
        if getattr(logged, name) != getattr(replayed, name):
            return name
    return None
