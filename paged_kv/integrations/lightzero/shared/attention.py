"""Attention that does not see the padding in front of shorter windows."""

from __future__ import annotations

from typing import Any

import torch
from lzero.model.unizero_world_models.transformer import SelfAttention, apply_rotary_emb
from torch.nn.functional import scaled_dot_product_attention


class MaskedAttention(SelfAttention):  # type: ignore[misc]
    """LightZero's attention, and with a mask of the columns that each row may see.

    LightZero 0.2.0 hands `valid_context_lengths` down to here; its own use of them works for one
    row only. Where it is None, as in training and in batches of equal windows, this is LightZero's
    attention.
    """

    def forward(
        self,
        x: torch.Tensor,
        kv_cache: Any = None,
        valid_context_lengths: torch.Tensor | None = None,
        freqs_cis: Any = None,
    ) -> torch.Tensor:
        """`valid_context_lengths` is a mask: bool, and broadcasts to [B, heads, T, columns]."""
        mask = valid_context_lengths
        if mask is None or kv_cache is None:
            return super().forward(x, kv_cache, None, freqs_cis)  # type: ignore[no-any-return]
        queries, keys, values = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.config.rotary_emb:
            queries, keys = apply_rotary_emb(queries, keys, freqs_cis=freqs_cis)
        kv_cache.update(keys, values)
        keys, values = kv_cache.get()
        drop = self.attn_drop.p if self.training else 0.0
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=drop)
        return self.resid_drop(self.proj(mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def mask_padding(model: Any, wanted: bool) -> None:
    """Give the blocks of a world model `MaskedAttention`, or LightZero's own. Parameters stay as
    they are.
    """
    for block in model.transformer.blocks:
        if type(block.attn) in (SelfAttention, MaskedAttention):
            block.attn.__class__ = MaskedAttention if wanted else SelfAttention
