"""Trees whose nodes release their contexts when the cyclic collector finds them, at whatever moment
that is.

Parents and children know each other, so every branch that is cut off is a cycle. Beside it a second
thread may collect, a timer may interrupt with a handler that releases and calls verbs, and a policy
releases and reads from its hooks.
"""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from paged_kv import LRU, CacheIndex, PagedKVCache, Step
from paged_kv.errors import ConcurrentCall, NestedCall, OutOfPages
from paged_kv.eviction import EntryView

PAGES = 48
MOST = 24  # nodes that are held
LONG = 12  # tokens of a node that gets no grandchildren
LOOK = 64  # turns between two looks at everything


class Node:
    """A node of a tree. It alone owns its sequence, and a step that may be open."""

    def __init__(
        self, garden: Garden, seq: int, tokens: tuple[float, ...], parent: Node | None
    ) -> None:
        self.cache = garden.cache
        self.counts = garden.counts
        self.seq = seq
        self.tokens = tokens
        self.parent = parent
        self.children: list[Node] = []
        self.opened: tuple[Step, tuple[float, ...]] | None = None  # and what its child will hold
        if parent is not None:
            parent.children.append(self)

    def __del__(self) -> None:
        self.counts["finalized"] += 1
        self.cache.release([self.seq])


class Nosy(LRU):
    """A policy whose hooks release a sequence and read."""

    def __init__(self, garden: Garden) -> None:
        super().__init__()
        self.garden = garden

    def on_add(self, entry: EntryView) -> None:
        self.garden.look_around()
        super().on_add(entry)

    def on_hit(self, entry: EntryView) -> None:
        self.garden.look_around()
        super().on_hit(entry)

    def on_remove(self, entry: EntryView) -> None:
        self.garden.look_around()
        super().on_remove(entry)


class Garden:
    """The program. Each turn calls a few verbs and compares contents with what the nodes know."""

    def __init__(self, seed: int, errors: list[object]) -> None:
        self.random = random.Random(seed)
        self.errors = errors  # that nobody could catch
        self.counts: Counter[str] = Counter()
        sizes: dict[str, Any] = {"layers": 1, "heads": 1, "head_size": 1, "page_size": 2}
        self.cache = PagedKVCache(**sizes, num_pages=8, max_pages=PAGES)
        self.index = CacheIndex(self.cache, partial(Nosy, self), 4)
        self.cache.set_reclaimer(self.index)
        self.contents: dict[int, tuple[float, ...]] = {}  # of the entries, by key
        self.spares: list[int] = []  # sequences that hooks and handlers may release
        self.token = 0.0
        self.plant()

    # -- what happens at any time

    def look_around(self) -> None:
        """What a hook does."""
        self.drop_spare("by hooks")
        assert len(self.cache.live()) == self.cache.live_sequences

    def handle(self, *told: object) -> None:
        """What a signal handler does."""
        self.drop_spare("by handlers")
        try:
            self.cache.release(self.cache.new(1))
        except (NestedCall, ConcurrentCall):
            self.counts["refused"] += 1

    def drop_spare(self, why: str) -> None:
        """Release a sequence that nobody needs."""
        with suppress(IndexError):
            seq = self.spares.pop()
            self.cache.release([seq])
            self.counts[why] += 1

    # -- turns

    def turn(self) -> None:
        """One turn."""
        self.counts["turns"] += 1
        acts = (
            self.grow,
            self.grow,
            self.grow,
            self.simulate,
            self.begin,
            self.begin,
            self.end,
            self.cut,
            self.cut,
            self.put,
            self.get,
            self.prepare,
        )
        with suppress(OutOfPages):
            self.random.choice(acts)()
            return
        self.counts["full"] += 1
        del self.root
        while self.spares:
            self.drop_spare("for pages")
        while not hasattr(self, "root"):
            gc.collect()  # does nothing where the other thread is at it
            with suppress(OutOfPages):
                self.plant()

    def turns(self, count: int) -> None:
        """Many turns."""
        for number in range(count):
            self.turn()
            if number % LOOK == 0:
                self.look()

    def plant(self) -> None:
        """A new tree; the old one is left to the collector."""
        (seq,) = self.cache.new(1)
        root = Node(self, seq, (), None)
        self.write([root], [self.tokens(3)])
        self.root = root

    def tokens(self, count: int) -> tuple[float, ...]:
        """New tokens: no two are alike, as long as numbers of 24 bits last."""
        first = self.token
        self.token = (self.token + count) % (1 << 24)
        return tuple(float((first + number) % (1 << 24)) for number in range(count))

    def write(self, nodes: list[Node], rows: list[tuple[float, ...]]) -> None:
        """Append tokens to nodes, and see that they are there."""
        keys = torch.tensor(rows).reshape(1, len(rows), 1, len(rows[0]), 1)
        self.cache.append([node.seq for node in nodes], keys, -keys)
        for node, row in zip(nodes, rows):
            node.tokens += row
        self.compare([(node.seq, node.tokens) for node in nodes])

    def compare(self, windows: list[tuple[int, tuple[float, ...]]]) -> None:
        """Sequences hold what they should."""
        gathered = self.cache.gather([seq for seq, _ in windows])
        assert torch.equal(gathered.values, -gathered.keys)
        rows = zip(gathered.keys[0, :, 0, :, 0].tolist(), gathered.lengths.tolist())
        assert [tuple(row[:length]) for row, length in rows] == [tokens for _, tokens in windows]

    def nodes(self) -> list[Node]:
        """All that are held."""
        found = [self.root]
        for node in found:  # grows while it is walked
            found += node.children
        return found

    def some(self) -> Node:
        """Any of them, reached from the root."""
        node = self.root
        while node.children and len(node.tokens) < LONG and self.random.random() < 0.7:
            node = self.random.choice(node.children)
        return node

    def grow(self) -> None:
        """Children with tokens of their own."""
        parent = self.some()
        count = self.random.randint(1, 2)
        seqs = self.cache.fork([parent.seq] * count)
        children = [Node(self, seq, parent.tokens, parent) for seq in seqs]
        length = self.random.randint(1, 3)
        self.write(children, [self.tokens(length) for _ in children])
        if len(self.nodes()) > MOST:
            self.cut()

    def simulate(self) -> None:
        """Children by a step."""
        parent = self.some()
        step = self.cache.open([parent.seq] * 2, 2)
        rows = [self.tokens(2), self.tokens(2)]
        keys = torch.tensor(rows).reshape(2, 1, 2, 1)
        step.update(0, keys, -keys)
        seqs = step.commit()
        children = [Node(self, seq, parent.tokens + row, parent) for seq, row in zip(seqs, rows)]
        self.compare([(node.seq, node.tokens) for node in children])

    def begin(self) -> None:
        """A step that stays open; the collector drops it with its node, or the next one does."""
        node = self.some()
        step = self.cache.open([node.seq], 2)
        row = self.tokens(1)
        keys = torch.tensor(row).reshape(1, 1, 1, 1)
        step.update(0, keys, -keys)
        self.counts["dropped"] += node.opened is not None
        node.opened = step, node.tokens + row

    def end(self) -> None:
        """A step that stayed open is committed, of which the parent may be longer by now."""
        for node in self.nodes():
            if node.opened is not None:
                step, tokens = node.opened
                node.opened = None
                (seq,) = step.commit()
                child = Node(self, seq, tokens, node)
                self.compare([(child.seq, child.tokens)])
                self.counts["committed"] += 1
                return

    def cut(self) -> None:
        """A branch is left to the collector."""
        node = self.some()
        if node.children:
            node.children.pop(self.random.randrange(len(node.children)))

    def put(self) -> None:
        """A context into the index, with one that may be released meanwhile."""
        node = self.some()
        key = self.random.randrange(8)
        seq, spare = self.cache.fork([node.seq, node.seq])
        self.spares.append(spare)
        self.index.put(key, seq)
        self.contents[key] = node.tokens

    def get(self) -> None:
        """A context from the index."""
        key = self.random.randrange(8)
        seq = self.index.get(key)
        if seq is not None:
            self.compare([(seq, self.contents[key])])

    def prepare(self) -> None:
        """More that may be released."""
        if len(self.spares) < 4:
            self.spares += self.cache.fork([self.root.seq] * 2)

    def look(self) -> None:
        """Everything is in order."""
        self.compare([(node.seq, node.tokens) for node in self.nodes()])
        self.cache.check()
        self.index.check()
        assert not self.errors, self.errors

    def finish(self) -> None:
        """Everything ends: nothing may be left."""
        self.look()
        with suppress(AttributeError):
            del self.root
        gc.collect()
        self.index.clear()
        while self.spares:
            self.drop_spare("at the end")
        self.counts["put off"] = next(self.cache.turns._numbers)
        assert not self.cache.turns.tickets
        assert self.cache.open_steps == 0
        assert (self.cache.live(), self.cache.pages_in_use) == ([], 0)
        self.cache.check()
        assert not self.errors, self.errors


class Weather(NamedTuple):
    """What goes on around a garden."""

    threshold: int = 700  # allocations between two runs of the collector
    thread: bool = False  # a second thread collects all the time
    timer: float = 0.0  # seconds between two signals


def run(seed: int, turns: int, weather: Weather) -> Counter[str]:
    """Some turns in such a weather. Raises AssertionError where a promise is broken."""
    errors: list[object] = []
    with heard(errors), collecting(weather.threshold):
        garden = Garden(seed, errors)
        with ExitStack() as stack:
            if weather.thread:
                stack.enter_context(collector_thread())
            if weather.timer:
                stack.enter_context(ticking(garden.handle, weather.timer))
            garden.turns(turns)
        garden.finish()
        return garden.counts


@contextmanager
def heard(errors: list[object]) -> Iterator[None]:
    """Errors that nobody can catch are noted."""
    previous = sys.unraisablehook

    def note(told: Any) -> None:
        errors.append(told.exc_value)

    sys.unraisablehook = note
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextmanager
def collecting(threshold: int) -> Iterator[None]:
    """The collector runs after so many allocations. What was there before is left out: else it
    takes long.
    """
    previous = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(threshold, *previous[1:])
    try:
        yield
    finally:
        gc.set_threshold(*previous)
        gc.unfreeze()


@contextmanager
def collector_thread() -> Iterator[None]:
    """A second thread that collects all the time."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            gc.collect()
            time.sleep(0.0002)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(switch)


@contextmanager
def ticking(handler: Any, seconds: float) -> Iterator[None]:
    """A timer that interrupts the main thread."""
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
