"""What the benchmark asks of a peer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from .workload import Workload

Handle = Any
KV = tuple[torch.Tensor, torch.Tensor]  # K and V [layers, B, heads, n, head_size]


class Peer(ABC):
    """Contexts as one library keeps them. A verb acts on a batch, one row an environment.

    `cannot` says which verbs a peer has not, and why. A peer with `pages` describes where tokens
    go; its K/V, where it has any, may lie anywhere. A peer with `copies` keeps every context for
    itself.
    """

    name: ClassVar[str]
    note: ClassVar[str] = ""
    cannot: ClassVar[dict[str, str]] = {}
    copies: ClassVar[bool] = False

    def __init__(self, work: Workload, nodes: int, tokens: int) -> None:
        """Make room for so many live nodes, and so many different tokens in them."""
        self.work = work
        self.outputs: list[torch.Tensor] = []
        self.attention_seconds = 0.0

    # -- bookkeeping

    @abstractmethod
    def begin(self, length: int, tokens: Any = None) -> Handle:
        """A new context of `length` tokens; their K/V in the form of `arrange`, or None where none
        are kept.
        """

    @abstractmethod
    def fork(self, parents: Sequence[Handle], new: int) -> list[Handle]:
        """A child a parent with room for `new` tokens more, and the slots that these go to. Writes
        none of them.
        """

    @abstractmethod
    def release(self, nodes: Sequence[Handle]) -> None:
        """Forget contexts and free what nobody shares."""

    def placed(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Of the latest fork: the slots of its new tokens, row by row; pages to copy first (source,
        target).
        """
        raise NotImplementedError

    def slots(self, node: Handle) -> list[int]:
        """The slot of every token of a context."""
        raise NotImplementedError

    # -- keys and values

    def arrange(self, tokens: KV) -> Any:
        """K/V of a step in the form in which the model of this library has them. Not timed."""
        return tokens

    def step(
        self, parents: Sequence[Handle], tokens: Any, new: int, queries: Any = None
    ) -> list[Handle]:
        """Fork, write the new tokens, and gather the batch for the model; with `queries`, also
        attend.
        """
        raise NotImplementedError

    def arrange_queries(self, queries: torch.Tensor) -> Any:
        """Queries [layers, B, heads, n, head_size] in the form in which the model has them. Not
        timed.
        """
        return queries

    def output(self, layer: int) -> torch.Tensor:
        """What the latest step attended to, [B, heads, n, head_size]."""
        return self.outputs[layer]

    def read(self, node: Handle) -> KV:
        """The whole context [layers, heads, length, head_size]. Not timed."""
        raise NotImplementedError

    def kv_bytes(self, lengths: Iterable[int]) -> int:
        """Bytes of K/V held for the live nodes, whose lengths these are."""
        raise NotImplementedError

    def attend(
        self, queries: Any, contexts: Callable[[int], KV], mask: Callable[[], torch.Tensor | None]
    ) -> None:
        """SDPA of every layer over what was gathered; its time is kept apart."""
        begin = time.perf_counter()
        bias = mask()
        self.outputs = [
            scaled_dot_product_attention(query, *contexts(layer), attn_mask=bias)
            for layer, query in enumerate(queries)
        ]
        self.attention_seconds = time.perf_counter() - begin


def causal(kept: torch.Tensor, new: int) -> torch.Tensor:
    """Bool [B, 1, new, W] from the columns that are tokens [B, W], the last `new` of which are the
    queries' own.
    """
    width = kept.shape[1]
    order = torch.ones(new, width, dtype=torch.bool, device=kept.device).tril(width - new)
    return kept[:, None, None, :] & order
