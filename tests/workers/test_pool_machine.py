"""Random lives of a pool whose workers die and hang, against one `PagedLM` that does not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from in_process import DIES_AFTER, DIES_BEFORE, FINE, HANGS
from pool_models import a_lm, a_pool, other_weights

from paged_kv.errors import NotPinned
from paged_kv.integrations.huggingface import Node
from paged_kv.integrations.ray import PoolNode

TOKENS = st.lists(st.integers(3, 60), min_size=1, max_size=4)
FATES = st.sampled_from([DIES_BEFORE, DIES_AFTER, HANGS])
MOST_NODES = 24


class PoolMachine(RuleBasedStateMachine):
    """Pairs of a node of the pool and a node of the lm. Whatever happens to workers, what they say
    is the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[PoolNode, Node]] = []
        self.fates: list[str] = []
        self.breaks = False

    @initialize(
        workers=st.integers(1, 3),
        every=st.sampled_from([1, 3, 64]),
        rows=st.sampled_from([None, 1, 2]),
        in_flight=st.integers(1, 3),
    )
    def begin(self, workers: int, every: int, rows: int | None, in_flight: int) -> None:
        self.pool, self.engine = a_pool(
            workers,
            fate=self.fate,
            snapshot_every=every,
            rows=rows,
            in_flight=in_flight,
            timeout=5,
            restarts=9,
            progress=self.progress,
        )
        self.in_flight = in_flight
        self.lm = a_lm()

    def progress(self, done: int, of: int) -> None:
        if self.breaks:
            self.breaks = False
            raise KeyboardInterrupt

    def fate(self, verb: str) -> str:
        return self.fates.pop() if self.fates else FINE

    def chosen(self, data: st.DataObject) -> list[int]:
        places = st.integers(0, len(self.pairs) - 1)
        return data.draw(st.lists(places, min_size=1, max_size=4))

    def both(self, places: list[int]) -> tuple[list[PoolNode], list[Node]]:
        chosen = [self.pairs[place] for place in places]
        return [pair[0] for pair in chosen], [pair[1] for pair in chosen]

    def add(self, nodes: list[PoolNode], others: list[Node]) -> None:
        for node, other in zip(nodes, others, strict=True):
            assert node.tokens == other.tokens
            assert node.new_tokens == other.new_tokens
            assert node.finish_reason == other.finish_reason
            assert (node.logprobs is None) == (other.logprobs is None)
            if node.logprobs is not None:
                near = torch.tensor(other.logprobs)
                torch.testing.assert_close(torch.tensor(node.logprobs), near, atol=1e-4, rtol=1e-4)
        self.pairs += zip(nodes, others)
        del self.pairs[: max(0, len(self.pairs) - MOST_NODES)]  # dropped here and there

    @rule(rows=st.lists(TOKENS, min_size=1, max_size=3), seed=st.integers(0, 9))
    def prefill(self, rows: list[list[int]], seed: int) -> None:
        self.add(self.pool.prefill(rows, seed=seed), self.lm.prefill(rows, seed=seed))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), tokens=st.integers(1, 3), copies=st.integers(1, 2))
    def sample(self, data: st.DataObject, tokens: int, copies: int) -> None:
        nodes, others = self.both(self.chosen(data))
        options: dict[str, Any] = {"max_new_tokens": tokens, "num_return_sequences": copies}
        self.add(self.pool.sample(nodes, **options), self.lm.sample(others, **options))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), row=TOKENS, fed=st.booleans())
    def grow(self, data: st.DataObject, row: list[int], fed: bool) -> None:
        nodes, others = self.both(self.chosen(data))
        rows = [row] * len(nodes)
        if fed:
            self.add(self.pool.extend(nodes, rows), self.lm.extend(others, rows).nodes)
        else:
            self.add(self.pool.fork(nodes, rows), self.lm.fork(others, rows))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        nodes, others = self.both(self.chosen(data))
        lengths = [max(1, len(node.tokens) - 1) for node in nodes]
        self.add(self.pool.crop(nodes, lengths), self.lm.crop(others, lengths))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), row=TOKENS)
    def says(self, data: st.DataObject, row: list[int]) -> None:
        nodes, others = self.both(self.chosen(data))
        near: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(self.pool.logits(nodes), self.lm.logits(others), **near)
        rows = [row] * len(nodes)
        for found, expected in zip(self.pool.score(nodes, rows), self.lm.score(others, rows)):
            torch.testing.assert_close(found, expected, **near)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        (node,), (other,) = self.both(self.chosen(data)[:1])
        assert self.pool.promote(node) == self.lm.promote(other)
        self.pairs = [pair for pair in self.pairs if pair[1].paths.has(pair[1].place.number)]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        nodes, others = self.both(self.chosen(data))
        self.pool.release(nodes)
        self.lm.release(others)
        self.pairs = [pair for pair in self.pairs if pair[0] not in nodes]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        (node,), _ = self.both(self.chosen(data)[:1])
        workers = [worker.worker for worker in self.pool.stats().workers]
        target = data.draw(st.sampled_from(workers))
        self.pool.move(node.tree, target)
        assert node.worker == target

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        nodes, others = self.both(self.chosen(data))
        self.pool.pin(nodes)
        self.lm.pin(others)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        nodes, others = self.both(self.chosen(data))
        try:
            self.lm.unpin(others)
        except NotPinned:
            with pytest.raises(NotPinned):
                self.pool.unpin(nodes)
        else:
            self.pool.unpin(nodes)

    @rule(rows=st.lists(TOKENS, min_size=1, max_size=3))
    def break_off(self, rows: list[list[int]]) -> None:
        """Calls that make no child: else the next one would have another ordinal."""
        for call in (
            lambda: self.pool.prefill(rows, seed=1),
            lambda: self.pool.logits([node for node, _ in self.pairs]),
        ):
            self.breaks = True
            with suppress(KeyboardInterrupt):
                call()
        self.breaks = False

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        workers = [worker.worker for worker in self.pool.stats().workers]
        if len(workers) == 1:
            return
        gone = data.draw(st.sampled_from(workers))
        before = {node.tree: node.worker for node, _ in self.pairs}
        homes = self.pool.retire(gone)
        for node, _ in self.pairs:
            assert node.worker == homes.get(node.tree, before[node.tree])
            assert (node.tree in homes) == (before[node.tree] == gone)

    @rule()
    def snapshot(self) -> None:
        self.pool.snapshot()

    @rule(other=st.booleans())
    def update(self, other: bool) -> None:
        weights = other_weights() if other else self.lm.model.state_dict()
        before = self.pool.stats().version
        assert self.pool.update(weights) == before + 1
        self.lm.model.load_state_dict(weights)

    @rule(fates=st.lists(FATES, min_size=1, max_size=2), later=st.integers(0, 6))
    def trouble(self, fates: list[str], later: int) -> None:
        """Calls to come die or hang."""
        self.fates = [*fates, *([FINE] * later)]

    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        if self.engine.living():
            data.draw(st.sampled_from(self.engine.living())).dead = True

    @invariant()
    def pages_are_whole(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        assert len(self.engine.living()) <= len(stats.workers)
        assert self.engine.most_waiting <= self.in_flight
        assert stats.trees == sum(worker.trees for worker in stats.workers)

    def teardown(self) -> None:
        """Workers hold what the driver knows of, and nothing once it knows of none."""
        if not hasattr(self, "pool"):
            return
        self.fates.clear()
        nodes = [node for node, _ in self.pairs]
        self.pool.snapshot()
        assert self.pool.stats().nodes == self.pool.stats().merged.nodes == len(set(nodes))
        self.pool.release(nodes)
        self.pool.snapshot()
        assert (self.pool.stats().trees, self.pool.stats().merged.nodes) == (0, 0)
        self.pool.close()
        assert not self.engine.living()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=6, stateful_step_count=15)
