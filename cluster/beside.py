"""What runs in the coordinator beside its operations: the gRPC service, and loops over samples.

The online loop of placement (`rebalancer.py`) and the autoscaler (`autoscale_loop.py`) ask for
operations as anybody does.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from remora.actors.launch import advertised_ip
from remora.actors.model_spec import ModelSpec
from remora.autoscale.autoscale_policy import AutoscalePolicy
from remora.autoscale.ingress_load import IngressLoad
from remora.cluster.autoscale_log import AutoscaleLog
from remora.cluster.autoscale_loop import Autoscaler
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_server import CoordinatorServer
from remora.cluster.log_folder import folder_below
from remora.cluster.operation import PlaceAs, taken_by
from remora.cluster.operation_request import Operations
from remora.cluster.rebalancer import Rebalancer
from remora.cluster.router_process import make_rebalancer, router_status
from remora.comm.errors import ClusterError, UnknownOperationError
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # of one look at an operation that the online loop waits for
LISTEN_EVERY_S: Final = 5.0


class Beside:
    """See the head of this file.

    Args:
        operations: the coordinator.
        is_stopping: whether the deployment is being stopped.
        running: id of the operation that runs.
    """

    def __init__(
        self,
        config: RemoraConfig,
        token: bytes,
        operations: Operations,
        is_stopping: Callable[[], bool],
        running: Callable[[], str | None],
    ) -> None:
        self._config, self._operations = config, operations
        self._is_stopping, self._running = is_stopping, running
        ip = config.elastic.bind_address or config.bind_address
        self._bind_ip = ip
        self._server = CoordinatorServer(
            operations, token=token, bind_ip=ip, port=config.elastic.port
        )
        self._closed = threading.Event()
        self._listener: threading.Thread | None = None
        self._router: Any = None
        self._rebalancer: Rebalancer | None = None
        self._autoscaler: Autoscaler | None = None

    def listen(self) -> None:
        """Take calls over gRPC. Raises ClusterError: the address cannot be bound."""
        self._server.start()

    def listen_when_free(self) -> None:
        """As `listen`; where the address is taken, as by the life before this one, again and again
        until it is not. What serves goes on serving; operators ask by Ray and HTTP meanwhile."""
        if not self._listens():
            self._listener = threading.Thread(
                target=self._listen_later, name="remora-operator-later", daemon=True
            )
            self._listener.start()

    def serve(self, spec: ModelSpec, router: Any) -> None:
        """Start what needs a deployment that serves; `router`: its actor, or None."""
        self._router = router
        if router is not None:
            self._rebalancer = make_rebalancer(
                self._config, spec, self._operations.view(), router, apply=self._place_and_wait
            )
            # operations go on meanwhile, and there was nobody yet to be told of their views
            self._rebalancer.adopt_view(self._operations.view())
        autoscale = self._config.autoscale.loaded()
        policy = autoscale.policy
        if isinstance(policy, AutoscalePolicy):
            base = autoscale.log_dir or self._config.elastic.log_dir
            self._autoscaler = Autoscaler(
                policy,
                sample_every_s=autoscale.sample_every_s,
                operations=self._operations,
                running=self._running,
                view=self._operations.view,
                log=AutoscaleLog(folder_below(base, self._config.name), policy),
            )
            self._autoscaler.start()

    def adopt_view(self, view: View) -> None:
        """Go by `view` from now on."""
        if self._rebalancer is not None:
            self._rebalancer.adopt_view(view)

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        """A round now; the operation that it begins is not waited for.

        Raises:
            OperationIdTakenError: the id stands for an operation that moves no experts.
            OperationRunsError: a round is being made.
            ClusterError: nothing serves, the router is off, or it has no plan to give.
        """
        if self._rebalancer is None:
            raise ClusterError(f"deployment {self._config.name!r} has no router that serves")
        if dry_run:
            return self._rebalancer.propose()
        try:
            known = self._operations.wait(operation_id, 0.0)
        except UnknownOperationError:
            return self._rebalancer.move(operation_id, self._place)
        if known["kind"] != PlaceAs.__struct_config__.tag:
            raise taken_by(operation_id, known)
        return {"verdict": "move", "reason": "asked for before", "operation": known}

    def exchange(self, load: IngressLoad | None) -> dict[str, float]:
        """Take what an ingress counted; metrics by name, for its `/metrics`."""
        rebalancer, autoscaler = self._rebalancer, self._autoscaler
        gauges = rebalancer.gauges() if rebalancer is not None else {}
        if autoscaler is None:
            return gauges
        if load is not None:
            autoscaler.report(load)
        return gauges | autoscaler.gauges()

    def status(self) -> dict[str, Any]:
        """For `remora status`."""
        api = self._server.status()
        ip = advertised_ip(self._bind_ip)
        if ip is not None and api["address"]:
            api["address"] = f"{ip}:{api['address'].rpartition(':')[2]}"
        autoscaler = self._autoscaler
        return {
            "router": router_status(self._router, self._rebalancer),
            "operator": api,
            "autoscale": autoscaler.status() if autoscaler is not None else None,
        }

    def close(self) -> None:
        """Stop all of it."""
        self._closed.set()
        if self._listener is not None:
            self._listener.join()
        rebalancer, self._rebalancer, self._router = self._rebalancer, None, None
        autoscaler, self._autoscaler = self._autoscaler, None
        if autoscaler is not None:
            autoscaler.close()
        if rebalancer is not None:
            rebalancer.close()
        self._server.stop()

    def _listens(self) -> bool:
        try:
            self.listen()
        except ClusterError as failure:
            logger.error("%s takes no calls over gRPC yet: %s", self._config.name, failure)
            return False
        return True

    def _listen_later(self) -> None:
        while not self._closed.wait(LISTEN_EVERY_S) and not self._listens():
            pass

    def _place(self, operation_id: str, placement: Placement) -> dict[str, Any]:
        return self._operations.request(operation_id, PlaceAs(placement.slots))

    def _place_and_wait(self, operation_id: str, placement: Placement) -> dict[str, Any]:
        """Have what serves hold a placement; returns when it does, or cannot."""
        operation = self._place(operation_id, placement)
        while operation["outcome"] == "running" and not self._is_stopping():
            operation = self._operations.wait(operation_id, LOOK_S)
        return operation
