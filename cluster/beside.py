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
from remora.cluster.ray_calls import our_error
from remora.cluster.rebalancer import Rebalancer
from remora.cluster.router_process import make_rebalancer, router_status
from remora.comm.errors import ClusterError, UnknownOperationError
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # of one look at an operation that the online loop waits for
AGAIN_EVERY_S: Final = 5.0


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
        self._late: dict[str, str] = {}  # what could not be started so far, and why
        self._again: threading.Thread | None = None
        self._router: Any = None
        self._rebalancer: Rebalancer | None = None
        self._autoscaler: Autoscaler | None = None

    def listen(self) -> None:
        """Take calls over gRPC. Raises ClusterError: the address cannot be bound."""
        self._server.start()

    def serve(self, spec: ModelSpec, router: Any) -> None:
        """Start what needs a deployment that serves; `router`: its actor, or None."""
        self._plan_moves(spec, router)
        self._scale()

    def serve_when_possible(self, spec: ModelSpec, router: Any) -> None:
        """As `listen` and `serve`. What cannot be started, as where the life before this one still
        has the address, or a volume is away, is tried again and again: what serves goes on serving,
        and operators ask by Ray and HTTP meanwhile."""
        starts: dict[str, Callable[[], None]] = {
            "gRPC": self.listen,
            "rebalancer": lambda: self._plan_moves(spec, router),
            "autoscaler": self._scale,
        }
        if self._try_all(starts):
            self._again = threading.Thread(
                target=self._start_later, args=(starts,), name="remora-beside-later", daemon=True
            )
            self._again.start()

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
            "not_started": dict(self._late),
        }

    def close(self) -> None:
        """Stop all of it."""
        self._closed.set()
        if self._again is not None:
            self._again.join()
        rebalancer, self._rebalancer, self._router = self._rebalancer, None, None
        autoscaler, self._autoscaler = self._autoscaler, None
        if autoscaler is not None:
            autoscaler.close()
        if rebalancer is not None:
            rebalancer.close()
        self._server.stop()

    def _plan_moves(self, spec: ModelSpec, router: Any) -> None:
        self._router = router
        if router is not None:
            self._rebalancer = make_rebalancer(
                self._config, spec, self._operations.view(), router, apply=self._place_and_wait
            )
            # operations go on meanwhile, and there was nobody yet to be told of their views
            self._rebalancer.adopt_view(self._operations.view())

    def _scale(self) -> None:
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

    def _try_all(self, starts: dict[str, Callable[[], None]]) -> bool:
        """Start these; whether any is left, which stays in `starts`."""
        for what, start in list(starts.items()):
            try:
                start()
            except Exception as failure:  # whatever it is, it keeps nothing else from starting
                why = str(our_error(failure))
                if self._late.get(what) != why:
                    logger.exception("%s: no %s yet", self._config.name, what)
                self._late[what] = why
            else:
                del starts[what]
                self._late.pop(what, None)
        return bool(starts)

    def _start_later(self, starts: dict[str, Callable[[], None]]) -> None:
        while not self._closed.wait(AGAIN_EVERY_S) and self._try_all(starts):
            pass

    def _place(self, operation_id: str, placement: Placement) -> dict[str, Any]:
        return self._operations.request(operation_id, PlaceAs(placement.slots))

    def _place_and_wait(self, operation_id: str, placement: Placement) -> dict[str, Any]:
        """Have what serves hold a placement; returns when it does, or cannot."""
        operation = self._place(operation_id, placement)
        while operation["outcome"] == "running" and not self._is_stopping():
            operation = self._operations.wait(operation_id, LOOK_S)
        return operation
