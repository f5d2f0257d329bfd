"""Workers of a pool in this process: what they are sent and answer is pickled as on its way to
another one, and they die and hang when a test says so.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from paged_kv.integrations.ray.calls import Call
from paged_kv.integrations.ray.engine import Died
from paged_kv.integrations.ray.tape import Order
from paged_kv.integrations.ray.worker import Worker

FINE = "fine"
DIES_BEFORE = "dies before"  # the call is not carried out
DIES_AFTER = "dies after"  # it is, but nobody hears of it
HANGS = "hangs"


def sent(value: Any) -> Any:
    """What arrives: arrays are read only, as those of an object store."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


class Actor:
    """A worker, and whether it lives."""

    def __init__(self, recipe: Any, worker: type[Any]) -> None:
        self.worker = worker(lambda: sent(recipe))
        self.dead = False
        self.hangs = False
        self.waiting = 0  # answers that nobody has taken


class Answer:
    """What a call answers, if ever."""

    def __init__(self, actor: Actor | None, value: Any, fate: str) -> None:
        self.actor = actor
        self.value = value
        self.fate = fate


class InProcess:
    """An engine. `fate` says what becomes of each call; time stands still but where it waits."""

    def __init__(
        self,
        recipe: Any,
        fate: Callable[[str], str] = lambda verb: FINE,
        worker: type[Any] = Worker,
    ) -> None:
        self.recipe = recipe
        self.worker = worker
        self.fate = fate
        self.calls: list[Call] = []
        self._hired: list[ref[Actor]] = []  # whose handle nobody has any more, ends
        self.most_waiting = 0
        self.clock = 0.0
        self.closed = False
        self.gone = False  # as if Ray had been shut down

    def hire(self) -> Actor:
        actor = Actor(self.recipe, self.worker)
        self._hired.append(ref(actor))
        return actor

    @property
    def actors(self) -> list[Actor]:
        found = [hired() for hired in self._hired]
        return [actor for actor in found if actor is not None]

    def living(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.dead]

    def stop(self, actor: Actor) -> None:
        actor.dead = True

    def hello(self, actor: Actor) -> Answer:
        return self._answer(actor, "hello", actor.worker.hello)

    def begin(
        self, actor: Actor, number: int, version: int, weights: Any, states: Mapping[int, Any]
    ) -> Answer:
        loaded = None if weights is None else sent(weights.value)
        saved = sent(dict(states))
        return self._answer(
            actor, "begin", lambda: actor.worker.begin(number, version, loaded, saved)
        )

    def record(self, actor: Actor, order: Order | None, reason: str) -> Answer:
        return self._answer(actor, "record", lambda: actor.worker.record(sent(order), reason))

    def run(self, actor: Actor, call: Call, payload: Any) -> Answer:
        self.calls.append(call)
        value = None if payload is None else sent(payload.value)
        return self._answer(actor, call.verb, lambda: actor.worker.run(sent(call), value))

    def give(self, actor: Actor, call: Call) -> tuple[Answer, Answer]:
        self.calls.append(call)
        both = self._answer(actor, call.verb, lambda: actor.worker.give(sent(call)))
        reply, trees = both.value or (None, None)
        both.value = reply
        return both, Answer(None, trees, both.fate)

    def seal(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def alive(self) -> bool:
        return not self.gone

    def put(self, value: Any) -> Answer:
        return Answer(None, sent(value), FINE)

    def wait(self, refs: Sequence[Answer], seconds: float) -> list[Answer]:
        ready = [ref for ref in refs if ref.fate != HANGS or self._dead(ref)]
        if not ready:
            self.clock += seconds
        return ready[:1]

    def result(self, ref: Answer, seconds: float) -> Any:
        if self._dead(ref):
            raise Died("killed")
        if ref.fate == HANGS:
            self.clock += seconds
            raise Died("it gave no answer in time")
        if ref.actor is not None:
            ref.actor.waiting -= 1
        return ref.value

    def now(self) -> float:
        return self.clock

    def close(self) -> None:
        self.closed = True

    def _dead(self, ref: Answer) -> bool:
        return ref.actor is not None and ref.actor.dead

    def _answer(self, actor: Actor, verb: str, work: Callable[[], Any]) -> Answer:
        fate = self.fate(verb)
        value = None
        actor.hangs |= fate == HANGS
        if actor.hangs:
            fate = HANGS  # what comes later waits behind it
        if not actor.dead and fate != DIES_BEFORE and fate != HANGS:
            value = sent(work())
        if fate in (DIES_BEFORE, DIES_AFTER):
            actor.dead = True
        actor.waiting += 1
        self.most_waiting = max(self.most_waiting, actor.waiting)
        return Answer(actor, value, fate)
