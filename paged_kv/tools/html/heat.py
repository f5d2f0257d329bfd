"""What each of many workers held or did over time: a row a worker, a cell a stretch of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import altair as alt

from paged_kv.recording import Recording
from paged_kv.tools.html.figure import Figure
from paged_kv.tools.html.series import Row, number

STRETCHES = 60
LEVELS = 6
NOTHING = "none"
ROW = 20  # pixels


class Named(NamedTuple):
    """A worker: what readers call it, what was recorded of it, and when that began."""

    name: str
    recording: Recording
    later: float  # seconds after the first of all


class Measure(NamedTuple):
    """A field of samples as cells. `grows`: a count, of which a cell shows what was added."""

    field: str
    name: str
    show: Callable[[float], str]
    grows: bool


class Cell(NamedTuple):
    """One worker in one stretch of time, a number from 0."""

    place: int
    value: float


def heat(
    name: str, title: str, reading: str, workers: Sequence[Named], measure: Measure
) -> Figure | None:
    """A figure of cells, the darker the more; None where there is nothing but zeros."""
    end = max((each.recording.seconds + each.later for each in workers), default=0.0)
    found = {each.name: cells(each, measure, end) for each in workers}
    top = max((cell.value for row in found.values() for cell in row), default=0)
    if not top or not end:
        return None
    rows = [
        _row(worker, cell, measure, top, end / STRETCHES)
        for worker, row in found.items()
        for cell in row
    ]
    drawing = _drawn(rows, list(found), measure, top)
    return Figure(name, title, drawing, reading, wide=True, fixed=True)


def cells(worker: Named, measure: Measure, end: float) -> list[Cell]:
    """The most that stood in each stretch of the time until `end`, or what was added in it.

    None before a recording begins, and after it ended.
    """
    width = end / STRETCHES
    values: dict[int, float] = {}
    before = 0.0
    last = 0
    for sample in worker.recording.samples:
        value = number(sample, measure.field)
        if value is None:
            continue
        place = _place(sample["t"] + worker.later, width)
        if measure.grows:
            values[place] = values.get(place, 0.0) + value - before
        else:
            values.update(dict.fromkeys(range(last + 1, place), before) if values else {})
            held = before if values and place not in values else 0.0
            values[place] = max(values.get(place, held), value)
        before = value
        last = place
    over = _place(worker.recording.seconds + worker.later, width)
    if values and not measure.grows:
        values.update(dict.fromkeys(range(last + 1, over + 1), before))
    return [Cell(place, values[place]) for place in sorted(values)]


def _place(t: float, width: float) -> int:
    return min(STRETCHES - 1, int(t / width)) if width else 0


def _row(worker: str, cell: Cell, measure: Measure, top: float, width: float) -> Row:
    return {
        "w": worker,
        "x": round(cell.place * width, 6),
        "e": round((cell.place + 1) * width, 6),
        "s": measure.show(cell.value),
        "b": _level(cell.value, measure, top),
    }


def _level(value: float, measure: Measure, top: float) -> str:
    """The step of the ramp, by its upper end."""
    if value <= 0:
        return NOTHING
    return f"up to {measure.show(top * min(LEVELS, ceil(value * LEVELS / top)) / LEVELS)}"


def _drawn(rows: list[Row], names: Sequence[str], measure: Measure, top: float) -> alt.Chart:
    steps = [_level(top * (step + 1) / LEVELS, measure, top) for step in range(LEVELS)]
    hues = ["var(--grid)", *(f"var(--ramp-{step + 1})" for step in range(LEVELS))]
    looks = dict(zip([NOTHING, *steps], hues))  # small counts share a label
    scale = alt.Scale(domain=list(looks), range=list(looks.values()))
    narrow = alt.Axis(grid=False, tickCount=8)
    cells_drawn = alt.Chart(alt.InlineData(values=rows)).mark_rect(stroke="var(--sheet)")
    drawing: alt.Chart = cells_drawn.properties(height=max(60, ROW * len(names))).encode(
        alt.X(
            "x:Q",
            title="seconds since the first recording began",
            scale=alt.Scale(nice=False),
            axis=narrow,
        ),
        alt.X2("e:Q"),
        alt.Y("w:N", title=None, sort=list(names), axis=alt.Axis(labelLimit=140, ticks=False)),
        alt.Color("b:N", scale=scale, legend=alt.Legend(title=measure.name, columns=4)),
        tooltip=[
            alt.Tooltip("w:N", title="worker"),
            alt.Tooltip("x:Q", title="from second", format=",.4~g"),
            alt.Tooltip("s:N", title=measure.name),
        ],
    )
    return drawing
