"""The rows of a `PagedCache`: sequences of its own, and the step that they are written on.

With dense attention one step stays open over many forwards, and is committed when somebody wants to
see, fork, reorder or shorten the rows, or when its room is used up. With attention over pages each
forward is a step of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from paged_kv.cache import PagedKVCache
from paged_kv.errors import BadArgument, BadShape, OutOfPages, UnpagedAttention
from paged_kv.integrations.huggingface.attention import NAME
from paged_kv.integrations.huggingface.feeding import PagedLength, Pair, Request
from paged_kv.integrations.huggingface.padding import Padding
from paged_kv.paged_step import PagedStep
from paged_kv.step import Step

AHEAD = 16  # columns of room beyond what a forward needs, at first
MOST_AHEAD = 128


class State(NamedTuple):
    """What the rows are, apart from columns that an open step holds.

    `columns` are those that the model has seen. The tokens of a row are the last `lengths[r]` of
    them.
    """

    seqs: tuple[int, ...]
    lengths: tuple[int, ...]
    columns: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)


class Rows:
    """What the layers of a `PagedCache` hand their K/V to."""

    state = State((), (), 0)  # of an object that an interrupt kept from being made, too

    def __init__(self, pages: PagedKVCache, config: Any, alike: int = 1) -> None:
        self.pages = pages
        self.config = config
        self.layers = pages.layers
        self._step: Step | None = None
        self._ahead = AHEAD
        self.began = 0  # tokens that every row held when it was handed over
        self.alike = alike  # rows side by side that share the K/V of the first forward
        self._paged: PagedStep | None = None
        self._padding: Padding | None = None

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.state.seqs and not at_exit():  # where modules are gone
            self.pages.release(self.state.seqs, missing_ok=True)

    # -- as the layers see it

    @property
    def paged(self) -> bool:
        """Whether the model attends over pages."""
        return bool(self.config._attn_implementation == NAME)

    @property
    def rows(self) -> int:
        """Rows of the batch; none before the first forward."""
        return len(self.state.seqs)

    @property
    def columns(self) -> int:
        """Columns of all layers."""
        return self.state.columns + self._filled()

    def spans(self, new: int) -> tuple[int, int]:
        """Columns that a forward of `new` tokens attends to, and the number of the first one.

        Dense steps begin at the first token of the longest row.
        """
        columns = self.columns
        if self.paged:
            return PagedLength(columns + new, new), 0
        in_front = self.state.columns - self.state.longest
        return columns + new - in_front, in_front

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, more: Any
    ) -> Pair | None:
        """Take new K/V; see `Feed`."""
        if layer == 0:
            self._begin(keys, more)
        if self._step is None:
            return None
        dense = self._step.layers[layer]
        dense.update(keys, values)
        return dense.get()

    def attend(self, layer: int, request: Request) -> torch.Tensor:
        """Write new K/V into pages and attend; the last layer ends the forward."""
        if layer == 0:
            self._open_paged(request)
        step = self._paged
        padding = self._padding
        if step is None or padding is None:
            raise UnpagedAttention(f"layer {layer} attends before layer 0")
        seen = step.layers[layer].attend(
            padding.to_front(request.queries),
            padding.to_front(request.keys),
            padding.to_front(request.values),
            scale=request.scale,
            window=request.window,
            soft_cap=request.soft_cap,
        )
        if layer == self.layers - 1:
            self._paged = None
            columns = self.state.columns + request.queries.shape[2]
            self.become(lambda: (self._each(step.commit()), columns))
            self.alike = 1
        return padding.to_back(seen)

    def read(self, layer: int) -> Pair:
        """K and V of a layer [B, heads, columns, size], padded on the left with zeros."""
        self.settle()
        found = self.pages.gather(self.state.seqs, pad="left")
        pair = found.keys[layer], found.values[layer]
        in_front = self.state.columns - self.state.longest
        keys, values = (torch.nn.functional.pad(each, (0, 0, in_front, 0)) for each in pair)
        return keys, values

    # -- a forward begins

    def _begin(self, keys: torch.Tensor, more: Any) -> None:
        """Be ready for a forward, of which these keys [B, heads, n, size] are the first."""
        rows, _, new, _ = keys.shape
        if not self.state.seqs:
            self._check_alike(keys)
            self.become(lambda: (self.pages.new(rows), 0))
        if rows != self.rows:
            allowed = (
                f"{self.rows}: generate() repeats its inputs, PagedCache(expand_size=) its rows"
            )
            raise BadShape("rows of the batch", (rows,), (allowed,))
        self._check_positions(new, more)
        self._paged = None
        if self.paged or (self.alike > 1 and self.columns):
            self.settle()
        if self.paged:
            return
        step = self._even()
        if step is not None and step.size + new > step.past + step.room:
            self.settle()
            self._ahead = min(max(1, 2 * self._ahead), MOST_AHEAD)
        if self._step is None:
            self._step = self._open(new)

    def _open(self, new: int) -> Step:
        """A dense step with room for more than this forward, where there are pages for it."""
        try:
            return self.pages.open(self.state.seqs, new + self._ahead)
        except OutOfPages:
            return self.pages.open(self.state.seqs, new)

    def _open_paged(self, request: Request) -> None:
        new = request.queries.shape[2]
        mask = request.mask
        if mask is None:
            mask = torch.ones(self.rows, new, dtype=torch.bool)
        times = self.alike
        self._padding = Padding(mask, self.state.lengths, times)
        self._paged = self.pages.attend(self.state.seqs[::times], self._padding.counts)

    def _each(self, seqs: list[int]) -> list[int]:
        """Each of these for all rows that are alike: forks share its pages."""
        more = self.alike - 1
        forks = self.pages.fork([seq for seq in seqs for _ in range(more)]) if more else []
        return [
            each
            for place, seq in enumerate(seqs)
            for each in (seq, *forks[place * more : (place + 1) * more])
        ]

    def _check_alike(self, keys: torch.Tensor) -> None:
        """Raise BadShape or BadArgument unless the rows come side by side, as was said."""
        times = self.alike
        if keys.shape[0] % times:
            raise BadShape("rows of the batch", (keys.shape[0],), (f"a multiple of {times}",))
        first = keys[::times].repeat_interleave(times, 0)
        if times > 1 and not torch.allclose(keys, first, rtol=0.05, atol=0.05, equal_nan=True):
            allowed = f"PagedCache(expand_size={times}) of as many rows alike, side by side"
            raise BadArgument("input_ids", "rows that differ", allowed)

    def _check_positions(self, new: int, more: Any) -> None:
        """Raise BadArgument where a prompt that the rows hold is fed from its beginning again.

        So generate() does where nothing is left to feed: `input_ids[:, -0:]` is all of it. Rows
        that may hold nothing but padding tell nothing.
        """
        held = min(self.state.lengths) if self.paged else min(self.began, self.columns)
        positions = _positions(more)
        if new < 2 or not held or positions is None or positions.dim() != 2:
            return
        if 0 in positions[:, 0].tolist():
            raise BadArgument(
                "input_ids",
                f"fed from position 0 on, where {self.columns} columns are held",
                "what follows those; generate() needs all but the last token of its input_ids to "
                "be held: PagedCache(omit_last=True)",
            )

    # -- an open step

    def _even(self) -> Step | None:
        """The open dense step, without columns that a forward which failed left in some layers."""
        step = self._step
        if step is None or step.closed:
            self._step = None
            return None
        size = min(layer.size for layer in step.layers)
        for layer in step.layers:
            layer.size = size
        return step

    def _filled(self) -> int:
        """Columns that the open step holds of all layers."""
        step = self._step
        if step is None or step.closed:
            return 0
        return min(layer.size for layer in step.layers) - step.past

    def settle(self) -> None:
        """Store what the open step holds."""
        step = self._even()
        if step is None:
            return
        new = step.size - step.past
        if new:
            self.become(lambda: (step.commit(), self.state.columns + new))
        step.close()
        self._step = None
        if self.alike > 1 and self.state.columns:
            self.become(
                lambda: (self._each(list(self.state.seqs[:: self.alike])), self.state.columns)
            )
            self.alike = 1

    # -- the rows change

    def become(self, make: Callable[[], tuple[Sequence[int], int]]) -> None:
        """Be what `make` returns: sequences of our own, and how many columns the model has seen.

        What is left over is released: the sequences before, or those that an error or an interrupt
        kept from being used.
        """
        before = self.state
        mark = self.pages.mark()
        try:
            seqs, columns = make()
            self.state = State(tuple(seqs), tuple(self.pages.lengths(seqs)), columns)
        finally:
            kept = set(self.state.seqs)
            made = self.pages.made_since(mark)
            over = [seq for seq in {*before.seqs, *made} if seq not in kept]
            self.pages.release(over, missing_ok=True)

    def pick(self, rows: Sequence[int]) -> None:
        """Be these rows of now, in this order; one may stand there several times.

        A row that is picked once keeps its sequence.
        """
        if list(rows) == list(range(self.rows)):
            return
        self.settle()
        self._ahead = 0  # who reorders once will do so after each forward
        seqs = self.state.seqs
        again = [row for place, row in enumerate(rows) if row in rows[:place]]

        def picked() -> tuple[list[int], int]:
            forks = self.pages.fork([seqs[row] for row in again])
            first: set[int] = set()
            found = []
            for row in rows:
                found.append(forks.pop(0) if row in first else seqs[row])
                first.add(row)
            return found, self.state.columns

        self.become(picked)

    def clear(self) -> None:
        """Be empty, with as many rows."""
        self._step = None  # which gives up what it holds
        self._paged = None
        self.began = 0
        self.become(lambda: (self.pages.new(self.rows), 0))

    def shorten(self, count: int) -> None:
        """Drop the last `count` columns."""
        self.began = max(0, self.began - count)
        step = self._even()
        if step is not None and count <= step.size - step.past:
            size = step.size - count
            for layer in step.layers:
                layer.size = size
            return
        self.settle()
        state = self.state
        left = [max(0, length - count) for length in state.lengths]
        self.become(lambda: (self.pages.fork(state.seqs, at=left), state.columns - count))


def _positions(more: Any) -> torch.Tensor | None:
    """Positions of new tokens, where the model hands them to its cache."""
    told = more[0] if isinstance(more, tuple) else more.get("kwargs")
    found = told.get("position_ids") if isinstance(told, dict) else None
    return found if isinstance(found, torch.Tensor) else None
