"""Which worker a tree lives in: named by a hash, corrected by a bound on load, then remembered.

Each tree has an order of all workers of its own (rendezvous hashing), and goes to the first one
that has room: nobody gets more than `bound` times the mean. A worker that goes leaves its own trees
to be placed anew, and no others. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from math import ceil, floor, isfinite
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paged_kv.checks import whole
from paged_kv.errors import BadArgument, BadCount

BOUND = 1.1
Words = npt.NDArray[np.uint64]


class Team(NamedTuple):
    """All workers, in order."""

    workers: Words
    salts: Words  # of each, for its hashes
    loads: npt.NDArray[np.int64]  # trees of each
    rows: dict[int, int]  # by worker


class Placement:
    """The directory of trees. Workers and trees are numbers; a number is given out once.

    Cost of opening a tree: O(workers), at the speed of numpy.

    >>> placement = Placement(range(3))
    >>> [placement.open(tree) for tree in range(6)]
    [0, 1, 2, 2, 1, 0]
    >>> placement.loads()
    {0: 2, 1: 2, 2: 2}
    """

    def __init__(self, workers: Iterable[int], bound: float = BOUND) -> None:
        if not isinstance(bound, (int, float)) or not isfinite(bound) or bound < 1:
            raise BadArgument("bound", bound, "a number of at least 1")
        self._bound = bound
        self._team = _team(workers)
        if not self._team.rows:
            raise BadCount("workers", 0, "at least 1")
        self._homes: dict[int, int] = {}  # of each tree

    # -- reading

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, tree: int) -> bool:
        return tree in self._homes

    def worker(self, tree: int) -> int:
        """Where a tree lives. Raises BadArgument for one that is not open."""
        if tree not in self._homes:
            raise BadArgument("tree", tree, "one that is open")
        return self._homes[tree]

    def workers(self) -> list[int]:
        """All workers."""
        return list(self._team.rows)

    def trees(self, worker: int) -> list[int]:
        """The trees of a worker, in the order they came. Cost: O(trees)."""
        return [tree for tree, home in self._homes.items() if home == worker]

    def loads(self) -> dict[int, int]:
        """Trees of each worker."""
        return {worker: int(self._team.loads[row]) for worker, row in self._team.rows.items()}

    def room(self, trees: int) -> int:
        """The most trees that one worker is given, where there are so many."""
        mean = trees / len(self._team.rows)
        return max(floor(self._bound * mean), ceil(mean))

    # -- changes

    def open(self, tree: int) -> int:
        """Place a tree that is not open yet; where it lives from now on."""
        whole("tree", tree, 0)
        if tree in self._homes:
            raise BadArgument("tree", tree, "one that is not open")
        return self._place(tree, self.room(len(self._homes) + 1))

    def close(self, tree: int) -> None:
        """Forget a tree."""
        self._team.loads[self._row(self.worker(tree))] -= 1
        del self._homes[tree]

    def move(self, tree: int, worker: int) -> None:
        """Let a tree live elsewhere, whatever the bound says: it was moved for lack of memory."""
        row = self._row(worker)
        self._team.loads[self._row(self.worker(tree))] -= 1
        self._team.loads[row] += 1
        self._homes[tree] = worker

    def lose(self, worker: int) -> dict[int, int]:
        """Take a worker out; where each of its trees lives from now on. All others stay.

        Raises BadArgument for the last one.
        """
        self._row(worker)
        if len(self._team.rows) == 1:
            raise BadArgument("worker", worker, "one of several: trees have to live somewhere")
        orphans = self.trees(worker)
        self._team = _team(each for each in self._team.rows if each != worker)
        for tree in orphans:
            del self._homes[tree]
        self.recount()
        room = self.room(len(self._homes) + len(orphans))
        return {tree: self._place(tree, room) for tree in orphans}

    def without(self, worker: int) -> dict[int, int]:
        """What `lose` would say; nothing changes. Cost: O(trees)."""
        return deepcopy(self).lose(worker)

    def recount(self) -> None:
        """Count trees anew: an interrupt may have come between a tree and its count. Cost:
        O(trees).
        """
        self._team.loads[:] = 0
        for home in self._homes.values():
            self._team.loads[self._row(home)] += 1

    # -- inside

    def _row(self, worker: int) -> int:
        if worker not in self._team.rows:
            raise BadArgument("worker", worker, f"one of {self.workers()[:20]}")
        return self._team.rows[worker]

    def _place(self, tree: int, room: int) -> int:
        """The first worker of a tree's own order that has fewer trees than `room`."""
        team = self._team
        scores = _mixed(team.salts ^ _mixed(np.array([tree], dtype=np.uint64)))
        free = team.loads < room
        row = int(np.where(free, scores >> np.uint64(1), 0).argmax())
        if not free[row]:  # all that are free score zero
            row = int(free.argmax())
        team.loads[row] += 1
        self._homes[tree] = int(team.workers[row])
        return self._homes[tree]


def _team(workers: Iterable[int]) -> Team:
    """Workers that have no tree."""
    numbers = np.array(sorted(workers), dtype=np.uint64)
    rows = {int(worker): row for row, worker in enumerate(numbers)}
    return Team(numbers, _mixed(numbers), np.zeros(len(numbers), dtype=np.int64), rows)


def _mixed(words: Words) -> Words:
    """Other words, each bit of which depends on all bits of the one: the finalizer of splitmix64.

    The same in every process.
    """
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
