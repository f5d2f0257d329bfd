"""Real weights: SmolLM2-135M in the folder that PAGED_KV_SMOLLM2 names, as `save_pretrained` left
it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv.integrations.huggingface import PagedCache, shape_of

FOLDER = os.environ.get("PAGED_KV_SMOLLM2")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="PAGED_KV_SMOLLM2 names no folder with SmolLM2-135M"
)
TEXTS = [
    "The tree of a search has",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
]


@cache
def loaded(attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, attn_implementation=attention, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("beams", [1, 4])
def test_smollm2_writes_what_it_writes_on_a_dynamic_cache(beams: int, attention: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12}
    expected = loaded("sdpa").generate(**inputs, **options)
    model = loaded(attention)
    pages = shape_of(model).pages()
    memory = PagedCache(pages, model, expand_size=beams)
    got = model.generate(**inputs, **options, **memory.as_argument())
    assert tokenizer.batch_decode(got) == tokenizer.batch_decode(expected)
    del memory
    pages.check()
    assert pages.pages_in_use == 0
