"""The oracle: every sequence a private dense tensor, every verb a loop. What the pages must always
agree with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paged_kv.cache import Gathered

Counts = int | Sequence[int]


@dataclass
class Window:
    """One sequence. Nothing is shared, so nothing can go wrong."""

    keys: torch.Tensor  # [layers, heads, tokens, head_size]
    values: torch.Tensor  # [layers, heads, tokens, value_head_size]
    positions: torch.Tensor  # [tokens] int64, where each token was written
    parent: int | None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.positions)

    def part(self, first: int, end: int, parent: int | None) -> Window:
        """A copy of the tokens in [first, end)."""
        keys = self.keys[:, :, first:end].clone()
        values = self.values[:, :, first:end].clone()
        return Window(keys, values, self.positions[first:end].clone(), parent)


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

    def new(self, count: int = 1) -> list[int]:
        """Empty sequences."""
        none = torch.zeros(0, dtype=torch.int64, device=self._keys.device)
        return [self._add(Window(self._keys, self._values, none, None)) for _ in range(count)]

    def fork(self, parents: Sequence[int], *, at: Counts | None = None) -> list[int]:
        """One copy a parent, of its first `at` tokens."""
        keep = self.lengths(parents) if at is None else _per_row(at, len(parents))
        return [
            self._add(self.windows[parent].part(0, end, parent))
            for parent, end in zip(parents, keep)
        ]

    def append(
        self,
        seqs: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Append keys and values [layers, B, heads, n, size], written at `positions` [B, n] or at
        their index.
        """
        for row, seq in enumerate(seqs):
            window = self.windows[seq]
            new = keys.shape[3]
            index = torch.arange(window.length, window.length + new, device=keys.device)
            window.keys = torch.cat((window.keys, keys[:, row]), dim=2)
            window.values = torch.cat((window.values, values[:, row]), dim=2)
            window.positions = torch.cat(
                (window.positions, index if positions is None else positions[row])
            )

    def slide(self, seqs: Sequence[int], count: Counts) -> None:
        """Drop tokens from the front."""
        for seq, drop in zip(seqs, _per_row(count, len(seqs))):
            window = self.windows[seq]
            self.windows[seq] = window.part(drop, window.length, window.parent)

    def truncate(self, seqs: Sequence[int], count: Counts) -> None:
        """Drop tokens from the end."""
        for seq, drop in zip(seqs, _per_row(count, len(seqs))):
            window = self.windows[seq]
            self.windows[seq] = window.part(0, window.length - drop, window.parent)

    def release(self, seqs: Sequence[int]) -> None:
        """Forget sequences."""
        for seq in seqs:
            del self.windows[seq]

    def release_subtree(self, seq: int) -> int:
        """Forget a sequence and all that descend from it over sequences that exist."""
        doomed = self._subtree(seq)
        self.release(doomed)
        return len(doomed)

    def promote(self, child: int) -> int:
        """Forget the subtrees of a child's siblings."""
        parent = self.windows[child].parent
        siblings = [
            seq for seq, window in self.windows.items() if parent == window.parent and seq != child
        ]
        return sum(map(self.release_subtree, siblings)) if parent is not None else 0

    def commit(
        self,
        parents: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        slide: Counts = 0,
        positions: torch.Tensor | None = None,
    ) -> list[int]:
        """Children with `slide` tokens less at the front and the new ones at the end, as a staging
        batch makes them.
        """
        children = self.fork(parents)
        self.append(children, keys, values, positions)
        self.slide(children, slide)
        return children

    def adopt(self, parent: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        """A child with a window [layers, heads, tokens, size] of its own, written at positions 0,
        1, ...
        """
        index = torch.arange(keys.shape[2], device=keys.device)
        return self._add(Window(keys.clone(), values.clone(), index, parent))

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """Tokens of each sequence."""
        return [self.windows[seq].length for seq in seqs]

    def gather(self, seqs: Sequence[int], *, pad: str = "right") -> Gathered:
        """Windows side by side in fresh tensors, padded with zeros."""
        lengths = self.lengths(seqs)
        width = max(lengths, default=0)
        layers, heads, _, head_size = self._keys.shape
        keys = self._keys.new_zeros(layers, len(seqs), heads, width, head_size)
        values = self._values.new_zeros(layers, len(seqs), heads, width, self._values.shape[-1])
        positions = torch.zeros(len(seqs), width, dtype=torch.int64, device=keys.device)
        mask = torch.zeros(len(seqs), width, dtype=torch.bool, device=keys.device)
        for row, seq in enumerate(seqs):
            window = self.windows[seq]
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

    def _add(self, window: Window) -> int:
        name = next(self._names)
        self.windows[name] = window
        return name

    def _subtree(self, seq: int) -> list[int]:
        found = [seq]
        for parent in found:  # grows while it is walked
            found.extend(name for name, window in self.windows.items() if window.parent == parent)
        return found


def _per_row(counts: Counts, rows: int) -> list[int]:
    return [counts] * rows if isinstance(counts, int) else list(counts)
