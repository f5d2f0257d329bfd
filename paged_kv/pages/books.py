"""The books of one pool: what is true, and how a change of it takes effect. No tensors in here.

The truth are the records of the live sequences and of open steps, who owns which sequence, and what
was counted. References of pages, free pages and links of the tree follow from it.

A verb validates, computes a `Change`, and changes nothing. `apply` makes it take effect with the
store of one attribute, and then does what it says. Whoever finds a change that an interrupt left
there calls `settle`. Who writes tensors does so before `apply`, to slots that no record reads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from weakref import ref

from paged_kv.checks import whole
from paged_kv.errors import (
    BadArgument,
    DuplicateSequence,
    ForeignHandle,
    OwnedSequence,
    StaleHandle,
)
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.change import Change, Entry, Figures, Light, Pending, Store, Told
from paged_kv.pages.handles import Handles
from paged_kv.pages.records import Record, reach
from paged_kv.pages.tree import Tree


class Books:
    """Records, pages, steps, owners and the tree of one pool."""

    def __init__(self, pages: PageAllocator, page_size: int) -> None:
        self.pages = pages
        self.page_size = whole("page_size", page_size, 1)
        self.owned: dict[int, Entry] = {}  # sequences that belong to an index
        self.pending: dict[int, Pending] = {}  # of open steps, by number
        # The latest open step, where it is a light one: see `OpenSteps.can_be_light`.
        self.light: dict[int, ref[Light]] = {}
        self.change: Change | None = None  # took effect, and is not carried out to its end
        self.told: list[Told | None] | None = None  # of changes, where somebody listens
        self.counted: tuple[int, int, int, int] = (0, 0, 0, 0)  # `figures` without open steps
        self.handles = Handles()
        self._live: dict[int, Record] = {}
        self.tree = Tree(self._live)

    # -- reading

    @property
    def live_count(self) -> int:
        """Sequences that exist."""
        return len(self._live)

    @property
    def figures(self) -> Figures:
        """What was done since the cache was made."""
        forks, appends, allocated, copied = self.counted
        for step in self.pending.values():
            allocated += step.fresh
            copied += step.copied
        return Figures(forks, appends, allocated, copied)

    def live(self) -> list[int]:
        """Handles of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live)

    def items(self) -> list[tuple[int, Record]]:
        """Handle and record of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live.items())

    def all_records(self) -> list[Record]:
        """Those of open steps too."""
        pending = [step.records for step in self.pending.values()]
        return [*self._live.values(), *itertools.chain.from_iterable(pending)]

    def __contains__(self, seq: int) -> bool:
        return seq in self._live

    def records(self, seqs: Sequence[int]) -> list[Record]:
        """Pages, start, length and parent of each sequence. Raises StaleHandle or ForeignHandle."""
        live = self._live
        try:
            return [live[seq] for seq in seqs]
        except (KeyError, TypeError):
            raise self._explain(seqs) from None

    def distinct_records(self, seqs: Sequence[int]) -> list[Record]:
        """As `records`, and raises DuplicateSequence where two sequences are the same."""
        records = self.records(seqs)
        if len(set(seqs)) != len(seqs):
            raise DuplicateSequence(next(seq for seq, times in Counter(seqs).items() if times > 1))
        return records

    def loose_records(self, seqs: Sequence[int]) -> list[Record]:
        """As `distinct_records`, and raises OwnedSequence where a sequence belongs to an index."""
        records = self.distinct_records(seqs)
        if self.owned and not self.owned.keys().isdisjoint(seqs):
            owned = next(seq for seq in seqs if seq in self.owned)
            raise OwnedSequence(owned, self.owned[owned].key)
        return records

    def remaining(self, seqs: list[int]) -> list[int]:
        """Those that still live, each once. Raises ForeignHandle for what was never given out."""
        live = self._live
        found = [seq for seq in dict.fromkeys(seqs) if seq in live]
        if len(found) < len(seqs):
            for seq in seqs:
                if seq not in live and not self.handles.gave(seq):
                    raise ForeignHandle(seq)
        return found

    def mark(self) -> tuple[int, int]:
        """This moment, for `made_since`."""
        return self.handles.mark()

    def made_since(self, mark: tuple[int, int]) -> list[int]:
        """Live sequences that were made after a moment, the newest first. Cost: O(their number)."""
        if not self.handles.is_mark(mark):
            raise BadArgument("mark", mark, "what mark() of this cache returned")
        since = self.handles.since
        return list(itertools.takewhile(lambda seq: since(seq, mark), reversed(self.live())))

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """Tokens of each sequence."""
        return [record[2] for record in self.records(seqs)]

    def windows(self, seqs: Sequence[int]) -> tuple[list[tuple[int, ...]], list[int], list[int]]:
        """Pages, start and length of each sequence."""
        records = self.records(seqs)
        return (
            [record[0] for record in records],
            [record[1] for record in records],
            [record[2] for record in records],
        )

    @property
    def pending_pages(self) -> int:
        """Pages that open steps alone hold. Cost: O(their pages)."""
        held = Counter(
            page for step in self.pending.values() for row in step.records for page in row[0]
        )
        refs = self.pages.refs
        return sum(refs[page] == count for page, count in held.items())

    def freed_by(self, seqs: Sequence[int]) -> int:
        """Pages that releasing all of `seqs` would free. Cost: O(their pages)."""
        held = Counter(page for record in self.distinct_records(seqs) for page in record[0])
        refs = self.pages.refs
        return sum(refs[page] == count for page, count in held.items())

    def stored_tokens(self) -> int:
        """Slots that live sequences read, each counted once. Cost: O(all block tables)."""
        size = self.page_size
        used: set[int] = set()
        for _, (pages, start, length, *_) in self.items():
            used.update(pages[i // size] * size + i % size for i in range(start, start + length))
        return len(used)

    # -- changes take effect

    def apply(self, change: Change) -> None:
        """Let a change take effect, at once and for good, and carry it out."""
        pages = self.pages
        self.change = change  # from here on it is done, whatever happens: see `settle`
        if change.drops:
            for seq in change.drops:
                del self._live[seq]
        if change.puts:
            self._live.update(change.puts)
        if change.ends or change.opens:
            self._move_steps(change)
        taken: Sequence[int] = ()
        freed: Sequence[int] = ()
        if change.fresh:
            if self.told is not None:
                taken = pages.free[-change.fresh :]
            pages.take(change.fresh)
        if change.gained:
            pages.hold(change.gained)
        if change.lost:
            freed = pages.drop(change.lost)
        if change.fills:
            pages.note(change.fills)
        self._do_the_rest(change)
        self.change = None
        if self.told is not None:
            self.told.append(Told(change, taken, freed))

    def _move_steps(self, change: Change) -> None:
        for number in change.ends:
            self.pending.pop(number, None)
            self.light.pop(number, None)
        self.pending.update(change.opens)

    def _do_the_rest(self, change: Change) -> None:
        if change.figures is not None:
            self.counted = change.figures
        if change.edits or change.stores:
            change.edit()
        if change.begins:
            self.tree.begin(change.puts)
        if change.arrival is not None:
            self.pages.count(change.arrival.shares)
            self.tree.graft(change.arrival.links)
        if change.drops:
            self.tree.end(change.drops)
        if change.splices:
            self.tree.take_out(change.splices)

    def settle(self) -> None:
        """Carry out to its end a change that an interrupt left half done.

        Cost: O(all block tables).
        """
        change = self.change
        if change is None:
            return
        for seq in change.drops:
            self._live.pop(seq, None)
        self._live.update(change.puts)
        self._move_steps(change)
        if change.figures is not None:
            self.counted = change.figures
        change.edit_each()
        size = self.page_size
        self.pages.rebuild([reach(record, size) for record in self.all_records()], size)
        self.tree.rebuild()
        self.change = None
        if self.told is not None:
            self.told.append(None)

    def grow(self, capacity: int) -> None:
        """Let there be `capacity` pages."""
        pages = self.pages
        change = Change({})
        change.stores = (
            Store(pages, "capacity", capacity),
            Store(pages, "growths", pages.growths + 1),
        )
        self.change = change
        pages.grow(capacity)
        self.change = None

    def rename(self, names: Mapping[int, int], stores: Sequence[Store]) -> None:
        """Use other pages for some that are in use, and count everything anew.

        Their contents lie there already. Cost: O(all block tables).
        """

        def renamed(record: Record) -> Record:
            return (tuple([names.get(page, page) for page in record[0]]), *record[1:])

        change = Change({seq: renamed(record) for seq, record in self._live.items()})
        change.opens = {
            number: step._replace(records=[renamed(record) for record in step.records])
            for number, step in self.pending.items()
        }
        change.stores = stores
        self.change = change
        self.settle()

    # -- inside

    def _explain(self, seqs: Sequence[int]) -> StaleHandle | ForeignHandle:
        for seq in seqs:
            if type(seq) is not int or not (seq in self._live or self.handles.gave(seq)):
                return ForeignHandle(seq)
            if seq not in self._live:
                return StaleHandle(seq)
        return ForeignHandle(seqs)
