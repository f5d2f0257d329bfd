"""One verb at a time: who is let in, who waits, what is put off, what an interrupt left to do. No
tensors in here.

A cache and the indexes over it share one `Turns`. Their methods are `verb`s and `reader`s: each
takes the lock, a plain one, and gives it back however it ends. While it is held

- `release` is put off: it becomes a ticket, which is carried out when the verb ends, or else before
  the next one begins. So a finalizer, a signal handler or another thread may always release;
- a reader of the thread that runs the verb is let in as long as the verb has changed nothing, so
  that a policy or a finalizer may look;
- a verb that meets another thread's release waits for it;
- all else is refused by name, for it would find the books half written.

Nobody notes who holds the lock: where it matters, the frames of all threads are asked. So a call
that an interrupt ended never counts as running. Where the lock is held and nobody is inside a verb,
it was left behind between two instructions, and is replaced. CPython 3.10 leaves it where a signal
arrives just as the body of `with` raises, 3.14 where one arrives while `__enter__` returns (`with`
calls it like any function there: python/cpython#148874); no version does elsewhere.
"""

from __future__ import annotations

import gc
import sys
import time
from _thread import LockType, allocate_lock, get_ident
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import count
from time import monotonic, perf_counter
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar
from weakref import ref

from paged_kv.errors import ConcurrentCall, NestedCall, PagedKVError, unraisable
from paged_kv.events import Event, Listener
from paged_kv.pages.change import Edit
from paged_kv.pages.open_steps import OpenSteps

F = TypeVar("F", bound=Callable[..., Any])
PATIENCE = 10.0  # seconds that a verb waits for another thread's release
PAUSE = 0.0002  # seconds between two looks at a lock that another thread holds
LOOKS = 3  # at a lock that nobody seems to hold, before it is replaced


class Ticket(NamedTuple):
    """A release that was put off."""

    seqs: list[int]
    missing_ok: bool


class Turns:
    """The lock of one pool, the releases that wait for it, and the way back after an interrupt."""

    def __init__(self, steps: OpenSteps) -> None:
        self.steps = steps
        self.tables = steps.tables
        self.books = steps.books
        self.lock = allocate_lock()
        # By number. Those of open steps that are given up are below zero, and hold anything; those
        # of indexes that are gone hold a dead reference.
        self.tickets: dict[int, object] = {}
        self._owners: dict[int, ref[object]] = {}  # indexes
        self._listeners: list[Listener] = []
        self._numbers = count()

    # -- who is told

    @property
    def listeners(self) -> Sequence[Listener]:
        """Who is told of every verb."""
        return tuple(self._listeners)

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every verb from now on. The lock is held."""
        self._listeners.append(listener)
        if self.books.told is None:
            self.books.told = []

    def unlisten(self, listener: Listener) -> None:
        """Tell it no more. The lock is held."""
        self._listeners.remove(listener)
        if not self._listeners:
            self.books.told = None

    def run(
        self, name: str, method: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]
    ) -> Any:
        """Call a verb, and tell of it."""
        begin = perf_counter()
        failed = True
        result = None
        try:
            result = method(*args, **more)
            failed = False
            return result
        finally:
            self._tell(name, begin, failed, result)

    def _tell(self, name: str, begin: float, failed: bool, result: object) -> None:
        told = self.books.told
        if told is None:
            return
        self.books.told = [] if self._listeners else None
        event = Event(name, begin, perf_counter(), failed, result, told)
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:
                # What was done is done: the caller of the verb is not to blame.
                unraisable(error)

    # -- what was put off

    def put_off(self, seqs: list[int], missing_ok: bool) -> None:
        """Release these sequences once no verb is running."""
        if seqs:
            self.tickets[next(self._numbers)] = Ticket(seqs, missing_ok)
            self.carry_out()

    def abandon(self, number: int) -> None:
        """Give up an open step once no verb is running; one that has ended stays as it is."""
        if number in self.steps:
            self.tickets[-number] = None
            self.carry_out()

    def own(self, index: object) -> int:
        """A number for an index; when that goes, a ticket ends its entries.

        No code of Python runs until then.
        """
        number = next(self._numbers)
        self._owners[number] = ref(index, partial(self.tickets.__setitem__, number))
        return number

    def carry_out(self) -> None:
        """Do what was put off, unless a verb is running: then that one does it when it ends."""
        while self.tickets:
            lock = self.lock
            if lock.locked():
                return
            with lock:
                inside = True  # noqa: F841  (see `_verb_of`)
                if self.lock is lock:
                    self.settle()
                else:  # as in `guarded`
                    lock.acquire(False)

    def settle(self) -> None:
        """Finish what an interrupt left half done, then what was put off. The lock is held.

        Each is told of by itself.
        """
        begin = perf_counter()
        self.books.settle()
        for step in list(self.books.light):
            self._weigh(step)
        self._tell_of_more("settle", begin)
        for number in list(self.tickets):
            begin = perf_counter()
            if number < 0:
                self.steps.abandon(-number, [Edit(self.tickets, {}, [number])])
                self._tell_of_more("close", begin)
            else:
                name = "clear" if number in self._owners else "release"
                self._release(number)
                self._tell_of_more(name, begin)

    def _weigh(self, step: int) -> None:
        """Have a light step take its pages, unless nobody works on it any more."""
        light = self.books.light
        lease = light[step]()
        if lease is None:
            del light[step]
        else:
            self.steps.weigh(step, lease, self.watch(lease, step))

    def watch(self, lease: object, step: int) -> object:
        """What leaves a ticket for a step when its lease is dropped.

        No code of Python runs until then.
        """
        return ref(lease, partial(self.tickets.__setitem__, -step))

    def _tell_of_more(self, name: str, begin: float) -> None:
        """Tell of what was done beside the verb that was called, where there was anything.

        Else a listener that releases what is gone would be told of that for ever.
        """
        told = self.books.told
        if not told:
            return
        if any(each is None or each.change.drops or each.change.ends for each in told):
            self._tell(name, begin, False, None)
        else:
            told.clear()

    def _let_go(self, number: int) -> None:
        """End what belonged to an index that is gone."""
        books = self.books
        seqs = [seq for seq, entry in books.owned.items() if entry.owner == number]
        edits = [Edit(book, {}, [number]) for book in (self._owners, self.tickets)]
        self.tables.end(seqs, books.records(seqs), [Edit(books.owned, {}, seqs), *edits])

    def _release(self, number: int) -> None:
        """Do a release that was put off."""
        ticket = self.tickets.get(number)
        if number in self._owners:
            self._let_go(number)
        if not isinstance(ticket, Ticket):
            return
        try:
            self.tables.release(
                ticket.seqs,
                missing_ok=ticket.missing_ok,
                edits=[Edit(self.tickets, {}, [number])],
            )
        except PagedKVError as error:
            # Nobody is there to catch it; all else may be a signal handler's.
            self.tickets.pop(number, None)
            unraisable(error)

    def meet(self, lock: LockType, name: str, reading: bool) -> bool:
        """Come upon a lock that is held: wait, raise, or return True for a reader that is let in
        without it.
        """
        looks = 0
        until = monotonic() + PATIENCE
        while lock.locked() and self.lock is lock:
            inside = self._inside()
            mine = inside.get(get_ident())
            if mine is not None:
                if reading and self.books.change is None:
                    return True
                raise NestedCall(name, mine)
            running = set(inside.values())
            if running - {"release"} or (running and monotonic() > until):
                raise ConcurrentCall(name)
            attempt = self._attempt()
            if attempt is not None:
                raise NestedCall(name, attempt)
            looks = 0 if inside else looks + 1
            if looks == LOOKS:
                self._replace(lock)
            time.sleep(PAUSE)
        return False

    def _replace(self, lock: LockType) -> None:
        """Put a fresh lock in place of one that nobody will give back, and wake those who wait for
        it.
        """
        fresh = allocate_lock()
        if self.lock is lock:  # nothing may come between this and the next line
            self.lock = fresh
            if lock.locked():
                lock.release()

    def _inside(self) -> dict[int, str]:
        """Thread -> name of the innermost verb of this pool that it is in.

        CPython 3.11 makes frame objects as they are asked for, and may run the collector as it
        makes one. What that calls lets other threads run, and the frame that was to be shown may be
        gone: the process crashes. So it waits.
        """
        found = {}
        frame: FrameType | None
        collecting = gc.isenabled()
        try:
            if collecting:  # else it is another thread in here that enables it again, at any time
                gc.disable()
            for thread, frame in sys._current_frames().items():
                name = self._verb_of(frame)
                if name is not None:
                    found[thread] = name
        finally:
            frame = None  # its own one: it would hold itself, and so all that runs above
            if collecting:
                gc.enable()
        return found

    def _attempt(self) -> str | None:
        """The verb of this thread that waits for the lock, or has just got it, and that a signal
        handler interrupts.
        """
        frame = sys._getframe(2).f_back  # below the verb that called `meet`
        while frame is not None:
            if frame.f_code is GUARD and frame.f_locals.get("turns") is self:
                return str(frame.f_locals["name"])
            if frame.f_code is CARRY and frame.f_locals.get("self") is self:
                return "release"
            frame = frame.f_back
        return None

    def _verb_of(self, frame: FrameType | None) -> str | None:
        """The verb that holds the lock, on a stack of frames: `inside` is set there, once it is
        got.
        """
        while frame is not None:
            if (
                frame.f_code is GUARD
                and frame.f_locals.get("turns") is self
                and "inside" in frame.f_locals
            ):
                return str(frame.f_locals["name"])
            if (
                frame.f_code is CARRY
                and frame.f_locals.get("self") is self
                and "inside" in frame.f_locals
            ):
                return "release"
            frame = frame.f_back
        return None


def verb(method: F) -> F:
    """A method that changes something: it runs alone. The object's `turns` says with whom."""
    return _guarded(method, False)


def light_verb(method: F) -> F:
    """A verb that sees for itself to a light step that is open: see `OpenSteps.can_be_light`."""
    return _guarded(method, False, heavy=False)


def reader(method: F) -> F:
    """A method that changes nothing: it runs alone, or inside a verb of its own thread that has
    changed nothing yet.
    """
    return _guarded(method, True)


def page_reader(method: F) -> F:
    """A reader of what pages hold. Where there are tiers it may move pages, so it runs alone."""
    return _guarded(method, True, pages=True)


def _guarded(method: F, reading: bool, *, heavy: bool = True, pages: bool = False) -> F:
    name = method.__name__.lstrip("_")

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        turns: Turns = self.turns
        while True:
            lock = turns.lock
            # frames of pages may not change within a verb that works on them
            if lock.locked() and turns.meet(
                lock, name, reading and not (pages and turns.books.pages.gone is not None)
            ):
                return method(self, *args, **kwargs)
            with lock:
                inside = True
                # it was given up as left behind while this call waited for it
                if turns.lock is not lock:
                    lock.acquire(False)  # and given back, as `with` is about to do
                    del inside
                    continue
                books = turns.books
                if books.change is not None or turns.tickets or (books.light and heavy):
                    turns.settle()
                if books.told is None or reading:
                    result = method(self, *args, **kwargs)
                else:
                    result = turns.run(name, method, (self, *args), kwargs)
            if turns.tickets:
                turns.carry_out()
            return result

    return guarded  # type: ignore[return-value]


def _code_of(function: Callable[..., Any]) -> CodeType:
    return function.__code__


CARRY = _code_of(Turns.carry_out)
GUARD = _code_of(_guarded(lambda: None, True))
