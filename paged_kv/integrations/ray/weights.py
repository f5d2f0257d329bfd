"""Weights on their way to workers: plain arrays, which are copied once, into the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.errors import BadArgument


class Weight(NamedTuple):
    """One tensor."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]


Weights = dict[str, Weight]
Shapes = dict[str, tuple[bool, tuple[int, ...]]]  # whether they are real numbers, and the shape


def packed(state: Any) -> Weights:
    """The `state_dict` of a model. Raises BadArgument for what is none."""
    allowed = "a dictionary of tensors by name, as state_dict() returns it"
    if not isinstance(state, Mapping):
        raise BadArgument("weights", state, allowed)
    found: Weights = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadArgument("weights", state, allowed)
        if tensor.is_meta or tensor.layout != torch.strided:
            raise BadArgument(f"weights[{name!r}]", tensor, "a dense tensor that has data")
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        found[name] = Weight(data, tensor.dtype, tuple(tensor.shape))
    return found


def shapes(weights: Mapping[str, Weight]) -> Shapes:
    """What has to fit of each tensor."""
    return {
        name: (weight.dtype.is_floating_point, weight.shape) for name, weight in weights.items()
    }


def check_fit(model: torch.nn.Module, found: Shapes) -> None:
    """Raise BadArgument where these are not the shapes of all weights of a model."""
    own = {
        name: (tensor.dtype.is_floating_point, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    differ = {name for name in own.keys() | found.keys() if own.get(name) != found.get(name)}
    if differ:
        raise BadArgument("weights", sorted(differ)[:5], "those of the model that workers have")


def load(model: torch.nn.Module, weights: Mapping[str, Weight]) -> None:
    """Have a model compute with these weights. Raises BadArgument where they are of another one;
    then nothing changed.
    """
    check_fit(model, shapes(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # arrays that are read only, as these are
        state = {
            name: torch.from_numpy(each.data).view(each.dtype).view(each.shape)
            for name, each in weights.items()
        }
    model.load_state_dict(state)
