"""The page of several recordings: workers side by side, and all of them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import altair as alt

from paged_kv.recording import Recording, by_worker, merged
from paged_kv.tools import workers as figures_of
from paged_kv.tools.html import charts, glance
from paged_kv.tools.html.document import Document, Section, figures, rendered
from paged_kv.tools.html.figure import Figure, choose
from paged_kv.tools.html.heat import Measure, Named, heat
from paged_kv.tools.html.histograms import lives
from paged_kv.tools.html.pagemap import page_map
from paged_kv.tools.html.series import Row, Source, axis, sources
from paged_kv.tools.html.tree import tree
from paged_kv.tools.units import count, size

MOST_WORKERS = 64  # that have a row of their own in a chart
MOST_BARS = 24
EVEN = 1.01  # over the mean
HELD = Measure("bytes_in_use", "bytes in use", size, grows=False)
EVICTED = Measure("evictions", "evictions", count, grows=True)
FOUND = charts.PartLook("found", "var(--paged)")
MISSED = charts.PartLook("not found", "var(--other)")


def workers_page(recordings: Sequence[Recording]) -> str:
    """One self-contained HTML text of recordings that were made at once, by workers of a pool.

    Recordings of one worker, which died and came back, are one row. Raises BadArgument where there
    is none, ImportError where the libraries of the extra `report` are missing.
    """
    whole = merged(recordings, figures_of.ALL)
    workers = _named(recordings, float(whole.header["started"]))
    (source,) = sources([whole])
    heads = ["", *(column.heading for column in figures_of.COLUMNS)]
    rows = [[side.name, *side.cells] for side in figures_of.sides(recordings)]
    return rendered(
        Document(
            title=_title(recordings, workers),
            lead=_lead(recordings, workers, whole),
            notices=list(_notices(recordings, workers)),
            cards=_cards(source, workers),
            table=glance.Table("Workers side by side", heads, rows),
            sections=list(_sections(source, workers, recordings)),
            facts=list(_facts(recordings)),
        )
    )


def _named(recordings: Sequence[Recording], begun: float) -> list[Named]:
    return [
        Named(figures_of.name_of(each), each, float(each.header["started"]) - begun)
        for each in by_worker(recordings)
    ]


def _title(recordings: Sequence[Recording], workers: Sequence[Named]) -> str:
    """What the titles have in common before the worker is named."""
    stems = {each.title.rsplit(": worker ", 1)[0] for each in recordings}
    what = f"{len(workers)} workers" if len(workers) > 1 else workers[0].name
    return f"{stems.pop()}: {what}" if len(stems) == 1 else what


def _lead(recordings: Sequence[Recording], workers: Sequence[Named], whole: Recording) -> str:
    pages = whole.cache.get("page_size")
    of = f" of pages of {pages} tokens" if pages else ""
    samples = sum(len(each.samples) for each in recordings)
    return (
        f"{len(recordings):,} recordings of {len(workers):,} workers{of}, {samples:,} samples in "
        f"{whole.seconds:,.3g} seconds. {figures_of.PEAKS_ADD_UP}"
    )


def _notices(recordings: Sequence[Recording], workers: Sequence[Named]) -> Iterator[str]:
    yield from figures_of.early(recordings)
    if len(workers) > MOST_WORKERS:
        yield (
            f"Charts show {MOST_WORKERS} of {len(workers):,} workers, those that held the most; "
            "the table has all."
        )


def _sections(
    whole: Source, workers: Sequence[Named], recordings: Sequence[Recording]
) -> Iterator[Section]:
    under = axis([whole])
    shown = _largest(workers, MOST_WORKERS)
    yield figures(
        "Memory",
        _memory(shown),
        charts.held([whole], under),
        charts.inside(whole, under),
        charts.references(whole, under),
    )
    yield figures(
        "Lookups and evictions",
        _evictions(shown),
        _lookups(_largest(workers, MOST_BARS)),
        charts.hits([whole], under),
    )
    yield figures("Time", _times(_largest(workers, MOST_BARS)), charts.verbs(whole), lives(whole))
    one = max(recordings, key=_peak)
    (source,) = sources([one])
    name = figures_of.name_of(one)
    yield figures(f"The tree of one search of {name}, which held the most", tree(source))
    yield figures(f"The pool of {name}, page by page", page_map(source))


def _memory(workers: Sequence[Named]) -> Figure | None:
    peaks = [_peak(each.recording) for each in workers]
    title = f"The worker that held the most held {_uneven(peaks)}"
    reading = (
        "A row is a worker, a cell a stretch of time: the darker (on dark: the lighter), the more "
        "it held at most. Grey: nothing, as of one that died until it is back. No cell: it was not "
        "recorded then."
    )
    return heat("memory-of-workers", title, reading, workers, HELD)


def _evictions(workers: Sequence[Named]) -> Figure | None:
    total = sum(figures_of.evictions(each.recording) or 0 for each in workers)
    reading = (
        "What a worker let go for lack of room is computed again when it is asked for. Rows that "
        "are dark while others are empty say that trees should move, or have more room."
    )
    title = f"{count(total)} contexts were evicted"
    return heat("evictions-of-workers", title, reading, workers, EVICTED)


def _lookups(workers: Sequence[Named]) -> Figure | None:
    rows: list[Row] = []
    for each in workers:
        asked = figures_of.last("queries")(each.recording) or 0
        found = figures_of.last("hits")(each.recording) or 0
        for place, (kind, number) in enumerate((("hits", found), ("misses", asked - found))):
            rows.append({"n": each.name, "k": kind, "i": place, "y": number})
    if not any(row["y"] for row in rows):
        return None
    looks = {"hits": FOUND, "misses": MISSED}
    scale = alt.Scale(domain=list(looks), range=[look.colour for look in looks.values()])
    names = choose({kind: look.name for kind, look in looks.items()})
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(cornerRadius=2)
    drawing: alt.Chart = bars.properties(height=max(60, 28 * len(workers))).encode(
        alt.Y("n:N", title=None, sort=None, axis=alt.Axis(labelLimit=140, ticks=False)),
        alt.X("y:Q", title="lookups", stack="zero", axis=alt.Axis(tickCount=4)),
        alt.Color("k:N", scale=scale, legend=alt.Legend(title=None, labelExpr=names)),
        order=alt.Order("i:Q"),
        tooltip=[
            alt.Tooltip("n:N", title="worker"),
            alt.Tooltip("k:N", title="kind"),
            alt.Tooltip("y:Q", title="lookups", format=","),
        ],
    )
    misses = sum(row["y"] for row in rows if row["k"] == "misses")
    title = f"{count(misses)} of {count(sum(row['y'] for row in rows))} lookups found nothing"
    reading = "The longer a bar, the more a worker was asked for; the second part is fed again."
    return Figure("lookups-of-workers", title, drawing, reading)


def _times(workers: Sequence[Named]) -> Figure | None:
    shares = [share for share in map(_time, workers) if share.parts["cache"]]
    reading = (
        "A bar is the time from the beginning of a worker's recording to its end, idle time "
        "included. Where the cache's parts differ much, the work is not even."
    )
    figure = charts.split(charts.Split(shares, charts.TWO_PARTS, "seconds recorded", reading))
    if figure is None:
        return None
    parts = [100 * share.parts["cache"] / share.whole for share in shares]
    title = f"The cache takes {min(parts):.3g} % to {max(parts):.3g} % of the time of a worker"
    return dataclasses.replace(figure, title=title)


def _time(worker: Named) -> charts.Share:
    spent = figures_of.last("cache_s")(worker.recording) or 0.0
    rest = max(0.0, worker.recording.seconds - spent)
    return charts.Share(worker.name, {"cache": spent, "rest": rest})


def _cards(whole: Source, workers: Sequence[Named]) -> list[glance.Card]:
    cards = [card for card in glance.recorded_cards(whole) if card.label != glance.TIME]
    peaks = [_peak(each.recording) for each in workers]
    named = (("most", max(peaks)), ("mean", sum(peaks) / len(peaks)), ("least", min(peaks)))
    bars = [glance.Bar(name, value, size(value), "i1") for name, value in named]
    note = "Peaks of the workers, each at its own moment."
    title = "The most held by one worker"
    return [*cards, glance.Card(title, _uneven(peaks), note, glance.scaled(bars))]


def _uneven(peaks: Sequence[float]) -> str:
    mean = sum(peaks) / len(peaks)
    ratio = max(peaks) / mean if mean else 1.0
    return "no more than the others" if ratio < EVEN else f"{ratio:.3g}x the mean"


def _largest(workers: Sequence[Named], most: int) -> list[Named]:
    """Those that held the most, in the order of all."""
    kept = sorted(range(len(workers)), key=lambda place: -_peak(workers[place].recording))[:most]
    return [workers[place] for place in sorted(kept)]


def _peak(recording: Recording) -> float:
    return figures_of.most("bytes_peak", "bytes_in_use")(recording) or 0.0


def _facts(recordings: Sequence[Recording]) -> Iterator[tuple[str, str]]:
    for each in recordings:
        labels = each.header["labels"]
        told = ", ".join(f"{name} {text}" for name, text in labels.items())
        yield each.title, told or "no labels"
    for name, value in recordings[0].cache.items():
        yield name.replace("_", " "), "none" if value is None else str(value)
