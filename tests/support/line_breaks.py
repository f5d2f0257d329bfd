"""Breaks a call off before a line: at the first pass over it."""

from __future__ import annotations

from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any

Line = tuple[CodeType, int]


class Breaker:
    """A trace function that raises at the first pass over a line of a file of `folder`, and notes
    all that it meets. Files whose names end with `others` are passed over.
    """

    def __init__(
        self,
        folder: str,
        others: tuple[str, ...],
        target: Line | None = None,
        error: type[BaseException] = KeyError,
    ) -> None:
        self.folder = folder
        self.others = others
        self.target = target
        self.error = error
        self.met: dict[Line, None] = {}
        self.fired = False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        # CPython 3.11 forgets some frames of generators that are traced, with all they hold
        if not code.co_filename.startswith(self.folder) or code.co_flags & CO_GENERATOR:
            return None
        if code.co_filename.endswith(self.others):
            return None
        return self.trace

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """Called before each line."""
        line = (frame.f_code, frame.f_lineno)
        self.met[line] = None
        if event == "line" and line == self.target and not self.fired:
            self.fired = True
            raise self.error
        return self.trace
