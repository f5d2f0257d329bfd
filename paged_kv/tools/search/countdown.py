"""The numbers game: reach a target by adding and taking away given numbers, in a few attempts, one
a line. No tensors in here.

>>> game = Game((3, 8, 5), 6)
>>> checked(game, "8 + 3 + 5 = 16\\n8 + 3 - 5 = 6\\n")
Checked(tried=2, allowed=2, nearest='8 + 3 - 5', distance=0, ended=False)
>>> checked(game, "8 + 5 + 3 = 16\\n8 + 4").distance
10
"""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import NamedTuple

NUMBERS = 3
LARGEST = 20
ATTEMPTS = 3  # in an example
TERM = re.compile(r"([+-]?) ?(\d+)")
SUM = re.compile(r"\d+( [+-] \d+)*")


class Game(NamedTuple):
    """Numbers, each of which may be used once, and what is to be reached with them."""

    numbers: tuple[int, ...]
    target: int


class Posed(NamedTuple):
    """A game, and attempts of which the last one reaches the target."""

    game: Game
    attempts: tuple[str, ...]


class Checked(NamedTuple):
    """What is known of an answer, as far as it goes.

    `tried`: lines with an equals sign, up to the first that reaches the target; `allowed`: those of
    them whose numbers were there to be used; `nearest`: the best of these, and its `distance` from
    the target, None where there is none. `ended`: no more attempts follow.
    """

    tried: int = 0
    allowed: int = 0
    nearest: str | None = None
    distance: int | None = None
    ended: bool = False

    @property
    def solved(self) -> bool:
        """Whether the target was reached."""
        return self.distance == 0


def posed(draws: random.Random, numbers: int = NUMBERS) -> Posed:
    """A game that can be solved: its target is what all numbers come to with some signs."""
    given = draws.sample(range(1, LARGEST), numbers)
    tries = [_attempt(draws, given) for _ in range(ATTEMPTS)]
    target = _total(tries[-1])
    wrong = [attempt for attempt in tries[:-1] if _total(attempt) != target]
    attempts = tuple(f"{attempt} = {_total(attempt)}" for attempt in [*wrong, tries[-1]])
    return Posed(Game(tuple(given), target), attempts)


def _attempt(draws: random.Random, given: list[int]) -> str:
    """All numbers in another order, with signs that keep the sum from falling below zero."""
    first, *others = draws.sample(given, len(given))
    reached = first
    attempt = str(first)
    for number in others:
        sign = draws.choice("+-") if number < reached else "+"
        reached += number if sign == "+" else -number
        attempt += f" {sign} {number}"
    return attempt


def question(game: Game) -> str:
    """What the model is asked; the answer begins on the next line."""
    return f"Numbers: {' '.join(map(str, game.numbers))} Target: {game.target}\n"


def solution(found: Posed) -> str:
    """A solved game, as an example."""
    return question(found.game) + "\n".join(found.attempts) + "\n\n"


def checked(game: Game, answer: str) -> Checked:
    """Check the attempts of an answer, which ends with an empty line or with another game."""
    found = Checked()
    lines = answer.split("\n")
    for place, line in enumerate(lines):
        whole = place + 1 < len(lines)
        if whole and (not line.strip() or ":" in line):
            return found._replace(ended=True)
        attempt, equals, _ = line.partition(" =")
        found = found._replace(tried=found.tried + bool(equals))
        if not equals or not _is_allowed(game, attempt):
            continue
        distance = abs(game.target - _total(attempt))
        found = found._replace(allowed=found.allowed + 1)
        if found.distance is None or distance < found.distance:
            found = found._replace(nearest=attempt, distance=distance)
        if found.solved:
            break
    return found


def _is_allowed(game: Game, attempt: str) -> bool:
    """Whether it is a sum of given numbers, each used at most once."""
    if not SUM.fullmatch(attempt):
        return False
    numbers = Counter(int(number) for _, number in TERM.findall(attempt))
    return numbers <= Counter(game.numbers)


def _total(attempt: str) -> int:
    return sum(int(sign + number) for sign, number in TERM.findall(attempt))
