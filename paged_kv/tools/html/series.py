"""What the charts need of recordings: names, an axis, rows; and never more of them than a page can
carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from paged_kv.recording import Recording
from paged_kv.tools.html.style import DOTS, LONG, SHORT, SOLID

MAX_SAMPLES = 500
Row = dict[str, Any]
UNITS = (("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30))


@dataclass(frozen=True)
class Source:
    """A recording as the page shows it. `key` is a plain word, `name` what readers see."""

    key: str
    name: str
    colour: str
    dash: list[int]
    recording: Recording
    samples: list[Row]

    @property
    def paged(self) -> bool:
        """Whether it is a recording of pages."""
        return bool(self.recording.cache.get("page_size"))

    def peak(self, name: str) -> float:
        """The largest value of a field; 0 where it was never recorded."""
        return max(values(self.samples, name), default=0)


def sources(recordings: Sequence[Recording]) -> list[Source]:
    """The recordings with names and colours of their own."""
    pages = iter(_looks("paged"))
    others = iter(_looks("other"))
    found = []
    for place, recording in enumerate(recordings):
        colour, dash = next(
            pages if recording.cache.get("page_size") else others, ("var(--muted)", DOTS)
        )
        found.append(
            Source(
                f"r{place}", recording.title, colour, dash, recording, thinned(recording.samples)
            )
        )
    return found


def _looks(kind: str) -> list[tuple[str, list[int]]]:
    # Those of other caches are dashed, so that a line of pages below stays visible.
    first, second = (SOLID, LONG) if kind == "paged" else (SHORT, DOTS)
    return [(f"var(--{kind})", first), (f"var(--{kind}-2)", second)]


def number(row: Row, name: str) -> float | None:
    """A field of a line as a number, or None where it is missing, no number, or not finite."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def values(rows: Iterable[Row], name: str) -> list[float]:
    """All numbers of a field."""
    found = (number(row, name) for row in rows)
    return [value for value in found if value is not None]


def thinned(samples: list[Row], limit: int = MAX_SAMPLES) -> list[Row]:
    """At most `limit` samples: of each group of neighbours the one that held the most, so that
    peaks stay.

    >>> [row["t"] for row in thinned([{"t": t, "bytes_in_use": t % 3} for t in range(6)], 2)]
    [2, 5]
    """
    if len(samples) <= limit:
        return samples
    edges = [len(samples) * i // limit for i in range(limit + 1)]
    groups = (samples[start:end] for start, end in pairwise(edges))
    return [max(group, key=lambda row: number(row, "bytes_in_use") or 0) for group in groups]


@dataclass(frozen=True)
class Axis:
    """What stands under the charts over time: simulations, where every sample counts them, or else
    seconds.
    """

    title: str
    of: Callable[[Row], float]
    breaks: list[float]  # where a new root step begins


def axis(found: Sequence[Source]) -> Axis:
    """The axis that all these recordings can be shown over."""
    rows = [row for source in found for row in source.samples]
    if rows and all(number(row, "simulation") is not None for row in rows):
        return Axis(
            "simulation", lambda row: number(row, "simulation") or 0, _breaks(found[0].samples)
        )
    return Axis("seconds since the recording began", lambda row: number(row, "t") or 0, [])


def _breaks(samples: list[Row]) -> list[float]:
    pairs = pairwise(samples)
    return [
        after["simulation"] for before, after in pairs if before.get("root") != after.get("root")
    ]


def byte_unit(largest: float) -> tuple[str, int]:
    """The unit in which an axis up to so many bytes reads best.

    >>> byte_unit(3_473_408), byte_unit(800)
    (('MiB', 1048576), ('B', 1))
    """
    return next((unit for unit in reversed(UNITS) if largest >= 2 * unit[1]), UNITS[0])


T = TypeVar("T")


def fullest(snapshots: Sequence[T], measure: Callable[[T], int]) -> T | None:
    """The snapshot with the most to see, the latest of equals; None where there is none."""
    return max(reversed(snapshots), key=measure, default=None)
