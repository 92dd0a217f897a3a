"""The thread that asks Ray which nodes are being drained, and begins to move what is there."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final

import ray

from remora.actors.health_state import Life
from remora.cluster.evacuation import next_evacuation
from remora.cluster.operation import Drain
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
        homes: nodes of each member of the view.
        request: begins an operation. Raises RemoraError: it cannot be, or not now.
        is_known: whether there is, or was, an operation of this id.
        leave: told of nodes on which nothing more is to be begun.
    """

    def __init__(
        self,
        *,
        draining: Callable[[], Mapping[str, float | None]],
        homes: Callable[[], Mapping[Life, AbstractSet[str]]],
        request: Callable[[str, Drain], object],
        is_known: Callable[[str], bool],
        leave: Callable[[AbstractSet[str]], None],
    ) -> None:
        self._draining, self._homes = draining, homes
        self._request, self._is_known, self._leave = request, is_known, leave
        self._refused: dict[str, str] = {}  # why, by operation id
        self._nodes: frozenset[str] = frozenset()
        self._is_blind = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remora-nodes", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    @property
    def nodes(self) -> frozenset[str]:
        """Nodes that were going away when it last looked."""
        return self._nodes

    def status(self) -> dict[str, Any]:
        """For `remora status --json`."""
        return {"draining": sorted(self._nodes), "refused": dict(self._refused)}

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
        self._nodes = frozenset(draining)
        if not draining:
            return
        self._leave(self._nodes)
        left = {n: at if at is None else at - now_unix_s for n, at in draining.items()}
        found = next_evacuation(left, self._homes(), self._is_tried)
        if found is None:
            return
        operation_id, target = found
        try:
            self._request(operation_id, target)
        except OperationRunsError as busy:
            logger.info("%s waits: %s", operation_id, busy)
        except RemoraError as refused:
            logger.error("%s cannot be: %s", operation_id, refused)
            self._refused[operation_id] = str(refused)
            while len(self._refused) > REFUSED_MAX:
                del self._refused[next(iter(self._refused))]

    def _is_tried(self, operation_id: str) -> bool:
        return operation_id in self._refused or self._is_known(operation_id)

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
            if self._gcs is None:
                raylet: Any = ray._raylet
                self._gcs = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
            found: dict[str, int] = self._gcs.get_draining_nodes(timeout=GCS_S)
        except ray.exceptions.RayError as silent:
            raise ClusterError(f"Ray's GCS does not answer: {silent}") from silent
        return {node: at_ms / 1e3 if at_ms else None for node, at_ms in found.items()}


def node_of(handle: Any) -> str | None:
    """Ray node of an actor; None: it has none now. Its state API would need the dashboard."""
    found = ray._private.state.actors(handle._actor_id.hex())
    node = found.get("Address", {}).get("NodeID") if found.get("State") == "ALIVE" else None
    return node or None
