"""Where the two tokens of a step stand: their cells in the staging buffer, what hides padding from
them, and their positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paged_kv.integrations.lightzero.shared.lean.reading import Parts
from paged_kv.integrations.lightzero.shared.lean.step import (
    Attend,
    Cell,
    Place,
    attend_exactly,
    attend_in_one,
    cells,
)
from paged_kv.integrations.lightzero.shared.versions import FOUND, MAIN

TOKENS = 2  # an action, and the observation that it leads to
NOTHING: Sequence[Any] = (None,) * TOKENS
Cells = tuple[list[Cell], list[Cell]]


class Places:
    """The places of the batches of one world model. Views are made once for each shape."""

    def __init__(self) -> None:
        self._cells: dict[int, tuple[weakref.ref[torch.Tensor], Cells]] = {}

    def of(self, model: Any, parts: Parts, batch: Any, depths: Any, times: Any) -> list[Place]:
        """Those of the action and of the observation of each row."""
        past = batch.past
        plane = batch.columns(past + TOKENS)
        device = plane.device
        both = self._views(plane, past)
        attend: Attend = attend_exactly if plane.is_cpu else attend_in_one
        masks = NOTHING
        if batch.hides_padding:
            if parts.masked:
                attend = attend_in_one  # as MaskedAttention does
            mask = padding_mask(batch.pads, past + TOKENS, plane.dtype)
            if attend is attend_exactly:
                mask = mask.repeat_interleave(parts.heads, 0).squeeze(1)
            mask = mask.to(device)
            masks = [mask[..., : past + 1 + index] for index in range(TOKENS)]
        turns: Any = NOTHING
        positions: Any = NOTHING
        if parts.positions is None:
            turns = rotations(model.transformer, rotary_positions(depths, times), device)
        else:
            lengths = batch.lengths
            index = torch.tensor([lengths, [length + 1 for length in lengths]], device=device)
            positions = torch.embedding(parts.positions.weight, index)
        return [
            Place(both[index], attend, masks[index], turns[index], positions[index])
            for index in range(TOKENS)
        ]

    def _views(self, plane: torch.Tensor, past: int) -> Cells:
        key = id(plane)
        known = self._cells.get(key)
        if known is not None and known[0]() is plane:
            return known[1]
        made = cells(plane, past), cells(plane, past + 1)
        forget = self._cells.pop
        self._cells[key] = weakref.ref(plane, lambda _: forget(key, None)), made
        return made


def padding_mask(pads: Sequence[int], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores [B, 1, 1, columns]: minus infinity in front of shorter windows."""
    hidden = np.arange(columns) < np.array(pads)[:, None]
    return torch.from_numpy(np.where(hidden, -np.inf, 0.0)[:, None, None]).to(dtype)


def rotary_positions(depths: Sequence[int], times: Sequence[Any]) -> list[int]:
    """Where the action of each row stands in its episode, then where the observation does."""
    first = [(depth + _whole(time)) * 2 + 1 for depth, time in zip(depths, times)]
    return first + [position + 1 for position in first]


def _whole(time: Any) -> int:
    """A time step, which LightZero gives as a number or as an array of one."""
    return int(time.reshape(-1)[0]) if hasattr(time, "reshape") else int(time)


def rotations(transformer: Any, positions: list[int], device: torch.device) -> torch.Tensor:
    """The rotations of both tokens, complex [2, B, 1, 1, head_size / 2]."""
    if FOUND == MAIN:
        table = transformer.freqs_cis
        if max(positions) >= len(table):  # main makes it longer as episodes need it
            blank = torch.empty((len(positions), 1, 0), device=device)
            transformer._get_rotary_frequencies(blank, positions)
            table = transformer.freqs_cis
    else:
        table = transformer.freqs_cis
        longest = transformer.config.max_seq_len
        positions = [position % longest for position in positions]
    index = torch.tensor(positions, device=device)
    return table.index_select(0, index).view(TOKENS, -1, 1, 1, table.shape[-1])  # type: ignore[no-any-return]
