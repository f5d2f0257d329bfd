"""What is recorded of one cache: how often each verb ran, for how long, and what it changed.

The cache tells of it, whoever changed something: a verb, an index that lets an entry go, a release
that was put off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadArgument, NestedCall
from paged_kv.events import Event
from paged_kv.gather import Gathered
from paged_kv.paged_step import PagedStep
from paged_kv.pages.books import Books
from paged_kv.pages.change import Told
from paged_kv.recording.accesses import AccessLog
from paged_kv.recording.lives import PageLives
from paged_kv.recording.mirror import Mirror
from paged_kv.recording.patience import patiently
from paged_kv.recording.tally import Tally
from paged_kv.step import Step

# The verb that is told of -> the one it is counted as. What an index does is not counted, but when
# the cache asks it for pages.
COUNTED = (
    "new",
    "fork",
    "append",
    "slide",
    "truncate",
    "gather",
    "attend",
    "open",
    "commit",
    "close",
    "release",
    "trim",
    "reclaim",
)
VERBS = {**{name: name for name in COUNTED}, "release_subtree": "release", "promote": "release"}
MOST = 4096  # calls or changes that are noted only


class Call(NamedTuple):
    """A call of a verb."""

    tally: Tally
    start: float
    end: float
    sequences: int  # that it read


class Verbs:
    """Watches one cache from `begin` to `end`; `tallies` and `lives` take what it sees.

    `seconds` counts time in verbs, failed ones included. `wanted` says whether to go on. `look` is
    called with the time once something was done and it is later than `due`; `before_drop` with the
    number of sequences, where at least half of them ended at once and `mirror` still has them all.
    All three are called inside of the verb.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        tallies: Mapping[str, Tally],
        lives: list[int],
        wanted: Callable[[Verbs], bool],
        look: Callable[[Verbs, float], None],
        before_drop: Callable[[int], None],
        accesses: AccessLog | None,
    ) -> None:
        self.cache = cache
        self.books = patiently(lambda: cache.books)
        self.mirror = Mirror(self.books, tallies, PageLives(lives))
        self.seconds = 0.0
        self.due = 0.0
        self._capacity = self.books.pages.capacity
        self._counted = {verb: tallies[name] for verb, name in VERBS.items()}
        self._grown = tallies["grow"]
        self._wanted = wanted
        self._look = look
        self._before_drop = before_drop
        self._accesses = accesses  # where they are wanted
        self._on = False
        self._calls: deque[Call] = deque()

    def begin(self, first: Callable[[Books], None]) -> None:
        """Listen to the cache, and call `first` before anything is heard. Raises NestedCall."""
        patiently(partial(self.cache.listen, self._heard))
        patiently(partial(self.cache.look, partial(self._start, first)))

    def end(self) -> None:
        """Listen no more. Twice is fine. Inside of a verb that cannot be: then the next event does
        it, for it is not wanted any more.
        """
        self._on = False
        with suppress(NestedCall, BadArgument):
            patiently(partial(self.cache.unlisten, self._heard))

    def settle(self) -> None:
        """Take into account what was noted, while no verb is running: then all is complete."""
        calls = self._calls
        while calls:
            call = calls.popleft()
            call.tally.add(call.start, call.end, call.sequences)
        self.mirror.settle()

    def _start(self, first: Callable[[Books], None], books: Books) -> None:
        self._capacity = books.pages.capacity
        self.mirror.begin()
        self._on = True
        first(books)

    def _heard(self, event: Event) -> None:
        """The cache tells of a verb, before the next one may begin."""
        if self._on:
            self._note(event)
        if not self._wanted(self):
            self.cache.turns.unlisten(self._heard)

    def _note(self, event: Event) -> None:
        tally = self._counted.get(event.verb)
        if self._accesses is not None:
            self._accesses.read(event)
        changed = [self._changed(event, told, tally) for told in event.told]
        if self.books.pages.capacity != self._capacity:
            self._resized(event.end)
        if tally is not None:
            self.seconds += event.end - event.begin
            if not event.failed:
                self._calls.append(Call(tally, event.begin, event.end, _rows(event.result)))
        if max(len(self.mirror.noted), len(self._calls)) >= MOST:
            self.settle()
        if event.end >= self.due and (tally is not None or any(changed)):
            self._look(self, event.end)

    def _changed(self, event: Event, told: Told | None, tally: Tally | None) -> bool:
        """Whether sequences, steps or pages changed."""
        mirror = self.mirror
        if told is None:
            self.settle()
            mirror.look_again(event.end)
            return True
        change = told.change
        if not (change.drops or change.puts or change.opens or change.ends or change.splices):
            return False  # an index counts a lookup
        if change.drops:
            left = len(mirror.live) - len(change.drops)
            if left <= len(change.drops) and len(mirror.live) > 1:
                self._before_drop(len(mirror.live))
        if self._accesses is not None:
            self._accesses.change(event.end, change, mirror.live, mirror.joints)
        mirror.note(event.end, tally, told)
        return True

    def _resized(self, now: float) -> None:
        """The pool has another capacity: it grew, unless it was trimmed."""
        capacity = self.books.pages.capacity
        more = capacity - self._capacity
        self._capacity = capacity
        if more > 0:
            self._grown.add(now, now)
            self._grown.effect(now, 0, more)


def _rows(result: object) -> int:
    """Sequences that a verb read."""
    if isinstance(result, (Step, PagedStep)):
        return len(result.parents)
    return len(result.lengths) if isinstance(result, Gathered) else 0
