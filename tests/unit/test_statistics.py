"""Histories of traffic against a dumb recount, their bounds, and sketches that lie.

Shape suffixes as in comm/statistics.py.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remora.comm.bundles import NO_SOURCE, LayerBundles, count_bundles
from remora.comm.domains import Domains
from remora.comm.errors import FrameError
from remora.comm.history_file import pack_history, unpack_history
from remora.comm.routing_counter import RoutingCounter, Run
from remora.comm.sketch import (
    LABEL_CHARS_MAX,
    SKETCH_BYTES_MAX,
    Cell,
    DomainSketch,
    RoutingSketch,
    TokenSample,
    decode_sketch,
    encode_sketch,
    feature_layers,
)
from remora.comm.statistics import HistoryLimits, RoutingHistory

NUM_EXPERTS, TOP_K, LAYERS = 12, 3, (0, 2)


def tokens_of(seed: int, num_tokens: int, base: int) -> NDArray[np.int64]:
    """[L, T, K]: experts from a window of six that begins at `base`, as a domain has."""
    rng = np.random.default_rng(seed)
    draw = rng.random((len(LAYERS), num_tokens, 6)).argsort(axis=2)[:, :, :TOP_K]
    return (draw + base) % NUM_EXPERTS


def sketch_of(
    ids_LTK: NDArray[np.int64], *, source: str = "h0", label: str | None = None, phase: int = 0
) -> RoutingSketch:
    """What an exact counter would send."""
    cells = []
    histogram = np.zeros((len(feature_layers(len(LAYERS))), NUM_EXPERTS), "<f4")
    for layer, ids_TK in enumerate(ids_LTK):
        unique = count_bundles(ids_TK, np.zeros(len(ids_TK), int))
        load = np.bincount(ids_TK.reshape(-1), minlength=NUM_EXPERTS).astype("<f4")
        histogram[layer] = load
        cells.append(
            Cell(
                layer=layer,
                phase=phase,
                experts=unique.experts_BK.astype("<u2").tobytes(),
                weights=unique.weight_B.astype("<f4").tobytes(),
                load=load.tobytes(),
            )
        )
    num_tokens = float(ids_LTK.shape[1])
    tokens = (num_tokens, 0.0) if phase == 0 else (0.0, num_tokens)
    return RoutingSketch(
        source=source,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        moe_layers=LAYERS,
        tokens_seen=tokens,
        tokens_counted=tokens,
        domains=[
            DomainSketch(tokens=num_tokens, histogram=histogram.tobytes(), cells=cells, label=label)
        ],
    )


def as_dict(layer: LayerBundles) -> dict[tuple[int, ...], float]:
    keys = zip(layer.source_B.tolist(), layer.experts_BK.tolist(), strict=True)
    return {
        (s, *row): weight for (s, row), weight in zip(keys, layer.weight_B.tolist(), strict=True)
    }


FOREVER = HistoryLimits(half_life_tokens=1e18, share_half_life_tokens=1e18)

parts_strategy = st.lists(
    st.tuples(st.integers(1, 80), st.sampled_from(["h0", "h1", "elsewhere"]), st.integers(0, 1)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(parts_strategy)
def test_without_decay_everything_is_counted(parts: list[tuple[int, str, int]]) -> None:
    hosts = ["h1", "h0"]
    wanted: list[Counter[tuple[int, ...]]] = [Counter() for _ in LAYERS]
    load_LE = np.zeros((len(LAYERS), NUM_EXPERTS))
    history = None
    for seed, (num_tokens, source, phase) in enumerate(parts):
        ids_LTK = tokens_of(seed, num_tokens, base=0)
        sketch = sketch_of(ids_LTK, source=source, phase=phase)
        history = history or RoutingHistory.of(sketch, FOREVER)
        history.add(decode_sketch(encode_sketch(sketch)))
        index = hosts.index(source) if source in hosts else NO_SOURCE
        for layer, ids_TK in enumerate(ids_LTK):
            for row in ids_TK.tolist():
                wanted[layer][(index, *sorted(row))] += 1
                load_LE[layer, row] += 1
    assert history is not None
    if len(history.domains.by_number) > 1:  # shares of tokens are then the same as tokens
        assert sum(history.share.values()) == pytest.approx(history.tokens_total)
    for layer, found in enumerate(history.bundles(hosts)):
        assert as_dict(found) == pytest.approx(dict(wanted[layer]))
    np.testing.assert_allclose(history.load_LE(), load_LE)


def test_domains_are_told_apart_and_mixed_as_recent_traffic_is() -> None:
    """Two kinds of tokens become two domains; when traffic turns to the first again, the plan's
    bundles are its own at once, though it was last seen long ago."""
    limits = HistoryLimits(half_life_tokens=1e6, share_half_life_tokens=500)
    first, second = (sketch_of(tokens_of(s, 2000, base)) for s, base in ((1, 0), (2, 6)))
    history = RoutingHistory.of(first, limits)
    history.add(first)
    for _ in range(5):
        history.add(second)
    assert len(history.domains.by_number) == 2
    assert history.load_LE()[0, :6].sum() < 1e-3 * history.load_LE()[0].sum()
    history.add(sketch_of(tokens_of(3, 1000, 0)))
    load_LE = history.load_LE()
    assert load_LE[0, :6].sum() > 0.7 * load_LE[0].sum()
    assert sum(history.recent_shares().values()) == pytest.approx(1)
    only = history.load_LE(shares={0: 1.0})
    assert only[0, 6:].sum() == 0


def two_domains(first: int, second: int, seed: int = 0) -> RoutingSketch:
    """One report of two kinds of traffic, 10,000 tokens of each."""
    one, other = (sketch_of(tokens_of(seed, 10_000, base)) for base in (first, second))
    return msgspec.structs.replace(one, domains=[*one.domains, *other.domains])


@pytest.mark.parametrize("bases", [(0, 6), (6, 0)])
def test_domains_of_one_large_report_share_it_in_either_order(bases: tuple[int, int]) -> None:
    history = RoutingHistory.of(two_domains(*bases))
    for seed in range(4):
        history.add(two_domains(*bases, seed=seed))
        assert sorted(history.recent_shares().values()) == pytest.approx([0.5, 0.5])
    for layer in range(len(LAYERS)):
        load_E = history.load_LE()[layer]
        assert load_E[:6].sum() == pytest.approx(load_E[6:].sum(), rel=1e-6)


@pytest.mark.parametrize("sources", [("h0", "h1"), ("h0", "h0")])
def test_groups_that_report_in_turn_share_what_is_recent(sources: tuple[str, str]) -> None:
    """Each of a domain of its own, 10,000 tokens a report, on two hosts or on one."""
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)))
    for turn in range(8):
        for number, source in enumerate(sources):
            sketch = sketch_of(tokens_of(turn, 10_000, 6 * number), source=source)
            history.add(sketch, f"dense-{number}")
            shares = history.recent_shares().values()
            if turn >= 3:  # before, one has told more than the other
                assert all(0.4 < share < 0.6 for share in shares), (turn, number, shares)


def test_a_shift_is_followed_within_5000_tokens_of_small_reports() -> None:
    """From two groups, after one whose reports were large has gone."""
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)))
    for seed in range(3):
        history.add(sketch_of(tokens_of(seed, 20_000, 0)), "gone")
    for seed in range(300):
        history.add(sketch_of(tokens_of(seed, 200, 0)), f"dense-{seed % 2}")
    assert history.reported.keys() == {"dense-0", "dense-1"}
    for seed in range(25):
        history.add(sketch_of(tokens_of(seed, 200, 6)), f"dense-{seed % 2}")
    assert max(history.recent_shares().values()) > 0.95 and history.recent_shares()[1] > 0.95


def test_one_group_that_reports_much_at_once_follows_a_shift_as_well() -> None:
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)))
    for seed in range(3):
        history.add(sketch_of(tokens_of(seed, 20_000, 0)))
    for seed in range(10):
        history.add(sketch_of(tokens_of(seed, 500, 6)))
    assert history.recent_shares()[1] > 0.95


def test_hosts_beyond_the_bound_cost_the_oldest_their_names_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each start of Ray names its machines anew: there is no end of names over the years."""
    monkeypatch.setattr("remora.comm.statistics.SOURCES_MAX", 6)
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)), FOREVER)
    for number in range(23):
        history.add(sketch_of(tokens_of(number, 100, 0), source=f"host-{number}"))
        assert len(history.sources) <= 6
    history = unpack_history(pack_history(history), FOREVER)
    late = [name for name in history.sources if name]
    assert late == [f"host-{number}" for number in range(23 - len(late), 23)] and len(late) >= 3
    for layer, found in enumerate(history.bundles(late)):
        tokens = np.bincount(found.source_B + 1, found.weight_B)
        assert tokens == pytest.approx([100 * (23 - len(late)), *[100] * len(late)])
        newest = LayerBundles(
            experts_BK=found.experts_BK[found.source_B == len(late) - 1],
            source_B=found.source_B[found.source_B == len(late) - 1],
            weight_B=found.weight_B[found.source_B == len(late) - 1],
        )
        ids_TK = tokens_of(22, 100, 0)[layer]
        wanted = count_bundles(ids_TK, np.full(100, len(late) - 1))
        assert as_dict(newest) == pytest.approx(as_dict(wanted))


def test_tokens_of_a_mix_are_what_it_rests_on() -> None:
    """Not what is remembered of a domain that has gone: its long memory says nothing of the new."""
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)))
    assert history.mix_tokens() == 0
    for seed in range(20):
        history.add(sketch_of(tokens_of(seed, 10_000, 0)))
    alone = history.domains.by_number[0].tokens
    assert history.mix_tokens() == pytest.approx(alone)
    for seed in range(3):
        history.add(sketch_of(tokens_of(seed, 500, 6)))
    share = history.recent_shares()
    wanted = 1 / (share[0] ** 2 / alone + share[1] ** 2 / history.domains.by_number[1].tokens)
    assert history.mix_tokens() == pytest.approx(wanted) and 1500 < wanted < 5000
    history.share = {n: d.tokens for n, d in history.domains.by_number.items()}
    assert history.mix_tokens() == pytest.approx(alone + 1500, rel=0.01), "mixed as they were seen"


def test_names_do_not_take_over_what_traffic_without_them_has_left() -> None:
    """A label chooses as traffic without any does, two others choose otherwise: they become one."""
    kinds = np.repeat(np.eye(3), 10, axis=1) * 100.0
    domains = Domains(domains_max=3, half_life_tokens=1e9)
    for label, kind in ((None, 0), ("law", 0), ("code", 1), ("medicine", 2)):
        histogram_FE = np.stack([kinds[kind]] * 2)
        number, merged = domains.assign(histogram_FE, label)
        assert merged is None or 0 not in merged
        domains.grow(number, histogram_FE, 1000)
    assert domains.assign(np.stack([kinds[0]] * 2)) == (0, None)
    assert domains.by_number[0].labels == set() and domains.by_number[0].tokens == 1000
    few = Domains(domains_max=2, half_life_tokens=1e9)
    for label in (None, "law", "code"):  # no other pair than one with a name and one without
        number, _ = few.assign(np.stack([kinds[0]] * 2), label)
        few.grow(number, np.stack([kinds[0]] * 2), 1000)
    assert len(few.by_number) == 2


def test_strange_requests_do_not_push_domains_together() -> None:
    """Three kinds of traffic, room for four domains, and now and then a request like no other."""
    rng = np.random.default_rng(0)
    domains = Domains(domains_max=4, half_life_tokens=1e9)
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    gone: dict[int, int] = {}
    for number in range(120):
        kind = int(rng.integers(0, 3))
        chances = np.full(30, 1e-9)
        if number % 10 == 9:
            chances[rng.integers(0, 30, 2)] = 1.0
        else:
            chances[5 * kind : 5 * kind + 10] = 1.0  # they share experts
        histogram_FE = rng.multinomial(2000, chances / chances.sum(), size=2).astype(float)
        found, merged = domains.assign(histogram_FE)
        if merged is not None:
            gone[merged[0]] = merged[1]
        domains.grow(found, histogram_FE, 500 if number % 10 != 9 else 10)
        if number % 10 != 9:
            seen[kind].add(found)
    final = []
    for numbers in seen.values():
        ends = set()
        for number in numbers:
            while number in gone:
                number = gone[number]
            ends.add(number)
        final.append(ends)
    assert all(len(ends) == 1 for ends in final), final
    assert len(set.union(*final)) == 3


@pytest.mark.parametrize(("num_layers", "num_experts", "num_domains"), [(58, 256, 8), (60, 384, 5)])
def test_a_sketch_of_a_large_model_fits_its_bound_with_every_domain_in_it(
    num_layers: int, num_experts: int, num_domains: int
) -> None:
    """More bundles in every cell than there is room for, and tokens enough for a whole sample."""
    counter = RoutingCounter(
        num_experts=num_experts, top_k=8, moe_layers=tuple(range(3, 3 + num_layers))
    )
    runs = [
        Run(
            2 * number + phase,
            phase,
            80,
            0,
            list(range(80)),
            LABEL_CHARS_MAX * chr(0x4E00 + number),
        )
        for number in range(num_domains)
        for phase in (0, 1)
    ]
    rng = np.random.default_rng(0)
    counter.count(rng.integers(0, num_experts, (num_layers, 80 * len(runs), 8)), runs)
    data = encode_sketch(counter.take("a-host"))
    sketch = decode_sketch(data)
    assert 0.98 * SKETCH_BYTES_MAX < len(data) <= SKETCH_BYTES_MAX
    assert sum(domain.tokens for domain in sketch.domains) == 80 * len(runs)
    assert [len(domain.cells) for domain in sketch.domains] == [2 * num_layers] * num_domains


def test_old_counts_fade_by_half_in_a_half_life() -> None:
    limits = HistoryLimits(half_life_tokens=1000, share_half_life_tokens=1e18)
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)), limits)
    old, new = tokens_of(0, 1000, 0), tokens_of(1, 1000, 0)
    history.add(sketch_of(old, label="x"))
    history.add(sketch_of(new, label="x"))
    wanted: dict[int, float] = defaultdict(float)
    for ids_LTK, weight in ((old, 0.5), (new, 1.0)):
        for e in ids_LTK[0].reshape(-1).tolist():
            wanted[e] += weight
    np.testing.assert_allclose(
        history.load_LE()[0], [wanted[e] for e in range(NUM_EXPERTS)], rtol=1e-6
    )


def test_memory_and_domains_are_bounded_and_totals_survive() -> None:
    limits = replace(FOREVER, domains_max=3, bytes_max=40_000)
    history = RoutingHistory.of(sketch_of(tokens_of(0, 1, 0)), limits)
    for number in range(10):
        history.add(sketch_of(tokens_of(number, 500, number), label=f"tenant-{number}"))
    assert len(history.domains.by_number) == 3
    assert history.nbytes <= limits.bytes_max
    assert history.load_LE().sum() == pytest.approx(10 * 500 * TOP_K * len(LAYERS))
    estimated = history.bundles(["h0"])[0].num_tokens
    assert estimated == pytest.approx(5000, rel=0.25)
    before = len(history.domains.by_number)
    history.add(sketch_of(tokens_of(3, 500, 3), label="tenant-3"))  # merged, and still known
    assert len(history.domains.by_number) == before


def test_sketches_that_lie_are_refused() -> None:
    good = sketch_of(tokens_of(0, 50, 0))
    domain = good.domains[0]
    cell = domain.cells[0]
    bad_cells: list[dict[str, Any]] = [
        {"layer": 2},
        {"phase": 2},
        {"experts": cell.experts[:-1]},
        {"experts": np.full((1, TOP_K), 99, "<u2").tobytes(), "weights": bytes(4)},
        {"experts": np.array([[2, 1, 0]], "<u2").tobytes(), "weights": bytes(4)},
        {"weights": np.array([np.nan] * (len(cell.weights) // 4), "<f4").tobytes()},
        {"weights": cell.weights[:-4]},
        {"load": (-np.ones(NUM_EXPERTS, "<f4")).tobytes()},
        {"load": np.full(NUM_EXPERTS, 1e30, "<f4").tobytes()},
    ]
    for change in bad_cells:
        changed = msgspec.structs.replace(cell, **change)
        lying = msgspec.structs.replace(
            good, domains=[msgspec.structs.replace(domain, cells=[changed])]
        )
        with pytest.raises(FrameError):
            decode_sketch(encode_sketch(lying))
    for fields in (
        {"version": 2},
        {"top_k": 99},
        {"tokens_seen": (float("nan"), 0.0)},
        {"domains": [msgspec.structs.replace(domain, tokens=1e300)]},  # no sum would be a number
        {"source": "h" * 257},  # it is remembered
    ):
        with pytest.raises(FrameError):
            decode_sketch(encode_sketch(msgspec.structs.replace(good, **fields)))
    with pytest.raises(FrameError, match="not a routing sketch"):
        decode_sketch(b"\x81\xa1x\x01")
    other = msgspec.structs.replace(good, moe_layers=(0, 3))
    history = RoutingHistory.of(good)
    with pytest.raises(FrameError, match="kept are"):
        history.add(other)


def test_the_page_tells_a_stranger_every_field_of_a_sketch() -> None:
    page = (Path(__file__).parents[2] / "docs/router.md").read_text(encoding="utf-8")
    told = page.partition("### A report's sketch")[2].partition("\n## ")[0]
    for kind in (RoutingSketch, DomainSketch, Cell, TokenSample):
        for field in msgspec.structs.fields(kind):
            assert f"`{field.encode_name}`" in told, f"{kind.__name__}.{field.name}"
