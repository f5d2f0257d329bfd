"""Naive indexes: lists that are sorted again for every question.

The model of the index and manager tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field


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


class GoneError(Exception):
    """A sequence that ended before it was put."""


@dataclass
class NaiveIndex:
    """The same promises as `CacheIndex`; it never releases anything, it only says what ends."""

    policy: str
    max_entries: int | None = None
    max_bytes: int | None = None
    weigh: Weigh = lambda handles: 0
    entries: list[Entry] = field(default_factory=list)
    clock: int = 0
    world: World | None = None
    stats: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("queries", "hits", "misses", "evictions", "insertions"), 0
        )
    )

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def find(self, key: Hashable) -> Entry | None:
        return next((entry for entry in self.entries if entry.key == key), None)

    def handles(self) -> list[int]:
        return [entry.handle for entry in self.entries]

    def pinned(self) -> list[int]:
        return [entry.handle for entry in self.entries if entry.pins]

    def ordered(self, busy: Collection[int] = ()) -> list[Entry]:
        """What may go, as the policy alone would have it."""
        free = [entry for entry in self.entries if not entry.pins and entry.handle not in busy]
        return sorted(free, key=ORDERS[self.policy])

    def victims(self, busy: Collection[int] = (), ended: Collection[int] = ()) -> list[Entry]:
        """What may go, leaves first."""
        found = self.ordered(busy)
        return self.world.leaves_first(found, ended) if self.world else found

    def get(self, key: Hashable) -> int | None:
        entry = self.find(key)
        self.stats["queries"] += 1
        self.stats["misses" if entry is None else "hits"] += 1
        if entry is None:
            return None
        entry.used = self.now()
        return entry.handle

    def fits(self, handles: list[int]) -> bool:
        if self.max_entries is not None and len(handles) > self.max_entries:
            return False
        return self.max_bytes is None or self.weigh(handles) <= self.max_bytes

    def put(
        self, key: Hashable, handle: int, priority: float | None, pin: bool = False
    ) -> list[int]:
        """The handles that end with it, in any order."""
        old = self.find(key)
        kept = [entry for entry in self.entries if entry is not old]
        ended = {old.handle} - {handle} if old else set()
        victims = [entry for entry in self.victims(ended=ended) if entry is not old]
        gone: list[Entry] = []
        while not self.fits([entry.handle for entry in kept] + [handle]):
            if not victims:
                raise FullError
            gone.append(victims.pop(0))
            kept.remove(gone[-1])
        now = self.now()
        rank = 0.0 if priority is None else priority
        pins = max(old.pins if old else 0, pin)
        self.entries = [*kept, Entry(key, handle, rank, now, now, pins)]
        self.stats["insertions"] += 1
        self.stats["evictions"] += len(gone)
        ended |= {entry.handle for entry in gone}
        if self.world:
            self.world.gone |= ended
        return list(ended)

    def put_batch(self, keys: Sequence[Hashable], handles: Sequence[int]) -> list[int]:
        """One `put` after the other; of an index that raises here, nothing more is to be used."""
        ended: list[int] = []
        for key, handle in zip(keys, handles):
            if handle in ended:
                raise GoneError
            ended += self.put(key, handle, None)
        return ended

    def drop(self, entries: list[Entry]) -> None:
        self.entries = [entry for entry in self.entries if entry not in entries]

    def end(self, handles: Collection[int]) -> None:
        """Forget entries whose sequences ended elsewhere, as no eviction."""
        self.drop([entry for entry in self.entries if entry.handle in handles])

    def evict(self, handles: Collection[int]) -> None:
        doomed = [entry for entry in self.entries if entry.handle in handles]
        self.drop(doomed)
        self.stats["evictions"] += len(doomed)


@dataclass
class World:
    """All live sequences with their parents, the oldest first, and the indexes that some of them
    lie in.

    `born` has the parents of all that ever lived: those that are gone are looked through.
    """

    indexes: list[NaiveIndex]
    parents: dict[int, int | None] = field(default_factory=dict)
    born: dict[int, int | None] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)  # of `parents`, but about to end

    def __post_init__(self) -> None:
        for index in self.indexes:
            index.world = self

    def leaves_first(self, order: list[Entry], gone: Collection[int] = ()) -> list[Entry]:
        """The first that nothing lives below, again and again; in the end those that are left."""
        found: list[Entry] = []
        while len(found) < len(order):
            ended = {*self.gone, *gone, *(entry.handle for entry in found)}
            left = [entry for entry in order if entry not in found]
            leaves = [e for e in left if ended.issuperset({*self.subtree(e.handle)} - {e.handle})]
            found += leaves[:1] or left
        return found

    def indexed(self) -> list[int]:
        return [handle for index in self.indexes for handle in index.handles()]

    def pinned(self) -> list[int]:
        return [handle for index in self.indexes for handle in index.pinned()]

    def outside(self) -> list[int]:
        """Sequences that belong to no index."""
        indexed = self.indexed()
        return [seq for seq in self.parents if seq not in indexed]

    def make(self, seqs: Sequence[int], parents: Sequence[int | None]) -> None:
        self.parents.update(zip(seqs, parents))
        self.born.update(zip(seqs, parents))

    def line(self, seq: int) -> list[int]:
        """All that ever was above a sequence, the nearest first."""
        found = []
        above = self.born[seq]
        while above is not None:
            found.append(above)
            above = self.born[above]
        return found

    def subtree(self, seq: int) -> list[int]:
        """The sequence, and all that hang on it, also by what is gone."""
        return [other for other in self.parents if seq in (other, *self.line(other))]

    def beside(self, seq: int) -> list[int]:
        """What else hangs below its nearest living parent, or else in its tree."""
        line = self.line(seq)
        top = next((above for above in line if above in self.parents), [seq, *line][-1])
        return [
            other
            for other in self.parents
            if top in self.line(other) and seq not in (other, *self.line(other))
        ]

    def end(self, seqs: Collection[int]) -> None:
        """They end, and with them the entries that hold them."""
        for index in self.indexes:
            index.end(seqs)
        self.gone.clear()
        for seq in seqs:
            del self.parents[seq]

    def evict(self, seqs: Collection[int]) -> None:
        """They end for lack of room."""
        for index in self.indexes:
            index.evict(seqs)
        for seq in seqs:
            del self.parents[seq]
