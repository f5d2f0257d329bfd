"""What the driver asks of whatever runs its workers: Ray, or a single process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from paged_kv.integrations.ray.calls import Call
from paged_kv.integrations.ray.held_trees import TreeState
from paged_kv.integrations.ray.tape import Order

Actor = Any
Ref = Any  # an answer that may not be there yet; hashable
Payload = Any  # an object that the engine holds


class Died(Exception):
    """A worker that will not answer."""


class Engine(Protocol):
    """Actors, each of which carries out what it is sent in order."""

    def hire(self) -> Actor:
        """A new worker, which may take long to come."""

    def stop(self, actor: Actor) -> None:
        """End a worker at once, whatever it does."""

    def hello(self, actor: Actor) -> Ref:
        """As `Worker.hello`."""

    def begin(
        self,
        actor: Actor,
        number: int,
        version: int,
        weights: Payload | None,
        states: Mapping[int, TreeState],
    ) -> Ref:
        """As `Worker.begin`."""

    def record(self, actor: Actor, order: Order | None, reason: str) -> Ref:
        """As `Worker.record`."""

    def run(self, actor: Actor, call: Call, payload: Payload | None) -> Ref:
        """As `Worker.run`."""

    def give(self, actor: Actor, call: Call) -> tuple[Ref, Payload]:
        """As `Worker.give`; the trees stay with the engine, and outlive the worker."""

    def seal(self, value: Any) -> bytes:
        """A value pickled as the workers can read it."""

    def put(self, value: Any) -> Payload:
        """Have the engine hold an object."""

    def wait(self, refs: Sequence[Ref], seconds: float) -> list[Ref]:
        """Those that can be had; waits for one."""

    def result(self, ref: Ref, seconds: float) -> Any:
        """An answer, or a payload. Raises Died where it will never come, or not in time."""

    def alive(self) -> bool:
        """Whether it can still have workers: nobody ended what they run on."""

    def now(self) -> float:
        """Seconds since some moment."""

    def close(self) -> None:
        """End what was begun for this engine."""
