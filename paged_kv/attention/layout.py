"""The parts of a step as numbers on the device, made once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from paged_kv.attention.parts import Batch, Group, Part
from paged_kv.pages.buffers import Ints
from paged_kv.pages.storage import Storage


class PartLayout(NamedTuple):
    """A part: G groups of `slots` slots each, with R queries each."""

    groups: int
    slots: int
    queries: int
    begin: int  # the columns that somebody sees
    end: int
    pages: torch.Tensor  # what is read [parts, heads, G * pages]
    dead: torch.Tensor | None  # slots [d] of G * slots that hold no token of their group
    masked: int  # the first column of `mask`, among those from `begin` on
    mask: torch.Tensor | None  # [G, R, end - begin - masked], true where a query does not see
    sources: torch.Tensor | None  # queries [G * R] where those of the batch are not just these
    targets: torch.Tensor | None  # where in G * R each query of the batch is [N]
    missing: torch.Tensor | None  # queries of the batch [N] that are not in this part


def lay_out(part: Part, batch: Batch, window: int | None, storage: Storage) -> PartLayout:
    """The numbers of a part."""
    device = storage.form.device
    size = storage.form.page_size
    width = part.slots // size
    pages = np.zeros((len(part.groups), width), dtype=np.int64)
    for row, group in zip(pages, part.groups):
        row[: len(group.pages)] = group.pages
    sources = _sources(part)
    low, high = _seen(part, batch, window, sources)
    begin = int(low.min())
    end = int(high.max())
    masked = 0 if (low > begin).any() else int(high.min()) - begin
    mask = None
    if masked < end - begin:
        columns = np.arange(begin + masked, end)
        hidden = (columns < low[:, :, None]) | (columns >= high[:, :, None])
        mask = torch.from_numpy(hidden).to(device)
    dead = _dead(part, begin, end)
    whole = np.array_equal(sources.reshape(-1), np.arange(batch.queries))
    targets, missing = (None, None) if whole else _targets(part, batch.queries)
    return PartLayout(
        len(part.groups),
        part.slots,
        part.queries,
        begin,
        end,
        storage.layer_index(pages.reshape(-1)),
        torch.from_numpy(dead).to(device) if len(dead) else None,
        masked,
        mask,
        None if whole else torch.from_numpy(sources.reshape(-1)).to(device),
        None if targets is None else torch.from_numpy(targets).to(device),
        None if missing is None or not missing.any() else torch.from_numpy(missing).to(device),
    )


def _sources(part: Part) -> Ints:
    """The number of each query [G, R]; groups with fewer repeat their last one."""
    first = np.array([group.query for group in part.groups])[:, None]
    last = np.array([group.queries - 1 for group in part.groups])[:, None]
    sources: Ints = first + np.minimum(np.arange(part.queries), last)
    return sources


def _targets(part: Part, queries: int) -> tuple[Ints, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Where the queries of the batch are in the part [N], and which are not in it."""
    targets = np.full(queries, -1, dtype=np.int64)
    for number, group in enumerate(part.groups):
        at = number * part.queries
        targets[group.query : group.query + group.queries] = np.arange(at, at + group.queries)
    return np.maximum(targets, 0), targets < 0


def _seen(part: Part, batch: Batch, window: int | None, sources: Ints) -> tuple[Ints, Ints]:
    """The first slot of its group that each query sees, and one behind the last one: [G, R]."""
    first = np.array([group.first for group in part.groups])[:, None]
    tokens = np.array([group.end for group in part.groups])[:, None]
    index = np.array(batch.places)[sources]  # in the sequence
    low = np.maximum(0, -first) + np.zeros_like(index)
    if window is not None:
        low = np.maximum(low, index - window + 1 - first)
    high = np.maximum(0, np.minimum(index + 1, tokens) - first)
    return np.minimum(low, high), high


def _dead(part: Part, begin: int, end: int) -> Ints:
    """Slots of the groups, of those that are read, that hold none of their tokens."""
    found = [
        number * part.slots + slot
        for number, group in enumerate(part.groups)
        for slot in (*range(begin, max(0, -group.first)), *range(_written(group, part), end))
    ]
    return np.array(found, dtype=np.int64)


def _written(group: Group, part: Part) -> int:
    """One behind the last slot of a group that holds a token."""
    return min(group.tokens, part.slots)
