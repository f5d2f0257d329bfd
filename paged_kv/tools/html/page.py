"""The page of recordings, and of a profile: what a search did to a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paged_kv.recording import Recording
from paged_kv.tools.html import charts, glance
from paged_kv.tools.html.document import Document, Section, figures, rendered
from paged_kv.tools.html.histograms import fill, lives
from paged_kv.tools.html.pagemap import page_map
from paged_kv.tools.html.series import Source, axis, sources
from paged_kv.tools.html.tree import tree
from paged_kv.tools.profile.counters import CACHE, HEADS, MODEL, TRANSFORMS, TREE
from paged_kv.tools.profile.parts import GLUE
from paged_kv.tools.profile.words import PART_NAMES, caches, notes, sides, title

COLOURS_OF_PARTS = {
    MODEL: "paged",
    HEADS: "shared",
    TRANSFORMS: "other-2",
    TREE: "other",
    CACHE: "cache",
    GLUE: "rest",
}
SEARCH_PARTS = {
    part: charts.PartLook(PART_NAMES[part], f"var(--{colour})")
    for part, colour in COLOURS_OF_PARTS.items()
}
NOTHING = "Nothing was recorded: there is no sample to draw."


def page(recordings: Sequence[Recording], result: dict[str, Any] | None = None) -> str:
    """One self-contained HTML text: loads nothing, follows light and dark, about 1 MB.

    `recordings` may be of pages and of other caches; `result` is what `profile` returned. Where
    there is nothing to show the page says so. Raises ImportError where the libraries of the extra
    `report` are missing.
    """
    found = sources(recordings)
    paged = [source for source in found if source.paged]
    table = None
    cards = []
    if result:
        table = glance.both(result)
        cards = glance.cards(result)
    elif found:
        table = glance.recorded(found)
        cards = glance.recorded_cards(paged[0]) if len(paged) == 1 else []
    return rendered(
        Document(
            title=_title(found, result),
            lead=_lead(found, result),
            notices=list(_notices(found, result)),
            cards=cards,
            table=table,
            sections=list(_sections(found, result)),
            facts=list(_facts(found, result)),
        )
    )


def _sections(found: list[Source], result: dict[str, Any] | None) -> Iterator[Section]:
    under = axis(found)
    paged = [source for source in found if source.paged]
    pools = [part(source, under) for source in paged for part in (charts.inside, charts.references)]
    yield figures("Memory over the search", charts.held(found, under), *pools)
    yield figures(
        "Time and lookups",
        charts.split(_times(found, result)),
        charts.cache_time(found, under),
        *(charts.verbs(source) for source in paged),
        charts.hits(found, under),
    )
    for source in paged:
        name = f" of {source.name}" if len(paged) > 1 else ""
        yield figures(f"The tree of one search{name}", tree(source))
        yield figures(
            f"The pool, page by page{name}", page_map(source), fill(source), lives(source)
        )


def _times(found: list[Source], result: dict[str, Any] | None) -> charts.Split:
    """Bars of time: of the profile, where there is one, or else of the recordings."""
    if result:
        shares = [
            charts.Share(name, side["search_parts_us_per_simulation"])
            for name, side in zip(sides(result["workload"]), caches(result))
        ]
        reading = (
            "The whole bar is the median of the timed root steps, in which nothing was wrapped or "
            "recorded; its parts were measured in a few more. The shorter, the better."
        )
        kept = [share for share in shares if share.whole]
        return charts.Split(kept, SEARCH_PARTS, "microseconds per simulation", reading)
    shares = [_recorded(source) for source in found]
    reading = (
        "The whole bar is the time from the beginning of the recording to its end, idle time "
        "included."
    )
    kept = [share for share in shares if share.parts["cache"]]
    return charts.Split(kept, charts.TWO_PARTS, "seconds recorded", reading)


def _recorded(source: Source) -> charts.Share:
    cache = source.peak("cache_s")
    rest = max(0.0, source.recording.seconds - cache)
    return charts.Share(source.name, {"cache": cache, "rest": rest})


def _title(found: list[Source], result: dict[str, Any] | None) -> str:
    if result:
        return f"{result['workload']['preset']}: {sides(result['workload'])[0]} against pages"
    return " and ".join(source.name for source in found) or "A report without a recording"


def _lead(found: list[Source], result: dict[str, Any] | None) -> str:
    if result:
        return f"{title(result['workload'])}. {notes(result)}"
    parts = []
    for source in found:
        sizes = source.recording.cache
        recording = source.recording
        of = f"pages of {sizes['page_size']} tokens, " if source.paged else ""
        parts.append(
            f"{source.name}: {of}{len(recording.samples):,} samples in {recording.seconds:,.3g} "
            "seconds."
        )
    return " ".join(parts)


def _notices(found: list[Source], result: dict[str, Any] | None) -> Iterator[str]:
    if not any(source.samples for source in found):
        yield NOTHING
    for source in found:
        if source.recording.torn:
            yield f"{source.name}: the last line of the file was cut off; the rest is shown."
        if source.recording.reason is None and source.samples:
            yield f"{source.name}: the recording was cut off; what was written until then is shown."
        if len(source.samples) < len(source.recording.samples):
            yield (
                f"{source.name}: {len(source.samples):,} of {len(source.recording.samples):,} "
                "samples are drawn, of "
                "each group of neighbours the one that held the most."
            )


def _facts(found: list[Source], result: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    for part in ("workload", "machine"):
        for name, value in (result or {}).get(part, {}).items():
            yield name.replace("_", " "), "none" if value is None else str(value)
    for source in found:
        for name, value in {
            **source.recording.cache,
            **source.recording.header.get("labels", {}),
        }.items():
            yield (
                f"{source.name}: {name.replace('_', ' ')}",
                "none" if value is None else str(value),
            )
