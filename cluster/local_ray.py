"""A Ray cluster of our own on this machine, which lives as long as its `remora serve`.

Its session (sockets, logs) is a private temporary directory that goes with it, so two instances
share nothing. Serve runs with direct ingress when there is one ingress replica: the replica listens
on the port itself and no proxy stands in the stream (see `cluster/app.py` for what that saves).
"""

import logging
import os
import secrets
import select
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

from remora.cluster.bootstrap import neutral_runtime_env
from remora.cluster.config import RemoraConfig
from remora.cluster.instances import TOKEN_ENV, find_instance, instance_names
from remora.comm.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

ENDS_WITHIN_S = 10.0  # Ray's processes, once they are told to


def check_free(config: RemoraConfig) -> RemoraConfig:
    """The configuration with a port that is free.

    Raises:
        ConfigError: an instance of this name runs, or the port is taken.
    """
    instance_names()  # clears away what killed ones have left
    running = find_instance(config.name)
    if running is not None:
        raise ConfigError(
            f"{config.name!r} is running already (process {running.pid},"
            f" {running.url or 'starting'}, model {running.model}): choose another --name and"
            f" --port, or `remora stop {config.name}`"
        )
    port = _usable_port(config.http.host, config.http.port)
    return config.model_copy(update={"http": config.http.model_copy(update={"port": port})})


@contextmanager
def own_ray(config: RemoraConfig) -> Iterator[tuple[str, str]]:
    """A Ray cluster of this machine for one deployment; yields its address and its directory.

    Ray's own processes listen on every address (Ray turns a loopback address into the host's), so
    they get a token of this cluster's own.

    Raises:
        ClusterError: Ray does not start.
        ConfigError: the actors ask for more than this machine has.
    """
    # Unix sockets lie in the session; their paths may have 107 bytes, so the name is short.
    session = tempfile.mkdtemp(prefix="rm-", dir="/tmp")
    saved = dict(os.environ)
    os.environ.update(serve_environment(config))
    os.environ[TOKEN_ENV] = secrets.token_hex(32)
    quiet_ray()
    try:
        _start_ray(config, session)
        check_room(config, ray.cluster_resources())
        yield str(ray.get_runtime_context().gcs_address), session
    finally:
        below = _descendants(os.getpid())
        ray.shutdown()
        _wait_for_end(below, ENDS_WITHIN_S)  # else one may still write into what is removed next
        os.environ.clear()
        os.environ.update(saved)
        shutil.rmtree(session, ignore_errors=True)


def _start_ray(config: RemoraConfig, session: str) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=config.ray.num_cpus or _num_cpus(config),
            object_store_memory=config.ray.object_store_mib << 20,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env=neutral_runtime_env(),
            _temp_dir=session,
        )
    except Exception as error:  # Ray raises that very class where a node was too slow to come up
        raise ClusterError(f"Ray does not start: {error}") from error


def check_room(config: RemoraConfig, has: Mapping[str, float]) -> None:
    """Whether all actors find a place; nobody adds nodes to a Ray cluster of our own.

    Args:
        has: amounts of the machine, by Ray's names.

    Raises:
        ConfigError: naming what there is too little of.
    """
    asked: defaultdict[str, float] = defaultdict(float)
    for count, placed in (
        (_ranks(config), config.dense),
        (_shards(config), config.experts),
    ):
        amounts = {"CPU": placed.num_cpus, "GPU": placed.num_gpus, **placed.resources}
        for name, amount in amounts.items():
            asked[name] += count * amount
    for name, amount in asked.items():
        if amount > has.get(name, 0) + 1e-6:
            raise ConfigError(
                f"{_ranks(config)} dense rank(s) and {_shards(config)} expert shard(s)"
                f" ask for {amount:g} {name} of Ray, this machine has {has.get(name, 0):g}: lower"
                " what dense.* or experts.* ask for (num_cpus, num_gpus, resources), or name a"
                " larger Ray cluster (ray.address)"
            )


def _descendants(pid: int) -> set[int]:
    """Processes below `pid`, as far as they can be seen now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def _wait_for_end(pids: set[int], timeout_s: float) -> None:
    """Return when all of `pids` have ended; say which have not after `timeout_s`."""
    until = time.monotonic() + timeout_s
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([handle], [], [], max(0.0, until - time.monotonic()))
        finally:
            os.close(handle)
        if not ended:
            logger.warning("process %d of Ray did not end within %.0f s", pid, timeout_s)


def quiet_ray() -> None:
    """Ray's own notes (token, Serve's steps) are not for the users of our command line."""
    for name in ("ray._private.authentication", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def serve_environment(config: RemoraConfig) -> dict[str, str]:
    """Environment that Ray's processes must start with: the cheapest way out of Serve, and nothing
    gathered that nobody reads in a cluster without a dashboard (idle processes then take 10 % of a
    core together, not 14 %: benchmarks/notes/2026-11-29-serve.md)."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    if config.http.replicas_max == 1:
        environment |= {
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(config.http.port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(config.http.port + 1),
        }
    return environment


def proxy_port(config: RemoraConfig) -> int:
    """Where Serve's own proxy listens: elsewhere when the replica has the port."""
    if config.http.replicas_max == 1:
        return _usable_port(config.http.host, 0)
    return config.http.port


def _num_cpus(config: RemoraConfig) -> int:
    """Logical CPUs: the machine's, or what the actors ask for if that is more."""
    dense, experts = config.dense, config.experts
    asked = _ranks(config) * dense.num_cpus + _shards(config) * experts.num_cpus
    return max(os.cpu_count() or 1, int(asked + 0.999))


def _ranks(config: RemoraConfig) -> int:
    """With those that stand by."""
    return config.dense.groups * config.dense.tensor_parallel + config.elastic.warm_dense


def _shards(config: RemoraConfig) -> int:
    """With those that stand by."""
    return config.experts.shards + config.elastic.warm_standby


def _usable_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host} port {port} cannot be used ({error.strerror}): choose another with --port"
                " (0: one that is free)"
            ) from None
        chosen: int = probe.getsockname()[1]
        return chosen
