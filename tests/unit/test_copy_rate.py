"""The rate of copies: less when decoding suffers, back when it does not, never out of bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora.autoscale.copy_rate import FLOOR, SLOWER_MAX, CopyRate, StepTotals

CEILING = 1024.0


class Dense:
    """A dense rank that makes steps."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0

    def run(self, steps: int, each_s: float) -> dict[str, StepTotals]:
        self.steps += steps
        self.seconds += steps * each_s
        return {"dense-0": StepTotals(self.steps, self.seconds)}


@pytest.fixture
def calm() -> tuple[CopyRate, Dense]:
    """10 ms a step between two operations."""
    rate, dense = CopyRate(CEILING), Dense()
    rate.end(dense.run(100, 0.5))  # warming up is not calm
    rate.begin(dense.run(100, 0.01))
    return rate, dense


def test_it_shrinks_and_recovers(calm: tuple[CopyRate, Dense]) -> None:
    rate, dense = calm
    assert rate.observe(dense.run(50, 0.012)) == CEILING, "within what is tolerated"
    assert rate.observe(dense.run(50, 0.02)) == CEILING / 2
    assert rate.observe(dense.run(50, 0.02)) == CEILING / 4
    assert rate.observe(dense.run(50, 0.01)) == CEILING * (1 / 4 + 1 / 16)
    for _ in range(12):
        rate.observe(dense.run(50, 0.01))
    assert rate.rate == CEILING
    for _ in range(99):
        rate.observe(dense.run(50, 1.0))
    assert rate.rate == CEILING * FLOOR


def test_who_makes_no_steps_or_is_new_does_not_suffer(calm: tuple[CopyRate, Dense]) -> None:
    rate, dense = calm
    assert rate.observe(dense.run(0, 0.0)) == CEILING
    totals = dense.run(50, 0.01)
    for steps in (5, 500):
        assert rate.observe(totals | {"dense-1": StepTotals(steps, 9.0 * steps)}) == CEILING


def test_the_worst_of_several_decides() -> None:
    rate, one, other = CopyRate(CEILING), Dense(), Dense()

    def both(first_s: float, second_s: float) -> dict[str, StepTotals]:
        return one.run(9, first_s) | {"dense-1": other.run(9, second_s)["dense-0"]}

    rate.end(both(0.01, 0.02))
    rate.begin(both(0.01, 0.02))
    assert rate.observe(both(0.01, 0.02)) == CEILING
    assert rate.observe(both(0.01, 0.03)) == CEILING / 2


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(1e-4, 10.0)), max_size=60))
def test_it_stays_in_bounds_and_goes_the_right_way(windows: list[tuple[int, float]]) -> None:
    rate, dense = CopyRate(CEILING), Dense()
    rate.end(dense.run(1, 0.01))
    rate.begin(dense.run(100, 0.01))
    for steps, each_s in windows:
        before = rate.rate
        after = rate.observe(dense.run(steps, each_s))
        assert CEILING * FLOOR <= after <= CEILING
        if steps and each_s > 1.01 * SLOWER_MAX * 0.01:
            assert after < before or after == CEILING * FLOOR
        elif not steps or each_s < 0.99 * SLOWER_MAX * 0.01:
            assert after > before or after == CEILING
