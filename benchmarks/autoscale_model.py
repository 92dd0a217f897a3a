"""A pool of units under a trace of requests, and the cheapest plan that a clairvoyant would make.

The pool is one first-in-first-out queue with a server of `units * rate` work a second; the work of
a request is output tokens + prompt tokens / `PROMPT_PER_OUTPUT`. Its time to first token is taken
to be its wait for what came before it. Within an interval of `STEP_S` the number of units is
constant, so the wait has a closed form (Lindley's recursion), vectorised here; a wait that reaches
into the next interval is counted at the rate of its own. Batching, prefix caches, memory, prefill
and the drain of leaving units are not modelled.

Shapes: R requests of one interval.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

STEP_S = 10.0
TTFT_S = 2.0  # the objective
PROMPT_PER_OUTPUT = 10.0  # prompt tokens that cost as much as one output token; assumed
UNITS_MAX = 80
FRONTIER_MAX = 48  # plans that the clairvoyant goes on with from an interval to the next

# Settings of our policy, tuned on the first halves of the traces, one set for all; seconds.
TUNED = {
    "utilisation": 0.85,
    "quantile": 0.8,
    "step_s": 60.0,
    "queue": 4.0,
    "down_window_s": 120.0,
    "down_below": 0.95,
    "down_s": 60.0,
}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """What arrives in one interval. offset_R: seconds from its begin, in order; work_R."""

    offset_R: Floats
    work_R: Floats

    def served(self, backlog: float, rate: float) -> tuple[Floats, float]:
        """wait_R in seconds, and the work left at the end, with `rate` work a second."""
        before_R = np.concatenate([[0.0], np.cumsum(self.work_R)])  # one more: the end
        drift_R = before_R - rate * np.append(self.offset_R, STEP_S)
        # Idle since any earlier arrival: an end has no arrival of its own to start from.
        lows_R = np.maximum.accumulate(-drift_R)
        workload_R = drift_R + np.maximum(backlog, lows_R)
        return workload_R[:-1] / rate, float(workload_R[-1])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace."""

    attainment: float  # share of requests that waited at most `TTFT_S`
    unit_hours: float


def read_requests(path: Path) -> Floats:
    """Requests of one of the files of ../shared/data/requests, [R, 3] in order of arrival:
    seconds since the first, prompt tokens, output tokens."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = [(r["timestamp"] / 1e3, r["input_length"], r["output_length"]) for r in rows]
    else:
        found = []
        for row in csv.DictReader(path.read_text().splitlines()):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            found.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    table = np.array(sorted(found), dtype=np.float64)
    table[:, 0] -= table[0, 0]
    return table


def read_trace(path: Path) -> list[Interval]:
    """Intervals of one of the files of ../shared/data/requests."""
    table = read_requests(path)
    at_R, work_R = table[:, 0], table[:, 2] + table[:, 1] / PROMPT_PER_OUTPUT
    step_R = (at_R // STEP_S).astype(int)
    return [
        Interval(at_R[step_R == step] - step * STEP_S, work_R[step_R == step])
        for step in range(int(step_R[-1]) + 1)
    ]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a policy is told after an interval."""

    at_s: float
    units: int  # that serve now
    wait_R: Floats
    load: float  # work that arrived, a second
    backlog: float  # work that waits
    requests_waiting: int
    is_starting: bool
    coming: int  # that there will be when those that start serve


Policy = Callable[[Seen], int]  # absolute number of units from now on


def run(
    intervals: Sequence[Interval],
    rate: float,
    policy: Policy,
    *,
    units: int,
    start_s: float,
    judged_from: int = 0,
) -> Outcome:
    """The trace under a policy. Units are paid from the decision on and serve `start_s` later.

    judged_from: the interval from which on requests and units count; the policy sees all.
    """
    backlog, paid_s, kept, total = 0.0, 0.0, 0, 0
    ready_s, coming = 0.0, units
    mean_work = float(np.mean(np.concatenate([i.work_R for i in intervals])))
    for step, interval in enumerate(intervals):
        wait_R, backlog = interval.served(backlog, units * rate)
        if step >= judged_from:
            paid_s += max(units, coming) * STEP_S
            kept += int(np.sum(wait_R <= TTFT_S))
            total += len(wait_R)
        at_s = (step + 1) * STEP_S
        if at_s >= ready_s:
            units = coming
        seen = Seen(
            at_s=at_s,
            units=units,
            wait_R=wait_R,
            load=float(interval.work_R.sum()) / STEP_S,
            backlog=backlog,
            requests_waiting=round(backlog / mean_work),
            is_starting=at_s < ready_s,
            coming=coming,
        )
        wanted = policy(seen)
        if wanted != coming and not seen.is_starting:
            ready_s = at_s + (start_s if wanted > units else 0.0)
            coming = wanted
            units = min(units, coming)  # those that leave do so at once
    return Outcome(kept / total, paid_s / 3600)


def clairvoyant(
    intervals: Sequence[Interval],
    rate: float,
    *,
    attainment: float,
    rounds: int,
    units: int,
    start_s: float = 0.0,
) -> Outcome:
    """The fewest unit-hours with at least `attainment`, all arrivals known.

    A plan is a number of units an interval. As any policy does, it pays a unit from `start_s`
    before it serves, and begins with `units`; unlike one it decides as early as it likes, and any
    number of times. Plans are compared by unit-intervals + price x misses, by the backlog they
    leave and by the units they have; the price is bisected, `rounds` times, until the attainment is
    met. Of a frontier's plans the `FRONTIER_MAX` cheapest go on: what is found can be carried out
    and is close to the least, but no proof of it.
    """
    total = sum(len(interval.work_R) for interval in intervals)
    low, high = 0.0, 16.0  # unit-intervals a miss
    begin = (units, start_s / STEP_S)
    best = _cheapest(intervals, rate, high, total, begin)
    for _ in range(rounds):
        price = high / 8 if low == 0.0 else (low * high) ** 0.5
        found = _cheapest(intervals, rate, price, total, begin)
        if found.attainment >= attainment:
            high, best = price, min(best, found, key=lambda one: one.unit_hours)
        else:
            low = price
    return best


def _cheapest(
    intervals: Sequence[Interval],
    rate: float,
    price: float,
    total: int,
    begin: tuple[int, float],
) -> Outcome:
    """begin: units that serve, and unit-intervals that one costs to start. U: units to choose from;
    P: plans of the frontier, each (cost, backlog, units, unit-intervals, misses)."""
    units, start = begin
    plans_P: Floats = np.array([[0.0, 0.0, units, 0.0, 0.0]])
    for interval in intervals:
        most = int(interval.work_R.sum() / (rate * STEP_S) * 4) + 8
        most = min(UNITS_MAX, max(most, int(plans_P[:, 2].max())))
        units_U = np.arange(1.0, most + 1)
        misses_PU, left_PU = _served(interval, plans_P[:, 1], rate * units_U)
        used_PU = units_U + start * np.maximum(0.0, units_U - plans_P[:, 2, None])
        grown = np.stack(
            [
                plans_P[:, 0, None] + used_PU + price * misses_PU,
                left_PU,
                np.broadcast_to(units_U, left_PU.shape),
                plans_P[:, 3, None] + used_PU,
                plans_P[:, 4, None] + misses_PU,
            ],
            axis=-1,
        ).reshape(-1, 5)
        plans_P = _frontier(grown, start)
    _, _, _, used, missed = plans_P[np.argmin(plans_P[:, 0])].tolist()
    return Outcome(1 - missed / total, used * STEP_S / 3600)


def _served(interval: Interval, backlog_P: Floats, rate_U: Floats) -> tuple[Floats, Floats]:
    """misses_PU and backlog_PU after an interval, for each backlog before it and each rate."""
    before_R = np.concatenate([[0.0], np.cumsum(interval.work_R)])
    drift_UR = before_R - rate_U[:, None] * np.append(interval.offset_R, STEP_S)
    lows_UR = np.maximum.accumulate(-drift_UR, axis=1)
    late_UR = TTFT_S * rate_U[:, None] - drift_UR[:, :-1]  # a workload over this is late
    # Late by idling since an earlier arrival, whatever the backlog; else late above a backlog.
    is_late_UR = lows_UR[:, :-1] > late_UR
    always_U = is_late_UR.sum(axis=1)
    allowed_UR = np.sort(np.where(is_late_UR, np.inf, late_UR), axis=1)
    misses_PU = np.empty((len(backlog_P), len(rate_U)))
    for n in range(len(rate_U)):
        misses_PU[:, n] = always_U[n] + np.searchsorted(allowed_UR[n], backlog_P, side="left")
    left_PU = drift_UR[:, -1] + np.maximum(backlog_P[:, None], lows_UR[:, -1])
    return misses_PU, left_PU


def _frontier(grown_P: Floats, start: float) -> Floats:
    """Those plans that no other one dominates, cheapest first, at most `FRONTIER_MAX`.

    A plan is dominated by one with no more backlog that is no dearer after starting the units that
    it has fewer: it could go on as the other does.
    """
    order_P = np.lexsort((grown_P[:, 1], grown_P[:, 0]))
    kept: list[Floats] = []
    for plan in grown_P[order_P[: 64 * FRONTIER_MAX]]:
        if kept:
            others = np.array(kept)
            dearer = others[:, 0] + start * np.maximum(0.0, plan[2] - others[:, 2])
            if bool(np.any((dearer <= plan[0] + 1e-9) & (others[:, 1] <= plan[1] + 1e-9))):
                continue
        kept.append(plan)
        if len(kept) == FRONTIER_MAX:
            break
    return np.array(kept)
