"""The names of LightZero's main for a stored context and for the batch in work."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from paged_kv.integrations.lightzero.shared.batch import LayerHalf, StepBatch


class Dense(Protocol):
    """Who has the tensors of stored contexts."""

    def dense(self, handle: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of K and V of every layer."""


class Halves:
    """K and V of one layer of a context, of which `size` columns are filled."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, size: int) -> None:
        self._k_cache = LayerHalf(keys, size)
        self._v_cache = LayerHalf(values, size)


class Context:
    """A stored context, as LightZero's `KeysValues` of one row. Its tensors are made when they are
    looked at.
    """

    __slots__ = ("_state", "handle", "size")

    def __init__(self, state: Dense, handle: int, size: int) -> None:
        self._state = state
        self.handle = handle
        self.size = size

    def clone(self) -> Context:
        """Itself: a step never writes to what is stored."""
        return self

    def __getitem__(self, layer: int) -> Halves:
        return self._keys_values[layer]

    @property
    def _keys_values(self) -> list[Halves]:
        return [Halves(keys, values, self.size) for keys, values in self._state.dense(self.handle)]


class Window:
    """Some rows of a `KeysValues` from a column on, as a `KeysValues` of their own."""

    def __init__(self, whole: Any, rows: list[int], first: int) -> None:
        self._whole = whole
        self._rows = rows
        self._first = first

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, layer: int) -> Halves:
        source = self._whole[layer]
        keys, values = (
            half._cache[self._rows, :, self._first :] for half in (source._k_cache, source._v_cache)
        )
        return Halves(keys, values, self._whole.size - self._first)


class MainBatch(StepBatch):
    """The batch in work, as LightZero's `keys_values_wm`."""

    __slots__ = ()

    @property
    def hides_padding(self) -> bool:
        """Whether attention is to be masked, since windows differ: main goes by lengths."""
        return len(set(self.lengths)) > 1

    def remove_register_tokens(self, count: int) -> None:
        """Drop the last `count` columns, which the model appends for its own use."""
        for layer in self._batch.layers:
            layer.size -= count
