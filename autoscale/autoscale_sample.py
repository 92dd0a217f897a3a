"""What the autoscaler is told and remembers: samples, the series of load, its state.

All of it is plain data of bounded size that goes to JSON and back without loss, so that a log of
decisions can be replayed.
"""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Annotated

from pydantic import Field, field_validator

from remora.autoscale.autoscale_policy import (
    GAP_STEPS_MAX,
    AutoscalePolicy,
    LatencyTarget,
    Percentile,
)
from remora.autoscale.forecast import ForecasterName
from remora.comm.checked import Section

Ratios = list[float | None]  # of one target, a sample after the other; None: not known
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Sample(Section):
    """One look at a pool. None: not measured, or nothing to measure (no request finished)."""

    at_s: Annotated[float, Field(allow_inf_nan=False)]  # Unix time, or any clock that goes forwards
    units: Annotated[int, Field(ge=0, le=1 << 20)]  # that serve
    operation: str | None = None  # id of the operation that runs
    ttft_s: dict[Percentile, float] = Field(default_factory=dict)  # since the last sample
    itl_s: dict[Percentile, float] = Field(default_factory=dict)  # since the last sample
    waiting: Annotated[int, Field(ge=0)] | None = None  # requests queued in the whole pool
    ongoing: Amount | None = None  # requests under way in the whole pool
    kv_use: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the pool's KV pages
    imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None  # largest / mean
    load: Amount | None = None  # offered since the last sample, a second (of predictive's unit)

    @field_validator("ttft_s", "itl_s")
    @classmethod
    def _seconds(cls, value: dict[Percentile, float]) -> dict[Percentile, float]:
        for name, seconds in value.items():
            if not isfinite(seconds) or seconds < 0:
                raise ValueError(f"{name} = {seconds!r}: seconds, at least 0")
        return value


def ratios_of(policy: AutoscalePolicy, samples: Sequence[Sample]) -> dict[str, Ratios]:
    """Each target's value over its bound, a sample after the other; None where it is not known.

    A pool that nobody asks anything of (`load` 0, nothing waits) has no latency: 0. By target and
    not by sample: windows hold up to `SAMPLES_MAX`, and are looked at with every new one.
    """
    targets = policy.targets
    found: dict[str, Ratios] = {}
    if (ttft := targets.ttft) is not None:
        found["ttft"] = _latencies(ttft, samples, (sample.ttft_s for sample in samples))
    if (itl := targets.itl) is not None:
        found["itl"] = _latencies(itl, samples, (sample.itl_s for sample in samples))
    if (queue := targets.queue_per_unit) is not None:
        found["queue"] = [
            None if sample.waiting is None else sample.waiting / (queue * max(1, sample.units))
            for sample in samples
        ]
    if (ongoing := targets.ongoing_per_unit) is not None:
        found["ongoing"] = [
            None if sample.ongoing is None else sample.ongoing / (ongoing * max(1, sample.units))
            for sample in samples
        ]
    if (kv_use := targets.kv_use) is not None:
        found["kv_use"] = [
            None if sample.kv_use is None else sample.kv_use / kv_use for sample in samples
        ]
    if (imbalance := targets.imbalance) is not None:
        found["imbalance"] = [
            _idle(sample) if sample.imbalance is None else sample.imbalance / imbalance
            for sample in samples
        ]
    return found


def _latencies(
    target: LatencyTarget, samples: Sequence[Sample], seen: Iterable[dict[Percentile, float]]
) -> Ratios:
    percentile, seconds = target.percentile, target.seconds
    return [
        _idle(sample) if (value := told.get(percentile)) is None else value / seconds
        for sample, told in zip(samples, seen, strict=True)
    ]


def _idle(sample: Sample) -> float | None:
    return 0.0 if sample.load == 0 and sample.waiting == 0 else None


class LoadSeries(Section):
    """Mean load of each step of `step_s`; the last step is still open."""

    first: int = 0  # number of the first step: step k is from k * step_s on
    means: tuple[float, ...] = ()
    open_count: int = 0  # samples in the last step's mean

    def after(self, at_s: float, load: float, *, step_s: float, steps_max: int) -> "LoadSeries":
        """With one more sample. Steps without any repeat the mean before, up to a gap's limit."""
        step = int(at_s // step_s)
        gap = step - (self.first + len(self.means) - 1)
        if not self.means or gap > GAP_STEPS_MAX or gap < 0:
            return LoadSeries(first=step, means=(load,), open_count=1)
        if gap == 0:
            mean = self.means[-1] + (load - self.means[-1]) / (self.open_count + 1)
            return LoadSeries(
                first=self.first, means=(*self.means[:-1], mean), open_count=self.open_count + 1
            )
        means = (*self.means, *[self.means[-1]] * (gap - 1), load)[-steps_max:]
        return LoadSeries(first=step - len(means) + 1, means=means, open_count=1)

    @property
    def closed(self) -> tuple[float, ...]:
        """The steps that are over."""
        return self.means[:-1]


class Outlook(Section):
    """A forecast that is kept until the next step of the series is over."""

    step: int  # number of the step that was open
    forecaster: ForecasterName
    peak: float
    margin: float
    errors: dict[ForecasterName, float]


class AutoscaleState(Section):
    """What is remembered between samples; `AutoscaleState()` is the beginning."""

    samples: tuple[Sample, ...] = ()  # of `down_window_s`, same units, no operation
    since_s: float | None = None  # from when on `samples` is without a gap
    series: LoadSeries = LoadSeries()
    outlook: Outlook | None = None
    seen_s: float | None = None  # of the last sample
    up_s: float | None = None  # last decision to add
    down_s: float | None = None  # last decision to remove
    rebalance_s: float | None = None  # last decision to rebalance
