"""Whether a pool should grow, shrink or rebalance: one sample at a time, pure.

    state = AutoscaleState()
    decision, state = decide(policy, state, sample)      # for every sample

Two loops propose a number of units and the larger one counts:

- *reactive*: the worst median of a target's ratio (value over bound) over `window_s`; over 1, the
  pool grows by that ratio (the rule of Kubernetes' horizontal pod autoscaler), by `step_up_max` at
  most;
- *predictive*: the peak of the forecast plus its margin over `load_per_unit`.

It shrinks when over `down_window_s` no target's ratio reached `down_below`, what stays has room,
and the forecast agrees. An imbalance is rebalanced first; a shard is added where that did not
suffice. While an operation runs nothing is decided but to wait, and samples taken meanwhile, with
another number of units, or before a gap of over `window_s`, say nothing about the pool as it is:
windows begin anew.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any, Final, Literal

from remora.autoscale.autoscale_policy import SAMPLES_MAX, AutoscalePolicy, Predictive
from remora.autoscale.autoscale_sample import (
    AutoscaleState,
    Outlook,
    Ratios,
    Sample,
    ratios_of,
)
from remora.autoscale.forecast import best_forecast
from remora.comm.checked import Section

Verdict = Literal["keep", "wait", "rebalance", "scale"]
Effect = Literal["none", "advise", "act"]

EFFECTS: Final[dict[str, Effect]] = {"observe": "none", "advise": "advise", "act": "act"}
ROOM: Final = 0.9  # of a target that shrinking may lead to: below 1, lest it grows again at once
SHARED: Final = (
    "queue",
    "ongoing",
    "kv_use",
)  # ratios that grow as units / fewer units when units leave


class Decision(Section):
    """What to do now, and why.

    Attributes:
        effect: what the policy's mode lets the caller do with it.
        target_units: absolute; `units` unless the verdict is `scale`.
        inputs: what it was decided from, as JSON data.
    """

    verdict: Verdict
    effect: Effect
    units: int
    target_units: int
    reason: str
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signals:
    """What the windows say. Ratios are values over bounds."""

    now: dict[str, float]  # medians over `window_s` of those that are known
    highest: dict[str, float | None]  # maxima over `down_window_s`; None: not always known
    is_covered: bool  # the whole of `down_window_s` was seen
    need: int | None  # units that the forecast asks for


def decide(
    policy: AutoscalePolicy, state: AutoscaleState, sample: Sample
) -> tuple[Decision, AutoscaleState]:
    """What to do about the pool, and what to remember.

    A decision to scale or rebalance starts its cooldown whether or not the mode lets it be carried
    out: advice is repeated once a cooldown, not with every sample.
    """
    state = _before(policy, state, sample)
    if _is_old(state, sample):
        reason = f"the sample is of {sample.at_s:.3f} s, not after the last of {state.seen_s:.3f} s"
        return _decision(policy, sample, "wait", sample.units, reason, {}), state
    state = _remember(policy, state, sample)
    if policy.predictive is not None:
        outlook = _foresee(policy.predictive, state, sample)
        state = state.model_copy(update={"outlook": outlook})
    signals = _signals(policy, state, sample)
    verdict, target, reason = _judge(policy, state, sample, signals)
    inputs = _inputs(policy, state, sample, signals, target)
    decision = _decision(policy, sample, verdict, target, reason, inputs)
    return decision, _cooling(state, sample, decision)


def recall(
    policy: AutoscalePolicy, state: AutoscaleState, sample: Sample, decision: Decision
) -> AutoscaleState:
    """What `decide` remembers of a decision that is in a log, but for its forecast, which takes
    long to make and is made anew with the next sample."""
    state = _before(policy, state, sample)
    if _is_old(state, sample):
        return state
    return _cooling(_remember(policy, state, sample), sample, decision)


def _before(policy: AutoscalePolicy, state: AutoscaleState, sample: Sample) -> AutoscaleState:
    """The state, or none where the clock was set back: not to wait until it has come round."""
    is_back = state.seen_s is not None and (
        sample.at_s < state.seen_s - policy.reactive.down_window_s
    )
    return AutoscaleState() if is_back else state


def _is_old(state: AutoscaleState, sample: Sample) -> bool:
    return state.seen_s is not None and sample.at_s <= state.seen_s


def _cooling(state: AutoscaleState, sample: Sample, decision: Decision) -> AutoscaleState:
    """The state with the cooldown that a decision begins."""
    if decision.verdict not in ("rebalance", "scale"):
        return state
    field = "rebalance_s"
    if decision.verdict == "scale":
        field = "up_s" if decision.target_units > sample.units else "down_s"
    return state.model_copy(update={field: sample.at_s})


def _decision(
    policy: AutoscalePolicy,
    sample: Sample,
    verdict: Verdict,
    target: int,
    reason: str,
    inputs: dict[str, Any],
) -> Decision:
    is_action = verdict in ("scale", "rebalance")
    return Decision(
        verdict=verdict,
        effect=EFFECTS[policy.mode] if is_action else "none",
        units=sample.units,
        target_units=target,
        reason=reason,
        inputs=inputs,
    )


def _remember(policy: AutoscalePolicy, state: AutoscaleState, sample: Sample) -> AutoscaleState:
    """The state with the sample in its windows and the series."""
    now_s = sample.at_s
    since_s = state.since_s
    kept: tuple[Sample, ...] = ()
    if sample.operation is not None:
        since_s = None
    else:
        if since_s is None or _is_cut_off(policy, state, sample):
            since_s = now_s
        else:
            from_s = now_s - policy.reactive.down_window_s
            kept = state.samples[_first_after(from_s, state.samples) :]
        kept = (*kept, sample)
        if len(kept) > SAMPLES_MAX:
            kept = kept[-SAMPLES_MAX:]
            since_s = kept[0].at_s
    update: dict[str, Any] = {"samples": kept, "since_s": since_s, "seen_s": now_s}
    if (predictive := policy.predictive) is not None and sample.load is not None:
        update["series"] = state.series.after(
            now_s,
            sample.load,
            step_s=predictive.step_s,
            steps_max=predictive.history_steps,
        )
    return state.model_copy(update=update)


def _first_after(at_s: float, samples: Sequence[Sample]) -> int:
    return bisect_right(samples, at_s, key=lambda sample: sample.at_s)


def _is_cut_off(policy: AutoscalePolicy, state: AutoscaleState, sample: Sample) -> bool:
    """Whether the samples before this one say nothing of the pool as it is: it had another number
    of units, or it was not looked at for so long that what it did meanwhile is not known."""
    if not state.samples:
        return False
    last = state.samples[-1]
    return last.units != sample.units or sample.at_s - last.at_s > policy.reactive.window_s


def _foresee(predictive: Predictive, state: AutoscaleState, sample: Sample) -> Outlook | None:
    """The forecast, renewed when a step is over."""
    series = state.series
    step = int(sample.at_s // predictive.step_s)
    outlook = state.outlook
    if sample.load is not None and series.closed and (outlook is None or outlook.step != step):
        forecast = best_forecast(
            series.closed,
            # The step that is open is to be forecast, too.
            horizon=predictive.horizon_steps + 1,
            season=predictive.season_steps,
            names=predictive.forecasters,
            quantile=predictive.quantile,
        )
        outlook = Outlook(
            step=step,
            forecaster=forecast.forecaster,
            peak=forecast.peak,
            margin=forecast.margin,
            errors=dict(forecast.errors),
        )
    elif not series.closed or (outlook and step - outlook.step > predictive.horizon_steps):
        outlook = None  # the series began anew, or ended: its forecast says nothing any more
    return outlook


def _signals(policy: AutoscalePolicy, state: AutoscaleState, sample: Sample) -> _Signals:
    reactive, now_s, samples = policy.reactive, sample.at_s, state.samples
    ratios = ratios_of(policy, samples)
    first = _first_after(now_s - reactive.window_s, samples)
    now: dict[str, float] = {}
    for name, values in ratios.items():
        known = [value for value in values[first:] if value is not None]
        if len(known) >= reactive.samples_min:
            now[name] = median(known)
    need = None
    if policy.predictive is not None and state.outlook is not None:
        wanted = state.outlook.peak + state.outlook.margin
        need = max(policy.bounds.min_units, ceil(wanted / policy.predictive.load_per_unit))
    return _Signals(
        now=now,
        highest=_highest(samples, ratios) if samples else {},
        is_covered=state.since_s is not None and now_s - state.since_s >= reactive.down_window_s,
        need=need,
    )


def _highest(samples: Sequence[Sample], ratios: dict[str, Ratios]) -> dict[str, float | None]:
    """The largest ratio of each target; None: it was not always known.

    Who arrived and has no token yet is no unknown for long: a later sample has the latency. So
    only those samples count that no later one makes up for.
    """
    found: dict[str, float | None] = {}
    for name, values in ratios.items():
        unknown = values
        if name in ("ttft", "itl"):
            numbers = range(len(samples) - 1, -1, -1)
            told = (n for n in numbers if _is_told(name, samples[n], values[n]))
            unknown = values[next(told, -1) + 1 :]
        known = [value for value in values if value is not None]
        found[name] = None if None in unknown else max(known, default=0.0)
    return found


def _is_told(name: str, sample: Sample, ratio: float | None) -> bool:
    """Whether somebody's latency is in a sample; or, between tokens, that first tokens came and no
    second ones: answers may have one token each."""
    if name == "ttft":
        return bool(sample.ttft_s) and ratio is not None
    return bool(sample.ttft_s) or (bool(sample.itl_s) and ratio is not None)


def _judge(
    policy: AutoscalePolicy, state: AutoscaleState, sample: Sample, signals: _Signals
) -> tuple[Verdict, int, str]:
    """Verdict, absolute number of units, reason."""
    units, bounds = sample.units, policy.bounds
    if sample.operation is not None:
        return "wait", units, f"operation {sample.operation} runs"
    if _should_rebalance(policy, state, sample, signals):
        ratio = signals.now["imbalance"]
        return "rebalance", units, f"imbalance at {ratio:.2f} of its target: rebalance first"
    wanted, why = _wanted(policy, state, sample, signals)
    target = min(wanted, max(units, bounds.min_units) + bounds.step_up_max, policy.units_max)
    if target > units:
        left_s = _cooldown_left(policy.cooldowns.up_s, sample.at_s, state.up_s, state.down_s)
        if left_s > 0:
            return "wait", units, f"{why}; cooldown, {left_s:.0f} s to go"
        return "scale", target, why
    if wanted > units == policy.units_max:
        return "keep", units, f"{why}; but {policy.units_max} units are the most allowed"
    target, why = _fewer(policy, sample, signals)
    if target < units:
        left_s = _cooldown_left(policy.cooldowns.down_s, sample.at_s, state.up_s, state.down_s)
        if left_s > 0:
            return "wait", units, f"{why}; cooldown, {left_s:.0f} s to go"
        return "scale", target, why
    return "keep", units, why


def _cooldown_left(cooldown_s: float, now_s: float, *last_s: float | None) -> float:
    done = [at_s for at_s in last_s if at_s is not None]
    return cooldown_s - (now_s - max(done)) if done else 0.0


def _should_rebalance(
    policy: AutoscalePolicy, state: AutoscaleState, sample: Sample, signals: _Signals
) -> bool:
    """An imbalance over its target that has not lately been rebalanced; one shard has none."""
    if sample.units < 2 or signals.now.get("imbalance", 0.0) <= 1:
        return False
    last_s = state.rebalance_s
    return last_s is None or sample.at_s - last_s >= policy.cooldowns.rebalance_again_s


def _wanted(
    policy: AutoscalePolicy, state: AutoscaleState, sample: Sample, signals: _Signals
) -> tuple[int, str]:
    """Units that the worst of the targets or the forecast asks for, and why; no bound but one."""
    units, bounds = sample.units, policy.bounds
    wanted, why = units, "within all targets"
    if units < bounds.min_units:
        wanted, why = bounds.min_units, f"{units} units, at least {bounds.min_units} are wanted"
    ratios = {name: ratio for name, ratio in signals.now.items() if name != "imbalance"}
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        asked = max(units + 1, ceil(units * ratios[worst]))
        if ratios[worst] > 1 and asked > wanted:
            wanted, why = asked, f"{worst} at {ratios[worst]:.2f} of its target"
    if signals.now.get("imbalance", 0.0) > 1 and units >= 2 and wanted <= units:
        assert state.rebalance_s is not None, "an imbalance that was never rebalanced adds no shard"
        since_s = sample.at_s - state.rebalance_s
        # a shard that was added has as long to show as the rebalance had
        added_s = sample.at_s - (state.rebalance_s if state.up_s is None else state.up_s)
        if min(since_s, added_s) >= policy.cooldowns.rebalance_s:
            wanted = units + 1
            why = (
                f"imbalance at {signals.now['imbalance']:.2f} of its target,"
                f" though a rebalance was decided {since_s:.0f} s ago"
            )
    if signals.need is not None and signals.need > wanted and state.outlook is not None:
        wanted = signals.need
        why = (
            f"{state.outlook.forecaster} forecasts {state.outlook.peak:.4g}"
            f" + {state.outlook.margin:.4g} of load: {wanted} units"
        )
    return wanted, why


def _fewer(policy: AutoscalePolicy, sample: Sample, signals: _Signals) -> tuple[int, str]:
    """The fewest units that one step may leave, and why not fewer."""
    units, reactive, bounds = sample.units, policy.reactive, policy.bounds
    if units > policy.units_max:  # lowered since, or the budget was: holds whatever is asked for
        target = max(policy.units_max, units - bounds.step_down_max)
        return target, f"{units} units, at most {policy.units_max} are allowed"
    if signals.now.get("imbalance", 0.0) > 1:
        return units, f"imbalance at {signals.now['imbalance']:.2f} of its target: a rebalance acts"
    if units <= bounds.min_units:
        return units, "within all targets"
    if not signals.is_covered:
        return units, f"within all targets; not yet {reactive.down_window_s:g} s of samples"
    if policy.predictive is not None and signals.need is None:
        return units, "within all targets; no forecast: the load is not measured"
    highest = {name: value for name, value in signals.highest.items() if name != "imbalance"}
    unknown = [name for name, value in highest.items() if value is None]
    if unknown:
        return units, f"within all targets; not always measured: {', '.join(unknown)}"
    known = {name: value for name, value in highest.items() if value is not None}
    busy = [name for name, value in known.items() if value >= reactive.down_below]
    if busy:
        return units, f"within all targets, {', '.join(busy)} in use"
    target = max(bounds.min_units, units - bounds.step_down_max, signals.need or 0)
    shared = max([known[name] for name in SHARED if name in known], default=0.0)
    while target < units and shared * units / target > ROOM:
        target += 1
    if target >= units:
        return units, f"within all targets; {units} units are needed"
    top = max(known.values(), default=0.0)
    return target, f"no target above {top:.2f} for {reactive.down_window_s:g} s"


def _inputs(
    policy: AutoscalePolicy,
    state: AutoscaleState,
    sample: Sample,
    signals: _Signals,
    target: int,
) -> dict[str, Any]:
    """What the decision was made from, besides the sample itself."""
    inputs: dict[str, Any] = {
        "ratio_median": signals.now,
        "ratio_max": signals.highest,
        "samples": len(state.samples),
    }
    if state.outlook is not None:
        inputs["forecast"] = {**state.outlook.model_dump(), "units": signals.need}
    if policy.cost is not None:
        inputs["cost_per_hour"] = [policy.cost.per_hour(n) for n in (sample.units, target)]
    return inputs
