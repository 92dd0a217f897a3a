"""`remora bench --phases`: the parts of a step add up, and only arithmetic counts as kernels."""

from typing import Any

import pytest

from remora.cluster.bench_phases import breakdown, phases_table


def reading(steps: int, each_us: float) -> dict[str, Any]:
    """Counters after so many steps whose parts take multiples of `each_us`."""
    ns = steps * each_us * 1e3
    laps = {"inbox": 1, "schedule": 2, "inputs": 3, "model": 80, "sampling": 10, "emit": 4}
    kernels = {"linear": 20, "row_linear": 1, "attention": 9, "activation": 2, "sampling": 6}
    experts = {"pack_ns": 3, "wait_ns": 30, "combine_ns": 2, "experts_compute_ns": 22}
    return {
        "steps": steps,
        "laps": {k: round(v * ns) for k, v in laps.items()},
        "kernels": {k: round(v * ns) for k, v in kernels.items()},
        "experts": {k: round(v * ns) for k, v in experts.items()} | {"layers": 8 * steps},
    }


def test_the_parts_are_the_step() -> None:
    found = breakdown(32, reading(100, 5.0), reading(300, 5.0), loops_step_us=20.0)
    assert found.num_steps == 200
    assert found.step_us == pytest.approx(500.0)
    assert sum(part.step_us for part in found.parts) == pytest.approx(found.step_us)
    parts = {part.name: part.step_us for part in found.parts}
    assert parts["dense linears"] == pytest.approx(105.0)
    assert parts["experts: sockets and wake-ups"] == pytest.approx(40.0)
    assert parts["sampling, the rest"] == pytest.approx(20.0)


def test_what_is_outside_kernels() -> None:
    found = breakdown(32, reading(0, 5.0), reading(10, 5.0), loops_step_us=20.0)
    # linears 21, attention 9, activation 2, loops 4, experts 22, sampling 6 of 100
    assert found.outside_kernels == pytest.approx(0.36)


def test_counters_that_a_rank_does_not_have_are_no_lines() -> None:
    bare = {"kernels": {}, "experts": {}}
    found = breakdown(1, reading(0, 1.0) | bare, reading(10, 1.0) | bare, loops_step_us=0.0)
    assert not any(part.is_kernel for part in found.parts)
    assert found.outside_kernels == pytest.approx(1.0)


def test_readings_without_a_step_between_them_are_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        breakdown(1, reading(5, 1.0), reading(5, 1.0), loops_step_us=0.0)


def test_the_table_has_a_column_for_each_batch() -> None:
    found = [breakdown(b, reading(0, b), reading(10, b), loops_step_us=0.0) for b in (1, 32)]
    lines = phases_table(found).splitlines()
    assert "batch 1, us" in lines[0] and "batch 32, us" in lines[0]
    assert len({len(line.removesuffix("  kernel")) for line in lines[1:]}) == 1
    assert lines[-1].startswith("outside kernels")
    assert "40.0%" in lines[-1]  # the same share in both, without loops
