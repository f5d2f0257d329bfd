"""The short step through `torch.compile`, where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from paged_kv.integrations.lightzero.shared.lean.reading import Parts
from paged_kv.integrations.lightzero.shared.lean.staging import Staging, fixed_step
from paged_kv.integrations.lightzero.shared.lean.step import Answers

ROUNDS = 7  # of each way to take a step, in turn; the fastest one counts
STEPS = 5  # in a round


class CannotCompile(Exception):
    """Why compiled steps are not used."""


class Timed(NamedTuple):
    """Seconds of a step, at best."""

    plain: float
    compiled: float


class Compiled:
    """The step of full batches of one world model, compiled. Batches of other sizes are left to the
    plain step.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self._staging = Staging(model, rows)
        self._step: Any = torch.compile(fixed_step, fullgraph=True, dynamic=False)

    def fits(self, batch: Any) -> bool:
        """Whether this batch is one that the step was compiled for."""
        return self._staging.fits(batch)

    def run(
        self, model: Any, parts: Parts, batch: Any, action: torch.Tensor, depths: Any, times: Any
    ) -> Answers:
        """One step of all rows; K and V of its tokens are written to the batch."""
        staging = self._staging
        staging.load(model, batch, action, depths, times)
        answers: Answers = self._step(
            parts, staging.planes, staging.mask, staging.action, staging.index, staging.turns
        )
        staging.store(batch)
        return answers


def race(plain: Callable[[], object], compiled: Callable[[], object]) -> Timed:
    """Time two ways to take a step, in turn."""
    best = []
    for _ in range(ROUNDS):
        best.append([_seconds(run) for run in (plain, compiled)])
    return Timed(*(min(times) for times in zip(*best)))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS
