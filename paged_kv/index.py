"""Keys to sequences: a bounded dictionary that owns the sequences it holds.

The index never touches a tensor. It hands out handles; whoever needs contents gathers them, or
forks the handle.

Its entries are the truth. The order in which a policy would evict them follows from their numbers,
so a policy that was interrupted or that failed half-way is made anew from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import count, islice
from operator import itemgetter
from typing import Any, NoReturn, Protocol

from paged_kv.checks import handle, handle_set, handles, limit, listed, whole
from paged_kv.checks import key as check_key
from paged_kv.checks import priority as checked_priority
from paged_kv.errors import (
    BadArgument,
    BadCount,
    CapacityExceeded,
    CorruptCache,
    HandleInUse,
    NotCopyable,
    NotPinned,
    PinnedEntry,
    StaleHandle,
    UnknownKey,
)
from paged_kv.eviction import Policy, make_policy, page_counts, policy_maker, subtract
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Edit, Entry, Store
from paged_kv.stats import IndexStats
from paged_kv.turns import Turns, reader, verb


class Cache(Protocol):
    """What an index needs of the `PagedKVCache` that its sequences live in: no tensors."""

    turns: Turns

    @property
    def page_bytes(self) -> int: ...

    def settle(self) -> None: ...


class Counts:
    """What an index counts; a query is a hit or a miss."""

    __slots__ = ("evictions", "hits", "insertions", "misses", "second")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.second = 0  # queries of keys that another index did not have
        self.evictions = 0
        self.insertions = 0


class Draft:
    """What a change is going to do to the entries of an index: they are seen through it as they
    will be.
    """

    def __init__(self, entries: dict[Hashable, Entry]) -> None:
        self._entries = entries
        self.added: dict[Hashable, Entry] = {}
        self.gone: dict[int, Entry] = {}  # by handle
        self.size = len(entries)

    def get(self, key: Hashable) -> Entry | None:
        """The entry of a key."""
        entry = self.added.get(key)
        if entry is None:
            entry = self._entries.get(key)
            if entry is not None and entry.handle in self.gone:
                return None
        return entry

    def entries(self) -> list[Entry]:
        """All of them. Cost: O(entries)."""
        kept = [entry for key, entry in self._entries.items() if key not in self.added]
        return [entry for entry in (*kept, *self.added.values()) if entry.handle not in self.gone]

    def pinned(self) -> int:
        """How many are pinned. Cost: O(entries)."""
        return sum(entry.pins > 0 for entry in self.entries())

    def drop(self, entry: Entry) -> None:
        """Without this one."""
        self.added.pop(entry.key, None)
        self.gone[entry.handle] = entry
        self.size -= 1

    def put(self, entry: Entry) -> None:
        """With this one, under a key that has none."""
        self.gone.pop(entry.handle, None)
        self.added[entry.key] = entry
        self.size += 1


class CacheIndex:
    """Key -> sequence handle, with eviction, pins, and a capacity in entries and in bytes.

    `policy` is "lru", "fifo", "priority" or what makes a `Policy` when called without arguments,
    such as its class. `max_bytes` bounds the pages that the entries hold, each counted once however
    many entries share it; None bounds nothing. Keys are hashable, and equal ones are one: no
    tensors. Lookups and insertions are O(1) (O(log n) with priorities); where `max_bytes` binds, an
    insertion walks the page tables of all entries.

    Entries belong to the index: it releases them when they are replaced, evicted, removed or
    cleared. Nobody else may change or end them, but for `release_subtree` and `promote` of the
    cache, which end entries that are not pinned. Fork an entry to go on from it.
    `cache.set_reclaimer(index)` lets the cache evict entries when its pages run out.

    >>> from paged_kv import PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2, num_pages=4)
    >>> index = CacheIndex(cache, max_entries=2)
    >>> for key, seq in zip("abc", cache.new(3)): index.put(key, seq)
    >>> index.get("a") is None, "c" in index, cache.live_sequences
    (True, True, 2)
    """

    def __init__(
        self,
        cache: Cache,
        policy: str | Callable[[], Policy] = "lru",
        max_entries: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        # what has turns and no pages is another index
        page_bytes = getattr(cache, "page_bytes", None)
        if page_bytes is None or not isinstance(getattr(cache, "turns", None), Turns):
            raise BadArgument("cache", cache, "a PagedKVCache")
        self.max_entries = limit("max_entries", max_entries, 1, "None or an integer >= 1")
        self.max_bytes = limit(
            "max_bytes", max_bytes, page_bytes, f"None or an integer >= {page_bytes}, one page"
        )
        self.cache = cache
        self.turns = cache.turns
        self._make_policy = policy_maker(policy)
        self.policy = make_policy(self._make_policy)
        self._in_order = True  # whether the policy was told of everything
        self._entries: dict[Hashable, Entry] = {}
        self._ended: dict[int, Entry] = {}  # entries whose sequences ended with a subtree
        self._counts = Counts()
        self._clock = count()
        self._number = self.turns.own(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    # -- reading

    def __len__(self) -> int:
        return len(self._settled()._entries) - len(self._ended)

    def __contains__(self, key: Hashable) -> bool:
        check_key(key)
        return self._settled()._find(key) is not None

    def __iter__(self) -> Iterator[Hashable]:
        return iter([entry.key for entry in self._settled()._alive()])

    @property
    def stats(self) -> IndexStats:
        """A snapshot of the counts."""
        counts = self._settled()._counts
        queries = counts.hits + counts.misses
        return IndexStats(queries, counts.hits, counts.misses, counts.evictions, counts.insertions)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that the entries hold, each page counted once. Cost:
        O(their pages).
        """
        return len(page_counts(self._tables(self.handles()))) * self.cache.page_bytes

    def handles(self) -> list[int]:
        """The sequences of all entries. They stay the index's own."""
        return [entry.handle for entry in self._settled()._alive()]

    @property
    def second_lookups(self) -> int:
        """Queries of keys that another index was asked for first: see `look_up`."""
        return self._settled()._counts.second

    def _settled(self) -> CacheIndex:
        """Itself, once what an interrupt left half done is finished."""
        self.cache.settle()
        return self

    @reader
    def pinned_pages(self) -> int:
        """Pages that pinned entries hold, each counted once. Cost: O(their pages)."""
        return pinned_pages((self,))

    @verb
    def victims(self, keep: Collection[int] = ()) -> list[Hashable]:
        """Keys, the first to evict first, but pinned ones and those whose handle is in `keep`.
        Cost: O(entries).
        """
        return [entry.key for _, entry in candidates(self, handle_set(keep, "keep"))]

    # -- lookups and insertions

    @verb
    def get(self, key: Hashable) -> int | None:
        """The sequence stored under `key`, or None; counted as a query. It stays the index's own.
        Raises BadKey.
        """
        return look_up((self,), key)

    @verb
    def put(self, key: Hashable, seq: int, priority: float | None = None) -> None:
        """Store `seq` under `key` and take ownership of it; evicts first where the index is full.

        The sequence that `key` held so far is released, and a pin of `key` holds the new one.
        Putting the same sequence again renews its age and priority. `priority` matters to policies
        that use it: the lowest goes first. Raises BadKey, HandleInUse, BadPriority,
        CapacityExceeded (everything else is pinned), StaleHandle or ForeignHandle; then nothing
        changed and `seq` still is the caller's.
        """
        self._put([key], [handle(seq)], checked_priority(priority))

    @verb
    def put_batch(self, keys: Iterable[Hashable], seqs: Iterable[int]) -> None:
        """`put` one sequence a key, in order: all or none. Raises as `put` does, and BadCount for
        unequal numbers.
        """
        names = listed("keys", keys, "a list of keys")
        rows = handles(seqs)
        if len(names) != len(rows):
            raise BadCount("keys (one a sequence)", len(names), f"{len(rows)} keys")
        self._put(names, rows, None)

    @verb
    def remove(self, key: Hashable) -> None:
        """Release one entry. Raises UnknownKey or PinnedEntry."""
        entry = self._known(key)
        if entry.pins:
            raise PinnedEntry(key, entry.pins)
        drop([(self, entry)])

    @verb
    def clear(self) -> None:
        """Release all entries in one call, the pinned ones too."""
        clear((self,))

    @reader
    def pinned(self, key: Hashable) -> bool:
        """Whether a pin keeps `key` from eviction."""
        check_key(key)
        entry = self._find(key)
        return entry is not None and entry.pins > 0

    @verb
    def pin(self, key: Hashable) -> None:
        """Keep an entry from eviction until `unpin` was called as often as `pin`. Raises
        UnknownKey.
        """
        self._known(key).pins += 1

    @verb
    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`. Raises UnknownKey or NotPinned."""
        entry = self._known(key)
        if not entry.pins:
            raise NotPinned(key)
        entry.pins -= 1

    # -- eviction

    @verb
    def reclaim(self, need: int, busy: Collection[int] = ()) -> bool:
        """Free at least `need` pages by evicting the fewest entries in order, or none and return
        False.

        Entries that are pinned or in `busy` stay. Cost: O(pages of the evicted entries), times the
        log of their number.
        """
        return reclaim(
            self.turns.tables, whole("need", need, 0), candidates(self, handle_set(busy, "busy"))
        )

    @reader
    def check(self) -> None:
        """Raise CorruptCache unless keys, handles, pins, policy and capacity agree and all entries
        live.
        """
        entries = self._alive()
        held = {entry.key for entry in entries}
        if self._in_order and not self._ended:
            order = list(self.policy.victims())
            if len(order) != len(held) or set(order) != held:
                raise CorruptCache(
                    f"the policy holds {order!r}, the index {sorted(map(repr, held))}"
                )
        for key, entry in list(self._entries.items()):
            if entry.key != key or entry.pins < 0 or entry.ended is not self._ended:
                raise CorruptCache(
                    f"key {key!r} holds an entry of {entry.key!r} with {entry.pins} pins"
                )
        owned = self.turns.books.owned
        for entry in entries:
            if owned.get(entry.handle) is not entry:
                raise CorruptCache(
                    f"key {entry.key!r} holds sequence {entry.handle:#x}, which the index does "
                    "not own"
                )
        if self.max_entries is not None and len(held) > self.max_entries:
            raise CorruptCache(f"{len(held)} entries, allowed are {self.max_entries}")
        self.turns.books.lengths([entry.handle for entry in entries])

    # -- inside

    def _find(self, key: Hashable) -> Entry | None:
        entry = self._entries.get(key)
        return None if entry is None or not self._owns(entry) else entry

    def _owns(self, entry: Entry) -> bool:
        """Whether the sequence of an entry lives: it may have ended with a subtree."""
        return self.turns.books.owned.get(entry.handle) is entry

    def _known(self, key: Hashable) -> Entry:
        check_key(key)
        self._tidy()
        entry = self._find(key)
        if entry is None:
            raise UnknownKey(key, len(self._entries))
        return entry

    def _alive(self) -> list[Entry]:
        return [entry for entry in list(self._entries.values()) if self._owns(entry)]

    def _tidy(self) -> None:
        """Forget entries whose sequences ended with a subtree; put the policy in order.

        It is out of order where it was not told of everything.
        """
        if self._ended:
            in_order = self._in_order
            self._in_order = False
            entries = list(self._ended.values())
            try:
                for entry in entries if in_order else ():
                    self.policy.on_remove(entry.key)
            except Exception:
                in_order = False  # it is made anew below
            change = Change({})
            change.edits = (
                Edit(self._entries, {}, [entry.key for entry in entries]),
                Edit(self._ended, {}, [entry.handle for entry in entries]),
            )
            self.turns.books.apply(change)
            self._in_order = in_order
            self._forget_lost()
        if not self._in_order:
            self._reorder()

    def _forget_lost(self) -> None:
        """Forget entries whose keys are not found any more, since their hash changed, and that
        ended.
        """
        if len(self._entries) != len(self._alive()):
            self._entries = {entry.key: entry for entry in self._alive()}

    def _reorder(self) -> None:
        """Let the policy be one that was told of all entries, and of nothing else."""
        self.policy = self._told(self._entries.values())
        self._in_order = True

    def _told(self, entries: Collection[Entry]) -> Policy:
        """A policy that is told of entries again, in the order in which they came and were last
        used.
        """
        policy = make_policy(self._make_policy)
        moments = [(entry.added, entry, True) for entry in entries]
        moments += [(entry.used, entry, False) for entry in entries if entry.used != entry.added]
        for _, entry, came in sorted(moments, key=itemgetter(0)):
            if came:
                policy.on_add(entry.key, entry.priority)
            else:
                policy.on_hit(entry.key)
        return policy

    def _put(self, keys: list[Hashable], seqs: list[int], priority: float | None) -> None:
        for key in keys:
            check_key(key)
        self._tidy()
        books = self.turns.books
        books.records(seqs)
        self._refuse_owned(keys, seqs)
        draft = Draft(self._entries)
        evicted = sum([self._insert(draft, key, seq, priority) for key, seq in zip(keys, seqs)])
        gone = list(draft.gone)
        counts = self._counts
        edits = (
            Edit(books.owned, {entry.handle: entry for entry in draft.added.values()}, gone),
            Edit(
                self._entries,
                draft.added,
                [e.key for e in draft.gone.values() if e.key not in draft.added],
            ),
        )
        stores = (
            Store(counts, "insertions", counts.insertions + len(seqs)),
            Store(counts, "evictions", counts.evictions + evicted),
        )
        self.turns.tables.end(gone, books.records(gone), edits, stores)
        self._in_order = True

    def _refuse_owned(self, keys: list[Hashable], seqs: list[int]) -> None:
        """Raise HandleInUse where a sequence is stored under another key, or stands
        here under two.
        """
        owned = self.turns.books.owned
        seen: dict[int, Hashable] = {}
        for key, seq in zip(keys, seqs):
            owner = owned.get(seq)
            if owner is not None and not (owner.ended is self._ended and owner.key == key):
                raise HandleInUse(seq, owner.key)
            if seq in seen and seen[seq] != key:
                raise HandleInUse(seq, seen[seq])
            seen[seq] = key

    def _insert(self, draft: Draft, key: Hashable, seq: int, priority: float | None) -> int:
        """Put one entry into a draft, and tell the policy. Returns how many were evicted."""
        if seq in draft.gone:  # evicted or replaced by what stands before it in the batch
            raise StaleHandle(seq)
        old = draft.get(key)
        evicted = self._overflow(draft, old, seq)
        policy = self.policy
        self._in_order = False  # until the draft has taken effect
        for entry in evicted:
            draft.drop(entry)
            policy.on_remove(entry.key)
        pins = 0
        if old is not None:
            pins = old.pins
            draft.drop(old)
            policy.on_remove(key)
        draft.put(Entry(key, seq, priority, next(self._clock), pins, self._ended, self._number))
        policy.on_add(key, priority)
        return len(evicted)

    def _victims(self, draft: Draft) -> Iterator[Entry]:
        """Entries that are not pinned, the first to evict first.

        A policy that fails while it is walked is made anew, once: the hash of a key may have
        changed.
        """
        seen: set[int] = set()
        walk = self._unpinned(draft)
        anew = False
        while True:
            try:
                entry = next(walk, None)
            except Exception:
                if anew:
                    raise
                anew = True
                self.policy = self._told(draft.entries())  # as it knew them, amid a batch too
                walk = self._unpinned(draft)
                continue
            if entry is None:
                return
            if entry.handle not in seen:
                seen.add(entry.handle)
                yield entry

    def _unpinned(self, draft: Draft) -> Iterator[Entry]:
        for key in self.policy.victims():
            entry = draft.get(key)
            if entry is not None and not entry.pins:
                yield entry

    def _overflow(self, draft: Draft, old: Entry | None, seq: int) -> list[Entry]:
        """The entries to evict so that `seq` fits in place of `old`. Raises CapacityExceeded."""
        evicted: list[Entry] = []
        if self.max_entries is not None and old is None and draft.size >= self.max_entries:
            evicted = list(islice(self._victims(draft), 1))
            if not evicted:
                raise CapacityExceeded(
                    "entries", draft.pinned() + 1, self.max_entries, draft.pinned()
                )
        # All pages in use within the limit: so are those of the entries, and they need not be
        # counted.
        page_bytes = self.cache.page_bytes
        if (
            self.max_bytes is not None
            and self.turns.books.pages.used_count * page_bytes > self.max_bytes
        ):
            evicted = self._overweight(draft, old, seq, len(evicted), self.max_bytes)
        return evicted

    def _overweight(
        self, draft: Draft, old: Entry | None, seq: int, least: int, max_bytes: int
    ) -> list[Entry]:
        """The first victims, at least `least`, without which the entries and `seq` fit into
        `max_bytes`.
        """
        page_bytes = self.cache.page_bytes
        others = [entry for entry in draft.entries() if entry is not old]
        *tables, new = self._tables([*(entry.handle for entry in others), seq])
        held = page_counts([*tables, new])
        table_of = dict(zip([entry.handle for entry in others], tables))
        evicted: list[Entry] = []
        for victim in self._victims(draft):
            if len(evicted) >= least and len(held) <= max_bytes // page_bytes:
                return evicted
            if victim is not old:
                evicted.append(victim)
                subtract(held, table_of[victim.handle])
        if len(held) > max_bytes // page_bytes:
            raise CapacityExceeded("bytes", len(held) * page_bytes, max_bytes, draft.pinned())
        return evicted

    def _tables(self, seqs: list[int]) -> list[tuple[int, ...]]:
        return self.turns.books.windows(seqs)[0]


# What follows works on several indexes of one cache, within a verb of one of them or of whoever
# holds them all.

Chosen = Sequence[tuple[CacheIndex, Entry]]


def look_up(indexes: Sequence[CacheIndex], key: Hashable) -> int | None:
    """The sequence of the first index that has the key. All that were asked count a query."""
    check_key(key)
    stores = []
    for index in indexes:
        index._tidy()
        counts = index._counts
        if index is not indexes[0]:
            stores.append(Store(counts, "second", counts.second + 1))
        entry = index._entries.get(key)
        if entry is not None:
            stores.append(Store(counts, "hits", counts.hits + 1))
            stores.append(Store(entry, "used", next(index._clock)))
            break
        stores.append(Store(counts, "misses", counts.misses + 1))
    change = Change({})
    change.stores = stores
    if entry is None:
        index.turns.books.apply(change)
        return None
    index._in_order = False
    index.policy.on_hit(key)
    index.turns.books.apply(change)
    index._in_order = True
    return entry.handle


def candidates(index: CacheIndex, busy: Collection[int]) -> Iterator[tuple[CacheIndex, Entry]]:
    """The entries of an index that may go, the first to evict first."""
    index._tidy()
    return (
        (index, entry)
        for entry in index._victims(Draft(index._entries))
        if entry.handle not in busy
    )


def drop(chosen: Chosen, *, evicted: bool = False) -> None:
    """Release entries of one or more indexes of one cache, at once."""
    by_index: dict[CacheIndex, list[Entry]] = {}
    for index, entry in chosen:
        by_index.setdefault(index, []).append(entry)
    handles_ = [entry.handle for _, entry in chosen]
    for index, entries in by_index.items():
        index._in_order = False
        for entry in entries:
            index.policy.on_remove(entry.key)
    edits = []
    stores = []
    sizes = {index: len(index._entries) for index in by_index}
    for index, entries in by_index.items():
        tables = index.turns.tables
        edits.append(Edit(tables.books.owned, {}, [entry.handle for entry in entries]))
        edits.append(Edit(index._entries, {}, [entry.key for entry in entries]))
        if evicted:
            stores.append(Store(index._counts, "evictions", index._counts.evictions + len(entries)))
    if by_index:
        tables.end(handles_, tables.books.records(handles_), edits, stores)
    for index, entries in by_index.items():
        if len(index._entries) != sizes[index] - len(entries):
            index._forget_lost()
        index._in_order = True


def reclaim(tables: BlockTables, need: int, candidates: Iterator[tuple[CacheIndex, Entry]]) -> bool:
    """Evict the shortest run of `candidates` that frees `need` pages, or nothing at all and return
    False.
    """
    run: list[tuple[CacheIndex, Entry]] = []
    seqs: list[int] = []
    short = 0  # a run of `short` is too short, a run of `enough` is not
    enough = 0
    while tables.books.freed_by(seqs) < need:
        short = len(run)
        run.extend(islice(candidates, max(1, short)))  # twice as long each time: hence the log
        seqs = [entry.handle for _, entry in run]
        enough = len(run)
        if enough == short:
            return False
    while enough - short > 1:
        middle = (short + enough) // 2
        if tables.books.freed_by(seqs[:middle]) < need:
            short = middle
        else:
            enough = middle
    drop(run[:enough], evicted=True)
    return True


def pinned_pages(indexes: Iterable[CacheIndex]) -> int:
    """Pages that pinned entries of several indexes hold, each counted once. Cost:
    O(their pages).
    """
    pages: set[int] = set()
    for index in indexes:
        for table in index._tables([entry.handle for entry in index._alive() if entry.pins]):
            pages.update(table)
    return len(pages)


def clear(indexes: Iterable[CacheIndex]) -> None:
    """Release all entries of several indexes of one cache, at once. No key is looked up for it."""
    seqs = []
    edits = []
    stores = []
    chosen = [index for index in indexes if index._entries]
    for index in chosen:
        index._in_order = False
        tables = index.turns.tables
        owned = [entry.handle for entry in index._alive()]
        seqs += owned
        edits.append(Edit(tables.books.owned, {}, owned))
        edits.append(Edit(index._ended, {}, list(index._ended)))
        stores.append(Store(index, "_entries", {}))
    if chosen:
        tables.end(seqs, tables.books.records(seqs), edits, stores)
    for index in chosen:
        index._reorder()
