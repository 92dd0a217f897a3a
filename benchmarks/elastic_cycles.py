"""Cycles of 2 -> 4 -> 2 shards: what a deployment occupies is to be the same after all of them.

    .venv/bin/python benchmarks/elastic_cycles.py --quick

100 cycles (`--quick`: 5) on a real Ray cluster, without streams and without standbys. Processes,
memory, ports, shared memory, placement groups and actor classes of the deployment after the last
are compared with those after the first: that one makes what is made once (buffers, connections,
code).
"""

import sys
import time
from argparse import Namespace
from typing import Any

import common
from elastic_footprint import faults, footprint
from engines_report import Bar, Spread
from live_streams import deployment, one_node

from remora.cluster.bootstrap import ClusterHandle, ensure_cluster, stop_cluster
from remora.cluster.operation import ScaleTo

NAME = "bench-cycles"
MEMORY_SHARE = 0.05  # that is no fault: what allocators keep
RETIREES = ("shard-2", "shard-3")


def cycles(handle: ClusterHandle, count: int) -> list[dict[str, Any]]:
    """A row for each cycle."""
    rows = []
    for number in range(count):
        begin_s = time.perf_counter()
        up = handle.done(f"up-{number}", ScaleTo(4))
        down = handle.done(f"down-{number}", ScaleTo(2, retire=RETIREES))
        for operation in (up, down):
            if operation["outcome"] != "done":
                raise RuntimeError(f"cycle {number}: {operation['reason']}")
        occupied = footprint(handle.name)
        rows.append(
            {
                "cycle": number,
                "seconds": round(time.perf_counter() - begin_s, 2),
                "up_s": round(up["ended_s"], 2),
                "down_s": round(down["ended_s"], 2),
                "actors": len(occupied["actors"]),
                "memory_mib": round(occupied["memory_bytes"] / (1 << 20)),
                "listeners": occupied["listeners"],
                "segments": occupied["segments"],
                "named_segments": occupied["named_segments"],
                "placement_groups": occupied["placement_groups"],
                "actor_classes": occupied["actor_classes"],
                "occupied": occupied,
            }
        )
        print(f"{number + 1}/{count} {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
    return rows


def main(args: Namespace) -> None:
    """Measure, print, write."""
    with one_node(8):
        handle = ensure_cluster(deployment(NAME))
        try:
            rows = cycles(handle, 5 if args.quick else 100)
        finally:
            stop_cluster(NAME)
    found = faults(rows[0]["occupied"], rows[-1]["occupied"], memory_share=MEMORY_SHARE)
    for fault in found:
        print(f"FAULT {fault}")
    growth = rows[-1]["occupied"]["memory_bytes"] / rows[0]["occupied"]["memory_bytes"] - 1
    for row in rows:
        del row["occupied"]
    bars = [
        Bar(name="faults", value=Spread.of([float(len(found))]), unit="", op="<=", target=0.0),
        Bar(name="memory_growth", value=Spread.of([growth]), unit="x", op="<=", target=0.05),
        Bar(name="cycle_s", value=Spread.of([row["seconds"] for row in rows]), unit="s"),
    ]
    common.finish("elastic_cycles", args, rows, bars)


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
