"""Forecasts of offered load, the forecaster chosen by back-test, with seasonal naive as the floor.

    forecast = best_forecast(series, horizon=4, season=2880, names=("seasonal_naive", "holt"))
    forecast.peak + forecast.margin      # what to have capacity for

A back-test stands at several earlier moments of the series (rolling origin), forecasts from what
was known then, and is compared with what came. Another forecaster takes the place of seasonal
naive only where its mean absolute error is smaller, that is where its scaled error (MASE, Hyndman
and Koehler 2006, doi:10.1016/j.ijforecast.2006.03.001) is below 1. Plain floats and fixed orders:
the same series gives the same forecast on any machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, fsum
from typing import Final, Literal

from remora.autoscale.library_forecast import LIBRARY, STEPS_MAX, auto_reg, holt_winters, theta

ForecasterName = Literal[
    "seasonal_naive", "moving_average", "holt", "auto_reg", "theta", "holt_winters"
]

ORIGINS_MAX: Final = 12  # moments that a back-test stands at
LIBRARY_ORIGINS_MAX: Final = 6  # the same for all, where forecasters of the library are among them
FIT_STEPS_MAX: Final = 120  # latest steps that Holt's method and the moving average look at
FITS_MAX: Final = 512  # remembered of a forecaster: `ORIGINS_MAX` + 1 horizons are of use
MEAN_STEPS: Final = 8
DAMPING: Final = 0.9  # of Holt's trend (Gardner and McKenzie 1985)
ALPHAS: Final = (0.2, 0.5, 0.8)  # smoothing of the level
BETAS: Final = (0.05, 0.2, 0.5)  # of the trend

Forecaster = Callable[[Sequence[float], int, int], list[float] | None]  # None: not for this series


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the load is expected to be.

    Attributes:
        forecaster: which one was taken.
        values: one a step ahead, each >= 0, in the unit of the series.
        margin: the quantile asked for of (came - forecast) in the back-test of the one taken, >= 0.
        errors: mean absolute error of each in the back-test; none where the series is too short.
    """

    forecaster: ForecasterName
    values: tuple[float, ...]
    margin: float
    errors: Mapping[ForecasterName, float]

    @property
    def peak(self) -> float:
        """The largest value over the horizon."""
        return max(self.values)


def seasonal_naive(series: Sequence[float], horizon: int, season: int) -> list[float]:
    """What was a season ago; the last value again while there is no whole season yet."""
    if len(series) < season:
        return [series[-1]] * horizon
    return [series[len(series) - season + step % season] for step in range(horizon)]


def moving_average(series: Sequence[float], horizon: int, season: int) -> list[float]:
    """The mean of the last `MEAN_STEPS` values."""
    last = series[-MEAN_STEPS:]
    return [fsum(last) / len(last)] * horizon


def holt(series: Sequence[float], horizon: int, season: int) -> list[float]:
    """Holt's linear method with a damped trend, smoothed as fits its own last steps best."""
    recent = series[-FIT_STEPS_MAX:]
    if len(recent) < 2:
        return [recent[-1]] * horizon
    fits = [_smoothed(recent, alpha, beta) for alpha in ALPHAS for beta in BETAS]
    _, level, trend = min(fits, key=lambda fit: fit[0])  # the first of equals
    values, damped = [], 0.0
    for step in range(1, horizon + 1):
        damped += DAMPING**step
        values.append(max(0.0, level + damped * trend))
    return values


def _smoothed(series: Sequence[float], alpha: float, beta: float) -> tuple[float, float, float]:
    """Squared one-step error, last level, last trend."""
    level, trend, error = series[0], series[1] - series[0], 0.0
    for value in series[1:]:
        expected = level + DAMPING * trend
        error += (value - expected) ** 2
        before, level = level, alpha * value + (1 - alpha) * expected
        trend = beta * (level - before) + (1 - beta) * DAMPING * trend
    return error, level, trend


def _remembered(forecaster: Forecaster, look_back: int) -> Forecaster:
    """The same, with its last `FITS_MAX` answers kept: a back-test stands at a moment again each
    time that the series has grown by a horizon, and what was known then has not changed.

    Args:
        look_back: latest steps, that the forecaster looks at and no others.
    """

    @lru_cache(maxsize=FITS_MAX)
    def fitted(recent: tuple[float, ...], horizon: int, season: int) -> tuple[float, ...] | None:
        values = forecaster(recent, horizon, season)
        return None if values is None else tuple(values)

    def known(series: Sequence[float], horizon: int, season: int) -> list[float] | None:
        values = fitted(tuple(series[-look_back:]), horizon, season)
        return None if values is None else list(values)

    return known


FORECASTERS: Final[dict[ForecasterName, Forecaster]] = {
    "seasonal_naive": seasonal_naive,
    "moving_average": moving_average,
    "holt": _remembered(holt, FIT_STEPS_MAX),
    "auto_reg": _remembered(auto_reg, STEPS_MAX),
    "theta": _remembered(theta, STEPS_MAX),
    "holt_winters": _remembered(holt_winters, STEPS_MAX),
}


def backtest(
    forecaster: Forecaster,
    series: Sequence[float],
    *,
    horizon: int,
    season: int,
    origins_max: int = ORIGINS_MAX,
) -> list[float] | None:
    """Errors (came - forecast) of all steps ahead, at up to `origins_max` latest moments.

    Moments are a horizon apart, so that no step is judged twice, and have two steps before them.
    None: at one of them the forecaster had nothing to say, so it cannot be compared.
    """
    origins = range(len(series) - horizon, 1, -horizon)[:origins_max]
    errors: list[float] = []
    for origin in origins:
        expected = forecaster(series[:origin], horizon, season)
        if expected is None:
            return None
        came = series[origin : origin + horizon]
        errors += [value - guess for value, guess in zip(came, expected, strict=True)]
    return errors


def best_forecast(
    series: Sequence[float],
    *,
    horizon: int,
    season: int,
    names: Sequence[ForecasterName],
    quantile: float = 0.9,
) -> Forecast:
    """The forecast of the forecaster with the smallest error in the back-test.

    Args:
        series: load a step, oldest first; at least one value.
        horizon: steps ahead.
        season: steps of a season.
        names: those to choose among; seasonal naive is always one of them.
        quantile: of the back-test's errors, for the margin; 0.5 to 1.
    """
    assert len(series) >= 1, f"series of {len(series)} steps: a forecast needs one"
    most = LIBRARY_ORIGINS_MAX if LIBRARY.keys() & set(names) else ORIGINS_MAX
    bounds = {"horizon": horizon, "season": season, "origins_max": most}
    floor: ForecasterName = "seasonal_naive"
    found = {floor: backtest(seasonal_naive, series, **bounds) or []}
    for name in names if found[floor] else ():
        off = backtest(FORECASTERS[name], series, **bounds) if name not in found else None
        if off is not None:
            found[name] = off
    errors = {name: fsum(map(abs, off)) / len(off) for name, off in found.items() if off}
    # the floor comes first: it wins ties
    for best in sorted(found, key=lambda name: errors.get(name, 0.0)):
        values = FORECASTERS[best](series, horizon, season)
        if values is not None:
            break
    assert values is not None, "seasonal naive always forecasts"
    return Forecast(
        forecaster=best,
        values=tuple(values),
        margin=_quantile(found[best], quantile),
        errors=errors,
    )


def _quantile(errors: Sequence[float], quantile: float) -> float:
    """The smallest error that `quantile` of them do not exceed, at least 0; 0 of none."""
    if not errors:
        return 0.0
    return max(0.0, sorted(errors)[ceil(quantile * len(errors)) - 1])
