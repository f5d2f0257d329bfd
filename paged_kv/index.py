"""Keys to sequences: a bounded dictionary that owns the sequences it holds.

The index never touches a tensor. It hands out handles; whoever needs contents gathers them, or forks the
handle.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

from paged_kv.errors import (
    BadCount,
    BadPriority,
    CapacityExceeded,
    CorruptCache,
    HandleInUse,
    NotPinned,
    PinnedEntry,
    UnknownKey,
)
from paged_kv.eviction import Policy, make_policy, page_counts, subtract
from paged_kv.stats import IndexStats


class Cache(Protocol):
    """What an index needs of the `PagedKVCache` that its sequences live in: no tensors."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def bytes_in_use(self) -> int: ...

    def lengths(self, seqs: Sequence[int]) -> list[int]: ...

    def pages_freed_by(self, seqs: Sequence[int]) -> int: ...

    def page_tables(self, seqs: Sequence[int]) -> list[tuple[int, ...]]: ...

    def release(self, seqs: Sequence[int]) -> None: ...


class CacheIndex:
    """Key -> sequence handle, with eviction, pins, and a capacity in entries and in bytes.

    `policy` is "lru", "fifo", "priority" or a fresh object with the hooks of `Policy`. `max_bytes` bounds the
    pages that the entries hold, each counted once however many entries share it; None bounds nothing. Keys
    are any hashable. Lookups and insertions are O(1) (O(log n) with priorities); where `max_bytes` binds, an
    insertion walks the page tables of all entries.

    Entries belong to the index: it releases them when they are replaced, evicted, removed or cleared. Fork an
    entry to go on from it. `cache.set_reclaimer(index)` lets the cache evict entries when its pages run out.

    >>> from paged_kv import PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, num_pages=4)
    >>> index = CacheIndex(cache, max_entries=2)
    >>> for key, seq in zip("abc", cache.new(3)): index.put(key, seq)
    >>> index.get("a") is None, "c" in index, cache.live_sequences
    (True, True, 2)
    """

    def __init__(
        self,
        cache: Cache,
        policy: str | Policy = "lru",
        max_entries: int | None = None,
        max_bytes: int | None = None,
        *,
        owners: dict[int, Hashable] | None = None,
    ) -> None:
        _check_capacity("max_entries", max_entries, 1, "None or an integer >= 1")
        page_bytes = cache.page_bytes
        _check_capacity("max_bytes", max_bytes, page_bytes, f"None or an integer >= {page_bytes}, one page")
        self.cache, self.max_entries, self.max_bytes = cache, max_entries, max_bytes
        self.policy = make_policy(policy)
        self._entries: dict[Hashable, int] = {}
        self._pins: dict[Hashable, int] = {}
        # handle -> key; indexes that may not share a handle (the pools of a manager) share this dict instead
        self._owners: dict[int, Hashable] = {} if owners is None else owners
        self._stats = IndexStats()

    # -- reading ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    @property
    def stats(self) -> IndexStats:
        """A snapshot of the counts."""
        return replace(self._stats)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that the entries hold, each page counted once. Cost: O(their pages)."""
        return len(page_counts(self._tables(self._entries))) * self.cache.page_bytes

    def handles(self) -> list[int]:
        """The sequences of all entries. They stay the index's own."""
        return list(self._entries.values())

    def pinned_pages(self) -> int:
        """Pages that pinned entries hold, each counted once. Cost: O(their pages)."""
        return pinned_pages((self,))

    def victims(self, keep: Collection[int] = ()) -> Iterator[Hashable]:
        """Keys, the first to evict first, without the pinned ones and those whose handle is in `keep`."""
        pins, entries = self._pins, self._entries
        return (key for key in self.policy.victims() if key not in pins and entries[key] not in keep)

    # -- lookups and insertions --------------------------------------------------------------------------

    def get(self, key: Hashable) -> int | None:
        """The sequence stored under `key`, or None; counted as a query. The handle stays the index's own."""
        handle = self._entries.get(key)
        stats = self._stats
        stats.queries += 1
        if handle is None:
            stats.misses += 1
            return None
        stats.hits += 1
        self.policy.on_hit(key)
        return handle

    def put(self, key: Hashable, seq: int, priority: float | None = None) -> None:
        """Store `seq` under `key` and take ownership of it; evicts first where the index is full.

        The sequence that `key` held so far is released, and a pin of `key` holds the new one. Putting the
        same sequence again renews its age and priority. `priority` matters to policies that use it: the
        lowest goes first. Raises HandleInUse, BadPriority, CapacityExceeded (everything else is pinned),
        StaleHandle or ForeignHandle; then nothing changed and `seq` still is the caller's.
        """
        entries, stats = self._entries, self._stats
        old = entries.get(key)
        if priority is not None:
            priority = _checked_priority(priority)
        self.cache.lengths((seq,))  # refuses stale and foreign handles
        if seq != old and seq in self._owners:
            raise HandleInUse(seq, self._owners[seq])
        evicted = self._overflow(key, seq, new=old is None)
        dropped = [entries[victim] for victim in evicted]
        if old is not None and old != seq:
            dropped.append(old)
        if dropped:
            self.cache.release(dropped)
            for victim in evicted:
                self._forget(victim)
            stats.evictions += len(evicted)
        if old is not None:
            self.policy.on_remove(key)
            del self._owners[old]
        entries[key] = seq
        self._owners[seq] = key
        self.policy.on_add(key, priority)
        stats.insertions += 1

    def put_batch(self, keys: Sequence[Hashable], seqs: Sequence[int]) -> None:
        """`put` one sequence a key, in order; where no capacity binds, in one pass with one check of the handles.

        Raises as `put` does; without a capacity nothing changed then.
        """
        if self.max_entries is not None or self.max_bytes is not None:
            for key, seq in zip(keys, seqs):
                self.put(key, seq)
            return
        entries, owners, policy = self._entries, self._owners, self.policy
        self.cache.lengths(seqs)  # refuses stale and foreign handles
        for place, seq in enumerate(seqs):
            if seq in owners or seq in seqs[:place]:
                raise HandleInUse(seq, owners.get(seq, keys[seqs.index(seq)]))
        replaced = []
        for key, seq in zip(keys, seqs):
            old = entries.get(key)
            if old is not None:
                replaced.append(old)
                del owners[old]
                policy.on_remove(key)
            entries[key] = seq
            owners[seq] = key
            policy.on_add(key, None)
        if replaced:
            self.cache.release(replaced)
        self._stats.insertions += len(seqs)

    def remove(self, key: Hashable) -> None:
        """Release one entry. Raises UnknownKey or PinnedEntry."""
        self._known(key)
        if key in self._pins:
            raise PinnedEntry(key, self._pins[key])
        self.cache.release((self._entries[key],))
        self._forget(key)

    def clear(self) -> None:
        """Release all entries in one call, the pinned ones too."""
        clear((self,))

    def pinned(self, key: Hashable) -> bool:
        """Whether a pin keeps `key` from eviction."""
        return key in self._pins

    def pin(self, key: Hashable) -> None:
        """Keep an entry from eviction until `unpin` was called as often as `pin`. Raises UnknownKey."""
        self._known(key)
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`. Raises UnknownKey or NotPinned."""
        self._known(key)
        pins = self._pins.get(key, 0)
        if not pins:
            raise NotPinned(key)
        if pins == 1:
            del self._pins[key]
        else:
            self._pins[key] = pins - 1

    # -- eviction ----------------------------------------------------------------------------------------

    def reclaim(self, need: int, busy: Collection[int] = ()) -> bool:
        """Free at least `need` pages by evicting the fewest entries in order, or none and return False.

        Entries that are pinned or in `busy` stay. Cost: O(pages of the evicted entries), times the log of
        their number.
        """
        busy = frozenset(busy)
        return reclaim(self.cache, need, ((self, key) for key in self.victims(busy)))

    def check(self) -> None:
        """Raise CorruptCache unless keys, handles, pins, policy and capacity agree and all entries live."""
        held, order = set(self._entries), list(self.policy.victims())
        if len(order) != len(held) or set(order) != held:
            raise CorruptCache(f"the policy holds {order!r}, the index {sorted(map(repr, held))}")
        if not set(self._pins) <= held or min(self._pins.values(), default=1) < 1:
            raise CorruptCache(f"pins {self._pins!r} among the keys {sorted(map(repr, held))}")
        if any(self._owners.get(handle) != key for key, handle in self._entries.items()):
            raise CorruptCache(f"owners {self._owners!r} of the entries {self._entries!r}")
        if self.max_entries is not None and len(held) > self.max_entries:
            raise CorruptCache(f"{len(held)} entries, allowed are {self.max_entries}")
        self.cache.lengths(self.handles())

    # -- inside ------------------------------------------------------------------------------------------

    def _known(self, key: Hashable) -> None:
        if key not in self._entries:
            raise UnknownKey(key, len(self._entries))

    def _forget(self, key: Hashable) -> None:
        """Drop all trace of an entry whose sequence was released."""
        del self._owners[self._entries.pop(key)]
        self._pins.pop(key, None)
        self.policy.on_remove(key)

    def _evict(self, key: Hashable) -> None:
        self._forget(key)
        self._stats.evictions += 1

    def _tables(self, keys: Iterable[Hashable]) -> list[tuple[int, ...]]:
        """The pages of each entry, in one call."""
        return self.cache.page_tables([self._entries[key] for key in keys])

    def _overflow(self, key: Hashable, seq: int, *, new: bool) -> list[Hashable]:
        """The keys to evict so that `seq` fits under `key`. Raises CapacityExceeded."""
        evicted: list[Hashable] = []
        if self.max_entries is not None and new and len(self._entries) >= self.max_entries:
            evicted = list(islice(self.victims(), 1))
            if not evicted:
                raise CapacityExceeded("entries", len(self._pins) + 1, self.max_entries, len(self._pins))
        # All pages in use within the limit: so are those of the entries, and they need not be counted.
        if self.max_bytes is not None and self.cache.bytes_in_use > self.max_bytes:
            evicted = self._overweight(key, seq, len(evicted))
        return evicted

    def _overweight(self, key: Hashable, seq: int, least: int) -> list[Hashable]:
        """The first victims, at least `least`, without which the entries and `seq` fit into `max_bytes`."""
        assert self.max_bytes is not None
        limit = self.max_bytes // self.cache.page_bytes
        others = [other for other in self._entries if other != key]
        *tables, new = self.cache.page_tables([*(self._entries[other] for other in others), seq])
        held, table_of = page_counts([*tables, new]), dict(zip(others, tables))
        evicted: list[Hashable] = []
        for victim in self.victims():
            if len(evicted) >= least and len(held) <= limit:
                return evicted
            if victim != key:
                evicted.append(victim)
                subtract(held, table_of[victim])
        if len(held) > limit:
            needed = len(held) * self.cache.page_bytes
            raise CapacityExceeded("bytes", needed, self.max_bytes, len(self._pins))
        return evicted


def reclaim(cache: Cache, need: int, victims: Iterator[tuple[CacheIndex, Hashable]]) -> bool:
    """Evict the shortest run of `victims` that frees `need` pages, or nothing at all and return False."""
    run: list[tuple[CacheIndex, Hashable]] = []
    handles: list[int] = []
    short = enough = 0  # a run of `short` is too short, a run of `enough` is not
    while cache.pages_freed_by(handles) < need:
        short = len(run)
        run.extend(islice(victims, max(1, short)))  # twice as long each time: hence the log
        handles = [index._entries[key] for index, key in run]
        enough = len(run)
        if enough == short:
            return False
    while enough - short > 1:
        middle = (short + enough) // 2
        if cache.pages_freed_by(handles[:middle]) < need:
            short = middle
        else:
            enough = middle
    cache.release(handles[:enough])
    for index, key in run[:enough]:
        index._evict(key)
    return True


def pinned_pages(indexes: Iterable[CacheIndex]) -> int:
    """Pages that pinned entries of several indexes hold, each counted once. Cost: O(their pages)."""
    return len(page_counts(table for index in indexes for table in index._tables(index._pins)))


def clear(indexes: Iterable[CacheIndex]) -> None:
    """Release all entries of several indexes of one cache in one call."""
    indexes = list(indexes)
    handles = [handle for index in indexes for handle in index._entries.values()]
    if handles:
        indexes[0].cache.release(handles)
    for index in indexes:
        for key in list(index._entries):
            index._forget(key)


def _check_capacity(name: str, value: int | None, least: int, allowed: str) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise BadCount(name, value, allowed)


def _checked_priority(priority: float) -> float:
    try:
        value = float(priority)
    except (TypeError, ValueError):
        raise BadPriority(priority) from None
    if value != value:
        raise BadPriority(priority)
    return value
