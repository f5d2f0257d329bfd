"""A chart as a picture of its own: an SVG file that loads nothing and follows light and dark."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import altair as alt
import vl_convert

from paged_kv.tools.html.style import COLOURS, CONFIG

VARIABLE = re.compile(r"var\(--([\w-]+)\)")
# What differs from a chart of the page: a picture needs a sheet of its own, and there is room for a
# row of names below it. These stand far apart, since the fonts of a reader may be wider than those
# that the picture was laid out with.
ALONE: dict[str, Any] = {"background": "var(--sheet)", "padding": 16}
NAMES: dict[str, Any] = {**CONFIG["legend"], "columns": 0, "columnPadding": 40}
TITLE: dict[str, Any] = {
    "anchor": "start",
    "color": "var(--text)",
    "fontSize": 13,
    "fontWeight": 600,
    "offset": 10,
    "subtitleColor": "var(--muted)",
}


def svg(chart: alt.TopLevelMixin, title: str) -> str:
    """The chart as the text of an SVG file; `title` is what a screen reader says of it.

    The colours are the light ones, so that every program shows them; a browser whose reader prefers
    dark puts the dark ones in their place.
    """
    look = {**CONFIG, **ALONE, "title": TITLE, "legend": NAMES}
    spec = {**chart.to_dict(), "config": look}
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    drawn = vl_convert.vegalite_to_svg(spec, vl_version=version)
    used = sorted(set(VARIABLE.findall(drawn)))
    drawn = VARIABLE.sub(lambda found: COLOURS[found[1]].light, drawn)
    opening, rest = drawn.split(">", 1)
    return f'{opening} role="img"><title>{escape(title)}</title>{_dark(used)}{rest}\n'


def _dark(names: list[str]) -> str:
    """The style that puts the dark colour in the place of each light one."""
    rules = [
        f'[{what}="{COLOURS[name].light}"]{{{what}:{COLOURS[name].dark}}}'
        for name in names
        for what in ("fill", "stroke")
    ]
    return f"<style>@media (prefers-color-scheme:dark){{{''.join(rules)}}}</style>"
