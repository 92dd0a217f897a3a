"""`AutoscalePolicy`: what a pool should hold to, as a YAML file (docs/autoscaling.md).

A policy is for one pool of like units: expert shards, dense groups or ingress replicas. All times
are seconds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from remora.autoscale.forecast import ForecasterName
from remora.autoscale.library_forecast import LIBRARY, check_installed
from remora.comm.checked import Section, parse_section, yaml_mapping
from remora.comm.errors import ConfigError

POLICY_BYTES_MAX = 1 << 16
SAMPLES_MAX = 1024  # remembered; the oldest go first, and windows are as long as what is left
SAMPLE_EVERY_MIN_S, SAMPLE_EVERY_MAX_S = 0.1, 300.0  # that a configuration may say
GAP_STEPS_MAX = 20  # steps without a sample that are filled in; after more the series begins anew
HISTORY_MAX = 8192  # steps of load that a forecast is made from

Percentile = Literal["p50", "p90", "p95", "p99"]
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Window = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Cooldown = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Units = Annotated[int, Field(ge=1, le=4096)]
Money = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class LatencyTarget(Section):
    """A percentile of a latency and its bound."""

    percentile: Percentile = "p99"
    seconds: Seconds


class Targets(Section):
    """What is held to; at least one. A target left out is not looked at."""

    ttft: LatencyTarget | None = None  # time to first token
    itl: LatencyTarget | None = None  # inter-token latency
    queue_per_unit: Annotated[float, Field(gt=0, le=1e6)] | None = None  # requests that wait
    ongoing_per_unit: Annotated[float, Field(gt=0, le=1e6)] | None = None  # requests under way
    kv_use: Annotated[float, Field(gt=0, le=1)] | None = None  # share of KV pages in use
    imbalance: Annotated[float, Field(gt=1, le=4096)] | None = None  # largest / mean shard load

    @model_validator(mode="after")
    def _some(self) -> "Targets":
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"at least one of {', '.join(type(self).model_fields)} is needed")
        return self


class Bounds(Section):
    """How many units there may be, and how many may come or go by one decision."""

    min_units: Units = 1
    max_units: Units
    step_up_max: Units = 4
    step_down_max: Units = 1

    @model_validator(mode="after")
    def _in_order(self) -> "Bounds":
        if self.min_units > self.max_units:
            raise ValueError(f"min_units = {self.min_units} is above max_units = {self.max_units}")
        return self


class Reactive(Section):
    """From what is measured now. Up on a median, down on a maximum over a longer time."""

    window_s: Window = 30.0  # its median over a target: more units
    samples_min: Annotated[int, Field(ge=1, le=1000)] = 3  # in the window
    down_window_s: Window = 300.0  # its maxima all under `down_below` of their targets: fewer
    down_below: Annotated[float, Field(gt=0, lt=1)] = 0.6  # share of a target

    @model_validator(mode="after")
    def _longer_down(self) -> "Reactive":
        if self.down_window_s < self.window_s:
            raise ValueError(
                f"down_window_s = {self.down_window_s:g} is below window_s = {self.window_s:g}:"
                " a pool shrinks more slowly than it grows"
            )
        return self


class Cooldowns(Section):
    """Seconds after a decision in which another of the kind is not made."""

    up_s: Cooldown = 30.0  # after either; before more units
    down_s: Cooldown = 300.0  # after either; before fewer
    rebalance_s: Cooldown = 120.0  # for a rebalance, or a unit added after it, to show
    rebalance_again_s: Cooldown = 1800.0  # after this, an imbalance is rebalanced first again

    @model_validator(mode="after")
    def _in_order(self) -> "Cooldowns":
        if self.rebalance_again_s < self.rebalance_s:
            raise ValueError(
                f"rebalance_again_s = {self.rebalance_again_s:g} is below rebalance_s ="
                f" {self.rebalance_s:g}: units would never be added for an imbalance"
            )
        return self


class Predictive(Section):
    """From a forecast of the offered load; adds to the reactive loop, never overrules it."""

    load_per_unit: Annotated[float, Field(gt=0, le=1e12)]  # that a unit serves within the targets
    horizon_s: Seconds = 120.0  # how far ahead: at least what a new unit takes to serve
    step_s: Seconds = 30.0  # of the series
    season_s: Seconds = 86400.0
    quantile: Annotated[float, Field(ge=0.5, lt=1)] = 0.9  # of back-test errors, kept as margin
    forecasters: tuple[ForecasterName, ...] = ("seasonal_naive", "moving_average", "holt")

    @model_validator(mode="after")
    def _whole(self) -> "Predictive":
        if self.horizon_s < self.step_s or self.season_s < self.step_s:
            raise ValueError("horizon_s and season_s must be at least step_s")
        if self.history_steps > HISTORY_MAX or self.horizon_steps > HISTORY_MAX // 16:
            raise ValueError(
                f"two seasons and 16 horizons of step_s must fit in {HISTORY_MAX} steps, these are"
                f" {self.history_steps}: make step_s larger"
            )
        if "seasonal_naive" not in self.forecasters:
            raise ValueError("forecasters: seasonal_naive is the floor and cannot be left out")
        check_installed(self.forecasters)
        return self

    @property
    def horizon_steps(self) -> int:
        """Steps ahead, rounded up."""
        return -int(-self.horizon_s // self.step_s)

    @property
    def season_steps(self) -> int:
        """Steps of a season."""
        return max(1, round(self.season_s / self.step_s))

    @property
    def history_steps(self) -> int:
        """Steps kept: two seasons, and room to back-test."""
        return 2 * self.season_steps + 16 * self.horizon_steps


class Cost(Section):
    """What hosts cost; the budget is one more bound."""

    host_hour: Money  # in any one currency
    units_per_host: Units = 1
    budget_per_hour: Money | None = None

    def per_hour(self, units: int) -> float:
        """Of the hosts of `units` units."""
        return -(-units // self.units_per_host) * self.host_hour


class AutoscalePolicy(Section):
    """One pool's policy."""

    kind: Literal["AutoscalePolicy"]
    version: Literal[1]
    pool: Literal["experts", "dense", "ingress"]
    mode: Literal["observe", "advise", "act"] = "advise"
    targets: Targets
    bounds: Bounds
    reactive: Reactive = Reactive()
    cooldowns: Cooldowns = Cooldowns()
    predictive: Predictive | None = None  # None: reactive alone
    cost: Cost | None = None

    @model_validator(mode="after")
    def _fits_the_pool(self) -> "AutoscalePolicy":
        if self.targets.imbalance is not None and self.pool != "experts":
            raise ValueError(f"targets.imbalance: only pool experts has one, not {self.pool}")
        if self.pool == "ingress":
            check_ingress(self)
        elif self.targets.ongoing_per_unit is not None:
            raise ValueError(f"targets.ongoing_per_unit: only of pool ingress, not {self.pool}")
        if self.units_max < self.bounds.min_units:
            raise ValueError(
                f"cost.budget_per_hour pays for {self.units_max} units, below bounds.min_units ="
                f" {self.bounds.min_units}"
            )
        least_s, most_s = sampling(self)
        if least_s > most_s:
            check_windows(self, most_s)
        return self

    @property
    def units_max(self) -> int:
        """The upper bound, the budget included."""
        cost = self.cost
        if cost is None or cost.budget_per_hour is None or cost.host_hour == 0:
            return self.bounds.max_units
        # 0.3 / 0.1 is just below 3
        paid = int(cost.budget_per_hour / cost.host_hour + 1e-9) * cost.units_per_host
        return min(self.bounds.max_units, paid)


def parse_policy(data: dict[str, Any], *, source: str = "policy") -> AutoscalePolicy:
    """A checked policy. Raises ConfigError: unknown key, or a value out of range."""
    return parse_section(data, AutoscalePolicy, source=source)


def read_policy(path: Path) -> AutoscalePolicy:
    """The policy of a YAML file.

    Raises:
        ConfigError: not readable, over `POLICY_BYTES_MAX`, or as `parse_policy`.
    """
    try:
        size = path.stat().st_size
        if size > POLICY_BYTES_MAX:
            raise ConfigError(f"{path}: {size} bytes; a policy has at most {POLICY_BYTES_MAX}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the policy: {error}") from None
    return parse_policy(yaml_mapping(text, str(path)), source=str(path))


def check_ingress(policy: AutoscalePolicy) -> None:
    """Ray Serve measures the requests under way, and calls a policy from its control loop.

    Raises:
        ValueError: another target.
    """
    others = policy.targets.model_dump(exclude_none=True).keys() - {"ongoing_per_unit"}
    if others:
        raise ValueError(
            f"pool ingress: targets.{min(others)} is not measured there; allowed: ongoing_per_unit"
        )
    slow = set(policy.predictive.forecasters) & LIBRARY.keys() if policy.predictive else set()
    if slow:
        raise ValueError(
            f"pool ingress: forecasters {', '.join(sorted(slow))} take seconds, and Serve's control"
            " loop would wait for them"
        )


def sampling(policy: AutoscalePolicy) -> tuple[float, float]:
    """Least and most seconds between samples that a policy's windows can be filled by; the least is
    above the most where none can."""
    reactive, predictive = policy.reactive, policy.predictive
    # after a gap of over `window_s` windows begin anew, so two must fit, even if one is enough
    most_s = reactive.window_s / max(2, reactive.samples_min)
    if predictive is not None:
        most_s = min(most_s, GAP_STEPS_MAX * predictive.step_s)
    least_s = max(SAMPLE_EVERY_MIN_S, reactive.down_window_s / SAMPLES_MAX)
    return least_s, min(most_s, SAMPLE_EVERY_MAX_S)


def check_windows(policy: AutoscalePolicy, sample_every_s: float) -> None:
    """Whether a policy's windows can be filled by samples that come so often.

    Raises:
        ValueError: they would never hold enough of them, or too many.
    """
    least_s, most_s = sampling(policy)
    if least_s <= sample_every_s <= most_s * (1 + 1e-9):  # 1.2 / 3 is just below 0.4
        return
    reactive, predictive = policy.reactive, policy.predictive
    limits = [
        f"at least {least_s:.4g}, as a window of down_window_s = {reactive.down_window_s:g} takes"
        f" at most {SAMPLES_MAX} samples",
        f"at most {most_s:.4g}, as window_s = {reactive.window_s:g} must hold"
        f" {max(2, reactive.samples_min)} samples (samples_min = {reactive.samples_min})",
    ]
    if predictive is not None:
        limits[-1] += (
            f" and a forecast from steps of step_s = {predictive.step_s:g} bridges"
            f" {GAP_STEPS_MAX} of them"
        )
    if least_s > most_s:
        raise ValueError("no autoscale.sample_every_s fits: " + ", and ".join(limits))
    limit = limits[0] if sample_every_s < least_s else limits[1]
    raise ValueError(f"sample_every_s = {sample_every_s:g}: {limit}")


def check_live(policy: AutoscalePolicy, sample_every_s: float) -> None:
    """Whether a running deployment can hold to a policy, sampled so often.

    Raises:
        ValueError: as `check_windows`, or a pool that nobody resizes.
    """
    check_windows(policy, sample_every_s)
    if policy.pool == "ingress":
        raise ValueError("pool ingress is Ray Serve's: http.autoscale takes its policy")
