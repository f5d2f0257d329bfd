"""What callers hand over as prompts, as rows of tokens."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.checks import listed
from paged_kv.errors import BadArgument, BadShape

ROWS = "a tensor [B, n], lists of tokens, or texts"


def prompts(input_ids: Any, attention_mask: Any, tokenizer: Any) -> list[Any]:
    """Rows of tokens without padding: of a tensor [B, n], of lists, or of texts.

    Raises BadArgument, BadShape.
    """
    if isinstance(input_ids, torch.Tensor) and input_ids.dim() != 2:
        raise BadShape("input_ids", tuple(input_ids.shape), ("B", "n"))
    rows = [input_ids] if isinstance(input_ids, str) else listed("input_ids", input_ids, ROWS)
    if any(isinstance(row, str) for row in rows):
        rows = _of_texts(rows, tokenizer)
    if attention_mask is None:
        return rows
    masks = listed("attention_mask", attention_mask, "a tensor [B, n], or lists of 0 and 1")
    if len(masks) != len(rows):
        raise BadArgument("attention_mask", attention_mask, "one row for each row of input_ids")
    return [_unpadded(row, mask) for row, mask in zip(rows, masks)]


def _unpadded(row: object, mask: object) -> list[object]:
    """The tokens that a mask shows."""
    tokens = listed("tokens", row, "a list of token ids")
    seen = listed("attention_mask", mask, "a list of 0 and 1 for each row")
    if len(tokens) != len(seen):
        raise BadArgument("attention_mask", mask, f"{len(tokens)} numbers, one for each token")
    if any(each not in (0, 1) for each in seen):
        raise BadArgument("attention_mask", mask, "0 and 1")
    return [token for token, each in zip(tokens, seen) if each]


def _of_texts(texts: list[Any], tokenizer: Any) -> list[Any]:
    if tokenizer is None:
        raise BadArgument("input_ids", texts, "tokens: texts need PagedLM(..., tokenizer=)")
    if not all(isinstance(text, str) for text in texts):
        raise BadArgument("input_ids", texts, "texts or rows of tokens, and not both")
    return [list(tokenizer(text).input_ids) for text in texts]
