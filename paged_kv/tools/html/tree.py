"""The tree of one search: who shares how much with whom."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import altair as alt

from paged_kv.tools.html.figure import Figure, pointed_at
from paged_kv.tools.html.series import Row, Source, fullest
from paged_kv.tools.html.style import BIN_COLOURS, BIN_LABELS, bin_of
from paged_kv.tools.units import size

MAX_NODES = 800  # of all trees of the page
MAX_TREES = 16


class Placed(NamedTuple):
    """A node and where it is drawn: its place across, and its steps below the root."""

    node: Row
    x: float
    depth: int


def tree(source: Source) -> Figure | None:
    """The trees of the fullest snapshot, one at a time: nodes coloured by how many share the page
    that they wrote.
    """
    snapshot = fullest(source.recording.trees, lambda line: len(nodes_of(line)))
    nodes = [] if snapshot is None else nodes_of(snapshot)
    if snapshot is None or not nodes:
        return None
    forest = grown(nodes)
    if not forest:  # each of them hangs below another one
        return None
    shown, rows = _rows(forest, nodes, source.recording.cache)
    most = max(row["h"] for row in rows)
    title = (
        f"One page serves up to {most:,} contexts of a search"
        if most > 1
        else "No two contexts of this search share a page"
    )
    reading = (
        "A dot is a node's context, its children hang below it. The colour says how many "
        "contexts read the page "
        "that the node wrote; its ancestors' pages it only refers to. Point at a node: all that "
        "hold its page "
        "are ringed."
    )
    left = len(forest) - shown
    if left:
        reading += f" The {shown} largest of {len(forest)} trees are offered."
    when = str(snapshot.get("title") or "a snapshot")
    return Figure(
        f"tree-{source.key}",
        f"{title} ({when})",
        _chart(rows, shown),
        reading,
        wide=True,
        fixed=True,
    )


def nodes_of(snapshot: Row) -> list[Row]:
    """The nodes of a snapshot that can be drawn."""
    nodes = snapshot.get("nodes")
    if not isinstance(nodes, list):
        return []
    return [node for node in nodes if isinstance(node, dict) and "id" in node]


def grown(nodes: list[Row]) -> list[list[Placed]]:
    """Trees of nodes with their places, the largest first: leaves side by side, parents above them.

    >>> chain = [{"id": 1, "parent": None}, {"id": 2, "parent": 1}, {"id": 3, "parent": 1}]
    >>> [(placed.node["id"], placed.x, placed.depth) for placed in grown(chain)[0]]
    [(1, 0.5, 0), (2, 0.0, 1), (3, 1.0, 1)]
    """
    known = {node["id"] for node in nodes}
    children: dict[Any, list[Row]] = {}
    for node in nodes:
        parent = node.get("parent")
        above = parent if parent in known and parent != node["id"] else None
        children.setdefault(above, []).append(node)
    forest = [_placed(root, children) for root in children.get(None, [])]
    return sorted(forest, key=len, reverse=True)


def _placed(root: Row, children: dict[Any, list[Row]]) -> list[Placed]:
    order = []
    todo = [(root, 0)]
    while todo:  # a chain may be longer than python's stack
        node, depth = todo.pop()
        order.append((node, depth))
        todo += [(child, depth + 1) for child in reversed(children.get(node["id"], []))]
    places: dict[Any, float] = {}
    leaves = sum(not children.get(node["id"]) for node, _ in order)
    for node, _ in reversed(order):
        below = [places[child["id"]] for child in children.get(node["id"], [])]
        if not below:
            leaves -= 1
        places[node["id"]] = (below[0] + below[-1]) / 2 if below else float(leaves)
    return [Placed(node, places[node["id"]], depth) for node, depth in order]


def _rows(forest: list[list[Placed]], nodes: list[Row], cache: Row) -> tuple[int, list[Row]]:
    """How many trees are shown, and a row a node of them."""
    holders = Counter(page for node in nodes for page in _pages(node))
    page_bytes = int(cache.get("page_bytes") or 0)
    rows: list[Row] = []
    shown = 0
    for placed in forest[:MAX_TREES]:
        if rows and len(rows) + len(placed) > MAX_NODES:
            break
        places = {node["id"]: x for node, x, _ in placed[:MAX_NODES]}
        for node, x, depth in placed[:MAX_NODES]:
            place = {"t": shown, "x": x, "d": depth, "px": places.get(node.get("parent"), x)}
            rows.append({**place, **_about(node, holders, page_bytes)})
        shown += 1
    return shown, rows


def _pages(node: Row) -> list[int]:
    pages = node.get("pages")
    return pages if isinstance(pages, list) else []


def _about(node: Row, holders: Counter[int], page_bytes: int) -> Row:
    pages = _pages(node)
    own = pages[-1] if pages else None
    alone = sum(holders[page] == 1 for page in pages)
    held = holders[own] if own is not None else 0
    return {
        "id": node["id"],
        "o": own,
        "p": pages,
        "h": held,
        "b": bin_of(max(1, held)),
        "n": node.get("tokens", 0),
        "a": f"{alone} of {len(pages)}",
        "z": size(alone * page_bytes),
        "w": size(len(pages) * page_bytes),
    }


def _chart(rows: list[Row], shown: int) -> alt.LayerChart:
    sizes = Counter(row["t"] for row in rows)
    chosen = alt.param(
        name="chosen",
        value=0,
        bind=alt.binding_select(
            options=list(range(shown)),
            labels=[f"{place + 1} ({sizes[place]} nodes)" for place in range(shown)],
            name="tree ",
        ),
    )
    drawing: alt.LayerChart = (
        hanging(_dots(), rows, 46).transform_filter("datum.t === chosen").add_params(chosen)
    )
    return drawing


def hanging(dots: alt.Chart, rows: list[Row], step: int) -> alt.LayerChart:
    """Dots as a tree, each below its parent: rows have `x`, the depth `d` and the parent's `px`.

    `step`: pixels of a level, as long as there are few.
    """
    x = alt.X("x:Q", axis=None, scale=alt.Scale(padding=16, zero=False, nice=False))
    y = alt.Y(
        "d:Q",
        title="depth (steps below the root)",
        scale=alt.Scale(reverse=True, padding=14, nice=False),
        axis=alt.Axis(tickMinStep=1, format="d", grid=False),
    )
    edges = (
        alt.Chart()
        .mark_rule(color="var(--line)", strokeWidth=1.2)
        .encode(x, y, x2="px:Q", y2="up:Q")
        .transform_filter("datum.d > 0")
        .transform_calculate(up="datum.d - 1")
    )
    depth = max(row["d"] for row in rows) + 1
    drawing: alt.LayerChart = alt.layer(
        edges, dots.encode(x, y), data=alt.InlineData(values=rows)
    ).properties(height=min(440, max(150, step * depth)))
    return drawing


def _dots() -> alt.Chart:
    """The nodes; those that hold the page of the one that is pointed at are ringed."""
    sharing = "pointed.o && indexof(datum.p, pointed.o[0]) >= 0"
    colours = alt.Scale(domain=BIN_LABELS, range=BIN_COLOURS)
    legend = alt.Legend(title="contexts that share the node's page", columns=6)
    dots: alt.Chart = (
        alt.Chart()
        .mark_circle(opacity=1, size=150)
        .encode(
            alt.Color("b:O", scale=colours, legend=legend),
            stroke=alt.condition(sharing, alt.value("var(--mark)"), alt.value("var(--line)")),
            strokeWidth=alt.condition(sharing, alt.value(3), alt.value(1)),
            tooltip=[
                alt.Tooltip("id:N", title="sequence"),
                alt.Tooltip("n:Q", title="tokens of its context"),
                alt.Tooltip("w:N", title="its pages, shared ones too"),
                alt.Tooltip("a:N", title="pages it holds alone"),
                alt.Tooltip("z:N", title="bytes it holds alone"),
                alt.Tooltip("o:N", title="page it wrote"),
                alt.Tooltip("h:Q", title="contexts sharing that page"),
            ],
        )
        .add_params(pointed_at("o"))
    )
    return dots
