"""Attention written down as its formula says, in 64 bits: what every backend has to agree with."""

from __future__ import annotations

import torch


def attended(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """What the last n tokens of one sequence see: [query heads, n, value size].

    Queries [query heads, n, size]; keys and values [heads, tokens, size] of all tokens.
    """
    groups = len(queries) // len(keys)
    new = queries.shape[1]
    q = queries.double().cpu()
    k = keys.double().cpu().repeat_interleave(groups, 0)
    v = values.double().cpu().repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    place = torch.arange(k.shape[1])
    asking = torch.arange(k.shape[1] - new, k.shape[1])[:, None]
    seen = place <= asking
    if window is not None:
        seen &= place > asking - window
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
