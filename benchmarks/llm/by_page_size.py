"""What a fork and a step cost by page size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm.models import random_rows
from llm.timing import in_turns, medians, ratios
from paged_kv import PagedKVCache
from paged_kv.integrations.huggingface import StepCache, shape_of
from paged_kv.integrations.huggingface.attention import NAME

FORKS = 64  # in one call, of which each gets the page that a token of its own needs
ROWS = 16
OWN = 32  # tokens of each row


class Contexts:
    """Rows that share a long beginning, in pages of one size; K/V are random."""

    def __init__(self, model: Any, page_size: int, shared: int) -> None:
        self.model = model
        self.pages: PagedKVCache = shape_of(model).pages(page_size=page_size)
        (self.root,) = self.pages.new()
        self._grow([self.root], shared)
        self.rows = self.pages.fork([self.root] * ROWS)
        self._grow(self.rows, OWN)
        self.ids = torch.tensor(random_rows(model, ROWS, 1, seed=1))
        self.positions = torch.full((ROWS, 1), shared + OWN)

    def _grow(self, seqs: list[int], count: int) -> None:
        pages = self.pages
        shape = (pages.layers, len(seqs), pages.heads, count, pages.head_size)
        pages.append(seqs, torch.randn(shape), torch.randn(shape))

    def fork(self) -> None:
        """Children that share all; and they go again."""
        pages = self.pages
        pages.release(pages.fork([self.root] * FORKS))

    def grow(self) -> None:
        """Children with room for a token of their own, which copies a page that is not full."""
        with self.pages.attend([self.root] * FORKS, 1):
            pass

    @torch.no_grad()
    def step(self) -> None:
        """A token of each row is fed and published."""
        with self.pages.attend(self.rows, 1) as step:
            self.model(self.ids, position_ids=self.positions, **StepCache(step).as_argument())
            self.pages.release(step.commit())


def costs(model: Any, sizes: list[int], shared: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each page size; steps and forks of all are timed in turns."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        made = {size: Contexts(model, size, shared) for size in sizes}
        forks = _timed({size: made[size].fork for size in sizes}, 20 * rounds)
        rooms = _timed({size: made[size].grow for size in sizes}, 20 * rounds)
        steps = in_turns({str(size): made[size].step for size in sizes}, rounds)
    finally:
        model.set_attn_implementation(before)
    over = ratios(steps, str(max(sizes)))
    return [
        {
            "page_size": size,
            "shared": shared,
            "fork_us": forks[size],
            "room_us": rooms[size],
            "step_seconds": medians(steps)[str(size)],
            "step_over_largest": over[str(size)],
            "kv_bytes": made[size].pages.bytes_in_use,
            "working_bytes": made[size].pages.working_bytes,
        }
        for size in sizes
    ]


def _timed(calls: dict[int, Callable[[], None]], rounds: int) -> dict[int, float]:
    """Microseconds of one fork of a call."""
    times = in_turns({str(size): call for size, call in calls.items()}, rounds)
    return {int(size): seconds / FORKS * 1e6 for size, seconds in medians(times).items()}
