"""Every verb of a cache, of its indexes and of a manager, in a tiny world whose tokens are letters.

A scenario says what sequences hold before and after its call, so the words in here are the dense
model. All else that can be seen of a world is compared with a world in which nothing was broken
off.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from paged_kv import CacheIndex, Gathered, KVCacheManager, PagedKVCache, PagedStep, Scope, Step
from paged_kv.bundles.bundle import Bundle
from paged_kv.events import Event
from paged_kv.eviction import LRU, EntryView
from paged_kv.pages.books import Books
from paged_kv.pages.change import Record
from paged_kv.stats import CacheStats, IndexStats

SHAPE: dict[str, Any] = {"layers": 1, "heads": 1, "head_size": 1, "page_size": 2}


@lru_cache
def tokens(*words: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one word a row. Nobody may change them."""
    rows = [[float(ord(letter)) for letter in word] for word in words]
    keys = torch.tensor(rows).reshape(1, len(words), 1, len(words[0]), 1)
    return keys, -keys


def words(gathered: Gathered) -> list[str]:
    """What sequences hold."""
    keys = gathered.keys.flatten(1).reshape(gathered.mask.shape)
    assert torch.equal(gathered.values, -gathered.keys)
    rows = zip(keys.tolist(), gathered.lengths.tolist())
    return ["".join(chr(int(key)) for key in row[:length]) for row, length in rows]


class IndexState(NamedTuple):
    """All that can be seen of an index. Sequences are places among the live ones."""

    entries: dict[Hashable, int]
    pinned: tuple[Hashable, ...]
    order: tuple[Hashable, ...]
    stats: IndexStats
    length: int
    bytes: int
    pinned_pages: int
    second: int


class State(NamedTuple):
    """All that can be seen of a world. Sequences are places among the live ones, pages are numbered
    as they are met.
    """

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    parents: tuple[int | None, ...]
    tables: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    used: int
    free: int
    stats: CacheStats
    indexes: tuple[IndexState, ...]
    steps: tuple[tuple[Any, ...], ...]
    open: int
    kept: tuple[int, ...]
    listeners: int
    reclaimer: str


class World:
    """A cache, what lies over it, and names for its sequences."""

    def __init__(self, num_pages: int = 12, max_pages: int | None = 12, page_size: int = 2) -> None:
        sizes = {**SHAPE, "page_size": page_size}
        self.cache = PagedKVCache(**sizes, num_pages=num_pages, max_pages=max_pages)
        self._indexes: list[CacheIndex] = []
        self.seqs: dict[str, int] = {}
        self.steps: list[Step] = []
        self.paged_steps: list[PagedStep] = []
        self.scope: Scope | None = None
        self.manager: KVCacheManager | None = None
        self.bundle: Bundle | None = None

    # -- to prepare a scenario

    def root(self, name: str, word: str = "", start: int = 0) -> int:
        """A sequence that holds a word."""
        (seq,) = self.cache.new(1, start=start)
        return self._named(name, seq, word)

    def child(self, name: str, parent: str, word: str = "") -> int:
        """A fork that holds a word more."""
        (seq,) = self.cache.fork([self.seqs[parent]])
        return self._named(name, seq, word)

    def _named(self, name: str, seq: int, word: str) -> int:
        self.seqs[name] = seq
        if word:
            self.cache.append([seq], *tokens(word))
        return seq

    def index(self, *names: str, policy: Any = "lru", **limits: Any) -> CacheIndex:
        """An index that holds these sequences under their names."""
        index = CacheIndex(self.cache, policy, **limits)
        self._indexes.append(index)
        for number, name in enumerate(names):
            index.put(name, self.seqs[name], priority=-number)
        return index

    def manage(self, envs: int = 2, **options: Any) -> KVCacheManager:
        """A manager over the cache."""
        self.manager = KVCacheManager(self.cache, envs, **options)
        return self.manager

    def pack(self, *names: str, indexes: int = 0) -> None:
        """Put some sequences and the first indexes into a bundle."""
        self.bundle = self.cache.export(self.of(*names), indexes=self._indexes[:indexes])

    def unpack(self, indexes: int = 0) -> list[int]:
        """Adopt the bundle, into as many last indexes."""
        assert self.bundle is not None
        chosen = self.indexes[len(self.indexes) - indexes :]
        return self.cache.adopt(self.bundle, indexes=chosen)

    def open(
        self,
        *names: str,
        room: int = 2,
        pad: str = "left",
        word: str = "",
        gather: str = "now",
        rebase: Any = None,
    ) -> Step:
        """A step of these sequences, with new tokens in it."""
        seqs = self.of(*names)
        self.steps.append(self.cache.open(seqs, room, pad=pad, gather=gather, rebase=rebase))
        if word:
            self.update(*[word] * len(names))
        return self.step

    def attend(self, *names: str, counts: Any = 2, word: str = "") -> PagedStep:
        """A step on the pages of these sequences, with new tokens in it."""
        self.paged_steps.append(self.cache.attend(self.of(*names), counts))
        if word:
            self.see(*[word] * len(names))
        return self.paged

    # -- to call a verb

    def of(self, *names: str) -> list[int]:
        """Sequences by name."""
        return [self.seqs[name] for name in names]

    def append(self, *names: str, word: str) -> None:
        """Append a word to each."""
        self.cache.append(self.of(*names), *tokens(*[word] * len(names)))

    def update(self, *rows: str) -> None:
        """Append a word to each row of the step."""
        keys, values = tokens(*rows)
        self.step.update(0, keys[0], values[0])

    def see(self, *rows: str) -> list[float]:
        """Write a word to each row of the paged step, and return what the queries find."""
        keys, values = tokens(*rows)
        return self.paged.layers[0].attend(keys[0], keys[0], values[0]).flatten().tolist()

    @property
    def paged(self) -> PagedStep:
        """The step on pages that was opened last."""
        return self.paged_steps[-1]

    @property
    def indexes(self) -> list[CacheIndex]:
        """Those of the manager, where there is one."""
        return self._indexes if self.manager is None else list(self.manager.pools)

    @property
    def managed(self) -> KVCacheManager:
        """The manager."""
        assert self.manager is not None
        return self.manager

    @property
    def step(self) -> Step:
        """The step that was opened last."""
        return self.steps[-1]

    # -- to look at it

    def look(self) -> State:
        """All that can be seen."""
        cache = self.cache
        figures = cache.stats, cache.pages_in_use, cache.pages_free, cache.live_sequences
        lengths = [len(index) for index in self.indexes]
        records = cache.look(lambda tables: tables.items())
        place = {seq: number for number, (seq, _) in enumerate(records)}
        gathered = cache.gather(list(place))
        indexes = tuple(seen(index, place) for index in self.indexes)
        if cache.live_sequences == figures[3]:  # no release was put off
            assert figures[:3] == (cache.stats, cache.pages_in_use, cache.pages_free)
            assert lengths == [index.length for index in indexes]
        assert cache.stats.allocated_pages - cache.stats.freed_pages == cache.pages_in_use
        assert cache.lengths(cache.live()) == gathered.lengths.tolist()
        return State(
            tuple(words(gathered)),
            tuple(map(tuple, gathered.positions.tolist())),
            tuple(record[4] for _, record in records),
            tuple(above if above is None else place[above] for above in map(cache.parent, place)),
            canonical([record for _, record in records]),
            tuple(record[1] for _, record in records),
            cache.pages_in_use,
            cache.pages_free,
            cache.stats,
            indexes,
            tuple(map(shown, self.steps)),
            cache.open_steps,
            tuple(sorted(place[seq] for seq in self.scope._kept if seq in place))
            if self.scope
            else (),
            len(cache.turns.listeners),
            type(cache.reclaimer).__name__,
        )

    def check(self) -> None:
        """Every invariant holds."""
        self.cache.check()
        if self.manager is not None:
            self.manager.check()
        for index in self.indexes:
            index.check()

    def drain(self) -> None:
        """End all there is: no page may be left."""
        for step in self.steps:
            step.close()
        for paged in self.paged_steps:
            paged.close()
        for index in self.indexes:
            index.clear()
        self.cache.release(self.cache.live())
        assert (self.cache.pages_in_use, self.cache.live_sequences) == (0, 0)
        assert not self.cache.turns.tickets
        assert not self.cache.books.owned
        assert not self.cache.books.tree.joints


def shown(step: Step) -> tuple[Any, ...]:
    """All that can be seen of a step."""
    if step.closed:
        return ("closed",)
    return step.past, step.size, str(step.keys(0).tolist()), str(step.values(0).tolist())


def seen(index: CacheIndex, place: dict[int, int]) -> IndexState:
    """All that can be seen of an index."""
    index.check()
    order = tuple(index.victims())
    index.check()
    entries = dict(zip(index, [place[handle] for handle in index.handles()]))
    pinned = tuple(key for key in entries if index.pinned(key))
    figures = len(index), index.bytes_in_use, index.pinned_pages(), index.second_lookups
    return IndexState(entries, pinned, order, index.stats, *figures)


def canonical(records: list[Record]) -> tuple[tuple[int, ...], ...]:
    """Block tables with pages numbered in the order in which they are met."""
    names: dict[int, int] = {}
    for record in records:
        for page in record[0]:
            names.setdefault(page, len(names))
    return tuple(tuple(names[page] for page in record[0]) for record in records)


Call = Callable[[World], object]


class Scenario(NamedTuple):
    """One call of a verb. `between` are effects that it may have on their own, in this order,
    before its own one. One that `spends` may take and copy pages for nothing, where it is broken
    off.
    """

    name: str
    prepare: Callable[[], World]
    call: Call
    before: str
    after: str
    between: tuple[Call, ...] = ()
    spends: bool = False

    def look(self, world: World) -> State:
        """All that can be seen of a world, as far as it is always the same."""
        state = world.look()
        if not self.spends:
            return state
        stats = replace(state.stats, allocated_pages=0, copied_pages=0, freed_pages=0)
        return state._replace(stats=stats)


def held(text: str) -> tuple[str, ...]:
    """The words of a text; "-" is the empty one."""
    return tuple("" if word == "-" else word for word in text.split())


# -- worlds


def tree() -> World:
    """A root of three letters, a fork of it, a fork of that with a letter of its own; and a
    sequence beside them.
    """
    world = World()
    world.root("a", "abc")
    world.child("b", "a")
    world.child("c", "b", "d")
    world.root("z", "xy")
    return world


TREE = "abc abc abcd xy"


def packed(
    *names: str, world: Callable[[], World] = tree, indexes: int = 0, **options: Any
) -> Callable[[], World]:
    """A world with a bundle of some of its sequences, and of what an index holds, beside which lies
    an empty one.
    """

    def prepare() -> World:
        made = world()
        if indexes:
            made.index(**options)
        made.pack(*names, indexes=indexes)
        return made

    return prepare


def bushy() -> World:
    """The tree, with a second branch."""
    world = tree()
    world.child("d", "a", "q")
    world.child("e", "d", "r")
    return world


BUSHY = f"{TREE} abcq abcqr"


def shared() -> World:
    """Two sequences that end in one page, the older one further on."""
    world = World(page_size=4)
    world.root("a", "abc")
    (world.seqs["b"],) = world.cache.fork(world.of("a"), at=1)
    return world


def twins() -> World:
    """Two sequences that end in one page, at the same token: one of them may write on in it."""
    world = World()
    world.root("a", "abc")
    world.child("b", "a")
    return world


def small() -> World:
    """A pool of two pages that may grow, one of them used."""
    world = World(num_pages=2)
    world.root("a", "ab")
    return world


def crowded() -> World:
    """A pool of two pages that may grow, both used."""
    world = World(num_pages=2)
    world.root("a", "abcd")
    return world


def full(**limits: Any) -> World:
    """A pool without a free page, an index that may be asked for some."""
    world = World(num_pages=4, max_pages=4)
    world.root("a", "ab")
    world.root("x", "p")
    world.root("y", "q")
    world.child("b", "a", "r")
    world.cache.set_reclaimer(world.index("x", "y", **limits))
    return world


FULL = "ab p q abr"


def holding(*names: str, world: Callable[[], World] = tree, **options: Any) -> Callable[[], World]:
    """A world with some of its sequences in an index."""

    def prepare() -> World:
        made = world()
        made.index(*names, **options)
        return made

    return prepare


def opened(*names: str, **options: Any) -> Callable[[], World]:
    """The tree, with a step of some of its sequences, to which a word may have been appended."""

    def prepare() -> World:
        world = tree()
        world.root("e", "ef")
        world.open(*names, **options)
        return world

    return prepare


OPENED = f"{TREE} ef"


def attending(*names: str, word: str = "", counts: Any = 2) -> Callable[[], World]:
    """The tree, with a step on the pages of some of its sequences."""

    def prepare() -> World:
        world = tree()
        world.attend(*names, word=word, counts=counts)
        return world

    return prepare


def busy() -> World:
    """Two steps that are open, one of a fork and one of its parent."""
    world = opened("b", "z", word="s")()
    world.open("a", "c", room=3, word="tu")
    return world


def orphaned(end: Call) -> Callable[[], World]:
    """The bushy tree, with open steps of sequences that then ended or changed."""

    def prepare() -> World:
        world = bushy()
        world.open("b", "d", word="s")
        world.open("d", "e", word="tu")
        end(world)
        return world

    return prepare


def holey() -> World:
    """A pool with free pages in front of used ones, and an open step."""
    world = World()
    world.root("x", "pqrs")
    world.root("a", "abc")
    world.child("b", "a", "d")
    world.open("a", "b", word="e")
    world.cache.release(world.of("x"))
    return world


HOLEY = "abc abcd"


def scoped() -> World:
    """A scope in which two sequences were made, one of which is kept."""
    world = tree()
    world.scope = world.cache.scope()
    world.root("k", "kk")
    world.root("l", "ll")
    world.scope.keep(world.of("k"))
    return world


SCOPED = f"{TREE} kk ll"


def listening() -> World:
    """Somebody listens."""
    world = tree()
    world.cache.listen(ignore)
    return world


def managed() -> World:
    """A manager with contexts in all of its pools."""
    world = World(num_pages=6, max_pages=6)
    for name in "abcdwz":
        world.root(name, name)
    manager = world.manage(2, init_entries=2, recur_entries=2)
    manager.set_init_cache(0, "i", world.seqs["a"])
    manager.set_init_cache(1, "j", world.seqs["b"])
    manager.set_recur_caches(["r", "s"], world.of("c", "d"))
    manager.set_wm_cache("w", world.seqs["w"])
    return world


MANAGED = "a b c d w z"


# -- calls


def ignore(event: Event) -> None:
    """A listener."""


def reclaimed(need: int) -> Call:
    """Entries of the index were evicted for `need` pages."""
    return lambda world: world.indexes[0].reclaim(need)


def reclaimed_but_x(world: World) -> None:
    """An entry of the index was evicted for a page, but not the first."""
    world.indexes[0].reclaim(1, world.of("x"))


def grown(need: int) -> Call:
    """The pool has grown until `need` pages are free."""
    return lambda world: world.cache._pool.grow_for(need)


def closed(world: World) -> None:
    """The step is closed."""
    world.step.close()


def left(world: World) -> None:
    """The block of the step ends."""
    world.step.__exit__()


def dropped_step(world: World) -> None:
    """Nobody holds the step any more; a figure is asked for."""
    if world.steps:
        world.steps.pop()
    assert world.cache.open_steps == len(world.steps)


def entered(world: World) -> None:
    """A step in a block of its own, in which it is committed."""
    with world.cache.open(world.of("a", "z"), 1) as step:
        keys, values = tokens("s", "s")
        step.update(0, keys[0], values[0])
        step.commit()


def attend(*names: str, **options: Any) -> Call:
    """Opens a step on the pages of some sequences."""
    return lambda world: world.attend(*names, **options)


def attended_in_vain(*names: str, counts: Any = 2) -> Call:
    """A step on pages was opened, and dropped at once."""

    def call(world: World) -> None:
        world.cache.attend(world.of(*names), counts)

    return call


def published(*counts: int) -> Call:
    """Commits the step on pages."""
    return lambda world: world.paged.commit(list(counts) if counts else None)


def paged_closed(world: World) -> None:
    """The step on pages is closed."""
    world.paged.close()


def paged_left(world: World) -> None:
    """The block of the step on pages ends."""
    world.paged.__exit__()


def layer_shapes(world: World) -> list[list[int]]:
    """What kernels of others are shown."""
    return [list(view.shape) for view in world.cache._pool.storage.layer_view(0)]


def in_pages(world: World) -> object:
    """What one token of each row sees of the windows of a step, where these can stay in place."""
    attention = world.step.in_pages()
    if attention is None:
        return None
    form = world.cache._pool.storage.form
    tokens = torch.ones(len(world.step.parents), form.parts[0].heads, 3, form.parts[0].head_size)
    return attention.see(0, 0, tokens.to(form.dtype)).tolist()


def for_kernels(world: World) -> object:
    """Tables as kernels of others read them."""
    seqs = world.of("a", "z")
    flash = world.cache.flash_attention_pages(seqs, 0, multiple=1)
    found = world.cache.flashinfer_pages(seqs, 0)
    return flash.cache_seqlens.tolist(), found.last_page_len.tolist()


def paged_said(world: World) -> object:
    """What a step on pages says of itself."""
    step = world.paged
    return repr(step), step.closed, step.lengths, step.counts


def open_step(*names: str, **options: Any) -> Call:
    """Opens a step of some sequences."""
    return lambda world: world.open(*names, **options)


def given_up(*names: str, room: int = 2) -> Call:
    """A step was opened, and dropped at once."""

    def call(world: World) -> None:
        world.cache.open(world.of(*names), room)

    return call


def commit(**options: Any) -> Call:
    """Commits the step that was opened last."""
    return lambda world: world.step.commit(**options)


def commit_first(world: World) -> list[int]:
    """Commits the step that was opened first."""
    return world.steps[0].commit()


def changed(world: World) -> None:
    """New tokens are changed where they lie."""
    step = world.step
    with torch.no_grad():
        for plane in step.columns(step.past, step.size):
            plane[:] = plane + torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1, 1)


def commit_changed(world: World) -> None:
    """New tokens are changed where they lie, and stored."""
    if world.step.keys(0)[0, 0, -1, 0] == ord("t"):
        changed(world)
    world.step.commit()


def related(world: World) -> object:
    """Who hangs below whom."""
    cache = world.cache
    seqs = world.seqs.values()
    return [(cache.parent(seq), cache.children(seq), cache.descendants(seq)) for seq in seqs]


def leave(world: World) -> None:
    """The scope ends."""
    assert world.scope is not None
    world.scope.__exit__()


def keep(world: World) -> None:
    """The scope keeps one more."""
    assert world.scope is not None
    world.scope.keep(world.of("l"))


def begin(world: World) -> None:
    """A scope begins."""
    world.scope = world.cache.scope().__enter__()


def cache_figures(world: World) -> object:
    """What a cache says of itself."""
    cache = world.cache
    sizes = cache.token_bytes, cache.bytes_in_use, cache.bytes_reserved, cache.working_bytes
    kinds = cache.dtype, cache.device, cache.reclaimer
    pages = cache.pages_in_use, cache.pages_free, cache.pages_reserved, cache.max_pages
    return (
        sizes,
        kinds,
        pages,
        cache.stats,
        cache.stored_tokens,
        cache.logical_tokens,
        cache.live_sequences,
        cache.open_steps,
        repr(cache),
    )


def read_step(world: World) -> object:
    """What a step says of itself."""
    step = world.step
    layer = step.layers[0]
    sizes = step.pads, step.lengths, step.size, step.filled(), step.closed, repr(step)
    return (
        sizes,
        step.then,
        step.now,
        step.mask(),
        step.keys(0),
        step.values(0),
        step.planes,
        step.columns(0, 1),
        layer.shape,
        layer.get(),
    )


def manager_figures(manager: KVCacheManager) -> object:
    """What a manager says of itself."""
    pages = manager.pinned_pages(), manager.block_tables([])
    return manager.env_count, manager.stats, pages, repr(manager)


def rebased(step: Step) -> None:
    """A client that looks at a step."""
    step.now.sum()


def len_of_books(books: Books) -> int:
    """Something that can be read in the books."""
    return books.live_count


def retrieve(key: str, recur: bool = True) -> Call:
    """Asks the manager for a key."""
    return on_manager(lambda manager: manager.retrieve_cache_hierarchical(0, key, recur))


def nodes_gone(need: int) -> Call:
    """The manager was asked for pages."""
    return on_manager(lambda manager: manager.reclaim(need))


def put(key: str, name: str, priority: float | None = None) -> Call:
    """Puts a sequence into the index."""
    return lambda world: world.indexes[0].put(key, world.seqs[name], priority)


def put_all(**names: str) -> Call:
    """Puts several sequences into the index at once."""
    return lambda world: world.indexes[0].put_batch(list(names), world.of(*names.values()))


def on_index(call: Callable[[CacheIndex], object]) -> Call:
    """A call of the index."""
    return lambda world: call(world.indexes[0])


def on_manager(call: Callable[[KVCacheManager], object]) -> Call:
    """A call of the manager."""
    return lambda world: call(world.managed)


PLACES = torch.tensor([[7], [9]])

CACHE = (
    Scenario("new", tree, lambda w: w.cache.new(2, start=1), TREE, f"{TREE} - -"),
    Scenario("new, many", tree, lambda w: w.cache.new(70), TREE, TREE + " -" * 70),
    Scenario(
        "fork", tree, lambda w: w.cache.fork(w.of("a", "a", "c")), TREE, f"{TREE} abc abc abcd"
    ),
    Scenario(
        "fork at", tree, lambda w: w.cache.fork(w.of("a", "c"), at=[1, 3]), TREE, f"{TREE} a abc"
    ),
    Scenario(
        "fork a root",
        tree,
        lambda w: w.cache.fork(w.of("c", "a"), root=True),
        TREE,
        f"{TREE} abcd abc",
    ),
    Scenario("append", tree, lambda w: w.append("z", word="z"), TREE, "abc abc abcd xyz"),
    Scenario(
        "append, copy",
        tree,
        lambda w: w.append("a", "b", "z", word="st"),
        TREE,
        "abcst abcst abcd xyst",
    ),
    Scenario(
        "append to a shared page",
        twins,
        lambda w: w.append("a", "b", word="s"),
        "abc abc",
        "abcs abcs",
    ),
    Scenario(
        "append, row by row",
        tree,
        lambda w: w.append("b", "z", word="s"),
        TREE,
        "abc abcs abcd xys",
    ),
    Scenario(
        "append, grow", small, lambda w: w.append("a", word="cdef"), "ab", "abcdef", (grown(2),)
    ),
    Scenario(
        "append, evict", full, lambda w: w.append("a", word="s"), FULL, "abs q abr", (reclaimed(1),)
    ),
    Scenario(
        "append, evict two",
        full,
        lambda w: w.append("a", word="stu"),
        FULL,
        "abstu abr",
        (reclaimed(2),),
    ),
    Scenario("append, no room", full, lambda w: w.append("a", word="s" * 7), FULL, FULL),
    Scenario(
        "append to one page", shared, lambda w: w.append("a", "b", word="st"), "abc a", "abcst ast"
    ),
    Scenario("slide", tree, lambda w: w.cache.slide(w.of("a", "c"), [1, 2]), TREE, "bc abc cd xy"),
    Scenario("slide out", tree, lambda w: w.cache.slide(w.of("z"), 2), TREE, "abc abc abcd -"),
    Scenario(
        "truncate", tree, lambda w: w.cache.truncate(w.of("a", "z"), [1, 2]), TREE, "ab abc abcd -"
    ),
    Scenario(
        "truncate in a page",
        bushy,
        lambda w: w.cache.truncate(w.of("a", "d"), 1),
        BUSHY,
        f"ab {TREE[4:]} abc abcqr",
    ),
    Scenario("release", tree, lambda w: w.cache.release(w.of("a", "z")), TREE, "abc abcd"),
    Scenario("release a joint", bushy, lambda w: w.cache.release(w.of("a")), BUSHY, BUSHY[4:]),
    Scenario(
        "release below a joint",
        orphaned(lambda w: w.cache.release(w.of("a"))),
        lambda w: w.cache.release(w.of("b", "c")),
        BUSHY[4:],
        "xy abcq abcqr",
    ),
    Scenario(
        "release again",
        tree,
        lambda w: w.cache.release(w.of("z"), missing_ok=True),
        TREE,
        "abc abc abcd",
    ),
    Scenario(
        "release subtree", tree, lambda w: w.cache.release_subtree(w.seqs["b"]), TREE, "abc xy"
    ),
    Scenario(
        "release subtree with entries",
        holding("c", "z"),
        lambda w: w.cache.release_subtree(w.seqs["b"]),
        TREE,
        "abc xy",
    ),
    Scenario("promote", bushy, lambda w: w.cache.promote(w.seqs["d"]), BUSHY, "abc xy abcq abcqr"),
    Scenario(
        "promote with entries",
        holding("c", "e", world=bushy),
        lambda w: w.cache.promote(w.seqs["d"]),
        BUSHY,
        "abc xy abcq abcqr",
    ),
    Scenario(
        "promote below a joint",
        orphaned(lambda w: w.cache.release(w.of("a"))),
        lambda w: w.cache.promote(w.seqs["d"]),
        BUSHY[4:],
        "xy abcq abcqr",
    ),
    Scenario("trim", holey, lambda w: w.cache.trim(), HOLEY, HOLEY),
    Scenario("trim a full pool", full, lambda w: w.cache.trim(), FULL, FULL),
    Scenario("relatives", bushy, related, BUSHY, BUSHY),
    Scenario("gather", tree, lambda w: w.cache.gather(w.of("a", "c", "z")), TREE, TREE),
    Scenario(
        "gather again", tree, lambda w: w.cache.gather(w.of("a", "c"), reuse=True), TREE, TREE
    ),
    Scenario(
        "gather alike", tree, lambda w: w.cache.gather(w.of("a", "b"), pad="left"), TREE, TREE
    ),
    Scenario("lengths", tree, lambda w: w.cache.lengths(w.of("a", "z")), TREE, TREE),
    Scenario("live", tree, lambda w: w.cache.live(), TREE, TREE),
    Scenario("block tables", tree, lambda w: w.cache.block_tables(w.of("a", "z")), TREE, TREE),
    Scenario("page tables", tree, lambda w: w.cache.page_tables(w.of("a", "z")), TREE, TREE),
    Scenario("prefetch", tree, lambda w: w.cache.prefetch(w.of("a", "z")), TREE, TREE),
    Scenario("tiers", tree, lambda w: w.cache.tiers, TREE, TREE),
    Scenario("fingerprint", tree, lambda w: w.cache.fingerprint({"of": 1}), TREE, TREE),
    Scenario("pages needed", tree, lambda w: w.cache.pages_needed(w.of("a"), 3), TREE, TREE),
    Scenario("pages freed", tree, lambda w: w.cache.pages_freed_by(w.of("a", "b")), TREE, TREE),
    Scenario("look", tree, lambda w: w.cache.look(len_of_books), TREE, TREE),
    Scenario("figures", tree, cache_figures, TREE, TREE),
    Scenario("stale", tree, lambda w: w.cache.lengths([w.seqs["a"], 1]), TREE, TREE),
    Scenario("check", holding("c"), lambda w: w.cache.check(), TREE, TREE),
    Scenario(
        "set reclaimer", holding("c"), lambda w: w.cache.set_reclaimer(w.indexes[0]), TREE, TREE
    ),
    Scenario("listen", tree, lambda w: w.cache.listen(ignore), TREE, TREE),
    Scenario("unlisten", listening, lambda w: w.cache.unlisten(ignore), TREE, TREE),
    Scenario("fork, heard", listening, lambda w: w.cache.fork(w.of("a")), TREE, f"{TREE} abc"),
    Scenario("begin a scope", tree, begin, TREE, TREE),
    Scenario("keep", scoped, keep, SCOPED, SCOPED),
    Scenario("end a scope", scoped, leave, SCOPED, f"{TREE} kk"),
)

BUNDLES = (
    Scenario("export", tree, lambda w: w.pack("c", "z"), TREE, TREE),
    Scenario(
        "export below what stays",
        orphaned(lambda w: w.cache.release(w.of("a"))),
        lambda w: w.pack("e", "b"),
        BUSHY[4:],
        BUSHY[4:],
    ),
    Scenario("export to", tree, lambda w: w.cache.export_to(Bundle.of, w.of("c", "z")), TREE, TREE),
    Scenario("export, indexed", holding("c", "z"), lambda w: w.pack("a", indexes=1), TREE, TREE),
    Scenario(
        "export a manager",
        managed,
        lambda w: w.cache.export(w.of("a"), indexes=[w.managed]),
        MANAGED,
        MANAGED,
    ),
    Scenario("adopt", packed("a", "c"), lambda w: w.unpack(), TREE, f"{TREE} abc abcd"),
    Scenario("adopt nothing", packed(), lambda w: w.unpack(), TREE, TREE),
    Scenario(
        "adopt entries",
        packed("z", world=holding("c", "z"), indexes=1),
        lambda w: w.unpack(1),
        TREE,
        f"{TREE} xy abcd",
    ),
    Scenario(
        "adopt entries by priority",
        packed("z", world=holding("c", "z"), indexes=1, policy="priority", max_bytes=64),
        lambda w: w.unpack(1),
        TREE,
        f"{TREE} xy abcd",
    ),
    Scenario("adopt, refused", packed("a", indexes=1), lambda w: w.unpack(0), TREE, TREE),
    Scenario(
        "adopt, grow",
        packed("a", world=crowded),
        lambda w: w.unpack(),
        "abcd",
        "abcd abcd",
        (grown(2),),
    ),
    Scenario(
        "adopt, evict",
        packed("x", world=full),
        lambda w: w.unpack(),
        FULL,
        "ab q abr p",
        (reclaimed(1),),
    ),
    Scenario("adopt, no room", packed("a", "b", "x", world=full), lambda w: w.unpack(), FULL, FULL),
)

STEPS = (
    Scenario("open", tree, open_step("a", "c"), TREE, TREE, (given_up("a", "c"),), True),
    Scenario("open alike", tree, open_step("a", "b"), TREE, TREE, (given_up("a", "b"),), True),
    Scenario("open by pages", tree, open_step("c", "z"), TREE, TREE, (given_up("c", "z"),), True),
    Scenario("open a page each", tree, open_step("z"), TREE, TREE, (given_up("z"),), True),
    Scenario(
        "open, gather later",
        tree,
        open_step("a", "c", gather="later"),
        TREE,
        TREE,
        (given_up("a", "c"),),
        True,
    ),
    Scenario(
        "gather later",
        opened("a", "c", gather="later"),
        lambda w: w.step.planes[0].tolist(),
        OPENED,
        OPENED,
    ),
    Scenario(
        "gather a light step later",
        opened("z", gather="later", rebase=lambda step: step.columns(0, step.past)),
        lambda w: w.step.planes[0].tolist(),
        OPENED,
        OPENED,
        (lambda w: w.step.then.tolist(),),
        True,
    ),
    Scenario("in pages", opened("a", "c", gather="later"), in_pages, OPENED, OPENED),
    Scenario(
        "open another",
        opened("a"),
        open_step("a", "c", "z", pad="right"),
        OPENED,
        OPENED,
        (given_up("a", "c", "z"),),
        True,
    ),
    Scenario(
        "open and rebase",
        tree,
        lambda w: w.steps.append(w.cache.open(w.of("a"), 1, rebase=rebased)),
        TREE,
        TREE,
        (given_up("a", room=1),),
        True,
    ),
    Scenario(
        "open, grow",
        small,
        open_step("a", room=4),
        "ab",
        "ab",
        (grown(2), given_up("a", room=4)),
        True,
    ),
    Scenario(
        "open, evict",
        full,
        open_step("b"),
        FULL,
        "ab q abr",
        (reclaimed(1), given_up("b")),
        True,
    ),
    Scenario(
        "open, evict another",
        full,
        open_step("x"),
        FULL,
        "ab p abr",
        (reclaimed_but_x, given_up("x")),
        True,
    ),
    Scenario("attend", tree, attend("a", "c"), TREE, TREE, (attended_in_vain("a", "c"),), True),
    Scenario(
        "attend, unequal",
        tree,
        attend("z", "a", counts=[3, 1]),
        TREE,
        TREE,
        (attended_in_vain("z", "a", counts=[3, 1]),),
        True,
    ),
    Scenario("attend, no room", full, attend("a", "b", counts=5), FULL, FULL),
    Scenario("see", attending("a", "z"), lambda w: w.see("st", "uv"), TREE, TREE),
    Scenario("say", attending("a", "z"), paged_said, TREE, TREE),
    Scenario("publish", attending("z", "a", word="st"), published(), TREE, f"{TREE} xyst abcst"),
    Scenario(
        "publish some", attending("z", "a", word="st"), published(1, 0), TREE, f"{TREE} xys abc"
    ),
    Scenario("publish too early", attending("z"), published(), TREE, TREE),
    Scenario("give up pages", attending("z", "a", word="st"), paged_closed, TREE, TREE),
    Scenario("leave pages", attending("z", "a"), paged_left, TREE, TREE),
    Scenario("look at a layer", tree, layer_shapes, TREE, TREE),
    Scenario("for kernels", tree, for_kernels, TREE, TREE),
    Scenario("open, no room", full, open_step("a", "b", room=5), FULL, FULL),
    Scenario(
        "a step in a block",
        tree,
        entered,
        TREE,
        f"{TREE} abcs xys",
        (given_up("a", "z", room=1),),
        True,
    ),
    Scenario("read a step", opened("a", "z", word="s"), read_step, OPENED, OPENED),
    Scenario("close", opened("a"), closed, OPENED, OPENED),
    Scenario("close, filled", opened("a", "z", word="s"), closed, OPENED, OPENED),
    Scenario("leave", opened("a", "z", word="s"), left, OPENED, OPENED),
    Scenario("drop", opened("a", "z", word="s"), dropped_step, OPENED, OPENED),
    Scenario("close one of two", busy, closed, OPENED, OPENED),
    Scenario("update", opened("a", "z"), lambda w: w.update("s", "t"), OPENED, OPENED),
    Scenario("fill", opened("a", "z"), lambda w: w.step.fill(1), OPENED, OPENED),
    Scenario("commit", opened("z", "e", word="st"), commit(), OPENED, f"{OPENED} xyst efst"),
    Scenario(
        "commit and slide", opened("z", "e", word="st"), commit(slide=2), OPENED, f"{OPENED} st st"
    ),
    Scenario(
        "live, beside a light step",
        opened("z", "e", word="st"),
        lambda w: w.cache.live(),
        OPENED,
        OPENED,
    ),
    Scenario(
        "append, beside a light step",
        opened("z", "e", word="st"),
        lambda w: w.append("b", word="s"),
        OPENED,
        "abc abcs abcd xy ef",
    ),
    Scenario(
        "release below a light step",
        opened("z", "e", word="st"),
        lambda w: w.cache.release(w.of("z", "e")),
        OPENED,
        "abc abc abcd",
    ),
    Scenario("commit one", opened("z", "e", word="s"), commit(), OPENED, f"{OPENED} xys efs"),
    Scenario("commit nothing", opened("z", "a"), commit(slide=1), OPENED, f"{OPENED} y bc"),
    Scenario(
        "commit unlike",
        opened("a", "z", word="st"),
        commit(slide=[1, 0]),
        OPENED,
        f"{OPENED} bcst xyst",
    ),
    Scenario(
        "commit changed",
        opened("z", "e", word="st"),
        commit_changed,
        OPENED,
        f"{OPENED} xytu eftu",
        (changed,),
    ),
    Scenario(
        "commit placed",
        opened("a", "z", word="s"),
        commit(positions=PLACES),
        OPENED,
        f"{OPENED} abcs xys",
    ),
    Scenario(
        "commit, right",
        opened("a", "z", word="s", pad="right"),
        commit(),
        OPENED,
        f"{OPENED} abcs xys",
    ),
    Scenario("commit the last of two", busy, commit(), OPENED, f"{OPENED} abctu abcdtu"),
    Scenario("commit the first of two", busy, commit_first, OPENED, f"{OPENED} abcs xys"),
    Scenario(
        "commit below what was released",
        orphaned(lambda w: w.cache.release(w.of("a", "d"))),
        commit(),
        "abc abcd xy abcqr",
        "abc abcd xy abcqr abcqtu abcqrtu",
    ),
    Scenario(
        "commit below what was cut",
        orphaned(lambda w: w.cache.truncate(w.of("d", "e"), [4, 2])),
        commit(),
        f"{TREE} - abc",
        f"{TREE} - abc abcqtu abcqrtu",
    ),
    Scenario(
        "close below what was promoted away",
        orphaned(lambda w: w.cache.promote(w.seqs["b"])),
        closed,
        TREE,
        TREE,
    ),
    Scenario(
        "release below a step",
        orphaned(lambda w: None),
        lambda w: w.cache.release(w.of("a", "b", "d")),
        BUSHY,
        "abcd xy abcqr",
    ),
    Scenario(
        "release a subtree below a step",
        orphaned(lambda w: None),
        lambda w: w.cache.release_subtree(w.seqs["d"]),
        BUSHY,
        TREE,
    ),
    Scenario(
        "promote beside a step",
        orphaned(lambda w: None),
        lambda w: w.cache.promote(w.seqs["b"]),
        BUSHY,
        TREE,
    ),
)


POLICIES = ("fifo", "lru", "priority")
LEFT = "abc xy"  # of the tree, without the branch that `mixed` ends


def mixed(policy: str) -> World:
    """Entries: one ended with a subtree, one is pinned, and the policy was not told of all."""
    world = holding("a", "c", "z", policy=policy)()
    world.indexes[0].pin("z")
    world.indexes[0].get("a")
    world.cache.release_subtree(world.seqs["b"])
    world.indexes[0].entries.in_order = False
    return world


def stuck(policy: str) -> World:
    """An index that is full of pinned entries."""
    world = holding("a", "z", policy=policy, max_entries=2)()
    world.indexes[0].pin("a")
    world.indexes[0].pin("z")
    return world


def sharing(policy: str) -> World:
    """An index that is asked for pages; two of its entries share one."""
    world = full(policy=policy)
    world.child("v", "x")
    world.indexes[0].put("v", world.seqs["v"])
    return world


def rooted() -> World:
    """The manager, and another sequence."""
    world = managed()
    world.root("y")
    return world


def set_roots(world: World) -> None:
    """Each environment gets a root, one in place of another, one beside it. Both are pinned."""
    names = ["k", "j"]
    world.managed.set_init_caches([0, 1], names, world.of("z", "y"), pin=True)


def index_scenarios(policy: str) -> tuple[Scenario, ...]:
    """The verbs of an index with one policy. Whatever that is, leaves go first."""
    three = holding("a", "b", "z", policy=policy, max_entries=3)
    roomy = holding("a", "b", policy=policy)
    tight = holding("a", "z", world=bushy, policy=policy, max_bytes=48)
    odd = partial(mixed, policy)
    shared = partial(sharing, policy)
    scenarios = (
        Scenario("put", roomy, put("k", "c"), TREE, TREE),
        Scenario("put with priority", roomy, put("k", "c", -5), TREE, TREE),
        Scenario("put in place", roomy, put("b", "c"), TREE, "abc abcd xy"),
        Scenario("put anew", roomy, put("a", "a", 3), TREE, TREE),
        Scenario("put and evict", three, put("k", "c"), TREE, "abc abc abcd"),
        Scenario("put, evict for bytes", tight, put("k", "d"), BUSHY, "abc abc abcd abcq abcqr"),
        Scenario("put beside pinned ones", partial(stuck, policy), put("k", "c"), TREE, TREE),
        Scenario("put what is owned", roomy, put("k", "a"), TREE, TREE),
        Scenario("put all", three, put_all(k="c", b="b"), TREE, "abc abc abcd"),
        Scenario(
            "set priorities",
            roomy,
            on_index(lambda index: index.set_priorities(["b", "a"], [7, None])),
            TREE,
            TREE,
        ),
        Scenario("get", roomy, on_index(lambda index: index.get("a")), TREE, TREE),
        Scenario("get nothing", roomy, on_index(lambda index: index.get("k")), TREE, TREE),
        Scenario("remove", roomy, on_index(lambda index: index.remove("a")), TREE, "abc abcd xy"),
        Scenario("clear", three, on_index(lambda index: index.clear()), TREE, "abcd"),
        Scenario("pin", roomy, on_index(lambda index: index.pin("a")), TREE, TREE),
        Scenario("reclaim", shared, reclaimed(1), f"{FULL} p", "ab p abr p"),
        Scenario("reclaim all", shared, reclaimed(2), f"{FULL} p", "ab abr"),
        Scenario(
            "reclaim too much",
            shared,
            on_index(lambda index: index.reclaim(3)),
            f"{FULL} p",
            f"{FULL} p",
        ),
        Scenario("unpin, mixed", odd, on_index(lambda index: index.unpin("z")), LEFT, LEFT),
        Scenario("pinned, mixed", odd, on_index(lambda index: index.pinned("z")), LEFT, LEFT),
        Scenario("victims, mixed", odd, on_index(lambda index: index.victims()), LEFT, LEFT),
        Scenario("get, mixed", odd, on_index(lambda index: index.get("a")), LEFT, LEFT),
        Scenario("put, mixed", odd, put("a", "a", 1), LEFT, LEFT),
        Scenario("clear, mixed", odd, on_index(lambda index: index.clear()), LEFT, ""),
        Scenario("check, mixed", odd, on_index(lambda index: index.check()), LEFT, LEFT),
        Scenario("figures, mixed", odd, on_index(figures), LEFT, LEFT),
    )
    return tuple(scenario._replace(name=f"{policy}: {scenario.name}") for scenario in scenarios)


def figures(index: CacheIndex) -> object:
    """What an index says of itself."""
    return (
        len(index),
        list(index),
        "a" in index,
        index.stats,
        index.bytes_in_use,
        index.pinned_pages(),
        (type(index.policy), index.max_entries, index.max_bytes),
        repr(index),
    )


MANAGER = (
    Scenario(
        "manage", tree, lambda w: w.manage(1), TREE, TREE, (lambda w: KVCacheManager(w.cache, 1),)
    ),
    Scenario("retrieve a root", managed, retrieve("i"), MANAGED, MANAGED),
    Scenario("retrieve a node", managed, retrieve("r"), MANAGED, MANAGED),
    Scenario("retrieve nothing", managed, retrieve("q"), MANAGED, MANAGED),
    Scenario("retrieve a root only", managed, retrieve("r", False), MANAGED, MANAGED),
    Scenario(
        "set a root",
        managed,
        lambda w: w.managed.set_init_cache(0, "k", w.seqs["z"]),
        MANAGED,
        MANAGED,
    ),
    Scenario("set roots", rooted, set_roots, f"{MANAGED} -", "a c d w z -"),
    Scenario(
        "set a node",
        managed,
        lambda w: w.managed.set_recur_cache("k", w.seqs["z"]),
        MANAGED,
        "a b d w z",
    ),
    Scenario(
        "set a context",
        managed,
        lambda w: w.managed.set_wm_cache("k", w.seqs["z"]),
        MANAGED,
        MANAGED,
    ),
    Scenario(
        "clear roots", managed, on_manager(lambda m: m.clear_init_caches([1])), MANAGED, "a c d w z"
    ),
    Scenario(
        "clear nodes", managed, on_manager(lambda m: m.clear_recur_cache()), MANAGED, "a b w z"
    ),
    Scenario(
        "clear contexts", managed, on_manager(lambda m: m.clear_wm_cache()), MANAGED, "a b c d z"
    ),
    Scenario("clear all", managed, on_manager(lambda m: m.clear_all()), MANAGED, "z"),
    Scenario("manager: reclaim", managed, on_manager(lambda m: m.reclaim(4)), MANAGED, "b z"),
    Scenario("manager: figures", managed, on_manager(manager_figures), MANAGED, MANAGED),
    Scenario(
        "set nodes",
        managed,
        lambda w: w.managed.set_recur_caches(["k"], w.of("z")),
        MANAGED,
        "a b d w z",
    ),
    Scenario(
        "get a root", managed, on_manager(lambda m: m.get_init_cache(1, "j")), MANAGED, MANAGED
    ),
    Scenario("get a node", managed, on_manager(lambda m: m.get_recur_cache("q")), MANAGED, MANAGED),
    Scenario("get a context", managed, on_manager(lambda m: m.get_wm_cache("w")), MANAGED, MANAGED),
    Scenario("manager: check", managed, on_manager(lambda m: m.check()), MANAGED, MANAGED),
    Scenario(
        "append, evict nodes",
        managed,
        lambda w: w.append("z", word="yx"),
        MANAGED,
        "a b d w zyx",
        (nodes_gone(1),),
    ),
)


# -- releases that are put off


class Nosy(LRU):
    """A policy whose hooks release a sequence and look around."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def on_hit(self, entry: EntryView) -> None:
        cache = self.world.cache
        assert (entry.parent, len(entry.pages), entry.tokens) == (None, 2, 3)
        cache.release(self.world.of("z"), missing_ok=True)
        assert len(cache.live()) >= cache.live_sequences
        super().on_hit(entry)


def nosy() -> World:
    """An index whose policy releases a sequence when it is asked for an entry."""
    world = tree()
    world.index("a", policy=partial(Nosy, world))
    return world


def dropped(*names: str) -> Call:
    """Sequences were released."""
    return lambda world: world.cache.release(world.of(*names), missing_ok=True)


PUT_OFF = (
    Scenario(
        "put off by a hook",
        nosy,
        on_index(lambda index: index.get("a")),
        TREE,
        "abc abc abcd",
        (dropped("z"),),
    ),
)

SCENARIOS = (
    CACHE
    + BUNDLES
    + STEPS
    + MANAGER
    + PUT_OFF
    + tuple(chain.from_iterable(map(index_scenarios, POLICIES)))
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
