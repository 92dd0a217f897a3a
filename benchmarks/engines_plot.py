"""Tokens/s over concurrent streams as an SVG file, a line for each series; no library needed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50  # margins
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#b5651d")


def line_plot(title: str, x_name: str, series: Mapping[str, Mapping[int, float]]) -> str:
    """SVG text. Both axes are logarithmic to base 2.

    Args:
        series: points (x > 0, y > 0) by name.
    """
    xs = sorted({x for points in series.values() for x in points})
    ys = [y for points in series.values() for y in points.values()]
    y_ticks = _powers(min(ys), max(ys))
    across = _Scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    up = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{title}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" '
        f'text-anchor="middle">{x_name}</text>',
    ]
    for y in y_ticks:
        parts.append(_line(LEFT, up(y), WIDTH - RIGHT, up(y), "#ddd"))
        parts.append(f'<text x="{LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        parts.append(_line(across(x), TOP, across(x), HEIGHT - BOTTOM, "#eee"))
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x}</text>'
        )
    for i, (name, points) in enumerate(series.items()):
        parts += _series(name, [(across(x), up(points[x])) for x in sorted(points)], i)
    return "\n".join([*parts, "</svg>", ""])


def write_plot(
    path: Path, title: str, x_name: str, series: Mapping[str, Mapping[int, float]]
) -> None:
    """Writes `line_plot` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line_plot(title, x_name, series))


def _series(name: str, points: Sequence[tuple[float, float]], index: int) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    y = TOP + 18 * index + 6
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *dots,
        f'<rect x="{WIDTH - RIGHT + 14}" y="{y - 8}" width="12" height="8" fill="{colour}"/>',
        f'<text x="{WIDTH - RIGHT + 32}" y="{y}">{name}</text>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _powers(least: float, most: float) -> list[float]:
    """Powers of two that hold both ends."""
    first, last = math.floor(math.log2(least)), math.ceil(math.log2(most))
    return [2.0**power for power in range(first, max(last, first + 1) + 1)]


class _Scale:
    """Maps least..most to a range of pixels, logarithmically."""

    def __init__(self, least: float, most: float, begin: float, end: float) -> None:
        self._least, self._begin = math.log2(least), begin
        self._per_doubling = (end - begin) / max(math.log2(most) - self._least, 1e-9)

    def __call__(self, value: float) -> float:
        return self._begin + (math.log2(value) - self._least) * self._per_doubling
