"""One forward of a model on one step."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.errors import UnpagedAttention
from paged_kv.integrations.huggingface.feeding import FeedCache, PagedLength, Pair, Request
from paged_kv.paged_step import PagedStep
from paged_kv.step import Step


class StepCache(FeedCache):
    """A step as the cache of one forward; the step's owner commits it afterwards.

    Models with dense attention need a `Step` of `open()`: they see windows that end in one column,
    padded on the left, and need `attention_mask(step, n)`. Those with `paged_kv` need a `PagedStep`
    of `attend()`: new tokens are padded on the right, and no mask is needed. Positions are the
    caller's to give.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from paged_kv.integrations.huggingface.shapes import shape_of
    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))
    >>> pages = shape_of(model).pages()
    >>> with torch.no_grad(), pages.open(pages.new(1), 3) as step:
    ...     logits = model(torch.tensor([[1, 2, 3]]), **StepCache(step).as_argument()).logits
    ...     root, = step.commit()
    >>> pages.lengths([root]), logits.shape
    ([3], torch.Size([1, 3, 50257]))
    """

    def __init__(self, step: Step | PagedStep) -> None:
        super().__init__(PagedFeed(step) if isinstance(step, PagedStep) else DenseFeed(step))


class DenseFeed:
    """An open step that models attend to as to dense tensors."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.layers = len(step.layers)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.step.parents)

    @property
    def columns(self) -> int:
        """Columns filled in every layer."""
        return min(layer.size for layer in self.step.layers)

    def spans(self, new: int) -> tuple[int, int]:
        """All columns."""
        return self.columns + new, 0

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor, more: Any) -> Pair:
        """Append, and return all."""
        dense = self.step.layers[layer]
        dense.update(keys, values)
        return dense.get()

    def attend(self, layer: int, request: Request) -> torch.Tensor:
        """Raises UnpagedAttention: dense tensors are handed out, and never asked for."""
        raise UnpagedAttention("a dense step was asked to attend over pages")

    def read(self, layer: int) -> Pair:
        """All of a layer."""
        return self.step.layers[layer].get()


class PagedFeed:
    """A step that models attend to where its pages lie."""

    def __init__(self, step: PagedStep) -> None:
        self.step = step
        self.layers = len(step.layers)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.step.parents)

    @property
    def columns(self) -> int:
        """Tokens of the longest window."""
        return max(self.step.lengths, default=0)

    def spans(self, new: int) -> tuple[int, int]:
        """All columns, for which no mask is to be made."""
        return PagedLength(self.columns + new, new), 0

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor, more: Any) -> None:
        """Leave them to `attend`."""

    def attend(self, layer: int, request: Request) -> torch.Tensor:
        """Write new K/V into pages and attend."""
        return self.step.layers[layer].attend(
            request.queries,
            request.keys,
            request.values,
            scale=request.scale,
            window=request.window,
            soft_cap=request.soft_cap,
        )

    def read(self, layer: int) -> Pair:
        """Raises UnpagedAttention: there is no dense copy."""
        raise UnpagedAttention("the K/V of an open step lie in pages")


def attention_mask(step: Step, new: int) -> torch.Tensor:
    """Int64 [B, columns so far + new]: zero at the padding in front of a window."""
    before = step.mask()
    after = before.new_ones(before.shape[0], new)
    return torch.cat([before, after], dim=1).long()
