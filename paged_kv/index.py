"""Keys to sequences: a bounded dictionary that owns the sequences it holds.

The index never touches a tensor. It hands out handles; whoever needs contents gathers them, or
forks the handle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any, NoReturn, Protocol

from paged_kv.checks import handle, handle_set, handles, limit, listed, whole
from paged_kv.checks import key as check_key
from paged_kv.checks import priority as checked_priority
from paged_kv.draft import Draft, put, reclaim, take_effect
from paged_kv.entries import Entries, clear, look_up, pinned_pages
from paged_kv.errors import BadArgument, BadCount, NotCopyable, NotPinned, PinnedEntry
from paged_kv.eviction import Policy, leaves_first, page_counts
from paged_kv.shelf import EntryShelf
from paged_kv.stats import IndexStats
from paged_kv.turns import Turns, reader, verb


class Cache(Protocol):
    """What an index needs of the `PagedKVCache` that its sequences live in: no tensors."""

    turns: Turns

    @property
    def page_bytes(self) -> int: ...

    def settle(self) -> None: ...


class CacheIndex:
    """Key -> sequence handle, with eviction, pins, and a capacity in entries and in bytes.

    `policy` is "lru", "fifo", "priority" or what makes a `Policy` when called without arguments,
    such as its class. `max_bytes` bounds the pages that the entries hold, each counted once however
    many entries share it; None bounds nothing. Keys are hashable, and equal ones are one: no
    tensors. Lookups and insertions are O(1) (O(log n) with priorities); where `max_bytes` binds, an
    insertion walks the page tables of all entries.

    What living sequences hang on frees few pages, and goes behind them: leaves are evicted first,
    in the policy's order, others only where nothing else is left.

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
        most = limit("max_entries", max_entries, 1, "None or an integer >= 1")
        size = limit(
            "max_bytes", max_bytes, page_bytes, f"None or an integer >= {page_bytes}, one page"
        )
        self.cache = cache
        self.turns = cache.turns
        self.entries = Entries(self.turns.books, policy, most, size, page_bytes)
        self.entries.home.owner = self.turns.own(self)
        self.shelves = (EntryShelf(self.entries),)  # what `export` takes along

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable(type(self).__name__)

    # -- reading

    def __len__(self) -> int:
        entries = self._settled()
        return len(entries.by_key) - len(entries.ended)

    def __contains__(self, key: Hashable) -> bool:
        check_key(key)
        return self._settled().find(key) is not None

    def __iter__(self) -> Iterator[Hashable]:
        return iter([entry.key for entry in self._settled().alive()])

    @property
    def stats(self) -> IndexStats:
        """A snapshot of the counts."""
        counts = self._settled().counts
        queries = counts.hits + counts.misses
        return IndexStats(queries, counts.hits, counts.misses, counts.evictions, counts.insertions)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that the entries hold, each page counted once. Cost:
        O(their pages).
        """
        return len(page_counts(self.turns.books.windows(self.handles())[0])) * self.cache.page_bytes

    def handles(self) -> list[int]:
        """The sequences of all entries. They stay the index's own."""
        return [entry.handle for entry in self._settled().alive()]

    @property
    def second_lookups(self) -> int:
        """Queries of keys that another index was asked for first: see `look_up`."""
        return self._settled().counts.second

    @property
    def policy(self) -> Policy:
        """The policy that serves the index now: it may be made anew at any time."""
        return self.entries.policy

    @property
    def max_entries(self) -> int | None:
        """Entries that it holds at most; None where nothing bounds them."""
        return self.entries.max_entries

    @property
    def max_bytes(self) -> int | None:
        """Bytes of pages that its entries hold at most; None where nothing bounds them."""
        return self.entries.max_bytes

    def _settled(self) -> Entries:
        """The entries, once what an interrupt left half done is finished."""
        self.cache.settle()
        return self.entries

    @reader
    def pinned_pages(self) -> int:
        """Pages that pinned entries hold, each counted once. Cost: O(their pages)."""
        return pinned_pages((self.entries,))

    @verb
    def victims(self, keep: Collection[int] = ()) -> list[Hashable]:
        """Keys, the first to evict first, but pinned ones and those whose handle is in `keep`.
        Those with living sequences below them come behind these, or last. Cost: O(entries).
        """
        kept = handle_set(keep, "keep")
        entries = self.entries
        entries.tidy()
        order = [
            seen
            for seen in entries.told(entries.by_key.values()).victims()
            if seen.handle not in kept and not entries.by_key[seen.key].pins
        ]
        return [seen.key for seen in leaves_first(order, self.turns.books.tree)]

    # -- lookups and insertions

    @verb
    def get(self, key: Hashable) -> int | None:
        """The sequence stored under `key`, or None; counted as a query. It stays the index's own.
        Raises BadKey.
        """
        return look_up((self.entries,), key)

    @verb
    def put(self, key: Hashable, seq: int, priority: float | None = None) -> None:
        """Store `seq` under `key` and take ownership of it; evicts first where the index is full.

        The sequence that `key` held so far is released, and a pin of `key` holds the new one.
        Putting the same sequence again renews its age and priority. `priority` matters to policies
        that use it: the lowest goes first. Raises BadKey, HandleInUse, BadPriority,
        CapacityExceeded (everything else is pinned), StaleHandle or ForeignHandle; then nothing
        changed and `seq` still is the caller's.
        """
        row = [handle(seq)]
        put(self.turns.tables, (self.entries,), (key,), row, checked_priority(priority))

    @verb
    def put_batch(self, keys: Iterable[Hashable], seqs: Iterable[int]) -> None:
        """`put` one sequence a key, in order: all or none. Raises as `put` does, and BadCount for
        unequal numbers.
        """
        names = listed("keys", keys, "a list of keys")
        rows = handles(seqs)
        if len(names) != len(rows):
            raise BadCount("keys (one a sequence)", len(names), f"{len(rows)} keys")
        put(self.turns.tables, [self.entries] * len(rows), names, rows)

    @verb
    def set_priorities(self, keys: Iterable[Hashable], priorities: Iterable[float | None]) -> None:
        """Give entries other priorities, one per key: all or none. Their ages stay.

        Of a key that comes twice the last one counts. Raises BadKey, BadPriority, UnknownKey, and
        BadCount for unequal numbers. Cost: O(log n) each with priorities, else O(1).
        """
        names = listed("keys", keys, "a list of keys")
        values = listed("priorities", priorities, "a list of priorities")
        if len(names) != len(values):
            raise BadCount("priorities (one a key)", len(values), f"{len(names)} priorities")
        found = [checked_priority(value) for value in values]
        self.entries.prioritize(dict(zip(map(self.entries.known, names), found)))

    @verb
    def remove(self, key: Hashable) -> None:
        """Release one entry. Raises UnknownKey or PinnedEntry."""
        entry = self.entries.known(key)
        if entry.pins:
            raise PinnedEntry(key, entry.pins)
        draft = Draft(self.entries, set())
        draft.drop(entry)
        take_effect(self.turns.tables, (draft,))

    @verb
    def clear(self) -> None:
        """Release all entries in one call, the pinned ones too."""
        clear(self.turns.tables, (self.entries,))

    @reader
    def pinned(self, key: Hashable) -> bool:
        """Whether a pin keeps `key` from eviction."""
        check_key(key)
        entry = self.entries.find(key)
        return entry is not None and entry.pins > 0

    @verb
    def pin(self, key: Hashable) -> None:
        """Keep an entry from eviction until `unpin` was called as often as `pin`. Raises
        UnknownKey.
        """
        self.entries.known(key).pins += 1

    @verb
    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`. Raises UnknownKey or NotPinned."""
        entry = self.entries.known(key)
        if not entry.pins:
            raise NotPinned(key)
        entry.pins -= 1

    # -- eviction

    @verb
    def reclaim(self, need: int, busy: Collection[int] = ()) -> bool:
        """Free at least `need` pages by evicting the fewest entries in order, or none and return
        False.

        Entries that are pinned or in `busy` stay. `busy` are about to be continued: a last page
        that one of them would have to copy counts as freed where only what is evicted holds it,
        too.
        Cost: O(pages of the evicted entries).
        """
        pages = whole("need", need, 0)
        kept = handle_set(busy, "busy")
        return reclaim(self.turns.tables, [(self.entries,)], pages, kept)

    @reader
    def check(self) -> None:
        """Raise CorruptCache unless keys, handles, pins, policy and capacity agree and all entries
        live.
        """
        self.entries.check()
