"""What is seen to before each call: nodes that were dropped, and what an interrupt left behind."""

from __future__ import annotations

from contextlib import suppress

from paged_kv.errors import WorkerLost
from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.gate import Gate
from paged_kv.integrations.ray.line import Line
from paged_kv.integrations.ray.placement import Placement
from paged_kv.integrations.ray.pool_nodes import Grove


class Upkeep:
    """Keeps workers, directory and nodes in step. `used` is forgotten with the trees."""

    def __init__(
        self,
        gate: Gate,
        dispatch: Dispatch,
        lines: dict[int, Line],
        placement: Placement,
        grove: Grove,
        used: dict[int, int],
    ) -> None:
        self._gate = gate
        self._dispatch = dispatch
        self._lines = lines
        self._placement = placement
        self._grove = grove
        self._used = used

    def begin(self, version: int) -> None:
        """Let workers know of nodes that were dropped here; trees without nodes end.

        Where the call before did not return, nobody knows what it has done: workers are told what
        they are to hold, forget all else, and say what they do not have.
        """
        tidy = self._gate.tidy
        self._gate.tidy = frozenset()  # until this call has returned
        names = frozenset(self._lines)
        if not names <= tidy:
            tidy |= self._tidied(names - tidy, version)
            names = frozenset(self._lines)
        self._gate.clean = tidy & names
        for name in self._grove.taken():
            self._lines[self._placement.worker(name[0])].dropped.append(name)
        self.close_empty()

    def unsure(self) -> None:
        """Have the next call tell workers what to hold, though this one returns."""
        self._gate.clean = frozenset()

    def close_empty(self) -> None:
        """Close trees without nodes."""
        for tree in self._grove.emptied():
            self.close(tree)

    def close(self, tree: int) -> None:
        """Forget a tree."""
        self._used.pop(tree, None)
        if tree in self._placement:
            self._placement.close(tree)

    def _tidied(self, names: frozenset[int], version: int) -> frozenset[int]:
        """Those of these workers that hold what they are to hold, after having been told."""
        self._grove.sweep()
        self._placement.recount()
        for name in self._lines.keys() - set(self._placement.workers()):
            self._lines.pop(name).close()  # it was being retired
        alive = set(self._grove.trees())
        for worker in self._placement.workers():
            for tree in self._placement.trees(worker):
                if tree not in alive:
                    self.close(tree)
        done = []
        for name in names & self._lines.keys():
            if not self._lines[name].lost:  # else whoever needs it has it brought back
                with suppress(WorkerLost):
                    self._tidy(name, version)
                    done.append(name)
        return frozenset(done)

    def _tidy(self, name: int, version: int) -> None:
        held = {tree: self._grove.held(tree) for tree in self._placement.trees(name)}
        (answer,) = self._dispatch.gather({name: [Ask("keep", (held,))]}, version)[name]
        if answer.reply.error is not None:
            raise answer.reply.error
        self._grove.remove(answer.reply.value)
