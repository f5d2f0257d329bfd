"""The entries of an index: keys, the sequences under them, the order in which these would go.

Entries are the truth. The order follows from their numbers, so a policy that was interrupted or
that failed half-way is made anew from them. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Hashable, Iterable, Mapping, Sequence
from itertools import count
from operator import itemgetter

from paged_kv.checks import key as check_key
from paged_kv.errors import CorruptCache, UnknownKey, UnknownPolicy
from paged_kv.eviction import ALLOWED, Policy, make_policy, policy_maker
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.books import Books
from paged_kv.pages.change import Change, Edit, Entry, Home, Store


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
        books: Books,
        policy: str | Callable[[], Policy],
        max_entries: int | None,
        max_bytes: int | None,
        page_bytes: int,
    ) -> None:
        self.books = books
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.page_bytes = page_bytes
        self.make_policy = policy_maker(policy)
        self.in_order = True  # whether the policies were told of everything
        self.policy = make_policy(self.make_policy)
        self.inner = make_policy(self.make_policy)  # of entries with living sequences below them
        if self.inner is self.policy:
            raise UnknownPolicy(policy, ALLOWED)
        self.parked: dict[int, Entry] = {}  # those told to it, by handle
        self.woken: list[int] = []  # maybe not inner any more
        self.by_key: dict[Hashable, Entry] = {}
        self.home = Home(books.tree)
        self.ended = self.home.ended  # entries whose sequences ended with a subtree
        self.counts = Counts()
        self.clock = count()

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
        return self.books.owned.get(entry.handle) is entry

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
                self.forget(entry)
        except Exception:
            in_order = False  # it is made anew when all is forgotten
        change = Change({})
        change.edits = (
            Edit(self.by_key, {}, [entry.key for entry in entries]),
            Edit(self.ended, {}, [entry.handle for entry in entries]),
        )
        self.books.apply(change)
        self.in_order = in_order
        self.forget_lost()

    def forget_lost(self) -> None:
        """Forget what ended under keys that are not found any more, since their hash changed."""
        alive = self.alive()
        if len(self.by_key) != len(alive):
            self.by_key = {entry.key: entry for entry in alive}

    def reorder(self, entries: Collection[Entry] | None = None) -> None:
        """Let the policies be such as were told of these entries, by default of all, and of nothing
        else.
        """
        self.in_order = False
        self.policy = self.told(self.by_key.values() if entries is None else entries)
        self.inner = make_policy(self.make_policy)
        self.parked.clear()
        self.in_order = True

    def prioritize(self, priorities: Mapping[Entry, float | None]) -> None:
        """Give some entries other priorities, at once."""
        in_order = self.in_order
        self.in_order = False
        for entry, priority in priorities.items():
            policy = self.inner if entry.handle in self.parked else self.policy
            policy.on_priority(entry, priority)
        change = Change({})
        change.stores = [Store(entry, "priority", value) for entry, value in priorities.items()]
        self.books.apply(change)
        self.in_order = in_order

    def forget(self, entry: Entry) -> None:
        """Tell the policies that an entry goes."""
        if entry.handle in self.parked:
            self.inner.on_remove(entry)
            del self.parked[entry.handle]
        else:
            self.policy.on_remove(entry)

    # -- inner entries

    def child_of(self, entry: Entry, gone: Container[int]) -> int | None:
        """A sequence that lives below an entry and is not in `gone`."""
        tree = self.books.tree
        if entry.handle not in tree.parents():
            return None
        return next(tree.living_below(entry.handle, gone), None)

    def park(self, entry: Entry, child: int) -> None:
        """Pass over an entry until `child` has ended, which lives below it."""
        self.books.tree.watch(child, entry.handle, self.woken)
        if entry.handle not in self.parked:
            in_order = self.in_order
            self.in_order = False
            self.policy.on_remove(entry)
            self.inner.on_add(entry)
            self.parked[entry.handle] = entry
            self.in_order = in_order

    def wake(self, gone: Container[int]) -> None:
        """Pass over those no more below which nothing lives any more, but what is in `gone`."""
        seqs = list(self.woken)
        for seq in dict.fromkeys(seqs):
            entry = self.parked.get(seq)
            if entry is None:
                continue
            child = self.child_of(entry, gone)
            if child is not None:
                self.park(entry, child)
                continue
            in_order = self.in_order
            self.in_order = False
            self.forget(entry)
            self.policy.on_add(entry)
            self.in_order = in_order
        del self.woken[: len(seqs)]

    def told(self, entries: Collection[Entry]) -> Policy:
        """A policy that is told of entries again, in the order in which they came and were last
        used.
        """
        policy = make_policy(self.make_policy)
        moments = [(entry.added, entry, True) for entry in entries]
        moments += [(entry.used, entry, False) for entry in entries if entry.used != entry.added]
        for _, entry, came in sorted(moments, key=itemgetter(0)):
            if came:
                policy.on_add(entry)
            else:
                policy.on_hit(entry)
        return policy

    def check(self) -> None:
        """Raise CorruptCache unless keys, handles, pins, policy and capacity agree and all entries
        live.
        """
        entries = self.alive()
        if self.in_order and not self.ended:
            order = [*self.policy.victims(), *self.inner.victims()]
            if len(order) != len(entries) or set(order) != set(entries):
                told = [entry.key for entry in order]
                held = [entry.key for entry in entries]
                raise CorruptCache(f"the policy holds {told!r}, the index {held!r}")
        for key, entry in list(self.by_key.items()):
            if entry.key != key or entry.pins < 0 or entry.home is not self.home:
                raise CorruptCache(
                    f"key {key!r} holds an entry of {entry.key!r} with {entry.pins} pins"
                )
        if self.max_entries is not None and len(entries) > self.max_entries:
            raise CorruptCache(f"{len(entries)} entries, allowed are {self.max_entries}")
        self.books.lengths([entry.handle for entry in entries])


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
        entries.books.apply(change)
        return None
    stores.append(Store(counts, "hits", counts.hits + 1))
    stores.append(Store(entry, "used", next(entries.clock)))
    entries.in_order = False
    policy = entries.inner if entry.handle in entries.parked else entries.policy
    policy.on_hit(entry)
    entries.books.apply(change)
    entries.in_order = True
    return entry.handle


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
        pages.update(*entries.books.windows(pinned)[0])
    return len(pages)
