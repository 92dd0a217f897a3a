"""Samples from what ingresses count."""

import random
from typing import Any

import msgspec
import pytest

from remora.autoscale.ingress_load import (
    GroupLoad,
    IngressLoad,
    LatencyBins,
    LoadMeter,
    LoadTotals,
    percentile_of,
)


def told(source: str = "a", **fields: Any) -> IngressLoad:
    given: dict[str, Any] = {
        "arrived": 0, "accepted": 0, "prompt_tokens": 0, "ended": 0, "generated_tokens": 0,
        "ttft": {}, "itl": {}, "groups": {},
    }  # fmt: skip
    return IngressLoad(source=source, **{**given, **fields})


def group(waiting: int = 0, used: int = 0, total: int = 10, **loads: float) -> GroupLoad:
    return GroupLoad(waiting=waiting, kv_used=used, kv_total=total, shard_load=loads)


def test_a_percentile_is_within_half_a_bin_of_the_true_one() -> None:
    rng = random.Random(1)
    seconds = sorted(rng.lognormvariate(-2, 1.5) for _ in range(2000))
    bins = LatencyBins()
    for each in seconds:
        bins.observe(each)
    for share in (0.5, 0.9, 0.99, 1.0):
        true = seconds[max(0, round(share * len(seconds)) - 1)]
        assert percentile_of(bins.counts, share) == pytest.approx(true, rel=0.026)
    assert percentile_of({}, 0.5) is None
    bins = LatencyBins()
    for each in (0.0, 1e-9, 1e9):
        bins.observe(each)
    assert len(bins.counts) == 2, "out of range is counted at the ends"


def test_a_sample_is_what_came_since_the_last_one_of_all_ingresses() -> None:
    meter = LoadMeter(fresh_s=15.0)
    meter.report(told("a", arrived=100, accepted=100, prompt_tokens=1000, ended=50,
                      generated_tokens=250, ttft={10: 90}), 0.0)  # fmt: skip
    first = meter.sample(1.0, units=2, operation=None)
    assert first.load is None and first.ttft_s == {}, "what it counted before is of no interval"
    meter.report(told("a", arrived=120, accepted=110, prompt_tokens=1100, ended=60,
                      generated_tokens=425, ttft={10: 95}), 5.0)  # fmt: skip
    meter.report(told("b", arrived=7), 5.0)
    second = meter.sample(6.0, units=3, operation="op")
    # 20 sequences in 5 s, of 10 prompt and 5 output tokens each; b's 7 came before it was known
    assert second.load == pytest.approx(20 * 15 / 5)
    assert set(second.ttft_s) == {"p50", "p90", "p95", "p99"}
    assert (second.units, second.operation) == (3, "op")
    assert meter.sample(7.0, units=3, operation=None).load == second.load, "as it was told last"


def test_samples_between_two_reports_do_not_see_an_idle_pool() -> None:
    """Reports and samples have the same period and clocks of their own: at times no report falls
    between two samples, and two between the next."""
    meter = LoadMeter(fresh_s=15.0)
    reports_s = [0.1, 5.1, 10.2, 14.9, 20.1, 24.8]
    loads, waits = [], 0
    for number in range(6):
        for at_s in [at_s for at_s in reports_s if 5 * (number - 1) < at_s <= 5 * number]:
            n = round(20 * at_s)
            meter.report(told(arrived=n, accepted=n, prompt_tokens=30 * n, ended=n), at_s)
            waits += 1
        loads.append(meter.sample(5.0 * number, units=1, operation=None).load)
    assert waits == len(reports_s)
    assert loads[:2] == [None, None] and loads[2:] == pytest.approx([600.0] * 4)


def test_the_first_sequences_of_a_deployment_are_not_taken_for_one() -> None:
    """10 a second of 100 prompt and 1,000 output tokens, 20 tokens a second each: before 50 s are
    over none has ended, and until then what is offered is not known to be more than twice that."""
    meter, true = LoadMeter(fresh_s=15.0), 10 * 1100.0
    meter.report(told(), 0.0)
    meter.sample(0.0, units=1, operation=None)
    seen = []
    for at_s in range(5, 305, 5):
        ages_s = [at_s - number / 10 for number in range(10 * at_s)]
        got = [min(1000, int(20 * age_s)) for age_s in ages_s]
        meter.report(
            told(
                arrived=len(got), accepted=len(got), prompt_tokens=100 * len(got),
                ended=got.count(1000), generated_tokens=sum(got),
            ),
            float(at_s),
        )  # fmt: skip
        load = meter.sample(float(at_s), units=1, operation=None).load
        assert load is not None
        seen.append(load / true)
    assert max(seen) < 1.1 and seen[-1] == pytest.approx(1.0, abs=0.02), seen


def test_groups_are_counted_once_and_shards_compared() -> None:
    meter = LoadMeter(fresh_s=15.0)
    old = {"dense-0": group(waiting=9, used=9)}
    new = {
        "dense-0": group(waiting=2, used=3, s0=1.5, s1=0.5),
        "dense-1": group(waiting=1, used=1, s0=1.0, s1=1.0),
    }
    meter.report(told("b", groups=new), 0.0)
    meter.report(told("a", groups=old), 1.0)
    meter.report(told("b", groups=new, generated_tokens=1), 2.0)
    sample = meter.sample(3.0, units=2, operation=None)
    assert (sample.waiting, sample.kv_use) == (3, 4 / 20), "who reported last knows best"
    assert sample.imbalance == pytest.approx(1.25)


def test_an_idle_pool_has_no_imbalance_left_over() -> None:
    meter = LoadMeter(fresh_s=15.0)
    hot = {"dense-0": group(s0=1.8, s1=0.2)}
    seen = []
    for number, tokens in enumerate((0, 50, 90, 90, 90)):
        meter.report(told(accepted=1, generated_tokens=tokens, groups=hot), 5.0 * number)
        seen.append(meter.sample(5.0 * number, units=2, operation=None).imbalance)
    assert seen == [None, 1.8, 1.8, None, None]


def test_an_ingress_that_is_gone_says_nothing_any_more() -> None:
    meter = LoadMeter(fresh_s=15.0)
    meter.report(told("a", groups={"dense-0": group(waiting=5)}), 0.0)
    assert meter.sample(10.0, units=1, operation=None).waiting == 5
    gone = meter.sample(20.0, units=1, operation=None)
    assert gone.waiting is None and gone.load is None and meter.sources == 0
    meter.report(told("a", arrived=5, accepted=5, prompt_tokens=50), 21.0)
    assert meter.sample(22.0, units=1, operation=None).load is None, "known anew from here on"
    meter.report(told("a", arrived=5, accepted=5, prompt_tokens=50), 26.0)
    assert meter.sample(27.0, units=1, operation=None).load == 0.0


def test_totals_travel_whole() -> None:
    totals = LoadTotals()
    totals.arrived += 3
    totals.ttft.observe(0.5)
    load = totals.told("x", {"dense-0": group(waiting=1, s0=1.0)})
    totals.ttft.observe(0.5)
    assert sum(load.ttft.values()) == 1, "what is told does not change"
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(load), type=IngressLoad)
    assert again == load
