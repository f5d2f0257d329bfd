"""The layers of a transformers cache over pages, and what they hand their K/V to.

All layers of a cache hold one `Feed`; none holds the cache, so that everything is freed as soon as
it is dropped, without the collector.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from paged_kv.integrations.huggingface.versions import FOUND

MARK = "paged_kv_layer"  # on keys of a paged forward: where the attention function finds its layer
Pair = tuple[torch.Tensor, torch.Tensor]


class Request(NamedTuple):
    """What an attention function is asked for, in one layer.

    `queries`, `keys`, `values` [B, heads, n, size] are of the new tokens; `mask` [B, n] is false at
    padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    window: int | None
    soft_cap: float | None


class Feed(Protocol):
    """What takes the new K/V of every layer, and lets the model attend to all.

    `columns` are those that the model sees: the tokens of each row are the last ones, padding is in
    front of them.
    """

    layers: int

    @property
    def rows(self) -> int:
        """Rows of the batch."""

    @property
    def columns(self) -> int:
        """Columns so far, of all layers."""

    def spans(self, new: int) -> tuple[int, int]:
        """Columns that a forward of `new` tokens attends to, and the number of the first one."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, more: Any
    ) -> Pair | None:
        """Take new K/V [B, heads, n, size]; all K/V of the layer, or None where `attend` is to be
        asked.
        """

    def attend(self, layer: int, request: Request) -> torch.Tensor:
        """What the queries see [B, query heads, n, value size]; new K/V are taken with it."""

    def read(self, layer: int) -> Pair:
        """K and V of a layer so far [B, heads, columns, size]."""


class PagedLength(int):
    """A number of columns that are attended to over pages, so without a mask; `new` are new."""

    new: int

    def __new__(cls, columns: int, new: int) -> PagedLength:
        length = super().__new__(cls, columns)
        length.new = new
        return length


class FeedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a cache, as models of both generations of transformers use it."""

    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are the masks' work: every layer has all columns
    supports_early_init = False
    is_initialized = True

    def __init__(self, feed: Feed, index: int) -> None:
        self.feed = feed
        self.index = index

    def lazy_initialization(self, *states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Take new K/V, and return all that there is; or the new ones, marked for `paged_kv`."""
        found = self.feed.update(self.index, keys, values, args or kwargs)
        if found is not None:
            return found
        setattr(keys, MARK, self)
        return keys, values

    def attend(self, request: Request) -> torch.Tensor:
        """What the queries see [B, query heads, n, value size]."""
        return self.feed.attend(self.index, request)

    def get_seq_length(self, *args: Any) -> int:
        """Columns so far."""
        return self.feed.columns

    def get_mask_sizes(self, queries: int | torch.Tensor) -> tuple[int, int]:
        """Columns that are attended to, and the number of the first one.

        `queries` is their number, or their places.
        """
        new = queries if isinstance(queries, int) else queries.shape[0]
        return self.feed.spans(new)

    def get_max_length(self) -> int:
        """No longest length."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No longest length: its older name."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self.feed.rows

    @property
    def keys(self) -> torch.Tensor:
        """K [B, heads, columns, size], as far as they are stored."""
        return self.feed.read(self.index)[0]

    @property
    def values(self) -> torch.Tensor:
        """V [B, heads, columns, size], as far as they are stored."""
        return self.feed.read(self.index)[1]


class FeedCache(Cache):  # type: ignore[misc]
    """A transformers cache whose layers share one feed."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(layers=[FeedLayer(feed, index) for index in range(feed.layers)])
        self.feed = feed

    def as_argument(self) -> dict[str, Any]:
        """The cache as an argument of `forward` and `generate`, under the name that this version of
        transformers gives it.
        """
        return {FOUND.cache_argument: self}
