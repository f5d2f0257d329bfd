"""Learned positions: what a context needs when it moves inside its window.

LightZero adds a position embedding to a token before a layer normalises it and projects it to keys
and values. When a window moves, it corrects K and V by P[now] - P[then], P being the projected
embeddings, as if nothing were normalised and nothing attended to: an approximation in every layer,
which both classes here reproduce (docs/lightzero_evidence.md has the figures). Models with rotary
positions keep the rotation a key was made with, and need none of this.
"""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.step import Step


class ReadShift:
    """Stores tokens without their positions, and adds those of the window as it is gathered.

    What is stored never changes when a window slides, so pages stay shared, and a batch whose
    windows are alike takes one `add_`. Storing K - P[then] and reading it back + P[now] is
    LightZero's K + (P[now] - P[then]) up to rounding.

    `table` [2 * layers, 1, heads, tokens + 1, head_size]: what is added, by index in the window.
    """

    def __init__(self) -> None:
        self._made_of: Any = None
        self.table = torch.empty(0)
        self._slices: dict[tuple[int, int], torch.Tensor] = {}

    def follow(self, model: Any) -> None:
        """Use the projected embeddings of `model`, which it renews before it collects
        or evaluates.
        """
        if self._made_of is model.positional_embedding_k:
            return
        self._made_of = model.positional_embedding_k
        pairs = zip(model.positional_embedding_k, model.positional_embedding_v)
        # in the order of the parts
        table = torch.cat([part.detach() for pair in pairs for part in pair]).unsqueeze(1)
        # the last one is for padding
        self.table = torch.cat((table, torch.zeros_like(table[:, :, :, :1])), dim=3)
        self._slices.clear()

    def of(self, first: int, end: int) -> torch.Tensor:
        """The positions `first` to `end` [2 * layers, 1, heads, end - first, head_size]."""
        found = self._slices.get((first, end))
        if found is None:
            found = self._slices[first, end] = self.table[:, :, :, first:end]
        return found

    def __call__(self, batch: Step) -> None:
        """Add the positions of the windows, in place."""
        past = batch.past
        if batch.uniform:
            batch.columns(0, past)[0].add_(self.of(0, past))
        else:
            index = torch.from_numpy(batch.now).masked_fill(
                ~batch.mask().cpu()[:, :past], self.table.shape[3] - 1
            )
            batch.columns(0, past)[0].add_(self._at(index))

    def take_off(self, batch: Step) -> None:
        """Take the positions off the new tokens of a batch, in place, before they are stored."""
        batch.columns(batch.past, batch.size)[0].sub_(self.new_tokens(batch))

    def new_tokens(self, batch: Step) -> torch.Tensor:
        """The positions that the new tokens of a batch were made with, each after its
        own window.
        """
        past = batch.past
        size = batch.size
        if batch.uniform:
            return self.of(past, size)
        index = torch.tensor(batch.lengths)[:, None] + torch.arange(size - past)
        return self._at(index)

    def _at(self, index: torch.Tensor) -> torch.Tensor:
        """The positions at `index` [B, n]: [2 * layers, B, heads, n, head_size]."""
        parts, _, heads, _, head_size = self.table.shape
        chosen = self.table.index_select(3, index.reshape(-1).to(self.table.device))
        return chosen.view(parts, heads, *index.shape, head_size).permute(0, 2, 1, 3, 4)


class WriteShift:
    """Corrects windows as they slide by two, with LightZero's own differences and in its order: bit
    for bit.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._key = (2, context_length - 1)
        self._made_of: Any = None
        self._difference = torch.empty(0)

    def follow(self, model: Any) -> None:
        """Use the differences of `model`, which it renews before it collects or evaluates."""
        if self._made_of is model.pos_emb_diff_k:
            return
        self._made_of = model.pos_emb_diff_k
        pairs = zip(model.pos_emb_diff_k, model.pos_emb_diff_v)
        # [2 * layers, 1, heads, context_length - 3, head_size]
        self._difference = torch.stack([part[self._key] for pair in pairs for part in pair])

    def apply(self, batch: Step, rows: list[int], first: int) -> None:
        """Correct the tokens from column `first` on in `rows`, in place."""
        width = self._difference.shape[3]
        plane = batch.planes[0]
        if len(rows) == plane.shape[1]:
            plane[:, :, :, first : first + width] += self._difference
        else:
            plane[:, rows, :, first : first + width] += self._difference
