"""The numbers that come first: ratios as cards, both sides as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paged_kv.tools.html.series import Source, values
from paged_kv.tools.profile.words import caches, measured_with, rows, sides
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


class Measure(NamedTuple):
    """One card of a profile: a figure of both sides, and the words around it."""

    label: str
    key: str
    show: Callable[[float], str]
    less: str
    more: str
    note: str


TIME = "Time in the cache"
HELD = Measure("Key/value bytes held, peak", "kv_bytes_peak", size, "less", "more", "")
MEASURES = (
    Measure(
        "Cache kernels per simulation",
        "tensor_kernels_per_simulation",
        count,
        "fewer",
        "more",
        "Tensor operations that a GPU would launch to look up, assemble, update and store "
        "contexts.",
    ),
    Measure(
        "Host copies per simulation",
        "host_copies_per_simulation",
        count,
        "fewer",
        "more",
        "Copies from device to host, each of which makes a GPU wait.",
    ),
    Measure(
        "Cache time per simulation",
        "cache_us_per_simulation",
        micros,
        "faster",
        "slower",
        "Median over the timed root steps, spent inside the cache.",
    ),
    Measure(
        "Search time per simulation",
        "search_us_per_simulation",
        micros,
        "faster",
        "slower",
        "Median over the timed root steps, the model and the tree included.",
    ),
)


def cards(result: dict[str, Any]) -> list[Card]:
    """What a profile found, the ratios first."""
    return [
        _held(result),
        *(_card(result, measure) for measure in MEASURES),
        agreement(result["fidelity"], result["workload"]),
    ]


def _held(result: dict[str, Any]) -> Card:
    """The card of bytes, with the unique tokens beside both sides."""
    paged = caches(result).paged
    needed = paged["unique_token_bytes_peak"]
    if not needed:
        return _card(result, HELD)
    over = paged["kv_bytes_peak"] / needed
    note = f"Pages hold {over:.3g}x what the unique tokens need."
    floor = Bar("unique tokens", needed, size(needed), "i2")
    return _card(result, HELD._replace(note=note), floor)


def _card(result: dict[str, Any], measure: Measure, *beside: Bar) -> Card:
    both = caches(result)
    dense = both.dense[measure.key]
    paged = both.paged[measure.key]
    names = sides(result["workload"])
    show = measure.show
    bars = [
        Bar(names.dense, dense, show(dense), "i0"),
        Bar(names.paged, paged, show(paged), "i1"),
        *beside,
    ]
    if show is micros and result["workload"]["roots"] < ENOUGH_ROOTS:
        note = f"Too few root steps were timed: give {ENOUGH_ROOTS} or more."
        return Card(measure.label, "not compared", note, scaled(bars))
    found = compared(dense, paged, measure.less, measure.more)
    return Card(measure.label, found.words, measure.note, scaled(bars), found.mood)


class Compared(NamedTuple):
    """A ratio in words, and whether it is good."""

    words: str
    mood: str


def compared(old: float, new: float, less: str, more: str) -> Compared:
    """How many times less or more the new side needs.

    >>> tuple(compared(104, 2.08, "fewer", "more")), tuple(compared(8, 0, "fewer", "more"))
    (('50x fewer', 'good'), ('none left', 'good'))
    >>> compared(2, 3, "faster", "slower").words
    '1.5x slower'
    """
    if old == new:
        return Compared("the same", "")
    if not new:
        return Compared("none left", "good")
    if not old:
        return Compared("new", "bad")
    ratio = old / new
    if ratio > 1:
        return Compared(f"{ratio:.3g}x {less}", "good")
    return Compared(f"{1 / ratio:.3g}x {more}", "bad")


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
    note = " ".join([note, *measured_with(workload)])
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
    return Table("Both caches side by side", heads, rows(result))


def recorded_cards(source: Source) -> list[Card]:
    """What one recording of pages shows without a profile beside it."""
    made = (_recorded_bytes(source), _recorded_hits(source), _recorded_time(source))
    return [card for card in made if card is not None]


def _recorded_bytes(source: Source) -> Card | None:
    used = source.peak("bytes_in_use")
    dense = source.peak("bytes_dense")
    unique = source.peak("bytes_unique")
    if not used:
        return None
    bars = [
        Bar("dense copies", dense, size(dense), "i0"),
        Bar("pages", used, size(used), "i1"),
        Bar("unique tokens", unique, size(unique), "i2"),
    ]
    found = compared(dense, used, "less", "more")
    note = "Against one dense copy a context, as long as the context."
    return Card("Key/value bytes, peak", found.words, note, scaled(bars), found.mood)


def _recorded_hits(source: Source) -> Card | None:
    asked = _last(source, "queries")
    found = _last(source, "hits")
    if not asked:
        return None
    note = f"{count(found)} of {count(asked)}."
    return Card("Lookups that hit", f"{100 * found / asked:.3g} %", note)


def _recorded_time(source: Source) -> Card | None:
    whole = source.recording.seconds
    spent = _last(source, "cache_s")
    if not whole or not spent:
        return None
    note = f"{spent:.3g} of {whole:.3g} seconds recorded, idle time included."
    return Card(TIME, f"{100 * spent / whole:.3g} %", note)


class Count(NamedTuple):
    """A field of a sample, the largest of which stands in the table."""

    field: str
    label: str
    show: Callable[[float], str]


COUNTS = (  # counters only grow, so that the largest is the last
    Count("sequences", "Sequences", count),
    Count("bytes_in_use", "Bytes in use", size),
    Count("bytes_peak", "  and between samples", size),
    Count("bytes_reserved", "Bytes reserved", size),
    Count("bytes_unique", "Bytes of unique tokens", size),
    Count("bytes_dense", "Bytes of dense copies", size),
    Count("queries", "Lookups", count),
    Count("hits", "Hits", count),
    Count("forks", "Forks", count),
    Count("appends", "Appends", count),
    Count("copied_pages", "Pages copied", count),
    Count("freed_pages", "Pages freed", count),
    Count("evictions", "Evictions", count),
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
    heads = ["", *(source.name for source in found)]
    return Table("Peaks of the samples, and totals", heads, lines)


def _last(source: Source, name: str) -> float:
    """The latest value of a field; 0 where it was never recorded."""
    known = values(source.samples, name)
    return known[-1] if known else 0
