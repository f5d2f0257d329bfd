"""Nodes of a search: paths of tokens, as cheap handles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from paged_kv.errors import NotCopyable
from paged_kv.integrations.huggingface.draws import seed_below
from paged_kv.integrations.huggingface.token_tree import Tokens


class Paths(Protocol):
    """What a node asks the paths that it is one of."""

    def has(self, number: int) -> bool: ...

    def settle(self) -> None: ...

    def begin(self) -> None: ...

    def check(self, nodes: Iterable[Node]) -> list[Node]: ...

    def length(self, tokens: Tokens) -> int: ...

    def text(self, tokens: Tokens) -> str: ...

    def hidden(self, nodes: Sequence[Node]) -> torch.Tensor: ...

    def logits(self, nodes: Sequence[Node]) -> torch.Tensor: ...


class Place:
    """Where a node stands in its tree. It outlives the node: children know whose they are."""

    __slots__ = ("above", "children", "number", "seed")

    def __init__(self, number: int, above: Place | None, seed: int) -> None:
        self.number = number
        self.above = above
        self.seed = seed  # of its draws
        self.children = 0  # that it ever had

    def child(self, number: int, seed: int | None = None) -> Place:
        """The place of one more child; its seed follows from ours, unless it is given."""
        if seed is None:
            seed = seed_below(self.seed, self.children)
        self.children += 1
        return Place(number, self, seed)

    def is_below(self, other: Place) -> bool:
        """Whether it is the other place, or hangs on it. Cost: O(depth)."""
        place: Place | None = self
        while place is not None:
            if place is other:
                return True
            place = place.above
        return False

    def root(self) -> Place:
        """The top of the tree."""
        place = self
        while place.above is not None:
            place = place.above
        return place


class Node:
    """A path of tokens, made by a `PagedLM`: whatever was computed for it is shared and kept.

    Tokens that no model has seen yet are *pending*: they take no page, and are fed in one batch
    with those of other nodes once somebody wants to know what follows. A node that is dropped gives
    its pages back, once its pending children were fed or dropped too; one that is released, at
    once. Its children stay. What was evicted is computed again. Copying a node, deeply too, gives
    the node itself; it cannot be pickled.

    Attributes: `tokens`, the whole path; `new_tokens`, those behind its parent's; `logprobs`, of
    the drawn ones among them, by the model and before any processor, or None; `scores`, the whole
    distribution that each was drawn from, where that was asked for; `finish_reason`, "stop",
    "length" or None; `data`, the caller's own.
    """

    __slots__ = (
        "__weakref__",
        "_shared",
        "basis",
        "data",
        "finish_reason",
        "logprobs",
        "paths",
        "place",
        "scores",
        "tokens",
    )

    def __init__(self, paths: Paths, place: Place, tokens: Tokens, shared: int) -> None:
        self.paths = paths
        self._shared = shared
        self.basis: object | None = None  # the node that it goes on from, until it was fed
        self.place = place
        self.tokens = tokens
        self.logprobs: list[float] | None = None
        self.scores: torch.Tensor | None = None
        self.finish_reason: str | None = None
        self.data: Any = None

    def __repr__(self) -> str:
        known = self.paths.has(self.place.number)
        state = f"{self.length} with K/V" if known else "released"
        return f"<Node {self.place.number} of {len(self.tokens)} tokens, {state}>"

    def __copy__(self) -> Node:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotCopyable("Node")

    @property
    def new_tokens(self) -> Tokens:
        """Those behind its parent's; of a root all."""
        return self.tokens[self._shared :]

    @property
    def length(self) -> int:
        """Tokens of the path whose K/V are held now, by this node or others. Cost: O(tokens)."""
        self.paths.settle()
        return self.paths.length(self.tokens)

    @property
    def text(self) -> str:
        """`new_tokens` as text. Raises BadArgument where the lm has no tokenizer."""
        return self.paths.text(self.new_tokens)

    @property
    def hidden_state(self) -> torch.Tensor:
        """The last hidden state [hidden size] behind the path. Pending tokens are fed for it."""
        self.paths.begin()
        return self.paths.hidden(self.paths.check([self]))[0]

    @property
    def logits(self) -> torch.Tensor:
        """What the head says behind the path: logits [vocabulary] of a language model. Pending
        tokens are fed for it.
        """
        self.paths.begin()
        return self.paths.logits(self.paths.check([self]))[0]
