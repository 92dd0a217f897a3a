"""Where the seconds of a start go: what each process of a deployment has reached when, and its CPU.

    .venv/bin/python benchmarks/start.py --model benchmarks/out/small

A deployment of two shards and one dense group comes up and is stopped, several times over in one
Ray cluster; the first start fills caches and is left out. A process *starts* (its own start,
imports, a look at the model), *loads*, *compiles* (a dense group: it takes traced layers from the
cache) and is *ready*; the deployment is up once the dense group has adopted a view of ready shards.
"""

import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import common
from engines_process import cpu_s
from engines_report import Bar, Spread
from live_streams import one_node
from locations import DEMO_MODEL
from ray_actors import process_of

from remora.actors.launch import Progress, coordinator_name, router_name
from remora.cluster.bootstrap import ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig, load_config

PHASES: Final = ("loading", "compiling", "ready")
NAME: Final = "bench-start"


def main(args: Namespace) -> None:
    """Measure, print, write."""
    config = load_config(
        overrides={
            "name": NAME,
            "model": str(args.model),
            "executor": args.executor,
            "dense.num_cpus": 0,
            "experts.num_cpus": 0,
        }
    )
    rows: list[dict[str, Any]] = []
    totals = []
    with one_node(os.cpu_count() or 1):
        started(config)  # fills caches
        for number in range(2 if args.quick else args.rounds):
            total_s, found = started(config)
            totals.append(total_s)
            rows += [{"round": number, **row} for row in found]
    cpu = [sum(row["cpu_s"] for row in rows if row["round"] == n) for n in range(len(totals))]
    bars = [
        Bar(name="start_s", value=Spread.of(totals), unit="s"),
        Bar(name="start_cpu_s", value=Spread.of(cpu), unit="s"),
    ]
    common.finish("start", args, rows, bars)


def started(config: RemoraConfig) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of one start; a row of each of its processes."""
    reached: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()

    def note(progress: Mapping[str, Progress]) -> None:
        for uid, now in progress.items():
            reached.setdefault(uid, {}).setdefault(now.phase, time.perf_counter() - begin)

    handle = ensure_cluster(config, note)
    total_s = time.perf_counter() - begin
    names = {member.uid: member.actor_name for member in handle.view().members}
    names |= {"coordinator": coordinator_name(config.name), "router": router_name(config.name)}
    rows = []
    for uid, name in sorted(names.items()):
        process = process_of(name)
        phases = {f"{p}_s": _seconds(reached.get(uid, {}), p) for p in PHASES}
        rows.append({"process": uid, **phases, "cpu_s": round(cpu_s([process]), 2)})
    stop_cluster(config.name)
    return total_s, rows


def _seconds(reached: Mapping[str, float], phase: str) -> float | str:
    """When it was first seen in a phase; none that it never was in, or too shortly."""
    return round(reached[phase], 1) if phase in reached else "-"


if __name__ == "__main__":
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="checkpoint directory")
    parser.add_argument("--executor", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
