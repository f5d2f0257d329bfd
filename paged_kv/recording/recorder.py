"""Recording a run: what the cache tells, samples at intervals, snapshots; and how little of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import IO, Any
from weakref import WeakKeyDictionary

from paged_kv.cache import PagedKVCache
from paged_kv.checks import flag
from paged_kv.errors import AlreadyRecording, NestedCall
from paged_kv.pages.books import Books
from paged_kv.recording.accesses import AccessLog
from paged_kv.recording.counters import Counters, counts
from paged_kv.recording.figures import Names, filled, page_map, sizes, tree
from paged_kv.recording.format import Line, RecordingWriter, header
from paged_kv.recording.lives import EDGES, histogram
from paged_kv.recording.mirror import Mirror
from paged_kv.recording.pace import Pace, check_pace
from paged_kv.recording.patience import patiently
from paged_kv.recording.tally import Tally
from paged_kv.recording.target import Target, find
from paged_kv.recording.verbs import Verbs

SNAPSHOT_INTERVAL = 1.0
# Beyond 100 s of the default interval samples become rarer, beyond 4 s snapshots: an hour has 9,000
# of the one and 35 of the other.
SAMPLES_THIN = 1 / 2000
SNAPSHOTS_THIN = 1 / 4


class Running:
    """A recording that goes on, and where it is written to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on = True


_recorded: WeakKeyDictionary[Any, Running] = WeakKeyDictionary()


@contextmanager
def record(
    target: Any,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    labels: Mapping[str, str] | None = None,
    interval: float = 0.05,
    budget: float | None = 0.005,
    accesses: bool = False,
    opener: Callable[[Path], IO[bytes]] | None = None,
) -> Iterator[Recorder]:
    """Record what a cache does within the block to a file, which `read_recording` reads.

    `target`: a PagedKVCache, a KVCacheManager, or a world model, model or policy that runs on
    pages, even if it has yet to make its cache. `title` is the file's name by default; `labels` are
    free text. Samples are at least `interval` seconds apart, and so rare that samples and snapshots
    take at most the share `budget` of the time (None: no bound). To listen costs some microseconds
    a call beside. With `accesses` the file also says which sequences were read when, which takes
    some bytes for each. An existing file is overwritten; `opener` makes another kind of file from
    the path.
    Raises NothingToRecord, AlreadyRecording, BadCount, BadArgument, or OSError where the file
    cannot be made; then nothing changed. An OSError later ends the recording with a RuntimeWarning,
    not the run.

    >>> import tempfile, pathlib, torch
    >>> from paged_kv.recording import read_recording
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> with record(cache, path) as recorder:
    ...     root, = cache.new()
    ...     cache.append([root], torch.ones(1, 1, 1, 3, 2), torch.ones(1, 1, 1, 3, 2))
    ...     recorder.snapshot("one root")
    >>> recording = read_recording(path)
    >>> [node["pages"] for node in recording.trees[0]["nodes"]], recording.samples[-1]["sequences"]
    ([[1, 2]], 1)
    """
    recorder = Recorder(find(target), Path(path), title, labels, interval, budget, accesses, opener)
    try:
        recorder.begin()
        yield recorder
        recorder.close()
    except BaseException as error:
        recorder.close(type(error).__name__)
        raise


class Recorder:
    """What `record` hands over: `mark` and `snapshot` for the caller, `close` for the end."""

    def __init__(
        self,
        target: Target,
        path: Path,
        title: str | None,
        labels: Mapping[str, str] | None,
        interval: float,
        budget: float | None,
        accesses: bool,
        opener: Callable[[Path], IO[bytes]] | None,
    ) -> None:
        check_pace(interval, budget)
        with_accesses = flag("accesses", accesses)
        cache = target.cache
        for held in (cache, target.state):
            other = None if held is None else _recorded.get(held)
            if other is not None and other.on:
                raise AlreadyRecording(other.path)
        name = path.stem if title is None else title
        known = None if cache is None else sizes(cache)
        self._writer = RecordingWriter(path, header(name, known, labels), opener)
        self._target = target
        self._running = Running(path)
        half = None if budget is None else budget / 2
        self._samples = Pace(interval, half, 0.0 if budget is None else SAMPLES_THIN)
        self._snapshots = Pace(SNAPSHOT_INTERVAL, half, SNAPSHOTS_THIN)
        self._largest = 0  # sequences of a tree so far
        self._names = Names()
        self._accesses = AccessLog(self._names) if with_accesses else None
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._marks: defaultdict[str, Tally] = defaultdict(Tally)
        self._counters = Counters()
        self._seconds = 0.0
        self._lives = [0] * len(EDGES)
        self._verbs: Verbs | None = None
        self._follower: Callable[..., Any] | None = None  # in place of `start` of the state
        self._start = perf_counter()

    def begin(self) -> None:
        """Listen from now on; whoever calls this sees to it that `close` is called."""
        if self._target.state is not None:
            self._follow(self._target.state)
        cache = self._target.cache
        if cache is not None:
            self._begin(cache)

    # -- for the caller

    def mark(self, name: str) -> None:
        """Note this moment under a name; marks of one name in an interval become one event."""
        now = perf_counter()
        self._marks[str(name)].add(now, now)

    def snapshot(self, title: str) -> None:
        """Write the tree and the pages as they are now. Waits for a verb that another thread is in.

        Cost: O(all block tables), whatever the budget.
        """
        verbs = self._verbs
        if verbs is None or not self._running.on:
            return

        def write(books: Books) -> None:
            verbs.settle()
            verbs.mirror.agree(perf_counter())
            self._writer.write_all(self._snapshot(verbs, str(title), self._now()))

        patiently(partial(verbs.cache.look, write))

    def close(self, reason: str = "done") -> None:
        """Write what is left, and listen no more. Closing twice is fine."""
        if not self._running.on:
            return
        self._running.on = False
        state = self._target.state
        try:
            if self._verbs is not None:
                self._end(self._verbs)
            self._writer.write_all(self._events())
        finally:
            if state is not None:
                _recorded.pop(state, None)
                if vars(state).get("start") is self._follower:
                    del state.start
            self._writer.close(self._now(), reason)

    # -- caches come and go

    def _follow(self, state: Any) -> None:
        """Go along when `state` begins with another cache."""
        start = state.start

        def begin(*args: Any, **kwargs: Any) -> Any:
            before = self._target.cache
            try:
                return start(*args, **kwargs)
            finally:
                cache = self._target.cache
                if self._running.on and cache is not None and cache is not before:
                    if self._verbs is not None:
                        self._end(self._verbs)
                    self._writer.write("cache", self._now(), cache=sizes(cache))
                    self._begin(cache)

        self._follower = begin
        _recorded[state] = self._running
        state.start = begin

    def _begin(self, cache: PagedKVCache) -> None:
        before = patiently(self._lookups)
        verbs = Verbs(
            cache,
            self._tallies,
            self._lives,
            self._wants,
            self._look,
            self._before_drop,
            self._accesses,
        )

        def first(books: Books) -> None:
            self._counters.begin({**before, **counts(books)})
            self._sample(verbs, self._now())

        self._verbs = verbs
        _recorded[cache] = self._running
        verbs.begin(first)

    def _end(self, verbs: Verbs) -> None:
        """Write how a cache stands, and listen to it no more."""
        self._verbs = None
        try:
            with suppress(NestedCall):  # in the middle of a change nothing can be seen
                patiently(partial(verbs.cache.look, partial(self._finish, verbs)))
        finally:
            verbs.end()
            _recorded.pop(verbs.cache, None)
            self._seconds += verbs.seconds

    def _finish(self, verbs: Verbs, books: Books) -> None:
        now = self._now()
        self._sample(verbs, now)
        self._writer.write("pages", now, title="end", **self._pages(verbs))
        self._writer.write("lives", now, **histogram(self._lives))

    # -- while the cache tells of a verb

    def _now(self) -> float:
        return perf_counter() - self._start

    def _wants(self, verbs: Verbs) -> bool:
        """Whether to go on: where nothing can be written any more, the run does so undisturbed."""
        return self._running.on and verbs is self._verbs and self._writer.failed is None

    def _look(self, verbs: Verbs, end: float) -> None:
        """It is time for a sample, after a verb that ended now."""
        if verbs.books.change is None:  # in the middle of a change nothing can be seen
            self._sample(verbs, end - self._start)

    def _before_drop(self, sequences: int) -> None:
        """At least half of these sequences, which the mirror has still, ended. So a search ends."""
        verbs = self._verbs
        now = self._now()
        late = now >= self._snapshots.due and 2 * sequences >= self._largest
        if verbs is None or not (late or 2 * sequences > 3 * self._largest):
            return
        verbs.settle()
        self._writer.write_all(self._snapshot(verbs, f"peak of {sequences} sequences", now))
        self._largest = max(self._largest, sequences)
        self._snapshots.looked(now, self._now() - now)

    # -- lines

    def _sample(self, verbs: Verbs, now: float) -> None:
        """Write what the verbs did since the last sample, and how the cache stands."""
        at = now + self._start
        cache = verbs.cache
        mirror = verbs.mirror
        verbs.settle()
        mirror.agree(at)
        totals = self._counters.totals
        evicted = totals.get("evictions", 0)
        self._counters.read(counts(verbs.books))
        with suppress(NestedCall):  # a release was put off: it is told of next, and then they count
            self._counters.read(self._lookups())
        if totals.get("evictions", 0) > evicted:
            self._tallies["evict"].add(at, at, totals["evictions"] - evicted)
        pages, sequences = mirror.peaks()
        sample = {
            "kind": "sample",
            "t": round(now, 6),
            **filled(cache, verbs.books.pages, mirror.live.values()),
            "bytes_peak": pages * cache.page_bytes,
            "sequences_peak": sequences,
            **totals,
            "cache_s": round(self._seconds + verbs.seconds, 6),
        }
        if cache.tiers:
            sample["tiers"] = [asdict(tier) for tier in cache.tiers]
        self._writer.write_all([*self._events(), sample])
        self._samples.looked(now, self._now() - now)
        verbs.due = self._start + self._samples.due
        if self._accesses is not None:  # what they cost does not make samples rarer
            self._write_accesses(self._accesses, mirror, at)

    def _snapshot(self, verbs: Verbs, title: str, now: float) -> list[Line]:
        t = round(now, 6)
        mirror = verbs.mirror
        nodes = tree(mirror.live, mirror.joints, self._names)
        return [
            {"kind": "tree", "t": t, "title": title, **nodes},
            {"kind": "pages", "t": t, "title": title, **self._pages(verbs)},
            {"kind": "lives", "t": t, **histogram(self._lives)},
        ]

    def _pages(self, verbs: Verbs) -> Line:
        mirror = verbs.mirror
        size = verbs.cache.page_size
        return page_map(mirror.live, mirror.held(), size, verbs.books.pages.capacity, self._names)

    def _events(self) -> list[Line]:
        """The calls since the last lines about them: a line a verb, in the order they began in."""
        lines = [
            tally.line(name, self._start)
            for name, tally in self._tallies.items()
            if not tally.empty
        ]
        lines += [
            {**tally.line(name, self._start), "mark": True} for name, tally in self._marks.items()
        ]
        for tally in self._tallies.values():
            tally.clear()
        self._marks.clear()
        return sorted(lines, key=lambda line: float(line["t"]))

    def _write_accesses(self, log: AccessLog, mirror: Mirror, at: float) -> None:
        """The accesses since the last line about them."""
        line = log.line(at, self._start, mirror.live, mirror.joints)
        if line is not None:
            self._writer.write_all([line])
        log.forget()

    def _lookups(self) -> dict[str, int]:
        """What the index has counted, where there is one."""
        lookups = self._target.lookups()
        return {} if lookups is None else lookups._asdict()
