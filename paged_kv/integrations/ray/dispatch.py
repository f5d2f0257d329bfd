"""Calls go out to all workers at once, a bounded number to each, and answers come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from paged_kv.integrations.ray.engine import Engine, Payload
from paged_kv.integrations.ray.line import Answer, Line, waiting


class Ask(NamedTuple):
    """One message to a worker."""

    verb: str
    args: tuple[Any, ...]
    rows: int = 1  # that it is about, for progress
    payload: Payload | None = None


class Dispatch:
    """Sends and waits. `in_flight`: messages of one worker that were not answered, at most."""

    def __init__(self, engine: Engine, lines: Mapping[int, Line], in_flight: int) -> None:
        self._engine = engine
        self._lines = lines
        self._in_flight = in_flight

    def gather(
        self,
        asks: Mapping[int, Sequence[Ask]],
        version: int,
        told: Callable[[int], object] = lambda rows: None,
    ) -> dict[int, list[Answer]]:
        """The answers of each worker, in the order it was asked; `told` hears of rows as they come.

        Raises WorkerLost. What is on its way when this is interrupted is dropped once it comes.
        """
        self._drain()
        queues = {name: deque(each) for name, each in asks.items()}
        found: dict[int, list[Answer]] = {name: [] for name in asks}
        try:
            while any(len(found[name]) < len(asks[name]) for name in asks):
                self._send(queues, version)
                self._receive()
                for name in asks:
                    for answer in self._lines[name].answers():
                        told(asks[name][len(found[name])].rows)
                        found[name].append(answer)
        except BaseException:
            for name, answers in found.items():
                self._lines[name].drop(answers)
                self._lines[name].abandon()
            raise
        return found

    def _send(self, queues: Mapping[int, deque[Ask]], version: int) -> None:
        for name, queue in queues.items():
            line = self._lines[name]
            while queue and len(line.refs()) < self._in_flight:
                ask = queue.popleft()
                line.send(ask.verb, ask.args, version, ask.payload)

    def _receive(self) -> None:
        """Wait until something can be had, and take it; who hangs is ended and brought back."""
        owners = waiting(list(self._lines.values()))
        if not owners:
            return
        busy = set(owners.values())
        patience = min(line.patience() for line in busy)
        for ref in self._engine.wait(list(owners), max(0.0, patience)):
            owners[ref].receive(ref)
        for line in busy:
            if line.refs() and line.patience() <= 0:
                line.bring_back("it gave no answer in time")

    def _drain(self) -> None:
        """Wait for what an earlier call left on its way."""
        while waiting(list(self._lines.values())):
            self._receive()
        for line in self._lines.values():
            line.abandon()
