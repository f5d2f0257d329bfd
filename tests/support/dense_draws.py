"""What `PagedLM.sample` draws behind one path, by whole forwards and without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paged_kv.integrations.huggingface.draws import seed_below, uniform


@torch.no_grad()
def draw(
    model: Any,
    path: Sequence[int],
    seed: int,
    generation_config: Any,
    logits_processor: Any,
    stopping_criteria: Any = (),
) -> list[int]:
    """The path with new tokens: one by one, each by the uniform number of its place."""
    tokens = list(path)
    own = seed_below(seed, 0)
    end = model.generation_config.eos_token_id
    least = generation_config.min_new_tokens or 0
    for count in range(generation_config.max_new_tokens):
        ids = torch.tensor([tokens])
        scores = model(ids, use_cache=False).logits[:, -1].float()
        if count < least:
            scores[:, end] = -torch.inf
        for process in logits_processor:
            scores = process(ids, scores)
        sums = scores[0].double().softmax(-1).cumsum(-1)
        wanted = uniform(own, len(tokens)) * sums[-1]
        tokens.append(int((sums <= wanted).sum()))
        ids = torch.tensor([tokens])
        if tokens[-1] == end or any(bool(stop(ids, None)) for stop in stopping_criteria):
            break
    return tokens
