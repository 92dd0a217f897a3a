"""What a deployment costs beyond its model: memory and start, against empty twins of its actors.

A twin is a Ray actor with the same environment that has imported the very modules its original
has, and then read its share of the checkpoint's bytes into one small buffer. Memory is that of the
originals less that of the twins, proportional set sizes: what both map is counted half in each and
falls out. Start is a second deployment of the same model, all caches warm, over the time that the
twins take together from their creation on.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

READ_BYTES = 16 << 20


class Twin:
    """An empty actor."""

    def become(self, modules: list[str], files: list[tuple[str, int, int]]) -> int:
        """Imports modules, reads (path, begin, end) of files; how many modules were not there."""
        import importlib

        missing = 0
        for name in modules:
            try:
                importlib.import_module(name)
            except Exception:  # generated at run time by the original
                missing += 1
        buffer = bytearray(READ_BYTES)
        for path, begin, end in files:
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                while begin < end:
                    begin += file.readinto(memoryview(buffer)[: end - begin])
        return missing

    def pss_bytes(self) -> int:
        """Proportional set size of this process."""
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/smaps_rollup has no Pss")


def footprint(handle: Any, config: Any, again: Any) -> dict[str, float]:
    """Growth and start of a deployment.

    Args:
        handle: of the deployment, in use for a while.
        config: its configuration.
        again: the same under another name, to be started and stopped.
    """
    import ray

    from remora.cluster.bootstrap import ensure_cluster, stop_cluster

    # Ray would pickle what lies here by name, and no actor can import it.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actors = _actors(handle)
    modules = {uid: ray.get(actor.__ray_call__.remote(_modules)) for uid, actor in actors.items()}
    begin = time.perf_counter()
    twins = _twins(config, modules)
    missing = ray.get([twin for _, twin in twins])
    floor_s = time.perf_counter() - begin
    theirs = [ray.get(actor.__ray_call__.remote(_pss)) for actor in actors.values()]
    empty = ray.get([actor.pss_bytes.remote() for actor, _ in twins])
    for actor, _ in twins:
        ray.kill(actor)
    begin = time.perf_counter()
    ensure_cluster(again)
    start_s = time.perf_counter() - begin
    stop_cluster(again.name)
    return {
        "start_s": start_s,
        "floor_s": floor_s,
        "growth_bytes": sum(theirs) - sum(empty),
        "actors_bytes": sum(theirs),
        "empty_bytes": sum(empty),
        **{f"growth_{uid}": a - b for uid, a, b in zip(actors, theirs, empty, strict=True)},
        "modules": sum(len(names) for names in modules.values()),
        "modules_missing": sum(missing),
    }


def pin(handle: Any, uid: str, cpus: list[int]) -> None:
    """Lets all threads of one data-plane process run on `cpus` only."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pid = ray.get(_actors(handle)[uid].__ray_call__.remote(_pid))
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cpus)


def _actors(handle: Any) -> dict[str, Any]:
    """Handles of a deployment's data-plane actors by uid."""
    import ray

    from remora.actors.launch import RAY_NAMESPACE

    return {
        member.uid: ray.get_actor(member.actor_name, namespace=RAY_NAMESPACE)
        for member in handle.view().members
    }


def _twins(config: Any, modules: dict[str, list[str]]) -> list[tuple[Any, Any]]:
    """(actor, what it is becoming) for each original; they share the checkpoint's bytes out."""
    import ray

    from remora.cluster.launch import dense_options, shard_options

    files = [(str(p), p.stat().st_size) for p in sorted(Path(config.model).glob("*.safetensors"))]
    make = ray.remote(Twin)
    twins = []
    for i, (uid, names) in enumerate(modules.items()):
        options = dense_options(config) if uid.startswith("dense") else shard_options(config)
        actor = make.options(runtime_env=options["runtime_env"], num_cpus=0).remote()
        n = len(modules)
        share = [(path, size * i // n, size * (i + 1) // n) for path, size in files]
        twins.append((actor, actor.become.remote(names, share)))
    return twins


# Run inside actors by `__ray_call__`.


def _modules(_: Any) -> list[str]:
    return [name for name in sys.modules if name != "__main__"]


def _pid(_: Any) -> int:
    return os.getpid()


def _pss(_: Any) -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Pss")
