"""Tools that break a call off: before any of its bytecodes, or at any of its operations on tensors;
and that judge what is found then.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from every_verb import Scenario, State, World, held
from torch.utils._python_dispatch import TorchDispatchMode

import paged_kv
from paged_kv.errors import NestedCall, PagedKVError
from paged_kv.turns import CARRY, GUARD

PACKAGE = str(Path(paged_kv.__file__).parent)
# so that hooks of its policies are broken off too
HERE = str(Path(__file__).parent / "every_verb.py")
FILES = (PACKAGE, HERE)
NEVER = sys.maxsize
TOOL = 4  # of `sys.monitoring`


class Timeout(Exception):
    """What a signal handler of a test raises: an error that `except Exception` catches."""


class Fault(RuntimeError):
    """What an operation on tensors raises where a test asks for it."""


# An interrupt as such, and errors that may come at any bytecode as well. In turn, so that each
# place meets all of them
# in one scenario or another.
ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, Timeout, MemoryError, RecursionError)


class Place(NamedTuple):
    """A bytecode."""

    code: CodeType
    offset: int


class Shot(NamedTuple):
    """How a call ended that was to be broken off."""

    fired: bool  # whether it was
    steps: int  # bytecodes or operations that were counted, the last one included
    outcome: object  # what the call returned, or the error of this package that it raised
    place: Place | None = None
    error: BaseException | None = None  # what was raised from outside
    swallowed: bool = False  # the call returned nevertheless

    def forget(self) -> None:
        """Let go of all that frames of the call hold. CPython 3.11 forgets some frames of
        generators that are traced.
        """
        if self.error is not None:
            traceback.clear_frames(self.error.__traceback__)
            self.error.__traceback__ = None

    def __str__(self) -> str:
        if self.place is None:
            return f"at step {self.steps}"
        code, offset = self.place
        lines = [line for first, end, line in code.co_lines() if first <= offset < end]
        return f"at step {self.steps}, {Path(code.co_filename).name}:{lines} in {code.co_name}"


@contextmanager
def traced(trace: Any) -> Iterator[None]:
    """Let this function, or none, be told what runs in the block, instead of coverage or a
    debugger.
    """
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


# Told of a bytecode before it runs: its function, its offset.
Met = Callable[[CodeType, int], None]


class Tracer:
    """A trace function that tells of the bytecodes of functions of this package."""

    def __init__(self, met: Met) -> None:
        self.met = met

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self.trace

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """Called before each bytecode of a function, and when it ends."""
        if event == "opcode":
            self.met(frame.f_code, frame.f_lasti)
        return self.trace


@contextmanager
def monitored(met: Met) -> Iterator[None]:
    """Does what a `Tracer` does, on Python 3.13, where trace functions are not told of all."""
    monitoring: Any = sys.__dict__["monitoring"]
    instrument(monitoring)
    thread = threading.get_ident()
    telling = False

    def told(code: CodeType, offset: int) -> None:
        nonlocal telling
        if telling or threading.get_ident() != thread:
            return
        telling = True
        try:
            met(code, offset)
        finally:
            telling = False

    monitoring.register_callback(TOOL, monitoring.events.INSTRUCTION, told)
    try:
        yield
    finally:
        monitoring.register_callback(TOOL, monitoring.events.INSTRUCTION, None)


@cache
def instrument(monitoring: Any) -> None:
    """Let all functions of this package tell of their bytecodes."""
    monitoring.use_tool_id(TOOL, "interrupts")
    functions = [found for found in gc.get_objects() if isinstance(found, FunctionType)]
    codes = [function.__code__ for function in functions]
    for code in codes:  # grows while it is walked
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        if code.co_filename.startswith(FILES):
            monitoring.set_local_events(TOOL, code, monitoring.events.INSTRUCTION)


class Bytecodes:
    """Counts the bytecodes of functions of this package, and acts before one of them."""

    def __init__(self, at: int = NEVER, act: Callable[[], object] = int) -> None:
        self.at = at
        self.act = act
        self.steps = 0
        self.place: Place | None = None

    def met(self, code: CodeType, offset: int) -> None:
        """One bytecode."""
        self.steps += 1
        if self.steps == self.at:
            self.place = Place(code, offset)
            self.act()

    def run(self, call: Callable[[], object]) -> object:
        """Call. Errors of this package are returned."""
        told = monitored(self.met) if sys.version_info >= (3, 13) else traced(Tracer(self.met))
        with told:
            try:
                return call()
            except PagedKVError as error:
                return error

    def shot(self, outcome: object) -> Shot:
        """How it ended."""
        return Shot(self.place is not None, self.steps, outcome, self.place)


class Places(Bytecodes):
    """Notes where each bytecode is met first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[Place, int] = {}

    def met(self, code: CodeType, offset: int) -> None:
        self.steps += 1
        self.first.setdefault(Place(code, offset), self.steps)


def interrupted(
    call: Callable[[], object], at: int, raised: type[BaseException] = KeyboardInterrupt
) -> Shot:
    """Call, and raise an error before bytecode number `at`, counted from 1."""
    error = raised()

    def fire() -> None:
        raise error

    trace = Bytecodes(at, fire)
    outcome: object = None
    returned = False
    try:
        outcome = trace.run(call)
        returned = kind(outcome) is None
    except BaseException as broken:
        if broken is not error:
            raise
    shot = trace.shot(outcome)
    return shot._replace(error=error, swallowed=shot.fired and returned)


def meddled(call: Callable[[], object], at: int, act: Callable[[], object]) -> Shot:
    """Call, and let something else happen before bytecode number `at`, counted from 1."""
    trace = Bytecodes(at, act)
    return trace.shot(trace.run(call))


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations on tensors, and raises before or after one of them."""

    def __init__(self, at: int, error: BaseException, after: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at
        self.error = error
        self.after = after
        self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps += 1
        if self.steps == self.at and not self.after:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if self.steps == self.at:
            raise self.error
        return result


def faulted(call: Callable[[], object], at: int, after: bool = False) -> Shot:
    """Call, and let operation number `at` on tensors, counted from 1, raise, before or after it is
    done.
    """
    error = Fault(f"operation {at}")
    mode = Operations(at, error, after)
    outcome: object = None
    try:
        with mode:
            outcome = call()
    except PagedKVError as own:
        outcome = own
    except Fault as broken:
        if broken is not error:
            raise
    return Shot(mode.steps >= at, mode.steps, outcome, error=error)


def cramped(call: Callable[[], object], frames: int) -> Shot:
    """Call where the stack has room for so many functions only."""
    limit = sys.getrecursionlimit()
    outcome: object = None
    error: RecursionError | None = None
    sys.setrecursionlimit(_depth() + frames)
    try:
        outcome = call()
    except PagedKVError as own:
        outcome = own
    except RecursionError as raised:
        error = raised
    finally:
        sys.setrecursionlimit(limit)
    return Shot(error is not None, frames, outcome, error=error)


def _depth() -> int:
    """The lowest limit that Python takes here."""
    limit = sys.getrecursionlimit()
    for depth in range(limit):
        with suppress(RecursionError):
            sys.setrecursionlimit(depth + 1)
            sys.setrecursionlimit(limit)
            return depth + 1
    return limit


def may_leave_lock(shot: Shot) -> bool:
    """Whether a lock may be found taken after this shot.

    It may between the last bytecode of a `with` block and its `__exit__`: no signal arrives there,
    but a trace function does. The next verb then gets in nevertheless.
    """
    return shot.place is not None and shot.place.code in (GUARD, CARRY)


def may_swallow(shot: Shot) -> bool:
    """Whether an error may come to nothing: one that could be of a hook, a key or a listener may.

    Ctrl-C may not, but where Python closes a generator that nobody needs any more.
    """
    in_generator = shot.place is not None and shot.place.code.co_flags & inspect.CO_GENERATOR
    return isinstance(shot.error, Exception) or bool(in_generator)


def kind(outcome: object) -> type[PagedKVError] | None:
    """What kind of error a call raised, if any."""
    return type(outcome) if isinstance(outcome, PagedKVError) else None


def difference(found: State, states: list[State]) -> str:
    """Where a state is none of those that are allowed."""
    lines = []
    for name in State._fields:
        allowed = [getattr(state, name) for state in states]
        if getattr(found, name) not in allowed or len(set(map(str, allowed))) > 1:
            lines.append(f"{name}: {getattr(found, name)}, allowed {allowed}")
    return "\n".join(lines)


UNWATCHED = traced(None)  # by coverage, which has seen each call before, and takes half of the time


class Trial:
    """A scenario, and all that may be found once its call was broken off."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.states = [self._state(number) for number in range(len(scenario.between) + 1)]
        world = scenario.prepare()
        places = Places()
        self.outcome = places.run(lambda: scenario.call(world))
        self.steps = places.steps
        self.first = places.first
        self.states.append(scenario.look(world))
        self.again = self._call(world)
        self.last = scenario.look(world)  # after the call was made once more
        assert self.states[0].words == held(scenario.before)
        assert self.states[-1].words == held(scenario.after)

    def _state(self, steps: int) -> State:
        """What is found before the call, or after the first of those effects that it may have on
        their own.
        """
        world = self.scenario.prepare()
        for effect in self.scenario.between[:steps]:
            effect(world)
        return self.scenario.look(world)

    def _call(self, world: World) -> object:
        try:
            return self.scenario.call(world)
        except PagedKVError as error:
            return error

    def interrupt(self, at: int, error: type[BaseException] | None = None) -> None:
        """Break the call off before a bytecode. Raises AssertionError where a promise is broken."""
        chosen = ERRORS[at % len(ERRORS)] if error is None else error
        shot, _ = self._judge(lambda call: interrupted(call, at, chosen))
        assert not shot.swallowed or may_swallow(shot), f"{self.scenario.name}, {shot}: swallowed"

    def fault(self, at: int, after: bool) -> bool:
        """Let an operation on tensors fail; False where there are fewer. Raises AssertionError as
        `interrupt` does.
        """
        shot, number = self._judge(lambda call: faulted(call, at, after))
        unchanged = number < len(self.states) - 1 or self.states[0] == self.states[-1]
        assert unchanged or not shot.fired, f"{self.scenario.name} raised {shot}, and took effect"
        return shot.fired

    def cramp(self, frames: int) -> bool:
        """Let the stack have room for so few functions; False where they are enough. Raises
        AssertionError too.
        """
        shot, _ = self._judge(lambda call: cramped(call, frames))
        return shot.fired

    @UNWATCHED
    def _judge(self, shoot: Callable[[Callable[[], object]], Shot]) -> tuple[Shot, int]:
        """Make the call, see that what is found is allowed, and that the same call works
        afterwards.
        """
        world = self.scenario.prepare()
        shot = shoot(lambda: self.scenario.call(world))
        shot.forget()  # a step that was being opened is dropped with that
        about = f"{self.scenario.name}, {shot}"
        assert may_leave_lock(shot) or not world.cache.turns.lock.locked(), (
            f"{about}: the lock is held"
        )
        found = self.scenario.look(world)
        assert found in self.states, f"{about}\n{difference(found, self.states)}"
        world.check()
        number = self.states.index(found)
        self._call_again(world, number, about)
        world.drain()
        return shot, number

    def _call_again(self, world: World, number: int, about: str) -> None:
        """The call works as if nothing had been broken off: the first time, or the second."""
        done = number == len(self.states) - 1
        outcome = self._call(world)
        expected = self.last if done else self.states[-1]
        found = self.scenario.look(world)
        assert found == expected, f"{about}, then called again\n{difference(found, [expected])}"
        assert kind(outcome) is kind(self.again if done else self.outcome), (
            f"{about}, then called again: {outcome!r}"
        )
        world.check()

    @UNWATCHED
    def release(self, at: int, *, in_thread: bool = False) -> None:
        """Let a finalizer, a handler or another thread release a sequence before a bytecode.

        Raises AssertionError unless the call does as if that sequence had not been there.
        """
        world = self.scenario.prepare()
        doomed = world.cache.new(1)
        threads: list[threading.Thread] = []

        def handler() -> None:
            world.cache.release(doomed, missing_ok=True)
            refused(lambda: world.cache.lengths([]))
            refused(lambda: world.cache.new(0))

        def thread() -> None:
            threads.append(
                threading.Thread(target=lambda: world.cache.release(doomed, missing_ok=True))
            )
            threads[0].start()
            threads[0].join(0.002)  # it may wait until a release that is under way is done

        shot = meddled(lambda: self.scenario.call(world), at, thread if in_thread else handler)
        for waiting in threads:
            waiting.join()
        if not shot.fired:
            world.cache.release(doomed, missing_ok=True)
        about = f"{self.scenario.name}, release {shot}"
        assert not world.cache.turns.lock.locked(), f"{about}: the lock is held"
        found = self.scenario.look(world)
        assert found == self.states[-1], f"{about}\n{difference(found, self.states[-1:])}"
        assert kind(shot.outcome) is kind(self.outcome), f"{about}: {shot.outcome!r}"
        world.check()
        world.drain()

    def unsettled(self, stride: int = 1) -> list[int]:
        """Bytecodes before which an interrupt leaves something to be settled by the next call, of
        every so many.
        """
        return [at for at in range(1, self.steps + 1, stride) if self._leaves_work(at)]

    @UNWATCHED
    def _leaves_work(self, at: int) -> bool:
        world = self.scenario.prepare()
        interrupted(lambda: self.scenario.call(world), at).forget()
        return world.cache._pool.books.change is not None

    def settling(self, at: int) -> Scenario:
        """The next call after an interrupt, as a scenario of its own."""

        def prepare() -> World:
            world = self.scenario.prepare()
            interrupted(lambda: self.scenario.call(world), at).forget()
            return world

        after = " ".join(word or "-" for word in _after(prepare()))
        return Scenario(f"settle {self.scenario.name} {at}", prepare, settle, after, after)


def settle(world: World) -> None:
    """Calls that finish what was left undone: a figure, and a verb."""
    assert world.cache.live_sequences >= len(world.cache.live())


def _after(world: World) -> tuple[str, ...]:
    return world.look().words


def refused(call: Callable[[], object]) -> None:
    """A call that may be refused here, by name."""
    with suppress(NestedCall):
        call()
