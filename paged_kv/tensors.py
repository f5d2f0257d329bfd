"""Checks of tensors that callers hand over."""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.checks import choice
from paged_kv.errors import BadArgument, BadDevice, BadDtype, BadShape
from paged_kv.pages.buffers import Form, Ints


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise BadArgument unless it is a tensor that holds its numbers one by one: neither sparse nor
    nested.
    """
    if not isinstance(tensor, torch.Tensor):
        raise BadArgument(name, tensor, "a tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise BadArgument(name, tensor, "a dense tensor")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor | Form
) -> None:
    """Raise an error unless it is a dense tensor of `shape`, with dtype and device of `like`.

    BadArgument, BadShape, BadDtype or BadDevice; RuntimeError of torch where it is nested: see
    `check_dense`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise BadArgument(name, tensor, "a tensor")
    if tensor.shape != shape:
        raise BadShape(name, tuple(tensor.shape), shape)
    if tensor.layout is not torch.strided:
        raise BadArgument(name, tensor, "a dense tensor")
    if tensor.dtype != like.dtype:
        raise BadDtype(name, tensor.dtype, like.dtype)
    if tensor.device != like.device:
        raise BadDevice(name, tensor.device, like.device)


def own_positions(positions: torch.Tensor | Ints, shape: tuple[int, int]) -> Ints:
    """A copy of int64 numbers [B, n], on the host. Raises BadArgument, BadShape, BadDtype or
    BadDevice.
    """
    if not isinstance(positions, (torch.Tensor, np.ndarray)):
        raise BadArgument("positions", positions, "an int64 tensor or array [B, n]")
    if isinstance(positions, torch.Tensor):
        check_dense("positions", positions)
    if tuple(positions.shape) != shape:
        raise BadShape("positions", tuple(positions.shape), shape)
    if positions.dtype not in (torch.int64, np.int64):
        raise BadDtype("positions", positions.dtype, "int64")
    if isinstance(positions, torch.Tensor):
        if positions.is_meta:
            raise BadDevice("positions", positions.device, "a device that holds data")
        positions = positions.detach().cpu().numpy()
    return np.array(positions)


def is_left(pad: str) -> bool:
    """Whether padding is on the left. Raises BadArgument."""
    if type(pad) is str and pad == "left":
        return True
    return choice("pad", pad, ("left", "right")) == "left"
