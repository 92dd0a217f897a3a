"""Rows and bars of `traffic.py` out of its results."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean

from common import Row
from engines_report import Bar, Spread
from traffic_ladder import Result, Shape

D8 = {spare: Shape(8, 1, spare) for spare in (0.0, 0.25, 0.5)}


def over_folds(values: Sequence[float]) -> Spread:
    """The mean over folds, where other benchmarks have a median, and the range (issue 4)."""
    return Spread(fmean(values), min(values), max(values))


def rows(results: Iterable[Result]) -> list[Row]:
    """One for each scenario, shape, sources and method: means over layers, then folds; and for each
    shift by itself, beside their mean."""
    found = list(results)
    found += [replace(r, scenario=f"{r.scenario} to {r.turned_to}") for r in found if r.turned_to]

    def key(result: Result) -> tuple[str, int, int, float, str, str]:
        shape = result.shape
        return (
            result.scenario, shape.hosts, shape.per_host, shape.spare, result.sources,
            result.method,
        )  # fmt: skip

    return [_row(list(group)) for _, group in groupby(sorted(found, key=key), key=key)]


def _row(group: list[Result]) -> Row:
    first, means = group[0], [result.mean for result in group]

    def of(name: str, digits: int = 3) -> float:
        return round(fmean(getattr(mean, name) for mean in means), digits)

    return {
        "scenario": first.scenario,
        "shape": str(first.shape),
        "sources": first.sources,
        "method": first.method,
        "copies": over_folds([mean.copies for mean in means]),
        "load": over_folds([mean.load for mean in means]),
        "step load": of("step_load"),
        "local rate": of("local_rate"),
        "out B": of("out_bytes", 0),
        "back ordered B": of("back_ordered", 0),
        "back presummed B": of("back_presummed", 0),
        "active": of("active", 2),
        "active max": of("active_max", 2),
        "ingress max/mean": of("ingress"),
        "ingress rows": of("ingress_rows"),
        "moved MB": round(fmean(r.migrated_bytes for r in group) / 1e6, 2),
        "plan s": round(fmean(r.plan_s for r in group), 2),
    }


class Figures:
    """Results by what they are of; a figure is a list with one value a fold."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = list(results)

    def get(self, name: str, scenario: str, shape: Shape, method: str, sources: str) -> list[float]:
        """Values of a figure by fold; empty when nothing of it ran."""
        found = [
            result
            for result in self._results
            if (result.scenario, result.shape, result.method, result.sources)
            == (scenario, shape, method, sources)
        ]
        return [getattr(r.mean, name) for r in sorted(found, key=lambda r: r.fold)]


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Paired by fold."""
    return [a / b for a, b in zip(above, below, strict=True)]


def bars(results: Iterable[Result]) -> list[Bar]:
    """Those of issue 4 that these results can answer, and the same with round-robin sources."""
    figures = Figures(results)
    return [*_v2lite(figures), *_demo(figures), *_shift(figures)]


def _v2lite(figures: Figures) -> list[Bar]:
    found: list[Bar] = []

    def bar(name: str, values: list[float], op: str | None, target: float | None) -> None:
        if values:
            unit = "x" if "_vs_" in name else ""
            value = over_folds(values)
            found.append(Bar(name=name, value=value, unit=unit, op=op, target=target))

    for sources, suffix in (("homes", ""), ("round-robin", "_round_robin")):
        for spare, percent in ((0.0, 0), (0.25, 25), (0.5, 50)):

            def get(name: str, method: str, sources: str, shape: Shape = D8[spare]) -> list[float]:
                return figures.get(name, "v2lite", shape, method, sources)

            loads = zip(
                get("load", "B6 Remora", sources),
                get("load", "B3a EPLB random", "round-robin"),
                get("load", "B3b EPLB cover", "round-robin"),
                strict=True,
            )
            excess = [ours - min(random, cover) for ours, random, cover in loads]
            aim = suffix == "" and spare < 0.5
            bar(f"v2lite_d8_spare{percent}_load_minus_eplb{suffix}", excess, *_if(aim, "<=", 0.03))
            ours = get("copies", "B6 Remora", sources)
            versus = {"": ("B3a EPLB random", {0.0: 0.72, 0.25: 0.64})}
            if spare > 0:
                versus["_cover"] = ("B3b EPLB cover", {0.25: 0.75})
            for what, (other, targets) in versus.items():
                values = ratio(ours, get("copies", other, "round-robin"))
                wanted = _if(suffix == "" and spare in targets, "<=", targets.get(spare, 0.0))
                bar(f"v2lite_d8_spare{percent}_copies_vs_eplb{what}{suffix}", values, *wanted)
    return found


def _if(aim: bool, op: str, target: float) -> tuple[str | None, float | None]:
    return (op, target) if aim else (None, None)


def _demo(figures: Figures) -> list[Bar]:
    """B5 at equal slots, none spare, each with its own shuffle (the bar), or with its homes."""
    found = []
    for sources, suffix, target in (("shuffle", "", 0.85), ("homes", "_homes", None)):
        ours, theirs = (
            figures.get("copies", "demo", D8[0.0], method, sources)
            for method in ("B6 Remora", "B5 co-clustering")
        )
        if ours and theirs:
            op = None if target is None else "<="
            value = over_folds(ratio(ours, theirs))
            name = f"demo_copies_vs_b5{suffix}"
            found.append(Bar(name=name, value=value, unit="x", op=op, target=target))
    for spare, suffix, aim in ((0.25, "", True), (0.0, "_spare0", False)):
        none, guess, oracle = (
            figures.get("copies", "demo", D8[spare], "B6 Remora", sources)
            for sources in ("round-robin", "shuffle", "shuffle oracle")
        )
        if none and guess and oracle:
            closed = [(n - g) / (n - o) for n, g, o in zip(none, guess, oracle, strict=True)]
            name = f"shuffle_oracle_gap_closed{suffix}"
            op, target = (">=", 0.6) if aim else (None, None)
            found.append(Bar(name=name, value=over_folds(closed), unit="", op=op, target=target))
    return found


def _shift(figures: Figures) -> list[Bar]:
    """The bars are the demo model's: its documents give a plan for a domain that is not judged."""
    found = []
    for trace, suffix in (("demo", ""), ("v2lite", "_v2lite")):
        after, own = (
            {
                name: figures.get(name, f"{trace} shift", D8[0.25], method, "homes")
                for name in ("load", "copies")
            }
            for method in ("B6 after 5,000 tokens", "B6 planned for it")
        )
        if not after["load"] or not own["load"]:
            continue
        gap = [a - b for a, b in zip(after["load"], own["load"], strict=True)]
        ratios = ratio(after["copies"], own["copies"])
        for name, values, target in (
            ("shift_load_gap", gap, 0.05),
            ("shift_copies_ratio", ratios, 1.10),
        ):
            op = "<=" if not suffix else None
            found.append(
                Bar(
                    name=name + suffix,
                    value=over_folds(values),
                    unit="",
                    op=op,
                    target=target if op else None,
                )
            )
    return found
