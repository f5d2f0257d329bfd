"""LightZero's own names for a stored context and for the batch in work."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from paged_kv.attention.dense import DenseLayer
from paged_kv.attention.in_pages import InPages
from paged_kv.step import Step


class Entry(NamedTuple):
    """A stored context as LightZero sees it."""

    handle: int
    size: int


class LayerHalf:
    """K or V of one layer of a batch, under LightZero's names."""

    def __init__(self, cache: torch.Tensor, size: int) -> None:
        self._cache = cache
        self._size = size


class LayerHalves:
    """Both halves of one layer of a batch, for whoever looks inside."""

    def __init__(self, batch: Step, layer: int) -> None:
        plane = batch.planes[0]
        size = batch.layers[layer].size
        self._k_cache = LayerHalf(plane[2 * layer], size)
        self._v_cache = LayerHalf(plane[2 * layer + 1], size)


class StepBatch:
    """The batch in work, as LightZero's `keys_values_wm`: its layers are those of the step.

    `masked` says whether windows of different lengths are to be masked: `mask` is None in every
    other batch.
    """

    __slots__ = ("_batch", "_in_pages", "_mask", "masked")
    whole_windows = False  # whether a step computes all of a window, and not the new tokens alone

    def __init__(self, batch: Step, masked: bool = False, in_pages: InPages | None = None) -> None:
        self._batch = batch
        self._in_pages = in_pages
        self._mask: torch.Tensor | None = None
        self.masked = masked and not batch.uniform and len(set(batch.lengths)) > 1

    @property
    def in_pages(self) -> InPages | None:
        """Attention to the windows where they lie, or None where they are copied: also where rows
        see padding, of which there is none in pages.
        """
        whole = self._batch.uniform or self.hides_padding or not any(self.pads)
        return self._in_pages if whole else None

    def mask(self, tokens: int) -> torch.Tensor | None:
        """Bool [B, 1, 1, columns]: what the next `tokens` tokens may attend to; None where that is
        everything.
        """
        if not self.masked:
            return None
        if self._mask is None:
            batch = self._batch
            seen = np.arange(batch.past + batch.room) >= np.array(batch.pads)[:, None]
            self._mask = torch.from_numpy(seen[:, None, None]).to(batch.planes[0].device)
        return self._mask[..., : self.size + tokens]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each context so far, without padding."""
        more = self.size - self._batch.past
        return [length + more for length in self._batch.lengths]

    def __reduce__(self) -> Any:
        return str, ("a batch that was in work where the model was copied",)

    def __getitem__(self, layer: int) -> DenseLayer:
        return self._batch.layers[layer]

    def __len__(self) -> int:
        return len(self._batch.layers)

    @property
    def parents(self) -> list[int]:
        """The context that each row goes on from."""
        return self._batch.parents

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context when it was gathered."""
        return self._batch.lengths

    @property
    def size(self) -> int:
        """Tokens so far, padding included."""
        return self._batch.size

    @property
    def hides_padding(self) -> bool:
        """Whether attention is to be masked, since windows differ."""
        return self.masked

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each context when it was gathered."""
        return self._batch.pads

    @property
    def past(self) -> int:
        """Columns of the longest context when it was gathered."""
        return self._batch.past

    def columns(self, end: int) -> torch.Tensor:
        """The first columns of all layers [2 * layers, B, heads, end, head_size], those of new
        tokens included: a view, the same object for each batch of this shape.
        """
        return self._batch.columns(0, end)[0]

    def filled(self, count: int) -> None:
        """So many more columns hold K and V, in every layer: somebody wrote them to `columns`."""
        self._batch.fill(count)

    @property
    def _keys_values(self) -> list[LayerHalves]:
        return [LayerHalves(self._batch, layer) for layer in range(len(self))]
