"""What main's policies know of each environment, and its model does not: which of two phases a step
belongs to, and its last observation.

Collection and evaluation share one model, and number their environments alike. A root is that of an
environment in a phase: the next root of that phase takes its place, and those of the other stay.

Main finds the root of an environment by its last observation. It keeps these in a tensor that is
made of whole numbers where observations are vectors, or after a reset: what is copied into it is
cut off, so that no root is found again, and the window goes on from an observation that nobody saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from lzero.policy.unizero import UniZeroPolicy

from paged_kv.integrations.lightzero.shared.hooks import put_around
from paged_kv.integrations.lightzero.shared.policy import POLICIES, STEPS
from paged_kv.integrations.lightzero.shared.wrappers import state_by_node, world_model_of

REMEMBER = "_update_last_infer_inputs"


def name_phases() -> None:
    """Have main's policies tell models with node keys whether they collect or evaluate."""
    for policy in POLICIES:
        for step, (model, _) in STEPS.items():
            put_around(policy, step, partial(_in_phase, phase=step, model=model))


def _in_phase(step: Callable[..., Any], phase: str, model: str) -> Callable[..., Any]:
    @wraps(step)
    def named(policy: Any, *arguments: Any, **options: Any) -> Any:
        world_model = world_model_of(getattr(policy, model))
        paged = getattr(world_model, "paged", None)
        if paged is None or not paged.by_node(world_model):
            return step(policy, *arguments, **options)
        before = paged.phase
        paged.phase = phase
        try:
            return step(policy, *arguments, **options)
        finally:
            paged.phase = before

    return named


def remember_exactly() -> None:
    """Have main's UniZero policy remember observations as they were, where its model is on pages
    with node keys.
    """
    put_around(UniZeroPolicy, REMEMBER, _exactly)


def _exactly(remember: Callable[..., None]) -> Callable[..., None]:
    @wraps(remember)
    def remembered(
        policy: Any,
        held: str,
        actions: str,
        seen: torch.Tensor,
        acted: Sequence[Any],
        envs: Sequence[int],
        count: int,
    ) -> None:
        remember(policy, held, actions, seen, acted, envs, count)
        last = getattr(policy, held)
        if state_by_node(policy._model) is not None and last.dtype != seen.dtype:
            last = last.to(seen.dtype)
            last[list(envs)] = seen
            setattr(policy, held, last)

    return remembered
