"""The dense working copy of a batch while the model runs: gathered once, committed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from paged_kv.errors import BadCount, BadDevice, BadDtype, BadShape, ClosedBatch
from paged_kv.storage import Ints, Layout

if TYPE_CHECKING:
    from paged_kv.cache import PagedKVCache

Windows = tuple[list[tuple[int, ...]], list[int], list[int]]
Rebase = Callable[["StagingBatch"], None]
UNKNOWN: Ints = np.zeros((0, 0), dtype=np.int64)


class StagingBatch:
    """A batch of contexts as an ordinary dense cache, with room for new tokens.

    Made by `PagedKVCache.open`. The windows end in column `past`; shorter ones are padded on the left with
    zeros (or on the right, with `pad="right"`: there new tokens follow the longest window, in the same columns).
    `update` appends in place, `keys` and `values` are views, `commit` stores the new tokens of all layers and
    returns the children. The buffers belong to the cache: a later `open` closes this batch.

    Attributes: `parents`; `lengths` and `pads` [B] (pads count on the left, else 0); `past`, `room`;
    `then` and `now` [B, past] the position each token was written at and its index in the window (both 0 in
    padding), only where a `rebase` was given; `planes`, the raw buffers [parts, B, heads, width, head_size].
    """

    def __init__(
        self, cache: PagedKVCache, parents: list[int], windows: Windows, room: int, left: bool, layout: Layout
    ) -> None:
        lengths = windows[2]
        self._cache: PagedKVCache | None = cache
        self.parents, self.windows, self.lengths = parents, windows, lengths
        self.room, self.left, self.layout = room, left, layout
        self.past = past = max(lengths, default=0)
        self.pads = [past - length for length in lengths] if left else [0] * len(lengths)
        self.sizes = [self.past] * cache.layers
        self.then = self.now = UNKNOWN

    @property
    def planes(self) -> list[torch.Tensor]:
        """Raw buffers, one a plane: [parts, B, heads, width, head_size]."""
        return self.layout.planes

    @property
    def size(self) -> int:
        """Columns filled so far in layer 0, padding included."""
        return self.sizes[0]

    def keys(self, layer: int) -> torch.Tensor:
        """K [B, heads, size, head_size] of a layer: a view."""
        return self.get(layer)[0]

    def values(self, layer: int) -> torch.Tensor:
        """V [B, heads, size, value_head_size] of a layer: a view."""
        return self.get(layer)[1]

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, as far as it is filled: views."""
        self._open("get")
        try:
            return self.layout.slice(layer, 0, self.sizes[layer])
        except IndexError:
            raise self._no_layer(layer) from None

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size] to a layer, in place. Two kernels.

        Raises BadShape, BadDtype, BadDevice; BadCount where the room is used up.
        """
        self._open("update")
        try:
            first = self.sizes[layer]
        except IndexError:
            raise self._no_layer(layer) from None
        end = first + (keys.shape[2] if keys.dim() == 4 else 0)
        if end > self.past + self.room:
            raise BadCount("new tokens", end - self.past, f"0 to the room of {self.room} that open() was given")
        key_slots, value_slots = self.layout.slice(layer, first, end)
        if not (alike(keys, key_slots) and alike(values, value_slots)):
            check_tensor("keys", keys, tuple(key_slots.shape), key_slots)
            check_tensor("values", values, tuple(value_slots.shape), value_slots)
        if keys.requires_grad or values.requires_grad:  # the buffers outlive the step: they must not hold its graph
            keys, values = keys.detach(), values.detach()
        key_slots.copy_(keys)
        value_slots.copy_(values)
        self.sizes[layer] = end

    def mask(self) -> torch.Tensor:
        """Bool [B, size], true at tokens, false at padding."""
        self._open("mask")
        columns = np.arange(self.size)
        pads, lengths = np.array(self.pads)[:, None], np.array(self.lengths)[:, None]
        kept = (columns >= pads) & ((columns < pads + lengths) | (columns >= self.past))
        return torch.from_numpy(kept).to(self.layout.planes[0].device)

    def commit(
        self,
        *,
        slide: int | Sequence[int] = 0,
        rewrite: Sequence[int | None] | None = None,
        positions: Ints | None = None,
    ) -> list[int]:
        """Store the new tokens and return the children, one a row; closes the batch.

        `slide`: tokens that each child drops from the front. `rewrite`: for a row the first column to store anew,
        in fresh pages that share nothing (its tokens were changed in `planes`), or None to share the parent's pages.
        `positions` [B, n] of the new tokens; by default their index in the parent's window.
        One scatter for all layers; all-or-nothing. Raises OutOfPages, BadCount, ParentChanged, ClosedBatch.
        """
        cache = self._open("commit")
        new = self.size - self.past
        if min(self.sizes) != max(self.sizes):
            raise BadCount("columns filled, by layer", self.sizes, "the same number in every layer")
        children = cache._commit(self, new, slide, rewrite, positions)
        self.close()
        return children

    def close(self) -> None:
        """Give the batch up; nothing is stored. Closing twice is fine."""
        self._cache = None

    def _open(self, what: str) -> PagedKVCache:
        if self._cache is None:
            raise ClosedBatch(what)
        return self._cache

    def _no_layer(self, layer: int) -> BadCount:
        return BadCount("layer", layer, f"an int from 0 to {len(self.sizes) - 1}")


def alike(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether shape, dtype and device are the same."""
    return tensor.shape == like.shape and tensor.dtype == like.dtype and tensor.device == like.device


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raise BadShape, BadDtype or BadDevice unless the tensor has `shape`, and dtype and device of `like`."""
    if tuple(tensor.shape) != shape:
        raise BadShape(name, tuple(tensor.shape), shape)
    if tensor.dtype != like.dtype:
        raise BadDtype(name, tensor.dtype, like.dtype)
    if tensor.device != like.device:
        raise BadDevice(name, tensor.device, like.device)
