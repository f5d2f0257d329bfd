"""Calls to a worker: numbered, so that each is carried out once, and noted, so that a worker which
died can be brought to where it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from paged_kv.errors import BadArgument

MAKERS = ("open", "sample", "extend", "fork", "crop")
Name = tuple[int, int]  # a tree, and the number of a node in it


class Call(NamedTuple):
    """What a worker is asked for."""

    number: int  # one more than that of the call before
    verb: str
    args: tuple[Any, ...]
    version: int  # of the weights that it is meant for
    dropped: tuple[Name, ...]  # nodes that nobody holds any more: forgotten before


class Figures(NamedTuple):
    """What a worker holds and did."""

    nodes: int = 0
    pages: int = 0  # in use
    bytes_in_use: int = 0  # K/V and hidden states
    max_bytes: int = 0
    tokens_fed: int = 0
    evicted: int = 0  # paths
    queries: int = 0  # of paths
    hits: int = 0
    pages_allocated: int = 0
    pages_copied: int = 0
    pages_freed: int = 0
    busy_seconds: float = 0.0
    calls: int = 0


class Reply(NamedTuple):
    """What came of a call."""

    number: int
    value: Any
    error: Exception | None
    figures: Figures | None


class Noted(NamedTuple):
    """A call, and what it takes along: an object that the engine holds, such as a moving tree."""

    call: Call
    payload: Any


def names_made(call: Call, value: Any) -> list[Name]:
    """The nodes that a call made, by its reply. `open` names trees, all others nodes above."""
    if call.verb not in MAKERS or not value:
        return []
    above = call.args[0]
    trees = above if call.verb == "open" else [tree for tree, _ in above]
    copies = len(value) // len(trees)
    spread = [tree for tree in trees for _ in range(copies)]
    return [(tree, made.number) for tree, made in zip(spread, value)]


class Journal:
    """The calls to one worker since its last snapshot, in order.

    >>> journal = Journal()
    >>> first = journal.note("open", ((1,),), 0, ())
    >>> second = journal.note("sample", ((1,),), 0, ())
    >>> journal.answered(first.call.number)
    >>> [noted.call.verb for noted in journal.waiting()]
    ['sample']
    >>> journal.cut(first.call.number)
    >>> [noted.call.verb for noted in journal.calls()]
    ['sample']
    """

    def __init__(self) -> None:
        self._next = 1
        self._calls: dict[int, Noted] = {}
        self._waiting: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def note(
        self,
        verb: str,
        args: tuple[Any, ...],
        version: int,
        dropped: tuple[Name, ...],
        payload: Any = None,
    ) -> Noted:
        """One more call."""
        noted = Noted(Call(self._next, verb, args, version, dropped), payload)
        self._calls[self._next] = noted
        self._waiting[self._next] = None
        self._next += 1
        return noted

    def answered(self, number: int) -> None:
        """Note that a call was answered. Raises BadArgument for one that waits for no answer."""
        if number not in self._waiting:
            raise BadArgument("number", number, f"one of {list(self._waiting)[:20]}")
        del self._waiting[number]

    def is_waiting(self, number: int) -> bool:
        """Whether a call was not answered yet."""
        return number in self._waiting

    def calls(self) -> list[Noted]:
        """All since the last snapshot."""
        return list(self._calls.values())

    def waiting(self) -> list[Noted]:
        """Those that were not answered."""
        return [self._calls[number] for number in self._waiting]

    def cut(self, number: int) -> None:
        """Forget a call and those before it: a snapshot has what they did."""
        if any(early <= number for early in self._waiting):
            raise BadArgument("number", number, "one before which all was answered")
        self._calls = {late: noted for late, noted in self._calls.items() if late > number}
