"""The thread that asks Ray which nodes are being drained, and begins to move what is there."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import ray
from ray.core.generated import autoscaler_pb2

from remora.actors.health_state import Life
from remora.cluster.evacuation import next_evacuation, next_replacement
from remora.cluster.operation import Operation, Target
from remora.comm.errors import ClusterError, OperationRunsError, RemoraError

logger = logging.getLogger(__name__)

EVERY_S: Final = 1.0
GCS_S: Final = 5.0
REFUSED_MAX: Final = 256


class NodeWatch:
    """Of one deployment, from `start` to `close`.

    Args:
        draining: nodes that go away, and when in Unix seconds; None: no deadline. Raises
            ClusterError: Ray does not tell.
        homes: nodes of everything that lives, members or not any more.
        members: those of the view.
        history: operations, the newest last.
        request: begins an operation. Raises RemoraError: it cannot be, or not now.
        leave: told of nodes on which nothing more is to be begun.
    """

    def __init__(
        self,
        *,
        draining: Callable[[], Mapping[str, float | None]],
        homes: Callable[[], Mapping[Life, AbstractSet[str]]],
        members: Callable[[], AbstractSet[Life]],
        history: Callable[[], Sequence[Operation]],
        request: Callable[[str, Target], object],
        leave: Callable[[AbstractSet[str]], None],
    ) -> None:
        self._draining, self._homes, self._members = draining, homes, members
        self._history, self._request, self._leave = history, request, leave
        self._refused: dict[str, str] = {}  # why, by operation id
        self._there: dict[str, list[str]] = {}  # uids, by node that goes away
        self._stay: list[str] = []
        self._is_blind = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remora-nodes", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    @property
    def nodes(self) -> frozenset[str]:
        """Nodes that were going away when it last looked."""
        return frozenset(self._there)

    def status(self) -> dict[str, Any]:
        """For `remora status --json`: who is on nodes that go away, who of them will stay (all has
        been tried), and what was refused."""
        there = {node: list(uids) for node, uids in self._there.items()}
        return {"draining": there, "stay": list(self._stay), "refused": dict(self._refused)}

    def close(self) -> None:
        """Stop. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, now_unix_s: float) -> None:
        """Begin what is due."""
        try:
            draining = self._draining()
        except ClusterError as silent:  # its GCS is gone; what was known is left as it is
            if not self._is_blind:
                logger.warning("nodes are not watched: %s", silent)
            self._is_blind = True
            return
        self._is_blind = False
        history, members = self._history(), self._members()  # before who lives: nobody is missed
        homes = self._homes() if draining else {}
        there = {
            node: sorted(uid for (uid, _), nodes in homes.items() if node in nodes)
            for node in draining
        }
        if draining:
            self._leave(draining.keys())
        left_s = {n: at if at is None else at - now_unix_s for n, at in draining.items()}
        ours = {life: nodes for life, nodes in homes.items() if life in members}
        known = self._refused.keys() | {operation.operation_id for operation in history}
        uids = [uid for uid, _ in members]
        found: tuple[str, Target] | None = next_evacuation(left_s, ours, known.__contains__)
        is_free = all(operation.outcome != "running" for operation in history)
        if found is None and is_free:
            self._stay = sorted(u for (u, _), nodes in ours.items() if nodes & draining.keys())
            found = next_replacement(history, uids, known.__contains__)
        elif found is not None:
            self._stay = []
        self._there = there
        if found is not None:
            self._begin(*found)

    def _begin(self, operation_id: str, target: Target) -> None:
        try:
            self._request(operation_id, target)
        except OperationRunsError as busy:
            logger.info("%s waits: %s", operation_id, busy)
        except RemoraError as refused:
            logger.error("%s cannot be: %s", operation_id, refused)
            self._refused[operation_id] = str(refused)
            while len(self._refused) > REFUSED_MAX:
                del self._refused[next(iter(self._refused))]

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            self.look(time.time())


class RayNodes:
    """Of the Ray cluster that this process is in.

    Ray (2.60) has no public call for what is drained; Serve's controller asks the GCS for the same.
    """

    def __init__(self) -> None:
        self._gcs: Any = None

    def draining(self) -> dict[str, float | None]:
        """Nodes that are being drained, and until when in Unix seconds.

        Raises:
            ClusterError: the GCS does not tell.
        """
        try:
            found: dict[str, int] = self._client().get_draining_nodes(timeout=GCS_S)
        except ray.exceptions.RayError as silent:
            raise ClusterError(f"Ray's GCS does not answer: {silent}") from silent
        return {node: at_ms / 1e3 if at_ms else None for node, at_ms in found.items()}

    def drain(self, node: str, why: str, deadline_unix_s: float) -> None:
        """Tell Ray that a node goes away, as `ray drain-node` does: it places nothing there any
        more, and ends the node's raylet once nothing is there, or at the deadline.

        Raises:
            ClusterError: the GCS does not answer, or refuses.
        """
        messages: Any = autoscaler_pb2
        preempted = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        try:
            is_accepted, why_not = self._client().drain_node(
                node, preempted, why, int(deadline_unix_s * 1e3)
            )
        except ray.exceptions.RayError as silent:
            raise ClusterError(f"Ray's GCS does not answer: {silent}") from silent
        if not is_accepted:
            raise ClusterError(f"Ray does not drain node {node}: {why_not}")

    def is_alive(self, node: str) -> bool:
        """Whether Ray has not ended a node, nor lost it."""
        return any(each["Alive"] for each in ray.nodes() if each["NodeID"] == node)

    def _client(self) -> Any:
        if self._gcs is None:
            raylet: Any = ray._raylet
            self._gcs = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        return self._gcs


def node_of(handle: Any) -> str | None:
    """Ray node of an actor; None: it has none now. Its state API would need the dashboard."""
    found = ray._private.state.actors(handle._actor_id.hex())
    node = found.get("Address", {}).get("NodeID") if found.get("State") == "ALIVE" else None
    return node or None
