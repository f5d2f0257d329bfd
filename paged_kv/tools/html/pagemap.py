"""The pool, page by page: who holds what, and how full it is."""

from __future__ import annotations

import altair as alt

from paged_kv.tools.html.figure import Figure, pointed_at
from paged_kv.tools.html.series import Row, Source, fullest, number
from paged_kv.tools.html.style import BIN_COLOURS, BIN_LABELS, bin_of
from paged_kv.tools.units import count

MAX_PAGES = 2048


def page_map(source: Source) -> Figure | None:
    """One cell a page: its colour says how many hold it, its height how full it is."""
    cells = cells_of(source)
    size = page_size(source)
    used = [cell for cell in cells if cell["r"]]
    if not used:
        return None
    filled = f"{100 * sum(cell['f'] for cell in used) / (size * len(used)):.3g} %"
    title = (
        f"{count(len(used))} of {count(len(cells))} pages in use, {filled} of their slots filled"
    )
    reading = (
        "A cell is a page, in the order of memory. Empty: free. Coloured: in use, as high as it "
        "is full, the "
        "darker (on dark: the lighter) the more sequences hold it. Point at a page: all pages of "
        "the same "
        "owner, the oldest sequence that holds them, are ringed."
    )
    if len(cells) > MAX_PAGES:
        reading += f" Only the first {count(MAX_PAGES)} pages are drawn."
    return Figure(
        f"map-{source.key}", title, _map(cells[:MAX_PAGES], size), reading, wide=True, fixed=True
    )


def page_size(source: Source) -> int:
    """Token slots of a page."""
    return int(number(source.recording.cache, "page_size") or 1)


def cells_of(source: Source) -> list[Row]:
    """The pages of the fullest snapshot, page 1 first: number, references, filled slots, owner,
    colour.
    """
    snapshots = list(map(_cells, source.recording.pages))
    return fullest(snapshots, lambda cells: sum(cell["r"] > 0 for cell in cells)) or []


def _cells(snapshot: Row) -> list[Row]:
    columns = [snapshot.get(name) for name in ("refs", "filled", "owner")]
    if not all(isinstance(column, list) for column in columns):
        return []
    rows = [
        {"p": page, "r": refs, "f": filled, "o": owner}
        for page, (refs, filled, owner) in enumerate(zip(*columns), start=1)
    ]
    sound = (row for row in rows if number(row, "r") is not None and number(row, "f") is not None)
    return [{**row, "b": bin_of(row["r"])} for row in sound]


def _map(cells: list[Row], size: int) -> alt.LayerChart:
    across = 32 if len(cells) <= 1024 else 64
    down = -(-len(cells) // across)
    x = alt.X("left:Q", axis=None, scale=alt.Scale(domain=[0, across], nice=False))
    rows = alt.Scale(domain=[0, down], reverse=True, nice=False)  # the first page at the top
    base = alt.Chart().transform_calculate(
        column=f"(datum.p - 1) % {across}", row=f"floor((datum.p - 1) / {across})"
    )
    base = base.transform_calculate(
        left="datum.column + 0.06",
        right="datum.column + 0.94",
        top="datum.row + 0.06",
        bottom="datum.row + 0.94",
        level=f"datum.row + 0.94 - 0.88 * datum.f / {size}",
    )
    full = _full(base).encode(
        x, alt.Y("level:Q", axis=None, scale=rows), x2="right:Q", y2="bottom:Q"
    )
    frame = _frame(base, size).encode(
        x, alt.Y("top:Q", axis=None, scale=rows), x2="right:Q", y2="bottom:Q"
    )
    layers = alt.layer(full, frame, data=alt.InlineData(values=cells))
    drawing: alt.LayerChart = layers.properties(height=max(40, 18 * down))
    return drawing


def _full(base: alt.Chart) -> alt.Chart:
    """What of a page is filled."""
    colours = alt.Scale(domain=BIN_LABELS, range=BIN_COLOURS)
    legend = alt.Legend(title="sequences that hold the page", columns=6)
    filled = base.transform_filter("datum.r > 0").mark_rect()
    full: alt.Chart = filled.encode(color=alt.Color("b:O", scale=colours, legend=legend))
    return full


def _frame(base: alt.Chart, size: int) -> alt.Chart:
    """The edge of every page; those of the owner that is pointed at are ringed."""
    same = "pointed.o && pointed.o[0] !== null && datum.o === pointed.o[0]"
    frame: alt.Chart = (
        base.mark_rect(fill="transparent")
        .encode(
            stroke=alt.condition(same, alt.value("var(--mark)"), alt.value("var(--line)")),
            strokeWidth=alt.condition(same, alt.value(2.5), alt.value(0.6)),
            tooltip=[
                alt.Tooltip("p:Q", title="page"),
                alt.Tooltip("r:Q", title="held by (sequences)"),
                alt.Tooltip("f:Q", title=f"slots filled, of {size}"),
                alt.Tooltip("o:N", title="owner (sequence)"),
            ],
        )
        .add_params(pointed_at("o"))
    )
    return frame
