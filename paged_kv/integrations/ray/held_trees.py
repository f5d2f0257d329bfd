"""The trees that live in one worker: nodes of its lm by name, and what is done to them.

Numbers of nodes follow from the calls alone, so that repeating these makes the same nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.bundles.bundle import Bundle
from paged_kv.errors import ReleasedNode
from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.integrations.ray.calls import Name


class Made(NamedTuple):
    """A node that was made."""

    number: int
    kept: int  # tokens of the path that its parent's begins with
    tokens: tuple[int, ...]  # those behind
    logprobs: list[float] | None
    finish_reason: str | None


class TreeState(NamedTuple):
    """A whole tree on its way: its nodes, their numbers in the same order, and the next number."""

    bundle: Bundle
    numbers: list[int]
    next: int


class Held:
    """One tree: its nodes by number."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.next = 0
        self.changed = True  # since the last snapshot

    def add(self, node: Node) -> int:
        """Name a node."""
        number = self.next
        self.next += 1
        self.nodes[number] = node
        self.changed = True
        return number


class HeldTrees:
    """Trees of an lm, whose verbs take names."""

    def __init__(self, lm: PagedLM) -> None:
        self.lm = lm
        self._trees: dict[int, Held] = {}

    def forget(self, names: Iterable[Name]) -> None:
        """Drop nodes that nobody holds any more; a tree without nodes ends."""
        for tree, number in names:
            held = self._trees.get(tree)
            if held is None:
                continue
            held.nodes.pop(number, None)
            held.changed = True
            if not held.nodes:
                del self._trees[tree]

    # -- paths begin and grow

    def open(self, trees: Sequence[int], rows: Sequence[Any], seeds: Sequence[int]) -> list[Made]:
        """A tree for each prompt."""
        roots = self.lm.prefill(rows, seed=list(seeds))
        self._trees.update((tree, Held()) for tree in trees)
        return self._made(trees, roots)

    def sample(self, names: Sequence[Name], options: Mapping[str, Any]) -> list[Made]:
        """Children with drawn tokens."""
        return self._children(names, self.lm.sample(self._found(names), **options))

    def extend(self, names: Sequence[Name], rows: Sequence[Any]) -> list[Made]:
        """Children with more tokens, fed."""
        return self._children(names, self.lm.extend(self._found(names), rows).nodes)

    def fork(self, names: Sequence[Name], rows: Sequence[Any]) -> list[Made]:
        """Children with more tokens, pending."""
        return self._children(names, self.lm.fork(self._found(names), rows))

    def crop(self, names: Sequence[Name], lengths: Sequence[int]) -> list[Made]:
        """Children with the first tokens only."""
        return self._children(names, self.lm.crop(self._found(names), lengths))

    # -- what the model says

    def logits(self, names: Sequence[Name]) -> list[torch.Tensor]:
        """What the head says behind nodes, a row each."""
        return list(self.lm.logits(self._found(names)).cpu())

    def hidden_states(self, names: Sequence[Name]) -> list[torch.Tensor]:
        """Last hidden states behind nodes, a row each."""
        return list(self.lm.hidden_states(self._found(names)).cpu())

    def score(self, names: Sequence[Name], rows: Sequence[Any]) -> list[torch.Tensor]:
        """Log-probabilities of continuations."""
        return [row.cpu() for row in self.lm.score(self._found(names), rows)]

    # -- what goes

    def promote(self, names: Sequence[Name]) -> list[list[int]]:
        """Keep nodes and all below them; the numbers of those of each tree that were released."""
        return [self._promoted(name) for name in names]

    def release(self, names: Sequence[Name]) -> None:
        """Give up nodes."""
        self.lm.release(self._found(names))
        self.forget(names)

    def pin(self, names: Sequence[Name]) -> None:
        """Keep K/V of nodes."""
        self.lm.pin(self._found(names))
        self._change(names)

    def unpin(self, names: Sequence[Name]) -> None:
        """Undo one `pin` of each."""
        self.lm.unpin(self._found(names))
        self._change(names)

    def keep(self, wanted: Mapping[int, Mapping[int, int]]) -> list[Name]:
        """Hold these nodes of these trees, pinned that often at most, and none else; those that are
        not here.
        """
        for tree in self._trees.keys() - wanted.keys():
            del self._trees[tree]
        missing = []
        for tree, pins in wanted.items():
            held = self._trees.get(tree)
            nodes = {} if held is None else held.nodes
            self.forget([(tree, number) for number in nodes.keys() - pins.keys()])
            missing += [(tree, number) for number in pins.keys() - nodes.keys()]
            for number in nodes.keys() & pins.keys():
                there = self.lm.paths.residents.pins(nodes[number].place.number)
                self.unpin([(tree, number)] * (there - pins[number]))
        return missing

    # -- whole trees

    @property
    def nodes(self) -> int:
        """Nodes that are held by name."""
        return sum(len(held.nodes) for held in self._trees.values())

    def trees(self) -> list[int]:
        """All that live here."""
        return list(self._trees)

    def states(self, trees: Iterable[int], identity: Mapping[str, Any]) -> dict[int, TreeState]:
        """Trees as they are, which stay."""
        return {tree: self._state(self._trees[tree], identity) for tree in trees}

    def changed(self) -> list[int]:
        """Trees that changed since `saved` was called; the others are as they were then."""
        return [tree for tree, held in self._trees.items() if held.changed]

    def clear(self) -> None:
        """Give up all K/V: what was saved of them is of no use any more."""
        self.lm.clear()
        for held in self._trees.values():
            held.changed = True

    def saved(self, trees: Iterable[int]) -> None:
        """Note that trees are as they were saved."""
        for tree in trees:
            self._trees[tree].changed = False

    def take(self, states: Mapping[int, TreeState], identity: Mapping[str, Any]) -> None:
        """Have trees that come from elsewhere: all or none."""
        taken = {}
        for tree, state in states.items():
            held = Held()
            nodes = self.lm.adopt(state.bundle, identity=identity)
            held.nodes.update(zip(state.numbers, nodes))
            held.next = state.next
            taken[tree] = held
        self._trees.update(taken)

    def end(self, trees: Iterable[int]) -> None:
        """Give up whole trees."""
        for tree in trees:
            held = self._trees.pop(tree)
            self.lm.release(held.nodes.values())

    def sizes(self) -> dict[int, int]:
        """Bytes of the pages of each tree, as if nothing were shared among trees."""
        pages = self.lm.pages
        sequences = self.lm.paths.residents.sequences()
        found = {}
        for tree, held in self._trees.items():
            numbers = [node.place.number for node in held.nodes.values()]
            seqs = [sequences[number] for number in numbers if number in sequences]
            tables = pages.page_tables(seqs)
            found[tree] = len({page for table in tables for page in table}) * pages.page_bytes
        return found

    # -- inside

    def _found(self, names: Sequence[Name]) -> list[Node]:
        found = []
        for tree, number in names:
            held = self._trees.get(tree)
            if held is None or number not in held.nodes:
                raise ReleasedNode(number)
            found.append(held.nodes[number])
        return found

    def _change(self, names: Sequence[Name]) -> None:
        """Note that trees are not as they were saved."""
        for tree, _ in names:
            self._trees[tree].changed = True

    def _children(self, names: Sequence[Name], nodes: Sequence[Node]) -> list[Made]:
        """Children, as many side by side of each node."""
        copies = len(nodes) // max(1, len(names))
        return self._made([tree for tree, _ in names for _ in range(copies)], nodes)

    def _made(self, trees: Sequence[int], nodes: Sequence[Node]) -> list[Made]:
        return [_told(self._trees[tree].add(node), node) for tree, node in zip(trees, nodes)]

    def _promoted(self, name: Name) -> list[int]:
        (node,) = self._found([name])
        held = self._trees[name[0]]
        # a tree that moved may have more roots than one: nodes whose parents did not come along
        gone = [
            number for number, each in held.nodes.items() if not each.place.is_below(node.place)
        ]
        self.lm.promote(node)
        self.lm.release([held.nodes[number] for number in gone if _lives(held.nodes[number])])
        for number in gone:
            del held.nodes[number]
        held.changed = True
        return gone

    def _state(self, held: Held, identity: Mapping[str, Any]) -> TreeState:
        bundle = self.lm.export(held.nodes.values(), identity=identity)
        return TreeState(bundle, list(held.nodes), held.next)


def _lives(node: Node) -> bool:
    return node.paths.has(node.place.number)


def _told(number: int, node: Node) -> Made:
    new = node.new_tokens
    kept = len(node.tokens) - len(new)
    return Made(number, kept, new, node.logprobs, node.finish_reason)
