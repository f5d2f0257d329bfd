"""The hooks on one cache: how often each verb ran, for how long, on how many sequences, and which pages it took.

They are attributes of the object, over the methods of its class, and are taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from time import perf_counter
from typing import Any

from paged_kv.allocator import MANY
from paged_kv.block_table import Record
from paged_kv.cache import PagedKVCache
from paged_kv.recording.lives import PageLives

Method = Callable[..., Any]
Line = dict[str, Any]

# Method -> name of the event: verbs that read sequences, make them, change them in place or drop them. Those of
# TAKES take pages.
READS = {"open": "open", "gather": "gather"}
MAKES = {"new": "new", "fork": "fork", "_commit": "commit"}
CHANGES = {"append": "append", "release": "release", "slide": "slide", "truncate": "truncate"}
TAKES = ("commit", "append")
MOST = 4096  # notes that are not settled
FEW = MANY  # pages that are told from others by their place on the free stack


class Tally:
    """The calls of one verb since the last line about it."""

    __slots__ = ("count", "end", "most", "pages", "seconds", "sequences", "start")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.count = self.sequences = self.pages = 0
        self.start = self.end = self.seconds = self.most = 0.0

    def add(self, start: float, end: float, sequences: int, pages: int) -> None:
        """One call."""
        spent = end - start
        if not self.count:
            self.start = start
        self.count += 1
        self.end = end
        self.seconds += spent
        self.sequences += sequences
        self.pages += pages
        if spent > self.most:
            self.most = spent

    def line(self, name: str, origin: float) -> Line:
        """The calls as an event, with times since `origin`."""
        return {"kind": "event", "t": round(self.start - origin, 6), "name": name, "s": round(self.seconds, 7),
                "span": round(self.end - self.start, 6), "most": round(self.most, 7), "count": self.count,
                "sequences": self.sequences, "pages": self.pages}


# Verb, start, end, sequences, change of the pages in use, pages and sequences after it, pages that it took or freed.
Note = tuple[Tally, float, float, int, int, int, int, list[int] | None]


class Verbs:
    """Watches one cache from `begin` to `end`; `tallies` and `lives` (see `PageLives`) take what it sees.

    `seconds` counts time in the outermost verbs, failed ones included. `look` is called with the time once an
    outermost verb is done and it is later than `due`; `before_drop` when at least half of the sequences are about to be
    released. The hooks run between two steps of a model, when the processor's caches are cold: they only note what
    happened, and `settle` makes sense of it later, of all notes at once.
    """

    def __init__(
        self, cache: PagedKVCache, tallies: dict[str, Tally], lives: list[int], look: Callable[[float], None],
        before_drop: Callable[[], None],
    ) -> None:
        self.cache, self.lives = cache, PageLives(cache._pages, lives)
        self.seconds, self.due = 0.0, 0.0
        self._pages, self._live = cache._pages, cache._tables._live
        self._tallies, self._look, self._before_drop = tallies, look, before_drop
        self._on = self._inside = False
        self._capacity = cache.pages_reserved
        self._noted: list[Note] = []
        self._hooks: dict[str, tuple[Method, Method | None]] = {}  # what is there now, what was there before
        self.begin_peaks()

    def begin(self) -> None:
        """Put the hooks on."""
        self._on = True
        for names, make in ((READS, self._reading), (MAKES, self._making), (CHANGES, self._changing)):
            for name, verb in names.items():
                before, method = vars(self.cache).get(name), getattr(self.cache, name)
                hook = make(verb, method)
                setattr(self.cache, name, hook)
                self._hooks[name] = hook, before

    def end(self) -> None:
        """Take the hooks off; one that somebody has wrapped since stays, and does nothing any more."""
        self._on = False
        for name, (hook, before) in self._hooks.items():
            if vars(self.cache).get(name) is hook:
                if before is None:
                    delattr(self.cache, name)
                else:
                    setattr(self.cache, name, before)
        self._hooks.clear()

    def begin_peaks(self) -> None:
        """Peaks begin again at what there is now."""
        self.pages_peak, self.sequences_peak = self._pages.used_count, len(self._live)

    def settle(self) -> None:
        """Take into account what the hooks noted: tallies, peaks and lives are complete after this."""
        lives = self.lives
        for tally, start, end, sequences, change, used, live, pages in self._noted:
            tally.add(start, end, sequences, change)
            if used > self.pages_peak:
                self.pages_peak = used
            if live > self.sequences_peak:
                self.sequences_peak = live
            if pages:
                (lives.taken if change > 0 else lives.freed)(pages, end)
        self._noted.clear()

    def _reading(self, verb: str, method: Method) -> Method:
        """The hook of a verb that neither takes pages nor makes sequences."""
        tally, dense, noted = self._tallies[verb], verb == "gather", self._noted

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(*args, **kwargs)
            outer, self._inside = not self._inside, True
            start = perf_counter()
            try:
                result = method(*args, **kwargs)
            finally:
                end = perf_counter()
                self._left(start, end, outer)
            noted.append((tally, start, end, len(result.lengths if dense else result.parents), 0, 0, 0, None))
            if outer:
                self._done(end)
            return result

        return watched

    def _making(self, verb: str, method: Method) -> Method:
        """The hook of a verb that returns new sequences."""
        tally, takes, noted = self._tallies[verb], verb in TAKES, self._noted
        cache, pages, free, live = self.cache, self._pages, self._pages.free, self._live

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(*args, **kwargs)
            before, freed, top = pages.used_count, cache.stats.freed_pages, free[-FEW:]
            outer, self._inside = not self._inside, True
            start = perf_counter()
            try:
                result = method(*args, **kwargs)
            finally:
                end = perf_counter()
                self._left(start, end, outer)
            used, fresh = pages.used_count, None
            if takes and used != before:
                # Pages come from the top of the free stack, unless room was made for them first.
                if used - before <= len(top) and freed == cache.stats.freed_pages and pages.capacity == self._capacity:
                    fresh = top[before - used :]
                else:
                    self.settle()
                    self.lives.born([live[child][0] for child in result], end)
            noted.append((tally, start, end, len(result), used - before, used, len(live), fresh))
            if outer:
                self._done(end)
            return result

        return watched

    def _changing(self, verb: str, method: Method) -> Method:
        """The hook of a verb that changes sequences in place or drops them."""
        tally, takes, releases, noted = self._tallies[verb], verb in TAKES, verb == "release", self._noted
        pages, free, live = self._pages, self._pages.free, self._live

        def watched(seqs: Iterable[int], *args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(seqs, *args, **kwargs)
            seqs, outer = list(seqs), not self._inside
            if releases and outer and 2 * len(seqs) >= len(live) > 1:
                self._before_drop()
            tables = _tables(live, seqs)
            before, self._inside = pages.used_count, True
            start = perf_counter()
            try:
                result = method(seqs, *args, **kwargs)
            finally:
                end = perf_counter()
                self._left(start, end, outer)
            used, gone = pages.used_count, None
            if not takes and -FEW < used - before < 0 and pages.unsorted:
                gone = free[used - before :]  # on top of the free stack, unless this sorted it
            elif takes or used != before:
                self.settle()
                self.lives.ended(set(chain.from_iterable(tables)), end)
                if takes:
                    self.lives.born([live[seq][0] for seq in seqs], end)
            noted.append((tally, start, end, len(seqs), used - before, used, len(live), gone))
            if outer:
                self._done(end)
            return result

        return watched

    def _left(self, start: float, end: float, outer: bool) -> None:
        """A verb is over; those that ran within it, such as the release of what it evicts, were before."""
        if outer:
            self._inside = False
            self.seconds += end - start

    def _done(self, end: float) -> None:
        """An outermost verb is done."""
        if self._pages.capacity != self._capacity:
            self._tallies["grow"].add(end, end, 0, self._pages.capacity - self._capacity)
            self._capacity = self._pages.capacity
        if len(self._noted) >= MOST:
            self.settle()
        if end >= self.due:
            self._look(end)


def _tables(live: dict[int, Record], seqs: list[int]) -> list[tuple[int, ...]]:
    """The pages of those sequences that exist; the verb itself says what is wrong with the others."""
    try:
        return [live[seq][0] for seq in seqs]
    except (KeyError, TypeError):
        return []
