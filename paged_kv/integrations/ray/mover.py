"""Trees move from worker to worker: whole, and only once they have arrived is the old one ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from paged_kv.errors import OutOfPages
from paged_kv.integrations.ray.balance import Load, choose
from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.line import Answer, Line
from paged_kv.integrations.ray.placement import Placement


class Mover:
    """Moves trees of a directory. `used` says when each tree was last asked for."""

    def __init__(
        self,
        dispatch: Dispatch,
        lines: Mapping[int, Line],
        placement: Placement,
        used: Mapping[int, int],
    ) -> None:
        self.moved = 0
        self._dispatch = dispatch
        self._lines = lines
        self._placement = placement
        self._used = used
        self._evicted: dict[int, int] = {}  # of each worker, when it was last looked at

    def move(self, tree: int, worker: int, version: int) -> None:
        """Let a tree live elsewhere. It travels through the engine, which holds it; the driver does
        not look at it. Raises OutOfPages where there is no room; then it stays.
        """
        source = self._placement.worker(tree)
        if source == worker:
            return
        (given,) = self._dispatch.gather({source: [Ask("copy", ((tree,),))]}, version)[source]
        _raise(given)
        ask = Ask("take", (), payload=given.payload)
        (taken,) = self._dispatch.gather({worker: [ask]}, version)[worker]
        _raise(taken)
        self._placement.move(tree, worker)  # from here on the old one is what is left over
        self.moved += 1
        self._dispatch.gather({source: [Ask("end", ((tree,),))]}, version)

    def retire(self, worker: int, version: int) -> dict[int, int]:
        """Let all trees of a worker live elsewhere, as the placement says; no others move. Where
        this fails, those that did not move yet stay, and so does the worker.
        """
        homes = self._placement.without(worker)
        for tree, home in homes.items():
            self.move(tree, home, version)
        self._placement.lose(worker)
        return homes

    def relieve(self, worker: int, version: int, stay: Collection[int]) -> int | None:
        """Move one tree away from a worker that ran out of pages, none of `stay`; which it was."""
        return self._ease(worker, version, (), stay)

    def balance(self, version: int) -> None:
        """Move one tree away from each worker that had to evict since the last time, to one that
        had not to.
        """
        short = dict.fromkeys(name for name in self._lines if self._evicts(name))
        for name in short:
            self._ease(name, version, short, ())

    def _evicts(self, name: int) -> bool:
        figures = self._lines[name].figures
        if figures is None:
            return False
        before = self._evicted.get(name, 0)
        self._evicted[name] = figures.evicted
        return figures.evicted > before

    def _ease(
        self, short: int, version: int, keep: Collection[int], stay: Collection[int]
    ) -> int | None:
        loads = self._loads()
        if len(loads) < 2 or not any(
            load.free for name, load in loads.items() if name != short and name not in keep
        ):
            return None
        (answer,) = self._dispatch.gather({short: [Ask("sizes", ())]}, version)[short]
        _raise(answer)
        move = choose(short, loads, answer.reply.value, self._used, keep, stay)
        if move is None:
            return None
        try:
            self.move(move.tree, move.worker, version)
        except OutOfPages:
            return None
        return move.tree

    def _loads(self) -> dict[int, Load]:
        found = {}
        for name, line in self._lines.items():
            figures = line.figures
            if figures is not None:
                found[name] = Load(figures.bytes_in_use, figures.max_bytes)
        return found


def _raise(answer: Answer) -> None:
    if answer.reply.error is not None:
        raise answer.reply.error
