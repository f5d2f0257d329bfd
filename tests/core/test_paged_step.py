"""Steps that attend in the pages: against dense attention, and in the hands of careless callers."""

from __future__ import annotations

import copy
import gc
from weakref import ref

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from paged_machine import PagedMachine

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDevice,
    BadDtype,
    BadShape,
    NotCopyable,
    OutOfPages,
)


def test_paged_steps_agree_with_dense_attention(device: str) -> None:
    machine = type("Machine", (PagedMachine,), {"device": device})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=150, stateful_step_count=25, deadline=None)
    )


def made(**options: int) -> tuple[PagedKVCache, int]:
    """A cache with one sequence of five tokens."""
    shape = {"layers": 2, "heads": 2, "head_size": 4, "page_size": 4, "value_head_size": 3}
    cache = PagedKVCache(**{**shape, **options})  # type: ignore[arg-type]
    (root,) = cache.new()
    cache.append([root], torch.randn(2, 1, 2, 5, 4), torch.randn(2, 1, 2, 5, 3))
    return cache, root


def tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of new tokens in one layer."""
    sizes = (4, 4), (2, 4), (2, 3)
    queries, keys, values = (torch.randn(rows, heads, count, size) for heads, size in sizes)
    return queries, keys, values


def test_a_step_on_pages_is_a_dense_step_without_the_copy() -> None:
    cache, root = made()
    kv = [tokens(2, 3) for _ in range(2)]
    with cache.attend([root, root], [3, 1]) as step:
        for layer, (queries, keys, values) in zip(step.layers, kv):
            layer.attend(queries, keys, values)
        paged = step.commit()
    working = cache.working_bytes
    with cache.open([root, root], 3) as dense:
        for layer, (_, keys, values) in enumerate(kv):
            dense.update(layer, keys, values)
        stored = dense.commit(counts=[3, 1])
    for ours, theirs in zip(cache.gather(paged), cache.gather(stored)):
        assert torch.equal(ours, theirs)
    assert cache.lengths(paged) == [8, 6]
    assert working < cache.working_bytes
    cache.check()


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    cache, root = made()
    queries, keys, values = tokens(1, 2)
    step = cache.attend([root], 2)
    (layer, _) = step.layers
    nested = torch.nested.nested_tensor([torch.ones(2, 2, 4)])
    for wrong, error in (
        ((queries[:, :3], keys, values), BadShape),
        ((queries[..., :3], keys, values), BadShape),
        ((queries[0], keys, values), BadShape),
        ((queries, keys[:, :, :1], values), BadShape),
        ((queries, keys, values[..., :2]), BadShape),
        ((queries.double(), keys, values), BadDtype),
        ((queries, keys.double(), values), BadDtype),
        ((queries, keys, values.to("meta")), BadDevice),
        ((None, keys, values), BadArgument),
        ((queries, None, values), BadArgument),
        ((queries, nested, values), BadArgument),
        ((queries.to_sparse(), keys, values), BadArgument),
    ):
        with pytest.raises(error):
            layer.attend(*wrong)  # type: ignore[arg-type]
    with pytest.raises(BadCount, match="layers attended is 0, allowed is all 2"):
        step.commit()
    layer.attend(keys.repeat(1, 2, 1, 1), values.new_zeros(1, 2, 2, 4), values)
    first = layer.attend(queries, keys, values)
    assert torch.equal(first, layer.attend(queries, keys, values)), "called again, it stores anew"
    with pytest.raises(BadCount):
        step.commit(3)
    step.layers[1].attend(queries, keys, values)
    assert cache.lengths(step.commit(1)) == [6]


def test_arguments_of_attend_are_checked() -> None:
    cache, root = made(num_pages=2, max_pages=2)
    for counts in (-1, [1, 2], "1", 1.5):
        with pytest.raises(BadCount):
            cache.attend([root], counts)  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match='"auto" or "dense" or "tree"'):
        cache.attend([root], 1, backend="fast")
    with pytest.raises(OutOfPages):
        cache.attend([root], 4)
    step = cache.attend([root], 3)
    with pytest.raises(NotCopyable):
        copy.copy(step)
    assert repr(step) == "<PagedStep of 1 rows, 3 new tokens, 0 of 2 layers written>"
    step.close()
    assert "closed" in repr(step)


def test_nothing_holds_a_step_that_is_dropped() -> None:
    cache, root = made()
    gc.disable()
    try:
        step = cache.attend([root] * 3, 6)
        step.layers[0].attend(*tokens(3, 6))
        seen = ref(step)
        del step
        assert seen() is None
        assert cache.open_steps == 0
        assert cache.pages_in_use == 2
    finally:
        gc.enable()


def test_no_graph_is_kept() -> None:
    cache, root = made()
    queries, keys, values = (tensor.requires_grad_() for tensor in tokens(1, 1))
    step = cache.attend([root], 1)
    for layer in step.layers:
        assert not layer.attend(queries, keys, values).requires_grad
    (child,) = step.commit()
    assert not cache.gather([child]).keys.requires_grad
