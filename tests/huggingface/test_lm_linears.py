"""A `PagedLM` whose linear layers have packed weights: what it says differs by rounding, follows
the weights, and the model is nobody else's business.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from paged_kv.errors import BadArgument
from paged_kv.integrations.huggingface import PagedLM
from paged_kv.linears import PackedLinears
from paged_kv.linears.packing import has_kernels

VOCABULARY = 600
HIDDEN = 512  # of smaller models, weights are not packed
INNER = 768
BODY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**BODY)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**BODY, tie_word_embeddings=True)),
    "biased": lambda: Qwen2ForCausalLM(Qwen2Config(**BODY, use_sliding_window=False)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**BODY, head_dim=64)),
    "other layers": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=8, eos_token_id=None)
    ),
}
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8], [3, 1, 4]]


@cache
def _first(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return MAKERS[kind]().eval()


def made(kind: str = "llama") -> Any:
    """A model of its own."""
    return deepcopy(_first(kind))


def packed_lm(model: Any, **options: Any) -> PagedLM:
    return PagedLM(model, progress=False, linears="packed", **options)


def said(lm: PagedLM) -> torch.Tensor:
    """Logits behind the prompts, which are fed anew, and a token more each."""
    lm.clear()
    nodes = lm.prefill(PROMPTS)
    return torch.cat([lm.logits(nodes), torch.cat(lm.extend(nodes, [[6], [7, 8], [9]]).logits)])


def own(model: Any) -> torch.Tensor:
    """What a copy of the model says with the linear layers that it has."""
    return said(PagedLM(deepcopy(model), progress=False))


def close(found: torch.Tensor, expected: torch.Tensor, within: float = 5e-5) -> None:
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


def is_packed(lm: PagedLM) -> bool:
    """Whether weights were packed. On machines without such kernels none are, and all else
    holds.
    """
    assert (lm.stats().packed_bytes > 0) == has_kernels(torch.float32)
    return lm.stats().packed_bytes > 0


def test_nothing_is_packed_by_itself() -> None:
    lm = PagedLM(made(), progress=False)
    said(lm)
    assert lm.stats().packed_bytes == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_model_says_the_same_but_for_rounding(kind: str) -> None:
    model = made(kind)
    lm = packed_lm(model)
    close(said(lm), own(model))
    if is_packed(lm):
        weights = sum(weight.nbytes for weight in model.parameters())
        assert VOCABULARY * HIDDEN * 4 <= lm.stats().packed_bytes < 1.1 * weights


def test_draws_are_the_same() -> None:
    model = made("tied")
    options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3}
    drawn = []
    for lm in (packed_lm(model), PagedLM(model, progress=False)):
        nodes = lm.prefill(PROMPTS)
        drawn.append([node.new_tokens for node in lm.sample(nodes * 3, **options)])
    assert drawn[0] == drawn[1]


def test_half_precision_differs_by_rounding_only() -> None:
    model = made().to(torch.bfloat16)
    lm = packed_lm(model)
    close(said(lm).float(), own(model.float()), within=0.03)
    assert (lm.stats().packed_bytes > 0) == has_kernels(torch.bfloat16)


def test_a_head_that_is_a_module_is_packed_too() -> None:
    head = torch.nn.Linear(HIDDEN, VOCABULARY).eval()
    model = made().model
    lm = packed_lm(model, head=head)
    said(lm)
    bare = packed_lm(model)
    bare.hidden_states(bare.prefill(PROMPTS))
    if is_packed(lm):
        more = lm.stats().packed_bytes - bare.stats().packed_bytes
        assert more >= head.weight.nbytes


def test_a_classifier_scores_the_same() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = LlamaForSequenceClassification(LlamaConfig(**BODY, num_labels=3)).eval()
    lm = packed_lm(model)
    close(said(lm), own(model))


def test_whoever_shares_packed_weights_packs_once() -> None:
    model = made()
    shared = PackedLinears()
    first = PagedLM(model, progress=False, linears=shared)
    second = PagedLM(model, progress=False, linears=shared)
    found = said(first)
    held = first.stats().packed_bytes
    close(said(second), found)
    assert second.stats().packed_bytes == held == shared.nbytes


# -- weights that change


def by_optimizer(model: Any) -> None:
    """One step, in place."""
    steps = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).loss.backward()
    steps.step()


def by_loading(model: Any) -> None:
    """Another state."""
    model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()})


def by_swapping(model: Any) -> None:
    """As adapters are merged: a parameter takes the place of another."""
    for layer in model.model.layers:
        old = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = torch.nn.Parameter(old.detach() + 0.05)


def by_data(model: Any) -> None:
    """Another tensor under the parameters that were there."""
    for parameter in model.parameters():
        parameter.data = 1.25 * parameter.data


def by_wrapping(model: Any) -> None:
    """As adapters are added: a module takes the place of a linear one."""
    for layer in model.model.layers:
        inner = layer.mlp.up_proj
        layer.mlp.up_proj = torch.nn.Sequential(inner, torch.nn.Linear(INNER, INNER)).eval()


CHANGES = (by_optimizer, by_loading, by_swapping, by_data, by_wrapping)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_changed_weights_are_computed_with(kind: str, change: Callable[[Any], None]) -> None:
    model = made(kind)
    lm = packed_lm(model)
    before = said(lm)
    change(model)
    nodes = lm.prefill(PROMPTS)  # nothing was cleared
    found = lm.logits(nodes)
    close(found, own(model)[: len(PROMPTS)])
    assert not torch.allclose(found, before[: len(PROMPTS)], atol=1e-3)


def test_what_leaves_no_trace_is_seen_once_all_is_given_up() -> None:
    model = made()
    lm = packed_lm(model)
    said(lm)
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
    close(said(lm), own(model))  # clears


def test_giving_up_gives_packed_weights_back() -> None:
    lm = packed_lm(made())
    said(lm)
    lm.clear()
    assert lm.stats().packed_bytes == 0


# -- the model is its owner's


def forward(model: Any) -> torch.Tensor:
    """What anyone else gets of the model, with gradients or without."""
    logits: torch.Tensor = model(input_ids=torch.tensor(PROMPTS[:1] * 2)).logits
    return logits.detach()


def patched(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_others_compute_as_before() -> None:
    model = made()
    with torch.no_grad():
        before = forward(model)
        lm = packed_lm(model)
        said(lm)
        assert torch.equal(forward(model), before)
    assert not patched(model)
    assert not patched(deepcopy(model))


def test_training_goes_on_in_between() -> None:
    model = made().train()
    expected = deepcopy(model)
    lm = packed_lm(model)
    said(lm)
    assert torch.equal(forward(model), forward(expected))
    by_optimizer(model)
    by_optimizer(expected)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    close(said(lm), own(expected))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_an_error_leaves_the_model_as_it_was(error: type[BaseException], place: str) -> None:
    model = made()
    lm = packed_lm(model)
    with torch.no_grad():
        before = forward(model)
    expected = said(lm)

    def fail(*_: Any) -> None:
        raise error("in the middle")

    hook = model.get_submodule(place).register_forward_hook(fail)
    with suppress(error):
        said(lm)
        pytest.fail("nothing was raised")
    hook.remove()
    assert not patched(model)
    with torch.no_grad():
        assert torch.equal(forward(model), before)
    assert torch.equal(said(lm), expected)


def test_a_model_that_computes_within_a_packed_forward() -> None:
    """As a hook does that asks the model for something else."""
    model = made()
    lm = packed_lm(model)
    expected = said(lm)
    asked: list[torch.Tensor] = []

    def ask(*_: Any) -> None:
        if not asked:
            asked.append(torch.empty(0))
            asked[0] = forward(model)

    hook = model.get_submodule("model.layers.1.mlp").register_forward_hook(ask)
    found = said(lm)
    hook.remove()
    assert torch.equal(found, expected)
    close(asked[0], forward(model))
    assert not patched(model)


@pytest.mark.parametrize("linears", ["fast", None, True, 3, ["packed"]])
def test_bad_choices_are_refused(linears: Any) -> None:
    with pytest.raises(BadArgument, match='"torch" or "packed"'):
        PagedLM(made(), linears=linears)
