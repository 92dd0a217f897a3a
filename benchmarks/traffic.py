"""Traffic and load of expert placements on held-out tokens: the ladder of baselines and Remora.

    make bench-traffic                                       # quick
    .venv/bin/python benchmarks/traffic.py --json out.json --pictures docs/images --resume kept

The full run takes hours: with `--resume DIR` it can be stopped and goes on where it was.

Traces are real (docs/benchmarks.md); planned on some documents, judged on others, five folds by
sequence. A missing trace is said and left out.
"""

import sys
import time
from pathlib import Path

import common
import numpy as np
import torch
from engines_report import Bar, Spread
from traffic_bounds import least_copies
from traffic_data import Trace
from traffic_ladder import BASELINES, REMORA, Result, Shape, judge_layers, round_robin
from traffic_report import D8, bars, rows
from traffic_scale import measure
from traffic_tasks import FOLDS, Kind, Task, load, run_all

from remora.comm.bundles import count_bundles
from remora.comm.topology import uniform_topology

QUICK_LAYERS = {"v2lite": tuple(range(1, 26, 5)), "demo": (0, 1, 2, 3), "second": (1, 3, 5)}
SOME_LAYERS = tuple(range(1, 26, 8))  # of DeepSeek-V2-Lite's 26: all but the bars' shapes
SHIFT_DOCUMENTS = 36  # held-out ones of a domain: 5,000 tokens to see and some to judge on
SMALL_EXPERTS, SMALL_HOSTS, SMALL_BUNDLES = 9, 3, 40


def main() -> None:
    """Runs everything and prints it."""
    parser = common.parser(__doc__)
    parser.add_argument("--pictures", type=Path, help="write PNG files into this directory")
    parser.add_argument("--processes", type=int, default=2, help="how many work at once")
    parser.add_argument(
        "--parts", default="ladder,tokens,shift,second,small,scale", help="which, by comma"
    )
    parser.add_argument(
        "--resume", type=Path, help="keep each task's results here, and take those that are there"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.resume:
        args.resume.mkdir(parents=True, exist_ok=True)
    parts = args.parts.split(",")
    results: list[Result] = []
    tasks = tasks_of(parts, args.quick)
    begin = time.perf_counter()
    for number, found in enumerate(run_all(tasks, args.processes, args.resume), 1):
        results += found
        print(f"{number}/{len(tasks)} {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    table, found_bars = rows(results), bars(results)
    v2lite = load("v2lite", 0, None)
    if "small" in parts and v2lite is not None:
        table += small_cases(v2lite, (0, 13) if args.quick else (0, 6, 13, 19, 25))
    if "scale" in parts:
        found_bars += scale(args.quick)
    if args.pictures and v2lite is not None:
        draw(results, v2lite, args.pictures)
    common.finish("traffic", args, table, found_bars)


def tasks_of(parts: list[str], quick: bool) -> list[Task]:
    """What to run, heaviest first; a trace that is not there is said and left out."""
    shapes = [
        Shape(hosts, per_host, spare)
        for hosts, per_host in ((8, 1), (4, 2), (8, 4))
        for spare in (0.0, 0.25, 0.5)
    ]
    bar_shapes = [D8[0.0], D8[0.25]]
    wanted: tuple[tuple[str, Kind, str, list[Shape]], ...] = (
        ("ladder", "ladder", "v2lite", bar_shapes if quick else shapes),
        ("tokens", "token ids", "demo", bar_shapes if quick else [*bar_shapes, Shape(4, 2, 0.25)]),
        ("shift", "shift", "v2lite", [D8[0.25]]),
        ("shift", "shift", "demo", [D8[0.25]]),
        ("second", "ladder", "second", [D8[0.25]] if quick else bar_shapes),
    )
    tasks: list[Task] = []
    for part, kind, trace, own_shapes in wanted:
        if part not in parts:
            continue
        documents = SHIFT_DOCUMENTS if kind == "shift" else 8 if quick else 24
        found = load(trace, documents, None)
        if found is None:
            print(f"no data for {trace}: left out", file=sys.stderr)
            continue
        rest = len(found.domains) if kind == "shift" else FOLDS
        step = 4 if quick and rest == 9 else 1  # quick: traffic turns to three of nine domains
        tasks += [
            Task(
                kind=kind,
                trace=trace,
                shape=shape,
                index=index,
                layers=_layers(kind, trace, shape, quick),
                documents=documents,
            )
            for shape in own_shapes
            for index in range(0, rest, step)
        ]
    return tasks


def _layers(kind: Kind, trace: str, shape: Shape, quick: bool) -> tuple[int, ...] | None:
    if quick:
        return QUICK_LAYERS[trace]
    all_of_them = trace != "v2lite" or (kind == "ladder" and shape in D8.values())
    return None if all_of_them else SOME_LAYERS


def small_cases(trace: Trace, layers: tuple[int, ...]) -> list[common.Row]:
    """Methods against the integer programme, planned and judged on the same few bundles: a layer's
    most frequent ones among its most used experts."""
    found: list[common.Row] = []
    for layer in layers:
        for slots in (3, 4):
            topology = uniform_topology(num_hosts=SMALL_HOSTS, shards_per_host=1, slots=slots)
            small = _cut(trace, layer)
            source_T = round_robin(small, topology)
            bundles = count_bundles(small.experts_TLK[:, 0], source_T)
            got = {}
            for method in (*BASELINES[3:], REMORA):
                (got[method.name],) = judge_layers(
                    method, method.place(small, topology), small, source_T, topology
                )
            cap = got[REMORA.name].load
            bound = least_copies(bundles, topology, small.num_experts, load_max=cap, seconds_max=20)
            row: dict[str, str | float] = {
                "layer": layer,
                "slots": slots * SMALL_HOSTS,
                "least at B6's load": round(bound.lower, 4),
                "found": round(bound.found, 4),
            }
            for name, figures in got.items():
                row[name] = f"{figures.copies:.4f} / {figures.load:.2f}"
            found.append(row)
    return found


def _cut(trace: Trace, layer: int) -> Trace:
    """Tokens of one layer as pairs of its SMALL_EXPERTS most used experts, the most frequent
    SMALL_BUNDLES pairs alone."""
    experts_TK = trace.experts_TLK[:, layer]
    used = np.argsort(-np.bincount(experts_TK.reshape(-1), minlength=trace.num_experts))
    name_E = np.full(trace.num_experts, -1)
    name_E[used[:SMALL_EXPERTS]] = np.arange(SMALL_EXPERTS)
    named_TK = np.sort(name_E[experts_TK], axis=1)[:, ::-1]
    named_TK = named_TK[(named_TK[:, 1] >= 0)][:, :2]
    keys = named_TK[:, 0] * SMALL_EXPERTS + named_TK[:, 1]
    kinds, counts = np.unique(keys, return_counts=True)
    kept = np.isin(keys, kinds[np.argsort(-counts)[:SMALL_BUNDLES]])
    named_TK = named_TK[kept][:600]
    return Trace(
        name="small",
        experts_TLK=named_TK[:, None].astype(np.int16),
        sequence_T=np.zeros(len(named_TK), np.int32),
        domain_Q=np.zeros(1, np.int32),
        split_Q=np.zeros(1, np.int8),
        domains=("small",),
        num_experts=SMALL_EXPERTS,
        row_bytes=trace.row_bytes,
        expert_bytes=trace.expert_bytes,
    )


def scale(quick: bool) -> list[Bar]:
    """Seconds to plan for DeepSeek-V3's shape; quick: 2 of its 58 layers, no bar."""
    num_layers = 2 if quick else 58
    times = measure(num_layers)
    suffix = f"_{num_layers}_layers" if quick else ""

    def bar(name: str, value: float, unit: str, target: float | None = None) -> Bar:
        op = None if quick or target is None else "<"
        return Bar(
            name=name + suffix,
            value=Spread(value, value, value),
            unit=unit,
            op=op,
            target=target if op else None,
        )

    found: list[Bar] = []
    if times.choice_us:
        median = float(np.median(times.choice_us))
        value = Spread(median, min(times.choice_us), max(times.choice_us))
        found.append(Bar(name="scale_choice", value=value, unit="us", op="<", target=30))
    return [
        *found,
        bar("scale_plan_cold", times.cold_s, "s", 120),
        bar("scale_plan_warm", times.warm_s, "s", 20),
        bar("scale_copies_vs_eplb", times.copies_vs_eplb, "x"),
        bar("scale_warm_moved", float(times.moved), "copies"),
    ]


def draw(results: list[Result], trace: Trace, folder: Path) -> None:
    """PNG files for docs/."""
    from traffic_pictures import heat_maps, traffic_against_load

    heat_maps(trace, 10, D8[0.0], folder / "traffic-coactivation.png")
    shapes = [D8[0.0], D8[0.25]]
    traffic_against_load(results, "v2lite", shapes, folder / "traffic-against-load.png")


if __name__ == "__main__":
    main()
