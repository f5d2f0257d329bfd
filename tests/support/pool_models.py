"""Models that workers of a pool make, and pools of workers in this process."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from in_process import FINE, InProcess
from tiny_models import tiny_model

from paged_kv.integrations.huggingface import PagedLM
from paged_kv.integrations.ray import SearchPool
from paged_kv.integrations.ray.worker import Recipe

ROOM = 10**6


def make_llama() -> Any:
    """A model of its own."""
    return deepcopy(tiny_model("llama"))


def other_weights() -> dict[str, torch.Tensor]:
    """Those of a model that says otherwise."""
    return {name: 1.2 * tensor for name, tensor in make_llama().state_dict().items()}


def a_lm(**options: Any) -> PagedLM:
    """What a pool should do as."""
    return PagedLM(make_llama(), progress=False, **{"max_bytes": ROOM, **options})


def a_pool(
    workers: int = 2,
    *,
    fate: Callable[[str], str] = lambda verb: FINE,
    lm: dict[str, Any] | None = None,
    make_model: Callable[[], Any] = make_llama,
    **options: Any,
) -> tuple[SearchPool, InProcess]:
    """A pool whose workers live here, and the engine that runs them."""
    settings = {"max_bytes": ROOM, **(lm or {})}
    engine = InProcess(Recipe(make_model, settings, 1, workers), fate)
    return SearchPool(make_model, workers, options=settings, engine=engine, **options), engine
