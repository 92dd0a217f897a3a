"""The share of copies: less when decoding suffers, back when not, all when nobody decodes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.autoscale.copy_rate import FLOOR, MORE, SLOWER_MAX, START, CopyRate, StepTotals


class Dense:
    """A dense rank that makes steps, with `running` sequences."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.running = 0, 0.0, 1

    def run(self, steps: int, each_s: float) -> dict[str, StepTotals]:
        self.steps += steps
        self.seconds += steps * each_s
        return {"dense-0": StepTotals(self.steps, self.seconds, self.running)}


@pytest.fixture
def calm() -> tuple[CopyRate, Dense]:
    """10 ms a step between two operations."""
    rate, dense = CopyRate(), Dense()
    rate.end(dense.run(100, 0.5))  # warming up is not calm
    assert rate.begin(dense.run(100, 0.01)) == START
    return rate, dense


def test_it_shrinks_and_recovers(calm: tuple[CopyRate, Dense]) -> None:
    rate, dense = calm
    assert rate.observe(dense.run(50, 0.011)) == START + MORE, "within what is tolerated"
    assert rate.observe(dense.run(50, 0.02)) == (START + MORE) / 2
    assert rate.observe(dense.run(50, 0.02)) == (START + MORE) / 4
    assert rate.observe(dense.run(50, 0.01)) == (START + MORE) / 4 + MORE
    for _ in range(20):
        rate.observe(dense.run(50, 0.01))
    assert rate.share == 1.0
    for _ in range(99):
        rate.observe(dense.run(50, 1.0))
    assert rate.share == FLOOR


def test_nobody_decodes_and_then_somebody_does() -> None:
    rate, dense = CopyRate(), Dense()
    dense.running = 0
    rate.end(dense.run(100, 0.01))
    assert rate.share == START, "who is told before anybody has looked"
    assert rate.begin(dense.run(100, 0.01)) == 1.0
    assert rate.observe(dense.run(0, 0.0)) == 1.0
    dense.running = 4
    assert rate.observe(dense.run(1, 0.01)) == START
    assert rate.observe(dense.run(50, 0.01)) == START + MORE
    dense.running = 0
    assert rate.observe(dense.run(50, 0.01)) == START + 2 * MORE, "it made steps until just now"
    assert rate.observe(dense.run(0, 0.0)) == 1.0
    assert rate.observe(dense.run(9, 0.01)) == START


def test_steps_that_are_held_are_no_idle_rank(calm: tuple[CopyRate, Dense]) -> None:
    """Sequences wait in a step for an expert, say."""
    rate, dense = calm
    assert rate.observe(dense.run(0, 0.0)) == START + MORE


def test_who_is_new_does_not_suffer(calm: tuple[CopyRate, Dense]) -> None:
    rate, dense = calm
    totals = dense.run(50, 0.01)
    for number, steps in enumerate((5, 500), 1):
        fresh = {"dense-1": StepTotals(steps, 9.0 * steps, 1)}
        assert rate.observe(totals | fresh) == START + number * MORE


def test_the_worst_of_several_decides() -> None:
    rate, one, other = CopyRate(), Dense(), Dense()

    def both(first_s: float, second_s: float) -> dict[str, StepTotals]:
        return one.run(9, first_s) | {"dense-1": other.run(9, second_s)["dense-0"]}

    rate.end(both(0.01, 0.02))
    rate.begin(both(0.01, 0.02))
    assert rate.observe(both(0.01, 0.02)) == START + MORE
    assert rate.observe(both(0.01, 0.03)) == (START + MORE) / 2


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(1e-4, 10.0)), max_size=60))
def test_it_stays_in_bounds_and_goes_the_right_way(windows: list[tuple[int, float]]) -> None:
    rate, dense = CopyRate(), Dense()
    rate.end(dense.run(1, 0.01))
    rate.begin(dense.run(100, 0.01))
    for steps, each_s in windows:
        before = rate.share
        after = rate.observe(dense.run(steps, each_s))
        assert FLOOR <= after <= 1.0
        if each_s > 1.01 * SLOWER_MAX * 0.01:
            assert after < before or after == FLOOR
        elif each_s < 0.99 * SLOWER_MAX * 0.01:
            assert after > before or after == 1.0
