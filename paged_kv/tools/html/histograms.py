"""How much of the pages in use is dead, and how long pages live."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import altair as alt

from paged_kv.tools.html.figure import Figure
from paged_kv.tools.html.pagemap import cells_of, page_size
from paged_kv.tools.html.series import Row, Source
from paged_kv.tools.html.style import HEIGHT
from paged_kv.tools.units import count


def fill(source: Source) -> Figure | None:
    """Pages in use by their dead slots."""
    size = page_size(source)
    used = [cell for cell in cells_of(source) if cell["r"]]
    if not used:
        return None
    dead = Counter(size - cell["f"] for cell in used)
    lost = sum(missing * pages for missing, pages in dead.items())
    slots = size * len(used)
    rows = [{"x": str(missing), "y": dead[missing]} for missing in range(size + 1)]
    title = f"{count(lost)} of {count(slots)} slots are dead ({100 * lost / slots:.3g} %)"
    reading = (
        "A dead slot lies in a page that is in use, but no live sequence reads it: before a "
        "window that slid, "
        "or behind the last token. The further to the left the pages stand, the less memory is "
        "lost."
    )
    chart = _bars(rows, f"dead slots of a page of {size}", "pages in use")
    return Figure(f"fill-{source.key}", title, chart, reading)


def lives(source: Source) -> Figure | None:
    """Pages by how long they lived."""
    last: Row = source.recording.lives[-1] if source.recording.lives else {}
    edges = last.get("edges")
    counts = last.get("counts")
    if (
        not isinstance(edges, list)
        or not isinstance(counts, list)
        or len(edges) <= len(counts)
        or not any(counts)
    ):
        return None
    filled = [place for place, pages in enumerate(counts) if pages]
    rows = [
        {"x": up_to(edges[place + 1]), "y": counts[place]}
        for place in range(filled[0], filled[-1] + 1)
    ]
    sums = list(accumulate(counts))
    middle = next(place for place, reached in enumerate(sums) if 2 * reached >= sums[-1])
    within = edges[middle + 1]
    title = "Half of the pages were freed " + (
        f"within {up_to(within)}"
        if within is not None
        else f"after more than {up_to(edges[middle])}"
    )
    reading = (
        "From the call that took a page to the one that freed it; pages still in use are not "
        "counted. Short "
        "lives are those of search nodes, long ones those of roots. Recording makes lives longer."
    )
    chart = _bars(rows, "life time of a page, up to", "pages freed so far")
    return Figure(f"lives-{source.key}", title, chart, reading)


def up_to(seconds: float | None) -> str:
    """The upper end of a bin.

    >>> up_to(0.0002), up_to(0.05), up_to(20), up_to(None)
    ('0.2 ms', '50 ms', '20 s', 'longer')
    """
    if seconds is None:
        return "longer"
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def _bars(rows: list[Row], x_title: str, y_title: str) -> alt.Chart:
    order: list[Any] = [row["x"] for row in rows]
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(color="var(--paged)", cornerRadiusEnd=2)
    drawing: alt.Chart = bars.properties(height=HEIGHT).encode(
        alt.X("x:O", title=x_title, sort=order, axis=alt.Axis(labelAngle=0)),
        alt.Y("y:Q", title=y_title, axis=alt.Axis(tickCount=6)),
        tooltip=[alt.Tooltip("x:O", title=x_title), alt.Tooltip("y:Q", title=y_title, format=",")],
    )
    return drawing
