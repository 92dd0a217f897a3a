"""Shards come and go again and again: afterwards a deployment occupies what it did after once."""

import pytest
import ray
from support.programs import benchmarks_on_path, program

from remora.actors.shard_process import ShardProcess
from remora.cluster.launch import ACTOR_THREADS
from remora.cluster.ray_calls import end_of, make_member

CYCLES = 3  # the first makes what is made once
MEMORY_SHARE = 0.1


def test_nothing_is_left_behind(one_ray: None) -> None:
    with benchmarks_on_path():
        bench, prints = program("elastic_cycles"), program("elastic_footprint")
        handle = bench.ensure_cluster(bench.deployment(bench.NAME))
        try:
            first, _, last = (row["occupied"] for row in bench.cycles(handle, CYCLES))
        finally:
            bench.stop_cluster(bench.NAME)
    assert first["actors"] == ["coordinator", "dense-0#1", "router", "shard-0#1", "shard-1#1"]
    assert first["listeners"] >= 4 and first["segments"] > 0, "they are counted"
    assert prints.faults(first, last, memory_share=MEMORY_SHARE) == []


def test_however_many_wait_for_its_end_a_member_is_heard(one_ray: None) -> None:
    """Each life of a coordinator waits for the ends of all members, and leaves that behind."""
    options = {"num_cpus": 0, "max_concurrency": ACTOR_THREADS, "lifetime": "detached"}
    member = make_member(ShardProcess, "remora/waited-for/shard-0#1", options)
    waiting = [end_of(member) for _ in range(2 * ACTOR_THREADS)]
    assert ray.get(member.progress.remote(), timeout=60).phase == "starting"
    assert not any(end.done() for end in waiting)
    ray.kill(member, no_restart=True)
    for end in waiting:
        with pytest.raises(ray.exceptions.RayActorError):
            end.result(timeout=60)
