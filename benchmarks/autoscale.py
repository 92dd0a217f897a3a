"""Autoscaling policies on real arrivals, in simulation: attainment and unit-hours.

    .venv/bin/python benchmarks/autoscale.py --quick --json out.json

For each trace of ../shared/data/requests (an hour each): the smallest fixed fleet that holds the
objective, a policy of a utilisation target as Ray Serve has it, ours without and with the forecast,
and the plan of a clairvoyant who knows all arrivals and whose units start at once. A unit's rate is
such that the mean load is `MEAN_UNITS` units. `autoscale_model.py` says what the pool is, and what
it leaves out. Settings were tuned on mooncake_conversation; the bars are of the worst other trace.
"""

import math
from collections.abc import Callable
from pathlib import Path

import autoscale_model as model
import common
import numpy as np
from engines_report import Bar, Spread

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import decide

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "requests"
TUNED_ON = "mooncake_conversation"
MEAN_UNITS = 6.0
START_S = 30.0  # from the decision until a new unit serves
FIXED_ATTAINMENT = 0.999
UTILISATION = 0.8  # of the policy like Ray Serve's; its look-back and delays are Serve's defaults
LOOK_BACK_S, UP_DELAY_S, DOWN_DELAY_S = 30.0, 30.0, 600.0


def ours(rate: float, *, is_predictive: bool, tuned: dict[str, float]) -> AutoscalePolicy:
    """Our policy for units of `rate`."""
    predictive = {
        "load_per_unit": rate * tuned["utilisation"],
        "horizon_s": START_S + model.STEP_S,
        "step_s": model.STEP_S,
        "season_s": 600,
        "quantile": tuned["quantile"],
    }
    return parse_policy(
        {
            "kind": "AutoscalePolicy",
            "version": 1,
            "pool": "dense",
            "mode": "act",
            "targets": {"ttft": {"seconds": model.TTFT_S}, "queue_per_unit": tuned["queue"]},
            "bounds": {"max_units": model.UNITS_MAX, "step_up_max": 8, "step_down_max": 4},
            "reactive": {
                "window_s": 2 * model.STEP_S,
                "samples_min": 1,
                "down_window_s": tuned["down_window_s"],
            },
            "cooldowns": {"up_s": model.STEP_S, "down_s": tuned["down_s"]},
            "predictive": predictive if is_predictive else None,
        }
    )


TUNED = {"utilisation": 0.7, "quantile": 0.5, "queue": 2.0, "down_window_s": 60.0, "down_s": 10.0}


def driven(policy: AutoscalePolicy) -> model.Policy:
    """Our decision as a policy of the model."""
    state = AutoscaleState()

    def step(seen: model.Seen) -> int:
        nonlocal state
        waits = {"p99": float(np.quantile(seen.wait_R, 0.99))} if len(seen.wait_R) else {}
        sample = Sample(
            at_s=seen.at_s,
            units=seen.units,
            operation="scale" if seen.is_starting else None,
            ttft_s=waits,
            waiting=seen.requests_waiting,
            load=seen.load,
        )
        decision, state = decide(policy, state, sample)
        return decision.target_units

    return step


def utilisation_target(rate: float) -> model.Policy:
    """Units for the mean load of the look-back at `UTILISATION`, once wanted for all the delay."""
    loads: list[float] = []
    since_s: dict[int, float] = {}  # direction -> first moment of the run that asks for it

    def step(seen: model.Seen) -> int:
        loads.append(seen.load + seen.backlog / model.STEP_S)
        recent = loads[-int(LOOK_BACK_S / model.STEP_S) :]
        wanted = max(1, math.ceil(sum(recent) / len(recent) / (rate * UTILISATION)))
        wanted = min(wanted, model.UNITS_MAX)
        way = (wanted > seen.units) - (wanted < seen.units)
        for other in (-1, 0, 1):
            if other != way:
                since_s.pop(other, None)
        first_s = since_s.setdefault(way, seen.at_s)
        delay_s = {1: UP_DELAY_S, -1: DOWN_DELAY_S, 0: 0.0}[way]
        if seen.is_starting or seen.at_s - first_s < delay_s:
            return seen.units
        since_s.clear()
        return wanted

    return step


def fixed(units: int) -> model.Policy:
    """Always as many."""
    return lambda seen: units


def measure(path: Path, rounds: int) -> list[dict[str, str | float]]:
    """One row a policy. rounds: of the clairvoyant's bisection."""
    intervals = model.read_trace(path)
    work = sum(float(interval.work_R.sum()) for interval in intervals)
    rate = work / (len(intervals) * model.STEP_S) / MEAN_UNITS
    early = sum(float(interval.work_R.sum()) for interval in intervals[:6]) / (6 * model.STEP_S)
    begin = max(1, math.ceil(early / rate / UTILISATION))

    def outcome(policy: model.Policy, units: int) -> model.Outcome:
        return model.run(intervals, rate, policy, units=units, start_s=START_S)

    peak = next(
        (n for n in range(1, model.UNITS_MAX) if is_enough(outcome(fixed(n), n))), model.UNITS_MAX
    )
    found = {
        "fixed peak": outcome(fixed(peak), peak),
        "utilisation target": outcome(utilisation_target(rate), begin),
        "remora reactive": outcome(driven(ours(rate, is_predictive=False, tuned=TUNED)), begin),
        "remora predictive": outcome(driven(ours(rate, is_predictive=True, tuned=TUNED)), begin),
    }
    wanted = found["fixed peak"].attainment - 0.01
    found["clairvoyant"] = bound = model.clairvoyant(
        intervals, rate, attainment=wanted, rounds=rounds
    )
    return [
        {
            "trace": path.stem,
            "policy": name,
            "attainment": round(one.attainment, 4),
            "unit_hours": round(one.unit_hours, 2),
            "of_fixed": round(one.unit_hours / found["fixed peak"].unit_hours, 3),
            "of_clairvoyant": round(one.unit_hours / bound.unit_hours, 3),
            "attainment_gap": round(found["fixed peak"].attainment - one.attainment, 4),
        }
        for name, one in found.items()
    ]


def is_enough(outcome: model.Outcome) -> bool:
    """Whether a fixed fleet holds the objective."""
    return outcome.attainment >= FIXED_ATTAINMENT


def bars(rows: list[dict[str, str | float]]) -> list[Bar]:
    """Of the predictive policy, over the traces that nothing was tuned on; the worst counts."""
    judged = [r for r in rows if r["policy"] == "remora predictive" and r["trace"] != TUNED_ON]

    def worst(key: str) -> Spread:
        values = [float(row[key]) for row in judged]
        return Spread(max(values), min(values), max(values))

    pairs: list[tuple[str, str, float, Callable[[str], Spread]]] = [
        ("autoscale_attainment_gap", "attainment_gap", 0.01, worst),
        ("autoscale_hosts_vs_clairvoyant", "of_clairvoyant", 1.15, worst),
    ]
    return [Bar(name=n, value=of(k), unit="", op="<=", target=t) for n, k, t, of in pairs]


def main() -> None:
    """Command line."""
    args = common.parser(__doc__).parse_args()
    paths = sorted(TRACES.glob("*.csv")) + sorted(TRACES.glob("*.jsonl"))
    if not paths:
        raise SystemExit(f"{TRACES}: no traces; nothing was simulated")
    rows = [row for path in paths for row in measure(path, 5 if args.quick else 10)]
    common.finish("autoscale", args, rows, bars(rows))


if __name__ == "__main__":
    main()
