"""The coordinator: brings the data-plane actors of one deployment up and publishes its view.

One detached, named actor per deployment. This first cut brings a deployment up, keeps the view that
dense ranks and ingresses read, tells who lives, and takes everything down; elasticity (operations,
write-ahead log, supervision of incarnations) grows here with its own issue.

Every data-plane actor is detached and named by incarnation, so that it outlives its creator:
`remora/<deployment>/shard-0#1`.
"""

import functools
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray

from remora.actors.dense_actor import DenseActor, DenseLaunch
from remora.actors.expert_actor import ExpertActor, ShardLaunch
from remora.actors.launch import Progress, actor_name
from remora.actors.manifest import Manifest
from remora.actors.model_spec import inspect_model
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import dense_launch, dense_options, shard_launch, shard_options
from remora.comm.errors import ClusterError, RemoraError
from remora.comm.view import Member, View, contiguous_placement

logger = logging.getLogger(__name__)

Phase = Literal["new", "starting", "serving", "failed", "stopped"]


class Coordinator:
    """Brings one deployment up and down. Wrapped by `ray.remote` in `cluster.bootstrap`.

    Methods are called on a small thread pool (`max_concurrency`), so `progress` and `status` answer
    while `deploy` runs. The lock guards the fields; no remote call is made while it is held.
    """

    def __init__(self, config: dict[str, Any], token: bytes | None) -> None:
        self._config = RemoraConfig.model_validate(config)
        self._token = token if token is not None else secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._deploying = threading.Lock()
        self._phase: Phase = "new"
        self._error: str | None = None
        self._view: View | None = None
        self._manifest: Manifest | None = None
        self._handles: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._started_unix_s = time.time()

    # ---- what ingresses and operators read ----

    def credentials(self) -> bytes:
        """The cluster's token (32 bytes); Ray's own authentication guards this call."""
        return self._token

    def config(self) -> dict[str, Any]:
        """The configuration this deployment runs, as plain data."""
        return self._config.model_dump(mode="json")

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
            phase, error, view = self._phase, self._error, self._view
            handles = dict(self._handles)
        members = {}
        for uid, handle in handles.items():
            try:
                members[uid] = ray.get(handle.status.remote(), timeout=5)
            except ray.exceptions.RayError as broken:
                members[uid] = {"alive": False, "error": str(broken).splitlines()[0]}
        return {
            "name": self._config.name,
            "model": self._config.model,
            "numerics": self._config.numerics,
            "phase": phase,
            "error": error,
            "epoch": view.epoch if view else None,
            "view_hash": view.view_hash if view else None,
            "uptime_s": time.time() - self._started_unix_s,
            "members": members,
        }

    def progress(self) -> dict[str, Progress]:
        """How far each actor has loaded; empty before any exists."""
        with self._lock:
            handles = dict(self._handles)
        report = {}
        for uid, handle in handles.items():
            try:
                report[uid] = ray.get(handle.progress.remote(), timeout=5)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                report[uid] = Progress(phase="starting", bytes_done=0, bytes_total=0)
            except ray.exceptions.ActorDiedError as died:
                report[uid] = Progress(
                    phase=f"died: {str(died).splitlines()[0]}", bytes_done=0, bytes_total=0
                )
        return report

    # ---- up and down ----

    def deploy(self) -> View:
        """Create, load, connect, publish. Idempotent: asking again returns the view.

        Raises:
            RemoraError: the model, a weight file or an actor failed; nothing is left half up.
        """
        with self._deploying:
            with self._lock:
                if self._phase == "serving":
                    assert self._view is not None
                    return self._view
                self._phase, self._error = "starting", None
            try:
                view = self._bring_up()
            except BaseException as failure:
                self._tear_down()
                with self._lock:
                    self._phase, self._error = "failed", str(failure)
                raise
            with self._lock:
                self._view, self._phase = view, "serving"
            return view

    def stop(self) -> None:
        """Stop every data-plane actor. The caller removes the coordinator itself afterwards."""
        with self._deploying:
            self._tear_down()
            with self._lock:
                self._phase, self._view = "stopped", None

    def _bring_up(self) -> View:
        config = self._config
        spec = inspect_model(config.model)
        shard_uids = tuple(f"shard-{i}" for i in range(config.experts.shards))
        dense_uids = tuple(f"dense-{i}" for i in range(config.dense.groups))
        placement = contiguous_placement(
            num_experts=spec.num_experts, moe_layers=spec.moe_layers, shard_uids=shard_uids
        )
        for uid in shard_uids:
            launch = shard_launch(config, uid, placement, self._token)
            self._create(ExpertActor, uid, launch, shard_options(config))
        for uid in dense_uids:
            launch_dense = dense_launch(config, uid, spec, self._token)
            self._create(DenseActor, uid, launch_dense, dense_options(config))
        with ThreadPoolExecutor(len(shard_uids) + len(dense_uids)) as pool:
            members = list(pool.map(self._start_one, (*shard_uids, *dense_uids)))
        manifest = self._manifest_of(shard_uids)
        missing = len(spec.moe_layers) * spec.num_experts - len(manifest.experts)
        assert missing == 0, f"{missing} experts of the placement have no digest"
        with self._lock:
            self._manifest = manifest
        view = View(epoch=1, members=tuple(members), placement=placement)
        for uid in dense_uids:
            _get(self._handles[uid].adopt_view.remote(view))
        return view

    def _create(
        self,
        actor_class: type[ExpertActor] | type[DenseActor],
        uid: str,
        launch: ShardLaunch | DenseLaunch,
        options: dict[str, Any],
    ) -> None:
        name = actor_name(self._config.name, uid, launch.incarnation)
        handle = ray.remote(actor_class).options(name=name, **options).remote(launch)
        with self._lock:
            self._handles[uid], self._names[uid] = handle, name

    def _start_one(self, uid: str) -> Member:
        member: Member = _get(self._handles[uid].start.remote())
        return member

    def _manifest_of(self, shard_uids: tuple[str, ...]) -> Manifest:
        """Digests of every expert held anywhere; replicas with different bytes are an error."""
        held = [_get(self._handles[uid].manifest.remote()) for uid in shard_uids]
        whole: Manifest = functools.reduce(Manifest.merge, held)
        return whole

    def _tear_down(self) -> None:
        with self._lock:
            handles, self._handles = dict(self._handles), {}
        # Dense ranks first: a rank whose shards vanish would report a fault that is none.
        for uid in sorted(handles):
            try:
                ray.get(handles[uid].stop.remote(), timeout=10)
            except ray.exceptions.RayError as broken:
                logger.warning("%s did not stop by itself: %s", uid, str(broken).splitlines()[0])
            ray.kill(handles[uid], no_restart=True)


def _get(reference: Any) -> Any:
    """`ray.get` that raises our own error when an actor raised one, and names a dead actor."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as failure:
        cause = failure.cause
        if isinstance(cause, RemoraError):
            raise cause from None
        raise
    except ray.exceptions.ActorDiedError as died:
        raise ClusterError(f"an actor died while starting: {died}") from died
