"""Pending nodes go on from what their parents have, also where nobody holds these any more."""

from __future__ import annotations

import torch
from hf_paths import paths, whole
from tiny_models import tiny_model

from paged_kv.integrations.huggingface.lm import PagedLM


def tiny_lm() -> PagedLM:
    return PagedLM(tiny_model("llama"), progress=False)


def test_a_loop_that_drops_the_nodes_it_came_from_feeds_each_token_once() -> None:
    """`nodes = lm.fork(nodes, ...)` drops the parents before anything was fed."""
    lm = tiny_lm()
    prompts = paths([9, 12])
    nodes = lm.prefill(prompts)
    for token in range(4, 10):
        nodes = lm.fork(nodes, [[token], [token + 1]])
        lm.logits(nodes)
    assert lm.stats().tokens_fed == 9 + 12 + 2 * 6
    for node, logits in zip(nodes, lm.logits(nodes)):
        expected = whole(lm.model, node.tokens)[-1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert lm.stats().nodes == 2
    lm.pages.check()


def test_pending_above_pending_goes_on_from_what_was_fed() -> None:
    lm = tiny_lm()
    (node,) = lm.prefill(paths([9]))
    for token in range(4, 10):
        (node,) = lm.fork([node], [[token]])
    lm.logits([node])
    assert lm.stats().tokens_fed == 9 + 6
    (node,) = lm.crop([node], [12])
    lm.logits([node])
    assert lm.stats().tokens_fed == 9 + 6 + 1  # its last token, for the hidden state
    assert lm.stats().nodes == 1


def test_a_pending_node_that_is_dropped_lets_its_parent_go() -> None:
    lm = tiny_lm()
    (node,) = lm.prefill(paths([9]))
    (node,) = lm.fork([node], [[4]])
    assert lm.stats().kv_bytes > 0
    del node
    assert lm.stats().kv_bytes == 0
    assert lm.stats().nodes == 0


def test_a_parent_that_is_released_goes_at_once() -> None:
    lm = tiny_lm()
    (root,) = lm.prefill(paths([9]))
    (child,) = lm.fork([root], [[4]])
    lm.release([root])
    assert lm.stats().kv_bytes == 0
    expected = whole(lm.model, child.tokens)[-1]
    torch.testing.assert_close(child.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_move_that_nobody_has_looked_at_yet_is_promoted_with_its_prompt() -> None:
    """As the answer of a person is, which is none of the children."""
    lm = tiny_lm()
    (root,) = lm.prefill(paths([9]))
    others = lm.fork([root] * 2, [[7], [8]])
    (move,) = lm.fork([root], [[4, 5]])
    assert lm.promote(move) == 3
    expected = whole(lm.model, move.tokens)[-1]
    torch.testing.assert_close(move.logits, expected, atol=1e-4, rtol=1e-4)
    assert lm.stats().tokens_fed == 9 + 2
    lm.release([move])
    assert lm.stats().kv_bytes == 0
    assert all(other.length == 0 for other in others)


def test_what_is_kept_beyond_a_scope_keeps_what_it_goes_on_from() -> None:
    lm = tiny_lm()
    with lm.scope() as scope:
        (root,) = lm.prefill(paths([9]))
        (cut,) = scope.keep(lm.crop([root], [6]))
        (child,) = scope.keep(lm.fork([root], [[4]]))
    lm.logits([child])
    lm.logits([cut])
    assert lm.stats().tokens_fed == 9 + 1 + 1
    assert lm.stats().nodes == 2  # `root` is released, though it is held here
    lm.release([child, cut])
    assert lm.stats().kv_bytes == 0
    lm.pages.check()


def test_a_promoted_node_keeps_its_own_and_takes_no_page() -> None:
    lm = tiny_lm()
    (root,) = lm.prefill(paths([9]))
    (fed,) = lm.extend([root], [[4]]).nodes
    held = lm.stats().kv_bytes
    lm.promote(fed)
    assert lm.stats().kv_bytes == held
    fed.logits  # noqa: B018
    assert lm.stats().tokens_fed == 10
