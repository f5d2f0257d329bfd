"""Pictures of the peers, from the JSON of run.py: times, scaling and bytes.

python benchmarks/peers/plots.py benchmarks/results/peers.json benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import altair as alt

from paged_kv.tools.html.picture import svg
from peers.table import RESULTS, micros

OURS = "paged_kv"
WIDE = 330  # of a panel with the names of peers at its side
TALL = 25  # of one peer's row
NAMES_WIDE = 200  # of the names: more than they take, since a reader's fonts may be wider
ROOM = 0.3  # of a logarithmic axis: behind the largest value, for the number beside it
# Of the lines, by their order in the file; ours is drawn thicker as well.
LINES = ("paged", "muted", "shared", "cache", "other", "dense", "other-2", "paged-2")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
HEADS = {"near": "parents among the 400 newest", "any": "parents among all"}


class Part(NamedTuple):
    """A panel of times: which part of a workload, which of its verbs, and what that is."""

    part: str
    verb: str
    title: str


PARTS = (
    Part("tables", "fork", "fork + append of 8"),
    Part("contents", "step", "fork + write + gather of 8"),
)


class Picture(NamedTuple):
    """One file: its name, what it shows, and what draws it."""

    name: str
    title: str
    draw: Callable[[dict[str, Any]], alt.TopLevelMixin]


def draw(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Write every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        path = folder / f"peers_{picture.name}.svg"
        path.write_text(svg(picture.draw(results), picture.title))
        yield path


def caption(results: dict[str, Any]) -> alt.TitleParams:
    """Hardware, versions and command, below the panels."""
    machine = results["machine"]
    where = f"{machine['processor']}, {machine['threads']} thread, python {machine['python']}"
    found = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return alt.TitleParams(
        [f"{where}, {found}", results["command"]],
        orient="bottom",
        color="var(--muted)",
        fontSize=11,
        fontWeight="normal",
        offset=18,
    )


def peers_axis() -> alt.Y:
    """The names of the peers at the left, in the order of the tables."""
    axis = alt.Axis(
        labelLimit=200,
        labelColor="var(--text)",
        labelPadding=8,
        minExtent=NAMES_WIDE,
        ticks=False,
        domain=False,
    )
    return alt.Y("peer:N", title=None, sort=None, axis=axis)


def own_colour() -> Any:
    """Ours stands out from the others."""
    ours = alt.datum.peer == OURS
    return alt.condition(ours, alt.value("var(--paged)"), alt.value("var(--reserved)"))


def times(results: dict[str, Any]) -> alt.TopLevelMixin:
    """Fork + append, and fork + write + gather, a row of panels for each workload."""
    panels = [
        timed(name, work, part) for name, work in results["workloads"].items() for part in PARTS
    ]
    return alt.concat(*panels, columns=len(PARTS), spacing=28, title=caption(results))


def timed(name: str, work: dict[str, Any], part: Part) -> alt.LayerChart:
    """Medians as dots, with their quartiles as lines. The axis is logarithmic and has no zero, so
    bars would have no length to be read.
    """
    rows = [
        {"peer": peer, "text": micros(found["median"])}
        | {key: found[key] for key in ("median", "q1", "q3")}
        for peer, entry in work[part.part].items()
        if (found := entry["us"].get(part.verb))
    ]
    low = min(row["q1"] for row in rows) / 1.5
    longest = max(row["q3"] for row in rows)
    high = longest * (longest / low) ** ROOM
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=powers(low, high), format="~s")
    x = alt.X("median:Q", title="microseconds", scale=scale, axis=axis)
    base = alt.Chart(alt.InlineData(values=rows))
    dots = base.mark_circle(size=110, opacity=1).encode(x, peers_axis(), color=own_colour())
    spans = base.mark_rule(strokeWidth=2).encode(
        alt.X("q1:Q", scale=scale), peers_axis(), x2="q3:Q", color=own_colour()
    )
    halo = {"stroke": "var(--sheet)", "strokeWidth": 5}  # no line of the grid crosses a number
    words = [
        base.mark_text(align="left", dx=9, **look).encode(
            alt.X("q3:Q", scale=scale), peers_axis(), text="text:N"
        )
        for look in (halo, {})
    ]
    title = alt.TitleParams(f"{name}: {part.title}")
    return alt.layer(*words, spans, dots, width=WIDE, height=TALL * len(rows), title=title)


def powers(low: float, high: float) -> list[float]:
    """The powers of ten from `low` to `high`."""
    return [10.0**power for power in range(-3, 13) if low <= 10.0**power <= high]


def scaling(results: dict[str, Any]) -> alt.TopLevelMixin:
    """Fork + append beside many live sequences."""
    rows = [
        {"peer": peer, "live": int(count), "parents": parents, "us": found[parents]["median"]}
        for peer, entry in results["scaling"].items()
        for count, found in entry.items()
        for parents in HEADS
    ]
    panels = (scaled(rows, list(results["scaling"]), parents) for parents in HEADS)
    return alt.hconcat(*panels, spacing=36, title=caption(results))


def scaled(rows: list[dict[str, Any]], peers: list[str], parents: str) -> alt.LayerChart:
    """One panel of lines; both have the same vertical axis."""
    counts = sorted({row["live"] for row in rows})
    top = max(row["us"] for row in rows) * 1.05
    # ours is the first of all, and is to lie above the others
    chosen = alt.InlineData(values=[row for row in rows[::-1] if row["parents"] == parents])
    x = alt.X(
        "live:Q",
        title="live sequences",
        scale=alt.Scale(type="log", domain=[counts[0] / 1.3, counts[-1] * 1.3], nice=False),
        axis=alt.Axis(values=counts, format="~s", grid=False),
    )
    y = alt.Y("us:Q", title="microseconds", scale=alt.Scale(domain=[0, top]))
    names = alt.Legend(title=None)
    hues = alt.Scale(domain=peers, range=[f"var(--{name})" for name in LINES[: len(peers)]])
    forms = alt.Scale(domain=peers, range=list(SHAPES[: len(peers)]))
    colour = alt.Color("peer:N", scale=hues, legend=names)
    shape = alt.Shape("peer:N", scale=forms, legend=names)
    base = alt.Chart(chosen)
    others = base.transform_filter(alt.datum.peer != OURS).mark_line(strokeWidth=1.5)
    ours = base.transform_filter(alt.datum.peer == OURS).mark_line(strokeWidth=3)
    lines = [line.encode(x, y, colour) for line in (others, ours)]
    marks = base.mark_point(filled=True, opacity=1, size=60).encode(x, y, colour, shape)
    title = alt.TitleParams(f"fork + append of 8, {HEADS[parents]}")
    return alt.layer(*lines, marks, width=400, height=280, title=title)


def kv_bytes(results: dict[str, Any]) -> alt.TopLevelMixin:
    """Bytes held over bytes of unique tokens."""
    panels = (held(name, work) for name, work in results["workloads"].items())
    return alt.hconcat(*panels, spacing=28, title=caption(results))


def held(name: str, work: dict[str, Any]) -> alt.LayerChart:
    """Bars from zero, and a line where nothing is held twice."""
    rows = [
        {"peer": peer, "times": entry["kv_bytes_over_unique"]}
        for peer, entry in work["contents"].items()
    ]
    longest = max(row["times"] for row in rows)
    scale = alt.Scale(domain=[0, longest * 1.15], nice=False)
    x = alt.X(
        "times:Q",
        title="KV bytes / unique",
        scale=scale,
        axis=alt.Axis(tickCount=6, grid=False, labelFlush=False),
    )
    base = alt.Chart(alt.InlineData(values=rows))
    bars = base.mark_bar(cornerRadiusEnd=2).encode(x, peers_axis(), color=own_colour())
    words = base.mark_text(align="left", dx=6).encode(
        x, peers_axis(), text=alt.Text("times:Q", format=".2f")
    )
    one = alt.Chart(alt.InlineData(values=[{"times": 1}]))
    once = one.mark_rule(color="var(--text)", strokeDash=[2, 2]).encode(x)
    title = alt.TitleParams(f"{name}: KV bytes held at the peak / unique tokens")
    return alt.layer(bars, once, words, width=WIDE, height=TALL * len(rows), title=title)


PICTURES = (
    Picture("times", "Times of a step of each peer: medians and quartiles", times),
    Picture("scaling", "Time of fork and append beside so many live sequences", scaling),
    Picture("bytes", "Bytes of keys and values held, over those of the unique tokens", kv_bytes),
)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("json", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS.parent)
    options = parser.parse_args()
    for path in draw(json.loads(options.json.read_text()), options.folder):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
