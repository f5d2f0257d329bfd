"""The document: one file with its charts, its data and all that draws them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from paged_kv import __version__
from paged_kv.tools.html.figure import Figure
from paged_kv.tools.html.glance import Card, Table
from paged_kv.tools.html.style import variables


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: list[Figure]


@dataclass(frozen=True)
class Document:
    """What a page says, from the top to the bottom; sections without figures are left out."""

    title: str
    lead: str
    notices: Sequence[str] = ()
    cards: Sequence[Card] = ()
    table: Table | None = None
    sections: Sequence[Section] = ()
    facts: Sequence[tuple[str, str]] = field(default=())


def rendered(document: Document) -> str:
    """One self-contained HTML text: loads nothing, follows light and dark, about 1 MB."""
    parts = [section for section in document.sections if section.figures]
    specs = {figure.name: figure.spec() for part in parts for figure in part.figures}
    code = script()
    return _template().render(
        title=document.title,
        lead=document.lead,
        notices=document.notices,
        cards=document.cards,
        table=document.table,
        sections=parts,
        facts=document.facts,
        version=__version__,
        style=Markup(variables() + _file("page.css")),
        charts=Markup(embedded(specs)),
        script=Markup(code),
        script_hash=f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'",
    )


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def embedded(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a
    comment.

    >>> embedded("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def script() -> str:
    """page.js with Vega, Vega-Lite and Vega-Embed, which vl-convert brings along. Cost: about a
    second, once.
    """
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])  # the one that the charts are written for
    bundle = vl_convert.javascript_bundle(_file("page.js"), vl_version=version)
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html"))


def figures(heading: str, *found: Figure | None) -> Section:
    """A section of the figures that there are."""
    return Section(heading, [figure for figure in found if figure is not None])
