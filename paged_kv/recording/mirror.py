"""What a cache holds, as its changes tell it: so it can be seen as it was before the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from paged_kv.errors import StaleHandle
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change, Record
from paged_kv.recording.lives import PageLives
from paged_kv.recording.tally import Tally

# When, the verb that ran, sequences that began or changed, that ended, pages taken, pages freed.
Note = tuple[float, Tally | None, int, int, Sequence[int], Sequence[int]]


class Mirror:
    """Sequences and pages of one cache, their peaks, and how long pages live.

    Changes come between two steps of a model, when the processor's caches are cold: beside the
    sequences they are only noted, and `settle` makes sense of them later, of all at once. Whoever
    settles sees to it that no verb is running.
    """

    def __init__(self, tallies: Mapping[str, Tally], lives: PageLives) -> None:
        self.live: dict[int, Record] = {}
        self.lives = lives
        self.used = 0
        self.noted: deque[Note] = deque()
        self._released = tallies["release"]
        self._recovered = tallies["recover"]
        self.begin_peaks()

    def begin(self, tables: BlockTables) -> None:
        """Begin with what there is."""
        self.noted.clear()
        self.live = dict(tables.items())
        self.used = tables.pages.used_count
        self.lives.begin(tables.pages.refs)
        self.begin_peaks()

    def begin_peaks(self) -> None:
        """Peaks begin again at what there is now."""
        self.pages_peak = self.used
        self.sequences_peak = len(self.live)

    def note(
        self,
        now: float,
        running: Tally | None,
        change: Change,
        taken: Sequence[int],
        freed: Sequence[int],
    ) -> None:
        """Something changed."""
        drops = change.drops
        puts = change.puts
        self.noted.append((now, running, len(puts), len(drops), taken, freed))
        live = self.live  # last: where an interrupt ends this half-way, `agree` finds a difference
        for seq in drops:
            live.pop(seq, None)
        live.update(puts)
        if len(live) > self.sequences_peak:
            self.sequences_peak = len(live)

    def settle(self) -> None:
        """Take into account what was noted: all figures are complete after this."""
        noted = self.noted
        while noted:
            self._take_in(*noted[0])  # which may be done again, where an interrupt ends it half-way
            noted.popleft()

    def _take_in(
        self,
        now: float,
        running: Tally | None,
        changed: int,
        ended: int,
        taken: Sequence[int],
        freed: Sequence[int],
    ) -> None:
        if taken:
            self.lives.taken(taken, now)
        if freed:
            self.lives.freed(freed, now)
        more = len(taken) - len(freed)
        if ended:  # however: by a release, also one that was put off, or by an index that lets go
            self._released.effect(now, ended, more)
        elif running is not None:
            running.effect(now, changed, more)
        self.used += more
        if self.used > self.pages_peak:
            self.pages_peak = self.used

    def agree(self, tables: BlockTables, now: float) -> None:
        """See that nothing was missed: Ctrl-C may come between a change and the word of it.

        Cost: O(sequences), of which all but a few are compared by identity.
        """
        if not self._agrees(tables):
            self.recover(tables, now)

    def _agrees(self, tables: BlockTables) -> bool:
        live = self.live
        if len(live) != tables.live_count or self.used != tables.pages.used_count:
            return False
        try:
            return tables.records(list(live)) == list(live.values())
        except StaleHandle:
            return False

    def recover(self, tables: BlockTables, now: float) -> None:
        """Look at everything again: something changed that was not told. Cost: O(everything)."""
        live = dict(tables.items())
        before = self.live
        changed = [seq for seq, record in live.items() if before.get(seq) != record]
        ended = before.keys() - live.keys()
        more = tables.pages.used_count - self.used
        self.lives.correct(tables.pages.refs, now)
        self._recovered.add(now, now)
        self._recovered.effect(now, len(changed) + len(ended), more)
        self.used += more
        self.live = live
        self.pages_peak = max(self.pages_peak, self.used)
        self.sequences_peak = max(self.sequences_peak, len(live))
