"""Calls go out to all workers at once, a bounded number to each, and answers come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from paged_kv.errors import BadArgument
from paged_kv.integrations.ray.engine import Engine, Payload
from paged_kv.integrations.ray.line import Answer, Line, waiting


class Ask(NamedTuple):
    """One message to a worker."""

    verb: str
    args: tuple[Any, ...]
    rows: int = 1  # that it is about, for progress
    payload: Payload | None = None


class Sealed(NamedTuple):
    """A message as it is sent."""

    verb: str
    args: bytes
    payload: Payload | None


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

        Raises WorkerLost, and BadArgument for what cannot be pickled, before anything is sent. What
        is on its way when this is broken off is waited for before the next call.
        """
        queues = {name: deque(map(self._sealed, each)) for name, each in asks.items()}
        for line in self._lines.values():
            line.settle()
        found: dict[int, list[Answer]] = {name: [] for name in asks}
        while any(len(found[name]) < len(asks[name]) for name in asks):
            self._send(queues, version)
            self._receive()
            for name in asks:
                for answer in self._lines[name].answers():
                    told(asks[name][len(found[name])].rows)
                    found[name].append(answer)
        return found

    def _sealed(self, ask: Ask) -> Sealed:
        try:
            args = self._engine.seal(ask.args)
        except Exception as error:  # whatever a caller's own object raises
            what = f"arguments of {ask.verb}()"
            raise BadArgument(what, ask.args, f"what can be pickled: {error}") from error
        return Sealed(ask.verb, args, ask.payload)

    def _send(self, queues: Mapping[int, deque[Sealed]], version: int) -> None:
        for name, queue in queues.items():
            line = self._lines[name]
            while queue and len(line.refs()) < self._in_flight:
                if line.version < version:  # by an update that did not reach it
                    line.send_weights(version)
                    continue
                each = queue.popleft()
                line.send(each.verb, each.args, version, each.payload)

    def _receive(self) -> None:
        """Wait until something can be had, and take it; who hangs is ended and brought back."""
        owners = waiting(list(self._lines.values()))
        if not owners:
            return
        patience = min(line.patience() for line in owners.values())
        ready = self._engine.wait(list(owners), max(0.0, patience))
        for ref in ready:
            owners[ref].receive(ref)
        if ready:  # which may have taken long, while others had their answers
            return
        for line in owners.values():
            if line.patience() <= 0:
                line.bring_back("it gave no answer in time")
