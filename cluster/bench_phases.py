"""Where a decode step's time goes: two readings of a dense rank's counters made into a table.

The laps of a step (`actors/step_laps.py`) add up to all of it. What the kernels counted
(`kernels/phases.py`), what generated loops and torch's kernels took in a process of their own
(`actors/loop_profile.py`) and what the dispatcher measured are parts of the lap `model`, in which
all layers run; the rest of that lap is calls, allocations and Python.

A shard's answer carries how long its kernels took; of the shards that work at the same time the
slowest counts. Sockets and wake-ups are what the dense rank waited beyond that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LINEARS = ("linear", "row_linear")
_SEPARATE = ("attention", "sampling", "collective")


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table."""

    name: str
    step_us: float  # microseconds of a mean step
    is_kernel: bool  # arithmetic of the model, ours or generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """A mean step; `parts` add up to `step_us`."""

    batch: int
    num_steps: int
    step_us: float
    parts: tuple[Part, ...]

    @property
    def outside_kernels(self) -> float:
        """Share of the step that is no kernel, 0..1."""
        return sum(p.step_us for p in self.parts if not p.is_kernel) / self.step_us

    def as_json(self) -> dict[str, Any]:
        """Plain data: batch, steps, microseconds by part, the share outside kernels."""
        return {
            "batch": self.batch,
            "steps": self.num_steps,
            "step_us": round(self.step_us, 1),
            "outside_kernels": round(self.outside_kernels, 4),
            "parts_us": {part.name: round(part.step_us, 1) for part in self.parts},
        }


def breakdown(
    batch: int, before: Mapping[str, Any], after: Mapping[str, Any], loops_step_us: float
) -> Breakdown:
    """What happened between two readings of `DenseActor.phases()`.

    Args:
        batch: sequences that every step in between decoded.
        before, after: the readings.
        loops_step_us: microseconds of a step inside generated loops and torch's kernels.

    Raises:
        ValueError: no step lies between the readings.
    """
    num_steps = after["steps"] - before["steps"]
    if num_steps <= 0:
        raise ValueError(f"no step between the readings: {before['steps']} and {after['steps']}")
    laps, kernels, experts = (
        _per_step(before[key], after[key], num_steps) for key in ("laps", "kernels", "experts")
    )
    ours = sum(us for kind, us in kernels.items() if kind not in (*_LINEARS, *_SEPARATE))
    computing = experts.get("experts_compute_ns", 0.0)
    waiting = max(0.0, experts.get("wait_ns", 0.0) - computing)
    sampling = min(kernels.get("sampling", 0.0), laps["sampling"])
    inside = [
        Part("dense linears", sum(kernels.get(kind, 0.0) for kind in _LINEARS), True),
        Part("attention", kernels.get("attention", 0.0), True),
        Part("other kernels of ours", ours, True),
        Part("loops made by Inductor, torch's kernels", loops_step_us, True),
        Part("experts: computing (slowest shard)", computing, True),
        Part("experts: choosing, packing, sending", experts.get("pack_ns", 0.0), False),
        Part("experts: sockets and wake-ups", waiting, False),
        Part("experts: combining", experts.get("combine_ns", 0.0), False),
        Part("tensor-parallel collectives", kernels.get("collective", 0.0), False),
    ]
    rest = laps["model"] - sum(part.step_us for part in inside)
    parts = [
        Part("scheduling and inbox", laps["inbox"] + laps["schedule"], False),
        Part("inputs of the step", laps["inputs"], False),
        *inside,
        Part("between kernels: calls, memory, Python", rest, False),
        Part("sampling kernels", sampling, True),
        Part("sampling, the rest", laps["sampling"] - sampling, False),
        Part("emit", laps["emit"], False),
    ]
    return Breakdown(
        batch=batch,
        num_steps=num_steps,
        step_us=sum(laps.values()),
        parts=tuple(part for part in parts if part.step_us),
    )


def phases_table(breakdowns: list[Breakdown]) -> str:
    """A line for each part, two columns for each batch: microseconds of a step, share of it."""
    names = list(dict.fromkeys(part.name for b in breakdowns for part in b.parts))
    order = {part: i for i, part in enumerate(names)}
    width = max(len(name) for name in names)
    head = "".join(f"{f'batch {b.batch}, us':>18}{'':>8}" for b in breakdowns)
    lines = [f"{'':{width}}{head}"]
    for name in sorted(names, key=order.__getitem__):
        cells = [_cell(b, sum(p.step_us for p in b.parts if p.name == name)) for b in breakdowns]
        kernel = any(p.is_kernel for b in breakdowns for p in b.parts if p.name == name)
        lines.append(f"{name:{width}}{''.join(cells)}{'  kernel' if kernel else ''}")
    lines.append(f"{'a step':{width}}{''.join(_cell(b, b.step_us) for b in breakdowns)}")
    outside = "".join(_cell(b, b.outside_kernels * b.step_us) for b in breakdowns)
    lines.append(f"{'outside kernels':{width}}{outside}")
    return "\n".join(lines)


def _cell(of: Breakdown, step_us: float) -> str:
    return f"{step_us:>18,.0f}{step_us / of.step_us:>8.1%}"


def _per_step(
    before: Mapping[str, int], after: Mapping[str, int], num_steps: int
) -> dict[str, float]:
    """Microseconds of a step, by kind."""
    return {kind: (after[kind] - before.get(kind, 0)) / num_steps / 1e3 for kind in after}
