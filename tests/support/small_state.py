"""What of a small cache decides how it goes on, in names that equal states share.

Left out is what a test compares with its model after each verb, so that it cannot differ: tokens
and positions; and what decides nothing here: handles and numbers of pages (`trim` moves pages, but
whichever it moves, equal tables come of it), counts, the order of sequences beside each other
(which settles the order in which pages come back, and this is in the state as it is), the buffers
of steps, whose contents are overwritten. The free stack is in the state page by page, as far as
pages differ: by how far they were written to when they were in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, permutations, product
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from paged_kv import CacheIndex, PagedKVCache
from paged_kv.pages.books import Books
from paged_kv.pages.change import Entry, Light, Pending
from paged_kv.pages.records import Record
from paged_kv.turns import Turns

Rows = tuple[Any, ...]


class State(NamedTuple):
    """All of it, as numbers."""

    sequences: Rows
    pending: Rows
    light: Rows
    joints: Rows
    indexed: Rows
    used: Rows  # of each page, its references and how far it is written to
    free: tuple[int, ...]
    capacity: int
    waiting: int  # releases that were put off

    def tidied(self) -> State:
        """As it is once the index has forgotten entries whose sequences have ended."""
        return self._replace(indexed=tuple([row for row in self.indexed if row != ENDED]))


ENDED = -1, 0


class Observed(Protocol):
    """Who has a cache and an index."""

    cache: PagedKVCache
    index: CacheIndex


def known(index: CacheIndex) -> list[Entry]:
    """All entries, the least recently used first; also those whose sequences have ended, until the
    index looks.
    """
    return sorted(index.entries.by_key.values(), key=attrgetter("used"))


def state_of(world: Observed) -> State:
    """The state, the same for all that differ in names alone. It changes nothing."""
    return state_and_orders(world)[0]


def state_and_orders(world: Observed) -> tuple[State, list[tuple[int, ...]]]:
    """The state, and all orders of its sequences in which it reads so.

    What stands at one place of two of them can be exchanged, and nobody sees a difference.
    """
    books = world.cache.turns.books  # as they are: `cache.books` would carry out what waits
    entries = [
        entry if books.owned.get(entry.handle) is entry else None for entry in known(world.index)
    ]
    found: list[tuple[int, ...]] = []
    least: State | None = None
    for order in _orders(books):
        state = _Reader(world.cache.turns, order).state(entries)
        if least is None or state < least:
            least = state
            found = []
        if state == least:
            found.append(order)
    assert least is not None
    return least, found


def _orders(books: Books) -> Iterator[tuple[int, ...]]:
    """Orders of the sequences in which alike ones stand side by side."""

    def kind(item: tuple[int, Record]) -> tuple[int, ...]:
        seq, (pages, start, length, parent, _) = item
        return start, length, len(pages), seq in books.owned, parent > 0

    groups = groupby(sorted(books.items(), key=kind), key=kind)
    alike = [list(permutations([seq for seq, _ in group])) for _, group in groups]
    return (tuple(chain.from_iterable(parts)) for parts in product(*alike))


class _Reader:
    """Names what it meets in the order in which it meets it."""

    def __init__(self, turns: Turns, order: Sequence[int]) -> None:
        self.turns = turns
        self.books = turns.books
        self.order = order
        self.seqs = {seq: place for place, seq in enumerate(order)}
        self.pages: dict[int, int] = {}
        self.joints: dict[int, int] = {}

    def state(self, entries: Iterable[Entry | None]) -> State:
        books = self.books
        pages = books.pages
        sequences = tuple([self.record(record) for record in books.records(self.order)])
        pending = tuple([self.pending(number, books.pending[number]) for number in books.pending])
        light = tuple([self.light(lease()) for lease in books.light.values()])
        joints = tuple([self.above(books.tree.joints[joint]) for joint in self.met_joints()])
        indexed = tuple([self.entry(entry) for entry in entries])
        used = tuple([(pages.refs[page], pages.fill[page]) for page in self.pages])
        free = tuple([pages.fill[page] for page in pages.free])
        waiting = sum(number > 0 for number in self.turns.tickets)
        return State(
            sequences, pending, light, joints, indexed, used, free, pages.capacity, waiting
        )

    def record(self, record: Record) -> Rows:
        pages, start, length, parent, _ = record
        named = tuple([self.pages.setdefault(page, len(self.pages)) for page in pages])
        return named, start, length, self.above(parent)

    def above(self, parent: int) -> tuple[int, int]:
        """A parent: a sequence, a joint, or none."""
        if parent in self.seqs:
            return 0, self.seqs[parent]
        if parent in self.books.tree.joints:
            return 1, self.joints.setdefault(parent, len(self.joints))
        return 2, 0

    def met_joints(self) -> Iterator[int]:
        """Those that something hangs on, also those that are met on the way."""
        place = 0
        while place < len(self.joints):
            yield list(self.joints)[place]
            place += 1

    def pending(self, number: int, step: Pending) -> Rows:
        """An open step: given up or not."""
        rows = tuple([self.record(record) for record in step.records])
        return tuple(step.rooms), -number in self.turns.tickets, rows

    def light(self, lease: Light | None) -> tuple[int, ...]:
        """A step that has taken nothing yet; nothing at all where nobody holds it any more."""
        return () if lease is None else tuple([self.seqs[seq] for seq in lease.parents])

    def entry(self, entry: Entry | None) -> tuple[int, int]:
        """A sequence under a key, with its pins; it may have ended."""
        return ENDED if entry is None else (self.seqs[entry.handle], entry.pins)
