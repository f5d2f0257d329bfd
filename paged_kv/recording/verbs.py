"""The hooks on one cache: how often each verb ran, for how long, on how many sequences, and which pages it took.

They are attributes of the object, over the methods of its class, and are taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from time import perf_counter
from typing import Any

from paged_kv.block_table import Record
from paged_kv.cache import PagedKVCache
from paged_kv.recording.lives import PageLives

Method = Callable[..., Any]
Line = dict[str, Any]

# Method -> name of the event: verbs that read sequences, make them, change them in place or drop them. After those of
# FRESH block tables may end with fresh pages.
READS = {"open": "open", "gather": "gather"}
MAKES = {"new": "new", "fork": "fork", "_commit": "commit"}
CHANGES = {"append": "append", "release": "release", "slide": "slide", "truncate": "truncate"}
FRESH = ("_commit", "append")


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


class Verbs:
    """Watches one cache from `begin` to `end`; `tallies` and `lives` (see `PageLives`) take what it sees.

    `seconds` counts time in the outermost verbs, failed ones included. `after` is called with the time once an
    outermost verb is done; `before_drop` with the number of sequences that are about to be released.
    """

    def __init__(
        self, cache: PagedKVCache, tallies: dict[str, Tally], lives: list[int], after: Callable[[float], None],
        before_drop: Callable[[int], None],
    ) -> None:
        self.cache, self.lives = cache, PageLives(cache._pages, lives)
        self.seconds = 0.0
        self._pages, self._live = cache._pages, cache._tables._live
        self._tallies, self._after, self._before_drop = tallies, after, before_drop
        self._on = self._inside = False
        self._capacity = cache.pages_reserved
        self._hooks: dict[str, tuple[Method, Method | None]] = {}  # what is there now, what was there before
        self.begin_peaks()

    def begin(self) -> None:
        """Put the hooks on."""
        self._on = True
        for names, make in ((READS, self._reading), (MAKES, self._making), (CHANGES, self._changing)):
            for name, verb in names.items():
                before, method = vars(self.cache).get(name), getattr(self.cache, name)
                hook = make(verb, method, name in FRESH)
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

    def _reading(self, verb: str, method: Method, fresh: bool) -> Method:
        """The hook of a verb that neither takes pages nor makes sequences."""
        tally, dense = self._tallies[verb], verb == "gather"

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(*args, **kwargs)
            outer, self._inside = not self._inside, True
            start = perf_counter()
            try:
                result = method(*args, **kwargs)
            finally:
                end = self._leave(start, outer)
            tally.add(start, end, len(result.lengths if dense else result.parents), 0)
            if outer:
                self._after(end)
            return result

        return watched

    def _making(self, verb: str, method: Method, fresh: bool) -> Method:
        """The hook of a verb that returns new sequences."""
        pages, live, born = self._pages, self._live, self.lives.born

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(*args, **kwargs)
            used = pages.used_count
            outer, self._inside = not self._inside, True
            start = perf_counter()
            try:
                result = method(*args, **kwargs)
            finally:
                end = self._leave(start, outer)
            if fresh:
                born([live[child][0] for child in result], end)
            self._done(verb, start, end, len(result), used, outer)
            return result

        return watched

    def _changing(self, verb: str, method: Method, fresh: bool) -> Method:
        """The hook of a verb that changes sequences in place or drops them."""
        pages, live, lives = self._pages, self._live, self.lives

        def watched(seqs: Iterable[int], *args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(seqs, *args, **kwargs)
            seqs, outer = list(seqs), not self._inside
            if outer and verb == "release":
                self._before_drop(len(seqs))
            tables = _tables(live, seqs)
            used, free, self._inside = pages.used_count, pages.free_count, True
            start = perf_counter()
            try:
                result = method(seqs, *args, **kwargs)
            finally:
                end = self._leave(start, outer)
            if fresh or pages.free_count > free:  # an append may free a page and take another
                lives.ended(set(chain.from_iterable(tables)), end)
            if fresh:
                lives.born([live[seq][0] for seq in seqs], end)
            self._done(verb, start, end, len(seqs), used, outer)
            return result

        return watched

    def _leave(self, start: float, outer: bool) -> float:
        """A verb is over; those that ran within it, such as the release of what it evicts, were before."""
        end = perf_counter()
        if outer:
            self._inside = False
            self.seconds += end - start
        return end

    def _done(self, verb: str, start: float, end: float, sequences: int, before: int, outer: bool) -> None:
        used, live = self._pages.used_count, len(self._live)
        self._tallies[verb].add(start, end, sequences, used - before)
        if used > self.pages_peak:
            self.pages_peak = used
        if live > self.sequences_peak:
            self.sequences_peak = live
        if self._pages.capacity != self._capacity:
            self._tallies["grow"].add(end, end, 0, self._pages.capacity - self._capacity)
            self._capacity = self._pages.capacity
        if outer:
            self._after(end)


def _tables(live: dict[int, Record], seqs: list[int]) -> list[tuple[int, ...]]:
    """The pages of those sequences that exist; the verb itself says what is wrong with the others."""
    try:
        return [live[seq][0] for seq in seqs]
    except (KeyError, TypeError):
        return []
