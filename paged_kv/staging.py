"""The dense working copy of a batch while the model runs: gathered once, committed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from paged_kv.checks import whole
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDevice,
    BadDtype,
    BadShape,
    ClosedBatch,
    NotCopyable,
)
from paged_kv.pages.buffers import Ints, Layout
from paged_kv.pages.change import Record

if TYPE_CHECKING:
    from paged_kv.cache import PagedKVCache

Rebase = Callable[["StagingBatch"], None]


class StagingLayer:
    """One layer of a batch, as attention reads it and appends to it. `size` counts its columns
    filled so far.
    """

    __slots__ = ("_batch", "_index", "size")

    def __init__(self, batch: StagingBatch, index: int) -> None:
        self._batch = batch
        self._index = index
        self.size = batch.past

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, columns filled so far, head size of the keys."""
        plane = self._batch.layout.planes[0].shape
        return plane[1], plane[2], self.size, plane[4]

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size], in place. Two kernels.

        Raises BadArgument, BadShape, BadDtype, BadDevice, ClosedBatch; BadCount where the room is
        used up.
        """
        batch = self._batch
        if batch.closed:
            raise ClosedBatch("update")
        if not isinstance(keys, torch.Tensor):
            raise BadArgument("keys", keys, "a tensor")
        if not isinstance(values, torch.Tensor):
            raise BadArgument("values", values, "a tensor")
        layout = batch.layout
        first = self.size
        try:
            end = first + (keys.shape[2] if keys.dim() == 4 else 0)
            if end > layout.past + layout.room:
                allowed = f"0 to the room of {layout.room} that open() was given"
                raise BadCount("new tokens", end - layout.past, allowed)
            key_slots, value_slots = layout.layers(first, end)[self._index]
            shape = key_slots.shape
            dtype = key_slots.dtype
            device = key_slots.device
            if keys.shape != shape or keys.dtype != dtype or keys.device != device:
                check_tensor("keys", keys, shape, key_slots)
            if (
                values.shape != value_slots.shape
                or values.dtype != dtype
                or values.device != device
            ):
                check_tensor("values", values, value_slots.shape, value_slots)
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
        self.size = end

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, as far as they are filled: views."""
        batch = self._batch
        if batch.closed:
            raise ClosedBatch("get")
        return batch.layout.layers(0, self.size)[self._index]


class StagingBatch:
    """A batch of contexts as an ordinary dense cache, with room for new tokens.

    Made by `PagedKVCache.open`. The windows end in column `past`; shorter ones are padded on the
    left with zeros (or on the right, with `pad="right"`: there new tokens follow the longest
    window, in the same columns). `update` appends in place, `keys` and `values` are views, `layers`
    holds each layer as a cache of its own, `commit` stores the new tokens of all layers and returns
    the children. The buffers belong to the cache: a later `open` closes this batch.

    Attributes: `parents`; `past`, `room`; `layers`; `planes`, the raw buffers [parts, B, heads,
    width, head_size]; `uniform`, whether all windows begin at one offset of their pages and have
    one length: then nothing is padding.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        parents: list[int],
        records: list[Record],
        left: bool,
        layout: Layout,
        uniform: bool,
    ) -> None:
        self._cache = cache
        self._positions: Ints | None = None
        self.closed = False
        self.uniform = uniform
        self.parents = parents
        self.records = records
        self.left = left
        self.layout = layout
        self.past = layout.past
        self.room = layout.room
        self.layers = [StagingLayer(self, index) for index in range(cache.layers)]

    @property
    def planes(self) -> list[torch.Tensor]:
        """Raw buffers, one a plane: [parts, B, heads, width, head_size].

        Autograd does not follow what is done to them.
        """
        return [plane.detach() for plane in self.layout.planes]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyable("StagingBatch")

    @property
    def size(self) -> int:
        """Columns filled so far in layer 0, padding included."""
        return self.layers[0].size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window [B]."""
        return [record[2] for record in self.records]

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each window [B]: 0 in a batch padded on the right."""
        return [self.past - record[2] if self.left else 0 for record in self.records]

    @property
    def then(self) -> Ints:
        """The position each token of the windows was written at [B, past], 0 in padding.

        On the host. Raises ClosedBatch, or ParentChanged where a window is not what it was.
        """
        if self._positions is None:
            self._positions = self.opened("then").positions_of(self)
        return self._positions

    @property
    def now(self) -> Ints:
        """The index of each token in its window [B, past], 0 in padding. On the host."""
        index = np.arange(self.past) - np.array(self.pads)[:, None]
        return np.where((index >= 0) & (index < np.array(self.lengths)[:, None]), index, 0)

    def keys(self, layer: int) -> torch.Tensor:
        """K [B, heads, size, head_size] of a layer: a view."""
        return self.get(layer)[0]

    def values(self, layer: int) -> torch.Tensor:
        """V [B, heads, size, value_head_size] of a layer: a view."""
        return self.get(layer)[1]

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, as far as it is filled: views."""
        return self._layer(layer).get()

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size] to a layer, in place; see
        `StagingLayer.update`.
        """
        self._layer(layer).update(keys, values)

    def mask(self) -> torch.Tensor:
        """Bool [B, size], true at tokens, false at padding."""
        self.opened("mask")
        columns = np.arange(self.size)
        pads = np.array(self.pads)[:, None]
        lengths = np.array(self.lengths)[:, None]
        kept = (columns >= pads) & ((columns < pads + lengths) | (columns >= self.past))
        return torch.from_numpy(kept).to(self.layout.planes[0].device)

    def commit(
        self,
        *,
        slide: int | Sequence[int] = 0,
        rewrite: Sequence[int | None] | None = None,
        positions: torch.Tensor | Ints | None = None,
        less: Sequence[torch.Tensor] | None = None,
    ) -> list[int]:
        """Store the new tokens and return the children, one a row; closes the batch.

        `slide`: tokens that each child drops from the front. `rewrite`: for a row the first column
        to store anew, in fresh pages that share nothing (its tokens were changed in `planes`), or
        None to share the parent's pages. `positions` [B, n] of the new tokens; by default their
        index in the parent's window. `less`: tensors, one a plane, that broadcast to the new tokens
        [parts, B, heads, n, head_size]: what is stored is the difference, for a `rebase` to add
        back. One scatter for all layers; all-or-nothing. Raises OutOfPages, BadCount,
        ParentChanged, ClosedBatch.
        """
        cache = self.opened("commit")
        return cache.commit(self, slide=slide, rewrite=rewrite, positions=positions, less=less)

    def filled(self) -> int:
        """New tokens of every layer. Raises BadCount where the layers differ."""
        sizes = [layer.size for layer in self.layers]
        if sizes.count(sizes[0]) != len(sizes):
            raise BadCount("columns filled, by layer", sizes, "the same number in every layer")
        return sizes[0] - self.past

    def close(self) -> None:
        """Give the batch up; nothing is stored. Closing twice is fine."""
        self.closed = True

    def opened(self, what: str) -> PagedKVCache:
        """The cache of an open batch. Raises ClosedBatch, which names the call that
        needs it open.
        """
        if self.closed:
            raise ClosedBatch(what)
        return self._cache

    def _layer(self, layer: int) -> StagingLayer:
        if type(layer) is not int or layer < 0 or layer >= len(self.layers):
            layer = whole("layer", layer, 0, len(self.layers) - 1)
        return self.layers[layer]


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise BadArgument unless it is a tensor that holds its numbers one by one: neither sparse nor
    nested.
    """
    if not isinstance(tensor, torch.Tensor):
        raise BadArgument(name, tensor, "a tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise BadArgument(name, tensor, "a dense tensor")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor
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
