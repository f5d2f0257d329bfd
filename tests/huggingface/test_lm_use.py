"""What else a `PagedLM` promises: what it keeps, evicts and frees, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hf_paths import left_padded, paths
from lm_oracle import Oracle, close, empty, whole
from tiny_models import FAMILIES, MAKERS, VOCABULARY, tiny_model
from transformers import LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

from paged_kv.errors import (
    BadArgument,
    BadCount,
    BadDtype,
    BadShape,
    ForeignNode,
    NotCopyable,
    NotPinned,
    OutOfPages,
    PagedKVError,
    ReleasedNode,
    UnsupportedModel,
    WeightsChanged,
)
from paged_kv.integrations.huggingface import PagedLM, ticks

PROMPTS = paths((7, 12, 9))
ROOM = 10**6


def lm_of(family: str = "llama", **options: Any) -> PagedLM:
    return PagedLM(tiny_model(family), **{"max_bytes": ROOM, "progress": False, **options})


# -- every family, device, and head


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_without_a_cache(family: str, device: str) -> None:
    lm = PagedLM(tiny_model(family, device=device), max_bytes=ROOM, prefill_chunk_size=5)
    oracle = Oracle(family)
    roots = lm.prefill(PROMPTS)
    children = lm.sample(roots, max_new_tokens=6, num_return_sequences=2)
    more = lm.extend(children, [[5, 6, 7]] * len(children))
    for node, logits in zip(more.nodes, more.logits):
        torch.testing.assert_close(
            logits.cpu(), oracle.logits(node.tokens)[-3:], atol=1e-4, rtol=1e-4
        )


def test_half_precision_differs_by_rounding_only() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    lm = PagedLM(model, max_bytes=ROOM)
    exact = Oracle("llama")
    nodes = lm.sample(lm.prefill(PROMPTS), max_new_tokens=4)
    for node in nodes:
        with torch.no_grad():
            plain = model(torch.tensor([node.tokens]), use_cache=False).logits[0, -1].float()
        wanted = exact.logits(node.tokens)[-1]
        allowed = 2 * float((plain - wanted).abs().max())
        assert float((node.logits.float() - plain).abs().max()) <= allowed


def test_codes_say_nearly_the_same_in_fewer_bytes() -> None:
    """However a path is cut into forwards: each token reads the codes of all others."""
    exact = lm_of()
    small = lm_of(storage="int8")
    pieces = lm_of(storage="int8", prefill_chunk_size=3)
    size = exact.pages.head_size
    assert exact.pages.page_bytes / small.pages.page_bytes == 4 * size / (size + 2)
    roots = [lm.prefill(PROMPTS) for lm in (exact, small, pieces)]
    wanted, found, again = [torch.stack([node.logits for node in nodes]) for nodes in roots]
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    close(again, found)
    with pytest.raises(BadArgument, match="storage is 'int4'"):
        lm_of(storage="int4")


def test_another_head_answers_for_every_position() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_model("llama").config).eval()
    lm = PagedLM(model, max_bytes=ROOM)
    policy = lm_of()
    nodes = lm.mirror(policy.sample(policy.prefill(PROMPTS), max_new_tokens=3))
    found = lm.logits(nodes)
    for node, row in zip(nodes, found):
        with torch.no_grad():
            expected = model(torch.tensor([node.tokens])).logits[0]
        close(row, expected)
    with pytest.raises(PagedKVError):
        lm.sample(nodes, max_new_tokens=2)


def test_a_head_of_the_caller_s_own_takes_the_place_of_the_model_s() -> None:
    lm = lm_of(head=lambda hidden: hidden.sum(-1, keepdim=True))
    (root,) = lm.prefill(PROMPTS[:1])
    close(root.logits, root.hidden_state.sum(-1, keepdim=True))
    bare = PagedLM(tiny_model("llama").model, max_bytes=ROOM)
    found = bare.extend(bare.prefill(PROMPTS[:1]), [[5]])
    assert found.logits == []
    with pytest.raises(BadArgument, match="head"):
        bare.logits(found.nodes)


def test_models_that_cannot_be_paged_are_refused_by_name() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        PagedLM(mamba)
    model = copy.deepcopy(tiny_model("llama"))
    model.model._supports_attention_backend = False
    with pytest.raises(UnsupportedModel, match="attention"):
        PagedLM(model)


# -- prompts


def test_prompts_come_as_tensors_arrays_and_lists_with_padding_anywhere() -> None:
    lm = lm_of()
    tokens, mask = left_padded(PROMPTS)
    for given, masks in (
        (tokens, mask),
        (tokens.numpy(), mask.bool().numpy()),
        (tokens.tolist(), mask.tolist()),
    ):
        assert [list(root.tokens) for root in lm.prefill(given, masks)] == PROMPTS
    backwards = lm.prefill(tokens.flip(1), mask.flip(1))
    assert [list(root.tokens[::-1]) for root in backwards] == PROMPTS
    (root,) = lm.prefill([numpy.array(PROMPTS[0])])
    assert root.tokens == tuple(PROMPTS[0])
    assert all(type(token) is int for token in root.tokens)
    assert lm.prefill([]) == []


def test_what_is_known_is_not_fed_again() -> None:
    lm = lm_of()
    known = lm.prefill([[5] * 20])
    fed = lm.stats().tokens_fed
    known += lm.prefill([[5] * 20, [5] * 12, [*[5] * 15, 7, 8], [5] * 20])
    # the same path shares its hidden state; of a beginning the last token is run again
    assert lm.stats().tokens_fed - fed == 0 + 1 + 2 + 0
    fed = lm.stats().tokens_fed
    lm.next_token_logprobs([[8] * 30 + [token] for token in range(40)])
    assert lm.stats().tokens_fed - fed == 30 + 40


def test_batches_of_nothing_are_nothing() -> None:
    lm = lm_of()
    assert lm.prefill([]) == lm.fork([], []) == lm.crop([], []) == lm.score([], []) == []
    assert lm.mirror([]) == lm.find([]) == []
    assert lm.extend([], []) == ([], [], [])
    assert lm.hidden_states([]).shape == (0, 32)
    assert lm.logits([]).shape == lm.next_token_logprobs([]).shape == (0, VOCABULARY)
    lm.pin([])
    lm.unpin([])
    lm.release([])


# -- bad input changes nothing


BAD: dict[str, tuple[Callable[[PagedLM, Any], Any], Any, str]] = {
    "too large": (lambda lm, n: lm.prefill([[3, VOCABULARY]]), BadArgument, "0 to 60"),
    "negative": (lambda lm, n: lm.fork([n], [[-1]]), PagedKVError, "-1"),
    "bool": (lambda lm, n: lm.fork([n], [[True]]), BadCount, "True"),
    "float": (lambda lm, n: lm.extend([n], [[1.0]]), BadCount, "1.0"),
    "inf": (lambda lm, n: lm.extend([n], [[float("inf")]]), BadCount, "inf"),
    "floats": (lambda lm, n: lm.prefill(torch.ones(1, 3)), BadCount, "1.0"),
    "string": (lambda lm, n: lm.score([n], ["12"]), BadArgument, "12"),
    "strings": (lambda lm, n: lm.score([n], [["12"]]), BadCount, "12"),
    "set": (lambda lm, n: lm.fork([n], [{1, 2}]), BadArgument, "order"),
    "number": (lambda lm, n: lm.fork([n], [5]), BadArgument, "list of token ids"),
    "nested": (lambda lm, n: lm.fork([n], [[[5]]]), BadCount, "5"),
    "no prompts": (lambda lm, n: lm.prefill(5), BadArgument, "input_ids"),
    "one prompt": (lambda lm, n: lm.prefill([1, 2]), BadArgument, "list of token ids"),
    "one dimension": (lambda lm, n: lm.prefill(torch.tensor([1, 2])), BadShape, "input_ids"),
    "empty": (lambda lm, n: lm.prefill([[3], []]), BadCount, "at least 1"),
    "masked": (lambda lm, n: lm.prefill([[3, 4]], [[0, 0]]), BadCount, "at least 1"),
    "mask rows": (lambda lm, n: lm.prefill([[3, 4]], [[1, 1]] * 2), BadArgument, "one row for"),
    "mask width": (lambda lm, n: lm.prefill([[3, 4]], [[1]]), BadArgument, "one for each token"),
    "mask kind": (lambda lm, n: lm.prefill([[3, 4]], "11"), BadArgument, "attention_mask"),
    "mask value": (lambda lm, n: lm.prefill([[3, 4]], [[1, 2]]), BadArgument, "0 and 1"),
    "text": (lambda lm, n: lm.prefill("abc"), BadArgument, "tokenizer"),
    "seed": (lambda lm, n: lm.prefill([[3]], seed="a"), BadCount, "seed"),
    "rows": (lambda lm, n: lm.fork([n, n], [[3]]), BadCount, "token_lists"),
    "no rows": (lambda lm, n: lm.fork([n], 5), BadArgument, "token_lists"),
    "extend by nothing": (lambda lm, n: lm.extend([n], [[]]), BadArgument, "at least one token"),
    "consume": (lambda lm, n: lm.extend([n], [[3]], consume=1), BadArgument, "consume"),
    "too long": (lambda lm, n: lm.fork([n], [[3] * 122]), BadCount, "128"),
    "too long prompt": (lambda lm, n: lm.prefill([[3] * 129]), BadCount, "128"),
    "crop": (lambda lm, n: lm.crop([n], [8]), BadCount, "lengths"),
    "crop rows": (lambda lm, n: lm.crop([n], [1, 2]), BadCount, "lengths"),
    "no list": (lambda lm, n: lm.logits(n), BadArgument, "nodes"),
    "no node": (lambda lm, n: lm.logits([5]), ForeignNode, "5"),
    "mirror of no node": (lambda lm, n: lm.mirror([5]), BadArgument, "node"),
    "mirror of no list": (lambda lm, n: lm.mirror(n), BadArgument, "nodes"),
    "foreign": (lambda lm, n: lm.logits([lm_of().prefill([[3]])[0]]), ForeignNode, "Node"),
    "look-up": (lambda lm, n: lm.next_token_logprobs(7), BadArgument, "token_lists"),
    "look-up of nothing": (lambda lm, n: lm.next_token_logprobs([[]]), BadCount, "at least 1"),
    "unpin": (lambda lm, n: lm.unpin([n]), NotPinned, "pinned"),
    "text of a node": (lambda lm, n: n.text, BadArgument, "tokenizer"),
    "find": (lambda lm, n: lm.find([[99]]), BadArgument, "99"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_changes_nothing(name: str) -> None:
    call, error, told = BAD[name]
    lm = lm_of()
    (node,) = lm.prefill(PROMPTS[:1], seed=1)
    before = lm.stats()
    with pytest.raises(error, match=told):
        call(lm, node)
    assert lm.stats() == before
    assert node.place.children == 0
    whole(lm)
    close(node.logits, Oracle("llama").logits(PROMPTS[0])[-1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_bytes": 10}, "max_bytes"),
        ({"max_bytes": "1 GB"}, "max_bytes"),
        ({"page_size": 0}, "page_size"),
        ({"eviction": "random"}, "random"),
        ({"backend": "fast"}, "backend"),
        ({"batch_bytes": 0}, "batch_bytes"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"weights": "ignore"}, "weights"),
        ({"progress": 1}, "progress"),
        ({"head": 5}, "head"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PagedKVError, match=told):
        lm_of(**options)


def test_a_path_ends_where_the_positions_do() -> None:
    lm = lm_of("gpt2")
    (root,) = lm.prefill([[3] * 120])
    with pytest.raises(BadCount, match="128"):
        lm.sample([root], max_new_tokens=9)
    (child,) = lm.sample([root], max_new_tokens=8, temperature=0)
    close(child.logits, Oracle("gpt2").logits(child.tokens)[-1])


def test_released_nodes_are_refused_and_their_children_are_not() -> None:
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1])
    (child,) = lm.sample([root], max_new_tokens=3)
    lm.release([root, root])
    for call in (
        lambda: root.logits,
        lambda: root.hidden_state,
        lambda: lm.sample([root], max_new_tokens=1),
        lambda: lm.release([root]),
        lambda: lm.pin([root]),
        lambda: lm.mirror([root]),
        lambda: lm.fork([child, root], [[3], [3]]),
    ):
        with pytest.raises(ReleasedNode, match="node 1 "):
            call()
    assert "released" in repr(root)
    assert root.tokens == tuple(PROMPTS[0])
    close(child.logits, Oracle("llama").logits(child.tokens)[-1])


def test_a_node_is_its_own_copy_and_cannot_be_pickled() -> None:
    lm = lm_of()
    (node,) = lm.prefill(PROMPTS[:1])
    node.data = {"mine": [1]}
    assert copy.copy(node) is node
    assert copy.deepcopy({"node": [node]})["node"][0] is node
    with pytest.raises(NotCopyable, match="Node"):
        pickle.dumps(node)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(NotCopyable, match="PagedLM"):
            duplicate(lm)


# -- weights


def test_active_dropout_is_refused_wherever_it_is() -> None:
    model = MAKERS["gpt2"]()
    with pytest.raises(UnsupportedModel, match="eval"):
        PagedLM(model.train(), max_bytes=ROOM)


@pytest.mark.parametrize("weights", ["drop", "refuse", "keep"])
def test_dropout_that_begins_later_is_refused_too(weights: str) -> None:
    model = MAKERS["gpt2"]().eval()
    lm = PagedLM(model, max_bytes=ROOM, weights=weights)
    (root,) = lm.prefill(PROMPTS[:1])
    before = lm.stats()
    model.transformer.h[1].attn.train()  # a part alone
    for call in (lambda: lm.prefill([[3]]), lambda: lm.sample([root], max_new_tokens=1)):
        with pytest.raises(UnsupportedModel, match="eval"):
            call()
    assert lm.stats() == before
    model.eval()
    lm.sample([root], max_new_tokens=1)
    assert lm.stats().weights_dropped == 0


def test_a_mode_without_dropout_is_as_good_as_another() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    lm = PagedLM(model, max_bytes=ROOM)
    (root,) = lm.prefill(PROMPTS[:1])
    expected = root.logits
    model.train()
    close(root.logits, expected)


def test_other_weights_drop_what_was_computed_with_the_old_ones() -> None:
    oracle = Oracle("llama")
    lm = PagedLM(oracle.model, max_bytes=ROOM)
    roots = lm.prefill(PROMPTS)
    old = lm.logits(roots)
    oracle.change()
    new = lm.logits(roots)
    assert float((new - old).abs().max()) > 1e-2
    for row, prompt in zip(new, PROMPTS):
        close(row, oracle.logits(prompt)[-1])
    assert lm.stats().weights_dropped == 1


def test_other_weights_are_refused_until_what_was_computed_is_forgotten() -> None:
    oracle = Oracle("llama")
    lm = PagedLM(oracle.model, max_bytes=ROOM, weights="refuse")
    oracle.change()  # nothing is held yet
    roots = lm.prefill(PROMPTS)
    oracle.change()
    before = lm.stats()
    for call in (lambda: lm.logits(roots), lambda: lm.prefill([[3]]), lambda: roots[0].logits):
        with pytest.raises(WeightsChanged, match="3 contexts"):
            call()
    assert lm.stats() == before
    lm.release(roots[:1])  # what asks no model goes on
    lm.fork(roots[1:2], [[3]])
    lm.clear()
    close(roots[1].logits, oracle.logits(PROMPTS[1])[-1])


def test_other_weights_may_be_kept() -> None:
    oracle = Oracle("llama")
    lm = PagedLM(oracle.model, max_bytes=ROOM, weights="keep")
    (root,) = lm.prefill(PROMPTS[:1])
    before = root.hidden_state
    oracle.change()
    assert torch.equal(root.hidden_state, before)
    assert lm.stats().tokens_fed == len(PROMPTS[0])


@pytest.mark.parametrize("weights", ["drop", "keep"])
def test_a_model_of_another_dtype_is_refused(weights: str) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    lm = PagedLM(model, max_bytes=ROOM, weights=weights)
    (root,) = lm.prefill(PROMPTS[:1])
    before = lm.stats()
    model.to(torch.bfloat16)
    with pytest.raises(BadDtype, match="the model"):
        lm.prefill([[3, 4]])
    assert lm.stats() == before
    model.to(torch.float32)
    lm.sample([root], max_new_tokens=2)


# -- room


def test_what_does_not_fit_at_once_is_fed_in_turn() -> None:
    lm = lm_of(max_bytes=12 * 1536, page_size=4)  # of which three prompts need 3 to 4 pages each
    oracle = Oracle("llama")
    prompts = paths([13] * 12)
    roots = lm.prefill(prompts)
    assert lm.stats().evicted
    grown = lm.extend(roots, [[4, 5]] * 12)
    for prompt, logits in zip(prompts, grown.logits):
        close(logits, oracle.logits([*prompt, 4, 5])[-2:])
    for prompt, found in zip(prompts, lm.score(roots, [[6, 7, 8]] * 12)):
        close(found, oracle.logprobs(prompt, [6, 7, 8]))
    whole(lm)


def test_what_cannot_fit_is_refused_and_changes_nothing() -> None:
    lm = lm_of(max_bytes=12 * 1536, page_size=4)
    roots = lm.prefill(paths([13] * 3))
    with pytest.raises(OutOfPages):
        lm.sample(roots, max_new_tokens=30, num_return_sequences=2)
    assert [root.place.children for root in roots] == [0, 0, 0]
    assert lm.stats().nodes == 3
    whole(lm)
    lm.pin(roots[:2])
    with pytest.raises(OutOfPages, match="8 pinned"):
        lm.extend(roots[2:], [[3] * 40])
    lm.unpin(roots[:2])
    with pytest.raises(OutOfPages):
        lm.pin(lm.fork(roots, [[4] * 10] * 3))
    assert not any(map(lm.paths.residents.index.pinned, lm.paths.residents.index))
    whole(lm)


def test_pins_hold_through_all_that_drops_contexts() -> None:
    oracle = Oracle("llama")
    lm = PagedLM(oracle.model, max_bytes=12 * 1536, page_size=4)
    (root,) = lm.prefill([PROMPTS[0]])
    lm.pin([root, root])
    lm.clear()
    assert lm.stats().kv_bytes == 0
    assert root.length == 0
    close(root.logits, oracle.logits(PROMPTS[0])[-1])
    oracle.change()
    close(root.logits, oracle.logits(PROMPTS[0])[-1])
    for seed in range(3):
        lm.prefill(paths([13] * 3, seed=seed))
    assert root.length == len(PROMPTS[0])
    lm.unpin([root])
    lm.prefill(paths([13] * 3, seed=7))
    assert root.length == len(PROMPTS[0])
    lm.unpin([root])
    with pytest.raises(NotPinned):
        lm.unpin([root])
    for seed in range(3):
        lm.prefill(paths([13] * 3, seed=seed))
    assert root.length < len(PROMPTS[0])


def test_unpinning_more_than_was_pinned_unpins_nothing() -> None:
    lm = lm_of()
    one, two = lm.prefill(PROMPTS[:2])
    lm.pin([one, two])
    with pytest.raises(NotPinned):
        lm.unpin([one, two, two])
    lm.unpin([one, two])


def test_nodes_of_one_path_share_all_they_have() -> None:
    lm = lm_of()
    (first,) = lm.prefill(PROMPTS[:1])
    before = lm.stats()
    roots = lm.prefill(PROMPTS[:1] * 50)
    after = lm.stats()
    assert after.paths == 51
    assert (after.kv_bytes, after.hidden_bytes) == (before.kv_bytes, before.hidden_bytes)
    del first
    assert lm.stats().hidden_bytes == before.hidden_bytes
    del roots
    empty(lm)


# -- drops


def test_all_is_freed_without_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        lm = lm_of(tokenizer=object())
        roots = lm.prefill(PROMPTS)
        children = lm.sample(roots, max_new_tokens=4, num_return_sequences=2)
        lm.score(children, [[3, 4]] * 6)
        lm.next_token_logprobs([[3, 4]])
        grown = lm.extend(children, [[3]] * 6, consume=True)
        with lm.scope():
            lm.fork(grown.nodes, [[4]] * 6)
        with pytest.raises(BadArgument):
            lm.sample(roots, max_new_tokens=2, seeed=1)
        watched = [weakref.ref(each) for each in (lm, lm.paths, lm.pages, lm.paths.residents)]
        held = [weakref.ref(node) for node in (*roots, *children, *grown.nodes)]
        del roots, children
        assert sum(watch() is not None for watch in held) == 6
        assert lm.stats().nodes == 7  # the look-up's own
        del grown
        lm.clear()
        assert (lm.stats().nodes, lm.pages.pages_in_use) == (0, 0)
        (last,) = lm.prefill([[5]])
        del lm
        assert last.logits.shape == (VOCABULARY,)  # a node keeps what it needs
        assert watched[0]() is None
        del last
        assert [watch() for watch in watched] == [None] * 4
    finally:
        gc.enable()


def test_a_node_that_is_dropped_amid_the_giving_back_of_another_is_given_back_too() -> None:
    lm = lm_of()
    nodes = lm.prefill([[3], [4], [5]])
    index = lm.paths.residents.index
    real = index.remove

    def remove(key: Any) -> None:
        real(key)
        del nodes[:1]  # as a finalizer might, while the first is seen to

    index.remove = remove  # type: ignore[method-assign]
    del nodes[0]
    lm.stats()
    del index.remove
    assert lm.stats().nodes == lm.stats().paths == len(nodes)


def test_deep_trees_are_dropped_without_recursion() -> None:
    """A pending node holds the one it goes on from."""
    lm = lm_of()
    (node,) = lm.prefill([[3]])
    for _ in range(20_000):
        (node,) = lm.crop([node], [1])
    del node
    empty(lm)


def test_promoting_releases_what_a_pending_node_went_on_from() -> None:
    lm = lm_of()
    (root,) = lm.prefill([[3, 4]])
    (child,) = lm.fork([root], [[5]])
    (other,) = lm.fork([root], [[6]])
    (leaf,) = lm.fork([child], [[7]])
    assert lm.promote(child) == 2
    assert [lm.paths.has(node.place.number) for node in (root, child, other, leaf)] == [0, 1, 0, 1]
    close(leaf.logits, Oracle("llama").logits([3, 4, 5, 7])[-1])


def test_a_scope_releases_what_was_made_in_it() -> None:
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1])
    with lm.scope() as scope:
        children = lm.sample([root] * 4, max_new_tokens=3)
        (kept,) = scope.keep([children[2]])
        with pytest.raises(ForeignNode):
            scope.keep(lm_of().prefill([[3]]))
    assert lm.stats().nodes == 2
    assert [lm.paths.has(child.place.number) for child in children] == [False, False, True, False]
    with pytest.raises(ZeroDivisionError), lm.scope():
        lost = lm.fork([kept], [[3]])
        raise ZeroDivisionError
    assert not lm.paths.has(lost[0].place.number)


def test_scores_leave_nothing_behind() -> None:
    lm = lm_of()
    (root,) = lm.prefill(PROMPTS[:1])
    before = lm.stats()
    lm.score([root] * 40, [[token] for token in range(40)])
    assert lm.stats() == before
    lm.score([root] * 3, [[3], [], [4, 5, 6]])
    assert lm.stats() == before._replace(
        tokens_fed=before.tokens_fed + 2, working_bytes=lm.stats().working_bytes
    )


def test_the_model_keeps_its_own_attention() -> None:
    model = tiny_model("llama", "eager")
    lm = PagedLM(model, max_bytes=ROOM)
    lm.prefill(PROMPTS)
    assert model.config._attn_implementation == "eager"


def test_the_look_up_keeps_no_more_than_has_contexts() -> None:
    lm = lm_of(max_bytes=12 * 1536, page_size=4)
    oracle = Oracle("llama")
    for seed in range(6):
        rows = paths([13] * 4, seed=seed)
        for row, found in zip(rows, lm.next_token_logprobs([*rows, rows[0]])):
            close(found, oracle.logits(row)[-1].log_softmax(-1))
    assert lm.stats().nodes <= 4 + 4
    with lm.scope():
        lm.next_token_logprobs([[5, 6]])
    fed = lm.stats().tokens_fed
    for _ in range(2):
        close(lm.next_token_logprobs([[5, 6]])[0], oracle.logits([5, 6])[-1].log_softmax(-1))
    assert lm.stats().tokens_fed == fed + 2
    assert lm.find([[5, 6]]) == [None]  # it is nobody's handle
    lm.clear()
    assert lm.stats().nodes == 0


def test_a_long_prefill_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            shown.append(options["total"])

        def update(self, count: int) -> None:
            shown.append(count)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            shown.append("end")

    monkeypatch.setattr(ticks, "tqdm", Bar)
    lm = lm_of(prefill_chunk_size=5)
    roots = lm.prefill(PROMPTS)
    assert shown == [28, 15, 11, 2, "end"]
    lm.sample(roots, max_new_tokens=2)
    assert shown[5:] == [6, 3, 3, "end"]
