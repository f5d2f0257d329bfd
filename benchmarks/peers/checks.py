"""Whether a peer is driven rightly: every node is read back against a dense copy that shares
nothing.

No peer is timed before it passed. `check_tables` plays a script on the tables alone, with an array
of token numbers in place of K/V; `check_contents` plays it with K/V, and compares attention as
well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .peer import KV, Peer
from .workload import Workload, script


class WrongContents(AssertionError):
    """A peer gave back something else than what was stored."""


class Handles:
    """A peer's own name for each node of a script."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def of(self, nodes: Sequence[int]) -> list[Any]:
        """Of each node."""
        return [self.known[node] for node in nodes]

    def add(self, nodes: Sequence[int], handles: Iterable[Any]) -> None:
        """Remember new ones."""
        self.known.update(zip(nodes, handles))

    def drop(self, nodes: Sequence[int]) -> list[Any]:
        """Forget nodes; their handles."""
        return [self.known.pop(node) for node in nodes]


def check_tables(kind: type[Peer], work: Workload, seed: int = 1) -> int:
    """Play a script on the tables of a peer; the number of contexts read back. Raises
    WrongContents.
    """
    made = script(work, seed)
    handles = Handles()
    peer = kind(work, work.nodes, work.unique_tokens)
    stored: dict[int, int] = {}  # slot -> number of the token in it
    wanted: dict[int, list[int]] = {}
    counter = 0
    compared = 0
    size = work.page_size

    def write(new: int) -> list[list[int]]:
        nonlocal counter
        slots, copies = peer.placed()
        for source, target in copies:
            stored.update(
                {
                    target * size + i: stored[source * size + i]
                    for i in range(size)
                    if source * size + i in stored
                }
            )
        tokens = list(range(counter, counter + len(slots)))
        counter += len(slots)
        stored.update(zip(slots, tokens))
        return [tokens[first : first + new] for first in range(0, len(tokens), new)]

    for search in made.searches:
        for node in search.begun:
            handles.add([node], [peer.begin(made.lengths[node])])
            (wanted[node],) = write(made.lengths[node])
        for parents, children in search.steps:
            handles.add(children, peer.fork(handles.of(parents), work.new))
            for parent, child, tokens in zip(parents, children, write(work.new)):
                wanted[child] = wanted[parent] + tokens
        compared += _compare(peer, handles, stored, wanted)
        for batch in search.released:
            peer.release(handles.drop(batch))
        compared += _compare(peer, handles, stored, wanted)
    return compared


def _compare(
    peer: Peer, handles: Handles, stored: dict[int, int], wanted: dict[int, list[int]]
) -> int:
    for node, handle in handles.known.items():
        got = [stored.get(slot) for slot in peer.slots(handle)]
        if got != wanted[node]:
            raise WrongContents(f"{peer.name}: node {node} reads {got}, stored was {wanted[node]}")
    return len(handles.known)


class Dense:
    """What every node holds, as one dense tensor of its own."""

    def __init__(self, work: Workload, seed: int = 0) -> None:
        self.work = work
        self.draw = torch.Generator().manual_seed(seed)
        self.contexts: dict[int, KV] = {}  # [layers, heads, length, head_size]

    def tokens(self, rows: int, count: int) -> KV:
        """Random K and V [layers, rows, heads, count, head_size]."""
        work = self.work
        shape = work.layers, rows, work.heads, count, work.head_size
        keys = torch.randn(shape, generator=self.draw).to(work.dtype)
        values = torch.randn(shape, generator=self.draw).to(work.dtype)
        return keys, values

    def add(self, node: int, parent: int, tokens: KV, row: int) -> None:
        """The context of a node: its parent's and a row of new tokens."""
        new = tuple(part[:, row] for part in tokens)
        kept = self.contexts[parent] if parent else tuple(part[:, :, :0] for part in new)
        self.contexts[node] = torch.cat((kept[0], new[0]), 2), torch.cat((kept[1], new[1]), 2)

    def attended(self, node: int, queries: torch.Tensor, layer: int) -> torch.Tensor:
        """Of queries [heads, n, head_size] that belong to the last n tokens of the node."""
        keys = self.contexts[node][0][layer]
        values = self.contexts[node][1][layer]
        width = keys.shape[1]
        new = queries.shape[1]
        mask = torch.ones(new, width, dtype=torch.bool).tril(width - new)
        return scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask
        )[0]


def check_contents(kind: type[Peer], work: Workload, seed: int = 1) -> int:
    """Play a script with K/V on a peer; the number of contexts read back. Raises WrongContents."""
    made = script(work, seed)
    handles = Handles()
    dense = Dense(work)
    peer = kind(work, work.nodes, work.unique_tokens)
    compared = 0
    for search in made.searches:
        for node in search.begun:
            tokens = dense.tokens(1, made.lengths[node])
            dense.add(node, 0, tokens, 0)
            handles.add([node], [peer.begin(made.lengths[node], peer.arrange(tokens))])
        for parents, children in search.steps:
            tokens = dense.tokens(work.envs, work.new)
            queries, _ = dense.tokens(work.envs, work.new)
            handles.add(
                children,
                peer.step(
                    handles.of(parents),
                    peer.arrange(tokens),
                    work.new,
                    peer.arrange_queries(queries),
                ),
            )
            for row, (parent, child) in enumerate(zip(parents, children)):
                dense.add(child, parent, tokens, row)
            _compare_attention(peer, dense, children, queries)
        compared += _compare_contents(peer, handles, dense)
        for batch in search.released:
            peer.release(handles.drop(batch))
        compared += _compare_contents(peer, handles, dense)
        for batch in search.released:
            for node in batch:
                del dense.contexts[node]
    return compared


def _compare_contents(peer: Peer, handles: Handles, dense: Dense) -> int:
    for node, handle in handles.known.items():
        for part, got, wanted in zip(("keys", "values"), peer.read(handle), dense.contexts[node]):
            if not torch.equal(got, wanted):
                raise WrongContents(f"{peer.name}: {part} of node {node} are not what was stored")
    return len(handles.known)


def _compare_attention(
    peer: Peer, dense: Dense, children: Sequence[int], queries: torch.Tensor
) -> None:
    loose = 1e-5 if dense.work.dtype == torch.float32 else 3e-2
    for layer in range(dense.work.layers):
        wanted = torch.stack(
            [dense.attended(node, queries[layer, row], layer) for row, node in enumerate(children)]
        )
        if not torch.allclose(peer.output(layer), wanted, atol=loose, rtol=loose):
            raise WrongContents(
                f"{peer.name}: attention of layer {layer} over {children} differs from the dense "
                "one"
            )
