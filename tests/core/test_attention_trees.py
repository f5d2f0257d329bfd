"""Attention over the pages of random trees, every backend beside a dense model of the tokens."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from paged_rows import Scene, assert_close

from paged_kv.attention import Scratch, cost, make_attention, part_work, tree

MOST_LIVE = 12
DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


class AttentionMachine(RuleBasedStateMachine):
    """Sequences that fork, grow, slide and end; steps on any of them are attended."""

    @initialize(
        page_size=st.integers(1, 4),
        value_head_size=st.sampled_from([None, 3]),
        dtype=st.sampled_from(DTYPES),
        heads=st.integers(1, 2),
        start=st.integers(0, 3),
        count=st.integers(0, 9),
    )
    def begin(self, page_size, value_head_size, dtype, heads, start, count):
        torch.manual_seed(0)
        self.scene = Scene(
            page_size=page_size, value_head_size=value_head_size, dtype=dtype, heads=heads
        )
        self.scratch = Scratch(self.scene.storage.form.device)  # all steps use it
        self.seqs = [self.scene.new(start % page_size, count)]

    @precondition(lambda self: len(self.seqs) < MOST_LIVE)
    @rule(data=st.data(), start=st.integers(0, 3), count=st.integers(0, 5))
    def new(self, data, start, count):
        self.seqs.append(self.scene.new(start % self.scene.cache.page_size, count))

    @precondition(lambda self: len(self.seqs) < MOST_LIVE)
    @rule(data=st.data(), count=st.integers(0, 5))
    def branch(self, data, count):
        parent = data.draw(st.sampled_from(self.seqs))
        at = data.draw(st.integers(0, self.scene.cache.lengths([parent])[0]))
        child = self.scene.fork(parent, at)
        self.scene.append(child, count)
        self.seqs.append(child)

    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data, count):
        seq = data.draw(st.sampled_from(self.seqs))
        if self.scene.cache.lengths([seq])[0] < 24:
            self.scene.append(seq, count)

    @rule(data=st.data())
    def slide(self, data):
        seq = data.draw(st.sampled_from(self.seqs))
        length = self.scene.cache.lengths([seq])[0]
        self.scene.slide(seq, data.draw(st.integers(0, length)))

    @precondition(lambda self: len(self.seqs) > 1)
    @rule(data=st.data())
    def release(self, data):
        seq = data.draw(st.sampled_from(self.seqs))
        self.seqs.remove(seq)
        self.scene.release([seq])

    @rule(
        data=st.data(),
        groups=st.sampled_from([1, 3]),
        alike=st.booleans(),
        window=st.none() | st.integers(1, 9),
        soft_cap=st.sampled_from([None, 1.5]),
        part=st.sampled_from([0.0, 1e-9, cost.PART]),
        most=st.sampled_from([1, 3, 6, 1000]),
        read=st.sampled_from([1, 100, part_work.MOST_READ]),
        scores=st.sampled_from([1, 100, part_work.MOST_SCORES]),
        joined=st.sampled_from([0, tree.MOST_JOINED]),
    )
    def attend(self, data, groups, alike, window, soft_cap, part, most, read, scores, joined):
        """A step in which rows may be twice, and have new tokens or none."""
        parents = data.draw(st.lists(st.sampled_from(self.seqs), min_size=1, max_size=7))
        counts = [data.draw(st.integers(0, 3))] * len(parents)
        if not alike:
            counts = [data.draw(st.integers(0, 3)) for _ in parents]
        step = self.scene.step(parents, counts)
        queries = step.queries(groups)
        options = dict(scale=0.6, window=window, soft_cap=soft_cap)
        with (
            patch.multiple(cost, PART=part, MOST_SLOTS=most, MOST_PART_SLOTS=2 * most),
            patch.multiple(part_work, MOST_READ=read, MOST_SCORES=scores),
            patch.multiple(tree, MOST_JOINED=joined and min(joined, scores)),
        ):
            attentions = [
                make_attention(
                    self.scene.storage, step.rows, backend=backend, depth=depth, scratch=scratch
                )
                for backend, depth, scratch in (
                    ("dense", None, self.scratch),
                    ("tree", None, self.scratch),
                    ("tree", 1, None),
                    ("tree", 9, self.scratch),
                    ("auto", None, None),
                )
            ]
            for layer in range(self.scene.cache.layers):
                step.write(layer)
                expected = step.expected(layer, queries, **options)
                for attention in attentions:
                    assert_close(attention.attend(layer, queries, **options), expected)
        step.end()

    def teardown(self):
        self.scene.cache.check()


TestAttentionOnTrees = AttentionMachine.TestCase
TestAttentionOnTrees.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_half_precision_is_as_good_as_that_of_torch(dtype: torch.dtype, sharp: float) -> None:
    """Scores are made in float32, as in torch, so no error is much larger than torch's own."""
    torch.manual_seed(1)
    scene = Scene(page_size=16, layers=1, heads=2, head_size=64, dtype=dtype, num_pages=100)
    step = scene.step([scene.new(0, 512)] * 8, [1] * 8)
    queries = (step.queries(1) * sharp).to(dtype)
    step.write(0)
    expected = step.expected(0, queries, scale=0.125)
    errors = {
        backend: (
            make_attention(scene.storage, step.rows, backend=backend).attend(0, queries).double()
            - expected
        )
        for backend in ("dense", "tree")
    }
    assert errors["tree"].abs().max() <= 2 * errors["dense"].abs().max()
    assert errors["tree"].square().mean() <= 2 * errors["dense"].square().mean()
