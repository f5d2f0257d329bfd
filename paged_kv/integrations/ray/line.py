"""One worker, as the driver sees it: what it was asked for, and how it is brought back."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from paged_kv.errors import BadArgument, ClosedPool, WorkerLost
from paged_kv.integrations.ray.calls import Call, Figures, Journal, Name, Noted, Reply
from paged_kv.integrations.ray.engine import Actor, Died, Engine, Payload, Ref
from paged_kv.integrations.ray.held_trees import TreeState
from paged_kv.integrations.ray.tape import Order

GIVES = ("save", "copy")  # whose trees come apart from the reply
NOTHING = pickle.dumps(())  # arguments


class Limits(NamedTuple):
    """How long is waited, and how often tried."""

    seconds: float  # for an answer
    start_seconds: float  # for a worker and its model
    restarts: int  # one after the other, without an answer in between


class Answer(NamedTuple):
    """A call that was answered."""

    call: Call
    reply: Reply
    payload: Payload | None  # trees that were given


class Sent(NamedTuple):
    """A call on its way."""

    noted: Noted
    payload: Payload | None


class Called(NamedTuple):
    """A worker that comes up."""

    actor: Actor
    hello: Ref


class Saved(NamedTuple):
    """A snapshot of all trees of a worker."""

    trees: dict[int, TreeState]
    number: int  # of the last call that it has; 0 before there is any
    version: int  # of the weights


class Line:
    """A worker by its number. It dies and comes back: calls since its last snapshot are repeated in
    the same batches.

    Whatever breaks off a call leaves a journal that is whole; `settle` sees to the rest before the
    next one. `dropped` are nodes that nobody holds any more; they go along with the next call.
    `weights` are those of each version but the first, with which a model is made; the pool sees to
    them.
    """

    def __init__(
        self, name: int, engine: Engine, limits: Limits, weights: Mapping[int, Payload]
    ) -> None:
        self.name = name
        self.restarts = 0
        self.dropped: list[Name] = []
        self.figures: Figures | None = None
        self.order: Order | None = None  # what it records
        self.pid: int | None = None
        self._engine = engine
        self._limits = limits
        self._weights = weights
        self._journal = Journal()
        self._actor: Actor = None
        self._called: Called | None = None
        self._closed = False
        self._sent: dict[Ref, Sent] = {}
        self._answers: list[Answer] = []
        self._since = 0.0
        self._saved = Saved({}, 0, 0)

    # -- calls

    def send(self, verb: str, args: bytes, version: int, payload: Payload | None = None) -> None:
        """Ask for something; `receive` has the answer some time."""
        if not self._sent:
            self._since = self._engine.now()
        noted = self._journal.note(verb, args, version, tuple(self.dropped), payload)
        self.dropped = []
        if self._actor is None:
            self.bring_back("it was lost before")
            return
        ref, sent = self._submitted(self._actor, noted)
        self._sent[ref] = sent

    def send_weights(self, version: int) -> None:
        """Have the worker compute with these weights; it has no answer."""
        self.send("weights", NOTHING, version, self._weights[version])

    def refs(self) -> list[Ref]:
        """What is waited for, the oldest first."""
        return list(self._sent)

    def patience(self) -> float:
        """Seconds until it counts as one that hangs."""
        return self._since + self._limits.seconds - self._engine.now()

    def receive(self, ref: Ref) -> None:
        """Take an answer that can be had; one that died is brought back, and has answered all."""
        sent = self._sent.get(ref)
        if sent is None:  # answered while the worker was brought back
            return
        try:
            self._accept(sent, self._engine.result(ref, self._limits.seconds))
        except Died as error:
            self.bring_back(str(error))
            return
        self._sent.pop(ref, None)
        self._since = self._engine.now()

    def answers(self) -> list[Answer]:
        """All that came since the last time, in order."""
        found = self._answers
        self._answers = []
        return found

    def settle(self) -> None:
        """Wait for what a call that was broken off has left on its way; nobody wants to know of it.

        A worker of which it is not known what it was sent is ended, and brought back without that.
        """
        sent = {each.noted.call.number for each in self._sent.values()}
        try:
            if any(noted.call.number not in sent for noted in self._journal.waiting()):
                raise Died("it is not known what it was sent")
            for ref, each in list(self._sent.items()):
                self._accept(each, self._engine.result(ref, max(0.0, self.patience())))
                self._sent.pop(ref, None)
                self._since = self._engine.now()
        except Died:
            self._lose()
        self._answers = []

    @property
    def lost(self) -> bool:
        """Whether there is no worker until somebody needs it."""
        return self._actor is None

    @property
    def version(self) -> int:
        """Weights of the last call."""
        calls = self._journal.calls()
        return calls[-1].call.version if calls else self._saved.version

    @property
    def saved_version(self) -> int:
        """Weights that are needed to bring it back."""
        return self._saved.version

    @property
    def calls_since_snapshot(self) -> int:
        """Calls that would be repeated."""
        return len(self._journal)

    # -- lives

    def call(self) -> None:
        """Ask for a worker, which comes up while others do; `start` waits for it."""
        self._called = self._hired()

    def start(self) -> None:
        """Have a worker for the first time. Raises WorkerLost."""
        try:
            self._hire()
        except Died as error:
            self.bring_back(str(error))

    def record(self, order: Order) -> None:
        """Have the worker record, this one and whoever comes in its place.

        Raises what the worker does, as OSError, and WorkerLost.
        """
        self.order = order
        if self._actor is None:  # it begins as it is brought back
            return
        try:
            ref = self._engine.record(self._actor, order, "done")
            reply = self._engine.result(ref, self._limits.seconds)
        except Died as error:
            self.bring_back(str(error))
            return
        if reply.error is not None:
            self.order = None
            raise reply.error

    def end_recording(self, reason: str) -> Ref | None:
        """Record no more; what says that the file has its end. A worker that died meanwhile leaves
        one without, which its readers see.
        """
        if self.order is None:
            return None
        ref = None if self._actor is None else self._engine.record(self._actor, None, reason)
        self.order = None
        return ref

    def wait_for_end(self, ref: Ref, seconds: float) -> None:
        """Wait for the end of a file; not longer for a worker in the midst of something."""
        with suppress(Died):
            self._engine.result(ref, min(seconds, self._limits.seconds))

    def stop(self) -> None:
        """End the worker."""
        if self._actor is not None:
            self._engine.stop(self._actor)
            self._actor = None
        if self._called is not None:
            self._engine.stop(self._called.actor)
            self._called = None

    def close(self) -> None:
        """End the worker, and have none any more."""
        self._closed = True
        self.stop()

    def bring_back(self, why: str) -> None:
        """Have a new worker that is where the old one was, and answered all.

        Raises WorkerLost; then what was not answered is forgotten: it may be what kills whoever
        tries it.
        """
        try:
            for _ in range(self._limits.restarts):
                self.stop()
                self.restarts += 1
                try:
                    self._hire()
                    return
                except Died as error:
                    why = str(error)
            raise WorkerLost(self.name, self.restarts, why)
        except BaseException:
            self._lose()
            raise

    def _lose(self) -> None:
        """Have no worker, and forget what was not answered."""
        self.stop()
        self._journal.forget_waiting()
        self._sent = {}

    def _hire(self) -> None:
        """A new worker, which is as of the last snapshot and repeats all calls since, one by
        one.
        """
        if self._closed:
            raise ClosedPool("it was closed")
        called = self._called or self._hired()
        self._called = None
        actor = called.actor
        try:
            self._begin(called)
            self._sent = {}
            for noted in self._journal.calls():
                if noted.call.number > self._saved.number:
                    ref, sent = self._submitted(actor, noted)
                    self._accept(sent, self._engine.result(ref, self._limits.seconds))
                    self._since = self._engine.now()
            self._actor = actor
        except BaseException:
            self._engine.stop(actor)
            raise

    def _hired(self) -> Called:
        actor = self._engine.hire()
        return Called(actor, self._engine.hello(actor))

    def _begin(self, called: Called) -> None:
        engine = self._engine
        saved = self._saved
        reply = engine.result(called.hello, self._limits.start_seconds)
        _raise_lost(self.name, self.restarts, reply)
        self.pid = reply.value.pid
        if self.order is not None:
            self._record_on(called.actor, self.order)
        if saved.number:
            weights = self._weights.get(saved.version)
            ref = engine.begin(called.actor, saved.number, saved.version, weights, saved.trees)
            reply = engine.result(ref, self._limits.start_seconds)
            _raise_lost(self.name, self.restarts, reply)

    def _record_on(self, actor: Actor, order: Order) -> None:
        """Go on in another file. That it cannot be written is no reason to do without a worker."""
        self.order = order._replace(life=order.life + 1)
        ref = self._engine.record(actor, self.order, "done")
        reply = self._engine.result(ref, self._limits.start_seconds)
        if reply.error is not None:
            why = f"worker {self.name} is not recorded any more: {reply.error}"
            warnings.warn(why, RuntimeWarning, stacklevel=2)

    # -- inside

    def _submitted(self, actor: Actor, noted: Noted) -> tuple[Ref, Sent]:
        call = noted.call
        if call.verb in GIVES:
            ref, payload = self._engine.give(actor, call)
            return ref, Sent(noted, payload)
        return self._engine.run(actor, call, noted.payload), Sent(noted, None)

    def _accept(self, sent: Sent, reply: Reply) -> None:
        """Note an answer, unless it is known: a call that was repeated."""
        call = sent.noted.call
        if reply.number != call.number:
            raise BadArgument("reply", reply.number, f"number {call.number}")
        if call.verb == "weights" and reply.error is not None:
            raise Died(f"it cannot have weights that fit: {reply.error}")
        saves = call.verb == "save" and reply.error is None
        if saves:
            self._keep(sent, reply)
        if not self._journal.is_waiting(call.number):
            return
        self.figures = reply.figures
        if call.verb != "weights":
            self._answers.append(Answer(call, reply, sent.payload))
        self._journal.answered(call.number)
        if saves:
            self._journal.cut(call.number)

    def _keep(self, sent: Sent, reply: Reply) -> None:
        """Have a snapshot: what changed is new, what ended is gone."""
        changed = self._engine.result(sent.payload, self._limits.seconds)
        both = {**self._saved.trees, **changed}
        trees = {tree: both[tree] for tree in reply.value}
        self._saved = Saved(trees, reply.number, sent.noted.call.version)


def _raise_lost(name: int, restarts: int, reply: Reply) -> None:
    """Raise what a worker says that cannot be made."""
    if reply.error is not None:
        why = f"{type(reply.error).__name__}: {reply.error}"
        raise WorkerLost(name, restarts, why) from reply.error


def waiting(lines: Sequence[Line]) -> dict[Ref, Line]:
    """What is waited for first of each worker: it answers in the order it was asked."""
    return {line.refs()[0]: line for line in lines if line.refs()}
