"""The same search on pages: a `PagedLM` does it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paged_kv.integrations.huggingface.lm import PagedLM
from paged_kv.integrations.huggingface.nodes import Node
from paged_kv.tools.search.measuring import Held, Peak, Stopwatch
from paged_kv.tools.search.side import Drawn, Rule


class PagedSide:
    """Nodes are handles, children are samples of them."""

    def __init__(self, name: str, lm: PagedLM, rule: Rule, draws: Stopwatch) -> None:
        self.name = name
        self._lm = lm
        self._rule = rule
        self._watch = Watch(lm, draws)
        self._nodes: list[Node] = []

    def begin(self, prompt: Sequence[int], seed: int) -> None:
        """Take the prompt of node 0."""
        self._nodes = self._lm.prefill([list(prompt)], seed=seed)
        self._watch.note()

    def expand(self, parents: Sequence[int], seeds: Sequence[int]) -> list[Drawn]:
        """A child of each of these nodes. Its draws follow from where it stands, as these seeds
        do.
        """
        children = self._lm.sample(
            [self._nodes[parent] for parent in parents],
            max_new_tokens=self._rule.tokens,
            temperature=self._rule.temperature,
            logits_processor=self._watch.begins,
            streamer=self._watch,
        )
        self._watch.note()
        self._nodes += children
        return [Drawn(child.new_tokens, list(child.logprobs or [])) for child in children]

    def peak(self) -> Held:
        """The most that was held at once since it was last asked."""
        return self._watch.peak.taken()

    def tokens_fed(self) -> int:
        """To the model, so far."""
        return self._lm.stats().tokens_fed


class Watch:
    """Sees every step of a sample: what is held then, and how long its tokens were drawn.

    A logits processor is called when a draw begins, a streamer when it has ended.
    """

    def __init__(self, lm: PagedLM, draws: Stopwatch) -> None:
        self.peak = Peak()
        self._pages = lm.pages
        self._draws = draws

    def note(self) -> None:
        """Look at what is held."""
        self.peak.note(Held(self._pages.bytes_in_use, self._pages.working_bytes))

    def begins(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A draw begins."""
        self._draws.start()
        return scores

    def put(self, value: Any) -> None:
        """A draw has ended."""
        self._draws.stop()
        self.note()

    def end(self) -> None:
        """The sample has ended."""
