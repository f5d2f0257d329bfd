"""The picture of train_both.py, from its JSON: returns against three clocks, and bytes.

python benchmarks/train_both_picture.py benchmarks/results/train_both.json out.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import altair as alt

from paged_kv.tools.html.picture import svg

TITLE = "CartPole on both caches: returns against three clocks, and reserved bytes"
SMOOTH = 5  # collections in one point of the picture
MIB = 2**20

Row = dict[str, Any]


class Look(NamedTuple):
    """How the line of one side is drawn."""

    name: str
    colour: str
    width: float


class Panel(NamedTuple):
    """What one panel shows: its title, and the fields and titles of its axes."""

    title: str
    x: str
    x_title: str
    y: str
    y_title: str


# LightZero's line is the thicker one and lies below: where both are equal, both are seen.
LOOKS = {
    "lightzero": Look("LightZero's own cache", "var(--other)", 5.0),
    "paged": Look("paged", "var(--paged)", 1.8),
}
RETURN = f"return, mean of {SMOOTH} turns"
PANELS = (
    Panel("Returns against environment steps", "env_steps", "environment steps", "return", RETURN),
    Panel("Returns against CPU time", "cpu_s", "CPU seconds", "return", RETURN),
    Panel("Returns against wall-clock time", "wall_s", "wall-clock seconds", "return", RETURN),
    Panel(
        "Bytes that the cache has reserved, after collecting",
        "env_steps",
        "environment steps",
        "mib",
        "MiB",
    ),
)


def drawing(sides: Sequence[Row]) -> str:
    """The text of an SVG file: four panels, two in a row."""
    rows = [row for side in sides for row in rows_of(side)]
    panels = [drawn(panel, rows) for panel in PANELS]
    return svg(alt.concat(*panels, columns=2, spacing=30), TITLE)


def rows_of(side: Row) -> list[Row]:
    """A row for each collection: the clocks, and what is drawn over them."""
    name = LOOKS[side["cache"]].name
    scores = [row for row in side["returns"] if row["at"] == "collected"]
    held = [row for row in side["held"] if row["at"] == "collected"]
    clocks = ("env_steps", "cpu_s", "wall_s")
    returns = [
        {"side": name, "return": score, **{clock: row[clock] for clock in clocks}}
        for row, score in zip(scores, smoothed([row["mean_return"] for row in scores]))
    ]
    reserved = [
        {"side": name, "mib": row["reserved"] / MIB, "env_steps": row["env_steps"]} for row in held
    ]
    return returns + reserved


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value as the mean of it and those just before it."""
    return [mean(values[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(values))]


def drawn(panel: Panel, rows: Sequence[Row]) -> alt.LayerChart:
    """One panel, its vertical axis from zero."""
    names = [look.name for look in LOOKS.values()]
    colours = alt.Scale(domain=names, range=[look.colour for look in LOOKS.values()])
    axis = alt.Axis(grid=False, tickCount=6, labelFlush=False)
    x = alt.X(panel.x, type="quantitative", title=panel.x_title, axis=axis)
    y = alt.Y(panel.y, type="quantitative", title=panel.y_title, scale=alt.Scale(zero=True))
    legend = alt.Legend(title=None, symbolType="stroke", symbolSize=300, symbolStrokeWidth=3)
    colour = alt.Color("side:N", scale=colours, legend=legend)
    lines = []
    for look in LOOKS.values():
        values = [row for row in rows if row["side"] == look.name and panel.y in row]
        line = alt.Chart(alt.InlineData(values=values)).mark_line(strokeWidth=look.width)
        lines.append(line.encode(x, y, colour))
    return alt.layer(*lines, width=400, height=240, title=panel.title)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("json", type=Path)
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    options.svg.write_text(drawing(json.loads(options.json.read_text())["sides"]))


if __name__ == "__main__":
    main()
