"""A step as attention reads an ordinary cache: K and V of each layer as dense tensors.

This is the reference: whatever attends to pages in another way has to agree with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from paged_kv.errors import BadArgument, BadCount, ClosedStep
from paged_kv.pages.buffers import Ints, Layout
from paged_kv.pages.lease import Lease
from paged_kv.tensors import check_dense, check_tensor


class Windows(NamedTuple):
    """Where the tokens of a batch lie in its columns: they end in column `past`, or begin in column
    0 where padding is on the right.

    >>> windows = Windows(sizes=[(0, 2), (0, 3)], past=3, left=True)
    >>> windows.pads, windows.places().tolist()
    ([1, 0], [[0, 0, 1], [0, 1, 2]])
    """

    sizes: list[tuple[int, int]]  # of each row: offset of the first token in its page, tokens
    past: int
    left: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window [B]."""
        return [length for _, length in self.sizes]

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each window [B]."""
        return [self.past - length if self.left else 0 for _, length in self.sizes]

    def places(self) -> Ints:
        """The index of each token in its window [B, past], 0 in padding."""
        index = np.arange(self.past) - np.array(self.pads)[:, None]
        return np.where((index >= 0) & (index < np.array(self.lengths)[:, None]), index, 0)

    def mask(self, size: int) -> torch.Tensor:
        """Bool [B, size], true at tokens, those behind the windows included. On the host."""
        columns = np.arange(size)
        pads = np.array(self.pads)[:, None]
        lengths = np.array(self.lengths)[:, None]
        kept = (columns >= pads) & ((columns < pads + lengths) | (columns >= self.past))
        return torch.from_numpy(kept)


class DenseLayer:
    """One layer of a step, as attention reads it and appends to it."""

    __slots__ = ("_filled", "_index", "_layout", "_lease")

    def __init__(self, lease: Lease, layout: Layout, filled: list[int], index: int) -> None:
        self._lease = lease
        self._layout = layout
        self._filled = filled  # columns of each layer
        self._index = index

    @property
    def size(self) -> int:
        """Columns filled so far."""
        return self._filled[self._index]

    @size.setter
    def size(self, size: int) -> None:
        self._filled[self._index] = size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, columns filled so far, head size of the keys."""
        plane = self._layout.planes[0].shape
        return plane[1], plane[2], self.size, plane[4]

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size], in place. Two kernels.

        Raises BadArgument, BadShape, BadDtype, BadDevice, ClosedStep; BadCount where the room is
        used up.
        """
        lease = self._lease
        if lease.number not in lease.light and lease.number not in lease.pending:
            raise ClosedStep("update")
        if not isinstance(keys, torch.Tensor):
            raise BadArgument("keys", keys, "a tensor")
        if not isinstance(values, torch.Tensor):
            raise BadArgument("values", values, "a tensor")
        layout = self._layout
        index = self._index
        first = self._filled[index]
        try:
            end = first + (keys.shape[2] if keys.dim() == 4 else 0)
            if end > layout.past + layout.room:
                allowed = f"0 to the room of {layout.room} that open() was given"
                raise BadCount("new tokens", end - layout.past, allowed)
            layers, key_shape, value_shape, dtype, device = layout.layers(first, end)
            key_slots, value_slots = layers[index]
            if keys.shape != key_shape or keys.dtype is not dtype or keys.device != device:
                check_tensor("keys", keys, key_shape, key_slots)
            if values.shape != value_shape or values.dtype is not dtype or values.device != device:
                check_tensor("values", values, value_shape, value_slots)
            # the buffers outlive the step, and must not hold its graph
            if keys.requires_grad or values.requires_grad:
                keys = keys.detach()
                values = values.detach()
            key_slots.copy_(keys)
            value_slots.copy_(values)
        except RuntimeError:
            # Of torch, where a tensor is not dense: that is not asked before, to save the time.
            check_dense("keys", keys)
            check_dense("values", values)
            raise
        self._filled[index] = end

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, as far as they are filled: views."""
        if self._lease.closed:
            raise ClosedStep("get")
        return self._layout.layers(0, self.size).layers[self._index]
