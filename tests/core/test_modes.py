"""Modes of torch: whatever mode each call runs in, the cache works in all others, and holds no
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch

from paged_kv import PagedKVCache, Step

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
}


def made(device: str, **options: Any) -> PagedKVCache:
    return PagedKVCache(
        **{"layers": 2, "heads": 1, "head_size": 2, "page_size": 2, "num_pages": 2, **options},
        device=device,
    )


def buffers(cache: PagedKVCache) -> list[torch.Tensor]:
    """All tensors that a cache keeps, and the views of them that it keeps."""
    pool = cache._pool
    found = [plane.rows for plane in pool.storage.planes]  # type: ignore[attr-defined]
    for buffer in (*pool.buffers._kept, pool.scratch):
        found += buffer._flat
        for layout in buffer._layouts.values():
            found += [*layout.planes, *layout.flat]
            found += [view for views in layout._columns.values() for view in views]
            pairs = [pair for columns in layout._layers.values() for pair in columns.layers]
            found += [view for pair in pairs for view in pair]
    return found


def holds_no_graph(cache: PagedKVCache) -> None:
    for tensor in buffers(cache):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
        assert not tensor.is_inference()


class Story:
    """What happens to a cache, call by call: it is made, grown, opened, gathered, written to and
    read again.
    """

    def __init__(self, device: str, value_head_size: int) -> None:
        self.device = device
        self.value_head_size = value_head_size
        self.random = torch.Generator().manual_seed(0)

    def tokens(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            torch.randn(*shape, width, generator=self.random).to(self.device)
            for width in (2, self.value_head_size)
        )
        return keys, values

    def make(self) -> None:
        self.cache = made(self.device, value_head_size=self.value_head_size)
        (self.root,) = self.cache.new(1)

    def grow(self) -> None:
        self.cache.append([self.root], *self.tokens(2, 1, 1, 9))

    def open(self) -> None:
        self.batch = self.cache.open([self.root, self.root], 2)

    def gather(self) -> None:
        self.context = self.cache.gather([self.root])
        self.view = self.cache.gather([self.root], reuse=True)

    def update(self) -> None:
        for layer in range(2):
            self.batch.update(layer, *self.tokens(2, 1, 2))

    def commit(self) -> None:
        self.children = self.batch.commit(slide=1)

    def append(self) -> None:
        self.cache.append(self.children, *self.tokens(2, 2, 1, 3))

    def read(self) -> list[torch.Tensor]:
        found = self.cache.gather([self.root, *self.children], pad="left")
        return [found.keys.clone(), found.values.clone(), found.positions]


CALLS = ["make", "grow", "open", "gather", "update", "commit", "append"]


@pytest.mark.parametrize("value_head_size", [2, 3])
def test_every_call_may_run_in_inference_mode_or_outside(device: str, value_head_size: int) -> None:
    """In every order: 2 ** 7 stories, which all end alike."""
    endings = []
    for inside in product((False, True), repeat=len(CALLS)):
        story = Story(device, value_head_size)
        for name, inference in zip(CALLS, inside):
            with torch.inference_mode(inference):
                getattr(story, name)()
        for mode in MODES.values():
            with mode():
                endings.append(story.read())
        holds_no_graph(story.cache)
    for ending in endings[1:]:
        assert all(map(torch.equal, ending, endings[0]))


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_goes_on_growing_in_another_mode(device: str, mode: str) -> None:
    with MODES[mode]():
        cache = made(device)
        (seq,) = cache.new(1)
    kv = torch.ones(2, 1, 1, 5, 2, device=device)
    for other in MODES.values():
        with other():
            cache.append([seq], kv, kv)
            assert cache.open([seq], 1).keys(0).sum() == cache.gather([seq]).keys[0].sum()
    assert cache.stats.growths == 2
    assert cache.gather([seq]).keys.sum() == 2 * 15 * 2
    holds_no_graph(cache)


def test_the_pool_keeps_no_graph(device: str) -> None:
    """Tokens that a model computes under autograd are stored as numbers, not as the step that made
    them.
    """
    cache = made(device)
    (seq,) = cache.new(1)
    kv = torch.ones(2, 1, 1, 1, 2, device=device, requires_grad=True)
    cache.append([seq], kv * 2, kv * 2)
    batch = cache.open([seq], 1)
    for layer in range(2):
        batch.update(layer, kv[layer] * 2, kv[layer])
        assert not batch.keys(layer).requires_grad
    (child,) = batch.commit()
    assert not cache.gather([child]).keys.requires_grad
    holds_no_graph(cache)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value_head_size", [2, 3])
def test_parameters_of_a_model_may_go_in_everywhere(
    device: str, mode: str, value_head_size: int
) -> None:
    """As tokens, as what is subtracted of them before they are stored, as what a hook adds: nothing
    that stays requires a gradient.
    """
    cache = made(device, value_head_size=value_head_size)
    widths = (2, value_head_size)
    keys, values = (
        torch.nn.Parameter(torch.ones(2, 2, 1, 2, width, device=device)) for width in widths
    )
    shift = torch.nn.Parameter(torch.full((1, 1, 1, 1, 1), 3.0, device=device))

    def rebase(batch: Step) -> None:
        with torch.enable_grad():
            for plane in batch.planes:
                plane += shift
                plane[:, :, :, : batch.past].mul_(shift)

    with MODES[mode]():
        seqs = cache.new(2)
        cache.append(seqs, keys, values)
        holds_no_graph(cache)
        for past in (2, 1):  # written by whole pages, then by slots
            batch = cache.open(seqs, 2, rebase=rebase)
            assert batch.past == past
            assert (batch.keys(0) == (1 + 3) * 3).all()
            for layer in range(2):
                batch.update(layer, keys[layer], values[layer])
                assert not any(tensor.requires_grad for tensor in batch.get(layer))
            with torch.no_grad():
                for plane in batch.columns(past, past + 2):
                    plane -= shift
            children = batch.commit()
            holds_no_graph(cache)
            found = cache.gather(children)
            assert (found.keys[:, :, :, -2:] == 1 - 3).all()
            assert not found.keys.requires_grad
            assert not found.values.requires_grad
            cache.slide(seqs, 1)
    (keys.sum() + values.sum() + shift.sum()).backward()
    assert keys.grad is not None


def test_nobody_can_hang_a_graph_on_the_buffers(device: str) -> None:
    """What is computed of a batch has a graph of its own; in place it is refused by torch, or stays
    outside.
    """
    cache = made(device)
    (seq,) = cache.new(1)
    kv = torch.ones(2, 1, 1, 2, 2, device=device)
    cache.append([seq], kv, kv)
    scale = torch.nn.Parameter(torch.tensor(2.0, device=device))
    batch = cache.open([seq], 2)
    out = (batch.keys(0) * scale).sum()
    out.backward()
    assert scale.grad == 4
    views = (*batch.get(0), *batch.columns(2, 4), cache.gather([seq]).keys)
    for view in (*views, cache.gather([seq], reuse=True).values):
        with pytest.raises(RuntimeError, match="modified inplace"):
            view.mul_(scale)
    batch.planes[0].mul_(scale)
    holds_no_graph(cache)
