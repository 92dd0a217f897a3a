"""What is counted off the hot path is what was routed: all of it, or a part that says so.

Legend: L MoE layers, T rows, K top-k.
"""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remora.actors import routing_tap
from remora.actors.dense_events import Slice, StepPlan
from remora.actors.routing_tap import RoutingTap, merged_runs, runs_of, split_runs
from remora.actors.sequence import Sequence
from remora.comm.messages import SamplingParams, Submit
from remora.comm.routing_counter import DOMAINS_MAX, RoutingCounter, Run
from remora.comm.sketch import RoutingSketch, decode_sketch
from remora.comm.trace import DECODE, PREFILL

NUM_EXPERTS, TOP_K, LAYERS = 9, 3, (1, 2, 5)


def tap() -> RoutingTap:
    return RoutingTap(RoutingCounter(num_experts=NUM_EXPERTS, top_k=TOP_K, moe_layers=LAYERS))


def plan_of(*parts: tuple[int, int, int]) -> StepPlan:
    """Slices of (arrival, start, tokens); prompts have five tokens."""
    slices = []
    for arrival, start, count in parts:
        submit = Submit(
            request_id=f"r{arrival}", prompt_ids=[0] * 5, params=SamplingParams(max_tokens=9)
        )
        sequence = Sequence(submit, "ingress", arrival, frozenset(), 1000)
        slices.append(
            Slice(
                sequence=sequence,
                token_ids=list(range(count)),
                start=start,
                block_table=[],
                sample=False,
            )
        )
    return StepPlan(step_id=1, slices=slices, num_tokens=sum(count for _, _, count in parts))


def ids_of(seed: int, num_rows: int) -> Tensor:
    """[L, T, K]."""
    rng = np.random.default_rng(seed)
    draw = rng.random((len(LAYERS), num_rows, NUM_EXPERTS)).argsort(axis=2)[:, :, :TOP_K]
    return torch.from_numpy(draw)


def run_step(
    tap: RoutingTap,
    plan: StepPlan,
    ids_LTK: Tensor,
    *,
    num_tokens: int | None = None,
    num_padding: int = 2,
) -> None:
    """One step that is padded with two rows; the experts are asked as told."""

    def experts(layer: int, hidden: Tensor, index: Tensor, weights: Tensor, count: int) -> Tensor:
        return hidden

    watched = tap.watch(experts)
    padding = torch.full((1, num_padding, TOP_K), 77)
    with tap.step(plan, plan.num_tokens + 2):
        for layer, ids_TK in zip(LAYERS, ids_LTK, strict=True):
            rows = torch.cat([ids_TK[None], padding], 1)[0]
            given = plan.num_tokens if num_tokens is None else num_tokens
            watched(layer, torch.zeros(len(rows), 4), rows, torch.zeros(rows.shape), given)


def counts_of(sketch: RoutingSketch) -> Counter[tuple[int, ...]]:
    """Weight by (phase, layer, bundle), whatever the domain."""
    found: Counter[tuple[int, ...]] = Counter()
    for domain in sketch.domains:
        for cell in domain.cells:
            experts_BK, weight_B = cell.bundles(TOP_K)
            for row, weight in zip(experts_BK.tolist(), weight_B.tolist(), strict=True):
                found[(cell.phase, cell.layer, *row)] += weight
    return found


steps_strategy = st.lists(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(1, 40)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30)
@given(steps_strategy, st.integers(1, 300), st.integers(1, 4))
def test_everything_is_counted_once(
    steps: list[list[tuple[int, int, int]]], wake_rows: int, take_every: int
) -> None:
    """However steps and reports interleave; both sides see the same clock of nothing."""
    wanted: Counter[tuple[int, ...]] = Counter()
    found: Counter[tuple[int, ...]] = Counter()
    counted = seen = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_tap, "WAKE_ROWS", wake_rows)
        one = tap()
        try:
            for seed, parts in enumerate(steps):
                plan = plan_of(*parts)
                ids_LTK = ids_of(seed, plan.num_tokens)
                run_step(one, plan, ids_LTK)
                row = 0
                for _, start, count in parts:
                    for position in range(start, start + count):
                        phase = PREFILL if position < 5 else DECODE
                        for layer in range(len(LAYERS)):
                            bundle = sorted(ids_LTK[layer, row].tolist())
                            wanted[(phase, layer, *bundle)] += 1
                        row += 1
                if seed % take_every == 0 or seed == len(steps) - 1:
                    data = one.take_sketch("h")
                    sketch = decode_sketch(data)
                    found += counts_of(sketch)
                    counted += sum(sketch.tokens_counted)
                    seen += sum(sketch.tokens_seen)
            assert one.take_sketch("h") == b""
        finally:
            one.close()
    assert counted == seen == sum(count for parts in steps for _, _, count in parts)
    assert found == wanted


@pytest.mark.parametrize("wake_rows", [30, 1000], ids=["with new rows", "with none"])
def test_a_buffer_that_is_handed_over_while_it_is_counted_is_counted_to_its_end(
    wake_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine runs a step in the middle of every count, which fills the buffer or finds no
    room in it."""
    monkeypatch.setattr(routing_tap, "WAKE_ROWS", wake_rows)
    monkeypatch.setattr(routing_tap, "BUFFER_ROWS", 64)
    one, seeds = tap(), iter(range(12))
    wanted: Counter[tuple[int, ...]] = Counter()
    found: Counter[tuple[int, ...]] = Counter()
    count = one._counter.count

    def step_ends() -> None:
        for seed in itertools.islice(seeds, 1):
            ids_LTK = ids_of(seed, 20)
            run_step(one, plan_of((seed, 5, 20)), ids_LTK)
            for layer, ids_TK in enumerate(ids_LTK.tolist()):
                wanted.update((DECODE, layer, *sorted(row)) for row in ids_TK)

    def count_slowly(ids_LTK: Any, runs: list[Run]) -> None:
        step_ends()
        count(ids_LTK, runs)

    monkeypatch.setattr(one._counter, "count", count_slowly)
    try:
        step_ends()
        while data := one.take_sketch("h"):
            found += counts_of(decode_sketch(data))
    finally:
        one.close()
    assert sum(wanted.values()) == 12 * 20 * len(LAYERS)
    assert found == wanted


def test_what_does_not_fit_is_sampled_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody counts, two buffers take what they can; the rest is noted, and what was
    counted stands for it."""
    monkeypatch.setattr(routing_tap, "BUFFER_ROWS", 64)
    one = tap()
    try:
        with one._counting:  # the counting thread is held up
            for seed in range(10):
                run_step(one, plan_of((seed, 5, 30)), ids_of(seed, 30))
        sketch = decode_sketch(one.take_sketch("h"))
    finally:
        one.close()
    assert sketch.tokens_seen == (0.0, 300.0)
    assert 64 <= sketch.tokens_counted[1] <= 128
    assert sketch.counted_ratio == sketch.tokens_counted[1] / 300
    assert sum(counts_of(sketch).values()) == pytest.approx(300 * len(LAYERS), rel=1e-5)


def test_failed_and_partial_steps_leave_nothing() -> None:
    one = tap()
    try:
        with pytest.raises(RuntimeError, match="shard"), one.step(plan_of((0, 0, 5)), 5):
            raise RuntimeError("a shard is gone")
        assert one.take_sketch("h") == b""
        run_step(one, plan_of((0, 0, 5)), ids_of(0, 5), num_tokens=3)  # a slice of the rows only
        run_step(one, plan_of((1, 0, 5)), ids_of(0, 5), num_padding=0)  # and where all are told
        sketch = decode_sketch(one.take_sketch("h"))
    finally:
        one.close()
    assert sketch.tokens_counted == (0.0, 0.0)
    assert sketch.tokens_seen == (10.0, 0.0)
    assert sketch.counted_ratio == 0.0


def test_ids_of_another_type_or_stride_are_taken() -> None:
    one = tap()
    plan = plan_of((0, 0, 4))
    ids_LTK = ids_of(3, 4)

    def experts(*args: Any) -> Any:
        return args[1]

    try:
        with one.step(plan, 4):
            for layer, ids_TK in zip(LAYERS, ids_LTK, strict=True):
                strided = ids_TK.int().T.contiguous().T
                one.watch(experts)(layer, torch.zeros(4, 2), strided, torch.zeros(4, TOP_K), 4)
        found = counts_of(decode_sketch(one.take_sketch("h")))
    finally:
        one.close()
    for layer in range(len(LAYERS)):
        for row in ids_LTK[layer].tolist():
            assert found[(PREFILL, layer, *sorted(row))] >= 1


def test_ids_are_copied_while_a_sample_wants_them_and_labels_always() -> None:
    one = tap()
    try:
        for arrival, label in enumerate(("law", None)):
            plan = plan_of((arrival, 0, 4))
            plan.slices[0].sequence.domain = label
            run_step(one, plan, ids_of(arrival, 4))
        sketch = decode_sketch(one.take_sketch("h"))
    finally:
        one.close()
    assert sketch.sample is not None
    assert sketch.sample.token_N().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {domain.label for domain in sketch.domains} == {"law", None}


def test_names_that_share_a_domain_keep_a_name_and_are_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They were reported without any, into the domains of requests that have none."""
    one = tap()
    try:
        for arrival in range(DOMAINS_MAX):
            plan = plan_of((arrival, 0, 4))
            plan.slices[0].sequence.domain = f"tenant-{arrival:02d}"
            run_step(one, plan, ids_of(arrival, 4))
        before = decode_sketch(one.take_sketch("h"))
        assert len({domain.label for domain in before.domains}) == DOMAINS_MAX
        assert one.shared_labels == [] and caplog.text == ""
        for arrival in range(DOMAINS_MAX, DOMAINS_MAX + 3):
            plan = plan_of((arrival, 0, 4))
            plan.slices[0].sequence.domain = f"tenant-{arrival:02d}"
            run_step(one, plan, ids_of(arrival, 4))
        sketch = decode_sketch(one.take_sketch("h"))
    finally:
        one.close()
    assert sketch.domains and None not in {domain.label for domain in sketch.domains}
    assert sum(domain.tokens for domain in sketch.domains) == 12
    assert sum(map(len, one.shared_labels)) == len(one.shared_labels) + 3
    [told] = [record.getMessage() for record in caplog.records]
    assert "more names of domains than are told apart: tenant-" in told


def test_runs() -> None:
    plan = plan_of((7, 3, 4), (8, 9, 1), (9, 0, 5))
    ids = [0, 1, 2, 3, 4]
    runs = [
        Run(7, PREFILL, 2, 3, ids[:2]),
        Run(7, DECODE, 2, 5, ids[2:4]),
        Run(8, DECODE, 1, 9, ids[:1]),
        Run(9, PREFILL, 5, 0, ids),
    ]
    assert runs_of(plan, with_tokens=True) == runs
    assert all(run.token_ids == [] for run in runs_of(plan))
    kept, rest = split_runs(runs, 3)
    assert kept == [runs[0], Run(7, DECODE, 1, 5, [2])]
    assert rest == [Run(7, DECODE, 1, 6, [3]), *runs[2:]]
    assert merged_runs(runs) == [Run(0, PREFILL, 7), Run(0, DECODE, 3)]
