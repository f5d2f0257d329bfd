"""Weights by version: handed to the engine once, kept as long as a worker may have to come back to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paged_kv.integrations.ray.dispatch import Ask, Dispatch
from paged_kv.integrations.ray.engine import Engine, Payload
from paged_kv.integrations.ray.line import Answer, Line
from paged_kv.integrations.ray.weights import packed, shapes


class Versions:
    """The weights of a pool. Version 0 is what workers make themselves."""

    def __init__(self, engine: Engine) -> None:
        self.current = 0
        self.held: dict[int, Payload] = {}
        self._engine = engine

    def update(self, state: Any, dispatch: Dispatch, lines: Mapping[int, Line]) -> int:
        """Give all workers other weights; returns their version. Raises BadArgument for those of
        another model; then workers go on with theirs.
        """
        weights = packed(state)
        asks = {name: [Ask("fits", (shapes(weights),))] for name in lines}
        raise_first(dispatch.gather(asks, self.current))
        version = self.current + 1
        self.held[version] = self._engine.put(weights)
        self.current = version  # each worker gets them before its next call
        self.forget(lines)
        return version

    def forget(self, lines: Mapping[int, Line]) -> None:
        """Let go of weights that no worker may have to come back to."""
        needed = {line.saved_version for line in lines.values()}
        for old in self.held.keys() - needed - {self.current}:
            del self.held[old]


def raise_first(answers: Mapping[int, Sequence[Answer]]) -> None:
    """Raise the first error that a worker answered with."""
    for each in answers.values():
        for answer in each:
            if answer.reply.error is not None:
                raise answer.reply.error
