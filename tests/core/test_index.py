"""The index against a naive model, in pools so small that eviction and exhaustion happen all the
time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import pytest
import torch
from flaky_policies import Boom, Flaky, Stop, Trap
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_index import FullError, GoneError, NaiveIndex, World
from small_caches import books, filled, grow, held, pages, saved, state, step, tiny_cache

from paged_kv import Step
from paged_kv.errors import (
    BadKey,
    CapacityExceeded,
    ForeignHandle,
    HandleInUse,
    NotPinned,
    OutOfPages,
    OwnedSequence,
    PinnedEntry,
    StaleHandle,
    UnknownKey,
)
from paged_kv.index import CacheIndex

pytestmark = pytest.mark.once
KEYS = st.integers(0, 4)
PICK = st.integers(0, 100)
PRIORITIES = st.none() | st.integers(-1, 2)
SPOILS = {
    "owned": HandleInUse,
    "twice": HandleInUse,
    "unhashable": BadKey,
    "foreign": ForeignHandle,
}
MOST = 4  # sequences outside of the index


class IndexMachine(RuleBasedStateMachine):
    """`world` knows every live sequence and its parent; `model` is the index in it."""

    policy = ""

    def __init__(self) -> None:
        super().__init__()
        self.trap = Trap()
        self.steps: list[Step] = []  # open ones

    @initialize(
        entries=st.integers(1, 4) | st.none(),
        limit=st.none() | st.integers(1, 5),
        page_size=st.integers(1, 3),
    )
    def start(self, entries: int | None, limit: int | None, page_size: int) -> None:
        self.cache = tiny_cache(6, page_size)
        size = None  # of a page and an odd byte, which holds none
        if limit is not None:
            size = limit * self.cache.page_bytes + 1
        self.index = CacheIndex(self.cache, self.make_policy(), entries, size)
        self.cache.set_reclaimer(self.index)
        weigh = lambda handles: held(self.cache, handles) * self.cache.page_bytes  # noqa: E731
        self.world = World([NaiveIndex(self.policy, entries, size, weigh)])
        self.world.make(filled(self.cache, 1, 2, 1), [None] * 3)
        for key in range(3):
            self.put(key, 0, None)

    def make_policy(self) -> Any:
        return self.policy

    # -- help

    @property
    def model(self) -> NaiveIndex:
        return self.world.indexes[0]

    def pick(self, seqs: list[int], number: int) -> int | None:
        return seqs[number % len(seqs)] if seqs else None

    def any(self, number: int) -> int | None:
        """A live sequence, owned or not."""
        return self.pick(list(self.world.parents), number)

    def freed_by(self, seqs: list[int]) -> int:
        """Pages that nobody but `seqs` holds, counted without the cache's own dry run."""
        holders = Counter(page for table in pages(self.cache, self.world.parents) for page in table)
        holders.update(self.pending())
        holders.subtract(page for table in pages(self.cache, seqs) for page in table)
        return sum(count == 0 for count in holders.values())

    def pending(self) -> list[int]:
        """Pages of the rows of open steps."""
        steps = self.cache.books.pending.values()
        return [page for step in steps for record in step.records for page in record[0]]

    def fewest(self, need: int, busy: Collection[int]) -> list[int] | None:
        """Handles of the shortest run of victims that frees `need` pages, or spares copies."""
        victims = [entry.handle for entry in self.model.victims(busy)]
        for size in range(len(victims) + 1):
            kept = saved(self.cache, busy, victims[:size])
            if self.freed_by(victims[:size]) + kept >= need:
                return victims[:size]
        return None

    def act(self, call: Callable[[], Any], *worlds: World) -> Any:
        """Call a verb that succeeds, and leaves the last of these worlds.

        Where a hook raises it leaves one of them, or all as it was, and returns None here.
        """
        records = dict(self.cache.books.items())
        try:
            result = call()
        except (Boom, Stop) as error:
            assert type(error) is self.trap.kind
            found = dict(self.cache.books.items())
            assert all(found[seq] == record for seq, record in records.items() if seq in found)
            self.world = next(world for world in (self.world, *worlds) if self.is_like(world))
            return None
        self.world = worlds[-1]
        return result

    def refuse(self, error: Any, call: Callable[[], Any]) -> Any:
        """Call a verb that raises, and changes nothing.

        Returns the error, None where a hook raised before.
        """
        seen = self.look()
        armed = bool(self.trap.left)
        try:
            with pytest.raises(error) as caught:
                call()
        except (Boom, Stop) as boom:
            assert type(boom) is self.trap.kind
            assert self.is_like(self.world)
            return None
        assert self.look(armed) == seen
        return caught.value

    def look(self, armed: bool = False) -> dict[str, Any]:
        """All that can be seen, without the order where a hook might raise."""
        if armed or self.trap.left:
            return books(self.cache.books)
        return state(self.index)

    def is_like(self, world: World) -> bool:
        (model,) = world.indexes
        return (
            self.cache.live() == list(world.parents)
            and asdict(self.index.stats) == model.stats
            and dict(zip(self.index, self.index.handles()))
            == {entry.key: entry.handle for entry in model.entries}
            and [key for key in range(5) if self.index.pinned(key)]
            == sorted(entry.key for entry in model.entries if entry.pins)
        )

    def with_room(
        self, call: Callable[[], Any], need: int, busy: Collection[int], error: Any = None
    ) -> Any:
        """Call a verb that takes `need` pages: it evicts, where pages are short, the fewest
        entries.
        """
        free = self.cache.pages_free
        doomed = self.fewest(need - free, busy) if need > free else []
        if doomed is not None:
            after = copy.deepcopy(self.world)
            after.evict(doomed)
            return self.act(call, after)
        found = self.refuse(OutOfPages, call)
        if found is not None:
            pinned = held(self.cache, self.world.pinned())
            assert (found.requested, found.free, found.pinned) == (need, free, pinned)
            alone = set(self.pending()).difference(*pages(self.cache, self.world.parents))
            assert found.pending == len(alone)
        return None

    # -- sequences

    @rule(number=PICK)
    def new(self, number: int) -> None:
        if len(self.world.outside()) < MOST:
            self.world.make(self.cache.new(1), [None])

    @rule(number=PICK)
    def fork(self, number: int) -> None:
        parent = self.any(number)
        if parent is not None and len(self.world.outside()) < MOST:
            self.world.make(self.cache.fork([parent]), [parent])

    @rule(first=PICK, second=PICK, count=st.integers(1, 5))
    def append(self, first: int, second: int, count: int) -> None:
        outside = self.world.outside()
        picked = dict.fromkeys([self.pick(outside, first), self.pick(outside, second)])
        seqs = [seq for seq in picked if seq is not None]
        if seqs:
            need = self.cache.pages_needed(seqs, count)
            self.with_room(lambda: grow(self.cache, seqs, count), need, seqs)

    @rule(first=PICK, second=PICK, count=st.integers(0, 3))
    def step(self, first: int, second: int, count: int) -> None:
        """A model step from sequences in and out of the index, which it does not evict."""
        parents = [seq for seq in (self.any(first), self.any(second)) if seq is not None]
        if len(self.world.outside()) + len(parents) > MOST:
            return
        need = self.cache.pages_needed(parents, count, fork=True)
        children = self.with_room(lambda: step(self.cache, parents, count), need, parents)
        if children is not None:
            self.world.make(children, parents)

    @rule(first=PICK, second=PICK, room=st.integers(0, 3))
    @precondition(lambda self: len(self.steps) < 2)
    def open(self, first: int, second: int, room: int) -> None:
        """A step that stays open, whatever becomes of its parents and of their entries."""
        parents = [seq for seq in (self.any(first), self.any(second)) if seq is not None]
        if len(self.world.outside()) + len(parents) > MOST:
            return
        need = self.cache.pages_needed(parents, room, fork=True)
        step = self.with_room(lambda: self.cache.open(parents, room), need, parents)
        if step is not None:
            self.steps.append(step)

    @rule(number=PICK, keep=st.booleans())
    @precondition(lambda self: self.steps)
    def finish(self, number: int, keep: bool) -> None:
        step = self.steps.pop(number % len(self.steps))
        if keep:
            kv = torch.zeros(len(step.parents), 1, step.room, 2)
            step.update(0, kv, kv)
            self.world.make(step.commit(), step.parents)
        else:
            step.close()

    @rule(number=PICK, verb=st.sampled_from(["slide", "truncate"]))
    def shorten(self, number: int, verb: str) -> None:
        seq = self.pick(self.world.outside(), number)
        if seq is not None and self.cache.lengths([seq])[0]:
            getattr(self.cache, verb)([seq], 1)

    @rule(number=PICK)
    def release(self, number: int) -> None:
        seq = self.pick(self.world.outside(), number)
        if seq is not None:
            self.cache.release([seq])
            self.world.end([seq])

    @rule(number=PICK, other=PICK, verb=st.sampled_from(["append", "slide", "truncate", "release"]))
    def meddle(self, number: int, other: int, verb: str) -> None:
        """What would change or end a sequence of the index is refused, wherever it stands in the
        batch.
        """
        seq = self.pick(self.world.indexed(), number)
        if seq is None:
            return
        beside = self.any(other)
        seqs = [seq] if beside is None or beside == seq else [beside, seq]
        calls: dict[str, Callable[[], Any]] = {
            "append": lambda: grow(self.cache, seqs, 1),
            "slide": lambda: self.cache.slide(seqs, 0),
            "truncate": lambda: self.cache.truncate(seqs, 0),
            "release": lambda: self.cache.release(seqs, missing_ok=bool(other % 2)),
        }
        found = self.refuse(OwnedSequence, calls[verb])
        if found is not None:
            keys = {entry.handle: entry.key for entry in self.model.entries}
            assert (found.handle in seqs, found.key) == (True, keys[found.handle])

    @rule(number=PICK, verb=st.sampled_from(["release_subtree", "promote"]))
    def prune(self, number: int, verb: str) -> None:
        """Whole subtrees end, and what an index holds of them: but where it is pinned, nothing
        does.
        """
        seq = self.any(number)
        if seq is None:
            return
        doomed = self.world.subtree(seq) if verb == "release_subtree" else self.world.beside(seq)
        call = lambda: getattr(self.cache, verb)(seq)  # noqa: E731
        if set(doomed) & set(self.world.pinned()):
            self.refuse(PinnedEntry, call)
            return
        after = copy.deepcopy(self.world)
        after.end(doomed)
        assert self.act(call, after) == len(doomed)

    # -- the index

    def put_as(self, key: int, seq: int, priority: float | None) -> None:
        """Put, as the model foretells."""
        after = copy.deepcopy(self.world)
        call = lambda: self.index.put(key, seq, priority)  # noqa: E731
        try:
            after.end(after.indexes[0].put(key, seq, priority))
        except FullError:  # pinned entries may have outgrown the limit
            self.refuse(CapacityExceeded, call)
        else:
            self.act(call, after)

    @rule(key=KEYS, number=PICK, priority=PRIORITIES)
    def put(self, key: int, number: int, priority: float | None) -> None:
        if len(self.world.outside()) <= number % MOST:
            self.new(number) if number % 3 else self.fork(number)
        seq = self.pick(self.world.outside(), number)
        if seq is not None:
            self.put_as(key, seq, priority)

    @rule(key=KEYS, priority=PRIORITIES)
    def renew(self, key: int, priority: float | None) -> None:
        entry = self.model.find(key)
        if entry is not None:
            self.put_as(key, entry.handle, priority)

    @rule(
        items=st.lists(st.tuples(KEYS, PICK), max_size=5),
        spoil=st.sampled_from([None, None, *sorted(SPOILS)]),
        place=PICK,
    )
    def put_batch(self, items: list[tuple[int, int]], spoil: str | None, place: int) -> None:
        """All or none, as one after the other: evictions, keys that repeat, entries that are put
        again.
        """
        outside = self.world.outside()
        batch: list[tuple[Any, int]] = []
        for key, number in items:
            entry = self.model.find(key)
            if entry is not None and number % 4 == 0:
                batch.append((key, entry.handle))
            elif outside:
                batch.append((key, outside.pop(number % len(outside))))
        wrong = self.spoiled(spoil, batch, place)
        if wrong is not None:
            batch.insert(place % (len(batch) + 1), wrong)
        keys = [key for key, _ in batch]
        seqs = [seq for _, seq in batch]
        call = lambda: self.index.put_batch(keys, seqs)  # noqa: E731
        if spoil is not None and wrong is not None:
            self.refuse(SPOILS[spoil], call)
            return
        after = copy.deepcopy(self.world)
        try:
            after.end(after.indexes[0].put_batch(keys, seqs))
        except FullError:
            self.refuse(CapacityExceeded, call)
        except GoneError:
            self.refuse(StaleHandle, call)
        else:
            self.act(call, after)

    def spoiled(
        self, spoil: str | None, batch: list[tuple[Any, int]], place: int
    ) -> tuple[Any, int] | None:
        """What must not stand in a batch."""
        seq = self.any(place)
        if spoil == "owned":
            seq = self.pick(self.model.handles(), place)
        elif spoil == "twice":
            seq = self.pick([seq for _, seq in batch], place)
        elif spoil == "foreign":
            seq = 7
        key: Any = -1
        if spoil == "unhashable":
            key = (1, [])
        return None if spoil is None or seq is None else (key, seq)

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        after = copy.deepcopy(self.world)
        wanted = after.indexes[0].get(key)
        assert self.act(lambda: self.index.get(key), after) in (wanted, None)

    @rule(key=KEYS, undo=st.booleans())
    def pin(self, key: int, undo: bool) -> None:
        entry = self.model.find(key)
        call = lambda: (self.index.unpin if undo else self.index.pin)(key)  # noqa: E731
        if entry is None:
            self.refuse(UnknownKey, call)
        elif undo and not entry.pins:
            self.refuse(NotPinned, call)
        else:
            after = copy.deepcopy(self.world)
            its = after.indexes[0].find(key)
            assert its is not None
            its.pins += -1 if undo else 1
            self.act(call, after)

    @rule(items=st.lists(st.tuples(KEYS, PRIORITIES), max_size=4))
    def set_priorities(self, items: list[tuple[int, float | None]]) -> None:
        """All or none."""
        after = copy.deepcopy(self.world)
        entries = [after.indexes[0].find(key) for key, _ in items]
        call = lambda: self.index.set_priorities(*map(list, zip(*items) if items else ((), ())))  # noqa: E731
        if None in entries:
            self.refuse(UnknownKey, call)
            return
        for entry, (_, priority) in zip(entries, items):
            assert entry is not None
            entry.priority = 0.0 if priority is None else priority
        self.act(call, after)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        entry = self.model.find(key)
        call = lambda: self.index.remove(key)  # noqa: E731
        if entry is None or entry.pins:
            self.refuse(UnknownKey if entry is None else PinnedEntry, call)
        else:
            after = copy.deepcopy(self.world)
            after.end([entry.handle])
            self.act(call, after)

    @rule(number=PICK)
    def clear(self, number: int) -> None:
        if number < 10:
            after = copy.deepcopy(self.world)
            after.end(after.indexed())
            self.act(self.index.clear, after)

    @rule(need=st.integers(0, 5), number=PICK)
    def reclaim(self, need: int, number: int) -> None:
        seq = self.pick(self.model.handles(), number)
        busy = [] if seq is None or number % 2 else [seq]
        doomed = self.fewest(need, busy)
        free = self.cache.pages_free
        after = copy.deepcopy(self.world)
        after.evict(doomed or [])
        kept = saved(self.cache, busy, doomed or [])
        done = self.act(lambda: self.index.reclaim(need, busy), after)
        if done is not None:
            assert done == (doomed is not None)
            assert self.cache.pages_free >= free + (need - kept if done else 0)

    # -- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.is_like(self.world)
        assert len(self.index) == len(self.model.entries)
        assert (
            self.index.bytes_in_use
            == held(self.cache, self.model.handles()) * self.cache.page_bytes
        )
        assert self.index.pinned_pages() == held(self.cache, self.world.pinned())
        assert self.cache.live_sequences == len(self.world.parents)
        if not self.trap.left:  # to ask for the order is to put it in order
            assert self.index.victims() == [entry.key for entry in self.model.victims()]
        with self.trap.asleep():
            self.cache.check()
            self.index.check()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.trap.left = []
            self.steps.clear()
            self.cache.release(self.world.outside())
            self.index.clear()
            assert self.cache.pages_in_use == self.cache.live_sequences == len(self.index) == 0
            self.cache.check()
            self.index.check()


class FlakyMachine(IndexMachine):
    """The hooks of the policy raise now and then, while the order is told to a new one, too."""

    def make_policy(self) -> Any:
        return lambda: Flaky(self.policy, self.trap)

    @rule(
        left=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        late=st.booleans(),
        kind=st.sampled_from([Boom, Stop]),
    )
    @precondition(lambda self: not self.trap.left)
    def arm(self, left: list[int], late: bool, kind: type[BaseException]) -> None:
        self.trap.left = left
        self.trap.late = late
        self.trap.kind = kind


def machine(base: type[IndexMachine], policy: str, examples: int) -> Any:
    """The test of one machine with one policy."""
    case = type(f"{policy}{base.__name__}", (base,), {"policy": policy}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=50, deadline=None)
    return case


TestFIFO = machine(IndexMachine, "fifo", 100)
TestLRU = machine(IndexMachine, "lru", 100)
TestPriority = machine(IndexMachine, "priority", 100)
TestFlakyLRU = machine(FlakyMachine, "lru", 150)
TestFlakyPriority = machine(FlakyMachine, "priority", 100)
