"""What is done to scores before a token is drawn: by transformers, and by the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.integrations.huggingface.recipe import Allowed, Recipe

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Group(NamedTuple):
    """Rows of one length."""

    rows: list[int]
    padding: int  # in front of them
    chain: list[Processor]


class Processors:
    """All processors of one call, in the order in which `generate` has them.

    The caller's own see all rows, padded on the left, in one order from the first token to the
    last. Those of transformers see rows of one length at a time, without padding: so what is drawn
    for a row does not depend on the others.

    `lengths`: of the rows; `make` gives the processors for rows of a length, the same `own` ones
    among them.
    """

    def __init__(
        self,
        make: Callable[[Sequence[int], int], list[Processor]],
        own: Sequence[Processor],
        lengths: Sequence[int],
    ) -> None:
        longest = max(lengths)
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            by_length.setdefault(length, []).append(row)
        self._groups = [
            Group(rows, longest - length, make(rows, length)) for length, rows in by_length.items()
        ]
        self._own = own

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] of what follows paths [B, n], padded on the left, as they are
        drawn from. Those that were given may be changed.
        """
        for stage in zip(*[group.chain for group in self._groups]):
            first = stage[0]
            if len(stage) == 1 or any(first is each for each in self._own):
                scores = first(ids, scores)
                continue
            for group, processor in zip(self._groups, stage):
                rows = group.rows
                scores[rows] = processor(ids[rows, group.padding :], scores[rows])
        return scores


def processors(model: Any, recipe: Recipe, lengths: Sequence[int]) -> Processors:
    """The processors for rows of these lengths, the copies of a prompt side by side.

    The function that says which tokens are allowed is told of the prompt's number and of the path
    alone, without padding.
    """
    config = recipe.config

    def make(rows: Sequence[int], length: int) -> list[Processor]:
        config.max_length = length + recipe.new_tokens
        try:
            found: list[Processor] = model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=length,
                prefix_allowed_tokens_fn=_of_group(recipe, rows),
                logits_processor=recipe.processors,
                device=model.device,
            )
        finally:
            config.max_length = None
        return found

    return Processors(make, recipe.processors, lengths)


def _of_group(recipe: Recipe, rows: Sequence[int]) -> Allowed | None:
    """The function for some of the rows, which transformers numbers by themselves."""
    allowed = recipe.allowed
    if allowed is None:
        return None
    return lambda row, ids: allowed(rows[row] // recipe.copies, ids)
