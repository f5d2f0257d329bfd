"""Eviction policies: each keeps the entries of one index in the order in which they should go.

A policy sees entries, and decides about nothing else: the index skips pinned entries while it walks
`victims()`, so that a pin never changes an entry's place, and lets no entry go before those that
hang on it: see `leaves_first`. An index makes its policy itself, and makes it anew where an
interrupt or an error of a hook left it half told.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import merge
from operator import attrgetter
from typing import Protocol

from sortedcontainers import SortedDict

from paged_kv.errors import UnknownPolicy
from paged_kv.pages.tree import Tree

HOOKS = ("on_add", "on_hit", "on_priority", "on_remove", "victims")


class EntryView(Protocol):
    """What a policy sees of an entry: to be read only.

    It is the same object from `on_add` to `on_remove`, and compares by identity. `parent`, `pages`
    and `tokens` are looked up when they are asked for, and are None, () and 0 once the sequence has
    ended.
    """

    @property
    def key(self) -> Hashable:
        """The key in the index."""

    @property
    def handle(self) -> int:
        """The sequence."""

    @property
    def priority(self) -> float | None:
        """What the caller said when it was put, or later."""

    @property
    def added(self) -> int:
        """When it was put: a number that grows with each insertion and each hit."""

    @property
    def used(self) -> int:
        """When it was last put or hit."""

    @property
    def parent(self) -> int | None:
        """The nearest sequence above that lives, in the index or not; None at the top of a tree."""

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages that it holds, alone or with others."""

    @property
    def tokens(self) -> int:
        """Its length."""


class Policy(Protocol):
    """The five hooks of an eviction policy.

    `on_add` is called for an entry that the policy does not hold, the others only for entries that
    it holds. A stored key that is put again is another entry: the old one is removed, the new one
    added. `on_priority` is called just before an entry gets another priority, this one. `victims`
    runs over all entries, the first to evict first, and changes nothing.

    An index makes two of them: inner entries are told to a second one, for as long as something
    lives below them, and then added to the first one again. So an entry's place must follow from
    what is seen of it, not from the moment of `on_add`.
    """

    def on_add(self, entry: EntryView) -> None: ...

    def on_hit(self, entry: EntryView) -> None: ...

    def on_priority(self, entry: EntryView, priority: float | None) -> None: ...

    def on_remove(self, entry: EntryView) -> None: ...

    def victims(self) -> Iterator[EntryView]: ...


class FIFO:
    """First in, first out: lookups do not change the order. Every hook is O(1), O(log n) where an
    entry is added behind later ones.

    >>> from paged_kv import CacheIndex, PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> index = CacheIndex(cache, FIFO)
    >>> index.put_batch(list("abc"), cache.new(3))
    >>> index.get("a") is None, index.victims()
    (False, ['a', 'b', 'c'])
    """

    _rank = staticmethod(attrgetter("added"))

    def __init__(self) -> None:
        # Not a plain dict: that one walks over the holes of removed entries to find its first, O(n)
        # a victim.
        self._order: OrderedDict[EntryView, None] = OrderedDict()
        self._late: SortedDict[int, EntryView] = SortedDict()  # by rank; added behind later ones

    def on_add(self, entry: EntryView) -> None:
        last = next(reversed(self._order), None)
        if last is None or self._rank(last) < self._rank(entry):
            self._order[entry] = None
        else:
            self._late[self._rank(entry)] = entry

    def on_hit(self, entry: EntryView) -> None:
        pass

    def on_priority(self, entry: EntryView, priority: float | None) -> None:
        pass

    def on_remove(self, entry: EntryView) -> None:
        if self._late and entry not in self._order:
            del self._late[self._rank(entry)]
        else:
            del self._order[entry]

    def victims(self) -> Iterator[EntryView]:
        if not self._late:
            return iter(self._order)
        return merge(self._late.values(), self._order, key=self._rank)


class LRU(FIFO):
    """Least recently used: a hit makes its entry the last to go. Cost: as `FIFO`.

    >>> from paged_kv import CacheIndex, PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> index = CacheIndex(cache, LRU)
    >>> index.put_batch(list("abc"), cache.new(3))
    >>> index.get("a") is None, index.victims()
    (False, ['b', 'c', 'a'])
    """

    _rank = staticmethod(attrgetter("used"))

    def on_hit(self, entry: EntryView) -> None:
        if entry in self._order:
            self._order.move_to_end(entry)
        else:
            del self._late[entry.used]
            self._order[entry] = None  # its number is about to be the highest


class Priority:
    """Lowest priority first, ties by age: the oldest goes first. No priority counts as 0. O(log n).

    >>> from paged_kv import CacheIndex, PagedKVCache
    >>> cache = PagedKVCache(layers=1, heads=1, head_size=2, page_size=2)
    >>> index = CacheIndex(cache, Priority)
    >>> for key, seq, priority in zip("abc", cache.new(3), (2.0, 1.0, 1.0)):
    ...     index.put(key, seq, priority)
    >>> index.victims()
    ['b', 'c', 'a']
    """

    def __init__(self) -> None:
        self._order: SortedDict[tuple[float, int], EntryView] = SortedDict()
        self._ranks: dict[EntryView, tuple[float, int]] = {}

    def on_add(self, entry: EntryView) -> None:
        self._place(entry, entry.priority)

    def _place(self, entry: EntryView, priority: float | None) -> None:
        # no two were added at once, so that ranks never tie and entries are never compared
        rank = (0.0 if priority is None else priority, entry.added)
        self._ranks[entry] = rank
        self._order[rank] = entry

    def on_hit(self, entry: EntryView) -> None:
        pass

    def on_priority(self, entry: EntryView, priority: float | None) -> None:
        self.on_remove(entry)
        self._place(entry, priority)

    def on_remove(self, entry: EntryView) -> None:
        del self._order[self._ranks.pop(entry)]

    def victims(self) -> Iterator[EntryView]:
        return iter(self._order.values())


POLICIES: dict[str, Callable[[], Policy]] = {"fifo": FIFO, "lru": LRU, "priority": Priority}


ALLOWED = ", ".join(map(repr, POLICIES)) + ", or what makes a fresh object with " + ", ".join(HOOKS)


def policy_maker(policy: str | Callable[[], Policy]) -> Callable[[], Policy]:
    """What makes a policy, by its name or as it is. Raises UnknownPolicy."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise UnknownPolicy(policy, ALLOWED)
        return POLICIES[policy]
    if not callable(policy):
        raise UnknownPolicy(policy, ALLOWED)
    return policy


def make_policy(maker: Callable[[], Policy]) -> Policy:
    """A fresh policy. Raises UnknownPolicy."""
    try:
        policy = maker()
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # from inside of it
        raise UnknownPolicy(maker, ALLOWED) from error  # it cannot be called without arguments
    if isinstance(policy, type) or not all(callable(getattr(policy, hook, None)) for hook in HOOKS):
        raise UnknownPolicy(maker, ALLOWED)
    if any(True for _ in policy.victims()):  # it already serves another index
        raise UnknownPolicy(maker, ALLOWED)
    return policy


def leaves_first(order: Iterable[EntryView], tree: Tree) -> Iterator[EntryView]:
    """Entries in their order, but each behind all that lives below it, in whatever hands.

    An inner entry frees few pages, and what hangs on it would be computed again from further up. So
    it follows as soon as the last one below it is among those that go; in the end come, in their
    order, those that something else hangs on. Cost: each entry is looked at once, and once more for
    each below it that goes first.
    """
    gone: set[int] = set()
    held: dict[int, EntryView] = {}
    waiting: dict[int, tuple[EntryView, Iterator[int]]] = {}  # by a sequence that still lives
    inner = tree.parents()
    for entry in order:
        seq = entry.handle
        below = tree.living_below(seq, gone) if seq in inner else None
        while True:
            if below is not None:
                child = next(below, None)
                if child is not None:
                    held[seq] = entry
                    waiting[child] = entry, below
                    break
                held.pop(seq, None)
            gone.add(seq)
            yield entry
            if seq not in waiting:
                break
            entry, below = waiting.pop(seq)
            seq = entry.handle
    yield from held.values()


def page_counts(tables: Iterable[tuple[int, ...]]) -> Counter[int]:
    """Page -> how many of these tables hold it."""
    return Counter(page for table in tables for page in table)


def subtract(held: Counter[int], pages: Iterable[int]) -> None:
    """Take one holder from each page. Counter's own `-=` would walk over all of `held`."""
    for page in pages:
        held[page] -= 1
        if not held[page]:
            del held[page]
