"""Line charts side by side in one SVG file, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# of one chart and of its margins
WIDTH = 460
HEIGHT = 300
LEFT = 62
RIGHT = 18
TOP = 34
BOTTOM = 44
COLUMNS = 2
TICKS = 5


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, its colour, how thick it is, and its points."""

    name: str
    colour: str
    width: float
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes, the vertical one from 0 or, where `log`, by powers of ten."""

    title: str
    across: str
    lines: Sequence[Line]
    log: bool = False

    def limits(self) -> tuple[float, float, float]:
        """The largest x, and the smallest and the largest y."""
        points = [point for line in self.lines for point in line.points]
        right = max((x for x, _ in points), default=1.0) or 1.0
        values = [y for _, y in points if y > 0 or not self.log]
        high = max(values, default=1.0) or 1.0
        if self.log:
            return (
                right,
                10.0 ** math.floor(math.log10(min(values, default=1.0))),
                10.0 ** math.ceil(math.log10(high)),
            )
        return right, 0.0, high


def drawing(charts: Sequence[Chart]) -> str:
    """The SVG text of all charts, two a row, with one legend below."""
    rows = -(-len(charts) // COLUMNS)
    width = WIDTH * min(COLUMNS, len(charts))
    height = HEIGHT * rows + 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, chart in enumerate(charts):
        x = number % COLUMNS * WIDTH
        y = number // COLUMNS * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_chart(chart), "</g>"]
    parts += _legend(charts[0].lines, height - 14)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _chart(chart: Chart) -> list[str]:
    right, low, high = chart.limits()
    wide = WIDTH - LEFT - RIGHT
    tall = HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return LEFT + wide * x / right

    def up(y: float) -> float:
        share = (
            math.log(max(y, low) / low) / math.log(high / low)
            if chart.log
            else (y - low) / (high - low)
        )
        return TOP + tall * (1 - share)

    parts = [f'<text x="{LEFT}" y="20" font-size="13">{escape(chart.title)}</text>']
    for y in _powers(low, high) if chart.log else _ticks(high):
        parts.append(f'<path d="M{LEFT} {up(y):.1f}h{wide}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>'
        )
    for x in _ticks(right):
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{_number(x)}</text>'
        )
    parts.append(
        f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 10}" '
        f'text-anchor="middle">{escape(chart.across)}</text>'
    )
    for line in chart.lines:
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{line.colour}" '
            f'stroke-width="{line.width}" '
            'stroke-linejoin="round"/>'
        )
    return parts


def _legend(lines: Sequence[Line], y: float) -> list[str]:
    parts = []
    x = float(LEFT)
    for line in lines:
        parts.append(
            f'<path d="M{x} {y - 4}h26" stroke="{line.colour}" stroke-width="{line.width}"/>'
        )
        parts.append(f'<text x="{x + 32}" y="{y}">{escape(line.name)}</text>')
        x += 60 + 7 * len(line.name)
    return parts


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, about five of them."""
    rough = high / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(int(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
