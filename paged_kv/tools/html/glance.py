"""The numbers that come first: ratios as cards, both sides as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paged_kv.tools.html.series import Source, number, values
from paged_kv.tools.profile.words import rows, sides
from paged_kv.tools.profile.workload import ENOUGH_ROOTS
from paged_kv.tools.units import count, micros, size


@dataclass(frozen=True)
class Bar:
    """One bar of a card: a name, a length, a text."""

    name: str
    value: float
    text: str
    look: str
    percent: float = 0.0


@dataclass(frozen=True)
class Card:
    """One number with what it stands for. `mood` is "good", "bad" or "" and colours it."""

    label: str
    big: str
    note: str
    bars: list[Bar] = field(default_factory=list)
    mood: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text; labels that begin with spaces belong to the row above."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def cards(result: dict[str, Any]) -> list[Card]:
    """What a profile found, the ratios first."""
    old = result["caches"]["dense"]
    new = result["caches"]["paged"]
    names = sides(result["workload"])

    def card(
        label: str,
        key: str,
        show: Callable[[float], str],
        less: str,
        more: str,
        note: str,
        needed: float | None = None,
    ) -> Card:
        pair = [
            Bar(names[0], old[key], show(old[key]), "i0"),
            Bar(names[1], new[key], show(new[key]), "i1"),
        ]
        if needed:
            pair.append(Bar("unique tokens", needed, show(needed), "i2"))
        big, mood = compared(old[key], new[key], less, more)
        if show is micros and result["workload"]["roots"] < ENOUGH_ROOTS:
            big = "not compared"
            mood = ""
            note = f"Too few root steps were timed: give {ENOUGH_ROOTS} or more."
        return Card(label, big, note, scaled(pair), mood)

    needed = new["unique_token_bytes_peak"]
    over = (
        f"Pages hold {new['kv_bytes_peak'] / needed:.3g}x what the unique tokens need."
        if needed
        else ""
    )
    return [
        card("Key/value bytes held, peak", "kv_bytes_peak", size, "less", "more", over, needed),
        card(
            "Cache kernels per simulation",
            "tensor_kernels_per_simulation",
            count,
            "fewer",
            "more",
            "Tensor operations that a GPU would launch to look up, assemble, update and store "
            "contexts.",
        ),
        card(
            "Host copies per simulation",
            "host_copies_per_simulation",
            count,
            "fewer",
            "more",
            "Copies from device to host, each of which makes a GPU wait.",
        ),
        card(
            "Cache time per simulation",
            "cache_us_per_simulation",
            micros,
            "faster",
            "slower",
            "Median over the timed root steps, spent inside the cache.",
        ),
        card(
            "Search time per simulation",
            "search_us_per_simulation",
            micros,
            "faster",
            "slower",
            "Median over the timed root steps, the model and the tree included.",
        ),
        agreement(result["fidelity"], result["workload"]),
    ]


def compared(old: float, new: float, less: str, more: str) -> tuple[str, str]:
    """A ratio in words, and whether it is good.

    >>> compared(104, 2.08, "fewer", "more"), compared(8, 0, "fewer", "more")
    (('50x fewer', 'good'), ('none left', 'good'))
    >>> compared(2, 3, "faster", "slower")
    ('1.5x slower', 'bad')
    """
    if old == new:
        return "the same", ""
    if not new:
        return "none left", "good"
    if not old:
        return "new", "bad"
    ratio = old / new
    return (f"{ratio:.3g}x {less}", "good") if ratio > 1 else (f"{1 / ratio:.3g}x {more}", "bad")


def scaled(bars: list[Bar]) -> list[Bar]:
    """The bars with lengths in percent of the longest."""
    longest = max(bar.value for bar in bars) or 1
    return [
        Bar(bar.name, bar.value, bar.text, bar.look, round(100 * bar.value / longest, 2))
        for bar in bars
    ]


def agreement(found: dict[str, Any], workload: dict[str, Any]) -> Card:
    """Whether both sides decided alike."""
    same = found["actions_equal"] == found["actions_compared"] and found["visit_counts_equal"]
    apart = found["max_abs_value_difference"]
    visits = "equal" if found["visit_counts_equal"] else "not equal"
    note = (
        f"Actions: {found['actions_equal']:,} of {found['actions_compared']:,} equal. Visit "
        f"counts: {visits}. "
        f"Values: {f'at most {apart:.2g} apart' if apart else 'equal'}."
    )
    if workload["tie_breaking"] != "fixed":
        note += " Tie-breaking could not be fixed here, so actions may differ."
    return Card(
        "Decisions of the agent",
        "the same" if same else "they differ",
        note,
        mood="good" if same else "bad",
    )


def both(result: dict[str, Any]) -> Table:
    """The whole comparison as a table."""
    heads = ["", *sides(result["workload"]), "ratio"]
    return Table(
        "Both caches side by side",
        heads,
        rows(result["caches"]["dense"], result["caches"]["paged"], result["workload"]["roots"]),
    )


def recorded_cards(source: Source) -> list[Card]:
    """What one recording of pages shows without a profile beside it."""
    used, dense, unique = (
        source.peak(name) for name in ("bytes_in_use", "bytes_dense", "bytes_unique")
    )
    made = []
    if used:
        bars = [
            Bar("dense copies", dense, size(dense), "i0"),
            Bar("pages", used, size(used), "i1"),
            Bar("unique tokens", unique, size(unique), "i2"),
        ]
        big, mood = compared(dense, used, "less", "more")
        made.append(
            Card(
                "Key/value bytes, peak",
                big,
                "Against one dense copy a context, as long as the context.",
                scaled(bars),
                mood,
            )
        )
    asked, found = (_last(source, name) for name in ("queries", "hits"))
    if asked:
        made.append(
            Card(
                "Lookups that hit",
                f"{100 * found / asked:.3g} %",
                f"{count(found)} of {count(asked)}.",
            )
        )
    whole = source.recording.seconds
    spent = _last(source, "cache_s")
    if whole and spent:
        made.append(
            Card(
                "Time in the cache",
                f"{100 * spent / whole:.3g} %",
                f"{spent:.3g} of {whole:.3g} seconds recorded, idle time included.",
            )
        )
    return made


# Fields of a sample, the largest of which stands in the table; counters only grow.
COUNTS = (
    ("sequences", "Sequences", count),
    ("bytes_in_use", "Bytes in use", size),
    ("bytes_peak", "  and between samples", size),
    ("bytes_reserved", "Bytes reserved", size),
    ("bytes_unique", "Bytes of unique tokens", size),
    ("bytes_dense", "Bytes of dense copies", size),
    ("queries", "Lookups", count),
    ("hits", "Hits", count),
    ("forks", "Forks", count),
    ("appends", "Appends", count),
    ("copied_pages", "Pages copied", count),
    ("freed_pages", "Pages freed", count),
    ("evictions", "Evictions", count),
)


def recorded(found: Sequence[Source]) -> Table:
    """Peaks and totals of recordings, side by side."""
    lines = []
    for name, label, show in COUNTS:
        cells = [
            show(source.peak(name)) if values(source.samples, name) else "" for source in found
        ]
        if any(cells):
            lines.append([label, *cells])
    return Table(
        "Peaks of the samples, and totals", ["", *(source.name for source in found)], lines
    )


def _last(source: Source, name: str) -> float:
    return next(
        (value for row in reversed(source.samples) if (value := number(row, name)) is not None), 0
    )
