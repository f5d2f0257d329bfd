"""The hooks on one cache: how often each verb ran, for how long, and what it changed.

They are attributes of the object, over the methods of its class, and are taken off again. What
changed is told by the cache itself, whoever changed it: a verb, an index that lets an entry go, a
release that was put off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from time import perf_counter
from typing import Any, NamedTuple

from paged_kv.cache import PagedKVCache
from paged_kv.errors import NestedCall
from paged_kv.pages.block_tables import BlockTables
from paged_kv.pages.change import Change
from paged_kv.recording.lives import PageLives
from paged_kv.recording.mirror import Mirror
from paged_kv.recording.patience import patiently
from paged_kv.recording.tally import Tally

Method = Callable[..., Any]
Call = tuple[Tally, float, float, int]  # of a verb: start, end, sequences that it read

# Method -> name of the event: verbs that read sequences, that make or change them, that drop them.
READS = {"open": "open", "gather": "gather"}
WRITES = {name: name for name in ("new", "fork", "commit", "append", "slide", "truncate")}
DROPS = dict.fromkeys(("release", "release_subtree", "promote"), "release")
ROWS = {"open": attrgetter("parents"), "gather": attrgetter("lengths")}  # of what the verb returns
MOST = 4096  # calls or changes that are noted only


class Hook(NamedTuple):
    """What lies on a method: the attribute that is there now, and the one that was there before."""

    now: Method
    before: Method | None


class Verbs:
    """Watches one cache from `begin` to `end`; `tallies` and `lives` take what it sees.

    `seconds` counts time in the outermost verbs, failed ones included. `look` is called with the
    time once something was done and it is later than `due`; `before_drop` with the number of
    sequences, where at least half of them ended at once and `mirror` still has them all.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        tallies: Mapping[str, Tally],
        lives: list[int],
        look: Callable[[float], None],
        before_drop: Callable[[int], None],
    ) -> None:
        self.cache = cache
        self.mirror = Mirror(tallies, PageLives(lives))
        self.seconds = 0.0
        self.due = 0.0
        self._tables = patiently(lambda: cache.tables)
        self._capacity = self._tables.pages.capacity
        self._tallies = tallies
        self._look = look
        self._before_drop = before_drop
        self._on = False
        self._inside = False  # of a verb
        self._running: Tally | None = None  # of the innermost verb that writes
        self._calls: deque[Call] = deque()
        self._hooks: dict[str, Hook] = {}

    def begin(self) -> None:
        """Put the hooks on. Raises NestedCall."""
        patiently(partial(self.cache.listen, self._changed))
        patiently(partial(self.cache.look, self._start))
        for name, verb in {**READS, **WRITES, **DROPS}.items():
            before = vars(self.cache).get(name)
            hook = self._watching(name, self._tallies[verb], getattr(self.cache, name))
            self._hooks[name] = Hook(hook, before)
            setattr(self.cache, name, hook)

    def end(self) -> None:
        """Take the hooks off; one that somebody has wrapped since stays, and does nothing any more.

        Inside of a verb the cache goes on to tell of changes, to nobody: `end` again later. Twice
        is fine.
        """
        self._on = False
        for name, hook in self._hooks.items():
            if vars(self.cache).get(name) is not hook.now:
                continue
            if hook.before is None:
                delattr(self.cache, name)
            else:
                setattr(self.cache, name, hook.before)
        self._hooks.clear()
        if self._changed in self._tables.listeners:
            with suppress(NestedCall):
                patiently(partial(self.cache.unlisten, self._changed))

    def settle(self) -> None:
        """Take into account what was noted, while no verb is running: then all is complete."""
        self._settle_calls()
        self.mirror.settle()

    def _settle_calls(self) -> None:
        calls = self._calls
        while calls:
            tally, start, end, sequences = calls.popleft()
            tally.add(start, end, sequences)

    def _start(self, tables: BlockTables) -> None:
        self.settle()
        self._capacity = tables.pages.capacity
        self.mirror.begin(tables)
        self._on = True

    def _watching(self, name: str, tally: Tally, method: Method) -> Method:
        """The hook of a method. What it changes is told to `_changed`."""
        calls = self._calls
        rows = ROWS.get(name)
        writes = name in WRITES

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return method(*args, **kwargs)
            outer = not self._inside
            before = self._running
            start = perf_counter()
            try:
                self._inside = True
                if writes:
                    self._running = tally
                result = method(*args, **kwargs)
            finally:
                # An interrupt may come with any call, so this is first: nothing is inside any more.
                self._running = before
                if outer:
                    self._inside = False
                end = perf_counter()
                if outer:
                    self.seconds += end - start
            calls.append((tally, start, end, 0 if rows is None else len(rows(result))))
            if outer and end >= self.due:
                self._look(end)
            if len(calls) >= MOST:
                self._settle_calls()
            return result

        return watched

    def _changed(self, change: Change | None, taken: Sequence[int], freed: Sequence[int]) -> None:
        """The cache tells of a change, inside of the verb that made it."""
        if not self._on:
            return
        if change is None:
            self.settle()
            self.mirror.recover(self._tables, perf_counter())
            return
        drops = change.drops
        if not drops and not change.puts:
            return  # an index counts a lookup
        now = perf_counter()
        if drops:
            left = self._tables.live_count
            if left <= len(drops) and left + len(drops) > 1:
                self._before_drop(left + len(drops))
        self.mirror.note(now, self._running, change, taken, freed)
        capacity = self._tables.pages.capacity
        if capacity != self._capacity:
            self._grown(now, capacity)
        if len(self.mirror.noted) >= MOST:
            self.mirror.settle()
        if not self._inside and now >= self.due:
            self._look(now)

    def _grown(self, now: float, capacity: int) -> None:
        self._tallies["grow"].add(now, now)
        self._tallies["grow"].effect(now, 0, capacity - self._capacity)
        self._capacity = capacity
