"""Create or adopt a deployment, idempotently: what `build`, ingresses and the CLI call.

The coordinator is a detached named actor, so whoever comes first creates it and everybody after
adopts it: an application upgrade keeps the data plane, an explicit `stop_cluster` tears it down.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from remora.actors.coordinator_watch import HEARTBEATS, watch_coordinator
from remora.actors.launch import NORMAL_PRIORITY, RAY_NAMESPACE, Progress, coordinator_name
from remora.actors.router_lookup import router_address
from remora.autoscale.ingress_load import IngressLoad
from remora.cluster.config import RemoraConfig
from remora.cluster.coordinator_process import OVER, CoordinatorProcess
from remora.cluster.operation import Target
from remora.comm.errors import ClusterError, ConfigError, DeadlineError, RemoraError, first_line
from remora.comm.view import Member, View

PROGRESS_EVERY_S = 0.2
COORDINATOR_THREADS = 8  # stop, and readers beside it
DEPLOY = "deploy"  # a thread of its own: however many ingresses wait there, `stop` is heard
BEGIN_S = 30.0  # for the coordinator to take an operation, or to tell how one is
NEXT_LIFE_S = 120.0  # for a coordinator that Ray is starting again to answer
OPERATION_LOOK_S = 5.0  # of one look at an operation: a waiter must not keep a thread for long
NEUTRAL_DIR = "/proc/sys/vm"  # on every Linux host; nobody can put a module there
ADOPTIONS_MAX = 5  # coordinators that one start finds to be over
# What cannot change under a data plane that runs; the rest is the ingresses' own.
DATA_PLANE = (
    "dtype", "experts_dtype", "numerics", "executor", "bind_address", "dense", "experts", "router",
    "elastic", "autoscale", "security",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterHandle:
    """A living deployment as seen from an ingress or the CLI."""

    name: str
    token: bytes
    coordinator: Any  # ray actor handle of `CoordinatorProcess`

    def view(self) -> View:
        """The committed view. Raises ClusterError when nothing serves."""
        view: View = _call(self.coordinator.view.remote())
        return view

    def router_address(self) -> str | None:
        """Where the router listens; None when it is off, or not up just now."""
        return router_address(self.name)

    def status(self) -> dict[str, Any]:
        """As `Coordinator.status`."""
        status: dict[str, Any] = _read(self.coordinator.status)
        return status

    def rebalance(self, operation_id: str, *, dry_run: bool) -> dict[str, Any]:
        """As `Coordinator.rebalance`."""
        pending = self.coordinator.rebalance.remote(operation_id, dry_run=dry_run)
        report: dict[str, Any] = _call(pending)
        return report

    def exchange(self, load: IngressLoad | None) -> dict[str, float]:
        """As `Coordinator.exchange`."""
        gauges: dict[str, float] = _call(self.coordinator.exchange.remote(load))
        return gauges

    def request(self, operation_id: str, target: Target) -> dict[str, Any]:
        """As `Coordinator.request`; a coordinator that Ray is starting again answers in its next
        life, since asking twice does nothing twice."""
        pending = _retried(self.coordinator.request, operation_id, target)
        operation: dict[str, Any] = _call(pending, BEGIN_S)
        return operation

    def wait(self, operation_id: str, timeout_s: float = OPERATION_LOOK_S) -> dict[str, Any]:
        """How an operation is, once it is over or the time is; also told by a next life."""
        pending = _retried(self.coordinator.wait, operation_id, timeout_s)
        operation: dict[str, Any] = _call(pending, timeout_s + BEGIN_S)
        return operation

    def cancel(self, operation_id: str | None) -> dict[str, Any]:
        """As `Coordinator.cancel`; also by a next life."""
        pending = _retried(self.coordinator.cancel, operation_id)
        operation: dict[str, Any] = _call(pending, BEGIN_S)
        return operation

    def done(self, operation_id: str, target: Target) -> dict[str, Any]:
        """Begin an operation, or find the one of that id, and wait until it is over."""
        self.request(operation_id, target)
        return self.over(operation_id)

    def over(self, operation_id: str) -> dict[str, Any]:
        """An operation, once it is over."""
        while (operation := self.wait(operation_id))["outcome"] == "running":
            pass
        return operation

    def dense_members(self) -> list[Member]:
        """The dense groups' first ranks: where ingresses connect."""
        return [member for member in self.view().members if member.role == "dense"]


def neutral_runtime_env() -> dict[str, Any]:
    """A runtime environment whose working directory holds nothing that could be imported.

    Ray puts the driver's working directory on every worker's import path; from a checkout that
    would let `import kernels` (which transformers probes for) find our room. A folder that Ray
    packs and sends would not do: where a machine has several nodes of one session, each new one
    unpacks it again and so takes it from under the workers of the others (Ray 2.60), and `import
    torch` fails in a directory that is gone.
    """
    return {"working_dir": f"local://{NEUTRAL_DIR}"}


def ensure_cluster(
    config: RemoraConfig, on_progress: Callable[[dict[str, Progress]], None] | None = None
) -> ClusterHandle:
    """Bring the deployment up, or adopt the one that runs under the same name.

    Args:
        config: what to serve. An existing deployment must run with the same `DATA_PLANE` keys.
        on_progress: called a few times a second while actors load.

    Raises:
        ConfigError: the one that runs serves something else, or the token file is unusable.
        RemoraError: the model, a weight file or an actor failed, it took longer than
            `start_timeout_s`, or the coordinator hung and was ended; nothing is left behind.
    """
    actor = _coordinator(config)
    _check_same(RemoraConfig.model_validate(_read(actor.config)), config)
    pending = actor.deploy.options(concurrency_group=DEPLOY).remote()
    # dense groups look after a coordinator that serves; nobody else does while it starts
    watch = watch_coordinator(
        config.name, "", hang_s=config.elastic.hang_s, start_s=config.start_timeout_s
    )
    watch.begin()
    try:
        while True:
            done, _ = ray.wait([pending], timeout=PROGRESS_EVERY_S if on_progress else None)
            if done:
                break
            if on_progress:
                on_progress(_call(actor.progress.remote()))
        _call(pending)
    except RemoraError:
        _remove_if_over(actor, NEXT_LIFE_S)
        raise
    finally:
        watch.close()
    return _handle(config.name, actor)


def _coordinator(config: RemoraConfig) -> Any:
    """The deployment's coordinator, made if there is none that may yet serve."""
    remote: Any = ray.remote  # its overloads know no groups of a class given later
    make = remote(concurrency_groups={DEPLOY: 1, HEARTBEATS: 1})(CoordinatorProcess).options(
        name=coordinator_name(config.name),
        namespace=RAY_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,  # a new life reads the log, and adopts what lives; see `CoordinatorWatch`
        max_concurrency=COORDINATOR_THREADS,
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                **NORMAL_PRIORITY,
            }
        },
    )
    token = _token_of(config) or secrets.token_bytes(32)
    for _ in range(ADOPTIONS_MAX):
        actor: Any = make.remote(config.model_dump(mode="json"), token)
        if not _remove_if_over(actor, config.start_timeout_s):
            return actor
    raise ClusterError(f"deployment {config.name!r} is being stopped; try again")


def _remove_if_over(actor: Any, within_s: float) -> bool:
    """Remove a coordinator that has nothing up and will not; True when it is gone.

    Only such a one may go: what it had up would outlive it.

    Raises:
        ClusterError: it could not be made.
        DeadlineError: it has not answered; it is ended, and started again by Ray.
    """
    try:
        if ray.get(_retried(actor.phase), timeout=within_s) not in OVER:
            return False
    except ray.exceptions.GetTimeoutError as late:
        ray.kill(actor, no_restart=False)
        raise DeadlineError(f"the coordinator did not answer within {within_s:g} s") from late
    except ray.exceptions.RayActorError as died:
        if died.actor_init_failed:
            reason = str(died).strip().splitlines()[-1]
            raise ClusterError(f"the coordinator does not start: {reason}") from died
        return True  # somebody else was faster
    ray.kill(actor, no_restart=True)
    return True


def _check_same(running: RemoraConfig, config: RemoraConfig) -> None:
    """Raises ConfigError when `running` is not what `config` asks of the data plane."""
    if running.model != config.model:
        raise ConfigError(
            f"deployment {config.name!r} already serves {running.model!r}, not {config.model!r}: "
            "choose another --name, or stop it first (remora stop)"
        )
    before, now = running.model_dump(mode="json"), config.model_dump(mode="json")
    for key in DATA_PLANE:
        if before[key] != now[key]:
            was, wanted = _difference(before[key], now[key])
            raise ConfigError(
                f"deployment {config.name!r} already runs with {key} {was}, not {wanted}: choose "
                f"another --name, or stop it first (remora stop {config.name})"
            )


def _difference(was: Any, wanted: Any) -> tuple[Any, Any]:
    """The part in which two values of one configuration key differ."""
    if not isinstance(was, dict):
        return was, wanted
    keys = [key for key in was if was[key] != wanted[key]]
    return {key: was[key] for key in keys}, {key: wanted[key] for key in keys}


def find_cluster(name: str) -> ClusterHandle | None:
    """The deployment of that name in the connected Ray cluster, or None."""
    try:
        actor = ray.get_actor(coordinator_name(name), namespace=RAY_NAMESPACE)
    except ValueError:
        return None
    return _handle(name, actor)


def is_up(name: str) -> bool:
    """Whether a deployment of that name runs, or is about to, in the connected Ray cluster."""
    found = find_cluster(name)
    return found is not None and _read(found.coordinator.phase) not in OVER


def cluster_status(name: str) -> dict[str, Any]:
    """Phase, members and what they say of themselves.

    Raises:
        ClusterError: no deployment of that name.
    """
    return _found(name).status()


def stop_cluster(name: str) -> None:
    """Stop a deployment's actors and its coordinator; the Ray cluster itself stays.

    Raises:
        ClusterError: no deployment of that name.
    """
    handle = _found(name)
    _call(handle.coordinator.stop.remote())
    ray.kill(handle.coordinator, no_restart=True)


def _found(name: str) -> ClusterHandle:
    handle = find_cluster(name)
    if handle is None:
        raise ClusterError(f"there is no deployment {name!r} in this Ray cluster")
    return handle


def _handle(name: str, actor: Any) -> ClusterHandle:
    return ClusterHandle(name=name, token=_read(actor.credentials), coordinator=actor)


def _token_of(config: RemoraConfig) -> bytes | None:
    path = config.security.token_file
    if path is None:
        return None
    try:
        token = Path(path).read_bytes().strip()
    except OSError as unreadable:
        raise ConfigError(f"security.token_file {path}: {unreadable.strerror}") from unreadable
    if len(token) < 16:
        raise ConfigError(f"security.token_file {path}: {len(token)} bytes, at least 16 are needed")
    return token


def _read(method: Any) -> Any:
    """What a method gives that changes nothing. Raises as `_call`, in `NEXT_LIFE_S`."""
    return _call(_retried(method), NEXT_LIFE_S)


def _retried(method: Any, *given: Any) -> Any:
    """A call whose answer a coordinator that Ray is starting again gives in its next life, however
    often that takes a try."""
    return method.options(max_task_retries=-1).remote(*given)


def _call(reference: Any, timeout_s: float | None = None) -> Any:
    """`ray.get` that raises our own error when an actor raised one, or has not answered in time."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as late:
        raise DeadlineError(f"the coordinator did not answer within {timeout_s:g} s") from late
    except ray.exceptions.RayTaskError as failure:
        if isinstance(failure.cause, RemoraError):
            raise failure.cause from None
        raise
    except ray.exceptions.RayActorError as died:
        raise ClusterError(f"the coordinator died: {first_line(died)}") from died
    except ray.exceptions.RayError as failure:  # it found no place, or Ray itself is in trouble
        reason = first_line(failure)
        raise ClusterError(f"the coordinator cannot be asked: {reason}") from failure
