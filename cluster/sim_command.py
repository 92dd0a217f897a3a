"""`remora sim`: histories of operations and faults from seeds; one again, with its trace."""

import json
import multiprocessing
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from remora.comm.errors import ConfigError

if TYPE_CHECKING:
    from remora.cluster.sim_faults import Fault
    from remora.cluster.simulation import Outcome

OK, FAILED = 0, 1
SEEDS: Final = 2000
JOBS_MAX: Final = 256
SHOWN_MAX: Final = 10  # seeds that fail, as text; --json has all
PROGRESS_EVERY: Final = 50


def add_sim(commands: "_SubParsersAction[ArgumentParser]") -> None:
    """The command line of it."""
    command = commands.add_parser(
        "sim", help="simulate operations under faults, seed by seed, without a cluster"
    )
    command.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default {SEEDS})")
    command.add_argument("--first", type=int, default=0, help="the first one (default 0)")
    command.add_argument("--seed", type=int, help="this one alone, with everything that happens")
    command.add_argument("--faults", type=Path, metavar="FILE", help="YAML; else drawn by the seed")
    command.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(run=run_sim)


def run_sim(options: Namespace) -> int:
    """Exit status 1 if something that must hold does not.

    Raises:
        ConfigError: a number is out of bounds, or the file is no file of faults.
    """
    from remora.cluster.sim_faults import read_faults

    for name, least, most in (("seeds", 1, 1 << 32), ("first", 0, 1 << 62), ("jobs", 1, JOBS_MAX)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise ConfigError(f"--{name} {value}: allowed is {least} to {most}")
    faults = read_faults(options.faults) if options.faults is not None else None
    if options.seed is not None:
        return _replay(options, faults)
    failed: list[Outcome] = []
    totals: Counter[str] = Counter()
    for number, outcome in enumerate(_outcomes(options, faults), 1):
        totals["tokens"] += outcome.num_tokens
        totals["events"] += outcome.num_events
        totals["faults"] += len(outcome.faults)
        totals["operations"] += len(outcome.operations)
        if outcome.violation is not None:
            failed.append(outcome)
            if not options.json and len(failed) <= SHOWN_MAX:
                _tell(options, outcome)
        if sys.stderr.isatty() and number % PROGRESS_EVERY == 0:
            print(f"\r{number} of {options.seeds}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    if options.json:
        report = {
            "seeds": options.seeds,
            "first": options.first,
            "failed": [{"seed": o.seed, "violation": o.violation} for o in failed],
            **totals,
        }
        print(json.dumps(report))
    else:
        print(f"{options.seeds} seeds: {len(failed)} failed;", _counts(totals))
    return FAILED if failed else OK


def _outcomes(options: Namespace, faults: "tuple[Fault, ...] | None") -> "Iterator[Outcome]":
    from remora.cluster.simulation import run_seed

    seeds = range(options.first, options.first + options.seeds)
    one = partial(run_seed, faults=faults)
    if options.jobs == 1:
        yield from map(one, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool:
        yield from pool.imap(one, seeds, chunksize=8)


def _replay(options: Namespace, faults: "tuple[Fault, ...] | None") -> int:
    from remora.cluster.simulation import run_seed

    outcome = run_seed(options.seed, faults, traced=True)
    if options.json:
        import msgspec

        print(msgspec.json.encode(outcome).decode())
    else:
        print("\n".join(outcome.trace))
        verdict = "holds" if outcome.violation is None else f"FAILS: {outcome.violation}"
        print(f"seed {outcome.seed} {verdict}; faults: {'; '.join(outcome.faults) or 'none'}")
    return OK if outcome.violation is None else FAILED


def _tell(options: Namespace, outcome: "Outcome") -> None:
    file = f" --faults {options.faults}" if options.faults is not None else ""
    print(f"seed {outcome.seed}: {outcome.violation}")
    print(f"  faults: {'; '.join(outcome.faults) or 'none'}")
    print(f"  again:  remora sim --seed {outcome.seed}{file}", flush=True)


def _counts(totals: "Counter[str]") -> str:
    return ", ".join(f"{count} {name}" for name, count in totals.items())
