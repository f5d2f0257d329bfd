"""What a step asks of attention over pages, and what it says of its rows. No tensors in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Rows(NamedTuple):
    """What the rows of a step attend to: their windows as they are once the new tokens are in.

    Token i of row r lies in slot `tables[r][(start + i) // P] * P + (start + i) % P`. A table may
    hold more pages than its window needs.
    """

    tables: list[tuple[int, ...]]  # pages of each row, those of the new tokens included
    starts: list[int]  # offset of the first token in its first page
    lengths: list[int]  # tokens before the step
    counts: list[int]  # new tokens; rows may differ, and have none


class Attention(Protocol):
    """Attends the new tokens of one step, layer by layer. Made once for a step."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Attend queries [B, query heads, n, head_size] to the pages of a layer.

        The new keys and values of the layer are in the pages by then. Row r uses its first
        `counts[r]` columns; what is returned, [B, query heads, n, value_head_size], is zero in the
        others. Query j of row r is token `lengths[r] + j` and sees that one and those before it,
        with `window` only the last so many. Query heads are a multiple of the K/V heads: head h
        reads K/V head h // (their ratio). `scale` is 1 / sqrt(head_size) by default; `soft_cap` c
        makes a score s to c * tanh(s / c). Gradients do not pass.
        Raises BadArgument, BadCount, BadShape, BadDtype, BadDevice.
        """
