"""Nodes as they travel: one record each, written as columns. No tensors in here.

What comes from elsewhere is not trusted: `read_rows` looks at every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from paged_kv.bundles.contents import Contents
from paged_kv.checks import whole
from paged_kv.errors import BadBundle, BadCount
from paged_kv.integrations.huggingface.token_tree import Tokens

KIND = "nodes of a language model"
MOST = 2**64 - 1  # of a seed
FAR = 2**40  # of what is counted
REASONS = (None, "stop", "length")


class NodeRow(NamedTuple):
    """One node. Rows above come first."""

    above: int  # the row of the nearest node above that came along; -1 for none
    kept: int  # tokens of that one's path, which this path begins with
    tokens: Tokens  # those that follow
    shared: int  # tokens of the path that are not `new_tokens`
    seed: int
    children: int  # that it ever had
    pins: int
    fed: int  # tokens with K/V that come along; 0 where no sequence does
    known: bool  # whether the hidden state behind the path comes along
    logprobs: list[float] | None
    finish_reason: str | None
    data: Any


class NodeRows(NamedTuple):
    """Nodes, the order in which they were named, and their hidden states one by one."""

    rows: list[NodeRow]
    order: list[int]
    states: bytes


def rows_as_data(rows: Sequence[NodeRow], order: Sequence[int], states: bytes) -> dict[str, Any]:
    """Rows as data of a bundle: a list for each field."""
    columns = {name: [getattr(row, name) for row in rows] for name in NodeRow._fields}
    columns["tokens"] = [list(row.tokens) for row in rows]
    return {"kind": KIND, "order": list(order), "states": states, **columns}


def read_rows(data: Any, contents: Contents, state_bytes: int) -> NodeRows:
    """The nodes of a bundle whose hidden states have so many bytes each. Raises BadBundle."""
    if type(data) is not dict or data.get("kind") != KIND:
        raise BadBundle("it holds no nodes of a language model")
    columns = [data.get(name) for name in NodeRow._fields]
    order = data.get("order")
    states = data.get("states")
    if type(order) is not list or any(type(column) is not list for column in columns):
        raise BadBundle("a field of its nodes is no list")
    sizes = {len(column) for column in columns if column is not None}
    if sizes != {len(order)} or sorted(map(repr, order)) != sorted(map(repr, range(len(order)))):
        raise BadBundle(f"it names {len(order)} nodes, and has fields of {sorted(sizes)}")
    rows = [NodeRow(*fields) for fields in zip(*columns)]
    try:
        for place, row in enumerate(rows):
            _check(place, row)
    except BadCount as error:
        raise BadBundle(str(error)) from error
    known = sum(row.known for row in rows)
    if type(states) is not bytes or len(states) != known * state_bytes:
        raise BadBundle(f"it has no {known} hidden states of {state_bytes} bytes")
    _check_lengths(rows, contents)
    return NodeRows(rows, order, states)


def _check(place: int, row: Any) -> None:
    """Raise BadBundle or BadCount for a row that no export has written."""
    whole("the row above", row.above, -1, place - 1)
    whole("seed", row.seed, 0, MOST)
    for name in ("kept", "shared", "children", "pins", "fed"):
        whole(name, getattr(row, name), 0, FAR)
    if type(row.tokens) is not list:
        raise BadBundle("tokens are no list")
    if type(row.known) is not bool or (row.known and not row.fed):
        raise BadBundle("a hidden state comes without K/V")
    if row.finish_reason not in REASONS:
        raise BadBundle(f"finish_reason is {row.finish_reason!r}")
    if row.logprobs is not None and not _numbers(row.logprobs):
        raise BadBundle("logprobs are no numbers")


def _numbers(found: object) -> bool:
    return isinstance(found, list) and all(
        type(each) is float and (isfinite(each) or each < 0) for each in found
    )


def _check_lengths(rows: Sequence[NodeRow], contents: Contents) -> None:
    """Raise BadBundle unless the sequences are those that the rows say."""
    expected = [row.fed for row in rows if row.fed]
    lengths = contents.tables.tokens
    if contents.named != len(expected) or lengths[: contents.named].tolist() != expected:
        raise BadBundle("its sequences are not those of its nodes")
