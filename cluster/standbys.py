"""Warm standbys: processes of members that are to be, started and imported, with nothing loaded.

The next shard, or dense group, that starts, in a scale-up or because another one died, takes one
and is spared the start of a process and its imports. They are filled up afterwards, one after the
other, so that no more than one process of a kind at a time starts beside those that serve (at idle
priority but for Ray's own part). A standby holds the CPUs, the GPU and the labels that such a
member asks of Ray.
"""

import logging
import secrets
import threading
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from typing import Any, Final, Literal

import ray
from ray.util import list_named_actors

from remora.actors.dense_process import DenseProcess
from remora.actors.launch import RAY_NAMESPACE, STANDBY, actor_name, coordinator_name
from remora.actors.shard_process import ShardProcess
from remora.cluster.config import RemoraConfig
from remora.cluster.launch import FIRST_INCARNATION, dense_options, shard_options
from remora.cluster.node_watch import node_of
from remora.cluster.ray_calls import end_of, make_member
from remora.comm.errors import first_line

logger = logging.getLogger(__name__)

FAILURES_MAX: Final = 3  # in a row, until the end of an operation: each costs who serves a start


class Standbys:
    """Those of one deployment and kind. Any thread; nothing here waits.

    Args:
        kind: a dense group has one rank, where there are standbys of it.
    """

    def __init__(self, config: RemoraConfig, kind: Literal["shard", "dense"]) -> None:
        self._config, self._kind = config, kind
        elastic = config.elastic
        self._wanted = elastic.warm_standby if kind == "shard" else elastic.warm_dense
        self._lock = threading.Lock()
        self._warm: dict[str, Any] = {}  # actor name -> handle
        self._starting: dict[str, Any] = {}  # one at most
        self._failures = 0
        self._why: str | None = None  # the last one failed
        self._closed = False

    def fill(self) -> None:
        """Start the next one if any is missing; and so on, as each is warm. Where too many failed,
        one more is tried."""
        with self._lock:
            self._failures = min(self._failures, FAILURES_MAX - 1)
        self.start_next()

    def start_next(self) -> None:
        """As `fill`, but nothing where too many failed."""
        config = self._config
        with self._lock:
            missing = self._wanted - len(self._warm) - len(self._starting)
            if self._closed or missing <= 0 or self._starting or self._failures >= FAILURES_MAX:
                return
            uid = f"{STANDBY}{secrets.token_hex(4)}"
            name = actor_name(config.name, uid, FIRST_INCARNATION)
            of_shards = self._kind == "shard"
            options = shard_options(config) if of_shards else dense_options(config)
            handle: Any = make_member(ShardProcess if of_shards else DenseProcess, name, options)
            self._starting[name] = handle
        warm = handle.warm_up.remote(config.model).future()
        warm.add_done_callback(lambda done: self._warmed(name, done))
        end_of(handle).add_done_callback(lambda _: self._ended(name))

    def take(self) -> tuple[str, Any] | None:
        """A warm one, by Ray's name and handle, that is the caller's now; None: there is none."""
        with self._lock:
            return self._warm.popitem() if self._warm else None

    def leave(self, nodes: AbstractSet[str]) -> None:
        """End those on nodes that go away: who takes one would go with it."""
        with self._lock:
            known = {**self._warm, **self._starting}
        for name in [name for name, handle in known.items() if node_of(handle) in nodes]:
            with self._lock:
                handle = self._warm.pop(name, None) or self._starting.pop(name, None)
            if handle is not None:
                ray.kill(handle, no_restart=True)

    def status(self) -> dict[str, Any]:
        """How many there are to be, are warm, are starting; and why the last one that was tried
        failed, if it did, and whether more are tried."""
        with self._lock:
            return {
                "wanted": self._wanted,
                "warm": len(self._warm),
                "starting": len(self._starting),
                "error": self._why,
                "given_up": self._failures >= FAILURES_MAX,
            }

    def close(self) -> None:
        """End all that nobody has taken, for good."""
        with self._lock:
            self._closed = True
            handles = [*self._warm.values(), *self._starting.values()]
            self._warm.clear()
            self._starting.clear()
        for handle in handles:
            ray.kill(handle, no_restart=True)

    # -- inside; Ray's thread, from which nothing of Ray's may be waited for --------------------

    def _warmed(self, name: str, done: "Future[None]") -> None:
        failure = done.exception()
        with self._lock:
            handle = self._starting.pop(name, None)
            if handle is None:  # closed, or it has ended
                return
            if failure is None:
                self._warm[name] = handle
                self._failures, self._why = 0, None
            else:
                self._failures += 1
                self._why = first_line(failure)
        if failure is not None:
            logger.error("standby %s: %s", name, self._why)
        self._go_on(None if failure is None else handle)

    def _ended(self, name: str) -> None:
        with self._lock:
            found = self._warm.pop(name, None) or self._starting.pop(name, None)
            if found is None or self._closed:  # somebody's, or asked to end
                return
            self._failures += 1
            self._why = "it died"
        logger.error("standby %s died", name)
        self._go_on(None)

    def _go_on(self, broken: Any) -> None:
        def work() -> None:
            if broken is not None:
                ray.kill(broken, no_restart=True)
            self.start_next()

        threading.Thread(target=work, name="remora-standbys", daemon=True).start()


def end_strays(deployment: str, in_use: set[str]) -> None:
    """End the standbys of a coordinator that died, but for those that have become members.

    Args:
        in_use: Ray's names of the members, of those included that retire.
    """
    _end_named(f"remora/{deployment}/{STANDBY}", in_use)


def end_all(deployment: str) -> None:
    """End what a coordinator had started that died in the middle of its first start."""
    _end_named(f"remora/{deployment}/", {coordinator_name(deployment)})


def _end_named(prefix: str, kept: set[str]) -> None:
    for found in list_named_actors(all_namespaces=True):
        name = found["name"]
        if found["namespace"] == RAY_NAMESPACE and name.startswith(prefix) and name not in kept:
            try:
                ray.kill(ray.get_actor(name, namespace=RAY_NAMESPACE), no_restart=True)
            except ValueError:  # it has ended meanwhile
                logger.info("%s is gone", name)
