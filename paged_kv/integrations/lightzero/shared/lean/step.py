"""The step of a search for a batch of contexts: an action, then the observation that it leads to.

Two tokens a row, one after the other, since the second is what the first predicts. Nothing here
looks at a number, waits for a device or depends on contents in its shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from paged_kv.integrations.lightzero.shared.lean.reading import Parts


class Cell(NamedTuple):
    """Where one token of one layer goes, and what it attends to: views of the staging buffer."""

    slot: torch.Tensor  # [2, B, heads, head_size], K and V
    keys: torch.Tensor  # [B, heads, columns, head_size], the token's own included
    values: torch.Tensor
    turned_keys: torch.Tensor  # [B * heads, head_size, columns]
    flat_values: torch.Tensor  # [B * heads, columns, head_size]


Advance = Callable[[int, torch.Tensor], torch.Tensor]
Attend = Callable[[torch.Tensor, Cell, torch.Tensor | None], torch.Tensor]
# Of a layer, and queries, keys and values of a token [B, heads, 3, head_size]: stores its keys and
# values, and gives what it sees, B * heads vectors.
See = Callable[[int, torch.Tensor], torch.Tensor]


class Place(NamedTuple):
    """Where one token stands."""

    see: See
    turn: torch.Tensor | None  # rotary: complex [B, 1, 1, head_size / 2], or its parts [..., 2]
    position: torch.Tensor | None  # learned: [B, embed_dim]


class Answers(NamedTuple):
    """What a step says of its rows."""

    last: torch.Tensor  # the transformer's output for the observation [B, embed_dim]
    latent: torch.Tensor  # the next latent state [B, embed_dim]
    scalars: torch.Tensor  # logits of values, then of rewards [2 * B, support]
    policy: torch.Tensor  # [B, actions], or means and deviations


class Predicted(NamedTuple):
    """What a root says of its rows."""

    last: torch.Tensor  # the transformer's output for the observation [B, embed_dim]
    value: torch.Tensor  # logits [B, support]
    policy: torch.Tensor


def predicted(parts: Parts, last: torch.Tensor) -> Predicted:
    """What is said of an observation, by the transformer's output for it."""
    value, policy = parts.value_and_policy(last)
    return Predicted(last, value, policy)


def step(parts: Parts, action: torch.Tensor, advance: Advance) -> Answers:
    """Take an action [B] (continuous: [B, size]) in each row.

    `advance(index, x)` is the transformer's output [B, embed_dim] for the first or second token.
    """
    latent, reward = parts.latent_and_reward(advance(0, parts.actions(action)))
    last = advance(1, latent)
    value, policy = parts.value_and_policy(last)
    return Answers(last, latent, torch.cat((value, reward)), policy)


def token(parts: Parts, x: torch.Tensor, place: Place) -> torch.Tensor:
    """The transformer's output [B, embed_dim] for one more token of each row, whose K and V are
    stored.
    """
    if place.position is not None:
        x = x + place.position
    rows, size = x.shape
    heads = parts.heads
    shape = rows, heads, 3, size // heads
    for layer, block in enumerate(parts.blocks):
        made = block.project(block.before(x)).view(shape)
        if place.turn is not None:
            rotate(made[:, :, :2], place.turn)
        x = x + block.mix(place.see(layer, made).view(rows, size))
        x = x + block.narrow(block.activate(block.widen(block.between(x))))
    return parts.after(x)


def see_cells(
    cells: Sequence[Cell],
    attend: Attend,
    mask: torch.Tensor | None,
    layer: int,
    made: torch.Tensor,
) -> torch.Tensor:
    """`See` of cells; `mask` is added to scores, 0 or -inf, in the shape that `attend` takes."""
    cell = cells[layer]
    cell.slot.copy_(made[:, :, 1:].permute(2, 0, 1, 3))
    return attend(made[:, :, 0], cell, mask)


def attend_exactly(queries: torch.Tensor, cell: Cell, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention [B * heads, 1, head_size] of queries [B, heads, head_size], in LightZero's own
    products and order: three kernels, and the same bits.
    """
    flat = queries.flatten(0, 1).unsqueeze(1)
    scale = 1.0 / math.sqrt(queries.shape[-1])
    added = 1.0
    if mask is None:
        mask = flat[:, :, :1]  # nothing of it is added
        added = 0.0
    scores = torch.baddbmm(mask, flat, cell.turned_keys, beta=added, alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), cell.flat_values)


def attend_in_one(queries: torch.Tensor, cell: Cell, mask: torch.Tensor | None) -> torch.Tensor:
    """The same in one kernel, whose sums are rounded in another order."""
    return scaled_dot_product_attention(
        queries.unsqueeze(2), cell.keys, cell.values, attn_mask=mask
    )


def attend_by_sums(queries: torch.Tensor, cell: Cell, mask: torch.Tensor | None) -> torch.Tensor:
    """The same as sums of products, which a compiler makes one loop of."""
    scale = 1.0 / math.sqrt(queries.shape[-1])
    scores = (queries.unsqueeze(2) * cell.keys).sum(-1) * scale
    if mask is not None:
        scores = scores + mask.squeeze(1)
    return (torch.softmax(scores, -1).unsqueeze(-1) * cell.values).sum(2)


def rotate(tokens: torch.Tensor, turn: torch.Tensor) -> None:
    """Turn queries and keys [B, heads, 2, head_size] by their positions, in place."""
    pairs = tokens.view(*tokens.shape[:-1], -1, 2)
    if turn.is_complex():
        torch.view_as_complex(pairs).mul_(turn)
        return
    even, odd = pairs.unbind(-1)
    cosine, sine = turn.unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1)
    pairs.copy_(turned)


def cells(planes: torch.Tensor, column: int) -> list[Cell]:
    """The cells of one column of a staging buffer [2 * layers, B, heads, width, head_size], whose
    columns before it are attended to.
    """
    return [_cell(planes[part : part + 2], column) for part in range(0, planes.shape[0], 2)]


def _cell(pair: torch.Tensor, column: int) -> Cell:
    keys, values = pair[:, :, :, : column + 1]
    return Cell(
        pair[:, :, :, column],
        keys,
        values,
        keys.flatten(0, 1).transpose(1, 2),
        values.flatten(0, 1),
    )
