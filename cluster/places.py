"""Whether those that join by an operation will find a place in the Ray cluster."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from remora.actors.health_state import Life
from remora.cluster.config import RemoraConfig
from remora.cluster.dense_groups import bundle_of
from remora.cluster.launch import dense_options, shard_options
from remora.cluster.members import asked_of_ray
from remora.cluster.operation import Operation, is_dense
from remora.cluster.operation_plan import by_number
from remora.cluster.placement_file import few

DIGITS = 4  # of an amount, as Ray keeps them


class Nodes(Protocol):
    """Of `RayNodes`."""

    def unplaced(self) -> list[dict[str, float]]:
        """What has no place yet."""

    def may_come(self) -> bool:
        """Whether Ray's autoscaler adds nodes."""


def why_placeless(
    config: RemoraConfig,
    nodes: Nodes,
    homes: Callable[[], Mapping[Life, object]],
    operation: Operation,
) -> str | None:
    """Why who joins by an operation will find no place; None: it has one, or may get one.

    Ray's account of what waits for a place names no actors: what one of ours asks for is looked for
    in it. `elastic.nodes_may_come` says whether waiting can be of use, else Ray is asked.

    Args:
        homes: of what lives; asked only where something waits for as much as ours ask for.

    Raises:
        ClusterError: Ray does not tell.
    """
    if not operation.joiners or config.elastic.nodes_may_come is True:
        return None
    unplaced = [_amounts(each) for each in nodes.unplaced()]
    asks = {uid: _ask_of(config, uid) for uid in operation.joiners}
    asks = {uid: ask for uid, ask in asks.items() if _amounts(bundle_of(ask)) in unplaced}
    living = homes() if asks else {}
    found: dict[str, list[str]] = {}
    for uid, ask in asks.items():
        if (uid, operation.joiners[uid]) not in living:
            found.setdefault(asked_of_ray(ask), []).append(uid)
    if not found or (config.elastic.nodes_may_come is None and nodes.may_come()):
        return None
    named = {what: few(sorted(uids, key=by_number)) for what, uids in found.items()}
    who = "; ".join(f"{uids} ({what} each)" for what, uids in named.items())
    why = "no node that stays has room, and none is added (elastic.nodes_may_come)"
    return f"no place for {who}: {why}"


def _ask_of(config: RemoraConfig, uid: str) -> dict[str, Any]:
    """What a member asks of Ray."""
    return dense_options(config) if is_dense(uid) else shard_options(config)


def _amounts(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: round(amount, DIGITS) for name, amount in bundle.items() if amount > 0}
