"""Who may call a pool: one call at a time, in the process that made it, until it is closed."""

from __future__ import annotations

import os
from _thread import allocate_lock, get_ident
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar

from paged_kv.errors import ClosedPool, ConcurrentCall, NestedCall

F = TypeVar("F", bound=Callable[..., Any])


class Gate:
    """The lock of a pool, and what is known of its workers.

    `tidy` are workers that hold what the driver knows of and nothing else; `clean` is what `tidy`
    becomes if the current call returns. `alive` says whether there can be workers.
    """

    def __init__(self, tidy: Collection[int], alive: Callable[[], bool]) -> None:
        self.lock = allocate_lock()
        self.closed = False
        self.tidy = frozenset(tidy)
        self.clean = self.tidy
        self._alive = alive
        self._process = os.getpid()
        self._running = ""
        self._thread = 0

    @property
    def here(self) -> bool:
        """Whether this process made the pool."""
        return self._process == os.getpid()

    def check(self, name: str) -> None:
        """Raise ClosedPool, NestedCall or ConcurrentCall, unless `name` may be called now."""
        if not self.here:
            raise ClosedPool(f"they belong to process {self._process}, from which this one forked")
        if self.closed:
            raise ClosedPool("it was closed")
        if not self._alive():
            raise ClosedPool("Ray was shut down under it")
        if self.lock.locked():
            if self._thread == get_ident():
                raise NestedCall(name, self._running)
            raise ConcurrentCall(name)

    def enter(self, name: str) -> None:
        """Note what runs. The lock is held."""
        self._running = name
        self._thread = get_ident()


def verb(method: F) -> F:
    """A method of an object with a `gate`, that may change something: it runs alone."""
    name = method.__name__

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate: Gate = self.gate
        gate.check(name)
        with gate.lock:  # two that pass at once go one after the other
            gate.enter(name)
            result = method(self, *args, **kwargs)
            gate.tidy = gate.clean
            return result

    return guarded  # type: ignore[return-value]
