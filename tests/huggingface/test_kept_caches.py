"""A cache that is put by after `generate` holds pages, and no more than its tokens need."""

from __future__ import annotations

import copy

import torch
from hf_paths import paths
from tiny_models import tiny_model

from paged_kv.integrations.huggingface import PagedCache, shape_of


def test_a_settled_cache_holds_the_pages_of_its_tokens() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages(page_size=4)
    cache = PagedCache(pages, model)
    prompt = torch.tensor(paths([10]))
    options = dict(max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt))
    first = model.generate(prompt, **options, **cache.as_argument())
    assert pages.open_steps == 1
    assert pages.pages_in_use > 3
    cache.settle()
    assert pages.open_steps == 0
    assert pages.pages_in_use == 3  # of 12 tokens: the last one was not fed
    assert cache.lengths == [12]

    options["attention_mask"] = torch.ones_like(first)
    again = model.generate(first, **options, **copy.deepcopy(cache).as_argument())
    plain = model.generate(first, **options)
    assert again.tolist() == plain.tolist()
    assert pages.pages_in_use == 3
