"""A small world model with the shape of UniZero's: two tokens a step, a key/value context per node
of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F


class Batch(Protocol):
    """What the model needs of a dense batch of contexts; `paged_kv.Step` is one."""

    @property
    def pads(self) -> list[int]:
        """Columns of padding in front of each row."""

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append K and V [B, heads, n, head_size] to a layer."""

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer as far as it is filled."""


class Prediction(NamedTuple):
    """What the model says of a batch of nodes."""

    latent: torch.Tensor  # [B, embed], the observation token
    policy: torch.Tensor  # [B, actions] logits
    value: torch.Tensor  # [B]
    reward: torch.Tensor  # [B]


class ReferenceWorldModel(nn.Module):
    """Encoder, rotary transformer over action and observation tokens, and heads. Deterministic for
    a seed.

    >>> model = ReferenceWorldModel(layers=1, embed=16, heads=2, actions=3, observation=4)
    >>> model.encode(torch.zeros(2, 4)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self, *, layers: int, embed: int, heads: int, actions: int, observation: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.layers = layers
        self.embed = embed
        self.heads = heads
        self.head_size = embed // heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(observation, embed), nn.LayerNorm(embed))
            self.action_table = nn.Embedding(actions, embed)
            self.blocks = nn.ModuleList(Block(embed, heads) for _ in range(layers))
            self.norm = nn.LayerNorm(embed)
            self.latent_head = nn.Sequential(nn.Linear(embed, embed), nn.LayerNorm(embed))
            self.policy_head = nn.Linear(embed, actions)
            self.scalar_heads = nn.Linear(embed, 2)
        self.frequencies: torch.Tensor
        self.register_buffer(
            "frequencies", 10000.0 ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        )
        self.eval()

    @torch.no_grad()
    def encode(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations [B, n] to latent tokens [B, embed]."""
        return torch.as_tensor(self.encoder(observations))

    def embed_actions(self, actions: Sequence[int]) -> torch.Tensor:
        """Actions to tokens [B, embed]."""
        return torch.as_tensor(self.action_table(torch.tensor(actions)))

    @torch.no_grad()
    def observe(self, batch: Batch, latent: torch.Tensor, positions: torch.Tensor) -> Prediction:
        """Append an observation token a row and predict policy and value there. `positions` [B] are
        absolute.
        """
        x = self.tokens(batch, latent, positions)
        return Prediction(
            latent, self.policy_head(x), self.scalar_heads(x)[:, 0], torch.zeros(len(latent))
        )

    @torch.no_grad()
    def act(self, batch: Batch, actions: Sequence[int], positions: torch.Tensor) -> Prediction:
        """Append an action and the observation that the model expects of it; predict at both."""
        x = self.tokens(batch, self.embed_actions(actions), positions)
        after = self.observe(batch, self.latent_head(x), positions + 1)
        return after._replace(reward=self.scalar_heads(x)[:, 1])

    @torch.no_grad()
    def tokens(self, batch: Batch, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Append one embedded token [B, embed] a row; returns what the transformer makes of it, [B,
        embed].
        """
        angles = positions[:, None].float() * self.frequencies
        # [B, 1, 1, head_size / 2]
        turn = torch.polar(torch.ones_like(angles), angles)[:, None, None, :]
        x = x.unsqueeze(1)
        for layer, block in enumerate(self.blocks):
            x = block(x, batch, layer, turn)
        return torch.as_tensor(self.norm(x)[:, 0])


class Block(nn.Module):
    """Pre-norm attention over a cached context, and an MLP."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(embed)
        self.norm2 = nn.LayerNorm(embed)
        self.qkv = nn.Linear(embed, 3 * embed)
        self.out = nn.Linear(embed, embed)
        self.mlp = nn.Sequential(
            nn.Linear(embed, 4 * embed), nn.GELU(), nn.Linear(4 * embed, embed)
        )

    def forward(
        self, x: torch.Tensor, batch: Batch, layer: int, turn: torch.Tensor
    ) -> torch.Tensor:
        """x [B, 1, embed]; appends this token's K and V to the layer."""
        # [3, B, H, 1, hs]
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = _rotate(heads[0], turn)
        key = _rotate(heads[1], turn)
        batch.update(layer, key, heads[2])
        keys, values = batch.get(layer)
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=_mask(batch, keys))
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + torch.as_tensor(self.mlp(self.norm2(x)))


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _mask(batch: Batch, keys: torch.Tensor) -> torch.Tensor | None:
    if not any(batch.pads):
        return None
    pads = torch.tensor(batch.pads, device=keys.device)
    return (torch.arange(keys.shape[2], device=keys.device) >= pads[:, None])[:, None, None, :]
