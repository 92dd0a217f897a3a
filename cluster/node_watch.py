"""The thread that asks Ray which nodes are being drained, and begins to move what is there.

Where what is to join finds no place, and nobody adds nodes, an operation that others wait for is
given up: whoever asked for it hears so soon, not when the time for starts is over. What gives way
to others (a restore, what the autoscaler asks for) may wait for room as long as it likes.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.core.generated import autoscaler_pb2

from remora.actors.health_state import Life
from remora.cluster.evacuation import EVACUATE, next_evacuation, next_replacement, tries_of
from remora.cluster.operation import Operation, Restore, Target, gives_way
from remora.comm.errors import ClusterError, OperationRunsError, RemoraError

logger = logging.getLogger(__name__)

EVERY_S: Final = 1.0
GCS_S: Final = 5.0
REFUSED_MAX: Final = 256
# In a row: Ray's account of what waits is a moment old, and names nobody. An actor of others that
# waits for the same looks like ours as long as ours starts.
PLACELESS_LOOKS: Final = 10
READ_ONLY: Final = "node_"  # begins the names of node types where Ray's monitor adds no nodes


class NodeWatch:
    """Of one deployment, from `start` to `close`.

    Args:
        draining: nodes that go away, and when in Unix seconds; None: no deadline. Raises
            ClusterError: Ray does not tell.
        homes: nodes of everything that lives, members or not any more.
        members: those of the view.
        history: operations, the newest last.
        request: begins an operation. Raises RemoraError: it cannot be, or not now.
        leave: told of nodes on which nothing more is to be begun, and whether what was to leave
            them has, or will not.
        why_placeless: why who joins by an operation will find no place; None: it has one, or may
            get one. Raises ClusterError: Ray does not tell.
        give_up: undoes an operation that waits for who joins, for a reason.
    """

    def __init__(
        self,
        *,
        draining: Callable[[], Mapping[str, float | None]],
        homes: Callable[[], Mapping[Life, AbstractSet[str]]],
        members: Callable[[], AbstractSet[Life]],
        history: Callable[[], Sequence[Operation]],
        request: Callable[[str, Target], object],
        leave: Callable[[AbstractSet[str], bool], None],
        why_placeless: Callable[[Operation], str | None],
        give_up: Callable[[str, str], None],
    ) -> None:
        self._draining, self._homes, self._members = draining, homes, members
        self._history, self._request, self._leave = history, request, leave
        self._why_placeless, self._give_up = why_placeless, give_up
        self._num_placeless = 0  # looks in a row that found no place for who joins
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
        if draining:
            self._leave(draining.keys(), found is None and is_free)
        self._look_for_places(history)
        if found is not None:
            self._begin(*found)

    def _look_for_places(self, history: Sequence[Operation]) -> None:
        """Whether who joins by the operation that runs has somewhere to go."""
        running = next((each for each in history if each.outcome == "running"), None)
        why: str | None = None
        if running is not None and not _may_wait(running.target):
            try:
                if running.step == "prepare":
                    why = self._why_placeless(running)
            except ClusterError as silent:
                logger.warning("whether there is a place is not known: %s", silent)
        self._num_placeless = self._num_placeless + 1 if why is not None else 0
        if running is None or why is None or self._num_placeless < PLACELESS_LOOKS:
            return
        if running.operation_id.startswith(EVACUATE):
            for operation_id in tries_of(running.operation_id):
                self._refuse(operation_id, why)
        self._give_up(running.operation_id, why)

    def _begin(self, operation_id: str, target: Target) -> None:
        try:
            self._request(operation_id, target)
        except OperationRunsError as busy:
            logger.info("%s waits: %s", operation_id, busy)
        except RemoraError as refused:
            self._refuse(operation_id, str(refused))

    def _refuse(self, operation_id: str, why: str) -> None:
        logger.error("%s cannot be: %s", operation_id, why)
        self._refused[operation_id] = why
        while len(self._refused) > REFUSED_MAX:
            del self._refused[next(iter(self._refused))]

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            try:
                self.look(time.time())
            except Exception:  # of one look; nodes that nobody watches any more are worse
                logger.exception("a look at nodes failed")


def _may_wait(target: Target) -> bool:
    """Whether nobody waits for it while it waits for room."""
    return isinstance(target, Restore) or gives_way(target)


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

    def unplaced(self) -> list[dict[str, float]]:
        """What actors and bundles of placement groups ask for that have no place yet.

        Raises:
            ClusterError: the GCS does not tell.
        """
        state = self._status().cluster_resource_state
        asked = [each.request for each in state.pending_resource_requests]
        for gang in state.pending_gang_resource_requests:
            told = [each for chosen in gang.bundle_selectors for each in chosen.resource_requests]
            asked += told or list(gang.requests)
        return [dict(each.resources_bundle) for each in asked]

    def may_come(self) -> bool:
        """Whether an autoscaler of Ray's adds nodes, as far as it tells: its monitor, which runs in
        any cluster, makes up a type for each node where there is none.

        Raises:
            ClusterError: the GCS does not tell.
        """
        status = self._status()
        if status.autoscaling_state.autoscaler_state_version:  # version 2
            return any(n.ray_node_type_name for n in status.cluster_resource_state.node_states)
        try:
            told = self._client().internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None, GCS_S)
        except ray.exceptions.RayError as silent:
            raise ClusterError(f"Ray's GCS does not answer: {silent}") from silent
        report = (json.loads(told) if told else {}).get("autoscaler_report") or {}
        types = (report.get("active_nodes") or {}).keys()
        return any(not name.startswith(READ_ONLY) for name in types)

    def _status(self) -> Any:
        messages: Any = autoscaler_pb2
        try:
            told = self._client().get_cluster_status(timeout_s=GCS_S)
        except ray.exceptions.RayError as silent:
            raise ClusterError(f"Ray's GCS does not answer: {silent}") from silent
        return messages.GetClusterStatusReply.FromString(told)

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
