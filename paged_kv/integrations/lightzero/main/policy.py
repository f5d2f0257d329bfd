"""What main's policies remember of each environment: here without rounding it.

Main finds the root of an environment by its last observation. It keeps these in a tensor that is
made of whole numbers where observations are vectors, or after a reset: what is copied into it is
cut off, so that no root is found again, and the window goes on from an observation that nobody saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from lzero.policy.unizero import UniZeroPolicy

REMEMBER = "_update_last_infer_inputs"


def remember_exactly() -> None:
    """Have main's UniZero policy remember observations as they were, where its model is on pages
    with node keys.
    """
    remember = vars(UniZeroPolicy)[REMEMBER]
    if not hasattr(remember, "__wrapped__"):
        setattr(UniZeroPolicy, REMEMBER, _exactly(remember))


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
        paged = getattr(getattr(policy._model, "world_model", None), "paged", None)
        last = getattr(policy, held)
        if paged is not None and paged.keys == "node" and last.dtype != seen.dtype:
            last = last.to(seen.dtype)
            last[list(envs)] = seen
            setattr(policy, held, last)

    return remembered
