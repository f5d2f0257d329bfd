"""Random lives of a `PagedCache` against whole paths, forwarded without any cache."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hf_paths import feed, whole
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_models import VOCABULARY, tiny_model

from paged_kv.integrations.huggingface import PagedCache, shape_of
from paged_kv.integrations.huggingface.versions import FOUND

TOKENS = st.integers(3, VOCABULARY - 1)
LONGEST = 60


class CacheMachine(RuleBasedStateMachine):
    """Rows of tokens are the model of it."""

    family = "llama"
    attention = "sdpa"

    def __init__(self) -> None:
        super().__init__()
        self.dense = tiny_model(self.family)
        self.model: Any = tiny_model(self.family, self.attention)
        self.pages = shape_of(self.model).pages(page_size=2, num_pages=8)
        self.rows: list[list[int]] = []
        self.columns = 0
        self.kept: list[tuple[list[int], list[list[int]]]] = []

    @initialize(prompts=st.lists(st.lists(TOKENS, max_size=7), min_size=1, max_size=3))
    def begin(self, prompts: list[list[int]]) -> None:
        roots = self.pages.new(len(prompts))
        seqs = [
            feed(self.dense, self.pages, [root], torch.tensor([prompt]))[1][0] if prompt else root
            for root, prompt in zip(roots, prompts)
        ]
        self.cache = PagedCache(self.pages, self.model, seqs)
        self.pages.release(sorted({*seqs, *roots}))
        self.rows = [list(prompt) for prompt in prompts]
        self.columns = max(map(len, prompts))

    @precondition(lambda self: self.columns < LONGEST)
    @rule(data=st.data(), new=st.integers(1, 4))
    def feed(self, data: st.DataObject, new: int) -> None:
        """A row that holds something gets as many tokens as the widest; others may be padded."""
        for row in self.rows:
            count = new if row else data.draw(st.integers(0, new))
            row.extend(data.draw(st.lists(TOKENS, min_size=count, max_size=count)))
        self.columns += new
        padding = [self.columns - len(row) for row in self.rows]
        mask = torch.tensor([[0] * pad + [1] * (self.columns - pad) for pad in padding])
        padded = [[0] * pad + row for pad, row in zip(padding, self.rows)]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = self.model(
                torch.tensor(padded)[:, -new:],
                attention_mask=mask,
                position_ids=positions[:, -new:],
                **self.cache.as_argument(),
            )
        for logits, row in zip(out.logits, self.rows):
            count = min(new, len(row))
            if not count:
                continue
            expected = whole(self.dense, row)[-count:]
            torch.testing.assert_close(logits[-count:], expected, atol=1e-4, rtol=1e-4)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        count = len(self.rows)
        order = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        self.cache.reorder_cache(torch.tensor(order))
        self.rows = [list(self.rows[row]) for row in order]

    @precondition(lambda self: len(self.rows) < 4)
    @rule(times=st.integers(1, 2))
    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.rows = [list(row) for row in self.rows for _ in range(times)]

    @rule(data=st.data(), as_bools=st.booleans())
    def select(self, data: st.DataObject, as_bools: bool) -> None:
        stays = data.draw(st.lists(st.booleans(), min_size=len(self.rows), max_size=len(self.rows)))
        stays[0] = True
        chosen = torch.tensor(stays)
        self.cache.batch_select_indices(chosen if as_bools else chosen.nonzero().flatten())
        self.rows = [row for row, kept in zip(self.rows, stays) if kept]

    @rule(count=st.integers(0, 5))
    def crop(self, count: int) -> None:
        count = min(count, self.columns)
        if FOUND.crop_removes or (count and count % 2):
            self.cache.crop(-count)
        else:  # the older meaning
            self.cache.crop(self.columns - count)
        self.rows = [row[: max(0, len(row) - count)] for row in self.rows]
        self.columns -= count

    @rule()
    def deepen(self) -> None:
        """Go on with a deep copy, which takes no page; the one before is dropped."""
        lengths = self.cache.lengths  # from now on no step is open
        in_use = self.pages.pages_in_use
        twin = deepcopy(self.cache)
        assert self.pages.pages_in_use == in_use
        assert twin.lengths == lengths
        self.cache = twin

    @rule()
    def keep(self) -> None:
        """Sequences outlive what the cache does next."""
        width = max([self.columns, *map(len, self.rows)])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in self.rows])
        seqs = self.cache.fork(mask)
        self.kept.append((seqs, [list(row) for row in self.rows]))

    @precondition(lambda self: self.kept)
    @rule()
    def go_on_from_kept(self) -> None:
        seqs, rows = self.kept.pop()
        self.cache = PagedCache(self.pages, self.model, seqs)
        self.pages.release(seqs)
        self.rows = rows
        self.columns = max(map(len, rows))

    @rule()
    def read(self) -> None:
        layer = self.cache.layers[1]
        assert layer.keys.shape[0] == layer.values.shape[0] == len(self.rows)
        assert layer.keys.shape[2] == self.columns

    @invariant()
    def is_whole(self) -> None:
        self.pages.check()
        if hasattr(self, "cache"):
            assert self.cache.get_seq_length() == self.columns
            assert self.cache.batch_size == len(self.rows)

    def teardown(self) -> None:
        for seqs, _ in self.kept:
            self.pages.release(seqs)
        if hasattr(self, "cache"):
            del self.cache
        assert (self.pages.live(), self.pages.open_steps, self.pages.pages_in_use) == ([], 0, 0)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "paged_kv"), ("gemma3", "eager"), ("gemma3", "paged_kv")],
)
def test_random_lives(family: str, attention: str) -> None:
    machine = type("Machine", (CacheMachine,), {"family": family, "attention": attention})
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    case().runTest()
