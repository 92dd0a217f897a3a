"""Remora against itself and its machine: HTTP, exact, int8, int4, footprint, phases, scaling.

Each part takes the checkpoint's label, the resident engine and the command line, and returns rows
and bars.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from common import Row
from engines_measure import Case, Samples, Target, decode_case, random_prompts
from engines_plot import write_plot
from engines_process import Engine, EngineError
from engines_report import (
    Bar,
    Spread,
    http_overhead,
    number,
    ratio,
    sample_rows,
    small_only,
    throughput,
)
from engines_rounds import run_rounds

from remora.cluster.bench_phases import Breakdown, breakdown, phases_table
from remora.kernels.experts_dtype import ExpertsDtype

Found = tuple[list[Row], list[Bar]]

BIG_BATCH = 32  # of the HTTP, exact and phases parts
OWN_TOKENS = 33  # new tokens there, and more rounds: small differences drown in slow drifts
OWN_ROUNDS = 2  # times those of the peers
SHARDS = (1, 2, 4)
STREAMS = (1, 2, 4, 8, 16, 32, 64)
QUICK_STREAMS = (1, 4, 16, 64)
FAST = {"name": "fast"}


def http_and_exact(label: str, engine: Engine, args: argparse.Namespace) -> Found:
    """What HTTP costs over the engine level, and `exact` numerics over `fast`."""
    case = decode_case(BIG_BATCH, OWN_TOKENS)
    targets = [Target(name="remora", engine=engine, arguments=FAST)]
    if "http" in args.parts:
        targets.append(Target(name="remora-http", engine=engine, op="http"))
    if "exact" in args.parts:
        engine.ask("deploy", name="exact", overrides={"numerics": "exact"})
        targets.append(Target(name="remora-exact", engine=engine, arguments={"name": "exact"}))
    samples = run_rounds(f"{label} own", targets, [case], args, OWN_ROUNDS * args.rounds)
    bars = []
    if "http" in args.parts:
        overhead = Spread.of(http_overhead(samples, case))
        name = f"{label}_http_overhead_ms_per_token"
        bars.append(Bar(name=name, value=overhead, unit="ms", op="<", target=0.2))
    if "exact" in args.parts:
        engine.ask("undeploy", name="exact")
        fast, exact = (throughput(samples, case.name, n) for n in ("remora", "remora-exact"))
        once = ratio(fast, exact)
        cost = Spread(once.median - 1, once.min - 1, once.max - 1)
        name = f"{label}_exact_cost_b32"
        bars.append(Bar(name=name, value=cost, unit="ratio", op="<", target=0.25))
    return sample_rows(f"{label} own", samples), bars


def quantised(
    label: str, engine: Engine, args: argparse.Namespace, *, experts_dtype: ExpertsDtype
) -> Found:
    """Experts quantised at load against the same model in bf16."""
    name = str(experts_dtype)
    cases = [decode_case(batch, args.new_tokens) for batch in args.batches]
    engine.ask("deploy", name=name, overrides={"experts_dtype": experts_dtype})
    targets = [
        Target(name="remora", engine=engine, arguments=FAST),
        Target(name=f"remora-{name}", engine=engine, arguments={"name": name}),
    ]
    samples = run_rounds(f"{label} {name}", targets, cases, args, args.rounds)
    engine.ask("undeploy", name=name)
    bars = [
        Bar(
            name=f"{label}_{name}_{case.name}_vs_bf16",
            value=ratio(*(throughput(samples, case.name, t.name) for t in reversed(targets))),
            unit="ratio",
            op=">=",
            target=1.5,
        )
        for case in cases
    ]
    return sample_rows(f"{label} {name}", samples), [small_only(bar, label) for bar in bars]


def footprint(label: str, engine: Engine, args: argparse.Namespace, model_bytes: int) -> Found:
    """Growth of memory over the checkpoint's bytes, and start over what it cannot do without."""
    found = [engine.ask("footprint", name="fast") for _ in range(1 if args.quick else args.rounds)]
    memory = Spread.of([f["growth_bytes"] / model_bytes for f in found])
    start = Spread.of([f["start_s"] / f["floor_s"] for f in found])
    rows: list[Row] = [
        {"checkpoint": label, **{key: round(value, 2) for key, value in f.items()}} for f in found
    ]
    print(f"{label} footprint: memory {memory} of the checkpoint, start {start} of its floor")
    bars = [
        Bar(name=f"{label}_memory_growth", value=memory, unit="ratio", op="<=", target=1.3),
        Bar(name=f"{label}_start", value=start, unit="ratio", op="<=", target=2.0),
    ]
    return rows, [small_only(bar, label) for bar in bars]


def phases(label: str, engine: Engine, args: argparse.Namespace) -> Found:
    """Where a decode step goes, and the share of it outside kernels at the big batch."""
    batches = sorted({*args.batches, BIG_BATCH})
    readings = []
    for number_ in range(args.rounds):
        for batch in batches:
            case = decode_case(batch, args.new_tokens)
            prompts = random_prompts(case, random.Random(f"{label} phases {number_} {batch}"))
            if args.shield:
                engine.shield(True)
            readings.append(
                (batch, engine.ask("phases", prompts=prompts, num_new=case.num_new, **FAST))
            )
            if args.shield:
                engine.shield(False)
    loops_us = engine.ask("loops", batches=batches)
    found: list[Breakdown] = [
        breakdown(batch, r["before"], r["after"], loops_us[str(batch)]) for batch, r in readings
    ]
    middle = [_median_of([b for b in found if b.batch == batch]) for batch in batches]
    print(f"\n{label}: where a decode step goes, median round of {args.rounds}\n")
    print(phases_table(middle), "\n", flush=True)
    rows: list[Row] = []
    for b in middle:
        parts = {p.name: round(p.step_us, 1) for p in b.parts}
        rows.append(
            {"checkpoint": label, "batch": b.batch, "step_us": round(b.step_us, 1), **parts}
        )
    outside = Spread.of([b.outside_kernels for b in found if b.batch == BIG_BATCH])
    name = f"{label}_b32_outside_kernels"
    bar = Bar(name=name, value=outside, unit="share", op="<=", target=0.20)
    return rows, [small_only(bar, label)]


def _median_of(found: list[Breakdown]) -> Breakdown:
    return sorted(found, key=lambda b: b.step_us)[len(found) // 2]


def scaling(label: str, engine: Engine, args: argparse.Namespace, plot: Path) -> Found:
    """Decode tokens/s over concurrent streams, at several numbers of shards; a table and a plot."""
    cases = [
        decode_case(streams, OWN_TOKENS) for streams in (QUICK_STREAMS if args.quick else STREAMS)
    ]
    rows: list[Row] = []
    series: dict[str, dict[int, float]] = {}
    for shards in SHARDS:
        deployment = f"shards{shards}"
        engine.ask("deploy", name=deployment, overrides={"experts.shards": shards})
        name = f"{shards} shard{'s' if shards > 1 else ''}"
        target = Target(name=name, engine=engine, arguments={"name": deployment})
        rounds = 1 if args.quick else args.rounds
        samples = run_rounds(f"{label} {name}", [target], cases, args, rounds)
        engine.ask("undeploy", name=deployment)
        series[name] = {case.batch: _middle(samples, case, name) for case in cases}
        rows += sample_rows(f"{label} scaling", samples)
    print(scaling_table(series), flush=True)
    write_plot(plot, f"{label}: decode tokens/s", "concurrent streams", series)
    print(f"plot: {plot}", flush=True)
    return rows, []


def _middle(samples: Samples, case: Case, target: str) -> float:
    return Spread.of(throughput(samples, case.name, target)).median


def scaling_table(series: dict[str, dict[int, float]]) -> str:
    """Markdown: a line for each number of shards, a column for each number of streams."""
    streams = sorted({x for points in series.values() for x in points})
    lines = [
        "| tokens/s at streams | " + " | ".join(str(s) for s in streams) + " |",
        "|---" * (len(streams) + 1) + "|",
    ]
    for name, points in series.items():
        lines.append(f"| {name} | " + " | ".join(number(points[s]) for s in streams) + " |")
    return "\n".join(lines)


def attempted(part: str, label: str, run: Callable[[], Found]) -> Found:
    """`run`, or a row saying why this part cannot be measured here."""
    try:
        return run()
    except EngineError as error:
        print(f"  {label} {part}: absent: {error}", flush=True)
        return [{"checkpoint": label, "part": part, "absent": str(error)}], []
