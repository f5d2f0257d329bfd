"""When to look: at most every so often, rarer in a long run, and within a share of its time."""

from __future__ import annotations

from typing import Any

from paged_kv.errors import BadCount


class Pace:
    """Says when the next look is due, from what the looks so far have cost.

    `interval`: seconds between two looks at the least. `share`: what the looks may cost, as a share
    of the time that has passed (None: anything). `thinning`: looks are at least this share of the
    time passed apart, so that their number grows with the logarithm of a long run.

    >>> pace = Pace(interval=0.05, share=0.01, thinning=0.0)
    >>> pace.looked(at=1.0, cost=0.002)
    >>> pace.due                            # the interval is over, and 2 ms are well below 1 %
    1.05
    >>> pace.looked(at=1.05, cost=0.018)    # 20 ms in all: that is 1 % of 2 s
    >>> round(pace.due, 9)
    2.0
    """

    def __init__(self, interval: float, share: float | None, thinning: float) -> None:
        self.interval = interval
        self.share = share
        self.thinning = thinning
        self.spent = 0.0
        self.due = 0.0

    def looked(self, at: float, cost: float) -> None:
        """A look began `at` seconds after the start and took `cost` seconds."""
        self.spent += cost
        self.due = at + max(self.interval, at * self.thinning)
        if self.share is not None:
            self.due = max(self.due, self.spent / self.share)


def check_pace(interval: Any, budget: Any) -> None:
    """Raise BadCount unless these are seconds between two looks and a share of the time or None."""
    if not _is_number(interval) or not interval >= 0:
        raise BadCount("interval", interval, "a number of seconds >= 0")
    if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
        raise BadCount("budget", budget, "None or a share of the time, above 0 up to 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
