"""A figure: a title that says what to see, a chart, a sentence on how to read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Across(NamedTuple):
    """The horizontal axis: its title, and where dotted rules mark a new root step."""

    title: str
    breaks: Sequence[float] = ()


class Up(NamedTuple):
    """The vertical axis: title, unit, how a tooltip writes its numbers, and its ends (None: as
    high as the lines reach).
    """

    title: str
    unit: str
    form: str = ",.4~g"
    low: float = 0.0
    high: float | None = None


def lines(drawn: Sequence[Line], across: Across, up: Up) -> alt.LayerChart:
    """Lines over common axes, with a rule that reads all of them off under the pointer. A click on
    the legend singles a line out.
    """
    data = alt.InlineData(
        values=[{"x": x, "k": line.key, "y": y} for line in drawn for x, y in line.points]
    )
    near = alt.selection_point(
        name="near",
        fields=["x"],
        on="pointermove, click",
        nearest=True,
        empty=False,
        clear="pointerout",
    )
    x = _across(drawn, across)
    colour = alt.Color(
        "k:N", legend=_names(drawn), scale=_scale(drawn, [line.colour for line in drawn])
    )
    y = _up(drawn, up)
    layers: list[Any] = [
        _strokes(drawn, data).encode(x, y, colour),
        alt.Chart(data)
        .transform_filter(near)
        .mark_point(size=40, strokeWidth=2.5)
        .encode(x, y, colour),
        _rule(drawn, across, up, near).properties(data=data).encode(x),
    ]
    if across.breaks:
        marks = alt.InlineData(values=[{"x": place} for place in across.breaks])
        layers.insert(0, alt.Chart(marks).mark_rule(color="var(--line)", strokeDash=DOTS).encode(x))
    drawing: alt.LayerChart = alt.layer(*layers).properties(height=HEIGHT)
    return drawing


def _across(drawn: Sequence[Line], across: Across) -> alt.X:
    # Domains are given: the layer that holds only what is pointed at has no extent of its own.
    places = [x for line in drawn for x, _ in line.points]
    scale = alt.Scale(domain=[min(places), max(places)], nice=False)
    axis = alt.Axis(grid=False, tickCount=8)
    if all(float(place).is_integer() for place in places):  # half a simulation means nothing
        axis.tickMinStep = 1
    return alt.X("x:Q", title=across.title, scale=scale, axis=axis)


def _up(drawn: Sequence[Line], up: Up) -> alt.Y:
    top = max(y for line in drawn for _, y in line.points) if up.high is None else up.high
    scale = alt.Scale(domain=[up.low, top or 1], nice=up.high is None)
    return alt.Y("y:Q", title=f"{up.title} ({up.unit})", scale=scale, axis=alt.Axis(tickCount=6))


def _names(drawn: Sequence[Line]) -> alt.Legend:
    return alt.Legend(
        title=None,
        labelExpr=choose({line.key: line.name for line in drawn}),
        symbolType="stroke",
        symbolSize=300,
        symbolStrokeWidth=2.5,
    )


def _scale(drawn: Sequence[Line], values: Sequence[Any]) -> alt.Scale:
    """What each line has of a look."""
    return alt.Scale(domain=[line.key for line in drawn], range=list(values))


def _strokes(drawn: Sequence[Line], data: alt.InlineData) -> alt.Chart:
    picked = alt.selection_point(name="picked", fields=["k"], bind="legend")
    dashes = _scale(drawn, [line.dash for line in drawn])
    strokes: alt.Chart = (
        alt.Chart(data)
        .mark_line()
        .encode(
            alt.StrokeDash("k:N", legend=_names(drawn), scale=dashes),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
        )
        .add_params(picked)
    )
    return strokes


def _rule(drawn: Sequence[Line], across: Across, up: Up, near: alt.Parameter) -> alt.Chart:
    read = [alt.Tooltip("x:Q", title=across.title, format=",.4~g")]
    read += [
        alt.Tooltip(f"{line.key}:Q", title=f"{plain(line.name)} ({up.unit})", format=up.form)
        for line in drawn
    ]
    rule: alt.Chart = (
        alt.Chart()
        .transform_pivot("k", value="y", groupby=["x"])
        .mark_rule(color="var(--muted)", strokeWidth=1.5)
        .encode(tooltip=read, opacity=alt.condition(near, alt.value(0.6), alt.value(0)))
        .add_params(near)
    )
    return rule


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
