"""The comparison as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from paged_kv.tools.search.words import agreement, found, heads, notes, ratios, rows, title

COLUMNS = 7  # that fit into 80 letters; the page has room for all


def table(result: dict[str, Any]) -> Table:
    """One search as a rich table."""
    named = title(result["workload"])
    made = Table(title=named, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    made.padding = (0, 1, 0, 0)
    first, *others = heads()[:COLUMNS]
    made.add_column(first, no_wrap=True)
    for heading in others:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows(result):
        made.add_row(*row[:COLUMNS])
    return made


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print a table and a few lines of text for each result."""
    for result in results:
        parts: list[RenderableType] = [
            "",
            table(result),
            ratios(result),
            agreement(result),
            *found(result),
            notes(result),
        ]
        for part in parts:
            console.print(part, highlight=False, markup=False)
