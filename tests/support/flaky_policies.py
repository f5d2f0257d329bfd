"""Eviction policies whose hooks raise where a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paged_kv.eviction import POLICIES, EntryView, Policy


class Boom(Exception):
    """Raised by a hook of a policy."""


class Stop(BaseException):
    """Raised by a hook of a policy, as Ctrl-C is: no `except Exception` catches it."""


class Trap:
    """Which hooks raise: the one after `left[0]` others, then the one after `left[1]` more, and so
    on.
    """

    def __init__(self) -> None:
        self.left: list[int] = []
        self.late = False  # whether a hook does its work before it raises
        self.kind: type[BaseException] = Boom
        self.misuse: list[str] = []  # hooks that were called though one before had failed

    def call(self, hook: Callable[..., Any], *args: Any) -> None:
        if not self.left:
            hook(*args)
        elif self.left[0]:
            self.left[0] -= 1
            hook(*args)
        else:
            del self.left[0]
            if self.late:
                hook(*args)
            raise self.kind

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let no hook raise meanwhile."""
        left = self.left
        self.left = []
        try:
            yield
        finally:
            self.left = left


class Flaky:
    """A policy of this package whose hooks a trap watches. Once it was told of a change and failed,
    it is not to be told of any more.
    """

    def __init__(self, name: str, trap: Trap) -> None:
        self.policy: Policy = POLICIES[name]()
        self.trap = trap
        self.failed = False

    def _tell(self, hook: Callable[..., Any], *args: Any) -> None:
        if self.failed:
            self.trap.misuse.append(f"{hook.__name__}{args}")
        try:
            self.trap.call(hook, *args)
        except BaseException:
            self.failed = True
            raise

    def on_add(self, entry: EntryView) -> None:
        self._tell(self.policy.on_add, entry)

    def on_hit(self, entry: EntryView) -> None:
        self._tell(self.policy.on_hit, entry)

    def on_priority(self, entry: EntryView, priority: float | None) -> None:
        self._tell(self.policy.on_priority, entry, priority)

    def on_remove(self, entry: EntryView) -> None:
        self._tell(self.policy.on_remove, entry)

    def victims(self) -> Iterator[EntryView]:
        for entry in self.policy.victims():
            self.trap.call(lambda: None)
            yield entry
