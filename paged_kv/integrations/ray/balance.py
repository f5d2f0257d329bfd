"""Which tree moves where, when the pages of a worker run short. No tensors in here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

SLACK = 0.9  # of free bytes that a tree which comes may take


class Load(NamedTuple):
    """What a worker holds."""

    bytes_in_use: int
    max_bytes: int

    @property
    def free(self) -> int:
        """Bytes that it may still take."""
        return max(0, self.max_bytes - self.bytes_in_use)


class Move(NamedTuple):
    """A tree, and where it goes."""

    tree: int
    worker: int


def choose(
    short: int,
    loads: Mapping[int, Load],
    sizes: Mapping[int, int],
    last_used: Mapping[int, int],
    keep: Collection[int] = (),
    stay: Collection[int] = (),
) -> Move | None:
    """The tree of worker `short` that goes to the worker with the most free bytes, or None.

    The one that was used the longest ago; of equal ones the largest. It has to fit there, and one
    tree stays: it would run short there as it does here. `keep`: workers that get nothing; `stay`:
    trees that do not go.

    >>> loads = {0: Load(100, 100), 1: Load(20, 100), 2: Load(60, 100)}
    >>> choose(0, loads, {5: 30, 6: 60, 7: 10}, {5: 1, 6: 1, 7: 9})
    Move(tree=6, worker=1)
    """
    others = [worker for worker in loads if worker != short and worker not in keep]
    if not others or len(sizes) < 2:
        return None
    target = max(others, key=lambda worker: (loads[worker].free, -worker))
    room = SLACK * loads[target].free
    fitting = [tree for tree, size in sizes.items() if 0 < size <= room and tree not in stay]
    if not fitting:
        return None
    tree = min(fitting, key=lambda each: (last_used.get(each, 0), -sizes[each], each))
    return Move(tree, target)
