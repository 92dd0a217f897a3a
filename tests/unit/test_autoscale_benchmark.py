"""The pool of benchmarks/autoscale.py against a dumb version of it, and its clairvoyant."""

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
        best = model.clairvoyant(intervals, 10.0, attainment=fixed.attainment, rounds=10)
        assert best.attainment >= fixed.attainment
        assert best.unit_hours <= fixed.unit_hours
