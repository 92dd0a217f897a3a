"""A real trace replayed against a real deployment: autoscaled dense groups, and fixed fleets.

    .venv/bin/python benchmarks/autoscale_live.py --json out.json

The demo model on a real Ray cluster of this machine. A unit is a dense group that decodes
`SEQUENCES` sequences at once. What one and two units can do is measured first, with lengths of the
trace; then arrivals of one contiguous window of it are replayed to three fleets, one after the
other: one unit, two units, and one to two as an `AutoscalePolicy` decides in the coordinator, with
both loops and one warm standby. The policy is the one that the simulation was tuned to
(`autoscale_model.TUNED`), its times divided by `FASTER`.

Of the trace, time is compressed so that the window's mean load is `MEAN_LOAD` of what one unit can
do; of all windows of that length it is the one whose highest minute is highest over its mean. A
request meets the objective if its first token came within `TTFT_S` and its tokens then `ITL_S`
apart, in the mean (`autoscale_replay.py`). Unit-hours are those of the time in which requests come;
a unit is paid from the decision to add it until the operation that takes it away is over. The
standby is not counted: it has no weights and no work.
"""

import asyncio
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import autoscale_model as model
import common
import numpy as np
from autoscale_model import TTFT_S, TUNED, Floats
from autoscale_replay import (
    Answer,
    Window,
    answered,
    capacity_of,
    chosen_window,
    replayed,
    request_of,
)
from engines_report import Bar, Spread
from live_streams import deployment, one_node, operate, until
from locations import REQUESTS

from remora.autoscale.decision_lines import replay
from remora.cluster.bootstrap import ClusterHandle, cluster_status, ensure_cluster, stop_cluster
from remora.cluster.config import RemoraConfig
from remora.cluster.connect import connected_service
from remora.cluster.operation import ScaleTo

NAME = "bench-autoscale"
TRACE = REQUESTS / "azure_llm_2023_conv.csv"
SEQUENCES = 4  # that a unit decodes at once; others wait
UNITS = 2  # of the largest fleet: there are two cores
MEAN_LOAD = 0.9  # of the window, of what one unit can do
FASTER = 6.0  # than the simulation, where a unit starts in 30 s: 5 s
SAMPLE_S = 1.5
CLIENTS_PER_UNIT = 3 * SEQUENCES  # when capacity is measured


async def fixed(config: RemoraConfig, table_R3: Floats, arm_s: float, for_s: float) -> Any:
    """Capacities, the window, and answers of a fixed fleet of one unit and of `UNITS`."""
    handle = ensure_cluster(config)
    service = await connected_service(config, handle)
    lengths = [request_of(i, 0.0, *row) for i, row in enumerate(table_R3[:4000, 1:])]
    found: dict[int, tuple[float, float]] = {}
    answers: dict[int, list[Answer]] = {}
    try:
        await capacity_of(
            service, lengths, clients=CLIENTS_PER_UNIT, for_s=2.0
        )  # what is only slow once
        found[1] = await capacity_of(service, lengths, clients=CLIENTS_PER_UNIT, for_s=for_s)
        window = chosen_window(table_R3, arm_s=arm_s, rate=MEAN_LOAD * found[1][0])
        say_window(window, found[1][0], arm_s)
        answers[1] = await replayed(service, window.requests)
        await operate(handle, "to-the-peak", ScaleTo(dense_groups=UNITS))

        async def all_connected() -> bool:
            return service.serving.engine.num_serving == UNITS

        await until(all_connected)
        found[UNITS] = await capacity_of(
            service, lengths, clients=UNITS * CLIENTS_PER_UNIT, for_s=for_s
        )
        answers[UNITS] = await replayed(service, window.requests)
        return found, window, answers
    finally:
        await service.close()
        await asyncio.to_thread(stop_cluster, config.name)


def say_window(window: Window, capacity: float, arm_s: float) -> None:
    rate = len(window.requests) / arm_s
    trace_s = arm_s * window.compression
    print(f"{TRACE.name}, {trace_s:.0f} s from {window.begin_s:g} s on in {arm_s:g} s:", end=" ")
    print(
        f"{len(window.requests)} requests, {rate:.2f} a second ({rate / capacity:.2f} of a unit),"
    )
    print(f"in the highest minute of the trace {window.peak_ratio:.2f} of that", flush=True)


def policy(tokens_per_s: float) -> dict[str, Any]:
    """The simulation's, `FASTER`. tokens_per_s: prompt + output, of one unit."""
    return {
        "kind": "AutoscalePolicy", "version": 1, "pool": "dense", "mode": "act",
        "targets": {"ttft": {"seconds": TTFT_S}, "queue_per_unit": TUNED["queue"]},
        "bounds": {"min_units": 1, "max_units": UNITS},
        "reactive": {
            "window_s": 2 * model.STEP_S / FASTER, "samples_min": 1,
            "down_window_s": TUNED["down_window_s"] / FASTER, "down_below": TUNED["down_below"],
        },
        "cooldowns": {"up_s": model.STEP_S / FASTER, "down_s": TUNED["down_s"] / FASTER},
        "predictive": {
            "load_per_unit": tokens_per_s * TUNED["utilisation"], "horizon_s": 60.0 / FASTER,
            "step_s": TUNED["step_s"] / FASTER, "season_s": 600.0 / FASTER,
            "quantile": TUNED["quantile"],
        },
    }  # fmt: skip


async def autoscaled(config: RemoraConfig, window: Window, arm_s: float) -> Any:
    """Answers, unit-hours, decisions to scale as rows, and whether the log replays."""
    handle = ensure_cluster(config)
    service = await connected_service(config, handle)
    try:

        async def is_warm() -> bool:
            return bool((await asyncio.to_thread(cluster_status, NAME))["warm_dense"]["warm"] == 1)

        await until(is_warm)
        for request in window.requests[:SEQUENCES]:  # the length of a request is then known
            await answered(service, request)
        begin_s = time.time()
        answers = await replayed(service, window.requests)
        status = await asyncio.to_thread(cluster_status, NAME)
        lines = Path(status["autoscale"]["log"]).read_text().splitlines()
        rows = decisions(handle, lines, begin_s)
    finally:
        await service.close()
        await asyncio.to_thread(stop_cluster, config.name)
    return answers, paid_hours(lines, begin_s, begin_s + arm_s), rows, replay(lines)


def paid_hours(lines: Sequence[str], begin_s: float, end_s: float) -> float:
    """Unit-hours between two times: the units of each sample until the next, and while an operation
    runs the most of before it, of its target and of those that are there."""
    logged = [json.loads(line) for line in lines]
    total, before_s, paid, held = 0.0, begin_s, 0, 0
    for line in (one for one in logged if one["kind"] == "autoscale_decision"):
        sample, decision = line["sample"], line["decision"]
        at_s = min(max(sample["at_s"], begin_s), end_s)
        total += paid * (at_s - before_s)
        before_s = at_s
        held = max(held, sample["units"]) if sample["operation"] else sample["units"]
        if decision["verdict"] == "scale":
            held = max(held, decision["target_units"])
        paid = held
    return (total + paid * (end_s - before_s)) / 3600


def decisions(handle: ClusterHandle, lines: Sequence[str], begin_s: float) -> list[dict[str, Any]]:
    """What was decided besides keeping and waiting, and what came of it."""
    rows: list[dict[str, Any]] = []
    for line in map(json.loads, lines):
        if line["kind"] == "autoscale_decision" and line["decision"]["verdict"] == "scale":
            decision = line["decision"]
            rows.append({
                "at_s": round(line["sample"]["at_s"] - begin_s, 1),
                "units": f"{decision['units']} to {decision['target_units']}",
                "outcome": "", "serving_s": "", "reason": decision["reason"],
            })  # fmt: skip
        elif line["kind"] == "autoscale_action" and rows:
            rows[-1]["outcome"] = line["outcome"]
            if line["outcome"] == "running":
                found = handle.over(line["operation_id"])
                rows[-1]["outcome"] = found["outcome"]
                rows[-1]["serving_s"] = round(found["serving_s"] or 0.0, 2)
    return rows


def row_of(fleet: str, answers: Sequence[Answer], unit_hours: float) -> dict[str, Any]:
    """What a fleet did for its clients."""
    whole = [answer for answer in answers if answer.failure is None]
    ttft, itl = ([getattr(a, key) for a in whole] for key in ("ttft_s", "itl_s"))
    return {
        "fleet": fleet,
        "requests": len(answers),
        "failed": len(answers) - len(whole),
        "attainment": round(sum(answer.is_good for answer in answers) / len(answers), 4),
        "ttft_p50_s": round(float(np.percentile(ttft, 50)), 3),
        "ttft_p99_s": round(float(np.percentile(ttft, 99)), 3),
        "itl_p50_ms": round(1e3 * float(np.percentile(itl, 50)), 1),
        "itl_p99_ms": round(1e3 * float(np.percentile(itl, 99)), 1),
        "unit_hours": round(unit_hours, 4),
        "late_max_s": round(max(answer.late_s for answer in answers), 3),
    }


def bars(rows: Sequence[dict[str, Any]], replays: bool, identical: bool) -> list[Bar]:
    """rows: of one unit, of the fixed fleet, of the autoscaled one."""
    one, peak, scaled = rows
    figures = {
        "failed_requests": (float(sum(row["failed"] for row in rows)), "", "<=", 0.0),
        "live_attainment_gap": (peak["attainment"] - scaled["attainment"], "", "<=", 0.01),
        "log_replays": (float(replays), "", ">=", 1.0),
        "identical_tokens": (float(identical), "", ">=", 1.0),
        "live_unit_hours_vs_fixed": (scaled["unit_hours"] / peak["unit_hours"], "x", None, None),
        "one_unit_attainment_gap": (peak["attainment"] - one["attainment"], "", None, None),
    }
    return [
        Bar(name=name, value=Spread.of([value]), unit=unit, op=op, target=target)
        for name, (value, unit, op, target) in figures.items()
    ]


def of_units(**sections: Any) -> RemoraConfig:
    """A deployment of one unit."""
    config = deployment(NAME, **sections)
    dense = config.dense.model_copy(update={"max_num_seqs": SEQUENCES})
    return config.model_copy(update={"dense": dense})


def main(args: Namespace) -> None:
    """Measure, print, write."""
    arm_s, for_s = (45.0, 6.0) if args.quick else (180.0, 15.0)
    if not TRACE.is_file():
        raise SystemExit(f"{TRACE}: not there; it is not in the repository (docs/benchmarks.md)")
    table_R3 = model.read_requests(TRACE)
    with one_node(8), tempfile.TemporaryDirectory() as folder:
        found, window, fleets = asyncio.run(fixed(of_units(), table_R3, arm_s, for_s))
        for units, (requests, tokens) in found.items():
            print(f"{units} units: {requests:.2f} requests/s, {tokens:.0f} tokens/s", flush=True)
        how = {"policy": policy(found[1][1]), "sample_every_s": SAMPLE_S, "log_dir": folder}
        config = of_units(elastic={"warm_dense": 1}, autoscale=how)
        scaled, hours, taken, again = asyncio.run(autoscaled(config, window, arm_s))
    rows = [
        row_of("one unit", fleets[1], arm_s / 3600),
        row_of(f"{UNITS} units", fleets[UNITS], UNITS * arm_s / 3600),
        row_of("autoscaled", scaled, hours),
    ]
    every = [*fleets.values(), scaled]
    for failure in sorted({a.failure for answers in every for a in answers if a.failure}):
        print(f"FAILED {failure}")
    print(f"{again.decisions} decisions, {again.num_differences} differ when made again")
    whole = [[a.token_ids for a in answers if a.failure is None] for answers in every]
    identical = all(one == whole[0] for one in whole)
    found_bars = bars(rows, again.num_differences == 0, identical)
    common.finish("autoscale_live", args, [*rows, *taken], found_bars)


if __name__ == "__main__":
    main(common.parser(__doc__).parse_args())
