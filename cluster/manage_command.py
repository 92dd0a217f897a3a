"""`remora status` and `remora stop`: find a deployment, ask it or end it."""

import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from remora.cluster.bootstrap import cluster_status, find_cluster, stop_cluster
from remora.cluster.instances import Instance, missing
from remora.cluster.local_ray import quiet_ray
from remora.comm.errors import ClusterError

STOP_WITHIN_S = 60.0
CONNECT_WITHIN_S = 5.0
OK = 0


def run_status(
    name: str, instance: Instance | None, ray_address: str | None, *, as_json: bool
) -> int:
    """Print what a deployment is doing. Returns the exit status: 3 when there is none."""
    with _connected(instance.ray_address if instance else ray_address) as found:
        if not found or find_cluster(name) is None:
            return missing(f"there is no deployment {name!r}", as_json)
        status = cluster_status(name)
    if instance is not None:
        status["url"] = instance.url
    print(json.dumps(status, default=str) if as_json else status_text(status))
    return OK


def run_stop(
    name: str, instance: Instance | None, ray_address: str | None, *, as_json: bool
) -> int:
    """Take a deployment down. Returns the exit status: 3 when there is none.

    Raises:
        ClusterError: it did not end.
    """
    if instance is not None:
        _end_process(instance)
    else:
        with _connected(ray_address) as found:
            if not found or find_cluster(name) is None:
                return missing(f"there is no deployment {name!r}", as_json)
            stop_cluster(name)
    print(json.dumps({"stopped": name}) if as_json else f"stopped {name}")
    return OK


def status_text(status: dict[str, Any]) -> str:
    """The status for people."""
    lines = [f"{status['name']}: {status['phase']}, model {status['model']}"]
    lines.append(f"  numerics {status['numerics']}, epoch {status['epoch']}")
    if "url" in status:
        lines.append(f"  {status['url']}/v1")
    if status.get("error"):
        lines.append(f"  error: {status['error']}")
    for uid, member in sorted(status["members"].items()):
        lines.append(f"  {uid:<10} {_state(member):<8} {_facts(member)}")
    return "\n".join(lines)


def _state(member: dict[str, Any]) -> str:
    """One word for one member."""
    if not member["alive"]:
        return "dead"
    return "degraded" if member.get("why_not_serving") else str(member["phase"])


def _facts(member: dict[str, Any]) -> str:
    """What an operator looks for first in one member, by its role."""
    if not member["alive"]:
        return str(member.get("error", ""))
    if member.get("why_not_serving"):
        return str(member["why_not_serving"])
    if "calls_served" in member:
        counts = member["experts_per_layer"]
        experts = f"{min(counts, default=0)}-{max(counts, default=0)}"
        return (
            f"{experts} experts in each of {len(counts)} layers"
            f" ({member['weights_bytes'] / 2**20:.1f} MiB), {member['calls_served']} calls,"
            f" {member['compute_s']:.1f} s computing, {member['peers']} peers"
        )
    return (
        f"{member['executor']}, {member['num_running']} running, {member['num_waiting']} waiting,"
        f" KV {member['kv_blocks_used']} of {member['kv_blocks_total']} blocks,"
        f" {member['steps_total']} steps in {member['step_s']:.1f} s,"
        f" {member['preemptions_total']} preemptions"
    )


@contextmanager
def _connected(address: str | None) -> Iterator[bool]:
    """Connect to a Ray cluster; False when there is none to connect to."""
    quiet_ray()
    if address is not None:
        _check_answers(address)
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            configure_logging=False,
        )
    except ConnectionError as error:
        if address is not None:
            raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
        yield False
        return
    try:
        yield True
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises ClusterError when nothing listens at `ip:port`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto", or a URL that Ray understands
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error


def _end_process(instance: Instance) -> None:
    """Ask a `remora serve` to end, as Ctrl-C would, and wait until it has."""
    try:
        handle = os.pidfd_open(instance.pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], STOP_WITHIN_S)
        if not ended:
            raise ClusterError(
                f"process {instance.pid} did not end within {STOP_WITHIN_S:.0f} s of SIGTERM"
            )
    finally:
        os.close(handle)
