"""What a deployment occupies on this machine: the same after as many operations as you like."""

import os
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_list
from ray.util import list_named_actors

from remora.actors.launch import RAY_NAMESPACE

TCP_LISTENS = "0A"


def footprint(name: str) -> dict[str, Any]:
    """Counts, and bytes of memory, of a deployment and of this machine's Ray.

    Returns:
        actors: names of ours. memory_bytes: proportional set sizes of its processes together.
        listeners: TCP ports that they listen on. segments: shared memory with or without a name
        that they map. named_segments: entries of /dev/shm but for semaphores of multiprocessing,
        which we have none of and other programs of the machine make. placement_groups: not removed.
        actor_classes: that Ray was told of, each of which it keeps.
    """
    prefix = f"remora/{name}/"
    names = [a["name"] for a in list_named_actors(all_namespaces=True)]
    pids = processes(name)
    return {
        "actors": sorted(n.removeprefix(prefix) for n in names if n.startswith(prefix)),
        "memory_bytes": sum(_pss(pid) for pid in pids),
        "listeners": sum(_listeners(pid) for pid in pids),
        "segments": sum(_segments(pid) for pid in pids),
        "named_segments": sum(
            not path.name.startswith("sem.mp-") for path in Path("/dev/shm").iterdir()
        ),
        "placement_groups": sum(
            group["state"] != "REMOVED" for group in ray.util.placement_group_table().values()
        ),
        "actor_classes": len(_internal_kv_list(b"ActorClass", namespace=b"fun")),
    }


def processes(name: str) -> list[int]:
    """Of the deployment's actors, as Ray knows them by now."""

    def pid(_actor: Any) -> int:  # travels by value: workers do not know this module
        return os.getpid()

    pids = []
    for each in list_named_actors(all_namespaces=True):
        if each["name"].startswith(f"remora/{name}/"):
            handle: Any = ray.get_actor(each["name"], namespace=RAY_NAMESPACE)
            pids.append(ray.get(handle.__ray_call__.remote(pid)))
    return pids


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} tells no Pss")


def _listeners(pid: int) -> int:
    sockets = {_target(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    found = [line.split() for line in lines]
    return sum(f[3] == TCP_LISTENS and f"socket:[{f[9]}]" in sockets for f in found)


def _segments(pid: int) -> int:
    return sum("/memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed since it was listed
        return ""


def faults(before: dict[str, Any], after: dict[str, Any], *, memory_share: float) -> list[str]:
    """What is more than before, in words; memory may be by a share."""
    found = [
        f"{key}: {before[key]} before, {after[key]} after"
        for key in before
        if key != "memory_bytes" and before[key] != after[key]
    ]
    bound = before["memory_bytes"] * (1 + memory_share)
    if after["memory_bytes"] > bound:
        found.append(f"memory: {before['memory_bytes']:,} before, {after['memory_bytes']:,} after")
    return found
