"""Figures of alternating rounds: medians with their spread, ratios within rounds, bars, a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from engines_measure import Case, Samples, Target

WANTED_OF_PEERS = {"vllm": 1.0, "transformers": 2.0}  # times their throughput, at least
OTHERS_SHARE_MAX = 0.05  # of the cores, used by neither engine nor benchmark: figures are marked


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and its range over rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.min)}..{number(self.max)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure that has a name, and perhaps a target: `op` target, both None where it has none."""

    name: str
    value: Spread
    unit: str
    op: str | None = None
    target: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        if self.op == ">=":
            return self.value.median >= self.target
        if self.op == "<=":
            return self.value.median <= self.target
        assert self.op == "<", f"bar {self.name}: operator {self.op!r}"
        return self.value.median < self.target

    def as_json(self) -> dict[str, Any]:
        """name, value, target, op, holds; and unit, min and max over the rounds."""
        return {
            "name": self.name,
            "value": self.value.median,
            "target": self.target,
            "op": self.op,
            "holds": self.holds,
            "unit": self.unit,
            "min": self.value.min,
            "max": self.value.max,
        }


def small_only(bar: Bar, checkpoint: str) -> Bar:
    """A bar that the issue sets for *small*: on another checkpoint it has no target."""
    return bar if checkpoint == "small" else replace(bar, op=None, target=None)


def number(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def throughput(samples: Samples, case: str, target: str) -> list[float]:
    """Tokens/s, one for each round."""
    return [s.tokens_per_s for s in samples[case, target]]


def best_of(samples: Samples, case: str, targets: Sequence[str]) -> str:
    """Of several ways to run one engine the one that is faster in this case, by its median."""
    return max(targets, key=lambda target: median(throughput(samples, case, target)))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the ratios within rounds."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def peer_bars(
    checkpoint: str, samples: Samples, cases: Sequence[Case], peer: str, targets: Sequence[str]
) -> list[Bar]:
    """`{checkpoint}_{case}_vs_{peer}`; the peer is the better of its targets in each figure."""
    return [
        Bar(
            name=f"{checkpoint}_{case.name}_vs_{peer}",
            value=ratio(
                throughput(samples, case.name, "remora"),
                throughput(samples, case.name, best_of(samples, case.name, targets)),
            ),
            unit="ratio",
            op=">=",
            target=WANTED_OF_PEERS[peer],
        )
        for case in cases
    ]


def http_overhead(samples: Samples, case: Case) -> list[float]:
    """Milliseconds of wall time per token that HTTP adds to the engine level, in each round."""
    engine = throughput(samples, case.name, "remora")
    http = throughput(samples, case.name, "remora-http")
    return [1e3 / h - 1e3 / e for h, e in zip(http, engine, strict=True)]


def table(samples: Samples, cases: Sequence[Case], targets: Sequence[Target]) -> str:
    """Markdown: a line for each engine, tokens/s and time to first token for each case."""
    lines = [
        "| engine | " + " | ".join(f"{c.name} tokens/s" for c in cases) + " | first token, ms |",
        "|---" * (len(cases) + 2) + "|",
    ]
    for target in targets:
        cells, firsts = [], []
        for case in cases:
            taken = samples.get((case.name, target.name))
            if not taken:
                cells.append("-")
                continue
            cells.append(str(Spread.of([s.tokens_per_s for s in taken])))
            firsts.append(f"{case.name} {number(median(s.first_ms for s in taken))}")
        lines.append(f"| {target.name} | {' | '.join(cells)} | {', '.join(firsts)} |")
    return "\n".join(lines)


def disturbance(samples: Samples) -> dict[str, float]:
    """How much of the cores neither the measured engine nor the benchmark used, as shares."""
    taken = [s.cpu for of_case in samples.values() for s in of_case]
    return {
        "others_median": median(cpu.others for cpu in taken),
        "others_max": max(cpu.others for cpu in taken),
        "idle_engines_median": median(cpu.idle_engines for cpu in taken),
        "idle_engines_max": max(cpu.idle_engines for cpu in taken),
    }


def sample_rows(label: str, samples: Samples) -> list[Mapping[str, str | float | Spread]]:
    """A row for each case and target, for the JSON file."""
    return [
        {
            "checkpoint": label,
            "case": case,
            "engine": target,
            "tokens_per_s": Spread.of([s.tokens_per_s for s in taken]),
            "first_ms": Spread.of([s.first_ms for s in taken]),
            "others_share_max": round(max(s.cpu.others for s in taken), 3),
            "idle_engines_share_max": round(max(s.cpu.idle_engines for s in taken), 3),
        }
        for (case, target), taken in samples.items()
    ]
