"""The loop of `in_pages`, compiled by numba. Not to be imported where that is missing.

A token of one part is a row of numbers, and arrays are two-dimensional: numba makes vectors of
loops over the last index, and a slice costs it more than the loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

AHEAD = 2  # pages that are asked for before they are needed
LINE = 64  # bytes
# Sums may be taken in any order, as vectors need it; but what is not a number stays so.
OPTIONS: Any = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}


def _prefetch(typing: Any, address: Any) -> Any:
    """Has the processor bring a line of memory into its second cache meanwhile."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        hints = [ir.Constant(number, hint) for hint in (0, 2, 1)]  # to read, not at once, data
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), *hints])
        return context.get_dummy_value()

    return types.void(types.int64), emit


_ask_for: Any = intrinsic(_prefetch)


def compiled(function: Any) -> Any:
    """The function, compiled at its first call. Not kept on the disk, where it may be lost, stale,
    damaged or refused: it takes a few seconds in a process.
    """
    return njit(**OPTIONS)(function)


@compiled
def attend(
    rows: Any,
    shape: Any,
    tables: Any,
    windows: Any,
    added: Any,
    fresh: Any,
    room: Any,
    place: Any,
    tokens: Any,
    scale: Any,
    seen: Any,
) -> None:  # pragma: no cover (no tracer sees compiled code)
    """One layer of a batch.

    `rows` [pages * parts * heads * page_size, size] has the tokens of windows; `shape` is (parts,
    heads, page_size). `tables` [B, pages of the longest] and `windows` [B, 2], offsets of their
    first tokens and lengths, say where they lie. `added` [parts * heads * n, size] is added to them
    by index, where it is not empty. `fresh` [parts * B * heads * width, size] has the new tokens;
    `room` is (width, column of the first one). `place` is (layer, column in the room). `tokens`
    [B * heads * 3, size] has a query, a key and a value for each row and head; `seen` is
    [B * heads, size].
    """
    heads = shape[1]
    width, first = room
    layer, column = place
    batch = len(tables)
    for row in range(batch):
        past = windows[row, 1]
        scores = np.empty((heads, past + column + 1), seen.dtype)
        token = row * heads
        keys = (2 * layer * batch + row) * heads
        values = ((2 * layer + 1) * batch + row) * heads
        _score(rows, tables[row], windows[row], shape, added, 2 * layer, tokens, token, scores)
        for head in range(heads):
            own = (keys + head) * width + first
            other = (values + head) * width + first
            query = 3 * (token + head)
            for index in range(tokens.shape[1]):
                fresh[own + column, index] = tokens[query + 1, index]
                fresh[other + column, index] = tokens[query + 2, index]
            for index in range(column + 1):
                scores[head, past + index] = _product(tokens, query, fresh, own + index)
            _softmax(scores[head], scale)
            seen[token + head] = 0
            for index in range(column + 1):
                _add(seen, token + head, scores[head, past + index], fresh, other + index)
        _sum(rows, tables[row], windows[row], shape, added, 2 * layer + 1, scores, token, seen)


@compiled
def _score(
    rows: Any,
    table: Any,
    window: Any,
    shape: Any,
    added: Any,
    part: int,
    tokens: Any,
    token: int,
    scores: Any,
) -> None:  # pragma: no cover
    """Products of the queries of a row with the keys of its window, page by page: all heads of one
    lie together, and so do keys and values.
    """
    parts, heads, page_size = shape
    start, past = window
    count = heads * page_size
    share = 2 * page_size * rows.shape[1] * rows.itemsize  # bytes, of keys and values of a page
    width = len(added) // (parts * heads)
    for page in range(len(table)):
        begin = page * page_size - start
        base = (table[page] * parts + part) * count
        for head in range(heads):
            if page + AHEAD < len(table):  # a share at a time: all at once would wait for itself
                ahead = (table[page + AHEAD] * parts + part) * heads // 2 + head
                for line in range(0, share, LINE):
                    _ask_for(rows.ctypes.data + ahead * share + line)
            query = 3 * (token + head)
            for slot in range(max(0, -begin), min(page_size, past - begin)):
                key = base + head * page_size + slot
                index = begin + slot
                total = rows.dtype.type(0)
                if width:
                    more = (part * heads + head) * width + index
                    for place in range(rows.shape[1]):
                        total += tokens[query, place] * (rows[key, place] + added[more, place])
                else:
                    for place in range(rows.shape[1]):
                        total += tokens[query, place] * rows[key, place]
                scores[head, index] = total


@compiled
def _sum(
    rows: Any,
    table: Any,
    window: Any,
    shape: Any,
    added: Any,
    part: int,
    scores: Any,
    token: int,
    seen: Any,
) -> None:  # pragma: no cover
    """Add the weighted values of a row's window to what its heads see."""
    parts, heads, page_size = shape
    start, past = window
    width = len(added) // (parts * heads)
    for page in range(len(table)):
        begin = page * page_size - start
        base = (table[page] * parts + part) * heads * page_size
        for head in range(heads):
            for slot in range(max(0, -begin), min(page_size, past - begin)):
                value = base + head * page_size + slot
                index = begin + slot
                weight = scores[head, index]
                to = token + head
                if width:
                    more = (part * heads + head) * width + index
                    for place in range(rows.shape[1]):
                        seen[to, place] += weight * (rows[value, place] + added[more, place])
                else:
                    for place in range(rows.shape[1]):
                        seen[to, place] += weight * rows[value, place]


@compiled
def _softmax(scores: Any, scale: Any) -> None:  # pragma: no cover
    """The weights of scores that are still to be scaled, in place."""
    most = scores[0]
    for index in range(len(scores)):
        most = max(most, scores[index])
    total = scores.dtype.type(0)
    for index in range(len(scores)):
        scores[index] = np.exp((scores[index] - most) * scale)
        total += scores[index]
    for index in range(len(scores)):
        scores[index] /= total


@compiled
def _product(queries: Any, query: int, keys: Any, key: int) -> Any:  # pragma: no cover
    """Of two rows."""
    total = keys.dtype.type(0)
    for index in range(keys.shape[1]):
        total += queries[query, index] * keys[key, index]
    return total


@compiled
def _add(sums: Any, to: int, weight: Any, rows: Any, row: int) -> None:  # pragma: no cover
    """A weighted row."""
    for index in range(rows.shape[1]):
        sums[to, index] += weight * rows[row, index]
