"""Time inside kernels, by kind: only what ran is counted, and never more than passed."""

import time

import pytest
import torch

from remora.kernels import phases
from remora.kernels.gates import SILU
from remora.kernels.linear import PackedLinear
from remora.kernels.native import native_available

needs_kernels = pytest.mark.skipif(not native_available(), reason="no C++ kernels")


@needs_kernels
def test_what_ran_is_counted_and_nothing_else() -> None:
    linear = PackedLinear.pack(torch.randn(512, 256).bfloat16())
    x_TD = torch.randn(32, 256).bfloat16()
    before, begin = phases.snapshot(), time.perf_counter_ns()
    linear(x_TD)
    spent, passed = phases.since(before), time.perf_counter_ns() - begin
    assert set(spent) == {"linear"}
    assert 0 < spent["linear"] <= passed


@needs_kernels
def test_kinds_are_apart() -> None:
    before = phases.snapshot()
    SILU.apply(torch.randn(4, 64).bfloat16())
    assert set(phases.since(before)) == {"activation"}


def test_counters_have_the_same_kinds_every_time() -> None:
    assert list(phases.snapshot()) == list(phases.snapshot())
    assert bool(phases.snapshot()) == native_available()
