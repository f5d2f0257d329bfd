"""What a cache holds, as it tells of it: so it can be seen as it was before the last change."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from paged_kv.errors import StaleHandle
from paged_kv.pages.books import Books
from paged_kv.pages.change import Told
from paged_kv.pages.records import Record
from paged_kv.recording.lives import PageLives
from paged_kv.recording.tally import Tally


class Note(NamedTuple):
    """A change that was heard of."""

    at: float
    running: Tally | None  # of the verb that made it
    changed: int  # sequences that began or changed
    ended: int  # sequences
    taken: Sequence[int]  # pages
    freed: Sequence[int]


class Mirror:
    """Sequences, open steps and pages of one cache, their peaks, and how long pages live.

    Changes come between two steps of a model, when the processor's caches are cold: beside the
    sequences they are only noted, and `settle` makes sense of them later, of all at once. Whoever
    settles sees to it that no verb is running.
    """

    def __init__(self, books: Books, tallies: Mapping[str, Tally], lives: PageLives) -> None:
        self.live: dict[int, Record] = {}
        self.steps: dict[int, list[Record]] = {}  # open ones, by number
        self.joints: dict[int, int] = {}  # with their parents: sequences that ended in a tree
        self.lives = lives
        self.used = 0
        self.taken = 0  # pages, since the cache was made
        self.noted: deque[Note] = deque()
        self._pages_peak = 0
        self._sequences_peak = 0
        self._books = books
        self._released = tallies["release"]
        self._recovered = tallies["recover"]

    def begin(self) -> None:
        """Begin with what there is."""
        self.noted.clear()
        self._look()
        self.lives.begin(self._books.pages.refs)
        self._begin_peaks()

    def peaks(self) -> tuple[int, int]:
        """The most pages and the most sequences so far; from here on peaks are counted anew."""
        found = self._pages_peak, self._sequences_peak
        self._begin_peaks()
        return found

    def held(self) -> Iterator[Record]:
        """All records, those of open steps too."""
        yield from self.live.values()
        for records in self.steps.values():
            yield from records

    def note(self, at: float, running: Tally | None, told: Told) -> None:
        """Something changed."""
        change = told.change
        drops = change.drops
        puts = change.puts
        # what hung on a joint hangs on another sequence now: no verb did anything to it
        changed = 0 if change.splices else len(puts)
        self.noted.append(Note(at, running, changed, len(drops), told.taken, told.freed))
        live = self.live  # last: where an interrupt ends this half-way, `agree` finds a difference
        for seq in drops:
            live.pop(seq, None)
        live.update(puts)
        for number in change.ends:
            self.steps.pop(number, None)
        for number, step in change.opens.items():
            self.steps[number] = step.records
        for edit in change.edits:
            if edit.book is self._books.tree.joints:
                for joint in edit.drops:
                    self.joints.pop(joint, None)
                self.joints.update(edit.puts)
        if len(live) > self._sequences_peak:
            self._sequences_peak = len(live)

    def settle(self) -> None:
        """Take into account what was noted: all figures are complete after this."""
        noted = self.noted
        while noted:
            self._take_in(noted[0])  # which may be done again, where an interrupt ends it half-way
            noted.popleft()

    def _take_in(self, note: Note) -> None:
        at, running, changed, ended, taken, freed = note
        if taken:
            self.lives.taken(taken, at)
        if freed:
            self.lives.freed(freed, at)
        more = len(taken) - len(freed)
        if ended:  # however: by a release, also one that was put off, or by an index that lets go
            self._released.effect(at, ended, more)
        elif running is not None:
            running.effect(at, changed, more)
        self.taken += len(taken)
        most = self.used + len(taken)
        if most > self._pages_peak:
            self._pages_peak = most
        self.used += more

    def _begin_peaks(self) -> None:
        self._pages_peak = self.used
        self._sequences_peak = len(self.live)

    # -- what was not told

    def agree(self, now: float) -> None:
        """See that nothing was missed: Ctrl-C may come between a change and the word of it.

        Cost: O(sequences), of which all but a few are compared by identity.
        """
        if not self._agrees():
            self._recover(now)

    def look_again(self, now: float) -> None:
        """Something changed, and nobody says what. Cost: O(everything)."""
        self._follow_moves()
        self.agree(now)

    def _agrees(self) -> bool:
        books = self._books
        live = self.live
        if (
            len(live) != books.live_count
            or self.used != books.pages.used_count
            or self.taken != books.figures.allocated
            or self.joints != books.tree.joints
            or self.steps != _steps(books)
        ):
            return False
        try:
            return books.records(list(live)) == list(live.values())
        except StaleHandle:
            return False

    def _recover(self, now: float) -> None:
        """Look at everything."""
        self._follow_moves()
        before = self.live
        used = self.used
        self._look()
        changed = [seq for seq, record in self.live.items() if before.get(seq) != record]
        ended = before.keys() - self.live.keys()
        self.lives.correct(self._books.pages.refs, now)
        self._recovered.add(now, now)
        self._recovered.effect(now, len(changed) + len(ended), self.used - used)
        self._pages_peak = max(self._pages_peak, self.used)
        self._sequences_peak = max(self._sequences_peak, len(self.live))

    def _look(self) -> None:
        books = self._books
        self.live = dict(books.items())
        self.steps = _steps(books)
        self.joints = dict(books.tree.joints)
        self.used = books.pages.used_count
        self.taken = books.figures.allocated

    def _follow_moves(self) -> None:
        """Where only the pages of a window are others, they have moved with all that they hold."""
        now = dict(self._books.items())
        steps = _steps(self._books)
        moved: dict[int, int] = {}
        for seq, record in self.live.items():
            moved.update(_moves(record, now.get(seq, record)))
        for number, records in self.steps.items():
            for record, same in zip(records, steps.get(number, records)):
                moved.update(_moves(record, same))
        if not moved:
            return
        refs = self._books.pages.refs
        before = self.lives.pages
        names = {
            old: new
            for old, new in moved.items()
            if new not in before and not (old < len(refs) and refs[old])
        }
        self.lives.move(names)
        for seq, record in self.live.items():
            other = now.get(seq)
            if other is not None and other == _renamed(record, names):
                self.live[seq] = other
        for number, records in self.steps.items():
            others = steps.get(number)
            if others is not None and others == [_renamed(record, names) for record in records]:
                self.steps[number] = others


def _steps(books: Books) -> dict[int, list[Record]]:
    """The records of open steps."""
    return {number: step.records for number, step in books.pending.items()}


def _moves(before: Record, after: Record) -> Iterator[tuple[int, int]]:
    """The pages of a window that have other numbers now, where it is the same otherwise."""
    if before is not after and before[1:3] == after[1:3]:
        yield from ((old, new) for old, new in zip(before[0], after[0]) if old != new)


def _renamed(record: Record, names: Mapping[int, int]) -> Record:
    return (tuple([names.get(page, page) for page in record[0]]), *record[1:])
