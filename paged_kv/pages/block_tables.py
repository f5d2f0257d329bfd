"""Sequences: block tables over shared pages, and the changes of them. No tensors in here.

A sequence is an immutable record: its pages (a tuple, shared with the parent it was forked from),
the head offset of its first token, its length, its parent, the position of its next token. Token i
of a sequence lies at index j = start + i of its table, that is in slot pages[j // page_size] *
page_size + j % page_size. A table holds exactly the pages of the half-open interval [start, start +
length); an empty sequence holds none, and `start` is where its first token will go.

An open step has records too, of the children that it will publish. They count like all others, but
have no handle: nobody reads, changes or ends them.

Every verb comes in two halves. The first validates, computes a `Change`, and changes nothing.
`apply` makes it take effect with the store of one attribute, and then does what it says. Whoever
finds a change that an interrupt left there calls `settle`. Who writes tensors does so between the
two halves, to slots that no record reads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from weakref import ref

from paged_kv.checks import Counts, amount, counts, whole
from paged_kv.errors import (
    BadArgument,
    CorruptCache,
    DuplicateSequence,
    ForeignHandle,
    OwnedSequence,
    PinnedEntry,
    StaleHandle,
)
from paged_kv.pages.allocator import PageAllocator
from paged_kv.pages.change import (
    NO_PARENT,
    Change,
    Edit,
    Entry,
    Figures,
    Light,
    Pending,
    Record,
    Store,
    Told,
)
from paged_kv.pages.handles import Handles
from paged_kv.pages.plan import Plan, plan_growth, plan_pages
from paged_kv.pages.tree import Tree

IDLE = 16  # joints of the tree that may be left for no use


NOTHING = Change({})  # left over, it has everything counted anew


class BlockTables:
    """All sequences of one pool.

    >>> tables = BlockTables(PageAllocator(8, max_pages=8), page_size=4)
    >>> root, = tables.new(1)
    >>> plan = tables.plan([root], 6)
    >>> plan.fresh, plan.slots
    (2, [4, 5, 6, 7, 8, 9])
    >>> tables.carry_out(plan) == [root]
    True
    >>> child, = tables.fork([root])
    >>> plan = tables.plan([child], 1)          # the first to write on in a page copies nothing
    >>> plan.copies, plan.slots
    ([], [10])
    """

    def __init__(self, pages: PageAllocator, page_size: int) -> None:
        self.pages = pages
        self.page_size = whole("page_size", page_size, 1)
        self.owned: dict[int, Entry] = {}  # sequences that belong to an index
        self.steps: dict[int, Pending] = {}  # open ones, by number
        # The latest open step, where it wants a page a row and nobody has asked for anything since:
        # there are pages, and its parents are what they were. It has them taken by whoever comes
        # next, and saves the books a change if that is its own commit, as in a search it is.
        self.light: dict[int, ref[Light]] = {}
        self.change: Change | None = None  # took effect, and is not carried out to its end
        self.told: list[Told | None] | None = None  # of changes, where somebody listens
        self._figures: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._handles = Handles()
        self._live: dict[int, Record] = {}
        self.tree = Tree(self._live)
        self._numbers = itertools.count(1)

    # -- reading

    @property
    def live_count(self) -> int:
        """Sequences that exist."""
        return len(self._live)

    @property
    def figures(self) -> Figures:
        """What was done since the cache was made."""
        forks, appends, allocated, copied = self._figures
        for step in self.steps.values():
            allocated += step.fresh
            copied += step.copied
        return Figures(forks, appends, allocated, copied)

    def live(self) -> list[int]:
        """Handles of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live)

    def items(self) -> list[tuple[int, Record]]:
        """Handle and record of all sequences that exist, the oldest first. Cost: O(sequences)."""
        return list(self._live.items())

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
            page for step in self.steps.values() for row in step.records for page in row[0]
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
            self.steps.pop(number, None)
            self.light.pop(number, None)
        self.steps.update(change.opens)

    def _do_the_rest(self, change: Change) -> None:
        if change.figures is not None:
            self._figures = change.figures
        if change.edits or change.stores:
            change.edit()
        if change.begins:
            self.tree.begin(change.puts)
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
            self._figures = change.figures
        change.edit_each()
        self.pages.rebuild(map(self._reach, self._records()), self.page_size)
        self.tree.rebuild()
        self.change = None
        if self.told is not None:
            self.told.append(None)

    def _records(self) -> list[Record]:
        """All records, those of open steps too."""
        pending = [step.records for step in self.steps.values()]
        return [*self._live.values(), *itertools.chain.from_iterable(pending)]

    def _reach(self, record: Record) -> tuple[tuple[int, ...], int]:
        """The pages of a record, and how far it reaches into the last one."""
        return record[0], (record[1] + record[2] - 1) % self.page_size + 1

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
            for number, step in self.steps.items()
        }
        change.stores = stores
        self.change = change
        self.settle()

    # -- sequences come and go

    def new(self, count: int, *, start: int = 0) -> list[int]:
        """Make `count` empty sequences whose first token goes to offset `start` of its page."""
        count = amount("count", count, 0)
        start = whole("start", start, 0, self.page_size - 1)
        seqs = self._handles.take(count)
        self.apply(Change(dict.fromkeys(seqs, ((), start, 0, NO_PARENT, 0))))
        return seqs

    def fork(
        self,
        parents: list[int],
        *,
        at: Counts | None = None,
        root: bool = False,
        position_of: Callable[[int], int] | None = None,
    ) -> list[int]:
        """Make one child a parent, sharing the pages of its first `at` tokens (all by default).

        With `root` each begins a tree of its own, and shares pages only. `position_of` says where
        the token in a slot was placed.
        """
        records = self.records(parents)
        fills: list[tuple[int, int]] = []
        if at is not None:
            kept = counts("at", at, [record[2] for record in records])
            records = [
                self._cut(record, record[2] - length, fills, position_of)
                for record, length in zip(records, kept)
            ]
        above = itertools.repeat(NO_PARENT) if root else parents
        forked = [
            (pages, start, length, parent, place)
            for (pages, start, length, _, place), parent in zip(records, above)
        ]
        children = self._handles.take(len(parents))
        change = Change(dict(zip(children, forked)))
        change.gained = itertools.chain.from_iterable([record[0] for record in records])
        change.fills = fills
        change.begins = not root
        forks, appends, allocated, copied = self._figures
        change.figures = forks + len(children), appends, allocated, copied
        self.apply(change)
        return children

    def release(
        self, seqs: list[int], *, missing_ok: bool = False, edits: Sequence[Edit] = ()
    ) -> None:
        """Drop sequences and their references; `missing_ok` passes over those that were dropped
        before.
        """
        if missing_ok:
            seqs = self._remaining(seqs)
        self.end(seqs, self.loose_records(seqs), edits)

    def end(
        self,
        seqs: Sequence[int],
        records: Sequence[Record],
        edits: Sequence[Edit] = (),
        stores: Sequence[Store] = (),
    ) -> None:
        """Drop these sequences, owned or not."""
        tree = self.tree
        change = Change({})
        change.drops = seqs
        joints = tree.joints_of(seqs, self._held() if self.steps else {})
        if joints and not self.steps:
            change.splices = tree.passed_over(joints, seqs)
            for joint, parent, (child,) in change.splices:
                del joints[joint]
                record = self._live[child]
                change.puts[child] = (*record[:3], parent, record[4])
        change.lost = itertools.chain.from_iterable([record[0] for record in records])
        change.edits = [Edit(tree.joints, joints, ()), *edits] if joints else edits
        change.stores = stores
        self.apply(change)
        if tree.joints:
            suspects = [*joints, *(record[3] for record in records)]
            if len(tree.joints) > 2 * (len(self._live) + len(seqs)) + IDLE:
                suspects = list(tree.joints)  # interrupts left many that hold nothing
            self._splice(suspects)

    def _held(self, but: int = 0) -> Mapping[int, int]:
        """Rows of open steps, `but` those of one, by the parents that they hang on."""
        steps = [step for number, step in self.steps.items() if number != but]
        return Counter(record[3] for step in steps for record in step.records)

    def _splice(self, suspects: list[int], but: int = 0) -> None:
        """Take out those joints that hold fewer than two branches together; a step (`but`) is about
        to end.

        In changes of their own, which nobody can see: what is above and below stays the same.
        """
        tree = self.tree
        held = self._held(but) if self.steps else {}
        while splices := tree.splices(suspects, held):
            change = Change({})
            joints: dict[int, int] = {}
            for _, parent, children in splices:
                for child in children:
                    record = self._live.get(child)
                    if record is None:
                        joints[child] = parent
                    else:
                        change.puts[child] = (*record[:3], parent, record[4])
            change.edits = [Edit(tree.joints, joints, [splice.joint for splice in splices])]
            change.splices = splices
            if self.steps:
                change.opens = self._adopted({joint: parent for joint, parent, _ in splices})
            self.apply(change)
            suspects += [splice.parent for splice in splices]
            held = self._held(but) if self.steps else {}

    def _adopted(self, gone: Mapping[int, int]) -> dict[int, Pending]:
        """The open steps on sequences that go, with the parents of those instead."""
        found = {}
        for number, step in self.steps.items():
            if all(record[3] not in gone for record in step.records):
                continue
            records = []
            for pages, start, length, parent, place in step.records:
                while parent in gone:
                    parent = gone[parent]
                records.append((pages, start, length, parent, place))
            found[number] = step._replace(records=records)
        return found

    def end_subtrees(self, seqs: list[int]) -> None:
        """Drop whole subtrees, owned sequences too. Raises PinnedEntry where an index has pinned
        one of them.

        Indexes are told where they look for it: in `ended` of the entry.
        """
        entries = [self.owned[seq] for seq in seqs if seq in self.owned] if self.owned else []
        for entry in entries:
            if entry.pins:
                raise PinnedEntry(entry.key, entry.pins)
        edits = [Edit(entry.ended, {entry.handle: entry}, ()) for entry in entries]
        if entries:
            edits.append(Edit(self.owned, {}, [entry.handle for entry in entries]))
        self.end(seqs, self.records(seqs), edits)

    def mark(self) -> tuple[int, int]:
        """This moment, for `made_since`."""
        return self._handles.mark()

    def made_since(self, mark: tuple[int, int]) -> list[int]:
        """Live sequences that were made after a moment, the newest first. Cost: O(their number)."""
        if not self._handles.is_mark(mark):
            raise BadArgument("mark", mark, "what mark() of this cache returned")
        since = self._handles.since
        return list(itertools.takewhile(lambda seq: since(seq, mark), reversed(self.live())))

    # -- sequences grow and shrink

    def plan(self, seqs: list[int], count: Counts, *, fork: bool = False) -> Plan:
        """Plan to append `count` tokens, one number or one a sequence: see `plan_growth`."""
        records = self.records(seqs) if fork else self.distinct_records(seqs)
        added = counts("count", count, len(seqs))
        return plan_growth(seqs, records, added, self.page_size, self.pages, fork=fork)

    def plan_step(self, seqs: list[int], records: list[Record], room: int, alike: bool) -> Plan:
        """Plan children with `room` new tokens; `alike`: all windows have one start and length."""
        if alike and room == self.page_size and not (records[0][1] + records[0][2]) % room:
            fresh = self.pages.peek(len(records))
            if fresh:
                return plan_pages(seqs, records, fresh, room)
        added = [room] * len(seqs)
        return plan_growth(seqs, records, added, self.page_size, self.pages, fork=True)

    def carry_out(self, plan: Plan, places: Sequence[int] | None = None) -> list[int]:
        """Let a plan made just before take effect.

        Returns the sequences: the children, where it forks. `places` are the positions that follow
        on the last tokens, where these were placed by hand.
        """
        rows = len(plan.seqs)
        forks, appends, allocated, copied = self._figures
        records = plan.becomes
        if places is not None:
            records = [(*record[:4], place) for record, place in zip(records, places)]
        seqs = plan.seqs
        if plan.fork:
            seqs = self._handles.take(rows)
            forks += rows
        change = Change(dict(zip(seqs, records)))
        change.begins = plan.fork
        self._count(change, plan)
        change.figures = (
            forks,
            appends + rows,
            allocated + plan.fresh,
            copied + len(plan.copies),
        )
        self.apply(change)
        return seqs

    def _count(self, change: Change, plan: Plan) -> None:
        """What a plan does to pages."""
        fresh = plan.fresh
        if plan.fork:
            change.gained = itertools.chain.from_iterable([record[0] for record in plan.becomes])
        else:
            change.gained = self.pages.free[-fresh:] if fresh else ()
            change.lost = plan.lost
        change.fresh = fresh
        change.fills = plan.fills

    def slide(self, seqs: list[int], count: Counts) -> None:
        """Drop tokens from the front; whole pages that fall out lose one reference."""
        records = self.loose_records(seqs)
        drops = counts("slide", count, [record[2] for record in records])
        lost: list[int] = []
        change = Change({})
        for seq, record, drop in zip(seqs, records, drops):
            change.puts[seq] = self._slid(record, drop, lost)
        change.lost = lost
        self.apply(change)

    def _slid(self, record: Record, drop: int, lost: list[int]) -> Record:
        """A record without its first tokens; pages that it leaves are added to `lost`."""
        pages, start, length, parent, place = record
        skipped, start = divmod(start + drop, self.page_size)
        if drop == length:
            skipped = len(pages)
        lost += pages[:skipped]
        return pages[skipped:], start, length - drop, parent, place

    def truncate(
        self, seqs: list[int], count: Counts, position_of: Callable[[int], int] | None = None
    ) -> None:
        """Drop tokens from the end; whole pages that fall out lose one reference."""
        records = self.loose_records(seqs)
        drops = counts("count", count, [record[2] for record in records])
        lost: list[int] = []
        fills: list[tuple[int, int]] = []
        change = Change({})
        for seq, record, drop in zip(seqs, records, drops):
            shorter = self._cut(record, drop, fills, position_of)
            lost += record[0][len(shorter[0]) :]
            change.puts[seq] = shorter
        change.lost = lost
        change.fills = fills
        self.apply(change)

    def _cut(
        self,
        record: Record,
        drop: int,
        fills: list[tuple[int, int]],
        position_of: Callable[[int], int] | None,
    ) -> Record:
        """A record without its last tokens.

        A last page that was read to its end may be read there by others: `fills` blocks it.
        """
        if not drop:
            return record
        pages, start, length, parent, place = record
        size = self.page_size
        left = length - drop
        end = start + left
        kept = pages[: _pages_for(start, left, size)]
        if kept and (len(kept) < len(pages) or not (start + length) % size):
            fills.append((kept[-1], size))
        if position_of is None:
            place -= drop
        elif left:
            place = position_of(kept[-1] * size + (end - 1) % size) + 1
        else:
            place = position_of(pages[end // size] * size + end % size)
        return kept, start, left, parent, place

    # -- steps

    def number(self) -> int:
        """The number of another step."""
        return next(self._numbers)

    def open(self, number: int, plan: Plan, room: int, user: object) -> None:
        """Keep the children of a plan that forks from being seen, as a step of this number.

        `user` is kept as long as the step is open. What is counted is counted when it ends, so one
        store of its records is all that takes effect, and a search does so at each of its steps.
        """
        pages = self.pages
        fresh = plan.fresh
        taken = pages.free[-fresh:] if fresh and self.told is not None else []
        self.change = NOTHING
        self.steps[number] = Pending(plan.becomes, room, fresh, len(plan.copies), user)
        if fresh:
            pages.take(fresh)
        pages.hold(itertools.chain.from_iterable([record[0] for record in plan.becomes]))
        if plan.fills:
            pages.note(plan.fills)
        self.change = None
        if self.told is not None:
            change = Change({})
            change.opens = {number: self.steps[number]}
            self.told.append(Told(change, taken, ()))

    def can_be_light(self, records: list[Record], room: int, alike: bool) -> bool:
        """Whether a step on these wants a page a row, from its edge on, and there are as many.

        With a listener it takes them at once, for these are told of.
        """
        return (
            alike
            and room == self.page_size
            and self.told is None
            and not (records[0][1] + records[0][2]) % room
            and len(records) <= self.pages.free_count
        )

    def weigh(self, number: int, light: Light, user: object) -> None:
        """Have a light step take its pages."""
        if number not in self.steps:  # else an interrupt came before the last line
            room = self.page_size
            plan = self.plan_step(light.parents, light.records, room, True)
            self.open(number, plan, room, user)
        del self.light[number]

    def publish_light(
        self, number: int, plan: Plan, slides: Sequence[int] | None, places: Sequence[int] | None
    ) -> list[int]:
        """End a light step with its children, as the plan has them; else as `publish`."""
        records = plan.becomes
        rows = len(records)
        if slides is not None:
            drop = slides[0]
            whole, part = divmod(drop, self.page_size)
            if part or not any(plan.counts) or slides.count(drop) != rows:
                records = [self._slid(record, drop, []) for record, drop in zip(records, slides)]
            else:
                records = [
                    (pages[whole:], start, length - drop, parent, place)
                    for pages, start, length, parent, place in records
                ]
        if places is not None:
            records = [(*record[:4], place) for record, place in zip(records, places)]
        children = self._handles.take(rows)
        change = Change(dict(zip(children, records)))
        change.begins = True
        change.ends = (number,)
        change.gained = itertools.chain.from_iterable([record[0] for record in records])
        change.fresh = plan.fresh
        change.fills = plan.fills
        forks, appends, allocated, copied = self._figures
        change.figures = forks + rows, appends + rows, allocated + plan.fresh, copied
        self.apply(change)
        return children

    def publish(
        self, number: int, new: int, slides: Sequence[int] | None, places: Sequence[int] | None
    ) -> list[int]:
        """End a step with its children, of which `new` tokens of the room are filled.

        `slides` are tokens that each child drops from the front, `places` as in `carry_out`.
        """
        records, room, fresh, copies, _ = self.steps[number]
        lost: list[int] = []
        fills: list[tuple[int, int]] = []
        if new < room:
            records = [self._filled(record, room - new, lost, fills) for record in records]
        if slides is not None:
            records = [self._slid(record, drop, lost) for record, drop in zip(records, slides)]
        if places is not None:
            records = [(*record[:4], place) for record, place in zip(records, places)]
        rows = len(records)
        children = self._handles.take(rows)
        change = Change(dict(zip(children, records)))
        change.begins = True
        change.ends = (number,)
        change.lost = lost
        change.fills = fills
        forks, appends, allocated, copied = self._figures
        change.figures = forks + rows, appends + rows, allocated + fresh, copied + copies
        self.apply(change)
        return children

    def _filled(
        self, record: Record, surplus: int, lost: list[int], fills: list[tuple[int, int]]
    ) -> Record:
        """A record of a step without the room that was not filled, which others may have now."""
        pages, start, length, parent, place = record
        size = self.page_size
        left = length - surplus
        kept = pages[: _pages_for(start, left, size)]
        lost += pages[len(kept) :]
        if surplus and kept and (start + left) % size:
            fills.append((kept[-1], (start + left) % size))
        return kept, start, left, parent, place - surplus

    def abandon(self, number: int, edits: Sequence[Edit] = ()) -> None:
        """Give back all that an open step holds; nothing where it has ended."""
        if self.tree.joints and number in self.steps:
            # before, so that no joint is left where an interrupt comes between
            self._splice([record[3] for record in self.steps[number].records], number)
        change = Change({})
        change.edits = edits
        step = self.steps.get(number)
        if step is not None:
            lost: list[int] = []
            fills: list[tuple[int, int]] = []
            for record in step.records:
                kept = self._filled(record, step.room, lost, fills)
                lost += kept[0]
            change.ends = (number,)
            change.lost = lost
            change.fills = fills
            forks, appends, allocated, copied = self._figures
            change.figures = forks, appends, allocated + step.fresh, copied + step.copied
        self.apply(change)

    # -- inside

    def _remaining(self, seqs: list[int]) -> list[int]:
        """Those that still live, each once. Raises ForeignHandle for what was never given out."""
        for seq in seqs:
            if seq not in self._live and not self._handles.gave(seq):
                raise ForeignHandle(seq)
        return [seq for seq in dict.fromkeys(seqs) if seq in self._live]

    def _explain(self, seqs: Sequence[int]) -> StaleHandle | ForeignHandle:
        for seq in seqs:
            if type(seq) is not int or not (seq in self._live or self._handles.gave(seq)):
                return ForeignHandle(seq)
            if seq not in self._live:
                return StaleHandle(seq)
        return ForeignHandle(seqs)

    def check(self) -> None:
        """Raise CorruptCache unless every invariant of pages and tables holds.

        Cost: O(everything).
        """
        holders: Counter[int] = Counter()
        pending = [("an open step", row) for step in self.steps.values() for row in step.records]
        for name, record in [*((f"sequence {seq:#x}", row) for seq, row in self.items()), *pending]:
            self._check_record(name, record)
            holders.update(record[0])
        for seq in self._live:
            if not self._handles.gave(seq):
                raise CorruptCache(f"sequence {seq:#x}: not a number that was given out")
        if self.light:
            raise CorruptCache(f"a light step is left: {self.light}")
        self.pages.check(holders)
        self._check_fill()
        for seq, entry in list(self.owned.items()):
            if seq not in self._live or entry.handle != seq:
                raise CorruptCache(
                    f"sequence {seq:#x} is owned under key {entry.key!r}, and does not live"
                )

    def _check_record(self, name: str, record: Record) -> None:
        table, start, length, parent, _ = record
        if parent and parent not in self._live and parent not in self.tree.joints:
            raise CorruptCache(f"{name}: its parent {parent:#x} is neither live nor a joint")
        if len(set(table)) != len(table):
            raise CorruptCache(f"{name} holds a page twice: {table}")
        pages = _pages_for(start, length, self.page_size)
        if not 0 <= start < self.page_size or len(table) != pages:
            raise CorruptCache(f"{name}: pages {table}, start {start}, length {length}")

    def _check_fill(self) -> None:
        """Raise CorruptCache where a row might write on in a page that another one
        reads further.
        """
        furthest: dict[int, int] = {}
        tails = set()
        for pages, reach in map(self._reach, self._records()):
            for page in pages[:-1]:
                furthest[page] = self.page_size
            for page in pages[-1:]:
                furthest[page] = max(reach, furthest.get(page, 0))
                if reach < self.page_size:
                    tails.add(page)
        for page in tails:
            if self.pages.fill[page] < furthest[page]:
                raise CorruptCache(
                    f"page {page}: read to {furthest[page]}, written to {self.pages.fill[page]}"
                )


def _pages_for(start: int, length: int, page_size: int) -> int:
    return -(-(start + length) // page_size) if length else 0
