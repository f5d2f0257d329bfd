"""Learned positions: what moving a token by a few places adds to its keys and values.

UniZero adds a position embedding to a token before it is projected to keys and values, so a token that moves from index
`then` to index `now` of its window is corrected by P[now] - P[then], P being the projected embeddings. Models
with rotary positions keep the rotation a key was made with, and need none of this.
"""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.staging import StagingBatch

KEPT = 16  # corrections at hand; once the windows are full every search step has the same one


class ReadShift:
    """Corrects windows as they are gathered; what is stored stays as the model produced it.

    The correction of a batch depends only on where its tokens were and are. It is built once for each such pattern and
    then added in one kernel.
    """

    def __init__(self) -> None:
        self._made_of: Any = None
        self._table = torch.empty(0)
        self._patterns: dict[bytes, torch.Tensor] = {}

    def follow(self, model: Any) -> None:
        """Use the projected embeddings of `model`, which it renews before it collects or evaluates."""
        if self._made_of is model.positional_embedding_k:
            return
        self._made_of = model.positional_embedding_k
        pairs = zip(model.positional_embedding_k, model.positional_embedding_v)
        # [tokens, 2 * layers, heads, head_size], parts in the order of the planes of a batch
        self._table = torch.cat([part for pair in pairs for part in pair]).permute(2, 0, 1, 3).contiguous()
        self._patterns.clear()

    def __call__(self, batch: StagingBatch) -> None:
        """Add the correction to the gathered windows, in place."""
        key = batch.then.tobytes() + batch.now.tobytes()
        correction = self._patterns.get(key)
        if correction is None:
            correction = self._build(batch)
            if len(self._patterns) >= KEPT:
                del self._patterns[next(iter(self._patterns))]
            self._patterns[key] = correction
        batch.planes[0][:, :, :, : batch.past].add_(correction)

    def _build(self, batch: StagingBatch) -> torch.Tensor:
        """Correction [2 * layers, B or 1, heads, past, head_size]."""
        then, now = batch.then, batch.now
        if (then == then[:1]).all() and (now == now[:1]).all():
            then, now = then[:1], now[:1]
        device = self._table.device
        difference = self._table[torch.from_numpy(now).to(device)] - self._table[torch.from_numpy(then).to(device)]
        return difference.permute(2, 0, 3, 1, 4).contiguous()


class WriteShift:
    """Corrects windows as they slide by two, with LightZero's own differences and in its order: bit for bit."""

    def __init__(self, context_length: int) -> None:
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

    def apply(self, batch: StagingBatch, rows: list[int], first: int) -> None:
        """Correct the tokens from column `first` on in `rows`, in place."""
        width = self._difference.shape[3]
        plane = batch.planes[0]
        if len(rows) == plane.shape[1]:
            plane[:, :, :, first : first + width] += self._difference
        else:
            plane[:, rows, :, first : first + width] += self._difference
