"""The same search on pages that are gathered: a dense batch for each batch of children."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.integrations.huggingface.stepping import StepCache
from paged_kv.integrations.huggingface.versions import FOUND
from paged_kv.step import Step
from paged_kv.tools.search.dense_cache import last_logits
from paged_kv.tools.search.drawing import Drawing
from paged_kv.tools.search.measuring import Held, Peak
from paged_kv.tools.search.side import Drawn


class GatheredSide:
    """Nodes are sequences of pages. A batch is opened once with room for all its tokens: the model
    goes on in a dense buffer, and what it added is stored at the end.

    The last token of a node is fed when it first gets children.
    """

    def __init__(self, name: str, model: Any, pages: PagedKVCache, drawing: Drawing) -> None:
        self.name = name
        self._model = model
        self._pages = pages
        self._drawing = drawing
        self._prompt = 0
        self._paths: list[tuple[int, ...]] = []  # behind the prompt, of each node
        self._seqs: list[int] = []  # of each node
        self._logits: dict[int, torch.Tensor] = {}  # [vocabulary] each, of nodes fed to their ends
        self._fed = 0
        self._peak = Peak()

    def begin(self, prompt: Sequence[int], seed: int) -> None:
        """Take the prompt of node 0."""
        self._prompt = len(prompt)
        self._paths = [()]
        with self._pages.open(self._pages.new(), len(prompt)) as step:
            self._logits = {0: self._feed(step, torch.tensor([list(prompt)]))[0]}
            self._note()
            self._seqs = step.commit()

    def expand(self, parents: Sequence[int], seeds: Sequence[int]) -> list[Drawn]:
        """A child of each of these nodes."""
        self._finish([node for node in dict.fromkeys(parents) if node not in self._logits])
        logits = torch.stack([self._logits[parent] for parent in parents])
        length = self._prompt + len(self._paths[parents[0]])
        room = self._drawing.rule.tokens - 1
        with self._pages.open([self._seqs[parent] for parent in parents], room) as step:
            feed = partial(self._feed, step)
            children = self._drawing.drawn(logits, seeds, length, feed)
            self._note()
            self._seqs += step.commit()
        self._paths += [
            self._paths[parent] + child.tokens for parent, child in zip(parents, children)
        ]
        return children

    def peak(self) -> Held:
        """The most that was held at once since it was last asked."""
        return self._peak.taken()

    def tokens_fed(self) -> int:
        """To the model, so far."""
        return self._fed

    def _finish(self, nodes: Sequence[int]) -> None:
        """Feed the last tokens of equally deep nodes."""
        if not nodes:
            return
        before = [self._seqs[node] for node in nodes]
        with self._pages.open(before, 1) as step:
            logits = self._feed(step, torch.tensor([self._paths[node][-1:] for node in nodes]))
            self._note()
            whole = step.commit()
        self._pages.release(before)
        for node, seq, said in zip(nodes, whole, logits):
            self._seqs[node] = seq
            self._logits[node] = said

    def _feed(self, step: Step, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] behind more tokens [B, n] of a step."""
        self._fed += tokens.numel()
        ids = tokens.to(self._model.device)
        return last_logits(self._model, FOUND.cache_argument, StepCache(step), ids)

    def _note(self) -> None:
        self._peak.note(Held(self._pages.bytes_in_use, self._pages.working_bytes))
