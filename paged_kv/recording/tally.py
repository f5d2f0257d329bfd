"""What one verb did since the last line about it."""

from __future__ import annotations

from math import inf
from typing import Any

Line = dict[str, Any]


class Tally:
    """The calls of one verb, and what came of them.

    >>> tally = Tally()
    >>> tally.effect(2.0, sequences=8, pages=-3)
    >>> tally.add(1.0, 2.5)
    >>> line = tally.line("release", origin=0.5)
    >>> line["t"], line["s"], line["count"], line["sequences"], line["pages"]
    (0.5, 1.5, 1, 8, -3)
    """

    __slots__ = ("count", "end", "most", "pages", "seconds", "sequences", "start")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.count = 0
        self.sequences = 0
        self.pages = 0
        self.start = inf
        self.end = 0.0
        self.seconds = 0.0
        self.most = 0.0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to say."""
        return self.start == inf

    def add(self, start: float, end: float, sequences: int = 0) -> None:
        """One call."""
        spent = end - start
        self.count += 1
        self.seconds += spent
        self.sequences += sequences
        if spent > self.most:
            self.most = spent
        if start < self.start:
            self.start = start
        if end > self.end:
            self.end = end

    def effect(self, now: float, sequences: int, pages: int) -> None:
        """Sequences that were made, changed or ended, and by how many pages more are in use."""
        self.sequences += sequences
        self.pages += pages
        if now < self.start:
            self.start = now
        if now > self.end:
            self.end = now

    def line(self, name: str, origin: float) -> Line:
        """All of it as an event, with times since `origin`."""
        return {
            "kind": "event",
            "t": round(self.start - origin, 6),
            "name": name,
            "s": round(self.seconds, 7),
            "span": round(self.end - self.start, 6),
            "most": round(self.most, 7),
            "count": self.count,
            "sequences": self.sequences,
            "pages": self.pages,
        }
