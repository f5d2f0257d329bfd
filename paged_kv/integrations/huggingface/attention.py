"""Attention over pages for transformers, under the name `paged_kv`.

`model.set_attn_implementation("paged_kv")`, or `attn_implementation="paged_kv"` when it is loaded.
The function finds its layer as a mark on the keys, which every model hands from `Cache.update`
straight to its attention function. Where no cache of ours is given, it is transformers' sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from paged_kv.errors import UnpagedAttention
from paged_kv.integrations.huggingface.feeding import MARK, FeedLayer, PagedLength, Request

NAME = "paged_kv"
# What some models add to scores, and pages know nothing of.
UNKNOWN = ("position_bias", "s_aux", "head_mask")


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the pages of the cache that `key` came through; [B, n, heads, size] and None.

    Raises UnpagedAttention where the keys were changed on their way, where the model adds something
    to its scores, or where the mask is one of the caller's own.
    """
    layer: FeedLayer | None = getattr(key, MARK, None)
    paged = attention_mask is not None and attention_mask.dim() == 2
    if layer is None and not paged:
        return _plain(module, query, key, value, attention_mask, dropout, scaling, softcap, more)
    kind = type(module).__name__
    if layer is None:
        raise UnpagedAttention(f"{kind} changes its keys after the cache has seen them")
    if attention_mask is not None and not paged:
        raise UnpagedAttention("masks of four dimensions cannot be read over pages")
    extras = [name for name in UNKNOWN if more.get(name) is not None]
    if extras:
        raise UnpagedAttention(f"{kind} adds {', '.join(extras)} to its scores")
    if dropout:
        raise UnpagedAttention(f"{kind} drops {dropout:g} of its scores: call model.eval()")
    seen = layer.attend(
        Request(query, key, value, attention_mask, scaling, sliding_window, softcap)
    )
    return seen.transpose(1, 2).contiguous(), None


def _plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    more: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """What transformers' sdpa does."""
    if softcap is not None:
        raise UnpagedAttention(
            f"{type(module).__name__} caps its scores, which sdpa cannot: give it a paged cache, "
            'or set_attn_implementation("eager")'
        )
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **more
    )
    return found


def paged_mask(
    *,
    batch_size: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor | None:
    """Which of the new tokens [B, n] are real, where a paged cache asks; else sdpa's mask.

    Raises UnpagedAttention where something else than order and a window decides who sees whom.
    """
    if not isinstance(kv_length, PagedLength):
        found: torch.Tensor | None = sdpa_mask(
            batch_size=batch_size, kv_length=kv_length, attention_mask=attention_mask, **more
        )
        return found
    if not more.get("allow_is_causal_skip", True):
        raise UnpagedAttention("the model changes the causal mask, for images or packed texts")
    if attention_mask is None:
        return torch.ones(1, 1, dtype=torch.bool).expand(batch_size, kv_length.new)
    return attention_mask[:, int(kv_length) - kv_length.new : int(kv_length)]


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, paged_mask)
