"""Children are drawn from logits, a token of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paged_kv.integrations.huggingface.draws import uniform
from paged_kv.integrations.huggingface.sampling import drawn_from
from paged_kv.tools.search.measuring import Stopwatch
from paged_kv.tools.search.side import Drawn, Rule

Feed = Callable[[torch.Tensor], torch.Tensor]


class Drawing:
    """How children are drawn, and a watch that runs meanwhile."""

    def __init__(self, rule: Rule, watch: Stopwatch) -> None:
        self.rule = rule
        self._watch = watch

    def drawn(
        self, logits: torch.Tensor, seeds: Sequence[int], length: int, feed: Feed
    ) -> list[Drawn]:
        """A child for each row of logits [B, vocabulary], which stand behind `length` tokens.

        `feed` takes tokens [B, 1] and returns the next logits; it is not asked behind the last
        ones.
        """
        tokens: list[list[int]] = []  # a list a step
        logprobs: list[list[float]] = []
        for step in range(self.rule.tokens):
            self._watch.start()
            numbers = [uniform(seed, length + step) for seed in seeds]
            chosen = drawn_from(logits / self.rule.temperature, numbers)
            said = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
            tokens.append(chosen.tolist())
            logprobs.append(said.tolist())
            self._watch.stop()
            if step + 1 < self.rule.tokens:
                logits = feed(chosen[:, None])
        return [Drawn(drawn, list(said)) for drawn, said in zip(zip(*tokens), zip(*logprobs))]
