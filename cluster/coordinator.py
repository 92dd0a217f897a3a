"""The coordinator: brings the data-plane actors of one deployment up and publishes its view.

One detached, named actor per deployment. This first cut brings a deployment up, keeps the view that
dense ranks and ingresses read, tells who lives, and takes everything down; elasticity (operations,
write-ahead log, supervision of incarnations) grows here with its own issue.

Every data-plane actor is detached and named by incarnation, so that it outlives its creator:
`remora/<deployment>/shard-0#1`. A coordinator brings its deployment up once: after a failure or a
stop it has nothing up and is of no more use; whoever asks next removes it and makes another.
"""

import functools
import logging
import secrets
import threading
import time
from typing import Any, Literal

import ray

from remora.actors.dense_actor import DenseActor, DenseLaunch
from remora.actors.expert_actor import ExpertActor, ShardLaunch
from remora.actors.launch import Progress, actor_name
from remora.actors.manifest import Manifest
from remora.actors.model_spec import inspect_model
from remora.actors.tp_actor import RankActor
from remora.cluster.config import RemoraConfig
from remora.cluster.dense_groups import (
    RankPlan,
    rank_plans,
    remove_placement_groups,
    start_ranks,
)
from remora.cluster.launch import (
    placement_of,
    shard_launch,
    shard_options,
)
from remora.cluster.members import (
    LateError,
    all_answers,
    answers_within,
    asked_of_ray,
    why_late,
)
from remora.cluster.rebalancer import Rebalancer
from remora.cluster.router_process import (
    kill_router,
    make_rebalancer,
    router_status,
    start_router,
    stop_router,
)
from remora.comm.errors import ClusterError, RemoraError
from remora.comm.view import Placement, View

logger = logging.getLogger(__name__)

Phase = Literal["new", "starting", "serving", "failed", "stopped"]
OVER: tuple[Phase, ...] = ("failed", "stopped")  # nothing is up, and nothing will be
STATUS_S = 5.0  # for all members to tell how they are
PROGRESS_S = 1.0
STOP_S = 10.0  # for all members of a role to stop by themselves
_UNANSWERED = (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError)


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
        self._failure: RemoraError | None = None  # why it is over
        self._stopping = False
        self._view: View | None = None
        self._manifest: Manifest | None = None
        self._handles: dict[str, Any] = {}
        self._ranks: list[RankPlan] = []  # of dense groups
        self._router: Any = None
        self._rebalancer: Rebalancer | None = None
        self._asked: dict[str, str] = {}  # of Ray, by uid
        self._started_unix_s = time.time()

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
            handles, router = dict(self._handles), self._router
            rebalancer = self._rebalancer
        members = {}
        pending = {uid: handle.status.remote() for uid, handle in handles.items()}
        for uid, answer in answers_within(pending, STATUS_S).items():
            if isinstance(answer, _UNANSWERED):
                waits = phase == "starting"  # for a place, or for its imports
                members[uid] = {"alive": waits, "phase": phase, "error": "it does not answer"}
            elif isinstance(answer, Exception):
                members[uid] = {"alive": False, "error": str(answer).splitlines()[0]}
            else:
                members[uid] = answer
        return {
            "name": self._config.name,
            "model": self._config.model,
            "numerics": self._config.numerics,
            "phase": phase,
            "error": str(failure) if failure else None,
            "epoch": view.epoch if view else None,
            "view_hash": view.view_hash if view else None,
            "uptime_s": time.time() - self._started_unix_s,
            "members": members,
            "router": router_status(router, rebalancer),
        }

    def progress(self) -> dict[str, Progress]:
        """How far each actor has loaded; empty before any exists."""
        with self._lock:
            handles = dict(self._handles)
        report = {}
        pending = {uid: handle.progress.remote() for uid, handle in handles.items()}
        for uid, answer in answers_within(pending, PROGRESS_S).items():
            if isinstance(answer, _UNANSWERED):
                answer = Progress(phase="starting")
            elif isinstance(answer, Exception):
                answer = Progress(phase=f"died: {str(answer).splitlines()[0]}")
            report[uid] = answer
        return report

    def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """A round of rebalancing now; see `Rebalancer.propose` and `move`.

        Raises:
            ClusterError: nothing serves, the router is off, or it has no plan to give.
            ConfigError: not a dry run, and nowhere to keep a placement.
        """
        rebalancer = self._rebalancer
        if rebalancer is None:
            raise ClusterError(f"deployment {self._config.name!r} has no router that serves")
        return rebalancer.propose() if dry_run else rebalancer.move()

    def rebalance_gauges(self) -> dict[str, float]:
        """Metrics of the online loop by name; empty before its first move."""
        return self._rebalancer.gauges() if self._rebalancer is not None else {}

    # ---- up and down ----

    def deploy(self) -> View:
        """Create, load, connect, publish. Asking again returns the view, or the same failure.

        Raises:
            RemoraError: the model, a weight file or an actor failed, not all had started within
                `start_timeout_s`, or somebody stopped it meanwhile; nothing is left half up.
        """
        with self._deploying:
            with self._lock:
                if self._phase == "serving":
                    assert self._view is not None
                    return self._view
                if self._failure is not None:
                    raise self._failure
                self._phase = "starting"
            try:
                view = self._bring_up(time.monotonic() + self._config.start_timeout_s)
            except BaseException as failure:
                self._kill()
                if not isinstance(failure, RemoraError):
                    logger.exception("deployment %s failed", self._config.name)
                raise self._over("failed", failure) from failure
            with self._lock:
                self._view, self._phase = view, "serving"
            return view

    def stop(self) -> None:
        """Stop every data-plane actor, also while they start, for good. The caller removes the
        coordinator itself afterwards."""
        with self._lock:
            self._stopping = True
            if self._phase == "starting":  # `deploy` sees them die, and ends
                for handle in self._handles.values():
                    ray.kill(handle, no_restart=True)
        with self._deploying:
            self._stop_members()
            self._kill()
            self._over("stopped", ClusterError(self._stopped()))

    def _stopped(self) -> str:
        return f"deployment {self._config.name!r} has been stopped"

    def _over(self, phase: Phase, failure: BaseException) -> RemoraError:
        """Note why nothing is up any more; returns what to raise."""
        with self._lock:
            if self._stopping:
                failure = ClusterError(self._stopped())
            elif not isinstance(failure, RemoraError):
                failure = ClusterError(f"{type(failure).__name__}: {failure}")
            self._phase, self._view, self._failure = phase, None, failure
        return failure

    def _bring_up(self, until_s: float) -> View:
        config = self._config
        spec = inspect_model(config.model)
        placement = placement_of(config, spec)
        if config.router.enabled:
            router = start_router(config, self._token)
            with self._lock:
                self._router = router
        shard_uids = tuple(placement.slots)
        dense_uids = tuple(f"dense-{i}" for i in range(config.dense.groups))
        for uid in shard_uids:
            launch = shard_launch(config, uid, placement, self._token)
            self._create(ExpertActor, uid, launch, shard_options(config))
        for group in range(config.dense.groups):
            plans = rank_plans(config, group, spec, self._token)
            with self._lock:
                self._ranks += plans
            for plan in plans:
                self._create(plan.actor_class, plan.uid, plan.launch, plan.options)
        try:
            view = self._connect(shard_uids, dense_uids, placement, until_s)
        except LateError as late:
            missing = {uid: self._handles[uid] for uid in late.uids}
            raise ClusterError(
                f"not everything has started within start_timeout_s = {config.start_timeout_s:g}:"
                f" {why_late(missing, self._asked)}"
            ) from late
        if self._router is not None:
            self._rebalancer = make_rebalancer(config, spec, view, self._router)
        return view

    def _connect(
        self,
        shard_uids: tuple[str, ...],
        dense_uids: tuple[str, ...],
        placement: Placement,
        until_s: float,
    ) -> View:
        """Have every actor load, check what the shards hold, and tell the dense ranks."""
        handles = self._handles
        pending = {uid: handles[uid].start.remote() for uid in shard_uids}
        started = all_answers(pending | start_ranks(handles, self._ranks), until_s)
        num_experts = len(placement.moe_layers) * placement.num_experts
        self._keep_manifest(shard_uids, num_experts, until_s)
        view = View(epoch=1, members=tuple(filter(None, started.values())), placement=placement)
        adopted = {uid: handles[uid].adopt_view.remote(view) for uid in dense_uids}
        if self._router is not None:
            adopted["router"] = self._router.adopt_view.remote(view)
        all_answers(adopted, until_s)
        return view

    def _create(
        self,
        actor_class: type[ExpertActor] | type[DenseActor] | type[RankActor],
        uid: str,
        launch: ShardLaunch | DenseLaunch,
        options: dict[str, Any],
    ) -> None:
        name = actor_name(self._config.name, uid, launch.incarnation)
        handle = ray.remote(actor_class).options(name=name, **options).remote(launch)
        with self._lock:
            self._handles[uid], self._asked[uid] = handle, asked_of_ray(options)
            if self._stopping:  # after `stop` had looked whom to kill
                raise ClusterError(self._stopped())

    def _keep_manifest(self, shard_uids: tuple[str, ...], count: int, until_s: float) -> None:
        """Digests of every expert held anywhere; replicas with different bytes are an error."""
        pending = {uid: self._handles[uid].manifest.remote() for uid in shard_uids}
        whole: Manifest = functools.reduce(Manifest.merge, all_answers(pending, until_s).values())
        assert len(whole.experts) == count, f"{len(whole.experts)} digests != {count} experts"
        with self._lock:
            self._manifest = whole

    def _stop_members(self) -> None:
        """Ask all to stop. Dense ranks first: one whose shards vanish would report a fault."""
        stop_router(self._router)
        followers = {plan.uid for plan in self._ranks if plan.launch.rank}
        leaders = {plan.uid for plan in self._ranks} - followers
        for uids in (leaders, followers, self._handles.keys() - leaders - followers):
            pending = {u: h.stop.remote() for u, h in self._handles.items() if u in uids}
            for uid, answer in answers_within(pending, STOP_S).items():
                if isinstance(answer, Exception):
                    reason = str(answer).splitlines()[0]
                    logger.warning("%s did not stop by itself: %s", uid, reason)

    def _kill(self) -> None:
        with self._lock:
            handles, self._handles = dict(self._handles), {}
            ranks, self._ranks = self._ranks, []
            router, self._router = self._router, None
            rebalancer, self._rebalancer = self._rebalancer, None
        if rebalancer is not None:
            rebalancer.close()
        kill_router(router)
        for handle in handles.values():
            ray.kill(handle, no_restart=True)
        remove_placement_groups(ranks)
