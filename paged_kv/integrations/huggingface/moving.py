"""Nodes leave an lm, and come into another: with their paths, seeds, K/V and last hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from paged_kv.bundles.bundle import Bundle, Source, data_of
from paged_kv.bundles.codec import Codec
from paged_kv.bundles.contents import Contents
from paged_kv.errors import BadArgument, BadBundle
from paged_kv.integrations.huggingface.node_rows import NodeRow, read_rows, rows_as_data
from paged_kv.integrations.huggingface.nodes import Node, Place
from paged_kv.integrations.huggingface.paths import Paths
from paged_kv.integrations.huggingface.token_tree import Tokens, common

Identity = Mapping[str, Any]


def export_nodes(
    paths: Paths, nodes: Sequence[Node], identity: Identity | None, codec: Codec | None
) -> Bundle:
    """See `PagedLM.export`."""
    given = [node.place.number for node in nodes]
    if len(set(given)) != len(given):
        raise BadArgument("nodes", nodes, "each node once")
    ordered = sorted(nodes, key=lambda node: node.place.number)  # whoever is above comes first
    above = _above(ordered)
    pages = paths.residents.pages
    with pages.scope():
        rows: list[NodeRow] = []
        seqs: list[int] = []
        states: list[torch.Tensor] = []
        held = paths.residents.sequences()
        for node, row in zip(ordered, above):
            seq = held.get(node.place.number)
            if seq is None and row < 0:
                seq = _borrowed(paths, node.tokens)
            fed = 0 if seq is None else pages.lengths([seq])[0]
            state = paths.residents.hidden(node.place.number) if fed else None
            rows.append(_row(paths, node, row, ordered, fed, state is not None))
            seqs += [] if seq is None else [seq]
            states += [] if state is None else [state]
        places = {number: row for row, number in enumerate(sorted(given))}
        order = [places[number] for number in given]
        data = rows_as_data(rows, order, _as_bytes(states))
        return pages.export(seqs, data=data, identity=_identity(paths, identity), codec=codec)


def adopt_nodes(
    paths: Paths, source: Source, identity: Identity | None, codec: Codec | None
) -> list[Node]:
    """See `PagedLM.adopt`."""
    contents = getattr(source, "contents", None)
    if not isinstance(contents, Contents):
        raise BadArgument("bundle", source, "what export() returned, or a snapshot")
    pages = paths.residents.pages
    own = _identity(paths, identity)
    contents.compare(pages.fingerprint(own))
    hidden = paths.runner.no_states()
    width = hidden.shape[1] * hidden.element_size()
    found = read_rows(data_of(contents, codec), contents, width)
    tokens = _paths_of(paths, found.rows)
    with pages.scope():
        seqs = iter(pages.adopt(source, identity=own, codec=codec))
        states = iter(_as_states(found.states, hidden))
        nodes: list[Node] = []
        for row, path in zip(found.rows, tokens):
            node = _made(paths, row, path, nodes)
            nodes.append(node)
            if row.fed:
                state = next(states) if row.known else None
                paths.residents.put(node.place.number, next(seqs), path[: row.fed], state)
    _pin(paths, nodes, found.rows)
    paths.residents.fit()
    return [nodes[place] for place in found.order]


def _above(ordered: Sequence[Node]) -> list[int]:
    """The row of the nearest node above each that comes along, or -1. Cost: O(ancestors)."""
    rows = {id(node.place): row for row, node in enumerate(ordered)}
    found = []
    for node in ordered:
        place = node.place.above
        while place is not None and id(place) not in rows:
            place = place.above
        found.append(-1 if place is None else rows[id(place)])
    return found


def _borrowed(paths: Paths, path: Tokens) -> int | None:
    """A sequence of what others hold of a path, within the scope that is open; None where nobody
    holds a token of it.
    """
    length = paths.length(path)
    if not length:
        return None
    (seq,) = paths.residents.pages.fork(paths.bases([path], [length]))
    return seq


def _row(
    paths: Paths, node: Node, above: int, ordered: Sequence[Node], fed: int, known: bool
) -> NodeRow:
    kept = common(node.tokens, ordered[above].tokens) if above >= 0 else 0
    return NodeRow(
        above=above,
        kept=kept,
        tokens=node.tokens[kept:],
        shared=len(node.tokens) - len(node.new_tokens),
        seed=node.place.seed,
        children=node.place.children,
        pins=paths.residents.pins(node.place.number),
        fed=fed,
        known=known,
        logprobs=node.logprobs,
        finish_reason=node.finish_reason,
        data=node.data,
    )


def _identity(paths: Paths, given: Identity | None) -> Identity:
    return paths.identity() if given is None else given


def _as_bytes(states: Sequence[torch.Tensor]) -> bytes:
    """Hidden states one behind the other."""
    if not states:
        return b""
    return torch.stack(list(states)).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _as_states(found: bytes, like: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states, of the kind of `like` [0, hidden size]; each in memory of its own."""
    if not found:
        return []
    flat = torch.frombuffer(bytearray(found), dtype=like.dtype)
    states = flat.view(-1, like.shape[1]).to(like.device)
    return [state.clone() for state in states]


def _paths_of(paths: Paths, rows: Sequence[NodeRow]) -> list[Tokens]:
    """The whole path of each row. Raises BadBundle."""
    found: list[Tokens] = []
    for row in rows:
        beginning = found[row.above][: row.kept] if row.above >= 0 else ()
        if len(beginning) != row.kept:
            raise BadBundle(f"a node keeps {row.kept} tokens of {len(beginning)}")
        try:
            path = beginning + paths.check_tokens(row.tokens, row.kept)
        except ValueError as error:
            raise BadBundle(f"a path is not of this model: {error}") from error
        if row.fed > len(path) or row.shared > len(path) or (row.known and row.fed < len(path)):
            raise BadBundle(f"a node of {len(path)} tokens says {row.fed} fed, {row.shared} shared")
        found.append(path)
    return found


def _made(paths: Paths, row: NodeRow, path: Tokens, nodes: Sequence[Node]) -> Node:
    """A node as a row says, below those that were made before."""
    parent = nodes[row.above] if row.above >= 0 else None
    above = None if parent is None else parent.place
    place = Place(paths.residents.number(), above, row.seed)
    place.children = row.children
    node = paths.made(place, path, row.shared, parent)
    node.logprobs = row.logprobs
    node.finish_reason = row.finish_reason
    node.data = row.data
    return node


def _pin(paths: Paths, nodes: Sequence[Node], rows: Sequence[NodeRow]) -> None:
    """Pin what was pinned."""
    residents = paths.residents
    for node, row in zip(nodes, rows):
        for _ in range(row.pins):
            residents.pin(node.place.number)
