"""Paths of tokens for Hugging Face models, and what a model says of each without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import VOCABULARY

from paged_kv import PagedKVCache
from paged_kv.integrations.huggingface import StepCache
from paged_kv.integrations.huggingface.stepping import attention_mask


def paths(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    """Random tokens, a row each; none of them is padding."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=made).tolist() for n in lengths]


def left_padded(rows: Sequence[Sequence[int]], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, columns] with zeros in front, and their attention mask."""
    longest = max(width, *map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


@torch.no_grad()
def feed(model: Any, pages: PagedKVCache, seqs: list[int], tokens: torch.Tensor) -> Any:
    """One forward on a dense step; what the model returns, and the children."""
    new = tokens.shape[1]
    with pages.open(seqs, new) as step:
        positions = torch.tensor(step.lengths)[:, None] + torch.arange(new)
        out = model(
            tokens.to(model.device),
            attention_mask=attention_mask(step, new).to(model.device),
            position_ids=positions.to(model.device),
            **StepCache(step).as_argument(),
        )
        return out, step.commit()


@torch.no_grad()
def whole(model: Any, path: Sequence[int]) -> torch.Tensor:
    """Logits of every token of a path, without any cache."""
    return model(torch.tensor([list(path)], device=model.device), use_cache=False).logits[0]
