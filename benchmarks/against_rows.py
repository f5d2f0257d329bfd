"""The arithmetic of against.py: what pairs of times say, and the table."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import NamedTuple

LIMIT = 1.10  # new / old
CONFIDENCE = 0.95
RESAMPLES = 4000
FEWEST_PAIRS = 6  # all of them lie on one side of the median with odds of 2 * 0.5 ** 6, below 0.05


class Pair(NamedTuple):
    """One figure in one round, in microseconds."""

    old: float
    new: float


class Interval(NamedTuple):
    """Where the median of the ratios lies."""

    low: float
    high: float


Measured = dict[str, list[Pair]]  # figure -> a pair of each round


@dataclass(frozen=True)
class Row:
    """One line of the table; times are in microseconds."""

    figure: str
    pairs: int
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None
    verdict: str
    ratios: list[float]


def interval(ratios: list[float]) -> Interval | None:
    """95 % confidence interval for the median ratio, or None where there are too few."""
    if len(ratios) < FEWEST_PAIRS:
        return None
    draw = random.Random(0)
    logs = [math.log(ratio) for ratio in ratios]
    drawn = (draw.choices(logs, k=len(logs)) for _ in range(RESAMPLES))
    medians = sorted(statistics.median(sample) for sample in drawn)
    outside = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Interval(math.exp(medians[outside]), math.exp(medians[-1 - outside]))


def verdict(found: Interval | None, limit: float = LIMIT) -> str:
    """What an interval says of the speed."""
    if found is None:
        return "too few"
    if found.high <= limit:
        return "kept"
    return "lost" if found.low > limit else "unclear"


def row(figure: str, pairs: list[Pair]) -> Row:
    """The line of one figure."""
    ratios = [pair.new / pair.old for pair in pairs]
    found = interval(ratios)
    return Row(
        figure=figure,
        pairs=len(pairs),
        old=statistics.median(pair.old for pair in pairs),
        new=statistics.median(pair.new for pair in pairs),
        ratio=math.exp(statistics.median(math.log(ratio) for ratio in ratios)),
        low=found.low if found else None,
        high=found.high if found else None,
        verdict=verdict(found),
        ratios=[round(ratio, 4) for ratio in ratios],
    )


def rows_of(found: Measured) -> list[Row]:
    """The table: a line of each figure."""
    return [row(figure, pairs) for figure, pairs in found.items()]


def table(rows: list[Row]) -> str:
    """The rows, for people."""
    width = max((len(line.figure) for line in rows), default=6)
    text = [
        f"{'figure':{width}}  {'pairs':>5}  {'old us':>10}  {'new us':>10}  {'ratio':>6}  "
        f"{'upper':>6}  verdict"
    ]
    for line in rows:
        upper = "-" if line.high is None else f"{line.high:.3f}"
        text.append(
            f"{line.figure:{width}}  {line.pairs:>5}  {line.old:>10,.2f}  {line.new:>10,.2f}  "
            f"{line.ratio:>6.3f}  {upper:>6}  {line.verdict}"
        )
    return "\n".join(text)
