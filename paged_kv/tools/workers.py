"""Recordings of several workers side by side: figures of each and of all, and which ended early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_kv.recording import Recording, by_worker, merged
from paged_kv.tools.summary import Show, percent, seconds
from paged_kv.tools.units import count, size

ALL = "all"
PEAKS_ADD_UP = (
    "Peaks of all are bounds, what each held at most in the same stretch of time, added up."
)


class Column(NamedTuple):
    """A figure of each worker: what it is called, in short for a terminal, where it comes from, how
    people read it.
    """

    heading: str
    short: str
    of: Callable[[Recording], float | None]
    show: Show


class Side(NamedTuple):
    """A worker, or all of them: its name and a text for each column."""

    name: str
    cells: list[str]


def name_of(recording: Recording) -> str:
    """What a recording is called beside others: its worker, where it is one's."""
    worker = recording.header["labels"].get("worker")
    return recording.title if worker is None else f"worker {worker}"


def sides(recordings: Sequence[Recording]) -> list[Side]:
    """The figures of each worker, and of all."""
    workers = by_worker(recordings)
    whole = merged(recordings, ALL)
    named = [*((name_of(each), each) for each in workers), (ALL, whole)]
    return [
        Side(name, [_text(column, recording) for column in COLUMNS]) for name, recording in named
    ]


def early(recordings: Sequence[Recording]) -> list[str]:
    """A sentence for each recording that did not end in good order."""
    found = []
    for each in recordings:
        name = name_of(each)
        life = each.header["labels"].get("life", "1")
        if life != "1":
            name = f"{name}, life {life}"
        if each.reason is None:
            found.append(
                f"{name}: the recording ends early, after {seconds(each.seconds)}: its process was "
                f"killed, or still goes on.{_followed(each, recordings)}"
            )
        elif each.reason != "done":
            found.append(f"{name}: the recording ended with {each.reason}.")
        if each.torn:
            found.append(f"{name}: the last line was cut off, and left out.")
    return found


def _followed(one: Recording, recordings: Sequence[Recording]) -> str:
    """When the worker came back, if it did."""
    worker = one.header["labels"].get("worker")
    ended = float(one.header["started"]) + one.seconds
    gaps = [
        float(other.header["started"]) - ended
        for other in recordings
        if worker is not None
        and other.header["labels"].get("worker") == worker
        and float(other.header["started"]) > float(one.header["started"])
    ]
    return f" It came back {seconds(max(0.0, min(gaps)))} later." if gaps else ""


def _text(column: Column, recording: Recording) -> str:
    value = column.of(recording)
    return "" if value is None else column.show(value)


def most(*fields: str) -> Callable[[Recording], float | None]:
    """The largest value of a field, under any of its names."""

    def of(recording: Recording) -> float | None:
        found = [sample[name] for sample in recording.samples for name in fields if name in sample]
        return max(found, default=None)

    return of


def last(field: str) -> Callable[[Recording], float | None]:
    """The last value of a field, as of a count."""

    def of(recording: Recording) -> float | None:
        value: float | None = recording.samples[-1].get(field) if recording.samples else None
        return value

    return of


def hit_rate(recording: Recording) -> float | None:
    """Hits over lookups; None without lookups."""
    asked = last("queries")(recording)
    return (last("hits")(recording) or 0) / asked if asked else None


def evictions(recording: Recording) -> float | None:
    """What went for lack of room."""
    return last("evictions")(recording)


COLUMNS = (
    Column("time", "time", lambda recording: recording.seconds, seconds),
    Column("KV bytes, peak", "KV peak", most("bytes_peak", "bytes_in_use"), size),
    Column("sequences, peak", "seqs", most("sequences_peak", "sequences"), count),
    Column("forks", "forks", last("forks"), count),
    Column("pages copied", "copied", last("copied_pages"), count),
    Column("lookups", "lookups", last("queries"), count),
    Column("hits", "hits", hit_rate, percent),
    Column("evictions", "evicted", evictions, count),
    Column("in the cache", "cache", last("cache_s"), seconds),
)
