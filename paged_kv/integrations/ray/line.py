"""One worker, as the driver sees it: what it was asked for, and how it is brought back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from paged_kv.errors import BadArgument, WorkerLost
from paged_kv.integrations.ray.calls import Call, Figures, Journal, Name, Noted, Reply, names_made
from paged_kv.integrations.ray.engine import Actor, Died, Engine, Payload, Ref
from paged_kv.integrations.ray.held_trees import TreeState

GIVES = ("save", "copy")  # whose trees come apart from the reply


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


class Line:
    """A worker by its number. It dies and comes back: calls since its last snapshot are repeated in
    the same batches.

    `dropped` are nodes that nobody holds any more; they go along with the next call. `weights` are
    those of each version but the first, with which a model is made; the pool sees to them.
    """

    def __init__(
        self, name: int, engine: Engine, limits: Limits, weights: Mapping[int, Payload]
    ) -> None:
        self.name = name
        self.restarts = 0
        self.dropped: list[Name] = []
        self.figures: Figures | None = None
        self.pid: int | None = None
        self._engine = engine
        self._limits = limits
        self._journal = Journal()
        self._actor: Actor = None
        self._sent: dict[Ref, Sent] = {}
        self._answers: list[Answer] = []
        self._abandoned: set[int] = set()
        self._since = 0.0
        self._saved: dict[int, TreeState] = {}
        self._saved_at = 0
        self._version = 0  # of the weights of the snapshot
        self._weights = weights

    # -- calls

    def send(
        self, verb: str, args: tuple[Any, ...], version: int, payload: Payload | None = None
    ) -> None:
        """Ask for something; `receive` has the answer some time."""
        if not self._sent:
            self._since = self._engine.now()
        dropped = tuple(self.dropped)
        noted = self._journal.note(verb, args, version, dropped, payload)
        self.dropped = []
        if self._actor is None:
            self.bring_back("it was lost before")
        else:
            self._submit(noted)

    def refs(self) -> list[Ref]:
        """What is waited for."""
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
            reply = self._engine.result(ref, self._limits.seconds)
            self._accept(sent, reply)
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

    def abandon(self) -> None:
        """Nobody wants to know what is on its way: what it makes is dropped when it comes."""
        self._abandoned.update(noted.call.number for noted in self._journal.waiting())
        self.drop(self.answers())

    def drop(self, answers: Iterable[Answer]) -> None:
        """Drop what calls have made."""
        for answer in answers:
            self.dropped += names_made(answer.call, answer.reply.value)

    @property
    def calls_since_snapshot(self) -> int:
        """Calls that would be repeated."""
        return len(self._journal)

    def saved_versions(self) -> Iterable[int]:
        """Weights that are needed to bring it back."""
        return {self._version, *(each.call.version for each in self._journal.calls())}

    # -- lives

    def start(self) -> None:
        """Have a worker for the first time. Raises WorkerLost."""
        try:
            self._hire()
        except Died as error:
            self.bring_back(str(error))

    def stop(self) -> None:
        """End the worker."""
        if self._actor is not None:
            self._engine.stop(self._actor)
            self._actor = None

    def bring_back(self, why: str) -> None:
        """Have a new worker that is where the old one was, and answered all. Raises WorkerLost."""
        for _ in range(self._limits.restarts):
            self.stop()
            self.restarts += 1
            try:
                self._hire()
                self._repeat()
            except Died as error:
                why = str(error)
                continue
            return
        self.stop()
        self._sent = {}
        raise WorkerLost(self.name, self.restarts, why)

    def _hire(self) -> None:
        """A new worker as of the last snapshot."""
        engine = self._engine
        self._actor = engine.hire()
        reply = engine.result(engine.hello(self._actor), self._limits.start_seconds)
        _raise_lost(self.name, self.restarts, reply)
        self.pid = reply.value.pid
        if self._saved_at:
            weights = self._weights.get(self._version)
            ref = engine.begin(self._actor, self._saved_at, self._version, weights, self._saved)
            reply = engine.result(ref, self._limits.start_seconds)
            _raise_lost(self.name, self.restarts, reply)

    def _repeat(self) -> None:
        """Send all calls since the snapshot again, one by one."""
        self._sent = {}
        for noted in self._journal.calls():
            self._submit(noted)
            ((ref, sent),) = self._sent.items()
            reply = self._engine.result(ref, self._limits.seconds)
            self._accept(sent, reply)
            self._sent = {}
            self._since = self._engine.now()

    # -- inside

    def _submit(self, noted: Noted) -> None:
        call = noted.call
        if call.verb in GIVES:
            ref, payload = self._engine.give(self._actor, call)
        else:
            ref = self._engine.run(self._actor, call, noted.payload)
            payload = None
        self._sent[ref] = Sent(noted, payload)

    def _accept(self, sent: Sent, reply: Reply) -> None:
        """Note an answer, unless it is known: a call that was repeated."""
        call = sent.noted.call
        if reply.number != call.number:
            raise BadArgument("reply", reply.number, f"number {call.number}")
        if call.verb == "save" and reply.error is None:
            self._keep(sent, reply)
        if not self._journal.is_waiting(call.number):
            return
        self._journal.answered(call.number)
        self.figures = reply.figures
        if call.number in self._abandoned:
            self._abandoned.discard(call.number)
            self.dropped += names_made(call, reply.value)
        else:
            self._answers.append(Answer(call, reply, sent.payload))
        if call.verb == "save" and reply.error is None:
            self._journal.cut(call.number)

    def _keep(self, sent: Sent, reply: Reply) -> None:
        """Have a snapshot: what changed is new, what ended is gone."""
        changed = self._engine.result(sent.payload, self._limits.seconds)
        both = {**self._saved, **changed}
        self._saved = {tree: both[tree] for tree in reply.value}
        self._saved_at = reply.number
        self._version = sent.noted.call.version


def _raise_lost(name: int, restarts: int, reply: Reply) -> None:
    """Raise what a worker says that cannot be made."""
    if reply.error is not None:
        why = f"{type(reply.error).__name__}: {reply.error}"
        raise WorkerLost(name, restarts, why) from reply.error


def waiting(lines: Sequence[Line]) -> dict[Ref, Line]:
    """All that is waited for, and whose it is."""
    return {ref: line for line in lines for ref in line.refs()}
