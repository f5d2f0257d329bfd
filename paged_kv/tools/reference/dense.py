"""The oracle: every sequence a private dense tensor, every verb a loop. What the pages must always
agree with.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paged_kv.gather import Gathered

Counts = int | Sequence[int]
MOST = sys.maxsize


@dataclass
class Window:
    """One sequence. Nothing is shared, so nothing can go wrong."""

    keys: torch.Tensor  # [layers, heads, tokens, head_size]
    values: torch.Tensor  # [layers, heads, tokens, value_head_size]
    positions: torch.Tensor  # [tokens] int64, where each token was written
    place: int = 0  # where the next token goes, if nobody says

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.positions)

    def part(self, first: int, end: int) -> Window:
        """A copy of the tokens in [first, end); what comes next goes on behind them."""
        keys = self.keys[:, :, first:end].clone()
        values = self.values[:, :, first:end].clone()
        place = self.place
        if end < self.length:
            place = int(self.positions[end - 1]) + 1 if end else int(self.positions[0])
        return Window(keys, values, self.positions[first:end].clone(), place)

    def longer(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None
    ) -> Window:
        """With tokens [layers, heads, n, size] behind it, written at `positions` or one behind the
        other.
        """
        new = keys.shape[2]
        if positions is None:
            positions = torch.arange(self.place, self.place + new, device=keys.device)
        return Window(
            torch.cat((self.keys, keys), dim=2),
            torch.cat((self.values, values), dim=2),
            torch.cat((self.positions, positions)),
            int(positions[-1]) + 1 if new else self.place,
        )


class DenseOracle:
    """The verbs of `PagedKVCache` on private tensors, with handles of its own. No limits, and no
    checks of arguments.

    >>> oracle = DenseOracle(layers=1, heads=1, head_size=2)
    >>> root, = oracle.new()
    >>> oracle.append([root], torch.ones(1, 1, 1, 3, 2), torch.ones(1, 1, 1, 3, 2))
    >>> child, = oracle.fork([root], at=2)
    >>> oracle.lengths([root, child])
    [3, 2]
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_size: int,
        value_head_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._keys = torch.zeros(layers, heads, 0, head_size, dtype=dtype, device=device)
        self._values = torch.zeros(
            layers, heads, 0, value_head_size or head_size, dtype=dtype, device=device
        )
        self._names = itertools.count(1)
        self.windows: dict[int, Window] = {}
        self._above: dict[int, int | None] = {}  # parents, also of those that are gone

    def new(self, count: int = 1) -> list[int]:
        """Empty sequences."""
        none = torch.zeros(0, dtype=torch.int64, device=self._keys.device)
        return [self._add(Window(self._keys, self._values, none), None) for _ in range(count)]

    def fork(
        self, parents: Sequence[int], *, at: Counts | None = None, root: bool = False
    ) -> list[int]:
        """One copy a parent, of its first `at` tokens; with `root`, in a tree of its own."""
        keep = self.lengths(parents) if at is None else _per_row(at, len(parents))
        return [
            self._add(self.windows[parent].part(0, end), None if root else parent)
            for parent, end in zip(parents, keep)
        ]

    def adopt(self, seqs: Sequence[int]) -> list[int]:
        """Copies of all, as they come out of a bundle: each below that of the nearest one above it
        that is copied, too.
        """
        made = {seq: self._add(self.windows[seq].part(0, MOST), None) for seq in seqs}
        for seq, name in made.items():
            above = next((each for each in self._lineage(seq)[1:] if each in made), None)
            self._above[name] = None if above is None else made[above]
        return list(made.values())

    def append(
        self,
        seqs: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Append keys and values [layers, B, heads, n, size], written at `positions` [B, n] or one
        behind the other.
        """
        for row, seq in enumerate(seqs):
            placed = None if positions is None else positions[row]
            self.windows[seq] = self.windows[seq].longer(keys[:, row], values[:, row], placed)

    def slide(self, seqs: Sequence[int], count: Counts) -> None:
        """Drop tokens from the front."""
        for seq, drop in zip(seqs, _per_row(count, len(seqs))):
            window = self.windows[seq]
            self.windows[seq] = window.part(drop, window.length)

    def truncate(self, seqs: Sequence[int], count: Counts) -> None:
        """Drop tokens from the end."""
        for seq, drop in zip(seqs, _per_row(count, len(seqs))):
            window = self.windows[seq]
            self.windows[seq] = window.part(0, window.length - drop)

    def release(self, seqs: Sequence[int]) -> None:
        """Forget sequences."""
        for seq in seqs:
            del self.windows[seq]

    def release_subtree(self, seq: int) -> int:
        """Forget a sequence and all that descend from it."""
        doomed = [name for name in self.windows if seq in self._lineage(name)]
        self.release(doomed)
        return len(doomed)

    def promote(self, child: int) -> int:
        """Forget all that does not descend from a child below the nearest sequence above it, or in
        its tree.
        """
        above = self.parent(child)
        top = self._lineage(child)[-1] if above is None else above
        doomed = [
            name
            for name in self.windows
            if top in self._lineage(name) and child not in self._lineage(name) and name != above
        ]
        self.release(doomed)
        return len(doomed)

    def parent(self, seq: int) -> int | None:
        """The nearest sequence above that is not gone."""
        return next((name for name in self._lineage(seq)[1:] if name in self.windows), None)

    def children(self, seq: int) -> list[int]:
        """Whose nearest sequence above is this one."""
        return [name for name in self.windows if self.parent(name) == seq]

    def descendants(self, seq: int) -> list[int]:
        """All that descend from it."""
        return [name for name in self.windows if seq in self._lineage(name)[1:]]

    def open(self, parents: Sequence[int]) -> list[tuple[int, Window]]:
        """What a step of these sequences keeps: parents and copies of their windows."""
        return [(parent, self.windows[parent].part(0, MOST)) for parent in parents]

    def commit(
        self,
        opened: Sequence[tuple[int, Window]],
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        counts: Sequence[int] | None = None,
        slide: Counts = 0,
        positions: torch.Tensor | None = None,
    ) -> list[int]:
        """Children of what was opened, with `slide` tokens less at the front and the new ones at
        the end: all, or the first `counts` of each row.
        """
        children = []
        for row, (parent, window) in enumerate(opened):
            new = keys.shape[3] if counts is None else counts[row]
            placed = None if positions is None else positions[row, :new]
            grown = window.longer(keys[:, row, :, :new], values[:, row, :, :new], placed)
            children.append(self._add(grown, parent))
        self.slide(children, slide)
        return children

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """Tokens of each sequence."""
        return [self.windows[seq].length for seq in seqs]

    def gather(self, seqs: Sequence[int], *, pad: str = "right") -> Gathered:
        """Windows side by side in fresh tensors, padded with zeros."""
        return self.side_by_side([self.windows[seq] for seq in seqs], pad=pad)

    def side_by_side(self, windows: Sequence[Window], *, pad: str) -> Gathered:
        """As `gather`, of windows."""
        lengths = [window.length for window in windows]
        width = max(lengths, default=0)
        layers, heads, _, head_size = self._keys.shape
        keys = self._keys.new_zeros(layers, len(windows), heads, width, head_size)
        values = self._values.new_zeros(layers, len(windows), heads, width, self._values.shape[-1])
        positions = torch.zeros(len(windows), width, dtype=torch.int64, device=keys.device)
        mask = torch.zeros(len(windows), width, dtype=torch.bool, device=keys.device)
        for row, window in enumerate(windows):
            first = width - window.length if pad == "left" else 0
            columns = slice(first, first + window.length)
            keys[:, row, :, columns] = window.keys
            values[:, row, :, columns] = window.values
            positions[row, columns] = window.positions
            mask[row, columns] = True
        return Gathered(
            keys,
            values,
            torch.tensor(lengths, dtype=torch.int64, device=keys.device),
            mask,
            positions,
        )

    def _add(self, window: Window, parent: int | None) -> int:
        name = next(self._names)
        self.windows[name] = window
        self._above[name] = parent
        return name

    def _lineage(self, seq: int) -> list[int]:
        """The sequence and all above it, the gone ones too."""
        found = [seq]
        while (above := self._above[found[-1]]) is not None:
            found.append(above)
        return found


def _per_row(counts: Counts, rows: int) -> list[int]:
    return [counts] * rows if isinstance(counts, int) else list(counts)
