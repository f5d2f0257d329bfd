"""A batch of fixed shape at fixed addresses, for steps that are compiled or captured."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from paged_kv.integrations.lightzero.shared.lean.places import (
    TOKENS,
    below_root,
    most_tokens,
    padding_mask,
    rotations,
)
from paged_kv.integrations.lightzero.shared.lean.reading import Parts
from paged_kv.integrations.lightzero.shared.lean.step import (
    Answers,
    Attend,
    Place,
    attend_in_one,
    cells,
    see_cells,
    step,
    token,
)


class Staging:
    """Contexts of one width, right-aligned: what is in front of shorter ones is masked.

    A step on it neither waits for the device nor depends on contents in its shapes, and reads and
    writes the same memory each time.
    """

    def __init__(self, model: Any, rows: int) -> None:
        weight = model.transformer.ln_f.weight
        size = model.embed_dim // model.num_heads
        longest = most_tokens(model.context_length)
        self.width = longest + TOKENS
        kind = dict(device=weight.device, dtype=weight.dtype)
        # what is masked is multiplied with zero, and has to be a number
        self.planes = torch.zeros(
            (2 * model.num_layers, rows, model.num_heads, self.width, size), **kind
        )
        self.mask = torch.zeros((rows, 1, 1, self.width), **kind)
        self._seen: list[int] = []  # tokens of each context that the mask lets through
        if model.continuous_action_space:
            self.action = torch.zeros((rows, model.action_space_size), **kind)
        else:
            self.action = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.index = torch.zeros((TOKENS, rows), dtype=torch.int64, device=weight.device)
        self.turns: torch.Tensor | None = None  # complex [2, B, 1, 1, head_size / 2]
        if model.config.rotary_emb:
            table = model.transformer.freqs_cis
            self.turns = table[: TOKENS * rows].view(TOKENS, rows, 1, 1, size // 2).clone()

    @property
    def rows(self) -> int:
        """Contexts."""
        return self.planes.shape[1]

    def fits(self, batch: Any) -> bool:
        """Whether a batch can be staged."""
        return len(batch.lengths) == self.rows and batch.past + TOKENS <= self.width

    def load(self, model: Any, batch: Any, action: torch.Tensor, depths: Any, times: Any) -> None:
        """Copy a batch here, and what its step starts with."""
        past = batch.past
        end = self.width - TOKENS
        self.planes[:, :, :, end - past : end].copy_(batch.columns(past))
        seen = batch.lengths if batch.hides_padding else [past] * self.rows
        if seen != self._seen:
            pads = [end - length for length in seen]
            self.mask.copy_(padding_mask(pads, self.width, self.mask.dtype))
            self._seen = list(seen)
        self.action.copy_(action)
        stands = below_root(batch, self.turns is not None, depths, times)
        if self.turns is None:
            self.index.copy_(torch.tensor(stands))
        else:
            self.turns.copy_(rotations(model.transformer, stands, self.planes.device))

    def store(self, batch: Any) -> None:
        """Copy K and V of the new tokens to the batch."""
        past = batch.past
        new = batch.columns(past + TOKENS)[:, :, :, past:]
        new.copy_(self.planes[:, :, :, self.width - TOKENS :])


def staged_step(parts: Parts, staging: Staging) -> Answers:
    """The step of what is staged."""
    return fixed_step(
        parts, staging.planes, staging.mask, staging.action, staging.index, staging.turns
    )


def fixed_step(
    parts: Parts,
    planes: torch.Tensor,
    mask: torch.Tensor,
    action: torch.Tensor,
    index: torch.Tensor,
    turns: torch.Tensor | None,
    attend: Attend = attend_in_one,
) -> Answers:
    """The step of a staged batch, by its tensors alone."""
    first = planes.shape[3] - TOKENS
    positions = None
    if parts.positions is not None:
        positions = torch.embedding(parts.positions.weight, index)

    def advance(which: int, x: torch.Tensor) -> torch.Tensor:
        column = first + which
        place = Place(
            partial(see_cells, cells(planes, column), attend, mask[..., : column + 1]),
            None if turns is None else turns[which],
            None if positions is None else positions[which],
        )
        return token(parts, x, place)

    return step(parts, action, advance)
