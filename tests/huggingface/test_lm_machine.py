"""Random lives of a `PagedLM` in little room, against a model that is run on every path alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lm_oracle import Oracle, close, drawn_as_told, empty, whole
from tiny_models import VOCABULARY

from paged_kv.errors import OutOfFrames, OutOfPages
from paged_kv.integrations.huggingface.draws import seed_below
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.tiers import HostTier, Tiers

TOKENS = st.sampled_from([2, 3, 4, 5, 40])
MORE = st.lists(TOKENS, max_size=4)
SOME = st.lists(TOKENS, min_size=1, max_size=4)
OTHERS = st.integers(2, 60)  # so many that paths part
LONGEST = 14  # tokens of a path that goes on
FRAMES = 12  # enough for one such path, whatever is made of it
PAGES = 19  # of two tokens: enough for two such paths, and for little more


class LMMachine(RuleBasedStateMachine):
    """Nodes, what each is a path of, and how many children each has had."""

    family = "llama"

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.paths: dict[Node, tuple[int, ...]] = {}
        self.above: dict[Node, Node | None] = {}  # outlives its nodes' place in `nodes`
        self.children: Counter[int] = Counter()  # by number: ever had
        self.pins: Counter[Node] = Counter()

    @initialize(
        batch=st.sampled_from([1, 20_000, 10**8]),
        piece=st.sampled_from([1, 3, 512]),
        backend=st.sampled_from(["auto", "tree", "dense"]),
        eviction=st.sampled_from(["lru", "fifo"]),
        frames=st.sampled_from([None, FRAMES]),
        data=st.data(),
    )
    def begin(
        self,
        batch: int,
        piece: int,
        backend: str,
        eviction: str,
        frames: int | None,
        data: st.DataObject,
    ) -> None:
        self.oracle = Oracle(self.family)
        options: dict[str, Any] = {
            "page_size": 2,
            "batch_bytes": batch,
            "prefill_chunk_size": piece,
            "backend": backend,
            "eviction": eviction,
            "tiers": None if frames is None else Tiers(frames=frames, cold=HostTier),
        }
        page = PagedLM(self.oracle.model, page_size=2, max_bytes=10**6).pages.page_bytes
        self.lm = PagedLM(self.oracle.model, max_bytes=PAGES * page, **options)
        self.other_oracle = Oracle("gpt2")
        self.other = PagedLM(self.other_oracle.model, max_bytes=10**6)
        self.prefill(data, [0, 1, 2])

    # -- what the machine knows

    def made(self, nodes: list[Node], paths: list[tuple[int, ...]], above: list[Any]) -> None:
        """Note nodes, and see that they are what they should be."""
        assert [node.tokens for node in nodes] == paths
        for node, path, parent in zip(nodes, paths, above):
            if parent is None:
                shared = 0
            else:
                shared = min(len(parent.tokens), len(path))
                ordinal = self.children[parent.place.number]
                self.children[parent.place.number] += 1
                assert node.place.seed == seed_below(parent.place.seed, ordinal)
            assert node.new_tokens == path[shared:]
            self.nodes.append(node)
            self.paths[node] = path
            self.above[node] = parent

    def some(self, data: st.DataObject, most: int = 3, shorter: int = LONGEST) -> list[Node]:
        """A few nodes that have a token and may go on."""
        found = [node for node in self.nodes if 0 < len(node.tokens) < shorter]
        if not found:
            return []
        return self.chosen(data, found, 1, most)

    def any(self, data: st.DataObject, most: int = 3) -> list[Node]:
        if not self.nodes:
            return []
        return list(dict.fromkeys(self.chosen(data, self.nodes, 0, most)))

    def chosen(self, data: st.DataObject, nodes: list[Node], least: int, most: int) -> list[Node]:
        """Some of these, by their places: what hypothesis draws it does not let go of."""
        places = st.integers(0, len(nodes) - 1)
        drawn = data.draw(st.lists(places, min_size=least, max_size=most))
        return [nodes[place] for place in drawn]

    def forget(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node in self.paths:
                self.nodes.remove(node)
                del self.paths[node]
                self.pins.pop(node, None)

    def may_run_out(self, error: OutOfFrames | OutOfPages) -> None:
        """Pages may end only where something is pinned, and frames do for each path."""
        assert self.pins, error
        assert isinstance(error, OutOfPages), error

    # -- paths begin and grow

    @rule(data=st.data(), sides=st.lists(st.integers(0, 3), min_size=3, max_size=3))
    def begin_more(self, data: st.DataObject, sides: list[int]) -> None:
        self.prefill(data, sides)

    def prefill(self, data: st.DataObject, sides: list[int]) -> None:
        """Of prompts that are padded on both sides, and may begin like others."""
        prompts = []
        for _ in range(data.draw(st.integers(1, 3))):
            front = data.draw(st.sampled_from([(), *self.paths.values()]))
            cut = data.draw(st.integers(0, len(front)))
            own = data.draw(st.lists(OTHERS, min_size=5, max_size=9))
            prompts.append((*front[:cut], *own)[:LONGEST])
        width = max(map(len, prompts)) + 3
        rows = []
        masks = []
        for prompt, left in zip(prompts, sides):
            right = width - len(prompt) - left
            rows.append([9] * left + list(prompt) + [9] * right)
            masks.append([0] * left + [1] * len(prompt) + [0] * right)
        try:
            roots = self.lm.prefill(torch.tensor(rows), torch.tensor(masks), seed=3)
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        self.made(roots, prompts, [None] * len(roots))
        assert [root.place.seed for root in roots] == [seed_below(3, i) for i in range(len(roots))]

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parents = self.some(data)
        lists = [data.draw(MORE) for _ in parents]
        fed = self.lm.stats()
        children = self.lm.fork(parents, lists)
        assert self.lm.stats() == fed._replace(nodes=fed.nodes + len(children))
        self.made(children, [(*self.paths[p], *row) for p, row in zip(parents, lists)], parents)

    @rule(data=st.data(), consume=st.booleans())
    def extend(self, data: st.DataObject, consume: bool) -> None:
        parents = self.some(data)
        lists = [data.draw(SOME) for _ in parents]
        try:
            found = self.lm.extend(parents, lists, consume=consume)
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        paths = [(*self.paths[p], *row) for p, row in zip(parents, lists)]
        for path, row, hidden, logits in zip(paths, lists, found.hidden_states, found.logits):
            close(hidden, self.oracle.hidden(path)[-len(row) :])
            close(logits, self.oracle.logits(path)[-len(row) :])
        self.made(found.nodes, paths, parents)
        if consume:
            self.forget(list(dict.fromkeys(parents)))

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        nodes = self.some(data)
        lengths = [data.draw(st.integers(0, len(node.tokens))) for node in nodes]
        fed = self.lm.stats()
        children = self.lm.crop(nodes, lengths)
        assert self.lm.stats() == fed._replace(nodes=fed.nodes + len(children))
        self.made(children, [self.paths[n][:m] for n, m in zip(nodes, lengths)], nodes)

    @rule(data=st.data(), new=st.integers(1, 4), copies=st.integers(1, 2), greedy=st.booleans())
    def sample(self, data: st.DataObject, new: int, copies: int, greedy: bool) -> None:
        nodes = self.some(data, most=2)
        parents = [node for node in nodes for _ in range(copies)]
        stop = data.draw(st.sampled_from([None, 7, [3, 11]]))
        try:
            children = self.lm.sample(
                nodes,
                max_new_tokens=new,
                num_return_sequences=copies,
                temperature=0 if greedy else 1.3,
                top_k=0,
                eos_token_id=stop,
            )
        except (OutOfFrames, OutOfPages) as error:
            wanted = sum((len(parent.tokens) + new) // 2 + 2 for parent in parents)
            assert self.pins or wanted > PAGES, error  # rows are held till the end
            return
        stops = stop if isinstance(stop, list) else [stop]
        paths = [(*self.paths[p], *child.new_tokens) for p, child in zip(parents, children)]
        self.made(children, paths, parents)
        for child in children:
            drawn = child.new_tokens
            ended = drawn[-1] in stops
            assert child.finish_reason == ("stop" if ended else "length")
            assert ended or len(drawn) == new
            assert not any(token in stops for token in drawn[:-1])
            before = len(child.tokens) - len(drawn)
            logits = self.oracle.logits(child.tokens)[before - 1 : -1]
            for index, (row, token) in enumerate(zip(logits, drawn)):
                if greedy:
                    assert float(row.max() - row[token]) < 1e-4
                else:
                    assert drawn_as_told(row / 1.3, token, child.place.seed, before + index)
            close(torch.tensor(child.logprobs), self.oracle.logprobs(child.tokens[:before], drawn))

    # -- what the model says

    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        nodes = self.some(data)
        lists = [data.draw(MORE) for _ in nodes]
        try:
            found = self.lm.score(nodes, lists)
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        for node, row, each in zip(nodes, lists, found):
            close(each, self.oracle.logprobs(self.paths[node], row))

    @rule(data=st.data())
    def look_up(self, data: st.DataObject) -> None:
        rows = [node.tokens for node in self.some(data)] + [(5, *data.draw(MORE))] * 2
        try:
            found = self.lm.next_token_logprobs(rows)
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        assert found.shape == (len(rows), VOCABULARY)
        for row, each in zip(rows, found):
            close(each, self.oracle.logits(row)[-1].log_softmax(-1))

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        nodes = self.some(data, shorter=99)
        try:
            hidden = self.lm.hidden_states(nodes)
            logits = self.lm.logits(nodes)
            alone = [(node.hidden_state, node.logits) for node in nodes]
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        for node, row, said, (state, own) in zip(nodes, hidden, logits, alone):
            close(row, self.oracle.hidden(self.paths[node])[-1])
            close(state, row)
            close(said, self.oracle.logits(self.paths[node])[-1])
            close(own, said)

    @rule(data=st.data())
    def mirror(self, data: st.DataObject) -> None:
        nodes = self.some(data)
        mirrored = self.other.mirror(nodes)
        assert [node.tokens for node in mirrored] == [self.paths[node] for node in nodes]
        assert [m.place.seed for m in mirrored] == [node.place.seed for node in nodes]
        assert [node.length for node in mirrored] == [len(self.paths[node]) for node in nodes]
        for node, row in zip(nodes, self.other.logits(mirrored)):
            close(row, self.other_oracle.logits(self.paths[node])[-1])

    # -- what is kept

    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        paths = [node.tokens for node in self.some(data)] + [(2, 3)]
        for path, node in zip(paths, self.lm.find(paths)):
            if node is not None:
                assert node in self.paths
                assert node.tokens[: len(path)] == path
                assert node.length >= len(path)

    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        for node in self.any(data, most=1):
            below = [other for other in self.nodes if node in self.chain(other)]
            top = self.chain(node)[-1]
            tree = [other for other in self.nodes if self.chain(other)[-1] is top]
            doomed = [other for other in tree if other not in below]
            assert self.lm.promote(node) == len(doomed)
            self.forget(doomed)

    def chain(self, node: Node) -> list[Node]:
        """A node and all above it."""
        found = [node]
        while (above := self.above[found[-1]]) is not None:
            found.append(above)
        return found

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Up to two; then they go again."""
        if sum(self.pins.values()) > 1:
            node = next(iter(self.pins))
            self.lm.unpin([node])
            self.pins -= Counter([node])
            return
        for node in self.some(data, most=1):
            try:
                self.lm.pin([node])
            except (OutOfFrames, OutOfPages) as error:
                self.may_run_out(error)
                return
            self.pins[node] += 1

    @rule(data=st.data(), dropped=st.booleans())
    def release(self, data: st.DataObject, dropped: bool) -> None:
        """Give nodes up, or just let go of them."""
        nodes = self.any(data, most=2)
        if dropped:
            kept = self.above.values()
            nodes = [node for node in nodes if node not in kept]  # those are held for `chain`
        else:
            self.lm.release(nodes)
        self.forget(nodes)
        if dropped:
            for node in nodes:
                del self.above[node]

    @rule(data=st.data(), keep=st.booleans())
    def scope(self, data: st.DataObject, keep: bool) -> None:
        parents = self.some(data, most=1)
        with self.lm.scope() as scope:
            inside = self.lm.fork(parents, [[4, 4]] * len(parents))
            try:
                self.lm.logits(inside)
            except (OutOfFrames, OutOfPages) as error:
                self.may_run_out(error)
            if keep:
                scope.keep(inside)
        for parent, node in zip(parents, inside):
            if keep:
                self.made([node], [(*self.paths[parent], 4, 4)], [parent])
            else:
                self.children[parent.place.number] += 1
                assert "released" in repr(node)

    @rule(weights=st.booleans())
    def lose_all(self, weights: bool) -> None:
        if weights:
            self.oracle.change()
            return
        self.lm.clear()
        assert self.lm.stats().kv_bytes == self.lm.stats().hidden_bytes == 0

    # -- what always holds

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "lm"):
            return
        whole(self.lm)
        whole(self.other)
        for node, path in self.paths.items():
            assert node.tokens == path
        for node in self.pins:
            assert self.lm.paths.residents.pins(node.place.number) == self.pins[node]

    @invariant()
    def the_newest_are_right(self) -> None:
        nodes = [node for node in self.nodes[-2:] if node.tokens]
        if not nodes:
            return
        try:
            found = self.lm.logits(nodes)
        except (OutOfFrames, OutOfPages) as error:
            self.may_run_out(error)
            return
        for node, row in zip(nodes, found):
            close(row, self.oracle.logits(self.paths[node])[-1])

    def teardown(self) -> None:
        if not hasattr(self, "lm"):
            return
        for known in (self.nodes, self.paths, self.above, self.pins):
            known.clear()
        empty(self.lm)
        empty(self.other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_random_lives(family: str) -> None:
    machine = type("Machine", (LMMachine,), {"family": family})
    case = machine.TestCase
    case.settings = settings(max_examples=8, stateful_step_count=18, deadline=None)
    case().runTest()
