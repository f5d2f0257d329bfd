"""Paths of tokens through one model: what is known of them, and what is computed on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from paged_kv.checks import listed, whole
from paged_kv.errors import BadArgument, BadCount, ForeignNode, ReleasedNode, WeightsChanged
from paged_kv.integrations.huggingface.heads import Head
from paged_kv.integrations.huggingface.model_limits import check_model
from paged_kv.integrations.huggingface.nodes import Node, Place
from paged_kv.integrations.huggingface.residents import Residents
from paged_kv.integrations.huggingface.runner import Fed, Runner
from paged_kv.integrations.huggingface.token_tree import Tokens, common
from paged_kv.weights import WeightStamp, digest

FORGET = (
    'lm.clear() forgets them; PagedLM(..., weights="drop") does so by itself, weights="keep" goes '
    "on with them"
)
LEAST = 8  # tokens that waiting paths have in common, for these to be fed once and before


class Digest(NamedTuple):
    """What weights are, and when they were looked at."""

    stamp: WeightStamp
    text: str


class Paths:
    """The nodes of one model, with the K/V and hidden states behind them.

    `weights` says what becomes of those when the model's weights change: "drop" computes them
    again, "refuse" raises WeightsChanged, "keep" goes on with them.
    """

    def __init__(
        self,
        model: Any,
        head: Head | None,
        tokenizer: Any,
        runner: Runner,
        residents: Residents,
        weights: str,
    ) -> None:
        self.model = model
        self.head = head
        self.tokenizer = tokenizer
        self.runner = runner
        self.residents = residents
        self.weights = weights
        self.dropped = 0  # times that weights had changed
        self._stamp = WeightStamp(model)
        self._digest: Digest | None = None

    # -- nodes

    def root(self, tokens: Tokens, seed: int) -> Node:
        """A node that begins a tree."""
        return self.made(Place(self.residents.number(), None, seed), tokens, 0)

    def child(self, parent: Node, tokens: Tokens, seed: int | None = None) -> Node:
        """A node with more tokens, none of which was fed."""
        place = parent.place.child(self.residents.number(), seed)
        return self.made(place, parent.tokens + tokens, len(parent.tokens), parent)

    def crop(self, node: Node, length: int) -> Node:
        """A child with the first tokens only."""
        place = node.place.child(self.residents.number())
        return self.made(place, node.tokens[:length], length, node)

    def hold(self, node: Node) -> None:
        """Have K/V of the whole path under the node's own number."""
        _check_begun(node)
        number = node.place.number
        if not self.residents.holds(number, node.tokens):
            self._ready({node.tokens: [number]}, {})

    def take_over(self, node: Node) -> None:
        """Have under the node's own number what others hold of its path: they are going to be
        released. Nothing is fed.
        """
        number = node.place.number
        path = node.tokens[: self.length(node.tokens)]
        if not path or self.residents.holds(number, path):
            return
        pages = self.residents.pages
        with pages.scope():
            (fork,) = pages.fork(self.bases([path], [len(path)]))
            self.residents.put(number, fork, path, None)

    def made(self, place: Place, tokens: Tokens, shared: int, parent: Node | None = None) -> Node:
        """A node at a place of its own. It goes on from `parent` until it was fed."""
        node = Node(self, place, tokens, shared)
        node.basis = parent
        self.residents.watch(place.number, node)
        return node

    def has(self, number: int) -> bool:
        """Whether a node of this number exists, and was not released."""
        return number in self.residents

    def _made_here(self, node: Node) -> bool:
        paths: object = node.paths
        return paths is self

    def check(self, nodes: Iterable[Node]) -> list[Node]:
        """Nodes as a list of its own. Raises BadArgument, ForeignNode, ReleasedNode."""
        found = listed("nodes", nodes, "a list of nodes")
        checked = []
        for node in found:
            if not isinstance(node, Node) or not self._made_here(node):
                raise ForeignNode(node)
            if not self.has(node.place.number):
                raise ReleasedNode(node.place.number)
            checked.append(node)
        return checked

    def check_tokens(self, tokens: Any, before: int = 0) -> Tokens:
        """Tokens as a tuple of ints. Raises BadArgument where one is not of the vocabulary,
        BadCount where one is no number, or the path becomes longer than the model has positions.
        """
        found = _as_tuple(tokens)
        shape = self.runner.shape
        if found and not 0 <= min(found) <= max(found) < shape.vocabulary:
            token = next(token for token in found if not 0 <= token < shape.vocabulary)
            raise BadArgument("token", token, f"0 to {shape.vocabulary - 1}")
        most = shape.positions
        if most is not None and before + len(found) > most:
            allowed = f"at most {most}, the model's positions"
            raise BadCount("tokens of a path", before + len(found), allowed)
        return found

    # -- what is known

    def settle(self) -> None:
        """See to nodes that were dropped, and to what an interrupt left half done."""
        self.residents.settle()

    def begin(self) -> None:
        """As `settle`, where the model is going to be asked: its weights may have changed.

        Raises WeightsChanged, UnsupportedModel, BadDtype, BadDevice.
        """
        self.settle()
        if self._stamp.matches(self.model):
            return
        check_model(self.model, self.runner.shape)
        if self.weights == "keep":
            self._stamp = WeightStamp(self.model)
            return
        held = len(self.residents.index)
        if held and self.weights == "refuse":
            raise WeightsChanged(held, FORGET)
        self.dropped += held > 0
        self.accept_weights()

    def accept_weights(self) -> None:
        """Go on with the weights as they are; all that was computed with others is given up."""
        self.residents.clear()
        self._stamp = WeightStamp(self.model)

    def identity(self) -> dict[str, Any]:
        """What K/V depend on beside their pages' form. Cost: the weights are read, once after each
        change.
        """
        if self._digest is None or not self._digest.stamp.matches(self.model):
            stamp = WeightStamp(self.model)
            self._digest = Digest(stamp, digest(self.runner.decoder))
        shape = self.runner.shape
        return {
            "model": type(self.runner.decoder).__name__,
            "windows": str(shape.windows),
            "soft_cap": shape.soft_cap,
            "weights": self._digest.text,
        }

    def length(self, tokens: Tokens) -> int:
        """How many tokens of a path, from its first one on, have K/V."""
        match = self.residents.longest(tokens)
        return 0 if match is None else match.length

    def text(self, tokens: Tokens) -> str:
        """Tokens as text. Raises BadArgument where there is no tokenizer."""
        if self.tokenizer is None:
            raise BadArgument("tokenizer", None, "a tokenizer: PagedLM(model, tokenizer=...)")
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def hidden(self, nodes: Sequence[Node]) -> torch.Tensor:
        """Hidden states [N, hidden size] behind these nodes, which are fed where they were not."""
        known: dict[Tokens, torch.Tensor] = {}
        waiting: dict[Tokens, list[int]] = {}
        for node in nodes:
            _check_begun(node)
            state = self.residents.hidden(node.place.number)
            if state is None:
                waiting.setdefault(node.tokens, []).append(node.place.number)
            else:
                known[node.tokens] = state
        self._ready(waiting, known)
        if not nodes:
            return self.runner.no_states()
        return torch.stack([known[node.tokens] for node in nodes])

    def logits(self, nodes: Sequence[Node]) -> torch.Tensor:
        """What the head says behind these nodes [N, vocabulary]."""
        return self.say(self.hidden(nodes))

    def say(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head says of hidden states [..., hidden size]."""
        if self.head is None:
            raise BadArgument("head", None, "a model with a head, or head=")
        module = self.head if isinstance(self.head, torch.nn.Module) else self.model
        with torch.no_grad(), self.runner.computing(module):
            return self.head(hidden)

    def say_each(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the head says of each of these [n, hidden size]; all are views of one tensor.

        A head reads all its weights however few it is asked for, so it is asked once.
        """
        if not states:
            return []
        said = self.say(torch.cat(list(states)))
        return list(said.split_with_sizes([len(state) for state in states]))

    # -- what is computed

    def _ready(self, waiting: dict[Tokens, list[int]], known: dict[Tokens, torch.Tensor]) -> None:
        """Feed what is left of these paths, in as few batches as may be; `known` gets their states.

        What several of them begin with, and nobody has fed, is fed first, and once.
        """
        for path in list(waiting):
            state = self._share(path, waiting[path])
            if state is not None:
                known[path] = state
                del waiting[path]
        trunks: set[Tokens] = set()
        while waiting:
            paths = [path for path in self._trunks(list(waiting)) if path not in trunks]
            trunks.update(paths)
            paths = paths or list(waiting)
            while paths:
                count = self.runner.rows(len(path) - self._known(path) for path in paths)
                batch = self.runner.fitting(paths, count, partial(self._fill, waiting))
                known.update(batch)
                for path in batch:
                    waiting.pop(path, None)
                del paths[: len(batch)]
                self.residents.fit()
        self.residents.release_spare()

    def _fill(
        self, waiting: dict[Tokens, list[int]], batch: Sequence[Tokens]
    ) -> dict[Tokens, torch.Tensor]:
        """Feed these paths, and keep what comes of it for who waits; the hidden states."""
        states = {}
        with self.residents.pages.scope():
            for path, fed in zip(batch, self.feed(batch)):
                states[path] = fed.hidden[-1].clone()
                (first, *others) = waiting.get(path) or [self.residents.spare()]
                self.residents.put(first, fed.seq, path, states[path])
                if others:
                    self._share(path, others)
        return states

    def _trunks(self, paths: Sequence[Tokens]) -> list[Tokens]:
        """The shortest beginnings that some of these paths have in common, and that nobody has fed:
        worth a batch of their own.
        """
        if len(paths) < 2:
            return []
        ordered = sorted(paths)
        found = set()
        for upper, lower in pairwise(ordered):
            length = min(common(upper, lower), len(upper) - 1, len(lower) - 1)
            if length - self.length(upper[:length]) >= LEAST:
                found.add(upper[:length])
        kept: list[Tokens] = []
        for trunk in sorted(found, key=len):
            if not any(trunk[: len(other)] == other for other in kept):
                kept.append(trunk)
        return kept

    def feed(self, batch: Sequence[Tokens]) -> list[Fed]:
        """Run what is left of these paths, at least the last token of each; sequences are the
        caller's, who has opened a scope.
        """
        known = [self._known(path) for path in batch]
        bases = self.bases(batch, known)
        return self.runner.feed(bases, [path[length:] for path, length in zip(batch, known)])

    def grow(self, pairs: Sequence[tuple[Node, Tokens]]) -> tuple[list[Node], list[torch.Tensor]]:
        """Children with more tokens, each pair by itself, and the hidden states of all of these."""
        children: list[Node] = []
        states: list[torch.Tensor] = []
        left = list(pairs)
        while left:
            count = self.runner.rows(
                len(node.tokens) + len(row) - self.length(node.tokens) for node, row in left
            )
            fed = self.runner.fitting(left, count, self._grow)
            children += [child for child, _ in fed]
            states += [state for _, state in fed]
            del left[: len(fed)]
            self.residents.fit()
        return children, states

    def _grow(self, pairs: Sequence[tuple[Node, Tokens]]) -> list[tuple[Node, torch.Tensor]]:
        """As `grow`, in one batch."""
        paths = [node.tokens for node, _ in pairs]
        with self.residents.pages.scope():
            known = [self.length(path) for path in paths]
            new = [path[length:] + row for path, length, (_, row) in zip(paths, known, pairs)]
            fed = self.runner.feed(self.bases(paths, known), new, whole=True)
            children = [self.child(node, row) for node, row in pairs]
            for child, (seq, hidden) in zip(children, fed):
                self.residents.put(child.place.number, seq, child.tokens, hidden[-1].clone())
        return [
            (child, hidden[-len(child.new_tokens) :]) for child, (_, hidden) in zip(children, fed)
        ]

    def bases(self, batch: Sequence[Tokens], lengths: Sequence[int]) -> list[int]:
        """Sequences with the first tokens of each path, which have K/V: to be forked, not changed.

        What is not there as such is made, within the scope that the caller has opened.
        """
        pages = self.residents.pages
        found = []
        for path, length in zip(batch, lengths):
            match = self.residents.longest(path[:length]) if length else None
            seq = None if match is None else self.residents.sequence(match.name)
            if seq is None:
                (seq,) = pages.new()
            elif pages.lengths([seq]) != [length]:
                (seq,) = pages.fork([seq], at=length)
            found.append(seq)
        return found

    def _known(self, path: Tokens) -> int:
        """Tokens that need not be fed: never the last one."""
        return self.length(path[:-1])

    def _share(self, path: Tokens, numbers: Sequence[int]) -> torch.Tensor | None:
        """Let these have what another node of the same path has, and return its hidden state; None
        where there is none.
        """
        residents = self.residents
        for name in residents.ending(path):
            hidden = residents.hidden(name)
            seq = None if hidden is None else residents.sequence(name)
            if seq is None:
                continue
            with residents.pages.scope():
                forks = residents.pages.fork([seq] * len(numbers))
                for number, fork in zip(numbers, forks):
                    residents.put(number, fork, path, hidden)
            return hidden
        return None


def _check_begun(node: Node) -> None:
    """Raise BadArgument where there is no token to be fed."""
    if not node.tokens:
        allowed = "one with a token: nothing is known before the first"
        raise BadArgument("node", node, allowed)


def _as_tuple(tokens: Any) -> Tokens:
    """A row of tokens, of any library. Raises BadArgument, BadCount."""
    row = listed("tokens", tokens, "a list of token ids")
    if all(type(token) is int for token in row):
        return tuple(row)  # type: ignore[arg-type]
    return tuple([whole("token", token, 0) for token in row])
