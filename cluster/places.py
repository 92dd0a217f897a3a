"""Whether those that join by an operation will find a place in the Ray cluster."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

from remora.actors.health_state import Life
from remora.cluster.config import RemoraConfig
from remora.cluster.dense_groups import bundle_of
from remora.cluster.launch import dense_options, shard_options
from remora.cluster.members import asked_of_ray
from remora.cluster.operation import Operation, is_dense

DIGITS = 4  # of an amount, as Ray keeps them


class Nodes(Protocol):
    """Of `RayNodes`."""

    def unplaced(self) -> list[dict[str, float]]:
        """What has no place yet."""

    def may_come(self) -> bool:
        """Whether Ray's autoscaler adds nodes."""


def why_placeless(
    config: RemoraConfig, nodes: Nodes, operation: Operation, living: AbstractSet[Life]
) -> str | None:
    """Why who joins by an operation will find no place; None: it has one, or may get one.

    Ray's account of what waits for a place names no actors: what one of ours asks for is looked for
    in it. `elastic.nodes_may_come` says whether waiting can be of use, else Ray is asked.

    Raises:
        ClusterError: Ray does not tell.
    """
    waiting = sorted(uid for uid, life in operation.joiners.items() if (uid, life) not in living)
    if not waiting or config.elastic.nodes_may_come is True:
        return None
    unplaced = [_amounts(each) for each in nodes.unplaced()]
    asks: dict[str, list[str]] = {}
    for uid in waiting:
        options: dict[str, Any] = dense_options(config) if is_dense(uid) else shard_options(config)
        if _amounts(bundle_of(options)) in unplaced:
            asks.setdefault(asked_of_ray(options), []).append(uid)
    if not asks or (config.elastic.nodes_may_come is None and nodes.may_come()):
        return None
    who = "; ".join(f"{', '.join(uids)} ({what} each)" for what, uids in asks.items())
    return f"no place for {who} on any other node, and none is added (elastic.nodes_may_come)"


def _amounts(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: round(amount, DIGITS) for name, amount in bundle.items() if amount > 0}
