"""Shards come and go again and again: afterwards a deployment occupies what it did after once."""

from support.programs import benchmarks_on_path, program

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
