"""What a verb is going to do to the entries of an index: who comes, who goes for it. No tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Sequence

from paged_kv.checks import key as check_key
from paged_kv.entries import Entries
from paged_kv.errors import CapacityExceeded, HandleInUse, StaleHandle
from paged_kv.eviction import page_counts, subtract
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Edit, Entry, Store


class Draft:
    """The entries of an index, as they will be. Nothing takes effect but what policies are told:
    see `Entries.in_order`. Drafts of one verb share what they end.
    """

    def __init__(self, entries: Entries, ended: set[int]) -> None:
        self.entries = entries
        self.added: dict[Hashable, Entry] = {}
        self.gone: dict[int, Entry] = {}  # by handle
        self.inserted = 0
        self.evicted = 0
        self.size = len(entries.by_key)
        self._ended = ended

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
        pins = 1 if pin else 0
        if old is not None:
            pins = old.pins or pins
            self.drop(old)
        if seq in self.gone:
            del self.gone[seq]  # it stays, and needs no room
            self._ended.remove(seq)
        else:
            self._make_room(seq)
        self.size += 1
        self.inserted += 1
        entry = Entry(key, seq, priority, next(entries.clock), pins, entries.home)
        self.added[key] = entry
        entries.in_order = False
        entries.policy.on_add(entry)

    def drop(self, entry: Entry) -> None:
        """End an entry."""
        entries = self.entries
        self.added.pop(entry.key, None)
        self.gone[entry.handle] = entry
        self._ended.add(entry.handle)
        self.size -= 1
        entries.in_order = False  # until the draft has taken effect
        entries.forget(entry)
        tree = entries.books.tree
        if tree.watches:
            tree.wake((entry.handle,))

    # -- who goes

    def evict(self, busy: Collection[int] = (), *, inner: bool = False) -> Entry | None:
        """End the first leaf, or with `inner` the first of all others, that is neither pinned nor
        busy. Returns it, or None where there is none.

        A policy that fails while it is walked is made anew, once.
        """
        entries = self.entries
        if entries.woken:
            entries.wake(self._ended)
        try:
            entry = self._first(busy, inner)
        except Exception:
            in_order = entries.in_order
            entries.reorder(self.all())  # as they knew them
            entries.in_order = in_order
            entry = self._first(busy, False)
            if entry is None and inner:
                entry = self._first(busy, True)
        if entry is not None:
            self.drop(entry)
            self.evicted += 1
        return entry

    def _first(self, busy: Collection[int], inner: bool) -> Entry | None:
        entries = self.entries
        owned = entries.books.owned
        parents = () if inner else entries.books.tree.parents()
        policy = entries.inner if inner else entries.policy
        passed = []
        victim = None
        for seen in policy.victims():
            entry = self.added.get(seen.key) if self.added else None
            if entry is None:
                entry = owned.get(seen.handle)
            if entry is None or entry is not seen or entry.pins or entry.handle in busy:
                continue
            child = entries.child_of(entry, self._ended) if entry.handle in parents else None
            if child is None:
                victim = entry
                break
            passed.append((entry, child))
        for each, child in passed:
            entries.park(each, child)
        return victim

    def _make_room(self, seq: int) -> None:
        """Evict for a sequence. Raises CapacityExceeded."""
        most = self.entries.max_entries
        if most is not None and self.size >= most and self._evict_any() is None:
            pinned = self._pinned()
            raise CapacityExceeded("entries", pinned + 1, most, pinned)
        most = self.entries.max_bytes
        if most is not None:
            self._lighten(seq, most)

    def _lighten(self, seq: int, max_bytes: int) -> None:
        """Evict until the entries and `seq` fit into `max_bytes`."""
        entries = self.entries
        most = max_bytes // entries.page_bytes
        if entries.books.pages.used_count <= most:
            return  # those of the entries are among them, and need not be counted
        seqs = [*(entry.handle for entry in self.all()), seq]
        held = page_counts(entries.books.windows(seqs)[0])
        while len(held) > most:
            victim = self._evict_any()
            if victim is None:
                size = len(held) * entries.page_bytes
                raise CapacityExceeded("bytes", size, max_bytes, self._pinned())
            subtract(held, victim.pages)

    def _evict_any(self) -> Entry | None:
        return self.evict() or self.evict(inner=True)

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
    ended: set[int] = set()
    for entries in targets:
        if entries not in drafts:
            if entries.ended or not entries.in_order:
                entries.tidy()
            drafts[entries] = Draft(entries, ended)
    tables.books.records(seqs)
    _refuse_owned(tables, targets, keys, seqs)
    for entries, key, seq in zip(targets, keys, seqs):
        drafts[entries].insert(key, seq, priority, pin)
    take_effect(tables, drafts.values())


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
        if owner is not None and not (owner.home is entries.home and owner.key == key):
            raise HandleInUse(seq, owner.key)
        if seen.setdefault(seq, (entries, key)) != (entries, key):
            raise HandleInUse(seq, seen[seq][1])


def take_effect(tables: BlockTables, drafts: Collection[Draft]) -> None:
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
        entries = draft.entries
        if len(entries.by_key) != draft.size:
            entries.forget_lost()
        entries.in_order = True


def reclaim(
    tables: BlockTables, ranks: Iterable[Iterable[Entries]], need: int, busy: Collection[int]
) -> bool:
    """Evict the shortest run of entries that frees `need` pages, or nothing at all and return
    False.

    Leaves of the first rank go first, then those of the next; those of one rank in turn.
    """
    ended: set[int] = set()
    drafts = []
    for rank in ranks:
        drafts.append(deque([_tidy(entries, ended) for entries in rank]))
    tails = _tails(tables, busy)
    refs = tables.books.pages.refs
    held: Counter[int] = Counter()
    freed = 0
    while freed < need:
        victim = _next(drafts, busy)
        if victim is None:
            return False
        for page in victim.pages:
            held[page] += 1
            left = refs[page] - held[page]
            freed += not left or (left == 1 and page in tails)
    if ended:
        take_effect(tables, [draft for rank in drafts for draft in rank if draft.gone])
    return True


def _tidy(entries: Entries, ended: set[int]) -> Draft:
    entries.tidy()
    return Draft(entries, ended)


def _next(drafts: Iterable[deque[Draft]], busy: Collection[int]) -> Entry | None:
    """Evict one entry of them."""
    for inner in (False, True):
        for rank in drafts:
            for draft in list(rank):
                rank.rotate(-1)
                victim = draft.evict(busy, inner=inner)
                if victim is not None:
                    return victim
    return None


def _tails(tables: BlockTables, busy: Collection[int]) -> set[int]:
    """Last pages that `busy` sequences would copy before they write on, since others hold them."""
    pages = tables.books.pages
    tails = set()
    for table, start, length, *_ in tables.books.records(
        [seq for seq in busy if seq in tables.books]
    ):
        offset = (start + length) % tables.books.page_size
        if table and offset and pages.fill[table[-1]] != offset and pages.refs[table[-1]] > 1:
            tails.add(table[-1])
    return tails
