"""What goes wrong, or would: misuse is named, failures leave the cache usable, nothing leaks."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import weakref
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_paths import feed, left_padded, paths, whole
from tiny_models import tiny_model
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from paged_kv import PagedKVCache
from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDtype,
    BadShape,
    NotCopyable,
    OutOfPages,
    StaleHandle,
    UnpagedAttention,
    UnsupportedModel,
)
from paged_kv.integrations.huggingface import PagedCache, shape_of
from paged_kv.integrations.huggingface.attention import paged_attention
from paged_kv.integrations.huggingface.versions import FOUND

BOTH = pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])


def node_of(pages: PagedKVCache, path: list[int]) -> int:
    """A sequence that holds a path."""
    _, (node,) = feed(tiny_model("llama"), pages, pages.new(1), torch.tensor([path]))
    return int(node)


@torch.no_grad()
def forward(model: Any, cache: PagedCache, tokens: list[list[int]]) -> torch.Tensor:
    """Logits of tokens that all rows have; rows are of one length."""
    first = cache.get_seq_length()
    rows = torch.tensor(tokens)
    positions = torch.arange(first, first + rows.shape[1])[None]
    return model(rows, position_ids=positions, **cache.as_argument()).logits


# -- traps of generate()


@BOTH
def test_a_cache_of_the_whole_prompt_is_told_what_to_leave_out(attention: str) -> None:
    """generate() has nothing left to feed, and feeds all again, or fails on its own."""
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages()
    path = paths((6,))[0]
    node = node_of(pages, path)
    cache = PagedCache(pages, model, [node])
    prompt = torch.tensor([path])
    wrong: type[Exception] = BadArgument
    why = r"all but the last token .* PagedCache\(omit_last=True"
    if FOUND.cache_argument == "past_key_values":
        wrong = IndexError
        why = "out of bounds|out of range"
    with pytest.raises(wrong, match=why):
        model.generate(prompt, max_new_tokens=2, do_sample=False, **cache.as_argument())
    assert cache.lengths == [6]  # nothing was written


@BOTH
def test_more_rows_than_the_cache_has_are_refused(attention: str) -> None:
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages()
    path = paths((6,))[0]
    cache = PagedCache(pages, model, [node_of(pages, path)], omit_last=True)
    with pytest.raises(BadShape, match=r"rows of the batch has shape \(4,\).*expand_size"):
        model.generate(torch.tensor([path]), num_beams=4, max_new_tokens=2, **cache.as_argument())
    assert cache.lengths == [5]


@BOTH
def test_rows_that_are_not_alike_are_not_taken_for_one(attention: str) -> None:
    model = tiny_model("llama", attention)
    cache = PagedCache(shape_of(model).pages(), model, expand_size=2)
    with pytest.raises(BadArgument, match=r"input_ids is 'rows that differ'.*expand_size=2"):
        forward(model, cache, paths((4, 4)))
    with pytest.raises(BadShape, match=r"rows of the batch has shape \(3,\).*a multiple of 2"):
        forward(model, cache, paths((4, 4, 4)))
    row = paths((4,))[0]
    forward(model, cache, [row, row])
    twin = deepcopy(cache)
    forward(model, twin, [[5], [6]])
    assert (cache.lengths, twin.lengths) == ([4, 4], [5, 5])


def test_an_empty_row_has_no_last_token_to_omit() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    with pytest.raises(BadCount, match="tokens of a row is 0"):
        PagedCache(pages, model, pages.new(1), omit_last=True)


def test_crop_takes_what_this_version_gives_it() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    node = node_of(pages, paths((6,))[0])
    cache = PagedCache(pages, model, [node])
    if FOUND.crop_removes:
        with pytest.raises(BadCount, match="tokens_to_remove is 2"):
            cache.crop(2)
        cache.crop(0)
        assert cache.lengths == [6]
    else:
        cache.crop(9)
        assert cache.lengths == [6]
        cache.crop(4)
        assert cache.lengths == [4]
    cache.crop(-9)
    assert cache.lengths == [0]
    assert pages.lengths([node]) == [6]


# -- the cache on its own


@BOTH
def test_a_deep_copy_is_a_fork(attention: str) -> None:
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages()
    path, left, right = paths((9, 3, 3))
    cache = PagedCache(pages, model)
    forward(model, cache, [path])
    assert cache.lengths == [9]
    in_use = pages.pages_in_use
    twin = deepcopy(cache)
    assert pages.pages_in_use == in_use
    mine = forward(model, cache, [left])[0]
    other = forward(model, twin, [right])[0]
    dense = tiny_model("llama")
    torch.testing.assert_close(mine, whole(dense, path + left)[-3:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other, whole(dense, path + right)[-3:], atol=1e-4, rtol=1e-4)


@BOTH
def test_all_goes_with_the_last_reference(attention: str) -> None:
    """No collector is needed: there is no circle."""
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages()
    gc.collect()
    gc.disable()
    try:
        cache = PagedCache(pages, model)
        logits = forward(model, cache, paths((5, 5)))
        twin = deepcopy(cache)
        forward(model, twin, paths((1, 1)))
        watched = [weakref.ref(each) for each in (cache, twin, cache.rows, cache.layers[0])]
        del cache, twin
        assert [watch() for watch in watched] == [None] * 4
        assert (pages.live(), pages.open_steps, pages.pages_in_use) == ([], 0, 0)
        del logits
    finally:
        gc.enable()
    pages.check()


def test_one_that_lives_to_the_end_of_the_process_ends_quietly() -> None:
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel;"
        "from paged_kv.integrations.huggingface import PagedCache, shape_of;"
        "model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9));"
        "pages = shape_of(model).pages(); cache = PagedCache(pages, model, pages.new(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception" not in done.stderr


def test_it_may_be_dropped_inside_of_any_verb() -> None:
    """As a finalizer would: what it held goes when the verb has ended."""
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    held = [PagedCache(pages, model, pages.new(1))]
    pages.listen(lambda event: held.clear())
    (root,) = pages.new(1)
    assert not held
    assert root in pages.live()
    assert len(pages.live()) == 2
    pages.check()


def test_sequences_of_the_caller_are_left_alone() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    node = node_of(pages, paths((6,))[0])
    cache = PagedCache(pages, model, [node], expand_size=2)
    forward(model, cache, paths((2, 2)))
    pages.release([node])
    assert cache.lengths == [8, 8]
    mine = cache.fork()
    cache.reset()
    assert (cache.lengths, pages.lengths(mine)) == ([0, 0], [8, 8])
    with pytest.raises(StaleHandle):
        PagedCache(pages, model, [node])


def test_pages_have_to_fit_the_model() -> None:
    model = tiny_model("llama")
    with pytest.raises(BadShape, match=r"pages .* \(3, 4, 8, 8\), expected \(3, 2, 8, 8\)"):
        PagedCache(shape_of(tiny_model("gpt2")).pages(), model)
    with pytest.raises(BadDtype, match=r"pages has dtype torch\.bfloat16"):
        PagedCache(shape_of(tiny_model("llama", dtype=torch.bfloat16)).pages(), model)
    with pytest.raises(BadArgument, match="pages is None"):
        PagedCache(None, model)  # type: ignore[arg-type]


def test_a_cache_is_not_pickled() -> None:
    model = tiny_model("llama")
    cache = PagedCache(shape_of(model).pages(), model)
    with pytest.raises(NotCopyable):
        pickle.dumps(cache)


# -- pages run out, models fail


@BOTH
def test_pages_that_run_out_lose_nothing(attention: str) -> None:
    """Room beyond the forward is asked for only where there is some."""
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages(page_size=2, num_pages=6, grow=False)
    path = paths((8,))[0]
    cache = PagedCache(pages, model)
    forward(model, cache, [path])
    forward(model, cache, [[5, 6]])
    with pytest.raises(OutOfPages):
        forward(model, cache, [[7, 8, 9]])
    assert cache.lengths == [10]
    logits = forward(model, cache, [[7, 8]])[0]
    expected = whole(tiny_model("llama"), [*path, 5, 6, 7, 8])[-2:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


class Broken(Exception):
    pass


@BOTH
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_that_fails_half_way_can_go_on(attention: str, layer: int) -> None:
    model = tiny_model("llama", attention)
    pages = shape_of(model).pages(page_size=2)
    path = paths((5,))[0]
    cache = PagedCache(pages, model)
    forward(model, cache, [path])

    def fail(*args: Any) -> None:
        raise Broken

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        for _ in range(2):
            with pytest.raises(Broken):
                forward(model, cache, [[9, 9, 9]])
    finally:
        hook.remove()
    kept = 3 if layer == 2 else 0  # every layer had stored them by then: twice
    assert cache.lengths == [5 + 2 * kept]
    cache.crop(-2 * kept if FOUND.crop_removes or kept else 5)
    logits = forward(model, cache, [[5, 6]])[0]
    expected = whole(tiny_model("llama"), [*path, 5, 6])[-2:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    del cache
    pages.check()
    assert (pages.live(), pages.open_steps) == ([], 0)


# -- the attention function


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral"])
def test_a_model_that_is_switched_works_without_our_cache(family: str) -> None:
    tokens, mask = left_padded(paths((12, 8)))
    model = tiny_model(family, "paged_kv")
    other = tiny_model(family)
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask, use_cache=False).logits
        assert torch.equal(plain, other(tokens, attention_mask=mask, use_cache=False).logits)
        dynamic = model(tokens, attention_mask=mask, **{FOUND.cache_argument: DynamicCache()})
    assert torch.equal(dynamic.logits, plain)


def test_switching_in_the_middle() -> None:
    model = deepcopy(tiny_model("llama"))
    pages = shape_of(model).pages()
    path = paths((9,))[0]
    cache = PagedCache(pages, model)
    parts = []
    for attention, first in (("sdpa", 0), ("paged_kv", 4), ("eager", 6), ("paged_kv", 7)):
        model.set_attn_implementation(attention)
        end = {0: 4, 4: 6, 6: 7, 7: 9}[first]
        parts.append(forward(model, cache, [path[first:end]])[0])
    expected = whole(tiny_model("llama"), path)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=1e-4)


def test_padding_in_the_middle_is_refused() -> None:
    model = tiny_model("llama", "paged_kv")
    cache = PagedCache(shape_of(model).pages(), model)
    tokens = torch.tensor(paths((4, 4)))
    for mask in ([[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 0, 1, 1]]):
        with pytest.raises(BadArgument, match=r"attention_mask is .*padding_side='left'"):
            model(tokens, attention_mask=torch.tensor(mask), **cache.as_argument())
    forward(model, cache, tokens.tolist())
    mask = torch.tensor([[1] * 6, [1] * 4 + [0, 1]])
    with pytest.raises(BadArgument, match="padding in front of the first token"):
        model(torch.ones(2, 2, dtype=torch.long), attention_mask=mask, **cache.as_argument())
    assert cache.lengths == [4, 4]


def test_a_mask_of_ones_own_is_refused() -> None:
    model = tiny_model("llama", "paged_kv")
    cache = PagedCache(shape_of(model).pages(), model)
    with pytest.raises(UnpagedAttention, match="masks of four dimensions"):
        model(
            torch.tensor([[3, 4]]),
            attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool),
            **cache.as_argument(),
        )


def test_masks_that_are_more_than_causal_are_refused() -> None:
    """As models make them that let the tokens of a picture see each other."""
    model = tiny_model("llama", "paged_kv")
    cache = PagedCache(shape_of(model).pages(), model)
    inputs = {("inputs_embeds" if FOUND.crop_removes else "input_embeds"): torch.zeros(1, 2, 8)}
    if not FOUND.crop_removes:
        inputs["cache_position"] = torch.arange(2)
    asked = {**inputs, **cache.as_argument(), "attention_mask": None}
    assert create_causal_mask(model.config, **asked).tolist() == [[True, True]]
    with pytest.raises(UnpagedAttention, match="the model changes the causal mask"):
        create_causal_mask(model.config, **asked, or_mask_function=lambda b, h, q, kv: q == kv)


def called(key: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> Any:
    return paged_attention(SimpleNamespace(num_key_value_groups=1), key, key, key, mask, **options)


def test_what_cannot_be_attended_is_named() -> None:
    key = torch.zeros(1, 1, 1, 2)
    with pytest.raises(UnpagedAttention, match="changes its keys after the cache has seen them"):
        called(key, torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(UnpagedAttention, match="caps its scores, which sdpa cannot"):
        called(key, None, softcap=5.0)
    model = tiny_model("llama", "paged_kv")
    cache = PagedCache(shape_of(model).pages(), model)
    key = torch.zeros(1, 2, 1, 8)
    marked, _ = cache.layers[0].update(key, key)
    for options, why in (
        ({"s_aux": torch.zeros(1)}, "adds s_aux to its scores"),
        ({"dropout": 0.1}, r"drops 0.1 of its scores: call model.eval\(\)"),
    ):
        with pytest.raises(UnpagedAttention, match=why):
            called(marked, None, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "paged_kv"])
def test_columns_that_all_rows_are_padded_in(attention: str) -> None:
    """The first columns of a prompt may be padding of every row; nodes hold none of it."""
    model = tiny_model("gemma3", attention)
    pages = shape_of(model).pages()
    prompts = paths((7, 4))
    tokens, mask = left_padded(prompts, width=10)
    cache = PagedCache(pages, model)
    masked(model, cache, tokens, mask)
    nodes = cache.fork(mask)
    assert pages.lengths(nodes) == [7, 4]
    again = PagedCache(pages, model, nodes)
    assert again.get_seq_length() == 7
    longer, mask = left_padded([path + [5, 6] for path in prompts])
    logits = masked(model, again, longer[:, 7:], mask)
    for row, path in enumerate(prompts):
        expected = whole(tiny_model("gemma3"), [*path, 5, 6])[-2:]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def masked(model: Any, cache: PagedCache, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of new tokens, where the mask tells positions."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(tokens, attention_mask=mask, position_ids=positions, **cache.as_argument()).logits


def test_a_model_that_cannot_be_paged_is_refused() -> None:
    model = deepcopy(tiny_model("llama"))
    model.model._is_stateful = True
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM cannot run on pages"):
        PagedCache(shape_of(tiny_model("llama")).pages(), model)
