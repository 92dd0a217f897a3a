"""The pool of benchmarks/autoscale.py against a dumb version of it, and its clairvoyant."""

import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.programs import benchmarks_on_path
from support.programs import program as module


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with benchmarks_on_path():
        yield


def interval_of(seed: int, count: int) -> Any:
    rng = np.random.default_rng(seed)
    return module("autoscale_model").Interval(
        np.sort(rng.uniform(0, 10, count)), rng.exponential(5.0, count)
    )


@pytest.mark.parametrize(("seed", "count"), [(0, 0), (1, 1), (2, 40)])
@pytest.mark.parametrize(("backlog", "rate"), [(0.0, 25.0), (90.0, 10.0), (3.0, 4000.0)])
def test_the_closed_form_is_the_queue(seed: int, count: int, backlog: float, rate: float) -> None:
    interval = interval_of(seed, count)
    wait_R, left = interval.served(backlog, rate)
    work, at_s, waits = backlog, 0.0, []
    for offset, size in zip(interval.offset_R, interval.work_R, strict=True):
        work = max(0.0, work - rate * (offset - at_s))
        waits.append(work / rate)
        work, at_s = work + size, offset
    assert wait_R == pytest.approx(waits, abs=1e-9)
    assert left == pytest.approx(max(0.0, work - rate * (10 - at_s)), abs=1e-9)


def test_units_are_paid_from_the_decision_and_serve_after_the_start() -> None:
    model = module("autoscale_model")
    seen: list[Any] = []

    def policy(now: Any) -> int:
        seen.append(now)
        return 3 if now.at_s < 60 else 1

    outcome = model.run([interval_of(n, 5) for n in range(9)], 50.0, policy, units=1, start_s=20)
    assert [now.units for now in seen] == [1, 1, 3, 3, 3, 3, 1, 1, 1]
    assert [now.is_starting for now in seen] == [False, True] + [False] * 7
    assert outcome.unit_hours == pytest.approx((1 + 3 * 5 + 3) * 10 / 3600)


def test_the_clairvoyant_beats_every_fixed_fleet_as_good() -> None:
    model = module("autoscale_model")
    intervals = [interval_of(n, 10 + 50 * (n % 4 == 3)) for n in range(24)]
    for units in (2, 3, 4):
        fixed = model.run(intervals, 10.0, lambda _, n=units: n, units=units, start_s=0)
        best = model.clairvoyant(
            intervals, 10.0, attainment=fixed.attainment, rounds=10, units=units
        )
        assert best.attainment >= fixed.attainment
        assert best.unit_hours <= fixed.unit_hours


def test_a_clairvoyant_that_pays_for_starts_holds_on_to_units() -> None:
    model = module("autoscale_model")
    intervals = [interval_of(n, 10 + 50 * (n % 4 == 3)) for n in range(24)]
    fixed = model.run(intervals, 10.0, lambda _: 4, units=4, start_s=30)
    options = {"attainment": fixed.attainment, "rounds": 8, "units": 4}
    free = model.clairvoyant(intervals, 10.0, **options)
    paying = model.clairvoyant(intervals, 10.0, start_s=30.0, **options)
    assert free.unit_hours < paying.unit_hours <= fixed.unit_hours
    assert paying.attainment >= fixed.attainment


@pytest.mark.parametrize("start_s", [0.0, 10.0])
def test_the_clairvoyants_plan_is_the_best_of_all(start_s: float) -> None:
    model = module("autoscale_model")
    intervals = [interval_of(n, 12 * (n % 3)) for n in range(5)]
    total = sum(len(interval.work_R) for interval in intervals)
    for price in (0.1, 1.0):
        found = model._cheapest(intervals, 8.0, price, total, (2, start_s / 10))
        least = float("inf")
        for plan in itertools.product(range(1, 5), repeat=5):
            backlog, missed, used, before = 0.0, 0, 0.0, 2
            for interval, units in zip(intervals, plan, strict=True):
                wait_R, backlog = interval.served(backlog, 8.0 * units)
                missed += int(np.sum(wait_R > model.TTFT_S))
                used += units + start_s / 10 * max(0, units - before)
                before = units
            least = min(least, used + price * missed)
        cost = found.unit_hours * 360 + price * round((1 - found.attainment) * total)
        assert cost <= least + 1e-6


def test_only_the_judged_part_counts() -> None:
    model = module("autoscale_model")
    intervals = [interval_of(0, 400)] + [interval_of(n, 5) for n in range(1, 4)]
    whole = model.run(intervals, 50.0, lambda _: 1, units=1, start_s=0)
    part = model.run(intervals, 50.0, lambda _: 1, units=1, start_s=0, judged_from=2)
    assert part.unit_hours == pytest.approx(whole.unit_hours / 2)
    assert part.attainment != whole.attainment


def test_serves_own_policy_waits_out_its_delays() -> None:
    with warnings.catch_warnings():  # Ray Serve's own, while it is imported
        warnings.simplefilter("ignore")
        policy = module("autoscale").serves_default(10.0)
    seen = {"wait_R": np.zeros(1), "backlog": 0.0, "requests_waiting": 0, "is_starting": False}

    def asked(at_s: float, load: float) -> int:
        now = module("autoscale_model").Seen(at_s=at_s, units=2, coming=2, load=load, **seen)
        return int(policy(now))

    assert [asked(at_s, 48.0) for at_s in (10.0, 20.0, 30.0, 40.0)] == [2, 2, 2, 6]


def test_the_window_to_replay_is_the_one_with_the_highest_minute() -> None:
    even_R = np.arange(0.0, 2000.0, 0.5)
    at_R = np.sort(np.concatenate([even_R, np.arange(1200.0, 1260.0, 0.5)]))  # one minute doubled
    table_R3 = np.stack([at_R, np.full_like(at_R, 300.0), np.full_like(at_R, 7.0)], axis=1)
    window = module("autoscale_replay").chosen_window(table_R3, arm_s=100.0, rate=8.0)
    trace_s = 100.0 * window.compression
    assert len(window.requests) == pytest.approx(800, rel=0.05)
    assert window.peak_ratio == pytest.approx(4 / (2 + 120 / trace_s), rel=0.05)
    assert window.begin_s <= 1200 and window.begin_s + trace_s >= 1260
    assert all(0 <= request.at_s < 100 for request in window.requests)
    assert {len(r.prompt_ids) for r in window.requests} == {32}  # clipped
    assert {r.num_new for r in window.requests} == {7}


def test_a_unit_is_paid_from_its_decision_to_the_end_of_what_takes_it_away() -> None:
    def line(at_s: float, units: int, target: int, operation: str | None = None) -> str:
        verdict = "wait" if operation else "keep" if units == target else "scale"
        decision = {"verdict": verdict, "target_units": target}
        sample = {"at_s": at_s, "units": units, "operation": operation}
        return json.dumps({"kind": "autoscale_decision", "sample": sample, "decision": decision})

    lines = [
        line(90, 1, 1), line(110, 1, 2), line(120, 1, 1, "up"), line(130, 2, 2),
        line(150, 2, 1), line(160, 1, 1, "down"), line(170, 1, 1),
    ]  # fmt: skip
    hours = module("autoscale_live").paid_hours(lines, 100.0, 200.0)
    assert hours * 3600 == pytest.approx(10 * 1 + (170 - 110) * 2 + 30 * 1)
