"""Padding in front of new tokens: models are fed with it, pages do not store it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paged_kv.errors import BadArgument


class Padding:
    """Which columns [B, n] of a forward are tokens: the last `counts[r]` of row r.

    Moves them to the front, where a paged step wants them, and what they saw back to their columns.
    `lengths` are the tokens that the rows have already: padding is in front of the first one.
    Where `times` rows side by side are alike, one of them stands for all. Raises BadArgument where
    padding is elsewhere.

    >>> padding = Padding(torch.tensor([[True, True, True], [False, False, True]]), [0, 0])
    >>> padding.counts
    [3, 1]
    >>> tokens = torch.arange(6.0).reshape(2, 1, 3, 1)
    >>> padding.to_front(tokens)[1].flatten()[0].item()
    5.0
    >>> padding.to_back(padding.to_front(tokens))[1].flatten()[2].item()
    5.0
    """

    def __init__(self, mask: torch.Tensor, lengths: Sequence[int], times: int = 1) -> None:
        self.times = times
        tokens = mask.detach().cpu().bool()[::times]
        new = tokens.shape[1]
        self.counts: list[int] = tokens.sum(1).tolist()
        self.width = max(self.counts, default=0)
        self.uniform = self.counts.count(new) == len(self.counts)
        if self.uniform:
            return
        columns = torch.arange(new)
        skipped = (new - tokens.sum(1))[:, None]
        if not torch.equal(tokens, columns >= skipped) or any(
            length and count < new for length, count in zip(lengths[::times], self.counts)
        ):
            allowed = "padding in front of the first token of a row only (padding_side='left')"
            raise BadArgument("attention_mask", mask.int().tolist(), allowed)
        self._front = (columns[: self.width] + skipped).clamp(max=new - 1).to(mask.device)
        self._back = (columns - skipped).clamp(min=0).to(mask.device)

    def to_front(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, heads, n, size] as [B / times, heads, the largest count, size]."""
        chosen = tokens if self.times == 1 else tokens[:: self.times]
        return chosen if self.uniform else _taken(chosen, self._front)

    def to_back(self, seen: torch.Tensor) -> torch.Tensor:
        """[B / times, heads, the largest count, size] as [B, heads, n, size]; what padding sees is
        without a meaning.
        """
        if not self.uniform and not self.width:
            seen = seen.new_zeros(*seen.shape[:2], self._back.shape[1], seen.shape[3])
        elif not self.uniform:
            seen = _taken(seen, self._back)
        return seen if self.times == 1 else seen.repeat_interleave(self.times, 0)


def _taken(tokens: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of each row its own columns."""
    _, heads, _, size = tokens.shape
    return tokens.gather(2, columns[:, None, :, None].expand(-1, heads, -1, size))
