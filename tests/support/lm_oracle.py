"""What a model says of paths when it is run on each of them alone and without any cache; and what a
`PagedLM` must be like whatever was done to it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tiny_models import tiny_model

from paged_kv.integrations.huggingface.draws import uniform
from paged_kv.integrations.huggingface.lm import PagedLM

Path = tuple[int, ...]


class Oracle:
    """A model of its own, whose weights may be changed."""

    def __init__(self, family: str, model: Any = None) -> None:
        self.model = deepcopy(tiny_model(family)) if model is None else model
        self._known: dict[Path, tuple[torch.Tensor, torch.Tensor]] = {}

    def change(self) -> None:
        """Give it other weights."""
        with torch.no_grad():
            next(iter(self.model.parameters())).mul_(1.1)
        self._known.clear()

    def hidden(self, path: Sequence[int]) -> torch.Tensor:
        """Hidden states of every token [n, hidden size]."""
        return self._run(tuple(path))[0]

    def logits(self, path: Sequence[int]) -> torch.Tensor:
        """Logits of every token [n, vocabulary]."""
        return self._run(tuple(path))[1]

    def logprobs(self, path: Sequence[int], more: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of tokens behind a path."""
        found = self.logits((*path, *more)).log_softmax(-1)[len(path) - 1 : -1]
        return found.gather(-1, torch.tensor(more, dtype=torch.int64)[:, None])[:, 0]

    def _run(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        if path not in self._known:
            with torch.no_grad():
                ids = torch.tensor([path])
                out = self.model(ids, use_cache=False, output_hidden_states=True)
            self._known[path] = (out.hidden_states[-1][0], out.logits[0])
        return self._known[path]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that they differ by rounding only."""
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)


def drawn_as_told(logits: torch.Tensor, token: int, seed: int, index: int) -> bool:
    """Whether a token lies where its uniform number falls, or a rounding beside."""
    sums = logits.double().softmax(-1).cumsum(-1)
    number = uniform(seed, index)
    low = float(sums[token - 1]) if token else 0.0
    return low - 1e-4 <= number <= float(sums[token]) + 1e-4


def whole(lm: PagedLM) -> None:
    """Assert that nothing is held but what nodes hold, and that figures say so."""
    stats = lm.stats()  # which also settles
    residents = lm.paths.residents
    lm.pages.check()
    residents.index.check()
    assert sorted(lm.pages.live()) == sorted(residents.index.handles())
    assert lm.pages.open_steps == 0
    assert set(residents.index) <= {node.place.number for node in residents.alive()}
    assert stats.paths == len(residents.index)
    assert stats.nodes == len(residents.alive())
    assert stats.kv_bytes == lm.pages.pages_in_use * lm.pages.page_bytes
    states = {}
    for number in residents.index:
        state = residents.hidden(number)
        if state is not None:
            states[id(state)] = state.numel() * state.element_size()
    assert stats.hidden_bytes == sum(states.values())
    assert {name for edge in residents.tree.edges() for name in edge.names} == set(residents.index)
    if not any(residents.index.pinned(number) for number in residents.index):
        assert stats.kv_bytes + stats.hidden_bytes <= residents.max_bytes


def empty(lm: PagedLM) -> None:
    """Assert that nothing is left once no node is."""
    lm.clear()
    gc.collect()
    stats = lm.stats()
    assert (stats.nodes, stats.paths, stats.kv_bytes, stats.hidden_bytes) == (0, 0, 0, 0)
    assert lm.pages.live() == []
    assert lm.pages.pages_in_use == 0
    lm.pages.check()
