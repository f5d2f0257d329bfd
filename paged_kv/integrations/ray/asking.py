"""What surrounds a question to the workers of a pool: what is seen to before, and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from paged_kv.errors import WorkerLost
from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.frontier import Frontier, Question
from paged_kv.integrations.ray.line import Line
from paged_kv.integrations.ray.mover import Mover
from paged_kv.integrations.ray.upkeep import Upkeep
from paged_kv.integrations.ray.versions import Versions


class Asking:
    """Asks workers, has snapshots of them after every so many calls, and evens out their memory.

    `used`: the call that a tree was last asked for by; others read it.
    """

    def __init__(
        self,
        lines: Mapping[int, Line],
        dispatch: Dispatch,
        frontier: Frontier,
        mover: Mover,
        upkeep: Upkeep,
        versions: Versions,
        used: dict[int, int],
        snapshot_every: int,
    ) -> None:
        self._lines = lines
        self._dispatch = dispatch
        self._frontier = frontier
        self._mover = mover
        self._upkeep = upkeep
        self._versions = versions
        self._used = used
        self._every = snapshot_every
        self._calls = 0

    def settle(self) -> None:
        """Before a call: see to what was dropped, and to what the call before left behind."""
        self._upkeep.begin(self._versions.current)

    def ask(
        self,
        what: str,
        trees: Sequence[int],
        columns: Sequence[Sequence[Any]],
        options: Mapping[str, Any] | None = None,
    ) -> list[list[Any]]:
        """What workers say of each row: the tree that it is about, and a value in each column."""
        if not trees:
            return []
        self._calls += 1
        self._used.update(dict.fromkeys(trees, self._calls))
        found = self._frontier.ask(Question(what, trees, columns, options, self._versions.current))
        lines = self._lines.items()
        self.look_after([name for name, line in lines if line.calls_since_snapshot >= self._every])
        return found

    def look_after(self, due: Sequence[int]) -> None:
        """Have snapshots of these workers, and move trees where pages run short. Whoever is lost
        meanwhile is missed by the next call that needs it: this one has what it asked for.
        """
        try:
            self._mover.balance(self._versions.current)
            for name, error in self.save(due):
                why = f"worker {name} cannot be saved, and repeats more if it dies: {error}"
                warnings.warn(why, RuntimeWarning, stacklevel=4)
        except WorkerLost:
            self._upkeep.unsure()

    def save(self, names: Sequence[int]) -> list[tuple[int, Exception]]:
        """Have snapshots of these workers; those that cannot be had, and why."""
        if not names:
            return []
        asks = {name: [Ask("save", ())] for name in names}
        answers = self._dispatch.gather(asks, self._versions.current)
        errors = [(name, answer.reply.error) for name, (answer,) in answers.items()]
        return [(name, error) for name, error in errors if error is not None]
