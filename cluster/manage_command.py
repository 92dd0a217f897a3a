"""`remora status` and `remora stop`: find a deployment, ask it or end it."""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from remora.cluster.autoscale_command import autoscale_lines
from remora.cluster.bootstrap import (
    ClusterHandle,
    cluster_status,
    find_cluster,
    stop_cluster,
)
from remora.cluster.instances import Instance, instance_names, missing
from remora.cluster.local_ray import quiet_ray
from remora.cluster.operation_command import operation_text
from remora.cluster.ray_address import connect, started_by_ray_start
from remora.cluster.router_text import router_lines
from remora.comm.errors import ClusterError

STOP_WITHIN_S = 60.0
WATCH_EVERY_S = 1.0
CLEAR = "\x1b[H\x1b[2J"  # of a terminal
OK = 0


def run_status(
    name: str, instance: Instance | None, ray_address: str | None, *, as_json: bool, watch: bool
) -> int:
    """Print what a deployment is doing. Returns the exit status: 3 when there is none.

    Args:
        watch: again and again, until Ctrl-C or until there is none.
    """
    with connected(instance.ray_address if instance else ray_address) as found:
        while True:
            if found and find_cluster(name) is not None:
                status = cluster_status(name)
            elif instance is not None:
                status = _not_there_yet(instance)
            else:
                return missing(nothing_of(name), as_json)
            if instance is not None and instance.url is not None:
                status["url"] = instance.url
            text = json.dumps(status, default=str) if as_json else status_text(status)
            print(f"{CLEAR if watch and sys.stdout.isatty() else ''}{text}", flush=True)
            if not watch:
                return OK
            time.sleep(WATCH_EVERY_S)


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
        with connected(ray_address) as found:
            if not found or find_cluster(name) is None:
                return missing(nothing_of(name), as_json)
            _delete_application(name)
            if find_cluster(name) is not None:  # else its ingress took it down
                stop_cluster(name)
    print(json.dumps({"stopped": name}) if as_json else f"stopped {name}")
    return OK


def _delete_application(name: str) -> None:
    """The ingress goes first: without its data plane it would answer 503 for good."""
    from ray import serve  # slow, and only needed here

    if name in serve.status().applications:
        serve.delete(name)


def nothing_of(name: str) -> str:
    """What to tell who asked for a deployment that is not there."""
    names = instance_names()
    here = f"; running on this machine: {', '.join(names)}" if names else ""
    return f"there is no deployment {name!r}{here} (in another Ray cluster: --ray-address)"


def _not_there_yet(instance: Instance) -> dict[str, Any]:
    """The status of a `remora serve` that has not made its coordinator yet."""
    return {
        "name": instance.name,
        "model": instance.model,
        "numerics": None,
        "phase": "starting",
        "error": None,
        "epoch": None,
        "members": {},
    }


def status_text(status: dict[str, Any]) -> str:
    """The status for people."""
    lines = [f"{status['name']}: {status['phase']}, model {status['model']}"]
    if status["epoch"] is not None:
        lines.append(f"  numerics {status['numerics']}, epoch {status['epoch']}")
    if "url" in status:
        lines.append(f"  {status['url']}/v1")
    if status.get("error"):
        lines.append(f"  error: {status['error']}")
    for uid, member in sorted(status["members"].items()):
        lines.append(f"  {uid:<10} {_state(member):<8} {_facts(member)}".rstrip())
    if "router" in status:
        lines += router_lines(status["router"])
    for what, why in (status.get("not_started") or {}).items():
        lines.append(f"  no {what} yet: {why}")
    lines += autoscale_lines(status.get("autoscale"))
    operations = status.get("operations") or {"running": None, "last": []}
    if alive := operations.get("replicas"):
        counts = "{none} lost, {one} with one replica, {several} with more".format(**alive)
        lines.append(f"  experts of all layers: {counts}")
    for operation in [operations["running"]] if operations["running"] else operations["last"][-1:]:
        lines.append(f"  operation {operation_text(operation)}")
    for key, kind in (("standbys", "shards"), ("warm_dense", "dense groups")):
        found = status.get(key)
        if found and found["wanted"]:
            counts = "{warm} of {wanted} warm, {starting} starting".format(**found)
            failed = f"; the last failed: {found['error']}" if found["error"] else ""
            over = "; no more are tried before an operation ends" if found["given_up"] else ""
            lines.append(f"  standbys of {kind}: {counts}{failed}{over}")
    for what, meaning in (
        ("fenced", "fenced"),
        ("lost", "lost"),
        ("given_up", "not restored any more, scale or drain"),
    ):
        if operations.get(what):
            lines.append(f"  {meaning}: {', '.join(operations[what])}")
    return "\n".join(lines)


def _state(member: dict[str, Any]) -> str:
    """One word for one member."""
    if not member["alive"]:
        return "dead"
    degraded = member["phase"] == "ready" and member.get("why_not_serving")
    return "degraded" if degraded else str(member["phase"])


def _facts(member: dict[str, Any]) -> str:
    """What an operator looks for first in one member, by its role."""
    if not member["alive"]:
        return str(member.get("error", ""))
    if member["phase"] != "ready":
        return str(member.get("error", ""))
    if member.get("why_not_serving"):
        return str(member["why_not_serving"])
    if "calls_served" in member:
        counts = member["experts_per_layer"]
        experts = f"{min(counts, default=0)}-{max(counts, default=0)}"
        slots = member.get("slots_per_layer")
        room = f" in {slots} slots" if slots else ""
        copies = ""
        if member.get("second_copies"):
            size = f"{member['second_copies_bytes'] / 2**20:.1f} MiB"
            copies = f", {member['second_copies']} second copies ({size})"
        return (
            f"{experts} experts{room} in each of {len(counts)} layers"
            f" ({member['weights_bytes'] / 2**20:.1f} MiB){copies}, {member['calls_served']} calls,"
            f" {member['compute_s']:.1f} s computing, {member['peers']} peers"
        )
    if "rank" in member:
        return (
            f"{member['executor']}, rank {member['rank']} of {member['tensor_parallel']},"
            f" {member['steps_total']} steps"
        )
    why = f" ({member['why_eager']})" if member.get("why_eager") else ""
    whole = member.get("whole_on_every_rank")
    ranks = f", {member['tensor_parallel']} ranks ({whole})" if whole else ""
    return (
        f"{member['executor']}{why}, {member['num_running']} running,"
        f" {member['num_waiting']} waiting,"
        f" KV {member['kv_blocks_used']} of {member['kv_blocks_total']} blocks,"
        f" {member['steps_total']} steps in {member['step_s']:.1f} s,"
        f" {member['preemptions_total']} preemptions{ranks}"
    )


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to a Ray cluster; False when there is none to connect to."""
    quiet_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        address = started_by_ray_start()
        if address is None:
            yield False
            return
    connect(address)
    try:
        yield True
    finally:
        ray.shutdown()


@contextmanager
def deployment_at(name: str, address: str | None) -> Iterator[ClusterHandle | None]:
    """Connect to a Ray cluster, and find a deployment there; None: there is no such one."""
    with connected(address) as found:
        yield find_cluster(name) if found else None


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
