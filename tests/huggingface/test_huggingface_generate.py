"""`generate()` on pages gives what it gives on a DynamicCache, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_paths import feed, left_padded, paths
from tiny_models import FAMILIES, tiny_model

from paged_kv import PagedKVCache
from paged_kv.integrations.huggingface import PagedCache, shape_of

ATTENTIONS = ("sdpa", "eager", "paged_kv")
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "beams": {"num_beams": 3, **GREEDY},
    "sampled beams": {"num_beams": 2, **SAMPLED},
    "several": {"num_return_sequences": 3, **SAMPLED},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, **GREEDY},
    "chunked prefill": {"prefill_chunk_size": 3, **GREEDY},  # a chunk of padding only, for a row
}


def generated(model: Any, tokens: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """What `generate` returns, with the same draws each time."""
    torch.manual_seed(5)
    return model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        **{"max_new_tokens": 12, "output_logits": True, **options},
        return_dict_in_generate=True,
    )


def same(got: Any, expected: Any) -> None:
    """Tokens are equal, and logits nearly."""
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.logits) == len(expected.logits) > 0
    for mine, other in zip(got.logits, expected.logits):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def whole_again(pages: PagedKVCache) -> None:
    """Nothing is held any more, and nothing is broken."""
    pages.check()
    assert (pages.live(), pages.open_steps, pages.pages_in_use) == ([], 0, 0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_padded_prompts(family: str, attention: str, device: str) -> None:
    model = tiny_model(family, attention, device=device)
    tokens, mask = left_padded(paths((9, 4, 6)))
    expected = generated(tiny_model(family, device=device), tokens, mask, **GREEDY)
    assert len(set(expected.sequences[0, 9:].tolist())) > 3  # else the test would see little
    pages = shape_of(model).pages()
    cache = PagedCache(pages, model)
    same(generated(model, tokens, mask, **GREEDY, **cache.as_argument()), expected)
    del cache
    whole_again(pages)


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_mode(mode: str, attention: str, family: str) -> None:
    model = tiny_model(family, attention)
    tokens, mask = left_padded(paths((7, 11)))
    expected = generated(tiny_model(family), tokens, mask, **MODES[mode])
    pages = shape_of(model).pages(page_size=2)
    cache = PagedCache(pages, model)
    same(generated(model, tokens, mask, **MODES[mode], **cache.as_argument()), expected)
    del cache
    whole_again(pages)


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("mode", ["greedy", "sampled", "beams", "several beams"])
def test_going_on_from_nodes_of_unequal_lengths(mode: str, attention: str) -> None:
    model = tiny_model("llama", attention)
    prompts = paths((9, 4))
    tokens, mask = left_padded(prompts)
    expected = generated(tiny_model("llama"), tokens, mask, **MODES[mode])
    pages = shape_of(model).pages()
    dense = tiny_model("llama")
    nodes = [feed(dense, pages, pages.new(1), torch.tensor([path]))[1][0] for path in prompts]
    in_use = pages.pages_in_use
    times = max(MODES[mode].get(name, 1) for name in ("num_beams", "num_return_sequences"))
    cache = PagedCache(pages, model, nodes, expand_size=times, omit_last=True)
    assert cache.lengths == [8] * times + [3] * times
    assert pages.pages_in_use == in_use
    same(generated(model, tokens, mask, **MODES[mode], **cache.as_argument()), expected)
    del cache
    assert pages.lengths(nodes) == [9, 4]
    assert pages.pages_in_use == in_use


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("mode", ["several", "beams", "several beams"])
def test_a_prompt_that_generate_repeats_is_stored_once(mode: str, attention: str) -> None:
    model = tiny_model("llama", attention)
    tokens, mask = left_padded(paths((41, 29)))
    expected = generated(tiny_model("llama"), tokens, mask, **MODES[mode])
    peaks = []
    for expand_size in (1, 3):
        pages = shape_of(model).pages(page_size=2)
        cache = PagedCache(pages, model, expand_size=expand_size)
        same(generated(model, tokens, mask, **MODES[mode], **cache.as_argument()), expected)
        rows = cache.fork(torch.cat([mask, mask.new_ones(2, 11)], 1).repeat_interleave(3, 0))
        assert pages.lengths(rows) == [52, 52, 52, 40, 40, 40]
        del cache
        peaks.append(pages.stats.peak_pages)
    prompts = 21 + 15
    assert pages.pages_in_use <= prompts + 6 * 7  # six rows of eleven tokens, each with a copy
    if attention == "paged_kv":  # the others have the whole batch for one forward
        assert peaks[0] >= 3 * prompts
        assert peaks[1] <= prompts + 6 * 8
    pages.release(rows)
    whole_again(pages)


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
def test_what_was_generated_is_a_tree_to_go_on_from(attention: str) -> None:
    """generate, fork what is real, and go on from there with only the last token left to feed."""
    model = tiny_model("qwen3", attention)
    tokens, mask = left_padded(paths((8, 5)))
    pages = shape_of(model).pages()
    cache = PagedCache(pages, model)
    first = generated(
        model, tokens, mask, max_new_tokens=6, **GREEDY, **cache.as_argument()
    ).sequences
    longer = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
    nodes = cache.fork(longer)
    assert pages.lengths(nodes) == [13, 10]  # the last token was drawn, and not fed
    del cache
    expected = generated(tiny_model("qwen3"), first, longer, **GREEDY)
    again = PagedCache(pages, model, nodes)
    same(generated(model, first, longer, **GREEDY, **again.as_argument()), expected)
    del again
    pages.release(nodes)
    whole_again(pages)


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
def test_rows_that_end_early_are_cut_where_they_end(attention: str) -> None:
    model = tiny_model("llama", attention)
    tokens, mask = left_padded(paths((6, 6)))
    free = generated(tiny_model("llama"), tokens, mask, **GREEDY)
    stop = int(free.sequences[0, 9])
    options = {"eos_token_id": stop, "pad_token_id": 0, **GREEDY}
    expected = generated(tiny_model("llama"), tokens, mask, **options)
    pages = shape_of(model).pages()
    cache = PagedCache(pages, model)
    out = generated(model, tokens, mask, **options, **cache.as_argument())
    assert out.sequences.tolist() == expected.sequences.tolist()
    real = (out.sequences != 0).long()
    ends = real.sum(1).tolist()
    assert ends[0] < ends[1]
    kept = cache.fork(real)
    held = out.sequences.shape[1] - 1
    assert pages.lengths(kept) == [min(end, held) for end in ends]


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_prompt_lookup_takes_drafts_back(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    tokens = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    mask = torch.ones_like(tokens)
    ended = {"eos_token_id": 2, **GREEDY}  # 4.57 needs one here
    expected = generated(tiny_model(family), tokens, mask, **ended)
    pages = shape_of(model).pages()
    cache = PagedCache(pages, model)
    drafted = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2, **ended}
    out = generated(model, tokens, mask, **drafted, **cache.as_argument())
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert cache.lengths == [out.sequences.shape[1] - 1]
    del cache, out
    whole_again(pages)


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
def test_an_assistant_drafts(attention: str) -> None:
    model = tiny_model("llama", attention)
    assistant = tiny_model("qwen2")
    tokens, mask = left_padded(paths((7,)))
    expected = generated(tiny_model("llama"), tokens, mask, **GREEDY)
    pages = shape_of(model).pages()
    cache = PagedCache(pages, model)
    drafted = {"assistant_model": assistant, **GREEDY}
    out = generated(model, tokens, mask, **drafted, **cache.as_argument())
    assert out.sequences.tolist() == expected.sequences.tolist()


class Collected:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
def test_tokens_are_streamed(attention: str) -> None:
    model = tiny_model("llama", attention)
    tokens, mask = left_padded(paths((7,)))
    streamer = Collected()
    cache = PagedCache(shape_of(model).pages(), model)
    out = generated(model, tokens, mask, streamer=streamer, **GREEDY, **cache.as_argument())
    assert streamer.ended
    assert streamer.tokens == out.sequences[0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "paged_kv"])
def test_half_precision(attention: str, device: str) -> None:
    """First logits differ from those of a DynamicCache by less than these do from exact ones."""
    tokens, mask = left_padded(paths((9, 4)))
    exact = generated(tiny_model("llama", device=device), tokens, mask, **GREEDY).logits[0]
    dense = tiny_model("llama", "sdpa", torch.bfloat16, device)
    model = tiny_model("llama", attention, torch.bfloat16, device)
    cache = PagedCache(shape_of(model).pages(), model)
    got = generated(model, tokens, mask, **GREEDY, **cache.as_argument()).logits[0].float()
    other = generated(dense, tokens, mask, **GREEDY).logits[0].float()
    assert (got - other).abs().max() <= 2 * (other - exact).abs().max()
