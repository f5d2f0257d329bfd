"""An interrupt between any two instructions leaves rows that are those before, those after, or
those that were stored last; and the next forward is right.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hf_paths import paths, whole
from interrupts import NEVER, interrupted
from tiny_models import tiny_model

from paged_kv.integrations.huggingface import PagedCache, shape_of
from paged_kv.integrations.huggingface.versions import FOUND

PATHS = paths((9, 9))
HELD = 6  # tokens of each row when the call is broken off
SHOTS = 16  # of each kind


@torch.no_grad()
def forward(model: Any, cache: PagedCache, end: int) -> torch.Tensor:
    """Feed what follows in both paths, up to `end`; the last logits of each row."""
    first = cache.get_seq_length()
    rows = torch.tensor(PATHS)[:, first:end]
    positions = torch.arange(first, end)[None]
    return model(rows, position_ids=positions, **cache.as_argument()).logits[:, -1]


CALLS: dict[str, Callable[[Any, PagedCache], object]] = {
    "forward": lambda model, cache: forward(model, cache, 8),
    "crop": lambda model, cache: cache.crop(-4 if FOUND.crop_removes else 2),
    "fork": lambda model, cache: cache.fork(),
    "deepcopy": lambda model, cache: deepcopy(cache),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([0, 0])),
}


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_leaves_rows_that_can_go_on(call: str, attention: str) -> None:
    model = tiny_model("llama", attention)
    expected = [whole(tiny_model("llama"), path)[-1] for path in PATHS]
    shape = shape_of(model)

    def scene() -> PagedCache:
        cache = PagedCache(shape.pages(page_size=2), model)
        forward(model, cache, 4)
        cache.settle()
        forward(model, cache, HELD)
        return cache

    steps = interrupted(partial(CALLS[call], model, scene()), NEVER).steps
    for at in range(1, steps, max(1, steps // SHOTS)):
        cache = scene()
        pages = cache.rows.pages
        shot = interrupted(partial(CALLS[call], model, cache), at)
        assert shot.fired
        shot.forget()
        held = cache.get_seq_length()
        assert held in (2, 4, HELD, 8), shot
        assert cache.batch_size == 2
        logits = forward(model, cache, 9)
        torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)
        if call != "reorder":
            torch.testing.assert_close(logits[1], expected[1], atol=1e-4, rtol=1e-4)
        assert cache.lengths == [9, 9]
        pages.check()
        del cache, logits
        assert pages.open_steps == 0
        pages.release(pages.live())  # what nobody received
        assert pages.pages_in_use == 0
