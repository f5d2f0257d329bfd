"""The charts over the time of a search: bytes, references, hits, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import altair as alt

from paged_kv.tools import summary
from paged_kv.tools.html.figure import Across, Figure, Line, Up, choose, lines
from paged_kv.tools.html.series import Axis, Row, Source, byte_unit, number
from paged_kv.tools.html.style import BIN_COLOURS, BIN_LABELS, DOTS, HEIGHT, LONG, SHORT, SOLID
from paged_kv.tools.units import count, size


class Look(NamedTuple):
    """A field of a sample as a line: what the legend calls it, its colour and its dashes."""

    field: str
    name: str
    colour: str
    dash: list[int]


class Share(NamedTuple):
    """The time of one side, part by part: one of them is the cache."""

    name: str
    parts: dict[str, float]

    @property
    def whole(self) -> float:
        """The time of all parts."""
        return sum(self.parts.values())


class PartLook(NamedTuple):
    """A part of the time: what the legend calls it, and its colour."""

    name: str
    colour: str


class Split(NamedTuple):
    """The times of all sides, the looks of their parts, the unit, and a sentence on how they were
    measured.
    """

    shares: Sequence[Share]
    looks: dict[str, PartLook]
    unit: str
    reading: str


RESERVED = Look("bytes_reserved", "reserved by the pool", "var(--reserved)", LONG)
IN_USE = Look("bytes_in_use", "pages in use", "var(--paged)", SOLID)
SHARED = Look("bytes_shared", "pages that are shared", "var(--shared)", SHORT)
DENSE = Look("bytes_dense", "dense copies would hold", "var(--dense)", LONG)
UNIQUE = Look("bytes_unique", "unique tokens need", "var(--unique)", DOTS)
INSIDE = (RESERVED, IN_USE, SHARED, UNIQUE)
TWO_PARTS = {
    "cache": PartLook("the cache", "var(--cache)"),
    "rest": PartLook("the model, the tree, all the rest", "var(--rest)"),
}


def held(found: Sequence[Source], under: Axis) -> Figure | None:
    """Bytes held by every side, beside what dense copies would hold and what the unique tokens
    need.
    """
    drawn = [_line(source, _own(source, "bytes_in_use"), under) for source in found]
    paged = next((source for source in found if source.paged), None)
    first = paged or (found[0] if found else None)
    if first is not None:
        drawn += [_line(first, look, under) for look in (DENSE, UNIQUE)]
    if not any(line.points for line in drawn):
        return None
    reading = (
        "Each line is what would have to lie in memory at that moment; the lower, the better. "
        "The unique tokens are the floor: every token of every live context, stored once."
    )
    return Figure(
        "held",
        _held_title(found, paged),
        _bytes(drawn, under),
        _with_breaks(reading, under),
        wide=True,
    )


def _held_title(found: Sequence[Source], paged: Source | None) -> str:
    other = next((source for source in found if not source.paged), None)
    ours = 0 if paged is None else paged.peak("bytes_in_use")
    if paged is None or not ours:
        return "Key/value bytes held"
    theirs = 0 if other is None else other.peak("bytes_in_use")
    if other is not None and theirs:
        return (
            f"{other.name} peaks at {size(theirs)}, pages at {size(ours)}: {_times(theirs / ours)}"
        )
    dense = paged.peak("bytes_dense")
    if not dense:
        return f"Pages peak at {size(ours)}"
    return (
        f"Pages peak at {size(ours)}; dense copies would hold {size(dense)}: {_times(dense / ours)}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x less" if ratio >= 1 else f"{1 / ratio:.3g}x more"


def inside(source: Source, under: Axis) -> Figure | None:
    """What the pool reserves, uses and shares."""
    drawn = [_line(source, look, under) for look in INSIDE]
    if not any(line.points for line in drawn):
        return None
    used = source.peak("bytes_in_use")
    unique = source.peak("bytes_unique")
    title = "What the pool reserves, uses and shares"
    if unique:
        title = (
            f"At their peak the pages in use hold {used / unique:.3g}x the bytes of the "
            "unique tokens"
        )
    reading = (
        "The closer the pages in use lie to the unique tokens, the less is wasted inside pages; "
        "what is "
        "reserved above them is room that the pool took when it grew."
    )
    return Figure(f"inside-{source.key}", title, _bytes(drawn, under), _with_breaks(reading, under))


def references(source: Source, under: Axis) -> Figure | None:
    """Pages by how many sequences hold them, stacked."""
    rows: list[Row] = []
    for sample in source.samples:
        bins = sample.get("pages_by_refs")
        if isinstance(bins, dict):
            rows += [
                {"x": under.of(sample), "b": name, "i": place, "y": number(bins, name) or 0}
                for place, name in enumerate(BIN_LABELS)
            ]
    if not rows:
        return None
    reading = (
        "The height is the number of pages in use; the darker (on dark: the lighter) the band, "
        "the more sequences read the same page. Click a number to single it out."
    )
    title = _references_title(source)
    return Figure(f"references-{source.key}", title, _bands(rows, under), reading)


def _bands(rows: list[Row], under: Axis) -> alt.Chart:
    picked = alt.selection_point(name="picked", fields=["b"], bind="legend")
    x_axis = alt.Axis(grid=False, tickCount=8)
    colours = alt.Scale(domain=BIN_LABELS, range=BIN_COLOURS)
    legend = alt.Legend(title="sequences that hold a page", columns=6)
    bands = alt.Chart(alt.InlineData(values=rows)).mark_area(interpolate="step-after")
    drawing: alt.Chart = (
        bands.encode(
            alt.X("x:Q", title=under.title, scale=alt.Scale(nice=False), axis=x_axis),
            alt.Y("y:Q", title="pages in use", stack="zero", axis=alt.Axis(tickCount=6)),
            alt.Color("b:O", sort=BIN_LABELS, scale=colours, legend=legend),
            order=alt.Order("i:Q", sort="descending"),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.15)),
            tooltip=[
                alt.Tooltip("b:O", title="held by"),
                alt.Tooltip("x:Q", title=under.title),
                alt.Tooltip("y:Q", title="pages"),
            ],
        )
        .add_params(picked)
        .properties(height=HEIGHT)
    )
    return drawing


def _references_title(source: Source) -> str:
    found = max(source.samples, key=lambda row: number(row, "bytes_in_use") or 0).get(
        "pages_by_refs"
    )
    bins: Row = found if isinstance(found, dict) else {}
    pages = sum(number(bins, name) or 0 for name in BIN_LABELS)
    if not pages:
        return "Pages by the number of sequences that hold them"
    shared = pages - (number(bins, "1") or 0)
    return f"At the peak {count(shared)} of {count(pages)} pages are held by more than one sequence"


def hits(found: Sequence[Source], under: Axis) -> Figure | None:
    """Share of the lookups that found their context, since the recording began."""
    drawn = []
    # dashed lines on top of those of pages
    for source in sorted(found, key=lambda source: not source.paged):
        pairs = [
            (under.of(row), number(row, "queries"), number(row, "hits")) for row in source.samples
        ]
        points = [(x, 100 * (good or 0) / asked) for x, asked, good in pairs if asked]
        if points:
            drawn.append(Line(source.key, source.name, source.colour, source.dash, points))
    if not drawn:
        return None
    last = {line.name: line.points[-1][1] for line in drawn}
    if all(rate == 100 for rate in last.values()):
        title = "Every lookup found its context"
    else:
        title = "; ".join(f"{name}: {rate:.3g} % of lookups hit" for name, rate in last.items())
    lowest = min(y for line in drawn for _, y in line.points)
    low = max(start for start in (0, 50, 90) if start <= max(lowest, 0))
    chart = lines(drawn, _across(under), Up("hits / lookups so far", "%", low=low, high=100))
    reading = (
        f"A miss means that a context is computed anew. The axis begins at {low} %; a dashed "
        "line on top of "
        "another one is equal to it."
    )
    return Figure("hits", title, chart, reading)


def cache_time(found: Sequence[Source], under: Axis) -> Figure | None:
    """Seconds spent in the cache so far."""
    drawn = []
    for source in found:
        line = _line(source, _own(source, "cache_s"), under, scale=1e-3)
        if any(y for _, y in line.points):
            drawn.append(line)
    if not drawn:
        return None
    spent = ", ".join(f"{line.name} {count(line.points[-1][1])} ms" for line in drawn)
    chart = lines(drawn, _across(under), Up("time in the cache so far", "ms"))
    reading = (
        "The steeper a line, the more each step costs. Recording and timing cost some time "
        "themselves, so read "
        "this for its shape; the bars of a profile are the measurement."
    )
    return Figure("cache-time", f"Time in the cache, added up: {spent}", chart, reading)


def verbs(source: Source) -> Figure | None:
    """Seconds by verb, from the events."""
    found = [verb for verb in summary.verbs(source.recording) if verb.seconds]
    if not found:
        return None
    rows = [
        {"n": verb.name, "y": 1000 * verb.seconds, "c": verb.calls, "e": verb.us_per_call}
        for verb in found
    ]
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(color="var(--cache)", cornerRadiusEnd=2)
        .encode(
            alt.Y(
                "n:N",
                title=None,
                sort=None,
                axis=alt.Axis(labelLimit=140, ticks=False, domain=False),
            ),
            alt.X("y:Q", title="time in all calls (ms)", axis=alt.Axis(tickCount=5)),
            tooltip=[
                alt.Tooltip("n:N", title="verb"),
                alt.Tooltip("y:Q", title="all calls (ms)", format=",.4~g"),
                alt.Tooltip("c:Q", title="calls", format=","),
                alt.Tooltip("e:Q", title="a call (us)", format=",.3~g"),
            ],
        )
        .properties(height=max(80, 34 * len(rows)))
    )
    most = max(found, key=lambda verb: verb.seconds)
    share = 100 * most.seconds / sum(verb.seconds for verb in found)
    title = f"{share:.3g} % of the time in the cache's verbs goes into {most.name}"
    reading = (
        "The verbs of the cache, each with all its calls; a verb that runs within another "
        "one counts in both."
    )
    return Figure(f"verbs-{source.key}", title, chart, reading)


def split(times: Split) -> Figure | None:
    """A bar a side, in parts, one of which is the time in the cache."""
    if not times.shares:
        return None
    shares = ", ".join(
        f"{100 * share.parts['cache'] / share.whole:.3g} % ({share.name})" for share in times.shares
    )
    title = f"The share of the time that goes into the cache: {shares}"
    return Figure("split", title, _split_bars(times), times.reading)


def _split_bars(times: Split) -> alt.Chart:
    looks = times.looks
    rows = [row for share in times.shares for row in _split_rows(share, list(looks))]
    names = alt.Axis(labelLimit=140, ticks=False, domain=False)
    colours = alt.Scale(domain=list(looks), range=[look.colour for look in looks.values()])
    names_of = {part: look.name for part, look in looks.items()}
    legend = alt.Legend(title=None, labelExpr=choose(names_of))
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(height=34, cornerRadius=2)
    drawing: alt.Chart = bars.properties(height=60 * len(times.shares)).encode(
        alt.Y("n:N", title=None, sort=None, axis=names),
        alt.X("y:Q", title=times.unit, stack="zero", axis=alt.Axis(tickCount=4)),
        alt.Color("p:N", scale=colours, legend=legend),
        order=alt.Order("i:Q"),
        tooltip=[
            alt.Tooltip("n:N", title="side"),
            alt.Tooltip("p:N", title="part"),
            alt.Tooltip("y:Q", title=times.unit, format=",.4~g"),
            alt.Tooltip("s:Q", title="share", format=".1%"),
        ],
    )
    return drawing


def _split_rows(share: Share, order: list[str]) -> list[Row]:
    return [
        {"n": share.name, "p": part, "y": time, "i": order.index(part), "s": time / share.whole}
        for part, time in share.parts.items()
    ]


def _own(source: Source, name: str) -> Look:
    """A field in the name and the look of its recording."""
    return Look(name, source.name, source.colour, source.dash)


def _line(source: Source, look: Look, under: Axis, scale: float = 1.0) -> Line:
    pairs = [(under.of(row), number(row, look.field)) for row in source.samples]
    points = [(x, y / scale) for x, y in pairs if y is not None]
    return Line(f"{source.key}_{look.field}", look.name, look.colour, look.dash, points)


def _bytes(drawn: Sequence[Line], under: Axis) -> alt.LayerChart:
    full = [line for line in drawn if line.points]
    unit, scale = byte_unit(max(y for line in full for _, y in line.points))
    scaled = [
        replace(line, points=[(x, round(y / scale, 4)) for x, y in line.points]) for line in full
    ]
    return lines(scaled, _across(under), Up("key/value bytes", unit, form=",.3~f"))


def _across(under: Axis) -> Across:
    return Across(under.title, under.breaks)


def _with_breaks(reading: str, under: Axis) -> str:
    return f"{reading} Dotted uprights: the next root step begins." if under.breaks else reading
