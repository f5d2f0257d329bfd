"""The entries of an index: keys, the sequences under them, the order in which these would go.

Entries are the truth. The order follows from their numbers, so a policy that was interrupted or
that failed half-way is made anew from them. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import count
from operator import itemgetter

from paged_kv.checks import key as check_key
from paged_kv.errors import CorruptCache, UnknownKey
from paged_kv.eviction import Policy, make_policy, policy_maker
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Edit, Entry, Store


class Counts:
    """What an index counts; a query is a hit or a miss."""

    __slots__ = ("evictions", "hits", "insertions", "misses", "second")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.second = 0  # queries of keys that another index did not have
        self.evictions = 0
        self.insertions = 0


class Entries:
    """All that one index holds. Whoever works on several indexes of a cache works on these.

    Everything in here is for those who plan a change: they set `in_order` to False before they tell
    the policy of it, and back once the change has taken effect.
    """

    def __init__(
        self,
        tables: BlockTables,
        policy: str | Callable[[], Policy],
        max_entries: int | None,
        max_bytes: int | None,
        page_bytes: int,
    ) -> None:
        self.tables = tables
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.page_bytes = page_bytes
        self.make_policy = policy_maker(policy)
        self.policy = make_policy(self.make_policy)
        self.in_order = True  # whether the policy was told of everything
        self.by_key: dict[Hashable, Entry] = {}
        self.ended: dict[int, Entry] = {}  # those whose sequences ended with a subtree
        self.counts = Counts()
        self.clock = count()
        self.owner = 0  # the number of the index

    def find(self, key: Hashable) -> Entry | None:
        """The entry of a key, unless its sequence has ended."""
        entry = self.by_key.get(key)
        return entry if entry is not None and self._lives(entry) else None

    def known(self, key: Hashable) -> Entry:
        """The entry of a key. Raises BadKey or UnknownKey."""
        check_key(key)
        self.tidy()
        entry = self.find(key)
        if entry is None:
            raise UnknownKey(key, len(self.by_key))
        return entry

    def alive(self) -> list[Entry]:
        """All whose sequences live: others may have ended with a subtree."""
        return [entry for entry in list(self.by_key.values()) if self._lives(entry)]

    def _lives(self, entry: Entry) -> bool:
        return self.tables.books.owned.get(entry.handle) is entry

    # -- in order

    def tidy(self) -> None:
        """Forget entries whose sequences ended with a subtree; put the policy in order."""
        if self.ended:
            self._forget_ended()
        if not self.in_order:
            self.reorder()

    def _forget_ended(self) -> None:
        in_order = self.in_order
        self.in_order = False
        entries = list(self.ended.values())
        try:
            for entry in entries if in_order else ():
                self.policy.on_remove(entry.key)
        except Exception:
            in_order = False  # it is made anew when all is forgotten
        change = Change({})
        change.edits = (
            Edit(self.by_key, {}, [entry.key for entry in entries]),
            Edit(self.ended, {}, [entry.handle for entry in entries]),
        )
        self.tables.books.apply(change)
        self.in_order = in_order
        self.forget_lost()

    def forget_lost(self) -> None:
        """Forget what ended under keys that are not found any more, since their hash changed."""
        alive = self.alive()
        if len(self.by_key) != len(alive):
            self.by_key = {entry.key: entry for entry in alive}

    def reorder(self) -> None:
        """Let the policy be one that was told of all entries, and of nothing else."""
        self.policy = self.told(self.by_key.values())
        self.in_order = True

    def told(self, entries: Collection[Entry]) -> Policy:
        """A policy that is told of entries again, in the order in which they came and were last
        used.
        """
        policy = make_policy(self.make_policy)
        moments = [(entry.added, entry, True) for entry in entries]
        moments += [(entry.used, entry, False) for entry in entries if entry.used != entry.added]
        for _, entry, came in sorted(moments, key=itemgetter(0)):
            if came:
                policy.on_add(entry.key, entry.priority)
            else:
                policy.on_hit(entry.key)
        return policy

    def check(self) -> None:
        """Raise CorruptCache unless keys, handles, pins, policy and capacity agree and all entries
        live.
        """
        entries = self.alive()
        held = {entry.key for entry in entries}
        if self.in_order and not self.ended:
            order = list(self.policy.victims())
            if len(order) != len(held) or set(order) != held:
                raise CorruptCache(
                    f"the policy holds {order!r}, the index {sorted(map(repr, held))}"
                )
        for key, entry in list(self.by_key.items()):
            if entry.key != key or entry.pins < 0 or entry.ended is not self.ended:
                raise CorruptCache(
                    f"key {key!r} holds an entry of {entry.key!r} with {entry.pins} pins"
                )
        if self.max_entries is not None and len(held) > self.max_entries:
            raise CorruptCache(f"{len(held)} entries, allowed are {self.max_entries}")
        self.tables.books.lengths([entry.handle for entry in entries])


# What follows works on one or more indexes of one cache, within a verb.


def look_up(asked: Sequence[Entries], key: Hashable) -> int | None:
    """The sequence of the first index that has the key. All that were asked count a query."""
    check_key(key)
    stores: list[Store] = []
    for entries in asked:
        if entries.ended or not entries.in_order:
            entries.tidy()
        counts = entries.counts
        if stores:
            stores.append(Store(counts, "second", counts.second + 1))
        entry = entries.by_key.get(key)
        if entry is not None:
            break
        stores.append(Store(counts, "misses", counts.misses + 1))
    change = Change({})
    change.stores = stores
    if entry is None:
        entries.tables.books.apply(change)
        return None
    stores.append(Store(counts, "hits", counts.hits + 1))
    stores.append(Store(entry, "used", next(entries.clock)))
    entries.in_order = False
    entries.policy.on_hit(key)
    entries.tables.books.apply(change)
    entries.in_order = True
    return entry.handle


def drop(
    tables: BlockTables, chosen: Sequence[tuple[Entries, Entry]], *, evicted: bool = False
) -> None:
    """Release some entries, at once."""
    doomed: dict[Entries, list[Entry]] = {}
    for entries, entry in chosen:
        doomed.setdefault(entries, []).append(entry)
    seqs = [entry.handle for _, entry in chosen]
    edits = [Edit(tables.books.owned, {}, seqs)]
    stores = []
    left = {}
    for entries, gone in doomed.items():
        entries.in_order = False
        for entry in gone:
            entries.policy.on_remove(entry.key)
        left[entries] = len(entries.by_key) - len(gone)
        edits.append(Edit(entries.by_key, {}, [entry.key for entry in gone]))
        if evicted:
            counts = entries.counts
            stores.append(Store(counts, "evictions", counts.evictions + len(gone)))
    if seqs:
        tables.end(seqs, tables.books.records(seqs), edits, stores)
    for entries, size in left.items():
        if len(entries.by_key) != size:
            entries.forget_lost()
        entries.in_order = True


def clear(tables: BlockTables, several: Iterable[Entries]) -> None:
    """Release all entries, at once. No key is looked up for it."""
    chosen = [entries for entries in several if entries.by_key]
    seqs = [entry.handle for entries in chosen for entry in entries.alive()]
    edits = [Edit(tables.books.owned, {}, seqs)]
    stores = []
    for entries in chosen:
        entries.in_order = False
        edits.append(Edit(entries.ended, {}, list(entries.ended)))
        stores.append(Store(entries, "by_key", {}))
    if chosen:
        tables.end(seqs, tables.books.records(seqs), edits, stores)
    for entries in chosen:
        entries.reorder()


def pinned_pages(several: Iterable[Entries]) -> int:
    """Pages that pinned entries hold, each counted once. Cost: O(their pages)."""
    pages: set[int] = set()
    for entries in several:
        pinned = [entry.handle for entry in entries.alive() if entry.pins]
        pages.update(*entries.tables.books.windows(pinned)[0])
    return len(pages)
