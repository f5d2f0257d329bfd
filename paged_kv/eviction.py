"""Eviction policies: each keeps the keys of one index in the order in which they should leave it.

A policy knows keys and nothing else: not what an entry weighs, nor whether it is pinned. The index
skips pinned entries while it walks `victims()`, so that a pin never changes an entry's place. An
index makes its policy itself, and makes it anew where an interrupt or an error of a hook left it
half told.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Protocol

from sortedcontainers import SortedDict

from paged_kv.errors import UnknownPolicy

HOOKS = ("on_add", "on_hit", "on_remove", "victims")


class Policy(Protocol):
    """The four hooks of an eviction policy.

    `on_add` is called for a key that the policy does not hold, the others only for keys that it
    holds. A stored key that is put again is removed and added. `victims` runs over all keys, the
    first to evict first, and changes nothing.
    """

    def on_add(self, key: Hashable, priority: float | None) -> None: ...

    def on_hit(self, key: Hashable) -> None: ...

    def on_remove(self, key: Hashable) -> None: ...

    def victims(self) -> Iterator[Hashable]: ...


class FIFO:
    """First in, first out: lookups do not change the order. Every hook is O(1).

    >>> policy = FIFO()
    >>> for key in "abc": policy.on_add(key, None)
    >>> policy.on_hit("a")
    >>> list(policy.victims())
    ['a', 'b', 'c']
    """

    def __init__(self) -> None:
        # Not a plain dict: that one walks over the holes of removed keys to find its first, O(n) a
        # victim.
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def on_add(self, key: Hashable, priority: float | None) -> None:
        self._order[key] = None

    def on_hit(self, key: Hashable) -> None:
        pass

    def on_remove(self, key: Hashable) -> None:
        del self._order[key]

    def victims(self) -> Iterator[Hashable]:
        return iter(self._order)


class LRU(FIFO):
    """Least recently used: a hit makes its key the last to go. Every hook is O(1).

    >>> policy = LRU()
    >>> for key in "abc": policy.on_add(key, None)
    >>> policy.on_hit("a")
    >>> list(policy.victims())
    ['b', 'c', 'a']
    """

    def on_hit(self, key: Hashable) -> None:
        self._order.move_to_end(key)


class Priority:
    """Lowest priority first, ties by age: the oldest goes first. No priority counts as 0. O(log n).

    >>> policy = Priority()
    >>> for key, priority in [("a", 2.0), ("b", 1.0), ("c", 1.0)]: policy.on_add(key, priority)
    >>> list(policy.victims())
    ['b', 'c', 'a']
    """

    def __init__(self) -> None:
        self._order: SortedDict[tuple[float, int], Hashable] = SortedDict()
        self._ranks: dict[Hashable, tuple[float, int]] = {}
        self._age = 0

    def on_add(self, key: Hashable, priority: float | None) -> None:
        self._age += 1  # unique, so that two ranks never tie and keys are never compared
        rank = self._ranks[key] = (0.0 if priority is None else priority, self._age)
        self._order[rank] = key

    def on_hit(self, key: Hashable) -> None:
        pass

    def on_remove(self, key: Hashable) -> None:
        del self._order[self._ranks.pop(key)]

    def victims(self) -> Iterator[Hashable]:
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


def page_counts(tables: Iterable[tuple[int, ...]]) -> Counter[int]:
    """Page -> how many of these tables hold it."""
    return Counter(page for table in tables for page in table)


def subtract(held: Counter[int], pages: Iterable[int]) -> None:
    """Take one holder from each page. Counter's own `-=` would walk over all of `held`."""
    for page in pages:
        held[page] -= 1
        if not held[page]:
            del held[page]
