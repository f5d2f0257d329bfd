"""Which worker a tree lives in: named by a hash, corrected by a bound on load, then remembered.

Each tree has an order of all workers of its own (rendezvous hashing), and goes to the first one
that has room: nobody gets more than `bound` times the mean. A worker that goes leaves its own trees
to be placed anew, and no others. No tensors in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, isfinite

import numpy as np
import numpy.typing as npt

from paged_kv.checks import whole
from paged_kv.errors import BadArgument, BadCount

BOUND = 1.1
Words = npt.NDArray[np.uint64]


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
        self._workers = np.array(sorted(workers), dtype=np.uint64)
        if not len(self._workers):
            raise BadCount("workers", 0, "at least 1")
        self._salts = _mixed(self._workers)
        self._loads = np.zeros(len(self._workers), dtype=np.int64)
        self._rows = {int(worker): row for row, worker in enumerate(self._workers)}
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
        return list(self._rows)

    def trees(self, worker: int) -> list[int]:
        """The trees of a worker, in the order they came. Cost: O(trees)."""
        return [tree for tree, home in self._homes.items() if home == worker]

    def loads(self) -> dict[int, int]:
        """Trees of each worker."""
        return {worker: int(self._loads[row]) for worker, row in self._rows.items()}

    def room(self, trees: int) -> int:
        """The most trees that one worker is given, where there are so many."""
        mean = trees / len(self._workers)
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
        self._loads[self._rows[self.worker(tree)]] -= 1
        del self._homes[tree]

    def move(self, tree: int, worker: int) -> None:
        """Let a tree live elsewhere, whatever the bound says: it was moved for lack of memory."""
        row = self._row(worker)
        self._loads[self._rows[self.worker(tree)]] -= 1
        self._loads[row] += 1
        self._homes[tree] = worker

    def lose(self, worker: int) -> dict[int, int]:
        """Take a worker out; where each of its trees lives from now on. All others stay.

        Raises BadArgument for the last one.
        """
        row = self._row(worker)
        if len(self._workers) == 1:
            raise BadArgument("worker", worker, "one of several: trees have to live somewhere")
        orphans = self.trees(worker)
        self._workers = np.delete(self._workers, row)
        self._salts = np.delete(self._salts, row)
        self._loads = np.delete(self._loads, row)
        self._rows = {int(name): place for place, name in enumerate(self._workers)}
        room = self.room(len(self._homes))
        return {tree: self._place(tree, room) for tree in orphans}

    # -- inside

    def _row(self, worker: int) -> int:
        if worker not in self._rows:
            raise BadArgument("worker", worker, f"one of {self.workers()[:20]}")
        return self._rows[worker]

    def _place(self, tree: int, room: int) -> int:
        """The first worker of a tree's own order that has fewer trees than `room`."""
        scores = _mixed(self._salts ^ _mixed(np.array([tree], dtype=np.uint64)))
        free = self._loads < room
        row = int(np.where(free, scores >> np.uint64(1), 0).argmax())
        if not free[row]:  # all that are free score zero
            row = int(free.argmax())
        self._loads[row] += 1
        self._homes[tree] = int(self._workers[row])
        return self._homes[tree]


def _mixed(words: Words) -> Words:
    """Other words, each bit of which depends on all bits of the one: the finalizer of splitmix64.

    The same in every process.
    """
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
