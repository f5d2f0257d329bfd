"""A search as programs write it with transformers: batches of dense caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from paged_kv.integrations.huggingface.versions import FOUND
from paged_kv.tools.search.dense_cache import last_logits, nbytes, repeated
from paged_kv.tools.search.drawing import Drawing
from paged_kv.tools.search.kept import Kept
from paged_kv.tools.search.measuring import Held, Peak
from paged_kv.tools.search.side import Drawn


class DenseSide:
    """Parents are opened as `kept` has them, their rows repeated for the children, which are drawn
    together.
    """

    def __init__(self, name: str, model: Any, kept: Kept, drawing: Drawing) -> None:
        self.name = name
        self._model = model
        self._kept = kept
        self._drawing = drawing
        self._prompt = 0
        self._paths: list[tuple[int, ...]] = []  # behind the prompt, of each node
        self._fed = 0
        self._peak = Peak()

    def begin(self, prompt: Sequence[int], seed: int) -> None:
        """Take the prompt of node 0."""
        self._prompt = len(prompt)
        self._paths = [()]
        self._kept.begin(prompt, self._feed)
        self._peak.note(Held(self._kept.nbytes(), 0))

    def expand(self, parents: Sequence[int], seeds: Sequence[int]) -> list[Drawn]:
        """A child of each of these nodes."""
        nodes = list(dict.fromkeys(parents))
        opened = self._kept.open(nodes, [self._paths[node] for node in nodes], self._feed)
        rows = [nodes.index(parent) for parent in parents]
        as_opened = rows == list(range(len(nodes))) and not opened.kept
        batch = opened.cache if as_opened else repeated(opened.cache, rows)
        logits = opened.logits[torch.tensor(rows, device=opened.logits.device)]
        del opened  # before the batch grows
        length = self._prompt + len(self._paths[parents[0]])
        feed = partial(self._feed, batch)
        children = self._drawing.drawn(logits, seeds, length, feed)
        del feed
        self._note(batch)
        self._kept.keep(len(self._paths), batch)
        del batch
        self._peak.note(Held(self._kept.nbytes(), 0))
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

    def _note(self, batch: DynamicCache) -> None:
        self._peak.note(Held(self._kept.nbytes() + nbytes(batch), 0))

    def _feed(self, cache: DynamicCache, rows: Any) -> torch.Tensor:
        ids = torch.as_tensor(rows, device=self._model.device)
        self._fed += ids.numel()
        return last_logits(self._model, FOUND.cache_argument, cache, ids)
