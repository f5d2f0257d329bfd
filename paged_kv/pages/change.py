"""What a verb is going to do, as data: whoever finds it half done can do it again from the start.
No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from paged_kv.errors import unraisable
from paged_kv.pages.records import Links, Record

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


class Pending(NamedTuple):
    """The sequences of an open step, which nobody knows of: as they will be if all its room is
    filled.
    """

    records: list[Record]
    rooms: list[int]  # new tokens of each row
    fresh: int  # pages that were taken for them
    copied: int  # and filled with copies
    user: (
        object  # whatever ends the step when it goes: a weak reference, kept here to keep it alive
    )


class Light(Protocol):
    """Who works on a step that holds nothing yet: see `OpenSteps.can_be_light`."""

    parents: list[int]
    records: list[Record]  # of these, all of one start and length, and on the edge of a page


class Splice(NamedTuple):
    """A joint of the tree that is taken out: it holds fewer than two branches together."""

    joint: int
    parent: int
    children: list[int]


class Arrival(NamedTuple):
    """Whole trees that come from elsewhere, with fresh pages: what follows from their records,
    counted all at once.
    """

    shares: list[tuple[int, int]]  # pages, and the references that each has
    links: Callable[[], Links]


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

    `puts` and `drops` say which sequences begin, change and end; `opens` and `ends` the same of
    steps, by number; `figures` (the fields of `Figures`; None: as before), `edits` and `stores`
    what else does. That is the truth, and doing it twice is doing it once. The rest follows from
    it, and spares a count of all: `gained` and `lost`, pages that gain or lose a reference;
    `fresh`, the number of pages taken from the free stack; `fills`, how far pages are written to;
    `begins`, whether all puts are new children; `splices`, joints of the tree that
    are taken out; `arrival`, what stands for `gained` and `begins` where all puts come from
    elsewhere.
    """

    drops: Sequence[int] = ()
    opens: dict[int, Pending] = {}  # noqa: RUF012  (never written to, as all of these)
    ends: Sequence[int] = ()
    gained: Iterable[int] = ()
    lost: Iterable[int] = ()
    fresh: int = 0
    fills: Sequence[tuple[int, int]] = ()
    begins: bool = False
    splices: Sequence[Splice] = ()
    arrival: Arrival | None = None
    figures: tuple[int, int, int, int] | None = None
    edits: Sequence[Edit] = ()
    stores: Sequence[Store] = ()

    def __init__(self, puts: dict[int, Record]) -> None:
        self.puts = puts

    def edit(self) -> None:
        """Do what concerns neither sequences nor pages.

        What may raise, for the keys are a caller's, comes last.
        """
        for target, name, value in self.stores:
            setattr(target, name, value)
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


class Told(NamedTuple):
    """A change that was carried out, with the pages that were taken and freed."""

    change: Change
    taken: Sequence[int]
    freed: Sequence[int]


class Kin(Protocol):
    """The sequences that live, and who hangs below whom."""

    def record(self, seq: int) -> Record | None: ...

    def parent(self, seq: int) -> int | None: ...


class Home:
    """What the entries of one index share. It does not hold the index, nor do entries."""

    __slots__ = ("ended", "kin", "owner")

    def __init__(self, kin: Kin) -> None:
        self.kin = kin
        self.owner = 0  # the number of the index
        self.ended: dict[int, Entry] = {}  # those whose sequences ended with a subtree


class Entry:
    """A sequence under a key of an index, which owns it.

    `added` and `used` are numbers of the index's clock.
    """

    __slots__ = ("added", "handle", "home", "key", "pins", "priority", "used")

    def __init__(
        self, key: Any, handle: int, priority: float | None, added: int, pins: int, home: Home
    ) -> None:
        self.key = key
        self.handle = handle
        self.priority = priority
        self.added = added
        self.used = added
        self.pins = pins
        self.home = home

    @property
    def ended(self) -> dict[int, Entry]:
        """Where its index looks for entries that ended."""
        return self.home.ended

    @property
    def owner(self) -> int:
        """The number of its index."""
        return self.home.owner

    @property
    def parent(self) -> int | None:
        """The nearest sequence above that lives; None for the top of a tree."""
        kin = self.home.kin
        return None if kin.record(self.handle) is None else kin.parent(self.handle)

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages of the sequence; none once it has ended."""
        record = self.home.kin.record(self.handle)
        return () if record is None else record[0]

    @property
    def tokens(self) -> int:
        """Its length; 0 once it has ended."""
        record = self.home.kin.record(self.handle)
        return 0 if record is None else record[2]
