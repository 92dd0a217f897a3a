"""Autoscaling policies on real arrivals, in simulation: attainment and unit-hours.

    .venv/bin/python benchmarks/autoscale.py --quick --json out.json

For each trace of ../shared/data/requests (an hour each): the smallest fixed fleet that holds the
objective, Ray Serve's default policy, a policy of a utilisation target, ours without and with the
forecast, and the plan of a clairvoyant who knows all arrivals and pays for the start of units as
all do. A unit's rate is such that the mean load is `MEAN_UNITS` units. `autoscale_model.py` says
what the pool is, and what it leaves out. Settings were tuned on the first halves of the traces
together, one set for all; the second halves are judged.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import autoscale_model as model
import common
import numpy as np
from engines_report import Bar, Spread
from locations import REQUESTS

from remora.autoscale.autoscale_policy import AutoscalePolicy, parse_policy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import decide

MEAN_UNITS = 6.0
START_S = 30.0  # from the decision until a new unit serves
FIXED_ATTAINMENT = 0.999
UTILISATION = 0.8  # of the policy like Ray Serve's; its look-back and delays are Serve's defaults
STREAMS = 16.0  # requests under way in a unit at its rate; assumed, for Serve's default policy
LOOK_BACK_S, UP_DELAY_S, DOWN_DELAY_S = 30.0, 30.0, 600.0


def ours(rate: float, *, is_predictive: bool, tuned: dict[str, float]) -> AutoscalePolicy:
    """Our policy for units of `rate`."""
    predictive = {
        "load_per_unit": rate * tuned["utilisation"],
        "horizon_s": 60.0,  # START_S, an interval, and the steps of the series
        "step_s": tuned["step_s"],
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
            "bounds": {"max_units": model.UNITS_MAX, "step_up_max": 4, "step_down_max": 1},
            "reactive": {
                "window_s": 2 * model.STEP_S,
                "samples_min": 1,
                "down_window_s": tuned["down_window_s"],
                "down_below": tuned["down_below"],
            },
            "cooldowns": {"up_s": model.STEP_S, "down_s": tuned["down_s"]},
            "predictive": predictive if is_predictive else None,
        }
    )


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


def serves_default(rate: float) -> model.Policy:
    """The default policy of the Ray Serve that is installed: its own code, at the model's time.

    It goes by requests under way. A unit is taken to have `STREAMS` of them at its rate, so that
    `UTILISATION` of these are the target; what waits comes on top.
    """
    from ray.serve import autoscaling_policy
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    config = AutoscalingConfig(
        min_replicas=1,
        max_replicas=model.UNITS_MAX,
        target_ongoing_requests=UTILISATION * STREAMS,
        upscale_delay_s=UP_DELAY_S,
        downscale_delay_s=DOWN_DELAY_S,
    )
    default = autoscaling_policy.default_autoscaling_policy
    decide_as_serve = autoscaling_policy._apply_autoscaling_config(default)  # as its controller
    ongoing: list[float] = []
    state: dict[str, Any] = {}
    given: dict[str, Any] = dict.fromkeys(inspect.signature(AutoscalingContext).parameters)
    named = {"deployment_id": DeploymentID("units", "trace"), "deployment_name": "units"}
    bounds = {"min_replicas": 1, "max_replicas": model.UNITS_MAX}
    given |= named | {f"capacity_adjusted_{name}": value for name, value in bounds.items()}

    def step(seen: model.Seen) -> int:
        nonlocal state
        ongoing.append(seen.load / rate * STREAMS + seen.requests_waiting)
        recent = ongoing[-int(LOOK_BACK_S / model.STEP_S) :]
        context = AutoscalingContext(
            **given
            | {
                "current_num_replicas": seen.units,
                "target_num_replicas": seen.coming,
                "running_replicas": [],
                "total_num_requests": sum(recent) / len(recent),
                "total_queued_requests": 0.0,
                "policy_state": state,
                "current_time": seen.at_s,
                "config": config,
            }
        )
        clock = SimpleNamespace(time=lambda: seen.at_s)
        with mock.patch.object(autoscaling_policy, "time", clock):  # its delays
            wanted, state = decide_as_serve(context)
        return min(model.UNITS_MAX, max(1, math.ceil(wanted)))

    return step


def fixed(units: int) -> model.Policy:
    """Always as many."""
    return lambda seen: units


def measure(path: Path, rounds: int) -> list[dict[str, str | float]]:
    """One row a policy, of the second half. rounds: of the clairvoyant's bisection."""
    intervals = model.read_trace(path)
    work = sum(float(interval.work_R.sum()) for interval in intervals)
    rate = work / (len(intervals) * model.STEP_S) / MEAN_UNITS
    half = len(intervals) // 2
    begin = math.ceil(MEAN_UNITS / UTILISATION)

    def outcome(policy: model.Policy, units: int = begin) -> model.Outcome:
        return model.run(intervals, rate, policy, units=units, start_s=START_S, judged_from=half)

    fleets = [outcome(fixed(n), n) for n in range(1, model.UNITS_MAX + 1)]
    peak = next((o for o in fleets if o.attainment >= FIXED_ATTAINMENT), fleets[-1])
    wanted = peak.attainment - 0.01
    found = {
        "fixed peak": peak,
        "fixed, 1 point less": next(o for o in fleets if o.attainment >= wanted),
        "Ray Serve's default": outcome(serves_default(rate)),
        "utilisation target": outcome(utilisation_target(rate)),
        "remora reactive": outcome(driven(ours(rate, is_predictive=False, tuned=model.TUNED))),
        "remora predictive": outcome(driven(ours(rate, is_predictive=True, tuned=model.TUNED))),
    }
    options = {"attainment": wanted, "rounds": rounds, "units": begin}
    bound = model.clairvoyant(intervals[half:], rate, start_s=START_S, **options)
    found["clairvoyant"] = bound
    found["clairvoyant, no start"] = model.clairvoyant(intervals[half:], rate, **options)
    return [
        {
            "trace": path.stem,
            "policy": name,
            "attainment": round(one.attainment, 4),
            "unit_hours": round(one.unit_hours, 2),
            "of_fixed": round(one.unit_hours / peak.unit_hours, 3),
            "of_clairvoyant": round(one.unit_hours / bound.unit_hours, 3),
            "attainment_gap": round(peak.attainment - one.attainment, 4),
        }
        for name, one in found.items()
    ]


def bars(rows: list[dict[str, str | float]]) -> list[Bar]:
    """Of the predictive policy; the worst trace counts."""
    judged = [row for row in rows if row["policy"] == "remora predictive"]

    def worst(key: str) -> Spread:
        values = [float(row[key]) for row in judged]
        return Spread(max(values), min(values), max(values))

    pairs: list[tuple[str, str, float, Callable[[str], Spread]]] = [
        ("autoscale_attainment_gap", "attainment_gap", 0.01, worst),
        ("autoscale_hosts_vs_clairvoyant", "of_clairvoyant", 1.15, worst),
    ]
    return [Bar(name=n, value=of(k), unit="", op="<=", target=t) for n, k, t, of in pairs]


def picture(rows: list[dict[str, str | float]], path: Path) -> None:
    """Attainment over unit-hours, a panel a trace, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    traces = list(dict.fromkeys(str(row["trace"]) for row in rows))
    figure, panels = plt.subplots(1, len(traces), figsize=(5 * len(traces), 4), squeeze=False)
    markers = dict(zip(dict.fromkeys(row["policy"] for row in rows), "sDv^<o*x", strict=False))
    for trace, panel in zip(traces, panels[0], strict=True):
        for row in (row for row in rows if row["trace"] == trace):
            at = (float(row["unit_hours"]), float(row["attainment"]))
            panel.plot(*at, markers[row["policy"]], ms=9, label=row["policy"])
        panel.set(title=trace, xlabel="unit-hours", xscale="log")
        panel.grid(True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("requests that waited at most 2 s")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--png", type=Path, help="write a picture of it to this file")
    args = parser.parse_args()
    paths = sorted(REQUESTS.glob("*.csv")) + sorted(REQUESTS.glob("*.jsonl"))
    if not paths:
        raise SystemExit(f"{REQUESTS}: no traces (docs/benchmarks.md); nothing was simulated")
    rows = [row for path in paths for row in measure(path, 5 if args.quick else 10)]
    if args.png is not None:
        picture(rows, args.png)
    common.finish("autoscale", args, rows, bars(rows))


if __name__ == "__main__":
    main()
