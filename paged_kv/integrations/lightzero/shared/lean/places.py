"""Where the new tokens of a step stand: their cells in the staging buffer, what hides padding from
them, and their positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from paged_kv.attention.in_pages import InPages
from paged_kv.integrations.lightzero.shared.lean.reading import Parts
from paged_kv.integrations.lightzero.shared.lean.step import (
    Attend,
    Cell,
    Place,
    See,
    attend_exactly,
    attend_in_one,
    cells,
    see_cells,
)
from paged_kv.integrations.lightzero.shared.versions import FOUND, MAIN

TOKENS = 2  # an action, and the observation that it leads to
Cells = list[list[Cell]]  # of each token, of each layer
Stands = list[list[int]]  # of each token, of each row


class Places:
    """The places of the batches of one world model. Views are made once for each shape."""

    def __init__(self) -> None:
        self._cells: dict[int, tuple[weakref.ref[torch.Tensor], Cells]] = {}

    def of(self, model: Any, parts: Parts, batch: Any, stands: Stands) -> list[Place]:
        """Those of the next tokens of each row, which stand at these positions."""
        count = len(stands)
        device = parts.after.weight.device
        turns: Any = [None] * count
        positions: Any = [None] * count
        if parts.positions is None:
            turns = rotations(model.transformer, stands, device)
        else:
            index = torch.tensor(stands, device=device)
            positions = torch.embedding(parts.positions.weight, index)
        return list(map(Place, self._sees(parts, batch, count), turns, positions))

    def _sees(self, parts: Parts, batch: Any, count: int) -> list[See]:
        """What each of the next tokens sees."""
        if batch.in_pages is not None:
            return [partial(_see_pages, batch.in_pages, column) for column in range(count)]
        past = batch.past
        plane = batch.columns(past + count)
        every = self._views(plane, past)
        attend: Attend = attend_exactly if plane.is_cpu else attend_in_one
        masks: list[Any] = [None] * count
        if batch.hides_padding:
            if parts.masked:
                attend = attend_in_one  # as MaskedAttention does
            mask = padding_mask(batch.pads, past + count, plane.dtype)
            if attend is attend_exactly:
                mask = mask.repeat_interleave(parts.heads, 0).squeeze(1)
            mask = mask.to(plane.device)
            masks = [mask[..., : past + 1 + index] for index in range(count)]
        return [partial(see_cells, every[index], attend, masks[index]) for index in range(count)]

    def _views(self, plane: torch.Tensor, past: int) -> Cells:
        key = id(plane)
        known = self._cells.get(key)
        if known is not None and known[0]() is plane:
            return known[1]
        made = [cells(plane, column) for column in range(past, plane.shape[3])]
        forget = self._cells.pop
        self._cells[key] = weakref.ref(plane, lambda _: forget(key, None)), made
        return made


def _see_pages(pages: InPages, column: int, layer: int, made: torch.Tensor) -> torch.Tensor:
    """`See` of windows in their pages; under autocast tokens are of another type than these."""
    return pages.see(column, layer, made.to(pages.dtype))


def padding_mask(pads: Sequence[int], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores [B, 1, 1, columns]: minus infinity in front of shorter windows."""
    hidden = np.arange(columns) < np.array(pads)[:, None]
    return torch.from_numpy(np.where(hidden, -np.inf, 0.0)[:, None, None]).to(dtype)


def most_tokens(context_length: int) -> int:
    """Tokens of the longest context that a step goes on from: an odd number, and fewer than make a
    window slide.
    """
    return max(1, context_length - 3 + context_length % 2)


def below_root(batch: Any, rotary: bool, depths: Sequence[int], times: Sequence[Any]) -> Stands:
    """Where the action of each row of a search step stands, and the observation after it: rotary
    positions count from the beginning of the episode, learned ones in the window.
    """
    first = batch.lengths
    if rotary:
        first = [(depth + _whole(time)) * 2 + 1 for depth, time in zip(depths, times)]
    return [first, [position + 1 for position in first]]


def at_root(batch: Any, rotary: bool, times: Any, begins: bool) -> Stands:
    """The same of a root: of its observation alone, where an episode begins. One time is that of
    all rows.
    """
    if rotary:
        if isinstance(times, (int, float)):
            times = [times] * len(batch.lengths)
        last = [2 * _whole(time) for time in times]
    else:
        sizes = batch.lengths if batch.masked else [batch.past] * len(batch.lengths)
        last = sizes if begins else [size + 1 for size in sizes]
    return [last] if begins else [[position - 1 for position in last], last]


def _whole(time: Any) -> int:
    """A time step, which LightZero gives as a number or as an array of one."""
    return int(time.reshape(-1)[0]) if hasattr(time, "reshape") else int(time)


def rotations(transformer: Any, stands: Stands, device: torch.device) -> torch.Tensor:
    """The rotations of tokens at these positions, complex [tokens, B, 1, 1, head_size / 2]."""
    positions = [position for row in stands for position in row]
    table = transformer.freqs_cis
    if FOUND != MAIN:
        longest = transformer.config.max_seq_len
        positions = [position % longest for position in positions]
    elif max(positions) >= len(table):  # main makes it longer as episodes need it
        blank = torch.empty((len(positions), 1, 0), device=device)
        transformer._get_rotary_frequencies(blank, positions)
        table = transformer.freqs_cis
    index = torch.tensor(positions, device=device)
    return table.index_select(0, index).view(len(stands), -1, 1, 1, table.shape[-1])  # type: ignore[no-any-return]
