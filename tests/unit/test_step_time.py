"""Laps of a step and timers around generated loops: nothing counted twice, everything put back."""

from types import ModuleType
from typing import Any

import pytest

from remora.actors import loop_timers
from remora.actors.loop_timers import LoopTimers
from remora.actors.step_laps import LAPS, Laps


def test_laps_add_up_to_what_passed_without_what_was_skipped() -> None:
    moments = iter([100, 110, 130, 1000, 1004, 1005])
    laps = Laps(now_ns=lambda: next(moments))
    laps.lap("inbox")  # 10
    laps.lap("model")  # 20
    laps.skip()  # idle until 1000
    laps.lap("schedule")  # 4
    laps.lap("model")  # 1
    expected = dict.fromkeys(LAPS, 0) | {"inbox": 10, "model": 21, "schedule": 4}
    assert laps.spent_ns == expected


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module as Inductor writes them: its functions find loops among its globals."""
    module: Any = ModuleType("generated")
    exec(
        "def cpp_fused_add_0(a, b):\n    return a + b\n"
        "def call(args):\n    return cpp_fused_add_0(*args)\n",
        vars(module),
    )
    monkeypatch.setattr(loop_timers, "_generated_modules", lambda: [module])
    return module


def test_only_generated_loops_are_timed_and_only_while_wanted(generated: Any) -> None:
    timers, loop = LoopTimers(), generated.cpp_fused_add_0
    timers.install()
    assert [generated.call((i, 1)) for i in range(5)] == [1, 2, 3, 4, 5]
    timers.remove()
    generated.call((1, 1))
    assert timers.calls == 5 and timers.spent_ns > 0
    assert 0 <= timers.net_ns <= timers.spent_ns
    assert generated.cpp_fused_add_0 is loop


def test_a_second_pass_starts_from_nothing(generated: Any) -> None:
    timers = LoopTimers()
    for _ in range(2):
        timers.install()
        generated.call((1, 2))
        timers.remove()
        assert timers.calls == 1
