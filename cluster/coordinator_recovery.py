"""The coordinator's state machine as its log leaves it. Pure."""

from typing import Any, NamedTuple

import msgspec

from remora.cluster.coordinator_calls import Limits
from remora.cluster.coordinator_state import CoordinatorState
from remora.cluster.former_places import former_after
from remora.cluster.operation import Held, Operation
from remora.comm.errors import ClusterError
from remora.comm.view import Member, View


class Recovered(NamedTuple):
    """What a log leads to.

    Attributes:
        state: the machine, to be resumed with `operation`.
        operation: in flight, with the rounds that it has committed.
        leaving: members that it has taken out of the view, and may not have ended yet.
    """

    state: CoordinatorState
    operation: Operation | None
    leaving: tuple[Member, ...]


def recovered(records: list[dict[str, Any]], limits: Limits, *, has_router: bool) -> Recovered:
    """The machine that a log leads to.

    Raises:
        ClusterError: the log does not begin with a base record, or records are not as this version
            writes them.
    """
    if not records or records[0].get("t") != "base":
        raise ClusterError("the coordinator's log does not begin with a base record")
    try:
        return _recovered(records, limits, has_router=has_router)
    except KeyError as missing:
        reason = f"it has no {missing}"
    except msgspec.ValidationError as wrong:
        reason = str(wrong)
    raise ClusterError(
        f"another version of Remora wrote it ({reason}): stop the deployment with that version, or"
        " delete the log once nothing of the deployment runs any more"
    )


def _recovered(records: list[dict[str, Any]], limits: Limits, *, has_router: bool) -> Recovered:
    base = dict(records[0])
    history = {each["operation_id"]: each for each in base["history"]}
    running: Operation | None = None
    accepted: Operation | None = None
    leaving: tuple[Member, ...] = ()
    for record in records[1:]:
        names = ("room", "incarnations", "fenced", "former", "term")
        base |= {name: record[name] for name in names}
        if record["t"] == "term":
            continue
        operation = msgspec.convert(record["operation"], Operation)
        is_accepted = accepted is not None and accepted.operation_id == operation.operation_id
        if record["t"] == "accepted" or (record["t"] == "unwanted" and is_accepted):
            accepted = operation
            continue
        if is_accepted:
            accepted = None
        if record["t"] == "ended":
            history[operation.operation_id] = record["operation"]
            running, leaving = None, ()
            continue
        running = operation
        if record["t"] == "committed":
            former = msgspec.convert(base["former"], Held)
            before, after = (msgspec.convert(each["view"], View) for each in (base, record))
            slots = before.placement.slots, after.placement.slots
            base["former"] = former_after(operation.target, former, *slots)
            base["view"] = record["view"]
            running.round += 1
            stay = {m.uid for m in after.members}
            gone = set(operation.retirees) - stay
            leaving += tuple(m for m in before.members if m.uid in gone)
    state = CoordinatorState(
        view=msgspec.convert(base["view"], View),
        room={uid: tuple(slots) for uid, slots in base["room"].items()},
        manifest={(layer, expert): digest for layer, expert, digest in base["manifest"]},
        incarnations=base["incarnations"],
        limits=limits,
        has_router=has_router,
    )
    state.fenced = set(base["fenced"])
    state.former = msgspec.convert(base["former"], Held)
    state.term = base["term"] + 1
    state.history = {key: msgspec.convert(each, Operation) for key, each in history.items()}
    state.accepted = (accepted, None) if accepted is not None else None
    return Recovered(state, running, leaving)
