"""All states that sequences of verbs of some length reach in a small world, breadth first.

A cache cannot be copied, so each state is reached anew, from the start, by the shortest sequence
that leads there. Equal states are one. So the sequence that comes to light with a mistake is among
the shortest that show it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

from small_state import State, state_and_orders, state_of
from small_verbs import SUBTREE, verbs, verify
from small_world import PAGES, Verb, World

Path = tuple[Verb, ...]


class Level(NamedTuple):
    """What sequences of so many verbs came to."""

    depth: int
    states: int  # that no shorter sequence reaches
    transitions: int
    refusals: int  # of them
    seconds: float


class Broken(AssertionError):
    """A sequence of verbs after which something is wrong."""

    def __init__(self, path: Path, error: BaseException) -> None:
        super().__init__(f"{'; '.join(map(str, path))}: {error!r}")
        self.path = path


def reach(path: Path, pages: int = PAGES) -> World:
    """A world after these verbs."""
    world = World(pages)
    for verb in path:
        world.do(verb)
    return world


def search(
    depth: int, tell: Callable[[Level], None] = lambda level: None, *, pages: int = PAGES
) -> list[Level]:
    """Try all sequences of up to `depth` verbs on so many pages. Raises Broken."""
    seen = {_digest(state_of(World()))}
    found: list[Path] = [()]
    levels = []
    for number in range(1, depth + 1):
        began = time.perf_counter()
        tries = 0
        refusals = 0
        paths = found
        found = []
        for path in paths:
            for verb, state, refused in _steps_from(path, pages):
                tries += 1
                refusals += refused
                digest = _digest(state)
                if digest not in seen:
                    seen.add(digest)
                    found.append((*path, verb))
        seconds = round(time.perf_counter() - began, 2)
        levels.append(Level(number, len(found), tries, refusals, seconds))
        tell(levels[-1])
    return levels


def _steps_from(path: Path, pages: int) -> Iterator[tuple[Verb, State, bool]]:
    """Each verb that may come next, the state behind it, and whether it was refused."""
    world = reach(path, pages)
    state, orders = state_and_orders(world)
    names = {seq: name for name, seq in enumerate(world.born)}
    swaps = [
        {names[seq]: names[other] for seq, other in zip(orders[0], order, strict=True)}
        for order in orders
    ]
    fresh = True
    for verb in list(_but_equals(verbs(world), swaps)):
        if not fresh:
            world = reach(path, pages)
        try:
            refused = world.do(verb)
            now = state_of(world)
            # else it was looked at when the state before was reached
            fresh = refused and now == state and verb.name not in SUBTREE
            if not fresh:
                verify(world)
        except Exception as error:
            raise Broken((*path, verb), error) from error
        yield verb, now, refused


def _but_equals(found: Iterator[Verb], swaps: Sequence[dict[int, int]]) -> Iterator[Verb]:
    """Of verbs that differ in sequences that can be exchanged, the first one."""
    for verb in found:
        if all(tuple([swap[seq] for seq in verb.seqs]) >= verb.seqs for swap in swaps):
            yield verb


def _digest(state: State) -> bytes:
    return blake2b(repr(tuple(state)).encode(), digest_size=16).digest()
