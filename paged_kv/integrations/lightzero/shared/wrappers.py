"""World models inside of what others put around a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

# Where DataParallel, DistributedDataParallel and others of their kind keep the model, and where
# torch.compile does.
_PLACES = ("module", "_orig_mod")


def unwrapped(model: Any) -> Any:
    """The model inside of DataParallel, DistributedDataParallel and torch.compile, however nested;
    what is none of these as it is.
    """
    while isinstance(model, nn.Module):
        inside = [getattr(model, place, None) for place in _PLACES]
        inner = next((found for found in inside if isinstance(found, nn.Module)), None)
        if inner is None:
            break
        model = inner
    return model


def world_model_of(model: Any) -> Any:
    """The world model of a UniZero model, or None."""
    return unwrapped(getattr(unwrapped(model), "world_model", None))


def state_by_node(model: Any) -> Any:
    """The contexts of a UniZero model on pages with node keys; None of any other."""
    paged = getattr(world_model_of(model), "paged", None)
    return paged if paged is not None and paged.keys == "node" else None


def lean_of(model: Any) -> Any:
    """The short steps of a UniZero model on pages, or None where its steps are LightZero's own."""
    return getattr(getattr(world_model_of(model), "paged", None), "lean", None)


def packed_linears(model: Any) -> AbstractContextManager[object]:
    """Inside, the linear layers of a world model on pages compute as was chosen for it."""
    world_model = world_model_of(model)
    linears = getattr(getattr(world_model, "paged", None), "linears", None)
    return nullcontext() if linears is None else linears.scope(world_model)
