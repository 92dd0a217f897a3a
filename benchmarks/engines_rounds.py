"""Rounds over resident engines, told as they go: what every comparison of serve.py does."""

import argparse
from collections.abc import Callable

from engines_measure import Case, Sample, Samples, Target, measure, warm_up
from engines_report import OTHERS_SHARE_MAX, disturbance, number, table


def run_rounds(
    title: str,
    targets: list[Target],
    cases: list[Case],
    args: argparse.Namespace,
    rounds: int,
    beside: Callable[[Case], None] | None = None,
) -> Samples:
    """Warms up, measures, prints each sample and the table; `args` has `shield`."""
    warm_up(targets, cases, args.shield)
    samples = measure(
        targets,
        cases,
        rounds=rounds,
        shield=args.shield,
        seed=title,
        on_sample=_report_sample,
        beside=beside,
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


def _report_sample(number_: int, case: Case, target: Target, taken: Sample) -> None:
    """One line as it is taken; marks what ran beside other work."""
    others = taken.cpu.others
    mark = f"  (others took {others:.0%} of the cores)" if others > OTHERS_SHARE_MAX else ""
    print(
        f"  round {number_} {case.name:<12} {target.name:<13} {number(taken.tokens_per_s):>6} "
        f"tokens/s, first {number(taken.first_ms)} ms{mark}",
        flush=True,
    )
