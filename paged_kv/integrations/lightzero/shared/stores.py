"""LightZero's own names for what is stored and what is in work, over pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from paged_kv.attention.dense import DenseLayer
from paged_kv.step import Step

if TYPE_CHECKING:
    from paged_kv.integrations.lightzero.shared.state import PagedState


class EnvKeys:
    """One environment's `past_kv_cache_init_infer_envs`: key -> sequence."""

    def __init__(self, state: PagedState, env: int) -> None:
        self._state = state
        self._env = env

    def __len__(self) -> int:
        return len(self._state.manager.init_pools[self._env])

    def __contains__(self, key: str) -> bool:
        return key in self._state.manager.init_pools[self._env]

    def __setitem__(self, key: str, handle: int) -> None:
        self._state.manager.set_init_cache(self._env, key, handle)

    def get(self, key: str) -> int | None:
        """The sequence stored under a key, or None."""
        return self._state.manager.get_init_cache(self._env, key)

    def clear(self) -> None:
        """Release the environment's root."""
        self._state.forget_roots(self._env)


class SharedKeys:
    """`past_kv_cache_recurrent_infer`: key -> sequence of a search node."""

    def __init__(self, state: PagedState) -> None:
        self._state = state

    def __len__(self) -> int:
        return len(self._state.manager.recur_pool)

    def __contains__(self, key: str) -> bool:
        return key in self._state.manager.recur_pool

    def __setitem__(self, key: str, handle: int) -> None:
        self._state.manager.set_recur_cache(key, handle)

    def get(self, key: str) -> int | None:
        """The sequence stored under a key, or None."""
        return self._state.manager.get_recur_cache(key)

    def clear(self) -> None:
        """Release all search nodes."""
        self._state.forget_nodes()


class Pool:
    """`shared_pool_recur_infer`, or one environment's `shared_pool_init_infer`: sequence ->
    context.
    """

    def __init__(self, state: PagedState) -> None:
        self._state = state

    def __getitem__(self, handle: int | None) -> Entry | None:
        return None if handle is None else self._state.entry(handle)


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

    __slots__ = ("_batch", "_mask", "masked")

    def __init__(self, batch: Step, masked: bool = False) -> None:
        self._batch = batch
        self._mask: torch.Tensor | None = None
        self.masked = masked and not batch.uniform and len(set(batch.lengths)) > 1
        if self.masked:
            seen = np.arange(batch.past + batch.room) >= np.array(batch.pads)[:, None]
            self._mask = torch.from_numpy(seen[:, None, None]).to(batch.planes[0].device)

    def mask(self, tokens: int) -> torch.Tensor | None:
        """Bool [B, 1, 1, columns]: what the next `tokens` tokens may attend to; None where that is
        everything.
        """
        return None if self._mask is None else self._mask[..., : self.size + tokens]

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
    def _keys_values(self) -> list[LayerHalves]:
        return [LayerHalves(self._batch, layer) for layer in range(len(self))]
