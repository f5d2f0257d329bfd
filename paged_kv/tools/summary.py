"""The figures of a recording: peaks, averages, totals and rates, and what each verb took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import NamedTuple

from paged_kv.recording.format import Line, Recording
from paged_kv.recording.merging import COUNT
from paged_kv.stats import TierStats
from paged_kv.tools.units import count, micros, size

Show = Callable[[float], str]


@dataclass(frozen=True)
class Figure:
    """One number of a recording, and how people read it."""

    group: str
    name: str
    value: float
    show: Show

    def __str__(self) -> str:
        return self.show(self.value)


@dataclass(frozen=True)
class Verb:
    """All calls of one verb; times in seconds."""

    name: str
    calls: int
    sequences: int
    seconds: float
    longest: float

    @property
    def us_per_call(self) -> float:
        """Mean time of a call, in microseconds."""
        return self.seconds / self.calls * 1e6 if self.calls else 0.0


def percent(value: float) -> str:
    """A share of 1, for people.

    >>> percent(0.1234)
    '12.3 %'
    """
    return f"{value * 100:.1f} %"


def times(value: float) -> str:
    """A ratio, for people.

    >>> times(7.571), times(20.9)
    ('7.57x', '20.9x')
    """
    return f"{value:.3g}x"


def seconds(value: float) -> str:
    """A span of time, for people.

    >>> seconds(12.34), seconds(0.0123)
    ('12.3 s', '12.3 ms')
    """
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def summarize(recording: Recording) -> list[Figure]:
    """Every figure that the samples allow; those whose fields are missing are left out.

    Averages are over time: a sample counts until the next. Totals are those of the last sample.
    """
    samples = recording.samples
    figures = [
        Figure("run", "time", recording.seconds, seconds),
        Figure("run", "samples", len(samples), count),
    ]
    figures += _peaks(samples)
    figures += _averages(samples)
    figures += _totals(recording)
    middle = _median_life(recording.lives)
    if middle is not None:
        figures.append(Figure("pages", "half of them live less than", middle, seconds))
    return figures


class Shown(NamedTuple):
    """What a figure is called, the fields of a sample it is made of, and how people read it."""

    name: str
    fields: Sequence[str]
    show: Show


PEAKS = (
    Shown("KV bytes in use", ("bytes_peak", "bytes_in_use"), size),
    Shown("bytes reserved", ("bytes_reserved",), size),
    Shown("dense copies would hold", ("bytes_dense",), size),
    Shown("unique tokens need", ("bytes_unique",), size),
    Shown("sequences", ("sequences_peak", "sequences"), count),
    Shown("usage of the pool", ("usage",), percent),
)
AVERAGES = (
    Shown("KV bytes in use", ("bytes_in_use",), size),
    Shown("bytes shared", ("bytes_shared",), size),
    Shown("dense copies would hold", ("bytes_dense",), size),
    Shown("unique tokens need", ("bytes_unique",), size),
    Shown("sequences", ("sequences",), count),
    Shown("dead slots", ("dead_slots",), count),
)
QUOTIENTS = (  # of averages: above and below the line
    Shown("dense copies / unique tokens", ("bytes_dense", "bytes_unique"), times),
    Shown("bytes in use / unique tokens", ("bytes_in_use", "bytes_unique"), times),
)


def _peaks(samples: Sequence[Line]) -> Iterator[Figure]:
    for name, known, show in PEAKS:
        found = [sample[field] for sample in samples for field in known if field in sample]
        if found:
            yield Figure("peak", name, max(found), show)


def _averages(samples: Sequence[Line]) -> Iterator[Figure]:
    average = {}
    for name, (field,), show in AVERAGES:
        value = _mean(samples, field)
        if value is not None:
            average[field] = value
            yield Figure("average", name, value, show)
    for name, (above, below), show in QUOTIENTS:
        if average.get(below) and above in average:
            yield Figure("average", name, average[above] / average[below], show)


def _mean(samples: Sequence[Line], field: str) -> float | None:
    """The average over time, from one sample to the next; the plain one where no time passes."""
    known: list[tuple[float, float]] = [
        (sample["t"], sample[field]) for sample in samples if field in sample
    ]
    if not known:
        return None
    spans = [later[0] - earlier[0] for earlier, later in pairwise(known)]
    passed = sum(spans)
    if passed <= 0:
        return sum(value for _, value in known) / len(known)
    return sum(value * span for (_, value), span in zip(known, spans)) / passed


def _totals(recording: Recording) -> Iterator[Figure]:
    last = recording.samples[-1] if recording.samples else {}
    passed = recording.seconds
    many = COUNT in recording.header["labels"]  # several caches at once: no share of the time
    for field in ("forks", "appends", "copied_pages", "freed_pages", "evictions", "queries"):
        if field in last:
            yield Figure("total", field.replace("_", " "), last[field], count)
    if many and "cache_s" in last:
        yield Figure("total", "time in the cache", last["cache_s"], seconds)
    if passed > 0:
        for field in ("forks", "appends", "freed_pages"):
            if field in last:
                name = f"{field.replace('_', ' ')} per second"
                yield Figure("rate", name, last[field] / passed, count)
        if "cache_s" in last and not many:
            yield Figure("rate", "time in the cache", last["cache_s"] / passed, percent)
    if last.get("queries") and "hits" in last:
        yield Figure("rate", "hit rate", last["hits"] / last["queries"], percent)


def _median_life(lives: Sequence[Line]) -> float | None:
    """The upper edge of the bin that the middle life falls in; None where there is none."""
    if not lives:
        return None
    counts = lives[-1]["counts"]
    for edge, reached in zip(lives[-1]["edges"][1:], accumulate(counts)):
        if reached and 2 * reached >= sum(counts):
            return None if edge is None else float(edge)
    return None


def verbs(recording: Recording) -> list[Verb]:
    """What each verb took, the longest in sum first. Marks are left out."""
    found: dict[str, Verb] = {}
    for event in recording.events:
        if event.get("mark"):
            continue
        name = str(event["name"])
        so_far = found.get(name, Verb(name, 0, 0, 0.0, 0.0))
        spent = float(event.get("s", 0.0))
        found[name] = Verb(
            name,
            so_far.calls + event.get("count", 1),
            so_far.sequences + event.get("sequences", 0),
            so_far.seconds + spent,
            max(so_far.longest, float(event.get("most", spent))),
        )
    return sorted(found.values(), key=lambda verb: -verb.seconds)


def tiers(recording: Recording) -> list[TierStats]:
    """Where pages lay at the end, and what moved; none where all were in memory."""
    last = recording.samples[-1] if recording.samples else {}
    names = [field.name for field in fields(TierStats)]
    return [
        TierStats(**{name: tier[name] for name in names if name in tier})
        for tier in last.get("tiers", [])
        if "name" in tier
    ]


class Pair(NamedTuple):
    """The same figure of two recordings; None where one has it not."""

    first: Figure | None
    second: Figure | None

    @property
    def ratio(self) -> float | None:
        """first / second, where it is defined."""
        if self.first is None or self.second is None or not self.second.value:
            return None
        return self.first.value / self.second.value


def pairs(first: Recording, second: Recording) -> list[Pair]:
    """The figures of two recordings side by side."""
    ours = {(figure.group, figure.name): figure for figure in summarize(first)}
    theirs = {(figure.group, figure.name): figure for figure in summarize(second)}
    return [Pair(ours.get(key), theirs.get(key)) for key in {**ours, **theirs}]


def call_time(verb: Verb) -> str:
    """The mean time of a call, for people."""
    return micros(verb.us_per_call)
