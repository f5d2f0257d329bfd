"""The comparison as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from paged_kv.tools.profile.words import agreement, notes, rows, sides, title, too_few_roots


class Screen(Console):
    """Standard output. Where nobody reads it, that is left to the command."""

    def on_broken_pipe(self) -> None:
        """Rich would end the program."""
        raise BrokenPipeError


def table(result: dict[str, Any]) -> Table:
    """One preset's comparison as a rich table."""
    made = Table(title=title(result["workload"]), title_justify="left", title_style="bold")
    made.add_column("")
    for heading in (*sides(result["workload"]), "ratio"):
        made.add_column(heading, justify="right")
    for row in rows(result):
        made.add_row(*row)
    return made


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print a table and a few lines of text for each result."""
    for result in results:
        parts: list[RenderableType] = [
            "",
            table(result),
            agreement(result),
            *too_few_roots(result),
            notes(result),
        ]
        for part in parts:
            console.print(part, highlight=False)
