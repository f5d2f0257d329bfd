"""A naive index: a list that is sorted again for every question. The model of the index and manager tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from itertools import count


@dataclass
class Entry:
    """One entry and all that any policy may ask about it."""

    key: Hashable
    handle: int
    priority: float
    age: int
    used: int
    pins: int = 0


ORDERS: dict[str, Callable[[Entry], tuple[float, ...]]] = {
    "fifo": lambda entry: (entry.age,),
    "lru": lambda entry: (entry.used,),
    "priority": lambda entry: (entry.priority, entry.age),
}
Weigh = Callable[[list[int]], int]  # handles -> bytes of their pages


class FullError(Exception):
    """An entry that does not fit beside the pinned ones."""


@dataclass
class NaiveIndex:
    """The same promises as `CacheIndex`; it never releases anything, it only says what should be released."""

    policy: str
    max_entries: int | None = None
    max_bytes: int | None = None
    weigh: Weigh = lambda handles: 0
    entries: list[Entry] = field(default_factory=list)
    clock: count[int] = field(default_factory=count)
    stats: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("queries", "hits", "misses", "evictions", "insertions"), 0)
    )

    def find(self, key: Hashable) -> Entry | None:
        return next((entry for entry in self.entries if entry.key == key), None)

    def handles(self) -> list[int]:
        return [entry.handle for entry in self.entries]

    def victims(self, busy: Collection[int] = ()) -> list[Entry]:
        free = [entry for entry in self.entries if not entry.pins and entry.handle not in busy]
        return sorted(free, key=ORDERS[self.policy])

    def get(self, key: Hashable) -> int | None:
        entry = self.find(key)
        self.stats["queries"] += 1
        self.stats["misses" if entry is None else "hits"] += 1
        if entry is None:
            return None
        entry.used = next(self.clock)
        return entry.handle

    def fits(self, handles: list[int]) -> bool:
        if self.max_entries is not None and len(handles) > self.max_entries:
            return False
        return self.max_bytes is None or self.weigh(handles) <= self.max_bytes

    def put(self, key: Hashable, handle: int, priority: float | None) -> list[int]:
        """The handles that have to be released, in any order."""
        old = self.find(key)
        kept = [entry for entry in self.entries if entry is not old]
        victims = [entry for entry in self.victims() if entry is not old]
        gone: list[Entry] = []
        while not self.fits([entry.handle for entry in kept] + [handle]):
            if not victims:
                raise FullError
            gone.append(victims.pop(0))
            kept.remove(gone[-1])
        now = next(self.clock)
        new = Entry(key, handle, 0.0 if priority is None else priority, now, now, old.pins if old else 0)
        self.entries = [*kept, new]
        self.stats["insertions"] += 1
        self.stats["evictions"] += len(gone)
        dropped = {entry.handle for entry in gone}
        if old is not None and old.handle != handle:
            dropped.add(old.handle)
        return list(dropped)

    def drop(self, entries: list[Entry]) -> None:
        self.entries = [entry for entry in self.entries if entry not in entries]

    def evict(self, entries: list[Entry]) -> None:
        self.drop(entries)
        self.stats["evictions"] += len(entries)
