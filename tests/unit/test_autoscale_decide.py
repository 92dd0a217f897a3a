"""The decision: both loops, hysteresis, cooldown, order of remedies, and what holds always."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.autoscaling import BASE, decisions_of, policy_of, sample_of

from remora.autoscale.autoscale_policy import SAMPLES_MAX, AutoscalePolicy
from remora.autoscale.autoscale_sample import AutoscaleState, Sample
from remora.autoscale.autoscaler import Decision, decide
from remora.autoscale.decision_lines import decision_line, recalled, replay, start_line


def last(policy: AutoscalePolicy, samples: list[Sample]) -> Decision:
    return decisions_of(policy, samples)[0][-1]


def every(step_s: float, count: int, start_s: float = 0.0, **fields: Any) -> list[Sample]:
    return [sample_of(start_s + step_s * n, **fields) for n in range(count)]


@pytest.mark.parametrize(
    ("fields", "target", "word"),
    [
        ({"waiting": 30}, 3, "queue at 1.50"),
        ({"waiting": 35}, 4, "queue at 1.75"),
        ({"waiting": 1000}, 6, "queue at 50.00"),  # step_up_max
        ({"kv_use": 0.9}, 3, "kv_use at 1.12"),
        ({"ttft_s": {"p99": 4.1}}, 5, "ttft at 2.05"),
        ({"ttft_s": {"p50": 9.0}}, 2, "within"),  # another percentile than the target's
    ],
)
def test_grows_by_the_ratio_of_the_worst_target(
    fields: dict[str, Any], target: int, word: str
) -> None:
    decision = last(policy_of(), every(10, 3, **fields))
    assert (decision.target_units, decision.units) == (target, 2)
    assert word in decision.reason
    assert decision.verdict == ("scale" if target > 2 else "keep")


def test_one_bad_sample_does_not_grow_and_too_few_say_nothing() -> None:
    spike = [*every(10, 2), sample_of(20, waiting=500)]
    assert last(policy_of(), spike).verdict == "keep"
    assert last(policy_of(), every(10, 2, waiting=500)).verdict == "keep"
    assert last(policy_of(), every(10, 3, waiting=500)).verdict == "scale"


@pytest.mark.parametrize(("mode", "effect"), [("observe", "none"), ("advise", "advise")])
def test_modes_change_what_may_be_done_not_what_is_decided(mode: str, effect: str) -> None:
    samples = every(10, 12, waiting=30)
    acted, _ = decisions_of(policy_of(), samples)
    told, _ = decisions_of(policy_of(mode=mode), samples)
    assert [d.target_units for d in acted] == [d.target_units for d in told]
    assert {d.effect for d in told if d.verdict == "scale"} == {effect}
    assert {d.effect for d in acted if d.verdict == "scale"} == {"act"}
    assert {d.effect for d in acted if d.verdict != "scale"} == {"none"}


def test_cooldown_lets_one_decision_through() -> None:
    made, _ = decisions_of(policy_of(), every(10, 12, waiting=30))
    assert [n for n, d in enumerate(made) if d.verdict == "scale"] == [2, 8], "60 s apart"
    assert "cooldown, 50 s to go" in made[3].reason and made[3].verdict == "wait"


def test_never_acts_while_an_operation_runs_nor_on_samples_from_meanwhile() -> None:
    busy = every(10, 6, waiting=500, operation="op-7")
    made, state = decisions_of(policy_of(), busy)
    assert {d.verdict for d in made} == {"wait"} and "op-7" in made[0].reason
    made, _ = decisions_of(policy_of(), every(10, 3, 60, waiting=500), state)
    assert [d.verdict for d in made] == ["keep", "keep", "scale"], "the window begins anew"


def test_samples_of_another_number_of_units_do_not_count() -> None:
    samples = [*every(10, 2, waiting=500), *every(10, 2, 20, units=3, waiting=500)]
    assert [d.verdict for d in decisions_of(policy_of(), samples)[0]] == ["keep"] * 4


def test_shrinks_only_after_a_whole_quiet_window() -> None:
    made, _ = decisions_of(policy_of(), every(10, 14))
    first = next(n for n, d in enumerate(made) if d.verdict == "scale")
    assert first == 12, "120 s after the first sample"
    assert (made[first].units, made[first].target_units) == (2, 1)
    disturbed = [*every(10, 6), sample_of(60, waiting=13), *every(10, 12, 70)]
    made, _ = decisions_of(policy_of(), disturbed)
    assert [n for n, d in enumerate(made) if d.verdict == "scale"] == [18], "120 s after it"


def test_a_time_without_samples_is_not_a_quiet_one() -> None:
    """A coordinator that was busy or stopped: what came meanwhile was not seen."""
    for gap_s, since_s in ((40.0, 100.0), (1000.0, 1060.0), (30.0, 0.0)):
        samples = [*every(10, 7), *every(10, 13, 60.0 + gap_s)]
        made, _ = decisions_of(policy_of(), samples)
        first = next(n for n, d in enumerate(made) if d.verdict == "scale")
        assert samples[first].at_s == since_s + 120, f"a whole window after {gap_s} s without any"


@pytest.mark.parametrize(("seconds", "verdict"), [(1.21, "keep"), (1.19, "scale")])
def test_a_latency_near_its_target_keeps_the_pool(seconds: float, verdict: str) -> None:
    """0.6 of 2 s is the line; one sample over it counts for the whole window."""
    samples = [*every(10, 12), sample_of(120, ttft_s={"p99": seconds})]
    assert last(policy_of(), samples).verdict == verdict


def test_does_not_shrink_into_what_would_grow_it_again() -> None:
    tight = last(policy_of(), every(10, 13, kv_use=0.4))  # 0.5 of the target; 1.0 with one unit
    assert tight.verdict == "keep" and "2 units are needed" in tight.reason
    wide = last(policy_of(), every(10, 13, units=4, kv_use=0.4))  # 0.67 with three
    assert (wide.verdict, wide.target_units) == ("scale", 3)


def test_what_is_not_measured_does_not_shrink_a_pool_unless_it_is_idle() -> None:
    unknown = last(policy_of(), every(10, 13, ttft_s={}))
    assert unknown.verdict == "keep" and "not always measured: ttft" in unknown.reason
    idle = last(policy_of(), every(10, 13, ttft_s={}, load=0))
    assert idle.target_units == 1


def test_who_arrived_just_before_a_sample_keeps_no_pool_large() -> None:
    """A pool with little to do: a request now and then whose first token comes after the sample."""
    late = [sample_of(10.0 * n, load=1.0 if n % 4 == 2 else 0.0, ttft_s={}) for n in range(14)]
    came = [
        sample.model_copy(update={"ttft_s": {"p99": 0.1}}) if n % 4 == 3 else sample
        for n, sample in enumerate(late)
    ]
    made, _ = decisions_of(policy_of(), came)
    assert [n for n, d in enumerate(made) if d.verdict == "scale"] == [12]
    waits, _ = decisions_of(policy_of(), [*came[:11], *late[11:]])
    assert {d.verdict for d in waits} == {"keep"}, "its first token has not come yet"
    assert "not always measured: ttft" in waits[-1].reason
    slow = sample_of(110, ttft_s={"p99": 1.9})
    made, _ = decisions_of(policy_of(), [*came[:11], slow, *came[12:]])
    assert {d.verdict for d in made} == {"keep"}, "and it had waited long"


def test_answers_of_one_token_have_nothing_between_tokens() -> None:
    targets = {"itl": {"percentile": "p99", "seconds": 0.1}}
    policy = policy_of(targets=targets)
    assert last(policy, every(10, 13)).target_units == 1
    stuck = last(policy, every(10, 13, ttft_s={}))
    assert stuck.verdict == "keep" and "not always measured: itl" in stuck.reason
    decoding = [*every(10, 6), sample_of(60, itl_s={"p99": 0.09}), *every(10, 6, 70)]
    assert last(policy, decoding).verdict == "keep", "some answers are longer, and slow"


def test_bounds_hold_whatever_is_asked_for() -> None:
    full = last(policy_of(), every(10, 3, units=8, waiting=5000))
    assert full.verdict == "keep" and "8 units are the most allowed" in full.reason
    lowered = policy_of(bounds={"min_units": 1, "max_units": 3})
    over = last(lowered, every(10, 1, units=8, waiting=5000))
    assert (over.verdict, over.target_units) == ("scale", 7)
    raised = policy_of(bounds={"min_units": 4, "max_units": 8})
    assert last(raised, every(10, 1, units=1)).target_units == 4
    assert last(raised, every(10, 13, units=4)).verdict == "keep"


IMBALANCE = {**BASE["targets"], "imbalance": 1.5}


def test_rebalances_first_and_adds_a_shard_second() -> None:
    policy = policy_of(targets=IMBALANCE)
    assert last(policy, every(10, 3, imbalance=2.0, waiting=90)).verdict == "rebalance"
    made, state = decisions_of(policy, every(10, 3, imbalance=2.0))
    assert (made[-1].verdict, made[-1].target_units) == ("rebalance", 2)
    assert "rebalance first" in made[-1].reason
    made, state = decisions_of(policy, every(10, 6, 30, imbalance=2.0), state)
    assert [d.verdict for d in made] == ["keep"] * 5 + ["scale"], "60 s for it to show"
    assert made[-1].target_units == 3 and "a rebalance was decided 60 s ago" in made[-1].reason
    made, _ = decisions_of(policy, every(10, 3, 620, units=3, imbalance=2.0), state)
    assert made[-1].verdict == "rebalance", "600 s later it is tried again"


def test_a_shard_that_was_added_has_time_to_show_before_another_is() -> None:
    policy = policy_of(targets=IMBALANCE, cooldowns={**BASE["cooldowns"], "up_s": 10})
    state, units, added_s = AutoscaleState(), 2, []
    for number in range(30):
        sample = sample_of(10.0 * number, units=units, imbalance=2.0)
        decision, state = decide(policy, state, sample)
        if decision.verdict == "scale":
            added_s.append(sample.at_s)
        units = decision.target_units
    assert added_s == [80, 140, 200, 260], "rebalanced at 20 s, then 60 s for each"


def test_while_a_rebalance_is_to_show_a_queue_still_grows_the_pool() -> None:
    policy = policy_of(targets=IMBALANCE)
    _, state = decisions_of(policy, every(10, 3, imbalance=2.0))
    made, _ = decisions_of(policy, every(10, 3, 30, imbalance=2.0, waiting=90), state)
    (grown,) = [decision for decision in made if decision.verdict == "scale"]
    assert "queue" in grown.reason


def test_one_shard_has_no_balance_to_find() -> None:
    decision = last(policy_of(targets=IMBALANCE), every(10, 3, units=1, imbalance=2.0))
    assert decision.verdict == "keep"


PREDICTIVE = {"load_per_unit": 100, "horizon_s": 60, "step_s": 20, "season_s": 200}


def test_the_forecast_grows_the_pool_before_any_target_is_missed() -> None:
    policy = policy_of(predictive=PREDICTIVE)
    ramp = [sample_of(10.0 * n, load=50 + 3.0 * n) for n in range(60)]
    made, _ = decisions_of(policy, ramp)
    first = next(n for n, d in enumerate(made) if d.verdict == "scale")
    assert made[first].target_units == 3
    assert ramp[first].load is not None and ramp[first].load < 200, "two units serve 200"
    assert "holt forecasts" in made[first].reason
    assert made[first].inputs["forecast"]["units"] == 3


def test_the_forecast_keeps_a_pool_that_looks_idle() -> None:
    policy = policy_of(predictive=PREDICTIVE)
    assert last(policy, every(10, 20, load=150)).verdict == "keep"
    assert last(policy_of(), every(10, 13, load=150)).verdict == "scale", "reactive alone"
    blind = last(policy, every(10, 20, load=None))
    assert blind.verdict == "keep" and "the load is not measured" in blind.reason


def test_a_season_is_known_the_second_time() -> None:
    """A burst of each tenth step: grown for before it comes, from the second on."""
    policy = policy_of(predictive={**PREDICTIVE, "horizon_s": 40})
    loads = [350.0 if step % 10 == 7 else 50.0 for step in range(60)]
    state, target_before = AutoscaleState(), []
    for step, load in enumerate(loads):
        decision, state = decide(policy, state, sample_of(20.0 * step + 1, units=1, load=load))
        if step % 10 == 6:
            target_before.append(decision.inputs.get("forecast", {}).get("units"))
    assert target_before[0] == 1 and target_before[-1] == 4


def test_a_long_gap_begins_the_series_anew() -> None:
    policy = policy_of(predictive=PREDICTIVE)
    _, short = decisions_of(policy, [*every(20, 5), sample_of(80 + 20 * 20)])
    assert len(short.series.means) == 25 and short.outlook is not None
    _, long = decisions_of(policy, [*every(20, 5), sample_of(80 + 20 * 21)])
    assert len(long.series.means) == 1 and long.outlook is None


def test_a_sample_that_is_not_newer_changes_nothing() -> None:
    policy = policy_of()
    _, state = decisions_of(policy, every(10, 3))
    decision, after = decide(policy, state, sample_of(20, waiting=500))
    assert decision.verdict == "wait" and "not after the last" in decision.reason
    assert after == state


def test_a_clock_that_was_set_back_is_not_waited_for() -> None:
    policy = policy_of(predictive=PREDICTIVE)
    lines = [start_line(policy, AutoscaleState())]
    samples = [*every(10, 20, 10_000), *every(10, 9, 6_400, waiting=500)]
    made, state = decisions_of(policy, samples)
    assert [d.verdict for d in made[20:23]] == ["keep", "keep", "scale"], "it begins anew"
    assert state.since_s == 6_400
    lines += [decision_line(*pair) for pair in zip(samples, made, strict=True)]
    assert replay(lines).num_differences == 0
    made, _ = decisions_of(policy, [*every(10, 3, 500), *every(10, 3, 490)])
    assert [d.verdict for d in made[3:]] == ["wait", "wait", "wait"], "a little is waited for"


def test_the_state_stays_small() -> None:
    _, state = decisions_of(
        policy_of(predictive=PREDICTIVE), every(0.01, SAMPLES_MAX + 50, kv_use=0.7)
    )
    assert len(state.samples) <= SAMPLES_MAX
    _, state = decisions_of(policy_of(predictive=PREDICTIVE), every(20, 300))
    assert len(state.series.means) == 20 + 16 * 3


samples_drawn = st.lists(
    st.builds(
        dict,
        gap_s=st.sampled_from([1.0, 10.0, 35.0, 500.0]),
        operation=st.sampled_from([None, None, None, "op"]),
        waiting=st.sampled_from([None, 0, 8, 60, 900]),
        kv_use=st.sampled_from([None, 0.1, 0.7, 1.0]),
        imbalance=st.sampled_from([None, 1.0, 3.0]),
        load=st.sampled_from([None, 0.0, 40.0, 700.0]),
        ttft_s=st.sampled_from([{}, {"p99": 0.1}, {"p99": 5.0}]),
    ),
    max_size=60,
)


@settings(max_examples=40)
@given(samples_drawn, st.integers(0, 10))
def test_what_holds_always(drawn: list[dict[str, Any]], units: int) -> None:
    """Bounds, steps, cooldowns, no action in an operation, and the log replays; the pool obeys."""
    policy = policy_of(
        targets={**BASE["targets"], "imbalance": 1.5},
        predictive=PREDICTIVE,
        cost={"host_hour": 1, "budget_per_hour": 6},
    )
    state, at_s, acted_s = AutoscaleState(), 0.0, -1e9
    lines = [start_line(policy, state)]
    for fields in drawn:
        at_s += fields["gap_s"]
        named = {name: value for name, value in fields.items() if name != "gap_s"}
        sample = Sample(at_s=at_s, units=units, **named)
        decision, state = decide(policy, state, sample)
        lines.append(decision_line(sample, decision))
        if decision.verdict != "scale":
            assert decision.target_units == units
            assert decision.verdict != "rebalance" or (units >= 2 and sample.operation is None)
            continue
        assert sample.operation is None and decision.target_units != units
        is_up = decision.target_units > units
        assert at_s - acted_s >= (60 if is_up else 120)
        assert decision.target_units <= 6 or not is_up
        assert decision.target_units >= 1
        assert -1 <= decision.target_units - units <= 5  # from 0: to min_units and a step
        units, acted_s = decision.target_units, at_s
    remembered = recalled(lines, policy)
    assert remembered.model_copy(update={"outlook": state.outlook}) == state
    if drawn:
        assert replay(lines).num_differences == 0
        half = len(lines) // 2
        assert replay(lines[: half + 2]).num_differences == 0
