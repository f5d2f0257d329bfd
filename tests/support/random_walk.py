"""Random verbs over a tiny cache, beside a dense model; any of them may be broken off, or meddled
with.

Whatever happens within a call, what is found afterwards is what the model says was there before it,
or what it says is there after it; where pages run out, entries of the index may have been evicted
first, whole ones and in order.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from interrupts import ERRORS, Shot, faulted, interrupted, meddled

from paged_kv import (
    CapacityExceeded,
    OutOfPages,
    PagedKVCache,
    PagedKVError,
    ParentChanged,
    PinnedEntry,
    StagingBatch,
    StaleHandle,
)
from paged_kv.index import CacheIndex

Draw = Callable[[int, int], int]  # a whole number, both ends included
Call = Callable[[], object]
POLICIES = ("fifo", "lru", "priority")
KEYS = 5
MOST = 10  # sequences that are not doomed, about
LESS = 0.5


class Window(NamedTuple):
    """A sequence. Every token is a number that no other token has."""

    tokens: tuple[float, ...]
    positions: tuple[int, ...]
    parent: int

    def part(self, first: int, end: int) -> Window:
        """Some of its tokens."""
        return self._replace(tokens=self.tokens[first:end], positions=self.positions[first:end])


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
    """All that a cache and its index show, and a batch."""

    windows: dict[int, Window]
    items: dict[Any, int]
    pins: dict[Any, int]
    order: list[Any]
    counts: tuple[int, ...]  # queries, hits, misses, evictions, insertions; forks, appends
    batch: list[tuple[float, ...]] | None  # None: closed


@dataclass(frozen=True)
class Model:
    """What there should be. Nothing in it is changed; `windows` is in the order of birth."""

    policy: str
    most: int | None
    windows: dict[int, Window] = field(default_factory=dict)
    items: dict[Any, Item] = field(default_factory=dict)
    counts: tuple[int, ...] = (0,) * 7
    clock: int = 0
    parents: tuple[int, ...] = ()  # of the batch
    past: int = 0  # columns of the batch that were filled when it was opened
    rows: tuple[tuple[float, ...], ...] | None = (
        None  # of the batch, padding included; None: closed
    )

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

    def subtree(self, seq: int) -> set[int]:
        """A sequence and all that descend from it over sequences that exist."""
        found = {seq}
        for child, window in self.windows.items():  # parents are older than their children
            if window.parent in found:
                found.add(child)
        return found

    # -- the index

    def order(self, busy: tuple[int, ...] = ()) -> list[Any]:
        """Keys, the first to evict first."""
        free = [
            (key, item)
            for key, item in self.items.items()
            if not item.pins and item.seq not in busy
        ]
        return [key for key, _ in sorted(free, key=lambda pair: ORDERS[self.policy](pair[1]))]

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
        rows = None if self.rows is None else list(self.rows)
        return Sight(self.windows, items, pins, self.order(), self.counts, rows)


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
    collect = collect_elsewhere if in_thread else gc.collect

    def perform(call: Call) -> Ending:
        shot = meddled(call, at, collect)
        return ended(shot._replace(fired=False), may_have_happened=False)

    return perform


def collect_elsewhere() -> None:
    """Another thread runs the cyclic collector."""
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join(0.1)  # a finalizer may wait until a release that is under way is done


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
    closes: bool = False  # the batch, whatever happens then


def unchanged(model: Model, made: list[int]) -> Model:
    """Nothing happens."""
    return model


class Walk:
    """A cache, an index that it may ask for pages, a batch, and the model of all of them."""

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
        self.batch: StagingBatch | None = None
        self.model = Model(policy, most)
        self.doomed: set[int] = set()  # sequences that a finalizer may release at any time
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
            {entry.key: entry.pins for entry in index._alive()},
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
            self._rows(),
        )

    def _windows(self, records: list[Any]) -> Iterator[Window]:
        gathered = self.cache.gather([seq for seq, _ in records])
        keys = gathered.keys[0, :, 0, :, 0]
        assert (gathered.values[0, :, 0] == -keys[..., None]).all()
        rows = zip(records, keys.tolist(), gathered.positions.tolist(), gathered.lengths.tolist())
        for (_, (_, _, _, parent)), tokens, positions, length in rows:
            yield Window(tuple(tokens[:length]), tuple(positions[:length]), parent)

    def _rows(self) -> list[tuple[float, ...]] | None:
        batch = self.batch
        if batch is None or batch.closed:
            return None
        keys = batch.keys(0)[:, 0, :, 0]
        assert (batch.values(0)[:, 0] == -keys[..., None]).all()
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
        base = self.model.without(lost)
        for model in self._possible(base, effect, made, ending):
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
                if effect.closes:
                    yield replace(model, rows=None)
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
        """Leave a sequence to the cyclic collector."""
        if len(self.doomed) > 2:
            gc.collect()
        before = set(self.model.windows)
        self.fork(draw)
        for seq in self.model.windows.keys() - before:
            self.doomed.add(seq)
            Node(self.cache, seq)

    def finish(self) -> None:
        """End everything: nothing may be left."""
        gc.collect()
        self.perform = plainly
        self.batch = None
        self.model = replace(self.model, rows=None)
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
            return model.having({seq: Window((), (), 0) for seq in made})

        self.act(lambda: self.cache.new(count, start=start), Effect(change, count))

    def fork(self, draw: Draw) -> None:
        """Children."""
        seqs = self.some(draw, 3)[: self.room(3)]
        if not seqs:
            return
        at = self.per_row(draw, self.lengths(seqs)) if draw(0, 1) else None
        ends = expand(at, len(seqs)) if at is not None else self.lengths(seqs)

        def change(model: Model, made: list[int]) -> Model:
            parts = [
                model.windows[seq].part(0, end)._replace(parent=seq) for seq, end in zip(seqs, ends)
            ]
            return model.having(dict(zip(made, parts))).counted(forks=len(seqs))

        self.act(lambda: self.cache.fork(seqs, at=at), Effect(change, len(seqs)))

    def append(self, draw: Draw) -> None:
        """Tokens at the end."""
        seqs = self.some(draw, 3, loose=True, distinct=True)
        if not seqs:
            return
        count = draw(0, 5)
        numbers, keys, values = self.words(len(seqs), count)
        placed = None
        places = [tuple(range(length, length + count)) for length in self.lengths(seqs)]
        if draw(0, 1):
            places = [tuple(draw(0, 50) for _ in range(count)) for _ in seqs]
            placed = torch.tensor(places, dtype=torch.int64).reshape(len(seqs), count)

        def change(model: Model, made: list[int]) -> Model:
            rows = zip(seqs, numbers, places)
            grown = {seq: longer(model.windows[seq], new, at) for seq, new, at in rows}
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
            effect = Effect(lambda model, _: promoted(model, seq), 0, (PinnedEntry,))
            self.act(lambda: self.cache.promote(seq), effect)

    def gather(self, draw: Draw) -> None:
        """What some hold, side by side."""
        seqs = self.some(draw, 4)
        pad = "left" if draw(0, 1) else "right"
        ending = self.act(lambda: self.cache.gather(seqs, pad=pad).keys.clone(), Effect(unchanged))
        if isinstance(ending.result, torch.Tensor):
            rows = ending.result[0, :, 0, :, 0].tolist()
            assert [tuple(row) for row in rows] == padded(self.model, seqs, pad == "left")

    def scope(self, draw: Draw) -> None:
        """What was made in a block ends with it."""
        scope = self.cache.scope()
        before = set(self.model.windows)
        self.new(draw)
        self.fork(draw)
        made = self.model.windows.keys() - before
        self.act(scope.close, Effect(lambda model, _: model.without(set(made))))

    # -- a batch

    def open(self, draw: Draw) -> None:
        """Windows side by side, with room."""
        seqs = self.some(draw, 3)
        if not seqs:
            return
        room = draw(0, 4)
        pad = "right" if draw(0, 3) == 0 else "left"
        ending = self.act(
            lambda: self.cache.open(seqs, room, pad=pad),
            Effect(lambda model, _: replace(model, rows=None), closes=True),
        )
        if isinstance(ending.result, StagingBatch):
            self.batch = ending.result
            rows = tuple(padded(self.model, seqs, pad == "left"))
            self.model = replace(self.model, parents=tuple(seqs), past=len(rows[0]), rows=rows)
            assert self._rows() == list(rows)

    def update(self, draw: Draw) -> None:
        """New tokens for each row."""
        batch = self.batch
        if batch is None or batch.closed:
            return
        numbers, keys, values = self.words(
            len(batch.parents), draw(0, batch.room + batch.past - batch.size)
        )

        def change(model: Model, made: list[int]) -> Model:
            return replace(
                model, rows=tuple(row + new for row, new in zip(model.rows or (), numbers))
            )

        self.act(lambda: batch.update(0, keys[0], values[0]), Effect(change))

    def commit(self, draw: Draw) -> None:
        """The new tokens are stored in children."""
        batch = self.batch
        if batch is None or batch.closed or self.room(3) < 3:
            return
        alive = [seq for seq in batch.parents if seq in self.model.windows]
        lengths = self.lengths(list(alive))
        slide = self.per_row(draw, lengths) if alive == list(batch.parents) else 0
        drops = expand(slide, len(batch.parents))
        anew = batch.left and draw(0, 3) == 0
        first = [draw(pad, batch.size) if anew and draw(0, 1) else None for pad in batch.pads]
        less = None if any(column is not None for column in first) or draw(0, 1) else self.less()

        def change(model: Model, made: list[int]) -> Model:
            rows = zip(batch.parents, model.rows or (), drops, first)
            children = [child(model, *row, 0.0 if less is None else LESS) for row in rows]
            model = model.having(dict(zip(made, children))).counted(
                forks=len(made), appends=len(made)
            )
            return replace(model, rows=None)

        refusals = OutOfPages, ParentChanged, StaleHandle
        effect = Effect(change, len(batch.parents), refusals, True, tuple(batch.parents))
        self.act(lambda: batch.commit(slide=slide, rewrite=first, less=less), effect)

    def simulate(self, draw: Draw) -> None:
        """What a search does at every step: a batch is opened, grows, and is committed."""
        self.open(draw)
        self.update(draw)
        self.commit(draw)

    def less(self) -> list[torch.Tensor]:
        """Tensors that make keys smaller and values larger by `LESS`."""
        if self.width == 1:
            return [torch.tensor([LESS, -LESS]).reshape(2, 1, 1, 1, 1)]
        return [torch.full((1, 1, 1, 1, 1), LESS), torch.full((1, 1, 1, 1, 1), -LESS)]

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


def promoted(model: Model, seq: int) -> Model:
    """Without the siblings of a sequence, and what descends from them."""
    parent = model.windows[seq].parent
    siblings = [
        each for each, window in model.windows.items() if window.parent == parent and each != seq
    ]
    doomed: set[int] = set()
    for sibling in siblings if parent else ():
        doomed |= model.subtree(sibling)
    return model.without(doomed)


def expand(count: int | list[int], rows: int) -> list[int]:
    """One count a row."""
    return [count] * rows if isinstance(count, int) else count


def longer(window: Window, tokens: tuple[float, ...], positions: tuple[int, ...]) -> Window:
    """With tokens at the end."""
    return window._replace(tokens=window.tokens + tokens, positions=window.positions + positions)


def padded(model: Model, seqs: list[int], left: bool) -> list[tuple[float, ...]]:
    """Tokens side by side, with zeros on one side."""
    rows = [model.windows[seq].tokens for seq in seqs]
    width = max(map(len, rows), default=0)
    gaps = [(0.0,) * (width - len(row)) for row in rows]
    return [gap + row if left else row + gap for row, gap in zip(rows, gaps)]


def child(
    model: Model, parent: int, row: tuple[float, ...], drop: int, first: int | None, less: float
) -> Window:
    """What a commit makes of one row of a batch."""
    if first is not None:
        return Window(row[first:], tuple(range(len(row) - first)), parent)
    window = model.windows[parent]
    new = tuple(token - less for token in row[model.past :])
    length = len(window.tokens)
    grown = longer(window, new, tuple(range(length, length + len(new))))
    return grown.part(drop, len(grown.tokens))._replace(parent=parent)
