"""Several recordings as one: of the workers that share a search, or of the lives of one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv import __version__
from paged_kv.errors import BadArgument, BadRecording
from paged_kv.recording.format import FORMAT, VERSION, Line, Recording
from paged_kv.recording.reading import read_recording

HELD = (  # what stands at a moment
    "bytes_in_use",
    "bytes_reserved",
    "bytes_shared",
    "bytes_unique",
    "bytes_dense",
    "sequences",
    "dead_slots",
)
DONE = (  # counts since a recording began
    "forks",
    "appends",
    "copied_pages",
    "freed_pages",
    "queries",
    "hits",
    "evictions",
    "cache_s",
)
PEAKS = {"bytes_peak": "bytes_in_use", "sequences_peak": "sequences"}
BINS = "pages_by_refs"
COUNT = "recordings"  # the label of a merged recording: of how many
Numbers = dict[str, float]


class _Moment(NamedTuple):
    """A sample of one recording, and the one after it; or the moment its cache was gone (None)."""

    t: float
    place: int
    sample: Line | None
    after: Line | None


def read_recordings(*paths: str | os.PathLike[str]) -> list[Recording]:
    """Read files, and all `*.jsonl` of folders, in the order of the numbers in their names.

    Raises BadRecording, also for a folder that has none, and MissingPackage.
    """
    return [read_recording(file) for path in paths for file in recordings_in(path)]


def recordings_in(path: str | os.PathLike[str]) -> list[Path]:
    """A file, or those of a folder. Raises BadRecording for a folder that has none."""
    where = Path(path)
    if not where.is_dir():
        return [where]
    found = sorted(where.glob("*.jsonl"), key=lambda file: _natural(file.stem))
    if not found:
        raise BadRecording(path, "it is a folder without a file *.jsonl")
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """How a name sorts: numbers in it as numbers."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def by_worker(recordings: Iterable[Recording]) -> list[Recording]:
    """One recording a worker: the lives of a worker, which share the label "worker", are merged.

    What has no such label stays as it is.
    """
    groups: dict[object, list[Recording]] = {}
    for place, recording in enumerate(recordings):
        worker = recording.header["labels"].get("worker")
        groups.setdefault(worker if worker is not None else place, []).append(recording)
    return [each[0] if len(each) == 1 else merged(each, each[0].title) for each in groups.values()]


def merged(recordings: Sequence[Recording], title: str | None = None) -> Recording:
    """One recording of all: what is held and was done, added up, over the time of all.

    What a recording held last counts until the end of all, or is gone with its worker where it was
    cut off. A sample's `bytes_peak` and `sequences_peak` are bounds: peaks that belong to one
    stretch of time, added up. Numbers of sequences and pages mean nothing beyond one cache, so that
    trees, pages and accesses are left out; so are `usage` and tiers. It ended where all did, and
    for the first reason but "done". Clocks of several machines are taken as they are.
    Cost: O(lines log lines). Raises BadArgument where there is none.
    """
    if not recordings:
        raise BadArgument("recordings", recordings, "at least one recording")
    begun = min(float(each.header["started"]) for each in recordings)
    shifts = [float(each.header["started"]) - begun for each in recordings]
    events = [
        {**event, "t": round(event["t"] + shift, 6)}
        for each, shift in zip(recordings, shifts)
        for event in each.events
    ]
    return Recording(
        _header(recordings, title, begun),
        samples=list(_samples(recordings, shifts)),
        events=sorted(events, key=lambda event: float(event["t"])),
        lives=_lives(recordings, shifts),
        ends=_ends(recordings, shifts),
        torn=any(each.torn for each in recordings),
    )


# -- the first line and the last


def _header(recordings: Sequence[Recording], title: str | None, begun: float) -> Line:
    labels = _common([each.header["labels"] for each in recordings])
    return {
        "format": FORMAT,
        "version": VERSION,
        "started": begun,
        "package": __version__,
        "title": f"{len(recordings)} recordings" if title is None else title,
        "cache": _common([each.cache for each in recordings]) or None,
        "labels": {**labels, COUNT: str(len(recordings))},
    }


def _common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say alike."""
    first, *others = mappings
    return {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }


def _ends(recordings: Sequence[Recording], shifts: Sequence[float]) -> list[Line]:
    reasons = [each.reason for each in recordings]
    if None in reasons:
        return []
    last = max(each.seconds + shift for each, shift in zip(recordings, shifts))
    reason = next((each for each in reasons if each != "done"), "done")
    return [{"kind": "end", "t": round(last, 6), "reason": reason}]


def _lives(recordings: Sequence[Recording], shifts: Sequence[float]) -> list[Line]:
    """The lives of pages that the recordings ended with, where they are told in the same bins."""
    told = [(each.lives[-1], shift) for each, shift in zip(recordings, shifts) if each.lives]
    if not told or any(line["edges"] != told[0][0]["edges"] for line, _ in told):
        return []
    counts = [sum(column) for column in zip(*(line["counts"] for line, _ in told))]
    last = max(line["t"] + shift for line, shift in told)
    return [{"kind": "lives", "t": round(last, 6), "edges": told[0][0]["edges"], "counts": counts}]


# -- samples


def _samples(recordings: Sequence[Recording], shifts: Sequence[float]) -> Iterator[Line]:
    told: list[Numbers] = [{} for _ in recordings]  # what of the sums is whose
    sums: Numbers = {}

    def put(place: int, numbers: Numbers) -> None:
        before = told[place]
        for name in {**before, **numbers}:
            sums[name] = sums.get(name, 0) + numbers.get(name, 0) - before.get(name, 0)
        told[place] = numbers

    for moment in _moments(recordings, shifts):
        now = _numbers(told[moment.place], moment.sample)
        put(moment.place, now)
        yield _line(moment.t, sums)
        put(moment.place, {**now, **_peaks(now, moment.after)})


def _moments(recordings: Sequence[Recording], shifts: Sequence[float]) -> list[_Moment]:
    moments = []
    over = [each.seconds + shift for each, shift in zip(recordings, shifts)]
    for place, (each, shift) in enumerate(zip(recordings, shifts)):
        followers: list[Line | None] = [*each.samples[1:], None]
        moments += [
            _Moment(sample["t"] + shift, place, sample, after)
            for sample, after in zip(each.samples, followers)
        ]
        if each.samples and each.reason is None and over[place] < max(over):
            moments.append(_Moment(over[place], place, None, None))
    return sorted(moments, key=lambda moment: (moment.t, moment.sample is None))


def _numbers(before: Numbers, sample: Line | None) -> Numbers:
    """What one recording adds to the sums: of a sample, or once its cache is gone."""
    if sample is None:
        return {name: number if name in DONE else 0 for name, number in before.items()}
    found = {name: sample[name] for name in (*HELD, *DONE, *PEAKS) if name in sample}
    bins = sample.get(BINS, {})
    return {**found, **{f"{BINS}/{name}": number for name, number in bins.items()}}


def _peaks(now: Numbers, after: Line | None) -> Numbers:
    """The most that is held from now until the next sample, which tells of it."""
    return {
        peak: now.get(held, 0) if after is None else max(after.get(peak, 0), now.get(held, 0))
        for peak, held in PEAKS.items()
        if peak in now
    }


def _line(t: float, sums: Numbers) -> Line:
    line: Line = {"kind": "sample", "t": round(t, 6)}
    bins = {}
    for name, number in sums.items():
        field, _, part = name.partition("/")
        if part:
            bins[part] = number
        else:
            line[field] = round(number, 6) if field == "cache_s" else number
    return {**line, BINS: bins} if bins else line
