"""Remora configured in one way against Remora configured in others, alternating in one Ray cluster.

    .venv/bin/python benchmarks/variants.py --checkpoint small --shield \\
        --variant 'two-threads experts.threads=2' \\
        --variant 'pinned pin.shard-0=0 pin.shard-1=1' \\
        --variant 'one-core experts.threads=1 dense.threads=1 pin.dense-0=0'

A variant is a name and words KEY=VALUE: any configuration key, or `pin.UID=CPU,CPU` to let a
process run on these CPUs only (once it is up; before that its threads go where they like). The
configuration as it is comes first under the name `default`; all variants are resident, each with
its own weights. Ratios to `default` are taken within a round.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from common import Row
from engines_measure import Target, serve_cases
from engines_process import Engine
from engines_report import Bar, Spread, ratio, sample_rows, throughput
from engines_rounds import run_rounds
from serve import checkpoint_directory, spec_of

from remora.cluster.config import parse_override

DEFAULT = "default"
PIN = "pin."


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration to try."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted keys
    pinned: dict[str, list[int]] = field(default_factory=dict)  # CPUs by uid


def parse_variant(text: str) -> Variant:
    """`NAME KEY=VALUE ... pin.UID=CPU,CPU`. Raises argparse.ArgumentTypeError."""
    words = text.split()
    if not words or "=" in words[0]:
        raise argparse.ArgumentTypeError(f"{text!r}: a name comes first, then KEY=VALUE")
    overrides: dict[str, Any] = {}
    pinned: dict[str, list[int]] = {}
    for word in words[1:]:
        if word.startswith(PIN):
            uid, _, cpus = word.removeprefix(PIN).partition("=")
            pinned[uid] = [int(cpu) for cpu in cpus.split(",")]
        else:
            key, value = parse_override(word)
            overrides[key] = value
    return Variant(words[0], overrides, pinned)


def parse_arguments() -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", default="tiny", help="tiny, small or a directory")
    parser.add_argument("--variant", action="append", type=parse_variant, required=True)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--cpus", default="0,1")
    parser.add_argument("--shield", action="store_true", help="as serve.py has it")
    args = parser.parse_args()
    args.batches = [int(batch) for batch in args.batches.split(",")]
    args.executor, args.parts, args.overrides = "compiled", [], {}
    return args


def main() -> None:
    """The command line."""
    args = parse_arguments()
    model = checkpoint_directory(args.checkpoint)
    logs = Path(tempfile.mkdtemp(prefix="remora-bench-"))
    engine = Engine(spec_of("remora", model, args), logs / "remora.log")
    try:
        targets = [Target(name=DEFAULT, engine=engine, arguments={"name": "fast"})]
        for v in args.variant:
            engine.ask("deploy", name=v.name, overrides=v.overrides, pinned=v.pinned)
            targets.append(Target(name=v.name, engine=engine, arguments={"name": v.name}))
        cases = serve_cases(args.batches, args.new_tokens)
        samples = run_rounds(model.name, targets, cases, args, args.rounds)
    finally:
        engine.close()
    bars = []
    for target in targets[1:]:
        for case in cases:
            both = (throughput(samples, case.name, name) for name in (target.name, DEFAULT))
            value: Spread = ratio(*both)
            bars.append(Bar(name=f"{case.name}_{target.name}", value=value, unit="ratio"))
    rows: list[Row] = list(sample_rows(model.name, samples))
    common.finish("variants", args, rows, bars)


if __name__ == "__main__":
    main()
