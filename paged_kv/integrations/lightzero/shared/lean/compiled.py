"""The short step through `torch.compile`, where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch

from paged_kv.integrations.lightzero.shared.lean.checking import Contexts, Run, check, practice
from paged_kv.integrations.lightzero.shared.lean.places import TOKENS, most_tokens
from paged_kv.integrations.lightzero.shared.lean.reading import NotLean, Parts
from paged_kv.integrations.lightzero.shared.lean.staging import Staging, fixed_step
from paged_kv.integrations.lightzero.shared.lean.step import (
    Answers,
    attend_by_sums,
    attend_in_one,
)

# The wrapper around the kernels in C++: in Python it takes as long as they do where rows are few.
OPTIONS: dict[str, Any] = {"cpp_wrapper": True, "size_asserts": False}
# Steps of each way, in turn. The fastest one counts: on a busy machine most are interrupted.
ROUNDS = 50
GAIN = 0.97  # of the plain step's time: less is not worth the difference in the last bits


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

    def __init__(self, model: Any, parts: Parts, backend: str = "inductor") -> None:
        self._parts = parts
        self._staging = Staging(model, model.env_num)
        # What torch compiles it keeps by code object, a few for each: every model has its own.
        own = FunctionType(
            fixed_step.__code__.replace(),
            fixed_step.__globals__,
            argdefs=fixed_step.__defaults__,
            closure=fixed_step.__closure__,
        )
        options = OPTIONS if backend == "inductor" else None
        self._step: Any = torch.compile(
            own, fullgraph=True, dynamic=False, backend=backend, options=options
        )

    def fits(self, batch: Any) -> bool:
        """Whether this batch is one that the step was compiled for. Under a dispatch mode, such as
        one that counts kernels, torch does not run what it compiled: then none is.
        """
        return torch._C._len_torch_dispatch_stack() == 0 and self._staging.fits(batch)

    def run(self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any) -> Answers:
        """One step of all rows; K and V of its tokens are written to the batch."""
        staging = self._staging
        staging.load(model, batch, action, depths, times)
        turns = staging.turns
        answers: Answers = self._step(
            self._parts,
            staging.planes,
            staging.mask,
            staging.action,
            staging.index,
            # compilers have no complex numbers
            None if turns is None else torch.view_as_real(turns),
            attend_by_sums if staging.planes.is_cpu else attend_in_one,
        )
        staging.store(batch)
        batch.filled(TOKENS)
        return answers


def compiled(
    model: Any, parts: Parts, plain: Run, contexts: Contexts, backend: str = "inductor"
) -> Compiled:
    """A compiled step that gives the same answers in less time. Raises CannotCompile.

    Takes as long as the compiler: half a minute to minutes.
    """
    if contexts.window == "exact":
        raise CannotCompile('window="exact" computes whole windows at every step')
    try:
        made = Compiled(model, parts, backend)
        check(model, made.run, contexts, model.env_num, filled=False)
    except NotLean as reason:
        raise CannotCompile(str(reason)) from None
    except Exception as failure:  # of whatever kind: compilers fail in many ways
        said = next(iter(str(failure).splitlines()), "")
        raise CannotCompile(f"it failed: {type(failure).__name__}: {said}") from failure
    timed = race(model, plain, made.run, contexts)
    if timed.compiled > GAIN * timed.plain:
        took = f"{timed.compiled * 1e6:.0f} us, and {timed.plain * 1e6:.0f} without"
        raise CannotCompile(f"it gains nothing here: a step takes {took}")
    return made


def race(model: Any, plain: Run, other: Run, contexts: Contexts) -> Timed:
    """Time two ways to take a step of full windows, in turn."""
    lengths = [most_tokens(model.context_length)] * model.env_num
    best: list[list[float]] = [[], []]
    with practice(model, contexts, lengths) as case:
        for _ in range(ROUNDS):
            for taken, run in zip(best, (plain, other)):
                taken.append(_seconds(lambda run=run: case.take(run)))  # type: ignore[misc]
    return Timed(min(best[0]), min(best[1]))


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
