"""The page of a search with a language model: its caches, and the tree with its texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paged_kv.tools.html.document import Document, figures, rendered
from paged_kv.tools.html.figure import Across, Figure, Line, Up, lines
from paged_kv.tools.html.glance import Bar, Card, Table, compared, scaled
from paged_kv.tools.html.series import byte_unit
from paged_kv.tools.html.style import DOTS, LONG, SHORT, SOLID
from paged_kv.tools.html.texts import texts
from paged_kv.tools.search import words
from paged_kv.tools.search.side import DEEPCOPY, TITLES, TODAY, TREE
from paged_kv.tools.units import size

LOOKS = {  # of the lines: colour and dashes
    "prefill": ("var(--other-2)", DOTS),
    "rootcache": ("var(--shared)", SHORT),
    "deepcopy": ("var(--other)", SHORT),
    "gathered": ("var(--paged-2)", LONG),
    "tree": ("var(--paged)", SOLID),
}


def page(result: dict[str, Any]) -> str:
    """One self-contained HTML text of what `paged_kv.tools.search.search` returned. Raises
    ImportError where the libraries of the extra `report` are missing.
    """
    return rendered(
        Document(
            title=words.title(result["workload"]),
            lead=words.notes(result),
            notices=words.found(result),
            cards=list(_cards(result)),
            table=Table("The caches side by side", words.heads(), words.rows(result)),
            sections=[
                figures("Memory over the search", _held(result)),
                figures("The tree and its texts", texts(result["tree"])),
            ],
            facts=list(_facts(result)),
        )
    )


def _cards(result: dict[str, Any]) -> Iterator[Card]:
    yield _speed(result)
    yield _memory(result)
    same = not result["tokens_different"]
    yield Card(
        "Tokens of all caches",
        "the same" if same else "they differ",
        words.agreement(result),
        mood="good" if same else "bad",
    )


def _speed(result: dict[str, Any]) -> Card:
    caches = result["caches"]
    rates = {name: side["tokens_per_second"] for name, side in caches.items()}
    best = max(rates[name] for name in TODAY)
    bars = [Bar(TITLES[name], rate, f"{rate:.1f}", _look(name)) for name, rate in rates.items()]
    found = compared(rates[TREE], best, "faster", "slower")
    note = "Pages as a tree against the best cache without pages; time of the root left out."
    note = " ".join([note, *words.packed(result)])
    return Card("Tokens per second", found.words, note, scaled(bars), found.mood)


def _memory(result: dict[str, Any]) -> Card:
    held = {name: side["kv_bytes_peak"] for name, side in result["caches"].items()}
    bars = [Bar(TITLES[name], count, size(count), _look(name)) for name, count in held.items()]
    needed = result["caches"][TREE]["unique_token_bytes_peak"]
    bars.append(Bar("unique tokens", needed, size(needed), "i2"))
    found = compared(held[DEEPCOPY], held[TREE], "less", "more")
    note = "Pages as a tree against a copy per node."
    return Card("Key/value bytes held, peak", found.words, note, scaled(bars), found.mood)


def _look(name: str) -> str:
    return "i0" if name in TODAY else "i1"


def _held(result: dict[str, Any]) -> Figure:
    """Bytes held by every cache, batch after batch, and what the unique tokens need.

    With packed weights pages hold what they hold without.
    """
    moments = result["timeline"]
    needed = [(moment["simulation"], moment["unique_token_bytes"]) for moment in moments]
    most = max(max(moment["kv_bytes"].values()) for moment in moments)
    unit, scale = byte_unit(most)
    drawn = []
    for name, (colour, dash) in LOOKS.items():
        points = [(moment["simulation"], moment["kv_bytes"][name] / scale) for moment in moments]
        drawn.append(Line(name, TITLES[name], colour, dash, points))
    floor = [(place, count / scale) for place, count in needed]
    drawn.append(Line("unique", "unique tokens need", "var(--unique)", DOTS, floor))
    copies = moments[-1]["kv_bytes"][DEEPCOPY] / needed[-1][1]
    pages = moments[-1]["kv_bytes"][TREE] / needed[-1][1]
    return Figure(
        "held",
        f"At the end copies hold {copies:.3g}x what the unique tokens need, pages {pages:.3g}x",
        lines(drawn, Across("simulation"), Up("key/value bytes", unit, form=",.3~f")),
        "The most that was held at once within each simulation, its running batch included; the "
        "lower, the better. Buffers that pages are gathered into stand in the table.",
        wide=True,
    )


def _facts(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part in ("workload", "machine"):
        for name, value in result[part].items():
            yield name.replace("_", " "), "none" if value is None else str(value)
