"""The tree of a search over texts: a dot a node, its text under the pointer."""

from __future__ import annotations

from typing import Any

import altair as alt

from paged_kv.tools.html.figure import Figure, pointed_at
from paged_kv.tools.html.tree import Placed, grown, hanging

MAX_NODES = 800
MAX_LETTERS = 400
KINDS = {  # what becomes of a node: its colour
    "open": "var(--paged)",
    "done": "var(--rest)",
    "solves it": "var(--shared)",
}


def texts(nodes: list[dict[str, Any]]) -> Figure:
    """Nodes with the texts that lead to them, larger where their value is; the first 800."""
    placed = grown(nodes[:MAX_NODES])[0]
    places = {each.node["id"]: each.x for each in placed}
    rows = [_row(each, places) for each in placed]
    solved = sum(row["k"] == "solves it" for row in rows)
    title = f"{len(rows):,} nodes, {max(row['d'] for row in rows)} steps deep"
    if solved:
        title += f"; {solved} solve the task"
    reading = (
        "A dot is a node, its children hang below it; the larger, the higher its value. Point at "
        "one to read its text, or touch it."
    )
    return Figure("texts", title, hanging(_dots(), rows, 60), reading, wide=True, fixed=True)


def _row(each: Placed, places: dict[Any, float]) -> dict[str, Any]:
    node = each.node
    kind = "done" if node["done"] else "open"
    text = node["text"].replace("\n", " \u21b5 ")
    return {
        "id": node["id"],
        "x": each.x,
        "d": each.depth,
        "px": places.get(node["parent"], each.x),
        "t": text[:MAX_LETTERS] or "(the prompt)",
        "v": node["value"],
        "n": node["visits"],
        "k": "solves it" if node["solved"] else kind,
    }


def _dots() -> alt.Chart:
    colours = alt.Scale(domain=list(KINDS), range=list(KINDS.values()))
    dots: alt.Chart = (
        alt.Chart()
        .mark_circle(opacity=1, stroke="var(--line)", strokeWidth=1)
        .encode(
            alt.Color("k:N", scale=colours, legend=alt.Legend(title=None)),
            alt.Size("v:Q", scale=alt.Scale(domain=[0, 1], range=[50, 260]), legend=None),
            strokeWidth=alt.condition(
                "pointed.id && datum.id === pointed.id[0]", alt.value(3), alt.value(1)
            ),
            tooltip=[
                alt.Tooltip("t:N", title="text"),
                alt.Tooltip("v:Q", title="value", format=".3~f"),
                alt.Tooltip("n:Q", title="visits"),
                alt.Tooltip("id:N", title="node"),
            ],
        )
        .add_params(pointed_at("id"))
    )
    return dots
