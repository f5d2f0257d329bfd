"""Parts of a long run that are timed, shown while they run, counted, and ended by Ctrl-C."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SHOWN = 3  # broken promises of one part that are shown
WIDTH = 30  # of the bar
EACH = 0.2  # seconds between two looks of the bar


class Stop(Exception):
    """The user has had enough."""


class Wish:
    """Whether the user wants it to stop: Ctrl-C raises nothing, since interrupts are expected."""

    def __init__(self) -> None:
        self.stop = False

    def __call__(self, *told: object) -> None:
        self.stop = True


@dataclass
class Part:
    """What one part did."""

    name: str
    total: float  # of what it counts
    unit: str
    done: float = 0
    broken: int = 0
    seconds: float = 0.0
    more: dict[str, float] = field(default_factory=dict)

    def add(self, counts: dict[str, int]) -> None:
        """Count more of what is beside the matter."""
        for name, number in counts.items():
            self.more[name] = self.more.get(name, 0) + number


class Parts:
    """All parts, one after another."""

    def __init__(self) -> None:
        self.wish = Wish()
        self.parts: list[Part] = []
        self._shown = 0.0

    @contextmanager
    def part(self, name: str, total: float, unit: str) -> Iterator[Part]:
        """A part is timed, shown, and ended by Ctrl-C."""
        part = Part(name, total, unit)
        self.parts.append(part)
        began = time.perf_counter()
        self._shown = 0.0
        try:
            yield part
        finally:
            part.seconds = time.perf_counter() - began
            self._draw(part, part.seconds)
            print(file=sys.stderr)

    def did(self, part: Part, began: float, count: float) -> None:
        """So much more is done. Raises Stop where the user wants it."""
        part.done += count
        now = time.perf_counter()
        if now - self._shown > EACH:
            self._shown = now
            self._draw(part, now - began)
        if self.wish.stop:
            raise Stop

    def _draw(self, part: Part, seconds: float) -> None:
        share = min(1.0, part.done / part.total) if part.total else 1.0
        bar = ("#" * round(share * WIDTH)).ljust(WIDTH, ".")
        line = f"\r{part.name:>10} [{bar}] {share:4.0%} {seconds:6.0f} s, broken: {part.broken} "
        print(line, end="", file=sys.stderr, flush=True)

    def tried(self, part: Part, call: Callable[[], object]) -> object:
        """Call; what it finds broken is counted, and shown."""
        try:
            return call()
        except Exception:  # of whatever kind: nothing of it may happen
            part.broken += 1
            if part.broken <= SHOWN:
                print(file=sys.stderr)
                traceback.print_exc()
            return None

    def each(self, part: Part, calls: Iterable[Callable[[], object]]) -> None:
        """Do some things, which count one each."""
        began = time.perf_counter()
        for call in calls:
            self.tried(part, call)
            self.did(part, began, 1)

    # -- what was found

    @property
    def broken(self) -> int:
        """Broken promises, all parts together."""
        return sum(part.broken for part in self.parts)

    def table(self) -> str:
        """For people."""
        lines = [f"{'part':<12}{'done':>12} {'':<12}{'broken':>8}{'seconds':>9}  more"]
        for part in self.parts:
            more = ", ".join(
                f"{number:,} {name}" for name, number in part.more.items() if name != part.unit
            )
            did = f"{part.name:<12}{part.done:>12,.0f} {part.unit:<12}"
            lines.append(f"{did}{part.broken:>8}{part.seconds:>9.1f}  {more}")
        return "\n".join(lines)

    def results(self) -> list[dict[str, Any]]:
        """For machines."""
        return [
            {
                "part": part.name,
                "unit": part.unit,
                "done": round(part.done),
                "broken": part.broken,
                "seconds": round(part.seconds, 1),
                **{
                    name.replace(" ", "_"): number
                    for name, number in part.more.items()
                    if name != part.unit
                },
            }
            for part in self.parts
        ]
