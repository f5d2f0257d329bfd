"""One forward on one step, against a forward over whole paths."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hf_paths import feed, paths, whole
from tiny_models import FAMILIES, tiny_model
from transformers import LlamaForSequenceClassification

from paged_kv.errors import BadCount, BadShape
from paged_kv.integrations.huggingface import StepCache, shape_of

LENGTHS = (7, 3, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unequal_lengths_see_what_they_would_see_alone(
    family: str, attention: str, device: str
) -> None:
    model = tiny_model(family, attention, device=device)
    pages = shape_of(model).pages()
    prompts = paths(LENGTHS)
    roots = []
    for prompt in prompts:  # a prompt at a time: no padding
        _, (root,) = feed(model, pages, pages.new(1), torch.tensor([prompt]))
        roots.append(root)
    parents = [roots[0], roots[2], roots[1], roots[0]]
    more = paths((5, 5, 5, 5), seed=4)
    out, children = feed(model, pages, parents, torch.tensor(more))
    assert pages.lengths(children) == [12, 17, 8, 12]
    for row, (source, tail) in enumerate(zip([0, 2, 1, 0], more)):
        expected = whole(model, prompts[source] + tail)[-5:]
        torch.testing.assert_close(out.logits[row], expected, atol=1e-4, rtol=1e-4)
    pages.release([*roots, *children])
    assert pages.pages_in_use == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_are_attended_where_they_lie(family: str, device: str) -> None:
    """Rows of unequal lengths with unequal numbers of new tokens, padded on the right."""
    dense = tiny_model(family, "sdpa", device=device)
    model = tiny_model(family, "paged_kv", device=device)
    pages = shape_of(model).pages(page_size=2)
    prompts = paths(LENGTHS)
    roots = [feed(dense, pages, pages.new(1), torch.tensor([path]))[1][0] for path in prompts]
    parents = [roots[0], roots[2], roots[1], roots[0]]
    counts = [4, 1, 5, 2]
    tails = paths(counts, seed=4)
    tokens = torch.tensor([[*tail, *[0] * (5 - len(tail))] for tail in tails])
    positions = torch.tensor(pages.lengths(parents))[:, None] + torch.arange(5)
    with torch.no_grad(), pages.attend(parents, counts) as step:
        out = model(
            tokens.to(device), position_ids=positions.to(device), **StepCache(step).as_argument()
        )
        children = step.commit()
    assert pages.lengths(children) == [11, 13, 8, 9]
    for row, source in enumerate([0, 2, 1, 0]):
        expected = whole(dense, prompts[source] + tails[row])[-counts[row] :]
        torch.testing.assert_close(out.logits[row, : counts[row]], expected, atol=1e-4, rtol=1e-4)
    pages.check()


def test_half_precision_differs_by_rounding_only(device: str) -> None:
    model = tiny_model("llama", "sdpa", torch.bfloat16, device)
    pages = shape_of(model).pages()
    prompt, tail = paths((9, 4))
    _, (root,) = feed(model, pages, pages.new(1), torch.tensor([prompt]))
    out, _ = feed(model, pages, [root], torch.tensor([tail]))
    expected = whole(model, prompt + tail)[-4:]
    exact = whole(tiny_model("llama", device=device), prompt + tail)[-4:]
    allowed = 2 * (expected.float() - exact).abs().max()  # what half precision costs anyway
    assert (out.logits[0].float() - expected.float()).abs().max() <= allowed


def test_another_head_runs_on_the_same_pages() -> None:
    model = LlamaForSequenceClassification(tiny_model("llama").config).eval()
    pages = shape_of(model).pages()
    prompt, tail = paths((6, 2))
    _, (root,) = feed(model, pages, pages.new(1), torch.tensor([prompt]))
    out, _ = feed(model, pages, [root], torch.tensor([tail]))
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tail])).logits
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)


def test_a_forward_that_does_not_fit_changes_nothing() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    root, other = pages.new(2)
    with pages.open([root, other], 2) as step:
        cache = StepCache(step)
        with pytest.raises(BadCount, match="new tokens"):
            model(torch.ones(2, 3, dtype=torch.long), **cache.as_argument())
        with pytest.raises(BadShape, match="keys has shape"):
            model(torch.ones(3, 2, dtype=torch.long), **cache.as_argument())
        assert cache.get_seq_length() == 0
    assert pages.lengths([root, other]) == [0, 0]
    assert pages.pages_in_use == 0


def test_layers_can_be_read_as_those_of_other_caches() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    with torch.no_grad(), pages.open(pages.new(2), 3) as step:
        cache = StepCache(step)
        model(torch.tensor(paths((3, 3))), **cache.as_argument())
        assert len(cache) == 3
        assert cache.layers[1].keys.shape == cache.layers[1].values.shape == (2, 2, 3, 8)
        assert not cache.is_compileable
        assert cache.layers[0].batch_size == 2


def test_all_is_freed_as_soon_as_it_is_dropped() -> None:
    model = tiny_model("llama")
    pages = shape_of(model).pages()
    seqs = pages.new(1)
    gc.collect()
    gc.disable()
    try:
        step = pages.open(seqs, 3)
        cache = StepCache(step)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), **cache.as_argument())
        watched = [weakref.ref(cache), weakref.ref(cache.layers[0]), weakref.ref(step)]
        del cache, step
        assert [watch() for watch in watched] == [None, None, None]
        assert pages.open_steps == 0
    finally:
        gc.enable()
