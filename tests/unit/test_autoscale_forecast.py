"""Forecasters on series whose future is known, and the choice among them."""

import importlib.util
import math
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.autoscaling import policy_of

from remora.autoscale import forecast as forecasts
from remora.autoscale.forecast import (
    FORECASTERS,
    MEAN_STEPS,
    Forecast,
    ForecasterName,
    backtest,
    best_forecast,
    holt,
    moving_average,
    seasonal_naive,
)
from remora.comm.errors import ConfigError

ALL: tuple[ForecasterName, ...] = ("seasonal_naive", "moving_average", "holt")  # our own


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


def test_a_moment_of_the_backtest_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log with forecasts replayed at a tenth of the speed, when each step fitted all again."""
    fits: list[int] = []
    smoothed = forecasts._smoothed

    def counted(series: Sequence[float], alpha: float, beta: float) -> tuple[float, float, float]:
        fits.append(len(series))
        return smoothed(series, alpha, beta)

    monkeypatch.setattr(forecasts, "_smoothed", counted)
    series = [50.0 + (n * 7919 % 17) for n in range(210)]
    for end in range(200, 204):  # a horizon: every moment that it can stand at, but the new ones
        best(series[:end])
    fits.clear()
    for end in range(204, 210):
        best(series[:end])
    grid = len(forecasts.ALPHAS) * len(forecasts.BETAS)
    assert len(fits) <= 6 * 2 * grid, "the newest moment, and the forecast itself"


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


LIBRARY_NAMES = ("auto_reg", "theta", "holt_winters")


def waves(steps: int, season: int, noise: float = 2.0) -> list[float]:
    rng = random.Random(3)
    return [
        100 + 30 * math.sin(2 * math.pi * n / season) + rng.gauss(0, noise) for n in range(steps)
    ]


@pytest.mark.parametrize("name", LIBRARY_NAMES)
def test_forecasters_of_the_library_follow_a_season(name: ForecasterName) -> None:
    series = waves(100, season=24)
    expected = FORECASTERS[name](series[:-6], 6, 24)
    assert expected is not None and len(expected) == 6
    assert all(abs(e - came) < 12 for e, came in zip(expected, series[-6:], strict=True)), expected
    again = FORECASTERS[name](series[:-6], 6, 24)
    assert again == expected, "the same series gives the same forecast"


@pytest.mark.parametrize("name", LIBRARY_NAMES)
@pytest.mark.parametrize(
    "series", [[5.0], [1.0, 2.0, 3.0], [7.0] * 50, [0.0] * 200], ids=["one", "few", "flat", "none"]
)
def test_what_cannot_be_fitted_is_left_to_the_floor(
    name: ForecasterName, series: list[float]
) -> None:
    assert FORECASTERS[name](series, 3, 24) is None
    found = best_forecast(series, horizon=3, season=24, names=("seasonal_naive", name))
    assert found.forecaster == "seasonal_naive" and name not in found.errors


def test_the_back_test_chooses_among_all_of_them() -> None:
    series = waves(110, season=24, noise=4.0)
    found = best_forecast(series, horizon=4, season=24, names=tuple(FORECASTERS))
    assert set(found.errors) == set(FORECASTERS)
    assert found.errors[found.forecaster] == min(found.errors.values())
    assert found.forecaster in LIBRARY_NAMES, "noise that a season ago repeats, they smooth"
    steady = [float(n % 24) for n in range(96)]
    exact = best_forecast(steady, horizon=4, season=24, names=tuple(FORECASTERS))
    assert exact.forecaster == "seasonal_naive", "the floor wins what it knows by heart"


@pytest.mark.parametrize("name", LIBRARY_NAMES)
def test_forecasts_are_never_negative_or_wild(name: ForecasterName) -> None:
    rng = random.Random(5)
    bursts = [0.0 if rng.random() < 0.6 else rng.expovariate(0.01) for _ in range(120)]
    expected = FORECASTERS[name](bursts, 5, 30)
    assert expected is None or all(0 <= e <= 10 * max(bursts) for e in expected)


def test_without_the_library_a_policy_that_needs_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    given = {"load_per_unit": 1.0, "forecasters": ["seasonal_naive", "theta"]}
    with pytest.raises(ConfigError, match=r"theta need statsmodels: pip install .*forecast"):
        policy_of(predictive=given)
    policy_of(predictive=given | {"forecasters": ["seasonal_naive", "holt"]})


def test_the_library_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, remora.autoscale.autoscaler, remora.cluster.cli\n"
        "assert not {'statsmodels', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)
