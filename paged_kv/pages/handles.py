"""Numbers for sequences: unique in this process, and by all odds among processes.

One counter serves the whole process. It begins at a random place and goes round below 2^53, so that
a number is exact as a double. A cache draws runs of numbers from it. Two processes that draw a
million numbers each share one with a probability of 2.5e-10; a process that was forked begins anew.
"""

from __future__ import annotations

import itertools
import os
import secrets
import weakref

UNIT = 64  # numbers of the shortest run
UNITS = (1 << 53) // UNIT
MOST_UNITS = 4096  # of a run


def _begin() -> itertools.count[int]:
    return itertools.count(secrets.randbelow(UNITS))


_units = _begin()
_issuers: weakref.WeakSet[Handles] = weakref.WeakSet()


class Handles:
    """Gives out numbers to one cache, and knows which ones it gave.

    >>> ours, theirs = Handles(), Handles()
    >>> first, second = ours.take(2)
    >>> ours.gave(first), theirs.gave(first), ours.gave(second + 1)
    (True, False, False)
    """

    __slots__ = ("__weakref__", "_end", "_next", "_runs", "_units")

    def __init__(self) -> None:
        self._next = 0
        self._end = 0
        self._units = 1  # of the next run
        self._runs: list[tuple[int, int]] = []  # [first, end), the one in use last
        _issuers.add(self)

    def take(self, count: int) -> list[int]:
        """New numbers."""
        first = self._next
        end = first + count
        if end <= self._end:
            self._next = end
            return list(range(first, end))
        taken = list(range(first, self._end))
        while len(taken) < count:
            self._draw(count - len(taken))
            end = min(self._end, self._next + count - len(taken))
            taken += range(self._next, end)
            self._next = end
        return taken

    def _draw(self, count: int) -> None:
        """Begin a run of up to `count` numbers, at least a unit.

        Each run is twice as long as the one before, up to a limit.
        """
        wanted = max(self._units, min(count // UNIT + 1, MOST_UNITS))
        first = last = next(_units) % UNITS or next(_units) % UNITS  # 0 is no handle
        while last - first + 1 < wanted:
            following = next(_units) % UNITS
            if following != last + 1:  # another thread drew in between: its neighbours are left out
                break
            last = following
        self._units = min(2 * self._units, MOST_UNITS)
        self._end = 0  # there is no run in use, should an interrupt come before the new one is
        if self._runs and self._runs[-1][1] == first * UNIT:
            self._runs[-1] = self._runs[-1][0], (last + 1) * UNIT
        else:
            self._runs.append((first * UNIT, (last + 1) * UNIT))
        self._next = first * UNIT
        self._end = (last + 1) * UNIT

    def gave(self, number: int) -> bool:
        """Whether this cache gave out `number`, to a sequence that lives or lived.
        Cost: O(runs).
        """
        if self._next <= number < self._end:
            return False
        return any(first <= number < end for first, end in self._runs)

    def mark(self) -> tuple[int, int]:
        """A moment: numbers that are given later are `since` it."""
        if not self._runs:
            return 0, 0
        return len(self._runs), self._following()

    def _following(self) -> int:
        """Where the rest of the last run begins."""
        first, end = self._runs[-1]
        # an interrupt may leave a run of which no number is ever given
        return self._next if first <= self._next <= end else first

    def is_mark(self, mark: object) -> bool:
        """Whether `mark` may be what `mark` returned."""
        if type(mark) is not tuple or [type(part) for part in mark] != [int, int]:
            return False
        runs, following = mark
        if not runs:
            return not following
        if not 1 <= runs <= len(self._runs):
            return False
        first, end = self._runs[runs - 1]
        return bool(first <= following <= end)

    def since(self, number: int, mark: tuple[int, int]) -> bool:
        """Whether a number that this cache gave out was given after the moment `mark`."""
        runs, following = mark
        if runs and self._runs[runs - 1][0] <= number < self._runs[runs - 1][1]:
            return number >= following
        return any(first <= number < end for first, end in self._runs[runs:])

    def begin_anew(self) -> None:
        """Give no number of the run in use any more: another process goes on with it."""
        if self._runs:
            self._runs[-1] = self._runs[-1][0], self._following()
        self._end = self._next


def _after_fork() -> None:
    global _units
    _units = _begin()
    for issuer in list(_issuers):
        issuer.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
