"""Writes what `paged-kv search` and `search_solves.py` measured into docs/search.md.

paged-kv search --preset all --json benchmarks/results/search.json
python benchmarks/search_solves.py --json benchmarks/results/search_solves.json
python benchmarks/search_table.py --write
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paged_kv.tools.search.words import agreement, heads, notes, ratios, rows, title

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "search.md"
BEGIN = "<!-- results: python benchmarks/search_table.py --write -->"
END = "<!-- end of results -->"


def text() -> str:
    """Both results, as far as they are there."""
    parts = list(_searches(_read("search.json") or []))
    solves = _read("search_solves.json")
    if solves:
        parts += _solves(solves)
    return "\n\n".join(parts)


def _read(name: str) -> Any:
    path = HERE / "results" / name
    return json.loads(path.read_text()) if path.exists() else None


def _searches(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        table = [heads(), ["---", *["---:"] * (len(heads()) - 1)], *rows(result)]
        yield f"**{title(result['workload'])}**"
        yield "\n".join(f"| {' | '.join(row)} |" for row in table)
        yield f"{ratios(result)} {agreement(result)} {notes(result)}"


def _solves(result: dict[str, Any]) -> Iterator[str]:
    workload = result["workload"]
    games = workload["games"]
    children = workload["simulations"] * workload["width"]
    lines = [
        f"| of {games} games, with at most {children} children each | solved | share, 95 % |",
        "|---|---:|---|",
        _line("greedy decoding", result["greedy"]["solved"], result["greedy"]["share"]),
    ]
    for method, found in result["methods"].items():
        lines.append(_line(method, found["solved"], found["share"]))
    yield "\n".join(lines)
    for method, found in result["methods"].items():
        beside = found["beside_greedy"]
        yield (
            f"`{method}` solves {beside['search_alone']} games that greedy decoding does not, and "
            f"misses {beside['greedy_alone']} that it solves."
        )


def _line(name: str, solved: int, share: dict[str, float]) -> str:
    low = f"{100 * share['low']:.0f}"
    high = f"{100 * share['high']:.0f}"
    return f"| {name} | {solved} | {100 * share['share']:.0f} % ({low} to {high}) |"


def main() -> None:
    """Print it, or write it into the page."""
    if "--write" not in sys.argv[1:]:
        print(text())
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
