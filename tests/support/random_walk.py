"""Random verbs over a tiny cache, beside a dense model; any of them may be broken off, or meddled
with. Several steps may be open at a time.

Whatever happens within a call, what is found afterwards is what the model says was there before it,
or what it says is there after it; where pages run out, entries of the index may have been evicted
first, whole ones and in order.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from interrupts import ERRORS, Shot, faulted, interrupted, meddled

from paged_kv import PagedKVCache, PagedKVError, Step
from paged_kv.errors import CapacityExceeded, OutOfPages, PinnedEntry
from paged_kv.index import CacheIndex

Draw = Callable[[int, int], int]  # a whole number, both ends included
Call = Callable[[], object]
POLICIES = ("fifo", "lru", "priority")
KEYS = 5
MOST = 10  # sequences that are not doomed, about
STEPS = 4  # that are open at once
MORE = 0.5


class Seen(NamedTuple):
    """What a sequence shows: `parent` is the nearest one above it that exists, or None."""

    tokens: tuple[float, ...]
    positions: tuple[int, ...]
    place: int  # where its next token goes
    parent: int | None


class Window(NamedTuple):
    """A sequence. Every token is a number that no other token has."""

    tokens: tuple[float, ...] = ()
    positions: tuple[int, ...] = ()
    place: int = 0

    def part(self, first: int, end: int) -> Window:
        """Some of its tokens; what comes next goes on behind them."""
        place = self.place
        if end < len(self.tokens):
            place = self.positions[end - 1] + 1 if end else self.positions[0]
        return Window(self.tokens[first:end], self.positions[first:end], place)

    def longer(self, tokens: tuple[float, ...], positions: tuple[int, ...] | None) -> Window:
        """With tokens at the end, placed somewhere or one behind the other."""
        placed = positions
        if placed is None:
            placed = tuple(range(self.place, self.place + len(tokens)))
        place = placed[-1] + 1 if placed else self.place
        return Window(self.tokens + tokens, self.positions + placed, place)


class Opened(NamedTuple):
    """An open step: parents, their windows as they were, and the new tokens of each row."""

    parents: tuple[int, ...]
    windows: tuple[Window, ...]
    new: tuple[tuple[float, ...], ...]
    left: bool

    def rows(self) -> list[tuple[float, ...]]:
        """Tokens side by side, padding included."""
        past = padded(list(self.windows), self.left)
        return [row + new for row, new in zip(past, self.new)]


class Item(NamedTuple):
    """An entry of the index."""

    seq: int
    priority: int
    added: int
    used: int
    pins: int


ORDERS: dict[str, Callable[[Item], tuple[int, ...]]] = {
    "fifo": lambda item: (item.added,),
    "lru": lambda item: (item.used,),
    "priority": lambda item: (item.priority, item.added),
}


class Sight(NamedTuple):
    """All that a cache and its index show, and open steps."""

    windows: dict[int, Seen]
    items: dict[Any, int]
    pins: dict[Any, int]
    order: list[Any]
    counts: tuple[int, ...]  # queries, hits, misses, evictions, insertions; forks, appends
    steps: dict[int, list[tuple[float, ...]]]  # those that are open, by name
    open: int


@dataclass(frozen=True)
class Model:
    """What there should be. Nothing in it is changed; `windows` is in the order of birth."""

    policy: str
    most: int | None
    windows: dict[int, Window] = field(default_factory=dict)
    items: dict[Any, Item] = field(default_factory=dict)
    counts: tuple[int, ...] = (0,) * 7
    clock: int = 0
    above: dict[int, int] = field(default_factory=dict)  # parents of all there were; 0: none
    steps: dict[int, Opened] = field(default_factory=dict)  # by name

    # -- sequences

    def counted(self, **more: int) -> Model:
        """With some counts higher."""
        names = ("queries", "hits", "misses", "evictions", "insertions", "forks", "appends")
        return replace(
            self, counts=tuple(n + more.get(name, 0) for n, name in zip(self.counts, names))
        )

    def having(self, windows: dict[int, Window]) -> Model:
        """With sequences that are new or changed."""
        return replace(self, windows={**self.windows, **windows})

    def without(self, seqs: set[int]) -> Model:
        """Without some sequences, and the entries that hold them."""
        windows = {seq: window for seq, window in self.windows.items() if seq not in seqs}
        items = {key: item for key, item in self.items.items() if item.seq not in seqs}
        return replace(self, windows=windows, items=items)

    def born(self, parents: list[int], windows: dict[int, Window]) -> Model:
        """With sequences that are new, below parents; 0 is none."""
        return replace(self.having(windows), above={**self.above, **dict(zip(windows, parents))})

    def lineage(self, seq: int) -> list[int]:
        """A sequence and all above it, those that ended too."""
        found = [seq]
        while self.above[found[-1]]:
            found.append(self.above[found[-1]])
        return found

    def parent(self, seq: int) -> int | None:
        """The nearest sequence above that exists."""
        return next((each for each in self.lineage(seq)[1:] if each in self.windows), None)

    def subtree(self, seq: int) -> set[int]:
        """A sequence and all that descend from it."""
        return {each for each in self.windows if seq in self.lineage(each)}

    def promoted(self, seq: int) -> Model:
        """Without all else below the nearest sequence above, or in the tree."""
        parent = self.parent(seq)
        top = self.lineage(seq)[-1] if parent is None else parent
        return self.without(self.subtree(top) - self.subtree(seq) - {parent or 0})

    # -- open steps

    def opened(self, name: int, step: Opened) -> Model:
        """With a step that is open, or another state of it."""
        return replace(self, steps={**self.steps, name: step})

    def ended(self, name: int) -> Model:
        """Without an open step."""
        return replace(
            self, steps={each: step for each, step in self.steps.items() if each != name}
        )

    # -- the index

    def order(self, busy: tuple[int, ...] = ()) -> list[Any]:
        """Keys, the first to evict first: leaves in the order of the policy, and in the end those
        that something else lives below.
        """
        free = [
            (key, item)
            for key, item in self.items.items()
            if not item.pins and item.seq not in busy
        ]
        left = [key for key, _ in sorted(free, key=lambda pair: ORDERS[self.policy](pair[1]))]
        found: list[Any] = []
        gone: set[int] = set()
        while left:
            seqs = {key: self.items[key].seq for key in left}
            leaves = [key for key in left if self.subtree(seqs[key]) <= gone | {seqs[key]}]
            if not leaves:
                return found + left
            found.append(leaves[0])
            gone.add(seqs[leaves[0]])
            left.remove(leaves[0])
        return found

    def evicted(self, keys: list[Any]) -> Model:
        """Without some entries."""
        return self.without({self.items[key].seq for key in keys}).counted(evictions=len(keys))

    def put(self, key: Any, seq: int, priority: int) -> Model:
        """With an entry, in place of the one of that key. Nothing is replaced by itself."""
        old = self.items.get(key)
        model = self
        if old is None and self.most is not None and len(self.items) >= self.most:
            model = self.evicted(self.order()[:1])
        if old is not None and old.seq != seq:
            model = model.without({old.seq})
        item = Item(seq, priority, self.clock, self.clock, old.pins if old else 0)
        items = {**{k: i for k, i in model.items.items() if k != key}, key: item}
        return replace(model, items=items, clock=self.clock + 1).counted(insertions=1)

    def asked(self, key: Any) -> Model:
        """After a query."""
        item = self.items.get(key)
        if item is None:
            return self.counted(queries=1, misses=1)
        items = {**self.items, key: item._replace(used=self.clock)}
        return replace(self, items=items, clock=self.clock + 1).counted(queries=1, hits=1)

    def pinned(self, key: Any, more: int) -> Model:
        """After a pin, or after one less."""
        item = self.items[key]
        return replace(self, items={**self.items, key: item._replace(pins=item.pins + more)})

    def sight(self) -> Sight:
        """What it looks like."""
        items = {key: item.seq for key, item in self.items.items()}
        pins = {key: item.pins for key, item in self.items.items()}
        windows = {seq: Seen(*window, self.parent(seq)) for seq, window in self.windows.items()}
        steps = {name: step.rows() for name, step in self.steps.items()}
        return Sight(windows, items, pins, self.order(), self.counts, steps, len(steps))


class Ending(NamedTuple):
    """How a call ended: `refused` by the package, `broken` off where it says, or with a result."""

    result: object = None
    refused: PagedKVError | None = None
    broken: str | None = None
    may_have_happened: bool = True  # where it was broken off


Perform = Callable[[Call], Ending]


def plainly(call: Call) -> Ending:
    """Call, and nothing else."""
    try:
        return Ending(call())
    except PagedKVError as error:
        return Ending(refused=error)


def ended(shot: Shot, *, may_have_happened: bool) -> Ending:
    """How a call ended that was to be broken off."""
    shot.forget()
    if shot.fired:
        return Ending(broken=str(shot), may_have_happened=may_have_happened)
    if isinstance(shot.outcome, PagedKVError):
        return Ending(refused=shot.outcome)
    return Ending(shot.outcome)


def interrupting(at: int) -> Perform:
    """Calls are broken off before a bytecode."""
    error = ERRORS[at % len(ERRORS)]
    return lambda call: ended(interrupted(call, at, error), may_have_happened=True)


def interrupting_within(draw: Draw, rule: str, known: dict[str, int]) -> Perform:
    """Calls are broken off somewhere in the bytecodes that calls of a rule are `known` to have; it
    learns them.
    """

    def perform(call: Call) -> Ending:
        at = draw(1, known.get(rule, 1000))
        shot = interrupted(call, at, ERRORS[at % len(ERRORS)])
        if not shot.fired:
            known[rule] = max(shot.steps, 20)
        return ended(shot, may_have_happened=True)

    return perform


def failing(at: int, after: bool) -> Perform:
    """An operation on tensors fails."""
    return lambda call: ended(faulted(call, at, after), may_have_happened=False)


def collecting_at(at: int, *, in_thread: bool) -> Perform:
    """The cyclic collector runs before a bytecode, in this thread or in another one."""
    threads: list[threading.Thread] = []

    def elsewhere() -> None:
        threads.append(threading.Thread(target=gc.collect))
        threads[-1].start()
        threads[-1].join(0.1)  # a finalizer may wait until a release that is under way is done

    def perform(call: Call) -> Ending:
        shot = meddled(call, at, elsewhere if in_thread else gc.collect)
        while threads:
            threads.pop().join()
        return ended(shot._replace(fired=False), may_have_happened=False)

    return perform


class Knot:
    """Holds a step and itself, so that the cyclic collector drops it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.itself = self


class Node:
    """Holds a sequence and itself, so that the cyclic collector frees it; and then releases the
    sequence.
    """

    def __init__(self, cache: PagedKVCache, seq: int) -> None:
        self.cache = cache
        self.seq = seq
        self.itself = self

    def __del__(self) -> None:
        self.cache.release([self.seq], missing_ok=True)


class Effect(NamedTuple):
    """What a call does: to a model, given the sequences that it made, which are so many."""

    change: Callable[[Model, list[int]], Model]
    made: int = 0
    refusals: tuple[type[PagedKVError], ...] = ()
    evicts: bool = False  # entries go first, where pages run out
    busy: tuple[int, ...] = ()  # sequences that stay then


def unchanged(model: Model, made: list[int]) -> Model:
    """Nothing happens."""
    return model


class Walk:
    """A cache, an index that it may ask for pages, open steps, and the model of all of them."""

    def __init__(self, draw: Draw) -> None:
        policy = POLICIES[draw(0, 2)]
        most = draw(1, 4) if draw(0, 1) else None
        pages = draw(2, 12)
        self.page_size = draw(1, 4)
        self.width = draw(1, 2)  # of values: 2 makes a plane of their own
        sizes: dict[str, Any] = {
            "layers": 1,
            "heads": 1,
            "head_size": 1,
            "value_head_size": self.width,
        }
        limit = pages * draw(1, 2)
        self.cache = PagedKVCache(
            **sizes, page_size=self.page_size, num_pages=pages, max_pages=limit
        )
        self.index = CacheIndex(self.cache, policy, most)
        self.cache.set_reclaimer(self.index)
        self.steps: dict[int, Step] = {}  # by name
        self.model = Model(policy, most)
        self.doomed: set[int] = set()  # sequences that a finalizer may release at any time
        self.fading: dict[int, weakref.ref[Step]] = {}  # steps that the collector may drop
        self.stained: set[int] = set()  # steps of which an update was broken off
        self.names = 0
        self.stale: list[int] = []
        self.token = 0
        self.perform: Perform = plainly
        self.broken = 0  # calls that were broken off

    # -- looking

    def see(self) -> Sight:
        """What the cache and its index show."""
        collecting = gc.isenabled()
        gc.disable()  # nothing is to end while one looks
        try:
            return self._see()
        finally:
            if collecting:
                gc.enable()

    def _see(self) -> Sight:
        records = self.cache.look(lambda tables: tables.items())
        index = self.index
        figures = self.cache.stats
        counts = index.stats
        return Sight(
            dict(zip([seq for seq, _ in records], self._windows(records))),
            dict(zip(index, index.handles())),
            {entry.key: entry.pins for entry in index.entries.alive()},
            index.victims(),
            (
                counts.queries,
                counts.hits,
                counts.misses,
                counts.evictions,
                counts.insertions,
                figures.forks,
                figures.appends,
            ),
            {name: self._rows(name, step) for name, step in self._known().items()},
            self.cache.open_steps,
        )

    def _known(self) -> dict[int, Step]:
        """The steps that are held, also those that the collector may drop."""
        fading = {name: step() for name, step in self.fading.items()}
        held = {**self.steps, **{name: step for name, step in fading.items() if step is not None}}
        return {name: step for name, step in held.items() if not step.closed}

    def _windows(self, records: list[Any]) -> Iterator[Seen]:
        gathered = self.cache.gather([seq for seq, _ in records])
        keys = gathered.keys[0, :, 0, :, 0]
        assert (gathered.values[0, :, 0] == -keys[..., None]).all()
        rows = zip(records, keys.tolist(), gathered.positions.tolist(), gathered.lengths.tolist())
        for (seq, record), tokens, positions, length in rows:
            parent = self.cache.parent(seq)
            yield Seen(tuple(tokens[:length]), tuple(positions[:length]), record[4], parent)

    def _rows(self, name: int, step: Step) -> list[tuple[float, ...]]:
        keys = step.keys(0)[:, 0, :, 0]
        assert (step.values(0)[:, 0] == -keys[..., None]).all()
        unused = [plane[..., step.size :, :] for plane in step.planes]
        assert name in self.stained or not any(part.any() for part in unused)
        return list(map(tuple, keys.tolist()))

    # -- acting

    def act(self, call: Call, effect: Effect) -> Ending:
        """Call, and see that what is found is one of the things that may be. That is the model from
        here on.
        """
        ending = self.perform(call)
        self.broken += ending.broken is not None
        found = self.see()
        made = [seq for seq in found.windows if seq not in self.model.windows]
        lost = {seq for seq in self.doomed if seq not in found.windows}
        self.doomed -= lost
        gone = self.fading.keys() - found.steps.keys()
        for name in gone:
            del self.fading[name]

        def collected(model: Model) -> Model:
            for name in gone:
                model = model.ended(name)
            return model.without(lost)

        base = collected(self.model)
        # what the collector comes upon within a verb is released at its end
        late = map(collected, self._possible(self.model, effect, made, ending))
        for model in chain(self._possible(base, effect, made, ending), late):
            if model.sight() == found:
                self.model = model
                self._check()
                return ending
        lines = [f"found {found}", f"ended {ending!r}", f"before {base.sight()}"]
        lines += [f"may be {model.sight()}" for model in self._possible(base, effect, made, ending)]
        raise AssertionError("\n".join(lines))

    def _check(self) -> None:
        self.cache.check()
        self.index.check()
        assert not self.cache.turns.tickets

    def _possible(
        self, base: Model, effect: Effect, made: list[int], ending: Ending
    ) -> Iterator[Model]:
        """What may be found after a call that ended so."""
        if ending.refused is not None:
            assert isinstance(ending.refused, effect.refusals), repr(ending.refused)
        finished = ending.refused is None and ending.broken is None
        order = base.order(effect.busy) if effect.evicts else []
        for count in range(len(order) + 1):
            model = base.evicted(order[:count])
            if not finished:
                yield model
            if len(made) == effect.made and (
                finished or (ending.broken and ending.may_have_happened)
            ):
                yield effect.change(model, made)

    def grow(self, draw: Draw) -> None:
        """See that there is something to work with."""
        self.perform = plainly
        if len(self.model.windows) - len(self.doomed) < 3:
            self.new(draw)
            self.append(draw)
        elif draw(0, 9) == 0:
            self.litter(draw)

    def litter(self, draw: Draw) -> None:
        """Leave a sequence, and perhaps an open step, to the cyclic collector."""
        if len(self.doomed) > 2:
            gc.collect()
        if self.steps and draw(0, 1):
            name = self.name(draw)
            Knot(self.steps[name])
            self.fading[name] = weakref.ref(self.steps.pop(name))
        before = set(self.model.windows)
        self.fork(draw)
        for seq in self.model.windows.keys() - before:
            self.doomed.add(seq)
            Node(self.cache, seq)

    def finish(self) -> None:
        """End everything: nothing may be left."""
        gc.collect()
        self.perform = plainly
        self.act(int, Effect(unchanged))
        for name in list(self.steps):
            self._end(name, ENDS[name % len(ENDS)])
        assert (self.cache.open_steps, self.model.steps) == (0, {})
        self.act(self.index.clear, Effect(cleared))
        seqs = self.cache.live()
        self.act(
            lambda: self.cache.release(seqs), Effect(lambda model, _: model.without(set(seqs)))
        )
        assert (self.cache.pages_in_use, self.cache.live_sequences, len(self.index)) == (0, 0, 0)

    # -- choosing

    def words(
        self, rows: int, count: int
    ) -> tuple[list[tuple[float, ...]], torch.Tensor, torch.Tensor]:
        """New tokens, as numbers, as keys and as values."""
        first = self.token
        self.token += rows * count
        tokens = torch.arange(first + 1, self.token + 1, dtype=torch.float32)
        keys = tokens.reshape(1, rows, 1, count, 1)
        numbers = [tuple(row) for row in keys[0, :, 0, :, 0].tolist()]
        return numbers, keys, -keys.expand(1, rows, 1, count, self.width)

    def some(
        self, draw: Draw, most: int, *, loose: bool = False, distinct: bool = False
    ) -> list[int]:
        """Some sequences; `loose` ones belong to no index."""
        owned = {item.seq for item in self.model.items.values()} if loose else set()
        choice = [seq for seq in self.model.windows if seq not in self.doomed and seq not in owned]
        chosen = [choice[draw(0, len(choice) - 1)] for _ in range(draw(1, most))] if choice else []
        return list(dict.fromkeys(chosen)) if distinct else chosen

    def room(self, wanted: int) -> int:
        """How many sequences may be made: the walk ends some when they are many."""
        return max(0, min(wanted, MOST - len(self.model.windows)))

    def per_row(self, draw: Draw, limits: list[int]) -> int | list[int]:
        """One count for all, or one a row."""
        if draw(0, 1):
            return draw(0, min(limits))
        return [draw(0, limit) for limit in limits]

    @staticmethod
    def one(seqs: list[int]) -> int:
        """The first, or 0, which is no sequence."""
        return seqs[0] if seqs else 0

    def lengths(self, seqs: list[int]) -> list[int]:
        """By the model."""
        return [len(self.model.windows[seq].tokens) for seq in seqs]

    def key(self, draw: Draw, *, pinned: bool | None = None) -> int | None:
        """A key that the index holds."""
        items = self.model.items.items()
        keys = [key for key, item in items if pinned is None or bool(item.pins) is pinned]
        return keys[draw(0, len(keys) - 1)] if keys else None

    # -- verbs of the cache

    def new(self, draw: Draw) -> None:
        """Empty sequences."""
        count = self.room(draw(0, 2))
        start = draw(0, self.page_size - 1)

        def change(model: Model, made: list[int]) -> Model:
            return model.born([0] * count, {seq: Window() for seq in made})

        self.act(lambda: self.cache.new(count, start=start), Effect(change, count))

    def fork(self, draw: Draw) -> None:
        """Children."""
        seqs = self.some(draw, 3)[: self.room(3)]
        if not seqs:
            return
        at = self.per_row(draw, self.lengths(seqs)) if draw(0, 1) else None
        ends = expand(at, len(seqs)) if at is not None else self.lengths(seqs)
        root = draw(0, 3) == 0

        def change(model: Model, made: list[int]) -> Model:
            parts = [model.windows[seq].part(0, end) for seq, end in zip(seqs, ends)]
            parents = [0] * len(seqs) if root else seqs
            return model.born(parents, dict(zip(made, parts))).counted(forks=len(seqs))

        self.act(lambda: self.cache.fork(seqs, at=at, root=root), Effect(change, len(seqs)))

    def append(self, draw: Draw) -> None:
        """Tokens at the end."""
        seqs = self.some(draw, 3, loose=True, distinct=True)
        if not seqs:
            return
        count = draw(0, 5)
        numbers, keys, values = self.words(len(seqs), count)
        places, placed = self.places(draw, len(seqs), count)

        def change(model: Model, made: list[int]) -> Model:
            rows = zip(seqs, numbers, places)
            grown = {seq: model.windows[seq].longer(new, at) for seq, new, at in rows}
            return model.having(grown).counted(appends=len(seqs))

        effect = Effect(change, 0, (OutOfPages,), True, tuple(seqs))
        self.act(lambda: self.cache.append(seqs, keys, values, placed), effect)

    def slide(self, draw: Draw) -> None:
        """Fewer tokens at the front."""
        self._shorten(
            draw, self.cache.slide, lambda window, drop: window.part(drop, len(window.tokens))
        )

    def truncate(self, draw: Draw) -> None:
        """Fewer tokens at the end."""
        self._shorten(
            draw,
            self.cache.truncate,
            lambda window, drop: window.part(0, len(window.tokens) - drop),
        )

    def _shorten(self, draw: Draw, verb: Any, cut: Callable[[Window, int], Window]) -> None:
        seqs = self.some(draw, 3, loose=True, distinct=True)
        if not seqs:
            return
        drop = self.per_row(draw, self.lengths(seqs))

        def change(model: Model, made: list[int]) -> Model:
            rows = zip(seqs, expand(drop, len(seqs)))
            return model.having({seq: cut(model.windows[seq], each) for seq, each in rows})

        self.act(lambda: verb(seqs, drop), Effect(change))

    def release(self, draw: Draw) -> None:
        """Some end; perhaps some had ended before."""
        seqs = self.some(draw, 3, loose=True, distinct=True)
        missing = bool(draw(0, 1))
        named = seqs + self.stale[-2:] if missing else seqs
        ending = self.act(
            lambda: self.cache.release(named, missing_ok=missing),
            Effect(lambda model, _: model.without(set(seqs))),
        )
        if ending.broken is None:
            self.stale += seqs

    def release_subtree(self, draw: Draw) -> None:
        """One ends, with all that descend from it."""
        seq = self.one(self.some(draw, 1))
        if seq:
            effect = Effect(lambda model, _: model.without(model.subtree(seq)), 0, (PinnedEntry,))
            self.act(lambda: self.cache.release_subtree(seq), effect)

    def promote(self, draw: Draw) -> None:
        """The siblings of one end."""
        seq = self.one(self.some(draw, 1))
        if seq:
            effect = Effect(lambda model, _: model.promoted(seq), 0, (PinnedEntry,))
            self.act(lambda: self.cache.promote(seq), effect)

    def gather(self, draw: Draw) -> None:
        """What some hold, side by side."""
        seqs = self.some(draw, 4)
        pad = "left" if draw(0, 1) else "right"
        reuse = bool(draw(0, 1))
        ending = self.act(
            lambda: self.cache.gather(seqs, pad=pad, reuse=reuse).keys, Effect(unchanged)
        )
        if isinstance(ending.result, torch.Tensor):
            rows = ending.result[0, :, 0, :, 0].tolist()
            windows = [self.model.windows[seq] for seq in seqs]
            assert [tuple(row) for row in rows] == padded(windows, pad == "left")

    def scope(self, draw: Draw) -> None:
        """What was made in a block ends with it."""
        scope = self.cache.scope()
        before = set(self.model.windows)
        self.new(draw)
        self.fork(draw)
        made = self.model.windows.keys() - before
        self.act(scope.close, Effect(lambda model, _: model.without(set(made))))

    def trim(self, draw: Draw) -> None:
        """Memory that nothing uses is given back."""
        self.act(self.cache.trim, Effect(unchanged))
        assert self.perform is not plainly or self.cache.pages_free in (0, 1)

    # -- steps

    def name(self, draw: Draw) -> int:
        """Of an open step; 0 where there is none."""
        names = list(self.steps)
        return names[draw(0, len(names) - 1)] if names else 0

    def open(self, draw: Draw) -> None:
        """Windows side by side, with room. Where many are open, one ends."""
        if len(self.steps) >= STEPS:
            self.end(draw)
        seqs = self.some(draw, 3)
        if not seqs:
            return
        room = draw(0, 4)
        pad = "right" if draw(0, 3) == 0 else "left"
        self.names += 1
        name = self.names
        windows = tuple(self.model.windows[seq] for seq in seqs)
        step = Opened(tuple(seqs), windows, ((),) * len(seqs), pad == "left")

        def call() -> None:
            self.steps[name] = self.cache.open(seqs, room, pad=pad)

        def change(model: Model, made: list[int]) -> Model:
            return model.opened(name, step)

        self.act(call, Effect(change, 0, (OutOfPages,), True, tuple(seqs)))

    def update(self, draw: Draw) -> None:
        """New tokens for each row of a step."""
        name = self.name(draw)
        if not name:
            return
        step = self.steps[name]
        left = step.room + step.past - step.size
        numbers, keys, values = self.words(len(step.parents), draw(0, left))

        def change(model: Model, made: list[int]) -> Model:
            opened = model.steps[name]
            rows = tuple(row + new for row, new in zip(opened.new, numbers))
            return model.opened(name, opened._replace(new=rows))

        def call() -> None:
            self.stained.add(name)
            step.update(0, keys[0], values[0])
            self.stained.discard(name)

        self.act(call, Effect(change))

    def nudge(self, draw: Draw) -> None:
        """New tokens of a step are changed where they lie."""
        name = self.name(draw)
        if not name:
            return
        step = self.steps[name]
        ending = self.act(lambda: step.columns(step.past, step.size), Effect(unchanged))
        if not isinstance(ending.result, list):
            return
        with torch.no_grad():
            for tensor, sign in zip(keys_values(ending.result), (1, -1)):
                tensor += sign * MORE
        opened = self.model.steps[name]
        rows = tuple(tuple(token + MORE for token in row) for row in opened.new)
        self.model = self.model.opened(name, opened._replace(new=rows))
        assert self.model.sight() == self.see()

    def commit(self, draw: Draw) -> None:
        """The new tokens are stored in children of what was opened."""
        name = self.name(draw)
        if not name or self.room(3) < 3:
            return
        step = self.steps[name]
        slide = self.per_row(draw, step.lengths)
        drops = expand(slide, len(step.parents))
        places, placed = self.places(draw, len(step.parents), step.size - step.past)

        def call() -> object:
            made = step.commit(slide=slide, positions=placed)
            self.steps.pop(name)
            return made

        def change(model: Model, made: list[int]) -> Model:
            opened = model.steps[name]
            grown = [
                window.longer(new, at)
                for window, new, at in zip(opened.windows, opened.new, places)
            ]
            cut = [window.part(drop, len(window.tokens)) for window, drop in zip(grown, drops)]
            model = model.born(list(opened.parents), dict(zip(made, cut)))
            return model.ended(name).counted(forks=len(made), appends=len(made))

        self.act(call, Effect(change, len(step.parents)))
        if step.closed:
            self.steps.pop(name, None)  # also where that was broken off

    def end(self, draw: Draw) -> None:
        """A step is given up in one of the ways there are."""
        name = self.name(draw)
        if name:
            self._end(name, ENDS[draw(0, len(ENDS) - 1)])

    def _end(self, name: int, way: Callable[[dict[int, Step], int], None]) -> None:
        self.act(partial(way, self.steps, name), Effect(lambda model, _: model.ended(name)))
        if name in self.steps and self.steps[name].closed:
            del self.steps[name]

    def simulate(self, draw: Draw) -> None:
        """What a search does at every move: a step is opened, grows, and is committed."""
        self.open(draw)
        self.update(draw)
        self.commit(draw)

    def places(
        self, draw: Draw, rows: int, count: int
    ) -> tuple[list[tuple[int, ...] | None], torch.Tensor | None]:
        """Positions of new tokens, row by row and as a tensor; or none."""
        if draw(0, 1):
            return [None] * rows, None
        chosen = [tuple(draw(0, 50) for _ in range(count)) for _ in range(rows)]
        return list(chosen), torch.tensor(chosen, dtype=torch.int64).reshape(rows, count)

    # -- the index

    def put(self, draw: Draw) -> None:
        """A sequence under a key, or the one that is there once more."""
        key = draw(0, KEYS - 1)
        item = self.model.items.get(key)
        seq = self.one(self.some(draw, 1, loose=True))
        if item is not None and (draw(0, 2) == 0 or not seq):
            seq = item.seq
        priority = draw(-2, 2)
        if seq:
            effect = Effect(lambda model, _: model.put(key, seq, priority), 0, (CapacityExceeded,))
            self.act(lambda: self.index.put(key, seq, priority), effect)

    def put_batch(self, draw: Draw) -> None:
        """Several at once."""
        seqs = self.some(draw, 3, loose=True, distinct=True)
        first = draw(0, KEYS - 1)
        keys = [(first + number) % KEYS for number in range(len(seqs))]

        def change(model: Model, made: list[int]) -> Model:
            for key, seq in zip(keys, seqs):
                model = model.put(key, seq, 0)
            return model

        self.act(lambda: self.index.put_batch(keys, seqs), Effect(change, 0, (CapacityExceeded,)))

    def get(self, draw: Draw) -> None:
        """A query."""
        key = draw(0, KEYS - 1)
        ending = self.act(lambda: self.index.get(key), Effect(lambda model, _: model.asked(key)))
        if ending.broken is None:
            item = self.model.items.get(key)
            assert ending.result == (None if item is None else item.seq)

    def remove(self, draw: Draw) -> None:
        """An entry ends."""
        key = self.key(draw, pinned=False)
        if key is not None:
            seqs = {self.model.items[key].seq}
            self.act(lambda: self.index.remove(key), Effect(lambda model, _: model.without(seqs)))

    def clear(self, draw: Draw) -> None:
        """All entries end; not too often."""
        if draw(0, 4) == 0:
            self.act(self.index.clear, Effect(cleared))

    def pin(self, draw: Draw) -> None:
        """An entry is held."""
        key = self.key(draw)
        if key is not None:
            self.act(lambda: self.index.pin(key), Effect(lambda model, _: model.pinned(key, 1)))

    def unpin(self, draw: Draw) -> None:
        """An entry is held once less."""
        key = self.key(draw, pinned=True)
        if key is not None:
            self.act(lambda: self.index.unpin(key), Effect(lambda model, _: model.pinned(key, -1)))

    def reclaim(self, draw: Draw) -> None:
        """Entries go for pages."""
        need = draw(0, 4)
        before = self.model.counts
        ending = self.act(lambda: self.index.reclaim(need), Effect(unchanged, evicts=True))
        assert ending.result is not False or self.model.counts == before


RULES = (
    "new",
    "fork",
    "append",
    "slide",
    "truncate",
    "release",
    "release_subtree",
    "promote",
    "gather",
    "scope",
    "open",
    "update",
    "commit",
    "simulate",
    "nudge",
    "end",
    "trim",
    "put",
    "put_batch",
    "get",
    "remove",
    "clear",
    "pin",
    "unpin",
    "reclaim",
)


def cleared(model: Model, made: list[int]) -> Model:
    """Without entries."""
    return model.without({item.seq for item in model.items.values()})


def expand(count: int | list[int], rows: int) -> list[int]:
    """One count a row."""
    return [count] * rows if isinstance(count, int) else count


def padded(windows: list[Window], left: bool) -> list[tuple[float, ...]]:
    """Tokens side by side, with zeros on one side."""
    rows = [window.tokens for window in windows]
    width = max(map(len, rows), default=0)
    gaps = [(0.0,) * (width - len(row)) for row in rows]
    return [gap + row if left else row + gap for row, gap in zip(rows, gaps)]


def keys_values(planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Keys and values of a dense batch, which may be parts of one plane."""
    return [planes[0][0::2], planes[0][1::2]] if len(planes) == 1 else planes


# -- how a step is given up


def close(steps: dict[int, Step], name: int) -> None:
    """It is closed."""
    steps[name].close()


def drop(steps: dict[int, Step], name: int) -> None:
    """Nobody holds it any more."""
    del steps[name]


def leave(steps: dict[int, Step], name: int) -> None:
    """Its block ends."""
    with steps[name]:
        pass


ENDS: tuple[Callable[[dict[int, Step], int], None], ...] = (close, drop, leave)
