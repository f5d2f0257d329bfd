"""A figure: a title that says what to see, a chart, a sentence on how to read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from paged_kv.tools.html.style import CONFIG, DOTS, HEIGHT


@dataclass(frozen=True)
class Figure:
    """One chart of the page. `title` and `reading` are plain text; `wide` takes the whole row of
    the page.
    """

    name: str
    title: str
    chart: alt.LayerChart | alt.Chart
    reading: str
    wide: bool = False
    fixed: bool = False  # keeps a least width, and scrolls in its own box on a narrow screen

    def spec(self) -> dict[str, Any]:
        """The chart as Vega-Lite, checked against its schema, as wide as the box it is put in."""
        chart = self.chart.properties(
            width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
        )
        spec: dict[str, Any] = chart.to_dict()
        return {**spec, "config": CONFIG, "description": self.title}


@dataclass(frozen=True)
class Line:
    """One line of a chart over time: a plain word as key, what the legend says, its look and its
    points (x, y).
    """

    key: str
    name: str
    colour: str
    dash: list[int]
    points: list[tuple[float, float]]


def lines(
    drawn: Sequence[Line],
    x_title: str,
    y_title: str,
    unit: str,
    *,
    breaks: Sequence[float] = (),
    form: str = ",.4~g",
    low: float = 0.0,
    high: float | None = None,
) -> alt.LayerChart:
    """Lines over a common axis, with a rule that reads all of them off under the pointer.

    A click on the legend singles a line out. `breaks` are marked by dotted rules.
    """
    points = [point for line in drawn for point in line.points]
    data = alt.InlineData(
        values=[{"x": x, "k": line.key, "y": y} for line in drawn for x, y in line.points]
    )
    keys = [line.key for line in drawn]
    # Domains are given: the layer that holds only what is pointed at has no extent of its own.
    span = [min(x for x, _ in points), max(x for x, _ in points)]
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=alt.Scale(domain=span, nice=False),
        axis=alt.Axis(grid=False, tickCount=8),
    )
    top = max(y for _, y in points) if high is None else high
    y = alt.Y(
        "y:Q",
        title=f"{y_title} ({unit})",
        scale=alt.Scale(domain=[low, top or 1], nice=high is None),
        axis=alt.Axis(tickCount=6),
    )
    names = alt.Legend(
        title=None,
        labelExpr=choose({line.key: line.name for line in drawn}),
        symbolType="stroke",
        symbolSize=300,
        symbolStrokeWidth=2.5,
    )
    colours = alt.Scale(domain=keys, range=[line.colour for line in drawn])
    dashes = alt.Scale(domain=keys, range=[line.dash for line in drawn])
    picked = alt.selection_point(name="picked", fields=["k"], bind="legend")
    near = alt.selection_point(
        name="near",
        fields=["x"],
        on="pointermove, click",
        nearest=True,
        empty=False,
        clear="pointerout",
    )
    strokes = (
        alt.Chart(data)
        .mark_line()
        .encode(
            x,
            y,
            alt.Color("k:N", legend=names, scale=colours),
            alt.StrokeDash("k:N", legend=names, scale=dashes),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
        )
        .add_params(picked)
    )
    dots = (
        alt.Chart(data)
        .transform_filter(near)
        .mark_point(size=40, strokeWidth=2.5)
        .encode(x, y, alt.Color("k:N", legend=names, scale=colours))
    )
    read = [alt.Tooltip("x:Q", title=x_title, format=",.4~g")]
    read += [
        alt.Tooltip(f"{line.key}:Q", title=f"{plain(line.name)} ({unit})", format=form)
        for line in drawn
    ]
    rule = (
        alt.Chart(data)
        .transform_pivot("k", value="y", groupby=["x"])
        .mark_rule(color="var(--muted)", strokeWidth=1.5)
        .encode(x, tooltip=read, opacity=alt.condition(near, alt.value(0.6), alt.value(0)))
        .add_params(near)
    )
    layers: list[Any] = [strokes, dots, rule]
    if breaks:
        marks = alt.InlineData(values=[{"x": place} for place in breaks])
        layers.insert(0, alt.Chart(marks).mark_rule(color="var(--line)", strokeDash=DOTS).encode(x))
    drawing: alt.LayerChart = alt.layer(*layers).properties(height=HEIGHT)
    return drawing


def pointed_at(field: str) -> alt.Parameter:
    """What is under the pointer, or was touched last: `pointed` in the expressions of a chart."""
    return alt.selection_point(
        name="pointed", fields=[field], on="pointerover, click", empty=False, clear="pointerout"
    )


def plain(name: str) -> str:
    """A name of somebody else's as a tooltip can have it: Vega-Lite writes it into an expression,
    between quotes.

    >>> plain('a "b"\\n c\\\\')
    "a 'b' c/"
    """
    return " ".join(name.replace('"', "'").replace("\\", "/").split())


def choose(names: dict[str, str]) -> str:
    """A Vega expression for a legend: the name that belongs to each key."""
    return f"{json.dumps(names)}[datum.value]"
