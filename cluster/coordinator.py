"""The coordinator: brings the data-plane actors of one deployment up and publishes its view.

One detached, named actor for each. It keeps the view that dense ranks and ingresses read, changes
it while requests run (`elastic.py`), tells who lives, and takes everything down.

Every data-plane actor is detached and named by incarnation, so that it outlives its creator:
`remora/<deployment>/shard-0#1`. A coordinator brings its deployment up once: after a failure or a
stop it has nothing up and is of no more use; whoever asks next removes it and makes another. One
that dies is started again by Ray, reads its log, and adopts what lives.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import ray

from remora.actors.launch import Progress, router_name
from remora.actors.manifest import Manifest
from remora.actors.model_spec import ModelSpec, inspect_model
from remora.actors.process_log import keep_log
from remora.autoscale.ingress_load import IngressLoad
from remora.cluster.beside import Beside
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_process import OVER, Phase
from remora.cluster.dense_groups import remove_placement_groups
from remora.cluster.elastic import ENDING, Elastic, log_folder
from remora.cluster.first_processes import begin_processes, connect_all, plan_ranks
from remora.cluster.launch import placement_of
from remora.cluster.member_tasks import find_actor
from remora.cluster.members import (
    LateError,
    asked_of_ray,
    first_answer,
    progress_of,
    status_of,
    stop_members,
    why_late,
)
from remora.cluster.operation import Target
from remora.cluster.ray_calls import is_next_life, our_error
from remora.cluster.router_process import kill_router, start_router, stop_router
from remora.cluster.standbys import end_all
from remora.cluster.wal import Wal
from remora.comm.errors import ClusterError, RemoraError
from remora.comm.view import View

logger = logging.getLogger(__name__)

LOCK_S: Final = 120.0  # a volume of the network may keep the lock of a host that is gone so long
ADOPT_EVERY_S: Final = 5.0
STARTING: Final = {"t": "starting"}  # in the log until there is a view: what is up then is nobody's


class Coordinator:
    """Brings one deployment up and down. Ray starts it as `CoordinatorProcess`.

    Methods are called on a small thread pool (`max_concurrency`), so `progress` and `status` answer
    while `deploy` runs. The lock guards the fields; no remote call is made while it is held.
    """

    def __init__(self, config: dict[str, Any], token: bytes) -> None:
        keep_log()
        self._config = RemoraConfig.model_validate(config)
        self._token = token
        self._lock = threading.Lock()
        self._deploying = threading.Lock()
        self._phase: Phase = "new"
        self._failure: RemoraError | None = None  # why it is over
        self._ends = threading.Event()  # it is being stopped
        self._view: View | None = None
        self._manifest: Manifest | None = None
        self._handles: dict[str, Any] = {}
        self._router: Any = None
        self._beside = Beside(
            self._config, token, self, self._ends.is_set, lambda: self._operations().running()
        )
        self._asked: dict[str, str] = {}  # of Ray, by uid
        self._started_s = time.monotonic()
        self._elastic: Elastic | None = None
        self._looked = threading.Event()  # nothing is left to adopt
        if self._is_adopted() or not is_next_life():
            self._looked.set()
        else:
            _in_thread(self._adopt_later)

    # ---- what ingresses and operators read ----

    def credentials(self) -> bytes:
        """The cluster's token (32 bytes); Ray's own authentication guards this call."""
        return self._token

    def config(self) -> dict[str, Any]:
        """The configuration this deployment runs, as plain data."""
        return self._config.model_dump(mode="json")

    def phase(self) -> Phase:
        """Where this deployment stands."""
        with self._lock:
            return self._phase

    def view(self) -> View:
        """The committed view.

        Raises:
            ClusterError: nothing is serving yet.
        """
        with self._lock:
            if self._view is None:
                raise ClusterError(
                    f"deployment {self._config.name!r} is {self._phase}: there is no view"
                )
            return self._view

    def manifest(self) -> Manifest:
        """blake3 digests of every expert as it was loaded: what later copies are checked against.

        Raises:
            ClusterError: nothing is loaded yet.
        """
        with self._lock:
            if self._manifest is None:
                raise ClusterError(f"deployment {self._config.name!r} has no manifest yet")
            return self._manifest

    def status(self) -> dict[str, Any]:
        """Phase, members and their own accounts of themselves; plain data for the CLI."""
        with self._lock:
            phase, failure, view = self._phase, self._failure, self._view
            handles, asked, elastic = dict(self._handles), dict(self._asked), self._elastic
        runner = elastic.runner if elastic is not None else None
        joining = elastic.joining(handles) if elastic is not None else set()
        members = status_of(handles, {uid: asked[uid] for uid in joining})
        return {
            "name": self._config.name,
            "model": self._config.model,
            "numerics": self._config.numerics,
            "phase": phase,
            "error": str(failure) if failure else None,
            "epoch": view.epoch if view else None,
            "view_hash": view.view_hash if view else None,
            "uptime_s": time.monotonic() - self._started_s,
            "members": members,
            "operations": runner.status() if runner is not None else None,
            "standbys": elastic.standbys.status() if elastic is not None else None,
            "warm_dense": elastic.warm_dense.status() if elastic is not None else None,
            "health": elastic.health_status() if elastic is not None else None,
            **self._beside.status(),
        }

    def progress(self) -> dict[str, Progress]:
        """How far each actor has loaded; empty before any exists."""
        with self._lock:
            handles = dict(self._handles)
        return progress_of(handles)

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        """A round of rebalancing now; see `Beside.rebalance`. Raises ClusterError."""
        return self._beside.rebalance(operation_id, dry_run=dry_run)

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        """Begin an operation on what serves, or find the one of that id.

        Raises:
            ConfigError, ClusterError: it cannot be, or nothing serves.
        """
        return self._operations().request(operation_id, target)

    def wait(self, operation_id: str, timeout_s: float) -> dict[str, Any]:
        """How an operation is, once it is over or the time is. Raises ClusterError: unknown."""
        return self._operations().begun().wait(operation_id, timeout_s)

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        """As `OperationRunner.cancel`."""
        return self._operations().begun().cancel(operation_id)

    def _operations(self) -> Elastic:
        with self._lock:
            if self._phase != "serving" or self._elastic is None:
                raise ClusterError(f"deployment {self._config.name!r} is {self._phase}")
            return self._elastic

    def heartbeat(self) -> tuple[int, int]:
        """A sign of progress, for the dense groups (`CoordinatorWatch`): returns once the thread of
        operations has come round; looks at members so far, and whether there are to be more."""
        elastic = self._elastic
        return elastic.heartbeat() if elastic is not None else (0, 0)

    def exchange(self, load: IngressLoad | None) -> dict[str, float]:
        """Take what an ingress counted; metrics of the loops beside operations, by name."""
        gauges, elastic = self._beside.exchange(load), self._elastic
        return gauges | (elastic.gauges() if elastic is not None else {})

    # ---- up and down ----

    def deploy(self) -> View:
        """Create, load, connect, publish. Asking again returns the view, or the same failure.

        Raises:
            RemoraError: the model, a weight file or an actor failed, not all had started within
                `start_timeout_s`, somebody stopped it meanwhile (nothing is left half up), or what
                lives is not adopted yet.
        """
        if not self._looked.wait(LOCK_S):
            raise self._failure or ClusterError(f"{self._config.name!r} is not adopted yet")
        with self._deploying:
            with self._lock:
                if self._phase == "serving":
                    assert self._view is not None
                    return self._view
                if self._ends.is_set():  # `stop` comes after us, and ends what is there
                    raise self._stopped()
                if self._failure is not None:
                    self._phase = "failed" if self._phase == "new" else self._phase
                    raise self._failure
                self._phase = "starting"
            try:
                self._bring_up(time.monotonic() + self._config.start_timeout_s)
            except BaseException as failure:
                self._kill()
                if not isinstance(failure, RemoraError):
                    logger.exception("deployment %s failed", self._config.name)
                raise self._over("failed", failure) from failure
            with self._lock:
                self._phase = "serving"
            return self.view()

    def stop(self) -> None:
        """Stop every data-plane actor, also while they start, for good. The caller removes the
        coordinator itself afterwards."""
        with self._lock:
            self._ends.set()
            if self._phase == "starting":  # `deploy` sees them die, and ends
                for handle in self._handles.values():
                    ray.kill(handle, no_restart=True)
        with self._deploying:
            if self._elastic is not None:
                self._elastic.close()
                self._elastic.ending()
            stop_router(self._router)
            stop_members(self._handles)
            self._kill()
            self._over("stopped", self._stopped())

    def _stopped(self) -> ClusterError:
        return ClusterError(f"deployment {self._config.name!r} has been stopped")

    def _over(self, phase: Phase, failure: BaseException) -> RemoraError:
        """Note why nothing is up any more; returns what to raise."""
        with self._lock:
            self._phase, self._view = phase, None
            self._failure = self._stopped() if self._ends.is_set() else our_error(failure)
            return self._failure

    def _bring_up(self, until_s: float) -> None:
        config = self._config
        wal, _ = Wal.open(log_folder(config))
        wal.append(STARTING)
        self._elastic = self._new_elastic(wal)
        self._beside.listen()  # a port that is taken is found before anything loads
        looks = begin_processes(config, self._created)
        if config.router.enabled:
            router = start_router(config, self._token)
            with self._lock:
                self._router = router
        try:
            spec: ModelSpec = first_answer(looks, until_s)
            placement = placement_of(config, spec)
            ranks = plan_ranks(config, spec, self._token, self._created)
            first = connect_all(
                config, self._token, spec, placement, ranks, self._handles, self._router, until_s
            )
        except LateError as late:
            missing = {uid: self._handles[uid] for uid in late.uids}
            raise ClusterError(
                f"not everything has started within start_timeout_s = {config.start_timeout_s:g}:"
                f" {why_late(missing, self._asked)}"
            ) from late
        with self._lock:
            self._manifest, self._view = first.manifest, first.view
        self._elastic.begin(
            first.view, spec, first.facts, first.manifest, self._handles, self._router
        )
        self._beside.serve(spec, self._router)

    def _new_elastic(self, wal: Wal) -> Elastic:
        publish, changed = self._publish, self._change_handle
        return Elastic(self._config, self._token, wal, publish=publish, changed=changed)

    def _publish(self, view: View) -> None:
        with self._lock:
            self._view = view
        self._beside.adopt_view(view)

    def _change_handle(self, uid: str, handle: Any, asked: str) -> None:
        with self._lock:
            if handle is None:
                self._handles.pop(uid, None)
            else:
                self._handles[uid], self._asked[uid] = handle, asked

    def _adopt(self) -> None:
        """Take over what a coordinator left that died; nothing of it: this one is new. What one
        left that died in its first start, or while it was being stopped, is ended.

        Raises:
            RemoraError: its log cannot be read, or its model not be looked at.
        """
        wal, records = Wal.open(log_folder(self._config))
        try:
            if records in ([STARTING], [ENDING]):
                self._end_all()
                died = ClusterError("it died in its first start")
                self._over("failed", self._stopped() if records == [ENDING] else died)
            if records in ([], [STARTING], [ENDING]):
                wal.remove()
                return
            has_router = self._config.router.enabled
            router = find_actor(router_name(self._config.name)) if has_router else None
        except BaseException:
            wal.close()  # for the next try
            raise
        elastic = self._elastic = self._new_elastic(wal)
        try:
            spec = inspect_model(self._config.model)
            view = elastic.resume(records, spec, router)
        except BaseException:
            self._elastic = None
            elastic.close()
            elastic.let_go()
            raise
        if view is None:
            self._end_operations()
            remove_placement_groups(self._config)
            if is_next_life():  # its host had all of it, and nobody else would begin again
                _in_thread(self._deploy_again)
            return
        with self._lock:
            self._phase, self._router = "serving", router
        self._beside.serve_when_possible(spec, router)

    def _is_adopted(self) -> bool:
        try:
            self._adopt()
        except Exception as failure:  # with one that leaves `__init__` Ray gives this actor up
            self._failure = our_error(failure)  # told by `deploy`
            logger.warning("%s is not adopted yet", self._config.name, exc_info=True)
            return False
        self._failure = self._failure if self._phase in OVER else None
        return True

    def _adopt_later(self) -> None:
        """Again and again until it works: what lives serves meanwhile, and nobody restores it."""
        while not self._ends.wait(ADOPT_EVERY_S):
            with self._deploying:
                if self._ends.is_set() or self._is_adopted():
                    break
        self._looked.set()

    def _deploy_again(self) -> None:
        try:
            self.deploy()
        except RemoraError:
            logger.exception("deployment %s does not come up again", self._config.name)

    def _end_operations(self) -> None:
        elastic, self._elastic = self._elastic, None
        if elastic is not None:
            elastic.close()
            elastic.forget()

    def _end_all(self) -> None:
        """What there is by name, whoever has started it."""
        end_all(self._config.name)
        remove_placement_groups(self._config)

    def _created(self, uid: str, handle: Any, options: dict[str, Any]) -> None:
        with self._lock:
            self._handles[uid], self._asked[uid] = handle, asked_of_ray(options)
            if self._ends.is_set():  # after `stop` had looked whom to kill
                raise self._stopped()

    def _kill(self) -> None:
        with self._lock:
            handles, self._handles = dict(self._handles), {}
            router, self._router = self._router, None
        self._beside.close()
        if self._elastic is not None:
            self._elastic.close()
        kill_router(router)
        for handle in handles.values():
            ray.kill(handle, no_restart=True)
        self._end_all()
        self._end_operations()  # last: until then another life of this one would go on from the log


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="remora-coordinator", daemon=True).start()
