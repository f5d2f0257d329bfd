"""What the workers of a pool hold and did, one by one and together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from paged_kv.integrations.ray.calls import Figures


class WorkerStats(NamedTuple):
    """One worker. Counts begin anew where it was brought back, but for `restarts`."""

    worker: int
    pid: int | None
    trees: int
    restarts: int
    figures: Figures | None  # as of its last answer


class PoolStats(NamedTuple):
    """All workers."""

    workers: list[WorkerStats]
    merged: Figures  # sums
    trees: int
    nodes: int
    moved: int  # trees, so far
    restarts: int
    version: int  # of the weights


def merged(figures: Iterable[Figures | None]) -> Figures:
    """The sums of all that are known."""
    known = [each for each in figures if each is not None]
    if not known:
        return Figures()
    return Figures(*(sum(column) for column in zip(*known)))
