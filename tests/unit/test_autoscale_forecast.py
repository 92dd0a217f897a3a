"""Forecasters on series whose future is known, and the choice among them."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.autoscale.forecast import (
    FORECASTERS,
    MEAN_STEPS,
    Forecast,
    backtest,
    best_forecast,
    holt,
    moving_average,
    seasonal_naive,
)

ALL = tuple(FORECASTERS)


def best(series: list[float], *, horizon: int = 4, season: int = 24) -> Forecast:
    return best_forecast(series, horizon=horizon, season=season, names=ALL)


def test_each_forecaster_on_what_it_is_made_for() -> None:
    wave = [float(n % 5) for n in range(23)]
    assert seasonal_naive(wave, 7, 5) == [float(n % 5) for n in range(23, 30)]
    assert seasonal_naive([1.0, 2.0], 2, 5) == [2.0, 2.0], "no whole season yet"
    assert moving_average([100.0] + [4.0, 6.0] * (MEAN_STEPS // 2), 3, 5) == [5.0] * 3
    line = [10.0 + 2 * n for n in range(60)]
    values = holt(line, 3, 5)
    assert values[0] > line[-1] and values == sorted(values), "it goes on upwards"
    assert values[2] < line[-1] + 3 * 2, "and is damped"
    assert holt([9.0, 6.0, 3.0, 1.0], 8, 5)[-1] >= 0, "no load is below none"


def test_the_backtest_chooses_what_fits_the_series() -> None:
    daily = [50 + 40 * math.sin(2 * math.pi * n / 24) for n in range(24 * 6)]
    assert best(daily).forecaster == "seasonal_naive"
    assert best(daily).errors["seasonal_naive"] == pytest.approx(0, abs=1e-9)
    noise = [50.0 + (n * 7919 % 13) for n in range(200)]
    assert best(noise, season=24).forecaster == "moving_average"
    ramp = [3.0 * n for n in range(100)]
    found = best(ramp, season=24)
    assert found.forecaster == "holt"
    assert found.peak + found.margin >= ramp[-1] + 3 * 4 * 0.8, "the margin covers the damping"


def test_a_backtest_does_not_look_ahead() -> None:
    """A forecaster that is given more than the past would have no error on a step."""
    seen: list[int] = []

    def spy(series: Sequence[float], horizon: int, season: int) -> list[float]:
        seen.append(len(series))
        assert max(series) < len(series), "values are their own positions"
        return [0.0] * horizon

    errors = backtest(spy, [float(n) for n in range(20)], horizon=4, season=2)
    assert seen == [16, 12, 8, 4] and len(errors) == 16
    assert sorted(errors) == [float(n) for n in range(4, 20)], "each step is judged once"


def test_too_little_to_backtest_is_the_floor() -> None:
    found = best([7.0])
    assert found == Forecast(forecaster="seasonal_naive", values=(7.0,) * 4, margin=0.0, errors={})


@given(
    st.lists(st.floats(0, 1e9), min_size=1, max_size=80),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_never_worse_than_seasonal_naive_in_the_backtest(
    series: list[float], horizon: int, season: int
) -> None:
    found = best(series, horizon=horizon, season=season)
    assert len(found.values) == horizon
    assert all(math.isfinite(value) and value >= 0 for value in found.values)
    assert found.margin >= 0
    if found.errors:
        assert found.errors[found.forecaster] <= found.errors["seasonal_naive"]
        assert set(found.errors) == set(ALL)
