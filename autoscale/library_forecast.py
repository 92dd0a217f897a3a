"""Forecasters of statsmodels: autoregression, the theta method, Holt and Winters' seasonal one.

The library comes with `pip install remora[forecast]`. It is imported when a policy that names one
of these is first made to forecast: with pandas beneath it, that takes a second and some 100 MiB.
Each looks at the newest `STEPS_MAX` steps, and is seasonal where these hold two seasons. One that
cannot be fitted to a series (a constant one, say) gives none for it.

Methods: AutoReg is least squares; theta is Assimakopoulos and Nikolopoulos 2000
(doi:10.1016/S0169-2070(00)00066-2); Holt and Winters' is additive.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from remora.comm.errors import ConfigError

STEPS_MAX: Final = 1024
LAGS: Final = (1, 2, 3, 4)  # of the autoregression, beside the season
FIT_MIN: Final = 12  # steps that a fit needs at least
NEEDED: Final = "statsmodels"


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError: one of these forecasters is of a library that is not installed."""
    missing = sorted(set(names) & LIBRARY.keys())
    if missing and importlib.util.find_spec(NEEDED) is None:
        raise ConfigError(
            f"forecasters: {', '.join(missing)} need {NEEDED}: pip install 'remora[forecast]', or"
            " leave them out"
        )


def auto_reg(series: Sequence[float], horizon: int, season: int) -> list[float] | None:
    """An autoregression on the last steps and the one a season ago."""
    from statsmodels.tsa.ar_model import AutoReg

    recent = _recent(series)
    lags = list(LAGS)
    if len(recent) >= 2 * season and season not in lags:
        lags.append(season)
    return _fitted(lambda: AutoReg(recent, lags=lags, trend="c"), recent, horizon)


def theta(series: Sequence[float], horizon: int, season: int) -> list[float] | None:
    """The theta method on the series without its season."""
    from statsmodels.tsa.forecasting.theta import ThetaModel

    recent = _recent(series)
    is_seasonal = len(recent) >= 2 * season and season > 1
    return _fitted(
        lambda: ThetaModel(
            recent,
            period=season if is_seasonal else 2,
            deseasonalize=is_seasonal,
            method="additive",
        ),
        recent,
        horizon,
    )


def holt_winters(series: Sequence[float], horizon: int, season: int) -> list[float] | None:
    """Level and season, both smoothed; level alone before there are two seasons."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    recent = _recent(series)
    is_seasonal = len(recent) >= 2 * season and season > 1
    return _fitted(
        lambda: ExponentialSmoothing(
            recent,
            seasonal="add" if is_seasonal else None,
            seasonal_periods=season if is_seasonal else None,
            initialization_method="heuristic" if is_seasonal else "estimated",
        ),
        recent,
        horizon,
    )


LIBRARY: Final = {"auto_reg": auto_reg, "theta": theta, "holt_winters": holt_winters}


def _recent(series: Sequence[float]) -> Any:
    return np.asarray(series[-STEPS_MAX:], dtype=np.float64)


def _fitted(make: Any, recent: Any, horizon: int) -> list[float] | None:
    """What a model of `make` forecasts; None where it cannot be fitted to `recent`."""
    if len(recent) < FIT_MIN or float(np.ptp(recent)) == 0.0:
        return None
    try:
        with warnings.catch_warnings():
            # an optimiser that stopped early is judged by the back-test, as any other fit is
            warnings.simplefilter("ignore")
            values = np.asarray(make().fit().forecast(horizon), dtype=np.float64)
    except (ValueError, ZeroDivisionError, np.linalg.LinAlgError):
        return None
    if not bool(np.isfinite(values).all()):
        return None
    return [max(0.0, float(value)) for value in values]
