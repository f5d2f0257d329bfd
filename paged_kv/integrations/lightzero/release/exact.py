"""Windows computed anew at every step: tokens lie in the pages, and no keys and values outlive a
step.

A window that slid is not what the model would compute from its tokens, in any layer that comes
after attention, and no correction of stored keys and values makes it so. What never changes is the
embedded token itself. So here a context is the tokens of its window, shared page by page as ever. A
step gathers them and runs whole windows and the new token of each through the transformer in one
pass: as many passes as a step on stored keys and values, over more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lzero.model.unizero_world_models.transformer import apply_rotary_emb

from paged_kv.errors import BadCount
from paged_kv.integrations.lightzero.shared.positions import ReadShift
from paged_kv.integrations.lightzero.shared.state import ROOM, PagedState
from paged_kv.step import Step


class FreshToken(NamedTuple):
    """A context that is not stored: one embedded observation [1, 1, embed_dim]."""

    token: torch.Tensor
    size: int = 1


class ExactState(PagedState):
    """The contexts of one world model as pages of embedded tokens, without their positions.

    A pool stores two vectors a token; here they are the halves of its embedding. That is 1 / (2 *
    layers) of what keys and values take.
    """

    def open_sequences(self, model: Any, parents: Sequence[int]) -> ExactBatch:
        """Gather the tokens of a batch of sequences, left-padded."""
        self._batch = self.cache.open(parents, ROOM)
        return self.as_batch(model, self._batch)

    def as_batch(self, model: Any, step: Step, shift: ReadShift | None = None) -> ExactBatch:
        """A step under LightZero's names."""
        return ExactBatch(step, model)

    def fresh(self, model: Any, latent: torch.Tensor, start_pos: int) -> FreshToken:
        """A context of one observation."""
        return FreshToken(latent)

    def take_in(self, model: Any, contexts: Sequence[Any], rows: int, size: int) -> list[int]:
        """New sequences of one token each. Raises BadCount for keys and values, which no tokens can
        be made of.
        """
        for context in contexts:
            if type(context) is not FreshToken:
                raise BadCount(
                    "context", type(context).__name__, 'a stored one: window="exact" keeps tokens'
                )
        tokens = torch.cat([context.token for context in contexts])
        if (
            self._cache is None
            or tokens.device != self._cache.device
            or tokens.dtype != self._cache.dtype
        ):
            self.start(tokens.device, tokens.dtype)
        guests = self.cache.new(rows, start=-size % self.cache.page_size)
        keys, values = halves(tokens)
        self.cache.append(guests, keys.unsqueeze(0), values.unsqueeze(0))
        return guests


class ExactLayer:
    """Keys and values of one layer while a step runs."""

    def __init__(self, batch: ExactBatch) -> None:
        self._batch = batch
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, columns so far, head size."""
        rows, heads, head_size = self._batch.shape
        return rows, heads, 0 if self._held is None else self._held[0].shape[2], head_size

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size]."""
        if self._held is not None:
            keys = torch.cat((self._held[0], keys), dim=2)
            values = torch.cat((self._held[1], values), dim=2)
        self._held = keys, values

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V so far."""
        assert self._held is not None
        return self._held


class ExactBatch:
    """The batch in work, as LightZero's `keys_values_wm`: its first token brings the whole windows
    along.
    """

    masked = False  # `run` masks by itself
    whole_windows = True

    def __init__(self, tokens: Step, model: Any) -> None:
        self._tokens = tokens
        self.shape = len(tokens.parents), model.num_heads, model.embed_dim // model.num_heads
        self._layers = [ExactLayer(self) for _ in range(model.num_layers)]
        self._pads = None if len(set(tokens.lengths)) <= 1 else torch.tensor(tokens.pads)

    def __reduce__(self) -> Any:
        return str, ("a batch that was in work where the model was copied",)

    def __getitem__(self, layer: int) -> ExactLayer:
        return self._layers[layer]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each context when it was gathered."""
        return self._tokens.lengths

    @property
    def size(self) -> int:
        """Tokens so far, padding included."""
        return self._tokens.size

    def run(self, model: Any, token: torch.Tensor) -> torch.Tensor:
        """The transformer's output [B, 1, embed_dim] for the next token of each window, given
        without position.

        Positions count from the first token of each window; of rotary ones attention sees the
        differences only.
        """
        first = 0 if self._layers[0].shape[2] == 0 else self.size
        keys, values = halves(token.detach())
        self._tokens.update(0, keys, values)
        end = self.size
        if end - first > 1:
            token = torch.cat([half[:, 0] for half in self._tokens.get(0)], dim=-1)
        columns = torch.arange(first, end, device=token.device)
        if not model.config.rotary_emb:
            pads = 0 if self._pads is None else self._pads.to(token.device)[:, None]
            token = token + model.pos_emb((columns - pads).clamp(min=0))
        return self._last(model.transformer, token, self._mask(columns, end), first)

    def _last(
        self, transformer: Any, x: torch.Tensor, mask: torch.Tensor | None, first: int
    ) -> torch.Tensor:
        """The transformer's pass over `x` from position `first` on, for the output of the last
        token.

        Nobody asks the last layer about the tokens before it: that layer makes their keys and
        values only.
        """
        turns = None
        if transformer.config.rotary_emb:
            turns = transformer.freqs_cis[first : first + x.shape[1]].repeat(x.shape[0], 1, 1)
        *lower, top = transformer.blocks
        x = transformer.drop(x)
        for layer, block in zip(self._layers, lower):
            x = block(x, layer, mask, turns)
        if x.shape[1] > 1:
            before = x[:, :-1]
            x = x[:, -1:]
            self._layers[-1].update(
                *_keys_and_values(top, before, None if turns is None else turns[:, :-1])
            )
            mask = None if mask is None else mask[:, :, -1:]
            turns = None if turns is None else turns[:, -1:]
        return transformer.ln_f(top(x, self._layers[-1], mask, turns))  # type: ignore[no-any-return]

    def _mask(self, columns: torch.Tensor, end: int) -> torch.Tensor | None:
        """Bool [B, 1, columns, end]: what each column may attend to; None where no window is
        padded.

        Padding attends to itself, for a softmax over nothing is no number. Nobody attends to it.
        """
        if self._pads is None:
            return None
        seen = torch.arange(end, device=columns.device)
        pads = self._pads.to(columns.device)[:, None, None]
        allowed = (seen <= columns[:, None]) & (seen >= pads) | (seen == columns[:, None])
        return allowed[:, None]


def _keys_and_values(
    block: Any, x: torch.Tensor, turns: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [B, heads, n, head_size] that a block makes of its input."""
    attention = block.attn
    x = block.ln1(x)
    keys, values = (
        layer(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for layer in (attention.key, attention.value)
    )
    if turns is not None:
        keys, _ = apply_rotary_emb(keys, keys, freqs_cis=turns)
    return keys, values


def token_shape(embed_dim: int) -> dict[str, int]:
    """The shape of a pool of embedded tokens."""
    if embed_dim % 2:
        raise BadCount("embed_dim", embed_dim, "an even number where window is 'exact'")
    return dict(layers=1, heads=1, head_size=embed_dim // 2)


def halves(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded tokens [B, n, embed_dim] as keys and values of one head: [B, 1, n, embed_dim / 2]
    each.
    """
    keys, values = tokens.unsqueeze(1).chunk(2, dim=-1)
    return keys, values
