"""What a verb is going to do, as data: whoever finds it half done can do it again from the start.
No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from paged_kv.errors import unraisable

# pages, start, length, handle of the parent, which may be stale
Record = tuple[tuple[int, ...], int, int, int]

TRIES = 3


class Edit(NamedTuple):
    """Entries to put into a dictionary, and keys to take out of it first."""

    book: dict[Any, Any]
    puts: dict[Any, Any]
    drops: Sequence[Any]


class Store(NamedTuple):
    """One attribute and its new value."""

    target: object
    name: str
    value: object


class Closable(Protocol):
    """A batch that ends with the change that it leads to."""

    closed: bool


class Figures(NamedTuple):
    """Counts since a cache was made: sequences forked, sequences appended to, pages taken, pages
    copied.
    """

    forks: int = 0
    appends: int = 0
    allocated: int = 0
    copied: int = 0


class Change:
    """The effect of one verb. Everything in it is its own: no list or dictionary of a caller.

    `puts` and `drops` say which sequences begin, change and end; `figures` (the fields of
    `Figures`; None: as before), `edits`, `stores` and `closes` what else does. That is the truth,
    and doing it twice is doing it once. `gained` and `lost`, pages that gain or lose a reference,
    and `fresh`, the number of pages taken from the free stack, follow from it: they spare a count
    of all.
    """

    drops: Sequence[int] = ()
    gained: Iterable[int] = ()
    lost: Iterable[int] = ()
    fresh: int = 0
    figures: tuple[int, int, int, int] | None = None
    edits: Sequence[Edit] = ()
    stores: Sequence[Store] = ()
    closes: Closable | None = None

    def __init__(self, puts: dict[int, Record]) -> None:
        self.puts = puts

    def edit(self) -> None:
        """Do what concerns neither sequences nor pages; what may raise, for the keys are a
        caller's, comes last.
        """
        for target, name, value in self.stores:
            setattr(target, name, value)
        if self.closes is not None:
            self.closes.closed = True
        for book, puts, drops in self.edits:
            for key in drops:
                book.pop(key, None)
            book.update(puts)

    def edit_each(self) -> None:
        """`edit`, and what keeps failing is left out and told to `sys.unraisablehook`.

        A caller's key that can no longer be hashed or compared must not stop all the others.
        """
        for target, name, value in self.stores:
            setattr(target, name, value)
        if self.closes is not None:
            self.closes.closed = True
        for book, puts, drops in self.edits:
            for key in drops:
                _tried(partial(book.pop, key, None))
            for key, value in puts.items():
                _tried(partial(book.__setitem__, key, value))


def _tried(edit: Callable[[], Any]) -> None:
    """Try a few times: an error may come from a signal handler, and not again."""
    for _ in range(TRIES):
        try:
            edit()
            return
        except (MemoryError, RecursionError):
            raise  # of this moment, not of the key: the next call does all of it again
        except Exception as error:
            failed = error
    unraisable(failed)


class Entry:
    """A sequence under a key of an index, which owns it.

    `added` and `used` are numbers of the index's clock; `ended` is where the index looks for
    entries whose sequences ended with a subtree.
    """

    __slots__ = ("added", "ended", "handle", "key", "pins", "priority", "used")

    def __init__(
        self,
        key: Any,
        handle: int,
        priority: float | None,
        added: int,
        pins: int,
        ended: dict[int, Entry],
    ) -> None:
        self.key = key
        self.handle = handle
        self.priority = priority
        self.added = added
        self.used = added
        self.pins = pins
        self.ended = ended
