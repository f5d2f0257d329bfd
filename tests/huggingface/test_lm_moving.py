"""Nodes leave an lm and come into another: they go on there as they would have here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from paged_kv.bundles.codec import from_json, to_json
from paged_kv.errors import (
    BadArgument,
    BadBundle,
    ForeignNode,
    OtherFingerprint,
    OutOfPages,
    ReleasedNode,
)
from paged_kv.integrations.huggingface import Node, PagedLM
from paged_kv.integrations.huggingface.node_rows import NodeRow
from paged_kv.snapshot import Snapshot, save_bundle

FAMILIES = ("llama", "gpt2", "mistral")
ROW = st.lists(st.integers(3, 60), min_size=1, max_size=6)


def lm_of(family: str = "llama", **options: Any) -> PagedLM:
    return PagedLM(tiny_model(family), progress=False, **{"max_bytes": 10**7, **options})


def grown(lm: PagedLM, rounds: int = 3) -> list[Node]:
    """Two trees of drawn nodes, with a pending and a cropped one among them."""
    nodes = lm.prefill([[5, 6, 7, 8, 9], [5, 6, 11]], seed=4)
    for _ in range(rounds):
        nodes += lm.sample(nodes[-2:] * 2, max_new_tokens=3)
    nodes += lm.fork(nodes[-1:], [[20, 21]])
    nodes += lm.crop(nodes[3:4], [2])
    return nodes


def same(nodes: list[Node], others: list[Node]) -> None:
    """Assert that nodes say the same of themselves."""
    for node, other in zip(nodes, others, strict=True):
        assert (node.tokens, node.new_tokens) == (other.tokens, other.new_tokens)
        assert (node.logprobs, node.finish_reason) == (other.logprobs, other.finish_reason)
        assert node.place.seed == other.place.seed
        assert node.place.children == other.place.children
        assert node.data == other.data


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_the_same_to_the_bit(family: str) -> None:
    lm = lm_of(family)
    nodes = grown(lm)
    nodes[2].data = {"visits": 3, "move": (1, 2)}
    bundle = lm.export(nodes)
    other = lm_of(family)
    theirs = other.adopt(bundle)
    same(nodes, theirs)
    assert other.stats().tokens_fed == 0
    assert other.stats().tokens == lm.stats().tokens
    assert other.pages.pages_in_use == lm.pages.pages_in_use
    assert torch.equal(lm.logits(nodes), other.logits(theirs))
    kids = lm.sample(nodes, max_new_tokens=5, output_scores=True)
    their_kids = other.sample(theirs, max_new_tokens=5, output_scores=True)
    same(kids, their_kids)
    for kid, twin in zip(kids, their_kids):
        assert kid.scores is not None
        assert twin.scores is not None
        assert torch.equal(kid.scores, twin.scores)


def test_they_stay_where_they_were() -> None:
    lm = lm_of()
    nodes = grown(lm)
    before = (lm.stats(), lm.pages.pages_in_use, lm.pages.live_sequences)
    lm.export(nodes)
    assert (lm.stats(), lm.pages.pages_in_use, lm.pages.live_sequences) == before
    lm.pages.check()


def test_what_is_dropped_there_gives_its_pages_back() -> None:
    lm = lm_of()
    other = lm_of()
    theirs = other.adopt(lm.export(grown(lm)))
    del theirs
    assert (other.stats().nodes, other.stats().paths) == (0, 0)
    assert other.pages.pages_in_use == 0


def test_a_tree_is_a_tree_there() -> None:
    lm = lm_of()
    nodes = grown(lm)
    other = lm_of()
    theirs = other.adopt(lm.export(nodes))
    assert other.promote(theirs[3]) == lm.promote(nodes[3])
    assert other.stats().nodes == lm.stats().nodes


def test_some_of_a_tree_hang_on_the_nearest_that_came_along() -> None:
    lm = lm_of()
    (root,) = lm.prefill([[5, 6, 7, 8]], seed=2)
    (child,) = lm.sample([root], max_new_tokens=2)
    (grandchild,) = lm.sample([child], max_new_tokens=2)
    (pending,) = lm.fork([grandchild], [[30]])
    other = lm_of()
    its_pending, its_root = other.adopt(lm.export([pending, root]))
    assert its_pending.place.above is its_root.place
    assert its_pending.new_tokens == (30,)
    assert its_pending.place.seed == pending.place.seed
    alone = lm_of()
    (its_pending,) = alone.adopt(lm.export([pending]))  # with what others hold of its path
    assert its_pending.place.above is None
    assert its_pending.length == pending.length
    alone.logits([its_pending])
    assert torch.allclose(alone.logits([its_pending]), lm.logits([pending]), atol=1e-6)


def test_pins_come_along() -> None:
    lm = lm_of()
    (root,) = lm.prefill([[5, 6, 7, 8]])
    lm.pin([root])
    lm.pin([root])
    other = lm_of()
    (theirs,) = other.adopt(lm.export([root]))
    other.unpin([theirs])
    other.unpin([theirs])
    with pytest.raises(ValueError, match="not pinned"):
        other.unpin([theirs])


def test_what_was_evicted_comes_without_pages() -> None:
    lm = lm_of()
    nodes = grown(lm)
    lm.clear()
    bundle = lm.export(nodes)
    assert len(bundle.records) == 0
    other = lm_of()
    theirs = other.adopt(bundle)
    same(nodes, theirs)
    assert torch.equal(other.logits(theirs), lm.logits(nodes))


def test_through_a_folder(tmp_path: Any) -> None:
    lm = lm_of()
    nodes = grown(lm)
    save_bundle(tmp_path / "tree", lm.export(nodes))
    assert save_bundle(tmp_path / "tree", lm.export(nodes)).new_pages == 0
    with pytest.raises(BadArgument, match="export"):
        save_bundle(tmp_path / "tree", nodes)  # type: ignore[arg-type]
    other = lm_of()
    with Snapshot(tmp_path / "tree") as snapshot:
        theirs = other.adopt(snapshot)
    same(nodes, theirs)
    assert torch.equal(lm.logits(nodes), other.logits(theirs))


def test_data_of_a_callers_own_needs_a_codec() -> None:
    class Complex:
        def encode(self, value: complex) -> object:
            return (value.real, value.imag)

        def decode(self, found: Any) -> object:
            return complex(*found)

    lm = lm_of()
    (root,) = lm.prefill([[5, 6]])
    root.data = 1 + 2j
    with pytest.raises(BadArgument, match="codec"):
        lm.export([root])
    (theirs,) = lm_of().adopt(lm.export([root], codec=Complex()), codec=Complex())
    assert theirs.data == 1 + 2j


def test_other_weights_and_pages_are_refused() -> None:
    lm = lm_of()
    bundle = lm.export(grown(lm))
    for other in (lm_of("mistral"), lm_of(page_size=4), lm_of("gpt2")):
        with pytest.raises(OtherFingerprint):
            other.adopt(bundle)
        assert other.stats().nodes == 0
    with pytest.raises(OtherFingerprint) as caught:
        lm_of("qwen2").adopt(bundle)
    assert "identity['weights']" in caught.value.differences
    named = lm.export([], identity={"version": 1})
    assert lm_of().adopt(named, identity={"version": 1}) == []
    with pytest.raises(OtherFingerprint, match="version"):
        lm_of().adopt(named, identity={"version": 2})


def test_what_is_no_node_or_comes_twice_is_refused() -> None:
    lm = lm_of()
    (root,) = lm.prefill([[5, 6]])
    with pytest.raises(BadArgument, match="once"):
        lm.export([root, root])
    with pytest.raises(ForeignNode):
        lm_of().export([root])
    lm.release([root])
    with pytest.raises(ReleasedNode):
        lm.export([root])
    with pytest.raises(BadArgument, match="export"):
        lm.adopt("tree")  # type: ignore[arg-type]
    with pytest.raises(BadBundle, match="no nodes"):
        lm.adopt(lm.pages.export([], identity={"v": 1}), identity={"v": 1})


def test_too_many_pages_are_refused_whole() -> None:
    lm = lm_of()
    bundle = lm.export(grown(lm))
    small = lm_of(max_bytes=3 * lm.pages.page_bytes)
    with pytest.raises(OutOfPages):
        small.adopt(bundle)
    assert (small.stats().nodes, small.pages.live_sequences) == (0, 0)


FIELDS = [*NodeRow._fields, "order"]
HOSTILE = st.sampled_from([None, -2, 2**70, "x", [], [[]], True, [99], 1.5, 3, [2**40]])


@settings(max_examples=40)
@given(field=st.sampled_from(FIELDS), row=st.integers(0, 5), value=HOSTILE, whole=st.booleans())
def test_fields_that_lie_are_refused_or_harmless(
    field: str, row: int, value: Any, whole: bool
) -> None:
    lm = lm_of()
    bundle = lm.export(grown(lm, 1))
    data, books = from_json(bundle.contents.extra)
    if whole:
        data[field] = value
    else:
        data[field][row] = value
    changed = replace(bundle.contents, extra=to_json((data, books)))
    other = lm_of()
    try:
        theirs = other.adopt(replace(bundle, contents=changed))
    except BadBundle:
        assert (other.stats().nodes, other.pages.live_sequences) == (0, 0)
    else:
        other.sample([node for node in theirs if node.tokens], max_new_tokens=2)
    other.pages.check()


@settings(max_examples=30)
@given(rows=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_any_nodes_go_on_as_they_would_have(
    rows: list[list[int]], seed: int, data: st.DataObject
) -> None:
    lm = lm_of()
    nodes = lm.prefill(rows, seed=seed)
    for _ in range(data.draw(st.integers(0, 4))):
        chosen = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
        nodes += lm.sample(chosen, max_new_tokens=data.draw(st.integers(1, 3)))
        nodes += lm.fork(chosen[:1], [data.draw(ROW)])
    taken = data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True))
    other = lm_of()
    theirs = other.adopt(lm.export(taken))
    assert [node.tokens for node in theirs] == [node.tokens for node in taken]
    kids = lm.sample(taken, max_new_tokens=3)
    twins = other.sample(theirs, max_new_tokens=3)
    assert [kid.tokens for kid in kids] == [twin.tokens for twin in twins]
    other.pages.check()
