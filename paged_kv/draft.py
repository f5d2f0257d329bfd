"""What a verb is going to do to the entries of an index: who comes, who goes for it. No tensors."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import islice

from paged_kv.checks import key as check_key
from paged_kv.entries import Entries, drop
from paged_kv.errors import CapacityExceeded, HandleInUse, StaleHandle
from paged_kv.eviction import page_counts, subtract
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Edit, Entry, Store

Chosen = tuple[Entries, Entry]


class Draft:
    """The entries of an index, as they will be. Nothing takes effect but what the policy is told:
    see `Entries.in_order`.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.added: dict[Hashable, Entry] = {}
        self.gone: dict[int, Entry] = {}  # by handle
        self.inserted = 0
        self.evicted = 0
        self._size = len(entries.by_key)

    def get(self, key: Hashable) -> Entry | None:
        """The entry of a key."""
        entry = self.added.get(key)
        if entry is None:
            entry = self.entries.by_key.get(key)
            if entry is not None and entry.handle in self.gone:
                return None
        return entry

    def all(self) -> list[Entry]:
        """All entries. Cost: O(entries)."""
        added = self.added
        kept = [entry for key, entry in self.entries.by_key.items() if key not in added]
        return [entry for entry in (*kept, *added.values()) if entry.handle not in self.gone]

    # -- who comes

    def insert(self, key: Hashable, seq: int, priority: float | None, pin: bool = False) -> None:
        """Put an entry in place of the one before, whose pins it takes over, and evict for it.

        With `pin` it is pinned at least once. Raises CapacityExceeded, or StaleHandle for what
        the draft has ended.
        """
        if seq in self.gone:
            raise StaleHandle(seq)
        entries = self.entries
        old = self.get(key)
        evicted = self._overflow(old, seq)
        entries.in_order = False  # until the draft has taken effect
        for entry in evicted:
            self._drop(entry)
            self.evicted += 1
        pins = 1 if pin else 0
        if old is not None:
            pins = old.pins or pins
            self._drop(old)
            self.gone.pop(seq, None)
        self._size += 1
        self.inserted += 1
        self.added[key] = Entry(
            key, seq, priority, next(entries.clock), pins, entries.ended, entries.owner
        )
        entries.policy.on_add(key, priority)

    def _drop(self, entry: Entry) -> None:
        self.added.pop(entry.key, None)
        self.gone[entry.handle] = entry
        self._size -= 1
        self.entries.policy.on_remove(entry.key)

    # -- who goes

    def victims(self) -> Iterator[Entry]:
        """Entries that are not pinned, the first to evict first.

        A policy that fails while it is walked is made anew, once: the hash of a key may have
        changed.
        """
        seen: set[int] = set()
        walk = self._unpinned()
        anew = False
        while True:
            try:
                entry = next(walk, None)
            except Exception:
                if anew:
                    raise
                anew = True
                self.entries.policy = self.entries.told(self.all())  # as it knew them
                walk = self._unpinned()
                continue
            if entry is None:
                return
            if entry.handle not in seen:
                seen.add(entry.handle)
                yield entry

    def _unpinned(self) -> Iterator[Entry]:
        for key in self.entries.policy.victims():
            entry = self.get(key)
            if entry is not None and not entry.pins:
                yield entry

    def _overflow(self, old: Entry | None, seq: int) -> list[Entry]:
        """The entries to evict so that `seq` fits in place of `old`. Raises CapacityExceeded."""
        evicted: list[Entry] = []
        most = self.entries.max_entries
        if most is not None and old is None and self._size >= most:
            victim = next(self.victims(), None)
            if victim is None:
                pinned = self._pinned()
                raise CapacityExceeded("entries", pinned + 1, most, pinned)
            evicted = [victim]
        most = self.entries.max_bytes
        if most is not None:
            return self._overweight(old, seq, evicted, most)
        return evicted

    def _overweight(
        self, old: Entry | None, seq: int, evicted: list[Entry], max_bytes: int
    ) -> list[Entry]:
        """The first victims, at least those of `evicted`, without which the entries and `seq` fit
        into `max_bytes`.
        """
        entries = self.entries
        most = max_bytes // entries.page_bytes
        if entries.tables.books.pages.used_count <= most:
            return evicted  # those of the entries are among them, and need not be counted
        others = [entry.handle for entry in self.all() if entry is not old]
        tables = entries.tables.books.windows([*others, seq])[0]
        held = page_counts(tables)
        table_of = dict(zip(others, tables))
        least = len(evicted)
        evicted = []
        for victim in self.victims():
            if len(evicted) >= least and len(held) <= most:
                return evicted
            if victim is not old:
                evicted.append(victim)
                subtract(held, table_of[victim.handle])
        if len(held) > most:
            size = len(held) * entries.page_bytes
            raise CapacityExceeded("bytes", size, max_bytes, self._pinned())
        return evicted

    def _pinned(self) -> int:
        return sum(entry.pins > 0 for entry in self.all())


def put(
    tables: BlockTables,
    targets: Sequence[Entries],
    keys: Sequence[Hashable],
    seqs: list[int],
    priority: float | None = None,
    *,
    pin: bool = False,
) -> None:
    """Store one sequence per target and key, in order: all or none."""
    for key in keys:
        check_key(key)
    drafts: dict[Entries, Draft] = {}
    for entries in targets:
        if entries not in drafts:
            if entries.ended or not entries.in_order:
                entries.tidy()
            drafts[entries] = Draft(entries)
    tables.books.records(seqs)
    _refuse_owned(tables, targets, keys, seqs)
    for entries, key, seq in zip(targets, keys, seqs):
        drafts[entries].insert(key, seq, priority, pin)
    _take_effect(tables, drafts.values())


def _refuse_owned(
    tables: BlockTables, targets: Sequence[Entries], keys: Sequence[Hashable], seqs: list[int]
) -> None:
    """Raise HandleInUse where a sequence is stored under another key, or stands here under two."""
    owned = tables.books.owned
    if owned.keys().isdisjoint(seqs) and (len(seqs) == 1 or len(set(seqs)) == len(seqs)):
        return
    seen: dict[int, tuple[Entries, Hashable]] = {}
    for entries, key, seq in zip(targets, keys, seqs):
        owner = owned.get(seq)
        if owner is not None and not (owner.ended is entries.ended and owner.key == key):
            raise HandleInUse(seq, owner.key)
        if seen.setdefault(seq, (entries, key)) != (entries, key):
            raise HandleInUse(seq, seen[seq][1])


def _take_effect(tables: BlockTables, drafts: Collection[Draft]) -> None:
    """Let drafts of several indexes happen, at once."""
    gone: list[int] = []
    owned: dict[int, Entry] = {}
    edits = [Edit(tables.books.owned, owned, gone)]
    stores = []
    for draft in drafts:
        added = draft.added
        for entry in added.values():
            owned[entry.handle] = entry
        gone += draft.gone
        lost = [entry.key for entry in draft.gone.values() if entry.key not in added]
        edits.append(Edit(draft.entries.by_key, added, lost))
        counts = draft.entries.counts
        stores.append(Store(counts, "insertions", counts.insertions + draft.inserted))
        if draft.evicted:
            stores.append(Store(counts, "evictions", counts.evictions + draft.evicted))
    tables.end(gone, tables.books.records(gone), edits, stores)
    for draft in drafts:
        draft.entries.in_order = True


def candidates(entries: Entries, busy: Collection[int]) -> Iterator[Chosen]:
    """The entries of an index that may go, the first to evict first."""
    entries.tidy()
    return ((entries, entry) for entry in Draft(entries).victims() if entry.handle not in busy)


def reclaim(tables: BlockTables, need: int, stream: Iterator[Chosen]) -> bool:
    """Evict the shortest run of candidates that frees `need` pages, or nothing at all and return
    False.
    """
    run: list[Chosen] = []
    seqs: list[int] = []
    short = 0  # a run of `short` is too short, a run of `enough` is not
    enough = 0
    while tables.books.freed_by(seqs) < need:
        short = len(run)
        run.extend(islice(stream, max(1, short)))  # twice as long each time: hence the log
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
    drop(tables, run[:enough], evicted=True)
    return True
