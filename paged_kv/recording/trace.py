"""A recording in Chrome's trace format, for ui.perfetto.dev or chrome://tracing.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: a slice has phase
X, a moment i, a counter C, names of rows M; times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paged_kv.recording.format import Line, Recording

PID = 1
MARKS = 0  # the row of the marks, before those of the verbs
TRACKS = {
    "KV bytes": ("bytes_in_use", "bytes_reserved", "bytes_shared", "bytes_unique", "bytes_dense"),
    "sequences": ("sequences",),
    "dead slots": ("dead_slots",),
    "usage": ("usage",),
}


def trace(recording: Recording) -> dict[str, Any]:
    """The whole trace, ready for `json.dump`.

    Each verb has a row of its own. A slice begins with the first of the calls that one event counts
    and ends with the last; how many they were and how long they took in sum is in its arguments.
    """
    return {
        "traceEvents": _events(recording, PID, 0.0),
        "displayTimeUnit": "ms",
        "otherData": {
            "title": recording.title,
            "started": recording.header["started"],
            **recording.header["labels"],
        },
    }


def traces(recordings: Sequence[Recording]) -> dict[str, Any]:
    """The trace of recordings that were made at once: a process each, over the time of all."""
    begun = min((each.header["started"] for each in recordings), default=0.0)
    events = [
        event
        for pid, each in enumerate(recordings, PID)
        for event in _events(each, pid, each.header["started"] - begun)
    ]
    other = {"started": begun, "recordings": len(recordings)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _events(recording: Recording, pid: int, later: float) -> list[Line]:
    """Those of one recording, which began some seconds later than the trace."""
    rows = {
        name: row
        for row, name in enumerate(dict.fromkeys(e["name"] for e in _calls(recording)), MARKS + 1)
    }
    events = [
        _named("process_name", MARKS, f"paged_kv: {recording.title}"),
        _named("thread_name", MARKS, "marks"),
    ]
    events += [_named("thread_name", row, name) for name, row in rows.items()]
    timed = [_slice(event, rows[event["name"]]) for event in _calls(recording)]
    timed += [_moment(event) for event in recording.events if event.get("mark")]
    timed += _counters(recording.samples)
    for event in timed:
        event["ts"] += later * 1e6
    events += sorted(timed, key=lambda event: float(event["ts"]))
    return [{**event, "pid": pid} for event in events]


def _calls(recording: Recording) -> list[Line]:
    return [event for event in recording.events if not event.get("mark")]


def _named(what: str, row: int, name: str) -> Line:
    return {"ph": "M", "name": what, "tid": row, "args": {"name": name}}


def _slice(event: Line, row: int) -> Line:
    spent = float(event.get("s", 0.0))
    span = float(event.get("span", spent))
    args: Line = {name: event[name] for name in ("count", "sequences", "pages") if name in event}
    args["seconds"] = spent
    return {
        "ph": "X",
        "name": event["name"],
        "cat": "verb",
        "ts": event["t"] * 1e6,
        "dur": span * 1e6,
        "tid": row,
        "args": args,
    }


def _moment(event: Line) -> Line:
    return {
        "ph": "i",
        "s": "p",
        "name": event["name"],
        "cat": "mark",
        "ts": event["t"] * 1e6,
        "tid": MARKS,
        "args": {"count": event.get("count", 1)},
    }


def _counters(samples: list[Line]) -> Iterator[Line]:
    before: Line = {}
    for sample in samples:
        for name, fields in TRACKS.items():
            yield from _counter(
                sample, name, {field: sample[field] for field in fields if field in sample}
            )
        yield from _counter(sample, "pages by references", sample.get("pages_by_refs", {}))
        for name, value in rates(before, sample).items():
            yield from _counter(sample, name.replace("_", " "), {name: value})
        before = sample


def _counter(sample: Line, name: str, values: Line) -> Iterator[Line]:
    if values:
        yield {
            "ph": "C",
            "name": name,
            "ts": sample["t"] * 1e6,
            "tid": MARKS,
            "args": values,
        }


def rates(before: Line, sample: Line) -> dict[str, float]:
    """Between two samples: the hit rate, if there were lookups, and the share of time in the cache.

    >>> before = {"t": 1.0, "queries": 10, "hits": 9}
    >>> rates(before, {"t": 2.0, "queries": 20, "hits": 14, "cache_s": 0.5})
    {'hit_rate': 0.5}
    """
    found = {}
    queries = sample.get("queries", 0) - before.get("queries", 0)
    if queries > 0 and "hits" in sample:
        found["hit_rate"] = (sample["hits"] - before.get("hits", 0)) / queries
    passed = sample["t"] - before.get("t", 0.0)
    if passed > 0 and "cache_s" in before and "cache_s" in sample:
        found["cache_share"] = (sample["cache_s"] - before["cache_s"]) / passed
    return found
