"""Calls to a worker: numbered, so that each is carried out once, and noted, so that a worker which
died can be brought to where it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from paged_kv.errors import BadArgument

Name = tuple[int, int]  # a tree, and the number of a node in it


class Call(NamedTuple):
    """What a worker is asked for."""

    number: int  # above that of the call before
    verb: str
    args: bytes  # pickled: what a worker cannot read is told as a mistake of the caller
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


class Journal:
    """The calls to one worker since its last snapshot, in order.

    Each change is one step of Python: whatever interrupts a call leaves a journal that is whole.

    >>> journal = Journal()
    >>> first = journal.note("open", b"", 0, ())
    >>> second = journal.note("sample", b"", 0, ())
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
        self._answered: set[int] = set()

    def __len__(self) -> int:
        return len(self._calls)

    def note(
        self,
        verb: str,
        args: bytes,
        version: int,
        dropped: tuple[Name, ...],
        payload: Any = None,
    ) -> Noted:
        """One more call."""
        number = self._next
        self._next += 1  # before it is noted: a number is given out once
        noted = Noted(Call(number, verb, args, version, dropped), payload)
        self._calls[number] = noted
        return noted

    def answered(self, number: int) -> None:
        """Note that a call was answered. Raises BadArgument for one that waits for no answer."""
        if not self.is_waiting(number):
            waiting = [noted.call.number for noted in self.waiting()]
            raise BadArgument("number", number, f"one of {waiting[:20]}")
        self._answered.add(number)

    def is_waiting(self, number: int) -> bool:
        """Whether a call was not answered yet."""
        return number in self._calls and number not in self._answered

    def calls(self) -> list[Noted]:
        """All since the last snapshot."""
        return list(self._calls.values())

    def waiting(self) -> list[Noted]:
        """Those that were not answered."""
        return [noted for number, noted in self._calls.items() if number not in self._answered]

    def forget_waiting(self) -> None:
        """Forget calls that were not answered: they are not repeated, as if never asked."""
        self._calls = {
            number: noted for number, noted in self._calls.items() if number in self._answered
        }

    def cut(self, number: int) -> None:
        """Forget a call and those before it: a snapshot has what they did."""
        if any(noted.call.number <= number for noted in self.waiting()):
            raise BadArgument("number", number, "one before which all was answered")
        self._calls = {late: noted for late, noted in self._calls.items() if late > number}
        self._answered &= self._calls.keys()
