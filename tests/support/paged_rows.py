"""Steps on pages beside a dense model of them, and what attention has to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from paged_kv import PagedKVCache
from paged_kv.attention import Rows

# What an answer of order 1 may be off by: rounding of the result, and of weights where V is half.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 2.5e-2,
}


class Context(NamedTuple):
    """K and V of one sequence, as they were written."""

    keys: torch.Tensor  # [layers, heads, tokens, size]
    values: torch.Tensor

    def cut(self, first: int, end: int) -> Context:
        """Tokens `first` to `end`."""
        return Context(self.keys[:, :, first:end], self.values[:, :, first:end])

    def joined(self, more: Context) -> Context:
        """With more tokens behind."""
        return Context(*[torch.cat(pair, dim=2) for pair in zip(self, more)])


class Scene:
    """A cache, a dense copy of each sequence, and steps as attention meets them.

    Slots that were never written hold NaN.
    """

    def __init__(
        self,
        *,
        page_size: int,
        layers: int = 2,
        heads: int = 2,
        head_size: int = 4,
        value_head_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        num_pages: int = 400,
    ) -> None:
        self.cache = PagedKVCache(
            layers=layers,
            heads=heads,
            head_size=head_size,
            value_head_size=value_head_size,
            page_size=page_size,
            dtype=dtype,
            device=device,
            num_pages=num_pages,
            grow=False,
        )
        self.storage = self.cache._pool.storage
        for layer in range(layers):
            for plane in self.storage.layer_view(layer):
                plane[1:] = torch.nan
        self.contexts: dict[int, Context] = {}

    def tokens(self, count: int) -> Context:
        """K and V of so many tokens."""
        cache = self.cache
        shape = (cache.layers, cache.heads, count)
        options = {"device": cache.device}
        return Context(
            torch.randn(*shape, cache.head_size, **options).to(cache.dtype),
            torch.randn(*shape, cache.value_head_size, **options).to(cache.dtype),
        )

    def new(self, start: int, count: int) -> int:
        """A sequence with tokens."""
        (seq,) = self.cache.new(start=start)
        self.contexts[seq] = self.tokens(0)
        self.append(seq, count)
        return seq

    def append(self, seq: int, count: int) -> None:
        """Append tokens."""
        more = self.tokens(count)
        self.cache.append([seq], more.keys[:, None], more.values[:, None])
        self.contexts[seq] = self.contexts[seq].joined(more)

    def fork(self, seq: int, at: int | None = None) -> int:
        """A child of the first tokens of a sequence."""
        length = self.cache.lengths([seq])[0] if at is None else at
        (child,) = self.cache.fork([seq], at=length)
        self.contexts[child] = self.contexts[seq].cut(0, length)
        return child

    def slide(self, seq: int, count: int) -> None:
        """Drop tokens in front."""
        self.cache.slide([seq], count)
        self.contexts[seq] = self.contexts[seq].cut(count, self.cache.lengths([seq])[0] + count)

    def release(self, seqs: Sequence[int]) -> None:
        """End sequences."""
        self.cache.release(seqs)
        for seq in seqs:
            del self.contexts[seq]

    def step(self, parents: Sequence[int], counts: Sequence[int]) -> Step:
        """Children of `parents` with room for new tokens, which hold NaN until they are written."""
        children = [self.fork(parent) for parent in parents]
        cache = self.cache
        for child, count in zip(children, counts):
            shape = (cache.layers, 1, cache.heads, count)
            nothing = [
                torch.full((*shape, size), torch.nan, dtype=cache.dtype, device=cache.device)
                for size in (cache.head_size, cache.value_head_size)
            ]
            cache.append([child], *nothing)
        return Step(self, children, list(counts))


class Step:
    """Rows with new tokens; `write` has them written layer by layer, as a model would."""

    def __init__(self, scene: Scene, children: list[int], counts: list[int]) -> None:
        self.scene = scene
        self.children = children
        tables, starts, totals = scene.cache._pool.books.windows(children)
        past = [total - count for total, count in zip(totals, counts)]
        self.rows = Rows(tables, starts, past, counts)
        self.news = [scene.tokens(count) for count in counts]
        for child, new in zip(children, self.news):
            scene.contexts[child] = scene.contexts[child].joined(new)
        size = scene.cache.page_size
        self.slots = torch.tensor(
            [
                table[index // size] * size + index % size
                for table, start, length, count in zip(*self.rows)
                for index in range(start + length, start + length + count)
            ],
            dtype=torch.int64,
            device=scene.cache.device,
        )

    def write(self, layer: int) -> None:
        """Write the new tokens of a layer."""
        pair = [
            torch.cat([new[part][layer] for new in self.news], dim=1).transpose(0, 1)
            for part in (0, 1)
        ]
        storage = self.scene.storage
        storage.write_tokens(layer, storage.slot_index(self.slots), *pair)

    def queries(self, groups: int) -> torch.Tensor:
        """Queries of all columns."""
        cache = self.scene.cache
        shape = (len(self.children), cache.heads * groups, max(self.rows.counts, default=0))
        queries = torch.randn(*shape, cache.head_size, device=cache.device)
        return queries.to(cache.dtype)

    def expected(
        self,
        layer: int,
        queries: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """The answer, in float64, query by query."""
        cache = self.scene.cache
        groups = queries.shape[1] // cache.heads
        result = torch.zeros(
            *queries.shape[:3], cache.value_head_size, dtype=torch.float64, device=cache.device
        )
        for row, (child, count) in enumerate(zip(self.children, self.rows.counts)):
            context = self.scene.contexts[child]
            past = self.rows.lengths[row]
            for column in range(count):
                end = past + column + 1
                first = 0 if window is None else max(0, end - window)
                keys = context.keys[layer, :, first:end].double().repeat_interleave(groups, 0)
                values = context.values[layer, :, first:end].double().repeat_interleave(groups, 0)
                query = queries[row, :, column].double()
                scores = torch.einsum("hd,htd->ht", query, keys) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                result[row, :, column] = torch.einsum("ht,htd->hd", scores.softmax(-1), values)
        return result

    def end(self) -> None:
        """Release the children."""
        self.scene.release(self.children)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare an answer with the one in float64."""
    allowed = TOLERANCE[found.dtype]
    assert found.shape == expected.shape
    assert found.isfinite().all()
    difference = (found.double() - expected).abs()
    most = allowed * expected.abs().clamp(min=1)
    assert (difference <= most).all(), f"off by up to {difference.max():.1e}"
